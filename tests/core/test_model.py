"""The architecture against an independent one, padding that changes nothing, log-probabilities, checkpoints."""
import copy
import itertools
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import UserError
from conftest import END, both_precisions, close, random_model
from data import pad_prompts
from model import GPT, Block, GPTConfig, Head, ScalarModel, attention, load_model, token_logprobs
from evaluate import Ensemble, load_reward
from reward import score_many
from sampling import sample

PROMPTS = [[END, 3, 4, 5, 6], [END], [END, 7, END, 2], [END, 1]]  # ragged, and one with EOS in the middle


def gpt2_by_hand(weights, tokens, n_layer, n_head, exact):
    """GPT-2 for one unpadded text, position by position and head by head: logits (T, V). Written from the papers.
    exact: the activation is x times the normal distribution function, and not GPT-2's approximation of it."""
    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        return x * weights[name + ".weight"] + weights[name + ".bias"]

    def linear(x, name):
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def gelu(x):
        if exact:
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    x = weights["trunk.token_embedding.weight"][tokens] + weights["trunk.position_embedding.weight"][:len(tokens)]
    size = x.size(1) // n_head
    for layer in range(n_layer):
        name = f"trunk.blocks.{layer}."
        q, k, v = linear(norm(x, name + "norm1"), name + "attention.qkv").chunk(3, dim=1)
        attended = torch.zeros_like(x)
        for head in range(n_head):
            part = slice(head * size, (head + 1) * size)
            for t in range(len(tokens)):
                weight = torch.softmax(k[:t + 1, part] @ q[t, part] / math.sqrt(size), dim=0)  # nothing after t
                attended[t, part] = weight @ v[:t + 1, part]
        x = x + linear(attended, name + "attention.proj")
        x = x + linear(gelu(linear(norm(x, name + "norm2"), name + "up")), name + "down")
    return norm(x, "trunk.norm") @ weights["trunk.token_embedding.weight"][:11].T  # what follows is unused


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_architecture_is_gpt2(gelu):
    """A wrong mask, scale, norm, activation or residual, or a head that is not tied to the embedding."""
    model = random_model(n_layer=3, n_head=4, gelu=gelu).double()
    tokens, pad = pad_prompts(PROMPTS, END)
    weights = model.state_dict()
    for row, (prompt, skip) in enumerate(zip(PROMPTS, pad.tolist())):
        expected = gpt2_by_hand(weights, prompt, 3, 4, exact=gelu == "none")
        assert torch.allclose(model(torch.tensor([prompt]))[0], expected, rtol=0, atol=1e-10)
        assert torch.allclose(model(tokens, pad)[row, skip:], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_written_out_and_through_the_fused_kernel(dtype, tolerance, monkeypatch):
    """Another scale, mask, softmax precision or dtype of the padding bias in one of the paths, CPU's and GPU's."""
    torch.manual_seed(0)
    (q, k, v), key, pad = torch.randn(3, 2, 4, 7, 8).to(dtype), torch.arange(7), torch.tensor([0, 3])[:, None, None]
    may = (key <= key[:, None]) & (key >= pad) | (key == key[:, None])  # causal, but a query sees itself at least
    bias = torch.zeros(may.shape).masked_fill(~may, -math.inf)[:, None]
    exact, kernel, seen = [x.double() for x in (q, k, v)], F.scaled_dot_product_attention, []
    padded, causal = kernel(*exact, bias.double()), kernel(*exact, is_causal=True)

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")  # for the choice of the path only: the numbers stay on the CPU
    for x in (q, q.as_subclass(Elsewhere)):
        for got, expected in [(attention(x, k, v, bias), padded), (attention(x, k, v, None), causal),
                              (attention(x[:, :, -1:], k, v, None), causal[:, :, -1:])]:
            got = got.as_subclass(torch.Tensor)
            assert got.dtype == dtype and torch.allclose(got.double(), expected, rtol=0, atol=tolerance)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **how: seen.append(how) or kernel(*x, **how))
    attention(q.as_subclass(Elsewhere), k, v, bias)
    attention(q, k, v, bias)
    assert seen == [{"is_causal": False, "enable_gqa": False}]  # of the second path only


