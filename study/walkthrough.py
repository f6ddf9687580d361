"""docs/walkthrough.md: one prompt followed through all of RLHF, with the numbers of a real run.

    python -m study.record out/tiny     study/walkthrough.json: what the models of a finished run compute
    python -m study.walkthrough         the page, from that file and study/templates/walkthrough.md

Recorded numbers are raw: tokens, log-probabilities, values, scores. What follows from them (rewards, advantages,
ratios, losses) is computed here by the functions that train.
"""
import json
from itertools import combinations
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid, pad

import ppo
from common import write_atomic
from reward import ranking_loss

STUDY = Path(__file__).parent
PRODUCTS = {"plain", "clipped", "gradient", "error", "clipped error"}  # shown with three digits, all else with four

def f(x, digits=4):
    """A number as text, never -0."""
    return f"{round(x, digits) + 0.0:.{digits}f}"

def b(x):
    """A number within a sum or a product: in brackets where it is negative."""
    return f"({f(x)})" if f(x).startswith("-") else f(x)

def quoted(text):
    """A token or a response in quotes, as many begin with a space; None is EOS."""
    return "EOS" if text is None else "`" + repr(text).replace("|", "\\|").replace("`", "'") + "`"

class Table(dict):
    """{title: column}. In the template {name:t | token} is a Markdown table of these two columns, {name:} of all."""

    def __format__(self, titles):
        titles = titles.split(" | ") if titles else list(self)
        columns = [[f(x, 3 if title in PRODUCTS else 4) if isinstance(x, float) else str(x) for x in self[title]]
                   for title in titles]
        return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *zip(*columns)])

def derive(found):
    """All that follows from the recorded numbers of the response: a table by token; its policy loss and value loss."""
    r, flags, rollout = found["response"], found["flags"], found["rollout"]
    old, ref, new, value, new_value = (torch.tensor([r[name]], dtype=torch.float64) for name in (
        "old_logprobs", "ref_logprobs", "new_logprobs", "values", "new_values"))  # (1, n)
    mask, clip, value_clip = torch.ones_like(old), flags["clip"], flags["value_clip"]
    reward = ppo.shape_rewards(old.new_tensor([r["score"]]), old, ref, mask, r["kl_coef"])
    advantage, returns = ppo.gae(reward, value, mask, flags["gamma"], flags["lam"])
    A = (advantage - rollout["advantage_mean"]) / rollout["advantage_std"]  # ppo.whiten, over the whole rollout
    ratio, within = (new - old).exp(), value + (new_value - value).clamp(-value_clip, value_clip)
    loss, _ = ppo.policy_loss(new.requires_grad_(), old, A, mask, clip)
    loss.backward()
    d = Table({name: x[0].tolist() for name, x in {
        "old": old, "ref": ref, "kl": old - ref, "reward": reward, "value": value, "new": new, "A": A,
        "delta": reward + flags["gamma"] * pad(value[:, 1:], (0, 1)) - value, "advantage": advantage, "return": returns,
        "ratio": ratio, "plain": -A * ratio, "clipped": -A * ratio.clamp(1 - clip, 1 + clip),
        "gradient": new.grad * old.size(1), "new value": new_value, "within": within,
        "error": (new_value - returns) ** 2, "clipped error": (within - returns) ** 2}.items()})
    d.update(t=range(old.size(1)), token=[quoted(text) for text in r["tokens"]])
    d["larger"] = ["clipped" if y > x else "plain" if y < x else "equal" for x, y in zip(d["plain"], d["clipped"])]
    return d, loss.item(), ppo.value_loss(new_value, value, returns, mask, value_clip)[0].item()

def alignment(found, d):
    """The response's row of the batch: what stands in which column, and what is read there."""
    left, P, r, n = found["rollout"]["pad"], found["rollout"]["columns"], found["response"], len(d["t"])
    tokens = [quoted(text) for text in found["prompt"]["tokens"] + r["tokens"]]
    columns = range(max(0, left - 1), P + n + 1)
    lines = {"token": (left - 1, ["pad", *tokens, "pad"]), "position": (left, range(len(tokens))),
             "**logits predict**": (P - 1, d["token"]), "**value**": (P - 1, d["value"]), "t": (P, d["t"]),
             "kl": (P, d["kl"]), "-kl_coef * kl": (P, [-r["kl_coef"] * x for x in d["kl"]]),
             "score": (P + n - 1, [r["score"]]), "reward": (P, d["reward"])}  # first column, cells
    at = {name: {first + i: f(x, 2) if isinstance(x, float) else x for i, x in enumerate(cells)}
          for name, (first, cells) in lines.items()}
    return Table({"column": lines, **{str(i): [line.get(i, "") for line in at.values()] for i in columns}})

