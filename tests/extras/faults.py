"""Kill training at bad moments, give the same command again, and compare what is left with the unbroken run, bit for bit.

    python tests/extras/faults.py           each step of one save, and two random kills, per stage
    python tests/extras/faults.py --long    each step of every save, and ten random kills, per stage

Prints a table; exit code 1 if anything differs.
"""
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # noqa: E402
import stages  # noqa: E402

POINTS = ("open", "half-way", "flush", "fsync", "replace", "after")
# A run that ends at once at one step (sys.argv[1]) of the save of a .pt file with one number (sys.argv[2]; 0: none), and
# writes to its last line how many there were. half-way: some of the content is on the disk, the rest is not.
DYING = """
import builtins, importlib, os, sys
import common, torch
point, number, script, *argv = sys.argv[1:]
plain, saves = {"open": open, "save": torch.save, "fsync": os.fsync, "replace": os.replace, "write": common.write_atomic}, [0]
def die(at):
    if at == point and current[0].endswith(".pt") and saves[0] == int(number): os._exit(9)
current = [""]
def write_atomic(path, content):
    current[0] = str(path)
    saves[0] += current[0].endswith(".pt")
    plain["write"](path, content)
    die("after")
    current[0] = ""
"""


def main(long):
    pass
