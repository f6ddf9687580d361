"""The figures of docs/walkthrough.md, for walkthrough.py: the stages of train_all.sh, and one row of a rollout."""
import matplotlib

from arithmetic import f
from checkpoint import write_atomic

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt  # noqa: E402

BLUE, GREEN, GREY, RED, CENTRED = "#cfe2f7", "#d9efd3", "#eeeeee", "#a93226", {"ha": "center", "va": "center"}
# stage: its place, colour and text; what it reads of the data, and where that stands
STAGES = {"base": (0, 1, BLUE, "sft.py\nfrom nothing"), "sft": (1, 1, BLUE, "sft.py\nfrom base"),
          "samples": (2, 1, GREEN, "label.py sample\nresponses"), "label": (3, 1, GREEN, "label.py rank\nrankings"),
          "labeler": (3, 0, BLUE, "reward.py\nfrom base"), "judge": (6.2, 0, BLUE, "reward.py\nfrom base"),
          "reward": (4, 1, BLUE, "reward.py\nfrom sft"), "dpo": (4, 2, BLUE, "dpo.py\nfrom sft"),
          "ppo": (5, 1, BLUE, "ppo.py\nfrom sft"), "evaluate": (6, 1, GREEN, "evaluate.py\nreport")}
DATA = {"base": (0, "sentences"), "sft": (1, "demonstrations"), "samples": (2, "prompts"), "ppo": (4.9, "prompts"),
        "labeler": (3, "half of the\nratings"), "judge": (6.2, "other half"), "evaluate": (5.45, "held-out\nprompts")}


def box(axis, x, y, width, height, colour, text="", **style):
    """A rectangle around (x, y) with a text in its middle."""
    axis.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor="#666666"))
    axis.text(x, y, text, **CENTRED, **style)


def arrow(axis, start, end, bend=0.0, colour="#444444"):
    """An arrow between two points (x, y)."""
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0,
                                              "connectionstyle": f"arc3,rad={bend}"})


def save(figure, axis, path):
    """Write a figure without axes as PNG, and close it."""
    axis.axis("off")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight"))
    plt.close(figure)


def draw_pipeline(path):
    """The stages of train_all.sh, and what goes from one to the next."""
    figure, axis = plt.subplots(figsize=(11, 5))
    axis.set(xlim=(-0.5, 6.7), ylim=(-1.5, 2.4))
    w, h = 0.43, 0.35  # half of a box
    for name, (x, y, colour, text) in STAGES.items():
        box(axis, x, y, 2 * w, 2 * h, colour)
        axis.text(x, y + 0.18, name, weight="bold", fontsize=11, **CENTRED)
        axis.text(x, y - 0.1, text, fontsize=8.5, **CENTRED)
    for start, end in [((x + w, 1), (x + 1 - w, 1)) for x in range(6)] + [
            ((3, h), (3, 1 - h)), ((6.2, h), (6.2, 1 - h)), ((3.2, 1 + h), (4 - w, 2)), ((4 + w, 2), (5.8, 1 + h))]:
        arrow(axis, start, end)
    box(axis, 3.1, -1.2, 7.1, 0.5, GREY)
    for name, (x, text) in DATA.items():
        axis.text(x, -1.2, text, fontsize=8.5, **CENTRED)
        arrow(axis, (x, -0.95), (5.7 if name == "evaluate" else x, STAGES[name][1] - h))
    axis.text(0.5, -0.82, "data.py", weight="bold", fontsize=11, **CENTRED)
    save(figure, axis, path)


def read_where(found, d):
    """{name: {column: what the figure shows there}} of the row of the response."""
    r, pad, P, n = found["response"], found["rollout"]["pad"], found["rollout"]["columns"], len(d.kl)
    return {"column": {column: str(column) for column in range(P + n + 1)},
            "t": {P + t: str(t) for t in range(n)},
            "position": {column: str(column - pad) for column in range(pad, P + n)},
            "mask": {**{P + t: "1" for t in range(n)}, P + n: "0"},
            "value": {P - 1 + t: f(x, 2) for t, x in enumerate(r["values"])},
            "kl": {P + t: f(x, 2) for t, x in enumerate(d.kl)},
            "-kl_coef * kl": {P + t: f(-r["kl_coef"] * x, 2) for t, x in enumerate(d.kl)},
            "score": {P + n - 1: f(d.score, 2)}, "reward": {P + t: f(x, 2) for t, x in enumerate(d.rewards)}}


def draw_alignment(found, d, path):
    """The row of the response: columns, positions, which logits predict which token, and where numbers are read."""
    r, pad, P, n = found["response"], found["rollout"]["pad"], found["rollout"]["columns"], len(d.kl)
    texts = [repr(text)[1:-1].strip() if text else "end of text" for text in found["prompt"]["tokens"] + r["tokens"]]
    cells = [(column, "pad", GREY) for column in range(pad)]
    cells = cells if pad < 4 else [cells[0], (None, "...", GREY), cells[-1]]
    cells += [(pad + i, text, BLUE if pad + i < P else GREEN) for i, text in enumerate(texts)] + [(P + n, "pad", GREY)]
    widths, middle, right = [max(1.0, 0.15 * len(text) + 0.35) for _, text, _ in cells], {}, 0.0
    figure, axis = plt.subplots(figsize=(max(11, 0.62 * sum(widths)), 5))
    for (column, text, colour), width in zip(cells, widths):
        middle[column], right = right + width / 2, right + width
        box(axis, right - width / 2, 0, width, 0.8, colour, text, fontsize=10)
    rows = read_where(found, d)
    for place, (name, row) in enumerate([("logits predict", {}), ("token", {}), *rows.items()]):
        y, colour = (0.8, 0.0, *(-0.7 - 0.5 * i for i in range(len(rows))))[place], RED if place in (0, 6) else "black"
        axis.text(-0.2, y, name, ha="right", va="center", fontsize=11, color=colour)
        for column, text in row.items():
            if column in middle:  # most of the padding is left out
                axis.text(middle[column], y, text, fontsize=10, color=colour, **CENTRED)
    for t in range(n):
        arrow(axis, (middle[P - 1 + t], 0.4), (middle[P + t], 0.4), -0.6, RED)
    axis.set(xlim=(-2.2, right + 0.1), ylim=(-5.0, 1.2))
    save(figure, axis, path)
