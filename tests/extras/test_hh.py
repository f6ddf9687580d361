"""Anthropic's dialogues: every oddity of the files written by hand, and whole runs on a small archive. No network."""
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import hh
from common import UserError
from data import REPLY, TURN, read_jsonl, read_rows
from hh import Config, first_message, main, read_pairs, split_transcript, transcripts_of

WORDS = "is was quite very rather slow bright cold funny warm dull long short with and of for about again never".split()


def dialogue(*messages):
    """The transcript of messages that alternate, the person first."""
    return "".join((TURN, REPLY)[i % 2] + (f" {message}" if message else "") for i, message in enumerate(messages))


def pair(*messages, chosen="yes", rejected="no"):
    """A row of a file: a dialogue that ends in two ways."""
    return {"chosen": dialogue(*messages, chosen), "rejected": dialogue(*messages, rejected)}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, rows):
    """Write rows as the authors did: JSON lines, compressed if the name says so. Returns the path."""
    content = rows if isinstance(rows, bytes) else lines(rows)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def conversations(seed, n):
    """Rows of n conversations of one to four turns of each side, where every stage is compared anew, as in HH, and
    every first answer with two others.
    """
    rng, rows = random.Random(seed), []
    for number in range(n):
        said = []
        for _ in range(rng.randint(1, 4)):
            say, good, bad = (" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) + end for end in ("?", "!", "."))
            said.append(f"{say} {seed} {number}")
            rows.append(pair(*said, chosen=good, rejected=bad))
            if len(said) == 1:
                rows.append(pair(*said, chosen=good, rejected=bad + bad))
            said.append(good)
    return rng.sample(rows, len(rows))


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- one pair --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, prompt, response", [
    pytest.param("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant:", " Yes", id="one turn"),
    pytest.param("\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant: C",
                 "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant:", " C", id="two turns"),
    pytest.param("\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:", "", id="nothing"),
    pytest.param("\n\nHuman: Hi\n\nAssistant:One\n\nTwo \nAssistant: x", "\n\nHuman: Hi\n\nAssistant:",
                 "One\n\nTwo \nAssistant: x", id="paragraphs, and a name after one line end"),
    pytest.param("\n\nHuman: Hi\n\nAssistant: A  Human: B", "\n\nHuman: Hi\n\nAssistant:", " A  Human: B",
                 id="a name within a line"),
])
def test_split_transcript(text, prompt, response):
    """A cut at the first answer instead of the last, text lost at the cut, a name within a line taken for a turn."""
    assert split_transcript(text) == (prompt, response) and prompt + response == text


@pytest.mark.parametrize("text, reason", [
    pytest.param("", "no Assistant turn", id="empty"),
    pytest.param("\n\nHuman: Hi", "no Assistant turn", id="only Human"),
    pytest.param("Assistant: Hi", "no Assistant turn", id="no blank line"),
    pytest.param(dialogue("a", "b", "c"), "ends with Human", id="ends with Human"),
])
def test_split_transcript_refuses(text, reason):
    """A question of the person as the response that is learnt."""
    with pytest.raises(ValueError, match=f"^{reason}$"):
        split_transcript(text)


@pytest.mark.parametrize("prompt, message", [
    pytest.param(dialogue("What is  THIS?\nEh", "x", "y", ""), "what is this? eh", id="dialogue"),
    pytest.param(TURN + " a" + TURN + " b" + REPLY, "a", id="two of one side"),
    pytest.param("Be kind." + TURN + " a" + REPLY, "a", id="words before it"),
    pytest.param(REPLY + " hello" + TURN + " a" + REPLY, "a", id="assistant first"),
    pytest.param("Question" + REPLY, "question", id="no Human"),
])
def test_first_message(prompt, message):
    """One group for all dialogues with the same preface; two groups for the same question in other letters."""
    assert first_message(prompt) == message


