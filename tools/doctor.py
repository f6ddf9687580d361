"""Is my run broken, or is this normal? What looks wrong in what a run wrote, why it matters, and what to try.

    python -m tools.doctor out/tiny               every stage of a run of train_all.sh
    python -m tools.doctor out/tiny/ppo           one stage
    python -m tools.doctor results/tiny/seed1     a committed run

Reads logs, report cards and the evaluation; loads no model. One line per finding, with what the committed runs show in
its place; the exit code is 1 if there is one. Limits are far outside the range of healthy runs (results/tiny, three
seeds), and outside chance. Which bug shows how: results/faults.md. Some show in no log: read samples, too.
"""
import functools
import json
import math
import os
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from common import check, run, visible

COMMITTED = Path(__file__).parents[1] / "results" / "tiny"  # healthy runs: what is normal
# kind: of stage; metric: a field of log.jsonl, or a file and a place in it; limit: when it counts as broken.
Symptom = namedtuple("Symptom", "kind metric limit why tries")
HELD_OUT, KEPT = "report_card.json: held-out rankings: accuracy", "done.json: order_kept"
WINS = "results.json: policies: ppo: win_rate_judge"
SYMPTOMS = {
    "stopped": Symptom("any", "stopped", "the log ends with it", "a guard or a non-finite number ended the run",
        "read its message; one of the findings below may be the cause"),
    "truncated responses": Symptom("any", "truncated", "more than 10 % of the responses",
        "a model does not learn to stop without EOS", "shorter responses, or a base with a larger --block-size"),
    "gradient far above the clip": Symptom("any", "grad_norm", "median above 10 times --grad-clip (not of DPO)",
        "every batch counts the same, whatever its gradient", "--kl-coef, --value-coef too large? a sum, not a mean?"),
    # PPO: is what is computed right?
    "negative KL": Symptom("ppo", "kl", "mean below -0.1, four of five rollouts below 0",
        "the responses are not samples of the policy", "see `sampler differs`; policy and reference exchanged?"),
    "first ratio": Symptom("ppo", "first_ratio_error", "above 0.1 (the guard stops a run at 0.5)",
        "old and new log-probabilities are of the same weights", "dropout left on? another mask or temperature?"),
    "sampler differs": Symptom("ppo", "sampler_difference", "above 0.05 nats per token",
        "sampler and training graph are two models", "compare temperature, mask, left padding, shift by one, dropout"),
    "rewards do not add up": Symptom("ppo", "rewards", "not score - kl_coef * kl, within 1 % and responses without EOS",
        "the KL penalty has the wrong sign, or the score is not in them once", "compare `ppo.py: shape_rewards`"),
    "group baseline off": Symptom("ppo", "advantage_group_std",
        "not group_std * K / (K - 1) with rloo, 1 with grpo, within 2 %, in a quarter of the rollouts",
        "the baseline is not the mean of the other responses to the same prompt",
        "are a prompt's rows neighbours? the response itself in its baseline? one baseline for the whole rollout?"),
    "wrong way": Symptom("ppo", "kl_coef", "moves away from the target in half of the rollouts",
        "it must rise while KL is above its target, and fall while it is below", "compare `ppo.py: AdaptiveKL`"),
    "first scores off": Symptom("ppo", "score",
        "mean beyond 0.5 or deviation outside 0.5 to 2, and beyond chance (not of a rule)",
        "on SFT samples they are 0 and 1", "is the last real token read? the same --sft, --prompts, --temperature?"),
    # PPO: does it learn, and what?
    "KL runs away": Symptom("ppo", "kl", "above three times --kl-target, without a controller above 30 nats",
        "far from what the reward model has seen", "a lower --lr, fewer --epochs, a larger --kl-coef; look at samples"),
    "flat score": Symptom("ppo", "score", "rises by less than 0.2 standard deviations",
        "no steps (KL at 0, too), or no direction", "larger --lr, lower --kl-coef; a reward model near chance?"),
    "KL stays at 0": Symptom("ppo", "kl_k3", "below 0.05 nats at the end",
        "it is still the SFT model, or the reference is trained along with it", "a larger --lr, a lower --kl-coef"),
    "length changes": Symptom("ppo", "length", "by more than 40 %", "the reward model likes length, or an early EOS",
        "compare win rates at equal length; is it shown whole responses?"),
    "no EOS": Symptom("ppo", "eos_rate", "falls below 0.5, or ends below 0.05", "the score is of half a response",
        "was the EOS learned in SFT, is it inside the mask? a larger --response-tokens; --missing-eos-score -1"),
    "identical responses": Symptom("ppo", "unique_responses", "fewer than 0.7 of a rollout differ",
        "collapse, or a policy that cannot see its prompt", "a larger --kl-coef; does this response always win?"),
    "repetition": Symptom("ppo", "repetition", "above 0.2, and twice the beginning's",
        "the same words again and again", "a larger --kl-coef; a reward model that has seen such text ranked last"),
    "values explain nothing": Symptom("ppo", "explained_variance", "below 0 at the end",
        "advantages are noisier than without it", "--value separate; are values and returns shifted by one?"),
    "groups without signal": Symptom("ppo", "equal_groups", "above 0.5 at the end",
        "a prompt's scores are equal: RLOO learns only the KL penalty, GRPO its small differences at full weight",
        "is the score at its maximum? a higher --temperature, a larger --group, a finer reward"),
    "clip binds": Symptom("ppo", "clip_fraction", "above 0.3 in a quarter of the rollouts",
        "a third of the tokens give no gradient: steps too large", "a lower --lr, fewer --epochs or --minibatches"),
    "clip never binds": Symptom("ppo", "clip_fraction", "0 all the time, with more than one step per rollout",
        "tiny steps, or old log-probabilities of the current pass (if KL moves)", "larger --lr; see `ppo.py: update`"),
    # the other stages
    "near chance": Symptom("reward", HELD_OUT, "surely below 0.6 (its interval)", "PPO would follow noise",
        "more rankings, more --epochs; do the labels agree with each other (python -m labeling.agreement)?"),
    "memorised": Symptom("reward", "accuracy", "in training more than 0.1 above the interval held out",
        "it knows its rankings, not what they have in common", "fewer --epochs, more rankings, --weight-decay"),
    "labels are noise": Symptom("label", KEPT, "below 0.6", "it hides the labeler's opinion", "--noise 1, --flip 0"),
    "overfit": Symptom("sft", "valid_loss", "ends more than 0.02 nats above its lowest",
        "the last steps memorised the training set; the checkpoint is that of the lowest", "fewer --epochs"),
    "chosen falls": Symptom("dpo", "chosen_logprobs", "by more than 30 %",
        "what chosen and rejected lose goes to texts that nobody ranked", "a larger --beta, a lower --lr"),
    "margins not 0 at first": Symptom("dpo", "loss", "first line further than 0.05 from log 2",
        "policy and reference are the same model before the first step", "is the reference the SFT model? dropout?"),
    "over-optimised": Symptom("evaluate", "results.json: snapshots", "labeler or judge fall by 0.25, proxy climbs",
        "the policy pleases the reward model and nobody else", "an earlier snapshot; --kl-coef, more rankings"),
    "no better than SFT": Symptom("evaluate", WINS, "its interval reaches below 0.5",
        "no gain can be shown on these prompts", "the findings of its stages; more prompts (--count)"),
}

