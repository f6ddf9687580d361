"""Everything on one footing: policies against the SFT model on held-out prompts, and a report to look at.

    python evaluate.py --sft out/tiny/sft --policies out/tiny/ppo --out out/tiny/evaluate

Every policy answers the same prompts at the same temperature. Three reward models score the answers: the reward model
that PPO optimised (proxy), the labeler that it was learned from (gold, in the words of Gao et al. 2022; none where it
learned from people themselves), and the judge, which learned from other ratings, of other sentences, and which nothing
was trained on. Win rates are the judge's.

Writes results.json, report.md and figures. Papers: Stiennon et al. 2020 (win rates, over-optimisation); Gao et al. 2022
(proxy and gold against KL); Dubois et al. 2024 (length control).
"""
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import torch

from checkpoint import write_atomic, write_json
from common import check, check_positive, generator, progress, run, set_up
from data import check_same_vocab, encode_prompt, load_tokenizer, pad_prompts, pad_responses, read_jsonl, write_jsonl
from model import load_model, prompt_room, score_many, token_logprobs
from runs import Stage
from sampling import sample_many
from sft import held_out_loss, packed_rows

matplotlib.use("Agg")  # files, no window
import matplotlib.pyplot as plt  # noqa: E402


@dataclass
class Config:
    out: str = "out/tiny/evaluate"           # folder for the report
    sft: str = "out/tiny/sft"                # the model to beat, and the reference for KL
    policies: str = "out/tiny/ppo"           # policies to compare with it: folder,folder
    reward: str = "out/tiny/reward"          # the proxy
    labeler: str = "out/tiny/labeler"        # the gold reward model; empty: there is none
    judge: str = "out/tiny/judge"            # the independent examiner
    prompts: str = "data/reviews/prompts_eval.jsonl"  # held-out prompts
    text: str = "data/reviews/corpus_test.jsonl"  # held-out text for perplexity
    count: int = 1000                        # prompts per policy
    snapshot_count: int = 256                # prompts per snapshot of a policy
    response_tokens: int = 32                # longest response
    temperature: float = 0.7                 # of every policy
    bootstrap: int = 2000                    # resamples behind each interval
    min_win_rate: float = 0.0                # exit code 1 if a policy's win rate is below this
    restart: bool = False                    # begin again where --out holds another run, instead of refusing
    seed: int = 1                            # samples and resamples
    device: str = "auto"                     # auto, cpu, cuda, mps
    dtype: str = "auto"                      # auto, float32, bfloat16 (autocast)


PRESETS = {"tiny": {}, "smoke": {"count": 32, "snapshot_count": 16, "response_tokens": 16, "bootstrap": 100},
           "gpt2": {"response_tokens": 24}, "hh": {"count": 500, "snapshot_count": 128, "response_tokens": 128}}


# ---- what is measured ------------------------------------------------------------------------------------------------


def mean_interval(x, resamples, random):
    """Mean of x (N,) and its 95 % bootstrap interval over the rows."""
    means = x[torch.randint(len(x), (resamples, len(x)), generator=random)].mean(1)
    return round(x.mean().item(), 4), [round(q, 4) for q in means.quantile(torch.tensor([0.025, 0.975])).tolist()]


