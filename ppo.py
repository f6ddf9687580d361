"""PPO: the policy learns to write what the reward model scores highly, with a KL penalty to the SFT model.

    python ppo.py --preset tiny --sft out/tiny/sft --reward out/tiny/reward --out out/tiny/ppo
    python ppo.py --preset tiny --kl-coef 0 --kl-ceiling 0 --out out/tiny/ppo-free    no KL penalty: over-optimisation

One iteration: sample a response to each prompt; score whole responses; charge every token for leaving the SFT model
(KL); estimate advantages (GAE); then a few epochs of clipped updates of policy and value on those same responses.

Papers: Schulman et al. 2017 (PPO), 2016 (GAE); Ziegler et al. 2019 (KL reward, adaptive controller); Stiennon et al.
2020 (separate value model). Left out on purpose: an entropy bonus, a pretraining loss, several GPUs.
"""
import math
import shutil
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributions import Categorical

from common import (Log, Stage, adamw, check, generator, learning_rate, optimizer_step, progress, run,
                    save_checkpoint, say, set_up)
from data import (check_same_vocab, encode_prompt, length_mask, load_tokenizer, pad_prompts, prompt_limit, read_jsonl,
                  report_truncated)
from model import full_precision, load_model, token_logprobs
from sampling import sample_prompts

@dataclass
class Config:  # the comments are the --help texts
    out: str = "out/tiny/ppo"           # folder for the checkpoint
    sft: str = "out/tiny/sft"           # the policy starts here, and the reference stays here
    reward: str = "out/tiny/reward"     # reward model; the value model starts from it too; several: folder,folder
    ensemble: str = "mean"              # of several reward models' scores: mean or min (Coste et al. 2023)
    prompts: str = "data/reviews/prompts_ppo.jsonl"  # {"prompt"}
    value: str = "separate"             # separate: from the reward model; sft: from SFT; shared: policy's; none
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
    clip: float = 0.2                   # clip range of the ratio
    value_clip: float = 0.2             # clip range of a value around its old value
    value_coef: float = 0.1             # weight of the value loss
    gamma: float = 1.0                  # discount
    lam: float = 0.95                   # GAE
    kl_coef: float = 0.2                # initial KL coefficient, in units of score per nat
    kl_target: float = 6.0              # nats per response that the controller steers to
    kl_horizon: float = 1000.0          # episodes; smaller: the controller moves faster; 0: the coefficient is fixed
    kl_ceiling: float = 60.0            # nats per response: the run stops above it; 0: it never does
    missing_eos_score: float = -1.0     # replaces the score of a response without EOS; nan: keep the score
    whiten_rewards: bool = False        # scale the rewards to variance 1, their mean kept (found harmful on TL;DR)
    whiten_advantages: bool = True      # advantages of mean 0 and variance 1 over a rollout
    snapshots: int = 8                  # policies kept along the way for the evaluation, at least
    sample_every: int = 10              # iterations between printed samples
    save_every: float = 300.0           # seconds between saves of the resume state
    overwrite: bool = False             # replace another run that --out holds, instead of refusing
    seed: int = 1                       # prompts, samples, minibatches
    device: str = "auto"                # auto, cpu, cuda, mps
    dtype: str = "auto"                 # auto, float32, bfloat16 (autocast; the weights stay float32)

