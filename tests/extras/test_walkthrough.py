"""docs/walkthrough.md: it is what study/walkthrough.json gives, and arithmetic by hand gives the same numbers."""
import json
import math
import re
import shutil

import pytest

import data
import label
import ppo
import sft
from study import record, walkthrough

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


def test_another_run_is_recorded_and_shown(checkpoints, tmp_path):
    """record.py that no longer repeats what ppo.py does, or a page that only fits the committed numbers."""
    run, demos = tmp_path, str(tmp_path / "demos.jsonl")
    data.write_jsonl(demos, [{"prompt": "the film", "completion": " was good"},
                             {"prompt": "a bad film", "completion": " with a bad plot"}])
    sft.main(sft.Config(model=checkpoints.sft, train=demos, valid=demos, epochs=60, lr=1e-2, evals=1, dropout=0.0,
                        out=f"{run}/sft"))  # until what it writes is text
    for name in ("labeler", "reward"):
        shutil.copytree(checkpoints.reward, run / name)
    label.sample(label.SampleConfig(model=f"{run}/sft", prompts=checkpoints.prompts, out=f"{run}/samples",
                                    response_tokens=8, keep_truncated=True))
    label.rank(label.RankConfig(labeler=f"{run}/labeler", samples=f"{run}/samples/samples.jsonl", noise=0.0,
                                out=f"{run}/label"))
    ppo.main(ppo.Config(sft=f"{run}/sft", reward=f"{run}/reward", prompts=checkpoints.prompts, iterations=3, episodes=4,
                        response_tokens=8, lr=1e-3, snapshots=1, out=f"{run}/ppo"))
    once, twice = (record.main(run, run / name) or (run / name).read_text() for name in ("once", "twice"))
    found, headings = json.loads(once), re.compile("^#.*", re.MULTILINE)
    assert once == twice and found["response"]["new_logprobs"] != found["response"]["old_logprobs"]
    for name in ("score", "kl"):
        assert found["rollout"][name] == pytest.approx(found["log"][0][name], abs=1e-5) != 0
    page = walkthrough.page_text(found)
    assert headings.findall(page) == headings.findall(PAGE) and "nan" not in page