def length_controlled(wins, longer, resamples, random):
    """Win rate at equal length, with a 95 % bootstrap interval: logistic regression of the win on the difference.

    wins (N,) in {0, 0.5, 1}; longer (N,) tokens that the policy's response is longer by. Fits P(win) = sigmoid(a +
    b * tanh(longer / std)) by Newton's method and reports sigmoid(a), the idea of Dubois et al. 2024 in two parameters.
    """
    x = torch.tanh(longer / longer.std(correction=min(1, len(longer) - 1)).clamp(min=1e-6))
    X = torch.stack([torch.ones_like(x), x], dim=1).double()  # (N, 2)
    rows = torch.randint(len(x), (resamples, len(x)), generator=random)
    rows[0] = torch.arange(len(x))  # the first fit is of the data itself
    X, y = X[rows], wins.double()[rows]  # (S, N, 2), (S, N)
    weights = torch.zeros(resamples, 2, dtype=torch.double)
    for _ in range(20):
        p = torch.sigmoid((X @ weights[:, :, None]).squeeze(2))  # (S, N)
        # A trace of ridge keeps the step finite where every answer won; it is subtracted from the gradient too.
        gradient = (X * (y - p)[:, :, None]).sum(1) - 1e-3 * weights
        hessian = torch.einsum("snj,sn,snk->sjk", X, p * (1 - p), X) + 1e-3 * torch.eye(2, dtype=torch.double)
        weights = weights + torch.linalg.solve(hessian, gradient).clamp(-2, 2)
    rates = torch.sigmoid(weights[:, 0])
    low, high = rates[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return round(rates[0].item(), 4), [round(low, 4), round(high, 4)]


def distinct_2(responses):
    """Share of different pairs of neighbouring tokens among all such pairs, over all responses (Li et al. 2016)."""
    pairs = [pair for ids in responses for pair in zip(ids, ids[1:])]
    return len(set(pairs)) / max(1, len(pairs))


@torch.no_grad()
def kl_to(ref, policy, prompts, responses, end, cfg, autocast):
    """log p(policy) - log p(ref) of each response, summed over its tokens: (N,) nats, k1."""
    device, kl = next(policy.parameters()).device, torch.empty(len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    for start in range(0, len(order), 32):
        rows = order[start:start + 32]
        left, pad = pad_prompts([prompts[i] for i in rows], end)
        right, mask = pad_responses([responses[i] for i in rows], end)
        tokens, pad, P = torch.cat([left, right], dim=1).to(device), pad.to(device), left.size(1)
        with autocast():
            logits = [model.response_logits(tokens, pad, P) for model in (policy, ref)]
        own, other = (token_logprobs(x, tokens[:, P - 1:], cfg.temperature).cpu() for x in logits)
        kl[rows] = ((own - other) * mask).sum(1)
    return kl


def answer(model, ref, judges, prompts, enc, cfg, autocast):
    """Sample the model's responses and measure them: a dict with texts, and per response scores, kl and length (N,)."""
    random = torch.Generator(next(model.parameters()).device).manual_seed(cfg.seed)
    with autocast():
        responses = sample_many(model, prompts, cfg.response_tokens, enc.eot_token, temperature=cfg.temperature,
                                random=random)
        texts = [prompt + response for prompt, response in zip(prompts, responses)]
        scores = {name: score_many(judge, texts) for name, judge in judges.items()}
    ended = torch.tensor([float(ids[-1] == enc.eot_token) for ids in responses])
    return {"texts": [enc.decode(ids[:-1] if e else ids) for ids, e in zip(responses, ended)], "scores": scores,
            "kl": kl_to(ref, model, prompts, responses, enc.eot_token, cfg, autocast),
            "length": torch.tensor([float(len(ids)) for ids in responses]), "ended": ended,
            "distinct_2": distinct_2(responses)}


def summarise(answers, base, cfg):
    """The row of the table for one policy; base: the SFT model's answers to the same prompts."""
    random = generator(cfg.seed)
    row = {name: round(scores.mean().item(), 4) for name, scores in answers["scores"].items()}
    row.update(kl=round(answers["kl"].mean().item(), 3), length=round(answers["length"].mean().item(), 2),
               end_rate=round(answers["ended"].mean().item(), 4), distinct_2=round(answers["distinct_2"], 4))
    if answers is not base:
        for judge in answers["scores"]:
            margin = answers["scores"][judge] - base["scores"][judge]
            wins = (margin > 0).float() + 0.5 * (margin == 0).float()
            row[f"win_rate_{judge}"], row[f"win_rate_{judge}_interval"] = mean_interval(wins, cfg.bootstrap, random)
            if judge == "judge":
                row["length_controlled"], row["length_controlled_interval"] = length_controlled(
                    wins, answers["length"] - base["length"], cfg.bootstrap, random)
    return row


# ---- what is shown ---------------------------------------------------------------------------------------------------


def read_log(folder):
    """The lines of a stage's log.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def learning_curves(folder, path):
    """Score, KL, KL coefficient, length, end-of-text rate and entropy over a PPO run's episodes."""
    log = [line for line in read_log(folder) if "stopped" not in line]
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.5))
    for axis, (name, title) in zip(axes.flat, [
            ("score", "reward-model score"), ("kl", "KL to the SFT model, nats per response"),
            ("kl_coef", "KL coefficient"), ("length", "response length, tokens"),
            ("end_rate", "share that reach end of text"),
            ("entropy", "entropy, nats per token")]):
        axis.plot([line["episodes"] for line in log], [line[name] for line in log])
        axis.set(title=title, xlabel="episodes")
        axis.grid(alpha=0.3)
    save(figure, path)


