"""The doctor: silent about healthy runs, and right about broken ones."""
import ast
import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import breaks
import doctor
import symptoms
from common import UserError
from symptoms import SYMPTOMS, examine

ROOT = Path(__file__).parents[1]
TINY = ROOT / "results" / "tiny"


def names(record):
    """The symptoms that the doctor finds."""
    return [name for name, _, _ in examine(record)]


def found(folder):
    """{stage: its symptoms}, of the stages that have any."""
    return {record.name: names(record) for record in doctor.records(folder) if names(record)}


# ---- runs that were really made --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_committed_runs_are_healthy(seed):
    """A limit inside the range of healthy runs: false alarms on the default run."""
    assert found(TINY / f"seed{seed}") == {}
    kinds = {record.name: record.kind for record in doctor.records(TINY / f"seed{seed}")}
    assert kinds.items() >= {"base": "sft", "sft": "sft", "labeler": "reward", "judge": "reward", "reward": "reward",
                             "label": "label", "dpo": "dpo", "ppo": "ppo", "evaluate": "evaluate"}.items()


@pytest.mark.parametrize("stage, symptom", [
    ("free-all", "KL runs away"), ("free-250", "KL runs away"), ("reward-250", "learned by heart"),
    ("dpo-beta0.05", "chosen falls"), ("ppo-kl3", None), ("ppo-kl12", None), ("ppo-exact", None), ("dpo-beta1", None)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_runs_of_the_study(seed, stage, symptom):
    """Blind to real runs that went wrong (no leash, 250 comparisons, a small beta), or alarmed by another KL target."""
    record, = doctor.records(TINY / f"seed{seed}" / "study" / stage)
    assert symptom in names(record) if symptom else names(record) == []


def test_real_over_optimisation_is_seen():
    """The run of the study where the labeler falls below SFT while the proxy climbs (seed 2, 250 comparisons)."""
    record, = doctor.records(TINY / "seed2" / "study" / "over-250")
    assert "over-optimised" in names(record)


# ---- bugs put in on purpose ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return breaks.world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("broken", breaks.BREAKS, ids=lambda broken: broken.bug)
def test_a_bug_is_named(broken, world, tmp_path):
    """A classic bug under which training goes on, and that nobody is told of."""
    assert broken.expected in breaks.run(breaks.replace(world[broken.stage], out=str(tmp_path)), broken)


@pytest.mark.parametrize("stage", ["reward", "ppo", "dpo", "sft"])
@pytest.mark.parametrize("seed", [1, 2])
def test_without_a_bug_nothing_is_named(stage, seed, world, tmp_path):
    """A doctor that finds faults everywhere names those of the broken runs, too."""
    none = breaks.Break("none", "", stage=stage, flags={"seed": seed})
    assert breaks.run(breaks.replace(world[stage], out=str(tmp_path)), none) == {}


def test_the_page_of_bugs_is_about_these():
    """docs/faults.md left behind when bugs or symptoms change their names."""
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| \w+ \| (.+?) \|$", page, re.M))
    for broken in breaks.BREAKS:
        assert broken.expected in rows[broken.bug].split(", ")
    assert all(f"| {bug} | `{test}` |" in page for bug, (_, _, test) in breaks.UNSEEN.items())
    assert all((ROOT / "ppo.py").read_text().count(old) == 1 for old, _, _ in breaks.UNSEEN.values())


# ---- each symptom by itself ------------------------------------------------------------------------------------------


def record_of(stage, seed=1):
    """A committed stage, to be changed."""
    return copy.deepcopy(next(record for record in doctor.records(TINY / f"seed{seed}") if record.name == stage))


def put(metric, value, last=8):
    """A change of a record: this metric has that value in the last lines (0: in all)."""
    def change(record):
        for line in record.lines[-last:] if last else record.lines:
            line[metric] = value(line) if callable(value) else value
    return change


def put_card(**changes):
    return lambda record: record.card["held-out rankings"].update(changes)


def put_human(record):
    for row in record.card["human comparisons"].values():
        row["reward model"] = {"accuracy": 0.5, "interval": [0.48, 0.52], "pairs": 2000}


ALONE = {  # symptom: (stage, what makes a healthy record show it)
    "stopped": ("ppo", lambda record: record.stop.update(stopped="KL is 61 nats per response")),
    "sampler differs": ("ppo", put("sampler_difference", 0.2)),
    "first ratio": ("ppo", put("first_ratio_error", 0.3)),
    "negative KL": ("ppo", lambda record: [put("kl", -0.5, 0)(record), put("kl_coef", 0.2, 0)(record), put(
        "rewards", lambda line: line["score"] - line["kl_coef"] * line["kl"], 0)(record)]),
    "rewards do not add up": ("ppo", put("rewards", lambda line: line["score"] + line["kl_coef"] * line["kl"])),
    "wrong way": ("ppo", lambda record: [line.update(kl_coef=0.2 + 0.01 * i, rewards=line["score"] - (
        0.2 + 0.01 * i) * line["kl"]) for i, line in enumerate(record.lines)] + [put("kl", 1.0, 0)(record), put(
            "rewards", lambda line: line["score"] - line["kl_coef"] * line["kl"], 0)(record)]),
    "first scores off": ("ppo", lambda record: record.lines[0].update(score=1.2, rewards=1.2)),
    "another start": ("ppo", lambda record: (setattr(record, "reward_start", "sha256 1"),
                                             setattr(record, "inputs", {"sft": "sha256 2"}))),
    "flat score": ("ppo", lambda record: [put("score", 0.3, 0)(record), put("rewards", lambda line: (
        0.3 - line["kl_coef"] * line["kl"]), 0)(record)]),
    "KL stays at 0": ("ppo", put("kl_k3", 0.001)),
    "KL runs away": ("ppo", lambda record: [put("kl", 30.0)(record), put("kl_coef", 0.2)(record), put(
        "rewards", lambda line: line["score"] - 0.2 * 30)(record)]),
    "length grows": ("ppo", put("length", 30.0)), "length shrinks": ("ppo", put("length", 3.0)),
    "no end of text": ("ppo", put("end_rate", 0.1)), "entropy collapse": ("ppo", put("entropy", 0.5)),
    "identical responses": ("ppo", put("distinct", 0.3)), "repetition": ("ppo", put("repetition", 0.5)),
    "value loss explodes": ("ppo", put("value_loss", 9.0)),
    "values explain nothing": ("ppo", put("explained_variance", -0.5)),
    "clip binds": ("ppo", put("clip_fraction", 0.5)), "clip never binds": ("ppo", put("clip_fraction", 0.0, 0)),
    "gradient far above the clip": ("ppo", put("grad_norm", 40.0, 0)),
    "near chance": ("reward", lambda record: [put_card(accuracy=0.5, interval=[0.45, 0.55])(record), put(
        "accuracy", 0.52)(record)]),
    "no better than words": ("reward", put_human),
    "learned by heart": ("reward", put("accuracy", 0.99)),
    "not learning": ("reward", put("loss", 0.7, 0)),
    "labels are noise": ("label", lambda record: record.facts.update(order_kept=0.5)),
    "over-fitted": ("sft", lambda record: record.lines[-1].update(test_loss=9.0)),
    "chosen falls": ("dpo", put("chosen_logprobs", -150.0)),
    "margins not 0 at first": ("dpo", lambda record: record.lines[0].update(loss=1.2)),
    "over-optimised": ("evaluate", lambda record: record.results["snapshots"]["ppo"][-1].update(
        labeler=-1.0, proxy=9.0)),
    "no better than SFT": ("evaluate", lambda record: record.results["policies"]["ppo"].update(
        win_rate_judge_interval=[0.4, 0.49])),
}


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_each_symptom_alone(symptom):
    """A check that can't fire, or that fires for another metric's sake."""
    stage, change = ALONE[symptom]
    record = record_of(stage)
    change(record)
    assert names(record) == [symptom]


def test_short_runs_are_not_judged_by_what_takes_time():
    """A smoke run called broken, as three rollouts have learned nothing; a wrong sign shows even there."""
    record = record_of("ppo")
    record.lines = record.lines[:2]
    put("clip_fraction", 0.0)(record)
    put("explained_variance", -3.0)(record)
    assert names(record) == []
    put("first_ratio_error", 0.4)(record)
    assert names(record) == ["first ratio"]


# ---- the command -----------------------------------------------------------------------------------------------------


def ask(folder):
    """python doctor.py FOLDER"""
    return subprocess.run([sys.executable, str(ROOT / "doctor.py"), str(folder)], capture_output=True, text=True)


def test_lines_and_exit_codes(tmp_path):
    """A finding that a script can't see, or that does not say where, what for, and compared with what."""
    healthy = ask(TINY / "seed1")
    assert healthy.returncode == 0 and all(": healthy" in line for line in healthy.stdout.splitlines())
    lines = healthy.stdout.splitlines()
    assert [line.split(":")[0] for line in lines][:4] == ["base", "sft", "labeler", "judge"]  # as they are made
    sick = ask(TINY / "seed1" / "study" / "free-all")
    first = sick.stdout.splitlines()[0]
    assert sick.returncode == 1 and first.startswith("free-all: KL runs away: kl: up to ")
    assert re.search(r"free-all/log\.jsonl, iteration \d+ to 32; healthy runs: 0\.00 to \d", first) and "Try: " in first
    assert sick.stdout.splitlines()[-1] == "1 stage with findings" and sick.stderr == ""


@pytest.mark.parametrize("damage, message", [
    (None, "no such folder"), ("", "no log.jsonl that the doctor knows"), ("[1]\n{}\n", "not a line of a log"),
    ('{"iteration": 1, "kl": "x"}\n{}\n', "no number"), ('{"iteration": 1, "kl": NaN}\n', "no number"),
    ('{"iteration": 1, "kl": 1.0}\n' * 9, "damaged, or of another version"),
    ('{"iteration": 1\n{"iteration": 2}\n', "not a line of a log")])
def test_damaged_logs(tmp_path, damage, message):
    """A traceback from a file that was cut, edited or mistaken for a log."""
    if damage is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.jsonl").write_text(damage)
    asked = ask(tmp_path / "run")
    assert asked.returncode == 2 and message in asked.stderr and asked.stderr.count("\n") == 1


def test_a_line_that_was_cut_is_left_out(tmp_path):
    """A run that is still under way, or that was killed in the middle of a line, can't be asked about."""
    text = (TINY / "seed1" / "ppo_log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text[:-200])
    record, = doctor.records(tmp_path)
    assert len(record.lines) == 31 and names(record) == []


def test_a_reward_model_that_skipped_sft(tmp_path):
    """The reward model's start read from the wrong place, or compared by its path."""
    for stage, inputs in {"reward": {"model": "sha256 base"}, "ppo": {"sft": "sha256 sft"}}.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.json").write_text(json.dumps({
            "stage": {"reward": "elsewhere/reward"} if stage == "ppo" else {}, "inputs": inputs}))
        (tmp_path / stage / "log.jsonl").write_text((TINY / "seed1" / f"{stage}_log.jsonl").read_text())
    assert found(tmp_path) == {"ppo": ["another start"]}
    with pytest.raises(UserError, match="cannot be read"):
        (tmp_path / "reward" / "config.json").write_text("{")
        doctor.records(tmp_path)


