"""README and docs against the code that they speak of."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "symptoms.py"]


def defined(file):
    """Names of functions, classes, methods (Class.method), fields and constants of a Python file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
            names |= {f"{node.name}.{part.target.id}" for part in node.body if isinstance(part, ast.AnnAssign)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def references(text):
    """(file, name) of each `file.py: name`, and of each `name` after it in the same square brackets."""
    found = [(file, name) for file, name in re.findall(r"`([\w/]+\.py): ([\w.]+)`", text)]
    for group in re.findall(r"\[(`[^\]]*`[^\]]*)\](?!\()", text):
        file = ""
        for quoted in re.findall(r"`([^`]+)`", group):
            file, name = quoted.split(": ") if ".py: " in quoted else (file, quoted)
            found += [(file, name)] if file and re.fullmatch(r"[\w.]+", name) else []
    return [pair for pair in found if pair[0] != "file.py"]  # which stands for any


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_code_reference_exists(page):
    """A page that sends its reader to a function that was renamed or moved."""
    for file, name in references(page.read_text()):
        assert (ROOT / file).is_file() and name in defined(ROOT / file), f"{page.name}: `{file}: {name}`"


def test_the_references_are_found():
    """A test of references that finds none."""
    assert ("ppo.py", "gae") in references("7. How much better? [`ppo.py: gae`]")
    assert references("[`ppo.py: policy_loss`, `AdaptiveKL`] [`x`](y.md)") == [
        ("ppo.py", "policy_loss"), ("ppo.py", "policy_loss"), ("ppo.py", "AdaptiveKL")]
    assert len(references((ROOT / "README.md").read_text())) > 15
    assert "AdaptiveKL.update" in defined(ROOT / "ppo.py") and "no_such" not in defined(ROOT / "ppo.py")


@pytest.mark.parametrize("page", PAGES[:-1], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    """A link to a page, a figure or a heading that is not there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            slugs = {re.sub(r"[^\w\- ]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
                     for line in file.read_text().splitlines() if line.startswith("#")}
            assert heading in slugs, f"{page.name}: {target}"


def test_every_file_named_exists():
    """A script in the README's tables and commands that was renamed."""
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"(?<![\w/.-])([\w/]+\.(?:py|sh|html|txt))\b", text)):
        assert (ROOT / name).exists(), name


def test_readme_is_short():
    """A README that nobody reads to its end."""
    assert len((ROOT / "README.md").read_text().splitlines()) < 300
