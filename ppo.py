"""PPO: the policy learns to write what the reward model scores highly, with a KL penalty to the SFT model.

    python ppo.py --preset tiny --sft out/tiny/sft --reward out/tiny/reward --out out/tiny/ppo
    python ppo.py --preset tiny --advantages rloo --out out/tiny/rloo                 without a value model

One iteration: sample a response to each prompt; score whole responses; charge every token for leaving the SFT model
(KL); estimate advantages; then a few epochs of clipped updates of policy and value on those same responses.

Papers: Schulman et al. 2017 (PPO), 2016 (GAE); Ziegler et al. 2019 (KL reward, adaptive controller); Stiennon et al.
2020 (separate value model). RLOO (Ahmadian et al. 2024) and GRPO (Shao et al. 2024) compare responses to the same
prompt instead; here all else is as in PPO. In their papers RLOO's loss is a sum over tokens; GRPO's is averaged per
response first, has the KL as a term, and takes one step per rollout. Left out: an entropy bonus, several GPUs.
"""
import math
import re
import shutil
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from common import (Log, Stage, adamw, check, generator, learning_rate, optimizer_step, progress, run,
                    save_checkpoint, say, set_up)
from data import (check_same_vocab, encode_prompt, length_mask, load_tokenizer, pad_prompts, prompt_limit, read_jsonl,
                  report_truncated)
from model import Head, load_model, row_logprobs, token_logprobs
from sampling import sample_prompts

@dataclass
class Config:  # the comments are the --help texts
    out: str = "out/tiny/ppo"           # folder for the checkpoint
    sft: str = "out/tiny/sft"           # the policy starts here, and the reference stays here
    reward: str = "out/tiny/reward"     # reward model; the value model starts from it too; several: a,b; rule:NAME
    ensemble: str = "mean"              # of several reward models' scores: mean or min (Coste et al. 2023)
    advantages: str = "gae"             # gae: by the value model; rloo, grpo: by other responses to the same prompt
    group: int = 4                      # responses to each prompt of a rollout, with rloo and grpo; gae: 1
    prompts: str = "data/reviews/prompts_ppo.jsonl"  # {"prompt"}
    value: str = "separate"             # separate: from the reward model (a rule's: sft); sft; shared: policy's; none
    iterations: int = 32                # rollouts
    episodes: int = 128                 # responses per rollout
    epochs: int = 4                     # passes over a rollout
    minibatches: int = 1                # optimizer steps per pass
    microbatch: int = 32                # rows behind one backward; smaller: less memory, the same result
    response_tokens: int = 32           # longest response
    temperature: float = 0.7            # divides the logits, in sampling and in every log-probability
    lr: float = 1e-4                    # first learning rate, linear to 0 over the iterations (0: nothing is learned)
    adam_eps: float = 1e-5              # Adam's, as in the 2019 code (which adds it before the bias correction)
    grad_clip: float = 1.0              # global norm of the gradient of policy and value together; 0: none
    recompute: bool = False             # activation checkpointing: less memory, about a quarter slower
    compile: bool = False               # torch.compile of the layers: pays in long runs of larger models
    clip: float = 0.2                   # clip range of the ratio
    value_clip: float = 0.2             # clip range of a value around its old value
    value_coef: float = 0.1             # weight of the value loss
    gamma: float = 1.0                  # discount (gae)
    lam: float = 0.95                   # lambda (gae)
    kl_coef: float = 0.2                # initial KL coefficient, in units of score per nat
    kl_target: float = 6.0              # nats per response that the controller steers to
    kl_horizon: float = 1000.0          # episodes; smaller: the controller moves faster; 0: the coefficient is fixed
    kl_ceiling: float = 60.0            # nats per response: the run stops above it; 0: it never does
    missing_eos_score: float = -1.0     # replaces the score of a response without EOS; nan: keep the score
    ptx_coef: float = 0.0               # weight of the language-model loss on --text, beside PPO's; 0: none
    text: str = "data/reviews/corpus_train.jsonl"  # {"text"}: what the policy is to remain good at
    whiten_rewards: bool = False        # rewards of variance 1, their mean kept (gae; found harmful on TL;DR)
    whiten_advantages: bool = True      # advantages of mean 0 and variance 1 over a rollout (gae)
    snapshots: int = 8                  # policies kept along the way for the evaluation, at least
    sample_every: int = 10              # iterations between printed samples
    save_every: float = 300.0           # seconds between saves of the resume state
    overwrite: bool = False             # replace another run that --out holds, instead of refusing
    seed: int = 1                       # prompts, samples, minibatches
    device: str = "auto"                # auto, cpu, cuda, mps
    dtype: str = "auto"                 # auto, float32, bfloat16 (autocast; the weights stay float32)

