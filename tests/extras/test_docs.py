"""README and docs against the code, the commands and the committed logs that they speak of; docs/walkthrough.md against
study/walkthrough.json, of which it is made, and against arithmetic by hand."""
import ast
import json
import math
import re
from pathlib import Path

import pytest

from study import walkthrough
from tools.doctor import SYMPTOMS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")]
COMMAND = r"(?:python |bash )(-m (?:prepare|labeling|study|tools)[\w.]+|[\w./]+\.(?:py|sh))([^`|#\n]*)"
PAGE = (ROOT / "docs/walkthrough.md").read_text()
FOUND = json.loads((walkthrough.STUDY / "walkthrough.json").read_text())


def defined(file):
    """Names of functions, classes, methods, fields and constants of a Python file; none if it is not there."""
    nodes = list(ast.walk(ast.parse(file.read_text()))) if file.is_file() else []
    names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def test_every_function_exists():
    """A page that sends its reader to a function that was renamed or moved: [`ppo.py: gae`, `whiten`]."""
    found = [(page.name, file, name) for page in PAGES for file, names in re.findall(
        r"`([\w/]+\.py): ([\w.]+`(?:,\s+`[\w.]+`(?!:))*)", page.read_text()) for name in re.findall(r"[\w.]+", names)]
    missing = [one for one in found if not set(one[2].split(".")) <= defined(ROOT / one[1])]
    assert not missing and len(found) > 60


def test_every_link_leads_somewhere():
    """A link to a page or a figure that is not there."""
    links = [(page, path) for page in PAGES for path in re.findall(r"\]\((?!http)([^)\s#]+)", page.read_text())]
    missing = [(page.name, path) for page, path in links if not (page.parent / path).exists()]
    assert not missing and len(links) > 40


def test_every_command_exists():
    """A command in a page whose script or flag was renamed."""
    other, missing, commands = {"preset", "help", "long"}, [], 0
    everywhere = set().union(other, *(defined(file) for file in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))))
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        named = [("", everywhere, flag) for flag in re.findall(r"`--([\w-]+)", text)]
        for script, flags in re.findall(COMMAND, text):
            file = ROOT / (script[3:].replace(".", "/") + ".py" if script.startswith("-m ") else script)
            missing += [] if file.is_file() else [(page.name, script)]
            known = defined(file) | other if file.suffix == ".py" else everywhere
            named += [(script, known, flag) for flag in re.findall(r"\s--([\w-]+)", flags)]
            commands += 1
        missing += [(page.name, script, flag) for script, known, flag in named if flag.replace("-", "_") not in known]
    assert not missing and commands > 40


def test_metrics_are_those_of_the_committed_runs():
    """A range in docs/metrics.md that is not that of the logs, or a finding that is not that of the doctor."""
    page, checked = (ROOT / "docs/metrics.md").read_text(), 0
    logs = [[json.loads(line) for line in file.open()] for file in sorted(ROOT.glob("results/tiny/seed*/logs.jsonl"))]
    for title, stage in {"PPO": "ppo", "Reward model": "reward", "DPO": "dpo", "SFT": "sft"}.items():
        section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
        for name, *ranges in re.findall(r"^\| `(\w+)` \| .* \| (.*) \| (.*) \|$", section, re.MULTILINE):
            values = [[line[name] for line in log if line["stage"] == stage and name in line] for log in logs]
            for place, shown in zip((0, -1), ranges, strict=True):
                ends = [f"{round(end(seed[place] for seed in values), 2) + 0.0:.2f}" for end in (min, max)]
                assert shown == " to ".join(dict.fromkeys(ends)), (stage, name)
                checked += 1
    assert checked == 2 * (20 + 3 + 8 + 3)
    rows = re.findall(r"^\| \*\*(.*)\*\* \| (.*) \| `?(.*?)`? \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert rows == [(name, one.kind, one.metric, one.limit, one.tries) for name, one in SYMPTOMS.items()]


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
