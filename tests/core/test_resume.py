"""Runs that are interrupted, damaged or given twice: what they leave, and whether they resume bit for bit."""
import errno
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
import stages
from common import UserError

ITEMS = ("step rng optimizer optimizer.exp_avg optimizer.exp_avg_sq optimizer.step log.text log.sums log.counts").split()
PARTS = {"base": "model best", "sft": "model best", "reward": "model", "dpo": "policy",
         "ppo": "policy value controller sampling streak"}
# No difference to be seen: the best loss of base falls to the end, DPO and PPO do not draw from rng, PPO sums up nothing
# between its steps. The streak, the time and log.steps have a test of their own.
UNSEEN = "base-best dpo-rng ppo-rng ppo-streak ppo-log.sums ppo-log.counts".split()
FORGOTTEN = [(stage, item) for stage in PARTS for item in [*ITEMS, *PARTS[stage].split()] if f"{stage}-{item}" not in UNSEEN]


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


def run(stage, inputs, out, **changes):
    """A stage's run in this process."""
    module, flags = stages.command(stage, inputs, out, **changes)
    module.main(common.load_config(module.Config, module.PRESETS, flags))


def guarded(capsys, *args, **changes):
    """The same through the guard of the command line: (exit code, what it wrote to stderr, which is one line or none)."""
    module, flags = stages.command(*args, **changes)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        common.run(module.main, module.Config, module.PRESETS, argv=flags)
    err = capsys.readouterr().err
    assert err.count("\n") <= 1
    return stop.value.code, err


def interrupt(stage, inputs, out, step, **changes):
    """A run that gets SIGTERM during this step: it leaves its state."""
    def keep(self, done, keep=common.Stage.keep):
        if done == step:
            signal.raise_signal(signal.SIGTERM)
        keep(self, done)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Stage, "keep", keep)
        with pytest.raises(UserError, match=f"stopped after step {step} of .*: the same command resumes it") as stop:
            run(stage, inputs, out, **changes)
    assert stop.value.code == 143


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Function of a stage: a folder with its unbroken run and, beside it, one interrupted after step 5."""
    made = {}

    def of(stage):
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(stage)
            run(stage, inputs, made[stage] / "unbroken")
            interrupt(stage, inputs, made[stage] / "interrupted", 5)
        return made[stage]
    return of


def same(out, runs, stage):
    """Whether a run left what the unbroken one left."""
    return stages.outcome(out) == stages.outcome(runs(stage) / "unbroken")


# ---- exact resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", PARTS)
def test_a_run_resumes_bit_for_bit(inputs, runs, tmp_path, stage):
    """A log line or weight that differs from the unbroken run's: within a log interval, after the last step."""
    for step in (2, stages.STEPS[stage]):
        interrupt(stage, inputs, tmp_path / str(step), step)
        run(stage, inputs, tmp_path / str(step))
        assert same(tmp_path / str(step), runs, stage), step


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


@pytest.mark.parametrize("stage, item", FORGOTTEN)
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
    assert not same(tmp_path, runs, stage)


def test_time_steps_and_streak_are_counted_on(inputs, runs, tmp_path, monkeypatch):
    """A time, an optimizer step in a message, or a count of rollouts with KL below zero that starts anew on resume."""
    shutil.copytree(runs("ppo") / "interrupted", tmp_path, dirs_exist_ok=True)
    state = common.load(tmp_path / "resume.pt")
    state["parts"]["streak"]["below_zero"] = 4
    common.save(tmp_path / "resume.pt", {**state, "seconds": 1000.0})
    ppo, collect = sys.modules["ppo"], sys.modules["ppo"].collect
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "collect", lambda *args: (lambda rollout, metrics: (
            rollout, {**metrics, "kl": torch.tensor(-1.0)}))(*collect(*args)))
        with pytest.raises(UserError, match="optimizer step 21: KL is .* below zero for 5 rollouts"):
            run("ppo", inputs, tmp_path)
    run("ppo", inputs, tmp_path)
    assert json.loads((tmp_path / "done.json").read_text())["seconds"] >= 1000


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, name", [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch, module, name):
    """Half a file in place of the last good one: a save fails half-way, before it is on the disk, or at the rename."""
    def fail(*args):
        if name == "save":
            args[1].write(b"PK half a file")
        raise OSError(errno.ENOSPC, "No space left on device")
    common.save(tmp_path / "x.pt", {"x": 1})
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(OSError):
            common.save(tmp_path / "x.pt", {"x": 2})
    assert common.load(tmp_path / "x.pt") == {"x": 1}
    common.save(tmp_path / "x.pt", {"x": 2})
    assert common.load(tmp_path / "x.pt") == {"x": 2}


