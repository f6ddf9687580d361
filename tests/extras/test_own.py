"""Files of one's own: every layout in, the exact rows out; what is wrong with a file named by line and field."""
import json

import pytest

import data
from common import UserError
from prepare.own import Config, main

USER, REPLY = {"role": "user", "content": " Good?\n"}, {"role": "assistant", "content": "Yes. "}
SYSTEM, OTHER = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "No"}
ASKED, YES, NO = "\n\nHuman: Good?\n\nAssistant:", " Yes.", " No"
PAIR, PAIRED = {"prompt": "a", "chosen": " b", "rejected": " c"}, {"prompt": ASKED, "chosen": YES, "rejected": NO}
DEMO, MESSAGES = {"prompt": "a", "completion": " b"}, {"messages": [USER, OTHER, USER, REPLY]}


@pytest.fixture
def convert(checkpoints, tmp_path):
    """convert({file name: rows}, flags): (counts of the last file, {name in the output folder: rows})."""
    def run(inputs, **flags):
        for name, rows in inputs.items():
            (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        names, out = tuple(str(tmp_path / name) for name in inputs), tmp_path / "out"
        files = main(Config(**{"files": names, "out": str(out), "vocab": str(checkpoints.vocab), **flags}))
        return files.popitem()[1]["counts"], {path.name: data.read_rows(path, dict) for path in out.glob("*.jsonl")}
    return run


@pytest.mark.parametrize("row, new", [
    ({"text": "a"}, {"text": "a"}), (DEMO, DEMO), (PAIR, PAIR), ({"prompt": [USER]}, {"prompt": ASKED}),
    ({"prompt": [SYSTEM, USER], "completion": [REPLY]}, {"prompt": f"Be brief.{ASKED}", "completion": YES}),
    (MESSAGES, {"prompt": f"{ASKED} No{ASKED}", "completion": YES}), ({**PAIR, "response": " b"}, PAIR),
    ({"prompt": "Good?", "messages": [USER, REPLY]}, {"prompt": ASKED, "completion": YES}),
    ({**DEMO, "text": "a b", "weight": 1, "tools": []}, DEMO),
    ({"messages": [{**SYSTEM, "content": ""}, USER, REPLY], "text": None}, {"prompt": ASKED, "completion": YES}),
    ({"prompt": "Good?", "chosen": [USER, REPLY], "rejected": [USER, OTHER], "messages": [USER, REPLY]}, PAIRED),
    ({"chosen": f"{ASKED} Yes.", "rejected": f"{ASKED} No"}, PAIRED),
    ({"chosen": "good", "rejected": "goods"}, {"prompt": "", "chosen": "good", "rejected": "goods"}),
    *(({"prompt": "", "chosen": write(f"{ASKED} Yes."), "rejected": write(f"{ASKED} No")}, PAIRED) for write in (
        str, str.strip, lambda text: text.replace("\n", "\r\n"))),
    ({"prompt": "a", "chosen": "a b", "rejected": "a c"}, PAIR), ({"prompt": "a", "completion": "a b"}, DEMO),
    ({"prompt": "a", "responses": ["a b", "a c"]}, {"prompt": "a", "responses": [" b", " c"]}),
    ({"prompt": "a", "responses": [" b", " c", " d"]}, {"prompt": "a", "responses": [" b", " c", " d"]})])
def test_layouts(convert, row, new):
    """A prompt and a response split at another place, a lost turn, chosen and rejected the wrong way round."""
    counts, made = convert({"a.jsonl": [row, {**row, "id": 7, "domain": "x", "source": "y"}]})
    assert made["a.jsonl"] == [new, {**new, "id": 7, "domain": "x"}] and counts["field 'source' left out"] == 1


def test_every_assistant_turn_is_a_row(convert):
    """A turn that is learned twice or not at all, or whose prompt holds what comes after it."""
    _, made = convert({"a.jsonl": [MESSAGES]}, turns="all")
    assert made["a.jsonl"] == [{"prompt": ASKED, "completion": NO}, {"prompt": f"{ASKED} No{ASKED}", "completion": YES}]


@pytest.mark.parametrize("row, problem", [
    ({"prompt": "a", "completion": " "}, "completion: empty"), ({"completion": "a"}, "prompt: missing"),
    *(({**MESSAGES, name: [{"name": "f"}]}, f"{name}: not used") for name in "tools functions documents".split()),
    *(({**DEMO, name: "c"}, f"{name}: not used") for name in "image reasoning text desirable winner_model".split()),
    *(({"prompt": "a", name: "b"}, f"{name}: not used") for name in (
        "response_1", "response_b", "answer0", "better_response_id", "preference_strength", "summary")),
    *(({"prompt": "a", "responses": ["b", "c"], x: [2, 1]}, f"{x}: not used") for x in ("ranking", "score", "x")),
    ({"prompt": "a", "rejected": "b"}, "rejected: not used"), ({**DEMO, "weight": 0}, "weight: not used"),
    ({**MESSAGES, "prompt": "c"}, "prompt: not used"), ({**PAIR, "responses": ["b", "d"]}, "responses: not used"),
    ({"prompt": data.TURN + " a"}, "prompt: a dialogue"), ({"prompt": "a", "responses": ["b", "b"]}, "responses: "),
    ({"messages": [{**SYSTEM, "content": "Human: a"}, USER, REPLY]}, "messages: message 1: content: holds Human"),
    ({"messages": [{**USER, "content": f"x{ASKED} y"}, REPLY]}, "messages: message 1: content: holds Human"),
    ({"messages": [USER, SYSTEM, REPLY]}, "messages: the last two"), ({"chosen": "a", "rejected": 3}, "rejected: "),
    ({"messages": [USER, {**REPLY, "tool_calls": [1]}]}, "messages: message 2: tool_calls: not used"),
    *(({"messages": [USER, {**REPLY, name: value}]}, f"messages: message 2: {name}: not used") for name, value in (
        ("weight", 0), ("reasoning_content", "c"), ("function_call", {"name": "f"}), ("metadata", {"reasoning": "c"}))),
    ({"messages": [{**USER, "content": [{"type": "image"}]}, REPLY]}, "messages: message 1: content: expected text"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "no known layout"),
    ({"chosen": f"{ASKED} a", "rejected": f"\n\nHuman: b{ASKED} c"}, "prompt: not what")])
def test_bad_rows_are_named_and_nothing_is_written(convert, tmp_path, row, problem):
    """A row that becomes something else than its author meant, or is refused without its line and field."""
    with pytest.raises(UserError, match=rf"^[^\n]*a\.jsonl:1: {problem}.*--skip-bad"):
        convert({"b.jsonl": [DEMO], "a.jsonl": [row]})
    assert not (tmp_path / "out").exists()


def test_bad_rows_can_be_left_out(convert, tmp_path):
    """A public file refused for a few empty responses; bad rows not counted, or too many of them; an input lost."""
    rows = [{"prompt": str(i), "chosen": " a", "rejected": " b" if i > 2 else ["", " ", " a"][i]} for i in range(30)]
    counts, made = convert({"a.jsonl": rows}, skip_bad=True)
    assert made["a.jsonl"] == rows[3:] and counts["rows left out: rejected: empty"] == 2
    assert counts["rows left out: chosen: the same as rejected"] == 1
    with pytest.raises(UserError, match="more than a tenth"):
        convert({"a.jsonl": rows[:29]}, skip_bad=True)
    with pytest.raises(UserError, match=r"a\.jsonl: demonstrations and pairs"):
        convert({"a.jsonl": [DEMO, PAIR]})
    with pytest.raises(UserError, match="is an input"):
        convert({"a.jsonl": [DEMO]}, out=str(tmp_path))


def test_held_out_prompts(convert):
    """A prompt that is trained on and examined, within a file, across files or as a longer dialogue; rows lost."""
    demos = [{"prompt": f"{data.TURN} Q{i % 100}{data.REPLY}" + f" x{data.TURN} y{data.REPLY}" * (i > 99),
              "completion": f" {i}"} for i in range(200)]
    pairs = [{"prompt": f"{data.TURN} q{i}{data.REPLY}", "chosen": "a", "rejected": "b"} for i in range(50, 150)]
    _, made = convert({"a b.jsonl": demos, "c.jsonl": pairs}, test_share=0.2, valid_share=0.2)
    parts = [{row["prompt"].lower().split("\n\nas")[0] for name in ("a b", "c") for row in made[f"{name}_{part}.jsonl"]}
             for part in ("train", "valid", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 150 and sum(map(len, made.values())) == 300
    alone = [{"chosen": f"{i}", "rejected": f"b {i}"} for i in range(40)]  # all without a prompt: rows are held out
    assert len(convert({"d.jsonl": alone}, test_share=0.3)[1]["d_train.jsonl"]) in range(20, 36)


def test_counts(convert, checkpoints):
    """A count that is wrong; another truncation than that of training; rankings not made into pairs."""
    rows = [{"prompt": p, "responses": list(r)} for p, r in (("a", "bcd"), ("a", "bcd"), ("a", "dbc"), ("a ", "bc"))]
    rows.append({"prompt": "a b " * 20, "responses": [" x" * 30, "z"]})
    counts, made = convert({"a.jsonl": rows}, block_size=24, pairs=True)
    assert len(made["a.jsonl"]) == 11 and {"prompt": "a", "chosen": "b", "rejected": "d"} in made["a.jsonl"]
    for n, what in ((4, "rows are duplicates"), (2, "prompts end in a space"), (18, "responses begin with a word"),
                    (1, "prompts truncated"), (1, "responses truncated")):
        assert [counts[name] for name in counts if name.startswith(what)] == [n], what
    told = {"text": "a</s>"}, {"text": "<|im_start|>user"}, {"text": "a <b> | c"}
    assert convert({"b.jsonl": told})[0]["texts hold a special token's name (no special token here)"] == 2
    longest = len(data.load_tokenizer(checkpoints.vocab).encode_ordinary("a b " * 20))
    assert counts["tokens in the longest prompt"] == longest
