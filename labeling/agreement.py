"""How far labelers agree: with each other, with reward models, with themselves; and how many rankings are enough.

    python -m labeling.agreement FILE FILE ... --rewards out/tiny/reward,out/tiny/labeler

FILE: answers.jsonl or rankings.jsonl of people, pages and machines, best after labeling.merge. Writes report.md, which
it prints, and report.json. Two labelers agree on a pair of responses if both put the same one first; pairs that either
ties are left out. Kendall's tau-b (1945), which counts ties, is averaged over the samples in which neither ties all.
Bradley-Terry (1952): how noisy a labeler looks around a reward model, whose errors count as the labeler's noise.
"""
import itertools
import json
import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from common import check, generator, open_folder, run, set_up, visible, write_atomic, write_json
from data import encode_rankings, load_tokenizer, read_rankings, read_rows, split_by_prompt
from labeling.answers import check_answer, levels_of, same_order
from model import load_model, score_many


@dataclass
class Config:
    files: str = ""        # answers.jsonl or rankings.jsonl: file,file; or the first words of the command line
    rewards: str = ""      # reward models to compare with (from more and more rankings: with each other): folder,folder
    out: str = "out/tiny/agreement"  # folder for report.md and report.json
    bootstrap: int = 2000  # resamples behind each interval
    seed: int = 1          # of the resamples
    device: str = "auto"   # auto, cpu, cuda, mps
    dtype: str = "auto"    # auto, float32, bfloat16 (autocast)


# ---- what one labeler says of the pairs of a sample, and what two say ------------------------------------------------


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
    """{"share" of 1 among the 1s and -1s in rows of signs, "interval": 95 %, bootstrap over the rows, "pairs"}; None if
    there are neither."""
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


def cycles(answers):
    """(cyclic, all) triples of responses to one prompt whose three pairs were judged one by one, without a tie: a above
    b, b above c, and c above a. A ranking can't hold one; pairs can."""
    above = defaultdict(dict)  # prompt: {(a, b): whether a is above b}
    for answer in answers:
        shown, pairs = answer["shown"], answer.get("preferences", [])
        if len(shown) == 2 and not pairs:
            pairs = [(1, 2, {"1 2": 1, "2 1": 0}.get(answer["order"], 0.5))]
        for a, b, p in ((shown[i - 1], shown[j - 1], p) for i, j, p in pairs if p != 0.5):
            above[answer["prompt"]] |= {(a, b): p > 0.5, (b, a): p < 0.5}
    triples = [(pairs[a, b], pairs[b, c], pairs[c, a]) for pairs in above.values()
               for a, b, c in itertools.combinations(sorted({text for pair in pairs for text in pair}), 3)
               if {(a, b), (b, c), (c, a)} <= pairs.keys()]
    return sum(one == two == three for one, two, three in triples), len(triples)


def describe(answers, resamples, random):
    """What one labeler did: counts, ties, seconds, how often the response shown earlier wins (0.5 if the order, which
    was drawn at random, does not matter), cycles."""
    levels = list(map(levels_of, answers))
    pairs = [sign for row in levels for sign in signs(row).values()]
    seconds = [answer["seconds"] for answer in answers if "seconds" in answer]
    by_eye = [list(signs(row, answer["shown"]).values()) for row, answer in zip(levels, answers)
              if row and "shown" in answer and "preferences" not in answer]  # machines are asked in both orders
    return {"answers": len(answers), "skipped": levels.count([]), "all_equal": sum(len(row) == 1 for row in levels),
            "none_acceptable": sum(answer.get("acceptable") is False for answer in answers),
            "ties": round(pairs.count(0) / max(1, len(pairs)), 4),
            "seconds": round(statistics.median(seconds), 1) if seconds else None,
            "earlier_shown_wins": share(by_eye, resamples, random),
            "cycles": cycles(answer for answer in answers if "shown" in answer)}


# ---- reward models ---------------------------------------------------------------------------------------------------


