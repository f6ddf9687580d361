"""What each detail of PPO does: a table of what ablations.sh ran, with the spread over seeds, beside what papers say.

    python -m study.ablations out/tiny/ablations        of one run (ablations.sh has called study.collect)
    python -m study.ablations results/ablations         the committed seeds

One detail is changed at a time, and everything else stays as train_all.sh has it: a change that another one would make
up for (a lower learning rate for more epochs, say) shows as harm here. All runs of a seed share its SFT model, reward
model, prompts and judge. The papers' claims, and what each run changes, stand in templates/ablations.md.
"""
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from common import run
from study.collect import read
from study.markdown import cells, fill, made, spread, table, template

TITLES = ["win rate", "at equal length", "KL, nats", "length", "proxy", "labeler"]

@dataclass
class Config:
    folder: str = "out/tiny/ablations"  # results.json and logs.jsonl of study.collect; ablations.md goes there, too

def row(name, change, seeds):
    """One line of the table: this run in all seeds (policies of evaluate.py) that have it."""
    seeds = [policies for policies in seeds if name in policies]
    differences = [policies[name]["win_rate_judge"] - policies["ppo"]["win_rate_judge"] for policies in seeds]
    gain = "" if name == "ppo" else spread(differences)
    return [change, gain, *cells([policies[name] for policies in seeds], TITLES)]

def main(cfg):
    folder = Path(cfg.folder)
    runs = [seed["evaluate"] for seed in read(folder / "results.json", 7).values()]
    seeds, lines = [results["policies"] for results in runs], read(folder / "logs.jsonl")
    head = ["here", "difference to the default", *TITLES]

    def rows(match):
        """The table in place of lines "@run what it changes"."""
        changes = [line[1:].split(" ", 1) for line in match[0].splitlines()]
        there = [row(name, change, seeds) for name, change in changes if any(name in policies for policies in seeds)]
        return table(head, there) + "\n" if there else "{nothing}"  # an empty part: fill leaves the section out

    ends = [policies["ppo"]["win_rate_judge_interval"] for policies in seeds]
    seconds = [line["done"]["seconds"] for line in lines if "done" in line]
    shares = {K: [line["card"]["human comparisons"]["movie, random"]["reward model"]["accuracy"] for line in lines
                  if line["run"] == f"reward-K{K}" and "card" in line] for K in (2, 4, 9)}
    fill(re.sub(r"(?m)(^@.*\n)+", rows, template("ablations.md")), folder / "ablations.md", runs, nothing="",
         width=f"{mean(high - low for low, high in ends):.2f}", stages=len(seconds), hours=f"{sum(seconds) / 3600:.1f}",
         made=made(folder, runs[0]),
         default=table(head, [row("ppo", "the default: PPO of train_all.sh", seeds)]),
         as_people=", ".join(f"{spread(found)} (K = {K})" for K, found in shares.items() if found))

if __name__ == "__main__":
    run(main, Config, words=("folder",))
