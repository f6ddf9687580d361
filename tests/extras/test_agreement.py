"""Agreement of labelers against hand calculations: pairs, tau-b, intervals, position bias, the report."""
import json
import math

import pytest
import torch

from common import UserError, generator
from data import write_jsonl
from labeling import agreement
from labeling.agreement import compare, describe, share, signs, tau_b


def answer(labeler, number, order, texts="abcd", **more):
    return {"id": f"s{number}", "prompt": f"P{number}", "labeler": labeler, "shown": list(texts), "order": order} | more


def test_tau_b_and_agreement_by_hand():
    """A tie counted as a pair: of a > b > c > d and b > a = c > d one pair is discordant, one tied, four concordant."""
    one, two = signs([["a"], ["b"], ["c"], ["d"]]), signs([["b"], ["a", "c"], ["d"]])
    assert one == {("a", "b"): 1, ("a", "c"): 1, ("a", "d"): 1, ("b", "c"): 1, ("b", "d"): 1, ("c", "d"): 1}
    assert two == {("a", "b"): -1, ("a", "c"): 0, ("a", "d"): 1, ("b", "c"): 1, ("b", "d"): 1, ("c", "d"): 1}
    assert tau_b(one, two) == pytest.approx((4 - 1) / math.sqrt(6 * 5))
    assert tau_b(one, one) == 1 and tau_b(one, signs([["d"], ["c"], ["b"], ["a"]])) == -1
    assert tau_b(one, signs([["a", "b", "c", "d"]])) is None
    found = compare({"s0": one, "s1": one, "s2": one}, {"s0": two, "s1": one, "s9": two}, 200, generator(1))
    assert found["samples"] == 2 and found["tau"] == pytest.approx((3 / math.sqrt(30) + 1) / 2, abs=1e-4)
    assert found["agree"]["share"] == pytest.approx(10 / 11, abs=1e-4) and found["agree"]["pairs"] == 11
    assert 0.8 <= found["agree"]["interval"][0] < found["agree"]["share"] < found["agree"]["interval"][1] == 1
    assert compare({"s0": one}, {"s1": two}, 10, generator(1))["agree"] is None


def test_position_bias_by_hand_and_without_bias():
    """The wrong place credited: ranked as shown, the earlier wins all six pairs; of "4 1=2 3" it wins two of five."""
    def earlier(rows, resamples=100):
        return describe(rows, resamples, generator(1))["earlier_shown_wins"]
    rows = [answer("x", 0, "1 2 3 4"), answer("x", 1, "4 1=2 3"), answer("x", 2, ""),
            answer("x", 3, "4 3 2 1", preferences=[])]  # of a machine, which is asked in both orders
    assert earlier(rows)["share"] == pytest.approx((6 + 2) / (6 + 5), abs=1e-4)
    assert earlier([answer("x", 0, "1 2 3 4", "dcba")])["share"] == 1 and earlier([answer("x", 0, "")]) is None
    random = generator(7)
    orders = [" ".join(str(1 + i) for i in torch.randperm(4, generator=random).tolist()) for _ in range(2000)]
    found = earlier([answer("x", i, order) for i, order in enumerate(orders)], 200)
    spread = math.sqrt(2 * (2 * 4 + 5) / (9 * 4 * 3)) / 2 / math.sqrt(2000)  # of tau over random orders (Kendall 1938)
    assert abs(found["share"] - 0.5) < 3 * spread
    assert found["interval"][1] - found["interval"][0] == pytest.approx(2 * 1.96 * spread, rel=0.2)


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
    rows = {"ann": [answer("ann", 0, "1 2 3 4", seconds=4.0), answer("ann", 1, "1=2 3=4", seconds=8.0),
                    answer("ann", 2, "", seconds=1.0)],
            "bob": [answer("bob", 0, "2 1 3 4", acceptable=False), answer("bob", 1, "1=2=3=4")],
            "cy": [{"id": "s0", "prompt": "P0", "labeler": "out/cy|<b>", "responses": list("dcba")}],
            "again": [answer("ann", 0, "4 3 2 1")]}
    ann, bob, cy, again = (str(tmp_path / name) for name in rows)
    for name, content in rows.items():
        write_jsonl(tmp_path / name, content)
    monkeypatch.setattr(agreement, "score_samples", lambda folder, samples, device, autocast: {
        (row["prompt"], text): -ord(text) for row in samples for text in row["responses"]})
    agreement.main(agreement.Config(f"{ann},{bob},{cy}", "out/reward", str(tmp_path / "out"), device="cpu"))
    facts = json.loads((tmp_path / "out/report.json").read_text())
    labelers = list(facts["labelers"].values())
    assert [[row[name] for name in ("answers", "skipped", "all_equal", "none_acceptable", "seconds")]
            for row in labelers] == [[3, 1, 0, 0, 4.0], [2, 0, 1, 1, None], [1, 0, 0, 0, None]]
    assert labelers[0]["ties"] == pytest.approx(2 / 12, abs=1e-4) and labelers[0]["earlier_shown_wins"]["share"] == 1
    found = {(row["one"], row["two"][:2]): (row["samples"], row["agree"]["share"], row["tau"])
             for row in facts["agreement"]}
    expected = {("ann", "bo"): (2, 5 / 6, 4 / 6), ("ann", "cy"): (1, 0, -1), ("bob", "cy"): (1, 1 / 6, -4 / 6),
                ("ann", "re"): (2, 1, (1 + 4 / math.sqrt(24)) / 2), ("bob", "re"): (2, 5 / 6, 4 / 6),
                ("cy|<b>", "re"): (1, 0, -1)}  # bob ties all of s1: it has no tau
    assert found == {names: pytest.approx(row, abs=1e-4) for names, row in expected.items()}
    text = (tmp_path / "out/report.md").read_text()
    assert "| ann | 3 | 1 | 0 | 0 | 0.1667 | 4.0 | 1.000 (1.000 to 1.000) of 10 |" in text
    assert text in capsys.readouterr().out and "<b>" not in text
    assert all(line.count("|") in (0, 6, 9) for line in text.splitlines())
    with pytest.raises(UserError, match="ann has two different answers"):
        agreement.main(agreement.Config(f"{ann},{again}", out=str(tmp_path / "new")))
