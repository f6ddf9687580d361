"""Everything on one footing: policies and best-of-n against the SFT model on held-out prompts.

    python evaluate.py --sft out/tiny/sft --policies out/tiny/dpo,out/tiny/ppo --out out/tiny/evaluate
    python evaluate.py --ask NAME                      then: which do you prefer, blind? (blind.py)

Every policy answers the same prompts at the same temperature. Three reward models score the answers: the one that PPO
optimised (proxy), the labeler that ranked the proxy's training data (Gao et al. 2022 call it gold; there is none in the
preset hh, where people ranked), and the judge, which learned from other ratings, of other sentences, and which nothing
was trained on. Win rates are the judge's.

Writes samples.jsonl, and results.json, from which report.py makes report.md and the figures. Papers: Stiennon et al.
2020 (win rates, over-optimisation); Nakano et al. 2021 (best-of-n); Dubois et al. 2024 (length control).
"""
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import report
from agreement import learned
from checkpoint import write_json
from common import check, check_positive, generator, progress, run, set_up
from data import check_same_vocab, encode_prompt, load_tokenizer, pad_prompts, pad_responses, read_jsonl, write_jsonl
from estimators import best_of_kl, distinct_2, expected_best, length_controlled, mean_interval, same_order
from model import load_model, load_reward, prompt_room, score_many, token_logprobs
from runs import Stage
from sampling import sample_many
from sft import held_out_loss, packed_rows


@dataclass
class Config:
    out: str = "out/tiny/evaluate"           # folder for the report
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
    no_end_score: float = -1.0               # what a response without end of text counts when best-of-n chooses; as PPO
    response_tokens: int = 32                # longest response
    temperature: float = 0.7                 # of every policy
    bootstrap: int = 2000                    # resamples behind each interval
    min_win_rate: float = 0.0                # exit code 1 if a policy's win rate is below this
    restart: bool = False                    # begin again where --out holds another run, instead of refusing
    seed: int = 1                            # samples and resamples
    device: str = "auto"                     # auto, cpu, cuda, mps
    dtype: str = "auto"                      # auto, float32, bfloat16 (autocast)


PRESETS = {"tiny": {}, "smoke": {"count": 32, "snapshot_count": 16, "best_of": 4, "response_tokens": 16,
                                 "bootstrap": 100},
           "gpt2": {"response_tokens": 24},
           "hh": {"count": 500, "snapshot_count": 128, "best_of_count": 128, "response_tokens": 128}}


# ---- answers and what is measured of them ----------------------------------------------------------------------------


@torch.no_grad()
def kl_to(ref, policy, prompts, responses, end, cfg, autocast):
    """log p(policy) - log p(ref) of each response, summed over its tokens: (N,) nats. As the policy drew the response,
    this is an unbiased estimate of the KL from one sample; it can be negative."""
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


def answer(model, ref, scorers, prompts, enc, cfg, autocast, seed=0):
    """Sample the model's responses and measure them: a dict with responses (ids), texts, scores of each scorer, and kl,
    length and ended (N,)."""
    random = torch.Generator(next(model.parameters()).device).manual_seed(cfg.seed + seed)
    with autocast():
        responses = sample_many(model, prompts, cfg.response_tokens, enc.eot_token, temperature=cfg.temperature,
                                random=random)
        texts = [prompt + response for prompt, response in zip(prompts, responses)]
        scores = {name: score_many(scorer, texts) for name, scorer in scorers.items()}
    ended = torch.tensor([float(ids[-1] == enc.eot_token) for ids in responses])
    return {"responses": responses, "texts": [enc.decode(ids[:-1] if e else ids) for ids, e in zip(responses, ended)],
            "scores": scores, "length": torch.tensor([float(len(ids)) for ids in responses]), "ended": ended,
            "kl": torch.zeros(len(prompts)) if model is ref else
            kl_to(ref, model, prompts, responses, enc.eot_token, cfg, autocast)}


def select(answers, rows):
    """Some rows (a list) of answers."""
    def pick(x):
        return {k: pick(v) for k, v in x.items()} if isinstance(x, dict) else (
            x[rows] if torch.is_tensor(x) else [x[i] for i in rows])
    return pick(answers)


