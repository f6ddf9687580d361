"""README and docs against the code, the commands and the committed logs that they speak of."""
import ast
import json
import re
from pathlib import Path

from tools.doctor import SYMPTOMS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")]
COMMAND = r"(?:python |bash )(-m (?:prepare|labeling|study|tools)[\w.]+|[\w./]+\.(?:py|sh))([^`|#\n]*)"


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
