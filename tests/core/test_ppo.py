"""PPO against slow loops, closed forms and enumeration; then tiny runs that must stand still or go the right way."""
import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import common
import model as model_module
import ppo
import runs
from checkpoint import read_checkpoint
from common import UserError
from conftest import END, log_of, ppo_config, ragged_mask, random_model, rollout_of, script
from data import pad_prompts
from estimators import repetition
from model import ScalarModel, token_logprobs
from ppo import AdaptiveKL, gae, masked_mean, policy_loss, shape_rewards, value_loss, whiten

ROOT = Path(__file__).parent.parent
LENGTHS = [3, 1, 5, 0]  # a response of one token, a full row, and a row of padding only
PROMPTS = [[END, 3, 4], [END], [END, 7, END, 2], [END, 1], [END, 5], [END, 9, 9, 9], [END, 2, 3], [END, 6]]
FAST = {"iterations": 20, "episodes": 12, "epochs": 4, "microbatch": 12, "lr": 3e-2, "temperature": 1.0,
        "kl_horizon": 0.0}
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def numbers(count, dtype, seed=0):
    """count random (B, R) tensors and the ragged mask; outside the mask stand large numbers that must not count."""
    random, mask = torch.Generator().manual_seed(seed), ragged_mask(LENGTHS, 5).to(dtype)
    made = [torch.randn(len(LENGTHS), 5, dtype=torch.float64, generator=random).to(dtype) for _ in range(count)]
    return [torch.where(mask == 1, x, 7 * x) for x in made], mask


def real(x, lengths=LENGTHS):
    """The numbers inside the mask as one flat list, row by row."""
    return [value for row, n in zip(x.tolist(), lengths) for value in row[:n]]


def close(dtype):
    return {"abs": 1e-5} if dtype == torch.float32 else {"abs": 1e-12}


# ---- the mathematics -------------------------------------------------------------------------------------------------


@both_precisions
def test_masked_mean(dtype):
    """A mean over the padding too, or NaN for an empty mask."""
    (x,), mask = numbers(1, dtype)
    assert masked_mean(x, mask).item() == pytest.approx(sum(real(x)) / 9, **close(dtype))
    assert masked_mean(x, mask).dtype == dtype
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0


@both_precisions
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(dtype, shift_mean):
    """The variance over n - 1, or over the padding; a mean that is lost; numbers left outside the mask."""
    (x,), mask = numbers(1, dtype)
    mean = sum(real(x)) / 9
    deviation = math.sqrt(sum((v - mean) ** 2 for v in real(x)) / 9 + 1e-8)
    expected = [(v - mean) / deviation + (0 if shift_mean else mean) for v in real(x)]
    assert real(whiten(x, mask, shift_mean)) == pytest.approx(expected, **close(dtype))
    assert not (whiten(x, mask, shift_mean) * (1 - mask)).any()


def test_whiten_of_equal_numbers():
    """A division by a variance of 0."""
    assert whiten(torch.full((1, 4), 3.0), torch.ones(1, 4)).tolist() == [[0, 0, 0, 0]]


@both_precisions
def test_shape_rewards(dtype):
    """The score at the wrong token (the last column, or the last token twice), a flipped KL, a row without tokens."""
    (logprobs, ref_logprobs), mask = numbers(2, dtype)
    scores = torch.tensor([1.5, -2.0, 3.0, 100.0], dtype=dtype)
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, 0.3)
    for b, length in enumerate(LENGTHS):
        for t in range(5):
            expected = -0.3 * (logprobs[b, t] - ref_logprobs[b, t]).item() if t < length else 0
            expected += scores[b].item() if t == length - 1 else 0
            assert rewards[b, t].item() == pytest.approx(expected, **close(dtype)), (b, t)
    assert rewards.dtype == dtype


@both_precisions
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (1.0, 1.0)])
def test_gae_is_its_double_sum(dtype, gamma, lam):
    """The recursion against its definition: advantage(t) = sum over l of (gamma lam)^l delta(t + l), eq. 16."""
    (rewards, values), mask = numbers(2, dtype)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b, length in enumerate(LENGTHS):
        v = values[b].tolist()[:length] + [0.0]  # after the last token nothing follows
        delta = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(5):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages[b, t].item() == pytest.approx(expected, **close(dtype)), (b, t)
            assert returns[b, t].item() == pytest.approx(expected + v[t] if t < length else 0, **close(dtype))
    assert advantages.dtype == returns.dtype == dtype


@both_precisions
def test_gae_with_lambda_one_is_monte_carlo(dtype):
    """A bootstrap from the padding: with gamma and lambda 1 the return is the sum of the rewards still to come."""
    (rewards, values), mask = numbers(2, dtype)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            to_come = sum(rewards[b].tolist()[t:length])
            assert returns[b, t].item() == pytest.approx(to_come, **close(dtype))
            assert advantages[b, t].item() == pytest.approx(to_come - values[b, t].item(), **close(dtype))


