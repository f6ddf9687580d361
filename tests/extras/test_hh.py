"""Anthropic's dialogues: every oddity of the files written by hand, whole runs, downloads. No network."""
import gzip
import hashlib
import json
import random
from collections import Counter

import pytest

from common import UserError
from data import REPLY, TURN, read_rows
from prepare import hh
from prepare.download import download
from prepare.hh import Config, main
from prepare.own import key_of, split_transcript


def dialogue(*messages):
    """The transcript of messages that alternate, the person first."""
    return "".join((TURN, REPLY)[i % 2] + f" {message}" * bool(message) for i, message in enumerate(messages))


def pair(*messages, chosen="yes", rejected="no"):
    """A row of a file: a dialogue that ends in two ways."""
    return {"chosen": dialogue(*messages, chosen), "rejected": dialogue(*messages, rejected)}


def write(path, rows):
    """Write rows as the authors did: JSON lines, compressed if the name says so. Returns the path."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def conversations(seed, n):
    """Rows of n dialogues of one to four turns: every stage is compared anew, as in HH, and the first one twice."""
    rng, rows = random.Random(seed), []
    for number in range(n):
        turns = [f"Q{seed} {number}"]
        for turn in range(rng.randint(1, 4)):
            rows += [pair(*turns, chosen="good", rejected=bad) for bad in ("bad", "worse")][turn > 0:]
            turns += ["good", f"{turn}?"]
    return rng.sample(rows, len(rows))


@pytest.mark.parametrize("text, group, response", [
    (dialogue("What is  THIS?\nEh", "A", "B", "C"), "what is this? eh", " C"), (dialogue("Hi", ""), "hi", ""),
    (f"Be kind.{TURN} a{REPLY}One\n\nTwo \nAssistant: x", "a", "One\n\nTwo \nAssistant: x"),
    (f"{REPLY} hello{TURN} a{REPLY} A  Human: B", "a", " A  Human: B"), (f"Question{REPLY} x", "question", " x")])
def test_split_transcript(text, group, response):
    """A split at the first response instead of the last, text lost there, a name within a line taken for a turn; one
    group for all dialogues with the same preface, or two for the same question in other letters."""
    prompt = text.removesuffix(response)
    assert split_transcript(text) == (prompt, response) and key_of({"prompt": prompt}) == group


def test_every_line_is_in_one_bin(tmp_path):
    """A line counted twice, or under another reason; a good pair that is changed or lost."""
    good, differ = pair("a", "b", "c"), "prompt: not what chosen and rejected begin with"
    odd = [("kept", good), ("kept", pair("a", "b", "c", chosen="no", rejected="yes")), ("repeated", good),
           ("kept", {name: f"{TURN} a{TURN} b{REPLY} {name}" for name in ("chosen", "rejected")}),
           ("no Assistant turn", {"chosen": f"{TURN} a", "rejected": f"{TURN} a{REPLY} x"}),
           ("ends with Human", {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "b", "c")}),
           (differ, {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "B", "c", "e")}),
           (differ, {"chosen": dialogue("a", "b  Human: c") + f"{REPLY} d", "rejected": dialogue("a", "b")}),
           ("rejected: empty", pair("a", rejected=" \n ")), ("chosen: the same as rejected", pair("a", rejected="yes")),
           ("chosen: holds a NUL or half a surrogate pair", pair("a\0")), ("group also in train", pair("Mine")),
           ("rejected: expected text, found int", {"chosen": "a", "rejected": 1}),
           ("no Assistant turn", {"chosen": "a", "rejected": "b"}), ("kept", pair("a", chosen="Human: b"))]
    write(path := tmp_path / "odd.jsonl.gz", [row for _, row in odd])
    kept = hh.read_pairs([path], 0, counts := {}, {"mine"})
    assert counts == {str(path): Counter(name for name, _ in odd)} and {p["domain"] for p in kept} == {"odd"}
    assert [(p["prompt"] + p["chosen"], p["prompt"] + p["rejected"]) for p in kept] == [
        (row["chosen"], row["rejected"]) for name, row in odd if name == "kept"]


@pytest.mark.parametrize("with_test", [True, False])
def test_a_whole_run(tmp_path, with_test):
    """A later stage of a conversation in another part; lines that vanish; SFT on rejected responses; unseeded order."""
    files = {part: str(write(tmp_path / f"harmless-base-{part}.jsonl.gz", rows + conversations("train", 180)[:30]))
             for part, rows in (("train", conversations("train", 180)), ("test", conversations("test", 80)))}
    cfg = Config(out=str(tmp_path / "out"), train=files["train"], test=files["test"] if with_test else "")
    summary = main(cfg)
    rows = {name.split(".")[0]: read_rows(tmp_path / "out" / name, dict) for name in summary["rows"]}
    groups = {name: {key_of(row) for row in made} for name, made in rows.items() if name != "corpus_test"}
    parts = [groups[name] for name in ("pairs_reward", "pairs_judge", "demos_valid", "pairs_test")]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert list(map(len, parts)) == ([88, 88, 4, 80] if with_test else [79, 79, 4, 18])
    assert groups["demos_train"] == groups["prompts_ppo"] == parts[0]
    total = sum(summary["counts"].values(), Counter())
    assert total["kept"] == sum(sum(domains.values()) for domains in summary["pairs"].values())
    assert (total["repeated"], total["group also in train"]) == (30, 30 * with_test)
    reward, demos, prompts = rows["pairs_reward"], rows["demos_train"], rows["prompts_ppo"]
    assert {(d["prompt"], d["completion"]) for d in demos} == {(p["prompt"], p["chosen"]) for p in reward}
    assert len({(d["prompt"], d["completion"]) for d in demos}) == len(demos) < len(reward)
    assert len({row["prompt"] for row in prompts}) == len(prompts) == len({p["prompt"] for p in reward})
    before = {name: (tmp_path / "out" / name).read_bytes() for name in summary["rows"]}
    for seed in (2, 1):
        main(Config(out=cfg.out, train=cfg.train, test=cfg.test, seed=seed))
        assert ({name: (tmp_path / "out" / name).read_bytes() for name in before} == before) == (seed == 1)


def test_only_the_right_file_gets_the_name(tmp_path, monkeypatch):
    """A login page or half a file taken for the file, a file downloaded again, the mirror in HF_ENDPOINT ignored."""
    hub, path, sha256 = tmp_path / "hub", tmp_path / "raw" / "file", hashlib.sha256(b"right").hexdigest()
    hub.mkdir()
    (hub / "a").write_bytes(b"right")
    monkeypatch.setenv("HF_ENDPOINT", f"file://{hub}/")
    for address, expected, problem in (("a", "0" * 64, "invalid hash"), ("b", sha256, "No such file")):
        with pytest.raises(UserError, match=f"{problem}.*put the file at {path} by hand; its sha256 is {expected}"):
            download(address, path, expected)
        assert not list(path.parent.iterdir())
    assert download("a", path, sha256) == path
    (hub / "a").unlink()
    assert download("a", path, sha256).read_bytes() == b"right"
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="file: not the expected file: expected sha256"):
        download("a", path, sha256)
