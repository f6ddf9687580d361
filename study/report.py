"""Draws what evaluate.py found, from results.json alone: report.md and its figures.

    python -m study.report out/tiny/evaluate      one run
    python -m study.report results/tiny/seed*     several: a report for each, and ../README.md with all side by side

Text that a model wrote is escaped: it cannot end a table, or put a link or an image into the report.
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # files, no window; a notebook's backend may not even be installed here
import matplotlib.pyplot as plt
import numpy as np

from common import run
from study.markdown import by_seed, escape, fill, number, share, table, template

SCORERS = {"proxy": "o-", "labeler": "s-", "judge": "^-"}
PANELS = {  # what is drawn of a training log: the horizontal axis, and {metric: title}
    "ppo": ("episodes", {"score": "reward-model score", "kl": "KL to the SFT model, nats", "kl_coef": "KL coefficient",
                         "length": "response length, tokens", "eos_rate": "EOS rate",
                         "entropy": "entropy, nats per token"}),
    "dpo": ("step", {"loss": "loss", "accuracy": "accuracy", "margin": "margin of implicit rewards",
                     "chosen_logprobs": "log-probability of chosen", "rejected_logprobs": "log-probability of rejected",
                     "grad_norm": "gradient norm"})}
WIDEST = 50.0  # nats: the frontier's axis ends here, whatever lies beyond


@dataclass
class Config:
    folders: str = "out/tiny/evaluate"  # where results.json is, and report.md and the figures go: folder,folder


# ---- figures -------------------------------------------------------------------------------------------------------


def kind_of(results, policy):
    """Which script trained a policy, by its flags: ppo, dpo, or "" for any other."""
    flags = results["flags"].get(policy, {})
    return "dpo" if "beta" in flags else "ppo" if "kl_coef" in flags else ""


def draw_policy(results, name, folder):
    """A policy's learning curves, its snapshots' scores against KL, and histograms of scores. Returns {title: file} of
    those that there are."""
    drawn, log, snapshots = {}, results["training"].get(name), results["snapshots"][name]
    if kind := log and kind_of(results, name):
        x, panels = PANELS[kind]
        figure, axes = plt.subplots(2, 3, figsize=(11, 5.5), layout="constrained")
        for axis, (metric, title) in zip(axes.flat, panels.items()):
            axis.plot([line[x] for line in log], [line[metric] for line in log])
            axis.set(title=title, xlabel=x)
        drawn["learning curves"] = save(figure, folder / f"{name}_curves.png")
    if len(snapshots) > 1:  # the first is the SFT model
        figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
        kl = [row["kl"] for row in snapshots]
        for scorer, style in SCORERS.items():
            if scorer in snapshots[0]:
                axis.plot(kl, [row[scorer] for row in snapshots], style, label=scorer)
        axis.set(xlabel="KL to the SFT model, nats per response", ylabel="mean score (SFT samples: mean 0, std 1)")
        axis.legend()
        drawn["scores against KL"] = save(figure, folder / f"{name}_kl.png")
    figure, axes = plt.subplots(1, len(results["histograms"]), figsize=(11, 3.2), sharey=True, layout="constrained")
    for axis, (scorer, found) in zip(axes, results["histograms"].items()):
        for label in ("sft", name):
            axis.stairs(found["counts"][label], found["edges"], fill=True, alpha=0.6, label=label)
        axis.set(title=scorer, xlabel="score")
    axes[0].set_ylabel("responses")
    axes[0].legend()
    drawn["histograms of the scores"] = save(figure, folder / f"{name}_histograms.png")
    return drawn


def draw_frontier(runs, path):
    """The judge's win rate and score against KL (Rafailov et al. 2023, figure 2), of one or several runs: best-of-n,
    policies of PPO and DPO (joined in order of KL), and snapshots (pale). Returns what lies beyond the axis."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    curves = []  # points, style, look
    for results in runs:
        curves += [(points, "C0-", {"alpha": 0.2, "linewidth": 1}) for points in results["snapshots"].values()]
        curves += [(results["best_of_n"], "k.-", {"label": "best-of-n"})]
        for kind, style in (("ppo", "C0o-"), ("dpo", "C1s-")):
            rows = [row for name, row in results["policies"].items() if kind_of(results, name) == kind]
            curves += [(sorted(rows, key=lambda row: row["kl"]), style, {"label": kind.upper()})]
    for axis, key, title in zip(axes, ("win_rate_judge", "judge"), ("win rate by the judge", "judge's mean score")):
        for points, style, look in curves:
            axis.plot([point["kl"] for point in points], [point[key] for point in points], style, **look)
        axis.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: x * abs(x)))
        axis.set_xlim(right=min(WIDEST, axis.get_xlim()[1]))
        axis.set(xlabel="KL to the SFT model, nats per response (root scale)", ylabel=title,
                 xticks=[tick for tick in (0, 1, 3, 6, 12, 25, 50) if tick <= axis.get_xlim()[1]])
    axes[0].axhline(0.5, color="gray", linewidth=1)
    handles, labels = axes[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles))  # one per method, not one per run
    axes[0].legend(entries.values(), entries.keys(), loc="lower right")
    save(figure, path)
    return [f"{name} of seed {results['config']['seed']} at {row['kl']:.0f} nats with a win rate of "
            f"{row['win_rate_judge']:.3f}" for results in runs for name, row in results["policies"].items()
            if row["kl"] > WIDEST]


