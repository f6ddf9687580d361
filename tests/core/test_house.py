"""The house: which module may import which, how long files may be, what is kept in results/. From the syntax trees."""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = {str(path.relative_to(ROOT)): ast.parse(path.read_text())
         for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py"))}
CODE = [name for name in TREES if name.split("/")[0] not in ("tests", "out", "data")]
TESTS = [name for name in TREES if name.startswith("tests/")]
LINES = {name: (ROOT / name).read_text().splitlines() for name in CODE + TESTS}
MODULE = {name[:-3].replace("/", "."): name for name in CODE}


def imported(tree):
    """Dotted names of what a module imports, inside functions too; a name from a module could be a module itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


ARROWS = {name: {MODULE[other] for other in imported(TREES[name]) if other in MODULE} for name in CODE}


def closure(*names):
    """These modules and all of ours that they import, directly or not."""
    seen, todo = set(), list(names)
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += ARROWS[name]
    return seen


def folder(name):
    return name.rpartition("/")[0]


def test_imports_point_inwards():
    """A root module that needs a folder, folders that need each other, a circle, an import hidden in a string."""
    for name in CODE:
        inwards = {other for other in ARROWS[name] if folder(other) in ("", folder(name))}
        assert folder(name) in ("study", "tools") or ARROWS[name] == inwards, name
        assert name not in closure(*ARROWS[name]), f"{name} is in an import circle"
        assert folder(name) or not re.search('import_module|__import__|"-m"', "\n".join(LINES[name])), name


@pytest.mark.parametrize("name, most", [("ppo.py", 1400), ("reward.py", 1250), ("sft.py", 1100), ("dpo.py", 1100)])
def test_a_script_is_read_in_one_sitting(name, most):
    """A trainer that pulls in more than its reader can hold."""
    assert sum(len(LINES[part]) for part in closure(name)) <= most, sorted(closure(name))


def test_nothing_outgrows_the_house():
    """A module, a line, a README or a folder of results that nobody reads to the end."""
    root = [name for name in CODE if not folder(name)]
    assert len(root) <= 11 and max(len(LINES[name]) for name in root) <= 385
    assert max(len(LINES[name]) for name in CODE) <= 450
    assert sum(len(LINES[name]) for name in CODE) <= 7000 and sum(len(LINES[name]) for name in TESTS) <= 5500
    assert not [f"{name}:{i + 1}" for name in LINES for i, line in enumerate(LINES[name]) if len(line) > 120]
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    results = [path.stat().st_size for path in (ROOT / "results").rglob("*") if path.is_file()]
    assert len(results) <= 120 and sum(results) <= 5_000_000


def test_every_test_says_what_it_catches():
    """A test without a docstring: nobody knows whether it may go."""
    assert not [f"{name}: {node.name}" for name in TESTS for node in ast.walk(TREES[name]) if isinstance(
        node, ast.FunctionDef) and node.name.startswith("test_") and not ast.get_docstring(node)]


def test_what_is_loaded_and_required():
    """A checkpoint whose loading can run a program; a package that pip install -r requirements.txt does not bring."""
    known = set(re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.M)) | {"regex"}  # tiktoken needs it
    for name in CODE:
        calls = [ast.unparse(node) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
        assert not [call for call in calls if call.startswith("torch.load(") and "weights_only=True" not in call], name
        top = ast.Module([node for node in TREES[name].body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        packages = {other.split(".")[0] for other in imported(top)} - {other.split(".")[0] for other in MODULE}
        assert packages - set(sys.stdlib_module_names) <= known, name
