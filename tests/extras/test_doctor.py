"""The doctor: silent about healthy runs, and right about broken ones."""
import copy
import json
from math import nan
from pathlib import Path

import breaks
import pytest
from common import UserError
from tools import doctor

TINY = Path(__file__).parents[2] / "results" / "tiny"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_committed_runs_are_healthy(seed, capsys):
    """A limit inside the range of healthy runs: false alarms on the default run."""
    doctor.main(doctor.Config(str(TINY / f"seed{seed}")))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(": healthy: ")[0] for line in lines] == [
        "base", "sft", "labeler", "judge", "label", "reward", "dpo", "ppo", "evaluate"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return breaks.world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("broken", breaks.BREAKS, ids=lambda broken: broken.bug)
def test_a_bug_is_named(broken, world, tmp_path):
    """A classic bug under which training goes on, and that nobody is told of."""
    found = breaks.run(breaks.replace(world[broken.stage], out=str(tmp_path)), broken)
    assert [name for name in found if name != "stopped"][:1] == [broken.expected]  # in the first place


@pytest.mark.parametrize("stage, seed", [("reward", 2), ("dpo", 1), ("sft", 1), ("ppo", 1), ("ppo", 2), ("ppo", 3)])
def test_without_a_bug_nothing_is_named(stage, seed, world, tmp_path):
    """A doctor that finds faults everywhere names those of the broken runs, too."""
    none = breaks.Break("none", "", flags={"seed": seed}, stage=stage)
    assert breaks.run(breaks.replace(world[stage], out=str(tmp_path)), none) == {}


# ---- what no bug above shows, in a committed run whose numbers are changed -------------------------------------------


def put(metric, value, last=8):
    """A change of a record: this metric has that value in the last lines (0: in all)."""
    def change(record):
        for line in record.lines[-last:]:
            line[metric] = value
            if record.kind == "ppo" and metric in ("score", "kl"):
                line["rewards"] = line["score"] - line["kl_coef"] * line["kl"]
    return change


def put_file(name, *path, **values):
    """A change of the content of one of the stage's files."""
    def change(record):
        content = record.files[name]
        for key in path:
            content = content[key]
        content.update(values)
    return change


PPO_RESULTS = ("results.json", "policies", "ppo")
SNAPSHOT = ("results.json", "snapshots", "ppo", -1)
COUNTED = {"reward model": {"accuracy": 0.6, "interval": [0.58, 0.62]}, "bag of words": {"accuracy": 0.65},
           "longer wins": {"accuracy": 0.5}}
RARE = [  # symptom, stage, what makes a healthy record show it
    ("truncated responses", "sft", lambda record: record.truncated.append({"prompts": 0, "responses": 11, "of": 100})),
    ("another start", "ppo", lambda record: setattr(record, "same_start", False)),
    ("length grows", "ppo", put("length", 30.0)), ("length shrinks", "ppo", put("length", 3.0)),
    ("no EOS", "ppo", put("eos_rate", 0.1)), ("entropy collapse", "ppo", put("entropy", 0.5)),
    ("identical responses", "ppo", put("unique_responses", 0.3)), ("repetition", "ppo", put("repetition", 0.5)),
    ("value loss explodes", "ppo", put("value_loss", 9.0)), ("clip binds", "ppo", put("clip_fraction", 0.5)),
    ("worse than bag of words", "reward", put_file("report_card.json", **{"human comparisons": {"movie": COUNTED}})),
    ("labels are noise", "label", put_file("done.json", order_kept=0.5)),
    ("over-optimised", "evaluate", put_file(*SNAPSHOT, labeler=-1.0, proxy=9.0)),
    ("no better than SFT", "evaluate", put_file(*PPO_RESULTS, win_rate_judge_interval=[0.4, 0.49]))]
UNUSUAL = [  # what is unusual, and no finding yet
    (None, "sft", lambda record: record.truncated.append({"prompts": 50, "responses": 10, "of": 100})),
    (None, "ppo", put("sampler_difference", 0.04)), (None, "ppo", put("first_ratio_error", 0.09)),
    (None, "ppo", put("score", 0.9)), (None, "ppo", put("kl", 17.5)), (None, "ppo", put("kl_k3", 0.06)),
    (None, "ppo", put("length", 20.0)), (None, "ppo", put("length", 9.2)), (None, "ppo", put("eos_rate", 0.55)),
    (None, "ppo", put("entropy", 1.0)), (None, "ppo", put("unique_responses", 0.72)),
    (None, "ppo", put("repetition", 0.19)), (None, "ppo", put("explained_variance", 0.02)),
    (None, "ppo", put("clip_fraction", 0.5, 7)), (None, "ppo", put("value_loss", 1.4)),
    (None, "ppo", put("grad_norm", 9.5, 0)), (None, "reward", put("accuracy", 0.87)), (None, "sft", put("valid_loss", 4.925, 1)),
    (None, "label", put_file("done.json", order_kept=0.61)), (None, "dpo", put("chosen_logprobs", -66.0)),
    (None, "evaluate", put_file(*SNAPSHOT, labeler=-1.0, proxy=-1.0)),
    (None, "evaluate", put_file(*PPO_RESULTS, win_rate_judge_interval=[0.51, 0.6]))]


def names(record):
    return [name for name, _, _ in doctor.examine(record)]


@pytest.fixture(scope="session")
def committed():
    return {record.name: record for record in doctor.records(TINY / "seed1")}


@pytest.mark.parametrize("symptom, stage, change", RARE + UNUSUAL)
def test_limits(symptom, stage, change, committed):
    """A check that cannot fire, that fires for another metric's sake, or whose limit moved towards healthy runs."""
    record = copy.deepcopy(committed[stage])
    change(record)
    assert names(record) == [symptom] * bool(symptom)


@pytest.mark.parametrize("flags, change", [
    ({"whiten_rewards": True}, put("rewards", 5.0)), ({"kl_horizon": 0.0}, put("kl", 25.0)),
    ({"value_coef": 0.0}, put("explained_variance", -1.0)), ({"value": "none"}, put("explained_variance", -1.0)),
    ({"epochs": 1}, put("clip_fraction", 0.0, 0)), ({"missing_eos_score": nan}, put("eos_rate", 0.0, 0)),
    ({"iterations": 200}, put("explained_variance", -1.0)), ({"grad_clip": 10.0}, put("grad_norm", 40.0, 0))])
def test_flags_that_explain_what_is_seen(flags, change, committed):
    """A finding that is what the flags ask for; without the flag it is one."""
    with_flags, without = copy.deepcopy(committed["ppo"]), copy.deepcopy(committed["ppo"])
    with_flags.flags.update(flags)
    change(with_flags), change(without)
    assert names(with_flags) == [] != names(without)


def test_a_live_folder(tmp_path, committed, capsys):
    """A run under way taken for a finished one, its half-written last line for a damaged log; a symptom that the table
    does not explain; a finding that a script cannot see in the exit code."""
    ppo = committed["ppo"]
    (tmp_path / "ppo").mkdir()
    inputs = {"sft": "sha256 1", "reward": "sha256 2"}
    (tmp_path / "ppo" / "config.json").write_text(json.dumps({"stage": ppo.flags, "inputs": inputs}))
    lines = [json.dumps(line) + "\n" for line in ppo.lines[:12]]
    (tmp_path / "ppo" / "log.jsonl").write_text("".join(lines) + '{"iteration": 13, "ep')
    doctor.main(doctor.Config(str(tmp_path)))
    assert "ppo: healthy, not finished: iteration 12 of 32: kl 0.00 to " in capsys.readouterr().out
    with open(tmp_path / "ppo" / "log.jsonl", "w") as file:
        file.write("".join(lines).replace('"unique_responses": ', '"unique_responses": 0.1, "was": '))
    with pytest.raises(UserError, match="1 of 1 stages with findings") as stopped:
        doctor.main(doctor.Config(str(tmp_path / "ppo")))
    assert stopped.value.code == 1
    first, sample = capsys.readouterr().out.splitlines()[1:]
    assert first.startswith("ppo: identical responses: unique_responses: 0.10 at the beginning")
    assert "log.jsonl, iteration 10 to 12; healthy runs: 0.96 to 1.00, at the end 1.00)" in first and "Try: " in first
    assert sample.startswith("ppo: look at iteration 10: [") and set(doctor.SYMPTOMS) >= {name for name, *_ in RARE}
    with pytest.raises(UserError, match="no stage that the doctor knows"):
        doctor.main(doctor.Config(str(tmp_path.parent)))
