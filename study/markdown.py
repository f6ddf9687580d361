"""Markdown that report.py, frontier.py and ablations.py write: cells, tables, and the texts of study/templates."""
import re
from pathlib import Path
from statistics import mean
from string import Template


def interval(value, ends):
    """value (low to high)"""
    return f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"


def number(row, name, form=".3f"):
    """A number of a row, with its interval if it has one; - where there is none."""
    if f"{name}_interval" in row:
        return interval(row[name], row[f"{name}_interval"])
    return f"{row[name]:{form}}" if name in row else "-"


def share(card):
    """The accuracy of a report card, with its interval."""
    return interval(card["accuracy"], card["interval"])


def spread(values, form=".2f"):
    """Mean over seeds and, if there are several, the lowest to the highest."""
    ends = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{ends}"


def table(titles, rows):
    """The lines of a Markdown table."""
    return [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles), *(f"| {' | '.join(row)} |" for row in rows), ""]


def by_seed(runs, titles, rows_of, keys=1):
    """A table of the rows that rows_of(results) makes. Of several runs: rows whose first cells (as many as keys) agree
    stand together, and the seed stands behind those cells."""
    several, groups = len(runs) > 1, {}
    for results in runs:
        seed = [str(results["config"]["seed"])] if several else []
        for row in rows_of(results):
            groups.setdefault(tuple(row[:keys]), []).append([*row[:keys], *seed, *row[keys:]])
    return table([*titles[:keys], *(["seed"] if several else []), *titles[keys:]], sum(groups.values(), []))


def escape(text):
    """Text from a model as plain text inside a Markdown table."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"[\\`*_\[\]<>|#&]", lambda special: f"&#{ord(special[0])};", text)


def template(name):
    """The sections of a text of study/templates: each but the first begins with "## "."""
    text = (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
    return re.split(r"(?m)^(?=## )", text)


def fill(sections, path, **parts):
    """Write the sections to path, with their $parts filled in: words, or lists of lines. A section with an empty part is
    left out."""
    parts = {name: "\n".join(part) if isinstance(part, list) else str(part or "") for name, part in parts.items()}
    kept = [section for section in sections if all(parts[name] for name in re.findall(r"\$(\w+)", section))]
    Path(path).write_text(Template("".join(kept)).substitute(parts), encoding="utf-8")
    print(path)
