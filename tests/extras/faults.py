"""Kill training at bad moments, give the same command again, and see whether it goes on as if nothing had happened.

    python tests/faults.py             every step of a save once per stage, two kills per stage
    python tests/faults.py --long      every step of every save, 30 kills, and train_all.sh killed in each stage

After each fault every file that is there must load; the continued run's log lines (times aside), weights, snapshots and
done.json must equal the unbroken run's bit for bit. Prints a table; exit code 1 if anything differs.
"""
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # who is killed cleans nothing up
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])

import torch  # noqa: E402

import checkpoint  # noqa: E402
import runs  # noqa: E402
from conftest import SENTENCES, make_checkpoints  # noqa: E402
from data import write_jsonl  # noqa: E402

POINTS = ("before the temporary file", "after open", "half-way", "before fsync", "before replace", "after replace")
TIMES = {"seconds", "tokens_per_second", "rollout_tokens_per_second", "update_tokens_per_second", "peak_memory_mb",
         "outputs"}  # the last one: sha256 of files that hold times
# Short runs in which every item of the state matters: dropout, a best loss in the middle, lines of several steps.
COMMON = {"device": "cpu", "dtype": "float32", "save_every": 0.0}
STAGES = {
    "base": ("sft", {"n_layer": 1, "n_head": 2, "width": 16, "block_size": 32, "pack": 16, "batch_size": 4, "lr": 1e-2,
                     "epochs": 3.0, "dropout": 0.2, "evals": 3}),
    "sft": ("sft", {"batch_size": 4, "epochs": 4.0, "lr": 0.2, "dropout": 0.2, "evals": 4}),
    "reward": ("reward", {"batch_size": 4, "epochs": 4, "lr": 1e-3, "dropout": 0.2, "log_every": 3, "test_share": 0.25,
                          "samples": 8, "response_tokens": 6, "pairs": ""}),
    "ppo": ("ppo", {"iterations": 6, "episodes": 4, "epochs": 2, "minibatches": 2, "microbatch": 3, "lr": 1e-3,
                    "response_tokens": 6, "kl_horizon": 8.0, "kl_target": 0.01, "snapshots": 3,
                    "no_end_score": float("nan")}),
    "dpo": ("dpo", {"batch_size": 5, "epochs": 4, "lr": 1e-3, "log_every": 3, "test_share": 0.25}),
}


def settings(stage, given, out):
    """(script, {flag: value}) of a stage's run into the folder out; given: what make_checkpoints returned."""
    script, flags = STAGES[stage]
    folder = Path(given.sft).parent
    texts, other = str(folder / "texts.jsonl"), str(folder / "other.jsonl")
    inputs = {"base": {"train": texts, "test": texts, "vocab": str(given.vocab)},
              "sft": {"model": given.sft, "train": str(folder / "demos.jsonl"), "test": other},
              "reward": {"model": given.sft, "sft": given.sft, "prompts": given.prompts, "train": given.rankings},
              "ppo": {"sft": given.sft, "reward": given.reward, "prompts": given.prompts},
              "dpo": {"model": given.sft, "train": given.rankings}}
    return script, {**COMMON, **flags, **inputs[stage], "out": str(out)}


def make_inputs(folder):
    """Everything that the runs read, in this folder."""
    given = make_checkpoints(folder)
    write_jsonl(folder / "texts.jsonl", [{"text": sentence} for sentence in SENTENCES * 4])
    words = "good bad so good bad so".split()
    write_jsonl(folder / "demos.jsonl", [{"prompt": "the film", "completion": f" was {word}"} for word in words])
    # Of this the demonstrations say nothing: the held-out loss soon rises, and the best is not the last.
    write_jsonl(folder / "other.jsonl", [{"prompt": "the plot", "completion": " z y x w"}] * 4)
    return given


