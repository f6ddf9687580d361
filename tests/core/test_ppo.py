"""PPO against slow loops and closed forms; then tiny runs that must stand still or go the right way."""
import copy
import math

import pytest
import torch
from torch import nn

import common
import ppo
from common import UserError
from conftest import (END, both_precisions, close, log_of, ppo_config, ragged_mask, random_model,
                      rollout_of)
from data import pad_prompts, pad_responses, read_jsonl
from model import ScalarModel, load_model, token_logprobs
from ppo import AdaptiveKL, gae, masked_mean, policy_loss, shape_rewards, value_loss, whiten

LENGTHS = [3, 1, 5, 0]  # a response of one token, a full row, and a row of padding only
PROMPTS = [[END, 3, 4], [END], [END, 7, END, 2], [END, 1], [END, 5], [END, 9, 9, 9], [END, 2, 3], [END, 6]]


def numbers(count, dtype, seed=0):
    """count random (B, R) tensors and the ragged mask; outside the mask stand large numbers that must not count."""
    random, mask = torch.Generator().manual_seed(seed), ragged_mask(LENGTHS, 5).to(dtype)
    made = [torch.randn(len(LENGTHS), 5, dtype=torch.float64, generator=random).to(dtype) for _ in range(count)]
    return [torch.where(mask == 1, x, 7 * x) for x in made], mask


def real(x, lengths=LENGTHS):
    """The numbers inside the mask as one flat list, row by row."""
    return [value for row, n in zip(x.tolist(), lengths) for value in row[:n]]


def watch(monkeypatch, name, change=lambda result: result):
    """What the function of this name in ppo returns from now on, as a list that grows; change: of each result."""
    seen, plain = [], getattr(ppo, name)
    monkeypatch.setattr(ppo, name, lambda *args, **how: seen.append(change(plain(*args, **how))) or seen[-1])
    return seen


@both_precisions
def test_masked_mean_and_whiten(dtype):
    """A mean over the padding, NaN for an empty mask, a variance over n - 1 or of 0, numbers left outside the mask."""
    (x,), mask = numbers(1, dtype)
    mean = sum(real(x)) / 9
    assert masked_mean(x, mask).item() == pytest.approx(mean, **close(dtype)) and masked_mean(x, mask).dtype == dtype
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0
    deviation = math.sqrt(sum((v - mean) ** 2 for v in real(x)) / 9 + 1e-8)
    for shift_mean in (True, False):
        expected = [(v - mean) / deviation + (0 if shift_mean else mean) for v in real(x)]
        assert real(whiten(x, mask, shift_mean)) == pytest.approx(expected, **close(dtype))
        assert not (whiten(x, mask, shift_mean) * (1 - mask)).any()
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
    """The recursion against its definition, sum over l of (gamma lam)^l delta(t + l); a bootstrap from the padding."""
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
def test_policy_and_value_loss(dtype):
    """A minimum for a maximum, a flipped ratio, means over padding, a clip around the return, a missing half."""
    (new, old, target), mask = numbers(3, dtype)
    terms = {"policy": [], "value": []}
    for a, b, c in zip(real(new), real(old), real(target)):
        ratio, near = math.exp(a - b), min(max(a, b - 0.2), b + 0.2)
        terms["policy"].append((-ratio * c, -min(max(ratio, 0.8), 1.2) * c))  # c: the advantage
        terms["value"].append((0.5 * (a - c) ** 2, 0.5 * (near - c) ** 2))    # c: the return
    for name, function in (("policy", policy_loss), ("value", value_loss)):
        loss, clip_fraction = function(new, old, target, mask, 0.2)
        clipped = sum(inside > plain for plain, inside in terms[name])
        assert loss.item() == pytest.approx(sum(map(max, terms[name])) / 9, **close(dtype)) and loss.dtype == dtype
        assert clip_fraction.item() == pytest.approx(clipped / 9, **close(dtype)) and 0 < clipped < 9


