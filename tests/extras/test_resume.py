"""Runs that are broken off, killed, misused or fed bad numbers: what they leave, and how they go on."""
import copy
import fcntl
import importlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import common
import doctor
import faults
import ppo
import runs
from common import UserError
from conftest import log_of
from model import load_model

LOG = ("log.text", "log.sums", "log.counts", "log.steps")
# All that a state holds (the test below sees to it that this is all), and a run that goes wrong without it.
ITEMS = {"sft": ("step", "seconds", "model", "optimizer", "best", "dropout", *LOG),
         "reward": ("step", "seconds", "model", "optimizer", "dropout", *LOG),
         "ppo": ("step", "seconds", "policy", "value", "optimizer", "controller", "sampling", "streak", *LOG),
         "dpo": ("step", "seconds", "policy", "optimizer", *LOG)}
# After each iteration PPO has written its line, and nothing is summed up yet: those items are seen in the other stages.
EMPTY = {("ppo", "log.sums"), ("ppo", "log.counts")}
ADAM = ("optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step")


@pytest.fixture(autouse=True)
def no_estimates(monkeypatch):
    """The speed of matrix products is measured before each run: not a hundred times here."""
    for name in ("sft", "reward", "ppo", "dpo"):
        monkeypatch.setattr(importlib.import_module(name), "announce", lambda *_: None)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return faults.make_inputs(tmp_path_factory.mktemp("inputs"))


def run(stage, given, out, **changes):
    """A stage's run in this process."""
    script, flags = faults.settings(stage, given, out)
    module = importlib.import_module(script)
    module.main(module.Config(**{**flags, "save_every": 1e9, **changes}))


def guarded(monkeypatch, capsys, stage, given, out, **changes):
    """The same through the guard of the command line: (exit code, what it wrote to stderr)."""
    script, flags = faults.settings(stage, given, out)
    module = importlib.import_module(script)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**flags, **changes}.items()]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.run(module.main, module.Config, module.PRESETS)
    return stop.value.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def unbroken(given, tmp_path_factory):
    """Function: what a stage's run leaves that nobody breaks off, by faults.outcome."""
    found = {}

    def left(stage, **changes):
        key = stage, str(changes)
        if key not in found:
            out = tmp_path_factory.mktemp("unbroken") / "out"
            run(stage, given, out, **changes)
            found[key] = faults.outcome(out)
        return found[key]
    return left


def broken_off(stage, given, out, step, **changes):
    """A run that gets SIGTERM during this step: it leaves its state."""
    keep = runs.Stage.keep

    def interrupted(self, done):
        if done == step:
            signal.raise_signal(signal.SIGTERM)
        keep(self, done)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Stage, "keep", interrupted)
        with pytest.raises(UserError, match="the same command goes on") as stop:
            run(stage, given, out, **changes)
    assert stop.value.code == 143


def forget(monkeypatch, item):
    """Have the next run come back without this item of its state: it keeps the value that it starts with."""
    load, resume, fresh = checkpoint.load, runs.Stage.resume, {}

    def resumed(self, steps, *args, **parts):
        fresh.update({name: copy.deepcopy(runs.get_state(part)) for name, part in parts.items()})
        return resume(self, steps, *args, **parts)

    def loaded(path, *advice):
        state = load(path, *advice)
        if Path(path).name == "resume.pt":
            part, _, within = item.partition(".")
            if part in ("step", "seconds"):
                state[part] = 0
            elif part == "optimizer" and within:  # a tensor per weight
                for moments in state["parts"]["optimizer"]["state"].values():
                    moments[within] = torch.zeros_like(moments[within])
            elif within:
                state["parts"][part][within] = fresh[part][within]
            else:
                state["parts"][part] = fresh[part]
        return state
    monkeypatch.setattr(runs.Stage, "resume", resumed)
    monkeypatch.setattr(runs, "load", loaded)