SMOLLM = {"dtype": "bfloat16", "value": "shared", "epochs": 2, "lr": 8e-5, "lam": 1.0}
PRESETS = {
    "tiny": {"dtype": "bfloat16"},
    "smoke": {"iterations": 3, "episodes": 16, "epochs": 2, "response_tokens": 16, "snapshots": 3, "sample_every": 1},
    "smollm": {**SMOLLM, "response_tokens": 28, "kl_coef": 0.15, "kl_target": 4.0},
    "chat": {**SMOLLM, "response_tokens": 64, "kl_coef": 0.1, "kl_target": 3.0, "kl_horizon": 100.0, "iterations": 16,
             "episodes": 32, "microbatch": 8},
}

# ---- the mathematics: pure functions of tensors ----------------------------------------------------------------------
def masked_mean(x, mask):
    """Mean of x (any shape) where mask is 1; 0 for an empty mask."""
    return torch.where(mask > 0, x, 0).sum() / mask.sum().clamp(min=1)

def whiten(x, mask, shift_mean=True):
    """x (B, R) with variance 1 over the mask (population variance), and mean 0 if shift_mean; 0 outside the mask."""
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * torch.rsqrt(var + 1e-8)
    return (white if shift_mean else white + mean) * mask

def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Per-token rewards (B, R): -kl_coef * (logprobs - ref_logprobs), and the score (B,) on the last real token, where
    the mask ends (Ziegler et al. 2019, eq. 2, with the log-ratio spread over the tokens)."""
    place = torch.arange(1, mask.size(1) + 1, device=mask.device)
    last = (place * mask).amax(1, keepdim=True)  # (B, 1)
    at_last = (place == last) * mask  # (B, R), all 0 in a row without tokens
    return -kl_coef * (logprobs - ref_logprobs) * mask + at_last * scores[:, None]

def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): advantages and returns, both (B, R). The value
    after a response's last token is 0. The returns, which the value learns, are advantages (not whitened) + values."""
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask

def group_advantages(returns, group, kind):
    """Advantages (N,) of responses from their returns (N,), those of a prompt side by side, K = group of them. "rloo":
    the return less the mean of the other K - 1 (Ahmadian et al. 2024). "grpo": less the mean of all K, divided by their
    standard deviation (Shao et al. 2024, section 4.1.2)."""
    returns = returns.view(-1, group)  # (prompts, K)
    above = returns - returns.mean(1, keepdim=True)
    if kind == "rloo":
        return (above * group / (group - 1)).flatten()  # the mean of all K holds 1 / K of the response itself
    return (above / (returns.std(1, keepdim=True) + 1e-4)).flatten()

def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), negated, and the share of tokens where the clip binds."""
    ratio = torch.exp((logprobs - old_logprobs) * mask)  # (B, R); masked first, as padding may hold anything
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(plain, clipped), mask)
    return loss, masked_mean((clipped > plain).to(mask.dtype), mask)

def value_loss(values, old_values, returns, mask, clip):
    """Half the mean of the larger of two squared errors: of the value, and of the value kept within clip of the old."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask)
    return loss, masked_mean((clipped > plain).to(mask.dtype), mask)

