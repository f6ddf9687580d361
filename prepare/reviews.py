"""The built-in human feedback: 23,700 sentences rated by people become a corpus, demonstrations, rankings and prompts.

    python -m prepare.reviews                               fetches the source through pip, writes data/reviews
    python -m prepare.reviews --out data/other --seed 2     with other splits

Source: C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014. Sentences of four domains (movie reviews, product reviews, newspaper editorials, tweets), each rated
by 15 or more people from -4 (very negative) to 4 (very positive). They belong to third parties, so they are fetched at
run time. The same seed gives the same bytes.

Left out on purpose: the 1,000 tweets with 92 or more ratings, since 199 of them contradict their published mean.
"""
import base64
import html
import io
import json
import random
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import regex  # comes with tiktoken, which needs it

from common import check, digest, open_folder, run, say, write_atomic, write_json
from data import PATTERN, load_tokenizer, write_jsonl

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
DOWNLOAD = "pip download --no-deps --no-binary vaderSentiment"
RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"  # inside ARCHIVE, itself an archive
FILES = {"movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets",
         "tweets": "tweets"}
BLOCK = 30  # rows of the movie ratings rated by the same people: position k of the list is one person, only within it
ROUNDS = {"labeler": 8, "judge": 8, "test": 4}  # parts of the data: in how many ranked groups each sentence is
K = 4  # sentences in a ranked group

@dataclass
class Config:
    out: str = "data/reviews"  # folder for the prepared files
    vocab_size: int = 4096     # size of the byte-pair vocabulary, EOS included
    seed: int = 1              # splits, groups and the borders between prompt and completion depend on it

class Sentence(NamedTuple):
    domain: str
    group: int  # what never crosses a split: the movie block, the document, the tweet itself
    text: str
    ratings: list  # one int in -4 .. 4 per rater
    mean: float  # of the ratings; its 4 decimals keep any two different means of up to 99 ratings apart

def fetch(out):
    """The verified source package in folder out, into which it is fetched through pip unless it is there."""
    path = out / ARCHIVE
    if not path.exists():
        say(f"fetching {ARCHIVE} through pip")
        command = [sys.executable, "-m", *DOWNLOAD.split(), "--require-hashes", "-r", "/dev/stdin", "--dest", out]
        pinned = f"vaderSentiment==3.3.2 --hash=sha256:{SHA256}\n"  # pip checks it before it runs anything
        result = subprocess.run(command, input=pinned, capture_output=True, text=True)
        check(path.exists(), f"pip could not fetch {ARCHIVE}: {result.stderr.strip()[-200:]} (put the file at {path}; "
              f"python -m {DOWNLOAD} vaderSentiment==3.3.2 gets it elsewhere)")
    check(digest(path) == SHA256, f"{path}: not the expected file: expected sha256 {SHA256}, found {digest(path)}")
    return path

def read_archive(path):
    """{domain: (ground-truth text, ratings text)} from the archive in the source package, all in memory."""
    with tarfile.open(path) as outer:
        content = outer.extractfile(RATINGS).read()
    with tarfile.open(fileobj=io.BytesIO(content)) as inner:
        return {domain: tuple(inner.extractfile(f"hutto_ICWSM_2014/{name}_{kind}.txt").read().decode("utf-8")
                              for kind in ("GroundTruth", "anonDataRatings")) for domain, name in FILES.items()}

def clean(text):
    """The sentence as typed: no HTML entities (some are escaped twice), '' is a quotation mark, single spaces."""
    while html.unescape(text) != text:
        text = html.unescape(text)
    return " ".join(text.replace("''", '"').split())

def parse(domain, truth, ratings, dropped):
    """Sentences of one domain from the text of its two files, joined by id, with the mean of their raw ratings (the
    published mean is not trusted). The Counter dropped gets what is left out, by reason."""
    def table(text):  # not csv, which would swallow rows at a stray quote
        return [line.rstrip("\r").split("\t") for line in text.lstrip("\ufeff").split("\n") if line]
    texts, sentences = {key: text for key, _, text in table(truth)}, []
    for position, (key, _, _, values) in enumerate(table(ratings)):
        values, text = json.loads(values), clean(texts.pop(key, ""))
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
        kept = first.setdefault("".join(c for c in s.text.casefold() if c.isalnum()), s)
        dropped[f"{s.domain}: duplicate text"] += kept is not s
    return list(first.values())

def split(sentences, seed):
    """{part: {domain: sentences}}: 42.5 % of each domain's groups for the labeler, as many for the judge, 15 % test."""
    parts = {part: {domain: [] for domain in FILES} for part in ROUNDS}
    for domain in FILES:
        groups = sorted({s.group for s in sentences if s.domain == domain})
        random.Random(f"{seed} split {domain}").shuffle(groups)  # the movie file is sorted by polarity
        a, b = int(0.425 * len(groups)), int(0.85 * len(groups))
        part_of = {g: "labeler" if i < a else "judge" if i < b else "test" for i, g in enumerate(groups)}
        for s in sentences:
            if s.domain == domain:
                parts[part_of[s.group]][domain].append(s)
    return parts