# ---- exact resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", faults.STAGES)
def test_every_fault_and_the_run_goes_on(tmp_path, stage):
    """A file that is half written, a state that lags behind the log, a signal that loses work: short form of faults.py,
    with real processes that really die."""
    lab = faults.Lab(tmp_path)
    *_, saves = lab.reference(stage)
    for number, point in enumerate(faults.POINTS):
        code, _, equal = lab.fault(stage, point, number=1 + (5 * number + 2) % saves)
        assert (code, equal) == (9, True), point
    code, step, equal = lab.fault(stage, kill=signal.SIGKILL)  # as soon as there is a state
    assert (code, equal) == (-9, True) and step > 0


@pytest.mark.parametrize("stage", ITEMS)
def test_the_items_are_all_that_a_state_holds(given, tmp_path, stage):
    """An item of the state that no test below forgets."""
    broken_off(stage, given, tmp_path, 2)
    state = checkpoint.load(tmp_path / "resume.pt")
    found = {"step", "seconds", *state["parts"], *(f"log.{name}" for name in state["parts"]["log"])} - {"log"}
    assert set(state) == {"step", "seconds", "parts"} and found == set(ITEMS[stage])


@pytest.mark.parametrize("stage", ITEMS)
def test_a_run_goes_on_bit_for_bit(given, unbroken, tmp_path, stage):
    """The same as below with nothing forgotten, from the middle of a log interval and from after the last step."""
    steps = {"sft": 8, "reward": 12, "ppo": 6, "dpo": 8}[stage]
    for step in (2, 5, steps):
        out = tmp_path / str(step)
        broken_off(stage, given, out, step)
        run(stage, given, out)
        assert faults.outcome(out) == unbroken(stage), step


@pytest.mark.parametrize("stage, item", [
    *((stage, item) for stage in ITEMS for item in ITEMS[stage]
      if (stage, item) not in EMPTY and item not in ("seconds", "log.steps", "streak")),
    *((stage, item) for stage in ITEMS for item in ADAM)])
def test_a_forgotten_item_shows(given, unbroken, tmp_path, monkeypatch, stage, item):
    """A state that lacks this item and a comparison that does not see it: each has to change log or weights."""
    broken_off(stage, given, tmp_path, 5)
    forget(monkeypatch, item)
    run(stage, given, tmp_path)
    assert faults.outcome(tmp_path) != unbroken(stage)


def test_forgotten_seconds_show(given, tmp_path, monkeypatch):
    """A run whose time is only that since the last crash."""
    broken_off("dpo", given, tmp_path, 5)
    plain = checkpoint.load(tmp_path / "resume.pt")
    checkpoint.save(tmp_path / "resume.pt", {**plain, "seconds": 1000.0})
    shutil.copytree(tmp_path, tmp_path / "again")
    run("dpo", given, tmp_path)
    assert json.loads((tmp_path / "done.json").read_text())["seconds"] >= 1000
    assert log_of(tmp_path)[-1]["seconds"] >= 1000 > log_of(tmp_path)[0]["seconds"]
    forget(monkeypatch, "seconds")
    run("dpo", given, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "done.json").read_text())["seconds"] < 1000


@pytest.mark.parametrize("stage", ITEMS)
@pytest.mark.parametrize("item", ["", "log.steps"])
def test_a_fault_after_a_continuation_names_the_right_step(given, tmp_path, monkeypatch, stage, item):
    """A count of optimizer steps that begins again with every continuation."""
    broken_off(stage, given, tmp_path, 4)
    if item:
        forget(monkeypatch, item)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    per_step = 4 if stage == "ppo" else 1  # two epochs of two minibatches
    with pytest.raises(UserError, match="grad_norm is not finite") as stop:
        run(stage, given, tmp_path)
    assert (f"optimizer step {4 * per_step + 1}:" in str(stop.value)) == (not item)
    assert f"the last good state is {tmp_path}/resume.pt" in str(stop.value) and stop.value.code == 4