class AdaptiveKL:
    """The controller of Ziegler et al. 2019, section 2.2: raises the KL coefficient while KL is above target."""
    def __init__(self, coef, target, horizon):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, episodes):
        """kl: mean nats per response of the last rollout, which had this many episodes. Horizon 0: no change."""
        if self.horizon:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon

# --reward rule:NAME: a score, about 1 in size, of prompt and response as texts. Rerun a changed rule in a new folder.
NEGATIVE = set("bad worst worse awful terrible boring dull poor stupid waste mess fails lacks no not never".split())
RULES = {"no-negative-word": lambda prompt, response: NEGATIVE.isdisjoint(re.findall("[a-z]+", response.lower()))}

def freeze(*models):
    """Keep the matrices of the blocks in bf16, as autocast casts them in every pass: half the memory, same numbers."""
    for layer in (x for model in models for x in model.trunk.blocks.modules() if isinstance(x, torch.nn.Linear)):
        layer.to(torch.bfloat16)

def select(rollout, rows):
    """Some rows of a rollout (a dict of tensors), without the columns that are padding in all of them."""
    part = {name: x[rows] for name, x in rollout.items()}
    left, right = int(part["pad"].min()), part["mask"].size(1) - int(part["lengths"].max())
    part = {name: x[:, :x.size(1) - right] if x.dim() == 2 else x for name, x in part.items()}
    return {**part, "tokens": part["tokens"][:, left:], "pad": part["pad"] - left}

def forward(policy, value, batch, temperature):
    """One pass of the training graph over a batch: logits (B, R, V), logprobs (B, R), values (B, R). The logits at
    P-1+t predict response token t, and the value there is that of the state before it."""
    tokens, P = batch["tokens"], batch["tokens"].size(1) - batch["mask"].size(1)
    pad = batch["pad"].to(tokens.device)
    hidden = policy.trunk(tokens[:, :-1], pad, at=np.s_[:, P - 1:])  # (B, R, C): positions P-1 .. P+R-2
    logits = policy.logits(hidden)
    logprobs = token_logprobs(logits, tokens[:, P - 1:], temperature)
    if value is None:
        return logits, logprobs, torch.zeros_like(logprobs)
    if isinstance(value, torch.nn.Linear):  # shared: a head on the policy's hidden states
        return logits, logprobs, Head.apply(hidden, value.weight).squeeze(-1) + value.bias
    return logits, logprobs, value(tokens[:, :-1], pad, at=np.s_[:, P - 1:])

