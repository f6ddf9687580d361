"""The transformer by hand, GPT-2's and by configuration Llama's or Qwen's; scalar head, log-probabilities of tokens.

The same trunk serves four models: policy and reference (a language model), reward and value (a scalar head).
Shapes: B rows, T positions, C width, V vocabulary, D head size, H heads of queries, G of keys and values (see data.py).
"""
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint

from common import check, read_checkpoint
from data import pad_responses

@dataclass
class GPTConfig:
    """The defaults are a small GPT-2 (Radford et al. 2019); from n_kv_head on: what Llama and Qwen have otherwise."""
    vocab_size: int = 4096    # V
    block_size: int = 128     # longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 4           # H
    width: int = 192          # C
    dropout: float = 0.0
    gelu: str = "none"        # F.gelu's approximate: "none" is exact; "tanh" is GPT-2's, on a CPU twice as slow
    n_kv_head: int = 0        # G, fewer than H in grouped-query attention (Ainslie et al. 2023); 0: H
    head_size: int = 0        # D; 0: C / H
    mlp_width: int = 0        # 0: 4 C
    swiglu: bool = False      # silu(gate) * up (Shazeer 2020) in place of gelu(up)
    rms_norm: bool = False    # in place of LayerNorm (Zhang and Sennrich 2019)
    qk_norm: bool = False     # the same for each head's query and key: Qwen 3
    norm_eps: float = 1e-5
    bias: str = "all"         # linear layers that have one: all, qkv or none
    rope: float = 0.0         # base of rotary positions (RoPE, Su et al. 2021) in place of learned ones; 0: learned
    rope_scaling: tuple = ()  # Llama 3.1's, for long texts: the four numbers of ROPE_SCALING; or none
    tied: bool = True         # the language model's head is the token embedding

    def __post_init__(self):
        self.n_kv_head, self.mlp_width = self.n_kv_head or self.n_head, self.mlp_width or 4 * self.width
        self.head_size = self.head_size or self.width // self.n_head
        self.padded_vocab = math.ceil(self.vocab_size / 64) * 64  # with unused rows, for faster matrix products

def make_norm(config, size):
    return RMSNorm(size, config.norm_eps) if config.rms_norm else nn.LayerNorm(size, config.norm_eps)

class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # x / sqrt(mean(x^2)), computed in float32, times a weight per number
        return F.rms_norm(x.float(), self.normalized_shape, eps=self.eps).to(x.dtype) * self.weight

def rope_rotation(config, position):
    """Cosines and sines of RoPE's angles, in float32: position (..., T): two of shape (..., T, 1, D / 2)."""
    frequency = 1 / config.rope ** (torch.arange(0, config.head_size, 2, device=position.device) / config.head_size)
    if config.rope_scaling:  # a wave longer than the context that was trained on is stretched, a short one is not
        factor, low, high, context = config.rope_scaling
        short = ((context / (2 * math.pi / frequency) - low) / (high - low)).clamp(0, 1)
        frequency = (1 - short) * frequency / factor + short * frequency
    angle = position[..., None, None] * frequency
    return angle.cos(), angle.sin()

