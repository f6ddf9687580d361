"""Is my run broken, or is this normal? What looks wrong in what a run wrote, why it matters, and what to try.

    python doctor.py out/tiny               every stage of a run of train_all.sh
    python doctor.py out/tiny/ppo           one stage; results/tiny/seed1, committed, works too

Reads logs, report cards and the evaluation; loads no model. One line per finding, with what the committed runs show in
its place; the exit code is 1 if there is one. The faults that it knows, and their limits, are in symptoms.py; some
faults no log can show (docs/metrics.md): read samples, too. guard looks at every rollout of PPO while the run lasts.
"""
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import GUARD, check, run
from symptoms import ENOUGH, SYMPTOMS, examine
from terminal import visible, words_for

CLOSE = 0.5  # how far a first ratio may be from 1: the rounding of bf16 at an unlikely token, but no bug
NEGATIVE = -0.1  # nats per response: by chance an estimate of KL is below zero, but not so far below
ROLLOUTS = 5  # ... for so many rollouts in a row
ORDER = ("base", "sft", "labeler", "judge", "label", "reward", "dpo", "ppo", "evaluate")  # of train_all.sh
COMMITTED = Path(__file__).parent / "results" / "tiny"  # healthy runs: what is normal
NUMBERS = {  # shown of a stage without findings
    "ppo": ("score", "kl", "entropy", "length", "end_rate", "repetition", "explained_variance", "clip_fraction"),
    "dpo": ("loss", "accuracy", "margin", "chosen_logprobs"), "reward": ("loss", "accuracy"),
    "sft": ("loss", "test_loss"), "label": (), "evaluate": ()}


# ---- while PPO runs --------------------------------------------------------------------------------------------------


def guard_ratio(error, log):
    """Stop a run whose ratio, before anything has been learned from a rollout, is this far from 1 at some token."""
    if error > CLOSE:
        log.stop(f"the ratio is {error:.2f} away from 1 though nothing has been learned yet: old and new "
                 "log-probabilities of the same weights differ (masks, positions, temperature, dropout?)", GUARD)


def guard(metrics, streak, kl_ceiling, log):
    """Stop a run that has gone wrong; what only looks wrong comes back in words.

    metrics: those of ppo.collect. streak: {"below_zero": rollouts in a row with KL below zero}, changed here.
    kl_ceiling: nats per response; 0: none.
    """
    kl = metrics["kl"].item()
    streak["below_zero"] = streak["below_zero"] + 1 if kl < NEGATIVE else 0
    if kl > (kl_ceiling or math.inf):
        log.stop(f"KL is {kl:.1f} nats per response, above --kl-ceiling {kl_ceiling:g}: the policy runs away (a larger "
                 "--kl-coef or a smaller --lr holds it, with --restart true)", GUARD)
    if streak["below_zero"] >= ROLLOUTS:
        log.stop(f"KL is {kl:.2f} nats per response, below zero for {ROLLOUTS} rollouts: the responses were not drawn "
                 "from the policy whose log-probabilities are counted", GUARD)
    doubts = {"hardly a response reaches end of text": metrics["end_rate"] < 0.05,
              "nearly all responses are the same": metrics["distinct"] < 0.1}
    return [text for text, found in doubts.items() if found]


# ---- afterwards ------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What a stage left."""
    name: str
    kind: str
    path: Path                                   # of the file that the findings are about
    lines: list = field(default_factory=list)    # of log.jsonl
    stop: dict = field(default_factory=dict)     # the line with "stopped" that a guard wrote, and its metrics
    flags: dict = field(default_factory=dict)    # of config.json, with the sha256 of the inputs
    inputs: dict = field(default_factory=dict)
    card: dict = field(default_factory=dict)     # report_card.json
    facts: dict = field(default_factory=dict)    # done.json
    results: dict = field(default_factory=dict)  # results.json of an evaluation
    reward_model: str = ""                       # PPO: its reward model's folder
    reward_start: str = ""                       # ... and the sha256 of the model that this started from

    def column(self, metric):
        """The values of a metric, from the lines that have it."""
        return [line[metric] for line in self.lines if metric in line]

    @property
    def steps(self):
        """Optimizer steps so far."""
        last = self.lines[-1] if self.lines else {}
        per_line = self.flags.get("epochs", 4) * self.flags.get("minibatches", 1)  # of a rollout
        return last.get("step", len(self.lines) * per_line)


def read(path):
    """The content of a JSON file, {} if there is none; UserError if it is damaged."""
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
        check(isinstance(content, dict), f"{path}: not an object")
        return content
    except (OSError, ValueError) as error:
        check(False, f"{path}: cannot be read: {error}")


def read_log(path):
    """Lines of a log.jsonl, and the one of a guard that stopped the run; a line that was cut at the end is left out."""
    lines, stop = [], {}
    texts = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for number, text in enumerate(texts):
        try:
            line = json.loads(text)
            numbers = [x for key, x in line.items() if key not in ("stopped", "warnings", "sample")]
            check(all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers),
                  f"{path}:{number + 1}: holds what is no number")
            stop = line if "stopped" in line else {}
            lines += [] if stop else [line]
        except (ValueError, AttributeError):
            check(number == len(texts) - 1, f"{path}:{number + 1}: not a line of a log")
    return lines, stop


