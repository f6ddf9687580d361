"""The numbers of docs/walkthrough.md: what the models of a finished run of train_all.sh compute for one prompt.

    python -m study.record out/tiny     writes study/walkthrough.json; then: python -m study.walkthrough

What is recorded is raw: tokens, log-probabilities, values, scores, rounded. The page derives the rest.
"""
import json
import re
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

import label
import ppo
from common import set_up, write_atomic
from data import load_tokenizer
from model import load_model, token_logprobs
from reward import encode_rankings, score_many
from sft import response_rows

ITERATION = 2  # of PPO, whose rollout and update are shown
FLAGS = ("seed", "episodes", "epochs", "temperature", "clip", "value_clip", "value_coef", "gamma", "lam", "kl_target",
         "kl_horizon", "missing_eos_score")

class Recorded(Exception):
    """Ends ppo.main when the iteration has been recorded."""

def replay(cfg):
    """Run ppo.main again up to the last pass of an iteration's update. Returns the rollout, and logprobs and values
    (both (B, R)) as that pass finds them."""
    update, rollouts = ppo.update, []

    def recording_update(policy, value, optimizer, rollout, lr, cfg, autocast, *rest):
        rollouts.append(rollout)
        last = len(rollouts) == ITERATION
        update(policy, value, optimizer, rollout, lr, replace(cfg, epochs=cfg.epochs - last), autocast, *rest)
        if last:
            with torch.no_grad(), autocast():
                raise Recorded(rollout, *ppo.forward(policy, value, rollout, cfg.temperature)[-2:])
    with tempfile.TemporaryDirectory() as folder, patch.object(ppo, "update", recording_update):
        try:
            ppo.main(replace(cfg, out=folder))
        except Recorded as recorded:
            return recorded.args

def rounded(x, digits=4):
    """A tensor as rounded floats for JSON."""
    return [round(value, digits) for value in x.tolist()] if x.dim() else round(x.item(), digits)

def main(folder, out="study/walkthrough.json"):
    """Record the finished run in a folder."""
    folder = Path(folder)
    flags = {stage: json.loads((folder / stage / "config.json").read_text())["stage"]
             for stage in ("sft", "samples", "ppo")}
    log = [json.loads(line) for line in (folder / "ppo/log.jsonl").read_text(encoding="utf-8").splitlines()]
    log = [{name: line[name] for name in ("iteration", "score", "kl", "kl_coef")} for line in log]
    settings, enc = ppo.Config(**flags["ppo"]), load_tokenizer(folder / "sft")
    rollout, logprobs, values = replay(settings)

    mask, lengths = rollout["mask"], rollout["lengths"].to(logprobs.device)
    P = rollout["tokens"].size(1) - mask.size(1)
    kl = ((rollout["old_logprobs"] - rollout["ref_logprobs"]) * mask).sum(1)
    ended = rollout["tokens"].gather(1, P + lengths[:, None] - 1).squeeze(1) == enc.end
    row = kl.where(ended & (lengths >= 5) & (lengths <= 8), -1e9).argmax()  # short, and the KL is large
    pad, n, unwhitened = int(rollout["pad"][row]), int(lengths[row]), (rollout["returns"] - rollout["values"])[mask > 0]
    prompt, ids = rollout["tokens"][row, pad:P].tolist(), rollout["tokens"][row, P:P + n].tolist()

    device, autocast = set_up(settings)
    sft, policy = (load_model(folder / stage, device) for stage in ("sft", "ppo"))
    block, text = sft.config.block_size, enc.decode(prompt[1:])
    demo, demo_prompt = min(response_rows(enc, flags["sft"]["train"], block, Counter()),  # a short one
                            key=lambda one: abs(len(one[0]) - 11) + abs(one[1] - 5))

    def tokens(ids):  # the text of each; None for EOS
        return [None if i == enc.end else enc.decode([i]) for i in ids]

    def score(stage, responses):
        texts, = encode_rankings(enc, [{"prompt": text, "responses": responses}], block, Counter())
        return score_many(load_model(folder / stage, device, kind="reward"), texts)
    with torch.no_grad(), autocast():
        demo_ids, draw = torch.tensor([demo], device=device), label.SampleConfig(**flags["samples"])
        demo_logprobs = token_logprobs(sft(demo_ids), demo_ids)[0]
        drawn, after = (label.draw_responses(model, enc, [text], draw, autocast)[0][0] for model in (sft, policy))
        ranked = [drawn[i] for i in score("labeler", drawn).argsort(descending=True)]
        scores = {stage: rounded(score(stage, ranked)) for stage in ("labeler", "reward")}
        after = {"responses": after, "reward": rounded(score("reward", after))}
    found = {
        "prompt": {"text": text, "ids": prompt, "tokens": tokens(prompt)},
        "demonstration": {"tokens": tokens(demo), "prompt_length": demo_prompt, "logprobs": rounded(demo_logprobs)},
        "ranking": {"responses": ranked, **scores, "temperature": draw.temperature},
        "rollout": {"iteration": ITERATION, "columns": P, "pad": pad, "all_tokens": int(lengths.sum()),
                    "score": rounded(rollout["scores"].mean(), 6), "kl": rounded(kl.mean(), 6),
                    "advantage_mean": rounded(unwhitened.mean()),
                    "advantage_std": rounded(unwhitened.std(correction=0))},
        "response": {"ids": ids, "tokens": tokens(ids), "score": rounded(rollout["scores"][row]),
                     "kl_coef": log[ITERATION - 1]["kl_coef"],
                     **{name: rounded(rollout[name][row, :n]) for name in (
                         "sampler_logprobs", "old_logprobs", "ref_logprobs", "values")},
                     "new_logprobs": rounded(logprobs[row, :n]), "new_values": rounded(values[row, :n])},
        "log": log[ITERATION - 1:ITERATION + 1] + log[-2:], "after": after,
        "flags": {name: flags["ppo"][name] for name in FLAGS}}
    lines = json.dumps(found, indent=1, ensure_ascii=False)
    lines = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda part: "[" + re.sub(r"\n *", " ", part[1]) + "]", lines)
    write_atomic(out, lines + "\n")
    print(f"{out}: {text!r} {enc.decode(ids)!r}; this rollout {found['rollout']}, in the log {found['log'][0]}")

if __name__ == "__main__":
    main(*sys.argv[1:])
