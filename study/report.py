"""The report of an evaluation: tables and figures from results.json, and from nothing else.

    python report.py out/tiny/evaluate          evaluate.py calls it; by hand it draws everything anew, without training

Writes report.md and figures into the folder that holds results.json.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from checkpoint import write_atomic
from common import UserError, check, run
from terminal import words_for

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt  # noqa: E402


@dataclass
class Config:
    folders: str = "out/tiny/evaluate"  # where results.json is, and where report.md and the figures go: folder,folder


# What is drawn of a training log: the horizontal axis, and {metric: its title}.
PANELS = {"ppo": ("episodes", {
              "score": "reward-model score", "kl": "KL to the SFT model, nats per response",
              "kl_coef": "KL coefficient", "length": "response length, tokens",
              "end_rate": "share that reach end of text", "entropy": "entropy, nats per token"}),
          "dpo": ("step", {
              "loss": "loss", "accuracy": "share of pairs in the right order", "margin": "margin of implicit rewards",
              "chosen_logprobs": "log-probability of chosen, nats",
              "rejected_logprobs": "log-probability of rejected, nats", "grad_norm": "gradient norm"})}
SCORERS = {"proxy": "o-", "labeler": "s-", "judge": "^-"}


# ---- figures ---------------------------------------------------------------------------------------------------------


def kind_of(results, policy):
    """What trained a policy, by its flags: ppo, dpo, or "" for anything else."""
    flags = results["flags"].get(policy, {})
    return "dpo" if "beta" in flags else "ppo" if "kl_coef" in flags else ""


def log_of(results, policy):
    """The lines of a policy's log that have all that PANELS shows; [] for another stage's log."""
    x, panels = PANELS.get(kind_of(results, policy), ("", {}))
    return [line for line in results["training"].get(policy, []) if line.keys() >= {x, *panels}]


def learning_curves(results, policy, path):
    """The metrics of PANELS over a run."""
    (x, panels), log = PANELS[kind_of(results, policy)], log_of(results, policy)
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5))
    for axis, (name, title) in zip(axes.flat, panels.items()):
        axis.plot([line[x] for line in log], [line[name] for line in log])
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
    save(figure, path)


def over_optimisation(snapshots, path):
    """Scores of the reward models against KL, over a policy's snapshots, of which the first is the SFT model."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    for name, style in SCORERS.items():
        if name in snapshots[0]:
            axis.plot([row["kl"] for row in snapshots], [row[name] for row in snapshots], style, label=name)
    axis.set(xlabel="KL to the SFT model, nats per response", ylabel="mean score (SFT samples: mean 0, std 1)")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def policies_of(results, kind):
    """The rows of the policies that ppo.py or dpo.py trained, in order of KL."""
    rows = [row for policy, row in results["policies"].items() if kind_of(results, policy) == kind]
    return sorted(rows, key=lambda row: row["kl"])


def signed_root(x):
    """The root of KL: the scale on which Gao et al. 2022 draw it. An estimate near 0 may be below it."""
    return np.sign(x) * np.sqrt(np.abs(x))


