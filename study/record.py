"""The numbers of docs/walkthrough.md: what the models of a finished run of train_all.sh say about one prompt.

    python docs/record.py out/tiny      writes docs/walkthrough.json; then: python docs/walkthrough.py

What is recorded is raw: tokens, log-probabilities, values, scores, rounded. What follows from them the page works out.
"""
import json
import re
import sys
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import label  # noqa: E402
import ppo  # noqa: E402
from arithmetic import derive  # noqa: E402
from checkpoint import digest, write_atomic  # noqa: E402
from common import adamw, check, generator, learning_rate, run, set_up  # noqa: E402
from data import encode_prompt, load_tokenizer, parse, read_jsonl, read_text  # noqa: E402
from model import load_model, prompt_room, score_many, token_logprobs  # noqa: E402
from reward import encode_rankings  # noqa: E402
from runs import Log  # noqa: E402
from sft import response_rows  # noqa: E402
from terminal import words_for  # noqa: E402


@dataclass
class Config:
    run: str = "out/tiny"               # folder of a finished run of train_all.sh
    iteration: int = 2                  # the iteration of PPO whose rollout and update are shown
    out: str = "docs/walkthrough.json"  # file for the numbers


def read_run(folder):
    """{stage: its flags} of a finished run; UserError if a stage is missing, or if PPO had other models or prompts."""
    configs = {}
    for stage in ("sft", "labeler", "samples", "label", "reward", "ppo"):
        check((folder / stage / "done.json").is_file(),
              f"{folder}: no finished run of train_all.sh (tiny, smoke, gpt2): {stage}/done.json is missing")
        configs[stage] = json.loads(read_text(folder / stage / "config.json"))
    flags = {stage: config["stage"] for stage, config in configs.items()}
    for name, path in {"sft": folder / "sft/model.pt", "reward": folder / "reward/model.pt",
                       "prompts": Path(flags["ppo"]["prompts"])}.items():
        check(path.is_file() and configs["ppo"]["inputs"][name] == f"sha256 {digest(path)}",
              f"{path}: missing, or not what {folder}/ppo was trained with")
    return flags


def replay(folder, cfg, iteration, enc):
    """The first iterations of a run's PPO once more, as in ppo.main, the last one up to the last pass of its update.

    Returns rollout, metrics, KL coefficient; logprobs and values (B, R) as the last pass of the update finds them.
    """
    device, autocast = set_up(cfg, quiet=True)
    policy, ref = (load_model(folder / "sft", device) for _ in range(2))
    reward, value = (load_model(folder / "reward", device, kind="reward") for _ in range(2))
    room = min(prompt_room(model.config, cfg.response_tokens) for model in (policy, reward))
    prompts = [encode_prompt(enc, row["prompt"], room) for row in read_jsonl(cfg.prompts, {"prompt": str})]
    check(0 < iteration < cfg.iterations and iteration * cfg.episodes <= len(prompts),
          f"--iteration is {iteration}: it must be one before the last, in the first epoch over the prompts")
    check(cfg.epochs > 1 == cfg.minibatches and cfg.value == "separate" and cfg.kl_horizon and cfg.whiten_advantages
          and not cfg.whiten_rewards, f"{folder}/ppo: the page shows several epochs of one minibatch, a separate value "
                                      "model, whitened advantages, plain rewards and a KL coefficient that moves")
    optimizer = adamw([*policy.parameters(), *value.parameters()], cfg.lr, weight_decay=0.0, eps=cfg.adam_eps)
    controller = ppo.AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    sampling = torch.Generator(device).manual_seed(cfg.seed)
    order = torch.randperm(len(prompts), generator=generator(cfg.seed, 0)).tolist()
    with tempfile.TemporaryDirectory() as nowhere:
        for i in range(iteration):
            batch = [prompts[j] for j in order[i * cfg.episodes:(i + 1) * cfg.episodes]]
            rollout, metrics = ppo.collect(policy, ref, reward, value, batch, controller.coef, cfg, enc.eot_token,
                                           autocast, sampling)
            coef, last = controller.coef, i + 1 == iteration
            ppo.update(policy, value, optimizer, rollout, learning_rate(i, cfg.iterations, cfg.lr, schedule="linear"),
                       replace(cfg, epochs=cfg.epochs - last), autocast, Log(nowhere), generator(cfg.seed, i, 1))
            controller.update(float(metrics["kl"]), cfg.episodes)
    logprobs, values = torch.zeros_like(rollout["mask"]), torch.zeros_like(rollout["mask"])
    for start in range(0, cfg.episodes, cfg.microbatch):  # the rows together that update has together
        part = ppo.select(rollout, slice(start, start + cfg.microbatch))
        with torch.no_grad(), autocast():
            _, *found = ppo.forward(policy, value, part, cfg.temperature)
        for kept, x in zip((logprobs, values), found):
            kept[start:start + cfg.microbatch, :x.size(1)] = x * part["mask"]
    return rollout, metrics, coef, logprobs, values


def choose(rollout, logprobs, clip, ended):
    """The row to show: one of 5 to 8 tokens that ended, where the clip binds for some tokens but not for all, and with
    a token that the policy likes clearly less than the SFT model does; of these the one with the largest KL."""
    ratio = ((logprobs - rollout["old_logprobs"]) * rollout["mask"]).exp()
    binds = (rollout["advantages"] * (ratio - ratio.clamp(1 - clip, 1 + clip)) > 0).sum(1)  # (B,)
    kl = (rollout["old_logprobs"] - rollout["ref_logprobs"]) * rollout["mask"]
    n = rollout["lengths"].to(kl.device)
    merit = zip(ended & (n >= 5) & (n <= 8), (binds > 0) & (binds < n), kl.amin(1) < -0.05, kl.sum(1))
    return max(enumerate(merit), key=lambda row: [x.item() for x in row[1]])[0]