@pytest.mark.parametrize("item", ["", "streak"])
def test_rollouts_below_zero_are_counted_on(given, tmp_path, monkeypatch, item):
    """A guard that forgets with every continuation how long KL has been below zero."""
    monkeypatch.setattr(doctor, "NEGATIVE", math.inf)
    broken_off("ppo", given, tmp_path, 3)
    if item:
        forget(monkeypatch, item)
        return run("ppo", given, tmp_path)  # three more rollouts are too few for the guard
    with pytest.raises(UserError, match="below zero for 5 rollouts") as stop:
        run("ppo", given, tmp_path)
    *lines, last = log_of(tmp_path)
    assert stop.value.code == 6 and len(lines) == 4 and "below zero for 5 rollouts" in last["stopped"]
    return None


def test_the_state_is_saved_at_its_interval(given, tmp_path, monkeypatch):
    """A state that is never saved, or at every step, whatever --save-every says."""
    saved, clock = [], iter(range(10**6))
    monkeypatch.setattr(runs.time, "time", lambda: next(clock))  # a second passes whenever one looks
    for module in (checkpoint, runs):
        monkeypatch.setattr(module, "save", lambda path, content: saved.append(content.get("step")))
    run("dpo", given, tmp_path / "a", save_every=1e6)
    assert saved == [8, None]  # at the end, and the checkpoint
    run("dpo", given, tmp_path / "b", save_every=4.0)
    assert len(saved) > 4


def test_a_second_signal_ends_the_run_at_once(given, tmp_path, monkeypatch):
    """A run that cannot be stopped while a step takes long; two signals of one Ctrl-C that lose the state."""
    stage = runs.Stage(ppo.Config(out=str(tmp_path)))
    stage.received = 0
    stage.interrupt(signal.SIGINT, None)
    stage.interrupt(signal.SIGTERM, None)  # from the shell, with the first
    assert stage.received == signal.SIGINT
    stage.when -= 2
    with pytest.raises(KeyboardInterrupt) as stop:
        stage.interrupt(signal.SIGINT, None)
    assert stop.value.args == (130,)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_a_file_is_read(given, tmp_path, monkeypatch, capsys, number, code):
    """A signal that is taken for a damaged file: the advice would be to delete a state that is good."""
    broken_off("dpo", given, tmp_path, 3)
    monkeypatch.setattr(torch, "load", lambda *_, **__: signal.raise_signal(number))
    assert guarded(monkeypatch, capsys, "dpo", given, tmp_path) == (code, "stopped\n")
    assert (tmp_path / "resume.pt").exists()