GOOD = pair("a", "b", "c")
ODD = [
    ("kept", GOOD),
    ("kept", pair("a", "b", "c", chosen="no", rejected="yes")),            # the opposite order is no repetition
    ("kept", pair("a", chosen="Human: yes")),
    ("kept", {name: TURN + " a" + TURN + " b" + REPLY + f" {name}" for name in ("chosen", "rejected")}),
    ("kept", pair("a", chosen=" yes\n\nand so on ", rejected="caf\u00e9 \u2019")),
    ("repeated", GOOD),
    ("no Assistant turn", {"chosen": TURN + " a", "rejected": TURN + " a" + REPLY + " x"}),
    ("no Assistant turn", {"chosen": TURN + " a" + REPLY + " x", "rejected": ""}),
    ("ends with Human", {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "b", "c")}),
    ("ends with Human", {"chosen": dialogue("a", "b", "c"), "rejected": dialogue("a", "x", "c")}),
    ("prompts differ", {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "B", "c", "e")}),
    ("prompts differ", {"chosen": dialogue("a", "b  Human: c") + REPLY + " d", "rejected": dialogue("a", "b")}),
    ("empty response", pair("a", chosen="")),
    ("empty response", pair("a", rejected=" \n ")),
    ("empty response", pair("a", chosen="", rejected="")),
    ("identical", pair("a", chosen="same", rejected="same")),
    ("identical", pair("a", chosen="same", rejected="same \n")),
    ("no proper text", pair("a\0")),
    ("no proper text", pair("a", chosen="\0")),
    ("no proper text", pair("a", rejected="no \ud83d")),
]


def test_every_line_is_in_one_bin(tmp_path):
    """A line that is counted twice or not at all, or under another reason; a good pair that is changed or lost."""
    path, counts = write(tmp_path / "odd.jsonl.gz", [row for _, row in ODD]), {}
    kept = read_pairs([path], 0, counts)
    counts[str(path)]["kept"] += len(kept)
    names = [name for name, _ in ODD]
    assert counts[str(path)] == {name: names.count(name) for name in hh.BINS}
    assert [(p.prompt + p.chosen, p.prompt + p.rejected) for p in kept] == [
        (row["chosen"], row["rejected"]) for name, row in ODD if name == "kept"]
    assert all(p.prompt.endswith(REPLY) and p.domain == "odd" for p in kept)


def test_oddities_of_kept_pairs(tmp_path):
    """Descriptions that count the wrong pairs, or only one of two that contradict each other."""
    path = write(tmp_path / "odd.jsonl", [row for _, row in ODD])
    assert hh.oddities(read_pairs([path], 0, {})) == {str(path): {
        "opposite order elsewhere": 2, "two turns of one side in a row": 1, hh.NAMED: 1}}


def test_a_pair_repeated_in_another_file(tmp_path):
    """The same pair in two files of one part, or dropped since the other part has it."""
    files = [write(tmp_path / name, [GOOD, pair(name)]) for name in ("one.jsonl", "two.jsonl")]
    counts = {}
    assert len(read_pairs(files, 0, counts)) == 3
    assert [counts[str(path)]["repeated"] for path in files] == [0, 1]


@pytest.mark.parametrize("name, domain", [
    ("raw/helpful-base-train.jsonl.gz", "helpful-base"), ("harmless-base/test.jsonl.gz", "harmless-base"),
    ("x/mine.jsonl", "mine"), ("x/my.own.jsonl.gz", "my.own")])
def test_domain(tmp_path, name, domain):
    """Results of the two subsets under two names, or a file that is called ".jsonl"."""
    (tmp_path / name).parent.mkdir()
    assert read_pairs([write(tmp_path / name, [GOOD])], 0, {})[0].domain == domain


# ---- files that are not what they should be --------------------------------------------------------------------------

PACKED = gzip.compress(lines([GOOD] * 50), mtime=0)


