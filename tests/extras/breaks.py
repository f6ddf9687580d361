"""Classic bugs put into small runs on purpose: does the doctor see them?

    python tests/extras/breaks.py                  prints the rows of the table in results/faults.md

Each is a patch of one function or of a flag, for a run of seconds on small models, whose healthy runs learn.
"""
import contextlib
import copy
import functools
import io
import random
import sys
import tempfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.nn.functional import normalize

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import common, data, dpo, ppo, reward, sft  # noqa: E401, E402
from conftest import SENTENCES  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from prepare.reviews import save_ranks, train_bpe  # noqa: E402
from sampling import sample_many  # noqa: E402
from tools import doctor  # noqa: E402


def small_policy(enc):
    """A random model made to write letters and spaces, and EOS as often as responses of some ten tokens need."""
    torch.manual_seed(1)
    policy = GPT(GPTConfig(enc.n_vocab, block_size=64, n_layer=1, n_head=2, width=32))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(4)
        texts = {i: enc.decode_single_token_bytes(i) for i in range(enc.n_vocab - 1)}
        plain = [i for i, text in texts.items() if text.isalpha() and text.islower() or text == b" "]
        direction, embedding = normalize(torch.randn(32), dim=0), policy.trunk.token_embedding.weight
        policy.trunk.norm.bias.add_(6 * direction)
        embedding.sub_(2 * direction)
        embedding[plain] += 2 * direction
        embedding[enc.end] += 2.1 * direction
    return policy


def world(folder):
    """{stage: its configuration} of a whole small set-up: an SFT model, rankings of its samples (vowels are good), a
    reward model trained on them, demonstrations and prompts."""
    vocab, prompts, start, rows, demos, held_out = (str(folder / name) for name in (
        "vocab.tiktoken", "prompts.jsonl", "sft", "rankings.jsonl", "demos.jsonl", "held_out.jsonl"))
    save_ranks(train_bpe(SENTENCES * 2, 270), vocab)
    enc = data.load_tokenizer(vocab)
    policy, end = small_policy(enc), enc.end
    common.save_checkpoint(start, policy, ppo.Config(), vocab)
    texts = [" ".join(sentence.split()[:n]) for sentence in SENTENCES for n in range(1, 9)] * 24
    data.write_jsonl(prompts, [{"prompt": text} for text in texts])
    ids = [data.encode_prompt(enc, text, 32) for text in texts for _ in range(4)]
    sampled = [enc.decode(response[:-1] if response[-1] == end else response)
               for response in sample_many(policy, ids, 12, end, random=torch.Generator().manual_seed(1))]
    ranked = []
    for i, text in enumerate(texts):
        usable = {x for x in sampled[4 * i:4 * i + 4] if x.strip() and x.isascii() and x.isprintable()}
        by_vowels = sorted(usable, key=lambda x: (-sum(map(x.count, "aeiou")) / len(x), x))
        ranked.append({"prompt": text, "responses": by_vowels})
    data.write_jsonl(rows, [row for row in ranked if len(row["responses"]) > 1])
    best = [{"prompt": row["prompt"], "completion": row["responses"][0]} for row in ranked if row["responses"]]
    data.write_jsonl(demos, best[:40])
    data.write_jsonl(held_out, best[40:80])
    small = {"device": "cpu", "dtype": "float32"}
    sampling = {"sft": start, "prompts": prompts, "response_tokens": 12, "temperature": 1.0, **small}
    configs = {
        "reward": reward.Config(out=str(folder / "reward"), model=start, train=rows, pairs="", epochs=2, lr=3e-3,
                                dropout=0.0, samples=256, log_every=10, **sampling),
        "ppo": ppo.Config(reward=str(folder / "reward"), iterations=12, episodes=96, microbatch=96, lr=1e-3,
                          kl_horizon=300.0, missing_eos_score=float("nan"), snapshots=1, **sampling),
        "dpo": dpo.Config(model=start, train=rows, epochs=2, **small),
        "sft": sft.Config(model=start, train=demos, valid=held_out, epochs=2.0, evals=4, dropout=0.0, batch_size=8,
                          **small)}
    with contextlib.redirect_stdout(io.StringIO()):
        reward.main(configs["reward"])
    return configs