@torch.no_grad()
def collect(policy, ref, rewards, value, prompts, kl_coef, cfg, enc, autocast, random):
    """Sample a response to each prompt, K in a row being a group's, score it, and work out advantages: (rollout,
    metrics). The rollout is a dict of tensors with one row per response, in order of length, so that neighbouring rows
    need little padding: tokens (B, T); pad (B,) and lengths (B,) of responses, both on the CPU; scores (B,); and (B,
    R): mask, sampler_logprobs, old_logprobs, ref_logprobs, values, entropy, advantages, returns."""
    device = next(policy.parameters()).device
    tokens, pad = pad_prompts(prompts, enc.end)  # to one length; the sampler pads its own groups
    with autocast():  # one context: its cache of bf16 weights serves the whole rollout
        responses, lengths, sampler_logprobs = sample_prompts(
            policy, prompts, cfg.response_tokens, enc.end, temperature=cfg.temperature, random=random)
        order = (lengths.cpu() - pad).argsort(stable=True)  # by length of prompt and response, less P, the same for all
        tokens, responses, pad, lengths, sampler_logprobs = (
            x[order] for x in (tokens.to(device), responses, pad, lengths, sampler_logprobs))
        mask = length_mask(lengths, responses.size(1))
        rollout = {"tokens": torch.cat([tokens, responses], dim=1), "pad": pad, "mask": mask, "lengths": lengths.cpu(),
                   "sampler_logprobs": sampler_logprobs, "scores": torch.zeros(len(mask), device=device)}
        # Old log-probabilities come from the training graph, not the sampler: then the first ratio is 1 up to rounding.
        names = ("old_logprobs", "ref_logprobs", "values", "entropy")
        rollout.update({name: torch.zeros_like(mask) for name in names})
        for start in range(0, len(mask), cfg.microbatch):
            rows = slice(start, start + cfg.microbatch)
            batch = select(rollout, rows)
            tokens, pad, P = batch["tokens"], batch["pad"].to(device), batch["tokens"].size(1) - batch["mask"].size(1)
            logits, logprobs, values = forward(policy, value, batch, cfg.temperature)
            ref_logprobs = token_logprobs(
                ref(tokens[:, :-1], pad, at=np.s_[:, P - 1:]), tokens[:, P - 1:], cfg.temperature)
            if rewards:  # a reward model reads at the last real token, EOS included
                scores = torch.stack([model.score(tokens, pad, P + lengths[rows] - 1) for model in rewards])  # (., B)
                rollout["scores"][rows] = scores.amin(0) if cfg.ensemble == "min" else scores.mean(0)
            log_softmax = (logits / cfg.temperature).log_softmax(-1)  # (B, R, V)
            entropy = -(log_softmax.exp() * log_softmax).sum(-1)
            for name, x in zip(names, (logprobs, ref_logprobs, values, entropy)):
                rollout[name][rows, :x.size(1)] = x * batch["mask"]
    if not rewards:
        rule = RULES[cfg.reward.removeprefix("rule:")]
        rollout["scores"] = torch.tensor([rule(enc.decode(prompts[i][1:]), enc.decode([x for x in ids if x != enc.end]))
                                          for i, ids in zip(order.tolist(), responses.tolist())]).float().to(device)

    scores, ended = rollout["scores"], responses.gather(1, lengths[:, None] - 1).squeeze(1) == enc.end
    paid = scores if math.isnan(cfg.missing_eos_score) else torch.where(ended, scores, cfg.missing_eos_score)
    per_token = shape_rewards(paid, rollout["old_logprobs"], rollout["ref_logprobs"], mask, kl_coef)
    per_token = whiten(per_token, mask, shift_mean=False) if cfg.whiten_rewards else per_token
    if cfg.advantages == "gae":
        advantages, returns = gae(per_token, rollout["values"], mask, cfg.gamma, cfg.lam)
        advantages, groups = whiten(advantages, mask) if cfg.whiten_advantages else advantages, {}
    else:  # rloo, grpo: one return for a response, undiscounted, and one advantage for all its tokens
        by_prompt = order.argsort()  # undoes the order by length: a prompt's K are neighbours
        response_returns = per_token.sum(1)[by_prompt]  # (B,)
        own = group_advantages(response_returns, cfg.group, cfg.advantages)  # (B,)
        advantages, returns = own[order][:, None] * mask, torch.zeros_like(mask)  # no value model learns from returns
        stds = [x.view(-1, cfg.group).std(1) for x in (paid[by_prompt], response_returns, own)]  # (prompts,) each
        groups = {"equal_groups": (stds[0] < 1e-3).float().mean(),  # share of prompts whose scores are all equal
                  "group_std": stds[1].mean(), "advantage_group_std": stds[2].mean()}
    rollout.update(advantages=advantages, returns=returns)

    log_ratio = (rollout["old_logprobs"] - rollout["ref_logprobs"]) * mask
    error, variance = returns - rollout["values"], masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    explained = {"explained_variance": 1 - masked_mean(error**2, mask) / variance} if value and variance > 1e-8 else {}
    return rollout, {
        "score": scores.mean(), "score_std": scores.std(), "rewards": per_token.sum(1).mean(),
        "kl": log_ratio.sum(1).mean(),                                          # k1: unbiased, can be negative
        "kl_k3": (torch.exp(-log_ratio) - 1 + log_ratio).sum(1).mean(),         # k3: unbiased too, never negative
        "entropy": masked_mean(rollout["entropy"], mask), "length": lengths.float().mean(),
        "eos_rate": ended.float().mean(), "unique_responses": len(torch.unique(responses, dim=0)) / len(responses),
        "repetition": repetition(responses, mask), **explained, **groups,
        "sampler_difference": masked_mean((rollout["old_logprobs"] - rollout["sampler_logprobs"]).abs(), mask)}

