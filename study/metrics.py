"""Every number in the logs, what it is, what it was in the committed runs, and when it is a bad sign: docs/metrics.md.

    python docs/metrics.py > docs/metrics.md

Ranges are of the logs of results/tiny (three seeds); limits and advice are those of the doctor (symptoms.py).
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from doctor import committed, span  # noqa: E402
from symptoms import SYMPTOMS  # noqa: E402

ANY = """
seconds: since the start, with those of earlier calls after an interruption
lr: learning rate of the last step
grad_norm: global norm of the gradient before it is clipped, mean of the steps since the last line
"""
STAGES = {  # title: (a stage of that kind in results/tiny, its metrics: what they are)
    "PPO": ("ppo", """
iteration: rollouts so far
episodes: responses so far
score: the reward model's score of a whole response, mean of the rollout; SFT samples to training prompts have mean 0
score_std: its standard deviation in the rollout; SFT samples have 1
rewards: sum of a response's per-token rewards, mean: what PPO maximises. It is score - kl_coef * kl, where a response
    without end of text counts --no-end-score in place of its score
kl: nats per response: sum of logprobs - ref_logprobs over its tokens (k1). Unbiased; single responses are often
    negative, and at the very beginning the mean may be
kl_k3: the same KL, estimated by exp(-x) - 1 + x for x = logprobs - ref_logprobs (k3), which is never negative.
    Unbiased as well: far from `kl`, one of the two is dominated by few tokens
kl_coef: price of one nat in this rollout
entropy: nats per token, of the policy's next-token distribution where it wrote
length: tokens per response, end of text included
end_rate: share of responses that reach end of text. It goes to 1 where a response without it counts --no-end-score;
    a bad sign only if the length collapses, too
distinct: share of the rollout's responses that differ from each other
repetition: share of a response's pairs of neighbouring tokens that it had before, mean
sampler_difference: mean distance, in nats per token, between the sampler's log-probabilities and those of the
    training graph: rounding only
explained_variance: 1 - mean((returns - values)^2) / variance of the returns: 1 is perfect, 0 as good as a constant.
    Below 0 in the first rollouts, as the value model starts as a reward model
first_ratio_error: largest distance of the ratio from 1 before anything was learned from the rollout, mean over
    microbatches: rounding only
policy_loss: the clipped loss; near 0 whatever happens, as advantages have mean 0: no measure of progress
value_loss: half the squared error of the values, clipped
clip_fraction: share of tokens where the clip binds: the clipped loss is the larger one, and the token has no
    gradient. It falls with the learning rate
value_clip_fraction: share of tokens whose clipped value error is the larger one
approx_kl: half the mean squared log-ratio of new to old policy, per token: how far one rollout's updates go
rollout_tokens_per_second: response tokens sampled and scored per second
update_tokens_per_second: response tokens per second of the update, each epoch counted
warnings: doubts of the guard, in words
sample: every tenth iteration: a prompt, its response, score and KL
"""),
    "Reward model": ("reward", """
step: optimizer steps so far
loss: -log sigmoid(better - worse), mean over a prompt's pairs, then over prompts; log 2 = 0.693 is a coin
accuracy: share of training pairs in their order, while it learns them. The held-out figure is in report_card.json
"""),
    "DPO": ("dpo", """
step: optimizer steps so far
loss: -log sigmoid(margin), as above; exactly log 2 before the first step
accuracy: share of training pairs with a margin above 0
margin: chosen_reward - rejected_reward
chosen_reward: beta * (logprobs - ref_logprobs) of the chosen response: its implicit reward
rejected_reward: the same of the rejected one
chosen_logprobs: log-probability of the whole chosen response, in nats. A moderate fall is normal: the loss depends
    only on differences
rejected_logprobs: the same of the rejected one; it should fall more
"""),
    "SFT and base": ("sft", """
step: optimizer steps so far
epoch: passes over the data so far
loss: nats per counted token in training (SFT: of responses only), dropout on
test_loss: the same on held-out text, dropout off; the checkpoint is that of the lowest
tokens_per_second: all tokens, prompts included
"""),
}


def entries(text):
    """{metric: what it is} of lines like "metric: what it is", which go on in indented ones."""
    return dict(line.split(": ", 1) for line in re.sub(r"\n +", " ", text.strip()).splitlines())


def cells(stage, metric):
    """First and last value in the committed runs, in words."""
    values = committed(stage, metric)
    if not values or not all(isinstance(x, (int, float)) for seed in values for x in seed):
        return "| | "
    return f"| {span(seed[0] for seed in values)} | {span(seed[-1] for seed in values)} "


def section(title, stage, metrics):
    """One stage's metrics as a table, then its symptoms."""
    print(f"\n## {title}\n\n| metric | what it is | first line | last line |\n|---|---|---|---|")
    for metric, meaning in {**entries(metrics), **entries(ANY)}.items():
        timed = "second" in metric or metric in ("iteration", "episodes", "step", "epoch", "lr")
        print(f"| `{metric}` | {meaning} {'| | ' if timed else cells(stage, metric)}|")
    print("\n| symptom | shows in | broken when | why it matters | what to try |\n|---|---|---|---|---|")
    for name, symptom in SYMPTOMS.items():
        if symptom.kind in {"reward": ("reward", "label"), "ppo": ("ppo", "any", "evaluate")}.get(stage, (stage,)):
            print(f"| **{name}** | {symptom.metric} | {symptom.limit} | {symptom.why} | {symptom.tries} |")


if __name__ == "__main__":
    print("""# Expected, or broken?

Written by `python docs/metrics.py`. What each number in a stage's `log.jsonl` is, from where to where it went in the
runs of [results/tiny](../results/tiny) (preset tiny, three seeds: the least to the largest of them), and what `python
doctor.py` takes for a bad sign. Which of its findings follow from which bug: [faults.md](faults.md). Runs of another
size have other numbers; what moves in which direction, and the signs of broken code, stay. "First line" and "last
line" are those
of the log. The training graph is the forward pass that has gradients, not the sampler; the guard looks at each rollout
of PPO while it runs (`doctor.py: guard`); the report card is what reward.py leaves in `report_card.json`.""")
    for title, (stage, metrics) in STAGES.items():
        section(title, stage, metrics)
