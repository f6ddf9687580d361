"""RLOO and GRPO: group advantages against closed forms, the policy gradient by enumeration, groups in a rollout."""
import itertools

import pytest
import torch

import ppo
from conftest import END, both_precisions, close, log_of, ppo_config, random_model, rollout_of
from model import ScalarModel
from ppo import group_advantages, policy_loss


@both_precisions
@pytest.mark.parametrize("K", [2, 3, 5])
def test_group_advantages(dtype, K):
    """A baseline with the response itself in it, of the wrong rows or the whole rollout; a deviation over n."""
    returns = torch.randn(4 * K, generator=torch.Generator().manual_seed(K), dtype=torch.float64).to(dtype)
    rows = returns.tolist()
    for i in range(4 * K):
        group = rows[i - i % K:i - i % K + K]
        mean, others = sum(group) / K, (sum(group) - rows[i]) / (K - 1)
        std = (sum((x - mean) ** 2 for x in group) / (K - 1)) ** 0.5
        rloo, grpo = (group_advantages(returns, K, kind) for kind in ("rloo", "grpo"))
        assert rloo[i].item() == pytest.approx(rows[i] - others, **close(dtype))
        assert grpo[i].item() == pytest.approx((rows[i] - mean) / (std + 1e-4), **close(dtype))
        assert rloo.dtype == grpo.dtype == dtype and rloo.shape == grpo.shape == (4 * K,)


@both_precisions
def test_a_group_without_differences(dtype):
    """NaN, or a large number, where all responses to a prompt have the same return; another prompt's changed by it."""
    returns = torch.tensor([3, 3, 3, 3, 1, 2, 3, 4], dtype=dtype)
    assert group_advantages(returns, 4, "rloo").tolist() == pytest.approx([0, 0, 0, 0, -2, -2 / 3, 2 / 3, 2])
    assert group_advantages(returns, 4, "grpo")[:4].tolist() == [0, 0, 0, 0]


