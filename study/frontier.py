"""Which method, at what KL? The figure and tables of what frontier.sh ran, from its results alone.

    python -m study.frontier out/tiny/frontier     of one run (frontier.sh has called study.collect)
    python -m study.frontier results/frontier      the committed seeds

Writes frontier.png and frontier.md. Methods are compared at equal KL: a policy's win rate less what PPO's frontier of
the same seed, joined by straight lines, has at that KL. Papers: Rafailov et al. 2023, figure 2 (frontier); Ahmadian et
al. 2024 (RLOO); Shao et al. 2024 (GRPO).
"""
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from common import run
from study.collect import read
from study.markdown import COLUMNS, by_seed, cells, fill, spread, table, template
from study.report import draw_frontier

@dataclass
class Config:
    folder: str = "out/tiny/frontier"  # results.json and logs.jsonl of study.collect; figure and tables go there, too

JOINED = r"(ppo|rloo|grpo)-kl.*|dpo.*"  # the policies that the figure joins by lines
ORDER = "sft best ppo no reinforce rloo grpo dpo"  # what names begin with, as tables have them
SCORES = ("win_rate_judge", "judge")  # what is compared at equal KL
COSTS = {"PPO": "ppo-kl6", "RLOO": "rloo-kl6", "GRPO": "grpo-kl6", "PPO, no values": "no-values", "DPO": "dpo-beta0.5"}
BASELINES = {"ppo-kl6": "value model, lambda {lam:g}", "rloo-kl6": "mean of the prompt's other responses, K = {group}",
             "no-values": "mean over the rollout, lambda {lam:g}", "reinforce": "nothing, lambda {lam:g}"}

def names(runs, pattern=".*"):
    """The policies that all runs have, of names that match, by method and then by KL."""
    shared = [name for name in runs[0]["policies"] if all(name in results["policies"] for results in runs)]
    return sorted((name for name in shared if re.fullmatch(pattern, name)), key=lambda name: (
        ORDER.find(name.split("-")[0]), mean(row["kl"] for row in of(runs, name))))

def of(runs, name):
    """A policy's row in each run."""
    return [results["policies"][name] for results in runs]

def joined(results):
    """The results without the policies that belong to no line of the figure, and without snapshots."""
    flags = {name: found for name, found in results["flags"].items() if re.fullmatch(JOINED, name)}
    return {**results, "flags": flags, "snapshots": {}, "policies": {name: results["policies"][name] for name in flags}}

# ---- equal KL ------------------------------------------------------------------------------------------------------

def at_kl(points, kl):
    """The height at this KL of the line through points (KL, height); None outside them: nothing is extrapolated."""
    for (x0, y0), (x1, y1) in itertools.pairwise(sorted(points)):
        if x0 < x1 and x0 <= kl <= x1:
            return y0 + (y1 - y0) * (kl - x0) / (x1 - x0)
    return None

def ppo_at(results, kl, key):
    """What PPO's frontier has at this KL: it begins at the SFT model and joins the policies of all KL targets."""
    start = 0.5 if key == "win_rate_judge" else results["policies"]["sft"][key]
    rows = [row for name, row in results["policies"].items() if name.startswith("ppo-kl")]
    return at_kl([(0.0, start), *((row["kl"], row[key]) for row in rows)], kl)

def gap(runs, rows, key, kls=None):
    """A cell: a policy's rows, one per run, less PPO's frontier of the same run, at the rows' KL or at others."""
    found = [(row[key], ppo_at(results, kl, key)) for results, row, kl in zip(
        runs, rows, kls or [row["kl"] for row in rows])]
    found = [own - ppo for own, ppo in found if ppo is not None]
    of_all = "" if len(found) in (0, len(runs)) else f", {len(found)} of {len(runs)} seeds"
    return spread(found, "+.3f") + of_all if found else "-"

def equal_rows(runs):
    """Every policy but PPO's against PPO at equal KL."""
    for name in names(runs, JOINED):
        if not name.startswith("ppo"):
            rows = of(runs, name)
            ends = [row["win_rate_judge_interval"] for row in rows]
            yield [name, *cells(rows, ["KL, nats"]), spread([row["win_rate_judge"] for row in rows]),
                   f"± {mean(high - low for low, high in ends) / 2:.3f}", gap(runs, rows, "win_rate_judge"),
                   *cells(rows, ["judge"]), gap(runs, rows, "judge")]

def seed_rows(results):
    """The same of one run, with the numbers that are compared."""
    for name in names([results], JOINED):
        if not name.startswith("ppo"):
            [row] = of([results], name)
            there = [ppo_at(results, row["kl"], key) for key in SCORES]
            win, judge = ["-" if x is None else f"{x:{form}}" for x, form in zip(there, (".3f", ".2f"))]
            yield [name, *cells([row], ["KL, nats", "win rate"]), win, *cells([row], ["judge"]), judge]

