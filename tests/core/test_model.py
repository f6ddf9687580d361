"""The architecture against an independent one, padding that changes nothing, log-probabilities, checkpoints."""
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import model as model_module
from common import UserError
from conftest import END, both_precisions, close, random_model
from data import pad_prompts
from model import (GPT, Ensemble, GPTConfig, ScalarModel, attention, entropy, load_reward, load_trunk, row_logprobs,
                   score_many, token_logprobs)
from sampling import sample

PROMPTS = [[END, 3, 4, 5, 6], [END], [END, 7, END, 2], [END, 1]]  # ragged, and one with EOS in the middle


# ---- the architecture ------------------------------------------------------------------------------------------------


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


def random_attention(dtype):
    """q, k, v (B, H, T, D) and a padding bias (B, 1, T, T), causal, in which every query sees at least itself."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 8).to(dtype)
    key, pad = torch.arange(7), torch.tensor([0, 3])[:, None, None]
    may = (key <= key[:, None]) & (key >= pad) | (key == key[:, None])
    return q, k, v, torch.zeros(may.shape).masked_fill(~may, -math.inf)[:, None]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_equals_the_library(dtype, tolerance):
    """Attention written out against PyTorch's: the scale, the mask, a single query, and the softmax's precision."""
    q, k, v, bias = random_attention(dtype)
    exact = [x.double() for x in (q, k, v)]
    for got, expected in [
            (attention(q, k, v, None), F.scaled_dot_product_attention(*exact, is_causal=True)),
            (attention(q, k, v, bias), F.scaled_dot_product_attention(*exact, bias.double())),
            (attention(q[:, :, -1:], k, v, None), F.scaled_dot_product_attention(*exact, is_causal=True)[:, :, -1:])]:
        assert got.dtype == dtype and torch.allclose(got.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_padded_attention_through_the_fused_kernel(dtype, tolerance, monkeypatch):
    """The kernel that a GPU takes with another mask, scale or dtype of the bias than the lines that a CPU takes."""
    q, k, v, bias = random_attention(dtype)
    written_out, plain = attention(q, k, v, bias), F.scaled_dot_product_attention
    seen = []

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")  # for the choice of the path only: the numbers stay on the CPU
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest, **how: seen.append(how) or plain(
        q.as_subclass(torch.Tensor), *rest, **how))
    fused = attention(q.as_subclass(Elsewhere), k, v, bias)
    assert seen == [{"is_causal": False}] and fused.dtype == written_out.dtype == dtype
    assert torch.allclose(fused.float(), written_out.float(), rtol=0, atol=tolerance)
    device = attention(*torch.empty(3, 2, 2, 5, 4, device="meta"), None).device
    assert device.type == "meta"  # no mask is made on the CPU for a model that is elsewhere


def test_initial_loss_and_weights():
    """An initialisation that does not begin near the uniform distribution, or whose residual layers are too large."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, width=64, n_layer=4))
    tokens = torch.randint(64, (16, 32))
    assert abs(-token_logprobs(model(tokens), tokens).mean() - math.log(64)) < 0.05
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 / math.sqrt(8) if name.endswith(("proj.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
        elif name.endswith("bias"):
            assert not parameter.any(), name


def test_scalar_head_initialisation_and_normalisation(checkpoints):
    """A fresh head of another scale, a trunk that was not loaded, or gain and bias on one of two paths only."""
    fresh, language = load_trunk(checkpoints.sft), model_module.load_model(checkpoints.sft)
    assert all(torch.equal(a, b) for a, b in zip(fresh.trunk.parameters(), language.trunk.parameters()))
    torch.manual_seed(0)
    head = ScalarModel(GPTConfig(vocab_size=1, block_size=1, n_layer=0, width=4095, n_head=1)).head
    assert head.weight.std().item() == pytest.approx(1 / 64, rel=0.1)
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


# ---- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 1, 4, 9])
def test_left_padding_changes_nothing(padding):
    """Positions counted from the padded row's start, or attention that sees the padding: all outputs move."""
    model, scorer, prompt = random_model(), random_model(ScalarModel), PROMPTS[0]
    plain, padded = torch.tensor([prompt]), torch.tensor([[END] * padding + prompt])
    pad, last = torch.tensor([padding]), torch.tensor([len(prompt) - 1])
    assert torch.allclose(model(padded, pad)[:, padding:], model(plain), rtol=0, atol=1e-5)
    assert torch.allclose(scorer(padded, pad)[:, padding:], scorer(plain), rtol=0, atol=1e-5)
    assert torch.allclose(scorer.score(padded, pad, last + padding), scorer.score(plain, None, last), rtol=0, atol=1e-5)
    drawn = [sample(model, tokens, p, 12, END, random=torch.Generator().manual_seed(3))
             for tokens, p in ((plain, None), (padded, pad))]
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.allclose(drawn[0][2], drawn[1][2], rtol=0, atol=1e-5)


def test_padding_ids_do_not_matter():
    """Padding found by comparing ids: what stands in the padding must not reach any real token."""
    model, (tokens, pad) = random_model(), pad_prompts(PROMPTS, END)
    other = torch.where(torch.arange(tokens.size(1)) < pad[:, None], 9, tokens)
    for row, skip in enumerate(pad.tolist()):
        assert torch.equal(model(tokens, pad)[row, skip:], model(other, pad)[row, skip:])
    assert torch.isfinite(model(tokens, pad)).all()  # a NaN in a padding row would spread by way of the gradient


def test_right_padding_leaves_the_score():
    """A score read from padding, or at "the last token that is not EOS": these texts end with EOS."""
    scorer, texts = random_model(ScalarModel), [[END, 3, END], [END, 4, 5, 6, 7, END], [END, END]]
    expected = torch.stack([scorer(torch.tensor([text]))[0, -1] for text in texts])
    for extra in (0, 1, 7):
        longest = max(map(len, texts)) + extra
        tokens = torch.tensor([text + [END] * (longest - len(text)) for text in texts])
        last = torch.tensor([len(text) - 1 for text in texts])
        assert torch.allclose(scorer.score(tokens, None, last), expected, atol=1e-5)
    assert torch.allclose(score_many(scorer, texts, batch_size=2), expected, atol=1e-5)  # and in the order of the texts


def test_response_logits_predict_the_response():
    """The shift by one: the logits for response token t are those after everything before it."""
    model, P = random_model(), 3
    tokens = torch.tensor([[END, 3, 4, 5, 6, 7]])
    expected = torch.stack([model(tokens[:, :P + t])[0, -1] for t in range(3)])
    assert torch.allclose(model.response_logits(tokens, None, P)[0], expected, atol=1e-5)


def test_too_long_is_refused():
    """A sampler that stops one token short of the block size, or an index error deep in an embedding."""
    model, prompt = random_model(block_size=8), torch.zeros(1, 5, dtype=torch.long)
    assert sample(model, prompt, None, 4, end=-1)[0].shape == (1, 4)  # the last sampled token is never read again
    with pytest.raises(UserError, match="do not fit"):
        sample(model, prompt, None, 5, end=-1)


@pytest.mark.parametrize("how", ["mean", "min"])
def test_an_ensemble_is_the_mean_or_the_least(checkpoints, how):
    """The maximum, which is what is to be avoided; members' scores in another order than the texts; a comma misread."""
    members, texts = [random_model(ScalarModel, seed) for seed in (1, 2, 3)], [[1, 2, 3], [4], [5, 6, 7, 8]]
    each = torch.stack([score_many(member, texts) for member in members])
    joined = score_many(Ensemble(members, how), texts)
    assert torch.allclose(joined, each.mean(0) if how == "mean" else each.min(0).values, atol=1e-5)
    assert isinstance(load_reward(checkpoints.reward), ScalarModel)
    several = load_reward(f"{checkpoints.reward},{checkpoints.reward}", ensemble=how)
    assert len(several.models) == 2 and several.how == how and not several.training
    with pytest.raises(UserError, match="--ensemble is 'max'"):
        load_reward(checkpoints.reward, ensemble="max")


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@both_precisions
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_token_logprobs(dtype, temperature):
    """A missing shift, a temperature that multiplies, or a float64 input rounded to float32."""
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 5, 7, dtype=dtype) * 3, torch.randint(7, (2, 5))
    got = token_logprobs(logits, tokens, temperature)
    assert got.shape == (2, 4) and got.dtype == dtype
    for b in range(2):
        for t in range(4):
            powers = [math.exp(x / temperature) for x in logits[b, t].tolist()]
            assert got[b, t].item() == pytest.approx(math.log(powers[tokens[b, t + 1]] / sum(powers)), **close(dtype))
    assert torch.equal(token_logprobs(logits[:, :-1], tokens, temperature), got)  # the last logits predict nothing
    assert token_logprobs(logits.bfloat16(), tokens).dtype == torch.float32  # a softmax in bf16 would lose the KL


def test_entropy():
    """A wrong sign or a forgotten temperature."""
    logits, temperature = torch.tensor([0.3, -1.0, 2.0]), 0.7
    p = [math.exp(x / temperature) for x in logits.tolist()]
    expected = -sum(x / sum(p) * math.log(x / sum(p)) for x in p)
    assert entropy(logits, temperature).item() == pytest.approx(expected, abs=1e-6)
    assert entropy(torch.zeros(2, 8)).tolist() == pytest.approx([math.log(8)] * 2)


def test_row_logprobs_float64(autocast_off):
    """Rows with prompts of unequal length: the prompt counted, EOS not counted, or one row's sum given to another."""
    model = random_model().double()
    rows = [([END, 3, 4, 5, 6, 7, END], 4), ([END, 8, END], 1), ([END, 2, 2, END], 3)]
    got = row_logprobs(model, rows, END, "cpu", autocast_off)
    for (ids, first), total in zip(rows, got.tolist()):
        each = [model(torch.tensor([ids[:t]]))[0, -1].log_softmax(-1)[ids[t]].item() for t in range(first, len(ids))]
        assert total == pytest.approx(sum(each), abs=1e-10)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_the_saved_one(checkpoints, tmp_path):
    """Weights that are not restored, dropout that stays on in a model that only scores, or a model of another kind."""
    model, tokens = model_module.load_model(checkpoints.sft, dropout=0.5), torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), model_module.load_model(checkpoints.sft)(tokens))
    with pytest.raises(UserError, match="kind reward, expected lm"):
        model_module.load_model(checkpoints.reward)
    with pytest.raises(UserError, match="model.pt is missing"):
        model_module.load_model(tmp_path)


def test_damage_is_noticed_and_no_code_is_run(checkpoints, tmp_path):
    """One flipped bit that torch.load would read, or a checkpoint from a stranger that runs a program when loaded."""
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    path = Path(shutil.copytree(checkpoints.sft, tmp_path / "evil")) / "model.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="evil/model.pt: damaged"):
        model_module.load_model(tmp_path / "evil")
    common.save(path, {"weights": Evil()})
    with pytest.raises((UserError, pickle.UnpicklingError)):
        model_module.load_model(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()
