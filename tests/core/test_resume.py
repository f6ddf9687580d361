"""Runs that are interrupted, damaged or given twice: what they leave, and whether they resume bit for bit."""
import dataclasses
import functools
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import common
import ppo
import stages
from common import UserError

ITEMS = "step rng optimizer optimizer.exp_avg optimizer.exp_avg_sq optimizer.step log.text log.sums log.counts".split()
PARTS = {"sft": "model best", "reward": "model", "dpo": "policy", "ppo": "policy value controller sampling streak"}
# No difference to be seen: DPO and PPO draw nothing from rng, PPO sums up nothing between its steps, the streak has a
# test of its own.
UNSEEN = "dpo-rng ppo-rng ppo-streak ppo-log.sums ppo-log.counts".split()
SEEN = [(stage, item) for stage in PARTS for item in ITEMS + PARTS[stage].split() if f"{stage}-{item}" not in UNSEEN]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """A standard input as a terminal has it; a test that interrupts a run leaves no signal handler behind."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return stages.make_inputs(tmp_path_factory.mktemp("inputs"))


def run(*args, **changes):
    """A stage's run in this process; arguments as for stages.command."""
    module, flags = stages.command(*args, **changes)
    module.main(common.load_config(module.Config, module.PRESETS, flags))


def guarded(capsys, *args, **changes):
    """The same through the guard of the command line: (exit code, the one line or nothing that it wrote to stderr)."""
    module, flags = stages.command(*args, **changes)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        common.run(module.main, module.Config, module.PRESETS, argv=flags)
    assert (err := capsys.readouterr().err).count("\n") <= 1
    return stop.value.code, err


def interrupt(step, *args, **changes):
    """A run that gets SIGTERM during this step: it leaves its state."""
    def keep(self, done, keep=common.Stage.keep):
        if done == step:
            signal.raise_signal(signal.SIGTERM)
        keep(self, done)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Stage, "keep", keep)
        with pytest.raises(UserError, match=f"stopped after step {step} of .*: the same command resumes it") as stop:
            run(*args, **changes)
    assert stop.value.code == 143


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Function of a stage: a folder with its unbroken run and, beside it, one interrupted after step 5."""
    @functools.cache
    def of(stage):
        folder = tmp_path_factory.mktemp(stage)
        run(stage, inputs, folder / "unbroken")
        interrupt(5, stage, inputs, folder / "interrupted")
        return folder
    return of


def same(one, other):
    return stages.outcome(one) == stages.outcome(other)


@pytest.mark.parametrize("stage", stages.SCRIPT)
def test_a_run_resumes_bit_for_bit(inputs, runs, tmp_path, stage):
    """A log line or weight that differs from the unbroken run's: from within a log interval, after the last step."""
    for step in (2, stages.STEPS[stage]):
        interrupt(step, stage, inputs, tmp_path / str(step))
        run(stage, inputs, tmp_path / str(step), save_every=7.0)
        assert same(tmp_path / str(step), runs(stage) / "unbroken"), step


def forget(state, fresh, item):
    """Give an item of a saved state the value that a run starts with."""
    part, _, within = item.partition(".")
    if item in ("step", "rng"):
        state[item] = {"step": 0, "rng": torch.Generator().manual_seed(99).get_state()}[item]
    elif part == "optimizer" and within:  # a tensor per weight
        for moments in state["parts"][part]["state"].values():
            moments[within] = torch.zeros_like(moments[within])
    elif within:
        state["parts"][part][within] = fresh[part][within]
    else:
        state["parts"][part] = fresh[part]


