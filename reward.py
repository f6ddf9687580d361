"""The reward model: a scalar head on a language model's trunk, trained to put rankings in the order that people gave.

    python reward.py --out out/tiny/reward --model out/tiny/sft --train out/tiny/label/rankings.jsonl

Three of them in a run of train_all.sh: the labeler, from half of the people's ratings, stands in for a person in
label.py; the judge, from the other half, only examines; the reward model learns from the labeler's rankings of the SFT
model's samples, and is what PPO optimises.

Papers: Ziegler et al. 2019 (normalisation); Stiennon et al. 2020; Ouyang et al. 2022, eq. 1 (K ranked responses).
"""
import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import (Log, Stage, adamw, check, learning_rate, optimizer_step, progress, run, say, set_up, visible,
                    write_json)
from data import (batches, check_same_vocab, encode_prompt, encode_texts, length_mask, load_tokenizer, pad_responses,
                  prompt_limit, ranking_accuracy, read_jsonl, read_rankings, report_truncated, split_by_prompt)
from model import load_model
from sampling import sample_many

@dataclass
class Config:
    out: str = "out/tiny/reward"             # folder for the checkpoint
    model: str = "out/tiny/sft"              # language model whose trunk it starts from
    train: str = "out/tiny/label/rankings.jsonl"  # {"prompt", "responses": best to worst}; several files: a,b
    test: str = ""                           # held-out rankings; empty: --test-share of the training prompts
    test_share: float = 0.1                  # share of the prompts held out when --test is empty
    pairs: str = "data/reviews/pairs_test.jsonl"  # held-out human comparisons to measure with; empty: none
    sft: str = "out/tiny/sft"                # its samples get scores of mean 0, standard deviation 1; empty: nobody's
    prompts: str = "data/reviews/prompts_label.jsonl"  # prompts for those samples
    samples: int = 512                       # how many samples
    response_tokens: int = 32                # longest sample
    temperature: float = 0.7                 # of those samples
    split_seed: int = -1                     # of the split alone, as an ensemble shares its data; -1: --seed
    limit: int = 0                           # train on this many rankings only; 0: all
    epochs: int = 1                          # passes over the rankings
    batch_size: int = 16                     # rankings behind one optimizer step
    microbatch: int = 32                     # rankings behind one backward; fewer: less memory, same but for dropout
    lr: float = 3e-4                         # peak learning rate, linear to 0
    warmup: float = 0.05                     # share of the steps with a rising learning rate
    weight_decay: float = 0.1                # AdamW, on matrices and embeddings
    grad_clip: float = 1.0                   # global norm of the gradient; 0: none
    recompute: bool = False                  # activation checkpointing: less memory, about a quarter slower
    compile: bool = False                    # torch.compile of the layers: pays in long runs of larger models
    dropout: float = 0.1                     # in training only
    log_every: int = 50                      # steps per log line
    save_every: float = 300.0                # seconds between saves of the resume state
    overwrite: bool = False                  # replace another run that --out holds, instead of refusing
    seed: int = 1                            # fresh head, order, dropout, split
    device: str = "auto"                     # auto, cpu, cuda, mps
    dtype: str = "auto"                      # auto, float32, bfloat16 (autocast; the weights stay float32)

SMOLLM = {"dtype": "bfloat16", "lr": 1e-4, "batch_size": 16, "microbatch": 4, "weight_decay": 0.01, "dropout": 0.0,
          "samples": 256, "response_tokens": 28}
PRESETS = {
    "tiny-people": {"dtype": "bfloat16", "batch_size": 32, "limit": 8000, "lr": 5e-4},  # labeler and judge
    "tiny": {"dtype": "bfloat16", "epochs": 2},  # the reward model, from the labeler's rankings
    **dict.fromkeys(("smoke", "smoke-people"), {"limit": 64, "samples": 16, "response_tokens": 16, "log_every": 1}),
    "smollm-people": {**SMOLLM, "limit": 2560},
    "smollm": SMOLLM,
    "chat": {**SMOLLM, "microbatch": 2, "samples": 128, "response_tokens": 64},  # people rank: no labeler
}

def ranking_loss(scores, mask):
    """scores (B, K) of a prompt's responses, best first; mask (B, K) 1.0 where a response exists: a scalar. Mean over a
    prompt's pairs of -logsigmoid(better - worse), then over prompts: InstructGPT eq. 1. The pairs of a prompt stay in
    one element of the batch: a response is one forward pass, however many pairs it is in."""
    margins = scores[:, :, None] - scores[:, None, :]  # (B, K, K), better - worse above the diagonal
    pairs = torch.triu(mask[:, :, None] * mask[:, None, :], diagonal=1)  # (B, K, K)
    losses = (-F.logsigmoid(margins) * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)  # (B,)
    rankings = (mask.sum(1) > 1).to(losses.dtype)  # a lone response holds no comparison
    return (losses * rankings).sum() / rankings.sum().clamp(min=1)