@pytest.mark.parametrize("kl, error", [(6.0, 0), (6.6, 0.1), (600.0, 0.2), (0.0, -0.2), (-5.0, -0.2)])
def test_adaptive_kl(kl, error):
    """A controller that pushes the wrong way, an error not held to 20 %, a horizon that counts updates."""
    for horizon, factor in ((1000, 1 + error * 50 / 1000), (0, 1)):
        controller = AdaptiveKL(0.15, target=6.0, horizon=horizon)
        controller.update(kl, episodes=50)
        assert controller.coef == pytest.approx(0.15 * factor, rel=1e-12)


def test_repetition():
    """Bigrams of the padding counted, or a bigram that repeats itself only in another response."""
    responses = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 7, 1, 2], [3, 3, 3, 3, 9], [5, 9, 9, 9, 9]])
    rows = [ppo.repetition(responses[i:i + 1], ragged_mask([n], 5)).item() for i, n in enumerate([5, 4, 4, 1])]
    assert rows == pytest.approx([1 / 2, 0, 2 / 3, 0])  # of 12 21 12 21 the last two
    assert ppo.repetition(responses, ragged_mask([5, 4, 4, 1], 5)).item() == pytest.approx(sum(rows) / 4)


@pytest.mark.parametrize("whiten_rewards", [False, True])
@torch.no_grad()
def test_rollout_against_one_response_at_a_time(four_models, monkeypatch, whiten_rewards):
    """Every shift, mask and position of a rollout: the same numbers from unpadded texts, one token after the other.
    Means diluted by padding; old log-probabilities of the sampler; whitened rewards that are left in the padding."""
    policy, ref, reward, value = four_models
    pad = nn.functional.pad  # more padding on both sides; and a sampler that finds twice the log-probabilities
    watch(monkeypatch, "pad_prompts", lambda x: (pad(x[0], (4, 0), value=END), x[1] + 4))
    watch(monkeypatch, "sample_prompts", lambda x: (pad(x[0], (0, 5), value=END), x[1], pad(2 * x[2], (0, 5), value=9)))
    rollout, metrics = rollout_of(*four_models, PROMPTS, ppo_config(lam=0.9, gamma=0.98, whiten_rewards=whiten_rewards))
    mask, lengths, R = rollout["mask"], rollout["lengths"].tolist(), rollout["mask"].size(1)
    sampled, prompts = rollout["tokens"][:, -R:], []
    by_hand = {name: torch.zeros(8, R) for name in ("old_logprobs", "ref_logprobs", "values", "entropy")}
    for row, length in enumerate(lengths):
        text = rollout["tokens"][row, rollout["pad"][row]:].tolist()
        prompts.append(text[:-R])
        for t in range(length):
            before = torch.tensor([prompts[row] + text[-R:][:t]])
            own, other = ((model(before)[0, -1] / 0.7).log_softmax(-1) for model in (policy, ref))
            each = (own[sampled[row, t]], other[sampled[row, t]], value(before)[0, -1], -(own.exp() * own).sum())
            for name, number in zip(by_hand, each):
                by_hand[name][row, t] = number
        score = reward(torch.tensor([prompts[row] + text[-R:][:length]]))[0, -1].item()
        assert rollout["scores"][row].item() == pytest.approx(score, abs=1e-4)
    totals = [len(prompt) + length for prompt, length in zip(prompts, lengths)]  # neighbours need little padding
    assert sorted(prompts) == sorted(PROMPTS) and totals == sorted(totals) and len(set(lengths)) > 1
    assert torch.equal(mask, ragged_mask(lengths, R))
    rewards = shape_rewards(rollout["scores"], by_hand["old_logprobs"], by_hand["ref_logprobs"], mask, 0.1)
    rewards = whiten(rewards, mask, shift_mean=False) if whiten_rewards else rewards
    advantages, by_hand["returns"] = gae(rewards, by_hand["values"], mask, 0.98, 0.9)  # all three are tested above
    for name, expected in {**by_hand, "advantages": whiten(advantages, mask)}.items():
        assert torch.allclose(rollout[name], expected, atol=1e-3) and not rollout[name][mask == 0].any(), name

    log_ratio, count = (by_hand["old_logprobs"] - by_hand["ref_logprobs"]), sum(lengths)
    error, returns = real(by_hand["returns"] - by_hand["values"], lengths), real(by_hand["returns"], lengths)
    expected = {"score": rollout["scores"].mean(), "score_std": rollout["scores"].std(), "rewards": rewards.sum() / 8,
                "kl": log_ratio.sum() / 8, "kl_k3": ((-log_ratio).exp() - 1 + log_ratio).sum() / 8,
                "entropy": by_hand["entropy"].sum() / count, "length": count / 8,
                "eos_rate": sum(sampled[row, n - 1] == END for row, n in enumerate(lengths)) / 8,
                "unique_responses": len({tuple(row) for row in sampled.tolist()}) / 8,
                "repetition": ppo.repetition(sampled, mask),
                "sampler_difference": -by_hand["old_logprobs"].sum() / count,
                "explained_variance": 1 - sum(x * x for x in error) / count / torch.tensor(returns).var(unbiased=False)}
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(
        {name: float(x) for name, x in expected.items()}, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")  # the standard deviation of one score
def test_kl_estimators_by_enumeration(monkeypatch):
    """A flipped log-ratio: the expectations of k1 and k3 over all responses of a toy policy are its exact KL."""
    policy, ref = (random_model(seed=seed, vocab_size=2) for seed in (1, 2))
    scorer, other = random_model(ScalarModel, vocab_size=2), 1
    exact = k1 = k3 = total = 0.0
    for response in ([END], [other, END], [other, other]):  # all there are, of at most two tokens
        drawn = torch.tensor([response]), torch.tensor([len(response)]), torch.zeros(1, len(response))
        monkeypatch.setattr(ppo, "sample_prompts", lambda *_, **__: drawn)
        text = torch.tensor([[END, other] + response])
        log_p, log_q = (token_logprobs(model(text), text, 0.7)[0, 1:].sum().item() for model in (policy, ref))
        _, metrics = rollout_of(policy, ref, scorer, scorer, [[END, other]], ppo_config())
        p = math.exp(log_p)
        total, exact = total + p, exact + p * (log_p - log_q)
        k1, k3 = k1 + p * metrics["kl"].item(), k3 + p * metrics["kl_k3"].item()
    assert total == pytest.approx(1, abs=1e-6) and exact > 0.05
    assert k1 == pytest.approx(exact, abs=1e-5) and k3 == pytest.approx(exact, abs=1e-5)


def test_ppo_samples_from_the_full_softmax(four_models):
    """Sampling with top-k or another temperature than log-probabilities have."""
    cfg = ppo_config(response_tokens=1, temperature=2.0, microbatch=4096)
    rollout, metrics = rollout_of(*four_models, [PROMPTS[0]] * 4096, cfg)
    drawn = torch.bincount(rollout["tokens"][:, -1], minlength=11) / 4096
    expected = (four_models[0](torch.tensor([PROMPTS[0]]))[0, -1] / 2.0).softmax(-1)
    assert torch.allclose(drawn, expected, atol=0.02) and (drawn > 0).all() and expected.min() < 0.05
    assert metrics["sampler_difference"] <= 5e-6


@pytest.mark.parametrize("missing_eos_score", [math.nan, -9.0])
def test_eos_that_is_also_the_padding(four_models, monkeypatch, missing_eos_score):
    """Masks from comparing ids: the real EOS is lost; the rule for a missing EOS on other rows or the logged score."""
    responses = [[END], [4, END], [5, 6, 7, END], [8, 8, 8, 8]]
    tokens, mask = pad_responses(responses, END)
    monkeypatch.setattr(ppo, "sample_prompts", lambda *_, **__: (tokens, mask.sum(1).long(), 0 * mask))
    prompts = [[END, 1 + row] for row in range(4)]  # of equal length: the order stays
    cfg = ppo_config(response_tokens=4, microbatch=8, lam=1.0, gamma=1.0, missing_eos_score=missing_eos_score)
    rollout, metrics = rollout_of(*four_models, prompts, cfg)
    assert torch.equal(rollout["mask"], mask) and torch.equal(rollout["tokens"][:, -4:], tokens)  # in order of length
    assert (metrics["eos_rate"], metrics["length"], metrics["score"]) == (0.75, 11 / 4, rollout["scores"].mean())
    expected = [four_models[2](torch.tensor([prompt + text]))[0, -1].item() for prompt, text in zip(prompts, responses)]
    assert rollout["scores"].tolist() == pytest.approx(expected, abs=1e-5)  # EOS included
    log_ratio = ((rollout["old_logprobs"] - rollout["ref_logprobs"]) * rollout["mask"]).sum(1)
    judged = torch.tensor(expected[:3] + ([expected[3]] if math.isnan(missing_eos_score) else [-9.0]))
    assert torch.allclose(rollout["returns"][:, 0], judged - 0.1 * log_ratio, atol=1e-5)  # lambda 1: all rewards


@pytest.mark.parametrize("P, longest", [(3, 5), (5, 3), (8, 8), (1, 7)])
def test_select_keeps_prompt_and_response(P, longest):
    """Columns told apart by their number alone: with P + longest == R the tokens were narrowed twice."""
    tokens, mask = torch.arange(4 * (P + 8)).view(4, P + 8), ragged_mask([8, longest, 1, 8], 8)
    part = ppo.select({"tokens": tokens, "mask": mask, "values": mask * 2, "pad": torch.arange(4),
                       "lengths": mask.sum(1)}, slice(1, 3))
    assert torch.equal(part["tokens"], tokens[1:3, 1:P + longest])  # column 0 is padding in both rows
    assert torch.equal(part["mask"], mask[1:3, :longest]) and torch.equal(part["values"], 2 * mask[1:3, :longest])
    assert part["pad"].tolist() == [0, 1]


def test_a_logit_offset_in_bf16(four_models):
    """Logits near -110, as GPT-2's are: bf16 has steps of 0.5 there, and rounding moves the first ratio far from 1."""
    policy, cfg, random = four_models[0], ppo_config(dtype="bfloat16", microbatch=1024), common.generator(0)
    policy.trunk.token_embedding.weight.data[:, 0] = -1.0
    policy.trunk.norm.weight.data[0], policy.trunk.norm.bias.data[0] = 0.0, 110.0
    assert -115 < policy(torch.tensor(PROMPTS[:1])).mean() < -105
    rollout, _ = rollout_of(*four_models, PROMPTS * 128, cfg)
    policy.trunk.register_forward_hook(  # what another kernel, for another shape, makes of the hidden states
        lambda trunk, given, hidden: hidden + 2e-3 * torch.randn(hidden.shape, generator=random))
    with torch.no_grad(), common.set_up(cfg)[1]():
        logprobs = ppo.forward(policy, None, rollout, cfg.temperature)[1]
    assert (((logprobs - rollout["old_logprobs"]) * rollout["mask"]).exp() - 1).abs().max() < 0.02


def test_frozen_models_in_bf16_change_no_number(four_models):
    """Norms, embeddings or heads in bf16, or matrices of another precision than autocast's: a KL that is not the KL."""
    cfg, rollouts = ppo_config(dtype="bfloat16"), []
    for _ in range(2):
        rollouts.append(rollout_of(*four_models, PROMPTS * 2, cfg)[0])
        ppo.freeze(four_models[1], four_models[2])
    assert all(torch.equal(rollouts[0][name], rollouts[1][name]) for name in rollouts[0])
    assert four_models[1].trunk.blocks[0].up.weight.dtype == torch.bfloat16


def one_update(four_models, folder, texts=(), **changes):
    """ppo.update by plain gradient descent, so that weights show gradients: (policy, value, log, rollout)."""
    rollout, cfg = rollout_of(*four_models, PROMPTS, ppo_config(microbatch=8))[0], ppo_config(**changes)
    policy, value, log = copy.deepcopy(four_models[0]), copy.deepcopy(four_models[3]), common.Log(folder)
    optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=1.0)
    ppo.update(policy, value, optimizer, rollout, 1e-2, cfg, common.set_up(cfg)[1], log, common.generator(0), texts)
    return policy, value, log, rollout