# patch: {name in the stage's module: what takes its place}; expected: what the doctor must say first.
Break = namedtuple("Break", "bug expected patch flags stage", defaults=[{}, {}, "ppo"])

# What the patches call: the functions as they are.
forward, load_model, sample_prompts, policy_loss, shape_rewards, token_logprobs = (
    ppo.forward, ppo.load_model, ppo.sample_prompts, ppo.policy_loss, ppo.shape_rewards, ppo.token_logprobs)
group_advantages, read_rankings, ranking_loss = ppo.group_advantages, reward.read_rankings, reward.ranking_loss
dpo_loss, response_logprobs = dpo.dpo_loss, dpo.response_logprobs
first_weights, loaded = functools.cache(copy.deepcopy), {}  # a model as it was at the first call; {folder: model}


def shifted(policy, value, batch, temperature):
    logits, _, values = forward(policy, value, batch, temperature)
    logits = logits.roll(1, dims=1)  # those one position late
    return logits, token_logprobs(logits, batch["tokens"][:, -1 - batch["mask"].size(1):], temperature), values


def too_kind(*args, **how):
    model = load_model(*args, **how)
    if "reward" in args and not how:  # not the value model, which starts from the same weights
        model.bias.add_(2.0)
    return model


def shared(folder, *args, **how):
    """The policy again when the reference is loaded; other models as they are."""
    model = load_model(folder, *args, **how)
    return model if "reward" in args else loaded.setdefault(folder, model)


def across(returns, K, kind):
    """Groups of rows that are N / K apart, as if the prompts of a rollout were repeated one after another."""
    return group_advantages(returns.view(K, -1).T.flatten(), K, kind).view(-1, K).T.flatten()


def with_itself(returns, K, kind):
    return (returns.view(-1, K) - returns.view(-1, K).mean(1, keepdim=True)).flatten()


def of_the_rollout(returns, K, kind):
    return group_advantages(returns, len(returns), kind)


def of_another_model(*args, **how):
    """Log-probabilities without a gradient, those of the reference, as another model would give them."""
    sums = response_logprobs(*args, **how)
    return sums if torch.is_grad_enabled() else [x * (1 + torch.rand(len(x))) for x in sums]


class Backwards(ppo.AdaptiveKL):
    def update(self, kl, episodes):
        super().update(2 * self.target - kl, episodes)


