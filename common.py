"""Run plumbing that a reader may skip: configuration, device and precision, learning rate, log, checkpoints.

Nothing in this file knows about RLHF. What a checkpoint folder holds:

    model.pt        the weights (torch.load(weights_only=True) reads them)
    config.json     model configuration, stage configuration, extra facts, versions
    vocab.tiktoken  the tokenizer, so that the folder is complete by itself
    log.jsonl       one line per log interval
    done.json       written last: seconds and peak memory; a stage without it is not finished
"""
import argparse
import ctypes
import dataclasses
import inspect
import json
import math
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm


class UserError(Exception):
    """A fault that the person at the keyboard can mend. Its message is one line: what is wrong, and what to do."""


# ---- configuration -------------------------------------------------------------------------------------------------


def load_config(Config, presets, argv=None):
    """Build a Config from the command line: field default < --preset < explicit flag. Unknown flags are errors.

    A field's trailing comment in the source is its --help text.
    """
    source = inspect.getsource(Config).splitlines()
    help_of = {line.split(":")[0].strip(): line.split("  # ", 1)[1]
               for line in source if "  # " in line and ":" in line}
    module = sys.modules[Config.__module__]
    parser = argparse.ArgumentParser(description=module.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("--preset", choices=list(presets), help="a set of values; explicit flags win over it")
    for field in dataclasses.fields(Config):
        shown = f"{help_of.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        kind = _boolean if field.type in (bool, "bool") else type(field.default)
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=None, help=shown, metavar="X")
    args = vars(parser.parse_args(argv))
    chosen = dict(presets.get(args.pop("preset", None), {}))
    chosen.update({name: value for name, value in args.items() if value is not None})
    return Config(**chosen)


def _boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: write true or false")
    return text.lower() == "true"


def words_for(*flags, several=False):
    """Let the words that a command line begins with stand for these flags, in this order: sample.py FOLDER PROMPT.

    several: any number of words stand for the one flag, with commas between them.
    """
    words = []
    while sys.argv[1:] and not sys.argv[1].startswith("-") and (several or len(words) < len(flags)):
        words.append(sys.argv.pop(1))
    words = [",".join(words)] if several and words else words
    sys.argv += [f"--{flag}={word}" for flag, word in zip(flags, words)]


def check(condition, message):
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_positive(cfg, *names):
    """UserError for the first of these fields that is not a finite number above zero."""
    for name in names:
        value = getattr(cfg, name)
        check(math.isfinite(value) and value > 0, f"--{name.replace('_', '-')} is {value}: it must be above 0")


def run(main, Config, presets=()):
    """The guard at the end of each script: parse, run, and turn a UserError into one line and exit code 2."""
    try:
        main(load_config(Config, dict(presets)))
    except UserError as error:
        # Names of files and fields may hold anything: one line, and nothing that acts on the terminal.
        print("error: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error)), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


# ---- device, precision, randomness ---------------------------------------------------------------------------------


def set_up(cfg, quiet=False):
    """Seed every generator, choose device and precision, print the configuration unless quiet: (device, autocast).

    autocast() is a fresh context manager for the forward pass. The weights stay in float32 whatever the precision.
    cfg needs the fields seed, device ("auto", "cpu", "cuda", ...) and dtype ("auto", "float32", "bfloat16").
    """
    check(cfg.dtype in ("auto", "float32", "bfloat16"), f"--dtype is {cfg.dtype!r}: write auto, float32 or bfloat16")
    torch.manual_seed(cfg.seed)
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    dtype = cfg.dtype
    if dtype == "auto":
        # bf16 pays where the hardware multiplies it natively; elsewhere it is emulated and slower than float32.
        if device.startswith("cuda"):
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if fast else "float32"
    keep_freed_memory()
    if not quiet:
        print(f"{device}, {dtype}, {torch.get_num_threads()} threads | "
              + " ".join(f"{key}={value}" for key, value in dataclasses.asdict(cfg).items() if value != ""), flush=True)

    def autocast():
        return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=dtype == "bfloat16")

    return device, autocast


def keep_freed_memory():
    """Have the C library keep freed memory for the next tensor, where it is glibc and can be told.

    By default large blocks go back to the system at once, which clears every page before it hands them out again: a
    fifth of the time of base training on a CPU. The price is some fragmentation: 2 % more memory in reward training.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # M_MMAP_THRESHOLD in bytes, of which older versions take no more than 32 MB; then M_TRIM_THRESHOLD.
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**30)


def generator(*key):
    """A private CPU generator that depends only on the key (integers), so that a position in a run is two numbers."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + int(part) + 1) % (2**62)
    return torch.Generator().manual_seed(seed)


