"""The whole pipeline through the real scripts, on a small made-up data set. No network."""
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import data
from prepare.reviews import save_ranks, train_bpe
from study import collect, record, walkthrough

ROOT = Path(__file__).parents[2]
RATED = "base sft labeler judge samples label reward dpo ppo evaluate".split()
# A service has no home, a notebook names a way to draw that is not installed here: neither must stop a run.
SURROUNDINGS = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "OMP_NUM_THREADS": "1",
                "PYTHON": sys.executable}


def start(folder, out, preset="smoke", *flags, **variables):
    """train_all.sh, started in another folder, with data and output in paths that hold a space."""
    env = {**os.environ, **SURROUNDINGS, "DATA": str(folder / "the data"), "OUT": str(folder / out), **variables}
    env.pop("HOME", None)
    return subprocess.Popen(["bash", ROOT / "train_all.sh", preset, *flags], cwd=folder, text=True, env=env,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def train_all(*args, code=0, **how):
    """What train_all.sh printed, once it has ended with this exit code."""
    process = start(*args, **how)
    text = process.communicate()[0]
    assert process.returncode == code, text[-3000:]
    return text


def finished(out):
    return sorted(path.parent.name for path in out.glob("*/done.json"))


def results(out):
    """What the evaluation found, without times, places and dates."""
    found = json.loads((out / "evaluate" / "results.json").read_text())
    same = ("policies", "snapshots", "reward_models", "best_of_n", "proxy_agreement", "others", "held_out_rankings")
    return {name: found[name] for name in same}, (out / "evaluate" / "samples.jsonl").read_text()


def make_data(folder):
    """Files as prepare.reviews and prepare.hh write them, of sentences drawn from few words."""
    draw, folder, files = random.Random(1), folder / "the data", {}
    folder.mkdir()

    def text():
        return f" {' '.join(draw.choices('good bad funny sad slow film plot actor was and very so'.split(), k=8))}."
    makers = {
        "corpus": lambda i: {"text": text()}, "prompts": lambda i: {"prompt": f"Film {i}{text()[:9]}"},
        "demos": lambda i: {"prompt": f"Film {i}", "completion": text()},
        "pairs": lambda i: {"prompt": f"Film {i}", "chosen": text() + "+", "rejected": text()},
        "rankings": lambda i: {"prompt": "", "responses": [f"{text()}{k}" for k in range(4)],
                               "means": [2.0, 1.0, 0.5, -1.0]}}
    for name in ("corpus_train corpus_valid corpus_test demos_train demos_valid rankings_labeler rankings_judge "
                 "rankings_test pairs_judge pairs_reward pairs_test prompts_label prompts_ppo prompts_eval "
                 "prompts_amazon").split():
        files[name] = [makers[name.split("_")[0]](i) for i in range(200 if name == "corpus_train" else 80)]
        data.write_jsonl(folder / f"{name}.jsonl", files[name])
    save_ranks(train_bpe([row["text"] for row in files["corpus_train"]], 300), folder / "vocab.tiktoken")
    agreement = {"movie": {"random": [0.8, 0.75], "close": [0.6, 0.6]}}
    (folder / "summary.json").write_text(json.dumps({"temperature": 0.8, "agreement": agreement}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, and one whole run, "smoke"."""
    make_data(folder := tmp_path_factory.mktemp("the pipeline"))
    train_all(folder, "smoke", RLOO="1")
    return folder


def test_every_stage_leaves_what_it_should(folder):
    """A stage that is skipped, a NaN in a log, a report whose pictures or figures are not there."""
    out = folder / "smoke"
    assert finished(out) == sorted([*RATED, "rloo"])
    for path in out.glob("*/log.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines and all(value == value for line in lines for value in line.values()), path
    found, report = results(out)[0], (out / "evaluate" / "report.md").read_text()
    assert list(found["policies"]) == ["sft", "best-of-4", "dpo", "ppo", "rloo"]
    assert set(found["others"]) == {"prompts_amazon"}
    assert all(f"{row['win_rate_judge']:.3f}" in report for name, row in found["policies"].items() if name != "sft")
    collect.main(collect.Config(str(out), f"{folder}/kept"))
    one = json.loads((folder / "kept/typical.json").read_text())
    samples = [json.loads(line) for line in (out / "evaluate/samples.jsonl").read_text().splitlines()]
    assert one["sft"] in [row["sft"] for row in samples if row["prompt"] == one["prompt"]]
    assert (folder / "kept/report.md").exists()
    pictures = set(re.findall(r"\]\((\S+?\.png)\)", report))
    assert pictures and all((out / "evaluate" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_what_is_refused(folder):
    """SEED=2 that shows the results of seed 1; a typing error that runs the default preset; flags that nobody reads."""
    assert "not seed 2" in train_all(folder, "smoke", code=2, SEED="2")
    assert "tinny" in train_all(folder, "none", "tinny", code=2)
    assert "smoke takes no flags" in train_all(folder, "none", "smoke", "smollm2", code=2)


@pytest.mark.parametrize("cuda", [True, False])
def test_a_larger_preset_is_named_where_cuda_is(tmp_path, cuda):
    """The line that nobody sees: a GPU trains the tiny models and its owner does not hear of smollm."""
    (tmp_path / "sitecustomize.py").write_text(f"import torch\ntorch.cuda.is_available = lambda: {cuda}\n")
    text = train_all(tmp_path, "out", "tiny", code=2, PYTHONPATH=str(tmp_path))  # there is no data
    assert ("train_all.sh smollm" in text.partition("== base")[0]) == cuda


def test_killed_and_started_again_it_ends_the_same(folder):
    """A kill that costs the run or changes its result; a signal to the shell that leaves its stage running."""
    for stage, number in (("base", signal.SIGKILL), ("labeler", signal.SIGTERM)):
        shell = start(folder, "killed")
        for sign in (f"== {stage}\n", " threads | "):  # the second: its folder is open, and its training begins
            assert any(sign in line for line in iter(shell.stdout.readline, "")), f"{stage} did not begin"
        os.killpg(shell.pid, number) if number == signal.SIGKILL else shell.send_signal(number)
        text = shell.communicate()[0]
        assert shell.returncode == (-9 if number == signal.SIGKILL else 143), text
        if number == signal.SIGTERM:
            with pytest.raises(ProcessLookupError):  # nothing outlives the shell
                os.killpg(shell.pid, 0)
    text = train_all(folder, "killed", RLOO="1")
    assert "another run" not in text and text.count("finished already") == 2
    assert results(folder / "killed") == results(folder / "smoke")


def test_without_standard_streams_it_runs(folder):
    """A script that dies of its first line under a service that has closed standard input, output and error."""
    command = 'exec "$0" "$1" --max-steps 2 --vocab "$2/vocab.tiktoken" --train "$2/corpus_train.jsonl" ' \
              '--valid "$2/corpus_valid.jsonl" --out "$3" <&- >&- 2>&-'
    subprocess.run(["bash", "-c", command, sys.executable, ROOT / "sft.py", folder / "the data", folder / "closed"],
                   check=True)
    assert (folder / "closed" / "done.json").exists()


def test_another_run_is_recorded_and_shown(folder):
    """record.py that no longer repeats what ppo.py does, or a page that only fits the committed numbers."""
    out, page = folder / "smoke", (ROOT / "docs/walkthrough.md").read_text()
    once, twice = (record.main(out, folder / name) or (folder / name).read_text() for name in ("once", "twice"))
    found, headings = json.loads(once), re.compile("^#.*", re.MULTILINE)
    assert once == twice and found["response"]["new_logprobs"] != found["response"]["old_logprobs"]
    for name in ("score", "kl"):
        assert found["rollout"][name] == pytest.approx(found["log"][0][name], abs=1e-5) != 0
    shown = walkthrough.page_text(found)
    assert headings.findall(shown) == headings.findall(page) and "nan" not in shown


def test_what_changed_runs_again_and_what_follows(folder):
    """Finished stages that are trained anew; a policy of other prompts than those that are there now."""
    before = {path: path.stat().st_mtime_ns for path in (folder / "smoke").glob("*/model.pt")}
    with open(folder / "the data" / "prompts_ppo.jsonl", "a") as file:
        file.write('{"prompt": "Another one"}\n')
    text = train_all(folder, "smoke")
    assert text.count("finished already") == len(RATED) - 2
    assert "ppo is overwritten: --prompts was" in text and "evaluate is overwritten: --policies was" in text
    assert [path.parent.name for path, when in before.items() if path.stat().st_mtime_ns != when] == ["ppo"]
