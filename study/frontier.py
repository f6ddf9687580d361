"""Where RLHF stops helping: the figures and tables of what frontier.sh ran, from its results alone.

    python -m study.frontier out/tiny/study        of one run (frontier.sh has called study.collect)
    python -m study.frontier results/study         the committed seeds

Writes frontier.png, over_optimisation.png and study.md. Papers: Rafailov et al. 2023, figure 2 (frontier); Gao et al.
2022 (over-optimisation, and the forms that are fitted); Coste et al. 2023 (ensembles).
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common import run
from study.collect import read
from study.markdown import fill, number, spread, table, template
from study.report import SCORERS, draw_frontier, plt, save


@dataclass
class Config:
    folder: str = "out/tiny/study"  # results.json of study.collect; figures and tables go there, too


SIZES = {"250": "250 comparisons", "1000": "1,000 comparisons", "all": "all comparisons",
         "250-mean": "mean of three, 250", "250-min": "least of three, 250"}  # reward models of over-optimisation


# ---- Gao et al. 2022: score against d, the root of KL --------------------------------------------------------------
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


def curves(seeds, size):
    """{method: one curve per seed} of the over-optimisation against one reward model."""
    return {"PPO": [seed[f"over-{size}"]["snapshots"][f"free-{size}"] for seed in seeds],
            "best-of-n": [seed[f"over-{size}"]["best_of_n"] for seed in seeds]}


def draw_over_optimisation(seeds, path):
    """A column per reward model, PPO above best-of-n: the scorers of each seed, the form fitted to the labeler's score,
    and where that turns."""
    figure, axes = plt.subplots(2, len(SIZES), figsize=(13, 5.5), sharey="row", sharex="row", layout="constrained")
    for column, (size, title) in zip(axes.T, SIZES.items()):
        column[0].set_title(title)
        for axis, (method, runs) in zip(column, curves(seeds, size).items()):
            for points in runs:
                d = root_kl(points)
                for color, (scorer, style) in enumerate(SCORERS.items()):
                    axis.plot(d, gains(points, scorer), style, color=f"C{color}", markersize=3, linewidth=0.8, alpha=0.6)
                a, b, *_ = fit(d, gains(points, "labeler"), method)
                x = torch.linspace(0, d.max().item(), 100, dtype=torch.double)
                axis.plot(x, basis(x, method) @ torch.tensor([a, -b], dtype=torch.double), "--", color="k", linewidth=1)
                point, turned = turn(points)
                if turned:
                    axis.plot(root_kl([point]), point["labeler"] - points[0]["labeler"], "k*", markersize=11)
            axis.set_xlabel("root of KL")
    for axis, method in zip(axes[:, 0], curves(seeds, "all")):
        axis.set_ylabel(f"{method}: score above SFT")
    figure.legend(axes[0, 0].lines[:4], [*SCORERS, "labeler, fitted"], loc="outside upper center", ncols=4)
    save(figure, path)


# ---- tables --------------------------------------------------------------------------------------------------------


def frontier_rows(runs):
    """Every policy of the frontier over the seeds, by KL."""
    shown = {"kl": ".1f", "win_rate_judge": ".3f", "proxy": ".2f", "labeler": ".2f", "judge": ".2f", "length": ".1f",
             "unique_bigrams": ".3f", "perplexity": ".0f"}
    for name in sorted(runs[0]["policies"], key=lambda name: runs[0]["policies"][name]["kl"]):
        rows = [results["policies"][name] for results in runs]
        yield [name, *(spread([row[key] for row in rows], form) if key in rows[0] else "-" for key, form in shown.items())]


def equal_kl(runs):
    """The judge's win rate of each DPO policy beside PPO's at the same KL, by linear interpolation between the SFT
    model and PPO's policies."""
    for results in runs:
        rows = results["policies"]
        ppo = sorted((row["kl"], row["win_rate_judge"]) for name, row in rows.items() if name.startswith("ppo"))
        for name in sorted((name for name in rows if name.startswith("dpo")), key=lambda name: rows[name]["kl"]):
            kl, at = rows[name]["kl"], f"- (PPO ends at {ppo[-1][0]:.1f})"
            for (x0, y0), (x1, y1) in zip([(0.0, 0.5), *ppo], ppo):
                if x0 < x1 and x0 <= kl <= x1:
                    at = f"{y0 + (y1 - y0) * (kl - x0) / (x1 - x0):.3f}"
            yield [str(results["config"]["seed"]), name, f"{kl:.1f}", number(rows[name], "win_rate_judge"), at]


