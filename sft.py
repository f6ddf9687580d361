r"""Supervised training: next-token prediction. Base training and fine-tuning differ only in which tokens count.

    python sft.py --train data/reviews/corpus_train.jsonl --out out/tiny/base           all tokens count, text packed
    python sft.py --model out/tiny/base --train data/reviews/demos_train.jsonl --test data/reviews/demos_valid.jsonl \
        --out out/tiny/sft                                    only the response and its end of text count

Papers: Brown et al. 2020, appendix B (packing, betas, cosine schedule); Ouyang et al. 2022, section 3 (step 1 of RLHF).
Left out on purpose: an attention border between packed documents (GPT-3 has none either) and multi-GPU training.
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from budget import announce, sft_budget
from common import (adamw, check, check_positive, dropout_generator, generator, learning_rate, optimizer_step, progress,
                    run, say, set_up)
from data import batches, encode_prompt, encode_response, load_tokenizer, pad_responses, read_jsonl
from model import GPT, GPTConfig, load_model, token_logprobs
from runs import Log, Stage


@dataclass
class Config:
    out: str = "out/tiny/base"                      # folder for the checkpoint
    model: str = ""                                 # checkpoint to start from; empty: a new model of the size below
    train: str = "data/reviews/corpus_train.jsonl"  # {"text"}: all tokens count; {"prompt", "completion"}: the response
    test: str = "data/reviews/corpus_valid.jsonl"   # the same, held out
    vocab: str = "data/reviews/vocab.tiktoken"      # tokenizer of a new model
    n_layer: int = 4                                # blocks of a new model
    n_head: int = 4                                 # attention heads of a new model
    width: int = 192                                # hidden size of a new model
    block_size: int = 64                            # longest sequence of a new model, in tokens
    pack: int = 64                                  # tokens per row of packed text
    dropout: float = 0.1                            # in training only
    epochs: float = 1.0                             # passes over the training set
    max_steps: int = 0                              # stop after this many steps, whatever --epochs says; 0: no limit
    batch_size: int = 32                            # rows behind one optimizer step
    microbatch: int = 32                            # rows behind one backward; fewer: less memory, same but dropout
    lr: float = 1e-3                                # peak learning rate
    warmup: float = 0.05                            # share of the steps with a rising learning rate
    weight_decay: float = 0.1                       # AdamW
    grad_clip: float = 1.0                          # global norm of the gradient; 0: none
    recompute: bool = False                         # activation checkpointing: less memory, about a quarter slower
    evals: int = 8                                  # held-out losses on the way; the best checkpoint is kept
    save_every: float = 300.0                       # seconds between saves of the state that a stopped run goes on from
    restart: bool = False                           # begin again where --out holds another run, instead of refusing
    seed: int = 1                                   # initial weights, data order, dropout
    device: str = "auto"                            # auto, cpu, cuda, mps
    dtype: str = "auto"                             # auto, float32, bfloat16 (autocast; the weights stay float32)


# Radford et al. 2018 (GPT, 117M), section 4.1: fine-tuning at 6.25e-5 in batches of 32, 0.2 % of the steps to warm up.
# No dropout (there 0.1), so that the microbatch changes nothing.
GPT2 = {"lr": 6.25e-5, "weight_decay": 0.01, "warmup": 0.002, "dropout": 0.0, "evals": 4}
PRESETS = {
    "tiny-base": {"batch_size": 16, "lr": 1.5e-3, "epochs": 3.0, "dropout": 0.0, "evals": 4},
    "tiny-sft": {"lr": 3e-4, "epochs": 2.0, "evals": 2},
    "smoke-base": {"n_layer": 2, "n_head": 2, "width": 32, "lr": 1e-2, "epochs": 8.0, "max_steps": 25, "evals": 1},
    "smoke-sft": {"lr": 3e-3, "epochs": 4.0, "max_steps": 10, "evals": 1},
    "gpt2-sft": {**GPT2, "epochs": 3.0},
    "hh-sft": {**GPT2, "microbatch": 16},
}


def packed_rows(enc, path, size, seed):
    """Shuffled documents, each begun by end of text, cut into rows of size + 1 ids; all but the first count."""
    texts = [row["text"] for row in read_jsonl(path, {"text": str})]
    stream = []
    for i in torch.randperm(len(texts), generator=generator(seed)).tolist():
        stream += [enc.eot_token] + enc.encode_ordinary(texts[i])
    stream.append(enc.eot_token)
    check(len(stream) > size, f"{path}: {len(stream)} tokens do not fill one row of --pack {size}")
    return [(stream[i:i + size + 1], 1) for i in range(0, len(stream) - size, size)]


def response_rows(enc, path, block_size):
    """Demonstrations as (prompt and response ids, length of the prompt): the response and its end of text count."""
    rows = []
    for row in read_jsonl(path, {"prompt": str, "completion": str}):
        prompt = encode_prompt(enc, row["prompt"], block_size // 2)
        rows.append((prompt + encode_response(enc, row["completion"], block_size - len(prompt)), len(prompt)))
    return rows


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
def held_out_loss(model, rows, pad_id, device, autocast, size=32):
    """Mean loss over all counted tokens of rows, nats per token, dropout off; size rows at a time."""
    training, total = model.training, 0.0
    model.eval()
    for batch in batches([len(ids) for ids, _ in rows], size, 0):
        total -= row_logprobs(model, [rows[i] for i in batch], pad_id, device, autocast).sum().item()
    model.train(training)
    return total / sum(len(ids) - first for ids, first in rows)


def main(cfg):
    check_positive(cfg, "lr", "epochs", "batch_size", "microbatch", "evals", "pack",
                   or_zero=("weight_decay", "grad_clip", "save_every"))
    stage = Stage(cfg, "train", "test", "model" if cfg.model else "vocab")
    device, autocast = set_up(cfg)
    vocab = Path(cfg.model) / "vocab.tiktoken" if cfg.model else Path(cfg.vocab)
    enc = load_tokenizer(vocab)
    if cfg.model:
        model = load_model(cfg.model, device, dropout=cfg.dropout)
    else:
        model = GPT(GPTConfig(enc.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.width, cfg.dropout)).to(device)
    model.trunk.recompute = cfg.recompute
    check(cfg.max_steps >= 0 and 0 <= cfg.warmup < 1, "--max-steps must be 0 or more, --warmup from 0 to below 1")
    packed = "text" in read_jsonl(cfg.train, {"text": str}, {"prompt": str, "completion": str})[0]
    if packed:
        size = model.config.block_size
        check(cfg.pack <= size, f"--pack {cfg.pack} is more than block size {size}")
        train, test = (packed_rows(enc, path, cfg.pack, cfg.seed) for path in (cfg.train, cfg.test))
    else:
        train, test = (response_rows(enc, path, model.config.block_size) for path in (cfg.train, cfg.test))
    stage.open()
    parameters = list(model.parameters())
    optimizer = adamw(parameters, cfg.lr, cfg.weight_decay, betas=(0.9, 0.95))  # betas as in GPT-3
    lengths = [len(ids) for ids, _ in train]
    per_epoch = math.ceil(len(train) / cfg.batch_size)
    steps = max(1, round(cfg.epochs * per_epoch))
    steps = min(steps, cfg.max_steps or steps)
    print(f"{sum(p.numel() for p in parameters):,} parameters, {len(train):,} rows, {sum(lengths):,} tokens, "
          f"{steps} steps")
    announce(*sft_budget(model.config, cfg, train, test, steps / per_epoch, device), device, autocast)

    log, best, seen, start = Log(stage.folder), {"test_loss": math.inf}, 0, time.time()
    done = stage.resume(steps, model=model, optimizer=optimizer, log=log, best=best, dropout=dropout_generator(device))
    model.train()
    for step in progress(range(done, steps), stage.folder.name):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == done:
            order = batches(lengths, cfg.batch_size, cfg.seed, epoch)
        batch = [train[i] for i in order[-1 - place]]  # the last one first
        counted = sum(len(ids) - first for ids, first in batch)  # tokens behind this step
        parts = [batch[i:i + cfg.microbatch] for i in range(0, len(batch), cfg.microbatch)]
        for part in parts:
            # Divided by the whole batch's count: how it is split into microbatches changes nothing.
            loss = -row_logprobs(model, part, enc.eot_token, device, autocast).sum() / counted
            loss.backward()
            log.add(loss=loss.detach() * len(parts))
        seen += sum(len(ids) for ids, _ in batch)
        lr = learning_rate(step, steps, cfg.lr, round(cfg.warmup * steps), floor=0.1)
        optimizer_step(optimizer, parameters, lr, cfg.grad_clip, log)
        if (step + 1) % max(1, steps // cfg.evals) == 0 or step + 1 == steps:
            test_loss = held_out_loss(model, test, enc.eot_token, device, autocast, cfg.microbatch)
            line = log.write(step=step + 1, epoch=round((step + 1) / per_epoch, 3), test_loss=test_loss, lr=lr,
                             tokens_per_second=round(seen / (time.time() - start)), seconds=round(stage.seconds(), 1))
            say("step {step}/{of} loss {loss:.3f} held-out {test_loss:.3f} nats/token, {tokens_per_second} tokens/s"
                .format(of=steps, **line))
            if test_loss < best["test_loss"]:
                best["test_loss"] = test_loss
                stage.save(model, vocab, step=step + 1, test_loss=test_loss)
        stage.keep(step + 1)
    stage.finish(steps=steps, best_test_loss=round(best["test_loss"], 4))


if __name__ == "__main__":
    run(main, Config, PRESETS)
