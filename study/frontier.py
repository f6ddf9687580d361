"""What study.sh found, over all seeds, as figures and tables: from the results.json of its evaluations alone.

    python study.py out/tiny/study                                         of one run
    python study.py results/tiny/seed*/study --out results/study           the committed ones

Writes frontier.png, over_optimisation.png and study.md. Papers: Rafailov et al. 2023, figure 2 (frontier); Gao et al.
2022 (over-optimisation, and the forms that are fitted); Coste et al. 2023 (ensembles).
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import write_atomic
from common import run
from report import SCORERS, frontier, plt, rate, read_results, save
from terminal import words_for


@dataclass
class Config:
    folders: str = "out/tiny/study"  # folder of each seed's study: folder,folder
    out: str = ""                    # folder for figures and tables; empty: the first of the folders


SIZES = {"250": "250 comparisons", "1000": "1,000 comparisons", "all": "all comparisons",
         "250-mean": "mean of three, 250", "250-min": "least of three, 250"}  # reward models of over-optimisation
NAMES = ["frontier", *(f"over-{size}" for size in SIZES), "labels-exact", "labels-flipped"]  # evaluations of study.sh
COLORS = {"proxy": "C0", "labeler": "C1", "judge": "C2"}


# ---- Gao et al. 2022: score against d, the root of KL ----------------------------------------------------------------
# They found the gold score to follow d (a - b d) for best-of-n and d (a - b ln d) for RL: a is the slope of what is
# really learned, b how fast over-optimisation eats it. KL does not measure the two methods alike: compare shapes.


def root_kl(points):
    """d, the root of KL, of the points of a curve: (N,). An estimate of KL near 0 can be below it."""
    return torch.tensor([max(0.0, point["kl"]) for point in points], dtype=torch.double).sqrt()


def gains(points, scorer):
    """A scorer's means above that of the first point, the SFT model: (N,)."""
    scores = torch.tensor([point[scorer] for point in points], dtype=torch.double)
    return scores - scores[0]


def basis(d, method):
    """The columns of a form, so that score = basis @ (a, -b): d (N,) to (N, 2)."""
    return torch.stack([d, d * d if method == "best-of-n" else torch.special.xlogy(d, d)], dim=1)


def fit(d, scores, method):
    """a, b, d at the peak (None: there is none), and the root mean square of the residuals where d > 0, by least
    squares: d, scores (N,). At d = 0, the SFT model, the forms are 0, and so are the scores."""
    d, scores = d[d > 0], scores[d > 0]
    a, minus_b = torch.linalg.lstsq(basis(d, method), scores[:, None]).solution.squeeze(1).tolist()
    residuals = scores - basis(d, method) @ torch.tensor([a, minus_b], dtype=torch.double)
    b, peak = -minus_b, None  # at the peak the derivative is 0
    if method == "best-of-n" and a > 0 and b > 0:
        peak = a / (2 * b)  # a - 2 b d = 0
    elif method != "best-of-n" and b > 0:
        peak = math.exp(min(a / b - 1, 50))  # a - b ln d - b = 0; 50: no overflow, and far beyond any run
    return a, b, peak, residuals.square().mean().sqrt().item()


def turn(points):
    """Where the labeler's score is highest, and whether that is a turn: at the end it is lower by more than 0.1 while
    the proxy is higher: (point, turned). A rule of thumb: the standard error of a mean over 256 prompts is 0.05."""
    best, last = max(points, key=lambda point: point["labeler"]), points[-1]
    return best, last["proxy"] > best["proxy"] and last["labeler"] < best["labeler"] - 0.1


# ---- figures and tables ----------------------------------------------------------------------------------------------


def curves(seeds, size):
    """{method: one curve per seed} of the over-optimisation against one reward model."""
    runs = [seed[f"over-{size}"] for seed in seeds]
    return {"PPO": [run["snapshots"][f"free-{size}"] for run in runs],
            "best-of-n": [run["best_of_n"] for run in runs]}