def test_initial_loss_and_weights():
    """An initialisation that does not begin near the uniform distribution, or whose residual layers are too large."""
    torch.manual_seed(0)
    model, tokens = GPT(GPTConfig(vocab_size=64, width=64, n_layer=4)), torch.randint(64, (16, 32))
    assert abs(-token_logprobs(model(tokens), tokens).mean() - math.log(64)) < 0.05
    for name, parameter in model.named_parameters():
        std = 0.02 / math.sqrt(8) if name.endswith(("proj.weight", "down.weight")) else 0.02
        assert not (name.endswith("bias") and parameter.any()), name
        assert parameter.dim() < 2 or parameter.std().item() == pytest.approx(std, rel=0.1), name
    head = ScalarModel(GPTConfig(vocab_size=1, block_size=1, n_layer=0, width=4095, n_head=1)).head
    assert head.weight.std().item() == pytest.approx(1 / 64, rel=0.1)


def test_a_scalar_models_trunk_and_normalisation(checkpoints):
    """A trunk that was not loaded, or gain and bias on one of two paths only."""
    fresh, language = load_model(checkpoints.sft, fresh_head=True), load_model(checkpoints.sft)
    assert all(torch.equal(a, b) for a, b in zip(fresh.trunk.parameters(), language.trunk.parameters()))
    model, tokens = random_model(ScalarModel), torch.tensor([PROMPTS[0]])
    before, last = model(tokens), torch.tensor([4])
    model.gain.fill_(2.0)
    model.bias.fill_(-3.0)
    assert torch.allclose(model(tokens), 2 * before - 3)
    assert torch.allclose(model.score(tokens, None, last), 2 * before[:, -1] - 3)


