"""Anthropic's dialogues: every oddity of the files written by hand, a whole run, downloads. No network."""
import gzip
import hashlib
import json
from collections import Counter

import pytest

from common import UserError
from data import REPLY, TURN, read_rows
from prepare import hh
from prepare.download import download
from prepare.hh import Config, main
from prepare.own import key_of


def dialogue(*messages):
    """The transcript of messages that alternate, the person first."""
    return "".join((TURN, REPLY)[i % 2] + f" {message}" * bool(message) for i, message in enumerate(messages))


def pair(*messages, chosen="yes", rejected="no"):
    """A row of a file: a dialogue that ends in two ways."""
    return {"chosen": dialogue(*messages, chosen), "rejected": dialogue(*messages, rejected)}


def write(path, rows):
    """Write rows as the authors did: the path."""
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_every_line_is_in_one_bin(tmp_path):
    """A line under another reason; a good pair changed or lost; a split at the first response, or within a line."""
    good, differ = pair("a", "b", "c"), "prompt: not what chosen and rejected begin with"
    preface, inline = f"Be kind.{TURN} a{REPLY}One\n\nTwo \nAssistant: ", dialogue("a  Human: b", "A  Human: B")
    odd = [("kept", good), ("kept", {"chosen": f"{preface}x", "rejected": f"{preface}y"}),
           ("kept", {"chosen": inline, "rejected": f"{inline} c"}), ("repeated", good),
           ("kept", pair("a", "b", "c", chosen="no", rejected="yes")),
           ("kept", {name: f"{TURN} a{TURN} b{REPLY} {name}" for name in ("chosen", "rejected")}),
           ("no Assistant turn", {"chosen": f"{TURN} a", "rejected": f"{TURN} a{REPLY} x"}),
           ("ends with Human", {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "b", "c")}),
           (differ, {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "B", "c", "e")}),
           ("rejected: empty", pair("a", rejected=" \n ")), ("chosen: the same as rejected", pair("a", rejected="yes")),
           ("prompt: holds a NUL or half a surrogate pair", pair("a\0")), ("group also in train", pair("Mine")),
           ("rejected: expected text, found int", {"chosen": "a", "rejected": 1}),
           ("no Assistant turn", {"chosen": "a", "rejected": "b"})]
    write(path := tmp_path / "odd.jsonl.gz", [row for _, row in odd])
    kept = hh.read_pairs([path], counts := {}, {"mine"})
    assert counts == {str(path): Counter(name for name, _ in odd)} and {p["domain"] for p in kept} == {"odd"}
    assert [(p["prompt"] + p["chosen"], p["prompt"] + p["rejected"]) for p in kept] == [
        (row["chosen"], row["rejected"]) for name, row in odd if name == "kept"]


def test_a_whole_run(tmp_path):
    """A later stage of a conversation in another part; lines that vanish; SFT on rejected responses; unseeded order; a
    limit that forgets a part, or draws others."""
    ends = [((), "bad"), ((), "worse"), (("good", "Go on."), "bad")]  # the first turn twice, then a later stage
    lines = [pair(f"Q {i}", *more, chosen="good", rejected=bad) for i in range(180) for more, bad in ends]
    path = write(tmp_path / "harmless-base.jsonl.gz", lines + lines[:30])
    cfg = Config(out=str(tmp_path / "out"), train=str(path))
    summary = main(cfg)
    rows = {name.split(".")[0]: read_rows(tmp_path / "out" / name, dict) for name in summary["rows"]}
    groups = {name: {key_of(row) for row in made} for name, made in rows.items() if name != "corpus_test"}
    parts = [groups[name] for name in ("pairs_reward", "pairs_judge", "prompts_ppo", "demos_valid", "pairs_test")]
    assert len(set.union(*parts)) == 180 and [*map(len, parts)] == [47, 47, 46, 4, 36]
    assert groups["demos_train"] == parts[0] and groups["prompts_eval"] == parts[4]
    kept = sum(sum(domains.values()) for domains in summary["pairs"].values())
    assert summary["counts"] == {str(path): {"kept": kept, "repeated": 30}}
    reward, demos = rows["pairs_reward"], rows["demos_train"]
    assert {(d["prompt"], d["completion"]) for d in demos} == {(p["prompt"], p["chosen"]) for p in reward}
    assert len(demos) == len({p["prompt"] for p in reward}) < len(reward)
    assert len(rows["prompts_ppo"]) == len({p["prompt"] for p in rows["prompts_ppo"]}) == 2 * 46
    before = {name: (tmp_path / "out" / name).read_bytes() for name in summary["rows"]}
    for seed in (2, 1):
        main(Config(out=cfg.out, train=cfg.train, seed=seed))
        assert ({name: (tmp_path / "out" / name).read_bytes() for name in before} == before) == (seed == 1)
    few = main(Config(out=cfg.out, train=cfg.train, limit=40))  # the first of the same
    assert {sum(domains.values()) for part, domains in few["pairs"].items() if part != "valid"} == {40}
    assert rows["pairs_reward"][:40] == read_rows(tmp_path / "out" / "pairs_reward.jsonl", dict)


def test_only_the_right_file_gets_the_name(tmp_path, monkeypatch):
    """A login page or half a file taken for the file, a file downloaded again, the mirror in HF_ENDPOINT ignored."""
    path, sha256 = tmp_path / "raw" / "file", hashlib.sha256(b"right").hexdigest()
    (tmp_path / "a").write_bytes(b"right")
    monkeypatch.setenv("HF_ENDPOINT", f"file://{tmp_path}/")
    with pytest.raises(UserError, match=f"invalid hash.*put the file at {path} by hand; its sha256 is 0000"):
        download("a", path, "0" * 64)
    assert not list(path.parent.iterdir())
    assert download("a", path, sha256) == path
    (tmp_path / "a").unlink()
    assert download("a", path, sha256).read_bytes() == b"right"
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="file: not the expected file: expected sha256"):
        download("a", path, sha256)
