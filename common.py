"""Run plumbing that a reader may skip: flags, device and precision, optimizer, files, exact resume, log.

A stage's folder holds model.pt and vocab.tiktoken (weights, what they are, tokenizer), config.json (flags, sha256 of
inputs), log.jsonl, resume.pt (until it is finished) and done.json (written last). Nothing here knows about RLHF.
"""
import argparse
import dataclasses
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

# Flags that may change when a run is resumed: they change no result (but for rounding, and what dropout draws).
FREE = ("out overwrite save_every microbatch recompute compile sample_every kl_ceiling max_calls timeout parallel "
        "dry_run")
WORK = ("done.json", "model.pt", "resume.pt")  # files that make a folder one that holds a run
LOCKED = {}  # output folder that this process has locked: its open handle
say = tqdm.write  # print a line above the progress bar
progress = functools.partial(tqdm, dynamic_ncols=True, leave=False, disable=None)  # (iterable, name), on a terminal

class UserError(Exception):
    """An end of the run that one line explains. code: 2 bad input or flags, 1 what happens later, 128 + n signal n."""
    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code

def check(condition, message, code=2):
    if not condition:
        raise UserError(message, code)

def load_config(Config, presets, argv=None, words=()):
    """A Config from the command line: default < --preset < flag. A field's trailing comment is its --help text. A
    number is not negative (unless its default is), a count not 0 unless its help says what "0:" means. words: fields
    that are given by their place, a tuple any number of times."""
    help_of = {line.split(":")[0].strip(): line.split("  # ", 1)[1] for part in Config.__mro__[-2::-1]
               for line in inspect.getsource(part).splitlines() if "  # " in line and ":" in line}
    parser = argparse.ArgumentParser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: check(False, f"{message} (--help explains the flags)")
    parser.add_argument("--preset", choices=list(presets), help="a set of values; explicit flags override it")
    for name, default in ((field.name, field.default) for field in dataclasses.fields(Config)):
        kind = {"type": type(default), "metavar": "X"}
        if isinstance(default, bool):  # may stand alone: --overwrite is --overwrite true
            value = {"type": json.loads, "choices": [False, True], "nargs": "?", "const": True, "metavar": "true|false"}
            kind = {"action": "store_true"} if words else value  # beside words it would take the next one for its value
        if name in words:
            kind = {"nargs": "*" if isinstance(default, tuple) else "?"}
        parser.add_argument(name if name in words else f"--{name.replace('_', '-')}", **kind, default=argparse.SUPPRESS,
                            help=f"{help_of.get(name, '')} (default: {default!r})".replace("%", "%%"))
    flags = vars(parser.parse_intermixed_args(argv))
    config = Config(**{**presets.get(flags.pop("preset"), {}), **flags})
    for name, value in dataclasses.asdict(config).items():
        if type(value) in (int, float) and name != "seed" and (default := getattr(Config, name)) >= 0:
            least = 1 if isinstance(default, int) and default and "0:" not in help_of.get(name, "") else 0
            check(least <= value < math.inf, f"--{name.replace('_', '-')} is {value}: it must be {least} or more")
    return config

def run(main, Config, presets=(), words=(), argv=None):
    """The guard at the end of each script: parse, run, and turn what can go wrong into one line and an exit code."""
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "r+"))  # a service may have none of them
        if hasattr(getattr(sys, name), "reconfigure"):  # a notebook's has not
            getattr(sys, name).reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        return main(load_config(Config, dict(presets), argv, words))
    except UserError as error:
        problem, code = f"{'error: ' * (0 < error.code < 128)}{error}", error.code
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os._exit(128 + signal.SIGPIPE)
    except OSError as error:
        problem, code = f"error: {error.filename or 'while writing'}: {error.strerror or error}", 1
    except KeyboardInterrupt:
        problem, code = "stopped", 128 + signal.SIGINT
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|alloc.* memory|bad_alloc", str(error)):
            raise
        problem, code = "error: out of memory: lower --microbatch or --response-tokens", 1
    print(visible(problem).replace("\n", " "), file=sys.stderr if code else sys.stdout)
    sys.exit(code)

