"""What labelers said, in one format, whether they are people at the terminal, people at the page, or machines.

An answer, a line of answers.jsonl: {"id", "prompt", "labeler", "shown", "order"}. shown holds the sample's responses as
the labeler saw them; order has their numbers, best first: "3=1 4 2" says that 3 and 1 are equally good, "" that the
sample was skipped. People's have "seconds", too, and "acceptable": false if they would accept none of them; machines'
have "preferences": [[i, j, p], ...], shown response i is better than j with probability p.

A ranking, a line of rankings.jsonl, is what reward.py and dpo.py train on: {"id", "prompt", "responses", "ties",
"labeler"}. Tied responses must not become pairs to train on: "responses" has one of each tie, the first shown (in a
random order), and "ties" each tie in full, that one first. An answer that compares nothing makes no ranking.
"""
import json
import re
import shlex
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import write_atomic
from common import check, generator
from data import check_text, checked, read_jsonl, read_rows, read_text, write_jsonl
from runs import open_folder
from terminal import visible


EXPECTED = "an object with id, prompt, labeler, shown, order, or with id, prompt, labeler, responses"


@dataclass
class MergeConfig:
    files: str = ""  # answers.jsonl or rankings.jsonl of several labelers: file,file
    samples: str = "out/tiny/samples/samples.jsonl"  # what they were asked about: {"id", "prompt", "responses"}
    out: str = "out/tiny/label-people"  # folder for answers.jsonl and rankings.jsonl


def parse_order(text, K):
    """Response numbers in levels, best first: "3=1 4 2" is [[3, 1], [4], [2]]. ValueError says what is wrong."""
    text = re.sub(r"[\s,]", "", text)
    if not re.fullmatch("[0-9](=?[0-9])*", text):
        raise ValueError("that is not an order")
    if sorted(text.replace("=", "")) != [str(number) for number in range(1, K + 1)]:
        raise ValueError(f"each of 1 to {K} has to stand there once")
    return [[int(number) for number in level.split("=")] for level in re.findall("[0-9](?:=[0-9])*", text)]


def write_order(levels):
    """The reverse of parse_order, each level in the order of the numbers."""
    return " ".join("=".join(map(str, sorted(level))) for level in levels)


def levels_of(answer):
    """The responses (texts) of an answer, or of a ranking, in levels, best first; [] if it was skipped."""
    if "shown" in answer:
        order = answer["order"].strip()
        levels = parse_order(order, len(answer["shown"])) if order else []
        return [[answer["shown"][number - 1] for number in sorted(level)] for level in levels]
    ties = {tie[0]: tie for tie in answer.get("ties", [])}
    return [ties.get(text, [text]) for text in answer["responses"]]


def ranking_of(answer):
    """The ranking that an answer makes; None if it compares nothing."""
    levels = levels_of(answer)
    if len(levels) < 2:
        return None
    return {"id": answer["id"], "prompt": answer["prompt"], "responses": [level[0] for level in levels],
            "ties": [level for level in levels if len(level) > 1], "labeler": answer["labeler"]}


def write_answers(folder, answers):
    """Write answers.jsonl, and rankings.jsonl beside it: the number of rankings."""
    rankings = list(filter(None, map(ranking_of, answers)))
    for name, rows in {"answers": answers, "rankings": rankings}.items():
        write_jsonl(Path(folder) / f"{name}.jsonl", rows)
    return len(rankings)


def how_to_train(folder):
    """The command that trains a reward model on a folder's rankings, into a folder beside it. Few rankings take more
    passes, so that there are 80 steps or so: with 42 and 167 rankings the best held-out accuracy was there, of a few
    tries in seed 1 (study.sh)."""
    rankings, name = folder / "rankings.jsonl", folder.name
    reward = folder.with_name(name.replace("label", "reward", 1) if name.startswith("label") else f"reward-{name}")
    count = read_text(rankings).count("\n")
    epochs = f" --epochs {80 * 16 // count}" if 80 * 16 // count > 2 else ""
    return f"python reward.py --train {shlex.quote(str(rankings))}{epochs} --out {shlex.quote(str(reward))}"


def shuffled(texts, *key):
    """The texts in a random order that is a function of the key (integers)."""
    return [texts[i] for i in torch.randperm(len(texts), generator=generator(*key)).tolist()]


def shown_to(labeler, sample):
    """A sample's responses in the order in which a labeler sees them: another one for each labeler."""
    return shuffled(sample["responses"], zlib.crc32(sample["id"].encode()), zlib.crc32(labeler.encode()))


# ---- files that came from elsewhere ----------------------------------------------------------------------------------


def read_samples(path, limit=0, flag="limit"):
    """The first so many (0: all) rows {"id", "prompt", "responses"} of a file that label.py sample wrote."""
    fields = {"id": str, "prompt": str, "responses": list}
    samples = [{name: row[name] for name in fields} for row in read_jsonl(path, fields)]
    check(len({row["id"] for row in samples}) == len(samples), f"{path}: id: the same one twice")
    check(limit >= 0, f"--{flag} is {limit}: it must be 0 (all) or more")
    return samples[:limit or len(samples)]