def over_optimisation(snapshots, path):
    """Scores of the reward models against KL, over a policy's snapshots; the SFT model is the point at KL 0."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2))
    for name, style in {"proxy": "o-", "labeler": "s-", "judge": "^-"}.items():
        if name in snapshots[0]:
            axis.plot([row["kl"] for row in snapshots], [row[name] for row in snapshots], style, label=name)
    axis.set(xlabel="KL to the SFT model, nats per response", ylabel="mean score (SFT samples: mean 0, std 1)")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def histograms(base, answers, name, path):
    """Scores of the reward models before and after."""
    figure, axes = plt.subplots(1, len(base["scores"]), figsize=(11, 3.2), sharey=True)
    for axis, judge in zip(axes, base["scores"]):
        both = torch.cat([base["scores"][judge], answers["scores"][judge]])
        bins = torch.linspace(both.min().item(), both.max().item(), 31).tolist()
        axis.hist(base["scores"][judge].tolist(), bins, alpha=0.6, label="sft")
        axis.hist(answers["scores"][judge].tolist(), bins, alpha=0.6, label=name)
        axis.set(title=judge, xlabel="score")
    axes[0].set_ylabel("responses")
    axes[0].legend()
    save(figure, path)


def save(figure, path):
    """Write a figure as PNG, atomically, and close it."""
    figure.tight_layout()
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


def escape(text):
    """Text from a model as plain text inside a Markdown table."""
    text = "".join(c if c.isprintable() else " " for c in text)
    for special in "\\`*_[]<>|#&":
        text = text.replace(special, "\\" + special if special not in "<>&" else f"&#{ord(special)};")
    return text


def sample_table(prompts, base, answers):
    """Markdown rows of the largest, the middle and the smallest changes of the judge's score."""
    change = answers["scores"]["judge"] - base["scores"]["judge"]
    order, middle = change.argsort(descending=True).tolist(), len(change) // 2
    lines = ["| | prompt | SFT | judge | policy | judge |", "|---|---|---|---|---|---|"]
    for title, rows in [("best", order[:4]), ("median", order[middle - 2:middle + 2]), ("worst", order[-4:])]:
        lines += [f"| {title} | {escape(prompts[i][-300:])} | {escape(base['texts'][i])} "
                  f"| {base['scores']['judge'][i]:.2f} | {escape(answers['texts'][i])} "
                  f"| {answers['scores']['judge'][i]:.2f} |" for i in rows]
    return lines


