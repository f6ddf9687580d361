"""How far labelers agree: with each other, with reward models, with themselves; and how many rankings are enough.

    python label.py report FILE FILE ... --rewards out/tiny/reward,out/tiny/labeler

FILE: answers.jsonl or rankings.jsonl of people, pages and machines, best after label.py merge. Prints tables, writes
them to report.md and the numbers to report.json. Two labelers agree on a pair of responses if both put the same one
first; pairs that either ties are left out. Kendall's tau-b (1945), which counts ties, is averaged over the samples in
which neither ties all. Bradley-Terry (1952): how noisy a labeler looks around a reward model, whose errors count as the
labeler's noise: P(i above j) = sigmoid((score_i - score_j) / temperature), by maximum likelihood. Intervals: 95 %,
bootstrap over samples.
"""
import itertools
import json
import math
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from answers import EXPECTED, levels_of, read_answers
from checkpoint import write_atomic, write_json
from common import UserError, check, generator, set_up
from data import load_tokenizer, read_rankings
from model import load_model, score_many
from people import fit_temperature
from reward import encode_rankings, split_by_prompt
from runs import open_folder
from terminal import visible


@dataclass
class ReportConfig:
    files: str = ""        # answers.jsonl or rankings.jsonl: file,file
    rewards: str = ""      # reward models to compare with (from more and more rankings: with each other): folder,folder
    out: str = "out/tiny/agreement"  # folder for report.md and report.json
    bootstrap: int = 2000  # resamples behind each interval
    seed: int = 1          # of the resamples
    device: str = "auto"   # auto, cpu, cuda, mps
    dtype: str = "auto"    # auto, float32, bfloat16 (autocast)


# ---- what one labeler says of the pairs of a sample ------------------------------------------------------------------


def signs(levels):
    """{(a, b): 1, 0 or -1} for the pairs of texts a < b of a sample: 1 if a is above b, 0 for a tie."""
    place = {text: number for number, level in enumerate(levels) for text in level}
    return {(a, b): (place[a] < place[b]) - (place[a] > place[b]) for a, b in itertools.combinations(sorted(place), 2)}


def tau_b(one, two):
    """Kendall's tau-b of two labelers' signs of the same pairs; None if one of them ties all."""
    pairs = one.keys() & two.keys()
    untied = [sum(abs(side[pair]) for pair in pairs) for side in (one, two)]
    return sum(one[pair] * two[pair] for pair in pairs) / math.sqrt(untied[0] * untied[1]) if all(untied) else None


