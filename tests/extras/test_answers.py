"""People who rank: the format of answers, the terminal, what merge accepts and refuses, the blind test, and agreement
against hand calculations: pairs, tau-b, intervals, position bias, the report."""
import contextlib
import json
import math
import re

import pytest
import torch

from common import UserError, generator
from data import read_rows, write_jsonl
from labeling import agreement, blind, merge, terminal
from labeling.agreement import compare, describe, share, signs, tau_b
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
    paths = [tmp_path / name for name in files if name != "samples"]
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
    ({**given("cy", 0, "1 2 3"), "order": [1]}, "order: .* has another type"),
    (given("cy", 0, "1 2 3", seconds="4"), "seconds: "),
    ({**SAMPLES[3], "labeler": "cy", "ties": None}, "ties: "), (given("cy", 0, "1 2"), "each of 1 to 3"),
    ({"id": "s3"}, "expected an object")])
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
    blind.main(blind.Config(evaluate=str(tmp_path), page=True))  # the same in a browser
    page = (tmp_path / "blind-sft-ppo/page.html").read_text()
    assert "P0.5" in page and "equal" not in page and not re.search("\\b(sft|ppo)\\b", page)
    saved = (tmp_path / "blind-sft-ppo/ann/answers.jsonl").rename(tmp_path / "answers-ann.jsonl")
    blind.main(blind.Config("bo", str(tmp_path), answers=str(saved)))
    assert json.loads((tmp_path / "blind-sft-ppo/bo/result.json").read_text()) == row


def answer(labeler, number, order, texts="abcd", **more):
    return {"id": f"s{number}", "prompt": f"P{number}", "labeler": labeler, "shown": list(texts), "order": order} | more


def test_tau_b_and_agreement_by_hand():
    """A tie counted as a pair: of a > b > c > d and b > a = c > d one pair is discordant, one tied, four concordant."""
    one, two = signs([["a"], ["b"], ["c"], ["d"]]), signs([["b"], ["a", "c"], ["d"]])
    assert two == {("a", "b"): -1, ("a", "c"): 0, ("a", "d"): 1, ("b", "c"): 1, ("b", "d"): 1, ("c", "d"): 1}
    assert tau_b(one, two) == pytest.approx((4 - 1) / math.sqrt(6 * 5))
    assert tau_b(one, one) == 1 and tau_b(one, signs([["d"], ["c"], ["b"], ["a"]])) == -1
    assert tau_b(one, signs([["a", "b", "c", "d"]])) is None
    found = compare({"s0": one, "s1": one, "s2": one}, {"s0": two, "s1": one, "s9": two}, 200, generator(1))
    assert found["samples"] == 2 and found["tau"] == pytest.approx((3 / math.sqrt(30) + 1) / 2, abs=1e-4)
    assert found["agree"]["share"] == pytest.approx(10 / 11, abs=1e-4) and found["agree"]["pairs"] == 11
    assert 0.8 <= found["agree"]["interval"][0] < found["agree"]["share"] < found["agree"]["interval"][1] == 1


def test_position_bias_by_hand():
    """The wrong place credited: ranked as shown, the earlier wins all six pairs; of "4 1=2 3" it wins two of five."""
    def earlier(rows):
        return describe(rows, 100, generator(1))["earlier_shown_wins"]
    rows = [answer("x", 0, "1 2 3 4"), answer("x", 1, "4 1=2 3"), answer("x", 2, ""),
            answer("x", 3, "4 3 2 1", preferences=[])]  # of a machine, which is asked in both orders
    assert earlier(rows)["share"] == pytest.approx((6 + 2) / (6 + 5), abs=1e-4)
    assert earlier([answer("x", 0, "1 2 3 4", "dcba")])["share"] == 1 and earlier([answer("x", 0, "")]) is None


def test_interval_of_a_share_covers():
    """An interval that is too narrow: of 200 samples of 30 flips of a fair coin, 95 % misses 0.5 in about ten."""
    random, missed = generator(3), 0
    for _ in range(200):
        flips = torch.rand(30, generator=random)
        low, high = share([[1 if flip < 0.5 else -1, 0] for flip in flips.tolist()], 300, random)["interval"]
        missed += not low <= 0.5 <= high
    assert 2 <= missed <= 24


def test_report_of_three_labelers_and_a_reward_model(tmp_path, monkeypatch, capsys):
    """A figure of the report in the wrong row; a name that breaks the table; a reward model read upside down."""
    write_jsonl(tmp_path / "people", [
        answer("ann", 0, "1 2 3 4", seconds=4.0), answer("ann", 1, "1=2 3=4", seconds=8.0),
        answer("ann", 2, "", seconds=1.0), answer("b|<b>", 0, "2 1 3 4", acceptable=False),
        answer("b|<b>", 1, "1=2=3=4")])
    write_jsonl(tmp_path / "cy", [{"id": "s0", "prompt": "P0", "labeler": "out/cy", "responses": list("dcba")}])
    monkeypatch.setattr(agreement, "score_samples", lambda folder, samples, device, autocast: {
        (row["prompt"], text): -ord(text) for row in samples for text in row["responses"]})
    files = f"{tmp_path}/people", f"{tmp_path}/cy"
    agreement.main(agreement.Config(files, "r/m,s/m", f"{tmp_path}/out", device="cpu"))
    facts = json.loads((tmp_path / "out/report.json").read_text())
    names = ("answers", "skipped", "all_equal", "none_acceptable", "seconds")
    assert [[row[name] for name in names] for row in facts["labelers"].values()] == [
        [3, 1, 0, 0, 4.0], [2, 0, 1, 1, None], [1, 0, 0, 0, None]]
    found = {row["one"][0] + row["two"][0]: (row["samples"], row["agree"]["share"], row["tau"])
             for row in facts["agreement"]}
    assert found == {names: pytest.approx(row, abs=1e-4) for names, row in {
        "ab": (2, 5 / 6, 4 / 6), "ao": (1, 0, -1), "bo": (1, 1 / 6, -4 / 6),
        **dict.fromkeys(("br", "bs"), (2, 5 / 6, 4 / 6)), **dict.fromkeys(("or", "os"), (1, 0, -1)),
        **dict.fromkeys(("ar", "as"), (2, 1, (1 + 4 / math.sqrt(24)) / 2))}.items()}  # b ties all of s1: no tau
    text = (tmp_path / "out/report.md").read_text()
    assert "| ann | 3 | 1 | 0 | 0 | 0.1667 | 4.0 | 1.000 (1.000 to 1.000) of 10 |" in text
    assert text in capsys.readouterr().out and "<b>" not in text
