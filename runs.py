"""One run in its output folder: the lock, the log, the state to go on from. A reader may skip this file; nothing in it
knows about RLHF. What the folder of a stage holds:

    model.pt        the weights, and what they are: kind, sizes, flags (torch.load(weights_only=True) reads it)
    vocab.tiktoken  the tokenizer, so that the folder is complete by itself
    config.json     flags, sha256 of the files that they name, versions: for people, and to tell one run from another
    log.jsonl       one line per log interval
    resume.pt       until the run is finished: everything that it needs to go on as if it had never stopped
    done.json       written last: seconds, peak memory, sha256 of all that was written; without it no stage is finished
"""
import dataclasses
import fcntl
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from checkpoint import VERSIONS, digest, load, save, save_checkpoint, write_json
from common import DISK, NOT_FINITE, UserError, check

# Flags that may change between a run and its continuation: they change no result, up to rounding and dropout's luck.
FREE = {"out", "restart", "save_every", "microbatch", "recompute", "graph", "sample_every", "kl_ceiling",
        "max_calls", "parallel", "timeout", "dry_run"}
LOCKED = {}  # folder that this process has locked: its open handle


def lock(folder):
    """Keep other processes out of a folder until this one ends, however it does. UserError if one is at work there."""
    folder = Path(folder).resolve()
    if folder not in LOCKED:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(f"{folder}: another run is at work there (wait for it, or name another folder)") from None
        except OSError:
            pass  # a file system that has no locks
        LOCKED[folder] = handle


