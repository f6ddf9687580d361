"""How far labelers agree: with each other, and with reward models.

    python -m labeling.agreement FILE FILE ... --rewards out/tiny/reward,out/tiny/labeler

FILE: answers.jsonl or rankings.jsonl of people, pages and machines, best after labeling.merge. Writes report.md, which
it prints, and report.json. Two labelers agree on a pair of responses if both put the same one first; pairs that either
ties are left out. Kendall's tau-b (1945), which counts ties, is averaged over the samples in which neither ties all.
"""
import itertools
import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from common import check, generator, open_folder, run, set_up, visible, write_atomic, write_json
from data import load_tokenizer, read_rows
from labeling.answers import check_answer, levels_of, same_order
from model import load_model
from reward import encode_rankings, score_many

@dataclass
class Config:
    files: tuple = ()      # answers.jsonl or rankings.jsonl of several labelers
    rewards: str = ""      # reward models to compare with: folder,folder
    out: str = "out/tiny/agreement"  # folder for report.md and report.json
    bootstrap: int = 2000  # resamples behind each interval
    seed: int = 1          # of the resamples
    device: str = "auto"   # auto, cpu, cuda, mps
    dtype: str = "auto"    # auto, float32, bfloat16 (autocast)

def signs(levels, texts=None):
    """{(a, b): 1, 0 or -1} for the pairs of a sample's texts, sorted or as given: 1 if a is above b, 0 for a tie."""
    place = {text: number for number, level in enumerate(levels) for text in level}
    return {(a, b): (place[a] < place[b]) - (place[a] > place[b])
            for a, b in itertools.combinations(texts or sorted(place), 2)}

def tau_b(one, two):
    """Kendall's tau-b of two labelers' signs of the same pairs; None if one of them ties all."""
    pairs = one.keys() & two.keys()
    untied = [sum(abs(side[pair]) for pair in pairs) for side in (one, two)]
    return sum(one[pair] * two[pair] for pair in pairs) / math.sqrt(untied[0] * untied[1]) if all(untied) else None

def share(rows, resamples, random):
    """The share of 1 among the 1s and -1s in rows of signs, with a 95 % bootstrap interval over the rows; or None."""
    counted = [(row.count(1), row.count(1) + row.count(-1)) for row in rows if any(row)]
    if not counted:
        return None
    hits, pairs = torch.tensor(counted, dtype=torch.double).T
    drawn = torch.randint(len(hits), (resamples, len(hits)), generator=random)
    ends = (hits[drawn].sum(1) / pairs[drawn].sum(1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    return {"share": round((hits.sum() / pairs.sum()).item(), 4), "pairs": int(pairs.sum()),
            "interval": [round(end, 4) for end in ends.tolist()]}

def compare(one, two, resamples, random):
    """Two labelers, {id: signs}: on how many samples, how far they agree, and the mean tau-b."""
    both = sorted(one.keys() & two.keys())
    taus = [tau for id in both if (tau := tau_b(one[id], two[id])) is not None]
    products = [[one[id][pair] * two[id][pair] for pair in one[id].keys() & two[id].keys()] for id in both]
    return {"samples": len(both), "agree": share(products, resamples, random),
            "tau": round(statistics.mean(taus), 4) if taus else None}

def describe(answers, resamples, random):
    """What one labeler did; "earlier_shown_wins" is 0.5 if the order, drawn at random, does not matter."""
    levels = list(map(levels_of, answers))
    pairs = [sign for row in levels for sign in signs(row).values()]
    seconds = [answer["seconds"] for answer in answers if "seconds" in answer]
    by_eye = [list(signs(row, answer["shown"]).values()) for row, answer in zip(levels, answers)
              if row and "shown" in answer and "preferences" not in answer]  # machines are asked in both orders
    return {"answers": len(answers), "skipped": levels.count([]), "all_equal": sum(len(row) == 1 for row in levels),
            "none_acceptable": sum(answer.get("acceptable") is False for answer in answers),
            "ties": round(pairs.count(0) / max(1, len(pairs)), 4),
            "seconds": round(statistics.median(seconds), 1) if seconds else None,
            "earlier_shown_wins": share(by_eye, resamples, random)}

def score_samples(folder, samples, device, autocast):
    """{(prompt, response): score} of a reward model; samples: {"prompt", "responses"}."""
    model, enc = load_model(folder, device, kind="reward"), load_tokenizer(folder)
    encoded = encode_rankings(enc, samples, model.config.block_size, Counter())
    with autocast():
        scores = score_many(model, [ids for texts in encoded for ids in texts]).tolist()
    return dict(zip([(row["prompt"], text) for row in samples for text in row["responses"]], scores))

def table(title, rows, note):
    """A section of report.md: a table of dicts with the same keys, whose texts may be anything."""
    def cell(value):
        if isinstance(value, dict):
            return "{share:.3f} ({interval[0]:.3f} to {interval[1]:.3f}) of {pairs}".format(**value)
        return "-" if value is None else str(value).replace("|", "&#124;").replace("<", "&lt;")

    lines = [[name.replace("_", " ") for name in rows[0]], ["---"] * len(rows[0]), *map(dict.values, rows)]
    return "\n".join([f"## {title}\n", *(f"| {' | '.join(map(cell, line))} |" for line in lines), "", note, ""])

def report(facts):
    """report.md from the numbers."""
    text = table("Labelers", [{"labeler": name, **row} for name, row in facts["labelers"].items()],
                 "Ties: share of the pairs. Seconds: median. Earlier shown wins: 0.5 if the order does not matter.")
    if facts["agreement"]:
        text += "\n" + table("Agreement", facts["agreement"], "A reward model agrees better with rankings that it has "
                                                              "learned from than with new ones.")
    return text

def main(cfg):
    check(cfg.files, "name files of answers: python -m labeling.agreement FILE FILE ...")
    labelers, samples = defaultdict(dict), {}  # {name: {id: answer}}, {id: its prompt and responses}
    for answer in (answer for path in cfg.files for answer in read_rows(path, check_answer)):
        name = answer["labeler"]
        check(same_order(labelers[name].setdefault(answer["id"], answer), answer),
              f"{name} has two different answers to {answer['id']!r} (labeling.merge says where)")
        if levels := levels_of(answer):
            samples[answer["id"]] = {"prompt": answer["prompt"], "responses": sorted(sum(levels, []))}
    (device, autocast), random = set_up(cfg), generator(cfg.seed)
    everyone = {name: {id: signs(levels_of(answer)) for id, answer in answers.items() if levels_of(answer)}
                for name, answers in labelers.items()}
    for folder in filter(None, cfg.rewards.split(",")):
        scores = score_samples(folder, samples.values(), device, autocast)
        orders = {id: sorted(row["responses"], key=lambda text: -scores[row["prompt"], text])
                  for id, row in samples.items()}
        everyone[f"{folder} (reward model)"] = {id: signs([[text] for text in order]) for id, order in orders.items()}
    facts = {"labelers": {name: describe([*answers.values()], cfg.bootstrap, random)
                          for name, answers in labelers.items()},
             "agreement": [{"one": one, "two": two, **compare(everyone[one], everyone[two], cfg.bootstrap, random)}
                           for one, two in itertools.combinations(everyone, 2) if one in labelers]}
    folder, text = open_folder(cfg.out), visible(report(facts))
    write_json(folder / "report.json", facts)
    write_atomic(folder / "report.md", text)
    print(f"{text}\nreport: {folder / 'report.md'}")

if __name__ == "__main__":
    run(main, Config, words=("files",))