def fit_rows(seeds):
    """The forms fitted to the labeler's score: coefficients, peak and residuals."""
    for size, title in SIZES.items():
        for method, runs in curves(seeds, size).items():
            for seed, points in zip(seeds, runs):
                d = root_kl(points)
                a, b, peak, residual = fit(d, gains(points, "labeler"), method)
                where = "none" if peak is None else "beyond" if peak > d.max() else f"{peak**2:.1f}"
                yield [title, method, str(seed["frontier"]["config"]["seed"]), f"{a:.3f}", f"{b:.3f}", where,
                       f"{d.max()**2:.1f}", f"{residual:.3f}"]


def turn_rows(seeds):
    """Where the labeler is highest in each run of PPO without a KL penalty; what each scorer says there and at the end."""
    for size, title in SIZES.items():
        for seed in seeds:
            results = seed[f"over-{size}"]
            points = results["snapshots"][f"free-{size}"]
            (best, turned), last = turn(points), points[-1]
            yield [title, str(results["config"]["seed"]), f"{results['proxy_agreement']['labeler']:.3f}",
                   "yes" if turned else "no", f"{best['kl']:.1f}, {last['kl']:.1f}",
                   *(f"{best[key]:.2f}, {last[key]:.2f}" for key in ("labeler", "proxy", "judge")),
                   f"{last['win_rate_judge']:.3f}"]


def label_rows(seeds):
    """What labels that disagree cost: reward model and policy."""
    for title, name, policy in [("without noise", "labels-exact", "ppo-exact"), ("people's noise", "frontier", "ppo"),
                                ("a quarter reversed", "labels-flipped", "ppo-flipped")]:
        runs = [seed[name] for seed in seeds]
        rows = [results["policies"][policy] for results in runs]
        cards = [results["reward_models"].get("proxy", {}).get("movie, random") for results in runs]
        yield [title, spread([results["proxy_agreement"]["labeler"] for results in runs], ".3f"),
               spread([card["reward model"]["accuracy"] for card in cards], ".3f") if all(cards) else "-",
               *(spread([row[key] for row in rows], form) for key, form in (
                   ("win_rate_judge", ".3f"), ("labeler", ".2f"), ("kl", ".1f")))]


def main(cfg):
    folder = Path(cfg.folder)
    seeds = list(read(folder / "results.json", 7).values())
    runs = [seed["frontier"] for seed in seeds]
    beyond = draw_frontier(runs, folder / "frontier.png")
    draw_over_optimisation(seeds, folder / "over_optimisation.png")
    score_at = ["labeler there, at the end", "proxy there, at the end", "judge there, at the end"]
    fill(template("study.md"), folder / "study.md", machine=f"{runs[0]['hardware']}, torch {runs[0]['torch']}, {runs[0]['date']}",
         seeds=", ".join(str(results["config"]["seed"]) for results in runs),
         beyond=f"Beyond the axis: {'; '.join(beyond)}." if beyond else "All policies are within the axis.",
         frontier=table(["policy", "KL, nats", "win rate", *SCORERS, "length", "unique bigrams", "perplexity"],
                        frontier_rows(runs)),
         equal=table(["seed", "DPO policy", "its KL", "win rate, DPO", "win rate, PPO at that KL"], equal_kl(runs)),
         turns=table(["reward model", "seed", "agrees with the labeler", "a turn", "KL there, at the end", *score_at,
                      "win rate at the end"], turn_rows(seeds)),
         fits=table(["reward model", "method", "seed", "a", "b", "peak at KL", "measured up to KL", "residual"],
                    fit_rows(seeds)),
         labels=table(["labels", "reward model agrees with the labeler, fresh SFT samples", "with people, movie pairs",
                       "win rate of PPO", "its labeler score", "its KL"], label_rows(seeds)))


if __name__ == "__main__":
    run(main, Config, words=("folder",))
