"""Files that outlive a crash: checkpoints, output folders, and the state that an interrupted run goes on from.

A reader may skip this file. Nothing in it knows about RLHF. What the folder of a stage holds:

    model.pt        the weights, and what they are: kind, sizes, flags (torch.load(weights_only=True) reads it)
    vocab.tiktoken  the tokenizer, so that the folder is complete by itself
    config.json     flags, sha256 of every input, versions: for people, and to tell one run from another
    log.jsonl       one line per log interval
    resume.pt       until the run is finished: everything that it needs to go on as if it had never stopped
    done.json       written last: seconds and peak memory; a stage without it is not finished

Every file is written under another name, put on the disk, and then renamed: a crash at any moment leaves the old file
or the new one. The .pt files end with the sha256 of all that stands before, so that one flipped bit is noticed.
"""
import dataclasses
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from common import DISK, NOT_FINITE, UserError, check

FORMAT = 1  # of the content of model.pt
VERSIONS = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
# Flags that may change between a run and its continuation: they change no result, up to rounding and dropout's luck.
FREE = {"out", "restart", "save_every", "microbatch", "recompute", "graph", "sample_every", "kl_ceiling"}


# ---- files ---------------------------------------------------------------------------------------------------------


def write_atomic(path, write):
    """Call write(temporary path), put the result on the disk, and move it to path, where the old file was till then."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)  # the new name, too
    except (OSError, RuntimeError) as error:  # torch.save reports some faults of the disk as RuntimeError
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass
        problem = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written: {problem} (what was there before is unharmed)", DISK) from None


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, content):
    """Write a dict as indented JSON, atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def digest(path, but=0):
    """sha256 in hexadecimal of a file, of any size, but for so many bytes at its end."""
    found, left = hashlib.sha256(), os.path.getsize(path) - but
    with open(path, "rb") as file:
        while block := file.read(max(0, min(2**20, left))):
            found.update(block)
            left -= len(block)
    return found.hexdigest()


def save(path, content):
    """Write nested dicts of tensors and plain values, atomically, so that load notices any damage."""
    def write(temporary):
        torch.save(content, temporary)
        with open(temporary, "r+b") as file:  # a zip archive: its last two bytes are the length of a comment
            file.seek(-2, os.SEEK_END)
            file.write((64).to_bytes(2, "little"))
            file.flush()
            file.write(digest(temporary).encode())
    check_finite(path, content)
    write_atomic(path, write)


def load(path):
    """What save wrote to path. UserError for anything else: nothing that is in the file is executed."""
    try:
        with open(path, "rb") as file:
            file.seek(-64, os.SEEK_END)
            whole = file.read() == digest(path, 64).encode()
        content = torch.load(path, map_location="cpu", weights_only=True) if whole else None
    except Exception:  # unreadable, or forbidden content: torch raises several types
        content = None
    check(isinstance(content, dict), f"{path}: damaged, or not a checkpoint of this version (run its stage again)")
    check_finite(path, content)
    return content


def check_finite(path, content, name=""):
    """UserError that names the first tensor in nested dicts with a number that is not finite."""
    if isinstance(content, dict):
        for key, value in content.items():
            check_finite(path, value, f"{name}.{key}".lstrip("."))
    elif torch.is_tensor(content) and content.is_floating_point():
        check(torch.isfinite(content).all(), f"{path}: {name} is not finite", NOT_FINITE)


# ---- output folders ------------------------------------------------------------------------------------------------


LOCKED = {}  # folders that this process has locked: the open handles


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


def files_of(path):
    """What a flag stands for that names this path: the file, the checkpoint in the folder, or else all its files."""
    check(not path.exists() or os.access(path, os.R_OK), f"{path}: cannot be read: permission denied")
    if path.is_dir():
        return [path / "model.pt"] if (path / "model.pt").is_file() else sorted(filter(Path.is_file, path.iterdir()))
    return [path] if path.is_file() else []


