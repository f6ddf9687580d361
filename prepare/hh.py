"""Anthropic's dialogues: people chose the better of two responses of an assistant, for helpfulness or harmlessness.

    python -m prepare.hh                                 downloads 30 MB, writes data/hh
    python -m prepare.hh --train FILE --out data/my      from a file of such pairs, of which a tenth is held out

Source: Bai et al. 2022, arXiv:2204.05862; MIT licence. The content can be offensive: people were asked to provoke it. A
pair, {"chosen", "rejected"}, is two whole dialogues that differ in their last response only: the prompt is all up to the
last "Assistant:". Every pair is kept, or counted under the reason why not. The same conversation comes back with one
more turn, so pairs that begin with the same message of the person are one group, and a group is in one part only.

    demos_train.jsonl, demos_valid.jsonl        prompt, completion: the chosen responses of reward and of valid
    pairs_reward.jsonl, _judge, _test           prompt, chosen, rejected
    prompts_ppo.jsonl, prompts_eval.jsonl       the different prompts of reward and of test
    corpus_test.jsonl, summary.json             the chosen dialogues of test as plain text; counts, written last

Left out on purpose: helpful-rejection-sampled and helpful-online, whose responses come from models tuned on such pairs.
"""
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import check, open_folder, run, write_json
from data import REPLY, TURN, check_text, read_rows, write_jsonl
from prepare.download import download

SOURCE = "datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa/{}/{}.jsonl.gz"
SHA256 = {("helpful-base", "train"): "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
          ("harmless-base", "train"): "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
          ("helpful-base", "test"): "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
          ("harmless-base", "test"): "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03"}


@dataclass
class Config:
    out: str = "data/hh"       # folder for the prepared files; the downloads go into its subfolder raw
    train: str = ""            # files on disk instead of the downloads, .jsonl or .jsonl.gz, commas between them
    test: str = ""             # the same for the held-out part; with --train alone it is a tenth of the groups there
    valid_share: float = 0.02  # share of the training groups that select a checkpoint of SFT
    limit: int = 0             # only the first so many pairs of each file (0: all)
    seed: int = 1              # parts and order depend on it


def split_transcript(text):
    """(prompt, response) of a dialogue as one text, split after the last REPLY; ValueError if another turn is last."""
    prompt, reply, response = text.rpartition(REPLY)
    if not reply or TURN in response:
        raise ValueError("ends with Human" if reply else "no Assistant turn")
    return prompt + reply, response


def first_message(prompt):
    """The person's first message in a prompt, in lower case and single spaces: what the dialogues of a group share."""
    opening = prompt.split(TURN)[:2][-1].split(REPLY)[0]  # what stands before the first TURN is nobody's message
    return " ".join(opening.lower().split())


def sort_out(row):
    """(prompt, chosen response, rejected response) of a row; ValueError with the reason to leave it out."""
    texts = row.get("chosen"), row.get("rejected")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("no two texts")
    (prompt, chosen), (other, rejected) = map(split_transcript, texts)
    if prompt != other:
        raise ValueError("prompts differ")  # a response that contains turns of its own moves the last REPLY
    if not chosen.strip() or not rejected.strip():
        raise ValueError("empty response")
    if chosen.strip() == rejected.strip():
        raise ValueError("identical")
    check_text(prompt + chosen + rejected, "text")
    return prompt, chosen, rejected


def read_pairs(paths, limit, counts, trained=()):
    """Different good pairs of the files of one part, as rows. counts[file] gets a number for "kept" and for each reason
    to leave a pair out. trained: groups of the training files, of which the test files keep none."""
    rows, seen = [], set()
    for path in paths:
        here, stem = counts.setdefault(str(path), Counter()), Path(path.name.removesuffix(".gz")).stem
        domain = next((subset for subset, _ in SHA256 if subset in f"{path.parent.name}/{stem}"), stem)
        for row in read_rows(path, dict)[:limit or None]:
            try:
                pair = prompt, chosen, rejected = sort_out(row)
                if pair in seen:
                    raise ValueError("repeated")
                seen.add(pair)
                if first_message(prompt) in trained:
                    raise ValueError("group also in train")
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "domain": domain})
                here["kept"] += 1
            except ValueError as reason:
                here[str(reason)] += 1
    return rows


def split(train, test, valid_share, seed):
    """{part: rows}, every group in one part. test: rows of the held-out files; None holds out a tenth of the groups."""
    groups = sorted({first_message(row["prompt"]) for row in train})
    random.Random(f"{seed} split").shuffle(groups)
    held_out = math.ceil(0.1 * len(groups)) if test is None else 0
    first = held_out + math.ceil(valid_share * len(groups))
    part_of = {group: "test" if i < held_out else "valid" if i < first else ("reward", "judge")[(i - first) % 2]
               for i, group in enumerate(groups)}
    parts = {"valid": [], "reward": [], "judge": [], "test": test or []}
    for row in train:
        parts[part_of[first_message(row["prompt"])]].append(row)
    for part, rows in parts.items():
        random.Random(f"{seed} {part}").shuffle(rows)
    return parts


def demos(rows):
    """The different chosen responses of pairs, as demonstrations."""
    best = {(row["prompt"], row["chosen"]): row["domain"] for row in rows}
    return [{"prompt": prompt, "completion": chosen, "domain": domain} for (prompt, chosen), domain in best.items()]


def different(name, texts):
    """The different ones of some texts, as rows with one field."""
    return [{name: text} for text in dict.fromkeys(texts)]


def main(cfg):
    """Make all files in folder cfg.out; returns the content of summary.json. The same seed gives the same bytes."""
    paths, counts = {}, {}
    for part, given in (("train", cfg.train), ("test", cfg.test)):
        paths[part] = [Path(name) for name in given.split(",") if name]
        if not given and not (part == "test" and cfg.train):
            paths[part] = [download(SOURCE.format(*key), f"{cfg.out}/raw/{'-'.join(key)}.jsonl.gz", sha256)
                           for key, sha256 in SHA256.items() if key[1] == part]
    train = read_pairs(paths["train"], cfg.limit, counts)
    test = read_pairs(paths["test"], cfg.limit, counts, {first_message(row["prompt"]) for row in train})
    parts = split(train, test if paths["test"] else None, cfg.valid_share, cfg.seed)
    for path, reasons in counts.items():
        print(f"{path}: " + ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()))
    for part, rows in parts.items():
        check(rows, f"no pairs for the part {part!r} (too few dialogues, or another --valid-share)")
    files = {"demos_train.jsonl": demos(parts["reward"]), "demos_valid.jsonl": demos(parts["valid"]),
             "pairs_reward.jsonl": parts["reward"], "pairs_judge.jsonl": parts["judge"], "pairs_test.jsonl": parts["test"],
             "prompts_ppo.jsonl": different("prompt", (row["prompt"] for row in parts["reward"])),
             "prompts_eval.jsonl": different("prompt", (row["prompt"] for row in parts["test"])),
             "corpus_test.jsonl": different("text", (row["prompt"] + row["chosen"] for row in parts["test"]))}
    out = open_folder(cfg.out)
    for name, rows in files.items():
        write_jsonl(out / name, rows)
        print(f"{name:<24}{len(rows):>8,} rows")
    summary = {"seed": cfg.seed, "counts": counts, "rows": {name: len(rows) for name, rows in files.items()},
               "pairs": {part: Counter(row["domain"] for row in rows) for part, rows in parts.items()}}
    write_json(out / "summary.json", summary)
    return summary


if __name__ == "__main__":
    run(main, Config)
