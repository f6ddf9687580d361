"""What each detail of PPO does: the table of what ablations.sh ran, with the spread over seeds, beside what papers say.

    python ablations.py out/tiny/ablations
    python ablations.py results/tiny/seed*/ablations --out results        several seeds: results/ablations.md

One detail is changed at a time, and everything else stays as train_all.sh has it: a change that another one would make
up for (a lower learning rate for more epochs, say) shows as harm here. All runs of a seed share its SFT model, reward
model, prompts and judge. Papers: as DETAILS names them; where none is named, we know of no claim.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from common import check, run
from terminal import words_for

DETAILS = {  # detail: (what papers say, the runs)
    "reward whitening": (
        "On in Ziegler et al. 2019's code (scaled, mean kept). Huang et al. 2024, detail 24: fewer wins and shorter "
        "texts with it, about equal at equal length",
        ["whiten-rewards"]),
    "advantage whitening": (
        "On in Ziegler et al. 2019's and Huang et al. 2024's code. Andrychowicz et al. 2020, section 3.3: hardly "
        "matters",
        ["raw-advantages"]),
    "value model": (
        "A model of its own, from the reward model: Stiennon et al. 2020 (appendix G.1: better than one shared with "
        "the policy), Ouyang et al. 2022. A head on the policy: Ziegler et al. 2019's code",
        ["value-sft", "value-shared", "value-zero"]),
    "epochs per rollout": (
        "4 in Ziegler et al. 2019's code and Stiennon et al. 2020, 1 in Ouyang et al. 2022. Bai et al. 2022, appendix "
        "B.1: more are often more stable",
        ["epochs-1", "epochs-8"]),
    "minibatches per epoch": (
        "1 in Ziegler et al. 2019's code, 8 in Ouyang et al. 2022",
        ["minibatches-4"]),
    "KL coefficient": (
        "Adaptive in Ziegler et al. 2019; fixed in Stiennon et al. 2020 (0.05) and Ouyang et al. 2022 (0.02). Gao et "
        "al. 2022, section 3.6: the penalty does what stopping early does. Bai et al. 2022, section 4.1: perhaps "
        "unnecessary",
        ["kl-fixed", "free-all"]),
    "KL target": (
        "6 nats in Ziegler et al. 2019's code",
        ["ppo-kl3", "ppo-kl12"]),
    "GAE's lambda": (
        "0.95 in Ziegler et al. 2019's code and Stiennon et al. 2020. Schulman et al. 2016, section 6.3: 0.92 to 0.98 "
        "learn fastest on a cart-pole",
        ["lam-1"]),
    "score of a response without end of text": (
        "-1 in Huang et al. 2024 (detail 23); -1 for one without a full stop in Ziegler et al. 2019",
        ["any-end"]),
    "Adam's eps": (
        "1e-5 in Ziegler et al. 2019's code and in Huang et al. 2024; PyTorch's default is 1e-8",
        ["adam-eps-1e-8"]),
    "scale of the scores": (
        "Mean 0 and deviation 1 on the model's own samples: Ziegler et al. 2019, section 2.1. Shifted only: Stiennon "
        "et al. 2020, Ouyang et al. 2022",
        ["raw-reward"]),
    "responses per ranking (2,880 in all)": (
        "2 in Stiennon et al. 2020 and Bai et al. 2022, 4 to 9 in Ouyang et al. 2022 (section 3.5: all pairs of a "
        "prompt in one step, as they over-fit otherwise)",
        ["K-2", "K-4", "K-9"]),
    "clip": (
        "0.2 in Ziegler et al. 2019's code, Ouyang et al. 2022, Bai et al. 2022. Schulman et al. 2017, "
        "table 1: 0.1, 0.2, 0.3 score 0.76, 0.82, 0.70 in robot tasks",
        ["clip-0.1", "clip-0.4"]),
    "temperature of the rollouts": (
        "0.7 in Ziegler et al. 2019's code (books, TL;DR), 1 in Ouyang et al. 2022",
        ["temperature-1"]),
}
CHANGES = {  # what is not plain from the name
    "raw-advantages": "not whitened", "value-sft": "from the SFT model", "value-shared": "a head on the policy",
    "value-zero": "none: values are 0", "whiten-rewards": "on", "kl-fixed": "0.2, fixed", "free-all": "0 (study.sh)",
    "ppo-kl3": "3 nats, horizon 250 (study.sh)", "ppo-kl12": "12 nats, horizon 250 (study.sh)",
    "any-end": "its own score", "raw-reward": "as the reward model gives them", "adam-eps-1e-8": "1e-8",
}


def spread(values, digits=2):
    """Mean, and in brackets the least and the largest where there are several."""
    texts = [f"{x:.{digits}f}" for x in (mean(values), min(values), max(values))]
    return f"{texts[0]} ({texts[1]} to {texts[2]})" if len(values) > 1 else texts[0]


def change_of(name):
    """What was changed, for the table."""
    return CHANGES.get(name, name.rsplit("-", 1)[-1])


def row(name, change, seeds):
    """One line of the table: this run in all seeds (results of evaluate.py) that have it."""
    have = [seed["policies"] for seed in seeds if name in seed["policies"]]
    own, default = [policies[name] for policies in have], [policies["ppo"] for policies in have]
    wins = [a["win_rate_judge"] for a in own]
    gains = [a["win_rate_judge"] - b["win_rate_judge"] for a, b in zip(own, default)]
    cells = [spread(wins, 3), spread(gains, 3) if name != "ppo" else "",
             spread([a["length_controlled"] for a in own], 3), spread([a["kl"] for a in own], 1),
             spread([a["length"] for a in own], 1),
             spread([a["proxy"] for a in own]), spread([a["labeler"] for a in own])]
    return f"| {change} | " + " | ".join(cells) + " |"


@dataclass
class Config:
    runs: str = ""  # folders of ablations.sh, one per seed: folder,folder
    out: str = ""   # folder for ablations.md; empty: the first of --runs


def main(cfg):
    check(cfg.runs, "name a folder, such as: python ablations.py out/tiny/ablations")
    folders = [Path(folder) for folder in cfg.runs.split(",")]
    for folder in folders:
        check((folder / "evaluate" / "results.json").is_file(), f"{folder}: no evaluate/results.json: ablations.sh?")
    seeds = [json.loads((folder / "evaluate" / "results.json").read_text()) for folder in folders]
    done = [json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob("*/done.json"))]
    hours, first = sum(stage["seconds"] for stage in done) / 3600, seeds[0]
    head = "| win rate | difference to the default | win rate at equal length | KL, nats | length | proxy | labeler |"
    widths = [high - low for seed in seeds for low, high in [seed["policies"]["ppo"]["win_rate_judge_interval"]]]
    numbers = ", ".join(str(seed["config"]["seed"]) for seed in seeds)
    text = [f"""# What each detail of PPO does

