"""The whole pipeline through the real scripts, on a small data set in the real format. No network."""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import faults
import reviews
from test_reviews import pack, small_source

ROOT = Path(__file__).parent.parent


def train_all(folder, preset="smoke", *flags, script="train_all.sh", **variables):
    """bash train_all.sh from another folder, with its data and output in paths that hold a space."""
    return subprocess.run(["bash", str(ROOT / script), preset, *flags], cwd=folder, capture_output=True, text=True,
                          timeout=300,
                          env={**os.environ, "PYTHON": sys.executable, "DATA": str(folder / "the data"),
                               "OUT": str(folder / "the output"), **variables})


def prepare(folder):
    """A small data set in the real format, in folder/the data."""
    data = folder / "the data"
    data.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reviews, "SHA256", pack(data / reviews.ARCHIVE, small_source()))
        reviews.prepare(data, vocab_size=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, output) of one whole run."""
    folder = tmp_path_factory.mktemp("pipeline")
    prepare(folder)
    result = train_all(folder)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder, result.stdout


def test_every_stage_finishes_and_logs(finished):
    """A stage that is skipped, or that dies without stopping the script."""
    out = finished[0] / "the output"
    stages = ["base", "sft", "labeler", "judge", "samples", "label", "reward", "dpo", "ppo", "evaluate"]
    assert sorted(path.parent.name for path in out.glob("*/done.json")) == sorted(stages)
    for stage in ("base", "sft", "labeler", "judge", "reward", "dpo", "ppo"):
        lines = [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]
        assert lines and all(value == value for line in lines for value in line.values()), f"{stage}: NaN in the log"


def test_results_hold_what_the_report_shows(finished):
    """A figure in the report that does not come from results.json, or a broken link to a picture."""
    folder = finished[0] / "the output" / "evaluate"
    results, text = json.loads((folder / "results.json").read_text()), (folder / "report.md").read_text()
    assert list(results["policies"]) == ["sft", "best-of-4", "dpo", "ppo"] and results["policies"]["sft"]["kl"] == 0
    for name in ("best-of-4", "dpo", "ppo"):
        row = results["policies"][name]
        low, high = row["win_rate_judge_interval"]
        assert 0 <= low <= row["win_rate_judge"] <= high <= 1
        assert f"| {name} | {row['win_rate_judge']:.3f} ({low:.3f} to {high:.3f}) |" in text
        assert f"| {row['kl']:.2f} |" in text
    assert {"hardware", "date", "stages", "reward_models", "snapshots"} <= set(results)
    assert set(results["others"]) == {"prompts_amazon", "prompts_nyt", "prompts_tweets"}
    assert results["reward_models"] and set(results["held_out_rankings"]) == {"proxy", "dpo"}
    pictures = {"frontier.png", "ppo_curves.png", "ppo_kl.png", "ppo_histograms.png", "dpo_curves.png",
                "dpo_histograms.png"}
    assert pictures == {path.name for path in folder.glob("*.png")} == set(re.findall(r"\]\((.*?)\)", text))
    assert all((folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_the_report_is_drawn_from_its_results_alone(finished, tmp_path):
    """A figure that can't be drawn again once the models are gone."""
    folder = finished[0] / "the output" / "evaluate"
    shutil.copy(folder / "results.json", tmp_path)
    result = subprocess.run([sys.executable, str(ROOT / "report.py"), str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for made in [*folder.glob("*.png"), folder / "report.md"]:
        assert (tmp_path / made.name).read_bytes() == made.read_bytes()


def test_the_doctor_finds_it_healthy(finished):
    """False alarms on a smoke run, which has learned next to nothing."""
    asked = subprocess.run([sys.executable, str(ROOT / "doctor.py"), str(finished[0] / "the output")],
                           capture_output=True, text=True)
    assert asked.returncode == 0 and asked.stdout.count(": healthy") == 9, asked.stdout + asked.stderr


def test_finished_stages_are_not_run_again(finished):
    """A rerun that trains everything anew, or that overwrites a finished stage."""
    out = finished[0] / "the output"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    result = train_all(finished[0])
    assert result.returncode == 0 and result.stdout.count("finished already") == 10
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_what_changed_runs_again_and_what_follows(finished):
    """A policy trained on other prompts than those that are there now, or a report on a policy that is gone."""
    with open(finished[0] / "the data" / "prompts_ppo.jsonl", "a") as file:
        file.write('{"prompt": "Another one"}\n')
    result = train_all(finished[0])
    assert result.returncode == 0 and result.stdout.count("finished already") == 8
    ppo, evaluate = (finished[0] / "the output" / name for name in ("ppo", "evaluate"))
    assert f"{ppo} is begun again: --prompts was sha256" in result.stdout
    assert f"{evaluate} is begun again: --policies was sha256" in result.stdout


def test_killed_and_started_again_it_ends_the_same(finished):
    """A kill that costs the run, or changes its result; a signal to the shell that leaves its stage running (then the
    folder stays locked)."""
    folder, breaks = finished[0], [("labeler", signal.SIGKILL), ("ppo", signal.SIGTERM)]
    text = faults.break_pipeline(folder, "killed", breaks, random.Random(1))
    assert "another run" not in text and text.count("finished already") >= 2 + 8
    assert faults.results_of(folder, "killed") == faults.results_of(folder, "the output")


def test_another_seed_needs_another_folder(finished):
    """SEED=2 that shows the report of seed 1."""
    result = train_all(finished[0], SEED="2")
    assert result.returncode == 2 and "seed 1, smoke" in result.stderr and "not seed 2" in result.stderr


def test_unknown_preset(tmp_path):
    """A typing error that silently runs the default preset."""
    result = train_all(tmp_path, preset="tinny")
    assert result.returncode == 2 and "tinny" in result.stderr
    result = train_all(tmp_path, "smoke", "--init", "gpt2")
    assert result.returncode == 2 and "smoke takes no flags" in result.stderr


def test_other_labelers(finished):
    """labelers.sh: a labeler that is left out without a word, or a report that does not compare."""
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not there: pip install -r tests/requirements.txt")
    out = finished[0] / "the output"
    few, many = out / "label-few words", out / "label-ann"
    rankings = (out / "label" / "rankings.jsonl").read_text().splitlines()
    for folder, lines in ((few, rankings[:3]), (many, rankings[3:])):
        folder.mkdir()
        (folder / "rankings.jsonl").write_text("".join(line + "\n" for line in lines))
    result = train_all(finished[0], script="labelers.sh")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "label-few words/rankings.jsonl has fewer than 10 rankings: left out" in result.stdout
    results = json.loads((out / "labelers" / "results.json").read_text())
    assert set(results["labelers"]) == {"ppo", "ppo-ann", "ppo-vader"}
    assert "## Who ranked" in (out / "labelers" / "report.md").read_text()
    facts = json.loads((out / "agreement" / "report.json").read_text())
    assert set(facts["labelers"]) == {"labeler", "vader"}


def test_sample_with_scores(finished):
    """sample.py that cannot read a checkpoint of the pipeline, or that does not put the best first."""
    out = finished[0] / "the output"
    result = subprocess.run([sys.executable, str(ROOT / "sample.py"), str(out / "ppo"), "the film", "--count", "4",
                             "--reward", str(out / "reward"), "--response-tokens", "8"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    scores = [float(line.split()[0]) for line in result.stdout.splitlines() if "the film" in line]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)


def test_the_win_rate_can_be_a_gate(finished):
    """--min-win-rate that never fails."""
    out = finished[0] / "the output"
    flags = [f"--{name}={out / name}" for name in ("sft", "reward", "labeler", "judge")]
    data = finished[0] / "the data"
    result = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "--preset", "smoke", *flags,
                             f"--policies={out / 'ppo'}",
                             f"--prompts={data / 'prompts_eval.jsonl'}", f"--text={data / 'corpus_test.jsonl'}",
                             f"--out={finished[0] / 'gate'}", "--min-win-rate", "1.01"], capture_output=True, text=True)
    assert result.returncode == 1 and "below --min-win-rate" in result.stderr
