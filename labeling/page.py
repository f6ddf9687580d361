"""A page to rank in: one HTML file that needs no server and no network, for any browser, on a laptop or a phone.

    python -m labeling.page --count 50               writes out/tiny/page.html: open it, or send it to others
    python -m labeling.merge answers-ann.jsonl ...   takes what they save in it and send back

Its questions are put into page.html so that whatever a model wrote stays text: the JSON is ASCII without "<", and the
page's security policy names the hash of the one script that may run.
"""
import base64
import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from common import run, write_atomic
from labeling.answers import read_samples

@dataclass
class Config:
    out: str = "out/tiny/page.html"  # the file to write
    samples: str = "out/tiny/samples/samples.jsonl"  # {"id", "prompt", "responses"}
    count: int = 50  # only the first so many samples; 0: all
    title: str = "Which response would you rather read?"  # the question above each sample

def make_page(samples, title):
    """The page as text; samples: {"id", "prompt", "responses"}."""
    before, script, after = Path(__file__).with_name("page.html").read_text(encoding="utf-8").partition("<script>\n")
    code = hashlib.sha256(("\n" + after.partition("</script>")[0]).encode())
    policy = "sha256-" + base64.b64encode(code.digest()).decode()
    samples = [{name: row[name] for name in ("id", "prompt", "responses")} for row in samples]
    content = {"title": title, "samples": samples}
    content["key"] = "plainrlhf " + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]  # of stored answers
    data = json.dumps(content).replace("<", "\\u003c")
    return before.replace("SCRIPT_HASH", policy).replace("PAGE_DATA", data) + script + after

def main(cfg):
    path, samples = Path(cfg.out), read_samples(cfg.samples, cfg.count)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, make_page(samples, cfg.title))
    print(f"{path}: {len(samples)} questions. Open it, rank, save, and then:\n"
          f"python -m labeling.merge answers-NAME.jsonl --samples {shlex.quote(cfg.samples)}")

if __name__ == "__main__":
    run(main, Config)
