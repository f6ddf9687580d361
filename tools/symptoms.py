"""What goes wrong in a run of RLHF: where it shows, why it matters, and what to try. examine.py looks for it, doctor.py
says it, and docs/metrics.md has it as a table.

A limit is far outside what healthy runs show (results/tiny: three seeds), and where chance plays a part, outside of
that, too.
"""
from dataclasses import dataclass


@dataclass
class Symptom:
    kind: str    # of stage: sft, reward, label, dpo, ppo, evaluate
    metric: str  # in which it shows, of log.jsonl unless it says otherwise
    limit: str   # when it counts as broken
    why: str     # why it matters, or what lies behind it
    tries: str   # what to try


SYMPTOMS = {
    "stopped": Symptom(
        "any", "stopped", "the log ends with it",
        "a guard or a number that is not finite ended the run",
        "read its message; one of the findings below may be the cause"),

    # PPO: is what is computed right?
    "sampler differs": Symptom(
        "ppo", "sampler_difference", "above 0.05 nats per token",
        "the sampler's log-probabilities and those of the training graph are not of the same model: KL and ratio "
        "are of responses that the policy did not draw",
        "compare both token by token: temperature, positions under left padding, a shift by one, top-k, dropout"),
    "first ratio": Symptom(
        "ppo", "first_ratio_error", "above 0.1 (the guard of a run stops at 0.5)",
        "before the first step of a rollout old and new log-probabilities are of the same weights: the ratio must "
        "be 1 up to rounding",
        "look for dropout, another temperature, a mask or positions that differ between the rollout and the "
        "update; are the weights themselves in bf16?"),
    "negative KL": Symptom(
        "ppo", "kl", "mean below -0.1, four of five rollouts below 0",
        "a KL is never negative; an estimate is by chance, but not again and again: the responses are not draws "
        "of the policy",
        "see `sampler differs`; is the mask 1 up to the end of text and no further? are policy and reference "
        "exchanged?"),
    "rewards do not add up": Symptom(
        "ppo", "rewards",
        "further from score - kl_coef * kl than 1 % and the responses without end of text can explain",
        "the per-token rewards sum to something else: the penalty has the wrong sign or the score is not, or not "
        "only once, in the rewards",
        "compare with `ppo.py: shape_rewards`"),
    "wrong way": Symptom(
        "ppo", "kl_coef", "moves away from the target in half of the rollouts",
        "the coefficient must rise while KL is above its target, and fall while it is below",
        "compare with `ppo.py: AdaptiveKL`"),
    "first scores off": Symptom(
        "ppo", "score, score_std", "mean further than 0.5 from 0, or deviation outside 0.5 to 2, beyond chance",
        "the reward model was normalised on such samples to mean 0 and deviation 1: it reads another place "
        "(padding?), other prompts, or was not normalised",
        "read `model.py: ScalarModel.score` at the last real token; reward.py --sft, --prompts, --temperature"),

    # PPO: does it learn, and what?
    "flat score": Symptom(
        "ppo", "score", "rises by less than 0.2 standard deviations",
        "nothing is gained from the reward model",
        "KL at 0 as well: --lr too low, or --kl-coef too high. KL rises: the reward model is near chance, or "
        "advantages are noise (see explained_variance), or they have the wrong sign; else a larger --lr, more "
        "--episodes, a lower --kl-coef"),
    "KL stays at 0": Symptom(
        "ppo", "kl_k3", "below 0.05 nats at the end",
        "the policy is still the SFT model, or the reference moves along with it",
        "does the score rise? then policy and reference are one model. Else a larger --lr; a lower --kl-coef (the "
        "adaptive one takes many rollouts to fall)"),
    "KL runs away": Symptom(
        "ppo", "kl", "above three times --kl-target, without a controller above 30 nats",
        "the leash does not hold; beyond what the reward model has seen its score means little",
        "a lower --lr, fewer --epochs, a larger --kl-coef; look at samples"),
    "length grows": Symptom(
        "ppo", "length", "by more than 40 %",
        "the reward model may like length itself",
        "compare win rates at equal length; the report card's `longer wins`"),
    "length shrinks": Symptom(
        "ppo", "length", "by more than 40 %",
        "ending early is the cheapest way to pay less KL or to please the reward model",
        "a lower --kl-coef; does the reward model see whole responses?"),
    "no end of text": Symptom(
        "ppo", "end_rate", "falls below 0.5, or ends below 0.05",
        "responses are cut at --response-tokens, and the score is of half a text",
        "is end of text inside the mask, and was it learned in SFT? is --response-tokens too small? with "
        "--no-end-score nan nothing asks for an end"),
    "entropy collapse": Symptom(
        "ppo", "entropy", "below 0.3 of what it was",
        "the policy has stopped trying things, and repeats what paid once",
        "a lower --lr, fewer --epochs, a larger --kl-coef"),
    "identical responses": Symptom(
        "ppo", "distinct", "fewer than 0.7 of a rollout differ",
        "one answer to everything: collapse, or a policy that cannot see its prompt",
        "a larger --kl-coef; does the reward model prefer this one answer whatever the prompt?"),
    "repetition": Symptom(
        "ppo", "repetition", "above 0.2, and twice the beginning's",
        "the same words again and again within a response",
        "a larger --kl-coef; a reward model that has seen such text ranked last"),
    "value loss explodes": Symptom(
        "ppo", "value_loss", "above three times the beginning's",
        "the value model chases returns that move faster than it",
        "a lower --lr or --value-coef; were the returns made from whitened advantages?"),
    "values explain nothing": Symptom(
        "ppo", "explained_variance", "below 0 at the end",
        "a constant would predict the returns better than the value model: advantages are noisier than without it",
        "--value-coef, a value model from the reward model (--value separate); are values and returns shifted by "
        "one?"),
    "clip binds": Symptom(
        "ppo", "clip_fraction", "above 0.3 in a quarter of the rollouts",
        "a third of the tokens give no gradient: the steps are too large for one rollout",
        "a lower --lr, fewer --epochs or --minibatches"),
    "clip never binds": Symptom(
        "ppo", "clip_fraction", "0 all the time, with more than one step per rollout",
        "steps so small that the ratio stays at 1; or, if KL moves all the same, old log-probabilities that are "
        "taken from the current pass",
        "if KL stays near 0, too: a larger --lr. Else compare `ppo.py: policy_loss` and what it is given"),
    "gradient far above the clip": Symptom(
        "any", "grad_norm", "median above 10 times --grad-clip",
        "clipping gives every batch the same weight, whatever its gradient; a norm near the clip is normal",
        "look for a loss that is a sum and not a mean, or for a --kl-coef or --value-coef much too large"),
    "another start": Symptom(
        "ppo", "config.json of the reward model", "its --model is not this run's --sft",
        "a reward model of the same SFT model has met the responses that it will score, from both sides; another "
        "start may be meant (a larger model, the labeler itself)",
        "reward.py --model with the SFT model's folder, unless it is meant"),

    # the other stages
    "near chance": Symptom(
        "reward", "report_card.json: held-out rankings", "surely below 0.6 (its interval)",
        "PPO would follow noise",
        "more rankings, more --epochs; do the labels agree with each other (label.py report)?"),
    "worse than words": Symptom(
        "reward", "report_card.json: human comparisons", "surely below a bag of words or length, in all domains",
        "it learned less than counting does",
        "a larger model or --lr; was the base trained long enough?"),
    "learned by heart": Symptom(
        "reward", "accuracy", "in training more than 0.1 above the interval held out",
        "it knows its rankings, not what they have in common",
        "fewer --epochs, more rankings, --weight-decay, --dropout"),
    "labels are noise": Symptom(
        "label", "done.json: order_kept; agreement.json",
        "order_kept below 0.6; agreement with people not surely above 0.5",
        "the noise hides the labeler's opinion, or it has none that people share",
        "--noise 1, --flip 0, and what calibrates the noise; another --rubric or --model"),
    "over-fitted": Symptom(
        "sft", "test_loss", "ends more than 0.02 nats above its lowest",
        "the last steps learned the training set by heart; the checkpoint is that of the lowest",
        "fewer --epochs"),
    "not learning": Symptom(
        "any", "loss", "never lower in the second half than at first; SFT: no better than all tokens alike",
        "the stage has learned nothing",
        "--lr, up or down by ten; are the labels what they should be?"),
    "chosen falls": Symptom(
        "dpo", "chosen_logprobs", "by more than 30 %",
        "the loss sees differences only: what both lose goes to texts that nobody ranked",
        "a larger --beta, a lower --lr, fewer --epochs; read samples"),
    "margins not 0 at first": Symptom(
        "dpo", "loss", "first line further than 0.05 from log 2",
        "policy and reference are the same model before the first step",
        "is the reference the model that the policy starts from? dropout?"),
    "over-optimised": Symptom(
        "evaluate", "results.json: snapshots",
        "labeler or judge fall by 0.25, and beyond chance, while the proxy climbs",
        "the policy pleases the reward model and nobody else",
        "stop at the best snapshot; a larger --kl-coef, more rankings, several reward models"),
    "no better than SFT": Symptom(
        "evaluate", "results.json: win_rate_judge", "its interval reaches below 0.5",
        "no gain can be shown on these prompts",
        "the findings of its stages; more prompts (--count)"),
}
