"""What goes wrong in a run of RLHF, how it shows in what the run wrote, and what to try: for doctor.py.

SYMPTOMS says of each fault where it shows (docs/metrics.md has it as a table). The functions below look for them, one
per kind of stage, each in a Record (what a stage left: doctor.py), and yield (name of the symptom, what was seen, the
lines of the log where).

A limit is far outside what healthy runs show (results/tiny: three seeds), and where chance plays a part, outside of
that, too. What takes learning to show is asked only after ENOUGH optimizer steps.
"""
import math
from dataclasses import dataclass
from statistics import mean, median

ENOUGH = 20  # optimizer steps, below which nothing has been learned that could be judged


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
        "read its message; the first finding below is often the cause"),

    # PPO: is what is computed right?
    "sampler differs": Symptom(
        "ppo", "sampler_difference", "above 0.05 nats per token",
        "the sampler's log-probabilities and those of the training graph are not of the same model: KL and ratio "
        "are of responses that the policy did not draw",
        "compare both token by token: temperature, positions under left padding, a shift by one, top-k, dropout"),
    "first ratio": Symptom(
        "ppo", "first_ratio_error", "above 0.1",
        "before the first step of a rollout old and new log-probabilities are of the same weights: the ratio must "
        "be 1 up to rounding",
        "look for dropout, another temperature, a mask or positions that differ between the rollout and the "
        "update, a lower precision"),
    "negative KL": Symptom(
        "ppo", "kl", "mean below -0.1, four of five rollouts below 0",
        "a KL is never negative; an estimate is by chance, but not again and again: the responses are not draws "
        "of the policy",
        "see `sampler differs`; is the mask 1 up to the end of text and no further? are policy and reference the "
        "right way round?"),
    "rewards do not add up": Symptom(
        "ppo", "rewards", "more than a hundredth from score - kl_coef * kl",
        "the per-token rewards sum to something else: the penalty has the wrong sign or the score is not, or not "
        "only once, in the rewards",
        "compare with `ppo.py: shape_rewards`"),
    "wrong way": Symptom(
        "ppo", "kl_coef", "moves away from the target in half of the rollouts",
        "the coefficient must rise while KL is above its target, and fall while it is below",
        "compare with `ppo.py: AdaptiveKL`"),
    "first scores off": Symptom(
        "ppo", "score, score_std", "mean further than 0.5 from 0, or deviation outside 0.5 to 2",
        "the reward model was normalised on such samples to mean 0 and deviation 1: it reads another place "
        "(padding?), other prompts, or was not normalised",
        "read `model.py: ScalarModel.score` at the last real token; reward.py --sft, --prompts, --temperature"),

    # PPO: does it learn, and what?
    "flat score": Symptom(
        "ppo", "score", "rises by less than 0.2 standard deviations",
        "nothing is gained from the reward model",
        "KL at 0 as well: --lr too low, or --kl-coef too high. KL rises: the reward model is near chance, or "
        "advantages are noise (explained_variance); a larger --lr, more --episodes, a lower --kl-coef"),
    "KL stays at 0": Symptom(
        "ppo", "kl_k3", "below 0.05 nats at the end",
        "the policy is still the SFT model",
        "a larger --lr; a lower --kl-coef (the adaptive one takes many rollouts to fall)"),
    "KL runs away": Symptom(
        "ppo", "kl", "above three times --kl-target",
        "the leash does not hold; beyond what the reward model has seen its score means little",
        "a lower --lr, fewer --epochs, a larger --kl-coef or a smaller --kl-horizon; look at samples"),
    "length grows": Symptom(
        "ppo", "length", "by more than 40 %",
        "the reward model may like length itself",
        "compare win rates at equal length; the report card's `longer wins`"),
    "length shrinks": Symptom(
        "ppo", "length", "by more than 40 %",
        "ending early is the cheapest way to pay less KL or to please the reward model",
        "a lower --kl-coef; does the reward model see whole responses?"),
    "no end of text": Symptom(
        "ppo", "end_rate", "falls below 0.5",
        "responses are cut at --response-tokens, and the score is of half a text",
        "--no-end-score -1; is end of text inside the mask, and was it learned in SFT?"),
    "entropy collapse": Symptom(
        "ppo", "entropy", "below 0.3 of what it was",
        "the policy has stopped to try things, and repeats what paid once",
        "a lower --lr, fewer --epochs, a larger --kl-coef"),
    "identical responses": Symptom(
        "ppo", "distinct", "fewer than 0.7 of a rollout differ",
        "one answer to everything: collapse, or a policy that cannot see its prompt",
        "a larger --kl-coef; does the reward model prefer this one answer whatever the prompt?"),
    "repetition": Symptom(
        "ppo", "repetition", "above 0.2",
        "the same words again and again within a response",
        "a larger --kl-coef; a reward model that has seen such text ranked last"),
    "value loss explodes": Symptom(
        "ppo", "value_loss", "above three times the beginning's",
        "the value model chases returns that move faster than it",
        "a lower --lr or --value-coef; are the returns of unwhitened advantages?"),
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
        "steps so small that the ratio stays at 1",
        "a larger --lr"),
    "gradient far above the clip": Symptom(
        "any", "grad_norm", "median above 10 times --grad-clip",
        "every step has the same length whatever the gradient is; near the clip is normal",
        "a lower --lr, a warm-up; look for a loss that is a sum and not a mean"),
    "another start": Symptom(
        "ppo", "config.json of the reward model", "its --model is not this run's --sft",
        "a reward model that skipped SFT has not met such responses",
        "reward.py --model the SFT model's folder"),

    # the other stages
    "near chance": Symptom(
        "reward", "report_card.json: held-out rankings", "surely below 0.6 (its interval)",
        "PPO would follow noise",
        "more rankings, more --epochs; do the labels agree with each other (label.py report)?"),
    "no better than words": Symptom(
        "reward", "report_card.json: human comparisons", "surely below length or a bag of words, in all domains",
        "it learned less than counting does",
        "a larger model or --lr; was the base trained long enough?"),
    "learned by heart": Symptom(
        "reward", "accuracy", "in training surely more than 0.1 above held-out rankings",
        "it knows its rankings, not what they have in common",
        "fewer --epochs, more rankings, --weight-decay, --dropout"),
    "labels are noise": Symptom(
        "label", "done.json: order_kept", "below 0.6",
        "the noise hides the labeler's opinion",
        "--noise 1, and what calibrates it"),
    "over-fitted": Symptom(
        "sft", "test_loss", "ends more than 0.02 nats above its lowest",
        "the last steps learned the training set by heart; the checkpoint is that of the lowest",
        "fewer --epochs"),
    "not learning": Symptom(
        "any", "loss", "no lower at the end than at the beginning",
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
        "evaluate", "results.json: snapshots", "labeler or judge fall by 0.25 while the proxy climbs",
        "the policy pleases the reward model and nobody else",
        "stop at the best snapshot; a larger --kl-coef, more rankings, several reward models"),
    "no better than SFT": Symptom(
        "evaluate", "results.json: win_rate_judge", "surely not above 0.5",
        "training made it worse, or did nothing",
        "the findings of its stages"),
}


