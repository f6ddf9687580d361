"""Arithmetic of tools/bench.py and tools/memory.py against what PyTorch counts; every figure once, on a toy model."""
import json

import model
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from model import GPT, GPTConfig, token_logprobs
from sampling import sample
from study import scaling
from tools import bench, memory
from torch.utils.flop_counter import FlopCounterMode


SIZE = dict(vocab_size=64, block_size=32, n_layer=2, n_head=2, width=16)
FAMILIES = {"GPT-2": GPTConfig(**SIZE), "Llama": GPTConfig(
    **SIZE, n_kv_head=1, head_size=12, mlp_width=24, swiglu=True, rms_norm=True, bias="none", rope=1e4)}


def counted(work):
    """Operations of the matrix products in work(), as PyTorch saw them go by."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("T, first", [(12, 0), (12, 7), (1, 0)])
def test_flop_counts_what_runs(T, first, family):
    """A floor that forgets attention, the head or what the last block leaves out, or has GPT-2's shapes for Llama's."""
    gpt, tokens = GPT(FAMILIES[family]).double(), torch.zeros(2, T, dtype=torch.long)  # no fused kernel to count

    def forward():
        return gpt.logits(gpt.trunk(tokens, at=np.s_[:, first:])).sum()
    expected = 2 * bench.flop(gpt.config, T, T - first, head=True)
    assert counted(torch.no_grad()(forward)) == expected
    # The first product's input is not a product: its gradient is needed (embeddings), so backward is twice forward.
    assert counted(lambda: forward().backward()) == 3 * expected


@torch.no_grad()
def test_flop_counts_samples():
    """A sampler's floor that counts a prompt twice, or once for each response of its group."""
    gpt, tokens = random_model().double(), torch.arange(4)[:, None].expand(4, 9)
    for group, rows in ((1, tokens), (3, tokens.repeat(3, 1))):
        ran = counted(lambda: sample(gpt, rows, None, 5, bench.NEVER))
        assert ran == pytest.approx(4 * group * bench.sample_flop(gpt.config, 9, 5, group))


@pytest.mark.parametrize("library, only, family", [
    ("", bench.Config.only, "GPT-2"), ("", "train,sample", "Llama"), ("transformers", "train,sample", "GPT-2"),
    ("transformers", "train,sample-group", "Llama"), ("trl", "ppo,grpo,reward,dpo", "GPT-2")])
def test_every_figure_runs(monkeypatch, capsys, library, only, family):
    """A benchmark that no longer fits the scripts it measures, or the peers; these only where they are installed."""
    if library:
        pytest.importorskip(library, reason=f"{library} is not installed")
    rankings = {"reward": (2, 2), "dpo": (2, 2), "dpo-ranked": (2, 4)}
    for name, small in {"TINY": FAMILIES[family], "TRAIN": (2, 8), "SAMPLE": (4, 4, 4), "GROUP": 2, "LONG": 8,
                        "PROMPT": 3, "TEXT": 8, "RANKINGS": rankings}.items():
        monkeypatch.setattr(bench, name, small)
    bench.main(bench.Config(only=only, dtype="bfloat16", device="cpu", repeats=1, peers=bool(library),
                            profile=family == "Llama"))
    printed = "\n" + capsys.readouterr().out
    for name in ["matrix product", *(f"{name} {library}" for name in only.split(","))]:
        assert f"\n{name} " in printed.replace("  ", " "), name


@pytest.mark.parametrize("family, widths", [("GPT-2", [8, 16]), ("Llama", [16])])
def test_scaling_changes_one_quantity_at_a_time(monkeypatch, tmp_path, family, widths):
    """Points that are all of the same shape, or a width that does not divide among the heads."""
    monkeypatch.setattr(bench, "TINY", FAMILIES[family])
    monkeypatch.setattr(scaling, "PROMPT", 8)
    monkeypatch.setattr(scaling, "AXES", {"prompt": (8, 16), "response": (8, 4), "width": (), "group": (1, 2)})
    monkeypatch.setattr(scaling, "RESPONSE", 8)
    scaling.main(scaling.Config(str(tmp_path), "tiny", episodes=4, repeats=1))
    points, floors = json.loads((tmp_path / "scaling.json").read_text())["points"], {}
    for point in points:
        floors.setdefault(point["axis"], []).append((point["value"], point["floor"]))
    assert [value for value, _ in floors["width"]] == widths
    usual = floors["prompt"][0][1]
    assert floors["prompt"][1][1] > usual == floors["response"][0][1] > floors["response"][1][1]
    assert floors["width"][-1][1] == floors["group"][0][1] == usual > floors["group"][1][1]
    assert (tmp_path / "scaling.png").stat().st_size > 1000


@pytest.mark.parametrize("recompute, read", [(False, 0), (False, 24), (True, 24)])
def test_bytes_that_a_row_keeps(monkeypatch, recompute, read):
    """Memory that is out by a factor: what the backward pass really keeps of one row, counted tensor by tensor."""
    monkeypatch.setattr(model, "attention",  # as on a GPU
                        lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    config, T, kept = GPTConfig(vocab_size=640, block_size=160, n_layer=6, n_head=4, width=64), 160, {}
    gpt, tokens = GPT(config), torch.zeros(1, T).long()
    gpt.trunk.recompute = recompute
    weights = {shape for p in gpt.parameters() for shape in (p.shape, p.shape[::-1])}  # and their copies in bf16

    def keep(x):
        if x.shape not in weights and x.dtype != torch.long:
            kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = gpt.trunk(tokens)
        _ = token_logprobs(gpt.logits(hidden[:, -read:]), tokens[:, -read:]) if read else None
    expected = memory.row_bytes(config, 1, T, 0, recompute)
    if recompute:  # the block that the backward pass computes again comes later
        expected -= memory.row_bytes(config, 1, T, 0, False) // config.n_layer
    expected += read * 4 * config.vocab_size  # log-softmax; the logits and their gradients come and go
    # On a CPU layer norms are computed in bf16, on a GPU in float32: less is kept here.
    assert 0.6 < sum(size for size, _ in kept.values()) / expected < 1.3
    assert memory.parameters(config) == sum(x.numel() for x in gpt.parameters())