PRESETS = {
    "tiny": {"dtype": "bfloat16"},
    "smoke": {"iterations": 3, "episodes": 16, "epochs": 2, "response_tokens": 16, "snapshots": 3, "sample_every": 1},
    # Ziegler et al. 2019's sentiment task, with a tenth of its code's million episodes.
    "gpt2": {"iterations": 200, "episodes": 512, "microbatch": 64, "response_tokens": 24, "lr": 1e-5, "kl_coef": 0.15,
             "kl_horizon": 1e4},
    # trlx's examples/hh for 125M (12,000 episodes), but for the learning-rate schedule, temperature and KL control.
    "hh": {"iterations": 96, "minibatches": 4, "microbatch": 16, "response_tokens": 128, "lr": 8e-6, "kl_coef": 0.05,
           "kl_horizon": 2000.0},
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

class Ensemble(torch.nn.ModuleList):
    """Several reward models as one, by the mean or least score, against over-optimisation (Coste et al. 2023)."""
    def score(self, *batch):
        scores = torch.stack([model.score(*batch) for model in self])  # (models, B)
        return scores.mean(0) if self.how == "mean" else scores.amin(0)

def load_reward(folders, device="cpu", how="mean"):
    """The reward models in checkpoint folders, with commas between, as one: how "mean" or "min"."""
    check(how in ("mean", "min"), f"--ensemble is {how!r}: write mean or min")
    models = Ensemble(load_model(folder, device, "reward") for folder in folders.split(","))
    models.how, models.config = how, min((model.config for model in models), key=lambda config: config.block_size)
    return models.eval()

# ---- rollout and update ----------------------------------------------------------------------------------------------

def freeze(*models):
    """Keep the matrices of the blocks in bf16, as autocast casts them in every pass: half the memory, the same numbers.
    Norms, embeddings and heads stay in float32."""
    for name, module in (pair for model in models for pair in model.named_modules()):
        if "blocks." in name and isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)

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
        return logits, logprobs, full_precision(value, hidden)
    return logits, logprobs, value(tokens[:, :-1], pad, at=np.s_[:, P - 1:])

@torch.no_grad()
def collect(policy, ref, reward, value, prompts, kl_coef, cfg, end, autocast, random):
    """Sample a response to each prompt, score it, and work out rewards and advantages: (rollout, metrics). The rollout
    is a dict of tensors with one row per response, in order of length, so that neighbouring rows need little padding:
    tokens (B, T); pad (B,) and lengths (B,) of responses, both on the CPU; scores (B,); and (B, R): mask,
    sampler_logprobs, old_logprobs, ref_logprobs, values, entropy, advantages, returns."""
    device = next(policy.parameters()).device
    tokens, pad = pad_prompts(prompts, end)  # to one length; the sampler pads its own groups
    with autocast():  # one context: its cache of bf16 weights serves the whole rollout
        responses, lengths, sampler_logprobs = sample_prompts(
            policy, prompts, cfg.response_tokens, end, temperature=cfg.temperature, random=random)
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
            ref_logprobs = token_logprobs(ref.response_logits(tokens, pad, P), tokens[:, P - 1:], cfg.temperature)
            # The reward model reads at the last real token, EOS included.
            rollout["scores"][rows] = reward.score(tokens, pad, P + lengths[rows] - 1)
            entropy = Categorical(logits=logits / cfg.temperature, validate_args=False).entropy()
            for name, x in zip(names, (logprobs, ref_logprobs, values, entropy)):
                rollout[name][rows, :x.size(1)] = x * batch["mask"]

    scores, ended = rollout["scores"], responses.gather(1, lengths[:, None] - 1).squeeze(1) == end
    paid = scores if math.isnan(cfg.missing_eos_score) else torch.where(ended, scores, cfg.missing_eos_score)
    rewards = shape_rewards(paid, rollout["old_logprobs"], rollout["ref_logprobs"], mask, kl_coef)
    rewards = whiten(rewards, mask, shift_mean=False) if cfg.whiten_rewards else rewards
    advantages, returns = gae(rewards, rollout["values"], mask, cfg.gamma, cfg.lam)
    rollout.update(advantages=whiten(advantages, mask) if cfg.whiten_advantages else advantages, returns=returns)

    log_ratio = (rollout["old_logprobs"] - rollout["ref_logprobs"]) * mask
    error, variance = returns - rollout["values"], masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    explains = value is not None and variance > 1e-8
    explained = {"explained_variance": 1 - masked_mean(error ** 2, mask) / variance} if explains else {}
    return rollout, {
        "score": scores.mean(), "score_std": scores.std(), "rewards": rewards.sum(1).mean(),
        "kl": log_ratio.sum(1).mean(),                                          # k1: unbiased, can be negative
        "kl_k3": (torch.exp(-log_ratio) - 1 + log_ratio).sum(1).mean(),         # k3: unbiased too, never negative
        "entropy": masked_mean(rollout["entropy"], mask), "length": lengths.float().mean(),
        "eos_rate": ended.float().mean(), "unique_responses": len(torch.unique(responses, dim=0)) / len(responses),
        "repetition": repetition(responses, mask), **explained,
        "sampler_difference": masked_mean((rollout["old_logprobs"] - rollout["sampler_logprobs"]).abs(), mask)}

