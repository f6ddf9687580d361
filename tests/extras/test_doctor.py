"""The doctor: silent about healthy runs, and right about broken ones."""
import ast
import contextlib
import copy
import functools
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import breaks
import doctor
from common import UserError
from examine import examine
from symptoms import SYMPTOMS

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
    ("dpo-beta0.05", "chosen falls"), ("ppo-kl3", None), ("ppo-kl12", None), ("ppo-exact", None), ("dpo-beta1", None),
    ("../ablations/value-zero", "length shrinks"), ("../ablations/value-shared", "values explain nothing"),
    ("../ablations/epochs-8", None), ("../ablations/minibatches-4", None), ("../ablations/temperature-1", None)])
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
    found = breaks.run(breaks.replace(world[broken.stage], out=str(tmp_path)), broken)
    assert [name for name in found if name != "stopped"][:1] == [broken.expected]  # in the first place


@pytest.mark.parametrize("stage, seed", [("reward", 1), ("dpo", 1), ("sft", 1)] + [("ppo", n) for n in range(1, 6)])
def test_without_a_bug_nothing_is_named(stage, seed, world, tmp_path):
    """A doctor that finds faults everywhere names those of the broken runs, too."""
    none = breaks.Break("none", "", stage=stage, flags={"seed": seed})
    assert breaks.run(breaks.replace(world[stage], out=str(tmp_path)), none) == {}


def test_the_page_of_bugs_is_about_these():
    """docs/faults.md left behind when bugs or symptoms change their names."""
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| \w+ \| (.+?) \|$", page, re.M))
    for broken in breaks.BREAKS:
        assert broken.expected == rows[broken.bug].removeprefix("stopped, ").split(", ")[0]
    healthy = re.findall(r"^\| none, seed \d \| (\w+) \| healthy \|$", page, re.M)
    assert sorted(healthy) == sorted(["sft", "reward", "dpo", "ppo"] * 5) and page.startswith(breaks.HEAD)
    assert all(f"| {bug} | `{test}` |" in page for bug, (_, _, test) in breaks.UNSEEN.items())
    assert all((ROOT / "ppo.py").read_text().count(old) == 1 for old, _, _ in breaks.UNSEEN.values())


# ---- each symptom by itself ------------------------------------------------------------------------------------------


@functools.cache
def committed_records():
    return {record.name: record for record in doctor.records(TINY / "seed1")}


def record_of(stage):
    """A committed stage, to be changed."""
    return copy.deepcopy(committed_records()[stage])


def put(metric, value, last=8):
    """A change of a record: this metric has that value in the last lines (0: in all)."""
    def change(record):
        for line in record.lines[-last:] if last else record.lines:
            line[metric] = value(line) if callable(value) else value
    return change


def add_up(record):
    """Per-token rewards that are what score and KL make them, after either was changed."""
    put("rewards", lambda line: line["score"] - line["kl_coef"] * line["kl"], 0)(record)


def put_card(**changes):
    return lambda record: record.card["held-out rankings"].update(changes)


def put_human(record):
    for row in record.card["human comparisons"].values():
        row["reward model"] = {"accuracy": 0.5, "interval": [0.48, 0.52], "pairs": 2000}