def test_the_gradient_of_rloo_is_the_policy_gradient():
    """A biased baseline, or a wrong claim in the docs. A toy policy over EOS and two tokens, responses of at most two,
    K = 2, the expectation by enumeration of all pairs: the loss summed over tokens has the true policy gradient; the
    mean over the tokens of a minibatch, which is PPO's, is along it only if all responses have the same length."""
    random = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 3, dtype=torch.float64, generator=random, requires_grad=True)  # state (none, 1, 2), token
    responses = [(END,), *((first, second) for first in (1, 2) for second in (END, 1, 2))]
    scores = torch.randn(len(responses), dtype=torch.float64, generator=random)
    mask = torch.tensor([[1.0, len(ids) - 1.0] for ids in responses], dtype=torch.float64)

    def gradient(loss):
        return torch.autograd.grad(loss, theta, retain_graph=True)[0].flatten()

    for may_end_at_once in (True, False):
        never = torch.zeros(3, 3, dtype=torch.float64)
        never[0, END] = 0 if may_end_at_once else -torch.inf
        table = (theta + never).log_softmax(-1)
        logprobs = torch.stack([torch.stack([table[0, ids[0]], table[ids[0], ids[-1]]]) for ids in responses])  # (7, 2)
        real = range(0 if may_end_at_once else 1, 7)
        probs = [(logprobs[i] * mask[i]).sum().exp() for i in real]
        assert sum(probs).item() == pytest.approx(1)
        true = gradient(sum(p * scores[i] for p, i in zip(probs, real)))
        summed, averaged = torch.zeros_like(true), torch.zeros_like(true)
        for (p, i), (q, j) in itertools.product(zip(probs, real), repeat=2):
            pair, weight = [i, j], (p * q).item()
            advantages = group_advantages(scores[pair], 2, "rloo")[:, None] * mask[pair]
            loss, _ = policy_loss(logprobs[pair], logprobs[pair].detach(), advantages, mask[pair], 0.2)
            averaged -= weight * gradient(loss)
            summed -= weight * gradient(loss * mask[pair].sum() / 2)  # per response
        assert summed.tolist() == pytest.approx(true.tolist(), abs=1e-12)
        cosine = torch.cosine_similarity(averaged, true, dim=0).item()
        assert (cosine > 1 - 1e-12) != may_end_at_once and cosine > 0.8


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_groups_in_a_rollout(kind):
    """Rows compared with another prompt's, as they are sorted by length; KL left out of the return; an advantage on
    padding, or other than its response's at some token; a value model asked; the share of equal groups off."""
    policy, ref = random_model(seed=1), random_model(seed=2)
    reward = random_model(ScalarModel, seed=3)
    prompts = [ids for ids in ([END, 3, 4], [END], [END, 7, 5, 2]) for _ in range(4)]
    cfg = ppo_config(advantages=kind, group=4, episodes=12)
    rollout, metrics = rollout_of(policy, ref, reward, None, prompts, cfg, seed=1, kl_coef=0.3)
    assert rollout["pad"].tolist() != sorted(rollout["pad"].tolist(), reverse=True)  # rows are not in prompts' order
    mask, P = rollout["mask"], rollout["tokens"].size(1) - rollout["mask"].size(1)
    kl = ((rollout["old_logprobs"] - rollout["ref_logprobs"]) * mask).sum(1)
    returns = {}  # prompt: (return, row) of its responses
    for row in range(12):
        prompt = tuple(rollout["tokens"][row, int(rollout["pad"][row]):P].tolist())
        returns.setdefault(prompt, []).append(((rollout["scores"][row] - 0.3 * kl[row]).item(), row))
    assert len({int(n) for n in rollout["lengths"]}) > 2 and [len(group) for group in returns.values()] == [4, 4, 4]
    for group in returns.values():
        expected = group_advantages(torch.tensor([x for x, _ in group]), 4, kind)
        for (_, row), advantage in zip(group, expected):
            wanted = [advantage.item() * x for x in mask[row].tolist()]
            assert rollout["advantages"][row].tolist() == pytest.approx(wanted, abs=1e-4)
    ratio = metrics["advantage_group_std"] / (metrics["group_std"] if kind == "rloo" else 1)
    assert ratio.item() == pytest.approx(4 / 3 if kind == "rloo" else 1, abs=1e-3)
    assert metrics["equal_groups"] == 0 and not rollout["values"].any() and not rollout["returns"].any()
    cfg = ppo_config(advantages=kind, group=4, episodes=12, missing_eos_score=-1.0, response_tokens=1)
    rollout, metrics = rollout_of(policy, ref, reward, None, prompts, cfg, kl_coef=0.3)
    ended = {}  # one token, which is EOS or not: scores are all -1 where no response ended, whatever their KL
    for row in range(12):
        ended.setdefault(int(rollout["pad"][row]), []).append(rollout["tokens"][row, -1].item() == END)
    assert metrics["equal_groups"] == pytest.approx(sum(len(set(group)) == 1 for group in ended.values()) / 3)
    assert 0 < metrics["equal_groups"] and torch.isfinite(rollout["advantages"]).all()


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_prompts_of_a_run_with_groups(checkpoints, tmp_path, monkeypatch, kind):
    """A group spread over two rollouts, a prompt used twice before others had their turn; a value model built."""
    seen, plain = [], ppo.collect
    monkeypatch.setattr(ppo, "collect", lambda *args: seen.append(args[3:5]) or plain(*args))
    ppo.main(ppo_config(out=str(tmp_path), sft=checkpoints.sft, reward=checkpoints.reward, prompts=checkpoints.prompts,
                        iterations=6, epochs=1, episodes=16, advantages=kind))
    values, batches = zip(*seen)
    assert values == (None,) * 6
    groups = [tuple(batch[i] for i in range(0, 16, 4)) for batch in batches]
    assert all(batch == [ids for ids in group for _ in range(4)] for batch, group in zip(batches, groups))
    assert sorted(sum(groups[:3], ())) == sorted(sum(groups[3:], ())) and groups[:3] != groups[3:]  # 12, 4 a rollout
    assert "explained_variance" not in log_of(tmp_path)[-1] and log_of(tmp_path)[-1]["value_loss"] == 0
