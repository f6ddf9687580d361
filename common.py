"""Run plumbing that a reader may skip: configuration, exit codes, device and precision, learning rate, the screen.

Nothing in this file knows about RLHF.
"""
import argparse
import ctypes
import dataclasses
import inspect
import io
import math
import os
import re
import signal
import sys

import torch
from tqdm import tqdm

DISK, NOT_FINITE, OUT_OF_MEMORY, GUARD = 3, 4, 5, 6  # exit codes; 2: bad input or usage; 128 + n: stopped by signal n


class UserError(Exception):
    """An end of the run that one line explains: what is wrong, and what to do about it. code: the exit code."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


# ---- configuration -------------------------------------------------------------------------------------------------


def load_config(Config, presets, argv=None):
    """Build a Config from the command line: field default < --preset < explicit flag. Unknown flags are errors.
    A field's trailing comment in the source is its --help text."""
    help_of = {line.split(":")[0].strip(): line.split("  # ", 1)[1]
               for line in inspect.getsource(Config).splitlines() if "  # " in line and ":" in line}
    parser = argparse.ArgumentParser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("--preset", choices=list(presets), help="a set of values; explicit flags win over it")
    for field in dataclasses.fields(Config):
        shown = f"{help_of.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        # A flag that is true or false may stand alone: --restart is --restart true.
        kind = ({"type": _boolean, "nargs": "?", "const": True} if field.type in (bool, "bool") else
                {"type": type(field.default)})
        parser.add_argument("--" + field.name.replace("_", "-"), default=None, help=shown, metavar="X", **kind)
    parser.error = lambda message: check(False, f"{message} (--help explains the flags)")
    args = vars(parser.parse_args(argv))
    chosen = dict(presets.get(args.pop("preset", None), {}))
    chosen.update({name: value for name, value in args.items() if value is not None})
    return Config(**chosen)


def _boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: write true or false")
    return text.lower() == "true"


def check(condition, message, code=2):
    """Raise UserError(message, code) unless the condition holds."""
    if not condition:
        raise UserError(message, code)


def check_positive(cfg, *names, or_zero=()):
    """UserError for the first of these fields that is not a finite number above zero, or from zero."""
    for name in (*names, *or_zero):
        value, least = getattr(cfg, name), "0 or more" if name in or_zero else "above 0"
        check(math.isfinite(value) and (value > 0 or value == 0 and name in or_zero),
              f"--{name.replace('_', '-')} is {value}: it must be {least}")


def run(main, Config, presets=()):
    """The guard at the end of each script: parse, run, and turn what can go wrong into one line and an exit code."""
    for stream in (sys.stdin, sys.stdout):  # what is no UTF-8 shows as it is, and stops nothing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a job in the background starts with it ignored
        signal.signal(number, interrupted)
    try:
        return main(load_config(Config, dict(presets)))
    except UserError as error:
        problem, code = f"{'error: ' * (0 < error.code < 128)}{error}", error.code
    except BrokenPipeError:  # the reader of our output, such as head, has left
        mute(sys.stdout)
        sys.exit(141)
    except OSError as error:
        problem, code = f"error: {error.filename or 'while writing'}: {error.strerror or error}", DISK
    except KeyboardInterrupt as stop:
        problem, code = "stopped", stop.args[0] if stop.args else 130
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|alloc.* memory|bad_alloc", str(error)):
            raise
        flags = [name for name in ("microbatch", "response_tokens", "batch_size", "count") if hasattr(Config, name)]
        problem, code = f"error: out of memory: lower --{' or --'.join(flags[:2])}".replace("_", "-"), OUT_OF_MEMORY
    # Names of files and fields may hold anything: one line, and nothing that acts on the terminal.
    problem = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in problem)
    try:
        print(problem, file=sys.stderr if code else sys.stdout)
    except BrokenPipeError:
        mute(sys.stderr)
    sys.exit(code)


def interrupted(number, _):
    """Handle a signal that ends the run, by an exception that no `except Exception` on the way takes for a fault."""
    raise KeyboardInterrupt(128 + number)


# ---- device, precision, randomness ---------------------------------------------------------------------------------


def set_up(cfg, quiet=False):
    """Seed every generator, choose device and precision, print the configuration unless quiet: (device, autocast).
    autocast() is a fresh context manager for the forward pass. The weights stay in float32 whatever the precision.
    """
    check(cfg.dtype in ("auto", "float32", "bfloat16"), f"--dtype is {cfg.dtype!r}: write auto, float32 or bfloat16")
    check(abs(cfg.seed) < 2**63, f"--seed is {cfg.seed}: it must be below 2^63")
    torch.manual_seed(cfg.seed)
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    # bf16 pays where the hardware multiplies it natively; elsewhere it is emulated and slower than float32.
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.startswith("cuda") else
            torch.cpu._is_avx512_bf16_supported())
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if fast else "float32"
    keep_freed_memory()
    if not quiet:
        print(f"{device}, {dtype}, {torch.get_num_threads()} threads | "
              + " ".join(f"{key}={value}" for key, value in dataclasses.asdict(cfg).items() if value != ""), flush=True)

    def autocast():
        return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=dtype == "bfloat16")

    return device, autocast


def keep_freed_memory():
    """Have glibc keep freed memory: clearing pages that went back to the system is a fifth of base training's time on a
    CPU. The price is some fragmentation: 2 % more memory in reward training."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # M_MMAP_THRESHOLD in bytes, of which older versions take no more than 32 MB; then M_TRIM_THRESHOLD.
        if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
            libc.mallopt(-1, 2**30)


def dropout_generator(device):
    """The generator that dropout draws from on a CPU or CUDA device: part of the state of a run that has dropout.
    (Elsewhere it is the CPU's, and a run with dropout goes on with other luck.)"""
    on_gpu = device.startswith("cuda")
    return torch.cuda.default_generators[torch.device(device).index or 0] if on_gpu else torch.default_generator


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
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (cosine if schedule == "cosine" else 1 - done)


def adamw(parameters, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8):
    """Fused AdamW. Weight decay applies to matrices and embeddings only, not to biases and layer-norm gains."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def optimizer_step(optimizer, parameters, lr, grad_clip, log):
    """Clip the gradients to a global norm (0: no clipping), log it, step at this learning rate, zero the gradients.
    If the norm, or anything logged since the last write, is not finite, the run stops before the step."""
    log.add(grad_norm=torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else math.inf).item())
    log.check_finite(log.sums)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    log.steps += 1


# ---- on the screen -----------------------------------------------------------------------------------------------


def progress(iterable, name):
    """A tqdm bar on a terminal; elsewhere (a log file) nothing, so that logs stay readable."""
    return tqdm(iterable, desc=name, dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())


def say(text):
    """Print a line at once, above the progress bar if there is one."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # tee, say, has ended by the same Ctrl-C: the step comes to its end, and the log has it all
        mute(sys.stdout)


def mute(stream):
    """Send what is written to a stream from now on nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
