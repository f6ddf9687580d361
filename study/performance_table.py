"""The table and the figure of docs/performance.md, from bench.jsonl:   python results/performance/table.py"""
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

FOLDER = Path(__file__).parent
PEERS = {"train": "transformers", "sample": "transformers", "ppo": "trl", "reward": "trl", "dpo": "trl",
         "dpo-ranked": "trl"}
lines = [json.loads(line) for line in (FOLDER / "bench.jsonl").read_text().splitlines()]
scales, found = {}, {}
for line in lines:
    name, _, size = line["figure"].partition(" ")
    if size.isdigit():
        scales.setdefault(name, {})[int(size)] = line
    else:
        found[line["size"], line["threads"], line["gelu"], line["dtype"], line["figure"], line["value"]] = line
setups = dict.fromkeys(key[:3] for key in found)

print("| size | threads | GELU | figure | precision | rate | seconds | fraction | peer, seconds | faster than the peer "
      "| than the peer in float32 |\n|---|---|---|---|---|---|---|---|---|---|---|")
for setup in setups:
    for figure, library in PEERS.items():
        for value in ("separate", "shared") if figure == "ppo" else (None,):
            for dtype in ("float32", "bfloat16"):
                ours = found.get((*setup, dtype, figure, value))
                if not ours:
                    continue
                peers = [found.get((*setup, kind, f"{figure} {library}", value and "separate"))
                         for kind in (dtype, "float32")]
                ratios = [f"{peer['seconds'] / ours['seconds']:.2f}" if peer else "-" for peer in peers]
                seconds = f"{peers[0]['seconds']:.3g} ({library})" if peers[0] else "-"
                print(f"| {setup[0]} | {setup[1]} | {'exact' if setup[2] == 'none' else 'tanh'} | {figure} "
                      f"{value or ''} | {dtype} | {ours['rate']:,.4g} {ours['unit']} | {ours['seconds']:.3g} | "
                      f"{ours['fraction']:.0%} | {seconds} | {ratios[0]} | {ratios[1]} |")

if scales:
    figure, panels = pyplot.subplots(1, len(scales), figsize=(13, 3.4), sharey=True)
    for (name, sizes), panel in zip(scales.items(), panels):
        for field, label, style in (("seconds", "measured", "o-"), ("floor_seconds", "floor", "--")):
            panel.loglog(list(sizes), [1e3 * line[field] / (line["rate"] * line["seconds"]) for line in sizes.values()],
                         style, label=label)
        panel.set_xticks(list(sizes), list(sizes))
        panel.minorticks_off()
        panel.set_xlabel({"batch": "prompts per iteration", "width": "width"}.get(name, f"{name} tokens"))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms per episode")
    panels[0].legend()
    line = next(iter(scales["batch"].values()))
    figure.suptitle("PPO, {size}, {dtype}, value {value}, {threads} thread(s), {processor}".format(**line), fontsize=10)
    figure.tight_layout()
    figure.savefig(FOLDER / "scaling.png", dpi=110)
