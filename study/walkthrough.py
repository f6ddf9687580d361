"""docs/walkthrough.md: one prompt followed through the whole of RLHF, with the numbers of a real run.

    python docs/record.py out/tiny      walkthrough.json: what the models of a run of train_all.sh say
    python docs/walkthrough.py          walkthrough.md and its figures, from walkthrough.json alone

What is recorded is raw: tokens, log-probabilities, values, scores, rounded. What follows from them (rewards,
advantages, ratios, losses) the page works out with the functions that train, so a test can write it again.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).parents[1]))
from arithmetic import b, by_hand, controller_step, derive, f, quoted, table, wrapped  # noqa: E402
from checkpoint import write_atomic  # noqa: E402
from common import UserError, run  # noqa: E402
from data import read_text  # noqa: E402
from figures import draw_alignment, draw_pipeline  # noqa: E402
from reward import ranking_loss  # noqa: E402
from runs import open_folder  # noqa: E402


@dataclass
class Config:
    numbers: str = "docs/walkthrough.json"  # file with the numbers
    out: str = "docs"                       # folder for the page and its figures


def page_text(found):
    """walkthrough.md, in full."""
    d, r, flags, rollout = derive(found), found["response"], found["flags"], found["rollout"]
    prompt, demo, ranking, log, after = (found[name] for name in ("prompt", "demonstration", "ranking", "log", "after"))
    n, P, clip, tokens = len(d.kl), rollout["columns"], flags["clip"], [quoted(text) for text in r["tokens"]]
    counted = [-x for x in demo["logprobs"][demo["prompt_length"] - 1:]]
    scores = torch.tensor(ranking["reward"], dtype=torch.float64)
    pairs = [(i, j, scores[i] - scores[j]) for i in range(len(scores)) for j in range(i + 1, len(scores))]
    larger = ["clipped" if d.clipped[t] > d.plain[t] else "plain" if d.clipped[t] < d.plain[t] else "equal"
              for t in range(n)]
    bound = ", ".join(f"t = {t} ({tokens[t]})" for t in range(n) if larger[t] == "clipped") or "no token here"
    against = sum((d.ratio[t] - 1) * d.white[t] < 0 for t in range(n))
    moved = [new - old for new, old in zip(r["new_values"], r["values"])]
    v = max(range(n), key=lambda t: abs(moved[t]))  # the value that moved most
    new, near = r["new_values"][v], r["values"][v] + min(max(moved[v], -flags["value_clip"]), flags["value_clip"])
    difference = max(abs(x - y) for x, y in zip(r["sampler_logprobs"], r["old_logprobs"]))
    hand = "\n\n".join(by_hand(found, d, t) for t in reversed(range(max(0, n - 5), n)))
    return wrapped(f"""
# One prompt through the whole of RLHF

Reinforcement learning from human feedback (RLHF) makes a language model write what people prefer. A base model can
continue any text. Demonstrations teach it to respond (SFT). Rankings of its responses train a second model to score
responses as people would. Then the first model is changed, a little at a time, so that its responses score higher, and
it pays a price for leaving what it was (PPO).

This page follows one prompt through all of that: `{prompt["text"]}`, the opening of a film review. You need to know
PyTorch, and nothing of RLHF. The numbers are those of a real run, `bash train_all.sh` with seed {flags["seed"]}.
`python docs/record.py out/tiny` asked the models of that run and wrote down tokens, log-probabilities,
values and scores: [walkthrough.json](walkthrough.json). `python docs/walkthrough.py` works out the rest from that
file and prints every number below, with the functions that train, whose names stand first in each section. Numbers have
four decimals, products of them in sections 10 and 11 three, `kl_coef` six. Calculate with the digits that you see, and
you get what you see, or one off in the last digit.

![the stages of train_all.sh and what they hand on](pipeline.png)

*The stages of `train_all.sh` and their scripts. A blue stage trains a model, which starts from the weights that are
named; a green one trains nothing. The arrows show the main inputs. This page is about the middle row, where PPO is.
dpo is another
way to train on rankings; the judge only examines.*

## 1. Tokens

[`data.py: encode_prompt`] A tokenizer cuts text into tokens, each with a number, its id. Most tokens begin with the
space that stands before them. Every prompt begins with end of text: this token stands between two documents of the base
model's training text, so it says that a text starts here.