def update(policy, value, optimizer, rollout, lr, cfg, autocast, log, random):
    """Epochs of clipped policy and value updates on one rollout."""
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
        log.stop(f"KL is {kl:.1f} nats per response, above --kl-ceiling {kl_ceiling:g} (a larger --kl-coef or smaller "
                 "--lr holds the policy, with --overwrite)")
    if streak["below_zero"] >= 5:
        log.stop(f"KL is {kl:.2f} nats per response, below zero for 5 rollouts: these are not the policy's own samples")

def repetition(responses, mask):
    """Share of bigrams that their response had before, mean over responses (B, R) with mask (B, R): 0 to nearly 1."""
    bigrams, real = responses[:, :-1] * (responses.max() + 1) + responses[:, 1:], mask[:, 1:]  # (B, R - 1), as numbers
    before = (bigrams[:, :, None] == bigrams[:, None]).tril(-1).any(2)  # (B, R - 1)
    return ((before * real).sum(1) / real.sum(1).clamp(min=1)).mean()

def one_response(enc, rollout, iteration):
    """One response of a rollout with its score and KL, to print and log: looking at samples finds most RLHF faults."""
    i = iteration * 37 % len(rollout["mask"])  # rows are in order of length: not always a short one
    R = rollout["mask"].size(1)
    tokens, pad, n = rollout["tokens"][i].tolist(), int(rollout["pad"][i]), int(rollout["lengths"][i])
    kl = ((rollout["old_logprobs"] - rollout["ref_logprobs"])[i] * rollout["mask"][i]).sum()
    return {"prompt": enc.decode(tokens[pad + 1:-R])[-200:], "response": enc.decode(tokens[-R:][:n]),
            "score": round(rollout["scores"][i].item(), 3), "kl": round(kl.item(), 3)}

