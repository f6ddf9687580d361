"""Sampling responses: one pass over the prompts, then one token at a time, with a cache of keys and values."""
import numpy as np
import torch

from common import check, progress
from data import pad_prompts

LOOK = {"cpu": 1}  # steps between two looks at which rows have ended; elsewhere 8, as a GPU has to be waited for
TOKENS = {"cpu": 2**15}  # tokens of a batch, responses included, at most; elsewhere 2**16: GPT-2's cache has 2.4 GB
LEAVE = 0.8  # rows that have ended leave the batch when at most this share still runs: it costs a copy of the cache

class KVCache:
    """Keys and values of the tokens so far, in memory that is allocated once: two (B, H, T, D) per layer."""
    def __init__(self, size):
        self.size, self.length, self.layers = size, 0, {}

    def extend(self, tokens):
        """So many new ones are about to be appended, by each layer: how many there will be."""
        self.length += tokens
        return self.length

    def append(self, layer, k, v):
        """Store k, v (B, H, t, D) of the newest tokens; returns all keys and values up to them."""
        B, H, t, D = k.shape
        if layer not in self.layers:
            keys, values = k.new_zeros(B, H, self.size, D), v.new_zeros(B, H, self.size, D)
            if k.device.type == "cpu":  # keys lie transposed in memory, as their product with a query reads them
                keys = k.new_zeros(B, H, D, self.size).transpose(2, 3)
            self.layers[layer] = keys, values
        keys, values = self.layers[layer]
        keys[:, :, self.length - t:self.length] = k
        values[:, :, self.length - t:self.length] = v
        return keys[:, :, :self.length], values[:, :, :self.length]

    def take(self, rows):
        for layer, (keys, values) in self.layers.items():  # one by one: the memory of one layer twice, not of all
            self.layers[layer] = keys[rows], values[rows]

@torch.no_grad()
def sample(model, tokens, pad, max_tokens, end, temperature=1.0, random=None, only=None):
    """Sample a response to each prompt, tokens (B, P) padded on the left, pad (B,) or None: responses (B, R), lengths
    (B,), and logprobs (B, R) of the full softmax at the temperature. A row ends with the first `end` id (EOS), which
    counts in its length, or after max_tokens; after that it is filled with `end`, and its logprobs mean nothing. R is
    the longest row. temperature 0 is greedy. only: a function that sets the probabilities
    (rows, V) of excluded tokens to 0; PPO excludes none."""
    B, P = tokens.shape
    check(max_tokens > 0 and P + max_tokens <= model.config.block_size + 1,
          f"{P} prompt and {max_tokens} response tokens do not fit in block size {model.config.block_size}")
    device = tokens.device
    responses = torch.full((B, max_tokens), end, device=device)
    logprobs = torch.zeros(B, max_tokens, device=device)
    prompts = tokens if pad is None else torch.cat([tokens, pad[:, None]], dim=1)
    prompts, place = prompts.unique(dim=0, return_inverse=True)  # one that stands in several rows is computed once
    new, pad, cache = prompts[:, :P], None if pad is None else prompts[:, P], KVCache(P + max_tokens - 1)
    rows = torch.arange(B, device=device)  # the rows still in the batch
    running = torch.ones(B, dtype=torch.bool, device=device)  # those of them that have not ended
    for t in range(max_tokens):
        hidden = model.trunk(new, pad, cache, at=np.s_[:, -1])  # (rows, C)
        if t == 0:  # from here on a row is a response
            hidden, pad = hidden[place], None if pad is None else pad[place]
            cache.take(place)
        probs = (model.logits(hidden).float() / (temperature or 1.0)).softmax(-1)  # (rows, V)
        uniform = torch.rand(B, 1, generator=random, device=device)[rows]  # a row's does not depend on who is left
        next_token = probs.argmax(-1) if temperature == 0 else draw(only(probs) if only else probs, uniform)  # (rows,)
        responses[rows, t] = next_token
        logprobs[rows, t] = probs.gather(1, next_token[:, None]).squeeze(1).log()
        running = running & (next_token != end)
        if (t + 1) % LOOK.get(device.type, 8) == 0:
            left = running.nonzero().squeeze(1)
            if len(left) == 0 or t + 1 == max_tokens:
                break
            if len(left) <= LEAVE * len(rows):  # the rows that have ended leave the batch
                rows, running, next_token = rows[left], running[left], next_token[left]
                pad = None if pad is None else pad[left]
                cache.take(left)
        new = next_token[:, None]
    before = (responses == end).cumsum(1) == 0  # a row that waits to leave the batch is sampled past its EOS: dropped
    lengths = (before.sum(1) + 1).clamp(max=max_tokens)
    R = lengths.max()
    return responses.masked_fill(~before, end)[:, :R], lengths, logprobs[:, :R]

def draw(probs, uniform):
    """Ids (B,), one per row of probs (B, V): the cumulative sum inverted at uniform (B, 1), numbers in [0, 1)."""
    reached = probs.cumsum(-1)  # (B, V)
    return torch.searchsorted(reached, uniform * reached[:, -1:], right=True).squeeze(1)

def sample_prompts(model, prompts, max_tokens, end, batch_size=512, **how):
    """One response to each of a list of prompts (lists of ids), as sample returns them. Prompts of similar length share
    a batch, of at most batch_size rows and TOKENS tokens: every step of every row pays for padding."""
    device = next(model.parameters()).device
    responses = torch.full((len(prompts), max_tokens), end, device=device)
    logprobs = torch.zeros(len(prompts), max_tokens, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
    groups, most = [[]], TOKENS.get(device.type, 2**16)
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if len(groups[-1]) >= min(batch_size, max(1, most // (len(prompts[i]) + max_tokens))):
            groups.append([])
        groups[-1].append(i)
    for rows in progress(groups, "sampling"):
        tokens, pad = pad_prompts([prompts[i] for i in rows], end)
        pad = pad.to(device) if pad.any() else None  # equal lengths need no mask
        drawn, n, drawn_logprobs = sample(model, tokens.to(device), pad, max_tokens, end, **how)
        responses[rows, :drawn.size(1)], logprobs[rows, :drawn.size(1)], lengths[rows] = drawn, drawn_logprobs, n
    R = int(lengths.max())
    return responses[:, :R], lengths, logprobs[:, :R]

def sample_many(model, prompts, max_tokens, end, batch_size=256, **how):
    """The responses of sample_prompts as lists of ids; one that ended has `end` as its last id."""
    responses, lengths, _ = sample_prompts(model, prompts, max_tokens, end, batch_size, **how)
    return [ids[:n] for ids, n in zip(responses.tolist(), lengths.tolist())]
