"""Anthropic's dialogues: every oddity of the files written by hand, and whole runs on small files. No network."""
import gzip
import json
import random
from collections import Counter

import pytest

from data import REPLY, TURN, read_rows
from prepare import hh
from prepare.hh import Config, first_message, main, split_transcript


def dialogue(*messages):
    """The transcript of messages that alternate, the person first."""
    return "".join((TURN, REPLY)[i % 2] + f" {message}" * bool(message) for i, message in enumerate(messages))


def pair(*messages, chosen="yes", rejected="no"):
    """A row of a file: a dialogue that ends in two ways."""
    return {"chosen": dialogue(*messages, chosen), "rejected": dialogue(*messages, rejected)}


def write(path, rows):
    """Write rows as the authors did: JSON lines, compressed. Returns the path as text."""
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return str(path)


def conversations(name, n):
    """Rows of n conversations of one to four turns of each side, where every stage is compared anew, as in HH."""
    rng, rows = random.Random(name), []
    for number in range(n):
        said = []
        for turn in range(rng.randint(1, 4)):
            said.append(f"{name} {number} {turn}?")
            rows += [pair(*said, chosen=f"good {turn}", rejected=bad) for bad in (["bad", "worse"] if not turn else ["bad"])]
            said.append(f"good {turn}")
    return rng.sample(rows, len(rows))


@pytest.mark.parametrize("text, prompt, response", [
    (dialogue("Hi", "A", "B", "C"), dialogue("Hi", "A", "B", ""), " C"), (dialogue("Hi", ""), dialogue("Hi", ""), ""),
    (f"{TURN} Hi{REPLY}One\n\nTwo \nAssistant: x", f"{TURN} Hi{REPLY}", "One\n\nTwo \nAssistant: x"),
    (f"{TURN} Hi{REPLY} A  Human: B", f"{TURN} Hi{REPLY}", " A  Human: B")])
def test_split_transcript(text, prompt, response):
    """A cut at the first response instead of the last, text lost at the cut, a name within a line taken for a turn."""
    assert split_transcript(text) == (prompt, response)


@pytest.mark.parametrize("prompt, message", [
    (dialogue("What is  THIS?\nEh", "x", "y", ""), "what is this? eh"), (f"Be kind.{TURN} a{REPLY}", "a"),
    (f"{REPLY} hello{TURN} a{REPLY}", "a"), (f"Question{REPLY}", "question")])
def test_first_message(prompt, message):
    """One group for all dialogues with the same preface; two groups for the same question in other letters."""
    assert first_message(prompt) == message


def test_every_line_is_in_one_bin(tmp_path):
    """A line counted twice, or under another reason; a good pair that is changed or lost; a field of another type."""
    good = pair("a", "b", "c")
    odd = [("kept", good), ("kept", pair("a", "b", "c", chosen="no", rejected="yes")), ("repeated", good),
           ("kept", {name: f"{TURN} a{TURN} b{REPLY} {name}" for name in ("chosen", "rejected")}),
           ("no Assistant turn", {"chosen": f"{TURN} a", "rejected": f"{TURN} a{REPLY} x"}),
           ("ends with Human", {"chosen": dialogue("a", "b"), "rejected": dialogue("a", "b", "c")}),
           ("prompts differ", {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "B", "c", "e")}),
           ("prompts differ", {"chosen": dialogue("a", "b  Human: c") + f"{REPLY} d", "rejected": dialogue("a", "b")}),
           ("empty response", pair("a", rejected=" \n ")), ("identical", pair("a", chosen="same", rejected="same \n")),
           ("text: holds a NUL or half a surrogate pair", pair("a\0")), ("no two texts", {"chosen": "a", "rejected": 1}), ("group also in train", pair("Mine")), ("kept", pair("a", chosen="Human: b"))]
    path = tmp_path / "odd.jsonl.gz"
    write(path, [row for _, row in odd])
    kept = hh.read_pairs([path], 0, counts := {}, {"mine"})
    assert counts == {str(path): Counter(name for name, _ in odd)}
    assert [(p["prompt"] + p["chosen"], p["prompt"] + p["rejected"]) for p in kept] == [
        (row["chosen"], row["rejected"]) for name, row in odd if name == "kept"]
    assert all(p["prompt"].endswith(REPLY) and p["domain"] == "odd" for p in kept)


@pytest.mark.parametrize("with_test", [True, False])
def test_a_whole_run(tmp_path, with_test):
    """A later stage of a conversation in another part; lines that vanish; SFT on rejected responses; unseeded order."""
    files = {part: write(tmp_path / f"harmless-base-{part}.jsonl.gz", conversations(part, n) + extra)
             for part, n, extra in (("train", 180, []), ("test", 80, conversations("train", 180)[:30]))}
    cfg = Config(out=str(tmp_path / "out"), train=files["train"], test=files["test"] if with_test else "")
    summary = main(cfg)
    rows = {name: read_rows(tmp_path / "out" / name, dict) for name in summary["rows"]}
    assert {name: len(made) for name, made in rows.items()} == summary["rows"] and len(rows) == 8
    groups = {name: {first_message(row["prompt"]) for row in made} for name, made in rows.items() if "corpus" not in name}
    parts = [groups[f"{name}.jsonl"] for name in ("pairs_reward", "pairs_judge", "demos_valid", "pairs_test")]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert list(map(len, parts)) == ([88, 88, 4, 80] if with_test else [79, 79, 4, 18])
    assert groups["demos_train.jsonl"] == groups["prompts_ppo.jsonl"] == parts[0]
    kept = sum(count["kept"] for count in summary["counts"].values())
    assert kept == sum(sum(domains.values()) for domains in summary["pairs"].values())
    assert sum(count["group also in train"] for count in summary["counts"].values()) == 30 * with_test
    reward, demos, prompts = (rows[f"{name}.jsonl"] for name in ("pairs_reward", "demos_train", "prompts_ppo"))
    assert {(d["prompt"], d["completion"]) for d in demos} == {(p["prompt"], p["chosen"]) for p in reward}
    assert len({(d["prompt"], d["completion"]) for d in demos}) == len(demos) < len(reward)
    assert len({row["prompt"] for row in prompts}) == len(prompts) == len({p["prompt"] for p in reward})
    before = {name: (tmp_path / "out" / name).read_bytes() for name in rows}
    main(Config(out=cfg.out, train=cfg.train, test=cfg.test, seed=2))
    assert {name: (tmp_path / "out" / name).read_bytes() for name in rows} != before
    main(cfg)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in rows} == before