def wins_over(answers, base, scorer="judge"):
    """1 where the scorer prefers the answer to the SFT model's, 0 where not, 0.5 for a tie: (N,)."""
    margin = answers["scores"][scorer] - base["scores"][scorer]
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def means(answers, base):
    """Mean scores, KL and win rate, as a point of a curve."""
    return {"kl": answers["kl"].mean().item(), "win_rate_judge": wins_over(answers, base).mean().item(),
            **{name: scores.mean().item() for name, scores in answers["scores"].items()}}


def summarise(answers, base, cfg):
    """The row of the table for one policy; base: the SFT model's answers to the same prompts."""
    random = generator(cfg.seed)
    row = {name: round(scores.mean().item(), 4) for name, scores in answers["scores"].items()}
    row.update(prompts=len(answers["texts"]), kl=round(answers["kl"].mean().item(), 3),
               length=round(answers["length"].mean().item(), 2), end_rate=round(answers["ended"].mean().item(), 4),
               distinct_2=round(distinct_2(answers["responses"]), 4))
    if answers is not base:
        for scorer in answers["scores"]:
            wins = wins_over(answers, base, scorer)
            row[f"win_rate_{scorer}"], row[f"win_rate_{scorer}_interval"] = mean_interval(wins, cfg.bootstrap, random)
        row["length_controlled"], row["length_controlled_interval"] = length_controlled(
            wins_over(answers, base), answers["length"] - base["length"], cfg.bootstrap, random)
    return row


def best_of_n(pool, base, n, no_end_score):
    """From a pool of n responses of the SFT model to each prompt (pool, row by row): the answers that the proxy thinks
    best, a curve of best-of-1, 2, 4, ... n in expectation, and how often the others agree with the proxy.

    It chooses by what PPO maximises: without the rule for responses that do not end, best-of-n prefers those.
    """
    M = len(base["texts"])
    proxy = pool["scores"]["proxy"].view(M, n)
    judged = proxy if math.isnan(no_end_score) else torch.where(pool["ended"].view(M, n) > 0, proxy, no_end_score)
    best = select(pool, (judged.argmax(1) + n * torch.arange(M)).tolist())
    best["kl"] = torch.full((M,), best_of_kl(n))
    repeated = {"scores": {name: scores.repeat_interleave(n) for name, scores in base["scores"].items()}}
    values = {**pool["scores"], "win_rate_judge": wins_over(pool, repeated)}
    sizes = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
    curve = [{"n": k, "kl": best_of_kl(k), **{
        name: expected_best(judged, x.view(M, n), k).mean().item() for name, x in values.items()}} for k in sizes]
    return best, curve, {name: round(same_order(proxy, scores.view(M, n)), 4)
                         for name, scores in pool["scores"].items() if name != "proxy"}