def ratio(hits, counts, resamples, random):
    """{"share": sum(hits) / sum(counts) over the samples, "interval": bootstrap, "pairs"}; None if nothing counts."""
    there = [(hit, count) for hit, count in zip(hits, counts) if count]  # the others say nothing
    if not there:
        return None
    hits, counts = torch.tensor(there, dtype=torch.double).T
    rows = torch.randint(len(hits), (resamples, len(hits)), generator=random)
    drawn = (hits[rows].sum(1) / counts[rows].sum(1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    return {"share": round((hits.sum() / counts.sum()).item(), 4), "pairs": int(counts.sum()),
            "interval": [round(end, 4) for end in drawn.tolist()]}


def compare(one, two, resamples, random):
    """Two labelers, {id: signs}: on how many samples, how far they agree, and the mean tau-b."""
    both = sorted(one.keys() & two.keys())
    decided = [[one[id][pair] * two[id][pair] for pair in one[id].keys() & two[id].keys()] for id in both]
    taus = [tau for id in both if (tau := tau_b(one[id], two[id])) is not None]
    return {"samples": len(both), "tau": round(statistics.mean(taus), 4) if taus else None,
            "agree": ratio([sum(x > 0 for x in row) for row in decided], [sum(map(abs, row)) for row in decided],
                           resamples, random)}


def position_bias(answers, resamples, random):
    """How often the response shown earlier is put above the one shown later, of the pairs that are no tie; 0.5 if the
    order does not matter, as it was drawn by lot."""
    hits, counts = [], []
    for answer in answers:
        place = {text: number for number, level in enumerate(levels_of(answer)) for text in level}
        pairs = itertools.combinations([place[text] for text in answer["shown"] if place], 2)
        decided = [a < b for a, b in pairs if a != b]
        hits.append(sum(decided))
        counts.append(len(decided))
    return ratio(hits, counts, resamples, random)


def cycles(answers):
    """(cyclic, all) triples of responses to one prompt whose three pairs were judged one by one, without a tie: a above
    b, b above c, and c above a. A ranking can't hold one; pairs can."""
    above = defaultdict(dict)  # prompt: {(a, b): whether a is above b}
    for answer in answers:
        if "preferences" in answer:
            pairs = [(answer["shown"][i - 1], answer["shown"][j - 1], p - 0.5) for i, j, p in answer["preferences"]]
        else:
            levels = levels_of(answer) if len(answer["shown"]) == 2 else []
            pairs = [(levels[0][0], levels[1][0], 1)] if len(levels) == 2 else []
        for a, b, margin in pairs:
            if margin:
                above[answer["prompt"]] |= {(a, b): margin > 0, (b, a): margin < 0}
    cyclic = total = 0
    for pairs in above.values():
        for a, b, c in itertools.combinations(sorted({text for pair in pairs for text in pair}), 3):
            if {(a, b), (b, c), (c, a)} <= pairs.keys():
                total += 1
                cyclic += pairs[a, b] == pairs[b, c] == pairs[c, a]
    return cyclic, total


def describe(answers, resamples, random):
    """What one labeler did: counts, ties, seconds, position bias, cycles."""
    levels = list(map(levels_of, answers))
    pairs = [sign for row in levels for sign in signs(row).values()]
    seconds = [answer["seconds"] for answer in answers if "seconds" in answer]
    shown = [answer for answer in answers if "shown" in answer]
    by_eye = [answer for answer in shown if "preferences" not in answer]  # machines are asked in both orders
    return {"answers": len(answers), "skipped": levels.count([]), "all_equal": sum(len(row) == 1 for row in levels),
            "none_acceptable": sum(answer.get("acceptable") is False for answer in answers),
            "ties": round(sum(sign == 0 for sign in pairs) / max(1, len(pairs)), 4),
            "seconds": round(statistics.median(seconds), 1) if seconds else None,
            "earlier_shown_wins": position_bias(by_eye, resamples, random), "cycles": cycles(shown)}


# ---- reward models ---------------------------------------------------------------------------------------------------


def score_answers(folder, texts, device, autocast):
    """{(prompt, response): score} of a reward model."""
    model, enc = load_model(folder, device, kind="reward"), load_tokenizer(folder)
    rows = [{"prompt": prompt, "responses": [response]} for prompt, response in texts]
    ids = [text for row in encode_rankings(enc, rows, model.config.block_size) for text in row]
    with autocast():
        return dict(zip(texts, score_many(model, ids).tolist()))


def noise(answers, scores):
    """Bradley-Terry: the temperature, in units of the reward model's score, and the mean log-likelihood per untied
    pair, nats (a coin: -0.693); {} without such pairs. The temperature is None if they go against the scores."""
    margins = [scores[answer["prompt"], better] - scores[answer["prompt"], worse] for answer in answers
               for one, two in itertools.combinations(levels_of(answer), 2) for better in one for worse in two]
    if not margins:
        return {}
    margins = torch.tensor(margins, dtype=torch.double)
    temperature = fit_temperature(margins.numpy())
    likelihood = torch.nn.functional.logsigmoid(margins / temperature).mean().item()
    return {"temperature": temperature if margins.mean() > 0 else None, "log_likelihood": round(likelihood, 4)}


def learned(folder):
    """What a reward model has learned from, and how well: {"train": file, "labelers", "rankings": how many, without
    those held out, "held-out rankings" and, where its report card has them, "people": accuracies}. None if its folder
    does not say."""
    try:
        card = json.loads((Path(folder) / "report_card.json").read_text())
        stage = json.loads((Path(folder) / "config.json").read_text())["stage"]
        rows = [row for path in stage["train"].split(",") for row in read_rankings(path)]
        if not stage["test"]:
            seed = stage["seed"] if stage["split_seed"] == -1 else stage["split_seed"]
            rows, _ = split_by_prompt(rows, stage["test_share"], seed)
        rows = rows[:stage["limit"] or len(rows)]
        people = card.get("human comparisons", {}).get("movie, random", {}).get("reward model", {})
        labelers = list(dict.fromkeys(str(row.get("labeler", "people")) for row in rows))
        return {"train": stage["train"], "labelers": labelers, "rankings": len(rows),
                "held-out rankings": card["held-out rankings"]["accuracy"],
                **({"people": people["accuracy"]} if people else {})}
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def per_doubling(sizes, values):
    """Least squares of values on log2(sizes), three or more: (slope per doubling, its standard error). The error is
    that of the fit alone: neither the draw of the held-out set nor that of the rankings is in it."""
    x = [math.log2(size) for size in sizes]
    mean, slope = statistics.mean(x), statistics.linear_regression(x, values).slope
    offset = statistics.mean(values) - slope * mean
    spread = sum((a - mean)**2 for a in x)
    error = math.sqrt(sum((y - offset - slope * a)**2 for a, y in zip(x, values)) / (len(x) - 2) / spread)
    return slope, error


# ---- the report ------------------------------------------------------------------------------------------------------


def percent(found):
    """share (low to high), or - where there is nothing to count."""
    return f"{found['share']:.3f} ({found['interval'][0]:.3f} to {found['interval'][1]:.3f})" if found else "-"


def table(titles, rows):
    """Lines of a Markdown table; names in it may be anything."""
    cells = [[str(cell).replace("|", "&#124;").replace("<", "&lt;") for cell in row] for row in rows]
    return ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|",
            *("| " + " | ".join(row) + " |" for row in cells), ""]


def report_lines(facts):
    """report.md from the numbers."""
    lines = ["# Labelers", "", *table(
        ["labeler", "answers", "skipped", "all equal", "none acceptable", "tied pairs", "seconds (median)",
         "earlier shown wins", "cyclic triples"],
        [[name, row["answers"], row["skipped"], row["all_equal"], row["none_acceptable"], f"{row['ties']:.3f}",
          "-" if row["seconds"] is None else row["seconds"], percent(row["earlier_shown_wins"]),
          "{} of {}".format(*row["cycles"]) if row["cycles"][1] else "-"] for name, row in facts["labelers"].items()]),
        "Earlier shown wins: of two responses the one shown first is put above; 0.5 means that the order does not "
        "matter. Cyclic triples: a above b, b above c, c above a, where pairs were judged one by one.", ""]
    if facts["agreement"]:
        lines += ["## Agreement", "", *table(
            ["", "", "samples", "pairs", "agree", "tau-b"],
            [[row["one"], row["two"], row["samples"], row["agree"]["pairs"] if row["agree"] else 0,
              percent(row["agree"]), "-" if row["tau"] is None else f"{row['tau']:.3f}"]
             for row in facts["agreement"]]),
            "A reward model agrees better with rankings that it has learned from than with new ones.", ""]
    if facts["noise"]:
        lines += ["## Noise around a reward model (Bradley-Terry)", "", *table(
            ["labeler", "reward model", "temperature, in its scores", "log-likelihood per pair (a coin: -0.693)"],
            [[row["labeler"], row["reward"], row["temperature"] or "none fits", row["log_likelihood"]]
             for row in facts["noise"]])]
    if facts["sizes"]:
        measures = [name for name in ("held-out rankings", "people") if name in facts["per_doubling"]]
        lines += ["## How many rankings", "", *table(
            ["reward model", "rankings", *(f"accuracy, {name}" for name in measures)],
            [[name, row["rankings"], *(f"{row[measure]:.3f}" for measure in measures)] for name, row in sorted(
                facts["sizes"].items(), key=lambda item: item[1]["rankings"])])]
        for name, (slope, error) in facts["per_doubling"].items():
            lines += [f"Per doubling, {name}: {100 * slope:+.1f} points (standard error of the fit {100 * error:.1f}).",
                      ""]
        lines += ["Stiennon et al. 2020 found about +1.1 points per doubling on human comparisons of summaries.", ""]
    return lines


def report(cfg):
    check(cfg.files, "name files of answers: python label.py report FILE FILE ...")
    check(cfg.bootstrap > 1, f"--bootstrap is {cfg.bootstrap}: it must be 2 or more")
    files = {path: read_answers(path) for path in cfg.files.split(",")}
    for path, answers in files.items():
        check(answers, f"{path}: empty (expected on every line: {EXPECTED})")
    by_labeler, answers = defaultdict(dict), list(itertools.chain(*files.values()))
    full = {answer["labeler"] for answer in answers}
    short = Counter(Path(name).name for name in full)  # of a reward model: its folder's name
    for answer in answers:
        name = Path(answer["labeler"]).name
        name = name if name and short[name] == 1 else answer["labeler"]
        earlier = by_labeler[name].setdefault(answer["id"], answer)
        check(list(map(sorted, levels_of(earlier))) == list(map(sorted, levels_of(answer))), f"{visible(name)} has two "
              f"different answers to {answer['id']!r} (label.py merge says where)")
    device, autocast = set_up(cfg, quiet=True)
    random, rewards = generator(cfg.seed), [folder for folder in cfg.rewards.split(",") if folder]
    folders = {Path(folder).name: folder for folder in rewards}
    check(len(folders) == len(rewards), "--rewards: two folders of one name")
    everyone = {name: {id: signs(levels) for id, answer in rows.items() if (levels := levels_of(answer))}
                for name, rows in by_labeler.items()}
    texts = sorted({(answer["prompt"], text) for answer in answers for level in levels_of(answer) for text in level})
    scores = {name: score_answers(folder, texts, device, autocast) for name, folder in folders.items()}
    facts = {"labelers": {name: describe([*rows.values()], cfg.bootstrap, random) for name, rows in by_labeler.items()},
             "agreement": [{"one": one, "two": two, **compare(everyone[one], everyone[two], cfg.bootstrap, random)}
                           for one, two in itertools.combinations(everyone, 2)],
             "noise": [], "sizes": {}, "per_doubling": {}}
    for name, score in scores.items():
        for labeler, rows in by_labeler.items():
            own = {id: signs([[text] for text in sorted((text for level in levels_of(rows[id]) for text in level),
                                                        key=lambda text: -score[rows[id]["prompt"], text])])
                   for id in everyone[labeler]}
            facts["agreement"].append({"one": labeler, "two": f"{name} (reward model)",
                                       **compare(everyone[labeler], own, cfg.bootstrap, random)})
            if found := noise(rows.values(), score):
                facts["noise"].append({"labeler": labeler, "reward": name, **found})
    found = {name: row for name, folder in folders.items() if (row := learned(folder))}
    groups = [{name: row for name, row in found.items() if row["train"] == train}  # of the same rankings, more or fewer
              for train in sorted({row["train"] for row in found.values()})]
    largest = max(groups, key=lambda rows: len({row["rankings"] for row in rows.values()}), default={})
    if len({row["rankings"] for row in largest.values()}) > 2:
        facts["sizes"] = largest
        for measure in ("held-out rankings", "people"):
            if all(measure in row for row in largest.values()):
                points = [(row["rankings"], row[measure]) for row in largest.values()]
                facts["per_doubling"][measure] = per_doubling(*zip(*points))
    folder, text = open_folder(cfg.out), visible("\n".join(report_lines(facts)))
    write_json(folder / "report.json", facts)
    write_atomic(folder / "report.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(text)
    print(f"report: {folder / 'report.md'}")