# ---- optimizer and learning rate -----------------------------------------------------------------------------------


def learning_rate(step, steps, peak, warmup=0, schedule="cosine", floor=0.0):
    """Learning rate at step 0..steps-1: linear warm-up, then "cosine" down to floor * peak or "linear" to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
    return peak * (1 - done)


def adamw(parameters, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8):
    """Fused AdamW. Weight decay applies to matrices and embeddings only, not to biases and layer-norm gains."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def optimizer_step(optimizer, parameters, lr, grad_clip):
    """Clip the gradients to a global norm (0: no clipping), step at this learning rate, zero them. Returns the norm.

    A gradient that is not finite raises before the step, so that the weights stay good.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf)
    if not torch.isfinite(norm):
        raise UserError("the gradient is not finite: stopped before the step (a lower --lr usually helps)")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()


# ---- log -----------------------------------------------------------------------------------------------------------


class Log:
    """Averages metrics between two calls of write, and appends one JSON line per write to folder/log.jsonl."""

    def __init__(self, folder):
        self.path = Path(folder) / "log.jsonl"
        self.path.write_text("")
        self.sums, self.counts = {}, {}

    def add(self, weight=1.0, **metrics):
        """Collect one value per metric (floats or one-element tensors) towards the weighted mean of this interval.

        A tensor stays on its device until write: asking a GPU for its value would make the loop wait.
        """
        for name, value in metrics.items():
            value = value.detach() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0.0) + weight * value
            self.counts[name] = self.counts.get(name, 0.0) + weight

    def write(self, **facts):
        """Append the interval's means and these facts as one line; returns them as a dict."""
        line = {**facts, **{name: float(self.sums[name] / self.counts[name]) for name in self.sums}}
        with open(self.path, "a") as file:
            file.write(json.dumps({key: round(v, 6) if isinstance(v, float) else v for key, v in line.items()}) + "\n")
        self.sums, self.counts = {}, {}
        return line


def progress(iterable, name):
    """A tqdm bar on a terminal; elsewhere (a log file) nothing, so that logs stay readable."""
    return tqdm(iterable, desc=name, dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())


def say(text):
    """Print a line at once, above the progress bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def write_atomic(path, write):
    """Call write(temporary path), then move the result to path: a reader sees the old file or the new one, no half."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_json(path, content):
    """Write a dict as indented JSON, atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def open_folder(folder, last):
    """The Path of an output folder, made if need be, and without the file that is written last: what is begun again
    must not look finished. UserError if it can't be made."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / last).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    return Path(folder)


class Stage:
    """One output folder: made at the start of a stage, marked finished at its end."""

    def __init__(self, folder):
        self.folder, self.start = open_folder(folder, "done.json"), time.time()

    def save(self, model, cfg, vocab, **extra):
        """Write weights, configuration and tokenizer of a model (extra: JSON facts that belong to the weights)."""
        save_checkpoint(self.folder, model, cfg, vocab, **extra)

    def finish(self, **facts):
        """Write done.json, the file that makes the stage count as finished."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        facts = {"seconds": round(time.time() - self.start, 1), "peak_memory_mb": round(peak), **facts}
        if torch.cuda.is_available():
            facts["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
        write_json(self.folder / "done.json", facts)
        print(f"{self.folder}: " + ", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)


def save_checkpoint(folder, model, cfg, vocab, **extra):
    """Write model.pt, config.json and vocab.tiktoken (copied from the file vocab) into folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if Path(vocab).resolve() != (folder / "vocab.tiktoken").resolve():
        write_atomic(folder / "vocab.tiktoken", lambda temporary: shutil.copyfile(vocab, temporary))
    write_atomic(folder / "model.pt", lambda temporary: torch.save(model.state_dict(), temporary))
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    write_json(folder / "config.json", {"kind": model.kind, "model": dataclasses.asdict(model.config),
                                        "stage": dataclasses.asdict(cfg), **extra, "versions": versions})


def read_checkpoint(folder, kinds):
    """(state_dict, config) of a checkpoint folder whose kind is one of kinds; UserError for anything else."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no checkpoint here (config.json is missing; has its stage been run?)")
    try:
        config = json.loads((folder / "config.json").read_text())
        state = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        kind = config["kind"]
    except FileNotFoundError:
        raise UserError(f"{folder}/model.pt: missing") from None
    except Exception as error:  # torch raises several types for a damaged file
        raise UserError(f"{folder}: damaged checkpoint ({type(error).__name__}); run its stage again") from None
    if kind not in kinds:
        raise UserError(f"{folder}: this is a {kind} checkpoint, expected {' or '.join(kinds)}")
    return state, config