ALONE = {  # symptom: (stage, what makes a healthy record show it)
    "stopped": ("ppo", lambda record: record.stop.update(stopped="KL is 61 nats per response")),
    "sampler differs": ("ppo", put("sampler_difference", 0.2)),
    "first ratio": ("ppo", put("first_ratio_error", 0.3)),
    "negative KL": ("ppo", lambda record: [put("kl", -0.5, 0)(record), put("kl_coef", 0.2, 0)(record), add_up(record)]),
    "rewards do not add up": ("ppo", put("rewards", lambda line: line["score"] + line["kl_coef"] * line["kl"])),
    "wrong way": ("ppo", lambda record: [line.update(kl=1.0, kl_coef=0.2 + 0.01 * i) for i, line in enumerate(
        record.lines)] + [add_up(record)]),
    "first scores off": ("ppo", lambda record: [record.lines[0].update(score=1.2), add_up(record)]),
    "another start": ("ppo", lambda record: (setattr(record, "reward_start", "sha256 1"),
                                             setattr(record, "inputs", {"sft": "sha256 2"}))),
    "flat score": ("ppo", lambda record: [put("score", 0.3, 0)(record), add_up(record)]),
    "KL stays at 0": ("ppo", put("kl_k3", 0.001)),
    "KL runs away": ("ppo", lambda record: [put("kl", 30.0)(record), put("kl_coef", 0.2)(record), add_up(record)]),
    "length grows": ("ppo", put("length", 30.0)), "length shrinks": ("ppo", put("length", 3.0)),
    "no end of text": ("ppo", put("end_rate", 0.1)), "entropy collapse": ("ppo", put("entropy", 0.5)),
    "identical responses": ("ppo", put("distinct", 0.3)), "repetition": ("ppo", put("repetition", 0.5)),
    "value loss explodes": ("ppo", put("value_loss", 9.0)),
    "values explain nothing": ("ppo", put("explained_variance", -0.5)),
    "clip binds": ("ppo", put("clip_fraction", 0.5)), "clip never binds": ("ppo", put("clip_fraction", 0.0, 0)),
    "gradient far above the clip": ("ppo", put("grad_norm", 40.0, 0)),
    "near chance": ("reward", lambda record: [put_card(accuracy=0.5, interval=[0.45, 0.55])(record), put(
        "accuracy", 0.52)(record)]),
    "worse than words": ("reward", put_human),
    "learned by heart": ("reward", put("accuracy", 0.99)),
    "not learning": ("reward", put("loss", 0.7, 0)),
    "labels are noise": ("label", lambda record: record.facts.update(order_kept=0.5)),
    "over-fitted": ("sft", lambda record: record.lines[-1].update(test_loss=6.0)),
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


JUST_INSIDE = [  # what is unusual, and no finding yet
    ("ppo", put("sampler_difference", 0.04)), ("ppo", put("first_ratio_error", 0.09)), ("ppo", put("kl_k3", 0.06)),
    ("ppo", lambda record: [line.update(rewards=line["rewards"] + 0.008) for line in record.lines]),
    ("ppo", lambda record: [record.lines[0].update(score=0.7, score_std=2.4), add_up(record)]),
    ("ppo", lambda record: [put("score", 0.75)(record), put("score", 0.5, 0)(record), put("score", 0.75)(record),
                            add_up(record)]),
    ("ppo", lambda record: [put("kl", 17.5)(record), put("kl_coef", 0.2)(record), add_up(record)]),
    ("ppo", put("length", 20.0)), ("ppo", put("length", 9.2)), ("ppo", put("end_rate", 0.55)),
    ("ppo", put("entropy", 1.0)), ("ppo", put("distinct", 0.72)), ("ppo", put("repetition", 0.19)),
    ("ppo", put("explained_variance", 0.02)), ("ppo", put("clip_fraction", 0.5, 7)), ("ppo", put("value_loss", 1.4)),
    ("ppo", put("grad_norm", 9.5, 0)), ("reward", put("accuracy", 0.87)),
    ("reward", lambda record: [put_card(accuracy=0.56, interval=[0.5, 0.61])(record), put("accuracy", 0.7)(record)]),
    ("sft", lambda record: record.lines[-1].update(test_loss=4.925)),
    ("label", lambda record: record.facts.update(order_kept=0.61)),
    ("dpo", put("chosen_logprobs", -66.0)), ("dpo", lambda record: record.lines[0].update(loss=0.735)),
    ("evaluate", lambda record: record.results["snapshots"]["ppo"][-1].update(labeler=-1.0, proxy=-1.0)),
    ("evaluate", lambda record: [record.results["snapshots"]["ppo"][-1].update(labeler=-1.0, proxy=9.0),
                                 record.results["config"].update(snapshot_count=1)]),
    ("evaluate", lambda record: record.results["policies"]["ppo"].update(win_rate_judge_interval=[0.51, 0.6])),
    ("evaluate", lambda record: [record.results["policies"]["ppo"].update(win_rate_judge_interval=[0.3, 0.6]),
                                 record.results.update(prompts=32)])]


@pytest.mark.parametrize("stage, change", JUST_INSIDE)
def test_what_is_only_unusual_is_no_finding(stage, change):
    """A limit that moved towards healthy runs."""
    record = record_of(stage)
    change(record)
    assert names(record) == []


FLAGS = [  # metrics that would be findings, but for the flags
    ({"whiten_rewards": True}, put("rewards", 5.0)), ({"kl_horizon": 0.0}, lambda record: [
        put("kl", 25.0)(record), put("kl_coef", 0.2)(record), add_up(record)]),
    ({"value_coef": 0.0}, put("explained_variance", -1.0)), ({"value_coef": 0.0}, put("value_loss", 9.0)),
    ({"epochs": 1}, put("clip_fraction", 0.0, 0)), ({"no_end_score": float("nan")}, lambda record: [
        put("end_rate", 0.0, 0)(record), add_up(record)]),
    ({"iterations": 200}, put("explained_variance", -1.0)), ({"grad_clip": 10.0}, put("grad_norm", 40.0, 0)),
    ({"ensemble": "min", "reward": "a,b"}, lambda record: [record.lines[0].update(score=-1.2), add_up(record)])]


@pytest.mark.parametrize("flags, change", FLAGS)
def test_flags_that_explain_what_is_seen(flags, change):
    """A finding that is what the flags ask for; without the flag it is one."""
    with_flags, without = record_of("ppo"), record_of("ppo")
    with_flags.flags.update(flags)
    for record in (with_flags, without):
        change(record)
    assert names(with_flags) == [] != names(without)


def test_a_long_run_that_was_good_early_is_not_flat():
    """A beginning that is itself most of the climb: the last quarter of 500 iterations against the first."""
    record = record_of("ppo")
    record.lines += [{**record.lines[-1], "iteration": i, "episodes": 128 * i} for i in range(33, 500)]
    assert names(record) == []


def test_short_runs_are_not_judged_by_what_takes_time():
    """A smoke run called broken, as three rollouts have learned nothing; a ratio that is off shows even there."""
    record = record_of("ppo")
    record.lines = record.lines[:2]
    put("clip_fraction", 0.0)(record)
    put("explained_variance", -3.0)(record)
    assert names(record) == []
    put("first_ratio_error", 0.4)(record)
    assert names(record) == ["first ratio"]


# ---- the command -----------------------------------------------------------------------------------------------------


def ask(folder):
    """What python doctor.py FOLDER prints, and its exit code, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = doctor.main(doctor.Config(str(folder))) or 0
        except UserError as error:
            code = error.code
            print(f"error: {error}", file=err)
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_lines_and_exit_codes(tmp_path):
    """A finding that a script can't see, or that does not say where, what for, and compared with what."""
    healthy = subprocess.run([sys.executable, str(ROOT / "doctor.py"), str(TINY / "seed1")], capture_output=True,
                             text=True)
    assert healthy.returncode == 0 and all(": healthy" in line for line in healthy.stdout.splitlines())
    lines = healthy.stdout.splitlines()
    assert not any("not finished" in line or "as far as" in line for line in lines)
    assert [line.split(":")[0] for line in lines][:4] == ["base", "sft", "labeler", "judge"]  # as they are made
    sick = ask(TINY / "seed1" / "study" / "free-all")
    first = sick.stdout.splitlines()[0]
    assert sick.returncode == 1 and first.startswith("free-all: KL runs away: kl: up to ")
    assert re.search(r"free-all/log\.jsonl, iteration \d+ to 32; healthy runs: 0\.00 to \d", first) and "Try: " in first
    assert sick.stdout.splitlines()[-1] == "1 stage with findings" and sick.stderr == ""
    text = (TINY / "seed1" / "ppo_log.jsonl").read_text().replace('"distinct": ', '"distinct": 0.1, "was": ')
    (tmp_path / "log.jsonl").write_text(text)
    assert re.search(r"^\S+: look at iteration 30: \['.*'\]'.*' score \S+ kl \S+$", ask(tmp_path).stdout, re.M)


@pytest.mark.parametrize("damage, message", [
    (None, "no such folder"), ("", "no log.jsonl that the doctor knows"), ("[1]\n{}\n", "not a line of a log"),
    ('{"iteration": 1, "kl": "x"}\n{}\n', "no number"), ('{"iteration": 1, "kl": NaN}\n', "no number"),
    ('{"iteration": 1, "kl": 1.0}\n' * 9, "damaged, or of another version"),
    ('{"iteration": 1, "kl": 1e400}\n', "no number"), ('{"iteration": 1, "kl": ' + "9" * 400 + "}\n", "no number"),
    ("[" * 9999 + "\n{}\n", "damaged"),
    ('{"iteration": 1\n{"iteration": 2}\n', "not a line of a log")])
def test_damaged_logs(tmp_path, damage, message):
    """A traceback from a file that was cut, edited or mistaken for a log."""
    if damage is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.jsonl").write_text(damage)
    asked = ask(tmp_path / "run")
    assert asked.returncode == 2 and message in asked.stderr and asked.stderr.count("\n") == 1


@pytest.mark.parametrize("file, content", [
    ("done.json", '{"outputs": null}'), ("config.json", '{"stage": null}'), ("config.json", "[]"),
    ("config.json", '{"inputs": []}'), ("config.json", '{"stage": {"reward": 3}}'), ("config.json", "{"),
    ("config.json", b"\xff\xfe"), ("log.jsonl", '{"test_loss": 1.0}\n{"test_loss": 2.0}\n'),
    ("log.jsonl", '{"iteration": 1, "episodes": -1}\n'), ("report_card.json", '{"held-out rankings": 3}')])
def test_a_damaged_stage_hides_no_other(tmp_path, file, content):
    """A traceback; or one bad file that keeps the doctor from looking at anything else."""
    for stage, log in (("a", "ppo_log.jsonl"), ("b", "study/free-all/log.jsonl"), ("c", "reward_log.jsonl")):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "log.jsonl").write_text((TINY / "seed1" / log).read_text())
    place = tmp_path / ("c" if file == "report_card.json" else "a") / file
    place.write_bytes(content if isinstance(content, bytes) else content.encode())
    asked = ask(tmp_path)
    assert "Traceback" not in asked.stderr and "\nb: KL runs away" in "\n" + asked.stdout
    assert asked.stderr.count("\n") == (asked.returncode == 2) and asked.returncode in (1, 2)


