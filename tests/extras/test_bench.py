"""The floors of the benchmark: operations counted by formula against operations counted while they run."""
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import budget
from conftest import random_model
from model import ScalarModel
from sampling import KVCache, sample


def counted(work):
    """Operations of the matrix products in work(), as PyTorch saw them go by."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("T, first", [(12, 0), (12, 7), (1, 0)])
def test_flop_counts_what_runs(T, first):
    """A floor that forgets attention, the head or what the last block leaves out: a wrong fraction."""
    model, tokens = random_model(n_layer=3).double(), torch.zeros(2, T, dtype=torch.long)  # no fused kernel to count

    def forward():
        return model.logits(model.trunk(tokens, at=np.s_[:, first:])).sum()
    expected = 2 * budget.flop(model.config, T, T - first, head=True)
    with torch.no_grad():
        assert counted(forward) == expected
    # The first product's input is not a product: its gradient is needed (embeddings), so backward is twice forward.
    assert counted(lambda: forward().backward()) == 3 * expected


def test_flop_counts_scores_and_samples():
    """A reward model's floor that counts positions nobody reads; a sampler's that counts a prompt twice."""
    scorer, model = random_model(ScalarModel).double(), random_model().double()
    tokens = torch.zeros(2, 9, dtype=torch.long)
    with torch.no_grad():
        head = 2 * 2 * scorer.config.width  # the one product that flop() leaves out
        ran = counted(lambda: scorer.score(tokens, None, torch.tensor([4, 8])))
        assert ran == 2 * budget.flop(scorer.config, 9, 1) + head
        expected = 2 * budget.sample_flop(model.config, 9, 5)
        assert counted(lambda: sample(model, tokens, None, 5, bench.NEVER)) == expected
        cache = KVCache(12)
        model.trunk(tokens, cache=cache)
        assert counted(lambda: model.trunk(tokens[:, :1], cache=cache)) == 2 * budget.flop(model.config, 1, 1, past=9)


def test_every_figure_runs(monkeypatch, tmp_path, capsys):
    """A benchmark that no longer fits the scripts it measures: every figure once, on a toy model."""
    monkeypatch.setitem(bench.SIZES, "tiny", (64, 32, 2, 2, 16))
    monkeypatch.setitem(bench.SHAPES, "tiny", {"train": (2, 8), "sample": (4, 4, 4), "ppo": (4, 4, 4)})
    for name, value in {"PAIRS": 2, "PROMPT": 3, "TEXT": 8, "RANKINGS": 2,
                        "SCALES": {"batch": (4, 8), "width": (16, 32)}}.items():
        monkeypatch.setattr(bench, name, value)
    for only, value in (("train,sample,ppo,reward,dpo,dpo-ranked,scaling", "separate"), ("ppo", "shared")):
        bench.main(bench.Config(only=only, value=value, dtype="bfloat16", device="cpu", repeats=2,
                                out=str(tmp_path / "lines")))
    table = capsys.readouterr().out
    for name in ("matrix product", "copy", "train", "sample", "ppo.rollout", "ppo.update", "reward", "dpo",
                 "dpo-ranked", "batch 8"):
        assert f"\n{name} " in table, name
    assert len((tmp_path / "lines").read_text().splitlines()) == 2 + 9 + 4 + 2 + 4


@pytest.mark.parametrize("library, figures", [("transformers", "train,sample"), ("trl", "ppo,reward,dpo,dpo-ranked")])
def test_every_peer_runs(monkeypatch, capsys, library, figures):
    """A comparison that no longer fits what it compares with; only where that is installed."""
    pytest.importorskip(library)
    import bench_peers
    for name, value in {"PAIRS": 2, "PROMPT": 3, "TEXT": 8, "RANKINGS": 2}.items():
        monkeypatch.setattr(bench, name, value)
        monkeypatch.setattr(bench_peers, name, value)
    monkeypatch.setitem(bench.SIZES, "tiny", (64, 32, 2, 2, 16))
    monkeypatch.setitem(bench.SHAPES, "tiny", {"train": (2, 8), "sample": (4, 4, 4), "ppo": (4, 4, 4)})
    bench.main(bench.Config(only=figures, against=library, device="cpu", repeats=2))
    table = capsys.readouterr().out
    assert all(f"\n{figure} {library} " in table for figure in figures.split(","))
