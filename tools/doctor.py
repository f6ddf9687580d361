"""Is my run broken, or is this normal? What looks wrong in what a run wrote, why it matters, and what to try.

    python doctor.py out/tiny               every stage of a run of train_all.sh
    python doctor.py out/tiny/ppo           one stage; or out/tiny/study, or results/tiny/seed1, which is committed

Reads logs, report cards and the evaluation; loads no model. One line per finding, with what the committed runs show in
its place; the exit code is 1 if there is one, 2 if files could not be read. The faults that it knows are in
symptoms.py, how it finds them in examine.py. Some faults no log can show (docs/faults.md): read samples, too. guard
looks at every rollout of PPO while the run lasts.
"""
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import GUARD, UserError, check, run
from examine import ENOUGH, examine
from symptoms import SYMPTOMS
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


def one_response(enc, rollout, iteration):
    """One response of a rollout of ppo.collect with its score and KL, to be printed and logged: looking at samples
    finds most faults of RLHF."""
    i = iteration * 37 % len(rollout["mask"])  # rows are in order of length: not always a short one
    R = rollout["mask"].size(1)
    tokens, pad, n = rollout["tokens"][i].tolist(), int(rollout["pad"][i]), int(rollout["lengths"][i])
    kl = ((rollout["old_logprobs"] - rollout["ref_logprobs"])[i] * rollout["mask"][i]).sum()
    return {"prompt": enc.decode(tokens[pad + 1:-R])[-200:], "response": enc.decode(tokens[-R:][:n]),
            "score": round(rollout["scores"][i].item(), 3), "kl": round(kl.item(), 3)}


# ---- afterwards ------------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What a stage left."""
    name: str
    kind: str                                    # sft (base, too), reward (labeler and judge, too), label, dpo, ...
    path: Path                                   # of the file that the findings are about
    lines: list = field(default_factory=list)    # of log.jsonl
    stop: dict = field(default_factory=dict)     # the line with "stopped" that a guard wrote, and its metrics
    flags: dict = field(default_factory=dict)    # of config.json; {} if there is none
    inputs: dict = field(default_factory=dict)   # ... with the sha256 of what they name
    vocab_size: int = 0                          # ... 0: unknown
    card: dict = field(default_factory=dict)     # report_card.json
    facts: dict = field(default_factory=dict)    # done.json; {} while the stage is not finished
    results: dict = field(default_factory=dict)  # results.json of an evaluation
    agreement: dict = field(default_factory=dict)  # agreement.json of a labeler that is a machine
    reward_start: str = ""                       # PPO: the sha256 of the model that its reward model started from

    def column(self, metric):
        """The values of a metric, from the lines that have it."""
        return [line[metric] for line in self.lines if metric in line]

    @property
    def steps(self):
        """Optimizer steps so far."""
        last = self.lines[-1] if self.lines else {}
        per_line = self.flags.get("epochs", 4) * self.flags.get("minibatches", 1)  # of a rollout
        return last.get("step", len(self.lines) * per_line)

    @property
    def judged(self):
        """Whether it went on for long enough to ask what it learned."""
        return self.steps >= ENOUGH and len(self.lines) >= (8 if self.kind == "ppo" else 1)


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
            check(all(isinstance(x, (int, float)) and abs(x) < 1e30 for x in numbers),
                  f"{path}:{number + 1}: holds what is no number")
            stop = line if "stopped" in line else {}
            lines += [] if stop else [line]
        except (ValueError, AttributeError):
            check(number == len(texts) - 1, f"{path}:{number + 1}: not a line of a log")
    return lines, stop


def kind_of(lines, flags, done, agreement, results):
    """Which stage wrote these; "" for one that the doctor knows nothing about."""
    metrics = {"iteration": "ppo", "chosen_logprobs": "dpo", "test_loss": "sft", "accuracy": "reward"}
    own_flags = {"kl_coef": "ppo", "beta": "dpo", "evals": "sft", "test_share": "reward"}  # of one without lines yet
    keys = {**lines[0], **lines[-1]} if lines else {}
    return next((kind for key, kind in metrics.items() if key in keys), None) or (
        next((kind for key, kind in own_flags.items() if key in flags), None)) or (
        "label" if "order_kept" in done or agreement else "evaluate" if "snapshots" in results else "")


def start_of(reward, weights, place):
    """sha256 of the model that the reward model in folder reward started from; "" if it is not to be found: beside
    the run, or where the run found it, it must have the weights (sha256) that PPO read."""
    name = Path(reward).name
    for at in (place("x").parent.parent / name / "{}", place("x").parent / f"{name}_{{}}", Path(reward) / "{}"):
        config, done = (read(Path(str(at).format(file))) for file in ("config.json", "done.json"))
        if weights and f"sha256 {done.get('outputs', {}).get('model.pt')}" == weights:
            return config.get("inputs", {}).get("model", "")
    return ""


def record_of(name, place):
    """The Record of a stage, None if it is of no kind that is known; place: from a file's name to its path."""
    lines, stop = read_log(place("log.jsonl"))
    config, done, card, agreement, results = (read(place(f"{file}.json")) for file in (
        "config", "done", "report_card", "agreement", "results"))
    flags, inputs = config.get("stage", {}), config.get("inputs", {})
    kind = kind_of(lines, flags if stop else {}, done, agreement, results)
    if not kind:
        return None
    path = place({"label": "done.json", "evaluate": "results.json"}.get(kind, "log.jsonl"))
    start = start_of(flags["reward"], inputs.get("reward"), place) if kind == "ppo" and flags.get("reward") else ""
    return Record(name, kind, path, lines, stop, flags, inputs, config.get("model", {}).get("vocab_size", 0), card,
                  done, results, agreement, start)