def extremes(prompts, base, answers):
    """The answers with the largest, the middle and the smallest changes of the judge's score, for the report."""
    change = answers["scores"]["judge"] - base["scores"]["judge"]
    order, middle = change.argsort(descending=True).tolist(), max(2, len(change) // 2)
    return [{"change": name, "prompt": prompts[i][-300:], "sft": base["texts"][i], "text": answers["texts"][i],
             "sft_judge": base["scores"]["judge"][i].item(), "judge": answers["scores"]["judge"][i].item()}
            for name, rows in [("best", order[:4]), ("median", order[middle - 2:middle + 2]), ("worst", order[-4:])]
            for i in rows]


def histograms(everyone):
    """{scorer: {"edges", "counts": {policy: responses per bin}}}."""
    made = {}
    for scorer in everyone["sft"]["scores"]:
        scores = {name: answers["scores"][scorer] for name, answers in everyone.items()}
        edges = torch.linspace(min(x.min() for x in scores.values()), max(x.max() for x in scores.values()), 31)
        counts = {name: torch.histogram(x, edges)[0].int().tolist() for name, x in scores.items()}
        made[scorer] = {"edges": edges.tolist(), "counts": counts}
    return made


# ---- what is read of other stages ------------------------------------------------------------------------------------


def policy_folders(cfg):
    """{name: folder} of the policies; UserError if a name is taken, as names are columns of tables."""
    folders = {Path(folder).name: Path(folder) for folder in cfg.policies.split(",")}
    taken = ["sft", "prompt", "proxy", "labeler", "judge", f"best-of-{cfg.best_of}"]
    check(len(folders) == len(cfg.policies.split(",")) and not folders.keys() & set(taken), f"--policies "
          f"{cfg.policies}: the folder names must differ from each other and from {', '.join(taken)}")
    return folders


def load_models(cfg, folders, device):
    """The SFT model, {name: reward model that scores} and {name: policy}."""
    ref = load_model(cfg.sft, device)
    check_same_vocab(cfg.sft, *cfg.reward.split(","), *filter(None, [cfg.labeler]), cfg.judge, *folders.values())
    scorers = {"proxy": load_reward(cfg.reward, device, cfg.ensemble)}
    for name, folder in {"labeler": cfg.labeler, "judge": cfg.judge}.items():
        scorers |= {name: load_model(folder, device, kind="reward")} if folder else {}
    policies = {name: load_model(folder, device) for name, folder in folders.items()}
    block_size = min(model.config.block_size for model in (*scorers.values(), *policies.values()))
    check(block_size >= ref.config.block_size, f"--sft {cfg.sft}: its block size is {ref.config.block_size}, another "
                                               f"model's only {block_size}")
    return ref, scorers, policies


def read_prompts(path, count, enc, room):
    """The first so many prompts of a file: texts, and their ids."""
    texts = [row["prompt"] for row in read_jsonl(path, {"prompt": str})][:count]
    return texts, [encode_prompt(enc, text, room) for text in texts]


def load_json(path):
    """The content of a JSON file, {} if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def training_log(folder):
    """The lines of a policy's log.jsonl; [] if there is no such log, or a damaged one: it is for a figure only."""
    try:
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        return [line for line in lines if isinstance(line, dict) and "stopped" not in line]
    except (OSError, ValueError):
        return []


def flags(stage):
    """The flags of a stage without those that are nan, which is not JSON."""
    return {flag: value for flag, value in stage.items() if value == value}


def stage_facts(cfg, folders, scorers):
    """What the stages before this one left: report cards, flags, logs, seconds and memory, for results.json."""
    cards = {name: load_json(Path(folder) / "report_card.json") if folder else {} for name, folder in (
        ("proxy", cfg.reward), ("labeler", cfg.labeler), ("judge", cfg.judge), *folders.items())}  # none: an ensemble
    human = {name: cards[name].get("human comparisons") for name in scorers}
    done = sorted(Path(cfg.sft).parent.glob("*/done.json"), key=lambda path: path.stat().st_mtime)
    same_run = Path(cfg.out).resolve().parent == Path(cfg.sft).resolve().parent
    return {"reward_models": human if all(human.values()) else {},
            "held_out_rankings": {name: card["held-out rankings"] for name, card in cards.items()
                                  if card and name not in ("labeler", "judge")},
            "labelers": labelers(folders),
            "flags": {name: flags(load_json(path / "config.json").get("stage", {})) for name, path in folders.items()},
            "training": {name: training_log(folder) for name, folder in folders.items()},
            "stages": {path.parent.name: load_json(path) for path in done if same_run}}


def labelers(folders):
    """{policy: what its reward model learned from, and how good that model is} of the policies trained on one; without
    those whose files are gone or damaged: it is for a table only."""
    found = {}
    for name, folder in folders.items():
        try:
            reward = load_json(folder / "config.json")["stage"]["reward"]
            card, facts = load_json(Path(reward) / "report_card.json"), learned(reward)
            found[name] = {"reward": reward, "labeler": ", ".join(Path(labeler).name for labeler in facts["labelers"]),
                           "rankings": facts["rankings"], "held-out": card["held-out rankings"],
                           "people": {sample: card["human comparisons"][sample]["reward model"]
                                      for sample in ("movie, random", "movie, same_sign")
                                      if sample in card.get("human comparisons", {})}}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
    return found


def hardware():
    """The processor or GPU, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in (cpu.read_text().splitlines() if cpu.is_file() else [])
             if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def main(cfg):
    check_positive(cfg, "count", "snapshot_count", "best_of_count", "response_tokens", "temperature",
                   or_zero=("best_of",))
    check(cfg.bootstrap > 1, f"--bootstrap is {cfg.bootstrap}: it must be 2 or more")
    check(cfg.best_of != 1, "--best-of is 1: it must be 0 (left out), or 2 or more")
    folders = policy_folders(cfg)
    stage = Stage(cfg, "sft", "policies", "reward", "labeler", "judge", "prompts", "others", "text")
    device, autocast = set_up(cfg)
    (ref, scorers, policies), enc = load_models(cfg, folders, device), load_tokenizer(cfg.sft)
    room, others = prompt_room(ref.config, cfg.response_tokens), [path for path in cfg.others.split(",") if path]
    check(len({Path(path).stem for path in [cfg.prompts, *others]}) == 1 + len(others),
          f"--others {cfg.others}: the names of the files must differ from each other and from that of --prompts")
    texts, prompts = read_prompts(cfg.prompts, cfg.count, enc, room)
    others = {Path(path).stem: read_prompts(path, cfg.snapshot_count, enc, room)[1] for path in others}
    held_out = packed_rows(enc, cfg.text, min(64, ref.config.block_size), 0)[:256]
    stage.open()

    def measure(model, prompts, seed=0):
        return answer(model, ref, scorers, prompts, enc, cfg, autocast, seed)

    def perplexity(model):
        return round(math.exp(held_out_loss(model, held_out, enc.eot_token, device, autocast)), 2)

    base = measure(ref, prompts)
    base_few = select(base, range(min(cfg.snapshot_count, len(prompts))))
    everyone, rows = {"sft": base}, {"sft": {**summarise(base, base, cfg), "perplexity": perplexity(ref)}}
    curve, agreement, snapshots, elsewhere = [], {}, {}, {}
    if cfg.best_of:
        name, base_pool = f"best-of-{cfg.best_of}", select(base, range(min(cfg.best_of_count, len(prompts))))
        repeated = [ids for ids in prompts[:cfg.best_of_count] for _ in range(cfg.best_of)]
        pool = measure(ref, repeated, seed=1)  # not the draws of base, against which they win or lose
        everyone[name], curve, agreement = best_of_n(pool, base_pool, cfg.best_of, cfg.no_end_score)
        rows[name] = summarise(everyone[name], base_pool, cfg)
    for name, policy in policies.items():
        everyone[name] = measure(policy, prompts)
        rows[name] = {**summarise(everyone[name], base, cfg), "perplexity": perplexity(policy)}
        snapshots[name] = [{"iteration": 0, **means(base_few, base_few)}]
        for path in progress(sorted(folders[name].glob("snapshots/*/model.pt")), f"{name} snapshots"):
            answers = measure(load_model(path.parent, device), prompts[:cfg.snapshot_count])
            snapshots[name].append({"iteration": int(path.parent.name), **means(answers, base_few)})
    for kind, ids in others.items():
        base_there = measure(ref, ids)
        elsewhere[kind] = {name: summarise(measure(policy, ids), base_there, cfg) for name, policy in policies.items()}

    results = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "torch": torch.__version__,
               "prompts": len(prompts), "config": flags(asdict(cfg)), "policies": rows, "best_of_n": curve,
               "proxy_agreement": agreement, "snapshots": snapshots, "others": elsewhere,
               "histograms": histograms(everyone),
               "samples": {name: extremes(texts, base, everyone[name]) for name in policies},
               **stage_facts(cfg, folders, scorers)}
    write_jsonl(stage.folder / "samples.jsonl", [{
        "prompt": text, **{name: x["texts"][i] for name, x in everyone.items() if i < len(x["texts"])},
        "judge": {name: round(x["scores"]["judge"][i].item(), 3) for name, x in everyone.items()
                  if i < len(x["texts"])}} for i, text in enumerate(texts)])
    write_json(stage.folder / "results.json", results)
    report.write(stage.folder, results)
    for name in [*everyone][1:]:
        row = rows[name]
        print(f"{name}: win rate {row['win_rate_judge']:.3f} {row['win_rate_judge_interval']}, at equal length "
              f"{row['length_controlled']:.3f}, KL {row['kl']:.2f}, length {row['length']:.1f}")
    print(f"report: {stage.folder / 'report.md'}")
    below = [name for name in policies if rows[name]["win_rate_judge"] < cfg.min_win_rate]
    check(not below, f"win rate of {', '.join(below)} below --min-win-rate {cfg.min_win_rate}", 1)
    stage.finish()


if __name__ == "__main__":
    if any(word.split("=")[0] == "--ask" for word in sys.argv):
        import blind  # whose flags these are
        run(blind.main, blind.Config)
    else:
        run(main, Config, PRESETS)