def save_ranks(ranks, path, settings=None):
    """Write the file that data.load_tokenizer reads, from {token: rank} and settings."""
    first = json.dumps(settings) + "\n" if settings else ""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    write_atomic(path, first + "".join(lines))

def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2): {token bytes: rank}, vocab_size - 1 entries. The
    256 bytes come first. Then the most frequent adjacent pair is merged, again and again (of equals the smallest)."""
    words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    spelling, count = [list(word.encode()) for word in words], list(words.values())  # lists of ids, merged below
    pairs, where = Counter(), defaultdict(set)  # how often each pair of ids occurs, and in which words
    tokens = [bytes([b]) for b in range(256)]

    def add(i):
        for pair in zip(spelling[i], spelling[i][1:]):
            pairs[pair] += count[i]
            where[pair].add(i)
    for i in range(len(spelling)):
        add(i)
    while len(tokens) < vocab_size - 1 and (most := max(pairs.values(), default=0)) > 1:
        best = min(pair for pair, n in pairs.items() if n == most)
        for i in where.pop(best):
            ids, k = spelling[i], 0
            for pair in zip(ids, ids[1:]):
                pairs[pair] -= count[i]
            while k < len(ids) - 1:
                if (ids[k], ids[k + 1]) == best:
                    ids[k:k + 2] = [len(tokens)]
                k += 1
            add(i)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        pairs = +pairs if len(tokens) % 64 == 0 else pairs  # forget pairs that no longer occur, now and then
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}

def make_prompts(train, valid, test, others, seed, dropped):
    """{name: [(prompt, completion)]}: "eval" from test texts, "label" (20 %), "ppo" (30 %) and "demos" from train,
    "valid" from validation texts, and each domain of others, {domain: test texts}. A prompt is the first 2 to 6 words
    of a text that has 4 more, and no prompt of two parts; only demonstrations may begin alike, as reviews do."""
    rng = random.Random(f"{seed} prompts")
    train = rng.sample(train, len(train))
    a, b = len(train) // 5, len(train) // 2
    parts = {"eval": test, "label": train[:a], "ppo": train[a:b], "demos": train[b:], "valid": valid, **others}
    made, taken = {name: [] for name in parts}, set()
    for name, texts in parts.items():
        for text in texts:
            words = text.split(" ")
            openings = [" ".join(words[:n]) for n in rng.sample(range(2, 7), 5) if len(words) >= n + 4]
            prompt = next((opening for opening in openings if opening.casefold() not in taken), None)
            if prompt is None:
                dropped[f"{name}: {'every opening taken' if openings else 'under 6 words'}"] += 1
                continue
            made[name].append((prompt, text[len(prompt):]))
            if name not in ("demos", "valid"):
                taken.add(prompt.casefold())
        if name == "valid":  # what demonstrations begin with is no prompt of the other domains either
            taken |= {prompt.casefold() for prompt, _ in made["demos"]}
    return made

def rankings(pools, rng, dropped):
    """Rows of a rankings file, each a random group of K sentences out of one pool, best first. pools: (sentences, the
    value of a sentence, more fields). Of tied sentences only the first stays; no group is there twice."""
    made = {}
    for pool, value, more in pools:
        pool = rng.sample(pool, len(pool))
        for i in range(0, len(pool) - 1, K):  # the last group may be smaller, but not a single sentence
            first_of = {value(s): s for s in reversed(pool[i:i + K])}
            best_first = [first_of[x] for x in sorted(first_of, reverse=True)]
            dropped["rankings: sentence tied with one in its group"] += len(pool[i:i + K]) - len(best_first)
            if len(best_first) > 1:
                texts = [s.text for s in best_first]
                made[(frozenset(texts), *more.values())] = {"prompt": "", "responses": texts, "means": [
                    s.mean for s in best_first], "domain": best_first[0].domain, **more}
    return rng.sample(list(made.values()), len(made))

def person_pools(rows):
    """Pools for rankings by one person's own ratings: each person who rated a block ranks all of it."""
    return [(block, lambda s, person=person: s.ratings[person], {"rater": f"{block[0].group}-{person}"})
            for block in blocks_of(rows) for person in range(len(block[0].ratings))]

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

def agreement(rows, same_sign, seed, draws=100_000):
    """Share of comparisons in which one rater agrees with [the mean of the other raters, one other rater]: of a random
    pair of sentences (same_sign: means both positive or both negative) and a random rater of each; ties are left out.
    """
    rng = np.random.default_rng(seed)
    count = np.array([len(s.ratings) for s in rows])  # (N,)
    ratings = np.array([s.ratings + [0] * (count.max() - len(s.ratings)) for s in rows])  # (N, most ratings)
    total = ratings.sum(1)
    pair = rng.integers(len(rows), size=(2, draws))
    pair = pair[:, (pair[0] != pair[1]) & ((total[pair[0]] * total[pair[1]] > 0) | (not same_sign))]
    n = count[pair]  # (2, draws that are left)
    one = rng.integers(n)
    another = (one + rng.integers(1, n)) % n  # anyone but the first
    first, second = ratings[pair, one], ratings[pair, another]
    shares = []
    for other in ((total[pair] - first) / (n - 1), second):
        agree = np.sign(first[0] - first[1]) * np.sign(other[0] - other[1])  # 0 for a tie
        shares.append(round(float((agree > 0).sum() / max(1, (agree != 0).sum())), 4))
    return shares

