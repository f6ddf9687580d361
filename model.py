"""GPT-2's architecture, written out: attention, block, forward pass, the scalar head, log-probabilities of tokens.

The same trunk serves four models: policy and reference (a language model), reward and value (a scalar head).
Shapes: B rows, T positions, C width, V vocabulary, H heads, D = C / H. See data.py for the layout of a batch.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import check, read_checkpoint
from data import pad_responses

EVERY = np.s_[:, :]  # every position of (B, T)


@dataclass
class GPTConfig:
    vocab_size: int = 4096  # V
    block_size: int = 128   # longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 4
    width: int = 192        # C
    dropout: float = 0.0
    gelu: str = "none"      # F.gelu's approximate: "none" is exact; "tanh" is GPT-2's, on a CPU twice as slow or worse

    @property
    def padded_vocab(self):
        """Rows of the token embedding: V, and unused ones up to a multiple of 64, for faster matrix products."""
        return math.ceil(self.vocab_size / 64) * 64


def attention(q, k, v, bias):
    """Scaled dot-product attention: q (B, H, t, D), k and v (B, H, T, D): (B, H, t, D). bias (B or 1, 1, t, T): 0 where
    a query may look, -inf where not; None: causal, a query that comes alone being the newest token."""
    t, T = q.size(2), k.size(2)
    # The same in one kernel. On a CPU it is slower than the lines below, five times in bf16, but for this one case.
    if q.device.type != "cpu" or bias is None and q.dtype == torch.float32:
        bias = bias if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None and t > 1)
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(2, 3)  # (B, H, t, T)
    if bias is None and t > 1:
        bias = torch.full((t, T), -math.inf, device=q.device).triu(1)
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v  # never in bf16


class Attention(nn.Module):
    """Causal multi-head self-attention: x (B, T, C) to the positions `at` of it (see Trunk.forward)."""

    def __init__(self, config):
        super().__init__()
        check(config.width % config.n_head == 0, f"--width {config.width} is not divisible by --n-head {config.n_head}")
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x, bias, cache, at):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
                   for part in self.qkv(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.append(self, k, v)  # (B, H, tokens so far, D)
        y = attention(q, k, v, bias).transpose(1, 2)  # (B, T, H, D)
        return self.proj(y[at].flatten(-2))  # heads side by side again: (..., C)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention, then x + MLP. x (B, T, C); only the positions `at` come out."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.gelu = config.gelu
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, bias, cache, at):
        x = x[at] + self.dropout(self.attention(self.norm1(x), bias, cache, at))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)), approximate=self.gelu)))


class Trunk(nn.Module):
    """Everything but the head: tokens to the hidden states after the final layer norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.padded_vocab, config.width)
        self.position_embedding = nn.Embedding(config.block_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.width)
        self.recompute = False  # True: the backward pass computes a block again, and only its input is kept in memory
        # GPT-2's initialisation: std 0.02, smaller where a layer adds to the residual stream (2 per block).
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(self, tokens, pad=None, cache=None, at=EVERY):
        """tokens (B, T), pad (B,) padding tokens on the left or None: hidden states (B, T, C).

        Positions count from the first real token. With a cache, tokens are those after the ones in it. at: an index of
        (B, T), the positions that are wanted (np.s_[:, P - 1:], or one per row); the last block computes no others.
        """
        T, past = tokens.size(1), cache.length if cache is not None else 0  # tokens now, tokens before
        place = past + torch.arange(T, device=tokens.device)  # (T,) index in the padded row
        position, bias = place, None
        if pad is not None or past and T > 1:  # else the plain causal case
            pad = torch.zeros(1, dtype=torch.long, device=tokens.device) if pad is None else pad
            position = (place - pad[:, None]).clamp(min=0)  # (B, T)
            key = torch.arange(past + T, device=tokens.device)
            may = (key <= place[:, None]) & (key >= pad[:, None, None])  # (B, T, keys)
            # A padding query would attend to nothing, and softmax over nothing is NaN: let it see itself.
            may = may | (key == place[:, None])
            bias = torch.zeros(may.shape, device=tokens.device).masked_fill(~may, -math.inf)[:, None]
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(position))
        for block in self.blocks:
            wanted = at if block is self.blocks[-1] else EVERY
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, cache, wanted, use_reentrant=False)
            else:
                x = block(x, bias, cache, wanted)
        if cache is not None:
            cache.length += T
        return self.norm(x)


class GPT(nn.Module):
    """The language model: trunk and a head that shares the token embedding's weights."""

    kind = "lm"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)

    def forward(self, tokens, pad=None):
        """tokens (B, T), pad (B,) or None: logits (B, T, V). The logits at t predict the token at t + 1."""
        return self.logits(self.trunk(tokens, pad))

    def logits(self, hidden):
        """hidden (..., C): logits (..., V)."""
        logits = F.linear(hidden, self.trunk.token_embedding.weight)  # (..., rows)
        return logits if self.config.padded_vocab == self.config.vocab_size else logits[..., :self.config.vocab_size]

    def response_logits(self, tokens, pad, P):
        """Logits that predict the response part of tokens (B, P + R): (B, R, V), read at positions P-1 .. P+R-2."""
        return self.logits(self.trunk(tokens[:, :-1], pad, at=np.s_[:, P - 1:]))