def rotate(x, cos, sin):
    """RoPE of queries or keys x (B, T, heads, D), in float32: number i pairs with i + D / 2, as in Llama's weights."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

def attention(q, k, v, bias):
    """Scaled dot-product attention: q (B, H, t, D), k and v (B, G, T, D), H / G queries to a key: (B, H, t, D). bias (B
    or 1, 1, t, T): 0 where a query may look, -inf where not; None: causal, a lone query being the newest token."""
    (B, H, t, D), (_, G, T, _) = q.shape, k.shape
    if q.device.type != "cpu" or bias is None and q.dtype == torch.float32 and H == G:  # else it is up to 10 x slower
        k, v = (x if bias is None or G == H else x.repeat_interleave(H // G, 1) for x in (k, v))  # else no fast kernel
        bias = bias if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None and t > 1, enable_gqa=k.size(1) < H)
    bias = torch.full((t, T), -math.inf, device=q.device).triu(1) if bias is None and t > 1 else bias
    grouped = (q / math.sqrt(D)).reshape(B, G, -1, D)  # all queries that share a key, one after the other
    scores = (grouped @ k.transpose(2, 3)).view(B, H, t, T) + (0.0 if bias is None else bias.to(q.dtype))
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)  # never in bf16
    return (weights.view(B, G, -1, T) @ v).view(B, H, t, D)

class Attention(nn.Module):
    """Causal self-attention: x (B, T, C) to the positions `at` of it (see Trunk.forward)."""
    def __init__(self, config):
        super().__init__()
        self.config, self.heads = config, [config.n_head, config.n_kv_head, config.n_kv_head]
        self.qkv = nn.Linear(config.width, sum(self.heads) * config.head_size, bias=config.bias != "none")
        self.proj = nn.Linear(config.n_head * config.head_size, config.width, bias=config.bias == "all")
        norm = make_norm if config.qk_norm else nn.Identity  # of each head's query and key
        self.q_norm, self.k_norm = norm(config, config.head_size), norm(config, config.head_size)

    def forward(self, x, rotation, bias, cache, at):
        q, k, v = self.qkv(x).unflatten(2, (-1, self.config.head_size)).split(self.heads, dim=2)  # (B, T, H or G, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(torch.cat([q, k], dim=2), *rotation).split(self.heads[:2], dim=2)
        q, k, v = (part.to(v.dtype).transpose(1, 2) for part in (q, k, v))  # (B, H or G, T, D)
        k, v = cache.append(self, k, v) if cache else (k, v)  # (B, G, all tokens so far, D)
        return self.proj(attention(q, k, v, bias).transpose(1, 2)[at].flatten(-2))  # heads side by side: (..., C)

class Block(nn.Module):
    """Pre-norm transformer block: x + attention, then x + MLP. x (B, T, C); only the positions `at` come out."""
    def __init__(self, config):
        super().__init__()
        self.norm1 = make_norm(config, config.width)
        self.attention = Attention(config)
        self.norm2 = make_norm(config, config.width)
        self.up = nn.Linear(config.width, (1 + config.swiglu) * config.mlp_width, bias=config.bias == "all")
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.bias == "all")
        self.config, self.dropout = config, nn.Dropout(config.dropout)

    def forward(self, x, rotation, bias, cache, at):
        x = x[at] + self.dropout(self.attention(self.norm1(x), rotation, bias, cache, at))
        *gate, up = self.up(self.norm2(x)).chunk(1 + self.config.swiglu, dim=-1)
        hidden = F.silu(gate[0]) * up if gate else F.gelu(up, approximate=self.config.gelu)
        return x + self.dropout(self.down(hidden))

class Trunk(nn.Module):
    """Everything but the head: tokens to the hidden states after the final norm."""
    def __init__(self, config):
        super().__init__()
        self.config, self.recompute, self.compiled, self.dropout = config, False, False, nn.Dropout(config.dropout)
        self.token_embedding = nn.Embedding(config.padded_vocab, config.width)
        self.position_embedding = nn.Identity() if config.rope else nn.Embedding(config.block_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config, config.width)
        for name, x in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(x)
            elif x.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))  # adds to the residual stream: 2 per block
                nn.init.normal_(x, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)  # as in GPT-2

    def set_flags(self, cfg):  # --recompute: the backward pass computes a block again; only its input stays in memory
        self.recompute, self.compiled = cfg.recompute, cfg.compile
        for block in self.blocks[:-1] if cfg.compile else ():  # one graph serves all but the last, which has `at`
            block.compile(dynamic=True)

    def forward(self, tokens, pad=None, cache=None, at=...):
        """tokens (B, T), pad (B,) padding on the left or None: hidden states (B, T, C). Positions count from the first
        real token. With a cache, tokens are the one after those in it. at: an index of (B, T), the positions that are
        wanted (np.s_[:, P - 1:], or one per row): the last block computes no others."""
        key = torch.arange(cache.extend(tokens.size(1)) if cache else tokens.size(1), device=tokens.device)
        place, first, bias = key[-tokens.size(1):], 0, None  # place (T,): index in the padded row, of the new tokens
        if pad is not None:  # bias (B, 1, T, keys): a query sees the keys from a row's first token to its own
            first = place.clamp(max=pad[:, None])  # (B, T); padding sees itself only: softmax over nothing would be NaN
            bias = torch.where((first[..., None] <= key) & (key <= place[:, None]), 0.0, -math.inf)[:, None]
        rotation = rope_rotation(self.config, place - first) if self.config.rope else None
        x = self.token_embedding(tokens)
        x = self.dropout(x if self.config.rope else x + self.position_embedding(place - first))
        for block in self.blocks:
            args = x, rotation, bias, cache, at if block is self.blocks[-1] else ...
            run = block.forward if self.compiled and cache else block  # not compiled with a cache: each length is new
            x = checkpoint(run, *args, use_reentrant=False) if self.recompute and x.requires_grad else run(*args)
        return self.norm(x)

class GPT(nn.Module):
    """The language model: the trunk and a head, which is the token embedding once more unless config.tied is False."""
    kind = "lm"
    def __init__(self, config):
        super().__init__()
        self.config, self.trunk = config, Trunk(config)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.padded_vocab, bias=False)

    def forward(self, tokens, pad=None, at=...):
        """tokens (B, T), pad (B,) or None: logits (B, T, V), or of the positions `at`. They predict the next token."""
        return self.logits(self.trunk(tokens, pad, at=at))

    def logits(self, hidden):
        """hidden (..., C): logits (..., V)."""
        head = self.lm_head or self.trunk.token_embedding
        return Head.apply(hidden, head.weight)[..., :self.config.vocab_size]

    @classmethod
    def from_pretrained(cls, folder, block_size=0, vocab_size=0):
        """The model in a folder in Hugging Face's format (config.json, safetensors), in float32 and eval mode.
        block_size, vocab_size: how many positions, and rows of the token embedding, are kept; 0: all."""
        model = cls(hub_config(json.loads((Path(folder) / "config.json").read_bytes()), block_size, vocab_size))
        for x in model.parameters():
            x.data.zero_()  # the rows of padded_vocab stay so
        one, index = (Path(folder) / f"model.safetensors{end}" for end in ("", ".index.json"))
        files = (json.loads(index.read_text())["weight_map"] if index.is_file() and not one.is_file() else
                 dict.fromkeys(safe_open(one, "pt").keys(), one.name))
        where = {re.sub("^(transformer|model)[.]", "", x): (Path(folder) / path, x) for x, path in files.items()}
        for name, part in hub_weights(model):
            path, there = where.pop(name)
            x = safe_open(path, "pt").get_tensor(there)  # opened for this weight only: what is read stays in memory
            part.copy_(x[:len(part)] if name.startswith(("embed_tokens", "lm_head", "wte", "wpe")) else x)
        others = [name for name in where if not re.search("^lm_head|[.](attn[.]bias|masked_bias|inv_freq)$", name)]
        check(not others, f"{folder}: {', '.join(others[:3])}: no weight of this architecture")
        return model.eval()

class ScalarModel(nn.Module):
    """Trunk and a scalar head, for the reward model (score of a text) and the value model (value of each state). It
    starts at std 1 / sqrt(C + 1) as in Stiennon et al. 2020's code; gain and bias normalise the score (reward.py)."""
    kind = "reward"
    def __init__(self, config):
        super().__init__()
        self.config, self.trunk = config, Trunk(config)
        self.head = nn.Linear(config.width, 1, bias=False)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(config.width + 1))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, tokens, pad=None, at=...):
        """tokens (B, T), pad (B,) or None: one number per position (B, T), or of those positions only."""
        return Head.apply(self.trunk(tokens, pad, at=at), self.head.weight).squeeze(-1) * self.gain + self.bias

    def score(self, tokens, pad, last):
        """Read the head at each row's last real token: tokens (B, T), last (B,) its index: score (B,)."""
        return self(tokens, pad, at=(torch.arange(len(tokens), device=tokens.device), last))

