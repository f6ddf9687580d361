"""How much memory and time a stage needs, said before it starts. Counted, not measured: the arithmetic is below.

Operations: two per multiply-add of the matrix products (flop), three times that for a forward and a backward pass.
Memory, per parameter: 4 bytes for a frozen model; 16 for a trained one (weight, gradient, two moments of AdamW, all
float32); 2 for the bf16 copy of the weights that autocast keeps until the backward pass. Per token and block of width
C, what the backward pass keeps: 36 C (two float32 residual streams 8 C; in bf16 two norms 4 C, query, key and value
6 C, attention 2 C, GELU's input and output 16 C); when recomputed 4 C, and 36 C for one block. Per position whose
logits are read: 16 V (bf16 and float32 logits, log-softmax, and its gradients). On a CPU, where attention is written
out, 6 bytes per attention score, too. Not counted: Python and PyTorch themselves, about half a GB.
"""
import time

import torch

from sampling import TOKENS


def flop(config, T, read, head=False, past=0):
    """Operations of a forward pass on one row: T tokens after `past` cached ones, `read` positions wanted.

    Per layer and token, C the width: 6 C^2 for query, key and value, 4 C per key for attention (all keys, the masked
    ones too), 18 C^2 for projection and MLP, which the last layer computes at the wanted positions only; the
    language-model head, if any, runs there too. (A scalar head is too small to count.)
    """
    C = config.width
    trunk = config.n_layer * T * (6 * C + 4 * (past + T)) * C + ((config.n_layer - 1) * T + read) * 18 * C * C
    return trunk + (2 * read * C * config.padded_vocab if head else 0)


def sample_flop(config, P, R):
    """One row: a prompt of P tokens, then R - 1 single tokens; the last drawn token is never read."""
    return flop(config, P, 1, True) + sum(flop(config, 1, 1, True, past) for past in range(P, P + R - 1))


def parameters(config):
    """Parameters of a trunk, which is nearly all of a model."""
    C = config.width
    return config.n_layer * (12 * C * C + 13 * C) + (config.padded_vocab + config.block_size + 2) * C


def model_bytes(config, trained, frozen):
    """Bytes of so many trained and frozen models of one size."""
    return parameters(config) * (18 * trained + 4 * frozen)


def row_bytes(config, trained, T, read, recompute, device="cuda"):
    """Bytes that one row of T tokens keeps for the backward pass through so many trained models."""
    block = 36 * config.width * T + (6 * config.n_head * T * T if device == "cpu" else 0)
    trunk = config.n_layer * 4 * config.width * T + block if recompute else config.n_layer * block
    return trained * trunk + read * 16 * config.vocab_size


def sft_budget(config, cfg, train, test, epochs, device):
    """(operations, bytes) of sft.py: train and test are rows (ids, how many of them do not count)."""
    work, held_out = (sum(flop(config, len(ids) - 1, len(ids) - first, head=True) for ids, first in rows)
                      for rows in (train, test))
    longest = max(len(ids) for ids, _ in train)
    size = min(cfg.microbatch, cfg.batch_size) * row_bytes(config, 1, longest, longest, cfg.recompute, device)
    return 3 * epochs * work + cfg.evals * held_out, model_bytes(config, 1, 0) + size


def reward_budget(config, cfg, rankings, test, human, device):
    """(operations, bytes) of reward.py: rankings to train on and to test are lists of texts, in ids; human: pairs that
    are scored besides. Every different text is scored once."""
    lengths = [len(text) for texts in rankings for text in texts]
    held_out = [len(text) for text in {tuple(text) for texts in test for text in texts}]
    besides = len({(row["prompt"], row[side]) for row in human for side in ("chosen", "rejected")})
    mean = round(sum(held_out) / len(held_out))
    scored = sum(flop(config, T, 1) for T in held_out) + besides * flop(config, mean, 1)
    texts = min(cfg.microbatch, cfg.batch_size) * max(map(len, rankings))  # behind one backward, at most
    size = texts * row_bytes(config, 1, max(lengths), 0, cfg.recompute, device)
    return (scored + 3 * cfg.epochs * sum(flop(config, T, 1) for T in lengths),
            model_bytes(config, 1, bool(cfg.sft)) + size)


def dpo_budget(config, cfg, rankings, test, device):
    """(operations, bytes) of dpo.py: rankings, to train on and to test, are lists of (ids, length of the prompt)."""
    texts, test_texts = ([text for ranking in part for text in ranking] for part in (rankings, test))
    work, held_out = ([flop(config, len(ids) - 1, len(ids) - first, head=True) for ids, first in part]
                      for part in (texts, test_texts))
    row = row_bytes(config, 1, max(len(ids) for ids, _ in texts), max(len(ids) - first for ids, first in texts),
                    cfg.recompute, device)
    behind = min(cfg.microbatch, cfg.batch_size) * max(map(len, rankings))  # texts behind one backward, at most
    return (1 + 3 * cfg.epochs) * sum(work) + 2 * sum(held_out), model_bytes(config, 1, 0) + behind * row


def ppo_budget(config, cfg, prompts, device):
    """(operations, bytes) of ppo.py, if every response has its full length; prompts in ids."""
    P, R = round(sum(map(len, prompts)) / len(prompts)), cfg.response_tokens
    values = cfg.value != "shared"  # one more trained model
    policy, value = flop(config, P + R - 1, R, head=True), values * flop(config, P + R - 1, R)
    # Policy, reference, value and reward read an episode once; policy and value are trained on it.
    episode = (sample_flop(config, P, R) + 2 * policy + value + flop(config, P + R, 1)
               + 3 * cfg.epochs * (policy + value))
    longest = max(map(len, prompts)) + R
    row = row_bytes(config, 1 + values, longest, R, cfg.recompute, device)
    rewards = len(cfg.reward.split(","))  # one, or those of an ensemble
    cache = min(TOKENS, cfg.episodes * longest) * config.n_layer * config.width * 4  # keys and values in bf16
    return (cfg.iterations * cfg.episodes * episode,
            model_bytes(config, 1 + values, 1 + rewards) + max(cache, min(cfg.microbatch, cfg.episodes) * row))


def duration(seconds):
    """Seconds in words: 90 -> 1.5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def announce(operations, size, device, autocast):
    """Print how much memory (size, in bytes) and time a stage of so many operations takes here, if it is a long one.

    Not in the time: the second forward pass of --recompute, a third more, and reading data.

    The time is between that of matrix products alone, whose speed is measured here in a moment, and three times that:
    small models, and small operations between the large ones, keep away from the limit.
    """
    n, best = (4096, 0) if device.startswith("cuda") else (1024, 0)
    a = torch.rand(n, n, device=device)
    with torch.no_grad(), autocast():
        for _ in range(4):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the result
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    if 3 * operations / best > 30:
        print(f"estimate: {size / 1e9:.1f} GB of memory, {duration(operations / best)} to "
              f"{duration(3 * operations / best)} ({operations:.1e} operations; matrix products reach {best:.1e} per "
              "second)", flush=True)
    del a
    if device.startswith("cuda") and size > (free := torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()):
        print(f"this is more than the {free / 1e9:.1f} GB that are free: a smaller --microbatch, or --recompute true, "
              "needs less", flush=True)
