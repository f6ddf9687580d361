"""The sampler against the full pass: cache, rows that end, batches by length, top-k and top-p, temperature."""
import io
import shutil
import sys

import pytest
import torch

import sample as talk
import sampling
from conftest import END, random_model
from data import load_tokenizer, pad_prompts
from model import token_logprobs
from sample import likeliest
from sampling import KVCache, draw, sample, sample_many, sample_prompts

PROMPTS = [[END, 3, 4, 5, 6], [END], [END, 7, END, 2], [END, 1]]  # ragged, and one with EOS in the middle


def drawn(padded=True, temperature=0.7):
    """(model, tokens, pad, what sample returns) for 64 prompts."""
    model, (tokens, pad) = random_model(), pad_prompts(PROMPTS * 16, END)
    pad = pad if padded else None
    return model, tokens, pad, sample(model, tokens, pad, 20, END, temperature, random=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cached_sampling_equals_the_full_forward(temperature):
    """A cache that shifts positions or loses a key: the sampler's log-probabilities are those of one full pass."""
    model, tokens, pad, (responses, lengths, logprobs) = drawn(temperature=temperature)
    assert len(set(lengths.tolist())) >= 3  # some rows end early
    P, texts = tokens.size(1), torch.cat([tokens, responses], dim=1)
    full = token_logprobs(model(texts, pad), texts, temperature)
    for row, length in enumerate(lengths.tolist()):
        assert torch.allclose(full[row, P - 1:P - 1 + length], logprobs[row, :length], rtol=0, atol=5e-6)


def test_a_prompt_of_several_rows_is_computed_once():
    """Rows that get another prompt's cache or padding; ids that are equal, though one begins with padding."""
    model, (tokens, pad) = random_model(), pad_prompts([*PROMPTS, [END, END, 3]], END)
    twin, rows = torch.tensor([[END, END, END, END, 3]]), torch.tensor([4, 1, 4, 0, 1, 5, 2, 4, 3, 5, 1])
    tokens, pad, seen = torch.cat([tokens, twin]), torch.cat([pad, torch.tensor([4])]), []
    model.trunk.register_forward_pre_hook(lambda trunk, given: seen.append(given[0].shape))
    responses, lengths, logprobs = sample(model, tokens[rows], pad[rows], 8, -1, 0.7)
    assert seen[:2] == [(6, 5), (11, 1)]
    texts = torch.cat([tokens[rows], responses], dim=1)
    full = token_logprobs(model(texts, pad[rows]), texts, 0.7)[:, 4:]
    assert torch.allclose(full, logprobs, rtol=0, atol=5e-6) and lengths.eq(8).all()


@pytest.mark.parametrize("pad", [None, torch.tensor([0, 2])])
def test_a_cache_takes_one_token_after_the_other(pad):
    """A causal mask or positions that start at the wrong place when a token follows those already in the cache."""
    model, tokens = random_model(), torch.tensor([[END, 3, 4, 5, 6, 7], [END, END, END, 8, 9, 1]])
    cache = KVCache(6)
    parts = [model.trunk(part, pad, cache) for part in tokens.split([3, 1, 1, 1], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), model.trunk(tokens, pad), atol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_rows_that_end_leave_the_batch_unnoticed(monkeypatch, padded):
    """A row that gets a neighbour's cache, padding, uniform number or place when another row leaves the batch."""
    sizes, keep = [], KVCache.take
    monkeypatch.setattr(KVCache, "take", lambda cache, rows: (sizes.append(len(rows)), keep(cache, rows)))
    leaving = drawn(padded)[3]
    assert len(sizes) > 3 and sizes == sorted(sizes, reverse=True)
    monkeypatch.setattr(sampling, "LEAVE", -1.0)  # nobody ever leaves
    staying = drawn(padded)[3]
    assert torch.equal(leaving[0], staying[0]) and torch.equal(leaving[1], staying[1])
    for row, length in enumerate(staying[1].tolist()):
        assert torch.allclose(leaving[2][row, :length], staying[2][row, :length], rtol=0, atol=1e-5)
    monkeypatch.undo()
    for look in (3, 8):  # what a row that has ended draws while it waits to leave the batch must not reach the result
        monkeypatch.setattr(sampling, "LOOK", {"cpu": look})
        assert all(torch.equal(a, b) for a, b in zip(drawn(padded)[3][:2], leaving[:2]))


def test_sample_many_keeps_order_and_equals_one_at_a_time():
    """Responses that return in the order of length, or that depend on which prompts share a batch."""
    model = random_model()
    together = sample_many(model, PROMPTS, 10, END, batch_size=3, temperature=0)
    assert together == [sample_many(model, [prompt], 10, END, temperature=0)[0] for prompt in PROMPTS]
    assert all(END not in ids[:-1] and (ids[-1] == END or len(ids) == 10) for ids in together)


def test_prompts_of_a_batch_are_of_similar_length(monkeypatch):
    """A prompt of 5 tokens padded to one of 500, another response's log-probabilities, a cache without a limit."""
    seen, plain, model, sizes = [], sampling.sample, random_model(), [1, 20, 2, 18, 1, 22, 2, 19]
    prompts = [[1 + i % 9] * n for i, n in enumerate(sizes)]
    monkeypatch.setattr(sampling, "sample", lambda model, x, pad, *rest, **how: seen.append((
        len(x), x.numel() - (0 if pad is None else int(pad.sum())))) or plain(model, x, pad, *rest, **how))
    responses, lengths, logprobs = sample_prompts(model, prompts, 6, END, batch_size=4)
    assert seen == [(4, 1 + 2 + 1 + 2), (4, 20 + 18 + 22 + 19)]
    for prompt, response, n, logprob in zip(prompts, responses, lengths, logprobs):
        text = torch.tensor([prompt + response[:n].tolist()])
        assert torch.allclose(logprob[:n], token_logprobs(model(text), text)[0, len(prompt) - 1:], atol=1e-5)
    for tokens, sizes in ((10**6, [40]), (200, [25, 7, 7, 1]), (1, [1] * 40)):  # 25 short prompts, then 15 long ones
        seen.clear()
        monkeypatch.setattr(sampling, "TOKENS", {"cpu": tokens})
        sample_prompts(model, [[1] * 2] * 25 + [[1] * 20] * 15, 6, END)
        assert [rows for rows, _ in seen] == sizes


@pytest.mark.parametrize("top_k, top_p, expected", [
    (0, 1.0, [0.4, 0.3, 0.2, 0.1]), (1, 1.0, [1.0, 0, 0, 0]), (3, 1.0, [4 / 9, 3 / 9, 2 / 9, 0]),
    (9, 1.0, [0.4, 0.3, 0.2, 0.1]),       # more than there are
    (0, 0.35, [1.0, 0, 0, 0]),            # the first reaches the share alone
    (0, 0.6, [4 / 7, 3 / 7, 0, 0]),       # the one that crosses the share is kept
    (0, 0.85, [4 / 9, 3 / 9, 2 / 9, 0]),
    (3, 0.72, [4 / 7, 3 / 7, 0, 0])])     # top_p among the three that top_k left: 4/9 + 3/9 > 0.72 > 0.4 + 0.3
def test_top_k_and_top_p(top_k, top_p, expected):
    """One token kept too many or too few, or truncated in the wrong order; a token of probability 0 at an end."""
    order, probs = [2, 0, 3, 1], torch.empty(4)  # ids are not sorted by probability
    probs[order] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    drawn = draw(likeliest(probs.expand(20_000, 4), top_k, top_p), uniform)
    shares = torch.bincount(drawn, minlength=4)[order] / 20_000
    assert torch.allclose(shares, torch.tensor(expected), atol=0.015)
    assert all((share == 0) == (p == 0) for share, p in zip(shares.tolist(), expected))
    edges = draw(likeliest(torch.tensor([[0, *probs, 0]]).expand(2, 6), top_k, top_p),
                 torch.tensor([[0.0], [1 - 2**-24]]))
    kept = [i for i in range(4) if expected[order.index(i)] > 0]
    assert edges.tolist() == [1 + kept[0], 1 + kept[-1]]  # a uniform number of 0, or just below 1


def test_sampling_follows_the_temperature():
    """A sampler that draws at temperature 1 while it reports another, or divides by zero at temperature 0."""
    model, prompt, random = random_model(), torch.tensor([PROMPTS[0]]), torch.Generator().manual_seed(0)
    tokens = sample(model, prompt.expand(20_000, -1), None, 1, END, temperature=0.5, random=random)[0]
    expected = (model(prompt)[0, -1] / 0.5).softmax(-1)
    assert torch.allclose(torch.bincount(tokens[:, 0], minlength=11) / 20_000, expected, atol=0.015)
    assert sample(model, prompt, None, 1, END, temperature=0)[0].item() == expected.argmax()


def test_several_models_talk(checkpoints, tmp_path, monkeypatch, capsys):
    """A model that goes on with another one's dialogue, or whose answer stands under another's name."""
    enc, other, asked = load_tokenizer(checkpoints.sft), shutil.copytree(checkpoints.sft, tmp_path / "other"), []

    monkeypatch.setattr(talk, "encode_prompt", lambda _, turns, limit: asked.append(
        " ".join(turn["content"] for turn in turns)) or [enc.end])
    monkeypatch.setattr(talk, "sample_many", lambda *_, **how: [enc.encode_ordinary(f" {len(asked)}") + [enc.end]])
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    talk.main(talk.Config(checkpoints.sft, str(other), chat=True, device="cpu"))
    one, two = f"{checkpoints.sft}:\n", f"{other}:\n"
    assert capsys.readouterr().out == f"{one}1\n{two}2\n\n{one}3\n{two}4\n\n"
    assert asked == ["a", "a", "a 1 b", "a 2 b"]
