"""Anthropic's dialogues: people chose the better of two answers of an assistant, for helpfulness and for harmlessness.

Source: Bai et al. 2022, "Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback",
arXiv:2204.05862. About 91,000 comparisons, 30 MB, fetched at run time from a pinned revision; MIT licence. The content
can be offensive and upsetting: people were asked to provoke bad answers. In short: fetch, parse, split, write files.

A pair is two whole dialogues that differ in their last answer only. The prompt is everything up to and including the
last "Assistant:", chosen and rejected are what follows. Every pair is kept, or counted under the reason why not. The
same conversation comes back with one more turn, so pairs that begin with the same message of the person are one group,
and a group is in one part only: valid, reward or judge (all three from the training files), or test.

    demos_train.jsonl, demos_valid.jsonl        prompt, completion: the chosen responses of reward and of valid
    pairs_reward.jsonl, _judge, _test           prompt, chosen, rejected
    prompts_ppo.jsonl, prompts_eval.jsonl       the different prompts of reward and of test
    corpus_test.jsonl                           the chosen dialogues of test as plain text
    summary.json                                counts and lengths, written last

Left out on purpose: the subsets helpful-rejection-sampled and helpful-online, whose answers come from models tuned on
such pairs, and red-team-attempts, which holds no comparisons.
"""
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoint import write_json
from common import UserError, check
from data import REPLY, TURN, check_text, read_rows, write_jsonl
from download import download, hub
from runs import open_folder

SOURCE = "datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa/{}/{}.jsonl.gz"
SHA256 = {("helpful-base", "train"): "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
          ("harmless-base", "train"): "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
          ("helpful-base", "test"): "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
          ("harmless-base", "test"): "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03"}
BINS = ("kept", "no Assistant turn", "ends with Human", "prompts differ", "empty response", "identical",
        "no proper text", "repeated", "group also in train")  # what becomes of a line: one of these
NAMED = "Human: or Assistant: within a response"
ANY_TURN = f"{TURN}|{REPLY}"  # as a pattern


@dataclass
class Config:
    out: str = "data/hh"       # folder for the prepared files; the downloads go into its subfolder raw
    train: str = ""            # files on disk instead of the downloads, .jsonl or .jsonl.gz, commas between them
    test: str = ""             # the same for the held-out part; with --train alone it is a tenth of the groups there
    valid_share: float = 0.02  # share of the training groups that choose a checkpoint of SFT
    limit: int = 0             # only the first so many pairs of each file (0: all)
    seed: int = 1              # parts and order depend on it


class Pair(NamedTuple):
    file: str
    domain: str
    group: str  # the first message of the person, in lower case
    prompt: str
    chosen: str  # responses: each begins as in the file, with a space
    rejected: str


# ---- parse ---------------------------------------------------------------------------------------------------------


def split_transcript(text):
    """(prompt, response) of a dialogue as one text: the prompt ends with the last REPLY.

    ValueError in words if no turn is the assistant's, or the last is not.
    """
    prompt, reply, response = text.rpartition(REPLY)
    if not reply:
        raise ValueError("no Assistant turn")
    if TURN in response:
        raise ValueError("ends with Human")
    return prompt + reply, response


def first_message(prompt):
    """The person's first message in a prompt, in lower case and single spaces."""
    opening = prompt.split(TURN)[:2][-1].split(REPLY)[0]  # what stands before the first TURN is nobody's message
    return " ".join(opening.lower().split())


def transcripts_of(row):
    """(chosen, rejected) of a row, both texts. Not data.checked: what it refuses is counted here, not an error."""
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name}: expected text, found {type(row[name]).__name__}" if name in row else
                             f"{name}: missing (found: {', '.join(row) or 'nothing'})")
    return row["chosen"], row["rejected"]


def sort_out(chosen, rejected):
    """(prompt, chosen response, rejected response) of two transcripts; ValueError with the reason to leave them out."""
    (prompt, chosen), (other, rejected) = split_transcript(chosen), split_transcript(rejected)
    if prompt != other:
        raise ValueError("prompts differ")  # a response that goes on with turns of its own moves the last REPLY
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


def read_pairs(paths, limit, counts):
    """Different good pairs of the files of one part. counts[file] gets a number for each reason to leave others out."""
    kept = {}
    for path in paths:
        here = counts.setdefault(str(path), Counter(dict.fromkeys(BINS, 0)))
        name = f"{path.parent.name}/{path.name}"
        domain = next((subset for subset, _ in SHA256 if subset in name), stem_of(path))
        for transcripts in read_rows(path, transcripts_of, "an object with chosen and rejected")[:limit or None]:
            try:
                pair = sort_out(*transcripts)
            except ValueError as reason:
                here[str(reason)] += 1
                continue
            here["repeated"] += pair in kept
            kept.setdefault(pair, Pair(str(path), domain, first_message(pair[0]), *pair))
    return list(kept.values())


# ---- describe and split --------------------------------------------------------------------------------------------


def oddities(pairs):
    """{file: Counter} of what is odd in pairs that are kept: it is how people and the assistant wrote."""
    seen = {pair[3:] for pair in pairs}
    odd = defaultdict(Counter)
    for pair in pairs:
        turns = re.findall(ANY_TURN, pair.prompt)
        odd[pair.file]["opposite order elsewhere"] += (pair.prompt, pair.rejected, pair.chosen) in seen
        odd[pair.file]["two turns of one side in a row"] += any(a == b for a, b in zip(turns, turns[1:]))
        odd[pair.file][NAMED] += bool(re.search("Human:|Assistant:", pair.chosen + pair.rejected))
    return odd