@both_precisions
def test_policy_loss(dtype):
    """A minimum that should be a maximum, a flipped ratio, or means over the padding."""
    (logprobs, old, advantages), mask = numbers(3, dtype)
    loss, clip_fraction = policy_loss(logprobs, old, advantages, mask, 0.2)
    terms, clipped = [], 0
    for new, before, advantage in zip(real(logprobs), real(old), real(advantages)):
        ratio = math.exp(new - before)
        inside = min(max(ratio, 0.8), 1.2)
        terms.append(-min(ratio * advantage, inside * advantage))
        clipped += inside * advantage < ratio * advantage
    assert loss.item() == pytest.approx(sum(terms) / 9, **close(dtype))
    assert clip_fraction.item() == pytest.approx(clipped / 9, **close(dtype)) and 0 < clipped < 9
    assert loss.dtype == dtype


@pytest.mark.parametrize("ratio, advantage, gradient", [
    (1.0, 2.0, -2.0), (1.0, -2.0, 2.0),    # the first minibatch: plain policy gradient, minus the advantage
    (1.5, 2.0, 0.0), (0.5, -2.0, 0.0),     # moved far enough in the right direction: no more
    (0.5, 2.0, -1.0), (1.5, -2.0, 3.0),    # moved in the wrong direction: always corrected
])
def test_policy_gradient_stops_where_the_clip_binds(ratio, advantage, gradient):
    """A sign error, or a clip on the side where a mistake must be mended."""
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, clip_fraction = policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), 0.2)
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert clip_fraction.item() == (gradient == 0)


@both_precisions
def test_value_loss(dtype):
    """A clip around the return in place of the old value, the smaller error in place of the larger, a missing half."""
    (values, old, returns), mask = numbers(3, dtype)
    loss, clip_fraction = value_loss(values, old, returns, mask, 0.2)
    terms, clipped = [], 0
    for value, before, target in zip(real(values), real(old), real(returns)):
        near = min(max(value, before - 0.2), before + 0.2)
        terms.append(0.5 * max((value - target) ** 2, (near - target) ** 2))
        clipped += (near - target) ** 2 > (value - target) ** 2
    assert loss.item() == pytest.approx(sum(terms) / 9, **close(dtype))
    assert clip_fraction.item() == pytest.approx(clipped / 9, **close(dtype)) and 0 < clipped < 9
    assert loss.dtype == dtype


@pytest.mark.parametrize("kl, factor", [(6.0, 1.0), (6.6, 1 + 0.1 * 0.05), (600.0, 1 + 0.2 * 0.05),
                                        (0.0, 1 - 0.2 * 0.05), (-5.0, 1 - 0.2 * 0.05)])
def test_adaptive_kl(kl, factor):
    """A controller that pushes the wrong way, or an error that is not held to 20 %."""
    controller = AdaptiveKL(0.15, target=6.0, horizon=1000)
    controller.update(kl, episodes=50)
    assert controller.coef == pytest.approx(0.15 * factor, rel=1e-12)


def test_adaptive_kl_grows_at_most_exponentially():
    """A horizon that counts updates in place of episodes: over N episodes it grows by exp(0.2 N / horizon) at most."""
    controller, fixed = AdaptiveKL(0.15, 6.0, 1000), AdaptiveKL(0.15, 6.0, 0)
    for _ in range(40):
        controller.update(1e9, episodes=100)
        fixed.update(1e9, episodes=100)
    bound = 0.15 * math.exp(0.2 * 4000 / 1000)
    assert 0.97 * bound < controller.coef < bound
    assert fixed.coef == 0.15


# ---- the rollout -----------------------------------------------------------------------------------------------------