def main(cfg):
    check(cfg.kl_horizon == 0 or cfg.kl_horizon > 0.2 * cfg.episodes, "--kl-horizon: 0, or above a fifth of --episodes")
    check(cfg.temperature > 0 and cfg.kl_target > 0, "--temperature and --kl-target must be above 0")
    check(cfg.value in ("separate", "sft", "shared", "none"), "--value: separate, sft, shared or none")
    check(cfg.episodes % cfg.minibatches == 0 and cfg.episodes > 1, "--episodes: above 1, a multiple of --minibatches")
    device, autocast = set_up(cfg)
    stage = Stage(cfg, "sft", "reward", "prompts")
    policy, ref = load_model(cfg.sft, device, recompute=cfg.recompute), load_model(cfg.sft, device)
    reward, reward_folders = load_reward(cfg.reward, device, cfg.ensemble), cfg.reward.split(",")
    if cfg.dtype == "bfloat16":
        freeze(ref, reward)
    value = None
    if cfg.value == "separate":
        value = load_model(reward_folders[0], device, kind="reward", recompute=cfg.recompute)
    elif cfg.value == "sft":
        value = load_model(cfg.sft, device, recompute=cfg.recompute, fresh_head=True)
    elif cfg.value == "shared":
        value = torch.nn.Linear(policy.config.width, 1).to(device)
        value.load_state_dict({name: 0 * x for name, x in value.state_dict().items()})  # all values are 0 at first
    enc, vocab = load_tokenizer(cfg.sft), f"{cfg.sft}/vocab.tiktoken"
    check_same_vocab(cfg.sft, *reward_folders)
    limit = min(prompt_limit(model.config.block_size, cfg.response_tokens) for model in (policy, reward))
    rows, counts = read_jsonl(cfg.prompts, {"prompt": str}), Counter()
    prompts = [encode_prompt(enc, row["prompt"], limit, counts) for row in rows]
    check(len(prompts) >= cfg.episodes, f"{cfg.prompts}: {len(prompts)} prompts do not fill --episodes {cfg.episodes}")
    stage.open()
    trained = {"policy": policy, "value": value} if value else {"policy": policy}  # ref and reward stay as they are
    optimizer = adamw([p for model in trained.values() for p in model.parameters()], cfg.lr, 0.0, eps=cfg.adam_eps)
    controller = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    sampling = torch.Generator(device).manual_seed(cfg.seed)
    log, streak = Log(stage.folder), {"below_zero": 0}  # rollouts in a row; a dict, which resume fills in place
    report_truncated(counts, log)
    per_epoch, every = len(prompts) // cfg.episodes, max(1, cfg.iterations // cfg.snapshots)
    first = stage.resume(cfg.iterations, **trained, optimizer=optimizer, log=log, controller=vars(controller),
                         sampling=sampling, streak=streak)  # vars(): what is written to it sets the attributes
    if first == 0:
        shutil.rmtree(stage.folder / "snapshots", ignore_errors=True)  # of an earlier run

    for iteration in (bar := progress(range(first, cfg.iterations), "ppo")):
        place = iteration % per_epoch  # in an epoch over the prompts; the few that are left over wait for the next
        order = torch.randperm(len(prompts), generator=generator(cfg.seed, iteration - place)).tolist()  # one an epoch
        batch = [prompts[i] for i in order[place * cfg.episodes:(place + 1) * cfg.episodes]]
        rollout, metrics = collect(policy, ref, reward, value, batch, controller.coef, cfg, enc.end, autocast, sampling)
        log.add(**metrics)
        guard(metrics["kl"].item(), streak, cfg.kl_ceiling, log)
        lr = learning_rate(iteration, cfg.iterations, cfg.lr, schedule="linear")
        update(policy, value, optimizer, rollout, lr, cfg, autocast, log, generator(cfg.seed, iteration, 1))
        show = iteration == 0 or (iteration + 1) % cfg.sample_every == 0
        line = log.write(iteration=iteration + 1, episodes=(iteration + 1) * cfg.episodes, kl_coef=controller.coef,
                         lr=lr, seconds=round(stage.seconds(), 1),
                         **({"sample": one_response(enc, rollout, iteration)} if show else {}))
        controller.update(line["kl"], cfg.episodes)
        bar.set_postfix_str("score {score:.2f}, kl {kl:.2f}, length {length:.1f}".format(**line))
        if show:
            say("iteration {iteration}/{of} score {score:.2f} kl {kl:.2f} kl_coef {kl_coef:.3f} entropy {entropy:.2f} "
                "length {length:.1f} EOS {eos_rate:.2f} clip {clip_fraction:.3f} value loss {value_loss:.3f}, "
                "{seconds} s".format(of=cfg.iterations, **line))
            say("  [{prompt!r}]{response!r} score {score:.2f} kl {kl:.1f}".format(**line["sample"]))
        if (iteration + 1) % every == 0:
            save_checkpoint(stage.folder / "snapshots" / f"{iteration + 1:05d}", policy, cfg, vocab)
        stage.keep(iteration + 1)
    stage.save(policy, vocab)
    stage.finish()

if __name__ == "__main__":
    run(main, Config, PRESETS)