def kind_of(lines, place):
    """Which stage wrote this, from what its files hold; "" for one that the doctor knows nothing about."""
    keys = {**lines[0], **lines[-1]}
    names = {"iteration": "ppo", "chosen_logprobs": "dpo", "test_loss": "sft", "accuracy": "reward"}
    found = [kind for key, kind in names.items() if key in keys]
    done = read(place("done.json"))
    return (found or ["label"] * ("order_kept" in done) or
            ["evaluate"] * ("results.json" in done.get("outputs", {}) and place("results.json").is_file()) or [""])[0]


def record_of(name, place):
    """The Record of a stage, None if it is of no kind that is known; place: from a file's name to its path."""
    lines, stop = read_log(place("log.jsonl"))
    kind = kind_of(lines or [stop], place) or ("ppo" if "first_ratio_error" in stop or "kl" in stop else "")
    if not kind:
        return None
    config = read(place("config.json"))
    path = place({"label": "done.json", "evaluate": "results.json"}.get(kind, "log.jsonl"))
    record = Record(name, kind, path, lines, stop, config.get("stage", {}), config.get("inputs", {}),
                    read(place("report_card.json")), read(place("done.json")), read(place("results.json")))
    if kind == "ppo" and "," not in (reward := record.flags.get("reward", "")):
        folder = Path(reward)
        for path in (folder / "config.json", place("x").parent.parent / folder.name / "config.json",
                     place("x").parent / f"{folder.name}_config.json"):
            record.reward_model = record.reward_model or (str(folder) if path.is_file() else "")
            record.reward_start = record.reward_start or read(path).get("inputs", {}).get("model", "")
    return record


def records(folder):
    """Records of all stages in a run's folder (out/tiny), of a kept one (results/tiny/seed1), or of one stage."""
    folder = Path(folder)
    check(folder.is_dir(), f"{folder}: no such folder")
    stages = {folder.resolve().name: folder.joinpath}  # name: from a file's name to its path
    stages |= {path.name: path.joinpath for path in sorted(folder.iterdir()) if path.is_dir()}
    for path in [*folder.glob("*_done.json"), *folder.glob("*_log.jsonl")]:  # kept by results/collect.sh
        name = path.name.rsplit("_", 1)[0]
        stages[name] = lambda file, name=name: folder / (file if file == "results.json" else f"{name}_{file}")
    found = [record for name, place in stages.items() if (record := record_of(name, place))]
    check(found, f"{folder}: no log.jsonl that the doctor knows, neither here nor in a folder below")
    return sorted(found, key=lambda record: (ORDER.index(record.name) if record.name in ORDER else 99, record.name))


def span(numbers):
    """From the least to the largest of some numbers, in few digits."""
    numbers = sorted(numbers)
    low, high = (f"{x:.2f}" if abs(x) < 100 else f"{x:.0f}" for x in (numbers[0], numbers[-1]))
    return low if low == high else f"{low} to {high}"


def committed(stage, metric):
    """What the committed runs have in a metric of a stage: a list of values per seed; [] if there is none."""
    logs = [read_log(path)[0] for path in sorted(COMMITTED.glob(f"seed*/{stage}_log.jsonl"))]
    return [values for lines in logs if (values := [line[metric] for line in lines if metric in line])]


def reference(record, metric, whole=True):
    """The same in words, of the stage of that name or else of that kind; "" if there is none."""
    seeds = committed(record.name, metric) or committed(record.kind, metric)
    if not seeds:
        return ""
    return (f"healthy runs: {span(sum(seeds, []))}, " if whole else "healthy: ") + (
        f"at the end {span(values[-1] for values in seeds)}")


def place_of(record, where):
    """Which lines of the log: iterations or steps, in words."""
    if where is None or not record.lines:
        return str(record.path)
    unit = "iteration" if record.kind == "ppo" else "step"
    at = [record.lines[i][unit] for i in where]
    return f"{record.path}, {unit} {at[0]}" + (f" to {at[-1]}" if len(at) > 1 else "")


@dataclass
class Config:
    run: str = ""  # folder of a run, or of one of its stages


def main(cfg):
    check(cfg.run, "name a folder, such as: python doctor.py out/tiny")
    sick = 0
    for record in records(cfg.run):
        try:
            findings = examine(record)
        except (KeyError, TypeError, ZeroDivisionError, IndexError) as error:
            check(False, f"{record.path}: damaged, or of another version: {error!r}")
        sick += bool(findings)
        for name, seen, where in findings:
            symptom = SYMPTOMS[name]
            places = filter(None, [place_of(record, where), reference(record, symptom.metric)])
            print(visible(f"{record.name}: {name}: {symptom.metric}: {seen} ({'; '.join(places)}): {symptom.why}. "
                          f"Try: {symptom.tries}."))
        if not findings:
            few = f" as far as {record.steps} optimizer steps show" if record.lines and record.steps < ENOUGH else ""
            numbers = [f"{metric} {x[0]:.2f} to {x[-1]:.2f} ({reference(record, metric, whole=False)})"
                       for metric in NUMBERS[record.kind] if (x := record.column(metric))]
            print("; ".join([f"{record.name}: healthy{few}", *numbers]))
    if sick:
        print(f"{sick} stage{'s' * (sick > 1)} with findings")
        sys.exit(1)


if __name__ == "__main__":
    words_for("run")
    run(main, Config)