def blocks_of(rows):
    """Movie sentences rated by the same people, as lists; a block with unequal numbers of ratings is left out."""
    blocks = defaultdict(list)
    for s in rows:
        blocks[s.group].append(s)
    return [block for block in blocks.values() if len({len(s.ratings) for s in block}) == 1]

def person_margins(rows):
    """Every comparison that one person made within a block, their ties left out: the mean rating by the others of the
    sentence they preferred, minus that of the one they did not. (comparisons,), rating units."""
    margins = [np.zeros(0)]
    for block in blocks_of(rows):
        ratings = np.array([s.ratings for s in block])  # (sentences, people)
        others = (ratings.sum(1, keepdims=True) - ratings) / (ratings.shape[1] - 1)
        i, j = np.triu_indices(len(block), 1)
        preferred = np.sign(ratings[i] - ratings[j])
        margins.append((preferred * (others[i] - others[j]))[preferred != 0])
    return np.concatenate(margins)

def fit_temperature(margins):
    """Maximum-likelihood t, in rating units, of P(prefers i to j) = sigmoid((mean_i - mean_j) / t) (Bradley-Terry)."""
    low, high = 0.01, 100.0  # the log-likelihood is concave in 1 / t: bisect 1 / t for where its slope is 0
    for _ in range(30):
        middle = (low * high) ** 0.5
        slope = (margins / (1 + np.exp(np.clip(middle * margins, -500, 500)))).sum()  # sum of m * sigmoid(-m / t)
        low, high = (middle, high) if slope > 0 else (low, middle)
    return round(1 / low, 4)

def main(cfg):
    """Make all files in folder cfg.out; returns the content of summary.json, written last."""
    out, dropped = open_folder(cfg.out), Counter()
    source = read_archive(fetch(out))
    (out / "summary.json").unlink(missing_ok=True)  # an interrupted run must not look finished
    sentences = [s for domain, (truth, ratings) in source.items() for s in parse(domain, truth, ratings, dropped)]
    parts = split(without_duplicates(sentences, dropped), cfg.seed)
    rng = random.Random(f"{cfg.seed} files")
    train = [s for part in ("labeler", "judge") for rows in parts[part].values() for s in rows]
    test = [s for rows in parts["test"].values() for s in rows]
    train, test = rng.sample(train, len(train)), rng.sample(test, len(test))
    valid, train = train[:len(train) // 25], train[len(train) // 25:]  # valid selects checkpoints, test only examines
    files = {f"corpus_{name}.jsonl": [{"text": s.text, "domain": s.domain} for s in rows]
             for name, rows in (("train", train), ("valid", valid), ("test", test))}
    movies = [[s.text for s in rows if s.domain == "movie"] for rows in (train, valid, test)]
    others = {domain: [s.text for s in test if s.domain == domain] for domain in FILES if domain != "movie"}
    made = make_prompts(*movies, others, cfg.seed, dropped)
    for name, part in (("train", "demos"), ("valid", "valid")):
        files[f"demos_{name}.jsonl"] = [{"prompt": p, "completion": c} for p, c in made[part]]
    for name in ("label", "ppo", "eval", *others):
        files[f"prompts_{name}.jsonl"] = [{"prompt": p} for p, _ in made[name]]
    for part, rounds in ROUNDS.items():
        pools = [(rows, lambda s: s.mean, {}) for rows in parts[part].values() for _ in range(rounds)]
        files[f"rankings_{part}.jsonl"] = rankings(pools, rng, dropped)
        files[f"raters_{part}.jsonl"] = rankings(person_pools(parts[part]["movie"]), rng, dropped)
    files["pairs_test.jsonl"] = sample_pairs(parts["test"], rng)
    for name, rows in files.items():
        write_jsonl(out / name, rows)
    save_ranks(train_bpe([s.text for s in train], cfg.vocab_size), out / "vocab.tiktoken")
    margins = person_margins([s for s in train if s.domain == "movie"])
    summary = {
        "source_sha256": SHA256, "seed": cfg.seed, "vocab_size": load_tokenizer(out).n_vocab,
        "files": {name: {"rows": len(rows)} for name, rows in files.items()},
        "sentences": {part: {domain: len(rows) for domain, rows in parts[part].items()} for part in parts},
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "agreement": {domain: {"random": agreement(rows, False, cfg.seed), "same_sign": agreement(rows, True, cfg.seed)}
                      for domain, rows in parts["test"].items() if rows},
        "temperature": fit_temperature(margins), "person_comparisons": len(margins)}
    write_json(out / "summary.json", summary)
    print(f"{out}: {len(files)} files of {sum(map(len, files.values())):,} rows, described in summary.json")
    return summary

if __name__ == "__main__":
    run(main, Config)
