"""Keeps what finished runs found, in two files and without their weights: results.json and logs.jsonl.

    python -m study.collect out/tiny results/tiny/seed1                 a run of train_all.sh, with its report
    python -m study.collect out/smollm results/smollm                   the same of a preset with one run
    python -m study.collect out/tiny/frontier results/frontier --seed 1     a study; its other seeds are kept

logs.jsonl: of each stage a line with its configuration, the lines of its log, its report card, and its done.json.
typical.json (of a run of train_all.sh): the responses to one prompt, chosen by a rule.
A study's results.json is {seed: {run: results}}. Paths into the run become paths into out/tiny or out/smollm.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from common import digest, run
from study import report

# Of a study's many runs these fields of a log line are kept (curves that one may want to compare), and of an
# evaluation's results all but these.
LINES = {"seed", "run", "config", "card", "done", "iteration", "step", "score", "kl", "kl_coef", "length", "eos_rate",
         "entropy", "grad_norm", "clip_fraction", "explained_variance", "loss", "accuracy", "margin"}
LEFT_OUT = {"training", "histograms", "samples", "stages", "others", "held_out_rankings"}

@dataclass
class Config:
    source: str = "out/tiny"            # a finished run, or the folder of a study in it
    target: str = "results/tiny/seed1"  # where to keep it
    seed: int = 0                       # of a study; 0: --source is a run of train_all.sh

def read(path, digits=5):
    """The content of a JSON file, or the list of a .jsonl file's; floats rounded to so many significant digits."""
    text = path.read_text(encoding="utf-8")
    text = f"[{','.join(text.splitlines())}]" if path.suffix == ".jsonl" else text
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.{digits}g}"))

def stage_lines(folder, **labels):
    """The lines of logs.jsonl about the stage of a folder; the labels come first in each."""
    lines = [{"config": read(folder / "config.json")["stage"]}]
    lines += read(folder / "log.jsonl") if (folder / "log.jsonl").is_file() else []
    lines += [{"card": read(folder / "report_card.json")}] if (folder / "report_card.json").is_file() else []
    lines += [{"done": {name: value for name, value in read(folder / "done.json").items() if name != "files"}}]
    return [{**labels, **line} for line in lines]

def typical(samples):
    """Of the prompts that all policies answered the one whose judge scores are closest (least squares) to the means."""
    names = list(samples[0]["judge"])
    samples = [row for row in samples if len(row["judge"]) == len(names)]  # best-of-n may have fewer prompts
    means = {name: mean(row["judge"][name] for row in samples) for name in names}
    best = min(samples, key=lambda row: sum((row["judge"][name] - means[name]) ** 2 for name in names))
    return {"rule": typical.__doc__, "means": {name: round(x, 4) for name, x in means.items()}, **best}

def main(cfg):
    source, target = Path(cfg.source), Path(cfg.target)
    target.mkdir(parents=True, exist_ok=True)
    stages = [path.parent for path in sorted(source.glob("*/done.json"), key=lambda path: path.stat().st_mtime)]
    if cfg.seed:
        there = (target / "results.json").is_file()
        results, lines = (read(target / "results.json", 7), read(target / "logs.jsonl")) if there else ({}, [])
        new = [line for folder in stages for line in stage_lines(folder, seed=cfg.seed, run=folder.name)]
        lines = [line for line in lines if line["seed"] != cfg.seed] + [
            {name: value for name, value in line.items() if name in LINES} for line in new]
        results[str(cfg.seed)] = {
            path.parent.name: {name: value for name, value in read(path, 7).items() if name not in LEFT_OUT}
            for kind in ("results", "report", "agreement") for path in sorted(source.glob(f"*/{kind}.json"))}
    else:
        results = read(source / "evaluate" / "results.json", 7)
        lines = [line for folder in stages for line in stage_lines(folder, stage=folder.name)]
        one = typical(read(source / "evaluate" / "samples.jsonl"))
        for name in ("opinions.json", "verdict.json", "refusals.json", "refusals.md"):
            (target / name).unlink(missing_ok=True)
            path, samples = source / "evaluate" / name, source / "evaluate" / "samples.jsonl"
            if path.is_file() and (name != "verdict.json" or read(path)["samples"] == digest(samples)):
                text = path.read_text(encoding="utf-8").replace(str(source), f"out/{target.name}")
                (target / name).write_text(text, encoding="utf-8")
        (target / "typical.json").write_text(json.dumps(one, indent=1) + "\n", encoding="utf-8")
    preset = target.name if target.parent.name == "results" and not cfg.seed else "tiny"
    out = f"{source.parent if cfg.seed else source}/"
    for name, text in (("results.json", json.dumps(results)), ("logs.jsonl", "\n".join(map(json.dumps, lines)))):
        (target / name).write_text(text.replace(out, f"out/{preset}/") + "\n", encoding="utf-8")
    if not cfg.seed:
        report.main(report.Config((str(target),)))

if __name__ == "__main__":
    run(main, Config, words=("source", "target"))