def batch_accuracy(scores, mask):
    """Share of a batch's pairs with better > worse, a tie counted half; scores, mask (B, K) as in ranking_loss."""
    margins = scores[:, :, None] - scores[:, None, :]
    pairs = torch.triu(mask[:, :, None] * mask[:, None, :], diagonal=1)
    return ((0.5 + 0.5 * torch.sign(margins)) * pairs).sum() / pairs.sum()

def encode_rankings(enc, rows, block_size, counts):
    """Each row's texts as ids of prompt, response and EOS: a list of lists, in the order of row["responses"]."""
    encoded = (encode_texts(enc, row["prompt"], row["responses"], block_size, counts) for row in rows)
    return [[prompt + response for response in responses] for prompt, responses in encoded]

def without_duplicates(rankings):
    """Rankings (lists of texts in ids) without texts that truncation has made equal; single texts are dropped."""
    kept = [[list(text) for text in dict.fromkeys(map(tuple, texts))] for texts in rankings]
    kept = [texts for texts in kept if len(texts) > 1]
    if len(kept) < len(rankings):
        print(f"{len(rankings) - len(kept):,} rankings dropped: their texts are equal within the block size")
    check(kept, "no ranking is left: the texts are equal within the block size")
    return kept

def score_texts(model, texts):
    """Scores (N,) of texts (lists of ids, prompt and response together). Texts of similar length share a forward pass,
    whichever ranking they are from: else half of it would be padding."""
    device, order, scores = next(model.parameters()).device, sorted(range(len(texts)), key=lambda i: len(texts[i])), []
    for start in range(0, len(order), 32):
        tokens, real = pad_responses([texts[i] for i in order[start:start + 32]], 0)  # no real token sees the padding
        scores.append(model.score(tokens.to(device), None, real.sum(1).long().to(device) - 1))
    return torch.cat(scores)[torch.tensor(order).argsort().to(device)]

@torch.no_grad()
def score_many(model, texts):
    """score_texts on the CPU, where duplicates have one score."""
    number = {text: i for i, text in enumerate(dict.fromkeys(map(tuple, texts)))}
    return score_texts(model, list(number)).float().cpu()[[number[tuple(text)] for text in texts]]

def score_rankings(model, rankings):
    """scores and mask (B, K) of a batch of rankings, each a list of texts in ids, best first."""
    counts = [len(texts) for texts in rankings]
    scores = score_texts(model, [text for texts in rankings for text in texts])
    scores = torch.nn.utils.rnn.pad_sequence(scores.split(counts), batch_first=True)  # (B, K)
    return scores, length_mask(torch.tensor(counts, device=scores.device), max(counts))

