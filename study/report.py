"""Draws what evaluate.py found, from results.json (and verdict.json, refusals.md if there): report.md and its figures.

    python -m study.report out/tiny/evaluate      one run
    python -m study.report results/tiny/seed*     several: a report for each, and ../README.md with all side by side

Text that a model wrote is escaped: it cannot end a table, or put a link or an image into the report.
"""
import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

os.environ["MPLBACKEND"] = "Agg"  # files, no window; a notebook's backend may not even be installed here
import matplotlib.pyplot as plt
import numpy as np

from common import digest, run
from evaluate import load_json
from study.markdown import COLUMNS, accuracy, by_seed, cells, escape, fill, table, template

SCORERS = {"proxy": "o-", "labeler": "s-", "judge": "^-"}
PANELS = {  # what is drawn of a policy's log, by a flag that tells how it was trained: horizontal axis, {metric: title}
    "kl_coef": ("episodes", {"score": "reward-model score", "kl": "KL to SFT, nats", "kl_coef": "KL coefficient",
                             "length": "length, tokens", "eos_rate": "EOS rate", "entropy": "entropy, nats per token"}),
    "beta": ("step", {"loss": "loss", "accuracy": "accuracy", "margin": "margin of implicit rewards",
                      "chosen_logprobs": "log-probability, chosen", "rejected_logprobs": "log-probability, rejected",
                      "grad_norm": "gradient norm"})}
METHODS = {"best-of-n": "k.-", "PPO": "C0o-", "RLOO": "C2^-", "GRPO": "C4v-", "DPO": "C1s-"}  # of the frontier
AXES = ("kl", "win_rate_judge", "judge")
WIDEST = 50.0  # nats: the frontier's axis ends here, whatever lies beyond

@dataclass
class Config:
    folders: tuple = ("out/tiny/evaluate",)  # where results.json is, and report.md and the figures go

@contextlib.contextmanager
def drawing(path, rows, columns, size, **options):
    """The axes of a figure, which is written to path in the end."""
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    yield axes
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)

def draw_policy(results, name, folder):
    """A policy's learning curves, its snapshots' scores against KL, and histograms of scores: {title: path} of those
    that there are."""
    drawn, log, snapshots = {}, results["training"].get(name), results["snapshots"][name]
    flag = next((flag for flag in PANELS if flag in results["flags"][name]), None)
    if log and flag:
        x, panels = PANELS[flag]
        log = [line for line in log if x in line]  # not the last words of a stopped run
        drawn["learning curves"] = folder / f"{name}_curves.png"
        with drawing(drawn["learning curves"], 2, 3, (11, 5.5)) as axes:
            for axis, (metric, title) in zip(axes.flat, panels.items()):
                axis.plot([line[x] for line in log], [line[metric] for line in log])
                axis.set(title=title, xlabel=x)
    if len(snapshots) > 1:  # the first is the SFT model
        drawn["scores against KL"] = folder / f"{name}_kl.png"
        with drawing(drawn["scores against KL"], 1, 1, (6.5, 4.2)) as [[axis]]:
            for scorer, style in SCORERS.items():
                if scorer in snapshots[0]:
                    axis.plot(*zip(*((row["kl"], row[scorer]) for row in snapshots)), style, label=scorer)
            axis.set(xlabel="KL to the SFT model, nats per response", ylabel="mean score (SFT samples: mean 0, std 1)")
            axis.legend()
    drawn["histograms of the scores"] = folder / f"{name}_histograms.png"
    with drawing(drawn["histograms of the scores"], 1, len(results["histograms"]), (11, 3.2), sharey=True) as [axes]:
        for axis, (scorer, found) in zip(axes, results["histograms"].items()):
            for label in ("sft", name):
                axis.stairs(found["counts"][label], found["edges"], fill=True, alpha=0.6, label=label)
            axis.set(title=scorer, xlabel="score")
        axes[0].set_ylabel("responses")
        axes[0].legend()
    return drawn

def method(flags):
    """What trained a policy, by its flags: PPO, RLOO, GRPO, DPO, or "" for something else."""
    if "kl_coef" in flags:
        return flags.get("advantages", "gae").upper().replace("GAE", "PPO")
    return "DPO" if "beta" in flags else ""