def numbers(x, digits=4):
    """A tensor or a number as rounded floats for JSON."""
    x = torch.as_tensor(x).double()
    return [round(value, digits) for value in x.tolist()] if x.dim() else round(x.item(), digits)


def main(cfg):
    """Write the raw numbers of a run to cfg.out."""
    folder = Path(cfg.run)
    flags, enc = read_run(folder), load_tokenizer(folder / "sft")

    def text_of(ids):  # of each token; None for end of text
        return [None if i == enc.eot_token else enc.decode([i]) for i in ids]
    settings = ppo.Config(**flags["ppo"])
    rollout, metrics, coef, logprobs, values = replay(folder, settings, cfg.iteration, enc)
    mask, lengths, P = rollout["mask"], rollout["lengths"].to(rollout["mask"].device), ppo.prompt_columns(rollout)
    ended = rollout["tokens"].gather(1, P + lengths[:, None] - 1).squeeze(1) == enc.eot_token
    row = choose(rollout, logprobs, settings.clip, ended)
    n, pad = int(lengths[row]), int(rollout["pad"][row])
    _, prompt, ids, _ = rollout["tokens"][row].split([pad, P - pad, n, mask.size(1) - n])
    prompt, ids, text = prompt.tolist(), ids.tolist(), enc.decode(prompt[1:].tolist())
    plain = rollout["returns"] - rollout["values"]  # advantages before they are whitened
    mean = ppo.masked_mean(plain, mask)
    log = [parse(line) for line in read_text(folder / "ppo" / "log.jsonl").splitlines()]
    log = [{key: line[key] for key in ("iteration", "score", "kl", "kl_coef")} for line in log]

    device, autocast = set_up(settings, quiet=True)
    sft, policy = (load_model(folder / stage, device) for stage in ("sft", "ppo"))
    labeler, reward = (load_model(folder / stage, device, kind="reward") for stage in ("labeler", "reward"))
    draw, block, temperature = label.SampleConfig(**flags["samples"]), sft.config.block_size, json.loads(
        read_text(folder / "label" / "done.json"))["temperature"]

    def score(model, texts):
        return score_many(model, encode_rankings(enc, [{"prompt": text, "responses": texts}], block)[0])
    demo, first = min(response_rows(enc, flags["sft"]["train"], block),  # a short one
                      key=lambda one: abs(len(one[0]) - 11) + abs(one[1] - 5))
    demo_tokens = torch.tensor([demo], device=device)
    with torch.no_grad(), autocast():
        demo_logprobs = token_logprobs(sft(demo_tokens), demo_tokens)[0]
        drawn, after = (label.draw_responses(model, enc, [text], draw, autocast)[0][0] for model in (sft, policy))
        check(len(drawn) > 1, f"the SFT model has no two different responses to {text!r}: nothing to rank")
        luck = generator(flags["label"]["seed"], zlib.crc32(label.sample_id(text, drawn).encode()))
        ranked = [drawn[i] for i in label.noisy_order(score(labeler, drawn), temperature, luck)]
        ranking = {"responses": ranked, "labeler": numbers(score(labeler, ranked)),
                   "reward": numbers(score(reward, ranked)), "temperature": draw.temperature}
        after = {"responses": after, "reward": numbers(score(reward, after)) if after else []}
    found = {
        "prompt": {"text": text, "ids": prompt, "tokens": text_of(prompt)},
        "demonstration": {"tokens": text_of(demo), "prompt_length": first, "logprobs": numbers(demo_logprobs)},
        "ranking": ranking,
        "rollout": {"iteration": cfg.iteration, "columns": P, "pad": pad, "all_tokens": int(lengths.sum()),
                    "score": numbers(metrics["score"], 6), "kl": numbers(metrics["kl"], 6),
                    "advantage_mean": numbers(mean),
                    "advantage_std": numbers((ppo.masked_mean((plain - mean) ** 2, mask) + 1e-8).sqrt())},
        "response": {"ids": ids, "tokens": text_of(ids), "ended": bool(ended[row]),
                     "score": numbers(rollout["scores"][row]), "kl_coef": numbers(coef, 6),
                     **{name: numbers(rollout[name][row, :n]) for name in (
                         "sampler_logprobs", "old_logprobs", "ref_logprobs", "values")},
                     "new_logprobs": numbers(logprobs[row, :n]), "new_values": numbers(values[row, :n])},
        "log": [*log[cfg.iteration - 1:cfg.iteration + 1], *log[-2:]], "after": after,
        "flags": {name: flags["ppo"][name] for name in (
            "seed", "episodes", "iterations", "epochs", "temperature", "clip", "value_clip", "value_coef", "gamma",
            "lam", "kl_target", "kl_horizon", "no_end_score")}}
    lines = json.dumps(found, indent=1, ensure_ascii=False)
    lines = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda part: "[" + re.sub("\n *", " ", part[1]) + "]", lines)
    write_atomic(cfg.out, lambda temporary: temporary.write_text(lines + "\n", encoding="utf-8"))
    error = (torch.tensor(derive(found).white) - rollout["advantages"][row, :n].cpu()).abs().max()
    print(f"{cfg.out}: iteration {cfg.iteration}, {text!r} {enc.decode(ids)!r}")
    print("this iteration: score {score:.6f}, kl {kl:.6f}; ".format(**found["rollout"])
          + "the log of the run: score {score:.6f}, kl {kl:.6f}".format(**found["log"][0]))
    print(f"advantages from the rounded numbers are off the rollout's by {error:.6f} at most")


if __name__ == "__main__":
    words_for("run")
    run(main, Config)
