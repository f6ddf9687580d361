"""docs/walkthrough.md: it is what study/walkthrough.json gives, and arithmetic by hand gives the same numbers."""
import json
import math
import re

import pytest

from study import walkthrough

PAGE = (walkthrough.STUDY.parent / "docs/walkthrough.md").read_text()
FOUND = json.loads((walkthrough.STUDY / "walkthrough.json").read_text())


def test_the_page_is_generated():
    """A page that says what the code no longer does, or that was edited by hand."""
    assert walkthrough.page_text(FOUND) == PAGE


def test_tables_by_hand():
    """Sections 5 to 11 with a wrong sign, shift or discount, a clip on the wrong side, a gradient that is not there."""
    r, flags, rollout, d = FOUND["response"], FOUND["flags"], FOUND["rollout"], walkthrough.derive(FOUND)[0]
    n, P, clip, decay = len(r["ids"]), rollout["columns"], flags["clip"], flags["gamma"] * flags["lam"]
    rewards = [-r["kl_coef"] * (old - ref) for old, ref in zip(r["old_logprobs"], r["ref_logprobs"])]
    rewards[-1] += r["score"]
    deltas = [rewards[t] + flags["gamma"] * [*r["values"], 0.0][t + 1] - r["values"][t] for t in range(n)]
    for t in range(n):
        advantage = sum(decay ** (s - t) * deltas[s] for s in range(t, n))  # not backwards, as in the code
        A = (advantage - rollout["advantage_mean"]) / rollout["advantage_std"]
        assert [d[name][t] for name in ("reward", "delta", "advantage", "A", "return")] == pytest.approx(
            [rewards[t], deltas[t], advantage, A, advantage + r["values"][t]])
        ratio = math.exp(r["new_logprobs"][t] - r["old_logprobs"][t])
        far = A > 0 and ratio > 1 + clip or A < 0 and ratio < 1 - clip
        assert d["gradient"][t] == pytest.approx(0 if far else -A * ratio) and far == (d["larger"][t] == "clipped")
        assert abs(d["within"][t] - r["values"][t]) <= flags["value_clip"] + 1e-9
    rows = walkthrough.alignment(FOUND, d)
    column = {c: dict(zip(rows["column"], rows[str(c)])) for c in (rollout["pad"], P - 1, P, P + n - 1)}
    assert column[P - 1]["**logits predict**"] == column[P]["token"] == d["token"][0] and column[P]["t"] == 0
    assert column[P - 1]["**value**"] == f"{r['values'][0]:.2f}" and column[rollout["pad"]]["position"] == 0
    assert column[P + n - 1]["score"] == f"{r['score']:.2f}"


def test_every_sum_comes_out_with_the_digits_shown():
    """Arithmetic on the page that a calculator does not confirm, or another KL coefficient than the log's."""
    sums = re.findall(r"(?:^|= |: )((?:[-(]*[\d.]+\)* [-+*/] )+[-(]*[\d.]+\)*) = (-?[\d.]*\d)",
                      "\n".join(line.strip() for line in PAGE.splitlines()), re.MULTILINE)
    assert len(sums) >= 1 + 2 + 6 + 1 + 4  # sections 2, 7, 8, 9, 12
    for text, result in sums:
        digits = len(result.split(".")[1])
        assert abs(round(eval(text), digits) - float(result)) < 1.5 * 10**-digits, (text, result)
    steps, log = re.findall(r"kl_coef = .* = ([\d.]+)$", PAGE, re.MULTILINE), FOUND["log"]
    assert [float(step) for step in steps] == pytest.approx([line["kl_coef"] for line in log[1::2]], abs=2e-6)
