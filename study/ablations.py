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
from study.markdown import fill, spread, table, template

TITLES = ["here", "win rate", "difference to the default", "win rate at equal length", "KL, nats", "length", "proxy",
          "labeler"]


@dataclass
class Config:
    folder: str = "out/tiny/ablations"  # results.json and logs.jsonl of study.collect; ablations.md goes there, too


def cells(name, change, seeds):
    """One line of the table: this run in all seeds (policies of evaluate.py) that have it."""
    seeds = [policies for policies in seeds if name in policies]
    differences = [policies[name]["win_rate_judge"] - policies["ppo"]["win_rate_judge"] for policies in seeds]

    def over_seeds(key, form=".3f"):
        return spread([policies[name][key] for policies in seeds], form)

    return [change, over_seeds("win_rate_judge"), spread(differences, ".3f") if name != "ppo" else "",
            over_seeds("length_controlled"), over_seeds("kl", ".1f"), over_seeds("length", ".1f"),
            over_seeds("proxy", ".2f"), over_seeds("labeler", ".2f")]


def main(cfg):
    folder = Path(cfg.folder)
    runs = [seed["evaluate"] for seed in read(folder / "results.json", 7).values()]
    seeds, first, lines = [results["policies"] for results in runs], runs[0], read(folder / "logs.jsonl")

    def rows(match):
        """The table in place of lines "@run what it changes": "" if none of them was run."""
        changes = [line[1:].split(" ", 1) for line in match[0].splitlines()]
        there = [cells(name, change, seeds) for name, change in changes if any(name in row for row in seeds)]
        return "\n".join(table(TITLES, there)) if there else ""

    sections = [(section, re.sub(r"(?m)(^@.*\n)+", rows, section)) for section in template("ablations.md")]
    ends = [policies["ppo"]["win_rate_judge_interval"] for policies in seeds]
    seconds = [line["done"]["seconds"] for line in lines if "done" in line]
    shares = {K: [line["card"]["human comparisons"]["movie, random"]["reward model"]["accuracy"] for line in lines
                  if line["run"] == f"reward-K{K}" and "card" in line] for K in (2, 4, 9)}
    fill([filled for section, filled in sections if "\n@" not in section or "\n| " in filled], folder / "ablations.md",
         count=first["config"]["count"], seeds=", ".join(str(results["config"]["seed"]) for results in runs),
         width=f"{mean(high - low for low, high in ends):.2f}", stages=len(seconds), hours=f"{sum(seconds) / 3600:.1f}",
         machine=f"{first['hardware']}, {first['date']}, torch {first['torch']}",
         default=table(TITLES, [cells("ppo", "the default: PPO of train_all.sh", seeds)]),
         as_people=", ".join(f"{spread(found, '.3f')} (K = {K})" for K, found in shares.items() if found))


if __name__ == "__main__":
    run(main, Config, words=("folder",))