def split(train, test, valid_share, seed):
    """{part: pairs}, every group in one part. test: pairs of the held-out files, without the groups of train; None
    holds out a tenth of the groups of train. UserError if a part would be empty.
    """
    groups = sorted({pair.group for pair in train})
    random.Random(f"{seed} split").shuffle(groups)
    held_out = math.ceil(0.1 * len(groups)) if test is None else 0
    first = held_out + math.ceil(valid_share * len(groups))
    part_of = {group: "test" if i < held_out else "valid" if i < first else ("reward", "judge")[(i - first) % 2]
               for i, group in enumerate(groups)}
    parts = {part: [pair for pair in train if part_of[pair.group] == part]
             for part in ("valid", "reward", "judge", "test")}
    parts["test"] += test or []
    for part, pairs in parts.items():
        check(pairs, f"no pairs for the part {part!r}: too few dialogues ({len(groups)} different first messages in "
                     "the training files), or those of the test files begin like training dialogues")
        random.Random(f"{seed} {part}").shuffle(pairs)
    return parts


def files_of(parts):
    """{file name: rows} of everything that the other scripts read. A text that repeats is there once, a pair always."""
    def pairs(part):
        return [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "domain": p.domain}
                for p in parts[part]]

    def demos(part):
        best = {(p.prompt, p.chosen): p.domain for p in parts[part]}
        return [{"prompt": prompt, "completion": chosen, "domain": domain} for (prompt, chosen), domain in best.items()]

    def prompts(part):
        return [{"prompt": prompt} for prompt in dict.fromkeys(p.prompt for p in parts[part])]

    texts = dict.fromkeys(p.prompt + p.chosen for p in parts["test"])
    return {"demos_train.jsonl": demos("reward"), "demos_valid.jsonl": demos("valid"),
            "pairs_reward.jsonl": pairs("reward"), "pairs_judge.jsonl": pairs("judge"),
            "pairs_test.jsonl": pairs("test"), "prompts_ppo.jsonl": prompts("reward"),
            "prompts_eval.jsonl": prompts("test"), "corpus_test.jsonl": [{"text": text} for text in texts]}


# ---- all of it -----------------------------------------------------------------------------------------------------


def sources(given, split, raw):
    """Paths of one split ("train" or "test"): the files given, else the downloads, fetched into the folder raw."""
    if given:
        names = [name.strip() for name in given.split(",") if name.strip()]
        check(names, f"--{split} {given!r}: no file is named")
        return [Path(name) for name in names]
    return [download(hub(SOURCE.format(*key)), raw / f"{'-'.join(key)}.jsonl.gz", sha256)
            for key, sha256 in SHA256.items() if key[1] == split]


def percentiles(values):
    """[5 %, median, 95 %, largest] of some numbers, as whole numbers that occur."""
    return np.percentile(values, (5, 50, 95, 100), method="lower").tolist()


def print_summary(summary):
    """What became of every line, what was made, how long it is."""
    for path, counts in summary["counts"].items():
        print(f"\n{path}: {sum(counts.values()):,} pairs")
        for name, count in counts.items():
            print(f"{count:>10,}  {name}")
        for name, count in summary["oddities"].get(path, {}).items():
            print(f"{count:>10,}  of those kept: {name}")
    print(f"\n{'file':<24}{'rows':>10}")
    for name, rows in summary["rows"].items():
        print(f"{name:<24}{rows:>10,}")
    print(f"\n{'pairs that are kept':<24}{'5 %':>10}{'median':>10}{'95 %':>10}{'largest':>10}")
    for name, values in summary["lengths"].items():
        print(f"{name:<24}" + "".join(f"{value:>10,}" for value in values))


def main(cfg):
    """Make all files in folder cfg.out; returns the content of summary.json. The same seed gives the same bytes."""
    check(0 < cfg.valid_share < 1, f"--valid-share is {cfg.valid_share}: it must be between 0 and 1")
    check(cfg.limit >= 0, f"--limit is {cfg.limit}: 0 means all pairs")
    out, counts = Path(cfg.out), {}
    train_files = sources(cfg.train, "train", out / "raw")
    test_files = sources(cfg.test, "test", out / "raw") if cfg.test or not cfg.train else []
    for path in {path.resolve() for path in train_files} & {path.resolve() for path in test_files}:
        raise UserError(f"{path}: both in --train and in --test")
    train = read_pairs(train_files, cfg.limit, counts)
    test = read_pairs(test_files, cfg.limit, counts)
    trained = {pair.group for pair in train}
    for pair in test:
        counts[pair.file]["group also in train"] += pair.group in trained
    test = [pair for pair in test if pair.group not in trained]
    for pair in train + test:
        counts[pair.file]["kept"] += 1
    parts = split(train, test if test_files else None, cfg.valid_share, cfg.seed)
    files = files_of(parts)
    open_folder(out, "summary.json")
    for name, rows in files.items():
        write_jsonl(out / name, rows)
    pairs = train + test
    summary = {
        "seed": cfg.seed, "counts": counts, "oddities": oddities(pairs),
        "rows": {name: len(rows) for name, rows in files.items()},
        "pairs": {part: Counter(pair.domain for pair in parts[part]) for part in parts},
        "lengths": {"words of the prompt": percentiles([len(pair.prompt.split()) for pair in pairs]),
                    "words of chosen": percentiles([len(pair.chosen.split()) for pair in pairs]),
                    "words of rejected": percentiles([len(pair.rejected.split()) for pair in pairs]),
                    "turns with the response": percentiles([len(re.findall(ANY_TURN, pair.prompt)) for pair in pairs])},
    }
    write_json(out / "summary.json", summary)
    print_summary(summary)
    return summary