def draw_over_optimisation(seeds, path):
    """A column per reward model, PPO above best-of-n: the scorers of each seed, the form fitted to the labeler's score,
    and where that turns."""
    figure, axes = plt.subplots(2, len(SIZES), figsize=(3.4 * len(SIZES), 6.4), sharey="row", sharex="row")
    for column, (size, title) in zip(axes.T, SIZES.items()):
        for axis, (method, runs) in zip(column, curves(seeds, size).items()):
            for points in runs:
                d = root_kl(points)
                for scorer, style in SCORERS.items():
                    axis.plot(d, gains(points, scorer), style, color=COLORS[scorer], markersize=3, linewidth=0.8,
                              alpha=0.6, label=scorer if points is runs[0] else None)
                a, b, *_ = fit(d, gains(points, "labeler"), method)
                x = torch.linspace(0, d.max().item(), 100, dtype=torch.double)
                axis.plot(x, basis(x, method) @ torch.tensor([a, -b], dtype=torch.double), "--", color="k", linewidth=1,
                          label="labeler, fitted" if points is runs[0] else None)
                point, turned = turn(points)
                if turned:
                    axis.plot(root_kl([point]), point["labeler"] - points[0]["labeler"], "k*", markersize=11)
            axis.set(title=f"{method}\n{title}", xlabel="root of KL")
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("score above SFT")
    axes[0, 0].legend()
    save(figure, path)


def over_seeds(values, form=".2f"):
    """Mean over the seeds, and, if there are several, the lowest to the highest."""
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):{form}}{spread}"