def uncut(path):
    """The text of a file of answers, without a last line that a crash or a broken transfer cut short (said so)."""
    content = Path(path).read_bytes() if Path(path).is_file() else b""  # in bytes: a letter may be cut in two
    last = content.rpartition(b"\n")[2]
    try:
        json.loads(last.strip() or b"0")  # if it can be read, only its line end is missing
        return read_text(path) + "\n" * bool(last)
    except (ValueError, RecursionError):
        text = read_text(path, cut=len(last))
        print(f"{path}: the last line was cut short and is left out")
        return text


def mend(path):
    """Remove a last line that was cut short from a file, if there is one, so that others can follow it."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        text = uncut(path)
        write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_answer(row):
    """The row, if it is an answer or a ranking; else ValueError "field: problem"."""
    asked = "order" in row or "shown" in row
    checked(row, {"id": str, "prompt": str, "labeler": str, "shown" if asked else "responses": list})
    if asked and not isinstance(row.get("order"), str):
        raise ValueError("order: missing, or no text")
    if asked and row["order"].strip():
        try:
            parse_order(row["order"], len(row["shown"]))
        except ValueError as error:
            raise ValueError(f"order: {error}") from None
    ties = row.get("ties", [])
    if not isinstance(ties, list) or not all(isinstance(tie, list) and len(tie) > 1 for tie in ties):
        raise ValueError("ties: expected lists of two or more responses")
    for text in (text for tie in ties for text in tie):
        check_text(text, "ties")
    preferences, numbers = row.get("preferences", []), range(1, len(row.get("shown", [])) + 1)
    if not isinstance(preferences, list) or not all(isinstance(each, list) and len(each) == 3 for each in preferences):
        raise ValueError("preferences: expected [[number, number, probability], ...]")
    for i, j, p in preferences:
        known = type(i) is type(j) is int and i in numbers and j in numbers
        if not (known and type(p) in (int, float) and 0 <= p <= 1):
            raise ValueError("preferences: expected [[number, number, probability], ...]")
    if row.get("acceptable", False) is not False:
        raise ValueError("acceptable: expected false, or that it is not there")
    seconds = row.get("seconds", 0)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e9:
        raise ValueError("seconds: expected a number, 0 or more")
    return row


def read_answers(path):
    """The rows of a file of answers, or of rankings, checked; a last line that was cut short is left out."""
    text = uncut(path)
    return read_rows(path, check_answer, EXPECTED, text=text) if text.strip() else []


def check_owner(folder, labeler):
    """UserError if a folder holds the answers of others, or rankings of a stand-in, which must not be overwritten."""
    path = folder / "answers.jsonl"
    answers = read_answers(path) if path.exists() else []
    new = not any((folder / name).exists() for name in ("done.json", "rankings.jsonl"))
    check((path.exists() or new) and all(row["labeler"] == labeler for row in answers),
          f"{folder} holds another labeler's work: change --out")


def collect(paths, samples):
    """The answers in several files, each checked against the samples (a path), none twice. UserError names the line of
    what does not fit."""
    known = {row["id"]: row for row in read_samples(samples)}
    collected = {}  # (labeler, id): answer, file

    def accept(row):
        check_answer(row)
        sample = known.get(row["id"])
        if not sample:
            raise ValueError(f"id: {row['id']!r} is not in {samples}")
        texts = row["shown"] if "shown" in row else [text for level in levels_of(row) for text in level]
        if row["prompt"] != sample["prompt"] or sorted(texts) != sorted(sample["responses"]):
            raise ValueError(f"id: {row['id']!r} has other texts in {samples}")
        earlier, where = collected.setdefault((row["labeler"], row["id"]), (row, path))
        if list(map(sorted, levels_of(earlier))) != list(map(sorted, levels_of(row))):
            raise ValueError(f"id: {row['labeler']!r} has answered {row['id']!r} otherwise in {where} (keep one of "
                             "them; what a page saved later holds all that it saved before)")
        return row

    for path in paths:
        rows = read_rows(path, accept, EXPECTED, text=uncut(path))
        if repeated := sum(collected[row["labeler"], row["id"]][0] is not row for row in rows):
            print(f"{path}: {repeated} answers that are there already")
    return [row for row, _ in collected.values()]


def merge(cfg):
    """Put the answers of several labelers together."""
    check(cfg.files, "name the files to merge: python label.py merge FILE FILE ...")
    answers = collect(cfg.files.split(","), cfg.samples)
    folder = Path(cfg.out)
    before = read_answers(path) if (path := folder / "answers.jsonl").exists() else []
    lost = {(row["labeler"], row["id"]) for row in before} - {(row["labeler"], row["id"]) for row in answers}
    check(not lost, f"{path} holds {len(lost)} answers that are in none of the files: name it, too, or change --out")
    check(not (folder / "done.json").exists(), f"{folder} holds another stage's work: change --out")
    open_folder(folder)
    rankings = write_answers(folder, answers)
    for labeler, count in Counter(row["labeler"] for row in answers).items():
        print(f"{visible(labeler)}: {count} answers")
    print(f"{folder}: {len(answers)} answers, {rankings} rankings")
    if rankings:
        print(f"to train:  {how_to_train(folder)}")
