r"""Supervised training: next-token prediction. Base training and fine-tuning differ only in which tokens count.

    python sft.py --train data/reviews/corpus_train.jsonl --out out/tiny/base           all tokens count, text packed
    python sft.py --model out/tiny/base --train data/reviews/demos_train.jsonl --valid data/reviews/demos_valid.jsonl \
        --out out/tiny/sft                                                 only the response and its EOS count

Papers: Brown et al. 2020, appendix B (packing, betas, cosine schedule); Ouyang et al. 2022, section 3 (step 1 of RLHF).
Left out on purpose: an attention border between packed documents (GPT-3 has none either), several GPUs.
"""
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from common import (Log, Stage, adamw, check, generator, learning_rate, optimizer_step, progress, run,
                    say, set_up)
from data import batches, encode_texts, load_tokenizer, read_jsonl, report_truncated
from model import GPT, GPTConfig, load_model, row_logprobs

@dataclass
class Config:
    out: str = "out/tiny/base"                      # folder for the checkpoint
    model: str = ""                                 # checkpoint to start from; empty: a new model of the size below
    train: str = "data/reviews/corpus_train.jsonl"  # {"text"}: all tokens count; {"prompt", "completion"}: the response
    valid: str = "data/reviews/corpus_valid.jsonl"  # the same, held out: its loss selects the checkpoint
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
    weight_decay: float = 0.1                       # AdamW, on matrices and embeddings
    grad_clip: float = 1.0                          # global norm of the gradient; 0: none
    recompute: bool = False                         # activation checkpointing: less memory, about a quarter slower
    compile: bool = False                           # torch.compile of the layers: pays in long runs of larger models
    evals: int = 8                                  # held-out losses on the way; the best checkpoint is kept
    save_every: float = 300.0                       # seconds between saves of the resume state
    overwrite: bool = False                         # replace another run that --out holds, instead of refusing
    seed: int = 1                                   # initial weights, data order, dropout
    device: str = "auto"                            # auto, cpu, cuda, mps
    dtype: str = "auto"                             # auto, float32, bfloat16 (autocast; the weights stay float32)

SMOLLM = {"dtype": "bfloat16", "weight_decay": 0.01, "dropout": 0.0, "evals": 2}
PRESETS = {
    "tiny-base": {"dtype": "bfloat16", "batch_size": 16, "lr": 1.5e-3, "epochs": 3.0, "dropout": 0.0, "evals": 4},
    "tiny-sft": {"dtype": "bfloat16", "lr": 3e-4, "epochs": 2.0, "evals": 2},
    "smoke-base": {"n_layer": 2, "n_head": 2, "width": 32, "lr": 1e-2, "epochs": 8.0, "max_steps": 25, "evals": 1},
    "smoke-sft": {"lr": 3e-3, "epochs": 4.0, "max_steps": 10, "evals": 1},
    "smollm-sft": {**SMOLLM, "lr": 1e-4, "max_steps": 30},
    "chat-sft": {**SMOLLM, "lr": 5e-5, "microbatch": 4},
}

def packed_rows(enc, path, size, seed):
    """Shuffled documents, each begun by <|endoftext|>, split into rows of size + 1 ids; all but the first count."""
    texts = [row["text"] for row in read_jsonl(path, {"text": str})]
    stream = []
    for i in torch.randperm(len(texts), generator=generator(seed)).tolist():
        stream += [enc.begin] + enc.encode_ordinary(texts[i])
    stream.append(enc.begin)
    check(len(stream) > size, f"{path}: {len(stream)} tokens do not fill one row of --pack {size}")
    return [(stream[i:i + size + 1], 1) for i in range(0, len(stream) - size, size)]

def response_rows(enc, path, block_size, counts):
    """Demonstrations as (prompt and response ids, length of the prompt): the response and its EOS count."""
    rows = []
    for row in read_jsonl(path, {"prompt": str, "completion": str}):
        prompt, (response,) = encode_texts(enc, row["prompt"], [row["completion"]], block_size, counts)
        rows.append((prompt + response, len(prompt)))
    return rows

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
    device, autocast = set_up(cfg)
    stage = Stage(cfg, "train", "valid", "model" if cfg.model else "vocab")
    vocab = Path(cfg.model) / "vocab.tiktoken" if cfg.model else Path(cfg.vocab)
    enc = load_tokenizer(vocab)
    if cfg.model:
        model = load_model(cfg.model, device, dropout=cfg.dropout)
    else:
        model = GPT(GPTConfig(enc.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.width, cfg.dropout)).to(device)
    model.trunk.set_flags(cfg)
    counts, block_size = Counter(), model.config.block_size
    if "text" in read_jsonl(cfg.train, {"text": str}, {"prompt": str, "completion": str})[0]:
        check(cfg.pack <= block_size, f"--pack {cfg.pack} is more than block size {block_size}")
        train, valid = (packed_rows(enc, path, cfg.pack, cfg.seed) for path in (cfg.train, cfg.valid))
    else:
        train = response_rows(enc, cfg.train, block_size, counts)
        valid = response_rows(enc, cfg.valid, block_size, Counter())
    stage.open()
    optimizer = adamw(model.parameters(), cfg.lr, cfg.weight_decay, betas=(0.9, 0.95))  # betas as in GPT-3
    lengths = [len(ids) for ids, _ in train]
    per_epoch = math.ceil(len(train) / cfg.batch_size)
    steps = min(max(1, round(cfg.epochs * per_epoch)), cfg.max_steps or math.inf)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(lengths):,} tokens, {steps} steps")
    log, best, seen, start = Log(stage.folder), {"valid_loss": math.inf}, 0, time.time()
    report_truncated(counts, log)
    done = stage.resume(steps, model=model, optimizer=optimizer, log=log, best=best)
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
            loss = -row_logprobs(model, part, enc.end, device, autocast).sum() / counted
            loss.backward()
            log.add(loss=loss.detach() * len(parts))
        seen += sum(len(ids) for ids, _ in batch)
        lr = learning_rate(step, steps, cfg.lr, round(cfg.warmup * steps), floor=0.1)
        optimizer_step(optimizer, list(model.parameters()), lr, cfg.grad_clip, log)
        if (step + 1) % max(1, steps // cfg.evals) == 0 or step + 1 == steps:
            valid_loss = held_out_loss(model, valid, enc.end, device, autocast, cfg.microbatch)
            line = log.write(step=step + 1, epoch=round((step + 1) / per_epoch, 3), valid_loss=valid_loss, lr=lr,
                             tokens_per_second=round(seen / (time.time() - start)), seconds=round(stage.seconds(), 3))
            say("step {step}/{of} loss {loss:.3f} held-out {valid_loss:.3f} nats/token, {tokens_per_second} tokens/s"
                .format(of=steps, **line))
            if not math.isfinite(valid_loss):
                log.stop("the held-out loss is not finite (a lower --lr usually helps, with --overwrite)")
            if valid_loss < best["valid_loss"]:
                best["valid_loss"] = valid_loss
                stage.save(model, vocab, step=step + 1, valid_loss=valid_loss)
        stage.keep(step + 1)
    stage.finish(steps=steps, best_valid_loss=round(best["valid_loss"], 4))

if __name__ == "__main__":
    run(main, Config, PRESETS)