def test_a_disk_that_fills_up(inputs, runs, tmp_path, capsys):
    """A traceback instead of one line, or a lost state, when there is no room for the next save, or no place for --out."""
    shutil.copytree(runs("dpo") / "interrupted", tmp_path / "out")
    before, limits = (tmp_path / "out" / "resume.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert guarded(capsys, "dpo", inputs, tmp_path / "out" / "resume.pt" / "out")[0] == 1
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):  # where it fails, torch raises an OSError or a RuntimeError
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), limits[1]))
        try:
            code, err = guarded(capsys, "dpo", inputs, tmp_path / "out", save_every=0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 1 and "File too large" in err and (tmp_path / "out" / "resume.pt").read_bytes() == before
    run("dpo", inputs, tmp_path / "out")
    assert same(tmp_path / "out", runs, "dpo")


@pytest.mark.parametrize("damage", ["empty", "short", "truncated", 0, 0.2, 0.5, 0.8, 0.97, 0.9999])
@pytest.mark.parametrize("name", ["model", "resume"])
def test_a_damaged_file_is_refused(inputs, runs, tmp_path, capsys, name, damage):
    """A flipped bit that is trained on (torch loads it silently), a traceback, or a message that names no file."""
    shutil.copytree(inputs / "sft", tmp_path / "model")
    shutil.copytree(runs("dpo") / "interrupted", tmp_path / "resume")
    path = tmp_path / name / f"{name}.pt"
    good = path.read_bytes()
    place = len(good) if isinstance(damage, str) else int(damage * len(good))
    path.write_bytes({"empty": b"", "short": good[:9], "truncated": good[:-1]}.get(
        damage, good[:place] + bytes(byte ^ 4 for byte in good[place:place + 1]) + good[place + 1:]))
    out = tmp_path / {"model": "new", "resume": "resume"}[name]
    code, err = guarded(capsys, "dpo", inputs, out, model=tmp_path / "model")
    assert code == 2 and err.startswith(f"error: {path}: damaged") and not (tmp_path / "new").exists()


def test_a_damaged_model_of_a_finished_run_can_be_made_again(inputs, tmp_path):
    """"Finished already" here and "run again" there, whatever one does: what the message advises must help."""
    run("dpo", inputs, tmp_path)
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(UserError) as stop:
        common.read_checkpoint(tmp_path, "lm")
    if f"delete {tmp_path} and" in str(stop.value):
        shutil.rmtree(tmp_path)
    (tmp_path / "model.pt").unlink(missing_ok=True)
    run("dpo", inputs, tmp_path)
    common.read_checkpoint(tmp_path, "lm")


# ---- one run per folder ----------------------------------------------------------------------------------------------


def test_a_finished_run_is_skipped(inputs, tmp_path, capsys):
    """Hours of training for a command that was given twice; a state that stays beside a finished model."""
    run("dpo", inputs, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for overwrite in (False, True):
        assert guarded(capsys, "dpo", inputs, tmp_path, overwrite=overwrite) == (0, "")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert not (tmp_path / "resume.pt").exists()


@pytest.mark.parametrize("had", ["unbroken", "interrupted"])
@pytest.mark.parametrize("stage, changes, message", [
    ("sft", {"seed": 2}, "--seed was 1, is 2"), ("base", {"width": 32}, "--width was 16, is 32"),
    ("dpo", {"train": "changed.jsonl"}, "--train was "), ("ppo", {"reward": "other"}, "--reward was "),
    ("dpo", {"lr": 1.0, "epochs": 9}, "--epochs was 4, is 9; --lr was 0.001, is 1.0 (")])
def test_another_run_is_refused_or_overwritten(inputs, runs, tmp_path, capsys, stage, changes, message, had):
    """Work of other flags or inputs that is used or replaced in silence; anything of it that --overwrite keeps."""
    (inputs / "changed.jsonl").write_text((inputs / "rankings.jsonl").read_text().replace("bad", "worse"))
    shutil.copytree(runs("reward") / "unbroken", inputs / "other", dirs_exist_ok=True)
    out = shutil.copytree(runs(stage) / had, tmp_path / "out")
    left = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, err = guarded(capsys, stage, inputs, out, **changes)
    assert code == 2 and f"{out} holds another run: {message}" in err
    assert left == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    interrupt(stage, inputs, out, 2, overwrite=True, **changes)
    assert f"{out} is overwritten: {message}" in capsys.readouterr().out and not (out / "done.json").exists()
    run(stage, inputs, out, overwrite=True, **changes)
    run(stage, inputs, tmp_path / "new", **changes)
    assert stages.outcome(out) == stages.outcome(tmp_path / "new")


def test_flags_that_change_no_result_may_change(inputs, runs, tmp_path):
    """A run out of memory that cannot resume with smaller microbatches; the same input elsewhere taken for another."""
    shutil.copytree(runs("dpo") / "interrupted", tmp_path / "out")
    shutil.copytree(inputs / "sft", tmp_path / "moved")
    run("dpo", inputs, tmp_path / "out", microbatch=1, recompute=True, model=tmp_path / "moved")
    ours, unbroken = (stages.outcome(folder)["lines"] for folder in (tmp_path / "out", runs("dpo") / "unbroken"))
    assert all(one == pytest.approx(other, abs=1e-3) for one, other in zip(ours, unbroken, strict=True))


def test_a_run_that_finished_meanwhile_is_kept(inputs, runs, tmp_path, monkeypatch, capsys):
    """The same command twice: the second reads its data while the first one finishes, and then deletes its model."""
    def finish_and_open(folder, plain=common.open_folder):
        shutil.copytree(runs("dpo") / "unbroken", folder, dirs_exist_ok=True)
        return plain(folder)
    monkeypatch.setattr(common, "open_folder", finish_and_open)
    assert guarded(capsys, "dpo", inputs, tmp_path / "out") == (0, "")
    assert same(tmp_path / "out", runs, "dpo")


def test_after_the_last_step_signals_end_the_run(inputs, tmp_path):
    """Normalisation and evaluation after the training that can no longer be interrupted, once the run was resumed."""
    interrupt("dpo", inputs, tmp_path, stages.STEPS["dpo"])
    run("dpo", inputs, tmp_path)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == [signal.default_int_handler, signal.SIG_DFL]


def test_two_runs_and_a_real_signal(inputs, tmp_path, capsys):
    """Two processes that write into each other's files; a SIGTERM that loses the state; a lock that outlives its run."""
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