def test_stopped_before_the_first_line(tmp_path):
    """A run that a guard stopped at once is left out, as its log has no line."""
    for stage, flags in {"x": {"evals": 4}, "y": {"kl_coef": 0.2}, "z": {"test_share": 0.1}}.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "log.jsonl").write_text('{"stopped": "loss is not finite", "optimizer_step": 3}\n')
        (tmp_path / stage / "config.json").write_text(json.dumps({"stage": flags}))
    assert found(tmp_path) == {"x": ["stopped"], "y": ["stopped"], "z": ["stopped"]}


def test_a_run_under_way(tmp_path):
    """Called healthy without a word that it is not finished."""
    (tmp_path / "log.jsonl").write_text("".join((TINY / "seed1" / "ppo_log.jsonl").read_text().splitlines(True)[:12]))
    (tmp_path / "config.json").write_text((TINY / "seed1" / "ppo_config.json").read_text())
    assert "healthy, not finished: iteration 12 of 32" in ask(tmp_path).stdout


def test_a_labeler_that_is_a_coin(tmp_path):
    """Labels of a machine that people do not share: the language model of results/rlaif."""
    for card, expected in [("rlaif/smollm2-135m-instruct-q4_mood_agreement.json", ["labels are noise"]),
                           ("tiny/seed1/label-vader_agreement.json", [])]:
        (tmp_path / "agreement.json").write_text((ROOT / "results" / card).read_text())
        (tmp_path / "done.json").write_text("{}")
        record, = doctor.records(tmp_path)
        assert record.kind == "label" and names(record) == expected


