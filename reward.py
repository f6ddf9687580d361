"""The reward model: a scalar head on a language model's trunk, trained to put rankings in the order that people gave.

    python reward.py --out out/tiny/reward --model out/tiny/sft --train out/tiny/label/rankings.jsonl

Three of them in a run of train_all.sh: the labeler, from half of the people's ratings, stands in for a person in
label.py; the judge, from the other half, only examines; the reward model learns from the labeler's rankings of the SFT
model's samples, and is what PPO optimises. (In the preset hh it learns from people's pairs, and there is no labeler.)

Papers: Ziegler et al. 2019 (normalisation); Stiennon et al. 2020; Ouyang et al. 2022, eq. 1 (K ranked responses).
Left out on purpose: multi-GPU training, and pairs of one prompt split over steps (they would be learned by heart).
"""
import itertools
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from budget import announce, reward_budget
from checkpoint import write_json
from common import (adamw, check, check_positive, dropout_generator, generator, learning_rate, optimizer_step, progress,
                    run, say, set_up)
from data import (batches, check_same_vocab, encode_prompt, encode_response, load_tokenizer, pad_responses, read_jsonl,
                  read_rankings)
from model import load_model, load_trunk, prompt_room, score_many
from people import read_summary
from runs import Log, Stage
from sampling import sample_many
from terminal import visible


@dataclass
class Config:
    out: str = "out/tiny/reward"             # folder for the checkpoint
    model: str = "out/tiny/sft"              # language model whose trunk it starts from
    train: str = "out/tiny/label/rankings.jsonl"  # {"prompt", "responses": best to worst}; several files: a,b
    test: str = ""                           # held-out rankings; empty: --test-share of the training prompts
    test_share: float = 0.1                  # share of the prompts held out when --test is empty
    pairs: str = "data/reviews/pairs_test.jsonl"  # held-out human comparisons for the report; empty: none
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
    weight_decay: float = 0.1                # AdamW
    grad_clip: float = 1.0                   # global norm of the gradient; 0: none
    recompute: bool = False                  # activation checkpointing: less memory, about a quarter slower
    dropout: float = 0.1                     # in training only
    log_every: int = 50                      # steps per log line
    save_every: float = 300.0                # seconds between saves of the state that a stopped run goes on from
    restart: bool = False                    # begin again where --out holds another run, instead of refusing
    seed: int = 1                            # fresh head, order, dropout, split
    device: str = "auto"                     # auto, cpu, cuda, mps
    dtype: str = "auto"                      # auto, float32, bfloat16 (autocast; the weights stay float32)


# Ziegler et al. 2019's code for GPT-2 124M: 5e-5, batches of 32, one epoch, normalised on 256 samples.
GPT2 = {"lr": 5e-5, "batch_size": 32, "weight_decay": 0.01, "dropout": 0.0, "samples": 256}
SMOKE = {"limit": 64, "samples": 16, "response_tokens": 16, "log_every": 1}
PRESETS = {
    "tiny-people": {"batch_size": 32, "limit": 8000, "lr": 5e-4},  # the labeler and the judge, from people's ratings
    "tiny": {"epochs": 2},              # the reward model, from the labeler's rankings
    "smoke-people": SMOKE,
    "smoke": SMOKE,
    "gpt2-people": {**GPT2, "response_tokens": 24},
    "gpt2": {**GPT2, "response_tokens": 24},
    "hh": {**GPT2, "microbatch": 16, "response_tokens": 128},  # from people's pairs: no labeler in between
}


def ranking_loss(scores, mask):
    """scores (B, K) of a prompt's responses, best first; mask (B, K) 1.0 where a response exists: a scalar.

    Mean over the prompt's pairs of -logsigmoid(better - worse), then over prompts: InstructGPT eq. 1. The pairs of one
    prompt stay in one element of the batch: a response is one forward pass and one vote, however many pairs it is in.
    """
    margins = scores[:, :, None] - scores[:, None, :]  # (B, K, K), better - worse above the diagonal
    pairs = torch.triu(mask[:, :, None] * mask[:, None, :], diagonal=1)  # (B, K, K)
    losses = (-F.logsigmoid(margins) * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)  # (B,)
    rankings = (mask.sum(1) > 1).to(losses.dtype)  # a lone response holds no comparison
    return (losses * rankings).sum() / rankings.sum().clamp(min=1)


def pair_accuracy(scores, mask):
    """Share of a batch's pairs with better > worse, a tie counted half: (hits, pairs) as tensors."""
    margins = scores[:, :, None] - scores[:, None, :]
    pairs = torch.triu(mask[:, :, None] * mask[:, None, :], diagonal=1)
    return (((margins > 0).float() + 0.5 * (margins == 0).float()) * pairs).sum(), pairs.sum()