class Record:
    """What a stage left: name, path (of its log), kind (of its script; "" if unknown), flags, lines of log.jsonl, stop
    (the line of what ended it early), truncated (counts), and files: {name: content, {} if there is none}."""
    FILES = {"config": "config.json", "card": "report_card.json", "done": "done.json", "results": "results.json"}
    KINDS = {"kl_coef": "ppo", "beta": "dpo", "evals": "sft", "best_of": "evaluate", "order_kept": "label",
             "test_share": "reward"}  # by a flag that only this stage has, or what it writes into done.json

    def __init__(self, name, path, lines):
        """lines: as those of a stage in a logs.jsonl."""
        self.name, self.path = name, path
        self.files = {self.FILES[part]: next((line[part] for line in lines if part in line), {}) for part in self.FILES}
        self.stop = next((line for line in lines if "stopped" in line), {})
        self.truncated = [line["truncated"] for line in lines if "truncated" in line]
        self.lines = [line for line in lines if "stopped" not in line and ("step" in line or "iteration" in line)]
        config = self.files["config.json"]
        self.flags = config.get("stage", config)  # in a logs.jsonl the flags alone
        facts = {**self.flags, **self.files["done.json"]}
        self.kind = next((kind for fact, kind in self.KINDS.items() if fact in facts), "")

    def column(self, metric):
        """The values of a metric: in the lines that have it, or the one at a place in a file."""
        if ": " not in metric:
            return [line[metric] for line in self.lines if metric in line]
        value = functools.reduce(lambda content, key: content.get(key, {}), metric.split(": "), self.files)
        return [value] if isinstance(value, float) else []

    @property
    def judged(self):
        """Whether it went on for long enough to ask what it learned."""
        if self.kind == "ppo":
            return len(self.lines) >= max(8, 20 / (self.flags["epochs"] * self.flags["minibatches"]))
        return bool(self.lines) and self.lines[-1]["step"] >= 20

