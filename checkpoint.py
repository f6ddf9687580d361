"""Files that outlive a crash, and checkpoints. A reader may skip this file; nothing in it knows about RLHF.

A file is written under another name, put on the disk, and then renamed: a crash at any moment leaves the old file or
the new one. A .pt file ends with the sha256 of all that stands before, so that one flipped bit is noticed.
"""
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from common import DISK, NOT_FINITE, UserError, check

FORMAT = 1  # of the content of model.pt
VERSIONS = {"python": sys.version.split()[0], "torch": str(torch.__version__)}


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
    except OSError as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass
        raise UserError(f"{path}: cannot be written: {error.strerror or error} (what was there before is unharmed)",
                        DISK) from None


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
        try:
            torch.save(content, temporary)
        except RuntimeError:  # so it reports a full disk
            raise OSError(errno.ENOSPC, "no space left, or another fault of the disk") from None
        with open(temporary, "r+b") as file:  # a zip archive: its last two bytes are the length of a comment
            file.seek(-2, os.SEEK_END)
            file.write((64).to_bytes(2, "little"))
            file.flush()
            file.write(digest(temporary).encode())
    check_finite(path, content)
    write_atomic(path, write)


def load(path, advice="run its stage again"):
    """What save wrote to path. UserError for anything else: nothing that is in the file is executed."""
    try:
        with open(path, "rb") as file:
            file.seek(-64, os.SEEK_END)
            whole = file.read() == digest(path, 64).encode()
        content = torch.load(path, map_location="cpu", weights_only=True) if whole else None
    except Exception:  # unreadable, or forbidden content: torch raises several types
        content = None
    check(isinstance(content, dict), f"{path}: damaged, or not a checkpoint of this version ({advice})")
    check_finite(path, content)
    return content


def check_finite(path, content, name=""):
    """UserError that names the first tensor in nested dicts with a number that is not finite."""
    if isinstance(content, dict):
        for key, value in content.items():
            check_finite(path, value, f"{name}.{key}".lstrip("."))
    elif torch.is_tensor(content) and content.is_floating_point():
        check(torch.isfinite(content).all(), f"{path}: {name} is not finite", NOT_FINITE)


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
    if (folder / "resume.pt").is_file():
        print(f"{folder}: the run that trains this model is not finished", flush=True)
    vocab = folder / "vocab.tiktoken"
    check(vocab.is_file() and digest(vocab) == facts["vocab"], f"{vocab}: missing, or not the vocabulary that model.pt "
                                                               "was trained with")
    return weights, facts