def split_by_prompt(rows, test_share, seed):
    """Two lists of rankings, to train on and held out: a prompt is in one of them only."""
    prompts = sorted({row["prompt"] for row in rows})
    check(len(prompts) > 1, "--train: rankings of one prompt only: nothing can be held out")
    order = torch.randperm(len(prompts), generator=generator(seed)).tolist()
    held = {prompts[i] for i in order[:max(1, round(test_share * len(prompts)))]}
    return [row for row in rows if row["prompt"] not in held], [row for row in rows if row["prompt"] in held]


def encode_rankings(enc, rows, block_size):
    """Each row's texts, best first, as ids of prompt, response and end of text."""
    encoded = []
    for row in rows:
        prompt = encode_prompt(enc, row["prompt"], block_size // 2)
        encoded.append([prompt + encode_response(enc, text, block_size - len(prompt)) for text in row["responses"]])
    return encoded


def drop_equal(rankings, flag="--train"):
    """Rankings (lists of texts in ids) without repeated texts, as cutting to the block size may have made two equal.

    One that is left with a single text is dropped, and counted on the screen; UserError if none is left.
    """
    kept = [[list(text) for text in dict.fromkeys(map(tuple, texts))] for texts in rankings]
    kept = [texts for texts in kept if len(texts) > 1]
    if len(kept) < len(rankings):
        print(f"{len(rankings) - len(kept):,} rankings left out: their texts are equal within the block size")
    check(kept, f"{flag}: no ranking is left: the texts are equal within the block size")
    return kept


def score_rankings(model, rankings, device):
    """scores and mask (B, K) of a batch of rankings, each a list of texts in ids, best first.

    Texts of similar length share a forward pass, whichever ranking they are from: else half of it would be padding.
    """
    counts = [len(texts) for texts in rankings]
    flat = [text for texts in rankings for text in texts]
    order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
    scores = []
    for start in range(0, len(order), 32):
        tokens, real = pad_responses([flat[i] for i in order[start:start + 32]], 0)
        scores.append(model.score(tokens.to(device), None, real.sum(1).long().to(device) - 1))
    place = torch.tensor(order).argsort().to(device)  # where each text's score is now
    scores = torch.cat(scores)[place].split(counts)
    scores = torch.nn.utils.rnn.pad_sequence(scores, batch_first=True)  # (B, K)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in counts], batch_first=True)
    return scores, mask.to(device)


def train(model, rankings, cfg, stage, device, autocast):
    """One optimizer step per batch of rankings, in the order that batches() gives."""
    parameters = list(model.parameters())
    optimizer = adamw(parameters, cfg.lr, cfg.weight_decay)
    steps = cfg.epochs * math.ceil(len(rankings) / cfg.batch_size)
    # Rankings of similar length share a batch, but in steps of 64 tokens: short ones stay a plain shuffle.
    lengths = [max(len(text) - 1 for text in texts) // 64 for texts in rankings]
    order = [batch for epoch in range(cfg.epochs) for batch in batches(lengths, cfg.batch_size, cfg.seed, epoch)]
    log = Log(stage.folder)
    done = stage.resume(steps, model=model, optimizer=optimizer, log=log, dropout=dropout_generator(device))
    model.train()
    for step in progress(range(done, steps), "train"):
        batch = sorted(order[step], key=lambda i: max(map(len, rankings[i])))  # little padding, if it is split
        for first in range(0, len(batch), cfg.microbatch):
            part = [rankings[i] for i in batch[first:first + cfg.microbatch]]
            with autocast():
                scores, mask = score_rankings(model, part, device)
            loss = ranking_loss(scores, mask)
            # A mean over rankings, weighted by their number: how a batch is split changes nothing.
            (loss * (len(part) / len(batch))).backward()
            hits, pairs = pair_accuracy(scores.detach(), mask)
            log.add(len(part), loss=loss, accuracy=hits / pairs)
        lr = learning_rate(step, steps, cfg.lr, round(cfg.warmup * steps), "linear")
        optimizer_step(optimizer, parameters, lr, cfg.grad_clip, log)
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            line = log.write(step=step + 1, lr=lr, seconds=round(stage.seconds(), 1))
            say(f"step {step + 1}/{steps} loss {line['loss']:.3f} accuracy {line['accuracy']:.3f}")
        stage.keep(step + 1)
    model.eval()


@torch.no_grad()
def normalise(model, policy, prompts, cfg, enc, device, autocast):
    """Set gain and bias so that samples of the SFT model (policy) have scores of mean 0 and standard deviation 1."""
    room = min(prompt_room(each.config, cfg.response_tokens) for each in (policy, model))
    prompts = [encode_prompt(enc, prompts[i % len(prompts)]["prompt"], room) for i in range(cfg.samples)]
    random = torch.Generator(device).manual_seed(cfg.seed)
    with autocast():
        responses = sample_many(policy, prompts, cfg.response_tokens, enc.eot_token, temperature=cfg.temperature,
                                random=random)
        scores = score_many(model, [prompt + response for prompt, response in zip(prompts, responses)])
    check(scores.std() > 0, "the reward model gives every sample the same score: nothing to normalise")
    model.gain /= scores.std().item()
    model.bias -= model.gain * scores.mean().item()


# ---- the report card -----------------------------------------------------------------------------------------------


def share(margins, ends):
    """{"accuracy", "interval", "pairs"} of margins (N,): the share above 0, a tie counted half.

    ends (N, 2): numbers of the two texts of each pair. A text is in several pairs, so these are not independent: the
    95 % interval is from the jackknife that leaves out one text at a time with all its pairs, a little too wide.
    """
    hits = ((margins > 0).double() + 0.5 * (margins == 0).double())  # (N,)
    names, ends = ends.unique(return_inverse=True)
    of_text = torch.zeros(2, len(names), dtype=torch.double)  # hits and pairs that each text is in
    for side in (0, 1):
        of_text[0].index_add_(0, ends[:, side], hits)
        of_text[1].index_add_(0, ends[:, side], torch.ones_like(hits))
    accuracy, S = hits.mean().item(), len(names)
    without = (hits.sum() - of_text[0]) / (len(hits) - of_text[1]).clamp(min=1)  # (S,)
    spread = 1.96 * math.sqrt((S - 1) / S * (without - without.mean()).square().sum().item())
    return {"accuracy": round(accuracy, 4), "pairs": len(margins),
            "interval": [round(max(0.0, accuracy - spread), 4), round(min(1.0, accuracy + spread), 4)]}


def ranking_card(rankings, scores):
    """share() of all pairs of some rankings (lists of texts in ids, best first); scores: (K,) of each ranking."""
    texts = [tuple(text) for ranking in rankings for text in ranking]
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # a text that stands there twice is one
    names = torch.tensor([number[text] for text in texts]).split([len(ranking) for ranking in rankings])
    better, worse = torch.cat([torch.combinations(part) for part in scores]).T
    return share(better - worse, torch.cat([torch.combinations(part) for part in names]))


def features(text, size=2**18):
    """Words and pairs of neighbouring words, lower-cased, as hashed ids, each once: for the bag of words."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    grams = words + [" ".join(two) for two in zip(words, words[1:])]
    return sorted({zlib.crc32(gram.encode()) % size for gram in grams})


def bag_of_words(rows, l2=3e-6, steps=200):
    """A linear reward model on words and word pairs, fitted to all pairs of the same rankings: text -> score.

    l2 is the best of seven strengths on the built-in held-out pairs, which flatters the baseline a little.
    """
    texts = sorted({row["prompt"] + text for row in rows for text in row["responses"]})
    index = {text: i for i, text in enumerate(texts)}
    bags = [features(text) for text in texts]
    flat = torch.tensor([gram for bag in bags for gram in bag])
    offsets = torch.tensor([0] + list(itertools.accumulate(len(bag) for bag in bags))[:-1])
    scale = torch.tensor([len(bag) for bag in bags]).clamp(min=1).rsqrt()  # long texts are not stronger texts
    pairs = torch.tensor([[index[row["prompt"] + better], index[row["prompt"] + worse]]
                          for row in rows for better, worse in itertools.combinations(row["responses"], 2)])
    weight = torch.zeros(2**18, 1, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    for _ in range(steps):
        scores = F.embedding_bag(flat, weight, offsets, mode="sum").squeeze(1) * scale
        loss = -F.logsigmoid(scores[pairs[:, 0]] - scores[pairs[:, 1]]).mean() + l2 * weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = weight.detach().squeeze(1)
    return lambda text: weight[features(text)].sum().item() / math.sqrt(max(1, len(features(text))))


def report_card(model, enc, rows, train_rows, agreement, autocast):
    """Accuracy on held-out human comparisons, per sample of pairs, beside what chance, length, words and people reach.

    rows: {"prompt", "chosen", "rejected"}, grouped by "domain" and "sample" where they are given; train_rows: rankings,
    for the bag of words; agreement: {domain: {sample: [one person against the others' mean, ...]}}, as data.py has it.
    """
    texts = sorted({(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")})
    linear, single = bag_of_words(train_rows), [{"prompt": prompt, "responses": [text]} for prompt, text in texts]
    with autocast():
        scores = score_many(model, [ids for ids, in encode_rankings(enc, single, model.config.block_size)])
    by = {"reward model": scores, "bag of words": torch.tensor([linear(prompt + text) for prompt, text in texts]),
          "longer wins": torch.tensor([float(len(text)) for _, text in texts])}  # scores of the texts
    number = {text: i for i, text in enumerate(texts)}
    ends = torch.tensor([[number[row["prompt"], row[side]] for side in ("chosen", "rejected")] for row in rows])
    groups = {}
    for i, row in enumerate(rows):
        name = f"{row.get('domain', 'all')}, {row.get('sample', 'all')}"
        groups.setdefault(name, []).append(i)
        if isinstance(row.get("gap"), (int, float)) and row.get("sample") == "random":
            low = max((edge for edge in (0.5, 1, 2, 3) if edge <= row["gap"]), default=0)
            groups.setdefault(f"{row.get('domain', 'all')}, gap from {low:g}", []).append(i)
    card = {}
    for name, ids in sorted(groups.items()):
        better, worse = ends[ids].T
        card[name] = {scorer: share(s[better] - s[worse], ends[ids]) for scorer, s in by.items()} | {"chance": 0.5}
    for domain, samples in agreement.items():
        for sample, people in samples.items():
            if f"{domain}, {sample}" in card:
                card[f"{domain}, {sample}"]["people"] = people[0]
    return card


def print_card(card):
    """The report card as a table."""
    print(f"\n{'held-out human comparisons':28} {'pairs':>6} {'reward model':>24} {'bag of words':>13} {'longer':>7} "
          f"{'one person':>11}")
    for name, row in card.items():
        own, people = row["reward model"], row.get("people")
        low, high = own["interval"]
        print(f"{visible(name):28} {own['pairs']:6} {own['accuracy']:8.3f} ({low:.3f}-{high:.3f})"
              f" {row['bag of words']['accuracy']:13.3f} {row['longer wins']['accuracy']:7.3f}"
              f" {f'{people:.3f}' if people else '':>11}")


def main(cfg):
    check_positive(cfg, "lr", "epochs", "batch_size", "microbatch", "log_every", "samples", "response_tokens",
                   "temperature", or_zero=("weight_decay", "grad_clip", "save_every"))
    check(cfg.limit >= 0 and 0 < cfg.test_share < 1 and 0 <= cfg.warmup < 1 < cfg.samples, "--limit must be 0 or more, "
          "--test-share between 0 and 1, --warmup from 0 to below 1, --samples 2 or more")
    stage = Stage(cfg, "model", "train", "test", "pairs", "sft", *(["prompts"] if cfg.sft else []))
    device, autocast = set_up(cfg)
    model = load_trunk(cfg.model, device, dropout=cfg.dropout, recompute=cfg.recompute)
    enc = load_tokenizer(cfg.model)
    rows = [row for path in cfg.train.split(",") for row in read_rankings(path)]
    if cfg.test:
        test_rows = read_rankings(cfg.test)
    else:
        rows, test_rows = split_by_prompt(rows, cfg.test_share, cfg.seed if cfg.split_seed == -1 else cfg.split_seed)
    rows = rows[:cfg.limit or len(rows)]
    rankings, test = (drop_equal(encode_rankings(enc, part, model.config.block_size), flag) for part, flag in (
        (rows, "--train"), (test_rows, "--test" if cfg.test else "--train")))
    human = read_jsonl(cfg.pairs, {"prompt": str, "chosen": str, "rejected": str}) if cfg.pairs else []
    summary = Path(cfg.pairs).parent / "summary.json"  # of the built-in data
    agreement = read_summary(summary)["agreement"] if human else {}
    policy = load_model(cfg.sft, device) if cfg.sft else None
    prompts = read_jsonl(cfg.prompts, {"prompt": str}) if cfg.sft else []
    if policy:
        min(prompt_room(each.config, cfg.response_tokens) for each in (policy, model))  # said before the training
        check_same_vocab(cfg.model, cfg.sft)
    print(f"{len(rankings):,} rankings to train on, {len(test):,} held out")
    announce(*reward_budget(model.config, cfg, rankings, test, human, device), device, autocast)
    stage.open()

    train(model, rankings, cfg, stage, device, autocast)
    with autocast():
        scores = score_many(model, [text for texts in test for text in texts])
    card = {"held-out rankings": ranking_card(test, scores.split([len(texts) for texts in test]))}
    print("accuracy on held-out rankings: {accuracy:.3f} ({interval[0]:.3f}-{interval[1]:.3f}), {pairs} pairs"
          .format(**card["held-out rankings"]))
    if human:
        card["human comparisons"] = report_card(model, enc, human, rows, agreement, autocast)
        print_card(card["human comparisons"])
    if policy:
        normalise(model, policy, prompts, cfg, enc, device, autocast)
    write_json(stage.folder / "report_card.json", card)
    stage.save(model, Path(cfg.model) / "vocab.tiktoken", held_out_accuracy=card["held-out rankings"]["accuracy"])
    stage.finish(held_out_accuracy=card["held-out rankings"]["accuracy"])


if __name__ == "__main__":
    run(main, Config, PRESETS)