def outcome(folder):
    """What a run left, times aside and flags that change no result: log lines, facts, and a digest of all weights."""
    folder = Path(folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines.append(json.loads((folder / "done.json").read_text()))
    left = {"lines": [{name: value for name, value in line.items() if name not in TIMES} for line in lines],
            "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))}
    for path in sorted(folder.rglob("*.pt")):
        facts = checkpoint.load(path)
        facts["stage"] = {name: value for name, value in facts["stage"].items() if name not in runs.FREE}
        bytes_of = [name.encode() + x.numpy().tobytes() for name, x in facts.pop("weights").items()]
        left[str(path.relative_to(folder))] = repr(facts), hashlib.sha256(b"".join(bytes_of)).hexdigest()
    return left


# ---- in the process that dies ----------------------------------------------------------------------------------------


def crash_at(point, number):
    """Have this process end at once at a step of the save with this number, counted over all .pt files."""
    saves, write_atomic, save, sync, replace = [0], checkpoint.write_atomic, torch.save, checkpoint.sync, os.replace

    def counted(path, write):
        saves[0] += str(path).endswith(".pt")
        if point == "before the temporary file" and due(path):
            os._exit(9)
        write_atomic(path, write)

    def due(path):
        return saves[0] == number and ".pt" in Path(path).name

    def torch_save(content, path):
        if point == "after open" and due(path):
            open(path, "wb").close()
            os._exit(9)
        if point == "half-way" and due(path):
            save(content, whole := io.BytesIO())
            Path(path).write_bytes(whole.getvalue()[:len(whole.getvalue()) // 2])
            os._exit(9)
        save(content, path)

    def synced(path):
        if point == "before fsync" and due(path):
            os._exit(9)
        sync(path)

    def replaced(source, target):
        if point == "before replace" and due(target):
            os._exit(9)
        replace(source, target)
        if point == "after replace" and due(target):
            os._exit(9)
    checkpoint.write_atomic, torch.save, checkpoint.sync, os.replace = counted, torch_save, synced, replaced
    return saves


def child(script, flags, output, point, number):
    """One run through the guard that the command line uses; with a point, it dies there. Counts its saves."""
    torch.set_num_threads(1)
    for handle in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), handle)
    module = __import__(script)
    sys.argv = [script] + [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    saves = crash_at(point, number)
    module.run(module.main, module.Config, module.PRESETS)
    Path(output).with_suffix(".saves").write_text(str(saves[0]))


# ---- in the process that looks ---------------------------------------------------------------------------------------


class Lab:
    """Runs of a stage in processes of their own, the unbroken one for comparison first."""

    def __init__(self, folder):
        self.folder, self.given, self.count = Path(folder), make_inputs(Path(folder) / "inputs"), 0
        self.context = multiprocessing.get_context("forkserver")
        # What every run imports is imported once; torch._dynamo is what the first step of an optimizer needs.
        self.context.set_forkserver_preload(["faults", "sft", "reward", "ppo", "dpo", "torch._dynamo"])
        self.unbroken = {}

    def start(self, stage, out, point="", number=0):
        """A started process, and the file that gets its output."""
        script, flags = settings(stage, self.given, out)
        output = Path(f"{out}.txt")
        process = self.context.Process(target=child, args=(script, flags, str(output), point, number))
        process.start()
        return process, output

    def finish(self, stage, out):
        """Run a stage to its end: what it left, its seconds and its output."""
        process, output = self.start(stage, out)
        began = time.time()
        process.join(120)
        if process.exitcode != 0:
            raise AssertionError(f"{stage}: exit code {process.exitcode}: {output.read_text()[-500:]}")
        return outcome(out), time.time() - began, output.read_text()

    def reference(self, stage):
        """(outcome, seconds, number of saves) of the unbroken run."""
        if stage not in self.unbroken:
            left, seconds, _ = self.finish(stage, self.folder / stage)
            saves = int((self.folder / f"{stage}.saves").read_text())
            self.unbroken[stage] = left, seconds, saves
        return self.unbroken[stage]

    def fault(self, stage, point="", number=0, kill=None, after=None):
        """Break a run at a step of a save, or by a signal after some seconds (None: once it has saved a state), and
        continue it: (exit code of the broken run, step after which the other went on, or 0, whether all is as in the
        unbroken run)."""
        reference, self.count = self.reference(stage)[0], self.count + 1
        out = self.folder / f"{self.count}" / stage
        out.parent.mkdir()
        process, _ = self.start(stage, out, point, number)
        if kill:
            time.sleep(after or 0)
            while after is None and process.is_alive() and not (out / "resume.pt").exists():
                time.sleep(0.001)
            if process.is_alive():
                os.kill(process.pid, kill)
        process.join(120)
        assert process.exitcode is not None, f"{stage} hangs"
        for path in out.rglob("*.pt"):
            checkpoint.load(path)
        left, _, text = self.finish(stage, out) if process.exitcode else (outcome(out), 0, "")
        steps = [line.split()[4] for line in text.splitlines() if line.startswith("going on after step")]
        return process.exitcode, int(steps[-1]) if steps else 0, left == reference


def train_all(folder, out, **how):
    """train_all.sh with its smallest settings, started: data and output are in folder."""
    return subprocess.Popen(
        ["bash", str(ROOT / "train_all.sh"), "smoke"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "PYTHON": sys.executable, "DATA": str(folder / "the data"),
                                     "OUT": str(folder / out)}, **how)


def break_pipeline(folder, out, breaks, draw):
    """Start train_all.sh, send a signal (SIGKILL: to all its processes, else: to the shell alone) a moment after a
    stage has begun, and so on for all breaks (stage, signal), and then to its end. What it printed."""
    text = ""
    for stage, number in (*breaks, (None, None)):
        shell = train_all(folder, out)
        for line in shell.stdout:
            text += line
            if line == f"== {stage}\n":
                break
        if stage:
            time.sleep(draw.uniform(1, 3.5))
            os.killpg(shell.pid, number) if number == signal.SIGKILL else shell.send_signal(number)
        code = shell.wait(120)
        if stage and number != signal.SIGKILL:
            try:
                os.killpg(shell.pid, 0)
                raise AssertionError(f"{stage} has outlived train_all.sh")
            except ProcessLookupError:
                pass
        text += shell.stdout.read()
        assert code in ((0, -9) if number == signal.SIGKILL else (0, 128 + number) if stage else (0,)), (code, text)
    return text


def results_of(folder, out):
    """What an evaluation found, without times, places and dates."""
    results = json.loads((folder / out / "evaluate" / "results.json").read_text())
    samples = (folder / out / "evaluate" / "samples.jsonl").read_text()
    return {name: results[name] for name in ("policies", "snapshots", "reward_models", "prompts", "best_of_n",
                                              "proxy_agreement", "others", "held_out_rankings")}, samples


def main(long):
    """Print the table; the number of runs that did not end as the unbroken one."""
    draw, wrong = random.Random(1), 0
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(folder)
        print(f"{'stage':8} {'fault':34} {'runs':>5} {'exit codes':>16} {'went on after step':>28}  equal")
        for stage in STAGES:
            _, seconds, saves = lab.reference(stage)
            faults = [(point, [{"point": point, "number": n} for n in (
                range(1, saves + 1) if long else [draw.randint(1, saves)])]) for point in POINTS]
            for number, kills in ((signal.SIGKILL, 6 if long else 2), (signal.SIGTERM, 1), (signal.SIGINT, 1)):
                faults.append((number.name, [{"kill": number, "after": draw.uniform(0, seconds)}
                                             for _ in range(kills)]))
            for name, cases in faults:
                results = [lab.fault(stage, **case) for case in cases]
                codes, steps, equal = zip(*results)
                wrong += len(equal) - sum(equal)
                print(f"{stage:8} {name:34} {len(cases):5} {' '.join(map(str, sorted(set(codes)))):>16} "
                      f"{' '.join(map(str, sorted(set(steps)))):>28}  {sum(equal)} of {len(equal)}", flush=True)
        if long:
            from test_pipeline import prepare
            folder, stages = Path(folder), "base sft labeler judge samples label reward dpo ppo evaluate".split()
            with contextlib.redirect_stdout(io.StringIO()):
                prepare(folder)
            break_pipeline(folder, "unbroken", [], draw)
            for number in (signal.SIGKILL, signal.SIGTERM):
                text = break_pipeline(folder, number.name, [(stage, number) for stage in stages], draw)
                equal = results_of(folder, number.name) == results_of(folder, "unbroken")
                wrong += not equal
                print(f"train_all.sh, {number.name} in each of {', '.join(stages)}: the same results: {equal} "
                      f"({text.count('finished already')} times a stage was finished already, "
                      f"{text.count('going on after')} times it went on)", flush=True)
    print("every continued run equals the unbroken one" if not wrong else f"{wrong} runs differ")
    return wrong


if __name__ == "__main__":
    if set(sys.argv[1:]) - {"--long"}:
        sys.exit(__doc__)
    from faults import main as run_main  # by its name, as the processes that it starts know it
    sys.exit(run_main("--long" in sys.argv) > 0)
