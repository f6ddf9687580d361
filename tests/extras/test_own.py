"""Files of one's own: every layout in, the exact rows out; what is wrong with a file named by line and field."""
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import data
import gpt2
import own
import terminal
from common import UserError

USER, ANSWER = {"role": "user", "content": " Is it good?\n"}, {"role": "assistant", "content": "Yes, it is. "}
SYSTEM, OTHER = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "No"}
MORE = {"role": "user", "content": "Why?"}
ASKED = "\n\nHuman: Is it good?\n\nAssistant:"
TWICE = "\n\nHuman: Is it good?\n\nAssistant: Yes, it is.\n\nHuman: Why?\n\nAssistant:"
HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Bye.\n\nAssistant:"
LAYOUTS = {  # name: (kind, row in, rows out)
    "text": ("corpus", {"text": "the film"}, [{"text": "the film"}]),
    "completion": ("demonstrations", {"prompt": "the film", "completion": " was good"},
                   [{"prompt": "the film", "completion": " was good"}]),
    "completion messages": ("demonstrations", {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
                            [{"prompt": "Be brief." + ASKED, "completion": " Yes, it is."}]),
    "messages": ("demonstrations", {"messages": [USER, ANSWER, MORE, OTHER]}, [{"prompt": TWICE, "completion": " No"}]),
    "alpaca": ("demonstrations", {"instruction": "Say it.", "input": "yes", "output": "Yes."},
               [{"prompt": "\n\nHuman: Say it.\n\nyes\n\nAssistant:", "completion": " Yes."}]),
    "alpaca, no input": ("demonstrations", {"instruction": "Say yes.", "output": "Yes."},
                         [{"prompt": "\n\nHuman: Say yes.\n\nAssistant:", "completion": " Yes."}]),
    "pair": ("pairs", {"prompt": "", "chosen": "good", "rejected": "bad"},
             [{"prompt": "", "chosen": "good", "rejected": "bad"}]),
    "pair messages": ("pairs", {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
                      [{"prompt": ASKED, "chosen": " Yes, it is.", "rejected": " No"}]),
    "prompt twice": ("pairs", {"prompt": "Is it good?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
                     [{"prompt": ASKED, "chosen": " Yes, it is.", "rejected": " No"}]),
    "implicit messages": ("pairs", {"chosen": [USER, ANSWER, MORE, OTHER], "rejected": [USER, ANSWER, MORE, ANSWER]},
                          [{"prompt": TWICE, "chosen": " No", "rejected": " Yes, it is."}]),
    "implicit transcripts": ("pairs", {"chosen": HH + " See you.", "rejected": HH + " See here."},
                             [{"prompt": HH, "chosen": " See you.", "rejected": " See here."}]),
    "implicit texts": ("pairs", {"chosen": "the film was funny", "rejected": "the film was full"},
                       [{"prompt": "the film was", "chosen": " funny", "rejected": " full"}]),
    "ranking": ("rankings", {"prompt": "a", "responses": [" b", " c", " d"]},
                [{"prompt": "a", "responses": [" b", " c", " d"]}]),
    "prompt": ("prompts", {"prompt": "the film"}, [{"prompt": "the film"}]),
    "prompt messages": ("prompts", {"prompt": [USER]}, [{"prompt": ASKED}]),
    "best of 4": ("pairs",
                  {"query": "a", "sample0": " b", "sample1": " c", "sample2": " d", "sample3": " e", "best": 2},
                  [{"prompt": "a", "chosen": " d", "rejected": rejected} for rejected in (" b", " c", " e")]),
    "best of 2 in ids": ("pairs", {"query": [97, 98, 300, 300], "sample0": [32, 99], "sample1": [100, 271], "best": 1},
                         [{"prompt": "ab", "chosen": "d", "rejected": " c"}]),
}
EVERY_LAYOUT = pytest.mark.parametrize("kind, row, expected", [pytest.param(*case, id=name)
                                                               for name, case in LAYOUTS.items()])


@pytest.fixture(autouse=True)
def ids_of_bytes(monkeypatch, checkpoints):
    """GPT-2's tokenizer without a network: a vocabulary that begins with the 256 bytes; 269 is its end of text."""
    monkeypatch.setattr(gpt2.tiktoken, "get_encoding", lambda name: data.load_tokenizer(checkpoints.vocab))
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and the disk is not what is tested


@pytest.fixture
def convert(checkpoints, tmp_path):
    """convert({file name: rows or bytes}, flags): (summary, {name in the output folder: rows})."""
    def run(inputs, **flags):
        for name, content in inputs.items():
            content = content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode()
            (tmp_path / name).write_bytes(content)
        names, out = ",".join(str(tmp_path / name) for name in inputs), tmp_path / "out"
        summary = own.main(own.Config(**{"files": names, "out": str(out), "vocab": str(checkpoints.vocab), **flags}))
        rows = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in out.glob("*.jsonl")}
        return summary, rows
    return run


def facts_of(convert, rows, **flags):
    """What the summary says about one file of these rows."""
    summary, _ = convert({"a.jsonl": rows}, **flags)
    (facts,) = summary["files"].values()
    return facts


# ---- every layout ----------------------------------------------------------------------------------------------------


@EVERY_LAYOUT
def test_layouts(convert, kind, row, expected):
    """A prompt and a response cut at another place, a lost turn, or chosen and rejected the wrong way round."""
    summary, made = convert({"a.jsonl": [row, {**row, "id": 7, "domain": "film", "source": "x"}]})
    (facts,) = summary["files"].values()
    assert made == {"a.jsonl": expected + [{**new, "id": 7, "domain": "film"} for new in expected]}
    assert facts["kind"] == kind and facts["rows"] == 2 * len(expected) and sum(facts["layouts"].values()) == 2
    assert facts["left_out"] == {"fields 'source'": 1} and facts["duplicates"] == len(expected)


@EVERY_LAYOUT
@pytest.mark.parametrize("content", [
    pytest.param(lambda lines: b"[" + b",\n ".join(lines) + b"]", id="array"),
    pytest.param(lambda lines: b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines) + b"\r\n", id="CRLF, blank lines and a BOM")])
def test_files_that_are_fine(convert, kind, row, expected, content):
    """A JSON array, or what editors leave behind, refused or read with a row less."""
    _, made = convert({"a.json": content([json.dumps(row).encode()] * 3)})
    assert made == {"a.jsonl": expected * 3}


def test_more_layouts_than_one(convert):
    """A file of one kind refused because its rows come from several sources."""
    demos = [(row, out) for kind, row, out in LAYOUTS.values() if kind == "demonstrations"]
    summary, made = convert({"a.jsonl": [row for row, _ in demos]})
    assert made["a.jsonl"] == [new for _, out in demos for new in out]
    assert summary["files"].popitem()[1]["layouts"] == {
        "prompt, completion": 2, "messages": 1, "instruction, output": 2}


@pytest.mark.parametrize("chosen, rejected, prompt", [
    pytest.param("the film", "the film was", "the", id="one is the beginning of the other"),
    pytest.param("good", "goods", "", id="no border"),
    pytest.param("a  b", "a  c", "a ", id="two spaces"),
    pytest.param("a\nb c", "a\nb d", "a\nb", id="line end"),
    pytest.param("a b", "a ", "", id="nothing but a space would be left")])
def test_common_beginning_of_texts(convert, chosen, rejected, prompt):
    """A word cut in two, or a response that is empty since all of it stood in the prompt."""
    _, made = convert({"a.jsonl": [{"chosen": chosen, "rejected": rejected}]})
    assert made["a.jsonl"] == [{"prompt": prompt, "chosen": chosen[len(prompt):], "rejected": rejected[len(prompt):]}]


def test_fields_that_two_layouts_have(convert):
    """A row taken for another layout because of a field that it merely carries along."""
    rows = [{**LAYOUTS["completion"][1], "best": True, "sample": "a", "text": "the film was good"}]
    assert convert({"a.jsonl": rows})[1]["a.jsonl"] == LAYOUTS["completion"][2]


def test_columns_of_a_table_that_are_empty(convert):
    """A file refused, or a row taken for another layout, because a table has a column for every field of any row."""
    rows = [{**LAYOUTS["messages"][1], "text": None, "chosen": None, "rejected": None, "prompt": None}]
    assert convert({"a.jsonl": rows})[1]["a.jsonl"] == LAYOUTS["messages"][2]


def test_an_empty_system_message_is_none(convert):
    """A public file refused because every dialogue begins with a system message that says nothing."""
    row = {"messages": [{"role": "system", "content": ""}, *LAYOUTS["messages"][1]["messages"]]}
    assert convert({"a.jsonl": [row]})[1]["a.jsonl"][0]["prompt"].endswith(LAYOUTS["messages"][2][0]["prompt"])


def test_a_growing_dialogue_is_in_one_part(convert):
    """Test prompts that are the beginning of a training prompt, or one that differs in its spaces only."""
    rows = []
    for i in range(60):
        said = f"{data.TURN} hello {i}"
        for turn in range(3):
            rows.append({"prompt": said + data.REPLY, "completion": f" yes {turn}"})
            said += f"{data.REPLY} yes {turn}{data.TURN} and {turn}?"
    rows += [{"prompt": f"the film {i}{space}", "completion": " was good"} for i in range(60) for space in ("", " ")]
    made = convert({"a.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows)).encode())}, test_share=0.3)[1]
    keys = [{own.key_of(row) for row in made[f"a_{part}.jsonl"]} for part in ("train", "test")]
    assert not keys[0] & keys[1] and len(keys[0]) + len(keys[1]) == 120
    assert len(made["a_train.jsonl"]) == sum(3 if "hello" in key else 2 for key in keys[0])


def test_alpaca_input_that_holds_nothing(convert):
    """A blank line at the end of the prompt, or the word None in it, when the field input is there but empty."""
    rows = [{"instruction": "Say yes.", "input": extra, "output": "Yes."} for extra in ("", None, " \n")]
    assert convert({"a.jsonl": rows})[1]["a.jsonl"] == LAYOUTS["alpaca, no input"][2] * 3


def test_samples_like_the_best_give_no_pair(convert):
    """A pair of two equal texts, or a public file that is refused as a whole because of one."""
    row = {"query": "a", "sample0": "b", "sample1": "c", "sample2": "b", "sample4": "d", "best": 0}
    summary, made = convert({"a.jsonl": [row]})
    assert made["a.jsonl"] == [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    assert summary["files"].popitem()[1]["left_out"] == {"fields 'sample4'": 1, "samples like another one": 1}


def test_the_tokenizer_of_gpt2_cannot_be_fetched(convert, monkeypatch):
    """A page of traceback from the network library on a machine without a network."""
    def offline(name):
        raise ConnectionError("no route")
    monkeypatch.setattr(gpt2.tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        convert({"a.jsonl": [LAYOUTS["best of 2 in ids"][1]]})


# ---- bad input -------------------------------------------------------------------------------------------------------


def leaves(value, path=()):
    """Paths of all texts in a row."""
    if isinstance(value, str):
        return [path]
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [leaf for key, item in inside for leaf in leaves(item, (*path, key))]


def with_leaf(row, path, value):
    """A copy of row with another value in this place."""
    row = inner = json.loads(json.dumps(row))
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return row


@EVERY_LAYOUT
@pytest.mark.parametrize("value", [pytest.param("a\0b", id="NUL"), pytest.param("a\ud83d", id="lone surrogate"),
                                   pytest.param(3, id="number"), pytest.param({"text": "a"}, id="object")])
def test_bad_texts_are_named(convert, tmp_path, kind, row, expected, value):
    """A text that no model can be trained on, or something that is no text, in any place of any layout."""
    for path in leaves(row):
        with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{path[0]}") as error:
            convert({"a.jsonl": [row, with_leaf(row, path, value)]})
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@EVERY_LAYOUT
def test_bad_lines_of_every_layout(convert, tmp_path, kind, row, expected):
    """A traceback, or a line without its number, for files as people have them."""
    line = json.dumps(row)
    for bad, problem in ((line[:-2], "not JSON"), (line[:-1] + ', "x": 1, "x": 2}', "twice"), ("{}", "no known layout"),
                         (line[:-1] + ', "x": NaN}', "NaN"), (line[:-1] + ', "x": 1e999}', "not a finite number"),
                         (f"[{line}]", "found list"), (json.dumps(line), "found str"), ("null", "found NoneType")):
        with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{problem}"):
            convert({"a.jsonl": f"{line}\n{bad}\n{line}".encode()})
    for content, problem in ((b" \n", "empty"), (b"[]", "empty"), (gzip.compress(line.encode()), "gzip"),
                             (line.encode("utf-16"), "UTF-16"), (line.encode() + b"\xe9", "not UTF-8")):
        with pytest.raises(UserError, match=rf"a\.jsonl: .*{problem}"):
            convert({"a.jsonl": content})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row, problem", [
    pytest.param({"prompt": "a", "completion": " "}, "completion: empty", id="empty completion"),
    pytest.param({"completion": "a"}, r"prompt: missing \(found: completion\)", id="no prompt"),
    pytest.param({"prompt": "a", "response": "b"}, "response: not used by the layout prompt", id="response"),
    pytest.param({"prompt": "a", "completion": "b", "label": False}, "label: not used", id="unpaired"),
    pytest.param({"question": "q", "chosen": "a", "rejected": "b"}, "question: not used", id="question"),
    pytest.param({"instruction": "q", "output": "a", "system": "s"}, "system: not used", id="Alpaca with a system"),
    pytest.param({"prompt": "a", "responses": ["b", "c"], "ranks": [2, 1]}, "ranks: not used", id="ranks"),
    pytest.param({"text": "a", "parent_id": "x"}, "parent_id: not used", id="tree"),
    pytest.param({"prompt": data.TURN + " a"}, "does not end with Assistant:", id="dialogue without a reply"),
    pytest.param({"prompt": data.TURN + " a", "chosen": "b", "rejected": "c"}, "does not end with", id="pair of that"),
    pytest.param({"prompt": "a", "completion": "b" + " " * 100_000}, "white-space", id="long white space"),
    pytest.param({"prompt": [USER], "completion": "a"}, "completion: expected a list of messages", id="mixed"),
    pytest.param({"prompt": "a", "completion": [ANSWER]}, "prompt: expected a list of messages", id="mixed too"),
    pytest.param({"prompt": [USER, ANSWER], "completion": [ANSWER]}, "prompt: assistant before", id="assistant twice"),
    pytest.param({"prompt": [USER], "completion": [ANSWER, ANSWER]}, "completion: expected one", id="two completions"),
    pytest.param({"prompt": [USER], "completion": [MORE]}, "completion: expected one .* found user", id="user answers"),
    pytest.param({"prompt": [USER], "completion": []}, "completion: expected one .* found none", id="no completion"),
    pytest.param({"text": ""}, "text: empty", id="empty text"),
    pytest.param({"txet": "a"}, r"no known layout \(found: txet", id="misspelt"),
    pytest.param({"messages": "a"}, "messages: expected a list of messages, found str", id="messages as text"),
    pytest.param({"messages": []}, "messages: nothing at the end", id="no messages"),
    pytest.param({"messages": ["a"]}, "messages: message 1: expected role and content, found str", id="no object"),
    pytest.param({"messages": [USER, ANSWER, MORE]}, "messages: user at the end", id="ends with user"),
    pytest.param({"messages": [USER]}, "messages: user at the end", id="no assistant"),
    pytest.param({"messages": [ANSWER]}, "messages: nothing before", id="no user"),
    pytest.param({"messages": [SYSTEM, SYSTEM, USER, ANSWER]}, "message 2: role: system", id="two systems"),
    pytest.param({"messages": [USER, SYSTEM, ANSWER]}, "message 2: role: system", id="late system"),
    pytest.param({"messages": [{"role": "tool", "content": "a"}, ANSWER]}, "role: 'tool' is not", id="role"),
    pytest.param({"messages": [USER, {"role": "assistant"}]}, "message 2: content: missing", id="no content"),
    pytest.param({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2: content: empty", id="empty"),
    pytest.param({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
                 "message 1: content: expected str, found list", id="image"),
    pytest.param({"instruction": "a", "output": ""}, "output: empty", id="empty output"),
    pytest.param({"instruction": "a"}, "output: missing", id="no output"),
    pytest.param({"instruction": "a", "input": 0, "output": "b"}, "input: expected text, found int", id="input"),
    pytest.param({"prompt": "a", "chosen": "b"}, "rejected: missing", id="no rejected"),
    pytest.param({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen: the same as rejected", id="equal pair"),
    pytest.param({"prompt": [USER], "chosen": [OTHER], "rejected": [{"role": "assistant", "content": "No "}]},
                 "chosen: the same as rejected", id="equal but for white space"),
    pytest.param({"chosen": [USER, ANSWER], "rejected": [USER]}, "rejected: expected one .* none", id="no answer"),
    pytest.param({"chosen": [USER, ANSWER], "rejected": [MORE, OTHER]}, "prompt: nothing before", id="other dialogue"),
    pytest.param({"chosen": [USER, ANSWER], "rejected": "No"}, "rejected: expected a list of", id="mixed pair"),
    pytest.param({"prompt": "What?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "prompt: it is not in",
                 id="another prompt"),
    pytest.param({"chosen": HH + " a", "rejected": HH}, "rejected: empty", id="empty answer"),
    pytest.param({"chosen": HH + " a", "rejected": "\n\nHuman: Hi."}, "rejected: a transcript", id="no Assistant"),
    pytest.param({"chosen": HH + " a\n\nHuman: b", "rejected": HH + " c"}, "chosen: a transcript", id="Human ends"),
    pytest.param({"chosen": HH + " a", "rejected": "\n\nHuman: No." + HH + " b"}, "another prompt", id="differ"),
    pytest.param({"prompt": "a", "responses": ["b"]}, "responses: 1 of them", id="one response"),
    pytest.param({"prompt": "a", "responses": ["b", "c", "b"]}, "responses: the same text twice", id="same twice"),
    pytest.param({"prompt": [USER], "responses": ["b", "c"]}, "prompt: expected str, found list", id="ranking"),
    pytest.param({"prompt": [USER, ANSWER]}, "prompt: assistant before the response", id="prompt ends with assistant"),
    pytest.param({"query": "a", "sample0": "b", "best": 0}, "sample1: missing", id="best of one"),
    pytest.param({"query": "a", "sample0": "b", "sample1": "c", "best": 2}, "best: .* 0 to 1", id="too large"),
    pytest.param({"query": "a", "sample0": "b", "sample1": "c", "best": True}, "best: .* whole number", id="true"),
    pytest.param({"query": "a", "sample0": "b", "sample1": "b", "best": 0}, "best: all samples", id="all the same"),
    pytest.param({"query": [1], "sample0": [97], "sample1": [300], "best": 0}, "rejected: empty", id="only padding"),
    pytest.param({"query": [1], "sample0": [97], "sample1": [-1], "best": 0}, "sample1: expected a text", id="bad id"),
    pytest.param({"query": [1], "sample0": [97], "sample1": [1.5], "best": 0}, "sample1: expected a text", id="no id"),
    pytest.param({"text": "a", "domain": "b\0"}, "domain: holds a NUL", id="domain"),
])
def test_bad_rows_are_named(convert, tmp_path, row, problem):
    """A row that becomes something else than its author meant, or is refused without its line and field."""
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{problem}") as error:
        convert({"a.jsonl": [row]})
    assert str(error.value).count("a.jsonl") == 1 and not (tmp_path / "out").exists()


def test_kinds_do_not_mix(convert, tmp_path):
    """Pairs that are trained on as demonstrations because the first line looked so, and files half written."""
    rows = [LAYOUTS["completion"][1], LAYOUTS["messages"][1], LAYOUTS["pair"][1], LAYOUTS["prompt"][1]]
    with pytest.raises(UserError, match=r"b\.jsonl:3: .*pairs after demonstrations.*b\.jsonl:4: .*prompts after"):
        convert({"a.jsonl": rows[:1], "b.jsonl": rows})
    assert not (tmp_path / "out").exists()


def test_files_that_would_be_written_over(convert, tmp_path, checkpoints):
    """An input lost, or one output that takes the place of another."""
    row = [LAYOUTS["text"][1]]
    with pytest.raises(UserError, match="the same name"):
        convert({"a.jsonl": row, "A.json": row})
    with pytest.raises(UserError, match="written over"):
        convert({"a.jsonl": row}, out=str(tmp_path))
    with pytest.raises(UserError, match="written over"):
        convert({"a.jsonl": row}, files=f"{tmp_path}/nowhere/../a.jsonl", out=str(tmp_path))
    with pytest.raises(UserError, match="written over"):
        convert({"a.jsonl": row, "summary.json": row}, out=f"{tmp_path}/nowhere/..")
    assert json.loads((tmp_path / "a.jsonl").read_text()) == row[0]
    for flags, problem in (({"files": ""}, "name your files"), ({"block_size": 3}, "--block-size is 3"),
                           ({"test_share": 1.0}, "--test-share is 1.0"), ({"test_share": float("nan")}, "--test-share"),
                           ({"vocab": "nowhere"}, "--vocab: nowhere: no tokenizer"),
                           ({"files": "nowhere.jsonl"}, "no such file"),
                           ({"files": str(tmp_path)}, "a folder"), ({"out": f"{tmp_path}/a.jsonl"}, "--out .*")):
        with pytest.raises(UserError, match=problem):
            convert({"a.jsonl": row}, **flags)


def mutated(content, rng):
    """A file with a fault: flipped bytes, a cut or lost piece, or a value of another type in one place."""
    fault = rng.randrange(4)
    if fault == 0:
        content = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif fault == 1:
        content = content[:rng.randrange(len(content))]
    elif fault == 2:
        start = rng.randrange(len(content))
        content = content[:start] + content[start + rng.randint(1, 9):]
    else:
        rows = [json.loads(line) for line in content.splitlines()]
        inner, key = rows, rng.randrange(len(rows))
        while isinstance(inner[key], (dict, list)) and inner[key] and rng.random() < 0.8:
            inner = inner[key]
            key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner[key] = rng.choice([None, True, 0, -1, 2.5, "", "x", [], ["x"], [None], {}, {"role": "user"}, 10**30])
        content = "\n".join(map(json.dumps, rows)).encode()
    return bytes(content)


@EVERY_LAYOUT
def test_damaged_files_never_end_in_a_traceback(tmp_path, checkpoints, kind, row, expected):
    """Any exception but UserError, for 120 faults in a file of each layout, until the rows are bytes again."""
    rng, outcomes, enc = random.Random(f"{row}"), set(), data.load_tokenizer(checkpoints.vocab)
    good = "\n".join(json.dumps(each) for each in (row, {**row, "id": "x"})).encode()
    for _ in range(120):
        (tmp_path / "a.jsonl").write_bytes(mutated(good, rng))
        try:
            _, rows, _, left_out = own.read_own(tmp_path / "a.jsonl")
            own.describe(rows, enc, 16)
            json.dumps([rows, left_out], ensure_ascii=False).encode()
            outcomes.add("success")
        except UserError as error:
            assert str(error).startswith(str(tmp_path / "a.jsonl"))
            outcomes.add("error")
    assert outcomes == {"success", "error"}


# ---- the report ------------------------------------------------------------------------------------------------------


def test_lengths(convert):
    """Percentiles of the wrong field, off by one, or of rows in the order of the file."""
    sizes = random.Random(0).sample(range(1, 102), 101)  # a digit and a letter are a token each: none is merged
    rows = [{"prompt": "7" if size > 20 else "", "completion": "xz" * (size // 2) + "x" * (size % 2)} for size in sizes]
    facts = facts_of(convert, rows, block_size=60)
    assert facts["tokens"]["response"] == {"5": 6, "50": 51, "95": 96, "max": 101, "cut": round(44 / 101, 4)}
    assert facts["tokens"]["prompt"] == {"5": 0, "50": 1, "95": 1, "max": 1, "cut": 0.0}


def test_corpus_is_never_cut(convert):
    """A warning about texts longer than the block size, which are packed."""
    assert facts_of(convert, [{"text": "x" * 50}], block_size=8)["tokens"] == {
        "text": {"5": 50, "50": 50, "95": 50, "max": 50, "cut": 0.0}}


@pytest.mark.parametrize("fact, rows, count", [
    pytest.param("duplicates", [{"prompt": "a", "completion": " b", "id": i} for i in "xyz"], 2, id="duplicates"),
    pytest.param("repeated_prompts", [{"prompt": prompt, "completion": f" {i}"}
                                      for i, prompt in enumerate(["a", "b", "a", "", ""])], 1, id="repeated prompts"),
    pytest.param("conflicts", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in
                               ("abc", "acb", "abc", "zbc", "acd")], 1, id="conflicting pairs"),
    pytest.param("conflicts", [{"prompt": "a", "responses": list(r)} for r in ("bcd", "dbc")], 2, id="rankings"),
    pytest.param("cut_to_equal", [{"prompt": "", "chosen": "xzxzxzx" + end, "rejected": "xzxzxzx"} for end in "xz"] +
                 [{"prompt": "", "chosen": "xzxzxz", "rejected": "xzxzxzx"}], 2, id="equal after the cut"),
    pytest.param("no_room", [{"prompt": "z" * n, "completion": " a"} for n in (5, 6, 7, 8)], 2, id="no room"),
    pytest.param("glued", [{"prompt": prompt, "completion": text} for prompt, text in
                           (("a", "b"), ("a ", "b"), ("a", " b"), ("", "b"), ("a", "\nb"), (ASKED, "b"))],
                 2, id="glued"),
    pytest.param("echoes", [{"prompt": prompt, "completion": "the film was"} for prompt in ("the film", "film", "")],
                 1, id="prompt in the response"),
    pytest.param("literal_end", [{"prompt": prompt, "completion": text} for prompt, text in
                                 (("a", " b" + data.END), (data.END, " b"), ("a", " b"))], 2, id="literal end")])
def test_facts(convert, capsys, fact, rows, count):
    """A count that is wrong, or that is nowhere said."""
    assert facts_of(convert, rows, block_size=8)[fact] == count
    assert f"{count} {own.FACTS[fact]}" in capsys.readouterr().out


def test_cut_is_that_of_training(convert, checkpoints):
    """A report about another cut than the one that sft.py makes."""
    rng, enc = random.Random(1), data.load_tokenizer(checkpoints.vocab)
    rows = [{"prompt": "x" * rng.randrange(20), "completion": "z" * rng.randrange(1, 30)} for _ in range(200)]
    found, prompts, responses = facts_of(convert, rows, block_size=24)["tokens"], 0, 0
    for row in rows:
        prompt = data.encode_prompt(enc, row["prompt"], 12)
        prompts += prompt != data.encode_prompt(enc, row["prompt"], 999)
        responses += data.encode_response(enc, row["completion"], 24 - len(prompt))[-1] != enc.eot_token
    assert (found["prompt"]["cut"], found["response"]["cut"]) == (prompts / 200, responses / 200)
    assert 0 < prompts < 200 and 0 < responses < 200


def test_prompts_in_common(convert, capsys):
    """Training and test data that share prompts without a word; or shared empty prompts, which mean nothing."""
    demos = [{"prompt": str(i), "completion": " b"} for i in [0, 0, 1, 2, ""]]
    prompts = [{"prompt": str(i)} for i in [1, 0, 5, ""]]
    summary, _ = convert({"a.jsonl": demos, "b.jsonl": prompts, "c.jsonl": [{"prompt": "z"}]})
    assert list(summary["in_common"].values()) == [2]
    assert "a.jsonl are also in" in (out := capsys.readouterr().out) and "2 prompts of" in out


def test_held_out_prompts(convert):
    """A prompt that is trained on and examined, within a file or across files; rows lost; a split that moves."""
    demos = [{"prompt": str(i % 100), "completion": f" {i}"} for i in range(300)]
    pairs = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(50, 150)]
    texts = [{"text": f"{i % 40}"} for i in range(80)]
    files = {"a.jsonl": demos, "b.jsonl": pairs, "c.jsonl": texts}
    summary, made = convert(files, test_share=0.3)
    key = {name: {own.key_of(row) for row in rows} for name, rows in made.items()}
    assert not (key["a_train.jsonl"] | key["b_train.jsonl"]) & (key["a_test.jsonl"] | key["b_test.jsonl"])
    assert not key["c_train.jsonl"] & key["c_test.jsonl"] and "a.jsonl" not in made
    assert [row for row in demos if row["prompt"] in key["a_test.jsonl"]] == made["a_test.jsonl"]
    assert len(made["a_train.jsonl"]) + len(made["a_test.jsonl"]) == 300 and 15 < len(key["a_test.jsonl"]) < 45
    assert list(summary["files"].values())[0]["written"].popitem()[1] == len(made["a_test.jsonl"])
    assert convert(files, test_share=0.3)[1] == made != convert(files, test_share=0.3, seed=2)[1]
    with pytest.raises(UserError, match="leaves a part empty"):
        convert({"a.jsonl": [{"prompt": "", "chosen": f"a {i}", "rejected": "b"} for i in range(9)]}, test_share=0.3)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, left", [
    pytest.param(["a b.jsonl", "c.json", "--seed", "3"], ["--seed", "3", "--files=a b.jsonl,c.json"], id="words"),
    pytest.param(["--files", "a", "--seed", "3"], ["--files", "a", "--seed", "3"], id="flags only"),
    pytest.param([], [], id="nothing")])
def test_words_become_a_flag(monkeypatch, words, left):
    """A file name with a space in two, a flag taken for a file, or the value of a flag."""
    monkeypatch.setattr(sys, "argv", ["data.py own", *words])
    terminal.words_for("files", several=True)
    assert sys.argv == ["data.py own", *left]


def test_from_the_command_line(tmp_path, checkpoints):
    """An import circle, a file name that is no known argument, a report that cannot be printed, or no exit code."""
    data.write_jsonl(tmp_path / "my pairs.jsonl", [LAYOUTS["pair"][1]])
    data.write_jsonl(tmp_path / "demos.jsonl", [{**LAYOUTS["messages"][1], "\x1b\u2028\u00e9": 1}])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 1}\n')
    script = Path(own.__file__).with_name("data.py")

    def call(*names):
        return subprocess.run([sys.executable, script, "own", *names, "--vocab", checkpoints.vocab, "--out", "out"],
                              cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    bad = call("demos.jsonl", "bad.jsonl")
    assert (bad.returncode, bad.stdout) == (2, "") and not (tmp_path / "out").exists()
    assert bad.stderr == "error: bad.jsonl:2: prompt: expected str, found int\n"
    good = call("my pairs.jsonl", "demos.jsonl")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.endswith(
        "\npython reward.py --model CHECKPOINT --train 'out/my pairs.jsonl' --pairs '' --sft CHECKPOINT "
        "--out out/own/reward\n"
        "python sft.py --model CHECKPOINT --train out/demos.jsonl --test HELD_OUT --out out/own/sft\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"demos.jsonl", "my pairs.jsonl", "summary.json"}