def test_rollout_against_one_response_at_a_time(four_models):
    """Every shift, mask and position of a rollout: the same numbers from unpadded texts, one token after the other."""
    policy, ref, reward, value = four_models
    cfg, kl_coef = ppo_config(lam=0.9, gamma=0.98), 0.1
    rollout, metrics = rollout_of(policy, ref, reward, value, PROMPTS, cfg)
    R = rollout["mask"].size(1)
    texts, lengths, seen, rewards_of, all_advantages = [], [], {}, [], []
    for row in range(8):
        skip, length = int(rollout["pad"][row]), int(rollout["mask"][row].sum())
        text = rollout["tokens"][row].tolist()[skip:]
        prompt, text = text[:len(text) - R], text[:len(text) - R + length]
        assert rollout["mask"][row].tolist() == [1.0] * length + [0.0] * (R - length)
        texts.append(prompt)
        lengths.append(length)
        logprobs, ref_logprobs, values, entropies = [], [], [], []
        for t in range(len(prompt), len(text)):
            before = torch.tensor([text[:t]])
            distribution = (policy(before)[0, -1] / 0.7).log_softmax(-1)
            logprobs.append(distribution[text[t]].item())
            ref_logprobs.append((ref(before)[0, -1] / 0.7).log_softmax(-1)[text[t]].item())
            values.append(value(before)[0, -1].item())
            entropies.append(-(distribution.exp() * distribution).sum().item())
        score = reward(torch.tensor([text]))[0, -1].item()
        rewards = [-kl_coef * (a - b) for a, b in zip(logprobs, ref_logprobs)]
        rewards[-1] += score
        delta = [rewards[t] + 0.98 * (values + [0.0])[t + 1] - values[t] for t in range(length)]
        advantages = [sum((0.98 * 0.9) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]
        expected = {"old_logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, "entropy": entropies,
                    "returns": [a + v for a, v in zip(advantages, values)]}
        for name, numbers in expected.items():
            assert rollout[name][row, :length].tolist() == pytest.approx(numbers, abs=1e-4), name
            assert not rollout[name][row, length:].any(), name
            seen.setdefault(name, []).extend(numbers)
        assert rollout["scores"][row].item() == pytest.approx(score, abs=1e-4)
        assert rollout["lengths"][row].item() == length
        rewards_of.append(sum(rewards))
        all_advantages += advantages
    totals = [len(prompt) + length for prompt, length in zip(texts, lengths)]  # neighbours need little padding
    assert sorted(texts) == sorted(PROMPTS) and totals == sorted(totals) and len(set(lengths)) > 1
    flat, count = torch.tensor(all_advantages), sum(lengths)
    white = (flat - flat.mean()) / flat.std(unbiased=False)
    assert real(rollout["advantages"], lengths) == pytest.approx(white.tolist(), abs=1e-3)

    log_ratio = [a - b for a, b in zip(seen["old_logprobs"], seen["ref_logprobs"])]
    error = [a - b for a, b in zip(seen["returns"], seen["values"])]
    returns, sampled = torch.tensor(seen["returns"]), rollout["tokens"][:, -R:]
    expected = {"score": rollout["scores"].mean(), "score_std": rollout["scores"].std(), "rewards": sum(rewards_of) / 8,
                "kl": sum(log_ratio) / 8, "kl_k3": sum(math.exp(-x) - 1 + x for x in log_ratio) / 8,
                "entropy": sum(seen["entropy"]) / count, "length": count / 8,
                "end_rate": sum(sampled[row, n - 1] == END for row, n in enumerate(lengths)) / 8,
                "distinct": len({tuple(row) for row in sampled.tolist()}) / 8,
                "repetition": sum(1 - len({tuple(row[t:t + 2]) for t in range(n - 1)}) / max(1, n - 1) if n > 1 else 0
                                  for row, n in zip(sampled.tolist(), lengths)) / 8,
                "explained_variance": 1 - sum(x * x for x in error) / count / returns.var(unbiased=False)}
    for name, number in expected.items():
        assert float(metrics[name]) == pytest.approx(float(number), abs=1e-3), name
    assert set(metrics) == set(expected) | {"sampler_difference"}


def test_padding_changes_no_number(four_models, monkeypatch):
    """Means diluted by padding: a calmer policy than the real one. More padding on both sides must change nothing."""
    cfg = ppo_config(whiten_rewards=True)
    rollout, metrics = rollout_of(*four_models, PROMPTS, cfg)
    plain_sample, plain_pad = ppo.sample_prompts, ppo.pad_prompts

    def padded_sample(*args, **how):
        responses, lengths, logprobs = plain_sample(*args, **how)
        responses, logprobs = (nn.functional.pad(x, (0, 5), value=v) for x, v in ((responses, END), (logprobs, -50.0)))
        return responses, lengths, logprobs

    def padded_prompts(prompts, pad_id):
        tokens, pad = plain_pad(prompts, pad_id)
        return nn.functional.pad(tokens, (4, 0), value=pad_id), pad + 4
    monkeypatch.setattr(ppo, "sample_prompts", padded_sample)
    monkeypatch.setattr(ppo, "pad_prompts", padded_prompts)
    wide, wide_metrics = rollout_of(*four_models, PROMPTS, cfg)
    R = rollout["mask"].size(1)
    assert wide["mask"].size(1) == R + 5 and wide["tokens"].size(1) == rollout["tokens"].size(1) + 9
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(wide_metrics[name]), abs=1e-5), name
    for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
        assert torch.allclose(rollout[name], wide[name][:, :R], atol=1e-4), name
        assert not wide[name][:, R:].any(), name

    def losses(rows):
        logprobs, values, mask = rows["old_logprobs"] + 0.5 * rows["mask"], rows["values"] + 0.5, rows["mask"]
        return [float(x) for x in (*policy_loss(logprobs, rows["old_logprobs"], rows["advantages"], mask, 0.2),
                                   *value_loss(values, rows["values"], rows["returns"], mask, 0.2))]
    assert losses(rollout) == pytest.approx(losses(wide), abs=1e-5)


def test_policy_equal_to_ref_gives_no_kl(four_models):
    """Policy and reference read at different positions, temperatures or masks: the KL must be 0 to the bit."""
    policy, _, reward, value = four_models
    rollout, metrics = rollout_of(policy, copy.deepcopy(policy), reward, value, PROMPTS, ppo_config())
    assert torch.equal(rollout["old_logprobs"], rollout["ref_logprobs"])
    assert metrics["kl"] == 0 and metrics["kl_k3"] == 0
    assert metrics["sampler_difference"] <= 5e-6


