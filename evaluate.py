"""Everything on one footing: policies and best-of-n against the SFT model on held-out prompts.

    python evaluate.py --sft out/tiny/sft --policies out/tiny/dpo,out/tiny/ppo --out out/tiny/evaluate

Every policy responds to the same prompts at the same temperature. Three reward models score the responses: the one that
PPO optimised (proxy), the labeler that ranked the proxy's training data (Gao et al. 2022 call it gold; the preset chat,
where people ranked, has none), and the judge, which learned from other ratings, of other sentences, and from which
nothing was trained. Win rates are the judge's.

Writes samples.jsonl and results.json, and prints a table; `python -m study.report` draws. Papers: Stiennon et al. 2020
(win rates, over-optimisation); Nakano et al. 2021 (best-of-n); Dubois et al. 2024 (length control).
"""
import json
import math
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from common import Stage, check, generator, progress, run, set_up, write_json
from data import (check_same_vocab, encode_prompt, load_tokenizer, pad_prompts, pad_responses, prompt_limit,
                  read_jsonl, report_truncated, write_jsonl)
from model import load_model, token_logprobs
from reward import score_many
from sampling import sample_many
from sft import held_out_loss, packed_rows

@dataclass
class Config:
    out: str = "out/tiny/evaluate"           # folder for samples.jsonl and results.json
    sft: str = "out/tiny/sft"                # the model to beat, and the reference for KL
    policies: str = "out/tiny/dpo,out/tiny/ppo"  # policies to compare with it: folder,folder
    reward: str = "out/tiny/reward"          # the proxy, by which best-of-n chooses, too; several: folder,folder
    ensemble: str = "mean"                   # of several reward models' scores: mean or min
    labeler: str = "out/tiny/labeler"        # the labeler behind the rankings; empty: people ranked
    judge: str = "out/tiny/judge"            # the independent examiner
    prompts: str = "data/reviews/prompts_eval.jsonl"  # held-out prompts
    others: str = ""                         # prompts of kinds that no policy was trained on: file,file; empty: none
    text: str = "data/reviews/corpus_test.jsonl"  # held-out text for perplexity
    count: int = 1000                        # prompts per policy
    snapshot_count: int = 256                # prompts per snapshot of a policy, and per file of --others
    best_of: int = 16                        # responses per prompt from which best-of-n takes the best; 0: leave it out
    best_of_count: int = 1000                # prompts for best-of-n
    missing_eos_score: float = -1.0          # score of a response without EOS when best-of-n chooses; as in PPO
    response_tokens: int = 32                # longest response
    temperature: float = 0.7                 # of every policy
    bootstrap: int = 2000                    # resamples behind each interval
    overwrite: bool = False                  # replace another run that --out holds, instead of refusing
    seed: int = 1                            # samples and resamples
    device: str = "auto"                     # auto, cpu, cuda, mps
    dtype: str = "auto"                      # auto, float32, bfloat16 (autocast)

PRESETS = {"tiny": {"dtype": "bfloat16"},
           "smoke": {"count": 32, "snapshot_count": 16, "best_of": 4, "response_tokens": 16, "bootstrap": 100},
           "smollm": {"dtype": "bfloat16", "response_tokens": 28, "count": 500, "snapshot_count": 64, "best_of": 4,
                      "best_of_count": 128},
           "chat": {"dtype": "bfloat16", "response_tokens": 64, "count": 300, "snapshot_count": 64, "best_of": 4,
                    "best_of_count": 64}}

