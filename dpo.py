"""Direct preference optimisation: the same rankings without a reward model.

    python dpo.py --model out/tiny/sft --train out/tiny/label/rankings.jsonl --out out/tiny/dpo

PPO maximises score - beta * KL to the SFT model (beta is its kl_coef). The best policy for that is known: the SFT
model's probability of a response times exp(score / beta), divided by a sum that depends on the prompt alone. Hence
score = beta * (log p(policy) - log p(SFT)) + a term of the prompt. Put this into the reward model's loss,
-log sigmoid(chosen score - rejected score): the term cancels, and only the policy is left to train (dpo_loss).
Log-probabilities are at temperature 1, as in the paper; PPO's are at its sampling temperature.

Papers: Rafailov et al. 2023 (DPO); Ouyang et al. 2022, section 3.5 (all pairs of K ranked responses).
Left out on purpose: a loss on demonstrations beside it, other losses of the family, several GPUs.
"""
import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import (Log, Stage, adamw, check, learning_rate, optimizer_step, progress, run, say, set_up,
                    write_json)
from data import (batches, encode_texts, load_tokenizer, ranking_accuracy, read_rankings, report_truncated,
                  split_by_prompt)
from model import load_model, row_logprobs

@dataclass
class Config:
    out: str = "out/tiny/dpo"                     # folder for the checkpoint
    model: str = "out/tiny/sft"                   # the policy starts here, and the reference stays here
    train: str = "out/tiny/label/rankings.jsonl"  # {"prompt", "responses": best to worst}; several files: a,b
    test: str = ""                                # held-out rankings; empty: --test-share of the training prompts
    test_share: float = 0.1                       # share of the prompts held out when --test is empty
    beta: float = 0.1                             # PPO's kl_coef: larger stays closer to the SFT model
    label_smoothing: float = 0.0                  # share of the labels believed to be reversed
    comparisons: str = "all"                      # pairs of a ranking: all, or ends (the best against the worst)
    epochs: int = 2                               # passes over the rankings
    batch_size: int = 16                          # rankings behind one optimizer step
    microbatch: int = 32                          # rankings behind one backward; fewer: less memory, the same result
    lr: float = 3e-4                              # peak learning rate, linear to 0
    warmup: float = 0.1                           # share of the steps with a rising learning rate
    grad_clip: float = 1.0                        # global norm of the gradient; 0: none
    recompute: bool = False                       # activation checkpointing: less memory, about a quarter slower
    compile: bool = False                         # torch.compile of the layers: pays in long runs of larger models
    log_every: int = 10                           # steps per log line
    save_every: float = 300.0                     # seconds between saves of the resume state
    overwrite: bool = False                       # replace another run that --out holds, instead of refusing
    seed: int = 1                                 # split, order
    device: str = "auto"                          # auto, cpu, cuda, mps
    dtype: str = "auto"                           # auto, float32, bfloat16 (autocast; the weights stay float32)

PRESETS = {"tiny": {"dtype": "bfloat16"}, "smoke": {"log_every": 1},
           "smollm": {"dtype": "bfloat16", "comparisons": "ends", "epochs": 1, "microbatch": 8, "lr": 2e-5},
           "chat": {"dtype": "bfloat16", "epochs": 1, "microbatch": 2, "lr": 2e-5}}

def dpo_loss(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta, label_smoothing=0.0):
    """Losses, chosen_rewards, rejected_rewards of pairs, all (B,), from log-probabilities summed over the response.

    Rafailov et al. 2023, eq. 7: -log sigmoid of the difference of the implicit rewards, which are beta * (logprobs -
    ref_logprobs) and returned detached. label_smoothing: the share of pairs expected to be reversed.
    """
    chosen_rewards = beta * (chosen_logprobs - ref_chosen_logprobs)
    rejected_rewards = beta * (rejected_logprobs - ref_rejected_logprobs)
    margins = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()

def encode(enc, rows, block_size, comparisons, counts):
    """Rankings: lists of texts, best first, each (ids, length of the prompt), without duplicates made by truncation."""
    rankings = []
    for row in rows:
        prompt, responses = encode_texts(enc, row["prompt"], row["responses"], block_size, counts)
        responses = list(dict.fromkeys(map(tuple, responses)))
        if len(responses) > 1:
            responses = responses if comparisons == "all" else [responses[0], responses[-1]]
            rankings.append([(prompt + list(response), len(prompt)) for response in responses])
    if len(rankings) < len(rows):
        print(f"{len(rows) - len(rankings):,} rankings dropped: their responses are equal within the block size")
    check(rankings, "nothing to compare: no ranking is left")
    return rankings

def response_logprobs(model, rankings, end, device, autocast, size=32):
    """Log-probability in nats of every response, summed over its tokens: one (K,) per ranking."""
    texts = [text for ranking in rankings for text in ranking]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))  # similar lengths share a forward pass
    sums = [row_logprobs(model, [texts[i] for i in order[start:start + size]], end, device, autocast)
            for start in range(0, len(order), size)]
    place = torch.tensor(order).argsort().to(device)  # where each text's sum is now
    return torch.cat(sums)[place].split([len(ranking) for ranking in rankings])

