"""What an episode of PPO costs: seconds against one quantity at a time, at two sizes of model, beside the floor.

    python -m study.scaling results/performance       scaling.png of the scaling.json that is there, or else measured:
                                                      half an hour of one core

An iteration is sampling, scoring, and 4 epochs of 4 minibatches with a separate value model, as in tools/bench.py,
whose clock and floor these are; from 2 responses to a prompt on it is GRPO's, which has no value model. Weights and
tokens are random, and every response has its full length.
"""
import json
import time
from dataclasses import dataclass, replace
from statistics import median

import torch

from common import open_folder, progress, run, write_json
from evaluate import hardware
from study.report import drawing
from tools import bench

@dataclass
class Config:
    out: str = "out/scaling"       # folder for scaling.json and scaling.png
    sizes: str = "tiny,smollm2"    # as tools/bench.py knows them
    episodes: int = 16             # of an iteration
    repeats: int = 2               # timed iterations per point, after one warm-up
    dtype: str = "bfloat16"        # float32, bfloat16 (autocast)
    device: str = "cpu"            # cpu, cuda
    seed: int = 1                  # weights, tokens

PROMPT, RESPONSE = 32, 32  # tokens, where nothing else is said
AXES = {"prompt tokens": (16, 32, 64), "response tokens": (16, 32, 64), "width": (), "responses to a prompt": (1, 2, 8)}

def narrowed(model, share):
    """A model with share / G of its width: G groups of heads (of keys and values) become so many."""
    parts = {name: getattr(model, name) * share // model.n_kv_head for name in ("width", "mlp_width", "n_head")}
    return replace(model, **parts, n_kv_head=share)

def measure(cfg):
    """What scaling.json holds."""
    torch.set_num_threads(1)
    points = []
    for size in cfg.sizes.split(","):
        at = bench.Bench(bench.Config(size, dtype=cfg.dtype, device=cfg.device, repeats=cfg.repeats, seed=cfg.seed))
        full, known = at.model, {}
        work = [(axis, value) for axis, values in AXES.items() for value in
                values or range(1, full.n_kv_head + 1)]  # width: by groups of heads
        for axis, value in progress(work, size):
            prompt, response, share, group = key = tuple(value if axis == name else usual for name, usual in zip(
                AXES, (PROMPT, RESPONSE, full.n_kv_head, 1)))
            at.model = narrowed(full, share)
            if key not in known:
                iteration, flops = bench.ppo_work(
                    at, "ppo" if group == 1 else "grpo", (cfg.episodes, prompt, response), group)
                known[key] = {name: float(f"{seconds / cfg.episodes:.3g}") for name, seconds in (
                    ("seconds", median(at.time(iteration))), ("floor", flops / at.flops))}
                del iteration  # and its models
            points.append({"size": size, "axis": axis, "value": at.model.width if axis == "width" else value,
                           **known[key]})
    return {"hardware": hardware(), "torch": torch.__version__, "dtype": cfg.dtype, "date": time.strftime("%Y-%m-%d"),
            "episodes": cfg.episodes, "points": points}

def main(cfg):
    file, figure = (open_folder(cfg.out) / f"scaling.{kind}" for kind in ("json", "png"))
    if not file.is_file():
        write_json(file, measure(cfg))
    points = json.loads(file.read_text())["points"]
    with drawing(figure, 1, len(AXES), (13, 4), sharey=True) as [axes]:
        for axis, name in zip(axes, AXES):
            for number, size in enumerate(dict.fromkeys(point["size"] for point in points)):
                mine = [point for point in points if (point["size"], point["axis"]) == (size, name)]
                for kind, style in (("seconds", "o-"), ("floor", "--")):
                    axis.plot([point["value"] for point in mine], [point[kind] for point in mine], style,
                              color=f"C{number}", label=f"{size}: {kind}")
            axis.set(xscale="log", yscale="log", xlabel=name)
            axis.set_xticks(ticks := sorted({point["value"] for point in points if point["axis"] == name}), ticks)
            axis.minorticks_off()
        axes[0].set_ylabel("seconds per episode")
        axes[0].legend()
    print(figure)

if __name__ == "__main__":
    run(main, Config, words=("out",))