def test_signal_handlers_are_put_back(given, tmp_path):
    """A report after the last step, or a notebook, that can no longer be interrupted."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run("dpo", given, tmp_path / "a")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    broken_off("dpo", given, tmp_path / "b", 3)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---- one run per folder ----------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_run_again(given, tmp_path, monkeypatch, capsys):
    """Hours of training for a command that was given twice."""
    run("dpo", given, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    code, err = guarded(monkeypatch, capsys, "dpo", given, tmp_path)
    assert (code, err) == (0, "") and before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert not (tmp_path / "resume.pt").exists()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("stage, changes, message", [
    ("sft", {"seed": 2}, "--seed was 1, is 2"), ("sft", {"lr": 0.5}, "--lr was 0.2, is 0.5"),
    ("base", {"width": 32}, "--width was 16, is 32"), ("ppo", {"prompts": "rankings"}, "--prompts was sha256"),
    ("dpo", {"model": "reward"}, "--model was sha256"),
    ("reward", {"lr": 1.0, "epochs": 9}, "--epochs was 4, is 9; --lr was 0.001, is 1.0 (")])
def test_another_run_is_refused(given, tmp_path, monkeypatch, capsys, finished, stage, changes, message):
    """A run that goes on with another size, seed, file or parent, or that overwrites finished work in silence."""
    if finished:
        run(stage, given, tmp_path / "out")
    else:
        broken_off(stage, given, tmp_path / "out", 2)
    left = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    changes = {name: getattr(given, str(value), value) for name, value in changes.items()}
    code, err = guarded(monkeypatch, capsys, stage, given, tmp_path / "out", **changes)
    assert code == 2 and err.count("\n") == 1 and f"{tmp_path}/out holds another run: {message}" in err
    assert left == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}


def test_restart_begins_again(given, unbroken, tmp_path, capsys):
    """--restart true that goes on with the old state, or keeps anything of it."""
    broken_off("ppo", given, tmp_path, 3, seed=2)
    run("ppo", given, tmp_path, restart=True)
    assert "is begun again: --seed was 2, is 1" in capsys.readouterr().out
    assert faults.outcome(tmp_path) == unbroken("ppo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "collect", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("ppo", given, tmp_path, restart=True, seed=3)
    assert not (tmp_path / "model.pt").exists()  # of seed 1: a report on seed 3 must not find it
    broken_off("ppo", given, tmp_path / "same", 3, restart=True)
    run("ppo", given, tmp_path / "same", restart=True)  # the same run: it goes on
    assert "going on after step 3 of 6" in capsys.readouterr().out


def test_flags_that_change_no_result_may_change(given, tmp_path):
    """A run out of memory that cannot go on with smaller microbatches."""
    broken_off("ppo", given, tmp_path, 3)
    run("ppo", given, tmp_path / "plain")
    run("ppo", given, tmp_path, microbatch=1, recompute=True, save_every=7.0, kl_ceiling=0.0, sample_every=1)
    for ours, plain in zip(log_of(tmp_path), log_of(tmp_path / "plain"), strict=True):
        assert {n: x for n, x in ours.items() if n not in faults.TIMES | {"sample"}} == pytest.approx(
            {n: x for n, x in plain.items() if n not in faults.TIMES | {"sample"}}, abs=1e-3)
        assert all(line["sample"]["response"] == ours["sample"]["response"] for line in [plain] if "sample" in line)


def test_a_run_that_was_begun_again_is_not_finished(given, tmp_path):
    """done.json of the run before, beside the state of the next one: it would count as finished."""
    run("ppo", given, tmp_path)
    assert len(list((tmp_path / "snapshots").iterdir())) == 3
    broken_off("ppo", given, tmp_path, 2, restart=True, snapshots=1)
    assert not (tmp_path / "done.json").exists() and not (tmp_path / "model.pt").exists()
    run("ppo", given, tmp_path, restart=True, snapshots=1)
    assert len(list((tmp_path / "snapshots").iterdir())) == 1  # none of the run before


@pytest.mark.parametrize("lost", ["model.pt", "vocab.tiktoken", "log.jsonl"])
@pytest.mark.parametrize("damage", ["gone", "a bit"])
def test_a_finished_run_without_its_output_is_run_again(given, unbroken, tmp_path, capsys, lost, damage):
    """"Finished already" here and "run its stage again" there, whatever one does. A text may be edited, and what else
    lies in the folder may come and go."""
    (tmp_path / "nohup.out").write_text("")
    run("sft", given, tmp_path)
    (tmp_path / "nohup.out").unlink()
    content = (tmp_path / lost).read_bytes()
    (tmp_path / lost).unlink()
    if damage == "a bit":
        (tmp_path / lost).write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    if (lost, damage) == ("log.jsonl", "a bit"):
        with pytest.raises(UserError, match="finished already"):
            run("sft", given, tmp_path)
        return
    run("sft", given, tmp_path)
    assert f"{lost} missing or damaged: run again" in capsys.readouterr().out
    assert faults.outcome(tmp_path) == unbroken("sft")


def test_killed_between_its_last_two_files_a_run_is_finished(given, tmp_path, monkeypatch):
    """The state deleted before the run counts as finished, so that all is lost; or a state that stays for ever."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, missing_ok=False, plain=Path.unlink: (
            1 / 0 if path.name == "resume.pt" and path.exists() else plain(path, missing_ok)))
        with pytest.raises(ZeroDivisionError):
            run("dpo", given, tmp_path)
    assert (tmp_path / "done.json").exists() and (tmp_path / "resume.pt").exists()
    with pytest.raises(UserError, match="finished already"):
        run("dpo", given, tmp_path)
    assert not (tmp_path / "resume.pt").exists()