def read_json(path):
    """The content of a JSON file, {} if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}

def read_lines(path):
    """The lines of a JSON-lines file, [] if there is none; one that is not complete yet is left out."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []

def read_stage(folder):
    """The Record of a stage in its own folder."""
    files = [{part: read_json(folder / file)} for part, file in Record.FILES.items()]
    return Record(folder.resolve().name, folder / "log.jsonl", read_lines(folder / "log.jsonl") + files)

def records(folder):
    """A Record of each stage that is of a known kind: of a committed run (logs.jsonl), of a folder with a folder for
    each stage (in the order in which they ran), or of one stage."""
    folder, stages = Path(folder), {}
    check(folder.is_dir(), f"{folder}: no such folder")
    for line in read_lines(folder / "logs.jsonl"):
        name = " ".join(str(line.pop(key)) for key in ("run", "seed", "stage") if key in line)
        stages.setdefault(name, []).append(line)
    if "evaluate" in stages:
        stages["evaluate"].append({"results": read_json(folder / "results.json")})
    found = [Record(name, folder / "logs.jsonl", lines) for name, lines in stages.items()]
    if not stages:
        paths = [*folder.glob("config.json"), *folder.glob("*/config.json")]
        found = [read_stage(path.parent) for path in sorted(paths, key=os.path.getmtime)]
    return [record for record in found if record.kind]

# ---- what is wrong: (symptom, what was seen, numbers of the log's lines where, or None) ------------------------------

def any_stage(record):
    """What every log can show."""
    if record.stop:
        yield "stopped", record.stop["stopped"], None
    for counts in record.truncated:
        if counts["responses"] > 0.1 * counts["of"]:
            yield "truncated responses", "{responses} of {of}".format(**counts), None
    norms, clip = record.column("grad_norm"), record.flags.get("grad_clip")
    # A large gradient means nothing in DPO, where it grows with beta and with the length of responses.
    if clip and record.kind != "dpo" and record.judged and median(norms) > 10 * clip:
        yield "gradient far above the clip", f"median {median(norms):.1f}, --grad-clip {clip:g}", None

