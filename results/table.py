"""results/README.md from the committed results; its first table is the README's, too:

    python results/table.py results/tiny/seed*/results.json > results/README.md
"""
import json
import sys
from pathlib import Path


def cell(row, name):
    """value (low to high)"""
    if name not in row:
        return "-"
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} ({low:.3f} to {high:.3f})"


def share(card):
    """accuracy (low to high)"""
    return "{accuracy:.3f} ({interval[0]:.3f} to {interval[1]:.3f})".format(**card)


def table(title, rows):
    """Print a table whose first columns are title, and then one per seed."""
    print("\n| " + " | ".join([*title, *(f"seed {run['config']['seed']}" for run in runs)]) + " |")
    print("|---" * (len(title) + len(runs)) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


runs = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
first, machines = runs[0], ", ".join(dict.fromkeys(f"{run['hardware']}, {run['date']}" for run in runs))
print(f"""# Results of the preset tiny

{first['prompts']} held-out prompts, temperature {first['config']['temperature']}; win rates by the judge against the
SFT model, ties counted half, with 95 % bootstrap intervals. {machines}, torch {first['torch']}.
Logs, report cards and reports with samples are in [tiny](tiny), the study in [study/study.md](study/study.md).
`python report.py results/tiny/seed*` and `python study.py results/tiny/seed*/study --out results/study` draw every
figure anew.
""")
print("| policy | seed | win rate | at equal length | proxy | labeler | judge | KL, nats | length | ends | distinct-2 "
      "| perplexity |")
print("|---|---|---|---|---|---|---|---|---|---|---|---|")
for name in first["policies"]:
    for run in runs:
        row = run["policies"][name]
        cells = [name, str(run["config"]["seed"]), cell(row, "win_rate_judge"), cell(row, "length_controlled"),
                 *(f"{row[key]:.2f}" for key in ("proxy", "labeler", "judge", "kl")), f"{row['length']:.1f}",
                 f"{row['end_rate']:.3f}", f"{row['distinct_2']:.2f}",
                 f"{row['perplexity']:.0f}" if "perplexity" in row else "-"]
        print("| " + " | ".join(cells) + " |")

print("\n## Prompts of domains that no policy was trained on: win rates")
table(["prompts", "policy"], ([kind.removeprefix("prompts_"), name, *(
    cell(run["others"][kind][name], "win_rate_judge") for run in runs)]
    for kind in first["others"] for name in first["others"][kind]))

print("\n## Held-out rankings of SFT samples: share of pairs in their order")
table([""], ([title, *(share(run["held_out_rankings"][name]) for run in runs)]
             for name, title in {"proxy": "reward model", "dpo": "DPO's implicit reward"}.items()))

print("""
## Held-out human comparisons: share of pairs in the order of the raters' mean

The labeler and the judge learned from people's ratings of all four domains, the reward model from rankings of samples
that begin like film reviews. Bag of words: a linear model on words and word pairs, of the same rankings. One person:
against the mean of the other raters. Chance is 0.5.""")
SCORERS = {
    "labeler": lambda group, cards: share(cards["labeler"][group]["reward model"]),
    "judge": lambda group, cards: share(cards["judge"][group]["reward model"]),
    "reward model": lambda group, cards: share(cards["proxy"][group]["reward model"]),
    "bag of words, labeler's half, judge's half": lambda group, cards: ", ".join(
        f"{cards[name][group]['bag of words']['accuracy']:.3f}" for name in ("labeler", "judge")),
    "one person": lambda group, cards: f"{cards['labeler'][group]['people']:.3f}"}
table(["pairs", "of"], ([group.replace("_", " "), title, *(made(group, run["reward_models"]) for run in runs)]
                        for group in first["reward_models"]["labeler"] if "gap" not in group
                        for title, made in SCORERS.items()))

print(f"\n## Time and memory of seed {first['config']['seed']}\n")
print("| stage | seconds | peak memory, MB |\n|---|---|---|")
for name, row in first["stages"].items():
    print(f"| {name} | {row['seconds']:.0f} | {row['peak_memory_mb']} |")