def hardware():
    """The processor or GPU, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def report(results, prompts, base, answered):
    """The lines of report.md."""
    def rate(row, name):
        if f"{name}_interval" not in row:
            return "-"
        return f"{row[name]:.3f} ({row[f'{name}_interval'][0]:.3f} to {row[f'{name}_interval'][1]:.3f})"

    lines = [f"# Report: {', '.join(answered)} against sft", "",
             f"{results['prompts']} held-out prompts, temperature {results['config']['temperature']}, seed "
             f"{results['config']['seed']}; {results['hardware']}, torch {results['torch']}, {results['date']}.",
             "Win rates are the judge's, against the SFT model's answer to the same prompt, ties counted half, with "
             "95 % bootstrap intervals. Scores: SFT samples have mean 0 and standard deviation 1.", "",
             "| policy | win rate | at equal length | proxy | labeler | judge | KL, nats | length | ends | distinct-2 "
             "| perplexity |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, row in results["policies"].items():
        labeler = f"{row['labeler']:.2f}" if "labeler" in row else "-"
        lines.append(f"| {name} | {rate(row, 'win_rate_judge')} | {rate(row, 'length_controlled')} | "
                     f"{row['proxy']:.2f} | {labeler} | {row['judge']:.2f} | "
                     f"{row['kl']:.2f} | {row['length']:.1f} | "
                     f"{row['end_rate']:.3f} | {row['distinct_2']:.3f} | {row['perplexity']:.1f} |")
    lines += ["", "Perplexity: on text that no stage has seen, per token. KL: mean of log p(policy) - log p(SFT).", ""]
    if results["reward_models"]:
        teacher = "labeler" if "labeler" in results["reward_models"] else "proxy"  # learned from people
        lines += ["## Reward models on held-out human comparisons", "",
                  "| comparisons | " + " | ".join(results["reward_models"]) +
                  f" | bag of words (of the {teacher}'s half) | longer wins | one person |",
                  "|---|" + "---|" * (len(results["reward_models"]) + 3)]
        for group, row in results["reward_models"][teacher].items():
            if "gap" in group:
                continue  # by rating gap: in report_card.json of each reward model
            cells = [card[group]["reward model"] for card in results["reward_models"].values()]
            cells = [f"{c['accuracy']:.3f} ({c['interval'][0]:.3f} to {c['interval'][1]:.3f})" for c in cells]
            people = f"{row['people']:.3f}" if "people" in row else ""
            lines.append(f"| {group} | {' | '.join(cells)} | {row['bag of words']['accuracy']:.3f} | "
                         f"{row['longer wins']['accuracy']:.3f} | {people} |")
        lines += ["", "Chance is 0.5. One person: how often one rater agrees with the mean of the others, where "
                  "neither ties (which flatters people: they tie on close pairs). Intervals: 95 %, jackknife over "
                  "sentences.", ""]
    for name in answered:
        lines += [f"## {name}", ""]
        if (Path(results["config"]["out"]) / f"{name}_curves.png").is_file():
            lines += [f"![learning curves]({name}_curves.png)", "", "Learning curves of the run.", ""]
        if results["snapshots"].get(name):
            lines += [f"![scores against KL]({name}_kl.png)", "",
                      "Proxy, labeler and judge against KL over the run's snapshots "
                      f"({results['config']['snapshot_count']} prompts each); where the proxy climbs and the judge "
                      "does not, the proxy is being over-optimised.", ""]
        lines += [f"![score histograms]({name}_histograms.png)", "", "Scores before (sft) and after.", "",
                  "Samples with the largest, the middle and the smallest change of the judge's score:", "",
                  *sample_table(prompts, base, answered[name]), ""]
    if results["stages"]:
        lines += ["## Time and memory", "", "| stage | seconds | peak memory, MB |", "|---|---|---|"]
        lines += [f"| {name} | {row['seconds']} | {row['peak_memory_mb']} |" for name, row in results["stages"].items()]
        lines += [f"| in all | {sum(row['seconds'] for row in results['stages'].values()):.0f} | "
                  f"{max(row['peak_memory_mb'] for row in results['stages'].values())} |", ""]
    return lines


def main(cfg):
    check_positive(cfg, "count", "snapshot_count", "response_tokens", "temperature")
    check(cfg.bootstrap > 1, f"--bootstrap is {cfg.bootstrap}: it must be 2 or more")
    folders = {Path(folder).name: Path(folder) for folder in cfg.policies.split(",")}
    check(len(folders) == len(cfg.policies.split(",")) and "sft" not in folders,
          f"--policies {cfg.policies}: the folder names must differ from each other and from sft")
    stage = Stage(cfg, "sft", "policies", "reward", "labeler", "judge", "prompts", "text")
    device, autocast = set_up(cfg)
    ref, enc = load_model(cfg.sft, device), load_tokenizer(cfg.sft)
    judges = {"proxy": cfg.reward, **({"labeler": cfg.labeler} if cfg.labeler else {}), "judge": cfg.judge}
    cards = {name: folder / "report_card.json" for name, folder in ((n, Path(f)) for n, f in judges.items())}
    check_same_vocab(cfg.sft, *judges.values(), *folders.values())
    judges = {name: load_model(folder, device, kind="reward") for name, folder in judges.items()}
    policies = {name: load_model(folder, device) for name, folder in folders.items()}
    block_size = min(model.config.block_size for model in (*judges.values(), *policies.values()))
    check(block_size >= ref.config.block_size, f"--sft {cfg.sft}: its block size is {ref.config.block_size}, another "
                                               f"model's only {block_size}")
    texts = [row["prompt"] for row in read_jsonl(cfg.prompts, {"prompt": str})][:cfg.count]
    prompts = [encode_prompt(enc, text, prompt_room(ref.config, cfg.response_tokens)) for text in texts]
    held_out = packed_rows(enc, cfg.text, min(64, ref.config.block_size), 0)[:256]
    stage.open()

    def perplexity(model):
        loss = held_out_loss(model, held_out, enc.eot_token, device, autocast)
        return round(math.exp(loss), 2)

    base = answer(ref, ref, judges, prompts, enc, cfg, autocast)
    rows = {"sft": {**summarise(base, base, cfg), "perplexity": perplexity(ref)}}
    answered, snapshots = {}, {}
    for name, folder in folders.items():
        policy = policies[name]
        answered[name] = answer(policy, ref, judges, prompts, enc, cfg, autocast)
        rows[name] = {**summarise(answered[name], base, cfg), "perplexity": perplexity(policy)}
        print(f"{name}: win rate {rows[name]['win_rate_judge']:.3f} {rows[name]['win_rate_judge_interval']}, "
              f"at equal length {rows[name]['length_controlled']:.3f}, KL {rows[name]['kl']:.2f}, "
              f"length {rows[name]['length']:.1f} (sft {rows['sft']['length']:.1f})", flush=True)
        snapshots[name] = []
        for snapshot in progress(sorted(folder.glob("snapshots/*/model.pt")), f"{name} snapshots"):
            model = load_model(snapshot.parent, device)
            measured = answer(model, ref, judges, prompts[:cfg.snapshot_count], enc, cfg, autocast)
            snapshots[name].append({"iteration": int(snapshot.parent.name), "kl": measured["kl"].mean().item(),
                                    **{judge: scores.mean().item() for judge, scores in measured["scores"].items()}})
        histograms(base, answered[name], name, stage.folder / f"{name}_histograms.png")
        if (folder / "log.jsonl").is_file() and "iteration" in read_log(folder)[0]:
            learning_curves(folder, stage.folder / f"{name}_curves.png")
        if snapshots[name]:
            start = {"kl": 0.0, **{n: s[:cfg.snapshot_count].mean().item() for n, s in base["scores"].items()}}
            over_optimisation([start] + snapshots[name], stage.folder / f"{name}_kl.png")

    stages = {path.parent.name: json.loads(path.read_text())
              for path in sorted(Path(cfg.sft).parent.glob("*/done.json"), key=lambda path: path.stat().st_mtime)}
    cards = {name: json.loads(path.read_text()).get("human comparisons")
             for name, path in cards.items() if path.is_file()}
    results = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "torch": torch.__version__,
               "prompts": len(prompts), "config": asdict(cfg), "policies": rows, "snapshots": snapshots,
               "reward_models": cards if len(cards) == len(judges) and all(cards.values()) else {}, "stages": stages}
    everyone = {"sft": base, **answered}.items()
    write_jsonl(stage.folder / "samples.jsonl",
                [{"prompt": text, **{name: x["texts"][i] for name, x in everyone},
                  "judge": {name: round(x["scores"]["judge"][i].item(), 3) for name, x in everyone}}
                 for i, text in enumerate(texts)])
    write_json(stage.folder / "results.json", results)
    lines = report(results, texts, base, answered)
    write_atomic(stage.folder / "report.md", lambda temporary: temporary.write_text("\n".join(lines), encoding="utf-8"))
    print(f"report: {stage.folder / 'report.md'}")
    below = [name for name in answered if rows[name]["win_rate_judge"] < cfg.min_win_rate]
    check(not below, f"win rate of {', '.join(below)} below --min-win-rate {cfg.min_win_rate}", 1)
    stage.finish()


if __name__ == "__main__":
    run(main, Config, PRESETS)