def frontier_table(runs):
    """Every policy of the frontier over the seeds, by KL."""
    lines = ["| policy | KL, nats | win rate | proxy | labeler | judge | length | distinct-2 | perplexity |",
             "|---|---|---|---|---|---|---|---|---|"]
    names = sorted(runs[0]["policies"], key=lambda name: runs[0]["policies"][name]["kl"])
    for name in names:
        rows = [results["policies"][name] for results in runs]
        shown = {"kl": ".1f", "win_rate_judge": ".3f", "proxy": ".2f", "labeler": ".2f", "judge": ".2f",
                 "length": ".1f", "distinct_2": ".3f", "perplexity": ".0f"}
        cells = [over_seeds([row[key] for row in rows], form) if key in rows[0] else "-" for key, form in shown.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def equal_kl(runs):
    """The judge's win rate of each DPO policy beside PPO's at the same KL, by linear interpolation between the SFT
    model and PPO's policies."""
    lines = ["| seed | DPO policy | its KL | win rate, DPO | win rate, PPO at that KL |", "|---|---|---|---|---|"]
    for results in runs:
        rows, seed = results["policies"], results["config"]["seed"]
        ppo = sorted((row["kl"], row["win_rate_judge"]) for name, row in rows.items() if name.startswith("ppo"))
        for name in sorted((name for name in rows if name.startswith("dpo")), key=lambda name: rows[name]["kl"]):
            kl, at = rows[name]["kl"], f"- (PPO ends at {ppo[-1][0]:.1f})"
            for (x0, y0), (x1, y1) in zip([(0.0, 0.5), *ppo], ppo):
                at = f"{y0 + (y1 - y0) * (kl - x0) / (x1 - x0):.3f}" if x0 < x1 and x0 <= kl <= x1 else at
            lines.append(f"| {seed} | {name} | {kl:.1f} | {rate(rows[name], 'win_rate_judge')} | {at} |")
    return lines


def fit_table(seeds):
    """The forms fitted to the labeler's score: coefficients, peak and residuals."""
    lines = ["| reward model | method | seed | a | b | peak at KL | measured up to KL | residual |",
             "|---|---|---|---|---|---|---|---|"]
    for size, title in SIZES.items():
        for method, runs in curves(seeds, size).items():
            for seed, points in zip(seeds, runs):
                d, number = root_kl(points), seed["frontier"]["config"]["seed"]
                a, b, peak, residual = fit(d, gains(points, "labeler"), method)
                where = "none" if peak is None else "beyond" if peak > d.max() else f"{peak**2:.1f}"
                lines.append(f"| {title} | {method} | {number} | {a:.3f} | {b:.3f} | {where} | {d.max()**2:.1f} | "
                             f"{residual:.3f} |")
    return lines


def turn_table(seeds):
    """Where the labeler is highest in each run of PPO without a leash; what each scorer says there and at the end."""
    lines = ["| reward model | seed | agrees with the labeler | a turn | KL there, at the end "
             "| labeler there, at the end | proxy there, at the end | judge there, at the end | win rate at the end |",
             "|---|---|---|---|---|---|---|---|---|"]
    for size, title in SIZES.items():
        for seed in seeds:
            results = seed[f"over-{size}"]
            points = results["snapshots"][f"free-{size}"]
            (best, turned), last = turn(points), points[-1]
            cells = [f"{best[key]:{form}}, {last[key]:{form}}" for key, form in (
                ("kl", ".1f"), ("labeler", ".2f"), ("proxy", ".2f"), ("judge", ".2f"))]
            lines.append(f"| {title} | {results['config']['seed']} | {results['proxy_agreement']['labeler']:.3f} | "
                         f"{'yes' if turned else 'no'} | {' | '.join(cells)} | {last['win_rate_judge']:.3f} |")
    return lines


def labels_table(seeds):
    """What labels that disagree cost: reward model and policy."""
    lines = ["| labels | reward model agrees with the labeler, fresh SFT samples | with people, movie pairs | "
             "win rate of PPO | its labeler score | its KL |", "|---|---|---|---|---|---|"]
    for title, name, policy in [("without noise", "labels-exact", "ppo-exact"), ("people's noise", "frontier", "ppo"),
                                ("a quarter upside down", "labels-flipped", "ppo-flipped")]:
        runs = [seed[name] for seed in seeds]
        rows = [results["policies"][policy] for results in runs]
        cards = [results["reward_models"].get("proxy", {}).get("movie, random") for results in runs]
        people = over_seeds([card["reward model"]["accuracy"] for card in cards], ".3f") if all(cards) else "-"
        lines.append(f"| {title} | {over_seeds([results['proxy_agreement']['labeler'] for results in runs], '.3f')} | "
                     f"{people} | {over_seeds([row['win_rate_judge'] for row in rows], '.3f')} | "
                     f"{over_seeds([row['labeler'] for row in rows])} | "
                     f"{over_seeds([row['kl'] for row in rows], '.1f')} |")
    return lines


def main(cfg):
    seeds = [{name: read_results(Path(folder) / name / "results.json") for name in NAMES}
             for folder in cfg.folders.split(",")]
    out = Path(cfg.out or cfg.folders.split(",")[0])
    out.mkdir(parents=True, exist_ok=True)
    runs = [seed["frontier"] for seed in seeds]
    frontier(runs, out / "frontier.png")
    draw_over_optimisation(seeds, out / "over_optimisation.png")
    lines = ["# The study", "", f"Seeds {', '.join(str(results['config']['seed']) for results in runs)}; mean over the "
             f"seeds, lowest to highest in brackets; {runs[0]['hardware']}, torch {runs[0]['torch']}, "
             f"{runs[0]['date']}.", "",
             "## The frontier", "", "![frontier](frontier.png)", "", *frontier_table(runs), "",
             "DPO against PPO at equal KL:", "", *equal_kl(runs), "", "## Over-optimisation", "",
             "![over-optimisation](over_optimisation.png)", "",
             "PPO without a leash, and best-of-n. Where the labeler is highest (there), and the end of the run; a "
             "turn: from there to the end the labeler falls by more than 0.1 while the proxy climbs (a star in the "
             "figure). The scores of three reward models together are not normalised again.", "",
             *turn_table(seeds), "",
             "Fitted to the labeler's score above SFT, which Gao et al. call gold, with d the root of KL: d (a - b d) "
             "for best-of-n, d (a - b ln d) for PPO. Residual: root mean square, in units of score.", "",
             *fit_table(seeds), "", "## Labels that disagree", "",
             *labels_table(seeds), ""]
    write_atomic(out / "study.md", lambda temporary: temporary.write_text("\n".join(lines), encoding="utf-8"))
    print(f"study: {out / 'study.md'}")


if __name__ == "__main__":
    words_for("folders", several=True)
    run(main, Config)
