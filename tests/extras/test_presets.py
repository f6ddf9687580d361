"""The presets gpt2 and hh through the real scripts, in small. No network."""
import json
import shutil
import subprocess
import sys

import torch

import hh
import test_hh
from data import load_tokenizer
from test_gpt2 import small_gpt2
from test_pipeline import ROOT, prepare, train_all


def test_gpt2_and_dialogues(tmp_path_factory, checkpoints):
    """The preset hh: a flag that is gone, a report that needs a labeler, or long prompts that break a stage."""
    folder = tmp_path_factory.mktemp("hh")
    source = test_hh.write(folder / "dialogues.jsonl", test_hh.conversations(1, 120))
    hh.main(hh.Config(train=str(source), out=str(folder / "the data")))
    vocab = load_tokenizer(checkpoints.vocab)
    base = small_gpt2(folder / "a GPT-2", **{"wte.weight": 0.1 * torch.randn(vocab.n_vocab, 8),
                                             "wpe.weight": 0.1 * torch.randn(1024, 8)})
    shutil.copy(checkpoints.vocab, base / "vocab.tiktoken")
    result = train_all(folder, "hh", "--init", str(base), STEPS="smoke")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    out = folder / "the output"
    stages = ["base", "sft", "judge", "reward", "dpo", "ppo", "evaluate"]
    assert sorted(path.parent.name for path in out.glob("*/done.json")) == sorted(stages)
    assert json.loads((out / "ppo" / "config.json").read_text())["model"]["block_size"] == 512
    results = json.loads((out / "evaluate" / "results.json").read_text())
    assert "labeler" not in results["policies"]["ppo"] and set(results["reward_models"]) == {"proxy", "judge"}
    assert "| sft | - | - |" in (out / "evaluate" / "report.md").read_text()


def test_gpt2_on_ratings(tmp_path):
    """The preset gpt2: stages that do not fit a base model which was not trained here. It comes from an export."""
    folder, data = tmp_path, tmp_path / "the data"
    prepare(folder)
    subprocess.run([sys.executable, ROOT / "sft.py", "--preset", "smoke-base", "--train", data / "corpus_train.jsonl",
                    "--test", data / "corpus_valid.jsonl", "--vocab", data / "vocab.tiktoken", "--out", folder / "own"],
                   check=True)
    subprocess.run([sys.executable, str(ROOT / "export.py"), folder / "own", folder / "a base"], check=True)
    result = train_all(folder, "gpt2", "--init", str(folder / "a base"), "--block-size", "48", STEPS="smoke")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert json.loads((folder / "the output" / "ppo" / "config.json").read_text())["model"]["block_size"] == 48