class Head(torch.autograd.Function):
    """A linear head in float32, outside autocast: hidden (..., C), weight (rows, C): (..., rows). In bf16 logits near
    -100, as GPT-2 has them, would be 0.5 apart, and different scores equal. Gradients are in autocast's precision."""
    @staticmethod
    def forward(ctx, hidden, weight):
        kind, dtype = hidden.device.type, torch.promote_types(weight.dtype, torch.float32)
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        ctx.save_for_backward(hidden, weight)
        with torch.autocast(kind, enabled=False):
            return F.linear(hidden.to(dtype), weight.to(dtype))
    @staticmethod
    def backward(ctx, grad):
        grad, hidden, weight = (x.to(ctx.dtype) for x in (grad, *ctx.saved_tensors))
        return grad @ weight, grad.reshape(-1, len(weight)).T @ hidden.reshape(-1, weight.size(1))

def token_logprobs(logits, tokens, temperature=1.0):
    """Log-probability in nats of tokens[:, 1:], each given what precedes it: (B, T-1). tokens (B, T); logits (B, T, V),
    divided by the temperature here, or (B, T-1, V). One place, so that PPO, DPO and evaluation agree to the bit."""
    logits = logits[:, :tokens.size(1) - 1].to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if temperature == 1 else logits / temperature
    return F.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)

def row_logprobs(model, rows, pad_id, device, autocast):
    """Log-probability in nats of each row (ids, first), summed over its counted tokens ids[first:]: (B,)."""
    P = min(first for _, first in rows)  # the head runs from here on only
    tokens = pad_responses([ids for ids, _ in rows], pad_id)[0].to(device)  # (B, T); real tokens do not see padding
    mask = pad_responses([[0] * first + [1] * (len(ids) - first) for ids, first in rows], 0)[0].to(device)  # (B, T)
    with autocast():
        logits = model(tokens[:, :-1], at=(slice(None), slice(P - 1, None)))  # (B, T - P, V)
    return (token_logprobs(logits, tokens[:, P - 1:]) * mask[:, P:]).sum(1)