def measure(logprobs, ref_logprobs, cfg):
    """{metric: its mean over a ranking's pairs, then over rankings, as in reward.py's ranking_loss}; logprobs,
    ref_logprobs: one (K,) per ranking."""
    means = []
    for own, ref in zip(logprobs, ref_logprobs):
        i, j = torch.triu_indices(len(own), len(own), offset=1, device=own.device)  # all pairs: i chosen, j rejected
        losses, chosen, rejected = dpo_loss(own[i], own[j], ref[i], ref[j], cfg.beta, cfg.label_smoothing)
        means.append({"loss": losses, "accuracy": 0.5 + 0.5 * torch.sign(chosen - rejected),  # a tie is a half
                      "margin": chosen - rejected, "chosen_reward": chosen, "rejected_reward": rejected,
                      "chosen_logprobs": own[i], "rejected_logprobs": own[j]})
    return {name: torch.stack([pairs[name].mean() for pairs in means]).mean() for name in means[0]}

def main(cfg):
    check(cfg.comparisons in ("all", "ends"), f"--comparisons is {cfg.comparisons!r}: write all or ends")
    device, autocast = set_up(cfg)
    stage = Stage(cfg, "model", "train", "test")
    policy, enc = load_model(cfg.model, device), load_tokenizer(cfg.model)
    policy.trunk.set_flags(cfg)
    rows = read_rankings(cfg.train)
    rows, held_out = (rows, read_rankings(cfg.test)) if cfg.test else split_by_prompt(rows, cfg.test_share, cfg.seed)
    counts, block_size = Counter(), policy.config.block_size
    rankings = encode(enc, rows, block_size, cfg.comparisons, counts)
    test = encode(enc, held_out, block_size, "all", Counter())
    optimizer = adamw(policy.parameters(), cfg.lr, weight_decay=0.0)
    steps = cfg.epochs * math.ceil(len(rankings) / cfg.batch_size)
    print(f"{len(rankings):,} rankings to train on, {len(test):,} held out, {steps} steps")
    stage.open()
    with torch.no_grad():  # the policy is still the SFT model: its log-probabilities now are the reference's for good
        ref_logprobs = response_logprobs(policy, rankings, enc.end, device, autocast, cfg.microbatch)
        test_ref_logprobs = response_logprobs(policy, test, enc.end, device, autocast, cfg.microbatch)
    # Rankings of similar length share a batch, but in steps of 64 tokens, as in reward.py.
    lengths = [max(len(ids) - 1 for ids, _ in ranking) // 64 for ranking in rankings]
    order = [batch for epoch in range(cfg.epochs) for batch in batches(lengths, cfg.batch_size, cfg.seed, epoch)]
    log = Log(stage.folder)
    report_truncated(counts, log)
    done = stage.resume(steps, policy=policy, optimizer=optimizer, log=log)
    for step in progress(range(done, steps), "dpo"):  # in eval mode: no dropout, so that the first margins are 0
        batch = order[step]
        for first in range(0, len(batch), cfg.microbatch):
            part = batch[first:first + cfg.microbatch]  # numbers of rankings
            logprobs = response_logprobs(policy, [rankings[i] for i in part], enc.end, device, autocast)
            metrics = measure(logprobs, [ref_logprobs[i] for i in part], cfg)
            (metrics["loss"] * (len(part) / len(batch))).backward()  # how a batch is split changes nothing
            log.add(len(part), **metrics)
        lr = learning_rate(step, steps, cfg.lr, round(cfg.warmup * steps), "linear")
        optimizer_step(optimizer, list(policy.parameters()), lr, cfg.grad_clip, log)
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            line = log.write(step=step + 1, lr=lr, seconds=round(stage.seconds(), 3))
            # Both log-probabilities often fall: the loss sees only their difference, the rest goes to unranked texts.
            say("step {step}/{of} loss {loss:.3f} accuracy {accuracy:.3f} margin {margin:.3f} chosen "
                "{chosen_logprobs:.1f} rejected {rejected_logprobs:.1f} nats".format(of=steps, **line))
        stage.keep(step + 1)

    with torch.no_grad():
        logprobs = response_logprobs(policy, test, enc.end, device, autocast, cfg.microbatch)
    held_out = {name: round(x.item(), 4) for name, x in measure(logprobs, test_ref_logprobs, cfg).items()}
    rewards = [cfg.beta * (own - ref).cpu() for own, ref in zip(logprobs, test_ref_logprobs)]
    card = ranking_accuracy([[ids for ids, _ in ranking] for ranking in test], rewards)
    print("held out: loss {0[loss]:.3f} margin {0[margin]:.3f} accuracy {1[accuracy]:.3f} ({1[interval][0]:.3f}-"
          "{1[interval][1]:.3f}), {1[pairs]} pairs".format(held_out, card))
    write_json(stage.folder / "report_card.json", {"held-out rankings": card})
    stage.save(policy, f"{cfg.model}/vocab.tiktoken", held_out={**held_out, "accuracy": card["accuracy"]})
    stage.finish(held_out_accuracy=card["accuracy"])

if __name__ == "__main__":
    run(main, Config, PRESETS)