def curves(results):
    """{method: {policy, or n of best-of-n: its row}}: the points that a line of the frontier joins."""
    found = {"best-of-n": {point["n"]: point for point in results["best_of_n"]}}
    for name, flags in results["flags"].items():
        found.setdefault(method(flags), {})[name] = results["policies"][name]
    return found

def by_kl(rows):
    """The rows of one of curves' methods, in order of KL."""
    return sorted(rows.values(), key=lambda row: row["kl"])

def draw_frontier(runs, path):
    """The judge's win rate and score against KL (Rafailov et al. 2023, figure 2): a line per method, its policies in
    order of KL, and snapshots (pale). Of several runs a thin line each, and the mean of each policy. Returns what lies
    beyond the axis."""
    each = [curves(results) for results in runs]
    lines = [(points, METHODS[method(results["flags"][name])][:2] + "-", {"alpha": 0.2, "linewidth": 1})
             for results in runs for name, points in results["snapshots"].items()
             if method(results["flags"][name])]  # points, style, look
    for label, style in METHODS.items():
        found = [one[label] for one in each if one.get(label)]
        if len(found) > 1:
            lines += [(by_kl(rows), style, {"alpha": 0.4, "linewidth": 0.7, "markersize": 2}) for rows in found]
            shared = [name for name in found[0] if all(name in rows for rows in found)]
            found = [{name: {key: mean(rows[name][key] for rows in found) for key in AXES} for name in shared}]
        lines += [(by_kl(rows), style, {"label": label, "linewidth": 2}) for rows in found]
    with drawing(path, 1, 2, (11, 4.6)) as [axes]:
        for axis, key, title in zip(axes, AXES[1:], ("win rate by the judge", "judge's mean score")):
            for points, style, look in lines:
                axis.plot([point["kl"] for point in points], [point[key] for point in points], style, **look)
            axis.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: x * abs(x)))
            axis.set_xlim(right=min(WIDEST, axis.get_xlim()[1]))
            axis.set(xlabel="KL to the SFT model, nats per response (root scale)", ylabel=title,
                     xticks=[tick for tick in (0, 1, 3, 6, 12, 25, 50) if tick <= axis.get_xlim()[1]])
        axes[0].axhline(0.5, color="gray", linewidth=1)
        axes[0].legend(loc="lower right")
    return "; ".join(f"{name} of seed {results['config']['seed']} at {row['kl']:.0f} nats, win rate "
                     f"{row['win_rate_judge']:.3f}" for results in runs for name, row in results["policies"].items()
                     if row["kl"] > WIDEST)

GAINS = list(COLUMNS)[:6]  # what every table of policies shows

def comparison(results):
    """The comparison: a row per policy."""
    for name, row in results["policies"].items():
        yield [name if row["prompts"] == results["prompts"] else f"{name} ({row['prompts']} prompts)", *cells([row])]

def other_prompts(results):
    """The policies on each file of prompts."""
    for kind, rows in {Path(results["config"]["prompts"]).stem: results["policies"], **results["others"]}.items():
        for name in results["samples"]:
            yield [kind.removeprefix("prompts_"), name, *cells([rows[name]], GAINS)]

def first_prompts(results):
    """All policies' responses to the first prompts of the evaluation file, with the judge's scores."""
    for row in results["first"]:
        for name, score in row["judge"].items():
            yield [escape(row["prompt"]) if name == "sft" else "", name, escape(row[name]), f"{score:.2f}"]

def human(results):
    """The reward models on held-out human comparisons, beside the baselines of study/card.py."""
    cards = [card for card in results["reward_models"].values() if card]
    for group in (group for group in cards[0] if "gap" not in group):
        rows = [card[group] for card in cards]
        longer, *words = [f"{row[name]['accuracy']:.3f}" if name in row else "-" for row, name in (
            (rows[0], "longer wins"), *((row, "bag of words") for row in rows))]
        yield [group.replace("_", " "), *(accuracy(row["reward model"]) for row in rows), longer, ", ".join(words),
               f"{rows[0]['people']:.3f}" if "people" in rows[0] else "-"]