def test_a_line_that_was_cut_is_left_out(tmp_path):
    """A run that is still under way, or that was killed in the middle of a line, can't be asked about."""
    text = (TINY / "seed1" / "ppo_log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text[:-200])
    record, = doctor.records(tmp_path)
    assert len(record.lines) == 31 and names(record) == []


def test_a_reward_model_that_skipped_sft(tmp_path):
    """The reward model's start read from the wrong place, or compared by its path."""
    of = {"reward": {"model": "sha256 base"}, "ppo": {"sft": "sha256 sft", "reward": "sha256 weights"}}
    for stage, inputs in of.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.json").write_text(json.dumps({
            "stage": {"reward": "elsewhere/reward"} if stage == "ppo" else {}, "inputs": inputs}))
        (tmp_path / stage / "done.json").write_text('{"outputs": {"model.pt": "weights"}}')
        (tmp_path / stage / "log.jsonl").write_text((TINY / "seed1" / f"{stage}_log.jsonl").read_text())
    assert found(tmp_path) == {"ppo": ["another start"]}
    (tmp_path / "reward" / "done.json").write_text('{"outputs": {"model.pt": "others"}}')  # another run's
    assert found(tmp_path) == {}


# ---- its pages -------------------------------------------------------------------------------------------------------


def test_every_symptom_is_looked_for():
    """A symptom in the table that no code finds, or a finding without advice."""
    texts = {node.value for node in ast.walk(ast.parse((ROOT / "examine.py").read_text()))
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