# ---- its pages -------------------------------------------------------------------------------------------------------


def test_every_symptom_is_looked_for():
    """A symptom in the table that no code finds, or a finding without advice."""
    texts = {node.value for node in ast.walk(ast.parse(Path(symptoms.__file__).read_text().split("\n}\n")[1]))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert set(SYMPTOMS) - {"length grows", "length shrinks"} <= texts  # these two are put together
    assert set(ALONE) == set(SYMPTOMS)


def test_metrics_page_is_of_now():
    """Ranges or limits on docs/metrics.md that are not those of the committed runs and of the doctor."""
    made = subprocess.run([sys.executable, str(ROOT / "docs" / "metrics.py")], capture_output=True, text=True)
    assert made.stdout == (ROOT / "docs" / "metrics.md").read_text()


def test_every_metric_is_explained():
    """A number in a log that docs/metrics.md does not explain."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    for title, stage in [("PPO", "ppo"), ("Reward model", "reward"), ("DPO", "dpo"), ("SFT and base", "sft")]:
        section = page.split(f"## {title}\n")[1].split("\n## ")[0]
        lines = (TINY / "seed1" / f"{stage}_log.jsonl").read_text().splitlines()
        keys = {key for line in lines for key in json.loads(line)}
        assert {key for key in keys if f"| `{key}` |" not in section} == set()
