"""Supervised training: which tokens count, and that batching, padding and microbatches change nothing."""
import json
import math
from collections import Counter

import pytest
import torch

import data
import sft
import stages
from conftest import END, SENTENCES, log_of, random_model
from model import load_model, row_logprobs

# (ids, how many of them are given): demonstrations with prompts of unequal length, and packed text.
ROWS = [([END, 3, 4, 5, 6, 7, END], 4), ([END, 8, END], 1), ([END, 9, 1, 2, 3, 4, END], 2), ([END, 2, 2, END], 3),
        ([END, 5, 7, 7, 7, 7], 2), ([END] + [3] * 12 + [4] * 12, 13)]
PACKED = [([END, 3, 4, END, 5], 1), ([5, 6, 7, END, 8], 1), ([8, 9, END, 1, 2], 1)]


def loss_by_hand(model, rows):
    """Minus the log-probability of every counted token, one token after the other, and their number."""
    logprobs = [model(torch.tensor([ids[:t]]))[0, -1].log_softmax(-1)[ids[t]].item()
                for ids, first in rows for t in range(first, len(ids))]
    return -sum(logprobs), len(logprobs)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("rows, count", [(ROWS, 3 + 2 + 5 + 1 + 4 + 12), (PACKED, 12)])
def test_which_tokens_count(rows, count, dtype, tolerance, autocast_off):
    """Prompt tokens that count, an EOS that does not, padding that does, a shift by one, a sum given to another row."""
    model = random_model().to(dtype)
    expected = [loss_by_hand(model, [row])[0] for row in rows]
    assert loss_by_hand(model, rows)[1] == count
    got = row_logprobs(model, rows, END, "cpu", autocast_off)
    assert (-got).tolist() == pytest.approx(expected, abs=tolerance) and got.dtype == dtype
    assert sft.held_out_loss(model, rows, END, "cpu", autocast_off) == pytest.approx(sum(expected) / count, abs=1e-5)


def test_packed_rows_are_the_documents(checkpoints, tmp_path):
    """Documents without a border, tokens lost between two rows, or a first token that no row predicts."""
    texts = [f"{sentence} {i}" for i in range(5) for sentence in SENTENCES]
    data.write_jsonl(tmp_path / "texts", [{"text": text} for text in texts])
    enc = data.load_tokenizer(checkpoints.vocab)
    rows = [ids for ids, first in sft.packed_rows(enc, tmp_path / "texts", 16, 1) if first == 1]
    assert all(len(ids) == 17 for ids in rows)
    assert all(first[-1] == second[0] for first, second in zip(rows, rows[1:]))  # given once, predicted once
    found = enc.decode(rows[0][:1] + [token for ids in rows for token in ids[1:]]).split(data.END)
    assert found[0] == "" and len(found) >= 15  # begins with EOS
    assert set(found[1:-1]) <= set(texts) and len(set(found[1:-1])) == len(found[1:-1])
    assert found[1:-1] != texts[:len(found) - 2]  # shuffled


def test_base_and_sft_learn(checkpoints, tmp_path):
    """Training that does not lower the held-out loss, from nothing or from a checkpoint."""
    stages.run("base", checkpoints.folder, tmp_path / "base", epochs=40, dropout=0.0)
    base = log_of(tmp_path / "base")
    assert base[0]["valid_loss"] > base[-1]["valid_loss"] and base[-1]["valid_loss"] < 2
    demos = checkpoints.folder / "demos.jsonl"
    stages.run("sft", checkpoints.folder, tmp_path / "sft", model=tmp_path / "base", valid=demos, epochs=30, lr=1e-2,
               dropout=0.0, batch_size=7)
    # Four continuations that are equally likely, each of a few tokens: log 4 in all is the least there is.
    enc = data.load_tokenizer(checkpoints.vocab)
    lengths = [len(enc.encode_ordinary(row["completion"])) + 1 for row in data.read_rows(demos, dict)]
    least = math.log(4) / (sum(lengths) / len(lengths))
    assert least - 0.01 < log_of(tmp_path / "sft")[-1]["valid_loss"] < least + 0.2


def test_held_out_loss_is_without_dropout(autocast_off):
    """A held-out loss with dropout, or a model that trains without it from then on."""
    model = random_model(dropout=0.5).train()
    assert len({sft.held_out_loss(model, ROWS, END, "cpu", autocast_off) for _ in range(3)}) == 1 and model.training


@pytest.mark.parametrize("stage, changes", [("sft", {"dropout": 0.0}), ("reward", {"dropout": 0.0}), ("dpo", {})])
def test_microbatches_change_no_run(checkpoints, tmp_path, stage, changes):
    """A mean per microbatch in place of one per batch: short rows weigh more, and memory decides the result."""
    for size in (4, 3, 1):
        stages.run(stage, checkpoints.folder, tmp_path / str(size), microbatch=size, lr=1e-3, **changes)
    for whole, *others in zip(*(log_of(tmp_path / size) for size in "431"), strict=True):
        for name in ("loss", "grad_norm", "margin" if stage == "dpo" else "lr"):
            assert [line[name] for line in others] == pytest.approx([whole[name]] * 2, rel=2e-3, abs=1e-4), name
    weights = [load_model(tmp_path / size, kind="reward" if stage == "reward" else "lm").state_dict() for size in "41"]
    assert all(torch.allclose(x, weights[1][name], rtol=0, atol=1e-3) for name, x in weights[0].items())


def test_the_best_checkpoint_is_kept(checkpoints, tmp_path):
    """The last weights saved in place of the best, or a held-out loss that is not that of the saved weights."""
    stages.run("sft", checkpoints.folder, tmp_path)
    losses = [line["valid_loss"] for line in log_of(tmp_path)]
    assert min(losses) < losses[-1]  # the training set says nothing about the other, and it overfits
    saved = json.loads((tmp_path / "config.json").read_text())
    enc, model = data.load_tokenizer(tmp_path), load_model(tmp_path)
    total, count = loss_by_hand(model, sft.response_rows(enc, checkpoints.folder / "other.jsonl", 32, Counter()))
    assert saved["valid_loss"] == pytest.approx(min(losses), abs=1e-5) == pytest.approx(total / count, abs=1e-4)