def ppo(record):
    """PPO: faults of the computation itself, which show from the first rollouts on; then what it learned."""
    column, flags, lines = record.column, record.flags, record.lines
    kl, coefs, target, missing = column("kl"), column("kl_coef"), flags["kl_target"], flags["missing_eos_score"]
    below = [i for i, x in enumerate(kl) if x < 0]
    if len(kl) >= 5 and mean(kl) < -0.1 and len(below) >= 0.8 * len(kl):
        yield "negative KL", f"{mean(kl):.2f} nats per response on average", below

    def above(name, limit):
        metric = SYMPTOMS[name].metric
        high = [i for i, x in enumerate(column(metric)) if x > limit]
        peak = max(column(metric) + [record.stop.get(metric, 0.0)])  # a guard may have noted it
        return [(name, f"up to {peak:.2f}", high)] if peak > limit else []
    yield from above("first ratio", 0.1) + above("sampler differs", 0.05)
    if not lines:  # stopped in the first rollout
        return
    wrong = []
    for i, line in enumerate(lines if not flags["whiten_rewards"] else []):
        gap = line["rewards"] - (line["score"] - line["kl_coef"] * line["kl"])
        # A response without EOS counts --missing-eos-score. Which scores it replaced, the log does not say: the mean
        # of a share m of the responses is at most std / sqrt(m) away from that of all (Cauchy-Schwarz).
        m = 1 - line["eos_rate"]
        unknown = 0 if math.isnan(missing) else (
            m * (abs(missing) + abs(line["score"])) + math.sqrt(m) * line["score_std"])
        if abs(gap) > unknown + 0.01 * (1 + abs(line["score"]) + abs(line["kl_coef"] * line["kl"])):
            wrong.append(i)
    if wrong:
        seen = "{rewards:.2f}, but score - kl_coef * kl is {score:.2f} - {kl_coef:.3f} * {kl:.2f}"
        yield "rewards do not add up", seen.format(**lines[wrong[-1]]), wrong
    advantages = flags.get("advantages", "gae")
    K, wrong = 1 if advantages == "gae" else flags["group"], []
    for i, line in enumerate(lines if K > 1 else []):
        high = line["group_std"] * K / (K - 1) if advantages == "rloo" else 1.0
        low = high if advantages == "rloo" else 1 - line["equal_groups"]  # without differences an advantage is 0
        if line["group_std"] > 0.01 and not 0.98 * low <= line["advantage_group_std"] <= 1.02 * high:
            wrong.append(i)
    if wrong and len(wrong) >= len(lines) / 4:
        seen = "{advantage_group_std:.2f}, group_std {group_std:.2f}, equal_groups {equal_groups:.2f}, K "
        yield "group baseline off", seen.format(**lines[wrong[-1]]) + str(K), wrong
    wrong = [i + 1 for i in range(len(kl) - 1) if (coefs[i + 1] - coefs[i]) * (kl[i] - target) < 0]
    if wrong and len(wrong) >= (len(kl) - 1) / 2:
        yield "wrong way", f"{coefs[0]:.3f} to {coefs[-1]:.3f}, KL {kl[0]:.1f} to {kl[-1]:.1f} of {target:g}", wrong
    score, deviation = lines[0]["score"], lines[0]["score_std"]
    chance = 3 / math.sqrt(lines[0]["episodes"] / K)  # three standard errors of a mean, and nearly of a deviation
    least = flags["ensemble"] == "min" and "," in flags["reward"]  # of several, which is lower than each
    if not flags["reward"].startswith("rule:") and (score > 0.5 + chance or not (
            least or score > -0.5 - chance and 0.5 / (1 + chance) < deviation < 2 + 2 * chance)):
        yield "first scores off", f"mean {score:.2f}, deviation {deviation:.2f}", [0]
    yield from above("KL runs away", 3 * target if flags["kl_horizon"] else 30.0)  # a horizon of 0: no controller
    if record.judged:
        yield from ppo_learning(record)

