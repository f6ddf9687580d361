"""Different people, different reward models? Two groups of raters, beside random halves of them.

    python -m study.groups out/tiny/groups/labels     what each group prefers: groups.sh trains on it
    python -m study.groups out/tiny/groups            groups.md, of what study.collect has kept there

Who rated a film review is known within blocks of 30 sentences. Of a block's raters the half whose ratings are lower is
strict, the other lenient; halves a and b are drawn. A rater who rates everything lower changes no order, but one who
values other things does. A block's sentences are two parts: ratings of one choose the groups that order the other.
"""
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import generator, open_folder, run, write_json
from data import write_jsonl
from evaluate import mean_interval
from prepare.reviews import blocks_of, fetch, parse, rankings, read_archive, split, without_duplicates
from study.collect import read
from study.markdown import fill, made, spread, table, template

GROUPS = ("strict", "lenient", "half-a", "half-b")
ROUNDS = 8  # rankings that a sentence is in

@dataclass
class Config:
    folder: str = "out/tiny/groups"  # folder of the data, or of results.json
    data: str = "data/reviews"       # folder with the archive of the ratings
    seed: int = 1                    # of the parts, of halves a and b, and of the rankings

def halves(block, draw):
    """Two parts of a block: its sentences, and [their means by each of GROUPS], (N,) each."""
    ratings, part = np.array([s.ratings for s in block]), draw.permutation(len(block)) % 2  # (sentences, raters)
    for k in (0, 1):
        orders = ratings[part != k].mean(0).argsort(), draw.permutation(ratings.shape[1])
        groups = [half for order in orders for half in (order[:len(order) // 2], order[(len(order) + 1) // 2:])]
        yield ([s for s, p in zip(block, part) if p == k], [ratings[part == k][:, group].mean(1) for group in groups])

def disagreement(a, b):
    """The share of a part's pairs of sentences that two groups order differently, ties left out: means a, b (N,)."""
    i, j = np.triu_indices(len(a), 1)
    same = np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
    return float((same < 0).sum() / max(1, (same != 0).sum()))

def labels(cfg, out):
    """rankings-GROUP.jsonl of the labeler's sentences; pairs.jsonl of held-out ones, the group being the domain;
    agreement.json: how often two groups disagree."""
    dropped, draw = Counter(), np.random.default_rng(cfg.seed)
    sentences = parse("movie", *read_archive(fetch(Path(cfg.data)))["movie"], dropped)
    parts = split(without_duplicates(sentences, dropped), 1)  # 1: the seed of data/reviews
    train, other, test = ([half for block in blocks_of(parts[part]["movie"]) for half in halves(block, draw)]
                          for part in ("labeler", "judge", "test"))
    comparisons = []
    for number, group in enumerate(GROUPS):
        rng, again = random.Random(cfg.seed), random.Random(cfg.seed)  # all groups rank the same sentences
        mean_of = {s.text: x for rows, means in train + test for s, x in zip(rows, means[number])}
        pools = [(rows, lambda s, of=mean_of: of[s.text], {}) for rows, _ in train for _ in range(ROUNDS)]
        write_jsonl(out / f"rankings-{group}.jsonl", [
            {"prompt": "", "responses": row["responses"]} for row in rankings(pools, rng, dropped)])
        texts = [[s.text for s in rows] for rows, _ in test]
        pairs = [sorted(pair, key=mean_of.get) for part in texts for pair in zip(part, again.sample(part, len(part)))]
        comparisons += [{"prompt": "", "chosen": b, "rejected": a, "domain": group, "sample": "random"}
                        for a, b in pairs if mean_of[a] < mean_of[b]]
    write_jsonl(out / "pairs.jsonl", comparisons)
    shares = {f"{GROUPS[i]}, {GROUPS[i + 1]}": torch.tensor([
        disagreement(means[i], means[i + 1]) for _, means in train + other + test]) for i in (0, 2)}
    write_json(out / "agreement.json", {  # resampled are blocks, whose two parts have the same raters
        name: dict(zip(("disagree", "interval"), mean_interval(x.view(-1, 2).mean(1), 2000, generator(1))))
        for name, x in shares.items()})

def main(cfg):
    folder = Path(cfg.folder)
    if not (folder / "results.json").is_file():
        return labels(cfg, open_folder(folder))
    seeds, lines = list(read(folder / "results.json", 7).values()), read(folder / "logs.jsonl")
    runs = [seed["evaluate"] for seed in seeds]

    def accuracies(group, other):
        cards = [line["card"]["human comparisons"] for line in lines if line["run"] == group and "card" in line]
        return spread([card[f"{other}, random"]["reward model"]["accuracy"] for card in cards])
    rates = [[name, *(spread([results["policies"][name][f"win_rate_{scorer}"] for results in runs])
                      for scorer in ("proxy", "labeler", "judge"))] for name in ("ppo-strict", "ppo-lenient")]
    fill(template("groups.md"), folder / "groups.md", runs, made=made(folder, runs[0]),
         differ=table(["groups", *(f"seed {results['config']['seed']}" for results in runs)],
                      [[name, *("{disagree:.3f} ({interval[0]:.3f} to {interval[1]:.3f})".format(**seed["labels"][name])
                                 for seed in seeds)] for name in seeds[0]["labels"]]),
         cards=table(["reward model of", *GROUPS], [[a, *(accuracies(a, b) for b in GROUPS)] for a in GROUPS]),
         rates=table(["policy", "strict's reward model", "lenient's", "the judge"], rates))

if __name__ == "__main__":
    run(main, Config, words=("folder",))