def test_kl_estimators_by_enumeration(monkeypatch):
    """A flipped log-ratio: the expectations of k1 and k3 over all responses of a toy policy are its exact KL."""
    policy, ref = (random_model(seed=seed, vocab_size=2) for seed in (1, 2))
    scorer, other = random_model(ScalarModel, vocab_size=2), 1
    responses = [[END], [other, END], [other, other]]  # all there are, of at most two tokens
    exact = k1 = k3 = total = 0.0
    for response in responses:
        drawn = torch.tensor([response]), torch.tensor([len(response)]), torch.zeros(1, len(response))
        monkeypatch.setattr(ppo, "sample_prompts", lambda *_, **__: drawn)
        text = torch.tensor([[END, other] + response])
        log_p, log_q = (token_logprobs(model(text), text, 0.7)[0, 1:].sum().item() for model in (policy, ref))
        with pytest.warns(UserWarning, match="degrees of freedom"):  # the standard deviation of one score
            _, metrics = rollout_of(policy, ref, scorer, scorer, [[END, other]], ppo_config())
        p = math.exp(log_p)
        total, exact = total + p, exact + p * (log_p - log_q)
        k1, k3 = k1 + p * metrics["kl"].item(), k3 + p * metrics["kl_k3"].item()
    assert total == pytest.approx(1, abs=1e-6) and exact > 0.05
    assert k1 == pytest.approx(exact, abs=1e-5)
    # k3 is summed over tokens: its expectation needs that of each token, which the enumeration also gives.
    assert k3 == pytest.approx(exact, abs=1e-5)


def test_ppo_samples_from_the_full_softmax(four_models):
    """Sampling with top-k, top-p or another temperature than the log-probabilities have: a KL that stays negative."""
    policy, ref, reward, value = four_models
    count = 4096
    cfg = ppo_config(response_tokens=1, temperature=2.0, microbatch=count)
    rollout, metrics = rollout_of(policy, ref, reward, value, [PROMPTS[0]] * count, cfg)
    drawn = torch.bincount(rollout["tokens"][:, -1], minlength=11) / count
    expected = (policy(torch.tensor([PROMPTS[0]]))[0, -1] / 2.0).softmax(-1)
    assert torch.allclose(drawn, expected, atol=0.02)
    assert (drawn > 0).all() and expected.min() < 0.05  # the unlikeliest token too
    assert metrics["sampler_difference"] <= 5e-6


def scripted_rollout(monkeypatch, models, responses, **changes):
    """A rollout in which the sampler draws these responses (after its end a row would draw 9)."""
    script(monkeypatch, *responses)
    prompts = [[END, 1 + row] for row in range(len(responses))]  # of equal length: the order stays
    return rollout_of(*models, prompts, ppo_config(response_tokens=4, microbatch=8, **changes))


def test_end_of_text_that_is_also_the_padding(four_models, monkeypatch):
    """Masks from comparing ids: the real end is lost, and an immediate end has length 0 or -1."""
    responses = [[END], [4, END], [5, 6, 7, END], [8, 8, 8, 8]]
    rollout, metrics = scripted_rollout(monkeypatch, four_models, responses)
    assert rollout["mask"].sum(1).tolist() == [1, 2, 4, 4]  # in order of length
    assert rollout["tokens"][:, -4:].tolist() == [[END] * 4, [4, END, END, END], [5, 6, 7, END], [8, 8, 8, 8]]
    assert metrics["end_rate"] == 0.75 and metrics["length"] == 11 / 4
    reward = four_models[2]
    for row, response in enumerate(responses):
        expected = reward(torch.tensor([[END, 1 + row] + response]))[0, -1]  # end of text included
        assert rollout["scores"][row].item() == pytest.approx(expected.item(), abs=1e-5)


def test_score_of_a_response_without_end(four_models, monkeypatch):
    """The end-of-text rule applied to the wrong rows, or to the score that is logged."""
    responses, advantages = [[END], [4, END], [5, 6, 7, END], [8, 8, 8, 8]], dict(lam=1.0, gamma=1.0)
    rollout, metrics = scripted_rollout(monkeypatch, four_models, responses, no_end_score=-9.0, **advantages)
    log_ratio = ((rollout["old_logprobs"] - rollout["ref_logprobs"]) * rollout["mask"]).sum(1)
    judged = torch.cat([rollout["scores"][:3], torch.tensor([-9.0])])
    # With lambda 1 the first return is the sum of all rewards.
    assert torch.allclose(rollout["returns"][:, 0], judged - 0.1 * log_ratio, atol=1e-5)
    assert metrics["score"] == rollout["scores"].mean()


