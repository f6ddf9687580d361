"""Direct preference optimisation: the same rankings without a reward model.

    python dpo.py --model out/tiny/sft --train out/tiny/label/rankings.jsonl --out out/tiny/dpo

PPO's best policy for a reward r is known: the SFT model's probabilities times exp(r / beta), normalised. Turned around,
beta times the log-ratio of policy and SFT model is a reward, so the policy itself can be trained as a reward model.

Papers: Rafailov et al. 2023 (DPO); Ouyang et al. 2022, section 3.5 (all pairs of K ranked responses).
Left out on purpose: a loss on demonstrations beside it, other losses of the family, several GPUs.
"""
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from budget import announce, dpo_budget
from common import adamw, check, check_positive, learning_rate, optimizer_step, progress, run, say, set_up
from data import batches, encode_prompt, encode_response, load_tokenizer, read_rankings
from model import load_model
from reward import split_by_prompt
from runs import Log, Stage
from sft import row_logprobs


@dataclass
class Config:
    out: str = "out/tiny/dpo"                     # folder for the checkpoint
    model: str = "out/tiny/sft"                   # the policy starts here, and the reference stays here
    train: str = "out/tiny/label/rankings.jsonl"  # {"prompt", "responses": best to worst}, or chosen and rejected
    test_share: float = 0.1                       # share of the prompts held out
    beta: float = 0.1                             # price of one nat away from the SFT model
    label_smoothing: float = 0.0                  # share of the labels believed to be the wrong way round
    epochs: int = 1                               # passes over the pairs
    batch_size: int = 32                          # pairs behind one optimizer step
    microbatch: int = 32                          # pairs behind one backward; smaller: less memory, the same result
    lr: float = 1e-4                              # peak learning rate, linear to 0
    warmup: float = 0.1                           # share of the steps with a rising learning rate
    grad_clip: float = 1.0                        # global norm of the gradient; 0: none
    recompute: bool = False                       # activation checkpointing: less memory, about a quarter slower
    log_every: int = 20                           # steps per log line
    save_every: float = 300.0                     # seconds between saves of the state that a stopped run goes on from
    restart: bool = False                         # begin again where --out holds another run, instead of refusing
    seed: int = 1                                 # split, order
    device: str = "auto"                          # auto, cpu, cuda, mps
    dtype: str = "auto"                           # auto, float32, bfloat16 (autocast; the weights stay float32)


GPT2 = {"lr": 1e-6, "batch_size": 64, "microbatch": 16}  # Rafailov et al. 2023, appendix B (with RMSprop there)
PRESETS = {"tiny": {}, "smoke": {"log_every": 1}, "gpt2": GPT2, "hh": GPT2}


