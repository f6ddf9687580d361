"""Agreement of labelers against hand calculations: pairs, tau-b, intervals, position bias, the report."""
import json
import math

import pytest
import torch

from common import generator
from data import write_jsonl
from labeling import agreement
from labeling.agreement import compare, describe, share, signs, tau_b


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
    agreement.main(agreement.Config(f"{tmp_path}/people,{tmp_path}/cy", "reward", f"{tmp_path}/out", device="cpu"))
    facts = json.loads((tmp_path / "out/report.json").read_text())
    names = ("answers", "skipped", "all_equal", "none_acceptable", "seconds")
    assert [[row[name] for name in names] for row in facts["labelers"].values()] == [
        [3, 1, 0, 0, 4.0], [2, 0, 1, 1, None], [1, 0, 0, 0, None]]
    found = {row["one"][0] + row["two"][0]: (row["samples"], row["agree"]["share"], row["tau"])
             for row in facts["agreement"]}
    assert found == {names: pytest.approx(row, abs=1e-4) for names, row in {
        "ab": (2, 5 / 6, 4 / 6), "ac": (1, 0, -1), "bc": (1, 1 / 6, -4 / 6), "br": (2, 5 / 6, 4 / 6), "cr": (1, 0, -1),
        "ar": (2, 1, (1 + 4 / math.sqrt(24)) / 2)}.items()}  # b ties all of s1: no tau
    text = (tmp_path / "out/report.md").read_text()
    assert "| ann | 3 | 1 | 0 | 0 | 0.1667 | 4.0 | 1.000 (1.000 to 1.000) of 10 |" in text
    assert text in capsys.readouterr().out and "<b>" not in text