def test_whitened_rewards_are_masked_again(four_models):
    """A shifted mean left in the padding, and returns from whitened advantages, which the value could never learn."""
    rollout, _ = rollout_of(*four_models, PROMPTS, ppo_config(whiten_rewards=True, lam=1.0, gamma=1.0))
    mask = rollout["mask"]
    assert 0 < mask.mean() < 1 and not (rollout["returns"] * (1 - mask)).any()
    rewards = shape_rewards(rollout["scores"], rollout["old_logprobs"], rollout["ref_logprobs"], mask, 0.1)
    flat = rewards[mask == 1]
    scaled = (rewards - flat.mean()) / flat.std(unbiased=False) + flat.mean()  # the mean stays
    assert torch.allclose(rollout["returns"][:, 0], (scaled * mask).sum(1), atol=1e-4)
    assert masked_mean(rollout["advantages"], mask).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("P, longest", [(3, 5), (5, 3), (8, 8), (1, 7)])
def test_select_keeps_prompt_and_response(P, longest):
    """Columns told apart by their number alone: with P + longest == R the tokens were cut twice."""
    R, rows = 8, slice(1, 3)
    tokens, mask = torch.arange(4 * (P + R)).view(4, P + R), ragged_mask([8, longest, 1, 8], R)
    part = ppo.select({"tokens": tokens, "mask": mask, "values": mask * 2, "pad": torch.arange(4),
                       "lengths": torch.tensor([8, longest, 1, 8])}, rows)
    assert torch.equal(part["tokens"], tokens[1:3, 1:P + longest])  # column 0 is padding in both rows
    assert torch.equal(part["mask"], mask[1:3, :longest]) and torch.equal(part["values"], 2 * mask[1:3, :longest])
    assert part["pad"].tolist() == [0, 1]


# ---- the update ------------------------------------------------------------------------------------------------------


def one_update(four_models, cfg, seed=0, optimizer=None):
    """One optimizer step by plain gradient descent at rate 1, so that weights show gradients: (policy, value, log)."""
    policy, ref, reward, value = four_models
    rollout, _ = rollout_of(policy, ref, reward, value, PROMPTS, ppo_config(microbatch=8))
    policy, value, log = copy.deepcopy(policy), copy.deepcopy(value), Collected()
    optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=1.0)
    autocast = common.set_up(cfg, quiet=True)[1]
    ppo.update(policy, value, optimizer, rollout, 1e-2, cfg, autocast, log, torch.Generator().manual_seed(seed))
    return policy, value, log.means()


class Collected(runs.Log):
    """A log without a file."""

    def __init__(self):
        super().__init__("")
        self.path = Path(os.devnull)

    def means(self):
        return {name: float(self.sums[name] / self.counts[name]) for name in self.sums}


@pytest.mark.parametrize("microbatch", [1, 3, 5])
def test_microbatches_change_nothing(four_models, microbatch):
    """A mean per microbatch, which weighs the tokens of short responses more: same weights, same logged numbers."""
    whole = one_update(four_models, ppo_config(epochs=2, minibatches=2, microbatch=8))
    split = one_update(four_models, ppo_config(epochs=2, minibatches=2, microbatch=microbatch))
    for k in (0, 1):
        for a, b in zip(whole[k].parameters(), split[k].parameters()):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)
    for name in ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "grad_norm", "approx_kl"):
        assert split[2][name] == pytest.approx(whole[2][name], rel=1e-4, abs=1e-6), name


def test_one_step_is_the_gradient_of_the_whole_loss(four_models):
    """A loss whose parts are weighted wrongly: one step against the loss written out for the whole rollout."""
    cfg = ppo_config(epochs=1, grad_clip=0.0, value_coef=0.3)
    policy, value, _ = one_update(four_models, cfg)
    old_policy, ref, reward, old_value = four_models
    rollout, _ = rollout_of(old_policy, ref, reward, old_value, PROMPTS, cfg)
    P = rollout["tokens"].size(1) - rollout["mask"].size(1)
    logits = old_policy(rollout["tokens"], rollout["pad"])
    logprobs = token_logprobs(logits, rollout["tokens"], 0.7)[:, P - 1:]
    values = old_value(rollout["tokens"], rollout["pad"])[:, P - 1:-1]
    mask = rollout["mask"]
    loss = -(torch.exp(logprobs - logprobs.detach()) * rollout["advantages"] * mask).sum() / mask.sum()
    loss = loss + 0.3 * 0.5 * ((values - rollout["returns"]) ** 2 * mask).sum() / mask.sum()
    parameters = [*old_policy.parameters(), *old_value.trunk.parameters(), old_value.head.weight]
    moved = [*policy.parameters(), *value.trunk.parameters(), value.head.weight]
    for before, after, gradient in zip(parameters, moved, torch.autograd.grad(loss, parameters)):
        assert torch.allclose(after, before - 1e-2 * gradient, rtol=0, atol=1e-6)