def test_only_the_files_that_are_read_count(given, tmp_path, monkeypatch):
    """A finished run begun again because of a file that it never reads, or of one that has the name of a flag's value;
    a changed file that is not noticed as its path holds a comma."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(given.sft, tmp_path / "a, b")
    run("dpo", given, tmp_path / "dpo", model="a, b")
    (tmp_path / "cpu").write_text("x")
    shutil.copytree(given.reward, tmp_path / "a")  # the first part of a name is another folder
    with pytest.raises(UserError, match="finished already"):
        run("dpo", given, tmp_path / "dpo", model="a, b")
    shutil.copy(Path(given.reward) / "model.pt", tmp_path / "a, b" / "model.pt")
    with pytest.raises(UserError, match="--model was sha256"):
        run("dpo", given, tmp_path / "dpo", model="a, b")
    run("sft", given, tmp_path / "sft", vocab="vocab of a new model")
    (tmp_path / "vocab of a new model").write_text("x")
    with pytest.raises(UserError, match="finished already"):
        run("sft", given, tmp_path / "sft", vocab="vocab of a new model")


def test_a_run_into_the_folder_of_its_parent(given, tmp_path, monkeypatch, capsys):
    """The SFT model overwritten by what was to be compared with it."""
    shutil.copytree(given.sft, tmp_path / "parent")
    (tmp_path / "link").symlink_to(tmp_path / "parent")
    assert guarded(monkeypatch, capsys, "dpo", given, tmp_path / "parent", model=str(tmp_path / "link"))[0] == 2
    for stage, flag in (("sft", "model"), ("ppo", "sft"), ("dpo", "model")):
        code, err = guarded(monkeypatch, capsys, stage, given, tmp_path / "parent", **{flag: str(tmp_path / "parent")})
        assert (code, err) == (2, f"error: --out {tmp_path}/parent: the folder of --{flag}\n")
    assert guarded(monkeypatch, capsys, "dpo", given, "")[1] == "error: --out is empty: name a folder\n"


def test_an_unfinished_model_is_used_with_a_notice(given, tmp_path, capsys):
    """A reward model on an SFT model that was stopped half-way, without anybody knowing."""
    broken_off("sft", given, tmp_path / "sft", 5)
    load_model(tmp_path / "sft")
    assert f"{tmp_path}/sft: the run that trains this model is not finished" in capsys.readouterr().out


def test_a_terminal_that_is_gone(given, tmp_path):
    """Ctrl-C ends tee first: a run that dies of it before it has saved; a closed terminal that kills it."""
    script, flags = faults.settings("ppo", given, tmp_path / "out")
    for number, kept in ((signal.SIGINT, "stdout"), (signal.SIGHUP, None)):
        flags.update(iterations=2000, save_every=1e9, snapshots=1, out=str(tmp_path / number.name))
        command = [sys.executable, f"{faults.ROOT}/{script}.py", "--sample-every", "1",
                   *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert any(b"iteration 10" in line for line in iter(process.stdout.readline, b""))
        if kept:
            process.stdout.close()
        process.send_signal(number)
        if not kept:
            process.stdout.read()
        assert process.wait(60) == 128 + number
        assert checkpoint.load(tmp_path / number.name / "resume.pt")["step"] >= 10


def test_the_same_files_elsewhere_are_the_same_inputs(given, tmp_path):
    """A project folder that was moved, and every run in it begun again."""
    broken_off("dpo", given, tmp_path / "out", 3)
    shutil.copytree(given.sft, tmp_path / "moved")
    run("dpo", given, tmp_path / "out", model=str(tmp_path / "moved"))


def test_a_run_of_an_unknown_configuration_is_refused(given, tmp_path):
    """Finished work, of an older version or with a damaged config.json, that is overwritten."""
    run("dpo", given, tmp_path)
    for content in ("", "{", "[1]", '{"stage": 1, "inputs": 2}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="holds another run"):
            run("dpo", given, tmp_path)


def test_two_runs_on_one_folder(given, tmp_path, monkeypatch, capsys):
    """Two processes that write into each other's files."""
    broken_off("dpo", given, tmp_path, 3)
    os.close(runs.LOCKED.pop(tmp_path.resolve()))
    handle = os.open(tmp_path, os.O_RDONLY)  # as another process has it: a handle of its own
    fcntl.flock(handle, fcntl.LOCK_EX)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for train in (given.rankings, "nowhere"):  # refused at once: before any input is read
        code, err = guarded(monkeypatch, capsys, "dpo", given, tmp_path, train=train)
        assert (code, err.count("\n")) == (2, 1) and "another run is at work there" in err
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    os.close(handle)
    run("dpo", given, tmp_path)