def open_folder(folder, last=None):
    """The Path of an output folder: made if need be, locked, and without the file that is written last (if named), as
    what is begun again must not look finished. UserError if that can't be."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        if last:
            (folder / last).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}", DISK) from None
    return folder


def files_of(value):
    """The files behind a flag's value: a file, a folder's weights (ours, or Hugging Face's), or several of these with
    commas between."""
    paths = [Path(value)] if Path(value).exists() else [Path(part) for part in value.split(",")]
    theirs = ("model.safetensors", "pytorch_model.bin", "config.json", "vocab.tiktoken")
    paths = [file for path in paths for file in (
        [path / "model.pt"] if (path / "model.pt").is_file() else [path, *(path / name for name in theirs)])]
    return list(filter(Path.is_file, paths))


class Stage:
    """One run in its output folder: skipped if it is finished, continued if it was interrupted, refused if the folder
    holds the work of other flags or inputs (unless --restart true, which begins again).

    In main: Stage(cfg, names of the flags that name inputs), open() once the input is known to be good, resume() before
    the loop, keep() after each step, save() and finish().
    """

    def __init__(self, cfg, *inputs, folder=None):
        """inputs: the flags that name files or checkpoints which the run reads; a change in one is another run."""
        self.cfg, self.folder, self.start, self.inputs = cfg, Path(folder or cfg.out), time.time(), {}
        check(cfg.out or folder, "--out is empty: name a folder")
        if self.folder.is_dir():
            lock(self.folder)
        for name in inputs:
            files = files_of(value) if (value := getattr(cfg, name)) else []
            check(self.folder.resolve() / "model.pt" not in [file.resolve() for file in files],
                  f"--out {self.folder}: the folder of --{name}")
            try:
                self.inputs |= {name: "sha256 " + ", ".join(map(digest, files))} if files else {}
            except OSError as error:
                raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
        self.changed = self.compare()
        if not self.changed and self.whole():
            (self.folder / "resume.pt").unlink(missing_ok=True)  # of a run that was killed just after it had finished
            raise UserError(f"{self.folder}: finished already", 0)  # not an error, but an end

    def compare(self):
        """How this run differs from the one whose work the folder holds, in words, and UserError unless --restart true;
        "" if it is the same run, or if there is no work yet."""
        if not any((self.folder / name).is_file() for name in ("done.json", "resume.pt")):
            return ""
        try:
            before = json.loads((self.folder / "config.json").read_text())
            before = {**before["stage"], **before["inputs"]}
        except (OSError, ValueError, KeyError, TypeError):
            before = {}
        now = {**dataclasses.asdict(self.cfg), **self.inputs}
        names = [name for name in {**now, **before} if name not in FREE and before.get(name) != now.get(name)
                 and str(before.get(name)) != str(now.get(name))]  # equal are 2 and 2.0, and, in writing, nan and nan
        changed = "; ".join(f"--{name.replace('_', '-')} was {before.get(name)}, is {now.get(name)}"
                            for name in names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
        changed = changed if before else "of unknown flags, as config.json is damaged or of an older version"
        check(self.cfg.restart or not changed, f"{self.folder} holds another run: {changed} (choose another --out, or "
                                               "begin again with --restart true)")
        return changed

    def whole(self):
        """Whether the folder holds a finished run with everything that it wrote; says so if something is missing.
        Models and vocabularies must be unchanged; a text, such as rankings, may have been edited by hand."""
        try:
            outputs = json.loads((self.folder / "done.json").read_text())["outputs"]
            lost = [name for name, sha256 in outputs.items() if not (file := self.folder / name).is_file()
                    or name.endswith((".pt", ".tiktoken")) and digest(file) != sha256]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if lost:
            print(f"{self.folder}: {', '.join(lost)} missing or damaged: run again", flush=True)
        return not lost

    def open(self):
        """Make and lock the folder, and note in config.json which run it is for."""
        open_folder(self.folder, "done.json")
        if self.changed:
            print(f"{self.folder} is begun again: {self.changed}", flush=True)
            (self.folder / "resume.pt").unlink(missing_ok=True)
        if not (self.folder / "resume.pt").exists():  # a fresh start: a model that is there is another run's
            (self.folder / "model.pt").unlink(missing_ok=True)
        write_json(self.folder / "config.json", {"stage": dataclasses.asdict(self.cfg), "inputs": self.inputs,
                                                 "versions": VERSIONS})

    def resume(self, steps, checkpoints=1, **parts):
        """How many of the steps an earlier run has done, whose state goes into the parts: all that changes from step to
        step (modules, optimizers, logs, generators, dicts; the first one is the module that is saved).

        checkpoints: how many the run will write, to see whether the disk has room. From here to the last step, SIGINT,
        SIGTERM and SIGHUP wait for the step to end, and for keep.
        """
        self.steps, self.parts, self.received, self.saved = steps, parts, 0, time.time()
        weights = [sum(x.nbytes for x in part.state_dict().values()) for part in parts.values()
                   if isinstance(part, torch.nn.Module)]
        # The state: 3 numbers per weight, as Adam keeps two, and the file is there twice while it is replaced.
        needed = 6 * sum(weights) + (checkpoints + 1) * weights[0]
        needed -= sum(path.stat().st_size for path in self.folder.rglob("*.pt*"))
        free = shutil.disk_usage(self.folder).free
        check(needed < free, f"--out {self.folder}: checkpoints need {needed / 1e6:,.1f} MB, and only "
                             f"{free / 1e6:,.1f} MB are free on this disk", DISK)
        done, path = 0, self.folder / "resume.pt"
        if path.is_file():
            state = load(path, "delete it to begin again")
            try:
                for name, part in parts.items():
                    set_state(part, state["parts"][name])
                done, seconds = state["step"], state["seconds"]
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
                raise UserError(f"{path}: not the state of this run, or of another device (delete it to begin again)"
                                ) from None
            self.start -= seconds
            print(f"going on after step {done} of {steps}", flush=True)
        if done < steps:
            self.handlers = {number: signal.signal(number, self.interrupt) for number in (
                signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN}  # nohup
        return done

    def interrupt(self, number, _):
        """Handle the first signal: remember it. A second one acts at once, unless it comes with the first."""
        if not self.received:
            self.received, self.when = number, time.time()
            try:
                os.write(2, b"\nstopping after this step\n")
            except OSError:
                pass  # the reader of our output has stopped before us
        elif time.time() - self.when > 1:
            raise KeyboardInterrupt(128 + number)

    def keep(self, step):
        """Call when this many steps are done: saves the state if it is time, if it was the last step, or if a signal
        has come, which then ends the run."""
        if step == self.steps or self.received or time.time() - self.saved >= self.cfg.save_every:
            save(self.folder / "resume.pt", {"step": step, "seconds": self.seconds(), "parts": {
                name: get_state(part) for name, part in self.parts.items()}})
            self.saved = time.time()
        if step == self.steps or self.received:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        if self.received:
            raise UserError(f"{self.folder}: stopped after step {step} of {self.steps}: the same command goes on from "
                            "there", 128 + self.received)

    def seconds(self):
        """Run time so far, that of earlier parts included."""
        return time.time() - self.start

    def save(self, model, vocab, **extra):
        """Write weights, configuration and tokenizer of a model (extra: JSON facts that belong to the weights)."""
        save_checkpoint(self.folder, model, self.cfg, vocab, inputs=self.inputs, **extra)
        self.saved = 0.0  # then keep saves the state, too: a model in a folder without it looks finished

    def finish(self, **facts):
        """Write done.json, the file that makes the stage count as finished."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        kinds = (".pt", ".tiktoken", ".json", ".jsonl", ".md", ".png")
        outputs = {path.name: digest(path) for path in sorted(self.folder.iterdir())
                   if path.suffix in kinds and path.name not in ("resume.pt", "done.json")}
        facts = {"seconds": round(self.seconds(), 1), "peak_memory_mb": round(peak), **facts}
        if torch.cuda.is_available():
            facts["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
        write_json(self.folder / "done.json", {**facts, "outputs": outputs})
        (self.folder / "resume.pt").unlink(missing_ok=True)
        print(f"{self.folder}: " + ", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)


def get_state(part):
    """What has to be saved of a part of a run."""
    if isinstance(part, dict):
        return part
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def set_state(part, state):
    """The reverse of get_state."""
    if isinstance(part, dict):
        part.update(state)
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)


class Log:
    """Averages metrics between two calls of write, and appends one JSON line per write to folder/log.jsonl."""

    def __init__(self, folder):
        self.path = Path(folder) / "log.jsonl"
        self.steps, self.text, self.sums, self.counts = 0, "", {}, {}  # steps of the optimizer, lines so far

    def add(self, weight=1.0, **metrics):
        """Collect one value per metric (floats or one-element tensors) towards the weighted mean of this interval.
        A tensor is summed on its device: a GPU is asked for values once per optimizer step, not per microbatch."""
        for name, value in metrics.items():
            value = value.detach() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0.0) + weight * value
            self.counts[name] = self.counts.get(name, 0.0) + weight

    def check_finite(self, metrics):
        """Stop the run if one of these is not a finite number."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                self.stop(f"{name} is not finite (a lower --lr usually helps, with --restart true)", NOT_FINITE)

    def stop(self, problem, code):
        """End the run before it does harm: UserError with folder, optimizer step, problem, and what is still good."""
        seen = {name: x for name in self.sums if math.isfinite(x := float(self.sums[name] / self.counts[name]))}
        with open(self.path, "a" if self.text else "w") as file:
            file.write(json.dumps({"stopped": problem, "optimizer_step": self.steps + 1, **seen}) + "\n")
        good = [path for name in ("resume.pt", "model.pt") if (path := self.path.with_name(name)).is_file()]
        raise UserError(f"{self.path.parent}, optimizer step {self.steps + 1}: {problem}; stopped before the step, "
                        f"{f'the last good state is {good[0]}' if good else 'nothing had been saved yet'}", code)

    def write(self, **facts):
        """Append the interval's means and these facts as one line; returns them as a dict."""
        line = {**facts, **{name: float(self.sums[name] / self.counts[name]) for name in self.sums}}
        self.check_finite({name: value for name, value in line.items() if isinstance(value, float)})
        rounded = {key: round(v, 6) if isinstance(v, float) else v for key, v in line.items()}
        self.sums, self.counts, text = {}, {}, json.dumps(rounded) + "\n"
        with open(self.path, "a" if self.text else "w") as file:  # there may be one of an earlier run
            file.write(text)
        self.text += text
        return line

    def last(self):
        """The last line, as a dict."""
        return json.loads(self.text.splitlines()[-1])

    def state_dict(self):
        return {name: value for name, value in vars(self).items() if name != "path"}

    def load_state_dict(self, state):
        vars(self).update(state)
        self.path.write_text(self.text)
