"""Outsiders' opinions of a run's responses, and the page of samples along KL."""
import json
import math
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from data import load_tokenizer, write_jsonl
from model import load_model, token_logprobs
from study import along_kl, opinions

RESPONSES = {"the film": (" was good", " bad and sad", " good good good"), "a plot": (" is sad", " is good", " good")}


@pytest.fixture
def finished(checkpoints, tmp_path):
    """A folder like a finished run's: small random models, three policies' responses to two prompts."""
    for name in ("base", "sft"):
        shutil.copytree(checkpoints.sft, tmp_path / name)
    for name in ("reward", "judge"):
        shutil.copytree(checkpoints.reward, tmp_path / name)
    (tmp_path / "evaluate").mkdir()
    write_jsonl(tmp_path / "evaluate/samples.jsonl", [
        {"prompt": prompt, **dict(zip(("sft", "dpo", "ppo"), texts)), "judge": {}}
        for prompt, texts in RESPONSES.items()])
    return tmp_path


def test_opinions(finished, monkeypatch):
    """A win counted for the SFT model, a policy's scores under another's name, perplexity per response, or with the
    prompt or an EOS that was never there in it."""
    words = SimpleNamespace(polarity_scores=lambda text: {"compound": text.count("good") - text.count("sad")})
    monkeypatch.setitem(sys.modules, "vaderSentiment", ModuleType("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment",
                        SimpleNamespace(SentimentIntensityAnalyzer=lambda: words))
    opinions.main(opinions.Config(str(finished), judges=f"{finished}/judge", device="cpu"))
    found = json.loads((finished / "evaluate/opinions.json").read_text())
    assert {name: row["VADER"] for name, row in found.items()} == {"sft": 0, "dpo": 0, "ppo": 2}
    assert {name: row["win rate, VADER"] for name, row in found.items()} == {"sft": 0.5, "dpo": 0.5, "ppo": 1}
    model, enc = load_model(finished / "base"), load_tokenizer(finished / "base")
    for place, name in enumerate(found):
        nats, count = 0.0, 0
        for prompt, texts in RESPONSES.items():
            ids = [enc.begin] + enc.encode_ordinary(prompt)
            row = torch.tensor([ids + enc.encode_ordinary(texts[place])])
            logprobs = token_logprobs(model(row), row)[0, len(ids) - 1:]
            nats, count = nats - logprobs.sum().item(), count + len(logprobs)
        assert found[name]["perplexity under the base model"] == pytest.approx(math.exp(nats / count), rel=1e-3)
    assert found["sft"][f"{finished.name}/judge"] != found["ppo"][f"{finished.name}/judge"]


def test_snapshots_along_kl(finished, checkpoints):
    """The snapshot of another KL, a column without its samples, the wrong prompts."""
    points = [{"kl": kl} for kl in (0.0, 0.5, 2.0, 5.0, 11.0, 13.0, 12.5)]
    assert [point["kl"] for point in along_kl.closest(points)] == [0.0, 2.0, 5.0, 12.5]
    for name in ("00001", "00002"):
        shutil.copytree(checkpoints.sft, finished / "free/snapshots" / name)
    along_kl.main(along_kl.Config(str(finished), prompts=checkpoints.prompts, count=4, shown=2, response_tokens=6,
                                  device="cpu"))
    rows = json.loads((finished / "free/along_kl.json").read_text())
    assert [row["iteration"] for row in rows] == [0, 1, 2] and all(row["kl"] == 0 for row in rows)
    page = (finished / "free/along_kl.md").read_text()
    assert page.count("| KL 0.0 |") == 2 and "perplexity under the base model" in page