def test_a_lock_dies_with_its_process(tmp_path):
    """A lock that outlives kill -9, so that no run can go on."""
    hold = subprocess.Popen([sys.executable, "-c", "import runs, sys, time; runs.open_folder(sys.argv[1]);"
                             "print('held', flush=True); time.sleep(60)", str(tmp_path)], stdout=subprocess.PIPE,
                            cwd=faults.ROOT, text=True)
    assert hold.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run is at work"):
        runs.open_folder(tmp_path)
    hold.kill()
    hold.wait()
    runs.open_folder(tmp_path)


# ---- the disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_disk_that_fills_up(given, unbroken, tmp_path, monkeypatch, capsys, stage):
    """A traceback, or half a file in place of the last good one, when there is no room for the next."""
    broken_off(stage, given, tmp_path, 3)
    before = (tmp_path / "resume.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        code, err = guarded(monkeypatch, capsys, stage, given, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, err.count("\n")) == (3, 1) and "cannot be written" in err and "Traceback" not in err
    assert (tmp_path / "resume.pt").read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    run(stage, given, tmp_path)
    assert faults.outcome(tmp_path) == unbroken(stage)


def test_no_room_is_said_before_the_training(given, tmp_path, monkeypatch, capsys):
    """A night of training whose checkpoint no longer fits: the state, with Adam's two moments, and the checkpoint stand
    there twice while they are replaced."""
    model = sum(x.nbytes for x in load_model(given.sft).state_dict().values())
    for share, expected in ((7.9, 3), (8.1, 143)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=share * model))
        monkeypatch.setattr(runs.Stage, "keep", lambda *_: signal.raise_signal(signal.SIGTERM) or 1 / 0)
        monkeypatch.setattr(runs.Stage, "interrupt", lambda *_: common.check(False, "training has begun", 143))
        code, err = guarded(monkeypatch, capsys, "dpo", given, tmp_path / str(share))
        assert (code, err.count("\n")) == (expected, 1) and ("MB are free on this disk" in err) == (expected == 3), err


