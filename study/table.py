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

folders = [Path(path).parent for path in sys.argv[1:]]
ranked = [json.loads((folder / "labelers/results.json").read_text()) for folder in folders]
print("""
## Who ranked

The same samples, ranked by the stand-in (the labeler of the tables above) and by VADER's rules; a reward model from
each, and the policy that PPO trained on it (`labelers.sh`, one thread, two runs side by side). Rankings: those learned
from, without the tenth held out. As people: random pairs of reviews in the order of the raters' mean. VADER itself: its
rules on those pairs, a tie counted half.""")
MEASURES = {
    "rankings": lambda name, run: str(run["labelers"][name]["rankings"]),
    "reward model: held-out rankings of its labeler": lambda name, run: share(run["labelers"][name]["held-out"]),
    "reward model: as people": lambda name, run: share(run["labelers"][name]["people"]["movie, random"]),
    "PPO: win rate": lambda name, run: cell(run["policies"][name], "win_rate_judge"),
    "PPO: win rate at equal length": lambda name, run: cell(run["policies"][name], "length_controlled"),
    "PPO: KL, nats": lambda name, run: f"{run['policies'][name]['kl']:.2f}"}
WHO = {"ppo": "the stand-in", "ppo-vader": "VADER"}
table(["who ranked", "measure"], [[WHO[name], title, *(made(name, run) for run in ranked)]
                                  for name in ranked[0]["labelers"] for title, made in MEASURES.items()])
cards = [json.loads((folder / "label-vader_agreement.json").read_text()) for folder in folders]
reports = [json.loads((folder / "agreement/report.json").read_text()) for folder in folders]
pair = [next(row for row in report["agreement"] if (row["one"], row["two"]) == ("labeler", "vader"))
        for report in reports]
table([""], [["VADER itself: as people", *(share(card["people"]["both orders"]) for card in cards)],
             ["VADER and the stand-in agree on their samples", *(
                 "{share:.3f} ({interval[0]:.3f} to {interval[1]:.3f})".format(**row["agree"]) for row in pair)],
             ["pairs that VADER ties", *(f"{report['labelers']['vader']['ties']:.3f}" for report in reports)]])

print("""
## A language model in people's place

Each pair of people's (random, of film reviews) asked about in both orders and averaged, or in one order, which alternates.
Unread: answers that were neither 1 nor 2. Flipped: of the pairs decided in both orders, those with another choice when the
two change places. See [rlaif](rlaif/README.md).

| model, rubric | pairs | as people, both orders | as people, one order | unread | decided | flipped | for the first shown |
|---|---|---|---|---|---|---|---|""")
for path in sorted(Path(__file__).parent.glob("rlaif/*_agreement.json")):
    card = json.loads(path.read_text())["people"]
    name = path.name.removesuffix("_agreement.json").replace("_", ", ")
    print(f"| {name} | {card['pairs']} | {share(card['both orders'])} | {share(card['one order'])} | {card['unread']} of "
          f"{2 * card['pairs']} | {card['read']} | {card['flipped']:.3f} | {card['first_shown_wins']:.3f} |")

print("""
## How many rankings

Reward models from the first so many of the stand-in's rankings: accuracy on held-out rankings / on people's random pairs
of reviews. The first four took 75 to 100 steps, the last one, of `train_all.sh`, 182. Per doubling: least squares on the
logarithm of the number.""")
table(["rankings"], [[str(row["rankings"]), *(
    "{held-out rankings:.3f} / {people:.3f}".format(**report["sizes"][name]) for report in reports)]
    for name, row in sorted(reports[0]["sizes"].items(), key=lambda item: item[1]["rankings"])] + [
    ["points per doubling", *(
        " / ".join(f"{100 * report['per_doubling'][measure][0]:+.1f}" for measure in ("held-out rankings", "people"))
        for report in reports)]])

print(f"\n## Time and memory of seed {first['config']['seed']}\n")
print("| stage | seconds | peak memory, MB |\n|---|---|---|")
for name, row in first["stages"].items():
    print(f"| {name} | {row['seconds']:.0f} | {row['peak_memory_mb']} |")