class ScalarModel(nn.Module):
    """Trunk and a scalar head, for the reward model (score of a text) and the value model (value of each state).

    The head has no bias and starts at std 1 / sqrt(C + 1) as in Stiennon et al. 2020's code. gain and bias normalise
    the score; they are set after training (reward.py) and saved with the weights.
    """

    kind = "reward"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.head = nn.Linear(config.width, 1, bias=False)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.width + 1))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, tokens, pad=None, at=EVERY):
        """tokens (B, T), pad (B,) or None: one number per position (B, T), or of those positions only."""
        return self.read(self.trunk(tokens, pad, at=at))

    def score(self, tokens, pad, last):
        """Read the head at each row's last real token: tokens (B, T), last (B,) its index: score (B,)."""
        return self.read(self.trunk(tokens, pad, at=(torch.arange(len(tokens), device=tokens.device), last)))

    def read(self, hidden):
        """hidden (..., C): (...). Never in bf16, whose 8 bits would make different scores equal."""
        return full_precision(self.head, hidden) * self.gain + self.bias


def full_precision(head, hidden):
    """A linear head with one output, outside autocast: hidden (..., C): (...)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).squeeze(-1)


def token_logprobs(logits, tokens, temperature=1.0):
    """Log-probability in nats of tokens[:, 1:], each given what precedes it: (B, T-1). logits (B, T, V), divided by the
    temperature here, or (B, T-1, V) without the last, which predicts nothing in tokens (B, T). The one place that
    shifts, divides and gathers, so that PPO, DPO and evaluation agree to the bit."""
    targets = tokens[:, 1:]
    logits = logits[:, :targets.size(1)]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1:
        logits = logits / temperature
    return F.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def row_logprobs(model, rows, pad_id, device, autocast):
    """Log-probability in nats of each row (ids, first), summed over its counted tokens ids[first:]: (B,)."""
    P = min(first for _, first in rows)  # the head runs from here on only
    tokens, real = pad_responses([ids for ids, _ in rows], pad_id)  # (B, T); no real token sees padding on the right
    firsts = torch.tensor([first for _, first in rows])
    mask = real * (torch.arange(tokens.size(1)) >= firsts[:, None])  # (B, T)
    tokens, mask = tokens.to(device), mask.to(device)
    with autocast():
        logits = model.response_logits(tokens, None, P)  # (B, T - P, V)
    return (token_logprobs(logits, tokens[:, P - 1:]) * mask[:, P:]).sum(1)


@torch.no_grad()
def entropy(logits, temperature=1.0):
    """Entropy in nats of the next-token distribution at each position: logits (..., V): (...)."""
    logprobs = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


class Ensemble(nn.Module):
    """Several reward models as one, by the mean or least score, against over-optimisation (Coste et al. 2023)."""

    def __init__(self, models, how):
        super().__init__()
        self.models, self.how = nn.ModuleList(models), how
        self.config = min((model.config for model in models), key=lambda config: config.block_size)

    def score(self, tokens, pad, last):
        """As ScalarModel.score."""
        scores = torch.stack([model.score(tokens, pad, last) for model in self.models])  # (models, B)
        return scores.mean(0) if self.how == "mean" else scores.amin(0)


@torch.no_grad()
def score_many(model, texts, batch_size=256):
    """Scores of a list of texts (lists of ids, prompt and response together) by a scalar model: (N,) on the CPU.
    Duplicates are scored once. A batch has at most batch_size texts, and 2^14 tokens."""
    device = next(model.parameters()).device
    left = sorted(set(map(tuple, texts)), key=lambda text: (len(text), text))
    score_of = {}
    while left:
        batch = left[:batch_size]
        while len(batch) * len(batch[-1]) > 2**14 and len(batch) > 1:  # they are sorted: the last is the longest
            batch.pop()
        left = left[len(batch):]
        tokens, mask = pad_responses(batch, 0)  # on the right: no real token sees the padding
        scores = model.score(tokens.to(device), None, mask.sum(1).long().to(device) - 1)
        score_of.update(zip(batch, scores.float().tolist()))
    return torch.tensor([score_of[tuple(text)] for text in texts])


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def load_model(folder, device="cpu", kind="lm", dropout=0.0, recompute=False):
    """The model in a checkpoint folder, in eval mode: "lm", or "reward" for a scalar model."""
    return build(GPT if kind == "lm" else ScalarModel, *read_checkpoint(folder, kind), device, dropout, recompute)


def load_trunk(folder, device="cpu", dropout=0.0, recompute=False):
    """A scalar model with a fresh head on the trunk of the language model in folder."""
    return build(ScalarModel, *read_checkpoint(folder, "lm"), device, dropout, recompute)


def load_reward(folders, device="cpu", ensemble="mean"):
    """The reward model in a checkpoint folder, or the Ensemble of those in several, with commas between."""
    check(ensemble in ("mean", "min"), f"--ensemble is {ensemble!r}: write mean or min")
    models = [load_model(folder, device, kind="reward") for folder in folders.split(",")]
    return models[0] if len(models) == 1 else Ensemble(models, ensemble).eval()


def build(Model, weights, facts, device, dropout, recompute):
    """A model with the weights of a checkpoint, in eval mode; a head that the checkpoint lacks stays fresh."""
    model = Model(GPTConfig(**{**facts["model"], "dropout": dropout}))
    model.load_state_dict({**model.state_dict(), **weights})
    model.trunk.recompute = recompute
    return model.to(device).eval()