def test_a_folder_that_cannot_be_made_or_written(given, tmp_path, monkeypatch, capsys):
    """A traceback for --out on a read-only disk, or below a file."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file", "/proc/nothing"):
        code, err = guarded(monkeypatch, capsys, "dpo", given, out)
        assert (code, err.count("\n")) == (3, 1) and f"--out {out}" in err

    def refused(path, flags, *args, plain=os.open):
        if flags != os.O_RDONLY:
            raise PermissionError(13, "Read-only file system", str(path))
        return plain(path, flags, *args)
    monkeypatch.setattr(Path, "write_text", lambda path, *_: refused(path, os.O_WRONLY))
    code, err = guarded(monkeypatch, capsys, "dpo", given, tmp_path / "read-only")
    assert (code, err.count("\n")) == (3, 1) and "config.json: cannot be written: Read-only file system" in err


@pytest.mark.parametrize("stage", ITEMS)
def test_a_folder_that_is_deleted_under_way(given, tmp_path, monkeypatch, capsys, stage):
    """A traceback when somebody tidies up during a run."""
    keep = runs.Stage.keep
    monkeypatch.setattr(runs.Stage, "keep", lambda self, step: (shutil.rmtree(tmp_path / "out", True),
                                                                      keep(self, step)))
    code, err = guarded(monkeypatch, capsys, stage, given, tmp_path / "out", save_every=1e9)
    assert (code, err.count("\n")) == (3, 1) and str(tmp_path / "out") in err


def test_what_is_saved_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut that leaves an empty file under the right name: data, then the name, then the folder."""
    done = []
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle, plain=os.fsync: (
        done.append(f"sync {os.readlink(f'/proc/self/fd/{handle}')}"), plain(handle)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda source, path, plain=os.replace: (
        done.append(f"name {path}"), plain(source, path)))
    checkpoint.save(tmp_path / "x.pt", {"x": torch.ones(3)})
    assert done == [f"sync {tmp_path}/x.pt.tmp", f"name {tmp_path}/x.pt", f"sync {tmp_path}"]


# ---- bad numbers, guards, memory -------------------------------------------------------------------------------------


LOSS = {"sft": ("sft", "row_logprobs"), "reward": ("reward", "ranking_loss"), "ppo": ("ppo", "policy_loss"),
        "dpo": ("dpo", "dpo_loss")}


@pytest.mark.parametrize("stage", LOSS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(given, unbroken, tmp_path, monkeypatch, capsys, stage, value):
    """A checkpoint full of NaN, or an infinite loss whose gradient looks harmless: the step must not be made."""
    script, name = LOSS[stage]
    module, calls = importlib.import_module(script), []
    plain = getattr(module, name)

    def spoiled(*args, **how):
        calls.append(torch.is_grad_enabled())
        result = plain(*args, **how)
        if sum(calls) < 8:  # the first losses of the training are good
            return result
        return (result[0] + value, *result[1:]) if isinstance(result, tuple) else result + value
    monkeypatch.setattr(module, name, spoiled)
    code, err = guarded(monkeypatch, capsys, stage, given, tmp_path)
    assert (code, err.count("\n")) == (4, 1) and "loss is not finite" in err and "optimizer step" in err
    assert f"the last good state is {tmp_path}/resume.pt" in err
    for path in tmp_path.rglob("*.pt"):
        checkpoint.load(path)  # which looks for NaN
    monkeypatch.setattr(module, name, plain)
    run(stage, given, tmp_path)
    assert faults.outcome(tmp_path) == unbroken(stage)


def test_a_held_out_loss_of_nan_is_never_the_best(given, tmp_path, monkeypatch):
    """NaN < best is false, but so is best < NaN: a run that ends without a checkpoint, or with that of NaN."""
    import sft
    monkeypatch.setattr(sft, "held_out_loss", lambda *_: math.nan)
    with pytest.raises(UserError, match="test_loss is not finite") as stop:
        run("sft", given, tmp_path)
    assert stop.value.code == 4 and not (tmp_path / "model.pt").exists()


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(given, tmp_path, monkeypatch):
    """A NaN in one weight that shows after hours, as a loss of NaN in another stage."""
    model = load_model(given.sft)
    model.trunk.blocks[0].up.weight.data[3, 2] = math.nan
    with pytest.raises(UserError, match="weights.trunk.blocks.0.up.weight is not finite") as stop:
        checkpoint.save_checkpoint(tmp_path / "bad", model, ppo.Config(), given.vocab)
    assert stop.value.code == 4 and not (tmp_path / "bad" / "model.pt").exists()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "check_finite", lambda *_: None)
        checkpoint.save_checkpoint(tmp_path / "bad", model, ppo.Config(), given.vocab)
    for stage, flag in (("sft", "model"), ("reward", "model"), ("ppo", "sft"), ("dpo", "model")):
        with pytest.raises(UserError, match="bad/model.pt: weights.trunk.blocks.0.up.weight is not finite") as stop:
            run(stage, given, tmp_path / "out", **{flag: str(tmp_path / "bad")})
        assert stop.value.code == 4 and not (tmp_path / "out").exists()