@pytest.mark.parametrize("stage, item", SEEN)
def test_a_forgotten_item_shows(inputs, runs, tmp_path, monkeypatch, stage, item):
    """An item of the state that could be lost without any difference to be seen, or that no test forgets."""
    def resume(self, steps, resume=common.Stage.resume, **parts):
        assert {*parts} == {"optimizer", "log", *PARTS[stage].split()} and len(parts["log"].state_dict()) == 4
        state = common.load(tmp_path / "resume.pt")
        forget(state, {name: common.state_of(part)[0]() for name, part in parts.items()}, item)
        common.save(tmp_path / "resume.pt", state)
        return resume(self, steps, **parts)
    shutil.copytree(runs(stage) / "interrupted", tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(common.Stage, "resume", resume)
    run(stage, inputs, tmp_path)
    assert not same(tmp_path, runs(stage) / "unbroken")


def test_time_steps_and_streak_are_counted_on(inputs, runs, tmp_path, monkeypatch):
    """A time, an optimizer step in a message, or a count of rollouts with KL below zero that starts anew on resume."""
    shutil.copytree(runs("ppo") / "interrupted", tmp_path, dirs_exist_ok=True)
    state = common.load(tmp_path / "resume.pt")
    state["parts"]["streak"]["below_zero"] = 4
    common.save(tmp_path / "resume.pt", {**state, "seconds": 1000.0})

    def below_zero(*args, collect=ppo.collect):
        rollout, metrics = collect(*args)
        return rollout, {**metrics, "kl": torch.tensor(-1.0)}
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "collect", below_zero)
        with pytest.raises(UserError, match="optimizer step 21: KL is .* below zero for 5 rollouts"):
            run("ppo", inputs, tmp_path)
    run("ppo", inputs, tmp_path)
    assert json.loads((tmp_path / "done.json").read_text())["seconds"] >= 1000


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])  # torch raises a RuntimeError or an OSError
def test_a_disk_that_fills_up(inputs, runs, tmp_path, capsys, share):
    """A traceback instead of one line, or a lost state, when there is no room for the next save."""
    shutil.copytree(runs("dpo") / "interrupted", tmp_path, dirs_exist_ok=True)
    before, limits = (tmp_path / "resume.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), limits[1]))
    try:
        code, err = guarded(capsys, "dpo", inputs, tmp_path, save_every=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and f"{tmp_path}/resume.pt: cannot be written" in err
    assert (tmp_path / "resume.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["empty", "short", "truncated", 0, 0.2, 0.5, 0.8, 0.97, 0.9999])
@pytest.mark.parametrize("name", ["model", "resume"])
def test_a_damaged_file_is_refused(inputs, runs, tmp_path, capsys, name, damage):
    """A flipped bit that is trained on (torch loads it silently), a traceback, or a message that names no file."""
    shutil.copytree(inputs / "sft", tmp_path / "model")
    shutil.copytree(runs("dpo") / "interrupted", tmp_path / "resume")
    path = tmp_path / name / f"{name}.pt"
    good = path.read_bytes()
    place = 0 if isinstance(damage, str) else int(damage * len(good))
    path.write_bytes({"empty": b"", "short": good[:9], "truncated": good[:-1]}.get(
        damage, good[:place] + bytes([good[place] ^ 4]) + good[place + 1:]))
    out = tmp_path / {"model": "new", "resume": "resume"}[name]
    code, err = guarded(capsys, "dpo", inputs, out, model=tmp_path / "model")
    assert code == 2 and err.startswith(f"error: {path}: damaged") and not (tmp_path / "new").exists()


def test_the_advice_for_a_damaged_model_helps(inputs, tmp_path):
    """"Finished already" here and "run again" there, once the file is deleted, as the message says."""
    run("dpo", inputs, tmp_path)
    shutil.rmtree(tmp_path)
    run("dpo", inputs, tmp_path)
    common.read_checkpoint(tmp_path, "lm")


def test_a_finished_run_is_skipped(inputs, tmp_path, capsys):
    """Hours of training for a command given twice, with a flag that changes no result or with a model that moved."""
    out, moved = tmp_path / "out", shutil.copytree(inputs / "sft", tmp_path / "moved")
    run("dpo", inputs, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "resume.pt"}
    for changes in ({}, {"overwrite": True}, {"microbatch": 1}, {"model": moved}):
        assert guarded(capsys, "dpo", inputs, out, **changes) == (0, "")
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.mark.parametrize("stage, had, changes, message", [
    ("sft", "unbroken", {"seed": 2}, "--seed was 1, is 2"), ("dpo", "unbroken", {"train": "changed"}, "--train was "),
    ("ppo", "unbroken", {"snapshots": 1}, "--snapshots was 3, is 1"),
    ("ppo", "interrupted", {"reward": "trained"}, "--reward was "),
    ("dpo", "interrupted", {"lr": 1.0, "epochs": 9}, "--epochs was 4, is 9; --lr was 0.001, is 1.0")])
def test_another_run_is_refused_or_overwritten(inputs, runs, tmp_path, capsys, stage, had, changes, message):
    """Work of other flags or inputs that is used or replaced in silence; anything of it that --overwrite keeps."""
    (inputs / "changed.jsonl").write_text((inputs / "rankings.jsonl").read_text().replace("bad", "worse"))
    shutil.copytree(runs("reward") / "unbroken", inputs / "trained", dirs_exist_ok=True)
    out = shutil.copytree(runs(stage) / had, tmp_path / "out")
    left = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, err = guarded(capsys, stage, inputs, out, **changes)
    assert code == 2 and f"{out} holds another run: {message}" in err
    assert left == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    interrupt(2, stage, inputs, out, overwrite=True, **changes)
    assert f"{out} is overwritten: {message}" in capsys.readouterr().out and not (out / "done.json").exists()
    run(stage, inputs, out, overwrite=True, **changes)
    run(stage, inputs, tmp_path / "new", **changes)
    assert same(out, tmp_path / "new")


def test_a_run_that_finished_meanwhile_is_kept(inputs, runs, tmp_path, monkeypatch, capsys):
    """The same command twice: the second reads its data while the first one finishes, and then deletes its model."""
    def finish_and_open(folder, plain=common.open_folder):
        shutil.copytree(runs("dpo") / "unbroken", folder, dirs_exist_ok=True)
        return plain(folder)
    monkeypatch.setattr(common, "open_folder", finish_and_open)
    assert guarded(capsys, "dpo", inputs, tmp_path / "out") == (0, "")
    assert same(tmp_path / "out", runs("dpo") / "unbroken")


def test_after_the_last_step_signals_end_the_run(inputs, tmp_path):
    """A normalisation or an evaluation after the training that cannot be interrupted, once the run was resumed."""
    interrupt(stages.STEPS["dpo"], "dpo", inputs, tmp_path)
    run("dpo", inputs, tmp_path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_runs_and_a_real_signal(inputs, tmp_path, capsys):
    """Two processes that write into each other's files; SIGTERM loses the state; a lock that outlives its run."""
    module, flags = stages.command("base", inputs, tmp_path, epochs=10**6, evals=10**9)  # a line per step, for hours
    with subprocess.Popen([sys.executable, module.__file__, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            while not process.stdout.readline().startswith("step 3/"):
                assert process.poll() is None, process.stderr.read()
            code, err = guarded(capsys, "base", inputs, tmp_path, epochs=10**6, evals=10**9)
            assert code == 2 and "another run is at work there" in err
            process.send_signal(signal.SIGTERM)
            err = process.communicate()[1]
        finally:
            process.kill()
    assert process.returncode == 143 and "the same command resumes it" in err and err.count("\n") == 1
    assert common.load(tmp_path / "resume.pt")["step"] >= 3 and not (tmp_path / "done.json").exists()
    common.open_folder(tmp_path)


def test_a_machine_without_its_gpu_overwrites_nothing(tmp_path):
    """Finished models deleted as --device auto means another device today; a model without config.json replaced."""
    @dataclasses.dataclass
    class Config:
        out: str = str(tmp_path)
        overwrite: bool = True
        seed: int = 1
        device: str = "auto"
        dtype: str = "auto"

    def begin(cfg):
        common.set_up(cfg)
        return common.Stage(cfg)
    stage = begin(Config())
    stage.open()
    stage.finish()
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["stage"].update(device="cuda", dtype="bfloat16")
    common.write_json(tmp_path / "config.json", facts)
    with pytest.raises(UserError, match="finished already"):
        begin(Config())
    with pytest.raises(UserError, match="--device was cuda, is cpu"):
        begin(Config(device="cpu", overwrite=False))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="holds another run: --seed was None"):
        begin(Config(overwrite=False, seed=2))
