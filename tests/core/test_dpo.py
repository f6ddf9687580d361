"""DPO: the loss against its closed form, its gradient, the reference's log-probabilities, and one short run."""
import json
import math
from collections import Counter

import pytest
import torch

import data
import dpo
import stages
from common import UserError
from conftest import both_precisions, close, log_of, ragged_mask
from dpo import dpo_loss
from model import load_model, token_logprobs
from reward import encode_rankings, ranking_loss, without_duplicates


@both_precisions
@pytest.mark.parametrize("smoothing", [[], [0.2]])
def test_loss_is_the_closed_form(dtype, smoothing):
    """A flipped sign, beta on one side only, smoothing that mixes up the labels, a gradient through logged rewards."""
    logprobs = torch.randn(4, 5, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses, good, bad = dpo_loss(*logprobs, 0.3, *smoothing)
    assert losses.requires_grad and not good.requires_grad and not bad.requires_grad
    for i, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(logprobs.T.tolist()):
        margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
        win = 1 / (1 + math.exp(-margin))
        expected = -(1 - sum(smoothing)) * math.log(win) - sum(smoothing) * math.log(1 - win)
        assert losses[i].item() == pytest.approx(expected, **close(dtype))
        assert (good[i] - bad[i]).item() == pytest.approx(margin, **close(dtype))
    assert losses.dtype == good.dtype == dtype and losses.shape == good.shape == bad.shape == (5,)


def test_the_loss_is_the_reward_models_on_implicit_rewards():
    """A pair counted twice, a long ranking that outweighs others, margins that mix two prompts, a wrong gradient."""
    logprobs, ref_logprobs = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    metrics = dpo.measure(logprobs.split([4, 2, 2]), ref_logprobs.split([4, 2, 2]), dpo.Config(beta=0.5))
    rewards = 0.5 * (logprobs - ref_logprobs)
    scores = torch.tensor([[*rewards[:4]], [*rewards[4:6], 0, 0], [*rewards[6:], 0, 0]])
    assert metrics["loss"].item() == pytest.approx(ranking_loss(scores, ragged_mask([4, 2, 2], 4)).item(), rel=1e-5)
    pairs = [[(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], [(4, 5)], [(6, 7)]]
    for name, of in {"margin": lambda i, j: rewards[i] - rewards[j], "accuracy": lambda i, j: rewards[i] > rewards[j],
                     "chosen_logprobs": lambda i, j: logprobs[i], "rejected_reward": lambda i, j: rewards[j]}.items():
        expected = sum(sum(of(i, j).item() for i, j in part) / len(part) for part in pairs) / 3
        assert metrics[name].item() == pytest.approx(expected, abs=1e-6), name
    cfg, exact = dpo.Config(beta=0.3, label_smoothing=0.1), ref_logprobs.double().split([4, 4])
    assert torch.autograd.gradcheck(lambda x: dpo.measure(x.split([4, 4]), exact, cfg)["loss"],
                                    logprobs.double().requires_grad_())


@torch.no_grad()
def test_log_probabilities_are_the_responses_alone(checkpoints, autocast_off):
    """The prompt counted, EOS not counted, or a response's sum given to another row."""
    policy, enc = load_model(checkpoints.sft), data.load_tokenizer(checkpoints.vocab)
    rows = data.read_rankings(checkpoints.rankings)
    rankings = dpo.encode(enc, rows, 32, "all", Counter())
    sums = dpo.response_logprobs(policy, rankings, enc.end, "cpu", autocast_off, size=5)
    assert [len(part) for part in sums] == [len(ranking) for ranking in rankings] == [len(x["responses"]) for x in rows]
    for (ids, first), total in zip(sum(rankings, []), torch.cat(sums).tolist()):
        tokens = torch.tensor([ids])
        assert ids[-1] == enc.end
        assert token_logprobs(policy(tokens), tokens)[0, first - 1:].sum().item() == pytest.approx(total, abs=1e-3)


def test_texts_that_truncation_has_made_equal_are_no_comparison(checkpoints):
    """A pair of which nothing is left but the same beginning: a margin of 0, a label that contradicts itself."""
    enc, counts = data.load_tokenizer(checkpoints.vocab), Counter()
    three = {"prompt": "the", "responses": ["x" * 20 + "a", "y", "x" * 20 + "b"]}
    two = {"prompt": "the", "responses": three["responses"][::2]}
    (ranking,) = dpo.encode(enc, [three, two], 16, "all", counts)
    assert len(ranking) == 2 and enc.decode(ranking[1][0]).endswith("y<|endoftext|>")
    assert counts["responses truncated"] == 4
    assert without_duplicates(encode_rankings(enc, [three, two], 16, counts)) == [[ids for ids, _ in ranking]]
    with pytest.raises(UserError, match="nothing to compare"):
        dpo.encode(enc, [two], 16, "all", counts)
    with pytest.raises(UserError, match="no ranking is left"):
        without_duplicates(encode_rankings(enc, [two], 16, counts))
    (ranking,) = dpo.encode(enc, [{"prompt": "the", "responses": [" a", " b", " c"]}], 16, "ends", counts)
    assert [enc.decode(ids[first:]) for ids, first in ranking] == [" a<|endoftext|>", " c<|endoftext|>"]


def test_a_run_learns_the_order(checkpoints, tmp_path):
    """A reference that moves with the policy, the halves of a batch swapped, or a checkpoint that PPO cannot read."""
    stages.run("dpo", checkpoints.folder, tmp_path, test="", test_share=0.5, epochs=40, lr=3e-3, log_every=1)
    lines = log_of(tmp_path)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and lines[0]["margin"] == pytest.approx(0, abs=1e-5)
    last = [line["accuracy"] for line in lines[-10:]]  # a line is one batch of a few pairs
    assert sum(last) / len(last) > 0.85 and lines[-1]["margin"] > 0.5
    assert lines[-1]["rejected_logprobs"] < lines[0]["rejected_logprobs"]
    assert json.loads((tmp_path / "config.json").read_text())["held_out"]["accuracy"] > 0.6
    load_model(tmp_path)
