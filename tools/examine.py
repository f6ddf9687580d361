"""Looking for the symptoms of symptoms.py in a Record, which is what a stage left (doctor.py).

One function per kind of stage; each yields (name of the symptom, what was seen, the lines of the log where, or None).
What takes learning to show is asked only after ENOUGH optimizer steps, of PPO eight rollouts, too.
"""
import math
from statistics import mean, median

ENOUGH = 20  # optimizer steps, below which nothing has been learned that could be judged


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
    count = min(results["prompts"], results["config"]["snapshot_count"])  # prompts of a snapshot
    least = max(0.25, 3 * math.sqrt(2 / count))  # three standard errors of a difference of means, of deviation 1
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