def score_samples(folder, samples, device, autocast):
    """{(prompt, response): score} of a reward model; samples: {"prompt", "responses"}."""
    model, enc = load_model(folder, device, kind="reward"), load_tokenizer(folder)
    encoded = encode_rankings(enc, samples, model.config.block_size, Counter())
    with autocast():
        scores = score_many(model, [ids for texts in encoded for ids in texts]).tolist()
    return dict(zip([(row["prompt"], text) for row in samples for text in row["responses"]], scores))


def fit_temperature(margins):
    """Maximum-likelihood t of P(better above worse) = sigmoid(margin / t), margins (N,); 100 at most. The likelihood's
    logarithm is concave in 1 / t: bisect for where its slope, the sum of m * sigmoid(-m / t), is 0."""
    low, high = 0.01, 100.0  # of 1 / t
    for _ in range(30):
        middle = math.sqrt(low * high)
        slope = (margins * torch.sigmoid(-middle * margins)).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return round(1 / low, 4)


def noise(answers, scores):
    """The temperature of a labeler around a reward model, in units of its score (None if the answers go against the
    scores), and the mean log-likelihood per untied pair in nats (a coin: -0.693); {} without such pairs."""
    margins = torch.tensor([scores[answer["prompt"], better] - scores[answer["prompt"], worse] for answer in answers
                            for one, two in itertools.combinations(levels_of(answer), 2)
                            for better in one for worse in two], dtype=torch.double)
    if not len(margins):
        return {}
    temperature = fit_temperature(margins)
    likelihood = torch.nn.functional.logsigmoid(margins / temperature).mean().item()
    return {"temperature": temperature if margins.mean() > 0 else None, "log_likelihood": round(likelihood, 4)}


def learned(folder):
    """{"train": file, "rankings": how many a reward model was trained on, and its accuracies: "held-out rankings",
    "people" where its report card has them}."""
    stage = json.loads((Path(folder) / "config.json").read_text())["stage"]
    card = json.loads((Path(folder) / "report_card.json").read_text())
    rows = [row for path in stage["train"].split(",") for row in read_rankings(path)]
    if not stage["test"]:
        seed = stage["seed"] if stage["split_seed"] == -1 else stage["split_seed"]
        rows, _ = split_by_prompt(rows, stage["test_share"], seed)
    found = {"train": stage["train"], "rankings": min(len(rows), stage["limit"] or len(rows)),
             "held-out rankings": card["held-out rankings"]["accuracy"]}
    people = card.get("human comparisons", {}).get("movie, random")
    return found | ({"people": people["reward model"]["accuracy"]} if people else {})


def per_doubling(sizes, values):
    """Least squares of values on log2(sizes), three or more: (slope per doubling, its standard error). The error is
    that of the fit alone: neither the draw of the held-out set nor that of the rankings is in it."""
    x = [math.log2(size) for size in sizes]
    slope, offset = statistics.linear_regression(x, values)
    residuals = [y - offset - slope * a for a, y in zip(x, values)]
    return slope, math.sqrt(sum(r**2 for r in residuals) / (len(x) - 2) / sum((a - statistics.mean(x))**2 for a in x))


def how_many(folders):
    """Of three or more reward models {name: folder}, those that learned from more and fewer of the same rankings
    ("sizes"), and what a doubling brings ("per_doubling")."""
    found = {name: learned(folder) for name, folder in folders.items() if len(folders) > 2}
    train = statistics.mode(row["train"] for row in found.values()) if found else ""
    sizes = {name: row for name, row in found.items() if row["train"] == train}
    points = {measure: [(row["rankings"], row[measure]) for row in sizes.values() if measure in row]
              for measure in ("held-out rankings", "people")}
    return {"sizes": sizes, "per_doubling": {
        measure: per_doubling(*zip(*rows)) for measure, rows in points.items() if len(dict(rows)) > 2}}


# ---- the report ------------------------------------------------------------------------------------------------------