@pytest.mark.parametrize("microbatch", [1, 3])
def test_microbatches_change_nothing(four_models, tmp_path, microbatch):
    """A mean per microbatch, which weighs the tokens of short responses more; a log of the last minibatch only."""
    whole = one_update(four_models, tmp_path, epochs=2, minibatches=2, microbatch=8)
    split = one_update(four_models, tmp_path, epochs=2, minibatches=2, microbatch=microbatch)
    for k in (0, 1):
        for a, b in zip(whole[k].parameters(), split[k].parameters()):
            assert torch.allclose(a, b, rtol=0, atol=1e-6)
    assert split[2].counts["grad_norm"] == split[2].steps == 4  # the minibatches of both epochs
    assert split[2].write() == pytest.approx(whole[2].write(), rel=1e-4, abs=1e-6)


def test_one_step_is_the_gradient_of_the_whole_loss(four_models, tmp_path):
    """A loss whose parts are weighted wrongly: one step against the loss written out for the whole rollout; a
    text whose first token is to be predicted, too, or whose gradient is a sum where the others are means."""
    text = [3, 1, 4, 1, 5]
    policy, value, _, rollout = one_update(four_models, tmp_path, [text], epochs=1, grad_clip=0.0, value_coef=0.3,
                                           ptx_coef=0.7)
    old_policy, _, _, old_value = four_models
    mask, P = rollout["mask"], rollout["tokens"].size(1) - rollout["mask"].size(1)
    logits = old_policy(rollout["tokens"], rollout["pad"])
    logprobs = token_logprobs(logits, rollout["tokens"], 0.7)[:, P - 1:]
    values = old_value(rollout["tokens"], rollout["pad"])[:, P - 1:-1]
    loss = -(torch.exp(logprobs - logprobs.detach()) * rollout["advantages"] * mask).sum() / mask.sum()
    loss = loss + 0.3 * 0.5 * ((values - rollout["returns"]) ** 2 * mask).sum() / mask.sum()
    loss = loss - 0.7 * token_logprobs(old_policy(torch.tensor([text])), torch.tensor([text])).mean()
    parameters = [*old_policy.parameters(), *old_value.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    for before, after, gradient in zip(parameters, [*policy.parameters(), *value.parameters()], gradients, strict=True):
        assert torch.allclose(after, before - 1e-2 * gradient, rtol=0, atol=1e-6)


def test_log(tmp_path):
    """The last value in place of the mean, values of the interval before, or a learning rate of 4e-7 shown as 0.0."""
    log = common.Log(tmp_path)
    for losses in ((1.0, 2.0, 6.0), (7.0,)):
        for loss in losses:
            log.add(loss=loss)
        log.write(lr=4e-7)
    assert log_of(tmp_path) == [{"lr": 4e-07, "loss": 3.0}, {"lr": 4e-07, "loss": 7.0}]


def test_optimizer_step_clips_what_backward_made(tmp_path):
    """Gradients clipped before backward, gradients that pile up over steps, or a step with NaN."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer, log = torch.optim.SGD([weight], lr=99.0), common.Log(tmp_path)
    for grad_clip, moved in ((1, [-0.6, -0.8]), (0, [-3, -4]), (9, [-3, -4])):
        weight.data.zero_()
        (weight * torch.tensor([3.0, 4.0])).sum().backward()
        common.optimizer_step(optimizer, [weight], 1.0, grad_clip, log)
        assert log.write() == {"grad_norm": pytest.approx(5.0)} and weight.grad is None
        assert weight.tolist() == pytest.approx(moved, abs=1e-5)
    (weight * math.nan).sum().backward()
    with pytest.raises(UserError, match="not finite") as stop:
        common.optimizer_step(optimizer, [weight], 1.0, 1, log)
    assert weight.tolist() == [-3, -4] and stop.value.code == 1 and "not finite" in log_of(tmp_path)[-1]["stopped"]


def test_adamw_and_learning_rate():
    """Both betas equal (seen in the wild), weight decay on biases, a first step at rate 0, another schedule."""
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = common.adamw([weight, bias], lr=0.1, weight_decay=0.5, eps=0.25)
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 0.25 for group in optimizer.param_groups)
    weight.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert bias.tolist() == [1, 1] and weight.flatten().tolist() == pytest.approx([0.95] * 4)
    assert [common.learning_rate(step, 4, 1.0, schedule="linear") for step in range(4)] == [1, 0.75, 0.5, 0.25]
    cosine = [common.learning_rate(step, 10, 2.0, warmup=2, floor=0.1) for step in (0, 1, 2, 6, 10)]
    assert cosine == pytest.approx([1, 2, 2, 1.1, 0.2])
    keys = [(1,), (2,), (1, 0), (0, 1), (1, 1), (1, 2), (2, 1), (1, 0, 0)]  # a private generator for each
    assert len({torch.randint(2**62, (1,), generator=common.generator(*key)).item() for key in keys}) == len(keys)


def tiny_run(checkpoints, folder, **changes):
    """ppo.main on the tiny checkpoints: the lines of its log."""
    ppo.main(ppo_config(**{"out": str(folder), "sft": checkpoints.sft, "reward": checkpoints.reward,
                           "prompts": checkpoints.prompts, "iterations": 3, "epochs": 2, **changes}))
    return log_of(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [*({"value": value} for value in ("separate", "sft", "shared", "none")),
                                     {"advantages": "rloo"}, {"advantages": "grpo"}])
def test_nothing_moves_at_learning_rate_zero(checkpoints, tmp_path, changes, dtype):
    """Old and new log-probabilities of different passes (dropout, padding, cache): ratio not 1, KL not 0."""
    for line in tiny_run(checkpoints, tmp_path, lr=0.0, dtype=dtype, epochs=1, **changes):
        assert line["first_ratio_error"] <= 1e-5 and line["kl"] == 0 and line["clip_fraction"] == 0
        assert line["approx_kl"] <= 1e-10 and line["sampler_difference"] <= (0.1 if dtype == "bfloat16" else 5e-6)
    before, after = (common.read_checkpoint(folder, "lm")[0] for folder in (checkpoints.sft, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_values_the_advantages_are_the_reward_to_go(checkpoints, tmp_path, monkeypatch):
    """--value none with a value model that is trained, stored or subtracted all the same."""
    rollouts = watch(monkeypatch, "collect")
    monkeypatch.setattr(common.Stage, "finish", lambda *_, **__: None)  # which removes resume.pt
    tiny_run(checkpoints, tmp_path, value="none", lam=1.0, whiten_advantages=False, lr=0.01, kl_horizon=0.0)
    for rollout, metrics in rollouts:
        assert "explained_variance" not in metrics  # nothing was there to explain
        rewards = shape_rewards(*(rollout[name] for name in ("scores", "old_logprobs", "ref_logprobs", "mask")), 0.2)
        to_go = rewards.flip(1).cumsum(1).flip(1) * rollout["mask"]
        assert torch.allclose(rollout["advantages"], to_go, atol=1e-5) and to_go.any() and not rollout["values"].any()
    parts = common.load(tmp_path / "resume.pt")["parts"]
    assert "value" not in parts and len(parts["optimizer"]["state"]) == len(list(load_model(tmp_path).parameters()))


def test_a_run_logs_and_saves(checkpoints, tmp_path):
    """A metric missing from the log or NaN in it, randomness outside the seed, a checkpoint that cannot be used."""
    lines, again, other = (tiny_run(checkpoints, tmp_path / name, seed=seed, snapshots=3, recompute=name == "b")
                           for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert {"policy_loss", "value_loss", "value_clip_fraction", "grad_norm", "explained_variance"} <= set(lines[0])
    assert {line.pop("seconds") >= 0 for line in lines + again} == {True}
    assert lines == again and [line["score"] for line in lines] != [line["score"] for line in other]
    assert ["sample" in line for line in lines] == [True, False, False]  # the first, and each --sample-every
    assert set(lines[0]["sample"]) == {"prompt", "response", "score", "kl"}
    assert sorted(folder.name for folder in (tmp_path / "a/snapshots").iterdir()) == ["00001", "00002", "00003"]
    tiny_run(checkpoints, tmp_path / "next", sft=str(tmp_path / "a"), iterations=1)


def test_prompts_controller_and_learning_rate_in_a_run(checkpoints, tmp_path, monkeypatch):
    """A prompt twice before another had its turn; a controller never told the KL, or too early; a rate that stays."""
    seen, plain = [], ppo.pad_prompts
    monkeypatch.setattr(ppo, "pad_prompts", lambda prompts, pad_id: seen.append(prompts) or plain(prompts, pad_id))
    lines = tiny_run(checkpoints, tmp_path, episodes=4, iterations=6, lr=1e-2, kl_target=0.5, kl_horizon=50.0)
    first, second = (sorted(sum(part, [])) for part in (seen[:3], seen[3:]))
    assert first == second and len(first) == 12 and seen[:3] != seen[3:]  # 12 prompts, 4 a rollout; shuffled anew
    assert [line["lr"] for line in lines] == pytest.approx([1e-2 * (1 - i / 6) for i in range(6)], rel=1e-4)
    assert lines[0]["kl_coef"] == 0.2 and all(line["first_ratio_error"] <= 1e-5 for line in lines)
    for before, after in zip(lines, lines[1:]):
        controller = AdaptiveKL(before["kl_coef"], 0.5, 50)
        controller.update(before["kl"], episodes=4)
        assert after["kl_coef"] == pytest.approx(controller.coef, abs=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("advantages, value", [("gae", "separate"), ("gae", "none"), ("rloo", ""), ("grpo", "")])
def test_score_sign(checkpoints, tmp_path, monkeypatch, sign, advantages, value):
    """A flipped sign anywhere between score and step: what a rule counts becomes likelier, its negation rarer. A rule
    that sees EOS, the prompt in the response, or another row's."""
    seen, prompts = [], {row["prompt"] for row in read_jsonl(checkpoints.prompts, {"prompt": str})}

    def bytes_from_128(prompt, response):  # the tokens of such bytes are about half of the vocabulary
        seen.append((prompt, response))
        return float(sign * sum(c >= "\x80" for c in response))

    def share(folder):
        model, (tokens, pad) = load_model(folder), pad_prompts([[269], [269, 100, 200, 50]], 269)
        return model(tokens, pad)[:, -1].softmax(-1)[:, 128:256].sum(1).mean().item()
    monkeypatch.setitem(ppo.RULES, "bytes", bytes_from_128)
    lines = tiny_run(checkpoints, tmp_path, iterations=16, episodes=12, epochs=4, microbatch=12, lr=3e-2, group=3,
                     temperature=1.0, reward="rule:bytes", advantages=advantages, value=value or "separate",
                     lam=1.0 if value == "none" else 0.95, kl_coef=0.0, kl_horizon=0.0)
    assert sign * (share(tmp_path) - share(checkpoints.sft)) > 0.1
    assert {prompt for prompt, _ in seen} <= prompts and not any("endoftext" in response for _, response in seen)
    shown = lines[0]["sample"]
    assert (shown["prompt"], shown["response"].removesuffix("<|endoftext|>")) in seen[:12]
    first = sum(sign * sum(c >= "\x80" for c in response) for _, response in seen[:12]) / 12
    assert lines[0]["score"] == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("change, line, message", [
    (lambda x: (x[0], {**x[1], "kl": torch.tensor(99.0)}), 1, "above --kl-ceiling 60 "),
    (lambda x: (x[0], {**x[1], "kl": torch.tensor(-0.5)}), 5, "KL is -0.50 .* below zero for 5 rollouts"),
    (lambda x: ({**x[0], "old_logprobs": x[0]["old_logprobs"] - 0.5}, x[1]), 1, "the ratio is 0.65 away from 1")])
def test_guards_stop_a_run_that_has_gone_wrong(checkpoints, tmp_path, monkeypatch, change, line, message):
    """Hours of training that is worthless: the policy runs away, or log-probabilities are not those of the sampler."""
    watch(monkeypatch, "collect", change)
    with pytest.raises(UserError, match=message) as stop:
        tiny_run(checkpoints, tmp_path, iterations=9)
    lines = log_of(tmp_path)
    assert stop.value.code == 1 and len(lines) == line and "stopped" in lines[-1]
    assert not (tmp_path / "model.pt").exists()


def test_flags_that_do_not_fit_each_other(checkpoints, tmp_path):
    """A traceback, or an empty folder left behind, where one line would do."""
    for flags in ({"minibatches": 3}, {"episodes": 100}, {"kl_horizon": 1.0}, {"response_tokens": 31},
                  {"advantages": "reinforce"}, {"group": 1, "advantages": "rloo"}, {"group": 3, "advantages": "grpo"},
                  {"whiten_rewards": True, "advantages": "rloo"}, {"reward": "rule:of-thumb"}, {"ensemble": "max"}):
        with pytest.raises(UserError, match=f"--{[*flags][0]}".replace("_", "-")):
            tiny_run(checkpoints, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()