def test_metrics_are_those_of_all_minibatches(four_models):
    """A log of the last minibatch only."""
    cfg, seen = ppo_config(epochs=2, minibatches=4, microbatch=2), []
    policy, ref, reward, value = four_models
    rollout, _ = rollout_of(policy, ref, reward, value, PROMPTS, cfg)

    class Spy(Collected):
        def add(self, weight=1.0, **metrics):
            seen.extend([float(metrics["grad_norm"])] if "grad_norm" in metrics else [])
            super().add(weight, **metrics)
    log, policy = Spy(), copy.deepcopy(policy)
    optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=1.0)
    ppo.update(policy, copy.deepcopy(value), optimizer, rollout, 1e-2, cfg, common.set_up(cfg, quiet=True)[1], log,
               torch.Generator().manual_seed(0))
    assert len(seen) == 8 and len(set(seen)) == 8  # 2 epochs of 4 minibatches
    assert log.means()["grad_norm"] == pytest.approx(sum(seen) / 8)


def test_log_averages_and_starts_anew(tmp_path):
    """A log line with the last value in place of the mean, or with values of the interval before."""
    log = runs.Log(tmp_path)
    for loss in (1.0, 2.0, 6.0):
        log.add(loss=loss)
    log.add(norm=torch.tensor(5.0))
    log.write(step=1)
    log.add(loss=7.0)
    log.write(step=2)
    assert log_of(tmp_path) == [{"step": 1, "loss": 3.0, "norm": 5.0}, {"step": 2, "loss": 7.0}]