def visible(text):
    """Text that cannot act on the terminal: escape codes, direction marks and the like become \\x1b, \\u202e, ..."""
    return "".join(c if c.isprintable() or c in "\n\xa0\u200c\u200d" else ascii(c)[1:-1] for c in text)

def set_up(cfg):
    """Seed the generators and resolve cfg.device and cfg.dtype in place ("auto": bfloat16 on a GPU that has it, else
    float32): (device, autocast). autocast() is a context manager for forward passes; weights stay float32."""
    check(cfg.dtype in ("auto", "float32", "bfloat16"), f"--dtype is {cfg.dtype!r}: write auto, float32 or bfloat16")
    torch.manual_seed(cfg.seed)
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # of a GPU's float32 products, the head's for one
    cfg.automatic = [name for name in ("device", "dtype") if getattr(cfg, name) == "auto"]  # no difference between runs
    cfg.device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    kind = cfg.device.split(":")[0]
    check(kind in ("cpu", "mps") or kind == "cuda" and torch.cuda.is_available(), f"--device {cfg.device}: not here")
    if cfg.dtype == "auto":
        fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.dtype = "bfloat16" if fast else "float32"
    return cfg.device, lambda: torch.autocast(kind, dtype=torch.bfloat16, enabled=cfg.dtype == "bfloat16")

def generator(*key):
    """A private CPU generator that depends only on the key (integers), so that a position in a run is two numbers."""
    seed = functools.reduce(lambda seed, part: (seed * 1_000_003 + int(part) + 1) % 2**62, key, 0)
    return torch.Generator().manual_seed(seed)

def learning_rate(step, steps, peak, warmup=0, schedule="cosine", floor=0.0):
    """Learning rate at step 0..steps-1: linear warm-up, then "cosine" down to floor * peak or "linear" to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)

def adamw(parameters, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8):
    """Fused AdamW. Weight decay applies to matrices and embeddings only, not to biases and norms."""
    parameters = list(parameters)
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)

def optimizer_step(optimizer, parameters, lr, grad_clip, log):
    """Clip the gradients to a global norm (0: none), log it, stop if anything logged is not finite, step at this lr."""
    log.add(grad_norm=torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf).item())
    for name, value in log.sums.items():
        if not math.isfinite(value):
            log.stop(f"{name} is not finite (a lower --lr usually helps, with --overwrite)")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    log.steps += 1

def write_atomic(path, content):
    """Write a text, or what content(file) writes, then rename: a crash leaves the old file or the new one."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            write = content if callable(content) else lambda file: file.write(content.encode())
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        Path(f"{path}.tmp").unlink(missing_ok=True)
        problem = getattr(error, "strerror", "disk full?")
        raise UserError(f"{path}: cannot be written: {problem} (what was there before is unharmed)", 1) from None

def write_json(path, content):
    write_atomic(path, json.dumps(content, indent=1) + "\n")

def digest(path, size=2**63):
    """sha256 of a file, or of its first bytes, in hexadecimal."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(max(0, min(2**24, size - file.tell()))):
            sha256.update(block)
    return sha256.hexdigest()

def save(path, content):
    """Write nested dicts of tensors and plain values, with the sha256 of it all behind them."""
    def write(file):
        torch.save(content, file)
        file.flush()
        file.write(digest(file.name).encode())
    write_atomic(path, write)

def load(path):
    """What save wrote to path; UserError if one bit of it differs. Nothing in the file is executed."""
    with open(path, "rb") as file:
        file.seek(max(0, size := file.seek(0, 2) - 64))
        check(file.read().decode("latin-1") == digest(path, size),
              f"{path}: damaged, or not a checkpoint of this version (delete its folder and run again)")
    return torch.load(path, map_location="cpu", weights_only=True)

def save_checkpoint(folder, model, cfg, vocab, **facts):
    """Write vocab.tiktoken (copied from the file vocab), model.pt, and what model.pt says of itself as config.json."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_atomic(f"{folder}/vocab.tiktoken", Path(vocab).read_text())
    facts = {"kind": model.kind, "model": dataclasses.asdict(model.config), "stage": dataclasses.asdict(cfg), **facts,
             "vocab": digest(vocab), "versions": {"torch": str(torch.__version__)}}
    save(f"{folder}/model.pt", {**facts, "weights": model.state_dict()})
    write_json(f"{folder}/config.json", facts)

