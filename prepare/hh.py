"""Anthropic's dialogues: people chose the better of two responses of an assistant, for helpfulness or harmlessness.

    python -m prepare.hh                                 downloads 30 MB, writes data/hh
    python -m prepare.hh --train FILE --out data/my      from a file of such pairs, of which a tenth is held out

Source: Bai et al. 2022, "Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback",
arXiv:2204.05862. About 91,000 comparisons, MIT licence, from a pinned revision. The content can be offensive and
upsetting: people were asked to provoke bad responses.

A pair, {"chosen", "rejected"}, is two whole dialogues that differ in their last response only. The prompt is all up to
the last "Assistant:". Every pair is kept, or counted under the reason why not. The same conversation comes back with
one more turn, so pairs that begin with the same message of the person are one group, and a group is in one part only:
valid, reward or judge (all three from the training files), or test.

    demos_train.jsonl, demos_valid.jsonl        prompt, completion: the chosen responses of reward and of valid
    pairs_reward.jsonl, _judge, _test           prompt, chosen, rejected
    prompts_ppo.jsonl, prompts_eval.jsonl       the different prompts of reward and of test
    corpus_test.jsonl, summary.json             the chosen dialogues of test as plain text; counts, written last

Left out on purpose: helpful-rejection-sampled and helpful-online, whose responses come from models tuned on such pairs.
"""
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import check, open_folder, paths, run, write_json
from data import REPLY, TURN, check_text, read_rows, write_jsonl
from prepare.download import download

SOURCE = "datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa/{}/{}.jsonl.gz"
SHA256 = {("helpful-base", "train"): "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
          ("harmless-base", "train"): "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
          ("helpful-base", "test"): "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
          ("harmless-base", "test"): "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03"}
BINS = ("kept", "no Assistant turn", "ends with Human", "prompts differ", "empty response", "identical",
        "no proper text", "repeated", "group also in train")  # what becomes of a line: one of these


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
    """The person's first message in a prompt, in lower case and single spaces: what all of one group begin with."""
    opening = prompt.split(TURN)[:2][-1].split(REPLY)[0]  # what stands before the first TURN is nobody's message
    return " ".join(opening.lower().split())


def sort_out(chosen, rejected):
    """(prompt, chosen response, rejected response) of two transcripts; ValueError with the reason to leave them out."""
    (prompt, chosen), (other, rejected) = split_transcript(chosen), split_transcript(rejected)
    if prompt != other:
        raise ValueError("prompts differ")  # a response that contains turns of its own moves the last REPLY
    if not chosen.strip() or not rejected.strip():
        raise ValueError("empty response")
    if chosen.strip() == rejected.strip():
        raise ValueError("identical")
    try:
        check_text(prompt + chosen + rejected, "text")
    except ValueError:
        raise ValueError("no proper text") from None  # a NUL, half a surrogate pair, endless white space
    return prompt, chosen, rejected


def stem_of(path):
    """The name of a file without .jsonl or .jsonl.gz."""
    return path.with_suffix("").stem if path.suffix == ".gz" else path.stem


def read_pairs(path, limit, seen, trained=()):
    """(different good pairs of a file as rows, {what became of its lines: how many}). seen: the set of pairs of earlier
    files of this part, extended. trained: groups of the training files, none of which may be in a test file."""
    def transcripts(row):
        for name in ("chosen", "rejected"):
            if not isinstance(row.get(name), str):
                raise ValueError(f"{name}: missing, or not a text")
        return row["chosen"], row["rejected"]
    rows, counts = [], Counter(dict.fromkeys(BINS, 0))
    domain = next((subset for subset, _ in SHA256 if subset in f"{path.parent.name}/{path.name}"), stem_of(path))
    for texts in read_rows(path, transcripts, "an object with chosen and rejected")[:limit or None]:
        try:
            pair = sort_out(*texts)
            if pair in seen:
                raise ValueError("repeated")
            seen.add(pair)
            if first_message(pair[0]) in trained:
                raise ValueError("group also in train")
            rows.append({**dict(zip(("prompt", "chosen", "rejected"), pair)), "domain": domain})
            counts["kept"] += 1
        except ValueError as reason:
            counts[str(reason)] += 1
    return rows, counts