def ppo_learning(record):
    """What takes some rollouts to show. The beginning: the first 512 responses; the end: the last quarter."""
    column, flags, lines = record.column, record.flags, record.lines
    first = max(1, sum(line["episodes"] <= 512 for line in lines))
    last = range(len(lines) - len(lines) // 4, len(lines))
    half_way = len(lines) >= 0.5 * flags["iterations"]  # slow is not broken
    asks_for_eos, values = not math.isnan(flags["missing_eos_score"]), flags["value_coef"] and flags["value"] != "none"
    # A reward model's scores of SFT samples have deviation 1. A rule's may have any; at the end it is small if nearly
    # all responses have the highest score.
    unit = mean(column("score_std")[last.start:]) if flags["reward"].startswith("rule:") else 1.0
    for name, is_broken in {
            "flat score": lambda early, late: late - early <= 0.2 * unit and half_way,
            "KL stays at 0": lambda early, late: late < 0.05 and half_way,
            "length changes": lambda early, late: not 0.6 * early < late < 1.4 * early,
            "no EOS": lambda early, late: late < 0.05 and asks_for_eos or late < 0.5 <= early,
            "identical responses": lambda early, late: late < 0.7,
            "repetition": lambda early, late: late > max(0.2, 2 * early),
            "values explain nothing": lambda early, late: late < 0 and half_way and values,
            "groups without signal": lambda early, late: late > 0.5}.items():
        metric = SYMPTOMS[name].metric  # not in all lines: explained_variance, equal_groups
        parts = [[line[metric] for line in part if metric in line] for part in (lines[:first], lines[last.start:])]
        if not all(parts):
            continue
        early, late = map(mean, parts)
        if is_broken(early, late):
            yield name, f"{early:.2f} at the beginning, {late:.2f} at the end", last
    clipped = column("clip_fraction")
    if len(high := [i for i, x in enumerate(clipped) if x > 0.3]) >= len(clipped) / 4:
        yield "clip binds", f"for up to {max(clipped):.2f} of the tokens", high
    if max(clipped) == 0 and flags["epochs"] * flags["minibatches"] > 1:
        yield "clip never binds", "0 in every rollout", None

def reward(record):
    """The reward model, the labeler or the judge, from its log and report card."""
    accuracy, card = record.column("accuracy"), record.files["report_card.json"]
    if not record.judged or not card:  # not finished
        return
    held_out, known = card["held-out rankings"], mean(accuracy[-max(1, len(accuracy) // 4):])
    if held_out["interval"][1] < 0.6:
        yield "near chance", "{accuracy:.3f} ({interval[0]:.3f} to {interval[1]:.3f})".format(**held_out), None
    if record.kind == "reward" and known > held_out["interval"][1] + 0.1:
        yield "memorised", f"{known:.3f} in training, {held_out['accuracy']:.3f} held out", None

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
    losses = record.column("valid_loss")
    if losses[-1] > min(losses) + 0.02:
        lowest = losses.index(min(losses))
        yield "overfit", f"{losses[-1]:.3f}, it was {losses[lowest]:.3f}", range(lowest, len(losses))

def label(record):
    """Rankings by a simulated labeler."""
    if (kept := record.files["done.json"]["order_kept"]) < 0.6:
        yield "labels are noise", f"{kept:.2f} of the pairs are in the labeler's own order", None

def evaluate(record):
    """The comparison of all policies."""
    results = record.files["results.json"]
    count = min(results["prompts"], results["config"]["snapshot_count"])  # prompts of a snapshot
    least = max(0.25, 3 * math.sqrt(2 / count))  # three standard errors of a difference of means, of deviation 1
    for policy, curve in results["snapshots"].items():
        for scorer in ("labeler", "judge"):
            points = [(point[scorer], point["proxy"], point["iteration"]) for point in curve if scorer in point]
            (best, proxy, i), last = max(points, default=(0, 0, 0)), (points or [(0, 0)])[-1]
            if last[0] < best - least and last[1] > proxy:
                yield "over-optimised", f"{policy}: {scorer} {best:.2f} at iteration {i}, then {last[0]:.2f}", None
        low, high = results["policies"][policy].get("win_rate_judge_interval", (0.5, 1.0))
        if high < 0.5 or results["prompts"] >= 200 and low < 0.5:
            yield "no better than SFT", f"{policy}: {low:.3f} to {high:.3f}", None

def examine(record):
    """All findings of one stage: (name of the symptom, what was seen, numbers of the log's lines or None)."""
    look = {"ppo": ppo, "reward": reward, "dpo": dpo, "sft": sft, "label": label, "evaluate": evaluate}[record.kind]
    has_begun = record.lines or record.kind in ("label", "ppo") or record.files["results.json"]
    return [*any_stage(record), *(look(record) if has_begun else [])]

def span(numbers):
    """From the least to the largest of some numbers, in few digits."""
    numbers = sorted(numbers) or ["-"]
    low, high = (f"{x:.2f}" if isinstance(x, float) else str(x) for x in (numbers[0], numbers[-1]))
    return low if low == high else f"{low} to {high}"

@functools.cache
def committed(metric, *stages):
    """What the committed runs have in a metric of the first of these stages that has it: a list of values per seed."""
    kept = [record for folder in sorted(COMMITTED.glob("seed*")) for record in records(folder)]
    found = ([x for record in kept if record.name == name and (x := record.column(metric))] for name in stages)
    return next(filter(None, found), [])

def report(record):
    """Print what there is to say of a stage; whether something was found."""
    findings = examine(record)
    for name, seen, where in findings:
        kind, metric, limit, why, tries = SYMPTOMS[name]
        unit = "iteration" if record.kind == "ppo" else "step"
        place = f"{record.path}{f', {unit} {span(record.lines[i][unit] for i in where)}' if where else ''}"
        if runs := committed(metric, record.name, record.kind):
            place += f"; healthy runs: {span(sum(runs, []))}, at the end {span(values[-1] for values in runs)}"
        print(visible(f"{record.name}: {name}: {metric}: {seen} ({place}): {why}. Try: {tries}."))
    if not findings:
        far = "" if record.files["done.json"] else f", not finished ({len(record.lines)} lines of its log)"
        print(f"{record.name}: healthy{far}")
    return bool(findings)

@dataclass
class Config:
    run: str = "out/tiny"  # folder of a run, or of one of its stages

def main(cfg):
    found = records(cfg.run)
    check(found, f"{cfg.run}: no stage that the doctor knows, neither here nor in a folder below")
    sick = sum([report(record) for record in found])
    check(not sick, f"{sick} of {len(found)} stages with findings", 1)

if __name__ == "__main__":
    run(main, Config, words=("run",))
