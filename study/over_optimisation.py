"""Where RLHF stops helping: the figure and tables of what over_optimisation.sh ran, from its results alone.

    python -m study.over_optimisation out/tiny/over_optimisation   of one run (the script has called study.collect)
    python -m study.over_optimisation results/over_optimisation    the committed seeds

Writes over_optimisation.png and over_optimisation.md. Papers: Gao et al. 2022 (over-optimisation, and the forms that
are fitted); Coste et al. 2023 (ensembles).
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common import run
from study.collect import read
from study.markdown import by_seed, cells, fill, made, spread, table, template
from study.report import SCORERS, drawing


@dataclass
class Config:
    folder: str = "out/tiny/over_optimisation"  # results.json of study.collect; figure and tables go there, too


SIZES = {"250": "250 comparisons", "1000": "1,000 comparisons", "all": "all comparisons",
         "250-mean": "mean of three, 250", "250-min": "least of three, 250"}  # reward models of over-optimisation
METHODS = ("PPO", "best-of-n")


# ---- Gao et al. 2022: score against d, the root of KL --------------------------------------------------------------
# They found the gold score to follow d (a - b d) for best-of-n and d (a - b ln d) for RL: a is the slope of what is
# really learned, b how fast over-optimisation eats it. KL does not measure the two methods alike: compare shapes.


def series(points, scorer):
    """d (an estimate of KL near 0 can be below it), and a scorer's mean above that of the SFT model, the first of the
    points: (N,), (N,)."""
    kl, scores = torch.tensor([[point["kl"], point[scorer]] for point in points], dtype=torch.double).T
    return kl.clamp(min=0).sqrt(), scores - scores[0]


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


def curve(seed, size, method):
    """The points of the over-optimisation against one reward model."""
    results = seed[f"over-{size}"]
    return results["snapshots"][f"free-{size}"] if method == "PPO" else results["best_of_n"]


def draw_over_optimisation(seeds, path):
    """A column per reward model, PPO above best-of-n: the scorers of each seed, the form fitted to the labeler's score,
    and where that turns."""
    with drawing(path, 2, len(SIZES), (13, 5.5), sharey="row", sharex="row") as axes:
        for column, size in enumerate(SIZES):
            axes[0, column].set_title(SIZES[size])
            for axis, method in zip(axes[:, column], METHODS):
                axis.set(xlabel="root of KL", ylabel="" if column else f"{method}: score above SFT")
                for points in (curve(seed, size, method) for seed in seeds):
                    draw_curve(axis, points, method)
        lines = axes[0, 0].lines[:4]
        axes[0, 0].figure.legend(lines, [*SCORERS, "labeler, fitted"], loc="outside upper center", ncols=4)


def draw_curve(axis, points, method):
    """One run of draw_over_optimisation."""
    for color, (scorer, style) in enumerate(SCORERS.items()):
        axis.plot(*series(points, scorer), style, color=f"C{color}", markersize=3, linewidth=0.8, alpha=0.6)
    d, scores = series(points, "labeler")
    a, b, *_ = fit(d, scores, method)
    x = torch.linspace(0, d.max().item(), 100, dtype=torch.double)
    axis.plot(x, basis(x, method) @ torch.tensor([a, -b], dtype=torch.double), "k--", linewidth=1)
    point, turned = turn(points)
    if turned:
        axis.plot(d[points.index(point)], scores[points.index(point)], "k*", markersize=11)


def fit_rows(seed):
    """The forms fitted to the labeler's score: coefficients, peak and residuals."""
    for size, title in SIZES.items():
        for method in METHODS:
            d, scores = series(curve(seed, size, method), "labeler")
            a, b, peak, residual = fit(d, scores, method)
            where = "none" if peak is None else "beyond" if peak > d.max() else f"{peak**2:.1f}"
            yield [title, method, f"{a:.3f}", f"{b:.3f}", where, f"{d.max()**2:.1f}", f"{residual:.3f}"]


def turn_rows(seed):
    """Where the labeler is highest in PPO without a KL penalty, and what each scorer says there and at the end."""
    for size, title in SIZES.items():
        points = curve(seed, size, "PPO")
        (best, turned), last = turn(points), points[-1]
        yield [title, f"{seed[f'over-{size}']['proxy_agreement']['labeler']:.3f}", "yes" if turned else "no",
               f"{best['kl']:.1f}, {last['kl']:.1f}", *(f"{best[key]:.2f}, {last[key]:.2f}" for key in SCORERS),
               f"{last['win_rate_judge']:.3f}"]


def label_rows(seeds):
    """What labels that disagree cost: reward model and policy."""
    for title, name, policy in [("without noise", "labels-exact", "ppo-exact"),
                                ("people's noise", "labels-people", "ppo"),
                                ("a quarter reversed", "labels-flipped", "ppo-flipped")]:
        runs = [seed[name] for seed in seeds]
        cards = [results["reward_models"]["proxy"]["movie, random"]["reward model"] for results in runs]
        yield [title, spread([results["proxy_agreement"]["labeler"] for results in runs]),
               spread([card["accuracy"] for card in cards]),
               *cells([results["policies"][policy] for results in runs], ["win rate", "labeler", "KL, nats"])]


def main(cfg):
    folder = Path(cfg.folder)
    seeds = [{**seed, "config": seed["labels-people"]["config"]} for seed in read(folder / "results.json", 7).values()]
    draw_over_optimisation(seeds, folder / "over_optimisation.png")
    fill(template("over_optimisation.md"), folder / "over_optimisation.md", seeds,
         made=made(folder, seeds[0]["labels-people"]),
         turns=by_seed(seeds, ["reward model", "agreement", "a turn", "KL", *SCORERS, "win rate"], turn_rows),
         fits=by_seed(seeds, ["reward model", "method", "a", "b", "peak at KL", "measured up to KL", "residual"],
                      fit_rows, keys=2),
         labels=table(["labels", "with labeler", "with people", "win rate", "labeler", "KL, nats"], label_rows(seeds)))


if __name__ == "__main__":
    run(main, Config, words=("folder",))
