"""Markdown that report.py and the studies write: cells, tables, and the texts of study/templates."""
import re
from pathlib import Path
from statistics import mean

COLUMNS = {  # title: field of a policy's row in results.json, and how it is printed
    "win rate": ("win_rate_judge", ".3f"), "at equal length": ("length_controlled", ".3f"), "proxy": ("proxy", ".2f"),
    "labeler": ("labeler", ".2f"), "judge": ("judge", ".2f"), "KL, nats": ("kl", ".2f"), "length": ("length", ".1f"),
    "EOS rate": ("eos_rate", ".3f"), "unique bigrams": ("unique_bigrams", ".3f"), "perplexity": ("perplexity", ".1f")}

def spread(values, form=".3f"):
    """Mean over seeds and, if there are several, the lowest to the highest."""
    ends = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{ends}"

def cells(rows, titles=COLUMNS):
    """The cells of a policy under these titles: of one row with its intervals, of several seeds' rows the spread."""
    found = []
    for field, form in map(COLUMNS.get, titles):
        interval = rows[0].get(f"{field}_interval") if len(rows) == 1 else None
        found.append(accuracy({"accuracy": rows[0][field], "interval": interval}) if interval else
                     spread([row[field] for row in rows], form) if field in rows[0] else "-")
    return found

def accuracy(card):
    """The accuracy in a row of a report card: value (low to high)."""
    return "{accuracy:.3f} ({interval[0]:.3f} to {interval[1]:.3f})".format(**card)

def table(titles, rows):
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows])

def by_seed(runs, titles, rows_of, keys=1):
    """A table of rows_of(results). Of several runs: rows that share their first cells (keys of them) stand together,
    with the seed behind these cells."""
    if len(runs) == 1:
        return table(titles, rows_of(runs[0]))
    rows = [[*row[:keys], str(results["config"]["seed"]), *row[keys:]] for results in runs for row in rows_of(results)]
    order = list(dict.fromkeys(tuple(row[:keys]) for row in rows))
    rows.sort(key=lambda row: order.index(tuple(row[:keys])))
    return table([*titles[:keys], "seed", *titles[keys:]], rows)

def escape(text):
    """Text from a model as plain text inside a Markdown table."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"[\\`*_\[\]<>|#&]", lambda special: f"&#{ord(special[0])};", text)

def made(folder, results):
    """The machine and date behind a study. The committed over-optimisation and ablations are older than this code."""
    old = folder.resolve().parts[-2:] in (("results", "over_optimisation"), ("results", "ablations"))
    old = "; version 0.7 (commit 7bdf83d), not rerun since" * old
    return "{hardware}, torch {torch}, {date}".format(**results) + old

def template(name):
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")

def fill(text, path, runs, **parts):
    """Write a template's text to path with its {parts} filled in, among them {first}, the first run's results, and
    {seeds}. A section, from one "## " to the next, is left out if one of its parts is empty."""
    parts |= {"first": runs[0], "seeds": ", ".join(str(results["config"]["seed"]) for results in runs)}
    kept = [section for section in re.split(r"(?m)^(?=## )", text)
            if all(parts[name] for name in re.findall(r"\{(\w+)", section))]
    Path(path).write_text("".join(kept).format(**parts), encoding="utf-8")
    print(path)