def split(train, test, valid_share, seed):
    """{part: rows}, every group in one part. test: rows of the held-out files; None holds out a tenth of the groups."""
    groups = sorted({first_message(row["prompt"]) for row in train})
    random.Random(f"{seed} split").shuffle(groups)
    held_out = math.ceil(0.1 * len(groups)) if test is None else 0
    first = held_out + math.ceil(valid_share * len(groups))
    part_of = {group: "test" if i < held_out else "valid" if i < first else ("reward", "judge")[(i - first) % 2]
               for i, group in enumerate(groups)}
    parts = {"valid": [], "reward": [], "judge": [], "test": list(test or [])}
    for row in train:
        parts[part_of[first_message(row["prompt"])]].append(row)
    for part, rows in parts.items():
        check(rows, f"no pairs for the part {part!r}: too few dialogues ({len(groups)} different first messages)")
        random.Random(f"{seed} {part}").shuffle(rows)
    return parts


def files_of(parts):
    """{file name: rows} of everything that the other scripts read. A text that repeats is there once, a pair always."""
    files = {}
    for name, part in (("train", "reward"), ("valid", "valid")):
        best = {(row["prompt"], row["chosen"]): row["domain"] for row in parts[part]}
        files[f"demos_{name}.jsonl"] = [{"prompt": prompt, "completion": chosen, "domain": domain}
                                        for (prompt, chosen), domain in best.items()]
    files |= {f"pairs_{part}.jsonl": parts[part] for part in ("reward", "judge", "test")}
    for name, part in (("ppo", "reward"), ("eval", "test")):
        files[f"prompts_{name}.jsonl"] = [{"prompt": x} for x in dict.fromkeys(row["prompt"] for row in parts[part])]
    texts = dict.fromkeys(row["prompt"] + row["chosen"] for row in parts["test"])
    return {**files, "corpus_test.jsonl": [{"text": text} for text in texts]}


def percentiles(values):
    """[5 %, median, 95 %, largest] of some numbers, as whole numbers that occur."""
    return np.percentile(values, (5, 50, 95, 100), method="lower").tolist()


def main(cfg):
    """Make all files in folder cfg.out; returns the content of summary.json. The same seed gives the same bytes."""
    check(0 < cfg.valid_share < 1, f"--valid-share is {cfg.valid_share}: it must be between 0 and 1")
    raw = Path(cfg.out) / "raw"
    train_files, test_files = ([Path(name) for name in paths(given)] if given or part == "test" and cfg.train else
                               [download(SOURCE.format(*key), raw / f"{'-'.join(key)}.jsonl.gz", sha256)
                                for key, sha256 in SHA256.items() if key[1] == part]
                               for part, given in (("train", cfg.train), ("test", cfg.test)))
    train, test, counts, seen = [], [], {}, (set(), set())
    for path in train_files:
        rows, counts[str(path)] = read_pairs(path, cfg.limit, seen[0])
        train += rows
    trained = {first_message(row["prompt"]) for row in train}
    for path in test_files:
        rows, counts[str(path)] = read_pairs(path, cfg.limit, seen[1], trained)
        test += rows
    files = files_of(parts := split(train, test if test_files else None, cfg.valid_share, cfg.seed))
    out, rows = open_folder(cfg.out), train + test
    for name, content in files.items():
        write_jsonl(out / name, content)
    summary = {
        "seed": cfg.seed, "counts": counts, "rows": {name: len(content) for name, content in files.items()},
        "pairs": {part: Counter(row["domain"] for row in parts[part]) for part in parts},
        "lengths": {"words of the prompt": percentiles([len(row["prompt"].split()) for row in rows]),
                    "words of chosen": percentiles([len(row["chosen"].split()) for row in rows]),
                    "words of rejected": percentiles([len(row["rejected"].split()) for row in rows]),
                    "turns with the response": percentiles([len(re.findall(f"{TURN}|{REPLY}", row["prompt"]))
                                                            for row in rows])}}
    write_json(out / "summary.json", summary)
    for path, bins in counts.items():
        print(f"{path}: " + ", ".join(f"{count:,} {name}" for name, count in bins.items() if count))
    for name, count in summary["rows"].items():
        print(f"{name:<24}{count:>10,} rows")
    for name, values in summary["lengths"].items():
        print(f"{name:<24}" + "".join(f"{value:>10,} {at}" for value, at in zip(values, ("5 %", "50 %", "95 %", "max"))))
    return summary


if __name__ == "__main__":
    run(main, Config)