`bash ablations.sh`, {first['config']['count']} held-out prompts, seeds {numbers}: means over the seeds, and in brackets
the least and the largest. Win rates are the judge's against the SFT model; the default's 95 % intervals are
{mean(widths):.2f} wide in one seed, wider nearer to 0.5. A difference whose sign the seeds do not share is chance.
Proxy: the default's reward model; labeler: what that learned from. {len(done)} stages took {hours:.1f} hours of
{first['hardware']}, {first['date']}, torch {first['torch']}; several went on beside each other, so this is no speed
figure.

| run {head}
|---{'|---' * 7}|
{row('ppo', 'the default: PPO of train_all.sh', seeds)}
"""]
    for detail, (papers, names) in DETAILS.items():
        rows = [row(name, change_of(name), seeds) for name in names if any(name in seed["policies"] for seed in seeds)]
        if rows:
            text.append("\n".join([f"## {detail[0].upper()}{detail[1:]}\n", f"Papers: {papers}.\n", f"| here {head}",
                                   f"|---{'|---' * 7}|", *rows, ""]))
    cards = {K: [json.loads(path.read_text())["human comparisons"]["movie, random"]["reward model"]["accuracy"]
                 for folder in folders if (path := folder / f"reward-K{K}" / "report_card.json").is_file()]
             for K in (2, 4, 9)}
    if all(cards.values()):
        text.append("Reward models of these rankings order people's random pairs of film reviews as people do in " +
                    ", ".join(f"{spread(shares, 3)} (K = {K})" for K, shares in cards.items()) + ".\n")
    path = Path(cfg.out or folders[0]) / "ablations.md"
    path.write_text("\n".join(text))
    print(path)


if __name__ == "__main__":
    words_for("runs", several=True)
    run(main, Config)
