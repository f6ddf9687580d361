"""A page to rank in: one HTML file that needs no server and no network, for any browser, on a laptop or a phone.

    python label.py page --count 50                  writes out/tiny/page.html: open it, or send it to others
    python label.py merge answers-ann.jsonl ...      takes what they save in it and send back

The page itself is page.html. Here its questions are put in, so that whatever a model wrote stays text: the JSON is
ASCII without "<", and the page's security policy names the hash of the one script that may run.
"""
import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from answers import read_samples
from checkpoint import write_atomic
from common import check

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class PageConfig:
    out: str = "out/tiny/page.html"  # the file to write
    samples: str = "out/tiny/samples/samples.jsonl"  # {"id", "prompt", "responses"}
    count: int = 50                  # only the first so many samples; 0: all
    title: str = "Which response would you rather read?"  # the question that stands above each sample


def make_page(samples, title):
    """The page as text; samples: {"id", "prompt", "responses"}."""
    before, script, after = TEMPLATE.read_text(encoding="utf-8").partition('<script>\n')
    code, end, after = after.partition("</script>")
    policy = "sha256-" + base64.b64encode(hashlib.sha256(("\n" + code).encode()).digest()).decode()
    content = [{name: row[name] for name in ("id", "prompt", "responses")} for row in samples]
    key = hashlib.sha256(json.dumps([content, title]).encode()).hexdigest()[:12]  # for the browser's storage
    data = json.dumps({"samples": content, "title": title, "key": f"plainrlhf {key}"}).replace("<", "\\u003c")
    before = before.replace("SCRIPT_HASH", policy).replace("PAGE_DATA", data)
    return before + script + code + end + after


def page(cfg, then=""):
    """Write the page; then: the command that takes what was saved in it."""
    samples = read_samples(cfg.samples, cfg.count, "count")
    check(all(len(row["responses"]) < 10 for row in samples), f"{cfg.samples}: more than nine responses to order")
    check(cfg.title.strip(), "--title is empty")
    path = Path(cfg.out)
    check(not path.is_dir() and path.suffix == ".html" and path.resolve() != TEMPLATE.resolve(),
          f"--out {path}: name a file that ends in .html, and another than the template")
    path.parent.mkdir(parents=True, exist_ok=True)
    html = make_page(samples, cfg.title)
    write_atomic(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    print(f"{path}: {len(samples)} questions, {path.stat().st_size / 1000:.0f} kB. Open it, rank, save, and then:\n"
          + (then or f"python label.py merge answers-NAME.jsonl --samples {cfg.samples}"))