def stages(folder):
    """{name: from a file's name to its path} of the stages in a run's folder (out/tiny), of those that
    results/collect.sh kept (results/tiny/seed1), or of one; in the order of train_all.sh."""
    folder = Path(folder)
    check(folder.is_dir(), f"{folder}: no such folder")
    alone = any((folder / file).is_file() for file in ("log.jsonl", "done.json", "config.json"))
    found = {folder.resolve().name: folder.joinpath} if alone else {}
    found |= {path.name: path.joinpath for path in folder.iterdir() if path.is_dir()}
    for path in [*folder.glob("*_done.json"), *folder.glob("*_log.jsonl")]:  # kept
        name = path.name.rsplit("_", 1)[0]
        results = folder / "results.json" if name == "evaluate" else folder / name / "results.json"
        found[name] = lambda file, name=name, results=results: (
            results if file == "results.json" else folder / f"{name}_{file}")
    order = {name: i for i, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def records(folder):
    """A Record of each stage in a folder that is of a known kind."""
    return [record for name, place in stages(folder).items() if (record := record_of(name, place))]


# ---- what is normal --------------------------------------------------------------------------------------------------


def span(numbers):
    """From the least to the largest of some numbers, in few digits."""
    numbers = sorted(numbers)
    low, high = (f"{x:.2f}" if abs(x) < 100 else f"{x:.4g}" for x in (numbers[0], numbers[-1]))
    return low if low == high else f"{low} to {high}"


def committed(stage, metric):
    """What the committed runs have in a metric of a stage: a list of values per seed; [] if there is none."""
    logs = [read_log(path)[0] for path in sorted(COMMITTED.glob(f"seed*/{stage}_log.jsonl"))]
    return [values for lines in logs if (values := [line[metric] for line in lines if metric in line])]


OTHERS = {  # what is in no log: (file, how to find it)
    "report_card.json: held-out rankings": ("{}_report_card.json", lambda card: card["held-out rankings"]["accuracy"]),
    "report_card.json: human comparisons": ("{}_report_card.json", lambda card: (
        card["human comparisons"]["movie, random"]["reward model"]["accuracy"])),
    "done.json: order_kept; agreement.json": ("label_done.json", lambda done: done["order_kept"]),
    "results.json: snapshots": ("results.json", lambda results: results["snapshots"]["ppo"][-1]["judge"]),
    "results.json: win_rate_judge": ("results.json", lambda results: results["policies"]["ppo"]["win_rate_judge"])}


def reference(record, metric, whole=True):
    """What healthy runs have, in words, of the stage of that name or else of that kind; "" if there is none."""
    if metric in OTHERS:
        file, find = OTHERS[metric]
        values = [find(read(path)) for stage in (record.name, record.kind)
                  for path in sorted(COMMITTED.glob(f"seed*/{file.format(stage)}"))]
        return f"healthy runs: {span(values)}" if values else ""
    metric = metric.split(", ")[0]
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


def report(record):
    """Print what there is to say of a stage; whether something was found."""
    findings, last = examine(record), record.lines[-1] if record.lines else {}
    for name, seen, where in findings:
        symptom = SYMPTOMS[name]
        places = filter(None, [place_of(record, where), reference(record, symptom.metric)])
        print(visible(f"{record.name}: {name}: {symptom.metric}: {seen} ({'; '.join(places)}): {symptom.why}. "
                      f"Try: {symptom.tries}."))
    if findings:
        for line in [line for line in record.lines if "sample" in line][-1:]:
            print(visible("{}: look at iteration {}: [{prompt!r}]{response!r} score {score} kl {kl}".format(
                record.name, line["iteration"], **line["sample"])))
        return True
    numbers = [f"{metric} {x[0]:.2f} to {x[-1]:.2f} ({reference(record, metric, whole=False)})"
               for metric in NUMBERS[record.kind] if (x := record.column(metric))]
    numbers += [f"held out {row['accuracy']:.2f}" for name, row in record.card.items() if name == "held-out rankings"]
    numbers += [f"order_kept {x:.2f}" for name, x in record.facts.items() if name == "order_kept"]
    policies = record.results.get("policies", {}).items()
    numbers += [f"{name} wins {row['win_rate_judge']:.2f}" for name, row in policies if "win_rate_judge" in row]
    few = f" as far as {record.steps} optimizer steps show" if record.lines and not record.judged else ""
    far = f", not finished: iteration {last['iteration']} of {record.flags['iterations']}" if (
        not record.facts and "iteration" in last and "iterations" in record.flags) else ""
    print("; ".join([f"{record.name}: healthy{few}{far}", *numbers]))
    return False


@dataclass
class Config:
    run: str = ""  # folder of a run, or of one of its stages


def main(cfg):
    check(cfg.run, "name a folder, such as: python doctor.py out/tiny")
    known, sick, unread = 0, 0, 0
    for name, place in stages(cfg.run).items():
        try:
            if record := record_of(name, place):
                known += 1
                sick += report(record)
        except Exception as error:  # whatever is wrong with its files, the other stages are still looked at
            unread += 1
            words = error if isinstance(error, UserError) else f"damaged, or of another version: {error!r}"
            print(visible(f"error: {name}: {words}"), file=sys.stderr)
    check(known or unread, f"{cfg.run}: no log.jsonl that the doctor knows, neither here nor in a folder below")
    if sick:
        print(f"{sick} stage{'s' * (sick > 1)} with findings")
    if sick or unread:
        sys.exit(2 if unread else 1)


if __name__ == "__main__":
    words_for("run")
    run(main, Config)