def read_checkpoint(folder, kind):
    """(weights, facts) of a checkpoint folder; UserError if there is none, or one of another kind."""
    path, vocab = Path(folder) / "model.pt", Path(folder) / "vocab.tiktoken"
    check(path.is_file(), f"{folder}: no checkpoint here (model.pt is missing; has its stage been run?)")
    facts = load(path)
    check(facts["kind"] == kind, f"{folder}: this is a checkpoint of kind {facts['kind']}, expected {kind}")
    check(vocab.is_file() and digest(vocab) == facts["vocab"], f"{vocab}: missing, or not the vocabulary of model.pt")
    return facts.pop("weights"), facts

def open_folder(folder):
    """Make an output folder and keep other processes out of it until this one ends: its Path."""
    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    handle = LOCKED.get(folder.resolve()) or os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another run is at work there (wait for it, or choose another folder)") from None
    LOCKED[folder.resolve()] = handle
    return folder

def state_of(part):
    """What reads and what writes the state of a part of a run: a dict, a generator, or anything with a state_dict."""
    names = {dict: ("copy", "update"), torch.Generator: ("get_state", "set_state")}
    return [getattr(part, name) for name in names.get(type(part), ("state_dict", "load_state_dict"))]

class Stage:
    """One run in its output folder: skipped if finished, resumed if interrupted, refused if the folder holds other work
    (unless --overwrite). In main: Stage(cfg, flags that name inputs), open() once the input is known to be good,
    resume() before the loop, keep() after each step, save(), finish()."""
    def __init__(self, cfg, *inputs, folder=None):
        self.cfg, self.folder, self.began, self.received = cfg, Path(folder or cfg.out), time.time(), 0
        self.facts = {"stage": dataclasses.asdict(cfg), "inputs": {}, "versions": {"torch": str(torch.__version__)}}
        for name in inputs:
            value = getattr(cfg, name)
            for path in map(Path, filter(None, [value] if Path(value).exists() else value.split(","))):
                check(path.exists(), f"--{name.replace('_', '-')} {path}: no such file or folder")
                check(path.resolve() != self.folder.resolve(), f"--out {path}: an input, too (--{name})")
                files = [path] if path.is_file() else sorted(filter(Path.is_file, path.glob("*model*")))
                self.facts["inputs"].setdefault(name, []).extend(map(digest, files))
        self.compare()

    def compare(self):
        """In words, how this run differs from the one in the folder; stops if that is the same one, and finished."""
        if not any((self.folder / name).is_file() for name in WORK):
            return ""
        before, free = self.folder / "config.json", {*FREE.split(), *getattr(self.cfg, "automatic", [])}
        then = json.loads(before.read_text()) if before.is_file() else {"stage": {"seed": None}}
        now, then = ({**vars(type(self.cfg)()), **run["stage"], **run.get("inputs", {})} for run in (self.facts, then))
        changed = [f"--{name.replace('_', '-')} was {then.get(name)}, is {now.get(name)}" for name in now | then
                   if name not in free and str(then.get(name)) != str(now.get(name))]  # as text, nan equals nan
        changed = "; ".join(changed[:3])
        check(self.cfg.overwrite or not changed,
              f"{self.folder} holds another run: {changed} (choose another --out, or --overwrite)")
        if not changed and (self.folder / "done.json").is_file():
            (self.folder / "resume.pt").unlink(missing_ok=True)
            raise UserError(f"{self.folder}: finished already (to run it again, delete the folder)", 0)
        return changed

    def open(self):
        """Make and lock the folder, note in config.json which run it is for, print the configuration."""
        open_folder(self.folder)
        if changed := self.compare():  # again: another process may have finished it meanwhile
            print(f"{self.folder} is overwritten: {changed}")
        for name in WORK if changed or not (self.folder / "resume.pt").exists() else ():
            (self.folder / name).unlink(missing_ok=True)  # what is not finished must not look finished
        write_json(self.folder / "config.json", self.facts)
        print(torch.get_num_threads(), "threads |", *(f"{k}={v}" for k, v in self.facts["stage"].items() if v != ""))

    def resume(self, steps, **parts):
        """How many of the steps are done. parts: all that changes from step to step (modules, optimizers, log,
        generators, dicts); they get the saved state. Until the last step SIGINT and SIGTERM wait for keep."""
        self.steps, self.parts, self.saved, done = steps, parts, time.time(), 0
        if (path := self.folder / "resume.pt").is_file():
            state = load(path)
            done, self.began = state["step"], self.began - state["seconds"]
            torch.set_rng_state(state["rng"])  # what dropout draws from
            for name, part in parts.items():
                state_of(part)[1](state["parts"][name])
            print(f"resuming from step {done} of {steps}")
        for number in (signal.SIGINT, signal.SIGTERM) if done < steps else ():
            signal.signal(number, lambda number, _: setattr(self, "received", number))
        return done

    def keep(self, step):
        """After each step: save the state if it is time, after the last step, or if a signal has come to end it."""
        ends = step == self.steps or self.received
        if ends or time.time() - self.saved >= self.cfg.save_every:
            parts = {name: state_of(part)[0]() for name, part in self.parts.items()}
            save(self.folder / "resume.pt",
                 {"step": step, "seconds": self.seconds(), "rng": torch.get_rng_state(), "parts": parts})
            self.saved = time.time()
        if ends:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        check(not self.received, f"{self.folder}: stopped after step {step} of {self.steps}: the same command resumes "
                                 "it", 128 + self.received)

    def seconds(self):
        return time.time() - self.began  # earlier parts included

    def save(self, model, vocab, **facts):
        save_checkpoint(self.folder, model, self.cfg, vocab, inputs=self.facts["inputs"], **facts)
        self.saved = 0.0  # then keep saves the state, too: a model in a folder without it looks finished

    def finish(self, **facts):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        gpu = {"peak_gpu_memory_mb": torch.cuda.max_memory_allocated() >> 20} if torch.cuda.is_available() else {}
        facts = {"seconds": round(self.seconds(), 1), "peak_memory_mb": round(peak), **gpu, **facts}
        write_json(self.folder / "done.json", facts)
        (self.folder / "resume.pt").unlink(missing_ok=True)
        print(f"{self.folder}:", ", ".join(f"{key} {value}" for key, value in facts.items()))