@pytest.mark.parametrize("padded", [True, False])
def test_reading_some_positions_equals_reading_all(padded):
    """A last block that leaves out a position which others attend to, in the result or in any gradient."""
    (tokens, pad), model = pad_prompts(PROMPTS, END), random_model(n_layer=3).double()
    pad = pad if padded else None
    some = (torch.arange(4), torch.tensor([4, 4, 3, 4]))
    for at in (np.s_[:, 2:], np.s_[:, -1], some):
        gradients = []
        for hidden in (model.trunk(tokens, pad)[at], model.trunk(tokens, pad, at=at)):
            gradients.append([*torch.autograd.grad(hidden.sin().sum(), list(model.parameters())), hidden])
        for plain, fast in zip(*gradients):
            assert torch.allclose(plain, fast, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_activations_changes_nothing(dropout):
    """Activation checkpointing that draws another dropout in the second pass, or that loses a gradient."""
    (tokens, pad), model = pad_prompts(PROMPTS, END), random_model(dropout=dropout).train()
    gradients = []
    for model.trunk.recompute in (False, True):
        torch.manual_seed(0)
        hidden = model.trunk(tokens, pad, at=np.s_[:, 2:])
        gradients.append([hidden, *torch.autograd.grad(hidden.sin().sum(), list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_compiled_layers_change_nothing(monkeypatch):
    """--compile: another result than eager, or a graph for every new shape, as a compiled cache or `at` would need."""
    monkeypatch.setattr(Block, "compile", lambda block, dynamic: torch.nn.Module.compile(  # CI need not have a compiler
        block, dynamic=dynamic, backend="aot_eager"))
    torch.manual_seed(0)
    plain, counts = GPT(GPTConfig(11, 32, 3, 4, 16, n_kv_head=2, swiglu=True, rms_norm=True, rope=1e4)).eval(), []
    compiled = copy.deepcopy(plain)
    compiled.trunk.set_flags(SimpleNamespace(recompute=False, compile=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for prompts in (PROMPTS, [row + row for row in PROMPTS], PROMPTS[:3], PROMPTS[2:] * 4):
        tokens, pad = pad_prompts(prompts, END)
        for first in (1, 3):
            results = []
            for model in (plain, compiled):
                hidden = model.trunk(tokens, pad, at=np.s_[:, first:])
                results.append([hidden, *torch.autograd.grad(hidden.sin().sum(), list(model.parameters()))])
            assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(*results))
        drawn = [sample(model, tokens, pad, 6, END, random=torch.Generator().manual_seed(3))[0]
                 for model in (plain, compiled)]
        assert torch.equal(*drawn)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts == [1] * 4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_gradients_of_the_head(dtype, tolerance):
    """Logits of less than float32 under autocast; gradients that are another function's, or worse than bf16's."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(11, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = Head.apply(hidden, weight)
    exact = F.linear(hidden, weight)
    assert torch.equal(logits, exact)
    for ours, theirs in zip(*(torch.autograd.grad(x.sin().sum(), (hidden, weight)) for x in (logits, exact))):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() <= tolerance * theirs.norm()
        assert torch.equal(ours, ours.to(dtype).float())  # rounded to bf16 under autocast: the fast products ran


@pytest.mark.parametrize("padding", [[], [END], [9] * 4, [END, 3, 9] * 3])
def test_left_padding_changes_nothing(padding):
    """Positions counted from the padded row's start, attention that sees padding, padding found by comparing ids."""
    model, scorer, prompt, n = random_model(), random_model(ScalarModel), PROMPTS[0], len(padding)
    plain, padded, pad = torch.tensor([prompt]), torch.tensor([padding + prompt]), torch.tensor([n])
    last = torch.tensor([len(prompt) - 1])
    assert torch.allclose(model(padded, pad)[:, n:], model(plain), rtol=0, atol=1e-5)
    assert torch.allclose(scorer(padded, pad)[:, n:], scorer(plain), rtol=0, atol=1e-5)
    assert torch.allclose(scorer.score(padded, pad, last + n), scorer.score(plain, None, last), rtol=0, atol=1e-5)
    assert torch.isfinite(model(padded, pad)).all()  # a NaN in the padding would spread by way of the gradient
    drawn = [sample(model, tokens, p, 12, END, random=torch.Generator().manual_seed(3))
             for tokens, p in ((plain, None), (padded, pad))]
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.allclose(drawn[0][2], drawn[1][2], rtol=0, atol=1e-5)


def test_response_logits_predict_the_response():
    """The shift by one; a sampler that stops one token short of the block size (the last is never read again)."""
    model, tokens, P = random_model(block_size=6), torch.tensor([[END, 3, 4, 5, 6, 7]]), 3
    expected = torch.stack([model(tokens[:, :P + t])[0, -1] for t in range(3)])
    assert torch.allclose(model(tokens[:, :-1], at=np.s_[:, P - 1:])[0], expected, atol=1e-5)
    assert sample(model, tokens[:, :P], None, 4, end=-1)[0].shape == (1, 4)
    with pytest.raises(UserError, match="do not fit"):
        sample(model, tokens[:, :P], None, 5, end=-1)


@pytest.mark.parametrize("how", ["mean", "min"])
def test_an_ensemble_is_the_mean_or_the_least(checkpoints, how):
    """The maximum, which is what is to be avoided; members' scores in another order than the texts; a comma misread."""
    members, texts = [random_model(ScalarModel, seed) for seed in (1, 2, 3)], [[1, 2, 3], [4], [5, 6, 7, 8]]
    each = torch.stack([score_many(member, texts) for member in members])
    (joined := Ensemble(members)).how = how
    joined = score_many(joined, texts)
    assert torch.allclose(joined, each.mean(0) if how == "mean" else each.min(0).values, atol=1e-5)
    several = load_reward(f"{checkpoints.reward},{checkpoints.reward}", how=how)
    assert len(several) == 2 and several.how == how and not several.training


@both_precisions
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_token_logprobs(dtype, temperature):
    """A missing shift, a temperature that multiplies, float64 rounded to float32."""
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 7, dtype=dtype) * 3, torch.randint(7, (2, 5))
    got = token_logprobs(logits, tokens, temperature)
    assert got.shape == (2, 4) and got.dtype == dtype
    for b, t in itertools.product(range(2), range(4)):
        powers = [math.exp(x / temperature) for x in logits[b, t].tolist()]
        assert got[b, t].item() == pytest.approx(math.log(powers[tokens[b, t + 1]] / sum(powers)), **close(dtype))
    assert torch.equal(token_logprobs(logits[:, :-1], tokens, temperature), got)  # the last logits predict nothing
    assert token_logprobs(logits.bfloat16(), tokens).dtype == torch.float32  # a softmax in bf16 would lose the KL


def test_a_loaded_model_is_the_saved_one_and_runs_no_code(checkpoints, tmp_path):
    """Dropout that stays on, a model of another kind, or a stranger's checkpoint that runs a program when loaded."""
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_model(checkpoints.sft, dropout=0.5)(tokens), load_model(checkpoints.sft)(tokens))
    with pytest.raises(UserError, match="kind reward, expected lm"):
        load_model(checkpoints.reward)
    common.save(tmp_path / "model.pt", {"weights": Evil()})
    with pytest.raises((UserError, pickle.UnpicklingError)):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()