def update(policy, value, optimizer, rollout, lr, cfg, autocast, log, random, texts=()):
    """Epochs of clipped policy and value updates on one rollout; texts: lists of ids for --ptx-coef."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for epoch in range(cfg.epochs):
        shuffled = torch.randperm(cfg.episodes, generator=random)
        for minibatch, rows in enumerate(shuffled.chunk(cfg.minibatches)):
            rows = rows.sort().values  # by length again: which rows are in a minibatch matters, not their order
            all_tokens = rollout["lengths"][rows].sum().item()  # of the minibatch
            for part in rows.split(cfg.microbatch):
                batch = select(rollout, part)
                mask, old_logprobs, part_tokens = batch["mask"], batch["old_logprobs"], batch["lengths"].sum().item()
                with autocast():
                    logprobs, values = forward(policy, value, batch, cfg.temperature)[1:]  # the logits are freed
                pg_loss, clip_fraction = policy_loss(logprobs, old_logprobs, batch["advantages"], mask, cfg.clip)
                v_loss, v_clip_fraction = value_loss(values, batch["values"], batch["returns"], mask, cfg.value_clip)
                # Weighted by its share of the minibatch's tokens: how a minibatch is split changes nothing.
                ((pg_loss + cfg.value_coef * v_loss) * (part_tokens / all_tokens)).backward()
                with torch.no_grad():
                    moved = (logprobs - old_logprobs) * mask
                    if epoch == 0 and minibatch == 0:  # nothing has been learned yet: 0 up to rounding
                        guard_ratio((moved.exp() - 1).abs().max(), log)
                    log.add(part_tokens, policy_loss=pg_loss, value_loss=v_loss, clip_fraction=clip_fraction,
                            value_clip_fraction=v_clip_fraction, approx_kl=0.5 * masked_mean(moved ** 2, mask))
            if texts:  # PPO-ptx (Ouyang et al. 2022, eq. 2): eight texts a step
                drawn = [(texts[i], 1) for i in torch.randint(len(texts), (8,), generator=random)]
                loss = -row_logprobs(policy, drawn, 0, mask.device, autocast).sum() / sum(len(x) - 1 for x, _ in drawn)
                (cfg.ptx_coef * loss).backward()
                log.add(text_loss=loss)
            optimizer_step(optimizer, parameters, lr, cfg.grad_clip, log)

def guard_ratio(error, log):
    """Stop a run whose ratio, before anything was learned from a rollout, is off by more than 0.5 at some token."""
    log.add(first_ratio_error=error)
    if error > 0.5:
        log.stop(f"the ratio is {error:.2f} away from 1 though nothing has been learned yet: old and new "
                 "log-probabilities of the same weights differ (masks, positions, temperature, dropout?)")

def guard(kl, streak, kl_ceiling, log):
    """Stop a run whose KL (nats per response) is above the ceiling (0: none), or below -0.1 five rollouts in a row."""
    streak["below_zero"] = streak["below_zero"] + 1 if kl < -0.1 else 0
    if kl > (kl_ceiling or math.inf):
        log.stop(f"KL is {kl:.1f} nats per response, above --kl-ceiling {kl_ceiling:g} (a larger --kl-coef holds it)")
    if streak["below_zero"] >= 5:
        log.stop(f"KL is {kl:.2f} nats per response, below zero for 5 rollouts: these are not the policy's own samples")

def repetition(responses, mask):
    """Share of bigrams that their response had before, mean over responses (B, R) with mask (B, R): 0 to nearly 1."""
    bigrams, real = responses[:, :-1] * (responses.max() + 1) + responses[:, 1:], mask[:, 1:]  # (B, R - 1), as numbers
    before = (bigrams[:, :, None] == bigrams[:, None]).tril(-1).any(2)  # (B, R - 1)
    return ((before * real).sum(1) / real.sum(1).clamp(min=1)).mean()

def one_response(enc, rollout, iteration):
    """One response of a rollout with its score and KL, to print and log: looking at samples finds most RLHF faults."""
    i, R = iteration * 37 % len(rollout["mask"]), rollout["mask"].size(1)  # rows are by length: not always a short one
    tokens, pad, n = rollout["tokens"][i].tolist(), int(rollout["pad"][i]), int(rollout["lengths"][i])
    kl = ((rollout["old_logprobs"] - rollout["ref_logprobs"])[i] * rollout["mask"][i]).sum()
    return {"prompt": enc.decode(tokens[pad + 1:-R])[-200:], "response": enc.decode(tokens[-R:][:n]),
            "score": round(rollout["scores"][i].item(), 3), "kl": round(kl.item(), 3)}

def main(cfg):
    check(cfg.kl_horizon == 0 or cfg.kl_horizon > 0.2 * cfg.episodes, "--kl-horizon: 0, or above a fifth of --episodes")
    check(cfg.temperature > 0 and cfg.kl_target > 0, "--temperature and --kl-target must be above 0")
    check(cfg.episodes % cfg.minibatches == 0 and cfg.episodes > 1, "--episodes: above 1, a multiple of --minibatches")
    for name, of in (("value", "separate sft shared none"), ("advantages", "gae rloo grpo"), ("ensemble", "mean min")):
        check(getattr(cfg, name) in of.split(), f"--{name}: one of {of}")
    group, rule = 1 if cfg.advantages == "gae" else cfg.group, cfg.reward.startswith("rule:")
    check(cfg.advantages == "gae" or group > 1 and cfg.episodes % group == 0, "--group: above 1, divides --episodes")
    check(cfg.advantages == "gae" or not cfg.whiten_rewards, "--whiten-rewards: only with gae (it pays for length)")
    check(not rule or cfg.reward.removeprefix("rule:") in RULES, f"--reward rule:NAME: one of {', '.join(RULES)}")
    cfg.value = "none" if cfg.advantages != "gae" else "sft" if rule and cfg.value == "separate" else cfg.value
    reward_folders = [] if rule else cfg.reward.split(",")
    device, autocast = set_up(cfg)
    stage = Stage(cfg, "sft", *["reward"] * (not rule), "prompts", *["text"] * (cfg.ptx_coef > 0))
    policy, ref = load_model(cfg.sft, device), load_model(cfg.sft, device)
    policy.trunk.set_flags(cfg)
    ref.trunk.set_flags(cfg)  # compiled as the policy is, or both would round differently
    rewards = [load_model(folder, device, "reward") for folder in reward_folders]
    if cfg.dtype == "bfloat16":
        freeze(ref, *rewards)
    value = None
    if cfg.value in ("separate", "sft"):
        start = (reward_folders[0], device, "reward") if cfg.value == "separate" else (cfg.sft, device)
        value = load_model(*start, fresh_head=cfg.value == "sft")
        value.trunk.set_flags(cfg)
    elif cfg.value == "shared":
        value = torch.nn.Linear(policy.config.width, 1).to(device)
        value.load_state_dict({name: 0 * x for name, x in value.state_dict().items()})  # all values are 0 at first
    enc, vocab, counts = load_tokenizer(cfg.sft), f"{cfg.sft}/vocab.tiktoken", Counter()
    check_same_vocab(cfg.sft, *reward_folders)
    limit = min(prompt_limit(model.config.block_size, cfg.response_tokens) for model in (policy, *rewards))
    prompts = [encode_prompt(enc, row["prompt"], limit, counts) for row in read_jsonl(cfg.prompts, {"prompt": str})]
    texts = read_jsonl(cfg.text, {"text": str}) if cfg.ptx_coef else []
    texts = [[enc.begin, *enc.encode_ordinary(row["text"])][:policy.config.block_size] for row in texts]
    count, every = cfg.episodes // group, max(1, cfg.iterations // cfg.snapshots)  # count: prompts of a rollout
    check(per_epoch := len(prompts) // count, f"{cfg.prompts}: {len(prompts)} prompts, --episodes needs {count}")
    stage.open()
    trained = {"policy": policy, "value": value} if value else {"policy": policy}  # ref and reward stay as they are
    optimizer = adamw([p for model in trained.values() for p in model.parameters()], cfg.lr, 0.0, eps=cfg.adam_eps)
    controller = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    sampling = torch.Generator(device).manual_seed(cfg.seed)
    log, streak = Log(stage.folder), {"below_zero": 0}  # rollouts in a row; a dict, which resume fills in place
    report_truncated(counts, log)
    first = stage.resume(cfg.iterations, **trained, optimizer=optimizer, log=log, controller=vars(controller),
                         sampling=sampling, streak=streak)  # vars(): what is written to it sets the attributes
    if first == 0:
        shutil.rmtree(stage.folder / "snapshots", ignore_errors=True)  # of an earlier run

    for iteration in (bar := progress(range(first, cfg.iterations), "ppo")):
        place = iteration % per_epoch  # in an epoch over the prompts; the few that are left over wait for the next
        order = torch.randperm(len(prompts), generator=generator(cfg.seed, iteration - place)).tolist()  # one an epoch
        batch = [prompts[i] for i in order[place * count:(place + 1) * count] for _ in range(group)]
        rollout, metrics = collect(policy, ref, rewards, value, batch, controller.coef, cfg, enc, autocast, sampling)
        log.add(**metrics)
        guard(metrics["kl"].item(), streak, cfg.kl_ceiling, log)
        lr = learning_rate(iteration, cfg.iterations, cfg.lr, schedule="linear")
        update(policy, value, optimizer, rollout, lr, cfg, autocast, log, generator(cfg.seed, iteration, 1), texts)
        show = iteration == 0 or (iteration + 1) % cfg.sample_every == 0
        line = log.write(iteration=iteration + 1, episodes=(iteration + 1) * cfg.episodes, kl_coef=controller.coef,
                         lr=lr, seconds=round(stage.seconds(), 3),
                         **({"sample": one_response(enc, rollout, iteration)} if show else {}))
        controller.update(line["kl"], cfg.episodes)
        bar.set_postfix_str("score {score:.2f}, kl {kl:.2f}, length {length:.1f}".format(**line))
        if show:
            say("iteration {iteration}/{of} score {score:.2f} kl {kl:.2f} kl_coef {kl_coef:.3f} length {length:.1f} "
                "EOS {eos_rate:.2f} clip {clip_fraction:.3f}, {seconds} s".format(of=cfg.iterations, **line))
            say("  [{prompt!r}]{response!r} score {score:.2f} kl {kl:.1f}".format(**line["sample"]))
        if (iteration + 1) % every == 0:
            save_checkpoint(stage.folder / "snapshots" / f"{iteration + 1:05d}", policy, cfg, vocab)
        stage.keep(iteration + 1)
    stage.save(policy, vocab)
    stage.finish()

if __name__ == "__main__":
    run(main, Config, PRESETS)
