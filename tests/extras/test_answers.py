"""People who rank: the format of answers, the terminal, what merge accepts and refuses, the blind test."""
import contextlib
import json
import re

import pytest

from common import UserError
from data import read_rows, write_jsonl
from labeling import blind, merge, terminal
from labeling.answers import levels_of, parse_order, ranking_of, write_order

SAMPLES = [{"id": f"s{i}", "prompt": f"\x1b[2J {i}", "responses": [f" {word} {i}" for word in "abc"]} for i in range(4)]


def given(labeler, number, order, **more):
    """One answer to a sample whose responses were shown in the order in which they are stored."""
    sample = SAMPLES[number]
    return {"id": sample["id"], "prompt": sample["prompt"], "labeler": labeler, "shown": sample["responses"],
            "order": order, **more}


def test_orders_levels_and_rankings():
    """A misread order; tied responses that become a pair to train on; a ranking that loses part of the order."""
    assert parse_order("3142", 4) == parse_order(" 3,1, 4,2 ", 4) == [[3], [1], [4], [2]]
    assert parse_order("3 = 1, 42", 4) == [[3, 1], [4], [2]] and write_order([[3, 1], [4], [2]]) == "1=3 4 2"
    for wrong in "", "314", "31422", "3141", "3145", "0123", "=3142", "3142=", "3==142", "3-1-4-2", "abc", "³142":
        with pytest.raises(ValueError):
            parse_order(wrong, 4)
    answer = given("ann", 0, "3=1 2")
    assert levels_of(answer) == [[" a 0", " c 0"], [" b 0"]] == levels_of(ranking_of(answer))
    assert ranking_of(answer)["responses"] == [" a 0", " b 0"] and ranking_of(answer)["ties"] == [[" a 0", " c 0"]]
    assert ranking_of(given("ann", 0, "")) is None and ranking_of(given("ann", 0, "1=2=3")) is None


@pytest.fixture
def ranked(tmp_path, monkeypatch):
    """A function: a session with these keys, killed where there are no more; rows of answers and rankings."""
    def session(*keys, labeler="me"):
        left = iter(keys)
        monkeypatch.setattr("builtins.input", lambda question: next(left))
        write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
        with contextlib.suppress(StopIteration):
            terminal.main(terminal.Config(labeler, f"{tmp_path}/samples.jsonl", out=f"{tmp_path}/label me"))
        return [read_rows(tmp_path / f"label me/{name}.jsonl", dict) for name in ("answers", "rankings")]
    return session


def test_order_ties_skip_undo_and_typing_errors(ranked, tmp_path, capsys):
    """An undo of the wrong answer, or of this session's only; a typing error that is stored; text that acts."""
    rows, rankings = ranked("u", "s", "u", "12", "312!", "u", "3=1 2", "s", "?", "1=2=3", "q")
    assert [(row["id"], row["order"]) for row in rows] == [("s0", "1=3 2"), ("s1", ""), ("s2", "1=2=3")]
    one, two, three = terminal.shown_to("me", SAMPLES[0])
    assert [(row["responses"], row["ties"]) for row in rankings] == [([one, two], [[one, three]])]
    out = capsys.readouterr().out
    assert "nothing to undo" in out and "each of 1 to 3" in out and "3 answered, 1 left" in out
    assert r"\x1b[2J 0 ..." in out and "\x1b" not in out
    assert f"--train '{tmp_path}/label me/rankings.jsonl' --epochs 1280 --out '{tmp_path}/reward-label me'" in out
    rows, _ = ranked("u", "u", "321!", "s")  # killed: every answer is on disk
    assert [(row["order"], row.get("acceptable")) for row in rows] == [("1=3 2", None), ("3 2 1", False), ("", None)]


def test_labelers_see_different_orders_and_do_not_overwrite_each_other(ranked, tmp_path):
    """Position bias that looks like agreement; one labeler's evening lost to another's, or to a reward model's."""
    assert any(terminal.shown_to("ann", row) != terminal.shown_to("bob", row) for row in SAMPLES)
    ranked("123", "q", labeler="ann")
    for labeler in ("bob", "ann"):
        with pytest.raises(UserError, match="another labeler's"):
            ranked(labeler=labeler)
        (tmp_path / "label me/answers.jsonl").unlink(missing_ok=True)  # as a reward model leaves its folder


