"""Where RLHF stops helping: the figure and tables of what over_optimisation.sh ran, from its results alone.

    python -m study.over_optimisation out/tiny/over_optimisation   of one run (the script has called study.collect)
    python -m study.over_optimisation results/over_optimisation    the committed seeds

Writes over_optimisation.png and over_optimisation.md. Papers: Gao et al. 2022 (over-optimisation); Coste et al. 2023
(ensembles). KL does not measure PPO and best-of-n alike: compare shapes.
"""
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

def series(points, scorer):
    """The root of KL (an estimate near 0 can be below it), and a scorer's mean above that of the SFT model, the
    first of the points: (N,), (N,)."""
    kl, scores = torch.tensor([[point["kl"], point[scorer]] for point in points], dtype=torch.double).T
    return kl.clamp(min=0).sqrt(), scores - scores[0]

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
    """A column per reward model, PPO above best-of-n: the scorers of each seed, and where the labeler's score turns."""
    with drawing(path, 2, len(SIZES), (13, 5.5), sharey="row", sharex="row") as axes:
        for column, size in enumerate(SIZES):
            axes[0, column].set_title(SIZES[size])
            for axis, method in zip(axes[:, column], METHODS):
                axis.set(xlabel="root of KL", ylabel="" if column else f"{method}: score above SFT")
                for points in (curve(seed, size, method) for seed in seeds):
                    draw_curve(axis, points)
        axes[0, 0].figure.legend(axes[0, 0].lines[:3], SCORERS, loc="outside upper center", ncols=3)

def draw_curve(axis, points):
    """One run of draw_over_optimisation."""
    for color, (scorer, style) in enumerate(SCORERS.items()):
        axis.plot(*series(points, scorer), style, color=f"C{color}", markersize=3, linewidth=0.8, alpha=0.6)
    point, turned = turn(points)
    if turned:
        axis.plot(*(x[points.index(point)] for x in series(points, "labeler")), "k*", markersize=11)

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
         labels=table(["labels", "with labeler", "with people", "win rate", "labeler", "KL, nats"], label_rows(seeds)))

if __name__ == "__main__":
    run(main, Config, words=("folder",))