@pytest.mark.parametrize("content, problem", [
    pytest.param(PACKED[:-20], ": damaged: ", id="cut gzip"),
    pytest.param(PACKED[:40] + bytes(8) + PACKED[48:], ": damaged: ", id="altered gzip"),
    pytest.param(PACKED[:-8] + bytes(8), ": damaged: ", id="wrong checksum"),
    pytest.param(PACKED[:5], ": damaged: ", id="cut header"),
    pytest.param(gzip.compress(b'{"chosen": "caf\xe9"}'), ": not UTF-8", id="latin-1"),
    pytest.param(b"<html>Log in</html>", ": HTML", id="HTML"),
    pytest.param(gzip.compress(b"<html>"), ": HTML", id="HTML within gzip"),
    pytest.param(b"PAR1....", ": a Parquet file", id="Parquet"),
    pytest.param(b"", ": empty", id="empty"),
    pytest.param(gzip.compress(b"\n \n"), ": empty", id="only blank lines"),
    pytest.param(lines([GOOD]) + b'{"chosen": "a', ":2: not JSON", id="cut line"),
    pytest.param(lines([GOOD, {"chosen": "a"}]), ":2: rejected: missing \\(found: chosen\\)", id="missing field"),
    pytest.param(lines([GOOD]) + b"\n" + lines([{"chosen": "a", "rejected": 1}]),
                 ":3: rejected: expected text, found int", id="number"),
    pytest.param(lines([{"chosen": None, "rejected": "a"}]), ":1: chosen: expected text, found NoneType", id="null"),
    pytest.param(lines([["a", "b"]]), ":1: expected an object .* found list", id="list"),
    pytest.param(lines([{}] * 7), r"\(and 2 more bad lines\)", id="seven bad lines"),
])
def test_bad_file(tmp_path, content, problem):
    """A traceback, half of a damaged file used, a message without the line; anything written after an error."""
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem) as caught:
        main(Config(out=str(tmp_path / "out"), train=str(path)))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert str(caught.value).count(str(path)) <= 5  # bad lines that are shown
    assert not (tmp_path / "out").exists()


def test_files_as_people_have_them(tmp_path):
    """A refusal of a file that was unpacked by a browser but kept its name, of CRLF, of a byte-order mark."""
    path, row = tmp_path / "file.jsonl.gz", {**pair("a", chosen="caf\u00e9"), "more": 1}
    content = b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n\r\n"
    for packed in (content, gzip.compress(content)):
        path.write_bytes(packed)
        assert read_rows(path, transcripts_of, "a pair") == [(row["chosen"], row["rejected"])]