def merged(tmp_path, *rows):
    """ann's answers, bob's, a reward model's and these, merged: rows of answers.jsonl and rankings.jsonl."""
    files = {"ann": [given("ann", 0, "3 1=2"), given("ann", 1, "")], "bob": [given("bob", 0, "1 2 3")],
             "model": [{**SAMPLES[3], "labeler": "out/tiny/labeler"}], "more": rows, "samples": SAMPLES}
    for name, content in files.items():
        write_jsonl(tmp_path / name, content)
    paths = ",".join(str(tmp_path / name) for name in files if name != "samples")
    merge.main(merge.Config(paths, f"{tmp_path}/samples", f"{tmp_path}/out"))
    return [read_rows(tmp_path / f"out/{name}.jsonl", dict) for name in ("answers", "rankings")]


def test_labelers_merge_and_duplicates_count_once(tmp_path):
    """Answers lost or counted twice, or rankings that can't be trained on."""
    turned = {**given("bob", 0, "3 2 1"), "shown": SAMPLES[0]["responses"][::-1]}  # the same, shown otherwise
    rows, rankings = merged(tmp_path, given("ann", 0, "3 2=1"), turned, given("cy", 2, "1=2=3"))
    assert [row["labeler"] + row["id"] for row in rows] == ["anns0", "anns1", "bobs0", "out/tiny/labelers3", "cys2"]
    assert [row["responses"] for row in rankings] == [[" c 0", " a 0"], *(SAMPLES[i]["responses"] for i in (0, 3))]
    with pytest.raises(UserError, match="holds 1 answers that are in none of the files"):
        merged(tmp_path, given("dee", 2, "1=2=3"))


@pytest.mark.parametrize("row, message", [
    (given("ann", 0, "1 2 3"), "'ann' has a different answer to 's0' in .*ann"),
    (given("cy", 0, "1 2 3", id="new"), "'new' is not in .*samples"),
    (given("cy", 0, "1 2 3", shown=[" a 0", " b 0", " x"]), "'s0' .* with other texts"),
    (given("cy", 0, "1 2"), "each of 1 to 3"), ({"id": "s3"}, "expected an object")])
def test_what_does_not_fit_is_refused_by_its_line(tmp_path, row, message):
    """Answers to other texts, or two answers of one labeler, merged without a word."""
    with pytest.raises(UserError, match="more:1: .*" + message):
        merged(tmp_path, row, given("cy", 1, "1 2 3"))
    assert not (tmp_path / "out").exists()


def test_blind_result_by_hand(tmp_path, monkeypatch, capsys):
    """The wrong policy credited; ties or skips counted as losses; agreement with the judge on ties; names that show."""
    choice = {"1": "fine", "2": "=", "-1": "fine", "0.5": "s"}  # by the judge's margin: what ann prefers, or types
    rows = [{"prompt": f"P{margin}", "sft": " dull", "ppo": " fine", "judge": {"sft": 0.0, "ppo": float(margin)}}
            for margin in choice]
    write_jsonl(tmp_path / "samples.jsonl", [*rows, {**rows[0], "prompt": "equal", "ppo": " dull"}])

    def reply(question):
        if "all answered" in question:
            return "q"
        shown = capsys.readouterr().out.split("-----")[-1]
        assert "sft" not in shown and "ppo" not in shown
        wanted, number = choice[re.search(r"P(\S+) ", shown)[1]], "12"["2  ... fine" in shown]
        return number if wanted == "fine" else wanted
    monkeypatch.setattr("builtins.input", reply)
    blind.main(blind.Config("ann", str(tmp_path)))
    row = json.loads((tmp_path / "blind-sft-ppo/ann/result.json").read_text())
    assert row == {"between": ["sft", "ppo"], "win_rate": 0.8333, "interval": [0.5, 1.0], "answers": 3, "ties": 1,
                   "skipped": 1, "judge_win_rate": 0.6667, "judged": 2, "judge_agrees": 0.5}