def test_kl_that_runs_away_stops_the_run(given, tmp_path, monkeypatch, capsys):
    """A policy that has left the SFT model hours ago, and a last checkpoint of nonsense."""
    fast = {"lr": 0.1, "iterations": 30, "kl_horizon": 0.0}
    code, err = guarded(monkeypatch, capsys, "ppo", given, tmp_path, **fast, kl_ceiling=0.5)
    assert (code, err.count("\n")) == (6, 1) and "above --kl-ceiling 0.5: the policy runs away" in err
    state = checkpoint.load(tmp_path / "resume.pt")
    *lines, last = log_of(tmp_path)
    assert state["step"] == len(lines) and all(line["kl"] <= 0.5 for line in lines) and "KL is" in last["stopped"]
    run("ppo", given, tmp_path, **fast, kl_ceiling=0.0)  # on, if that is what is wanted
    assert max(line["kl"] for line in log_of(tmp_path)) > 0.5


def test_a_first_ratio_that_is_not_1_stops_the_run(given, tmp_path, monkeypatch):
    """Dropout in the policy: old and new log-probabilities of other passes, in every update."""
    monkeypatch.setattr(doctor, "CLOSE", 1e-3)  # an untrained policy hardly minds dropout
    run("ppo", given, tmp_path / "well")
    monkeypatch.setattr(ppo, "load_model", lambda folder, device, kind="lm", recompute=False: load_model(
        folder, device, kind, dropout=0.5).train(kind == "lm"))
    with pytest.raises(UserError, match="away from 1 though nothing has been learned yet") as stop:
        run("ppo", given, tmp_path / "ill")
    assert stop.value.code == 6 and not (tmp_path / "ill" / "model.pt").exists()


def test_doubts_are_named_in_the_log(given, tmp_path, monkeypatch):
    """A policy that never ends, or always says the same, and a log that does not say so."""
    plain, shares = ppo.collect, []

    def collect(*args):
        rollout, metrics = plain(*args)
        return rollout, {**metrics, "end_rate": torch.tensor(shares[0]), "distinct": shares[1]}
    monkeypatch.setattr(ppo, "collect", collect)
    for name, shares[:], expected in (("well", (0.5, 0.9), ""), ("ill", (0.01, 0.05), (
            "hardly a response reaches end of text, nearly all responses are the same"))):
        run("ppo", given, tmp_path / name)
        assert {line["warnings"] for line in log_of(tmp_path / name)} == {expected}


def out_of_memory(kind):
    if kind == "cpu":
        return torch.empty(2**60)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate") if kind == "cuda" else MemoryError


@pytest.mark.parametrize("kind", ["cpu", "cuda", "python"])
def test_out_of_memory_says_what_to_lower(given, tmp_path, monkeypatch, capsys, kind):
    """Forty lines of traceback, and the flags still unknown."""
    monkeypatch.setattr(ppo, "update", lambda *_: out_of_memory(kind))
    assert guarded(monkeypatch, capsys, "ppo", given, tmp_path) == (
        5, "error: out of memory: lower --microbatch or --response-tokens\n")


def test_a_fault_of_ours_keeps_its_traceback(given, tmp_path, monkeypatch):
    """A bug that is reported as a lack of memory, and never found."""
    def broken(*_):
        raise RuntimeError("shapes cannot be multiplied")
    monkeypatch.setattr(ppo, "update", broken)
    monkeypatch.setattr(sys, "argv", ["ppo"])
    with pytest.raises(RuntimeError, match="shapes"):
        common.run(lambda cfg: broken(), ppo.Config)