def train(model, rankings, counts, cfg, stage, device, autocast):
    """One optimizer step per batch of rankings, in the order that batches() gives."""
    optimizer = adamw(model.parameters(), cfg.lr, cfg.weight_decay)
    steps = cfg.epochs * math.ceil(len(rankings) / cfg.batch_size)
    lengths = [max(len(text) - 1 for text in texts) // 64 for texts in rankings]  # in steps: short ones are shuffled
    order = [batch for epoch in range(cfg.epochs) for batch in batches(lengths, cfg.batch_size, cfg.seed, epoch)]
    log = Log(stage.folder)
    report_truncated(counts, log)
    done = stage.resume(steps, model=model, optimizer=optimizer, log=log)
    model.train()
    for step in progress(range(done, steps), "train"):
        batch = sorted(order[step], key=lambda i: max(map(len, rankings[i])))  # little padding, if it is split
        for first in range(0, len(batch), cfg.microbatch):
            part = [rankings[i] for i in batch[first:first + cfg.microbatch]]
            with autocast():
                scores, mask = score_rankings(model, part)
            loss = ranking_loss(scores, mask)
            # A mean over rankings, weighted by their number: how a batch is split changes nothing.
            (loss * (len(part) / len(batch))).backward()
            log.add(len(part), loss=loss, accuracy=batch_accuracy(scores.detach(), mask))
        lr = learning_rate(step, steps, cfg.lr, round(cfg.warmup * steps), "linear")
        optimizer_step(optimizer, list(model.parameters()), lr, cfg.grad_clip, log)
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            line = log.write(step=step + 1, lr=lr, seconds=round(stage.seconds(), 3))
            say(f"step {step + 1}/{steps} loss {line['loss']:.3f} accuracy {line['accuracy']:.3f}")
        stage.keep(step + 1)
    model.eval()

@torch.no_grad()
def normalise(model, policy, prompts, cfg, end, device, autocast):
    """Set gain and bias so that samples of the SFT model (policy) have scores of mean 0 and standard deviation 1."""
    prompts = [prompts[i % len(prompts)] for i in range(cfg.samples)]  # ids
    random = torch.Generator(device).manual_seed(cfg.seed)
    with autocast():
        responses = sample_many(policy, prompts, cfg.response_tokens, end, temperature=cfg.temperature, random=random)
        scores = score_many(model, [prompt + response for prompt, response in zip(prompts, responses)])
    check(scores.std() > 0, "the scores of the SFT model's samples are all the same: nothing to normalise")
    model.gain /= scores.std().item()
    model.bias -= model.gain * scores.mean().item()

@torch.no_grad()
def report_card(model, enc, test, rows, autocast):
    """Accuracy on held-out rankings (lists of texts in ids) and on rows of human comparisons {"prompt", "chosen",
    "rejected"}, for each "domain" and "sample" that they name: {"human comparisons": {"movie, random": ...}}."""
    both = [{**row, "responses": [row["chosen"], row["rejected"]]} for row in rows]
    pairs, groups = encode_rankings(enc, both, model.config.block_size, Counter()), {}
    with autocast():  # all at once: the built-in rankings and comparisons are of the same texts
        scores = score_many(model, [text for texts in test + pairs for text in texts])
    scores = scores.split([len(texts) for texts in test + pairs])
    card = {"held-out rankings": ranking_accuracy(test, scores[:len(test)])}
    for row, pair, score in zip(rows, pairs, scores[len(test):]):
        groups.setdefault(f"{row.get('domain', 'all')}, {row.get('sample', 'all')}", []).append((pair, score))
    human = {name: {"reward model": ranking_accuracy(*zip(*groups[name]))} for name in sorted(groups)}
    return {**card, "human comparisons": human} if human else card

def main(cfg):
    device, autocast = set_up(cfg)
    stage = Stage(cfg, "model", "train", "test", "pairs", "sft", *(["prompts"] if cfg.sft else []))
    model, counts = load_model(cfg.model, device, "lm", cfg.dropout, fresh_head=True), Counter()
    model.trunk.set_flags(cfg)
    enc, block_size, rows = load_tokenizer(cfg.model), model.config.block_size, read_rankings(cfg.train)
    split_seed = cfg.seed if cfg.split_seed == -1 else cfg.split_seed
    rows, held_out = (rows, read_rankings(cfg.test)) if cfg.test else split_by_prompt(rows, cfg.test_share, split_seed)
    rankings = without_duplicates(encode_rankings(enc, rows[:cfg.limit or len(rows)], block_size, counts))
    test = without_duplicates(encode_rankings(enc, held_out, block_size, Counter()))
    human = read_jsonl(cfg.pairs, {"prompt": str, "chosen": str, "rejected": str}) if cfg.pairs else []
    if cfg.sft:
        check_same_vocab(cfg.model, cfg.sft)
        policy = load_model(cfg.sft, device)
        limit = prompt_limit(min(policy.config.block_size, block_size), cfg.response_tokens)
        rows = read_jsonl(cfg.prompts, {"prompt": str})
        prompts = [encode_prompt(enc, row["prompt"], limit, counts) for row in rows]
    print(f"{len(rankings):,} rankings to train on, {len(test):,} held out")
    stage.open()

    train(model, rankings, counts, cfg, stage, device, autocast)
    card = report_card(model, enc, test, human, autocast)
    shown = {name: row["reward model"] for name, row in card.get("human comparisons", {}).items()}
    for name, row in {"held-out rankings": card["held-out rankings"], **shown}.items():
        low, high = row["interval"]
        print(f"accuracy on {visible(name)}: {row['accuracy']:.3f} ({low:.3f}-{high:.3f}), {row['pairs']} pairs")
    if cfg.sft:
        normalise(model, policy, prompts, cfg, enc.end, device, autocast)
    write_json(stage.folder / "report_card.json", card)
    stage.save(model, f"{cfg.model}/vocab.tiktoken", held_out_accuracy=card["held-out rankings"]["accuracy"])
    stage.finish(held_out_accuracy=card["held-out rankings"]["accuracy"])

if __name__ == "__main__":
    run(main, Config, PRESETS)
