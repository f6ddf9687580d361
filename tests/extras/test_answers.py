"""People who rank: the format of answers, the terminal, what merge accepts and refuses, the blind test."""
import contextlib
import json
import re

import pytest

from common import UserError
from data import read_rankings, write_jsonl
from labeling import blind, merge, terminal
from labeling.answers import levels_of, parse_order, ranking_of, write_order
from labeling.terminal import shown_to

SAMPLES = [{"id": f"s{i}", "prompt": f"Prompt {i}", "responses": [f" {word} {i}" for word in "abc"]} for i in range(4)]


def given(labeler, sample, order, **more):
    """One answer to a sample whose responses were shown in the order in which they are stored."""
    return {"id": sample["id"], "prompt": sample["prompt"], "labeler": labeler, "shown": sample["responses"],
            "order": order, "seconds": 1.5, **more}


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_orders_levels_and_rankings():
    """A misread order; tied responses that become a pair to train on; a ranking that loses part of the order."""
    assert parse_order("3142", 4) == parse_order(" 3,1, 4,2 ", 4) == [[3], [1], [4], [2]]
    assert parse_order("3 = 1, 42", 4) == [[3, 1], [4], [2]] and write_order([[3, 1], [4], [2]]) == "1=3 4 2"
    for wrong in "", "314", "31422", "3141", "3145", "0123", "=3142", "3142=", "3==142", "3-1-4-2", "abc", "³142":
        with pytest.raises(ValueError):
            parse_order(wrong, 4)
    answer = given("ann", SAMPLES[0], "3=1 2")
    assert levels_of(answer) == [[" a 0", " c 0"], [" b 0"]] == levels_of(ranking_of(answer))
    assert ranking_of(answer)["responses"] == [" a 0", " b 0"] and ranking_of(answer)["ties"] == [[" a 0", " c 0"]]
    assert ranking_of(given("ann", SAMPLES[0], "")) is None and ranking_of(given("ann", SAMPLES[0], "1=2=3")) is None


@pytest.fixture
def ranked(tmp_path, monkeypatch):
    """A function: a session with these keys, then quit (or, with an error, killed); rows of answers and rankings."""
    def session(*keys, samples=SAMPLES, labeler="me", end=None):
        left = iter(keys)
        monkeypatch.setattr("builtins.input", lambda question: next(left) if end else next(left, "q"))
        write_jsonl(tmp_path / "samples.jsonl", samples)
        with pytest.raises(end) if end else contextlib.nullcontext():
            terminal.main(terminal.Config(labeler, f"{tmp_path}/samples.jsonl", out=f"{tmp_path}/label me"))
        return [rows_of(tmp_path / f"label me/{name}.jsonl") for name in ("answers", "rankings")]
    return session


def test_order_ties_skip_undo_and_typing_errors(ranked, tmp_path, capsys):
    """An undo that removes the wrong answer or can't reach the last session; a typing error that is stored."""
    rows, rankings = ranked("u", "s", "u", "12", "312!", "u", "3=1 2", "s", "?", "1=2=3")
    assert [(row["id"], row["order"]) for row in rows] == [("s0", "1=3 2"), ("s1", ""), ("s2", "1=2=3")]
    one, two, three = shown_to("me", SAMPLES[0])
    assert [(row["responses"], row["ties"]) for row in rankings] == [([one, two], [[one, three]])]
    out = capsys.readouterr().out
    assert "nothing to undo" in out and "each of 1 to 3" in out and "3 answered, 1 left" in out
    assert f"--train '{tmp_path}/label me/rankings.jsonl' --epochs 1280 --out '{tmp_path}/reward-label me'" in out
    rows, _ = ranked("u", "u", "321!", "s", end=StopIteration)  # killed: every answer is on disk
    assert [(row["order"], row.get("acceptable")) for row in rows] == [("1=3 2", None), ("3 2 1", False), ("", None)]


def test_one_key_decides_between_two(ranked):
    """A pair, whose answer is one key, asked like a ranking."""
    pairs = [{**row, "responses": row["responses"][:2]} for row in SAMPLES]
    rows, _ = ranked("2", "1 !", "=", "3", "s!", samples=pairs)
    assert [(row["order"], row.get("acceptable")) for row in rows] == [
        ("2 1", None), ("1 2", False), ("1=2", None), ("", None)]


def test_labelers_see_different_orders_and_do_not_overwrite_each_other(ranked, tmp_path):
    """Position bias that looks like agreement; one labeler's evening lost to another's, or to a reward model's."""
    assert any(shown_to("ann", row) != shown_to("bob", row) for row in SAMPLES)
    ranked("123", labeler="ann")
    with pytest.raises(UserError, match="another labeler's"):
        ranked("123", labeler="bob")
    (tmp_path / "label me/answers.jsonl").unlink()  # as a reward model leaves its folder
    with pytest.raises(UserError, match="another labeler's"):
        ranked("123", labeler="ann")


def test_nasty_text_stays_text_and_within_the_terminal(monkeypatch, capsys):
    """A line wider than the terminal, or a response that acts on it."""
    monkeypatch.setenv("COLUMNS", "60")
    terminal.show("1 of 2", "The film", ["\x1b[2J" + " good" * 20, " \u202ebad" * 30])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) < 60 and line.isprintable() for line in lines)
    assert sum("\\x1b" in line for line in lines) == 1 and " ".join(lines).count("good") == 20


