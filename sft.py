r"""Supervised training: next-token prediction. Base training and fine-tuning differ only in which tokens count.

    python sft.py --train data/reviews/corpus_train.jsonl --out out/tiny/base           all tokens count, text packed
    python sft.py --model out/tiny/base --train data/reviews/demos_train.jsonl --test data/reviews/demos_test.jsonl \
        --out out/tiny/sft                                    only the response and its end of text count

Papers: Radford et al. 2019 (GPT-2: packing, learning-rate schedule); Ouyang et al. 2022, section 3 (step 1 of RLHF).
Left out on purpose: an attention border between packed documents (GPT-2 has none either) and multi-GPU training.
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common import (Log, Stage, adamw, check, check_positive, generator, learning_rate, optimizer_step, progress, run,
                    set_up)
from data import batches, encode_prompt, encode_response, load_tokenizer, pad_prompts, pad_responses, read_jsonl
from model import GPT, GPTConfig, load_model, token_logprobs


@dataclass
class Config:
    out: str = "out/tiny/base"                      # folder for the checkpoint
    model: str = ""                                 # checkpoint to start from; empty: a new model of the size below
    train: str = "data/reviews/corpus_train.jsonl"  # {"text"} to train on all tokens, {"prompt", "completion"} on the response
    test: str = "data/reviews/corpus_test.jsonl"    # the same, held out
    vocab: str = "data/reviews/vocab.tiktoken"      # tokenizer of a new model
    n_layer: int = 4                                # blocks of a new model
    n_head: int = 4                                 # attention heads of a new model
    width: int = 192                                # hidden size of a new model
    block_size: int = 64                            # longest sequence of a new model, in tokens
    pack: int = 64                                  # tokens per row of packed text
    dropout: float = 0.1                            # in training only
    epochs: float = 1.0                             # passes over the training set
    batch_size: int = 32                            # rows behind one optimizer step
    microbatch: int = 32                            # rows behind one backward; smaller: less memory, the same result
    lr: float = 1e-3                                # peak learning rate
    warmup: float = 0.05                            # share of the steps with a rising learning rate
    weight_decay: float = 0.1                       # AdamW
    grad_clip: float = 1.0                          # global norm of the gradient; 0: none
    evals: int = 8                                  # how often the held-out loss is measured; the best checkpoint is kept
    seed: int = 1                                   # initial weights, data order, dropout
    device: str = "auto"                            # auto, cpu, cuda, mps
    dtype: str = "auto"                             # auto, float32, bfloat16 (autocast; the weights stay float32)


PRESETS = {
    "tiny-base": {},
    "tiny-sft": {"lr": 3e-4, "epochs": 2.0},
    "smoke-base": {"n_layer": 2, "n_head": 2, "width": 32, "epochs": 0.02, "evals": 1},
    "smoke-sft": {"epochs": 0.1, "evals": 1},
}


def packed_rows(enc, path, size, seed):
    """Documents in shuffled order, each begun by end of text, cut into rows: a list of (tokens (T+1), first counted 0)."""
    texts = [row["text"] for row in read_jsonl(path, {"text": str})]
    stream = []
    for i in torch.randperm(len(texts), generator=generator(seed)).tolist():
        stream += [enc.eot_token] + enc.encode_ordinary(texts[i])
    stream.append(enc.eot_token)
    check(len(stream) > size, f"{path}: {len(stream)} tokens do not fill one row of --pack {size}")
    return [([], stream[i:i + size + 1]) for i in range(0, len(stream) - size, size)]


def response_rows(enc, path, block_size):
    """Demonstrations as a list of (prompt ids, response ids)."""
    rows = read_jsonl(path, {"prompt": str, "completion": str})
    prompts = [encode_prompt(enc, row["prompt"], block_size // 2) for row in rows]
    return [(prompt, encode_response(enc, row["completion"], block_size - len(prompt)))
            for prompt, row in zip(prompts, rows)]


def collate(rows, pad_id):
    """tokens (B, T), pad (B,) or None, P, mask (B, R) of the tokens that count."""
    prompts, responses = [row[0] for row in rows], [row[1] for row in rows]
    if not prompts[0]:  # packed text: the first token of a row is given, all others count
        prompts, responses = [row[1][:1] for row in rows], [row[1][1:] for row in rows]
    left, pad = pad_prompts(prompts, pad_id)
    right, mask = pad_responses(responses, pad_id)
    return torch.cat([left, right], dim=1), pad if pad.any() else None, left.size(1), mask


def loss_sum(model, batch, device, autocast):
    """Sum over counted tokens of -log p, in nats, and how many tokens that is."""
    tokens, pad, P, mask = batch
    tokens, mask, pad = tokens.to(device), mask.to(device), pad if pad is None else pad.to(device)
    with autocast():
        logits = model.response_logits(tokens, pad, P)  # (B, R, V)
    return -(token_logprobs(logits, tokens[:, P - 1:]) * mask).sum(), int(mask.sum())


@torch.no_grad()
def held_out_loss(model, rows, pad_id, device, autocast):
    """Mean loss over all counted tokens of rows, nats per token, dropout off."""
    training, total, count = model.training, 0.0, 0
    model.eval()
    for batch in batches([len(p) + len(r) for p, r in rows], 64, 0):
        loss, n = loss_sum(model, collate([rows[i] for i in batch], pad_id), device, autocast)
        total, count = total + loss.item(), count + n
    model.train(training)
    return total / count


def main(cfg):
    check_positive(cfg, "lr", "epochs", "batch_size", "microbatch", "evals")
    stage = Stage(cfg.out)
    device, autocast = set_up(cfg)
    vocab = Path(cfg.model) / "vocab.tiktoken" if cfg.model else Path(cfg.vocab)
    enc = load_tokenizer(vocab)
    if cfg.model:
        model = load_model(cfg.model, device, dropout=cfg.dropout)
    else:
        model = GPT(GPTConfig(enc.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.width, cfg.dropout)).to(device)
    packed = "text" in read_jsonl(cfg.train, {})[0]
    if packed:
        train, test = (packed_rows(enc, path, cfg.pack, cfg.seed) for path in (cfg.train, cfg.test))
    else:
        train, test = (response_rows(enc, path, model.config.block_size) for path in (cfg.train, cfg.test))
    parameters = list(model.parameters())
    optimizer = adamw(parameters, cfg.lr, cfg.weight_decay, betas=(0.9, 0.95))  # betas as in GPT-3
    lengths = [len(prompt) + len(response) for prompt, response in train]
    per_epoch = math.ceil(len(train) / cfg.batch_size)
    steps = max(1, round(cfg.epochs * per_epoch))
    print(f"{sum(p.numel() for p in parameters):,} parameters, {len(train):,} rows, {sum(lengths):,} tokens, {steps} steps")

    log, best, seen, start, order = Log(stage.folder), math.inf, 0, time.time(), []
    model.train()
    for step in progress(range(steps), stage.folder.name):
        if not order:
            order = batches(lengths, cfg.batch_size, cfg.seed, step // per_epoch)
        batch = [train[i] for i in order.pop()]
        counted = sum(len(response) - (not prompt) for prompt, response in batch)  # tokens behind this step
        for i in range(0, len(batch), cfg.microbatch):
            loss, _ = loss_sum(model, collate(batch[i:i + cfg.microbatch], enc.eot_token), device, autocast)
            # Divided by the whole batch's count: how it is split into microbatches changes nothing.
            (loss / counted).backward()
            log.add(loss=loss.item() / counted * math.ceil(len(batch) / cfg.microbatch))
        seen += sum(len(prompt) + len(response) for prompt, response in batch)
        lr = learning_rate(step, steps, cfg.lr, round(cfg.warmup * steps), floor=0.1)
        log.add(grad_norm=optimizer_step(optimizer, parameters, lr, cfg.grad_clip))
        if (step + 1) % max(1, steps // cfg.evals) == 0 or step + 1 == steps:
            test_loss = held_out_loss(model, test, enc.eot_token, device, autocast)
            seconds = time.time() - start
            line = log.write(step=step + 1, epoch=round((step + 1) / per_epoch, 3), test_loss=test_loss, lr=lr,
                             tokens_per_second=round(seen / seconds), seconds=round(seconds, 1))
            print("step {step}/{of} loss {loss:.3f} held-out {test_loss:.3f} nats/token, {tokens_per_second} tokens/s"
                  .format(of=steps, **line), flush=True)
            if test_loss < best:
                best = test_loss
                stage.save(model, cfg, vocab, step=step + 1, test_loss=test_loss)
    stage.finish(steps=steps, best_test_loss=round(best, 4))


if __name__ == "__main__":
    run(main, Config, PRESETS)
