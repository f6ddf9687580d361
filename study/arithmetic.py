"""What follows from the numbers of docs/walkthrough.json, and how the page writes it: for walkthrough.py, figures.py
and record.py.
"""
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ppo  # noqa: E402


def f(x, digits=4):
    """A number as the page writes it: no minus before a zero."""
    text = f"{x:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def derive(found):
    """What follows from the raw numbers of the response: lists with one number per token, in float64."""
    r, flags = found["response"], found["flags"]
    old, ref, new, values, new_values = (torch.tensor([r[name]], dtype=torch.float64) for name in (
        "old_logprobs", "ref_logprobs", "new_logprobs", "values", "new_values"))  # (1, n)
    mask, clip = torch.ones_like(old), flags["clip"]
    counts = r["score"] if r["ended"] or flags["no_end_score"] != flags["no_end_score"] else flags["no_end_score"]
    rewards = ppo.shape_rewards(old.new_tensor([counts]), old, ref, mask, r["kl_coef"])
    advantages, returns = ppo.gae(rewards, values, mask, flags["gamma"], flags["lam"])
    # As ppo.whiten does it, whose mean and standard deviation are those of the whole rollout.
    white = (advantages - found["rollout"]["advantage_mean"]) / found["rollout"]["advantage_std"]
    ratio = (new - old).exp()
    loss, clip_fraction = ppo.policy_loss(new.requires_grad_(), old, white, mask, clip)
    loss.backward()
    value_losses = [ppo.value_loss(*(x[:, t:t + 1] for x in (new_values, values, returns, mask)),
                                   flags["value_clip"])[0].item() for t in range(old.size(1))]
    lists = {"kl": old - ref, "rewards": rewards, "advantages": advantages, "returns": returns, "white": white,
             "deltas": rewards + flags["gamma"] * torch.cat([values, 0 * values[:, :1]], 1)[:, 1:] - values,
             "ratio": ratio.detach(), "plain": -white * ratio.detach(), "gradient": new.grad * old.size(1),
             "clipped": -white * ratio.detach().clamp(1 - clip, 1 + clip)}
    return SimpleNamespace(score=counts, loss=loss.item(), binds=round(clip_fraction.item() * old.size(1)),
                           value_losses=value_losses, **{name: x[0].tolist() for name, x in lists.items()})


def b(x):
    """The same within a sum or a product: a negative number in brackets."""
    return f"({f(x)})" if f(x).startswith("-") else f(x)


def quoted(text):
    """A token or a response as the page writes it: in quotes, as many begin with a space."""
    return "end of text" if text is None else "`" + repr(text).replace("|", "\\|").replace("`", "'") + "`"


def table(head, rows):
    """A Markdown table: head "a | b"; rows of cells, of which a float gets four decimals."""
    lines = [" | ".join(f(x) if isinstance(x, float) else str(x) for x in row) for row in rows]
    return "\n".join([f"| {head} |", "|---" * len(head.split(" | ")) + "|", *(f"| {line} |" for line in lines)])


def wrapped(text):
    """Paragraphs in lines of 118 columns; headings, tables, pictures and blocks of code as they are."""
    def fill(part):
        part = re.sub(r"`[^`]+`", lambda code: re.sub(r"\s", "\0", code[0]), part)  # no line ends within `code`
        return textwrap.fill(part, 118, break_long_words=False, break_on_hyphens=False).replace("\0", " ")
    parts = []
    for i, part in enumerate(re.split("(```.*?```)", text, flags=re.DOTALL)):
        parts += [part] if i % 2 else part.strip().split("\n\n")
    return "\n\n".join(part if part.startswith(("|", "#", "!", "```")) else fill(part) for part in parts) + "\n"


def by_hand(found, d, t):
    """The arithmetic of one token's advantage and return."""
    r, flags = found["response"], found["flags"]
    value, name = r["values"][t], "end of text" if r["tokens"][t] is None else repr(r["tokens"][t])
    after, later = (r["values"][t + 1], d.advantages[t + 1]) if t + 1 < len(d.kl) else (0.0, 0.0)
    return f"""t = {t}, {name}
    delta     = {f(d.rewards[t])} + {flags["gamma"]:g} * {b(after)} - {b(value)} = {f(d.deltas[t])}
    advantage = {f(d.deltas[t])} + {flags["gamma"]:g} * {flags["lam"]:g} * {b(later)} = {f(d.advantages[t])}
    return    = {f(d.advantages[t])} + {b(value)} = {f(d.returns[t])}"""


def controller_step(line, flags):
    """The controller's arithmetic after one iteration, a line of the log."""
    controller = ppo.AdaptiveKL(line["kl_coef"], flags["kl_target"], flags["kl_horizon"])
    controller.update(line["kl"], flags["episodes"])
    error = line["kl"] / flags["kl_target"] - 1
    kept, share = min(max(error, -0.2), 0.2), f"{flags['episodes']} / {flags['kl_horizon']:g}"
    return f"""iteration {line["iteration"]}
    error   = {f(line["kl"])} / {flags["kl_target"]:g} - 1 = {f(error)}, kept between -0.2 and 0.2: {f(kept)}
    kl_coef = {line["kl_coef"]:.6f} * (1 + {b(kept)} * {share}) = {controller.coef:.6f}"""