def frontier(runs, path):
    """The judge's win rate and score against KL: best-of-n, PPO's and DPO's policies (joined in order of KL), and PPO's
    snapshots (pale), of one or several runs. As in figure 2 of Rafailov et al. 2023.

    runs: contents of results.json, of the same policies from several seeds.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    for axis, key, title in zip(axes, ("win_rate_judge", "judge"), ("win rate by the judge", "judge's mean score")):
        for i, results in enumerate(runs):
            def draw(points, style, label=None, **how):
                axis.plot([point["kl"] for point in points], [point[key] for point in points], style,
                          label=None if i else label, **how)

            for points in results["snapshots"].values():
                draw(points, "C0-", alpha=0.2, linewidth=1)
            draw(results["best_of_n"], "k.-", "best-of-n")
            draw(policies_of(results, "ppo"), "C0o-", "PPO")
            draw(policies_of(results, "dpo"), "C1s-", "DPO")
        axis.set_xscale("function", functions=(signed_root, lambda x: x * abs(x)))
        axis.set(xlabel="KL to the SFT model, nats per response (root scale)", ylabel=title,
                 xticks=[tick for tick in (0, 1, 3, 6, 12, 25, 50, 100, 200, 400) if tick <= axis.get_xlim()[1]])
        axis.grid(alpha=0.3)
    axes[0].axhline(0.5, color="gray", linewidth=1)
    axes[0].legend()
    save(figure, path)


def score_histograms(histograms, policy, path):
    """Scores of the reward models before (sft) and after."""
    figure, axes = plt.subplots(1, len(histograms), figsize=(11, 3.2), sharey=True)
    for axis, (scorer, made) in zip(axes, histograms.items()):
        for name in ("sft", policy):
            axis.stairs(made["counts"][name], made["edges"], fill=True, alpha=0.6, label=name)
        axis.set(title=scorer, xlabel="score")
    axes[0].set_ylabel("responses")
    axes[0].legend()
    save(figure, path)


def save(figure, path):
    """Write a figure as PNG, atomically, and close it."""
    figure.tight_layout()
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


# ---- tables ----------------------------------------------------------------------------------------------------------


def interval(value, ends):
    """value (low to high)"""
    return f"{value:.3f} ({ends[0]:.3f} to {ends[1]:.3f})"


def rate(row, name):
    """A win rate of a row with its interval; - where there is none."""
    return interval(row[name], row[f"{name}_interval"]) if name in row else "-"


def scores_of(row):
    """The mean scores of a row; - where there is no such scorer."""
    return [f"{row[scorer]:.2f}" if scorer in row else "-" for scorer in SCORERS]


def escape(text):
    """Text from a model as plain text inside a Markdown table."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"[\\`*_\[\]<>|#&]", lambda special: f"&#{ord(special[0])};", text)


def policy_table(results):
    """The comparison: one row per policy."""
    lines = ["| policy | win rate | at equal length | proxy | labeler | judge | KL, nats | length | ends | distinct-2 "
             "| perplexity |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, row in results["policies"].items():
        perplexity = f"{row['perplexity']:.1f}" if "perplexity" in row else "-"
        few = "" if row["prompts"] == results["prompts"] else f" ({row['prompts']} prompts)"
        lines.append(f"| {name}{few} | {rate(row, 'win_rate_judge')} | {rate(row, 'length_controlled')} | "
                     f"{' | '.join(scores_of(row))} | {row['kl']:.2f} | {row['length']:.1f} | {row['end_rate']:.3f} | "
                     f"{row['distinct_2']:.3f} | {perplexity} |")
    return lines


def human_table(models):
    """The reward models on held-out human comparisons: models is {name: report card}."""
    teacher = "labeler" if "labeler" in models else "proxy"  # learned from people
    titles = [*models, f"bag of words (of the {teacher}'s half)", "longer wins", "one person"]
    lines = [f"| comparisons | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for group, row in models[teacher].items():
        # By rating gap: in report_card.json of each reward model.
        if "gap" not in group and all(group in card for card in models.values()):
            cells = [card[group]["reward model"] for card in models.values()]
            cells = [interval(cell["accuracy"], cell["interval"]) for cell in cells]
            people = f"{row['people']:.3f}" if "people" in row else ""
            lines.append(f"| {group} | {' | '.join(cells)} | {row['bag of words']['accuracy']:.3f} | "
                         f"{row['longer wins']['accuracy']:.3f} | {people} |")
    return lines


def policy_section(name, results):
    """What report.md shows of one policy."""
    lines = [f"## {name}", ""]
    if log_of(results, name):
        lines += [f"![learning curves]({name}_curves.png)", "", "Learning curves of the run.", ""]
    if len(results["snapshots"][name]) > 1:
        lines += [f"![scores against KL]({name}_kl.png)", "",
                  "Proxy, labeler and judge against KL over the run's snapshots "
                  f"({results['config']['snapshot_count']} prompts each). Where the proxy climbs and the labeler "
                  "falls, the policy exploits the proxy's errors: over-optimisation. Where the labeler climbs and the "
                  "judge falls, it exploits the labeler's. Errors that all three share, none of them shows: read the "
                  "samples.", ""]
    lines += [f"![score histograms]({name}_histograms.png)", "", "Scores before (sft) and after.", "",
              "Samples with the largest, the middle and the smallest change of the judge's score:", "",
              "| | prompt | SFT | judge | policy | judge |", "|---|---|---|---|---|---|"]
    return lines + [f"| {row['change']} | {escape(row['prompt'])} | {escape(row['sft'])} | {row['sft_judge']:.2f} | "
                    f"{escape(row['text'])} | {row['judge']:.2f} |" for row in results["samples"][name]] + [""]


def labeler_section(results):
    """Reward models that learned from different labelers, and the policies that they lead to."""
    samples = ("movie, random", "movie, same_sign")
    lines = ["## Who ranked", "", "| labeler | rankings | in the order of its own held-out rankings | as people "
             "(random) | as people (same sign) | policy | win rate | at equal length | KL, nats |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, row in results["labelers"].items():
        cells = [row["held-out"]] + [row["people"].get(sample) for sample in samples]
        policy = results["policies"][name]
        lines.append(f"| {escape(row['labeler'])} | {row['rankings']} | " + " | ".join(
            interval(cell["accuracy"], cell["interval"]) if cell else "-" for cell in cells)
            + f" | {name} | {rate(policy, 'win_rate_judge')} | {rate(policy, 'length_controlled')} | "
              f"{policy['kl']:.2f} |")
    return lines + ["", "A reward model from each labeler's rankings: its accuracy on rankings of its labeler "
                    "that it has not seen, and on people's held-out comparisons of film reviews (all, "
                    "and those whose means have the same sign), which no labeler here made; and the policy that PPO "
                    "trained on it.", ""]


def report_lines(results):
    """The lines of report.md."""
    cfg, policies = results["config"], list(results["samples"])
    lines = [f"# Report: {', '.join(name for name in results['policies'] if name != 'sft')} against sft", "",
             f"{results['prompts']} held-out prompts, temperature {cfg['temperature']}, seed {cfg['seed']}; "
             f"{results['hardware']}, torch {results['torch']}, {results['date']}.",
             "Win rates are the judge's, against the SFT model's answer to the same prompt, ties counted half, with "
             "95 % bootstrap intervals. Scores: SFT samples on training prompts have mean 0 and standard deviation 1 "
             "(an ensemble's are not normalised again).", "",
             *policy_table(results), "",
             "Perplexity: on text that no stage has seen, per token. KL: mean of log p(policy) - log p(SFT); of "
             "best-of-n log n - (n - 1) / n, an upper bound. distinct-2: share of different pairs of neighbouring "
             "tokens, which falls as texts grow alike (and as there are more of them).", "",
             "![win rate and score against KL](frontier.png)", "",
             "The frontier: what each method gains (up) for how far it leaves the SFT model (right); at equal KL, "
             "higher is better. Best-of-n: n = 1, 2, 4, ..., chosen by the proxy, each point the mean over all subsets "
             "of one pool; its KL is an upper bound. PPO and DPO: the policies of the table; pale: PPO's snapshots. KL "
             "is at the sampling temperature.", ""]
    if results["held_out_rankings"]:
        lines += ["## On held-out rankings", "", "| | in the order of the rankings | pairs |", "|---|---|---|"]
        for name, card in results["held_out_rankings"].items():
            what = "reward model" if name == "proxy" else f"{name}: beta times the log-ratio to the SFT model"
            lines.append(f"| {what} | {interval(card['accuracy'], card['interval'])} | {card['pairs']} |")
        lines += ["", "Each on the rankings that its own stage held out: the same ones for all in train_all.sh.", ""]
    if agreement := results["proxy_agreement"]:
        lines += ["On pairs of fresh SFT samples for one prompt, the proxy orders as the others do: " + ", ".join(
            f"{name} {share:.3f}" for name, share in agreement.items()) + " of the pairs.", ""]
    if len({row.get("reward") for row in results.get("labelers", {}).values()}) > 1:
        lines += labeler_section(results)
    if results["others"]:
        lines += ["## Prompts of other kinds", "",
                  f"{cfg['snapshot_count']} prompts of each file. No demonstration, ranking or prompt of PPO was of "
                  "these kinds (base model, labeler and judge may know them).", "",
                  "| prompts | policy | win rate | at equal length | proxy | labeler | judge | KL, nats |",
                  "|---|---|---|---|---|---|---|---|"]
        for kind, rows in {Path(cfg["prompts"]).stem: results["policies"], **results["others"]}.items():
            for name, row in ((name, rows[name]) for name in policies):
                lines.append(f"| {kind} | {name} | {rate(row, 'win_rate_judge')} | {rate(row, 'length_controlled')} | "
                             f"{' | '.join(scores_of(row))} | {row['kl']:.2f} |")
        lines += [""]
    if results["reward_models"]:
        lines += ["## Reward models on held-out human comparisons", "", *human_table(results["reward_models"]), "",
                  "Chance is 0.5. One person: how often one rater agrees with the mean of the others, where neither "
                  "ties (which flatters people: they tie on close pairs). Intervals: 95 %, jackknife over sentences.",
                  ""]
    for name in policies:
        lines += policy_section(name, results)
    if stages := results["stages"]:
        lines += ["## Time and memory", "", "| stage | seconds | peak memory, MB |", "|---|---|---|"]
        lines += [f"| {name} | {row['seconds']} | {row['peak_memory_mb']} |" for name, row in stages.items()]
        lines += [f"| sum, highest | {sum(row['seconds'] for row in stages.values()):.0f} | "
                  f"{max(row['peak_memory_mb'] for row in stages.values())} |", "",
                  "Of the finished stages in this run's folder; not of preparing the data, nor of this evaluation.", ""]
    return lines


def write(folder, results):
    """Draw all figures and write report.md."""
    folder = Path(folder)
    for old in [*folder.glob("*_curves.png"), *folder.glob("*_kl.png"), *folder.glob("*_histograms.png")]:
        old.unlink()  # it may be of a policy that is not measured any more
    frontier([results], folder / "frontier.png")
    for name in results["samples"]:
        score_histograms(results["histograms"], name, folder / f"{name}_histograms.png")
        if log_of(results, name):
            learning_curves(results, name, folder / f"{name}_curves.png")
        if len(results["snapshots"][name]) > 1:
            over_optimisation(results["snapshots"][name], folder / f"{name}_kl.png")
    lines = "\n".join(report_lines(results))
    write_atomic(folder / "report.md", lambda temporary: temporary.write_text(lines, encoding="utf-8"))


def read_results(path):
    """The content of a results.json; UserError if it is none."""
    path = Path(path)
    check(path.is_file(), f"{path}: no such file (evaluate.py writes it)")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    check(isinstance(results, dict) and "best_of_n" in results, f"{path}: not from this version's evaluate.py")
    return results


def main(cfg):
    for folder in cfg.folders.split(","):
        write(folder, read_results(Path(folder) / "results.json"))
        print(f"report: {Path(folder) / 'report.md'}")


if __name__ == "__main__":
    words_for("folders", several=True)
    run(main, Config)
