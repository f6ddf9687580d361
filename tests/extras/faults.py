"""Kill training at bad moments, give the same command again: what is left must equal the unbroken run's, bit for bit.

    python tests/extras/faults.py           per stage five steps of a save in a row, two kills and a SIGTERM
    python tests/extras/faults.py --long    per stage each step of each save, ten kills and five times SIGTERM

The steps of a save: the file is open and empty; half of a .pt file is written; then before fsync, before the file gets
its name, and after that. Kills come at random moments. Prints a table; exit code 1 if anything differs.
"""
import builtins
import io
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  which an optimizer's first step would import in each process anew

import common  # noqa: E402
import stages  # noqa: E402


def die_at(number):
    """Have this process end at once at this step of its saves (0: never); returns the counter of steps."""
    steps, open, save, fsync, replace = itertools.count(1), builtins.open, torch.save, os.fsync, os.replace

    def step(last_act=lambda: None):
        if next(steps) == number:
            last_act()
            os._exit(9)

    def opened(path, *args, **how):
        file = open(path, *args, **how)
        if str(path).endswith(".tmp"):
            step()
        return file

    def saved(content, file):
        save(content, whole := io.BytesIO())
        step(lambda: (file.write(whole.getvalue()[:whole.tell() // 2]), file.flush()))
        save(content, file)

    builtins.open, torch.save, os.fsync = opened, saved, lambda handle: (step(), fsync(handle))
    os.replace = lambda source, target: (step(), replace(source, target), step())
    return steps


def go(stage, inputs, out, number=0, kill=None, after=0.0):
    """A stage's run in a process of its own, which dies at a step of its saves, or of a signal after some seconds: its
    exit code, negative if a signal ended it. out.txt gets what it prints, out.steps the number of steps."""
    module, flags = stages.command(stage, inputs, out, save_every=0)
    if child := os.fork():
        if kill:
            time.sleep(after)
            os.kill(child, kill)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for handle in (1, 2):
        os.dup2(os.open(f"{out}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
    steps, code = die_at(number), 0
    try:
        common.run(module.main, module.Config, module.PRESETS, argv=flags)
    except SystemExit as end:
        code = end.code
    Path(f"{out}.steps").write_text(str(next(steps) - 1))
    os._exit(code)


def fault(stage, inputs, out, **how):
    """Break a run and give the command again: the exit code of the first."""
    out.parent.mkdir()
    code = go(stage, inputs, out, **how)
    for path in out.rglob("*.pt"):
        common.load(path)
    assert code == 0 or go(stage, inputs, out) == 0, Path(f"{out}.txt").read_text()[-500:]
    return code


def main(long):
    """Print the table; the number of runs that did not end as the unbroken one."""
    draw, wrong = random.Random(1), 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        inputs = stages.make_inputs(folder / "inputs")
        print(f"{'stage':8}{'fault':16}exit codes")
        for stage in stages.SCRIPT:
            began, unbroken = time.time(), folder / stage
            assert go(stage, inputs, unbroken) == 0, Path(f"{unbroken}.txt").read_text()[-500:]
            seconds, steps = time.time() - began, int(Path(f"{unbroken}.steps").read_text())
            first = 1 if long else draw.randint(1, steps - 4)
            faults = {"step of a save": [{"number": n} for n in range(first, 1 + (steps if long else first + 4))]}
            for number, runs in ((signal.SIGKILL, 10 if long else 2), (signal.SIGTERM, 5 if long else 1)):
                faults[number.name] = [{"kill": number, "after": draw.uniform(0, seconds)} for _ in range(runs)]
            for name, cases in faults.items():
                outs = [folder / f"{stage} {name} {i}" / stage for i in range(len(cases))]
                codes = [fault(stage, inputs, out, **how) for out, how in zip(outs, cases)]
                print(f"{stage:8}{name:16}", *codes, flush=True)
                wrong += sum(stages.outcome(out) != stages.outcome(unbroken) for out in outs)
    print("every resumed run equals the unbroken one" if not wrong else f"{wrong} runs differ")
    return wrong


if __name__ == "__main__":
    if set(sys.argv[1:]) - {"--long"}:
        sys.exit(__doc__)
    sys.exit(main("--long" in sys.argv) > 0)
