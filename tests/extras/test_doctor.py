"""The doctor: silent about healthy runs, and right about broken ones."""
import copy
import functools
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


# ---- each limit by itself, in a committed run whose numbers are changed ----------------------------------------------


@pytest.fixture(scope="session")
def committed():
    return {record.name: record for record in doctor.records(TINY / "seed1")}


def names(record):
    return [name for name, _, _ in doctor.examine(record)]


def changed(record, metric, value, last=8):
    """A record with another value of a metric in its last lines (0: in all), or at a place in its files."""
    record = copy.deepcopy(record)
    *path, name = metric.split(": ")
    for line in [functools.reduce(dict.get, path, record.files)] if path else record.lines[-last:]:
        line[name] = value
        if metric in ("score", "kl", "eos_rate"):
            line["rewards"] = line["score"] - line["kl_coef"] * line["kl"]
    return record


ROW = {"reward model": {"interval": [0.58, 0.62]}, "bag of words": {"accuracy": 0.65}, "longer wins": {"accuracy": 0.5}}
LIMITS = [  # symptom, stage, metric, a value that shows it, one that is unusual and no finding yet
    ("sampler differs", "ppo", "sampler_difference", 0.2, 0.04), ("first ratio", "ppo", "first_ratio_error", 0.3, 0.09),
    ("KL runs away", "ppo", "kl", 30.0, 17.5), ("KL stays at 0", "ppo", "kl_k3", 0.001, 0.06),
    ("flat score", "ppo", "score", 0.2, 0.9), ("entropy collapse", "ppo", "entropy", 0.5, 1.0),
    ("length grows", "ppo", "length", 30.0, 20.0), ("length shrinks", "ppo", "length", 3.0, 9.2),
    ("no EOS", "ppo", "eos_rate", 0.1, 0.55), ("identical responses", "ppo", "unique_responses", 0.3, 0.72),
    ("repetition", "ppo", "repetition", 0.5, 0.19), ("clip binds", "ppo", "clip_fraction", 0.5, 0.29),
    ("values explain nothing", "ppo", "explained_variance", -0.5, 0.02),
    ("value loss explodes", "ppo", "value_loss", 9.0, 1.4), ("memorised", "reward", "accuracy", 0.99, 0.87),
    ("worse than bag of words", "evaluate", "results.json: reward_models: proxy", {"a, random": ROW}, {"a, gap": ROW}),
    ("chosen falls", "dpo", "chosen_logprobs", -150.0, -66.0), ("labels are noise", "label", doctor.KEPT, 0.5, 0.61),
    ("no better than SFT", "evaluate", f"{doctor.WINS}_interval", [0.4, 0.49], [0.51, 0.6])]


@pytest.mark.parametrize("symptom, stage, metric, sick, unusual", LIMITS)
def test_limits(symptom, stage, metric, sick, unusual, committed):
    """A check that cannot fire, that fires for another metric's sake, or whose limit moved towards healthy runs."""
    assert names(changed(committed[stage], metric, sick)) == [symptom]
    assert names(changed(committed[stage], metric, unusual)) == []


@pytest.mark.parametrize("flags, metric, value", [
    ({"whiten_rewards": True}, "rewards", 5.0), ({"kl_horizon": 0.0}, "kl", 25.0),
    ({"value_coef": 0.0}, "explained_variance", -1.0), ({"value": "none"}, "explained_variance", -1.0),
    ({"epochs": 1}, "clip_fraction", 0.0), ({"missing_eos_score": nan}, "eos_rate", 0.0),
    ({"iterations": 200}, "explained_variance", -1.0), ({"grad_clip": 10.0}, "grad_norm", 40.0)])
def test_flags_that_explain_what_is_seen(flags, metric, value, committed):
    """A finding that is what the flags ask for; without the flag it is one."""
    without = changed(committed["ppo"], metric, value, 0 if metric in ("clip_fraction", "eos_rate", "grad_norm") else 8)
    with_flags = copy.deepcopy(without)
    with_flags.flags.update(flags)
    assert names(with_flags) == [] != names(without)


def test_what_is_in_no_metric(committed):
    """Responses without EOS that nobody is told of; over-optimisation that is missed, or seen in what is chance."""
    sft, ppo, evaluation = (copy.deepcopy(committed[name]) for name in ("sft", "ppo", "evaluate"))
    sft.truncated = [{"prompts": 50, "responses": 10, "of": 100}]
    assert names(sft) == []
    sft.truncated[0]["responses"], ppo.same_start = 11, False
    assert names(sft) == ["truncated responses"] and names(ppo) == ["another start"]
    last = evaluation.files["results.json"]["snapshots"]["ppo"][-1]
    last.update(labeler=-1.0, proxy=-1.0)
    assert names(evaluation) == []
    last["proxy"] = 9.0
    assert names(evaluation) == ["over-optimised"]
    evaluation.files["results.json"]["config"]["snapshot_count"] = 1  # of one prompt
    assert names(evaluation) == []


def test_a_live_folder(tmp_path, committed, capsys):
    """A run under way taken for a finished one, its half-written last line for a damaged log; a finding that no script
    can see in the exit code, or that does not say where, and compared with what."""
    (tmp_path / "ppo").mkdir()
    facts = {"stage": committed["ppo"].flags, "inputs": {"sft": "sha256 1", "reward": "sha256 2"}}
    (tmp_path / "ppo" / "config.json").write_text(json.dumps(facts))
    log = "".join(json.dumps(line) + "\n" for line in committed["ppo"].lines[:12])
    (tmp_path / "ppo" / "log.jsonl").write_text(log + '{"iteration": 13, "ep')
    doctor.main(doctor.Config(str(tmp_path)))
    assert "ppo: healthy, not finished: iteration 12 of 32: kl 0.00 to " in capsys.readouterr().out
    (tmp_path / "ppo" / "log.jsonl").write_text(log.replace('"unique_responses": ', '"unique_responses": 0.1, "was": '))
    with pytest.raises(UserError, match="1 of 1 stages with findings") as stopped:
        doctor.main(doctor.Config(str(tmp_path / "ppo")))
    finding, sample = capsys.readouterr().out.splitlines()[1:]
    assert stopped.value.code == 1 and finding.startswith("ppo: identical responses: unique_responses: 0.10 at ")
    assert "iteration 10 to 12; healthy runs: 0.96 to 1.00, at the end 1.00)" in finding and "Try: " in finding
    assert sample.startswith("ppo: look at iteration 10: [")
    with pytest.raises(UserError, match="no stage that the doctor knows"):
        doctor.main(doctor.Config(str(TINY)))
