"""The report card of reward models: how accuracy grows with the number of rankings, and where it is lost.

    python reward.py --preset smollm-people --limit 800 --out out/curve/800 ...     (and others)
    python -m study.reward_models out/curve out/curve/* out/smollm/judge --small out/tiny/judge

Held-out pairs of film reviews, random and of the same sign; a linear model on a bag of words fitted to the same
rankings; one person against the others' mean. By rating gap: pairs are harder the closer people's ratings are. Writes
results.json, reward_models.md and reward_models.png into the first folder.
"""
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common import check, open_folder, progress, run, set_up, write_atomic, write_json
from data import pair_accuracy, read_jsonl, read_rankings
from evaluate import hardware
from model import load_model
from study.card import bag_of_words
from study.markdown import accuracy, table
from study.opinions import judged
from study.report import drawing

GAPS = {"gap under 1": (0, 1), "1 to 2": (1, 2), "2 to 3": (2, 3), "3 and more": (3, 9)}  # ratings are from -4 to 4

@dataclass
class Config:
    out: str = "out/curve"     # folder of the page
    models: tuple = ()         # folders of reward models
    small: str = ""            # reward model of another size, to compare: a folder
    pairs: str = "data/reviews/pairs_test.jsonl"  # held-out pairs, with summary.json beside them
    domain: str = "movie"      # of the pairs
    seed: int = 1
    device: str = "auto"       # auto, cpu, cuda, mps
    dtype: str = "auto"        # auto, float32, bfloat16 (autocast)

def card(scores, rows):
    """{group of pairs: pair_accuracy} of {text: score}: by sample, and random pairs by rating gap."""
    groups = {}
    for row in rows:
        groups.setdefault(row["sample"].replace("_", " "), []).append(row)
        if row["sample"] == "random":
            gap = next(name for name, (low, high) in GAPS.items() if low <= row["gap"] < high)
            groups.setdefault(gap, []).append(row)
    number = {text: i for i, text in enumerate(scores)}
    return {name: pair_accuracy(torch.tensor([scores[row["chosen"]] - scores[row["rejected"]] for row in group]),
                                torch.tensor([[number[row["chosen"]], number[row["rejected"]]] for row in group]))
            for name, group in groups.items() if group}

def main(cfg):
    device, autocast = set_up(cfg)
    check(cfg.models, "no reward models named")
    out = open_folder(cfg.out)
    rows = [row for row in read_jsonl(cfg.pairs, {"prompt": str, "chosen": str, "rejected": str})
            if row["domain"] == cfg.domain]
    texts = sorted({row[side] for row in rows for side in ("chosen", "rejected")})
    summary = json.loads(Path(cfg.pairs).with_name("summary.json").read_text(encoding="utf-8"))
    found, counted = [], {}
    for folder in progress([*cfg.models, *([cfg.small] if cfg.small else [])], "models"):
        stage = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["stage"]
        train = read_rankings(stage["train"])
        train = train[:stage["limit"] or len(train)]
        scores = judged(folder, [{"prompt": "", "responses": texts}], device, autocast).flatten().tolist()
        parameters = sum(p.numel() for p in load_model(folder, "cpu", "reward").parameters())
        found.append({"model": f"{parameters / 1e6:.1f}M", "rankings": len(train), "half": Path(stage["train"]).stem,
                      "epochs": stage["epochs"], "lr": stage["lr"], "card": card(dict(zip(texts, scores)), rows)})
        counted[len(train), stage["train"]] = train
    for (_, path), train in counted.items():
        linear = bag_of_words(train)
        found.append({"model": "bag of words", "rankings": len(train), "half": Path(path).stem,
                      "card": card({text: linear(text) for text in texts}, rows)})
    found.sort(key=lambda row: (row["model"] == "bag of words", row["model"], row["rankings"]))
    people = {name.replace("_", " "): row[0] for name, row in summary["agreement"][cfg.domain].items()}
    write_json(out / "results.json", {"hardware": hardware(), "torch": torch.__version__,
                                      "date": time.strftime("%Y-%m-%d"), "people": people, "models": found})

    with drawing(out / "reward_models.png", 1, 2, (11, 4.2), sharey=True) as [axes]:
        for axis, sample in zip(axes, ("random", "same sign")):
            for model in dict.fromkeys(row["model"] for row in found):
                mine = [row for row in found if row["model"] == model]
                cards = [row["card"][sample] for row in mine]
                bars = [[abs(row["accuracy"] - row["interval"][end]) for row in cards] for end in (0, 1)]
                axis.errorbar([row["rankings"] for row in mine], [row["accuracy"] for row in cards], bars, fmt="o-",
                              capsize=2, label=model)
            axis.axhline(people.get(sample, 1), color="gray", linestyle="--", label="one person")
            axis.set(xscale="log", xlabel="rankings of four", title=f"{sample} pairs")
            axis.set_xticks(ticks := sorted({row["rankings"] for row in found}), [f"{count:,}" for count in ticks])
            axis.minorticks_off()
        axes[0].set_ylabel("accuracy on held-out film reviews")
        axes[0].legend()
    groups = ["random", "same sign", *GAPS]
    lines = [[row["model"], f"{row['rankings']:,}", row["half"].removeprefix("rankings_"),
              *(accuracy(row["card"][group]) if group in row["card"] else "-" for group in groups)] for row in found]
    lines.append(["one person", "", "", *(f"{people[group]:.3f}" if group in people else "-" for group in groups)])
    write_atomic(out / "reward_models.md", "\n\n".join([
        "# Reward models on people's held-out judgements", f"{hardware()}, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}. Share of pairs of {cfg.domain} reviews in order (95 % interval); random pairs "
        "also by the gap between the two mean ratings (-4 to 4). Learned from rankings of four sentences; one seed.",
        table(["model", "rankings", "half", *groups], lines), "![accuracy](reward_models.png)"]) + "\n")
    print(out / "reward_models.md")

if __name__ == "__main__":
    run(main, Config, words=("out", "models"))
