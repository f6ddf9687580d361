"""The architecture against an independent one, the sampler against the full pass, padding that changes nothing."""
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as model_module
import sampling
from common import UserError
from conftest import END, random_model, script
from data import pad_prompts
from model import GPT, GPTConfig, ScalarModel, attention, entropy, load_trunk, score_many, token_logprobs
from sampling import KVCache, draw, sample, sample_many

PROMPTS = [[END, 3, 4, 5, 6], [END], [END, 7, END, 2], [END, 1]]  # ragged, and one with end of text in the middle


# ---- the architecture ------------------------------------------------------------------------------------------------


def gpt2_by_hand(weights, tokens, n_layer, n_head, exact):
    """GPT-2 for one unpadded text, position by position and head by head: logits (T, V). Written from the papers.

    exact: the activation is x times the normal distribution function, and not GPT-2's approximation of it.
    """
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
    head = model_module.scalar_head(GPTConfig(width=4095, n_head=1))
    assert head.weight.std().item() == pytest.approx(1 / 64, rel=0.1)
    model, tokens = random_model(ScalarModel), torch.tensor([PROMPTS[0]])
    before, last = model(tokens), torch.tensor([4])
    model.gain.fill_(2.0)
    model.bias.fill_(-3.0)
    assert torch.allclose(model(tokens), 2 * before - 3)
    assert torch.allclose(model.score(tokens, None, last), 2 * before[:, -1] - 3)


