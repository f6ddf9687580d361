"""The blind test: do you prefer one policy's responses to another's, not knowing which is whose?

    python -m labeling.blind ann                     at the terminal, on the prompts of a finished evaluation
    python -m labeling.blind page                    writes a page to open, or to send to others
    python -m labeling.blind answers-ann.jsonl ...   what they saved in it

How often the second policy of --between is preferred, ties counted half, with a 95 % bootstrap interval, and how often
the judge of that evaluation agrees, is printed, and written to result-NAME.json.
"""
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from common import check, check_positive, generator, open_folder, run, visible, write_json
from data import read_jsonl, write_jsonl
from evaluate import mean_interval
from label import shuffled
from labeling import page, terminal
from labeling.answers import levels_of
from labeling.merge import collect


@dataclass
class Config:
    labeler: str = ""  # your name; page: write a page; or the files that were saved in it (first words of the command)
    evaluate: str = "out/tiny/evaluate"  # folder of a finished evaluation: its samples.jsonl
    between: str = "sft,ppo"  # the two policies, as they are called there
    count: int = 50           # prompts
    bootstrap: int = 2000     # resamples behind the interval
    seed: int = 1             # choice of the prompts, and resamples


def read_pairs(cfg):
    """{id: {"prompt", "texts": [of one, of the other], "margin": the judge's}} of all prompts, in a random order."""
    rows = read_jsonl(Path(cfg.evaluate) / "samples.jsonl", {"prompt": str})
    names, policies = cfg.between.split(","), [name for name in rows[0] if name not in ("prompt", "judge")]
    check(len(names) == len({*names} & {*policies}) == 2, f"--between {cfg.between}: expected two of {policies}")
    pairs = {}
    for row in shuffled(rows, cfg.seed):
        texts = [row.get(name, "") for name in names]  # best-of-n may have fewer prompts
        if texts[0] != texts[1] and all(text.strip() for text in texts):
            id = hashlib.sha256(json.dumps([row["prompt"], texts]).encode()).hexdigest()[:12]
            pairs[id] = {"prompt": row["prompt"], "texts": texts,
                         "margin": row["judge"][names[1]] - row["judge"][names[0]]}
    check(pairs, f"--between {cfg.between}: nothing to compare, the texts are the same, or empty")
    return pairs


def result(pairs, answers, cfg):
    """What one labeler's answers come to: how often the second policy is preferred, and how often the judge agrees."""
    asked = [(pairs[answer["id"]], levels) for answer in answers if (levels := levels_of(answer))]
    wins, margins = [], torch.tensor([pair["margin"] for pair, _ in asked])
    for pair, levels in asked:
        first, second = (next(i for i, level in enumerate(levels) if text in level) for text in pair["texts"])
        wins.append(0.5 + 0.5 * ((second < first) - (second > first)))
    wins = torch.tensor(wins)
    rate, interval = mean_interval(wins, cfg.bootstrap, generator(cfg.seed))
    agrees = ((wins > 0.5) == (margins > 0))[(wins != 0.5) & (margins != 0)].float()
    return {"win_rate": rate, "interval": interval, "answers": len(wins), "ties": int((wins == 0.5).sum()),
            "skipped": len(answers) - len(wins), "judge_win_rate": round((0.5 + 0.5 * margins.sign()).mean().item(), 4),
            "judged": len(agrees), "judge_agrees": round(agrees.mean().item(), 4) if len(agrees) else None}


def main(cfg):
    check(cfg.labeler, "name yourself: python -m labeling.blind NAME (or page, or files that were saved in the page)")
    check_positive(cfg, "count", "bootstrap")
    pairs, names = read_pairs(cfg), cfg.between.split(",")
    folder = open_folder(Path(cfg.evaluate) / f"blind-{'-'.join(names)}")
    samples = [{"id": id, "prompt": pair["prompt"], "responses": sorted(pair["texts"])} for id, pair in pairs.items()]
    write_jsonl(folder / "samples.jsonl", samples)
    if cfg.labeler == "page":
        return page.main(page.Config(str(folder / "page.html"), str(folder / "samples.jsonl"), cfg.count), then=[
            "labeling.blind", "answers-NAME.jsonl", "--evaluate", cfg.evaluate, "--between", cfg.between])
    answers = (collect(cfg.labeler.split(","), folder / "samples.jsonl").values() if cfg.labeler.endswith(".jsonl")
               else terminal.rank(samples[:cfg.count], cfg.labeler, folder / cfg.labeler))
    for labeler in dict.fromkeys(answer["labeler"] for answer in answers if levels_of(answer)):
        row = result(pairs, [answer for answer in answers if answer["labeler"] == labeler], cfg)
        print("{} prefers {other} to {one}: {win_rate:.3f} ({interval[0]:.3f} to {interval[1]:.3f}), {answers} answers, "
              "{ties} of them ties, {skipped} skipped\nthe judge, on the same prompts: {judge_win_rate:.3f}; it agrees on "
              "{judge_agrees} of {judged} pairs that neither ties".format(
                  visible(labeler), one=names[0], other=names[1], **row))
        write_json(folder / f"result-{re.sub('[^A-Za-z0-9_.-]', '_', labeler)}.json", {"between": names, **row})


if __name__ == "__main__":
    run(main, Config, words=("labeler...",))