def table(title, rows, *notes):
    """A section of report.md: a table of dicts with the same keys, whose texts may be anything."""
    def cell(value):
        if isinstance(value, dict):
            return "{share:.3f} ({interval[0]:.3f} to {interval[1]:.3f}) of {pairs}".format(**value)
        value = "-" if value is None else "{} of {}".format(*value) if isinstance(value, tuple) else str(value)
        return value.replace("|", "&#124;").replace("<", "&lt;")

    lines = [[name.replace("_", " ") for name in row] for row in rows[:1]] + [["---"] * len(row) for row in rows[:1]]
    lines = [f"| {' | '.join(map(cell, line))} |" for line in [*lines, *map(dict.values, rows)]]
    return "\n".join([f"## {title}\n", *lines, "", *notes, ""])


def report(facts):
    """report.md from the numbers."""
    sizes = sorted(facts["sizes"].items(), key=lambda item: item[1]["rankings"])
    return "\n".join([
        table("Labelers", [{"labeler": name, **row} for name, row in facts["labelers"].items()],
              "Ties: share of the pairs. Seconds: median. Earlier shown wins: 0.5 if the order does not matter.",
              "Cycles: a above b, b above c, c above a, of the triples whose pairs were judged one by one."),
        table("Agreement", facts["agreement"],
              "A reward model agrees better with rankings that it has learned from than with new ones."),
        table("Noise around a reward model (Bradley-Terry)", facts["noise"],
              "Temperature: in the reward model's scores. Log-likelihood: per pair (a coin: -0.693)."),
        table("How many rankings", [{"reward model": name, **row} for name, row in sizes],
              *(f"Per doubling, {name}: {100 * slope:+.1f} points (standard error of the fit {100 * error:.1f})."
                for name, (slope, error) in facts["per_doubling"].items()))])


def main(cfg):
    check(cfg.files, "name files of answers: python -m labeling.agreement FILE FILE ...")
    by_labeler, folders = defaultdict(dict), {Path(name).name: name for name in cfg.rewards.split(",") if name}
    for answer in (answer for path in cfg.files.split(",") for answer in read_rows(path, check_answer)):
        name = Path(answer["labeler"]).name  # of a reward model: its folder's name
        check(same_order(by_labeler[name].setdefault(answer["id"], answer), answer),
              f"{name} has two different answers to {answer['id']!r} (labeling.merge says where)")
    (device, autocast), random = set_up(cfg), generator(cfg.seed)
    everyone = {name: {id: signs(levels) for id, answer in rows.items() if (levels := levels_of(answer))}
                for name, rows in by_labeler.items()}
    samples = {id: {"prompt": answer["prompt"], "responses": sorted(sum(levels_of(answer), []))}
               for rows in by_labeler.values() for id, answer in rows.items() if levels_of(answer)}
    facts = {"labelers": {name: describe([*rows.values()], cfg.bootstrap, random) for name, rows in by_labeler.items()},
             "noise": [], **how_many(folders)}
    for name, folder in folders.items():
        score = score_samples(folder, samples.values(), device, autocast)
        everyone[f"{name} (reward model)"] = {
            id: signs([[text] for text in sorted(row["responses"], key=lambda text: -score[row["prompt"], text])])
            for id, row in samples.items()}
        facts["noise"] += [{"labeler": labeler, "reward": name, **found} for labeler, rows in by_labeler.items()
                           if (found := noise(rows.values(), score))]
    facts["agreement"] = [{"one": one, "two": two, **compare(everyone[one], everyone[two], cfg.bootstrap, random)}
                          for one, two in itertools.combinations(everyone, 2) if one in by_labeler]
    folder, text = open_folder(cfg.out), visible(report(facts))
    write_json(folder / "report.json", facts)
    write_atomic(folder / "report.md", text)
    print(f"{text}\nreport: {folder / 'report.md'}")


if __name__ == "__main__":
    run(main, Config, words=("files...",))
