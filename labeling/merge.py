"""Put the answers of several labelers together:   python -m labeling.merge answers-ann.jsonl answers-bob.jsonl

FILE: answers.jsonl or rankings.jsonl of people, pages and machines. Each line is checked against the samples;
duplicates count once; what does not fit is refused with file and line, and nothing is written.
"""
from dataclasses import dataclass
from pathlib import Path

from common import check, open_folder, run
from data import read_rows
from labeling.answers import check_answer, levels_of, read_answers, read_samples, same_order, write_answers

@dataclass
class Config:
    files: tuple = ()  # answers.jsonl or rankings.jsonl of several labelers
    samples: str = "out/tiny/samples/samples.jsonl"  # what they were asked about: {"id", "prompt", "responses"}
    out: str = "out/tiny/label-people"  # folder for answers.jsonl and rankings.jsonl

def collect(files, samples):
    """{(labeler, id): answer} of several files, each checked against the samples (a path)."""
    known, collected, where = {row["id"]: row for row in read_samples(samples)}, {}, {}

    def accept(row):
        check_answer(row)
        key, sample = (row["labeler"], row["id"]), known.get(row["id"])
        texts = row["shown"] if "shown" in row else sum(levels_of(row), [])
        if not sample or row["prompt"] != sample["prompt"] or sorted(texts) != sorted(sample["responses"]):
            raise ValueError(f"id: {row['id']!r} is not in {samples}, or with other texts")
        if not same_order(collected.setdefault(key, row), row):
            raise ValueError(f"id: {row['labeler']!r} has a different answer to {row['id']!r} in {where[key]} "
                             "(keep one of them)")
        where.setdefault(key, path)
        return row

    for path in files:
        print(f"{path}: {len(read_rows(path, accept))} answers")
    return collected

def main(cfg):
    check(cfg.files, "name the files to merge: python -m labeling.merge FILE FILE ...")
    answers, folder = collect(cfg.files, cfg.samples), Path(cfg.out)
    lost = {(row["labeler"], row["id"]) for row in read_answers(folder)} - answers.keys()
    check(not lost, f"{folder}/answers.jsonl holds {len(lost)} answers that are in none of the files: name it, too, "
                    "or change --out")
    write_answers(open_folder(folder), list(answers.values()))

if __name__ == "__main__":
    run(main, Config, words=("files",))