def test_places_that_are_no_file(tmp_path):
    """A traceback for a folder or a missing file; a program that waits for ever at a pipe."""
    os.mkfifo(tmp_path / "pipe")
    for name, problem in ((".", "a folder"), ("no", "no such file"), ("pipe", "not a plain file")):
        with pytest.raises(UserError, match=problem):
            read_pairs([tmp_path / name], 0, {})


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Folder with four small files under the names of the downloads; a third of the test groups are in train too."""
    folder = tmp_path_factory.mktemp("raw")
    for subset, split in hh.SHA256:
        rows = conversations(f"{subset} {split}", 90 if split == "train" else 40)
        if split == "test":
            rows += conversations(f"{subset} train", 90)[:30] + [row for _, row in ODD]
        write(folder / f"{subset}-{split}.jsonl.gz", rows)
    return folder


def given(raw, out, **more):
    files = {split: ",".join(str(raw / f"{s}-{split}.jsonl.gz") for s in ("helpful-base", "harmless-base"))
             for split in ("train", "test")}
    return Config(**{"out": str(out), **files, **more})


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    """(folder, summary) of one whole run."""
    out = tmp_path_factory.mktemp("hh")
    return out, main(given(raw, out))


def groups(out, *names):
    return {first_message(row["prompt"]) for name in names for row in rows_of(out / name)}


def test_files_pass_the_project_reader(prepared):
    """Rows that the other scripts refuse, a summary that disagrees with the files."""
    out, summary = prepared
    fields = {"demos": {"prompt": str, "completion": str, "domain": str}, "prompts": {"prompt": str},
              "pairs": {"prompt": str, "chosen": str, "rejected": str, "domain": str}, "corpus": {"text": str}}
    assert sorted(path.name for path in out.glob("*.jsonl")) == sorted(summary["rows"]) and len(summary["rows"]) == 8
    for name, number in summary["rows"].items():
        rows = read_jsonl(out / name, fields[name.split("_")[0]])
        assert len(rows) == number > 0 and all(row.get("prompt", REPLY).endswith(REPLY) for row in rows)
        assert all(row.get("domain", "odd") in ("helpful-base", "harmless-base", "odd") for row in rows)
    assert json.loads((out / "summary.json").read_text()) == summary


def test_counts_add_up(prepared, raw):
    """Lines that vanish between the file and the parts."""
    out, summary = prepared
    for path, counts in summary["counts"].items():
        assert sum(counts.values()) == gzip.decompress(Path(path).read_bytes()).count(b"\n")
    train, test = ([c for path, c in summary["counts"].items() if f"-{split}." in path] for split in ("train", "test"))
    rows = summary["rows"]
    valid = sum(summary["pairs"]["valid"].values())
    assert sum(c["kept"] for c in train) == rows["pairs_reward.jsonl"] + rows["pairs_judge.jsonl"] + valid
    assert sum(c["kept"] for c in test) == rows["pairs_test.jsonl"]
    assert [c["group also in train"] for c in train + test] == [0, 0, 30, 30]


@pytest.mark.parametrize("test", [pytest.param(True, id="test files"), pytest.param(False, id="a tenth held out")])
def test_groups_never_cross(prepared, raw, tmp_path, test):
    """A later stage of a conversation in another part: the test then asks for what was learnt by heart."""
    out = prepared[0]
    if not test:
        out = tmp_path
        main(given(raw, out, test=""))
    parts = [groups(out, "pairs_reward.jsonl"), groups(out, "pairs_judge.jsonl"), groups(out, "demos_valid.jsonl"),
             groups(out, "pairs_test.jsonl")]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert groups(out, "demos_train.jsonl", "prompts_ppo.jsonl") == parts[0]
    assert groups(out, "prompts_eval.jsonl") == parts[3]
    assert [len(part) for part in parts[:3]] == ([88, 88, 4] if test else [79, 79, 4])
    assert test or len(parts[3]) == 18


def test_prompts_and_demonstrations_come_from_the_right_side(prepared):
    """SFT on rejected responses, a prompt or a demonstration that stands twice, a corpus of rejected dialogues."""
    out = prepared[0]
    reward, test = rows_of(out / "pairs_reward.jsonl"), rows_of(out / "pairs_test.jsonl")
    demos, prompts = rows_of(out / "demos_train.jsonl"), rows_of(out / "prompts_ppo.jsonl")
    assert {(d["prompt"], d["completion"]) for d in demos} == {(p["prompt"], p["chosen"]) for p in reward}
    assert len(demos) < len(reward) and len({(d["prompt"], d["completion"]) for d in demos}) == len(demos)
    assert len({row["prompt"] for row in prompts}) == len(prompts) == len({p["prompt"] for p in reward})
    assert {row["text"] for row in rows_of(out / "corpus_test.jsonl")} == {p["prompt"] + p["chosen"] for p in test}
    domains = [row["domain"] for row in reward]
    assert domains != sorted(domains) and domains != sorted(domains, reverse=True)  # the files are shuffled together


def test_same_seed_same_bytes(prepared, raw, tmp_path):
    """An order that follows Python's hash of a str; a seed that changes nothing."""
    out, cfg = prepared[0], given(raw, tmp_path / "again")
    flags = [f"--{name}={getattr(cfg, name)}" for name in ("out", "train", "test")]
    subprocess.run([sys.executable, "data.py", "hh", *flags], check=True, stdout=subprocess.DEVNULL,
                   cwd=Path(hh.__file__).parent, env={**os.environ, "PYTHONHASHSEED": "7"})
    names = sorted(path.name for path in out.iterdir())
    assert [(tmp_path / "again" / name).read_bytes() for name in names] == [(out / name).read_bytes() for name in names]
    main(given(raw, tmp_path / "other", seed=2))
    assert groups(tmp_path / "other", "pairs_reward.jsonl") != groups(out, "pairs_reward.jsonl")


