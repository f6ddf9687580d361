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
    names = ["base", "dpo", "evaluate", "judge", "label", "labeler", "ppo", "reward", "rloo", "sft"]
    assert sorted(capsys.readouterr().out.splitlines()) == [f"{name}: healthy" for name in names]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return breaks.world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("broken", breaks.BREAKS, ids=lambda broken: broken.bug)
def test_a_bug_is_named(broken, world, tmp_path):
    """A classic bug under which training goes on, and that nobody is told of."""
    found = breaks.run(breaks.replace(world[broken.stage], out=str(tmp_path)), broken)
    assert [name for name in found if name != "stopped"][:1] == [broken.expected]  # in the first place


@pytest.mark.parametrize("stage, flags", [
    ("reward", {"seed": 2}), ("dpo", {}), ("sft", {}), ("ppo", {}), ("ppo", {"advantages": "rloo"}),
    ("ppo", {"advantages": "grpo"}), ("ppo", {"value": "none"})], ids=str)
def test_without_a_bug_nothing_is_named(stage, flags, world, tmp_path):
    """A doctor that finds faults everywhere names those of the broken runs, too; one that stops without a metric."""
    none = breaks.Break("none", "", flags=flags, stage=stage)
    assert breaks.run(breaks.replace(world[stage], out=str(tmp_path)), none) == {}


@pytest.fixture(scope="session")
def committed():
    return {record.name: record for record in doctor.records(TINY / "seed1")}


def names(record):
    return [name for name, _, _ in doctor.examine(record)]


def changed(record, metric, value, last=8):
    """A record with another value of a metric in its last lines (0: all), or at a place in its files."""
    record = copy.deepcopy(record)
    *path, name = metric.split(": ")
    for line in [functools.reduce(dict.get, path, record.files)] if path else record.lines[-last:]:
        line[name] = value
        if metric in ("score", "kl", "eos_rate"):
            line["rewards"] = line["score"] - line["kl_coef"] * line["kl"]
    return record


@pytest.mark.parametrize("symptom, stage, metric, sick, unusual", [  # a value that shows it, one that is no finding yet
    ("sampler differs", "ppo", "sampler_difference", 0.2, 0.04), ("first ratio", "ppo", "first_ratio_error", 0.3, 0.09),
    ("KL runs away", "ppo", "kl", 30.0, 17.5), ("KL stays at 0", "ppo", "kl_k3", 0.001, 0.06),
    ("length changes", "ppo", "length", 30.0, 20.0), ("length changes", "ppo", "length", 3.0, 9.2),
    ("flat score", "ppo", "score", 0.2, 0.9), ("values explain nothing", "ppo", "explained_variance", -0.5, 0.02),
    ("no EOS", "ppo", "eos_rate", 0.1, 0.55), ("identical responses", "ppo", "unique_responses", 0.3, 0.72),
    ("repetition", "ppo", "repetition", 0.5, 0.19), ("clip binds", "ppo", "clip_fraction", 0.5, 0.29),
    ("memorised", "reward", "accuracy", 0.99, 0.87),
    ("chosen falls", "dpo", "chosen_logprobs", -150.0, -63.0), ("labels are noise", "label", doctor.KEPT, 0.5, 0.61),
    ("no better than SFT", "evaluate", f"{doctor.WINS}_interval", [0.4, 0.49], [0.51, 0.6])])
def test_limits(symptom, stage, metric, sick, unusual, committed):
    """A check that cannot fire, that fires for another metric's sake, or whose limit moved towards healthy runs."""
    assert names(changed(committed[stage], metric, sick)) == [symptom]
    assert names(changed(committed[stage], metric, unusual)) == []


@pytest.mark.parametrize("flags, metric, value, last", [
    ({"whiten_rewards": True}, "rewards", 5.0, 8), ({"kl_horizon": 0.0}, "kl", 25.0, 8),
    ({"value": "none"}, "explained_variance", -1.0, 8), ({"epochs": 1}, "clip_fraction", 0.0, 0),
    ({"missing_eos_score": nan}, "eos_rate", 0.0, 0), ({"grad_clip": 10.0}, "grad_norm", 40.0, 0)])
def test_flags_that_explain_what_is_seen(flags, metric, value, last, committed):
    """A finding that is what the flags ask for; without the flag it is one."""
    without = changed(committed["ppo"], metric, value, last)
    with_flags = copy.deepcopy(without)
    with_flags.flags.update(flags)
    assert names(with_flags) == [] != names(without)