def test_optimizer_step_clips_what_backward_made():
    """Gradients clipped before backward, gradients that pile up over steps, or a step with NaN."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=99.0)
    for grad_clip, expected in ((1.0, [-0.6, -0.8]), (0.0, [-3.0, -4.0]), (10.0, [-3.0, -4.0])):
        weight.data.zero_()
        (weight * torch.tensor([3.0, 4.0])).sum().backward()
        common.optimizer_step(optimizer, [weight], 1.0, grad_clip, log := Collected())
        assert log.means() == {"grad_norm": pytest.approx(5.0)}
        assert weight.tolist() == pytest.approx(expected, abs=1e-5) and weight.grad is None
    weight.data.zero_()
    (weight * math.nan).sum().backward()
    with pytest.raises(UserError, match="not finite"):
        common.optimizer_step(optimizer, [weight], 1.0, 1.0, Collected())
    assert weight.tolist() == [0, 0]


def test_adamw():
    """Both betas equal (seen in the wild), or weight decay on biases and layer norms."""
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = common.adamw([weight, bias], lr=0.1, weight_decay=0.5)
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
    weight.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert bias.tolist() == [1, 1] and weight.flatten().tolist() == pytest.approx([0.95] * 4)


def test_learning_rate():
    """A first step at rate 0, or a schedule that ends early."""
    linear = [common.learning_rate(step, 4, 1.0, schedule="linear") for step in range(4)]
    assert linear == pytest.approx([1, 0.75, 0.5, 0.25])  # the first at the full rate
    cosine = [common.learning_rate(step, 10, 2.0, warmup=2, floor=0.1) for step in range(11)]
    assert [cosine[step] for step in (0, 1, 2, 6, 10)] == pytest.approx([1, 2, 2, 1.1, 0.2])


# ---- whole runs ------------------------------------------------------------------------------------------------------


def tiny_run(checkpoints, folder, **changes):
    """ppo.main on the tiny checkpoints: the lines of its log."""
    ppo.main(ppo_config(**{"out": str(folder), "sft": checkpoints.sft, "reward": checkpoints.reward,
                           "prompts": checkpoints.prompts, "iterations": 3, "epochs": 2, **changes}))
    return log_of(folder)


def test_recompute_reaches_policy_and_value(checkpoints, tmp_path, monkeypatch):
    """A flag that one of the two trained models forgets, or that reaches one of the frozen ones."""
    trunks = {}
    monkeypatch.setattr(ppo, "load_model", lambda *args, **how: trunks.setdefault(
        len(trunks), model_module.load_model(*args, **how)))
    monkeypatch.setattr(ppo, "load_reward", lambda *args: trunks.setdefault(
        len(trunks), model_module.load_reward(*args)))
    lines = tiny_run(checkpoints, tmp_path / "a", recompute=True)
    assert [model.trunk.recompute for model in trunks.values()] == [True, False, False, True]
    plain = tiny_run(checkpoints, tmp_path / "b")
    assert [line["score"] for line in lines] == [line["score"] for line in plain]


@pytest.mark.parametrize("value", ["separate", "sft", "shared"])
def test_nothing_moves_at_learning_rate_zero(checkpoints, tmp_path, value):
    """Old and new log-probabilities of different passes (dropout, padding, cache): ratio not 1, KL not 0."""
    lines = tiny_run(checkpoints, tmp_path, lr=0.0, value=value, minibatches=2)
    assert len(lines) == 3
    for line in lines:
        assert line["first_ratio_error"] <= 1e-5 and line["kl"] == 0 and line["clip_fraction"] == 0
        assert line["approx_kl"] <= 1e-10 and line["sampler_difference"] <= 5e-6
    before, after = (read_checkpoint(folder, ["lm"])[0] for folder in (checkpoints.sft, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_values_the_returns_are_the_advantages(checkpoints, tmp_path, monkeypatch):
    """--value shared --value-coef 0, which stands for no values, with values that move all the same."""
    seen, plain = [], ppo.collect
    monkeypatch.setattr(ppo, "collect", lambda *args: seen.append(plain(*args)) or seen[-1])
    tiny_run(checkpoints, tmp_path, value="shared", value_coef=0.0, whiten_advantages=False, lr=0.01)
    for rollout, _ in seen:
        assert not rollout["values"].any() and torch.equal(rollout["advantages"], rollout["returns"])
    assert any(rollout["advantages"].any() for rollout, _ in seen)


def test_adam_eps_reaches_the_optimizer(checkpoints, tmp_path, monkeypatch):
    """A flag that changes nothing."""
    made = []
    monkeypatch.setattr(ppo, "adamw", lambda *args, **how: made.append(common.adamw(*args, **how)) or made[-1])
    tiny_run(checkpoints, tmp_path, adam_eps=0.5, iterations=1)
    assert {group["eps"] for group in made[0].param_groups} == {0.5}


def test_repetition():
    """Pairs of the padding counted, or a pair that repeats itself only in another response."""
    responses = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 7, 1, 2], [3, 3, 3, 3, 9], [5, 9, 9, 9, 9]])
    assert repetition(responses[:1], torch.ones(1, 5)).item() == 2 / 4  # 12 21 12 21
    rows = torch.stack([repetition(responses[i:i + 1], mask) for i, mask in enumerate(
        [ragged_mask([n], 5) for n in (5, 4, 4, 1)])])
    assert rows.tolist() == pytest.approx([1 / 2, 0, 2 / 3, 0])
    assert repetition(responses, ragged_mask([5, 4, 4, 1], 5)).item() == pytest.approx((1 / 2 + 2 / 3) / 4)


def test_a_run_is_a_function_of_its_seed(checkpoints, tmp_path):
    """Randomness outside the seed: two equal runs must log the same numbers, another seed must not."""
    def run(name, seed):
        lines = tiny_run(checkpoints, tmp_path / name, seed=seed)
        return [{key: value for key, value in line.items() if "second" not in key} for line in lines]
    first, second, other = run("a", 1), run("b", 1), run("c", 2)
    assert first == second != other


def test_a_run_logs_and_saves(checkpoints, tmp_path):
    """A metric missing from the log, NaN in it, or a checkpoint that cannot be used for the next run."""
    lines = tiny_run(checkpoints, tmp_path, snapshots=3)
    expected = {"iteration", "episodes", "score", "kl", "kl_k3", "kl_coef", "rewards", "entropy", "length", "end_rate",
                "distinct", "clip_fraction", "value_clip_fraction", "approx_kl", "value_loss", "explained_variance",
                "grad_norm", "lr", "rollout_tokens_per_second", "update_tokens_per_second", "seconds", "policy_loss",
                "sampler_difference", "first_ratio_error"}
    assert expected <= set(lines[0])
    assert all(math.isfinite(line[name]) for line in lines for name in set(line) - {"warnings", "sample"})
    assert ["sample" in line for line in lines] == [True, False, False]  # the first, and each --sample-every
    assert set(lines[0]["sample"]) == {"prompt", "response", "score", "kl"} and 0 <= lines[0]["repetition"] < 1
    assert lines[1]["kl_k3"] > 0 and [line["iteration"] for line in lines] == [1, 2, 3]
    assert sorted(folder.name for folder in (tmp_path / "snapshots").iterdir()) == ["00001", "00002", "00003"]
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["last_rollout_kl"] == pytest.approx(lines[-1]["kl"], abs=1e-3)
    tiny_run(checkpoints, tmp_path / "next", sft=str(tmp_path), iterations=1)


def test_prompts_are_used_once_per_pass(checkpoints, tmp_path, monkeypatch):
    """The same prompts in every rollout, or one prompt twice before another had its turn."""
    seen, plain = [], ppo.pad_prompts
    monkeypatch.setattr(ppo, "pad_prompts", lambda prompts, pad_id: seen.append(prompts) or plain(prompts, pad_id))
    tiny_run(checkpoints, tmp_path, episodes=4, iterations=6, epochs=1)
    first, second = (sorted(sum(part, [])) for part in (seen[:3], seen[3:]))
    assert first == second and len(first) == 12  # 12 prompts, 4 a rollout
    assert seen[:3] != seen[3:]  # shuffled anew


def test_controller_and_learning_rate_in_a_run(checkpoints, tmp_path):
    """A controller that is never told the KL, or too early; a learning rate that does not fall."""
    lines = tiny_run(checkpoints, tmp_path, iterations=4, lr=1e-2, kl_coef=0.2, kl_target=0.5, kl_horizon=100.0)
    assert [line["lr"] for line in lines] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert lines[0]["kl_coef"] == 0.2
    assert all(line["first_ratio_error"] <= 1e-5 for line in lines)  # at every iteration, not only the first
    for before, after in zip(lines, lines[1:]):
        controller = AdaptiveKL(before["kl_coef"], 0.5, 100)
        controller.update(before["kl"], episodes=8)
        assert after["kl_coef"] == pytest.approx(controller.coef, abs=1e-5)


def test_difference_between_sampler_and_training_is_logged(four_models, monkeypatch):
    """In bfloat16 the sampler and the training pass differ, which nobody sees unless it is logged."""
    plain_sample = ppo.sample_prompts

    def drifting(*args, **how):
        responses, lengths, logprobs = plain_sample(*args, **how)
        return responses, lengths, logprobs - 0.25
    exact, _ = rollout_of(*four_models, PROMPTS, ppo_config())
    monkeypatch.setattr(ppo, "sample_prompts", drifting)
    drifted, metrics = rollout_of(*four_models, PROMPTS, ppo_config())
    assert metrics["sampler_difference"] == pytest.approx(0.25, abs=1e-5)
    assert torch.equal(exact["old_logprobs"], drifted["old_logprobs"])  # those PPO uses come from the training pass


def test_bf16_run(checkpoints, tmp_path):
    """A ratio that is not 1 at first, or a KL between equal models, because two passes differ in precision."""
    for line in tiny_run(checkpoints, tmp_path, dtype="bfloat16", lr=0.0):
        assert line["first_ratio_error"] <= 1e-5 and line["kl"] == 0 and line["sampler_difference"] < 0.1


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_score_sign(checkpoints, tmp_path, monkeypatch, sign, value):
    """A flipped sign anywhere between score and step: what the reward counts becomes likelier, its negation rarer."""
    liked = 128  # the score counts the tokens below this id, about half of the vocabulary

    def scripted(tokens, pad, last):
        place = torch.arange(tokens.size(1))
        real = (place >= pad[:, None]) & (place <= last[:, None])
        return sign * ((tokens < liked) & real).sum(1).float()

    def load(folder, device, kind="lm", **how):
        model = model_module.load_model(folder, device, kind, **how)
        if kind == "reward":
            model.score = scripted
        return model

    def share(folder):
        model, (tokens, pad) = model_module.load_model(folder), pad_prompts([[269], [269, 100, 200, 50]], 269)
        return model(tokens, pad)[:, -1].softmax(-1)[:, :liked].sum(1).mean().item()
    monkeypatch.setattr(ppo, "load_model", load)
    monkeypatch.setattr(ppo, "load_reward", lambda folder, device, _: load(folder, device, "reward"))
    tiny_run(checkpoints, tmp_path, **FAST, value=value, kl_coef=0.0)
    before, after = share(checkpoints.sft), share(tmp_path)
    assert sign * (after - before) > 0.1, (before, after)


def test_kl_leash_holds(checkpoints, tmp_path):
    """A KL reward of the wrong sign: at a high price the policy stays nearer to the reference than at none."""
    def run(name, **how):
        return tiny_run(checkpoints, tmp_path / name, **FAST, **how)[-1]["kl_k3"]
    assert run("leash", kl_coef=3.0) < 0.2 * run("free", kl_coef=0.0)


# ---- bad input and configuration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ({"lr": -1.0}, "--lr"), ({"lr": math.nan}, "--lr"), ({"episodes": 0}, "--episodes"),
    ({"temperature": 0.0}, "--temperature"),
    ({"microbatch": 0}, "--microbatch"), ({"value": "none"}, "--value"), ({"dtype": "half"}, "--dtype"),
    ({"device": "abacus"}, "--device"), ({"episodes": 8, "minibatches": 3}, "try --episodes 6 or 9"),
    ({"episodes": 100, "minibatches": 1}, "12 prompts do not fill"), ({"response_tokens": 31}, "no room for a prompt"),
    ({"prompts": "nowhere"}, "nowhere"), ({"reward": "nowhere"}, "nowhere"), ({"sft": "nowhere"}, "nowhere"),
    ({"snapshots": 0}, "--snapshots"), ({"sample_every": 0}, "--sample-every"), ({"kl_target": 0.0}, "--kl-target"),
])
def test_bad_flags(checkpoints, tmp_path, flags, message):
    """A traceback, or hours of a run, where one line would do."""
    with pytest.raises(UserError, match=message):
        tiny_run(checkpoints, tmp_path, **flags)


def test_a_mistyped_run_leaves_a_finished_one(checkpoints, tmp_path):
    """An error in the flags that makes a finished stage count as unfinished, or leaves an empty folder behind."""
    (tmp_path / "done.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(UserError):
            tiny_run(checkpoints, folder, reward="nowhere")
    assert (tmp_path / "done.json").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong, message", [("missing", "no checkpoint here"),
                                            ("reward", "this is a reward checkpoint")])
def test_exit_code_and_one_line(checkpoints, tmp_path, wrong, message):
    """A traceback for a stage out of order, or a failure that the shell script takes for success."""
    sft = checkpoints.reward if wrong == "reward" else str(tmp_path / "missing")
    result = subprocess.run([sys.executable, str(ROOT / "ppo.py"), "--sft", sft, "--reward", checkpoints.reward,
                             "--out", str(tmp_path / "out"), "--device", "cpu"], capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ") and message in result.stderr