# ---- estimators: pure functions of scores and wins -----------------------------------------------------------------

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
        # A trace of ridge keeps the step finite where every response won; it is subtracted from the gradient too.
        gradient = (X * (y - p)[:, :, None]).sum(1) - 1e-3 * weights
        hessian = torch.einsum("snj,sn,snk->sjk", X, p * (1 - p), X) + 1e-3 * torch.eye(2, dtype=torch.double)
        weights = weights + torch.linalg.solve(hessian, gradient).clamp(-2, 2)
    rates = torch.sigmoid(weights[:, 0])
    low, high = rates[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return round(rates[0].item(), 4), [round(low, 4), round(high, 4)]

def expected_best(scores, values, n):
    """Mean value of the response with the highest score among n: scores, values (M, N) to (M,), one per prompt.

    scores choose (the proxy's), values count (the judge's, say). Unbiased, and less noisy than one draw of n: the mean
    over all C(N, n) subsets of the N responses (Nakano et al. 2021, appendix I). The response with i others below it is
    the best of a subset if the n - 1 others come from those i: in C(i, n - 1) subsets. Ties go to the later one.
    """
    N = scores.size(1)
    weights = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)], dtype=torch.double)
    return (values.double().gather(1, scores.argsort(dim=1, stable=True)) * weights).sum(1)

def best_of_kl(n):
    """KL of best-of-n to the model sampled from, nats (Stiennon et al. 2020): an upper bound, nearly met while
    responses hardly repeat (Beirami et al. 2024). The chosen response's rank u in (0, 1) has the density n u^(n-1), and
    the KL is the mean of its logarithm."""
    return math.log(n) - (n - 1) / n

def unique_bigrams(responses):
    """Share of different bigrams among all bigrams of all responses (distinct-2 of Li et al. 2016); it falls as more
    responses of the same kind are counted."""
    pairs = [pair for ids in responses for pair in zip(ids, ids[1:])]
    return len(set(pairs)) / max(1, len(pairs))

def same_order(a, b):
    """Share of the pairs of one prompt's responses that two scorers order alike, a tie of either counted half:
    a, b (M, N)."""
    i, j = torch.triu_indices(a.size(1), a.size(1), offset=1)
    return (0.5 + 0.5 * torch.sign(a[:, i] - a[:, j]) * torch.sign(b[:, i] - b[:, j])).mean().item()

class Ensemble(torch.nn.ModuleList):
    """Several reward models as one, by the mean or least score, against over-optimisation (Coste et al. 2023)."""
    def score(self, *batch):
        scores = torch.stack([model.score(*batch) for model in self])  # (models, B)
        return scores.mean(0) if self.how == "mean" else scores.amin(0)

def load_reward(folders, device="cpu", how="mean"):
    """The reward models in checkpoint folders, with commas between, as one: how "mean" or "min"."""
    check(how in ("mean", "min"), f"--ensemble is {how!r}: write mean or min")
    models = Ensemble(load_model(folder, device, "reward") for folder in folders.split(","))
    models.how, models.config = how, min((model.config for model in models), key=lambda config: config.block_size)
    return models.eval()

# ---- responses and what is measured of them --------------------------------------------------------------------------