def dpo_loss(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta, label_smoothing=0.0):
    """Losses, chosen_rewards, rejected_rewards of pairs, all (B,), from log-probabilities summed over the response.

    Rafailov et al. 2023, eq. 7: -log sigmoid of the difference of the implicit rewards, which are beta * (logprobs -
    ref_logprobs) and carry no gradient. label_smoothing: the share of pairs expected to be the wrong way round.
    """
    chosen_rewards = beta * (chosen_logprobs - ref_chosen_logprobs)
    rejected_rewards = beta * (rejected_logprobs - ref_rejected_logprobs)
    margins = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def make_pairs(enc, rows, block_size):
    """All pairs of each ranking: a list of texts (ids, length of prompt), and pairs of their numbers, better first.

    Two texts that are equal once cut to the block size make no pair.
    """
    texts, pairs = [], []
    for row in rows:
        prompt = encode_prompt(enc, row["prompt"], block_size // 2)
        numbers = range(len(texts), len(texts) + len(row["responses"]))
        texts += [(prompt + encode_response(enc, text, block_size - len(prompt)), len(prompt))
                  for text in row["responses"]]
        pairs += [(i, j) for i, j in itertools.combinations(numbers, 2) if texts[i] != texts[j]]
    check(pairs, "--train: no pair to compare: the responses are equal within the block size")
    return texts, pairs


@torch.no_grad()
def all_logprobs(model, texts, end, device, autocast, size=64):
    """Log-probability of every response, (N,), size texts at a time: each text once, however many pairs it is in."""
    logprobs = torch.empty(len(texts), device=device)
    for batch in batches([len(ids) for ids, _ in texts], size, 0):
        logprobs[batch] = row_logprobs(model, [texts[i] for i in batch], end, device, autocast)
    return logprobs


def measure(logprobs, ref_logprobs, pairs, cfg):
    """Mean dpo_loss over pairs of places in logprobs and ref_logprobs (N,), and the metrics of the log."""
    better, worse = torch.tensor(pairs).T
    chosen, rejected = logprobs[better], logprobs[worse]
    losses, good, bad = dpo_loss(chosen, rejected, ref_logprobs[better], ref_logprobs[worse], cfg.beta,
                                 cfg.label_smoothing)
    # Both log-probabilities often fall, the chosen one's too: only their difference is trained, and the probability
    # that the pair loses goes to responses that nobody ranked.
    return losses.mean(), {
        "loss": losses.mean().item(), "accuracy": (good > bad).float().mean().item(),
        "margin": (good - bad).mean().item(), "chosen_reward": good.mean().item(), "rejected_reward": bad.mean().item(),
        "chosen_logprobs": chosen.mean().item(), "rejected_logprobs": rejected.mean().item()}


def main(cfg):
    check_positive(cfg, "beta", "epochs", "batch_size", "microbatch", "lr", "log_every",
                   or_zero=("grad_clip", "save_every"))
    check(0 <= cfg.label_smoothing < 0.5, f"--label-smoothing is {cfg.label_smoothing}: it must be from 0 to below 0.5")
    check(0 < cfg.test_share < 1 and 0 <= cfg.warmup < 1,
          "--test-share must be between 0 and 1, --warmup from 0 to below 1")
    stage = Stage(cfg, "model", "train")
    device, autocast = set_up(cfg)
    policy, enc = load_model(cfg.model, device, recompute=cfg.recompute), load_tokenizer(cfg.model)
    train_rows, test_rows = split_by_prompt(read_rankings(cfg.train), cfg.test_share, cfg.seed)
    texts, pairs = make_pairs(enc, train_rows, policy.config.block_size)
    test_texts, test_pairs = make_pairs(enc, test_rows, policy.config.block_size)
    parameters = list(policy.parameters())
    optimizer = adamw(parameters, cfg.lr, weight_decay=0.0)
    lengths = [len(texts[i][0]) + len(texts[j][0]) for i, j in pairs]
    steps = cfg.epochs * math.ceil(len(pairs) / cfg.batch_size)
    print(f"{len(pairs):,} pairs to train on, {len(test_pairs):,} held out, {steps} steps")
    announce(*dpo_budget(policy.config, cfg, texts, pairs, test_texts, device), device, autocast)

    stage.open()
    # The policy is still the SFT model: its log-probabilities now are the reference's for good.
    size, end = 2 * cfg.microbatch, enc.eot_token
    ref_logprobs = all_logprobs(policy, texts, end, device, autocast, size)
    test_ref_logprobs = all_logprobs(policy, test_texts, end, device, autocast, size)
    log = Log(stage.folder)
    order = [batch for epoch in range(cfg.epochs) for batch in batches(lengths, cfg.batch_size, cfg.seed, epoch)]
    done = stage.resume(steps, policy=policy, optimizer=optimizer, log=log)
    for step in progress(range(done, steps), "dpo"):
        batch = order[step]
        for begin in range(0, len(batch), cfg.microbatch):
            chosen, rejected = zip(*[pairs[i] for i in batch[begin:begin + cfg.microbatch]])
            B, numbers = len(chosen), torch.tensor(chosen + rejected)  # the chosen half, then the rejected half
            logprobs = row_logprobs(policy, [texts[i] for i in numbers], end, device, autocast)  # (2 B,)
            loss, metrics = measure(logprobs, ref_logprobs[numbers], [(i, B + i) for i in range(B)], cfg)
            (loss * (B / len(batch))).backward()  # how a batch is split changes nothing
            log.add(B, **metrics)
        lr = learning_rate(step, steps, cfg.lr, round(cfg.warmup * steps), "linear")
        optimizer_step(optimizer, parameters, lr, cfg.grad_clip, log)
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            line = log.write(step=step + 1, lr=lr, seconds=round(stage.seconds(), 1))
            say("step {step}/{of} loss {loss:.3f} accuracy {accuracy:.3f} margin {margin:.3f} chosen "
                "{chosen_logprobs:.1f} rejected {rejected_logprobs:.1f} nats".format(of=steps, **line))
        stage.keep(step + 1)
    logprobs = all_logprobs(policy, test_texts, end, device, autocast, size)
    _, held_out = measure(logprobs, test_ref_logprobs, test_pairs, cfg)
    print("held out: loss {loss:.3f} accuracy {accuracy:.3f} margin {margin:.3f}".format(**held_out))
    stage.save(policy, Path(cfg.model) / "vocab.tiktoken", held_out=held_out)
    stage.finish(held_out_accuracy=round(held_out["accuracy"], 4))


if __name__ == "__main__":
    run(main, Config, PRESETS)