def save(figure, path):
    """Write a figure as PNG, and close it: the file's name."""
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.name


# ---- tables: of one run, or of several seeds beside each other -------------------------------------------------------

GAINS = ["win rate", "at equal length", "proxy", "labeler", "judge", "KL, nats"]
POLICIES = ["policy", *GAINS, "length", "EOS rate", "unique bigrams", "perplexity"]


def gains(row):
    """The cells under GAINS."""
    return [number(row, "win_rate_judge"), number(row, "length_controlled"),
            *(number(row, name, ".2f") for name in (*SCORERS, "kl"))]


def policies(results):
    """The comparison: a row per policy."""
    for name, row in results["policies"].items():
        few = "" if row["prompts"] == results["prompts"] else f" ({row['prompts']} prompts)"
        yield [name + few, *gains(row), number(row, "length", ".1f"), number(row, "eos_rate"),
               number(row, "unique_bigrams"), number(row, "perplexity", ".1f")]


def other_prompts(results):
    """The policies on each file of prompts."""
    for kind, rows in {Path(results["config"]["prompts"]).stem: results["policies"], **results["others"]}.items():
        for name in results["samples"]:
            yield [kind.removeprefix("prompts_"), name, *gains(rows[name])]


def held_out(results):
    """How well each model orders the rankings that its own stage held out."""
    for name, card in results["held_out_rankings"].items():
        what = "reward model" if name == "proxy" else f"{name}: beta times the log-ratio to the SFT model"
        yield [what, share(card), str(card["pairs"])]


def human(results):
    """The reward models on held-out human comparisons, beside what study/card.py adds."""
    models = results["reward_models"].values()
    for group, row in (results["reward_models"].get("labeler") or results["reward_models"]["proxy"]).items():
        if "gap" not in group and all(group in card for card in models):
            words = [card[group].get("bag of words", {}) for card in models]
            yield [group.replace("_", " "), *(share(card[group]["reward model"]) for card in models),
                   ", ".join(number(card, "accuracy") for card in words),
                   number(row.get("longer wins", {}), "accuracy"), number(row, "people")]


def cost(results):
    """Time and memory of the stages."""
    rows = results["stages"]
    yield from ([name, f"{row['seconds']:.1f}", str(row["peak_memory_mb"])] for name, row in rows.items())
    yield ["sum, highest", f"{sum(row['seconds'] for row in rows.values()):.0f}",
           str(max(row["peak_memory_mb"] for row in rows.values()))]


def parts_of(runs):
    """What the templates show of one run, or of several side by side."""
    first = runs[0]
    machines = dict.fromkeys(f"{results['hardware']}, torch {results['torch']}, {results['date']}" for results in runs)
    judged = ["pairs", *first["reward_models"], "bag of words", "longer wins", "one person"]
    return {
        "names": ", ".join(name for name in first["policies"] if name != "sft"), "prompts": first["prompts"],
        "temperature": first["config"]["temperature"], "few": first["config"]["snapshot_count"],
        "seeds": ", ".join(str(results["config"]["seed"]) for results in runs), "machines": "; ".join(machines),
        "policies": by_seed(runs, POLICIES, policies),
        "held_out": first["held_out_rankings"] and by_seed(runs, ["", "accuracy", "pairs"], held_out),
        "agreement": ", ".join(f"{name} {x:.3f}" for name, x in first["proxy_agreement"].items()),
        "others": first["others"] and by_seed(runs, ["prompts", "policy", *GAINS], other_prompts, keys=2),
        "human": first["reward_models"] and by_seed(runs, judged, human),
        "cost": first["stages"] and table(["stage", "seconds", "peak memory, MB"], cost(first))}


def policy_lines(results, name, figures):
    """What report.md shows of one policy: its figures ({title: file}) and samples."""
    samples = table(["", "prompt", "SFT", "judge", "policy", "judge"], [
        [row["change"], escape(row["prompt"]), escape(row["sft"]), f"{row['sft_judge']:.2f}", escape(row["text"]),
         f"{row['judge']:.2f}"] for row in results["samples"][name]])
    return [f"## {name}", "", *(f"![{title}]({file})\n" for title, file in figures.items()), *samples]


def main(cfg):
    folders = [Path(folder) for folder in cfg.folders.split(",")]
    runs = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    for folder, results in zip(folders, runs):
        draw_frontier([results], folder / "frontier.png")
        samples = [line for name in results["samples"]
                   for line in policy_lines(results, name, draw_policy(results, name, folder))]
        fill(template("report.md"), folder / "report.md", **parts_of([results]), samples=samples)
    if len(runs) > 1 and folders[0].name.startswith("seed"):
        fill(template("seeds.md"), folders[0].parent.parent / "README.md", **parts_of(runs))


if __name__ == "__main__":
    run(main, Config, words=("folders...",))
