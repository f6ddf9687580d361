"""What goes wrong in a run of RLHF, how it shows in what the run wrote, and what to try: for doctor.py.

SYMPTOMS says of each fault where it shows (docs/metrics.md has it as a table). The functions below look for them, one
per kind of stage, each in a Record (what a stage left: doctor.py), and yield (name of the symptom, what was seen, the
lines of the log where).

A limit is far outside what healthy runs show (results/tiny: three seeds), and where chance plays a part, outside of
that, too. What takes learning to show is asked only after ENOUGH optimizer steps, of PPO eight rollouts, too.
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


def any_stage(record):
    """What every log can show."""
    if record.stop:
        yield "stopped", record.stop["stopped"], None
    norms, clip = record.column("grad_norm"), record.flags.get("grad_clip", 1.0)
    # DPO's gradient grows with beta and with the length of responses, so that there a large one means nothing.
    if norms and clip and record.kind != "dpo" and record.judged and median(norms) > 10 * clip:
        yield "gradient far above the clip", f"median {median(norms):.1f}, --grad-clip {clip:g}", None


def ppo_numbers(record):
    """PPO: faults of the computation itself, which show from the first rollouts on."""
    column, flags, lines = record.column, record.flags, record.lines
    kl = column("kl")
    below = [i for i, x in enumerate(kl) if x < 0]
    if len(kl) >= 5 and mean(kl) < -0.1 and len(below) >= 0.8 * len(kl):
        yield "negative KL", f"{mean(kl):.2f} nats per response on average", below
    for name, metric, limit in (("first ratio", "first_ratio_error", 0.1),
                                ("sampler differs", "sampler_difference", 0.05)):
        values = column(metric) + [record.stop.get(metric, 0.0)]
        if max(values) > limit:
            yield name, f"up to {max(values):.2f}", [i for i, x in enumerate(column(metric)) if x > limit] or None
    if not lines:  # stopped in the first rollout
        return
    no_end, wrong = flags.get("no_end_score", -1.0), []
    for i, line in enumerate(lines if not flags.get("whiten_rewards") else []):
        gap = line["rewards"] - (line["score"] - line["kl_coef"] * line["kl"])
        # Responses without end of text count --no-end-score; which scores it took the place of, the log does not say.
        unknown = 0 if math.isnan(no_end) else (
            (1 - line["end_rate"]) * (abs(no_end) + abs(line["score"]) + 4 * line["score_std"]))
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
    score, deviation = lines[0]["score"], lines[0]["score_std"]
    chance = 3 / math.sqrt(lines[0]["episodes"])  # three standard errors of a mean, and nearly of a deviation
    least = flags.get("ensemble") == "min" and "," in flags.get("reward", "")  # of several, which is lower than each
    if score > 0.5 + chance or not (least or score > -0.5 - chance and 0.5 / (1 + chance) < deviation < 2 + 2 * chance):
        yield "first scores off", f"mean {score:.2f}, deviation {deviation:.2f}", [0]
    theirs, own = record.reward_start, record.inputs.get("sft")
    if theirs and own and theirs != own:
        yield "another start", f"it started from another model than {flags.get('sft')}", None


def ppo_learning(record):
    """PPO: what takes some rollouts to show. The beginning: the first 512 responses; the end: the last quarter."""
    column, flags, lines = record.column, record.flags, record.lines
    # Without a controller the target is not in use.
    limit = 3 * flags.get("kl_target", 6.0) if flags.get("kl_horizon", 1.0) else 30.0
    peak = max(column("kl") + [record.stop.get("kl", 0.0)])
    if peak > limit:
        yield "KL runs away", f"up to {peak:.1f} nats per response", [
            i for i, x in enumerate(column("kl")) if x > limit] or None
    if not record.judged:
        return
    first = max(1, sum(line["episodes"] <= 512 for line in lines))
    last = range(len(lines) - max(1, len(lines) // 4), len(lines))

    def ends(metric):
        return mean(column(metric)[:first]), mean(column(metric)[-len(last):])
    half_way = len(lines) >= 0.5 * flags.get("iterations", len(lines))  # slow is not broken
    (early, late), k3 = ends("score"), ends("kl_k3")[1]
    if late - early < 0.2 and half_way:
        yield "flat score", f"{early:.2f} at the beginning, {late:.2f} at the end, KL {lines[-1]['kl']:.2f}", last
    if k3 < 0.05 and half_way:
        yield "KL stays at 0", f"{k3:.3f} nats per response", last
    early, late = ends("length")
    if not 0.6 < late / early < 1.4:
        yield f"length {'grows' if late > early else 'shrinks'}", f"from {early:.1f} to {late:.1f} tokens", last
    early, late = ends("end_rate")
    if not math.isnan(flags.get("no_end_score", -1.0)) and late < 0.05 or late < 0.5 <= early:
        yield "no end of text", f"{late:.2f} of the responses, {early:.2f} at the beginning", last
    early, late = ends("entropy")
    if late < 0.3 * early:
        yield "entropy collapse", f"from {early:.2f} to {late:.2f} nats per token", last
    if (late := ends("distinct")[1]) < 0.7:
        yield "identical responses", f"{late:.2f} of a rollout differ", last
    if column("repetition") and (late := ends("repetition")[1]) > max(0.2, 2 * ends("repetition")[0]):
        yield "repetition", f"{late:.2f} of a response's token pairs were in it before", last
    if flags.get("value_coef", 0.1):
        if (late := ends("explained_variance")[1]) < 0 and half_way:
            yield "values explain nothing", f"{late:.2f}", last
        later = range(len(lines) // 2, len(lines))
        early, late = ends("value_loss")[0], max(column("value_loss")[i] for i in later)
        if late > 3 * early:
            yield "value loss explodes", f"up to {late:.2f}, {early:.2f} at the beginning", later
    clipped = column("clip_fraction")
    high = [i for i, x in enumerate(clipped) if x > 0.3]
    if len(high) >= len(clipped) / 4:
        yield "clip binds", f"for up to {max(clipped):.2f} of the tokens", high
    if max(clipped) == 0 and flags.get("epochs", 4) * flags.get("minibatches", 1) > 1:
        yield "clip never binds", "0 in every rollout", None


def reward(record):
    """The reward model, the labeler or the judge, from its report card."""
    card, accuracy, losses = record.card, record.column("accuracy"), record.column("loss")
    # The best of the second half: a line may be of few rankings. Where labels are smoothed, the loss can hardly fall.
    half, smoothed = len(losses) // 2, record.flags.get("label_smoothing")
    better = max(accuracy[half:]) > accuracy[0] + 0.01 if smoothed else min(losses[half:]) < losses[0] - 0.01
    if record.judged and len(losses) > 1 and not better:
        yield "not learning", f"{losses[0]:.3f} at the beginning, {losses[-1]:.3f} at the end", None
    held_out = card.get("held-out rankings")
    if not record.judged or not held_out:
        return
    if held_out["interval"][1] < 0.6:
        yield "near chance", "{accuracy:.3f} ({interval[0]:.3f} to {interval[1]:.3f})".format(**held_out), None
    known = mean(accuracy[-max(1, len(accuracy) // 4):])
    if record.kind == "reward" and known > held_out["interval"][1] + 0.1:
        yield "learned by heart", f"{known:.3f} in training, {held_out['accuracy']:.3f} held out", None
    rows = card.get("human comparisons", {})
    rows = {name: row for name, row in rows.items() if name.endswith(", random")} or rows
    longer = [row["longer wins"]["accuracy"] for row in rows.values()]
    simple = [max(row["bag of words"]["accuracy"], x, 1 - x) for row, x in zip(rows.values(), longer)]
    if rows and all(row["reward model"]["interval"][1] < best for row, best in zip(rows.values(), simple)):
        name, row = next(iter(rows.items()))
        yield "worse than words", f"{name}: {row['reward model']['accuracy']:.3f}, but {simple[0]:.3f}", None


def dpo(record):
    """DPO, from its log and report card."""
    first, chosen = record.lines[0], record.column("chosen_logprobs")
    if first["step"] <= 10 and abs(first["loss"] - math.log(2)) > 0.05:
        yield "margins not 0 at first", f"{first['loss']:.3f}", [0]
    yield from reward(record)
    if record.judged and (late := mean(chosen[-max(1, len(chosen) // 4):])) < 1.3 * chosen[0]:
        yield "chosen falls", f"from {chosen[0]:.1f} to {late:.1f} nats per response", None


def sft(record):
    """Supervised training."""
    losses, guess = record.column("test_loss"), math.log(record.vocab_size or 1)
    if record.judged and record.vocab_size and losses[-1] > guess - 0.05:
        yield "not learning", f"{losses[-1]:.3f} held out; all tokens alike are {guess:.3f}", None
    if losses and losses[-1] > min(losses) + 0.02:
        lowest = losses.index(min(losses))
        yield "over-fitted", f"{losses[-1]:.3f}, it was {losses[lowest]:.3f}", range(lowest, len(losses))


def label(record):
    """Rankings by a stand-in, or by a machine that was asked about people's pairs as well."""
    if record.facts.get("order_kept", 1) < 0.6:
        yield "labels are noise", f"{record.facts['order_kept']:.2f} of the pairs are in the labeler's own order", None
    people = record.agreement.get("people", {}).get("both orders")
    if people and people["interval"][0] <= 0.5:
        low, high = people["interval"]
        yield "labels are noise", f"as people in {people['accuracy']:.3f} ({low:.3f} to {high:.3f}) of the pairs", None


def evaluate(record):
    """The comparison of all policies."""
    results = record.results
    few = min(results["prompts"], results["config"]["snapshot_count"])
    least = max(0.25, 3 * math.sqrt(2 / few))  # three standard errors of a difference of means, of deviation 1
    for policy, curve in results["snapshots"].items():
        for scorer in ("labeler", "judge"):
            points = [(point[scorer], point["proxy"], i) for i, point in enumerate(curve) if scorer in point]
            if not points:
                continue
            (best, proxy, i), last = max(points), points[-1]
            if last[0] < best - least and last[1] > proxy:
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