{table("position | id | token", [(i, prompt["ids"][i], quoted(text)) for i, text in enumerate(prompt["tokens"])])}

At each position the model gives logits; their softmax is its probability of every possible next token. Most of this
page is about logarithms of such probabilities, in nats (natural logarithm): -0.69 is one half, -2.30 a tenth, -6.91 a
thousandth.

## 2. SFT: only the response counts

[`sft.py: response_rows`, `row_logprobs`] Supervised fine-tuning (SFT) is next-token prediction on demonstrations:
sentences that people wrote, cut into prompt and response. (No two stages share a prompt: this is not ours.) The loss is
minus the log-probability of a token given all before it, averaged where the mask is 1. The prompt has mask 0: the model
is not to learn to write prompts. End of text has 1: the model is to learn to stop. The log-probabilities are those of
the SFT model after its training, at temperature 1 (PPO's are at another one, section 6).

{table("position | token | mask | log-probability", [
    (i, quoted(text), int(i >= demo["prompt_length"]), demo["logprobs"][i - 1] if i else "-")
    for i, text in enumerate(demo["tokens"])])}

Loss: ({" + ".join(map(f, counted))}) / {len(counted)} = {f(sum(counted) / len(counted))} nats per token.

## 3. Responses, ranked

[`label.py: draw_responses`, `noisy_order`] The SFT model responds to our prompt {len(scores)} times. Each next token is
drawn from the softmax of the logits divided by {ranking["temperature"]:g}; such a temperature below 1 makes likely
tokens likelier. Then the responses are ordered from best to worst. You could do that. In `train_all.sh` a stand-in
does, the labeler: a model that learned from people's ratings of other sentences. It orders by its scores with some
noise added (not in the table), because people do not always agree.

{table("place | response | labeler's score | reward model's score", [
    (i + 1, quoted(text), ranking["labeler"][i], ranking["reward"][i]) for i, text in enumerate(ranking["responses"])])}

(In the run this was done with other prompts, and the reward model learned from those rankings. `record.py` did the same
with ours, by the same models and functions.)

## 4. The reward model's loss

[`reward.py: ranking_loss`] The reward model reads a prompt with a response and gives one number, the score. In each
pair of a ranking the better response should have the higher score. The margin is the better one's score minus the worse
one's; sigmoid(margin) is taken as the probability that a person agrees with the order; the loss is minus its logarithm.

{table("better | worse | margin | sigmoid(margin) | loss", [
    (i + 1, j + 1, margin.item(), margin.sigmoid().item(), -logsigmoid(margin).item()) for i, j, margin in pairs])}

The loss of the ranking is the mean, {f(ranking_loss(scores[None], torch.ones_like(scores)[None]).item())}; with equal
scores it would be ln 2 = 0.6931. These are scores of the finished model, which were shifted and scaled so that those of
the SFT model's responses have mean 0 and standard deviation 1; in training the same formula is applied before that.

## 5. The rollout: which logits predict which token

[`ppo.py: collect`, `forward`] PPO (proximal policy optimisation) has four models. The **policy** writes and is trained;
it starts as the SFT model. The **reference** is the SFT model and stays so. The **reward model** stays, too. The
**value model** is trained to foresee rewards; it starts as the reward model. In each iteration the policy responds to
{flags["episodes"]} prompts: a rollout. Ours is in iteration {rollout["iteration"]}, where the policy is no longer the
SFT model. The response is {quoted("".join(text or "" for text in r["tokens"]))}, one token per column below.
(`record.py` chose it, as it is short and shows much: a large KL, a clipped ratio.)

![one row of the rollout, and what is read in which column](alignment.png)

*One row of the rollout. Grey: padding; blue: prompt; green: response. An arrow goes from the column where logits are
read
to the token that they predict. Red: read in this column, about the next token (the first value is `value[0]`); black:
of
the token in this column.*

All prompts of a rollout end in the same column: shorter ones are padded on the left, ours with {rollout["pad"]} tokens,
to P = {P} columns. No token attends to padding, and positions count from the first real token. Response token t stands
in column `P + t`. The logits that predict it are read one column earlier, at `P - 1 + t`, where the model has seen all
before the token, but not the token. Its value is read there, too: it is that of the state before the token. In code,
`tokens[:, :-1]` goes in, the outputs at `[:, P - 1:]` are read, and `tokens[:, P:]` is predicted. The score is one
number for the
whole response, read in the column of its last token (`model.py: ScalarModel`). What follows is padding, with mask 0.

## 6. Log-probabilities and KL

[`model.py: token_logprobs`] `old` is the log-probability of a response token under the policy that wrote it, `ref` that
under the reference, both with logits divided by the temperature, {flags["temperature"]:g}. `kl` is `old - ref`.

{table("t | token | old | ref | kl", [
    (t, tokens[t], r["old_logprobs"][t], r["ref_logprobs"][t], d.kl[t]) for t in range(n)])}

The KL of the response is the sum, {f(sum(d.kl))} nats. A token's can be negative ({sum(x < 0 for x in d.kl)} of {n}
here): the policy likes it less than the reference does. Averaged over what the policy writes it estimates the
Kullback-Leibler divergence, which is never negative; over the {flags["episodes"]} responses of this rollout it is
{f(rollout["kl"])} nats per response. `old` is from a forward pass like those of the update, not from the sampler (the
two differ by at most {f(difference)} here), so that the ratio in section 10 begins at 1.