@torch.no_grad()
def kl_to(ref, policy, prompts, responses, end, cfg, autocast):
    """log p(policy) - log p(ref) of each response, summed over its tokens: (N,) nats. As the policy sampled it, this is
    an unbiased estimate of the KL from one sample; it can be negative."""
    device, kl = next(policy.parameters()).device, torch.empty(len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    for start in range(0, len(order), 32):
        rows = order[start:start + 32]
        left, pad = pad_prompts([prompts[i] for i in rows], end)
        right, mask = pad_responses([responses[i] for i in rows], end)
        tokens, pad, P = torch.cat([left, right], dim=1).to(device), pad.to(device), left.size(1)
        with autocast():
            logits = [model(tokens[:, :-1], pad, at=np.s_[:, P - 1:]) for model in (policy, ref)]  # (., R, V) each
        own, other = (token_logprobs(x, tokens[:, P - 1:], cfg.temperature).cpu() for x in logits)
        kl[rows] = ((own - other) * mask).sum(1)
    return kl

def respond(model, ref, scorers, prompts, enc, cfg, autocast, seed=0):
    """Sample the model's responses and measure them: a dict with responses (ids), texts, scores of each scorer, and kl,
    length and ended (N,)."""
    random = torch.Generator(next(model.parameters()).device).manual_seed(cfg.seed + seed)
    with autocast():
        responses = sample_many(model, prompts, cfg.response_tokens, enc.end, temperature=cfg.temperature,
                                random=random)
        texts = [prompt + response for prompt, response in zip(prompts, responses)]
        scores = {name: score_many(scorer, texts) for name, scorer in scorers.items()}
    ended = torch.tensor([float(ids[-1] == enc.end) for ids in responses])
    return {"responses": responses, "texts": [enc.decode(ids[:-1] if e else ids) for ids, e in zip(responses, ended)],
            "scores": scores, "length": torch.tensor([float(len(ids)) for ids in responses]), "ended": ended,
            "kl": torch.zeros(len(prompts)) if model is ref else
            kl_to(ref, model, prompts, responses, enc.end, cfg, autocast)}

def select(measured, rows):
    """Some rows (a list) of what respond returns."""
    def pick(x):
        return {k: pick(v) for k, v in x.items()} if isinstance(x, dict) else (
            x[rows] if torch.is_tensor(x) else [x[i] for i in rows])
    return pick(measured)

def wins_over(measured, base, scorer="judge"):
    """1 where the scorer prefers the response to the SFT model's, 0 where not, 0.5 for a tie: (N,)."""
    return 0.5 + 0.5 * torch.sign(measured["scores"][scorer] - base["scores"][scorer])

def means(measured, base):
    """Mean scores, KL and win rate, as a point of a curve."""
    return {"kl": measured["kl"].mean().item(), "win_rate_judge": wins_over(measured, base).mean().item(),
            **{name: scores.mean().item() for name, scores in measured["scores"].items()}}

def summarise(measured, base, cfg):
    """The row of the table for one policy; base: the SFT model's responses to the same prompts."""
    random = generator(cfg.seed)
    row = {name: round(scores.mean().item(), 4) for name, scores in measured["scores"].items()}
    row.update(prompts=len(measured["texts"]), kl=round(measured["kl"].mean().item(), 3),
               length=round(measured["length"].mean().item(), 2), eos_rate=round(measured["ended"].mean().item(), 4),
               unique_bigrams=round(unique_bigrams(measured["responses"]), 4))
    if measured is not base:
        for scorer in measured["scores"]:
            wins = wins_over(measured, base, scorer)
            row[f"win_rate_{scorer}"], row[f"win_rate_{scorer}_interval"] = mean_interval(wins, cfg.bootstrap, random)
        row["length_controlled"], row["length_controlled_interval"] = length_controlled(
            wins_over(measured, base), measured["length"] - base["length"], cfg.bootstrap, random)
    return row

def best_of_n(pool, base, n, missing_eos_score):
    """From a pool of n responses of the SFT model to each prompt (row by row): the responses that the proxy finds best,
    a curve of best-of-1, 2, 4, ... n in expectation, and how often the others agree with the proxy.

    It chooses by what PPO maximises: without the rule for a missing EOS, best-of-n prefers responses without one.
    """
    M = len(base["texts"])
    proxy = pool["scores"]["proxy"].view(M, n)
    judged = proxy if math.isnan(missing_eos_score) else torch.where(pool["ended"].view(M, n) > 0, proxy,
                                                                     missing_eos_score)
    best = select(pool, (judged.argmax(1) + n * torch.arange(M)).tolist())
    best["kl"] = torch.full((M,), best_of_kl(n))
    repeated = {"scores": {name: scores.repeat_interleave(n) for name, scores in base["scores"].items()}}
    values = {**pool["scores"], "win_rate_judge": wins_over(pool, repeated)}
    sizes = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
    curve = [{"n": k, "kl": best_of_kl(k), **{
        name: expected_best(judged, x.view(M, n), k).mean().item() for name, x in values.items()}} for k in sizes]
    return best, curve, {name: round(same_order(proxy, scores.view(M, n)), 4)
                         for name, scores in pool["scores"].items() if name != "proxy"}

def extremes(prompts, base, measured):
    """The responses with the largest, the middle and the smallest changes of the judge's score, for the report."""
    change = measured["scores"]["judge"] - base["scores"]["judge"]
    order, middle = change.argsort(descending=True).tolist(), max(2, len(change) // 2)
    return [{"change": name, "prompt": prompts[i][-300:], "sft": base["texts"][i], "text": measured["texts"][i],
             "sft_judge": base["scores"]["judge"][i].item(), "judge": measured["scores"]["judge"][i].item()}
            for name, rows in [("best", order[:4]), ("median", order[middle - 2:middle + 2]), ("worst", order[-4:])]
            for i in rows]

def histograms(everyone):
    """{scorer: {"edges", "counts": {policy: responses per bin}}}."""
    made = {}
    for scorer in everyone["sft"]["scores"]:
        scores = {name: measured["scores"][scorer] for name, measured in everyone.items()}
        edges = torch.linspace(min(x.min() for x in scores.values()), max(x.max() for x in scores.values()), 31)
        counts = {name: torch.histogram(x, edges)[0].int().tolist() for name, x in scores.items()}
        made[scorer] = {"edges": edges.tolist(), "counts": counts}
    return made

# ---- what is read of other stages ------------------------------------------------------------------------------------

def load_json(path):
    """The content of a JSON file, {} if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}

def flags(stage):
    """The flags of a stage without those that are nan, which is not JSON."""
    return {flag: value for flag, value in stage.items() if value == value}

def stage_facts(cfg, folders, scorers):
    """What the stages before this one left: report cards, flags, logs, seconds and memory, for results.json."""
    cards = {name: load_json(Path(folder) / "report_card.json") for name, folder in (
        ("proxy", cfg.reward), ("labeler", cfg.labeler), ("judge", cfg.judge), *folders.items()) if folder}
    done = sorted(Path(cfg.sft).parent.glob("*/done.json"), key=lambda path: path.stat().st_mtime)
    logs = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, folder in folders.items()
            if (path := folder / "log.jsonl").is_file()}
    return {"reward_models": {name: cards[name].get("human comparisons", {}) for name in scorers},
            "held_out_rankings": {name: card["held-out rankings"] for name, card in cards.items()
                                  if card and name not in ("labeler", "judge")},
            "flags": {name: flags(load_json(path / "config.json").get("stage", {})) for name, path in folders.items()},
            "training": logs, "stages": {path.parent.name: load_json(path) for path in done}}

def hardware():
    """The processor or GPU, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in (cpu.read_text().splitlines() if cpu.is_file() else [])
             if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

def main(cfg):
    check(cfg.bootstrap > 1 and cfg.best_of != 1, "--bootstrap must be 2 or more, --best-of 0 (left out), 2 or more")
    folders = {Path(folder).name: Path(folder) for folder in cfg.policies.split(",")}
    taken = ["sft", "prompt", "proxy", "labeler", "judge", f"best-of-{cfg.best_of}"]  # names are columns of tables
    check(len(folders) == len(cfg.policies.split(",")) and not folders.keys() & set(taken), f"--policies "
          f"{cfg.policies}: the folder names must differ from each other and from {', '.join(taken)}")
    device, autocast = set_up(cfg)
    stage = Stage(cfg, "sft", "policies", "reward", "labeler", "judge", "prompts", "others", "text")
    enc, ref, others = load_tokenizer(cfg.sft), load_model(cfg.sft, device), list(filter(None, cfg.others.split(",")))
    check_same_vocab(cfg.sft, *cfg.reward.split(","), *filter(None, [cfg.labeler]), cfg.judge, *folders.values())
    scorers = {"proxy": load_reward(cfg.reward, device, cfg.ensemble)}
    for name, folder in {"labeler": cfg.labeler, "judge": cfg.judge}.items():
        scorers |= {name: load_model(folder, device, kind="reward")} if folder else {}
    policies = {name: load_model(folder, device) for name, folder in folders.items()}
    limit = prompt_limit(min(m.config.block_size for m in (ref, *scorers.values(), *policies.values())),
                         cfg.response_tokens)

    def read_prompts(path, count):
        texts, counts = [row["prompt"] for row in read_jsonl(path, {"prompt": str})][:count], Counter()
        encoded = [encode_prompt(enc, text, limit, counts) for text in texts]
        report_truncated(counts)
        return texts, encoded

    check(len({Path(path).stem for path in [cfg.prompts, *others]}) == 1 + len(others),
          f"--others {cfg.others}: the names of the files must differ from each other and from that of --prompts")
    texts, prompts = read_prompts(cfg.prompts, cfg.count)
    others = {Path(path).stem: read_prompts(path, cfg.snapshot_count)[1] for path in others}
    held_out = packed_rows(enc, cfg.text, min(64, ref.config.block_size), 0)[:256]
    stage.open()

    def measure(model, prompts, seed=0):
        return respond(model, ref, scorers, prompts, enc, cfg, autocast, seed)

    def perplexity(model):
        return round(math.exp(held_out_loss(model, held_out, enc.end, device, autocast)), 2)

    base = measure(ref, prompts)
    base_few = select(base, range(min(cfg.snapshot_count, len(prompts))))
    everyone, rows = {"sft": base}, {"sft": {**summarise(base, base, cfg), "perplexity": perplexity(ref)}}
    curve, agreement, snapshots, elsewhere = [], {}, {}, {}
    if cfg.best_of:
        name, base_pool = f"best-of-{cfg.best_of}", select(base, range(min(cfg.best_of_count, len(prompts))))
        repeated = [ids for ids in prompts[:cfg.best_of_count] for _ in range(cfg.best_of)]
        pool = measure(ref, repeated, seed=1)  # not the samples of base, against which they win or lose
        everyone[name], curve, agreement = best_of_n(pool, base_pool, cfg.best_of, cfg.missing_eos_score)
        rows[name] = summarise(everyone[name], base_pool, cfg)
    for name, policy in policies.items():
        everyone[name] = measure(policy, prompts)
        rows[name] = {**summarise(everyone[name], base, cfg), "perplexity": perplexity(policy)}
        snapshots[name] = [{"iteration": 0, **means(base_few, base_few)}]
        for path in progress(sorted(folders[name].glob("snapshots/*/model.pt")), f"{name} snapshots"):
            measured = measure(load_model(path.parent, device), prompts[:cfg.snapshot_count])
            snapshots[name].append({"iteration": int(path.parent.name), **means(measured, base_few)})
    for kind, ids in others.items():
        base_there = measure(ref, ids)
        elsewhere[kind] = {name: summarise(measure(policy, ids), base_there, cfg) for name, policy in policies.items()}

    responses = [{
        "prompt": text, **{name: x["texts"][i] for name, x in everyone.items() if i < len(x["texts"])},
        "judge": {name: round(x["scores"]["judge"][i].item(), 3) for name, x in everyone.items()
                  if i < len(x["texts"])}} for i, text in enumerate(texts)]
    write_jsonl(stage.folder / "samples.jsonl", responses)
    write_json(stage.folder / "results.json", {
        "date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "torch": torch.__version__,
        "prompts": len(prompts), "config": flags(asdict(cfg)), "policies": rows, "best_of_n": curve,
        "proxy_agreement": agreement, "snapshots": snapshots, "others": elsewhere, "histograms": histograms(everyone),
        "first": responses[:12], "samples": {name: extremes(texts, base, everyone[name]) for name in policies},
        **stage_facts(cfg, folders, scorers)})
    print(f"\n{'policy':16} win rate    95 % interval     KL length EOS rate perplexity")
    for name, row in rows.items():
        low, high = row.get("win_rate_judge_interval", ("", ""))
        print(f"{name:16} {row.get('win_rate_judge', ''):>8} {low:>7} {high:>8} {row['kl']:6.2f} {row['length']:6.1f} "
              f"{row['eos_rate']:8.3f} {row.get('perplexity', ''):>10}")
    stage.finish()

if __name__ == "__main__":
    run(main, Config, PRESETS)
