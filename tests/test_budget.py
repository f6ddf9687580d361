"""The estimate that is printed before a stage: its operations against what PyTorch counts in a run of that stage."""
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import budget
import data
import dpo
import ppo
import reward
import sft
from model import GPT, GPTConfig

COMMON = {"device": "cpu", "dtype": "bfloat16"}  # attention is written out in bf16: fused kernels are not counted
STAGES = [pytest.param(sft, {"epochs": 2.0, "evals": 1, "pack": 8}, id="sft"), pytest.param(reward, {"epochs": 2}, id="reward"),
          pytest.param(dpo, {"epochs": 2}, id="dpo"),
          pytest.param(ppo, {"iterations": 2, "episodes": 8}, id="ppo"),
          pytest.param(ppo, {"iterations": 2, "episodes": 8, "value": "shared"}, id="ppo shared")]


@pytest.mark.parametrize("script, changes", STAGES)
def test_operations_of_a_stage(checkpoints, tmp_path, monkeypatch, script, changes):
    """An estimate that forgets the backward pass, a model, the epochs or the held-out part: out by a factor."""
    prompts = [f"the film {i}" for i in range(10, 42)]  # all texts of one length: nothing is padding
    demos, rankings = str(tmp_path / "demos.jsonl"), str(tmp_path / "rankings.jsonl")
    data.write_jsonl(demos, [{"prompt": prompt, "completion": " was good and long enough"} for prompt in prompts])
    data.write_jsonl(rankings, [{"prompt": prompt, "responses": [" qxz", " xqz", " zxq"]} for prompt in prompts])
    paths = {sft: {"model": checkpoints.sft, "train": demos, "test": demos},
             reward: {"model": checkpoints.sft, "train": rankings, "pairs": "", "sft": ""},
             dpo: {"model": checkpoints.sft, "train": rankings},
             ppo: {"sft": checkpoints.sft, "reward": checkpoints.reward, "prompts": demos, "response_tokens": 8}}[script]
    expected = []
    monkeypatch.setattr(script, "announce", lambda operations, *_: expected.append(operations))
    with FlopCounterMode(display=False) as counter:
        script.main(script.Config(**COMMON, **paths, **changes, out=str(tmp_path / "out")))
    # More: the held-out part of sft and dpo. Less: responses that end, and what the sampler stops for them.
    assert 0.9 < counter.get_total_flops() / expected[0] < 1.2


def test_bytes_of_a_model():
    """Parameters counted twice or not at all, such as those of the unused rows of the vocabulary."""
    config = GPTConfig(vocab_size=100, block_size=12, n_layer=3, n_head=2, width=8)
    assert budget.parameters(config) == sum(x.numel() for x in GPT(config).parameters())
    assert budget.model_bytes(config, 2, 1) == budget.parameters(config) * 40


@pytest.mark.parametrize("seconds, text", [(5, "5 s"), (90, "1.5 min"), (5400, "90 min"), (36000, "10 h")])
def test_duration(seconds, text):
    """Minutes that are called hours."""
    assert budget.duration(seconds) == text


def test_a_short_stage_says_nothing(capsys):
    """A line of noise before every stage of a few seconds, or none before one of hours."""
    budget.announce(1e6, 1e9, "cpu", nullcontext)
    assert capsys.readouterr().out == ""
    budget.announce(1e18, 5.25e9, "cpu", nullcontext)
    assert "5.2 GB of memory" in (out := capsys.readouterr().out) and " h (1.0e+18 operations" in out


def test_more_than_the_gpu_has_is_said(monkeypatch, capsys):
    """A run that dies of memory after an hour, although it was clear before the start."""
    monkeypatch.setattr(torch, "rand", lambda *size, device: torch.ones(2, 2))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**10))
    budget.announce(1e6, 2e9, "cuda", nullcontext)
    assert "more than the 1.0 GB that are free" in capsys.readouterr().out