def ends(x):
    """Means of the first and of the last quarter of a list."""
    n = max(1, len(x) // 4)
    return mean(x[:n]), mean(x[-n:])


def any_stage(record):
    """What every log can show."""
    if record.stop:
        yield "stopped", record.stop["stopped"], None
    norms, clip = record.column("grad_norm"), record.flags.get("grad_clip", 1.0)
    if norms and clip and record.steps >= ENOUGH and median(norms) > 10 * clip:
        yield "gradient far above the clip", f"median {median(norms):.1f}, --grad-clip {clip:g}", None
    losses = record.column("loss")
    if record.kind in ("reward", "dpo") and len(losses) > 1 and record.steps >= ENOUGH and losses[-1] > losses[0] - .01:
        yield "not learning", f"{losses[0]:.3f} at the beginning, {losses[-1]:.3f} at the end", None


def ppo_numbers(record):
    """PPO: faults of the computation itself, which show from the first rollouts on."""
    column, flags, lines = record.column, record.flags, record.lines
    for name, metric, limit in (("sampler differs", "sampler_difference", 0.05),
                                ("first ratio", "first_ratio_error", 0.1)):
        values = column(metric) + [record.stop.get(metric, 0.0)]
        if max(values) > limit:
            yield name, f"up to {max(values):.2f}", [i for i, x in enumerate(column(metric)) if x > limit] or None
    if not lines:  # stopped in the first rollout
        return
    kl = column("kl")
    below = [i for i, x in enumerate(kl) if x < 0]
    if len(kl) >= 5 and mean(kl) < -0.1 and len(below) >= 0.8 * len(kl):
        yield "negative KL", f"{mean(kl):.2f} nats per response on average", below
    no_end = flags.get("no_end_score", -1.0)
    no_end = 0.0 if no_end is None or math.isnan(no_end) else no_end
    wrong = []
    for i, line in enumerate(lines if not flags.get("whiten_rewards") else []):
        gap = line["rewards"] - (line["score"] - line["kl_coef"] * line["kl"])
        # Responses without end of text count --no-end-score; which scores it took the place of, the log does not say.
        unknown = (1 - line["end_rate"]) * (abs(no_end) + abs(line["score"]) + 4 * line["score_std"])
        if abs(gap) > unknown + 0.01 * (1 + abs(line["kl_coef"] * line["kl"])):
            wrong.append(i)
    if wrong:
        line = lines[wrong[-1]]
        yield "rewards do not add up", (f"{line['rewards']:.2f}, but score - kl_coef * kl is {line['score']:.2f} - "
                                        f"{line['kl_coef']:.3f} * {line['kl']:.2f}"), wrong
    target, coefs = flags.get("kl_target"), column("kl_coef")
    wrong = [i + 1 for i in range(len(kl) - 1) if target and (coefs[i + 1] - coefs[i]) * (kl[i] - target) < 0]
    if wrong and len(wrong) >= 0.5 * (len(kl) - 1):
        yield "wrong way", (f"from {coefs[0]:.3f} to {coefs[-1]:.3f} with KL {kl[0]:.1f} to {kl[-1]:.1f}, target "
                            f"{target:g}"), wrong
    first = lines[0]
    chance = 3 / math.sqrt(first["episodes"])  # three standard errors of a mean, and nearly of a deviation
    if abs(first["score"]) > 0.5 + chance or not 0.5 / (1 + chance) < first["score_std"] < 2 * (1 + chance):
        yield "first scores off", f"mean {first['score']:.2f}, deviation {first['score_std']:.2f}", [0]
    theirs, own = record.reward_start, record.inputs.get("sft")
    if theirs and own and theirs != own:
        yield "another start", f"it started from {record.reward_model}", None


def ppo_learning(record):
    """PPO: what takes some rollouts to show."""
    column, flags, lines = record.column, record.flags, record.lines
    limit, peak = 3 * flags.get("kl_target", 6.0), max(column("kl") + [record.stop.get("kl", 0.0)])
    if peak > limit:
        yield "KL runs away", (f"up to {peak:.1f} nats per response, the target is {limit / 3:g}"), [
            i for i, x in enumerate(column("kl")) if x > limit] or None
    if record.steps < ENOUGH or len(lines) < 8:
        return
    last = range(len(lines) - max(1, len(lines) // 4), len(lines))
    (score, end), (_, k3) = ends(column("score")), ends(column("kl_k3"))
    if end - score < 0.2:
        yield "flat score", f"{score:.2f} in the first quarter, {end:.2f} in the last, KL {column('kl')[-1]:.2f}", last
    if k3 < 0.05:
        yield "KL stays at 0", f"{k3:.3f} nats per response", last
    early, late = ends(column("length"))
    if not 0.6 < late / early < 1.4:
        yield f"length {'grows' if late > early else 'shrinks'}", f"from {early:.1f} to {late:.1f} tokens", last
    early, late = ends(column("end_rate"))
    if late < 0.5 and late < early - 0.1:
        yield "no end of text", f"{late:.2f} of the responses, {early:.2f} at the beginning", last
    early, late = ends(column("entropy"))
    if late < 0.3 * early:
        yield "entropy collapse", f"from {early:.2f} to {late:.2f} nats per token", last
    for name, metric, wrong, text in (
            ("identical responses", "distinct", lambda x: x < 0.7, "{:.2f} of a rollout differ"),
            ("repetition", "repetition", lambda x: x > 0.2, "{:.2f} of a response's token pairs were in it before"),
            ("values explain nothing", "explained_variance", lambda x: x < 0, "{:.2f}")):
        if column(metric) and wrong(late := ends(column(metric))[1]):
            yield name, text.format(late), last
    losses, half = column("value_loss"), range(len(lines) // 2, len(lines))
    early, late = ends(losses)[0], max(losses[i] for i in half)
    if late > 3 * early:
        yield "value loss explodes", f"up to {late:.2f}, {early:.2f} at the beginning", half
    clipped = column("clip_fraction")
    high = [i for i, x in enumerate(clipped) if x > 0.3]
    if len(high) >= len(clipped) / 4:
        yield "clip binds", f"for up to {max(clipped):.2f} of the tokens", high
    if max(clipped) == 0 and flags.get("epochs", 4) * flags.get("minibatches", 1) > 1:
        yield "clip never binds", "0 in every rollout", None


def reward(record):
    """The reward model, the labeler or the judge, from its report card."""
    card, accuracy = record.card, record.column("accuracy")
    held_out = card.get("held-out rankings")
    if record.steps < ENOUGH or not held_out:
        return
    if held_out["interval"][1] < 0.6:
        yield "near chance", "{accuracy:.3f} ({interval[0]:.3f} to {interval[1]:.3f})".format(**held_out), None
    if accuracy and accuracy[-1] > held_out["interval"][1] + 0.1:
        yield "learned by heart", f"{accuracy[-1]:.3f} in training, {held_out['accuracy']:.3f} held out", None
    rows = {name: row for name, row in card.get("human comparisons", {}).items() if name.endswith(", random")}
    simple = [max(row[other]["accuracy"] for other in ("bag of words", "longer wins")) for row in rows.values()]
    if rows and all(row["reward model"]["interval"][1] < best for row, best in zip(rows.values(), simple)):
        name, row = next(iter(rows.items()))
        yield "no better than words", f"{name}: {row['reward model']['accuracy']:.3f}, but {simple[0]:.3f}", None


def dpo(record):
    """DPO, from its log and report card."""
    first, chosen = record.lines[0], record.column("chosen_logprobs")
    if abs(first["loss"] - math.log(2)) > 0.05:
        yield "margins not 0 at first", f"{first['loss']:.3f}", [0]
    if record.steps >= ENOUGH and (late := ends(chosen)[1]) < 1.3 * chosen[0]:
        yield "chosen falls", f"from {chosen[0]:.1f} to {late:.1f} nats per response", None
    yield from ((name, seen, where) for name, seen, where in reward(record) if name != "learned by heart")


def sft(record):
    """Supervised training."""
    losses = record.column("test_loss")
    if losses and losses[-1] > min(losses) + 0.02:
        lowest = losses.index(min(losses))
        yield "over-fitted", f"{losses[-1]:.3f}, it was {losses[lowest]:.3f}", range(lowest, len(losses))


def label(record):
    """Rankings by a stand-in."""
    if record.facts.get("order_kept", 1) < 0.6:
        yield "labels are noise", f"{record.facts['order_kept']:.2f} of the pairs are in the labeler's own order", None


def evaluate(record):
    """The comparison of all policies."""
    results = record.results
    for policy, curve in results.get("snapshots", {}).items():
        for scorer in ("labeler", "judge"):
            points = [(point[scorer], point["proxy"], i) for i, point in enumerate(curve) if scorer in point]
            if not points:
                continue
            (best, proxy, i), last = max(points), points[-1]
            if last[0] < best - 0.25 and last[1] > proxy:
                yield "over-optimised", (f"{policy}: the {scorer} fell from {best:.2f} at iteration "
                                         f"{curve[i]['iteration']} to {last[0]:.2f}, the proxy rose from {proxy:.2f} "
                                         f"to {last[1]:.2f}"), None
        row = results["policies"][policy]
        low, high = row["win_rate_judge_interval"]
        if high < 0.5 or results["prompts"] >= 200 and low < 0.5:
            yield "no better than SFT", f"{policy}: {row['win_rate_judge']:.3f} ({low:.3f} to {high:.3f})", None


def examine(record):
    """All findings of one stage: (name of the symptom, what was seen, numbers of the log's lines or None)."""
    looks = {"ppo": [ppo_numbers, ppo_learning], "reward": [reward], "dpo": [dpo], "sft": [sft], "label": [label],
             "evaluate": [evaluate]}[record.kind]
    if not record.lines and record.kind in ("sft", "reward", "dpo"):
        looks = []  # stopped before the first line
    return [finding for look in [any_stage, *looks] for finding in look(record)]