def at_one_rows(runs, at_one):
    """DPO against PPO at the KL that DPO's policies have at temperature 1; scores of responses at 0.7, and at 1."""
    for name in names(at_one, "dpo.*"):
        rows, ones = of(runs, name), of(at_one, name)
        kls = [row["kl"] for row in ones]
        yield [name, *cells(rows, ["KL, nats"]), *cells(ones, ["KL, nats"]),
               *(gap(runs, of_them, key, kls) for key in SCORES for of_them in (rows, ones))]

# ---- cost, group sizes, baselines ----------------------------------------------------------------------------------

def passes(config):
    """Per response, by a stage's configuration: responses sampled, forward passes that score them, forward passes of
    the updates, and as many backward. DPO's reference is scored once, by the policy before its first step."""
    if "beta" in config:
        return 0, 1, config["epochs"], config["epochs"]
    models = 1 + (config["value"] in ("separate", "sft"))  # policy and value; a shared head is no pass of its own
    rewards = 0 if config["reward"].startswith("rule:") else len(config["reward"].split(","))
    return 1, models + 1 + rewards, config["epochs"] * models, config["epochs"] * models

def cost_rows(lines):
    """Passes, seconds and memory of a method; lines: of logs.jsonl."""
    for title, name in COSTS.items():
        config, done = ([line[kind] for line in lines if line["run"] == name and kind in line]
                        for kind in ("config", "done"))
        if config and done:
            yield [title, name, *map(str, passes(config[0])), spread([one["seconds"] for one in done], ".0f"),
                   spread([one["peak_memory_mb"] for one in done], ",.0f")]

def group_rows(runs):
    """RLOO and GRPO with groups of 2, 4 and 8."""
    for kind in ("rloo", "grpo"):
        for name in (f"{kind}-group2", f"{kind}-kl6", f"{kind}-group8"):
            if name in names(runs):
                flags, rows = runs[0]["flags"][name], of(runs, name)
                yield [kind.upper(), str(flags["group"]), str(flags["episodes"] // flags["group"]),
                       *cells(rows, ["win rate", "judge", "KL, nats", "length"]),
                       *(gap(runs, rows, key) for key in SCORES)]

def value_rows(runs):
    """With a value model, with a group, and with neither."""
    for name, title in BASELINES.items():
        if name in names(runs):
            rows = of(runs, name)
            yield [name, title.format(**runs[0]["flags"][name]), *cells(rows, ["win rate", "judge", "KL, nats"]),
                   *(gap(runs, rows, key) for key in SCORES)]

def main(cfg):
    folder = Path(cfg.folder)
    seeds = list(read(folder / "results.json", 7).values())
    runs, at_one = ([seed[name] for seed in seeds if name in seed] for name in ("evaluate", "evaluate-at-1"))
    at_one = at_one if len(at_one) == len(runs) else []
    gaps = ["win rate less PPO's", "judge's score less PPO's"]
    costs = read(folder / "cost.jsonl") if (folder / "cost.jsonl").is_file() else []
    beyond = draw_frontier([joined(results) for results in runs], folder / "frontier.png")
    best = next((name for name in names(runs) if name.startswith("best-of")), "")
    fill(template("frontier.md"), folder / "frontier.md", runs, beyond=beyond or "nothing",
         best=f"{best}: {runs[0]['policies'][best]['prompts']} prompts. " if best else " ",
         policies=table(["policy", *COLUMNS], [[name, *cells(of(runs, name))] for name in names(runs)]),
         equal=table(["policy", "KL, nats", "win rate", "95 %", gaps[0], "judge", gaps[1]], equal_rows(runs)),
         seed_by_seed=by_seed(runs, ["policy", "KL, nats", "win rate", "PPO's", "judge", "PPO's"], seed_rows),
         at_one=at_one and table(["policy", "KL at 0.7", "KL at 1", *(f"{title}, at {t}" for title in gaps
                                                                      for t in (0.7, 1))], at_one_rows(runs, at_one)),
         sft=spread([row["judge"] for row in of(runs, "sft")], ".2f"),
         sft_at_one=at_one and spread([row["judge"] for row in of(at_one, "sft")], ".2f"),
         cost=table(["method", "run", "sampled", "forward, scoring", "forward, updates", "backward", "seconds",
                     "peak memory, MB"], cost_rows(read(folder / "logs.jsonl"))),
         iteration=costs and table(list(costs[0]), [[str(x) for x in line.values()] for line in costs]),
         groups=table(["method", "K", "prompts in a rollout", "win rate", "judge", "KL, nats", "length", *gaps],
                      group_rows(runs)),
         values=table(["policy", "the return is compared with", "win rate", "judge", "KL, nats", *gaps],
                      value_rows(runs)))

if __name__ == "__main__":
    run(main, Config, words=("folder",))