def load_model(folder, device="cpu", kind="lm", dropout=0.0, fresh_head=False):
    """A checkpoint folder's model in eval mode, "lm" or "reward". fresh_head: a scalar head on a language model."""
    weights, facts = read_checkpoint(folder, kind)
    model = (ScalarModel if kind == "reward" or fresh_head else GPT)(GPTConfig(**facts["model"] | {"dropout": dropout}))
    model.load_state_dict({name: weights.get(name, fresh) for name, fresh in model.state_dict().items()})
    return model.to(device).eval()

# Hugging Face's names of our settings and modules; of several, one of ours holds the rows one after the other.
GPT2 = dict(n_layer="n_layer", n_head="n_head", width="n_embd", mlp_width="n_inner", block_size="n_positions",
            norm_eps="layer_norm_epsilon", token_embedding="wte", position_embedding="wpe", blocks="h", norm1="ln_1",
            qkv="attn.c_attn", proj="attn.c_proj", norm2="ln_2", up="mlp.c_fc", down="mlp.c_proj", norm="ln_f")
LLAMA = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
             width="hidden_size", head_size="head_dim", mlp_width="intermediate_size", norm_eps="rms_norm_eps",
             block_size="max_position_embeddings", token_embedding="embed_tokens", blocks="layers",
             norm1="input_layernorm", qkv="self_attn.q_proj self_attn.k_proj self_attn.v_proj",
             q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", proj="self_attn.o_proj",
             norm2="post_attention_layernorm", up="mlp.gate_proj mlp.up_proj", down="mlp.down_proj", norm="norm")
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SUPPORTED = {"model_type": ["gpt2", "llama", "qwen2", "qwen3"], "hidden_act": ["silu"], "num_experts": [False],
             "rope_type": ["default", "llama3"], "activation_function": ["gelu", "gelu_new", "gelu_pytorch_tanh"],
             "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False], "partial_rotary_factor": [1.0],
             **dict.fromkeys("attention_bias mlp_bias use_sliding_window quantization_config".split(), [False])}

def hub_config(settings, block_size=0, vocab_size=0):
    """GPTConfig from the content of a config.json; UserError names a setting that cannot be computed here."""
    rope = {**(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}  # transformers 4, and 5
    settings = {"rope_type": rope.get("type"), "rope_theta": 10000.0, **settings, **rope}
    for name, values in SUPPORTED.items():
        check(settings.get(name) in [None, *values], f"config.json: {name} {settings.get(name)!r} is not supported")
    kind, names = settings["model_type"], GPT2 if settings["model_type"] == "gpt2" else LLAMA
    ours = {name: settings[theirs] for name, theirs in names.items()
            if hasattr(GPTConfig, name) and settings.get(theirs) is not None}
    ours |= {"vocab_size": settings["vocab_size"], "tied": settings.get("tie_word_embeddings", kind == "gpt2")}
    for name, wanted in (("vocab_size", vocab_size), ("block_size", block_size)):
        check(0 <= wanted <= ours[name], f"{name} {wanted:,}: the model has {ours[name]:,}")
        ours[name] = wanted or ours[name]
    if kind == "gpt2":
        return GPTConfig(**ours, gelu="none" if settings.get("activation_function") == "gelu" else "tanh")
    scaling = tuple(settings[name] for name in ROPE_SCALING) if settings["rope_type"] == "llama3" else ()
    return GPTConfig(**ours, swiglu=True, rms_norm=True, qk_norm=kind == "qwen3", rope=settings["rope_theta"],
                     rope_scaling=scaling, bias="qkv" if kind == "qwen2" else "none")

def hub_weights(model):
    """(Hugging Face's name, the part of a weight that it names, as a view) of all of a model: to write or to read."""
    config, names = model.config, LLAMA if model.config.rope else GPT2
    q, kv = config.n_head * config.head_size, config.n_kv_head * config.head_size
    for name, x in model.named_parameters():  # trunk.blocks.0.attention.qkv.weight
        *path, module, kind = name.replace("attention.", "").split(".")
        place, x, theirs = "", x.detach(), names.get(module, module).split()
        if "blocks" in path:
            place, x = f"{names['blocks']}.{path[-1]}.", x if config.rope or x.dim() == 1 else x.T  # GPT-2: (in, out)
        elif module in ("token_embedding", "lm_head"):
            x = x[:config.vocab_size]
        rows = {1: [len(x)], 2: [config.mlp_width] * 2, 3: [q, kv, kv]}[len(theirs)]
        yield from zip((f"{place}{part}.{kind}" for part in theirs), x.split(rows))
