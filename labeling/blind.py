"""The blind test: do you prefer one policy's responses to another's, not knowing which is whose?

    python evaluate.py --ask ann                     at the terminal, on the prompts of a finished evaluation
    python evaluate.py --ask page                    writes a page to open, or to send to others
    python evaluate.py --ask answers-ann.jsonl,...   what they saved in it

Result: how often the second policy of --between is preferred, ties counted half, with a 95 % bootstrap interval, and
how often the judge of that evaluation agrees. It is printed, and written to result-NAME.json.
"""
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from answers import collect, levels_of, shuffled
from checkpoint import write_json
from common import UserError, check, generator
from data import read_jsonl, write_jsonl
from estimators import mean_interval
from label import sample_id
from page import PageConfig, page
from person import NAME, rank_by_person
from runs import open_folder
from terminal import visible

@dataclass
class Config:
    ask: str = ""                   # your name; page: write a page; or files that were saved in it: file,file
    out: str = "out/tiny/evaluate"  # folder of a finished evaluation: its samples.jsonl
    between: str = "sft,ppo"        # the two policies, as they are called there
    count: int = 50                 # prompts
    bootstrap: int = 2000           # resamples behind the interval
    seed: int = 1                   # choice of the prompts, and resamples


def read_pairs(cfg):
    """{id: {"prompt", "texts": [of one, of the other], "margin": the judge's}} of all prompts, in a random order."""
    names, path = cfg.between.split(","), Path(cfg.out) / "samples.jsonl"
    rows = read_jsonl(path, {"prompt": str})
    policies = [name for name in rows[0] if name not in ("prompt", "judge")]
    check(len(names) == 2 and names[0] != names[1] and all(name in policies for name in names),
          f"--between {cfg.between}: expected two of {', '.join(policies)}")
    pairs = {}
    try:
        for row in shuffled(rows, cfg.seed):
            if names[0] in row and names[1] in row:  # best-of-n may have answered fewer prompts
                texts = [row[name] for name in names]
                pairs[sample_id(row["prompt"], texts)] = {
                    "prompt": row["prompt"], "texts": texts, "margin": row["judge"][names[1]] - row["judge"][names[0]]}
    except (KeyError, TypeError):
        raise UserError(f"{path}: not from this version's evaluate.py") from None
    return pairs


def result(pairs, answers, cfg):
    """What one labeler's answers come to: how often the second policy is preferred, and how often the judge agrees."""
    asked = [(pairs[answer["id"]], levels) for answer in answers if (levels := levels_of(answer))]
    wins, margins = [], torch.tensor([pair["margin"] for pair, _ in asked])
    for pair, levels in asked:
        first, second = (next(i for i, level in enumerate(levels) if text in level) for text in pair["texts"])
        wins.append(0.5 + 0.5 * ((second < first) - (second > first)))
    wins = torch.tensor(wins)
    both = (wins != 0.5) & (margins != 0)
    rate, interval = mean_interval(wins, cfg.bootstrap, generator(cfg.seed))
    agrees = ((wins > 0.5) == (margins > 0))[both].float()
    return {"win_rate": rate, "interval": interval, "answers": len(wins), "ties": int((wins == 0.5).sum()),
            "skipped": len(answers) - len(wins), "judge_win_rate": round((0.5 + 0.5 * margins.sign()).mean().item(), 4),
            "judged": len(agrees), "judge_agrees": round(agrees.mean().item(), 4) if len(agrees) else None}


def print_result(labeler, row, names):
    """Two lines for one labeler."""
    print(f"{visible(labeler)} prefers {names[1]} to {names[0]}: {row['win_rate']:.3f} ({row['interval'][0]:.3f} to "
          f"{row['interval'][1]:.3f}), {row['answers']} answers, {row['ties']} of them ties, {row['skipped']} skipped")
    agrees = f"; it agrees on {row['judge_agrees']:.3f} of the {row['judged']} pairs that neither ties"
    print(f"the judge, on the same prompts: {row['judge_win_rate']:.3f}" + (agrees if row["judged"] else ""))


def main(cfg):
    check(cfg.ask, "--ask is empty: your name, page, or files that were saved in a page")
    check(cfg.count > 0 and cfg.bootstrap > 1, "--count must be 1 or more, --bootstrap 2 or more")
    files = any(Path(path).is_file() for path in cfg.ask.split(","))
    check(files or re.fullmatch(NAME, cfg.ask) and not cfg.ask.endswith(".jsonl"),
          f"--ask {cfg.ask}: no such file, and no name (letters, digits, ., -, _)")
    pairs, names = read_pairs(cfg), cfg.between.split(",")
    samples = [{"id": id, "prompt": pair["prompt"], "responses": sorted(pair["texts"])} for id, pair in pairs.items()
               if pair["texts"][0] != pair["texts"][1] and all(text.strip() for text in pair["texts"])]
    check(samples, f"--between {cfg.between}: nothing to compare, the texts are the same")
    if len(samples) < len(pairs):
        print(f"{len(pairs) - len(samples)} prompts are left out: the texts are the same, or one is empty")
    folder = open_folder(Path(cfg.out) / f"ask-{'-'.join(names)}")
    write_jsonl(folder / "samples.jsonl", samples)
    if cfg.ask == "page":
        return page(PageConfig(out=str(folder / "page.html"), samples=str(folder / "samples.jsonl"), count=cfg.count),
                    f"python evaluate.py --ask answers-NAME.jsonl --out {cfg.out} --between {cfg.between}")
    answers = (collect(cfg.ask.split(","), folder / "samples.jsonl") if files else
               rank_by_person(samples[:cfg.count], cfg.ask, folder / cfg.ask))
    asked = {sample["id"]: sample["responses"] for sample in samples}
    answers = [answer for answer in answers if sorted(answer.get("shown", [])) == asked.get(answer["id"])]
    for labeler in dict.fromkeys(answer["labeler"] for answer in answers):
        own = [answer for answer in answers if answer["labeler"] == labeler]
        if any(map(levels_of, own)):
            row = result(pairs, own, cfg)
            print_result(labeler, row, names)
            write_json(folder / f"result-{re.sub('[^A-Za-z0-9_.-]', '_', labeler)}.json", {"between": names, **row})
