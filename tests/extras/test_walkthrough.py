"""docs/walkthrough.md: its numbers come from docs/walkthrough.json again, and a hand gets the same."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data
import label
import ppo
import reward
import sft
from common import UserError

DOCS = Path(__file__).parents[1] / "docs"
sys.path.append(str(DOCS))
import figures  # noqa: E402
import record  # noqa: E402
import walkthrough  # noqa: E402

PAGE, FOUND = (DOCS / "walkthrough.md").read_text(), json.loads((DOCS / "walkthrough.json").read_text())


def table(head):
    """The rows below this head of a table on the page, as lists of cells."""
    lines = PAGE.split(f"\n| {head} |\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def column(head, name):
    """One column of such a table, as numbers."""
    i = head.split(" | ").index(name)
    return [float(row[i]) for row in table(head)]


def shown(numbers, digits=4):
    """Numbers that were written with so many digits: equal up to their rounding."""
    return pytest.approx(numbers, rel=0, abs=0.50001 * 10**-digits)


def test_the_page_is_written_again(tmp_path):
    """A page that says what the code no longer does, or that was edited by hand."""
    walkthrough.main(walkthrough.Config(numbers=str(DOCS / "walkthrough.json"), out=str(tmp_path)))
    assert (tmp_path / "walkthrough.md").read_bytes() == (DOCS / "walkthrough.md").read_bytes()
    assert max(len(line) for line in PAGE.splitlines() if not line.startswith("|")) <= 120
    assert all(line == "```" for line in PAGE.splitlines() if "```" in line), "a block of code that does not end"
    for name in ("pipeline.png", "alignment.png"):  # their bytes depend on the version of matplotlib
        assert f"]({name})" in PAGE and (DOCS / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name).stat().st_size > 10_000


def test_rewards_and_advantages_by_hand():
    """A table of section 6 or 8 that does not follow from the raw numbers: a wrong sign, shift or discount."""
    r, flags = FOUND["response"], FOUND["flags"]
    n = len(r["ids"])
    kl, rewards, deltas, advantages = [0.0] * n, [0.0] * n, [0.0] * n, [0.0] * n
    for t in range(n):
        kl[t] = r["old_logprobs"][t] - r["ref_logprobs"][t]
        rewards[t] = -r["kl_coef"] * kl[t] + (r["score"] if t == n - 1 else 0.0)
    for t in range(n):
        after = r["values"][t + 1] if t < n - 1 else 0.0
        deltas[t] = rewards[t] + flags["gamma"] * after - r["values"][t]
    for t in range(n):  # not backwards as in the code: the sum of all later deltas
        advantages[t] = sum((flags["gamma"] * flags["lam"]) ** (s - t) * deltas[s] for s in range(t, n))
    assert r["ended"] and n > 5, "the test takes the score as it is, the page shows five of the tokens"
    assert column("t | token | old | ref | kl", "kl") == shown(kl)
    head = "t | token | reward | value | delta | advantage | return"
    for name, expected in {"reward": rewards, "value": r["values"], "delta": deltas, "advantage": advantages,
                           "return": [a + v for a, v in zip(advantages, r["values"])]}.items():
        assert column(head, name) == shown(expected), name


def test_the_figure_shows_each_number_in_its_column():
    """A figure of the index alignment that is off by one itself."""
    rows = figures.read_where(FOUND, walkthrough.derive(FOUND))
    P, pad, n = FOUND["rollout"]["columns"], FOUND["rollout"]["pad"], len(FOUND["response"]["ids"])
    assert list(rows["value"]) == list(range(P - 1, P - 1 + n)) and float(rows["value"][P - 1]) == shown(
        FOUND["response"]["values"][0], 2)
    assert list(rows["kl"]) == list(rows["reward"]) == list(range(P, P + n)) and list(rows["score"]) == [P + n - 1]
    assert rows["position"][pad] == "0" and rows["position"][P] == str(len(FOUND["prompt"]["ids"]))
    assert [int(x) for x in rows["mask"].values()] == [1] * n + [0] and pad + len(FOUND["prompt"]["ids"]) == P


def test_ratio_clip_and_gradient_by_hand():
    """A table of section 10 with the clip on the wrong side, or a gradient where there is none."""
    r, clip = FOUND["response"], FOUND["flags"]["clip"]
    head = "t | token | A | old | new | ratio | plain | clipped | larger | gradient"
    for t, row in enumerate(table(head)):
        _, _, A, old, new, ratio, plain, clipped, larger, gradient = row
        assert (float(old), float(new)) == (r["old_logprobs"][t], r["new_logprobs"][t])
        whole = math.exp(r["new_logprobs"][t] - r["old_logprobs"][t])
        advantage = column("t | token | reward | value | delta | advantage | return", "advantage")[t]
        white = (advantage - FOUND["rollout"]["advantage_mean"]) / FOUND["rollout"]["advantage_std"]
        assert float(ratio) == shown(whole) and float(A) == pytest.approx(white, abs=1.5e-4)
        near = min(max(whole, 1 - clip), 1 + clip)
        assert float(plain) == pytest.approx(-white * whole, abs=1e-3)
        assert float(plain) == pytest.approx(-float(A) * float(ratio), abs=1e-3)  # with the digits shown, too
        assert float(clipped) == pytest.approx(-white * near, abs=1e-3)
        outside = white > 0 and whole > 1 + clip or white < 0 and whole < 1 - clip
        assert larger == ("clipped" if outside else "equal" if near == whole else "plain")
        assert gradient == ("0.000" if outside else plain)
    assert "clipped" in [row[8] for row in table(head)], "the page is about a token where the clip binds"


def test_ranking_loss_by_hand():
    """A table of section 4 with the margins the wrong way round, or a mean over something else than pairs."""
    scores, losses = FOUND["ranking"]["reward"], []
    rows = iter(table("better | worse | margin | sigmoid(margin) | loss"))
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            losses.append(math.log(1 + math.exp(scores[j] - scores[i])))
            better, worse, margin, sigmoid, loss = map(float, next(rows))
            assert (better, worse, margin) == (i + 1, j + 1, shown(scores[i] - scores[j]))
            assert loss == shown(losses[-1]) and sigmoid == shown(math.exp(-losses[-1]))
    assert next(rows, None) is None and f"the mean, {sum(losses) / len(losses):.4f};" in PAGE


def test_controller_by_hand():
    """Section 12: a step that the controller does not take, or that the log of the run does not have."""
    steps = re.findall(r"kl_coef = .* = ([\d.]+)$", PAGE, re.MULTILINE)
    flags, log = FOUND["flags"], FOUND["log"]
    for before, after, coef in zip(log[::2], log[1::2], steps, strict=True):
        error = max(-0.2, min(0.2, before["kl"] / flags["kl_target"] - 1))
        expected = before["kl_coef"] * (1 + error * flags["episodes"] / flags["kl_horizon"])
        assert float(coef) == shown(expected, 6) == pytest.approx(after["kl_coef"], abs=2e-6)
    assert FOUND["rollout"]["kl"] == log[0]["kl"] and FOUND["rollout"]["score"] == log[0]["score"]


def test_every_sum_comes_out_with_the_digits_shown():
    """Arithmetic on the page that a reader with a calculator cannot follow."""
    sums = re.findall(r"(?:^|= |: )((?:[-(]*[\d.]+[)^2]* [-+*/] )+[-(]*[\d.]+[)^2]*) = (-?[\d.]*\d)",
                      "\n".join(line.strip() for line in PAGE.splitlines()), re.MULTILINE)
    assert len(sums) >= 1 + 2 + 15 + 1 + 3 + 4  # sections 2, 7, 8, 9, 11, 12
    for text, result in sums:
        digits = len(result.split(".")[1])
        assert abs(round(eval(text.replace("^", "**")), digits) - float(result)) < 1.5 * 10**-digits, (text, result)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, checkpoints):
    """A folder like that of train_all.sh: the stages that the page needs, on a toy model, in seconds."""
    folder = tmp_path_factory.mktemp("walkthrough")
    run, demos = folder / "run", str(folder / "demos.jsonl")
    data.write_jsonl(demos, [{"prompt": "the film", "completion": " was good"},
                             {"prompt": "a bad film", "completion": " with a bad plot"}])
    same = {"device": "cpu", "dtype": "float32"}
    sft.main(sft.Config(model=checkpoints.sft, train=demos, test=demos, epochs=60, lr=1e-2, evals=1, dropout=0.0,
                        out=str(run / "sft"), **same))  # until what it writes is text
    for name in ("labeler", "reward"):
        reward.main(reward.Config(model=str(run / "sft"), train=checkpoints.rankings, pairs="", sft="",
                                  out=str(run / name), seed=len(name), **same))
    label.sample(label.SampleConfig(model=str(run / "sft"), prompts=checkpoints.prompts, out=str(run / "samples"),
                                    response_tokens=8, keep_cut=True, **same))
    label.rank(label.RankConfig(labeler=str(run / "labeler"), samples=str(run / "samples" / "samples.jsonl"), noise=0.0,
                                out=str(run / "label"), **same))
    ppo.main(ppo.Config(sft=str(run / "sft"), reward=str(run / "reward"), prompts=checkpoints.prompts, iterations=3,
                        episodes=4, microbatch=3, response_tokens=8, lr=1e-3, snapshots=1, out=str(run / "ppo"),
                        **same))
    return run


def test_another_run_is_recorded_and_shown(small_run, tmp_path, capsys):
    """record.py that no longer repeats what ppo.py does, or a page that only fits the committed numbers."""
    capsys.readouterr()
    record.main(record.Config(run=str(small_run), out=str(tmp_path / "numbers.json")))
    found, text = json.loads((tmp_path / "numbers.json").read_text()), capsys.readouterr().out
    assert all(abs(found["rollout"][name] - found["log"][0][name]) < 2e-6 for name in ("score", "kl"))
    assert found["rollout"]["kl"] != 0 and found["response"]["new_logprobs"] != found["response"]["old_logprobs"]
    assert float(re.search(r"off the rollout's by ([\d.]+) at most", text)[1]) < 2e-3
    walkthrough.main(walkthrough.Config(numbers=str(tmp_path / "numbers.json"), out=str(tmp_path / "docs")))
    page = (tmp_path / "docs" / "walkthrough.md").read_text()
    headings = re.compile("^#.*", re.MULTILINE)
    assert headings.findall(page) == headings.findall(PAGE) and "nan" not in page
    assert found["prompt"]["text"] in page and f"P = {found['rollout']['columns']}" in page


def test_a_run_of_other_prompts_is_refused(small_run, tmp_path):
    """Numbers of a run that never was: its models with other prompts."""
    config = small_run / "ppo" / "config.json"
    kept = config.read_text()
    config.write_text(kept.replace("prompts.jsonl", "rankings.jsonl"))
    with pytest.raises(UserError, match="rankings.jsonl: missing, or not what"):
        record.main(record.Config(run=str(small_run), out=str(tmp_path / "numbers.json")))
    config.write_text(kept)


@pytest.mark.parametrize("script, words, problem", [
    ("walkthrough.py", ["page"], "unrecognized arguments: page"), ("record.py", ["no/run"], "no/run: no finished run"),
    ("walkthrough.py", ["--numbers", str(DOCS / "memory.py")], "memory.py: damaged, or not what docs/record.py")])
def test_bad_commands(script, words, problem, tmp_path):
    """A traceback, or exit code 0, for a typing error."""
    result = subprocess.run([sys.executable, str(DOCS / script), *words], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 2 and problem in result.stderr and result.stderr.count("\n") == 1