def advantage_by_hand(d, t, flags):
    reward, value, delta, advantage = (d[name][t] for name in ("reward", "value", "delta", "advantage"))
    next_value, next_advantage = ([*d[name], 0.0][t + 1] for name in ("value", "advantage"))
    return f"""t = {t}, {d["token"][t].strip("`")}
    delta     = {f(reward)} + {flags["gamma"]:g} * {b(next_value)} - {b(value)} = {f(delta)}
    advantage = {f(delta)} + {flags["gamma"] * flags["lam"]:g} * {b(next_advantage)} = {f(advantage)}
    return    = {f(advantage)} + {b(value)} = {f(d["return"][t])}"""

def controller_by_hand(line, flags):
    controller = ppo.AdaptiveKL(line["kl_coef"], flags["kl_target"], flags["kl_horizon"])
    controller.update(line["kl"], flags["episodes"])
    error = line["kl"] / flags["kl_target"] - 1
    clamped, share = min(max(error, -0.2), 0.2), f"{flags['episodes']} / {flags['kl_horizon']:g}"
    return f"""iteration {line["iteration"]}
    error   = {f(line["kl"])} / {flags["kl_target"]:g} - 1 = {f(error)}, clamped: {f(clamped)}
    kl_coef = {line["kl_coef"]:.6f} * (1 + {b(clamped)} * {share}) = {controller.coef:.6f}"""

def page_text(found):
    """The page: the template, its names replaced by numbers and tables."""
    r, flags, prompt, demo, ranking, after = (found[name] for name in (
        "response", "flags", "prompt", "demonstration", "ranking", "after"))
    (d, loss, value_loss), scores = derive(found), torch.tensor(ranking["reward"], dtype=torch.float64)
    n, first, counted = len(d["t"]), demo["prompt_length"], [-x for x in demo["logprobs"][demo["prompt_length"] - 1:]]
    better, worse = zip(*combinations(range(len(scores)), 2))
    margins = scores[list(better)] - scores[list(worse)]
    return (STUDY / "templates/walkthrough.md").read_text(encoding="utf-8").format(
        **found, r=r, d=d, n=n, P=found["rollout"]["columns"], alignment=alignment(found, d), loss=loss,
        prompt_table=Table({"position": range(len(prompt["ids"])), "id": prompt["ids"],
                            "token": map(quoted, prompt["tokens"])}),
        demo_table=Table({"position": range(len(demo["tokens"])), "token": map(quoted, demo["tokens"]),
                          "mask": [int(i >= first) for i in range(len(demo["tokens"]))],
                          "log-probability": ["-", *demo["logprobs"]]}),
        sft_loss=f"({' + '.join(map(f, counted))}) / {len(counted)} = {f(sum(counted) / len(counted))}",
        ranked=Table({"rank": range(1, len(scores) + 1), "response": map(quoted, ranking["responses"]),
                      "labeler's score": ranking["labeler"], "reward model's score": ranking["reward"]}),
        pairs=Table({"better": [i + 1 for i in better], "worse": [i + 1 for i in worse], "margin": margins.tolist(),
                     "sigmoid(margin)": margins.sigmoid().tolist(), "loss": (-logsigmoid(margins)).tolist()}),
        ranking_loss=ranking_loss(scores[None], torch.ones_like(scores)[None]).item(),
        text=quoted("".join(text or "" for text in r["tokens"])), kl_sum=sum(d["kl"]),
        kl_negative=sum(x < 0 for x in d["kl"]), value_loss=value_loss,
        sampler_difference=1e-4 + max(abs(x - y) for x, y in zip(r["sampler_logprobs"], r["old_logprobs"])),  # rounded
        first_reward=f"-{r['kl_coef']:.6f} * {b(d['kl'][0])} = {f(d['reward'][0])}", last=n - 1,
        last_reward=f"-{r['kl_coef']:.6f} * {b(d['kl'][-1])} + {b(r['score'])} = {f(d['reward'][-1])}",
        advantages_by_hand="\n\n".join(advantage_by_hand(d, t, flags) for t in reversed(range(n - 2, n))),
        mean=b(found["rollout"]["advantage_mean"]), steps=flags["epochs"] - 1, low=1 - flags["clip"],
        high=1 + flags["clip"], binding=d["larger"].count("clipped"),
        against=sum((ratio - 1) * A < 0 for ratio, A in zip(d["ratio"], d["A"])),
        controller="\n\n".join(controller_by_hand(found["log"][i], flags) for i in (0, 2)),
        after_table=Table({"response": map(quoted, after["responses"]), "reward model's score": after["reward"]}))

if __name__ == "__main__":
    recorded = json.loads((STUDY / "walkthrough.json").read_text(encoding="utf-8"))
    write_atomic(STUDY.parent / "docs" / "walkthrough.md", page_text(recorded))