BREAKS = [
    Break("log-probabilities shifted by one", "sampler differs", {"forward": shifted}),
    Break("left padding attended to and counted in the positions", "sampler differs", {
        "forward": lambda policy, value, batch, _: forward(policy, value, batch | {"pad": 0 * batch["pad"]}, _)}),
    Break("logits not divided by the temperature", "sampler differs",
          {"token_logprobs": lambda logits, tokens, _=1.0: token_logprobs(logits, tokens)}, {"temperature": 0.7}),
    Break("padding after EOS counted (mask of ones)", "sampler differs",
          {"length_mask": lambda lengths, size: torch.ones(len(lengths), size)}),
    Break("dropout left on", "first ratio",
          {"load_model": lambda *args, **how: load_model(*args, **{**how, "dropout": 0.1}).train()}),
    Break("responses sampled with stale weights", "negative KL", {
        "sample_prompts": lambda model, *args, **how: sample_prompts(first_weights(model), *args, **how)}),
    Break("KL penalty with the wrong sign", "rewards do not add up",
          {"shape_rewards": lambda scores, own, ref, mask, coef: shape_rewards(scores, own, ref, mask, -coef)}),
    Break("score on every token", "rewards do not add up",
          {"shape_rewards": lambda scores, own, ref, mask, coef: (scores[:, None] - coef * (own - ref)) * mask}),
    Break("KL controller backwards", "wrong way", {"AdaptiveKL": Backwards}),
    Break("reference trained along with the policy", "KL stays at 0", {"load_model": shared}),
    Break("advantages with the wrong sign", "KL runs away",
          {"policy_loss": lambda own, old, advantages, mask, clip: policy_loss(own, old, -advantages, mask, clip)}),
    Break("old log-probabilities taken from the current pass", "KL runs away",
          {"policy_loss": lambda own, old, *rest: policy_loss(own, own.detach(), *rest)}),
    Break("learning rate 30 times too high", "KL runs away", flags={"lr": 0.03}),
    Break("learning rate 1,000 times too low", "flat score", flags={"lr": 1e-6}),
    Break("KL coefficient 250 times too high", "gradient far above the clip",
          flags={"kl_coef": 50.0, "kl_horizon": 0.0}),
    Break("no KL penalty", "KL runs away", flags={"kl_coef": 0.0, "kl_horizon": 0.0, "lr": 4e-3}),
    Break("reward model normalised on other samples", "first scores off", {"load_model": too_kind}),
    *(Break(f"{kind.upper()}: {bug}", "group baseline off", {"group_advantages": patch},
            {"advantages": kind, "iterations": 4}) for bug, patch, kinds in (
        ("groups of responses to different prompts", across, "rloo grpo"),
        ("baseline with the response itself in it", with_itself, "rloo"),
        ("baseline of the whole rollout", of_the_rollout, "rloo grpo")) for kind in kinds.split()),
    Break("reward model untrained", "gradient far above the clip", flags={"lr": 1e-9}, stage="reward"),
    Break("rankings in no order", "near chance", {
        "read_rankings": lambda path: [{**row, "responses": random.Random(i).sample(texts, len(texts))}
                                       for i, row in enumerate(read_rankings(path)) for texts in [row["responses"]]]},
          {"test_share": 0.3}, stage="reward"),
    Break("ranking loss reversed", "near chance", {"ranking_loss": lambda scores, mask: ranking_loss(-scores, mask)},
          stage="reward"),
    Break("reward model trained far too long", "memorised", flags={"epochs": 15}, stage="reward"),
    Break("DPO with chosen and rejected swapped", "near chance",
          {"dpo_loss": lambda a, b, ref_a, ref_b, *rest: dpo_loss(b, a, ref_b, ref_a, *rest)}, stage="dpo"),
    Break("DPO against another model than its start", "margins not 0 at first",
          {"response_logprobs": of_another_model}, stage="dpo"),
    Break("DPO with a beta 10 times too small", "chosen falls", flags={"beta": 0.01, "lr": 3e-3}, stage="dpo"),
    Break("SFT on few demonstrations for long", "overfit", flags={"epochs": 60.0}, stage="sft"),
]


def run(cfg, broken):
    """Findings of the doctor after a run with the bug: {symptom: what was seen}."""
    module = {"ppo": ppo, "reward": reward, "dpo": dpo, "sft": sft}[broken.stage]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for name, substitute in broken.patch.items():
            stack.enter_context(mock.patch.object(module, name, substitute))
        try:
            module.main(replace(cfg, **broken.flags))
        except common.UserError as error:  # a guard, which writes the reason into the log
            assert error.code == 1, error
    record, = doctor.records(cfg.out)
    return {name: seen for name, seen, _ in doctor.examine(record)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        configs = world(Path(folder))
        kinds = [*((stage, "", {}) for stage in configs),
                 *(("ppo", f"{kind.upper()}, ", {"advantages": kind}) for kind in ("rloo", "grpo"))]
        healthy = [Break(f"none, {name}seed {seed}", "", flags={"seed": seed, **flags}, stage=stage)
                   for stage, name, flags in kinds for seed in range(1, 6)]
        for number, broken in enumerate([*healthy, *BREAKS]):
            found = run(replace(configs[broken.stage], out=f"{folder}/run{number}"), broken)
            print(f"| {broken.bug} | {broken.stage} | {', '.join(found) or 'healthy'} |", flush=True)
