"""Anthropic's dialogues: people chose the better of two responses of an assistant, for helpfulness or harmlessness.

    python -m prepare.hh                                 downloads 30 MB to data/hh-raw, writes data/hh
    python -m prepare.hh --train FILE --out data/my      from a file of such pairs, of which a fifth is held out

Source: Bai et al. 2022, arXiv:2204.05862; MIT licence. The content can be offensive: people were asked to provoke it.
A pair, {"chosen", "rejected"}, is two whole dialogues that differ in their last response only; what comes before it is
the prompt. The same conversation comes back with one more turn, so pairs that begin with the same message of the person
are one group, and a group is in one part only.

    pairs_reward.jsonl, _judge, _test           prompt, chosen, rejected
    demos_train.jsonl, demos_valid.jsonl        prompt, completion: the chosen responses of reward and of valid
    prompts_ppo.jsonl, prompts_eval.jsonl       the different prompts of the part ppo and of test
    corpus_test.jsonl, summary.json             the chosen dialogues of test as plain text; counts, written last
"""
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import check, open_folder, run, write_json
from data import REPLY, read_rows, write_jsonl
from prepare.download import download
from prepare.own import convert, key_of

SOURCE = "datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa/{}/{}.jsonl.gz"
SHA256 = {("helpful-base", "train"): "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
          ("harmless-base", "train"): "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
          ("helpful-base", "test"): "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
          ("harmless-base", "test"): "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03"}

@dataclass
class Config:
    out: str = "data/hh"       # folder for the prepared files
    train: str = ""            # files on disk instead of the downloads, with commas between them
    limit: int = 0             # at most so many pairs in each part; 0: all
    valid_share: float = 0.02  # share of the training groups that select a checkpoint of SFT
    seed: int = 1              # parts and order depend on it

def read_pairs(paths, counts, trained=()):
    """Different good pairs of the files of one part, as rows. counts[file] gets a number for "kept" and for each reason
    to leave a pair out. trained: groups of the training files, of which the test files keep none."""
    rows, seen = [], set()
    for path in paths:
        here, stem = counts.setdefault(str(path), Counter()), Path(path.name.removesuffix(".gz")).stem
        domain = next((subset for subset, _ in SHA256 if subset in f"{path.parent.name}/{stem}"), stem)
        for row in read_rows(path, dict):
            try:
                _, pair = convert({"chosen": row.get("chosen"), "rejected": row.get("rejected")}, Counter())
                if not pair["prompt"].endswith(REPLY):
                    raise ValueError("no Assistant turn")
                if tuple(pair.values()) in seen:
                    raise ValueError("repeated")
                seen.add(tuple(pair.values()))
                if key_of(pair) in trained:
                    raise ValueError("group also in train")
                rows.append({**pair, "domain": domain})
                here["kept"] += 1
            except ValueError as reason:
                here[str(reason)] += 1
    return rows

def split(train, test, valid_share, seed):
    """{part: rows}, every group in one part. test: rows of the held-out files; None holds out a fifth of the groups."""
    groups = sorted({key_of(row) for row in train})
    random.Random(f"{seed} split").shuffle(groups)
    held_out = math.ceil(0.2 * len(groups)) if test is None else 0
    first = held_out + math.ceil(valid_share * len(groups))
    part_of = {group: "test" if i < held_out else "valid" if i < first else ("reward", "judge", "ppo")[(i - first) % 3]
               for i, group in enumerate(groups)}
    parts = {"valid": [], "reward": [], "judge": [], "ppo": [], "test": test or []}
    for row in train:
        parts[part_of[key_of(row)]].append(row)
    for part, rows in parts.items():
        random.Random(f"{seed} {part}").shuffle(rows)
    return parts

def demos(rows):
    """The different chosen responses of pairs, as demonstrations."""
    best = {(row["prompt"], row["chosen"]): row["domain"] for row in rows}
    return [{"prompt": prompt, "completion": chosen, "domain": domain} for (prompt, chosen), domain in best.items()]

def prompts(rows):
    """The different prompts of pairs."""
    return [{"prompt": prompt} for prompt in dict.fromkeys(row["prompt"] for row in rows)]

def main(cfg):
    """Make all files in folder cfg.out; returns the content of summary.json. The same seed gives the same bytes."""
    paths, counts = {"train": [Path(name) for name in cfg.train.split(",")], "test": []}, {}
    if not cfg.train:
        paths = {part: [download(SOURCE.format(*key), f"data/hh-raw/{'-'.join(key)}.jsonl.gz", sha256)
                        for key, sha256 in SHA256.items() if key[1] == part] for part in ("train", "test")}
    train = read_pairs(paths["train"], counts)
    test = read_pairs(paths["test"], counts, {key_of(row) for row in train})
    parts = split(train, test if paths["test"] else None, cfg.valid_share, cfg.seed)
    for part, rows in parts.items():
        check(rows, f"no pairs for the part {part!r} (too few dialogues, or another --valid-share)")
        if 0 < cfg.limit < len(rows):
            print(f"{part}: {cfg.limit:,} of {len(rows):,} pairs")
            del rows[cfg.limit:]
    files = {"demos_train.jsonl": demos(parts["reward"]), "demos_valid.jsonl": demos(parts["valid"]),
             **{f"pairs_{part}.jsonl": parts[part] for part in ("reward", "judge", "test")},
             "prompts_ppo.jsonl": prompts(parts["ppo"]), "prompts_eval.jsonl": prompts(parts["test"]),
             "corpus_test.jsonl": [{"text": row["prompt"] + row["completion"]} for row in demos(parts["test"])]}
    out = open_folder(cfg.out)
    for name, rows in files.items():
        write_jsonl(out / name, rows)
    summary = {"seed": cfg.seed, "counts": counts, "rows": {name: len(rows) for name, rows in files.items()},
               "pairs": {part: Counter(row["domain"] for row in rows) for part, rows in parts.items()}}
    write_json(out / "summary.json", summary)
    print(f"{out}: {sum(map(len, files.values())):,} rows; summary.json counts what is left out, and why")
    return summary

if __name__ == "__main__":
    run(main, Config)
