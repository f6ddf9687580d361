"""The blind test: do you prefer one policy's responses to another's, not knowing which is whose?

    python -m labeling.blind ann                     on the prompts of a finished evaluation, at the terminal
    python -m labeling.blind --page                  or in a browser: writes blind-sft-ppo/page.html there
    python -m labeling.blind ann --answers FILE      counts what was saved in the page

Prints how often the second policy of --between is preferred, ties counted half, with a 95 % bootstrap interval, and how
often the judge of that evaluation agrees. The same command resumes, like labeling.terminal.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from common import check, generator, open_folder, run, write_atomic, write_json
from data import read_jsonl, read_rows
from evaluate import mean_interval
from label import shuffled
from labeling import terminal
from labeling.answers import check_answer, levels_of
from labeling.page import make_page

@dataclass
class Config:
    labeler: str = ""  # your name, the first word of the command line
    evaluate: str = "out/tiny/evaluate"  # folder of a finished evaluation: its samples.jsonl
    between: str = "sft,ppo"  # the two policies, as they are called there
    page: bool = False        # write a page to compare in, in place of asking here
    answers: str = ""         # what was saved in the page: answers-NAME.jsonl
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
    """What the answers come to: how often the second policy is preferred, and how often the judge agrees."""
    wins, margins = [], []
    for answer in answers:
        if levels := levels_of(answer):
            pair = pairs[answer["id"]]
            first, second = (next(i for i, level in enumerate(levels) if text in level) for text in pair["texts"])
            wins.append(0.5 + 0.5 * ((second < first) - (second > first)))
            margins.append(pair["margin"])
    check(wins, "no answers to count yet", 0)
    wins, margins = torch.tensor(wins), torch.tensor(margins)
    rate, interval = mean_interval(wins, cfg.bootstrap, generator(cfg.seed))
    agrees = ((wins > 0.5) == (margins > 0))[(wins != 0.5) & (margins != 0)].float()
    return {"win_rate": rate, "interval": interval, "answers": len(wins), "ties": int((wins == 0.5).sum()),
            "skipped": len(answers) - len(wins), "judge_win_rate": round((0.5 + 0.5 * margins.sign()).mean().item(), 4),
            "judged": len(agrees), "judge_agrees": round(agrees.mean().item(), 4) if len(agrees) else None}

def main(cfg):
    pairs, (one, other) = read_pairs(cfg), cfg.between.split(",")
    samples = [{"id": id, "prompt": pair["prompt"], "responses": sorted(pair["texts"])} for id, pair in pairs.items()]
    folder = Path(cfg.evaluate) / f"blind-{one}-{other}" / cfg.labeler
    if cfg.page:
        write_atomic(open_folder(folder) / "page.html", make_page(samples[:cfg.count], "Which response is better?"))
        print(f"{folder / 'page.html'}: open it, choose, save, and then:\n"
              "python -m labeling.blind NAME --answers answers-NAME.jsonl, with the other flags as here")
        return
    if cfg.answers:
        answers = read_rows(cfg.answers, check_answer)
        open_folder(folder)
    else:
        answers = terminal.rank(samples[:cfg.count], cfg.labeler, folder)
    row = result(pairs, [answer for answer in answers if answer["id"] in pairs], cfg)  # not of an earlier evaluation
    write_json(folder / "result.json", {"between": [one, other], **row})
    print("{labeler} prefers {other} to {one}: {win_rate:.3f} ({interval[0]:.3f} to {interval[1]:.3f}), {answers} "
          "answers, {ties} ties, {skipped} skipped\nthe judge, on the same prompts: {judge_win_rate:.3f}; it agrees on "
          "{judge_agrees} of {judged} pairs that neither ties".format(labeler=cfg.labeler, one=one, other=other, **row))

if __name__ == "__main__":
    run(main, Config, words=("labeler",))
