"""Are reward models better than counting words? Their report cards get three baselines:   python -m study.card out/tiny

On people's held-out comparisons: a linear model on a bag of words, fitted to the same rankings as each reward model;
the longer text wins; one person against the others' mean. They go into "reward_models" of evaluate/results.json, and
from there into the report.
"""
import itertools
import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from common import run, write_json
from data import pair_accuracy, read_jsonl, read_rankings, split_by_prompt
from study.report import parts_of

@dataclass
class Config:
    folder: str = "out/tiny"  # a run of train_all.sh

def features(text, size=2**18):
    """Words and bigrams of words, lower-cased, as hashed ids, each once."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    grams = words + [" ".join(two) for two in zip(words, words[1:])]
    return sorted({zlib.crc32(gram.encode()) % size for gram in grams})

def bag_of_words(rows, l2=3e-6, steps=200):  # l2: the best of seven on the built-in pairs, which flatters it a little
    """A linear reward model on these features, fitted to all pairs of the rankings: text -> score."""
    texts = sorted({row["prompt"] + text for row in rows for text in row["responses"]})
    index = {text: i for i, text in enumerate(texts)}
    bags = [features(text) for text in texts]
    flat = torch.tensor([gram for bag in bags for gram in bag])
    offsets = torch.tensor([0] + list(itertools.accumulate(len(bag) for bag in bags))[:-1])
    scale = torch.tensor([len(bag) for bag in bags]).clamp(min=1).rsqrt()  # long texts are not stronger texts
    pairs = torch.tensor([[index[row["prompt"] + better], index[row["prompt"] + worse]]
                          for row in rows for better, worse in itertools.combinations(row["responses"], 2)])
    weight = torch.zeros(2**18, 1, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    for _ in range(steps):
        scores = F.embedding_bag(flat, weight, offsets, mode="sum").squeeze(1) * scale
        loss = -F.logsigmoid(scores[pairs[:, 0]] - scores[pairs[:, 1]]).mean() + l2 * weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = weight.detach().squeeze(1)
    return lambda text: weight[features(text)].sum().item() / math.sqrt(max(1, len(features(text))))

def add_baselines(card, stage):
    """Add them to each row of the report card of a reward model that was trained with these flags."""
    train = [row for path in stage["train"].split(",") for row in read_rankings(path)]
    if not stage["test"]:
        seed = stage["seed"] if stage["split_seed"] == -1 else stage["split_seed"]
        train, _ = split_by_prompt(train, stage["test_share"], seed)
    linear = bag_of_words(train[:stage["limit"] or len(train)])
    pairs = read_jsonl(stage["pairs"], {"prompt": str, "chosen": str, "rejected": str})
    summary = Path(stage["pairs"]).with_name("summary.json")  # of the built-in data
    people = json.loads(summary.read_text()).get("agreement", {}) if summary.is_file() else {}
    texts = sorted({(row["prompt"], row[side]) for row in pairs for side in ("chosen", "rejected")})
    number, groups = {text: i for i, text in enumerate(texts)}, {}
    for row in pairs:
        ends = groups.setdefault((row.get("domain", "all"), row.get("sample", "all")), [])
        ends.append([number[row["prompt"], row[side]] for side in ("chosen", "rejected")])
    for name, scores in (("bag of words", [linear(prompt + text) for prompt, text in texts]),
                         ("longer wins", [float(len(text)) for _, text in texts])):
        for (domain, sample), ends in groups.items():
            better, worse = torch.tensor(scores)[torch.tensor(ends)].T
            card[f"{domain}, {sample}"][name] = pair_accuracy(better - worse, torch.tensor(ends))
    for domain, sample in groups:
        card[f"{domain}, {sample}"]["chance"] = 0.5
        if sample in people.get(domain, {}):
            card[f"{domain}, {sample}"]["people"] = people[domain][sample][0]

def main(cfg):
    path = Path(cfg.folder) / "evaluate" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    for name, card in results["reward_models"].items():
        stage = Path(cfg.folder) / {"proxy": "reward"}.get(name, name)
        if card and not any("bag of words" in row for row in card.values()):  # else it is complete
            add_baselines(card, json.loads((stage / "config.json").read_text(encoding="utf-8"))["stage"])
    write_json(path, results)
    print(parts_of([results])["human"])

if __name__ == "__main__":
    run(main, Config, words=("folder",))