def test_lengths(tmp_path):
    """Words and turns of the wrong text."""
    rows = [pair(f"a{i} b c d", "e f", "g h i", chosen="x y", rejected="z") for i in range(40)]
    summary = main(Config(out=str(tmp_path), train=str(write(tmp_path / "file.jsonl", rows))))
    assert summary["lengths"] == {"words of the prompt": [13] * 4, "words of chosen": [2] * 4,
                                  "words of rejected": [1] * 4, "turns with the response": [4] * 4}
    assert hh.percentiles(range(1, 101)) == [5, 50, 95, 100]


def test_limit(raw, tmp_path):
    """A limit on all files together instead of each."""
    summary = main(given(raw, tmp_path, limit=25))
    assert [sum(counts.values()) for counts in summary["counts"].values()] == [25] * 4


@pytest.mark.parametrize("changes, problem", [
    pytest.param({"valid_share": 0.0}, "--valid-share is 0.0", id="no share"),
    pytest.param({"valid_share": float("nan")}, "--valid-share is nan", id="nan"),
    pytest.param({"limit": -1}, "--limit is -1", id="limit"),
    pytest.param({"limit": 2, "train": "{raw}/helpful-base-train.jsonl.gz", "test": ""}, "no pairs for the part",
                 id="too few"),
    pytest.param({"train": "{raw}/helpful-base-test.jsonl.gz"}, "both in --train and in --test", id="same file"),
    pytest.param({"train": "{raw}/helpful-base-train.jsonl.gz,{raw}/no.jsonl"}, "no.jsonl: no such file", id="missing"),
    pytest.param({"train": ","}, "--train ',': no file", id="only a comma"),
])
def test_flags(raw, tmp_path, changes, problem):
    """A traceback far from its cause, or empty files, for values that can't work."""
    changes = {name: value.format(raw=raw) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(UserError, match=problem):
        main(given(raw, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_downloads(raw, prepared, tmp_path, monkeypatch):
    """Files fetched under the wrong name, fetched again when they are there, or not fetched for --test alone."""
    asked = []

    def fetched(url, path, sha256):
        asked.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((raw / path.name).read_bytes())
        assert hashlib.sha256(path.name.encode()).hexdigest() == sha256
        return path
    monkeypatch.setattr(hh, "download", fetched)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(hh, "SHA256", {key: hashlib.sha256(f"{'-'.join(key)}.jsonl.gz".encode()).hexdigest()
                                       for key in hh.SHA256})
    main(Config(out=str(tmp_path / "a")))
    base = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
    assert sorted(asked) == sorted(f"{base}/{subset}/{split}.jsonl.gz" for subset, split in hh.SHA256)
    for name in prepared[1]["rows"]:
        assert (tmp_path / "a" / name).read_bytes() == (prepared[0] / name).read_bytes()
    asked.clear()
    main(given(raw, tmp_path / "b", train=""))
    assert len(asked) == 2 and all(url.endswith("train.jsonl.gz") for url in asked)


def test_offline(tmp_path, monkeypatch):
    """A machine without a network that is not told which file to put where, or where an empty folder is left."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"put the file at .*/out/raw/helpful-base-train\.jsonl\.gz by hand: http"):
        main(Config(out=str(tmp_path / "out")))
    assert list(tmp_path.iterdir()) == []