@pytest.mark.parametrize("kind, advantages, equal, last, expected", [
    ("rloo", 0.8, 0.0, 0, []), ("rloo", 0.6, 0.0, 0, ["group baseline off"]), ("rloo", 0.6, 0.0, 7, []),
    ("rloo", 0.83, 0.3, 8, ["group baseline off"]), ("grpo", 0.99, 0.0, 0, []), ("grpo", 0.75, 0.25, 0, []),
    ("grpo", 0.92, 0.0, 8, ["group baseline off"]), ("grpo", 1.15, 0.4, 0, ["group baseline off"]),
    ("grpo", 0.99, 0.48, 8, []), ("grpo", 0.99, 0.6, 8, ["groups without signal"]), ("gae", 0.6, 0.0, 0, [])])
def test_groups(kind, advantages, equal, last, expected, committed):
    """A wrong baseline missed, or seen where responses are equal and in single rollouts; groups asked of GAE."""
    record = changed(committed["ppo"], "group_std", 0.6, 0)
    right = changed(record, "advantage_group_std", 0.8 if kind == "rloo" else 1.0, 0)
    right.flags.update(advantages=kind, group=4)
    assert names(changed(changed(right, "advantage_group_std", advantages, last), "equal_groups", equal, 0)) == expected


@pytest.mark.parametrize("end, deviation, expected", [
    (0.95, 0.2, []), (0.83, 0.38, ["flat score"]), (0.8, 0.0, ["flat score"]), (0.82, 0.02, [])])
def test_scores_of_a_rule(end, deviation, expected, committed):
    """A rule's scores, 0 or 1, held against the mean 0 and deviation 1 that a reward model's have at first."""
    learned = changed(changed(committed["ppo"], "score", 0.8, 0), "score_std", 0.4, 0)
    learned = changed(changed(learned, "score", end), "score_std", deviation)
    rule = copy.deepcopy(learned)
    rule.flags["reward"] = "rule:no-negative-word"
    assert names(rule) == expected and names(learned)[0] == "first scores off"


def test_responses_without_eos(committed):
    """An error seen where a rule gives 10 to one response in 20, those without EOS, which count -1; or missed."""
    for rewards, expected in ((-0.05, []), (-0.5, ["rewards do not add up"])):
        record = committed["ppo"]
        for name, value in {"score": 0.5, "score_std": 2.18, "eos_rate": 0.95, "kl": 0.0, "rewards": rewards}.items():
            record = changed(record, name, value, 0)
        assert [name for name in names(record) if name == "rewards do not add up"] == expected


def test_what_is_in_no_metric(committed):
    """Responses without EOS that nobody is told of; over-optimisation that is missed, or seen where the proxy falls."""
    sft, evaluation = (copy.deepcopy(committed[name]) for name in ("sft", "evaluate"))
    for responses, expected in ((10, []), (11, ["truncated responses"])):
        sft.truncated = [{"prompts": 50, "responses": responses, "of": 100}]
        assert names(sft) == expected
    last = evaluation.files["results.json"]["snapshots"]["ppo"][-1]
    last.update(labeler=-1.0, proxy=-1.0)
    assert names(evaluation) == []
    last["proxy"] = 9.0
    assert names(evaluation) == ["over-optimised"]


def test_a_live_folder(tmp_path, committed, capsys):
    """A run under way taken for a finished one, its half-written last line for a damaged log; a finding that no script
    can see in the exit code, or that does not say where, and compared with what."""
    (tmp_path / "config.json").write_text(json.dumps({"stage": committed["ppo"].flags}))
    log = "".join(json.dumps(line) + "\n" for line in committed["ppo"].lines[:12])
    (tmp_path / "log.jsonl").write_text(log + '{"iteration": 13, "ep')
    doctor.main(doctor.Config(str(tmp_path)))
    assert ": healthy, not finished (12 lines of its log)" in capsys.readouterr().out
    (tmp_path / "log.jsonl").write_text(log.replace('"unique_responses": ', '"unique_responses": 0.1, "was": '))
    with pytest.raises(UserError, match="1 of 1 stages with findings") as stopped:
        doctor.main(doctor.Config(str(tmp_path)))
    finding = capsys.readouterr().out
    assert stopped.value.code == 1 and ": identical responses: unique_responses: 0.10 at the beginning" in finding
    assert "iteration 10 to 12; healthy runs: 0.91 to 1.00, at the end 0.96 to 1.00)" in finding and "Try: " in finding
