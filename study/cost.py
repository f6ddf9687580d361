"""What does the value model cost? Seconds and memory of an iteration of PPO and RLOO, on an otherwise idle machine.

    python -m study.cost out/tiny --settings tiny --to results/frontier/cost.jsonl

Runs ppo.py for a few iterations with each method, every time in a process of its own, whose peak memory is that of the
method. Appends a line for each to --to, and prints them as a table. An iteration's seconds are a median, without the
first one's.
"""
import json
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

METHODS = {"PPO": [], "PPO, shared value model": ["--value", "shared"], "RLOO": ["--advantages", "rloo"]}


@dataclass
class Config:
    folder: str = "out/tiny"  # a run of train_all.sh
    settings: str = "tiny"    # preset of ppo.py
    iterations: int = 5       # of each method
    flags: str = ""           # more flags of ppo.py
    to: str = ""              # file to append to; empty: none


def measure(cfg, method):
    """A line about one method."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, "ppo.py", "--preset", cfg.settings, "--sft", f"{cfg.folder}/sft", "--reward",
                        f"{cfg.folder}/reward", "--iterations", str(cfg.iterations), "--snapshots", "1", "--out", out,
                        *METHODS[method], *cfg.flags.split()], check=True, stdout=subprocess.DEVNULL)
        seconds = [json.loads(line)["seconds"] for line in (Path(out) / "log.jsonl").read_text().splitlines()]
        stage = json.loads((Path(out) / "config.json").read_text())["stage"]
        done = json.loads((Path(out) / "done.json").read_text())
    return {"folder": Path(cfg.folder).name, "method": method, "hardware": hardware(), "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            **{name: stage[name] for name in ("dtype", "episodes", "epochs", "microbatch", "response_tokens")},
            "seconds": round(median(b - a for a, b in zip(seconds, seconds[1:])), 2),
            **{name: value for name, value in done.items() if name.startswith("peak")}}


def main(cfg):
    lines = [measure(cfg, method) for method in METHODS]
    if cfg.to:
        with open(cfg.to, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    names = list(lines[0])
    print(table(names, [[str(line[name]) for name in names] for line in lines]))


if __name__ == "__main__":
    run(main, Config, words=("folder",))
