"""Seconds and memory of some steps of a stage, in a process of its own, whose peak memory is then the stage's.

    python -m tools.cost out/cost.jsonl "PPO, one epoch" "ppo.py --preset tiny --epochs 1 --iterations 5"
    python -m tools.cost out/cost.jsonl                  the lines of the file as a table

Appends a line to the file. Seconds: between lines of the stage's log, the median without the first. A command that
fails has a line, too: the last that it printed.
"""
import json
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from common import run
from evaluate import hardware
from study.markdown import table

@dataclass
class Config:
    file: str = "out/cost.jsonl"
    name: str = ""               # what the line is called; empty: a table of the lines that are there
    command: str = ""            # a stage's script and its flags, as one word

def measure(cfg):
    """The line about the command."""
    line = {"name": cfg.name, "hardware": hardware(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as out:
        words = shlex.split(cfg.command)
        out = words[words.index("--out") + 1] if "--out" in words else out
        ran = subprocess.run([sys.executable, *words, "--out", out], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if ran.returncode:
            return {**line, "problem": ran.stdout.decode(errors="replace").strip().rpartition("\n")[2][-200:]}
        log, stage, done = ((Path(out) / name).read_text() for name in ("log.jsonl", "config.json", "done.json"))
    shown = "dtype episodes epochs batch_size microbatch response_tokens recompute compile".split()
    seconds = [row["seconds"] for row in map(json.loads, log.splitlines()) if "seconds" in row]
    stage, done = json.loads(stage)["stage"], json.loads(done)
    return {**line, **{name: stage[name] for name in shown if name in stage},
            "seconds": round(median([b - a for a, b in zip(seconds, seconds[1:])] or [done["seconds"]]), 2),
            **{name: value for name, value in done.items() if name.startswith("peak")}}

def main(cfg):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # then the stage is killed, too, and its folder goes
    lines = [measure(cfg)] if cfg.name else list(map(json.loads, Path(cfg.file).read_text().splitlines()))
    if cfg.name:
        with open(cfg.file, "a") as file:
            file.write(json.dumps(lines[0]) + "\n")
    names = list(dict.fromkeys(name for line in lines for name in line))
    print(table(names, [[str(line.get(name, "")) for name in names] for line in lines]))

if __name__ == "__main__":
    run(main, Config, words=("file", "name", "command"))