## 7. Rewards per token

[`ppo.py: shape_rewards`] The score of the response is {f(r["score"])}. (A response without end of text gets
{flags["no_end_score"]:g} in its place{"" if r["ended"] else ", as here"}.) Every token pays `kl_coef` times its kl:
without that the policy would go wherever the reward model errs in its favour. In this iteration `kl_coef` is
{r["kl_coef"]:.6f}. The last token gets the score on top:

```
reward[0] = -{r["kl_coef"]:.6f} * {b(d.kl[0])} = {f(d.rewards[0])}
reward[{n - 1}] = -{r["kl_coef"]:.6f} * {b(d.kl[-1])} + {b(d.score)} = {f(d.rewards[-1])}
```

## 8. Advantages by hand

[`ppo.py: gae`] `value[t]` is what the value model, before token t, expects the rewards from t to the end to sum to.
`delta[t]` says how much better it went with token t: its reward, plus what is expected after it, minus what was
expected before it. After the last token nothing follows, so 0 is expected. The advantage also adds the later
deltas, since this token led to them, each multiplied by `gamma * lam` once for every step between. The return is what
the value model should
have said, and learns to say.

```
delta[t]     = reward[t] + gamma * value[t + 1] - value[t]        gamma = {flags["gamma"]:g}
advantage[t] = delta[t] + gamma * lam * advantage[t + 1]          lam = {flags["lam"]:g}
return[t]    = advantage[t] + value[t]
```

{table("t | token | reward | value | delta | advantage | return", [(t, tokens[t], d.rewards[t], r["values"][t],
    d.deltas[t], d.advantages[t], d.returns[t]) for t in range(n)])}

From the last token backwards{" (the rest is left to you)" if n > 5 else ""}:

```
{hand}
```

Early in a run values jump from token to token: the value model starts as the reward model, which has seen finished
texts only. `lam` is a compromise. At 0 an advantage is its delta alone, and wrong values mislead the policy. At 1 all
values but `value[t]` cancel, and the luck of every later token counts in full.

## 9. Whitening

[`ppo.py: whiten`] The advantages of all {rollout["all_tokens"]:,} response tokens of the rollout have mean
{f(rollout["advantage_mean"])} and standard deviation {f(rollout["advantage_std"])} (divided by n, not n - 1). The mean
is subtracted, and the
result divided by the standard deviation, so that the policy's loss has the same scale whatever that of the scores.
This is A,
the advantage that the policy learns from. Returns stay as they are. For the first token:

```
A[0] = ({f(d.advantages[0])} - {b(rollout["advantage_mean"])}) / {f(rollout["advantage_std"])} = {f(d.white[0])}
```

## 10. The update: ratio and clip

[`ppo.py: update`, `policy_loss`] The update goes through the rollout {flags["epochs"]} times, with one optimizer step
each time. `new` is the log-probability of a token under the policy as it is by then, and its ratio is `exp(new - old)`:
1 in the first pass, everywhere. The loss of a token is the larger of two, plain `-A * ratio` and clipped `-A *
clamp(ratio, {1 - clip:g}, {1 + clip:g})`. In the last pass, after {flags["epochs"] - 1} of the {flags["epochs"]} steps:

{table("t | token | A | old | new | ratio | plain | clipped | larger | gradient", [
    (t, tokens[t], d.white[t], r["old_logprobs"][t], r["new_logprobs"][t], d.ratio[t], f(d.plain[t], 3),
     f(d.clipped[t], 3), larger[t], f(d.gradient[t], 3)) for t in range(n)])}

The gradient is the derivative of the token's loss with respect to `new`. The derivative of the ratio is the ratio
itself, so that of the plain loss is the plain loss. Where clipped is larger, `new` has no part in the loss
and the gradient is 0: the token has moved far enough. So it is for {bound}. All cases:

{table("ratio | A above 0: more of this token | A below 0: less of it", [
    (f"below {1 - clip:g}", "plain is larger: it went the wrong way", "clipped is larger: far enough, no gradient"),
    ("between", "equal, with a gradient", "equal, with a gradient"),
    (f"above {1 + clip:g}", "clipped is larger: far enough, no gradient", "plain is larger: it went the wrong way")])}

{against} of the {n} ratios moved against their A: a step serves all {rollout["all_tokens"]:,} tokens together. The
policy's loss is the mean of the larger ones over all of these; over our {n} it is {f(d.loss, 3)}, with {d.binds} of {n}
clipped.

## 11. The value loss

[`ppo.py: value_loss`] The value model learns the returns by half the squared error, which has a clip of its own. A
value that has moved more than {flags["value_clip"]:g} since the rollout is also taken as if it had moved by just that,
and the larger error counts. In the last pass, for t = {v}, whose value has moved most:

```
moved   = {f(new)} - {b(r["values"][v])} = {f(moved[v])}: the value within {flags["value_clip"]:g} is {f(near)}
plain   = ({f(new)} - {b(d.returns[v])})^2 = {f((new - d.returns[v]) ** 2, 3)}
clipped = ({f(near)} - {b(d.returns[v])})^2 = {f((near - d.returns[v]) ** 2, 3)}
loss    = 0.5 * the larger = {f(d.value_losses[v], 3)}
```

The mean over all tokens, times {flags["value_coef"]:g} (`value_coef`), is added to the policy's loss.

## 12. The KL controller

[`ppo.py: AdaptiveKL`] After an update `kl_coef` moves, so that the KL of a response comes to {flags["kl_target"]:g}
nats: down if the rollout had less, up if it had more. `kl` is the rollout's mean KL per response, `target` is
{flags["kl_target"]:g}, `episodes` the {flags["episodes"]} responses of a rollout, `horizon` {flags["kl_horizon"]:g}
(`--kl-horizon`; smaller is faster). After our iteration, and late in the run:

```
error   = kl / target - 1, kept between -0.2 and 0.2
kl_coef = kl_coef * (1 + error * episodes / horizon)

{controller_step(log[0], flags)}

{controller_step(log[2], flags)}
```

The log of the run, `ppo/log.jsonl`, has {log[1]["kl_coef"]:.6f} in iteration {log[1]["iteration"]} and
{log[3]["kl_coef"]:.6f} in iteration {log[3]["iteration"]}. For iteration {rollout["iteration"]} it has a mean score of
{f(log[0]["score"])} and a KL of {f(log[0]["kl"])}; `record.py`, which repeats the run up to there, found
{f(rollout["score"])} and {f(rollout["kl"])}.

## 13. What became of it

The rollout of the last iteration, number {log[3]["iteration"]}, has a mean score of {f(log[3]["score"])} and a KL of
{f(log[3]["kl"])} nats per response. The finished policy's responses to our prompt, drawn like those of section 3:

{table("response | reward model's score", [
    (quoted(text), score) for text, score in zip(after["responses"], after["reward"])])}
""")


def main(cfg):
    """Write the page and its figures from the numbers alone."""
    try:
        found = json.loads(read_text(cfg.numbers))
        text, d = page_text(found), derive(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{cfg.numbers}: damaged, or not what docs/record.py writes") from None
    out = open_folder(cfg.out)
    draw_pipeline(out / "pipeline.png")
    draw_alignment(found, d, out / "alignment.png")
    write_atomic(out / "walkthrough.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"{out}: walkthrough.md, pipeline.png, alignment.png")


if __name__ == "__main__":
    run(main, Config)