# ---- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", range(10))
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
    """A score read from padding, or at "the last token that is not end of text": both texts end with end of text."""
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
    """An index error deep in an embedding, or positions that silently wrap, for a text beyond the block size."""
    model = random_model(block_size=8)
    with pytest.raises(UserError, match="9 tokens do not fit in block size 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    prompt = torch.zeros(1, 5, dtype=torch.long)
    assert sample(model, prompt, None, 4, end=-1)[0].shape == (1, 4)  # the last sampled token is never read again
    assert sample(model, prompt, None, 4, end=-1, graph=True)[0].shape == (1, 4)
    with pytest.raises(UserError, match="do not fit"):
        sample(model, prompt, None, 5, end=-1)


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
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
            expected = math.log(powers[tokens[b, t + 1]] / sum(powers))
            assert got[b, t].item() == pytest.approx(expected, abs=1e-12 if dtype == torch.float64 else 1e-5)
    assert torch.equal(token_logprobs(logits[:, :-1], tokens, temperature), got)  # the last logits predict nothing


def test_token_logprobs_of_bf16_logits_are_float32():
    """A softmax in bfloat16, which loses the KL that PPO is about."""
    logits = torch.randn(1, 3, 50).bfloat16()
    assert token_logprobs(logits, torch.tensor([[1, 2, 3]])).dtype == torch.float32


def test_entropy():
    """A wrong sign or a forgotten temperature."""
    logits, temperature = torch.tensor([0.3, -1.0, 2.0]), 0.7
    p = [math.exp(x / temperature) for x in logits.tolist()]
    expected = -sum(x / sum(p) * math.log(x / sum(p)) for x in p)
    assert entropy(logits, temperature).item() == pytest.approx(expected, abs=1e-6)
    assert entropy(torch.zeros(2, 8)).tolist() == pytest.approx([math.log(8)] * 2)


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cached_sampling_equals_the_full_forward(temperature):
    """A cache that shifts positions or loses a key: the sampler's log-probabilities are those of one full pass."""
    model, (tokens, pad) = random_model(), pad_prompts(PROMPTS * 16, END)
    responses, lengths, logprobs = sample(model, tokens, pad, 20, END, temperature,
                                          random=torch.Generator().manual_seed(0))
    assert len(set(lengths.tolist())) >= 3  # some rows end early
    P = tokens.size(1)
    texts = torch.cat([tokens, responses], dim=1)
    full = token_logprobs(model(texts, pad), texts, temperature)
    for row, length in enumerate(lengths.tolist()):
        assert torch.allclose(full[row, P - 1:P - 1 + length], logprobs[row, :length], rtol=0, atol=5e-6)


@pytest.mark.parametrize("pad", [None, torch.tensor([0, 2])])
def test_cache_takes_tokens_in_any_portions(pad):
    """A causal mask that starts at the wrong place when several tokens follow those already in the cache."""
    model, tokens = random_model(), torch.tensor([[END, 3, 4, 5, 6, 7], [END, END, END, 8, 9, 1]])
    cache = KVCache(6)
    parts = [model.trunk(part, pad, cache) for part in tokens.split([2, 3, 1], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model.trunk(tokens, pad), atol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_rows_that_end_leave_the_batch_unnoticed(monkeypatch, padded):
    """A row that gets a neighbour's cache, padding, luck or place in the result when another row leaves the batch."""
    model, (tokens, pad) = random_model(), pad_prompts(PROMPTS * 16, END)
    pad = pad if padded else None

    def drawn():
        return sample(model, tokens, pad, 20, END, 0.7, random=torch.Generator().manual_seed(0))
    sizes, keep = [], KVCache.keep
    monkeypatch.setattr(KVCache, "keep", lambda cache, rows: (sizes.append(len(rows)), keep(cache, rows)))
    leaving = drawn()
    assert len(sizes) > 2 and sizes == sorted(sizes, reverse=True)
    alone = [sample(model, tokens[i:i + 1], None if pad is None else pad[i:i + 1], 20, END, 0)[0] for i in range(4)]
    together = sample(model, tokens[:4], None if pad is None else pad[:4], 20, END, 0)
    assert all(torch.equal(together[0][i, :together[1][i]], row[0, :together[1][i]]) for i, row in enumerate(alone))
    monkeypatch.setattr(sampling, "LEAVE", -1.0)  # nobody ever leaves
    staying = drawn()
    assert torch.equal(leaving[0], staying[0]) and torch.equal(leaving[1], staying[1])
    for row, length in enumerate(staying[1].tolist()):
        assert torch.allclose(leaving[2][row, :length], staying[2][row, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_a_cache_of_fixed_shapes_draws_the_same(padded):
    """The path of CUDA graphs, whose attention reads memory that is not filled yet: it must not reach a result."""
    model, (tokens, pad) = random_model(), pad_prompts(PROMPTS * 16, END)
    plain, fixed = (sample(model, tokens, pad if padded else None, 20, END, 0.7, graph=graph,
                           random=torch.Generator().manual_seed(0)) for graph in (False, True))
    assert torch.equal(plain[0], fixed[0]) and torch.equal(plain[1], fixed[1])
    for row, length in enumerate(plain[1].tolist()):
        assert torch.allclose(plain[2][row, :length], fixed[2][row, :length], rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_a_recorded_step_draws_the_same(monkeypatch, padded, bf16):
    """A CUDA graph that keeps reading the first token, a cache that no longer grows, or a recording never used."""
    model, (tokens, pad) = random_model().cuda(), pad_prompts(PROMPTS * 16, END)
    used, record = [], sampling.record
    monkeypatch.setattr(sampling, "record", lambda step, *rest: used.append((step, record(step, *rest))) or used[-1][1])
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
        plain, recorded = (sample(model, tokens.cuda(), pad.cuda() if padded else None, 20, END, 0.7, graph=graph,
                                  random=torch.Generator("cuda").manual_seed(0)) for graph in (False, True))
    assert len(used) == 1 and used[0][0] is not used[0][1]
    R = min(plain[0].size(1), recorded[0].size(1))
    same = (plain[0][:, :R] == recorded[0][:, :R]).cumprod(1).bool()  # other kernels: a draw may differ, then all after
    assert same.float().mean() > 0.9
    kept = same & (torch.arange(R, device="cuda") < plain[1][:, None])
    assert torch.allclose(plain[2][:, :R][kept], recorded[2][:, :R][kept], rtol=0, atol=0.1 if bf16 else 1e-4)


@pytest.mark.parametrize("look", [1, 3, 8])
def test_how_often_the_sampler_looks_changes_nothing(monkeypatch, look):
    """A row that has ended and waits to leave the batch: what it draws meanwhile must not reach the result."""
    model, (tokens, pad) = random_model(), pad_prompts(PROMPTS * 16, END)
    monkeypatch.setattr(sampling, "LOOK", {"cpu": look})
    responses, lengths, _ = sample(model, tokens, pad, 20, END, 0.7, random=torch.Generator().manual_seed(0))
    monkeypatch.undo()
    expected = sample(model, tokens, pad, 20, END, 0.7, random=torch.Generator().manual_seed(0))
    assert torch.equal(responses, expected[0]) and torch.equal(lengths, expected[1])


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


def test_draws_at_the_edges():
    """Luck of 0, or just below 1, that draws a token of probability 0 at an end of the vocabulary, or none at all."""
    probs = torch.tensor([[0, 0.25, 0.0, 0.75, 0, 0]]).expand(2, 6)
    for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.99)):
        assert draw(probs, top_k, top_p, torch.tensor([[0.0], [1 - 2**-24]])).tolist() == [1, 3]


def test_attention_stays_on_its_device():
    """A mask made on the CPU for a model that is elsewhere."""
    q = torch.empty(2, 2, 5, 4, device="meta")
    assert attention(q, q, q, None).device.type == "meta"


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


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_equals_the_library(dtype, tolerance):
    """Attention written out against PyTorch's: the scale, the mask, a single query, and the softmax's precision."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 7, 8).to(dtype)
    bias = torch.zeros(2, 1, 7, 7).masked_fill(torch.rand(2, 1, 7, 7) < 0.5, -math.inf)
    bias.diagonal(dim1=2, dim2=3).zero_()
    exact = [x.double() for x in (q, k, v)]
    for got, expected in [
            (attention(q, k, v, None), F.scaled_dot_product_attention(*exact, is_causal=True)),
            (attention(q, k, v, bias), F.scaled_dot_product_attention(*exact, bias.double())),
            (attention(q[:, :, -1:], k, v, None), F.scaled_dot_product_attention(*exact, is_causal=True)[:, :, -1:])]:
        assert got.dtype == dtype and torch.allclose(got.double(), expected, rtol=0, atol=tolerance)


def test_rows_end_where_they_end(monkeypatch):
    """A row that goes on after its end, an immediate end of 0 tokens, a loop that runs on when all have ended."""
    script(monkeypatch, [END], [4, END], [5, 6, 7, END], [8, 8, 8])
    tokens, pad = pad_prompts(PROMPTS, END)
    responses, lengths, logprobs = sample(random_model(), tokens, pad, 4, END)
    assert lengths.tolist() == [1, 2, 4, 4]
    assert responses.tolist() == [[END] * 4, [4, END, END, END], [5, 6, 7, END], [8, 8, 8, 9]]
    assert logprobs.shape == (4, 4)
    script(monkeypatch, [4, END], [END])
    assert sample(random_model(), tokens[:2], pad[:2], 20, END)[0].shape == (2, 2)


def test_sample_many_keeps_order_and_equals_one_at_a_time():
    """Responses that return in the order of length, or that depend on which prompts share a batch."""
    model = random_model()
    together = sample_many(model, PROMPTS, 10, END, batch_size=3, temperature=0)
    alone = [sample_many(model, [prompt], 10, END, temperature=0)[0] for prompt in PROMPTS]
    assert together == alone
    assert sample_many(model, [], 10, END) == []
    drawn = sample_many(model, PROMPTS * 8, 10, END, random=torch.Generator().manual_seed(0))
    assert all(END not in ids[:-1] and (ids[-1] == END or len(ids) == 10) for ids in drawn)


def test_prompts_of_a_batch_are_of_similar_length(monkeypatch):
    """A prompt of 5 tokens that pays, at every step, for the padding of one of 500."""
    seen, plain = [], sampling.sample

    def watched(model, tokens, pad, *args, **how):
        seen.append(tokens.numel() - (0 if pad is None else int(pad.sum())))
        assert pad is None or tokens.size(1) - int(pad.max()) >= tokens.size(1) // 2
        return plain(model, tokens, pad, *args, **how)
    monkeypatch.setattr(sampling, "sample", watched)
    prompts = [[1 + i % 9] * n for i, n in enumerate([1, 20, 2, 18, 1, 22, 2, 19])]
    responses, lengths, logprobs = sampling.sample_prompts(random_model(), prompts, 6, END, batch_size=4)
    assert sum(seen) == sum(map(len, prompts)) and len(seen) == 2
    # Log-probabilities belong to their responses, whatever the order of sampling.
    model = random_model()
    for prompt, response, n, logprob in zip(prompts, responses, lengths, logprobs):
        text = torch.tensor([prompt + response[:n].tolist()])
        expected = token_logprobs(model(text), text)[0, len(prompt) - 1:]
        assert torch.allclose(logprob[:n], expected, atol=1e-5)


@pytest.mark.parametrize("tokens, sizes", [(10**6, [40]), (200, [25, 7, 7, 1]), (1, [1] * 40)])
def test_a_sampling_batch_has_so_many_tokens_at_most(monkeypatch, tokens, sizes):
    """A cache that grows with the longest prompt until the memory is full: 25 short prompts, then 15 long ones."""
    seen, plain = [], sampling.sample

    def watched(model, tokens, *args, **how):
        seen.append(len(tokens))
        return plain(model, tokens, *args, **how)
    monkeypatch.setattr(sampling, "sample", watched)
    monkeypatch.setattr(sampling, "TOKENS", tokens)
    sampling.sample_prompts(random_model(), [[1] * 2] * 25 + [[1] * 20] * 15, 6, END)
    assert seen == sizes


@pytest.mark.parametrize("top_k, top_p, expected", [
    (0, 1.0, [0.4, 0.3, 0.2, 0.1]),
    (1, 1.0, [1.0, 0, 0, 0]),
    (3, 1.0, [4 / 9, 3 / 9, 2 / 9, 0]),
    (9, 1.0, [0.4, 0.3, 0.2, 0.1]),       # more than there are
    (0, 0.35, [1.0, 0, 0, 0]),            # the first reaches the share alone
    (0, 0.6, [4 / 7, 3 / 7, 0, 0]),       # the one that crosses the share is kept
    (0, 0.85, [4 / 9, 3 / 9, 2 / 9, 0]),
    (3, 0.72, [4 / 7, 3 / 7, 0, 0]),      # top_p among the three that top_k left: 4/9 + 3/9 > 0.72 > 0.4 + 0.3
])
def test_top_k_and_top_p(top_k, top_p, expected):
    """Truncation that keeps one token too many or too few, or that is applied in the wrong order."""
    order = [2, 0, 3, 1]  # ids are not sorted by probability
    probs = torch.empty(4)
    probs[order] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    luck = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    drawn = draw(probs.expand(20_000, 4), top_k, top_p, luck)
    shares = torch.bincount(drawn, minlength=4)[order] / 20_000
    assert torch.allclose(shares, torch.tensor(expected), atol=0.015)
    assert all((share == 0) == (p == 0) for share, p in zip(shares.tolist(), expected))


def test_sampling_follows_the_temperature():
    """A sampler that draws at temperature 1 while it reports log-probabilities at another."""
    model, B = random_model(), 20_000
    prompt = torch.tensor([PROMPTS[0]])
    random = torch.Generator().manual_seed(0)
    drawn = sample(model, prompt.expand(B, -1), None, 1, END, temperature=0.5, random=random)[0]
    expected = (model(prompt)[0, -1] / 0.5).softmax(-1)
    assert torch.allclose(torch.bincount(drawn[:, 0], minlength=11) / B, expected, atol=0.015)


def test_temperature_zero_is_greedy():
    """A division by zero, or a random choice, at temperature 0."""
    model, prompt = random_model(), torch.tensor([PROMPTS[0]])
    first = sample(model, prompt, None, 1, END, temperature=0)[0].item()
    assert first == model(prompt)[0, -1].argmax()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_load_model_refuses_the_wrong_kind(checkpoints, tmp_path):
    """A reward model used as a policy, an empty folder, or a damaged file, each with a traceback."""
    with pytest.raises(UserError, match="this is a reward checkpoint, expected lm"):
        model_module.load_model(checkpoints.reward)
    with pytest.raises(UserError, match="model.pt is missing"):
        model_module.load_model(tmp_path)
    (tmp_path / "model.pt").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        model_module.load_model(tmp_path)


def test_loading_runs_no_code(checkpoints, tmp_path):
    """A checkpoint from a stranger that runs a program when it is loaded."""
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    shutil.copytree(checkpoints.sft, tmp_path / "evil")
    torch.save({"weight": Evil()}, tmp_path / "evil" / "model.pt")
    with pytest.raises(UserError, match="evil/model.pt: damaged"):
        model_module.load_model(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()


def test_a_loaded_model_is_the_saved_one(checkpoints):
    """Weights that are not restored, or dropout that stays on in a model that only scores."""
    model = model_module.load_model(checkpoints.sft, dropout=0.5)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), model_module.load_model(checkpoints.sft)(tokens))
