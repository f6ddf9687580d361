"""The estimate that is printed before a stage: its operations against what PyTorch counts in a run of that stage."""
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import budget
import data
import dpo
import ppo
import model
import reward
import sampling
import sft
from gpt2 import SIZES
from model import GPT, GPTConfig, token_logprobs

COMMON = {"device": "cpu", "dtype": "bfloat16"}  # attention is written out in bf16: fused kernels are not counted
STAGES = [pytest.param(sft, {"epochs": 2.0, "evals": 1, "pack": 8}, id="sft"),
          pytest.param(reward, {"epochs": 2}, id="reward"), pytest.param(dpo, {"epochs": 2}, id="dpo"),
          pytest.param(ppo, {"iterations": 2, "episodes": 8}, id="ppo"),
          pytest.param(ppo, {"iterations": 2, "episodes": 8, "value": "shared"}, id="ppo shared")]


@pytest.mark.parametrize("script, changes", STAGES)
def test_operations_of_a_stage(checkpoints, tmp_path, monkeypatch, script, changes):
    """An estimate that forgets the backward pass, a model, the epochs or the held-out part: out by a factor."""
    prompts = [f"the film {i}" for i in range(10, 42)]  # all texts of one length: nothing is padding
    demos, rankings = str(tmp_path / "demos.jsonl"), str(tmp_path / "rankings.jsonl")
    data.write_jsonl(demos, [{"prompt": prompt, "completion": " was good and long enough"} for prompt in prompts])
    data.write_jsonl(rankings, [{"prompt": prompt, "responses": [" qxz", " xqz", " zxq"]} for prompt in prompts])
    pairs = str(tmp_path / "pairs.jsonl")  # of three texts each, which are scored once
    data.write_jsonl(pairs, [{"prompt": prompt, "chosen": " qxz", "rejected": text} for prompt in prompts
                             for text in (" xqz", " zxq")])
    # Responses of full length, as the estimate takes them to be: end of text is never drawn.
    end, plain = data.load_tokenizer(checkpoints.vocab).eot_token, sampling.draw
    monkeypatch.setattr(sampling, "draw", lambda probs, *how: plain(probs.index_fill(1, torch.tensor(end), 0), *how))
    paths = {sft: {"model": checkpoints.sft, "train": demos, "test": demos},
             reward: {"model": checkpoints.sft, "train": rankings, "pairs": pairs, "sft": ""},
             dpo: {"model": checkpoints.sft, "train": rankings},
             ppo: {"sft": checkpoints.sft, "reward": checkpoints.reward, "prompts": demos,
                   "response_tokens": 8}}[script]
    expected = []
    monkeypatch.setattr(script, "announce", lambda operations, *_: expected.append(operations))
    with FlopCounterMode(display=False) as counter:
        script.main(script.Config(**COMMON, **paths, **changes, out=str(tmp_path / "out")))
    assert counter.get_total_flops() == pytest.approx(expected[0], rel=0.02)  # prompts, whose mean is rounded


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("read, device", [(0, "cuda"), (24, "cuda"), (0, "cpu")])
def test_bytes_that_a_row_keeps(monkeypatch, recompute, read, device):
    """Memory that is out by a factor: what the backward pass really keeps of one row, counted tensor by tensor."""
    if device == "cuda":  # fused attention
        monkeypatch.setattr(model, "attention",
                            lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    config, T = GPTConfig(vocab_size=640, block_size=160, n_layer=6, n_head=4, width=64), 160
    gpt, kept = GPT(config), {}
    gpt.trunk.recompute = recompute
    weights = {shape for p in gpt.parameters() for shape in (p.shape, p.shape[::-1])}  # and their copies in bf16

    def keep(x):
        if x.shape not in weights and x.dtype != torch.long:
            kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x
    tokens = torch.randint(640, (1, T), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = gpt.trunk(tokens)
        _ = token_logprobs(gpt.logits(hidden[:, -read:]), tokens[:, -read:]) if read else None
    expected = budget.row_bytes(config, 1, T, 0, recompute, device)
    if recompute:  # the block that the backward pass computes again comes later
        expected -= budget.row_bytes(config, 1, T, 0, False, device) // config.n_layer
    expected += read * 4 * config.vocab_size  # log-softmax; the logits and their gradients come and go
    # On a CPU layer norms are computed in bf16, on a GPU in float32: less is kept here.
    assert 0.6 < sum(size for size, _ in kept.values()) / expected < 1.3


@pytest.mark.parametrize("size, microbatch", [("gpt2", 16), ("gpt2-medium", 4)])
def test_the_presets_fit_into_24_gb(size, microbatch):
    """A preset for one GPU of 24 GB that dies there of memory, with the README's flags."""
    n_layer, n_head, width, *_ = SIZES[size]
    for name, block in (("gpt2", 128), ("hh", 512)):
        config = GPTConfig(50257, block, n_layer, n_head, width, gelu="tanh")
        small = {"microbatch": microbatch} if size != "gpt2" else {}
        prompts, texts = [[0] * (block // 2)] * 600, [[[0] * block] * (4 if name == "gpt2" else 2)] * 64
        rows = [([0] * block, 1)] * 64
        cfgs = [script.Config(**{**script.PRESETS[preset], **small})
                for script, preset in ((sft, f"{name}-sft"), (reward, name), (ppo, name))]
        budgets = [budget.sft_budget(config, cfgs[0], rows, rows, 1, "cuda"),
                   budget.reward_budget(config, cfgs[1], texts, texts, [], "cuda"),
                   budget.ppo_budget(config, cfgs[2], prompts, "cuda")]
        assert all(size < 22e9 for _, size in budgets), (name, budgets)


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