@pytest.fixture
def merged(tmp_path):
    """A function that merges files of ann's, bob's and a reward model's: rows of answers.jsonl and rankings.jsonl."""
    write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    write_jsonl(tmp_path / "ann.jsonl", [given("ann", SAMPLES[0], "3 1=2"), given("ann", SAMPLES[1], "")])
    write_jsonl(tmp_path / "bob.jsonl", [given("bob", SAMPLES[0], "1 2 3"), given("bob", SAMPLES[2], "1=2=3")])
    write_jsonl(tmp_path / "model.jsonl", [{**SAMPLES[3], "labeler": "out/tiny/labeler"}])

    def files(*names):
        merge.main(merge.Config(",".join(f"{tmp_path}/{name}.jsonl" for name in names), f"{tmp_path}/samples.jsonl",
                                f"{tmp_path}/out"))
        return rows_of(tmp_path / "out/answers.jsonl"), rows_of(tmp_path / "out/rankings.jsonl")
    return files


def test_three_labelers_merge_and_duplicates_count_once(merged, tmp_path):
    """Answers lost or counted twice, or rankings that can't be trained on."""
    turned = {**given("bob", SAMPLES[0], "3 2 1"), "shown": SAMPLES[0]["responses"][::-1]}  # the same, shown otherwise
    write_jsonl(tmp_path / "again.jsonl", [given("ann", SAMPLES[0], "3 2=1"), turned])
    rows, rankings = merged("ann", "bob", "model", "again")
    assert [row["labeler"] + row["id"] for row in rows] == ["anns0", "anns1", "bobs0", "bobs2", "out/tiny/labelers3"]
    assert [row["responses"] for row in read_rankings(tmp_path / "out/rankings.jsonl")] == [
        [" c 0", " a 0"], [" a 0", " b 0", " c 0"], [" a 3", " b 3", " c 3"]]
    assert merged("out/answers")[1] == rankings  # what was merged can be merged
    with pytest.raises(UserError, match="holds 2 answers that are in none of the files"):
        merged("bob", "model")


@pytest.mark.parametrize("row, message", [
    (given("ann", SAMPLES[0], "1 2 3"), r"'ann' has a different answer to 's0' in .*ann\.jsonl"),
    ({**given("cy", SAMPLES[0], "1 2 3"), "id": "new"}, r"'new' is not in .*samples\.jsonl"),
    ({**given("cy", SAMPLES[0], "1 2 3"), "shown": [" a 0", " b 0", " x"]}, "'s0' .* with other texts"),
    (given("cy", SAMPLES[0], "1 2"), "each of 1 to 3"), ({"id": "s3"}, "expected an object"), ([], "found list")])
def test_what_does_not_fit_is_refused_by_its_line(merged, tmp_path, row, message):
    """Answers to other texts, or two answers of one labeler, merged without a word."""
    write_jsonl(tmp_path / "bad.jsonl", [row, given("cy", SAMPLES[1], "1 2 3")])
    with pytest.raises(UserError, match=r"bad\.jsonl:1: .*" + message):
        merged("ann", "bob", "bad")
    assert not (tmp_path / "out").exists()


def test_blind_result_by_hand(tmp_path, monkeypatch, capsys):
    """The wrong policy credited; ties or skips counted as losses; agreement with the judge on ties; names that show."""
    choice = {1.0: "ppo", 2.0: "=", -1.0: "ppo", 0.5: "s"}  # by the judge's margin: what ann prefers
    rows = [{"prompt": f"P{margin}", "sft": f" dull {margin}", "ppo": f" fine {margin}",
             "judge": {"sft": 0.0, "ppo": margin}} for margin in choice]
    write_jsonl(tmp_path / "samples.jsonl", [*rows, {**rows[0], "prompt": "equal", "ppo": " dull 1.0"}])

    def reply(_):
        asked.append(capsys.readouterr().out)
        number, text, margin = re.findall(r"(1) .*(fine|dull) (\S+)", asked[-1])[-1]
        return ("1" if text == "fine" else "2") if choice[float(margin)] == "ppo" else choice[float(margin)]
    asked = []
    monkeypatch.setattr(terminal, "ask", lambda question: "q" if "all answered" in question else reply(question))
    blind.main(blind.Config("ann", str(tmp_path)))
    assert len(asked) == 4 and "sft" not in "".join(asked[1:]) and "ppo" not in "".join(asked[1:])
    assert "ann prefers ppo to sft: 0.833" in capsys.readouterr().out
    row = json.loads((tmp_path / "blind-sft-ppo/ann/result.json").read_text())
    assert row["win_rate"] == pytest.approx((1 + 0.5 + 1) / 3, abs=1e-4) and row["answers"] == 3
    assert (row["ties"], row["skipped"], row["judged"], row["judge_agrees"]) == (1, 1, 2, 0.5)
    assert row["judge_win_rate"] == pytest.approx(2 / 3, abs=1e-4)
    assert 0.5 <= row["interval"][0] < row["win_rate"] < row["interval"][1] <= 1