class Stage:
    """One run in its output folder: skipped if it is finished, continued if it was interrupted, refused if the folder
    holds the work of other flags or inputs (unless --restart true, which begins again).

    In main: Stage(cfg), open() once the input is known to be good, resume() before the loop, keep() after each step,
    save() and finish().
    """

    def __init__(self, cfg, folder=None):
        self.cfg, self.folder, self.start, self.inputs = cfg, Path(folder or cfg.out), time.time(), {}
        if self.folder.is_dir():
            lock(self.folder)
        for name, value in dataclasses.asdict(cfg).items():  # sha256 of the files and checkpoints that flags name
            if isinstance(value, str) and name != "out":
                paths = [path for part in value.split(",") if part for path in files_of(Path(part))]
                if paths:
                    self.inputs[name] = "sha256 " + ", ".join(map(digest, paths))
        if not self.compare() and (self.folder / "done.json").is_file():
            raise UserError(f"{self.folder}: finished already", 0)  # not an error, but an end

    def compare(self):
        """How this run differs from the one whose work the folder holds, in words; "" if there is none, or no work."""
        if not any((self.folder / name).is_file() for name in ("done.json", "resume.pt")):
            return ""
        try:
            before = json.loads((self.folder / "config.json").read_text())
            before = {**before["stage"], **before["inputs"]}
        except (OSError, ValueError, KeyError, TypeError):
            before = {}
        now = {**dataclasses.asdict(self.cfg), **self.inputs}
        names = [name for name in {**now, **before} if name not in FREE and before.get(name) != now.get(name)
                 and str(before.get(name)) != str(now.get(name))]  # written out, nan equals nan
        changed = "; ".join(f"--{name.replace('_', '-')} was {before.get(name)}, is {now.get(name)}"
                            for name in names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
        check(self.cfg.restart or not changed, f"{self.folder} holds another run: {changed} (choose another --out, or "
                                               "begin again with --restart true)")
        return changed

    def open(self):
        """Make and lock the folder, and note in config.json which run it is for."""
        changed = self.compare()
        open_folder(self.folder, "done.json")
        if changed:
            print(f"{self.folder} is begun again: {changed}", flush=True)
            (self.folder / "resume.pt").unlink(missing_ok=True)
        if not (self.folder / "resume.pt").exists():  # a fresh start: a model that is there is another run's
            (self.folder / "model.pt").unlink(missing_ok=True)
        write_json(self.folder / "config.json", {"stage": dataclasses.asdict(self.cfg), "inputs": self.inputs,
                                                 "versions": VERSIONS})

    def resume(self, steps, checkpoints=1, **parts):
        """How many of the steps an earlier run has done, whose state goes into the parts: all that changes from step to
        step (modules, optimizers, logs, generators, dicts; the first one is the module that is saved).

        checkpoints: how many the run will write, to see whether the disk has room. From here to the last step, SIGINT
        and SIGTERM wait for the step to end, and for keep.
        """
        self.steps, self.parts, self.signal, self.saved, first = steps, parts, 0, time.time(), 0
        weights = [sum(x.nbytes for x in part.state_dict().values()) for part in parts.values()
                   if isinstance(part, torch.nn.Module)]
        # Adam keeps two more numbers per weight; while a file is replaced, it is there twice.
        needed = 6 * sum(weights) + (checkpoints + 1) * weights[0]
        needed -= sum(path.stat().st_size for path in self.folder.rglob("*.pt"))
        free = shutil.disk_usage(self.folder).free
        check(needed < free, f"--out {self.folder}: checkpoints need {needed / 1e9:.1f} GB more than are there, and "
                             f"{free / 1e9:.1f} GB are free on this disk", DISK)
        if (path := self.folder / "resume.pt").is_file():
            state = load(path)
            try:
                for name, part in parts.items():
                    set_state(part, state["parts"][name])
                first, seconds = state["step"], state["seconds"]
            except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
                raise UserError(f"{path}: not the state of this run (begin again with --restart true)") from None
            self.start -= seconds
            print(f"going on after step {first} of {steps}", flush=True)
        if first < steps:
            self.handlers = {n: signal.signal(n, self.interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
        return first

    def interrupt(self, number, _):
        """Handle the first signal: remember it. A second one acts at once, unless it comes with the first."""
        if not self.signal:
            self.signal, self.signalled = number, time.time()
            os.write(2, b"\nstopping after this step\n")
        elif time.time() - self.signalled > 1:
            sys.exit(128 + number)

    def restore_handlers(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def keep(self, step):
        """Call when this many steps are done: saves the state if it is time, if it was the last step, or if a signal
        has come, which then ends the run."""
        if step == self.steps or self.signal or time.time() - self.saved >= self.cfg.save_every:
            save(self.folder / "resume.pt", {"step": step, "seconds": self.seconds(), "parts": {
                name: get_state(part) for name, part in self.parts.items()}})
            self.saved = time.time()
        if step == self.steps:
            self.restore_handlers()
        if self.signal:
            raise UserError(f"{self.folder}: stopped after step {step} of {self.steps}: the same command goes on from "
                            "there", 128 + self.signal)

    def seconds(self):
        """Run time so far, that of earlier parts included."""
        return time.time() - self.start

    def save(self, model, vocab, **extra):
        """Write weights, configuration and tokenizer of a model (extra: JSON facts that belong to the weights)."""
        save_checkpoint(self.folder, model, self.cfg, vocab, inputs=self.inputs, **extra)

    def finish(self, **facts):
        """Write done.json, the file that makes the stage count as finished."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        facts = {"seconds": round(self.seconds(), 1), "peak_memory_mb": round(peak), **facts}
        if torch.cuda.is_available():
            facts["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
        write_json(self.folder / "done.json", facts)
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


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def save_checkpoint(folder, model, cfg, vocab, **extra):
    """Write vocab.tiktoken (copied from the file vocab), model.pt, and what model.pt says of itself as config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if Path(vocab).resolve() != (folder / "vocab.tiktoken").resolve():
        write_atomic(folder / "vocab.tiktoken", lambda temporary: shutil.copyfile(vocab, temporary))
    facts = {"format": FORMAT, "kind": model.kind, "model": dataclasses.asdict(model.config),
             "stage": dataclasses.asdict(cfg), **extra, "vocab": digest(vocab), "versions": VERSIONS}
    save(folder / "model.pt", {**facts, "weights": model.state_dict()})
    write_json(folder / "config.json", facts)


def read_checkpoint(folder, kinds):
    """(weights, facts) of a checkpoint folder whose kind is one of kinds; UserError for anything else."""
    folder = Path(folder)
    check((folder / "model.pt").is_file(), f"{folder}: no checkpoint here (model.pt is missing; has its stage been "
                                           "run?)")
    facts = load(folder / "model.pt")
    weights, kind = facts.pop("weights", None), facts.get("kind")
    check(facts.get("format") == FORMAT and isinstance(weights, dict) and isinstance(facts.get("model"), dict),
          f"{folder}/model.pt: not a checkpoint of this version (run its stage again)")
    check(kind in kinds, f"{folder}: this is a {kind} checkpoint, expected {' or '.join(kinds)}")
    vocab = folder / "vocab.tiktoken"
    check(vocab.is_file() and digest(vocab) == facts["vocab"], f"{vocab}: missing, or not the vocabulary that model.pt "
                                                               "was trained with")
    return weights, facts