def beside(folder, results):
    """What other commands left in the folder, "" if nothing: verdict.json on these samples, the judge's agreement with
    people before the table, and refusals.md without its title."""
    found, samples, path = load_json(folder / "verdict.json"), folder / "samples.jsonl", folder / "refusals.md"
    parts = {"verdict": "", "refusals": path.is_file() and path.read_text(encoding="utf-8").partition("\n\n")[2]}
    if found and not (samples.is_file() and digest(samples) != found["samples"]):
        card, rows = found["people"].get("both orders"), []
        fields = ["win_rate", *(f"win_rate_{name}" for name in SCORERS if name in results["policies"]["sft"])]
        for name, mine in found["policies"].items():
            row = {**results["policies"][name], **mine}
            rates = [accuracy({"accuracy": row[field], "interval": row[f"{field}_interval"]}) for field in fields]
            rows.append([name, *rates, str(row["prompts"]), str(row["ties"]), f"{row['flipped']:.3f}"])
        titles = ["policy", escape(found["labeler"]), *(field.removeprefix("win_rate_") for field in fields[1:])]
        people = f"{accuracy(card)} of {card['pairs']} pairs" if card else "not measured"
        parts["verdict"] = f"{people}.\n\n{table([*titles, 'prompts', 'ties', 'flipped'], rows)}"
    return parts

def parts_of(runs):
    """What the templates show of one run, or of several side by side."""
    first, stages = runs[0], runs[0]["stages"]
    judged = [name for name, card in first["reward_models"].items() if card]
    cost = [[name, f"{stage['seconds']:.1f}", str(stage["peak_memory_mb"])] for name, stage in stages.items()]
    total = ["together", f"{sum(stage['seconds'] for stage in stages.values()):.0f}", ""]

    def held_out(results):
        return [[name, accuracy(card), str(card["pairs"])] for name, card in results["held_out_rankings"].items()]

    return {
        "names": ", ".join(name for name in first["policies"] if name != "sft"),
        "machines": "; ".join(dict.fromkeys("{hardware}, torch {torch}, {date}".format(**results) for results in runs)),
        "policies": by_seed(runs, ["policy", *COLUMNS], comparison),
        "held_out": first["held_out_rankings"] and by_seed(runs, ["", "accuracy", "pairs"], held_out),
        "shown": "first" in first and table(["prompt", "policy", "response", "judge"], first_prompts(first)),
        "agreement": ", ".join(f"{name} {x:.3f}" for name, x in first["proxy_agreement"].items()),
        "others": first["others"] and by_seed(runs, ["prompts", "policy", *GAINS], other_prompts, keys=2),
        "human": judged and by_seed(runs, ["pairs", *judged, "longer wins", "bag of words", "one person"], human),
        "cost": stages and table(["stage", "seconds", "peak memory, MB"], [*cost, total])}

def policy_section(results, name, figures):
    """What report.md shows of one policy: its figures ({title: path}) and samples."""
    samples = table(["", "prompt", "SFT", "judge", "policy", "judge"], [
        [row["change"], escape(row["prompt"]), escape(row["sft"]), f"{row['sft_judge']:.2f}", escape(row["text"]),
         f"{row['judge']:.2f}"] for row in results["samples"][name]])
    return "\n\n".join([f"## {name}", *(f"![{title}]({path.name})" for title, path in figures.items()), samples])

def main(cfg):
    folders = [Path(folder) for folder in cfg.folders]
    runs = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    for folder, results in zip(folders, runs):
        draw_frontier([results], folder / "frontier.png")
        policies = [policy_section(results, name, draw_policy(results, name, folder)) for name in results["samples"]]
        parts = {**parts_of([results]), **beside(folder, results), "samples": "\n\n".join(policies)}
        fill(template("report.md"), folder / "report.md", [results], **parts)
    if len(runs) > 1 and folders[0].resolve().parent.parent.name == "results":  # the committed ones
        fill(template("seeds.md"), folders[0].parent.parent / "README.md", runs, **parts_of(runs))

if __name__ == "__main__":
    run(main, Config, words=("folders",))