class Log:
    """Averages metrics between two calls of write, and appends one JSON line per write to folder/log.jsonl."""
    def __init__(self, folder):
        self.path = Path(folder) / "log.jsonl"
        self.steps, self.text, self.sums, self.counts = 0, "", {}, {}  # steps of the optimizer, lines so far

    def add(self, weight=1.0, **metrics):
        """Collect one value per metric (a number or a tensor, summed on its device) towards the interval's mean."""
        for name, value in metrics.items():
            value = value.detach() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0.0) + weight * value
            self.counts[name] = self.counts.get(name, 0.0) + weight

    def stop(self, problem):
        """End the run before it does harm, in one line: folder, optimizer step, problem."""
        means = {name: float(x / self.counts[name]) for name, x in self.sums.items() if math.isfinite(x)}
        self.append({"stopped": problem, "optimizer_step": self.steps + 1, **means})
        raise UserError(f"{self.path.parent}, optimizer step {self.steps + 1}: {problem}; stopped before the step", 1)

    def write(self, **facts):
        """Append the interval's means and these facts as one line, six significant digits each; returns the line."""
        line = {**facts, **{name: float(self.sums[name] / self.counts[name]) for name in self.sums}}
        self.sums, self.counts = {}, {}
        self.append({key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in line.items()})
        return line

    def append(self, line):
        self.text += json.dumps(line) + "\n"
        self.path.write_text(self.text)

    def state_dict(self):
        return {name: value for name, value in vars(self).items() if name != "path"}

    def load_state_dict(self, state):
        vars(self).update(state)
        self.path.write_text(self.text)
