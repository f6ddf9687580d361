"""Labels: first samples, then rankings, so that several labelers can rank the same. The first word chooses the step:

    python label.py sample --model out/tiny/sft          K responses per prompt, sampled from the SFT model
    python label.py rank --labeler out/tiny/labeler      order them best to worst: a reward model in people's place
    python label.py sample --help, rank --help           the flags of a step

People rank by python -m labeling.terminal or on a page, machines by python -m labeling.rlaif: see docs/labeling.md.

People disagree at times, so the reward model in their place does too. Sorting score + temperature * Gumbel noise
samples a ranking from the Plackett-Luce model, whose pairs are Bradley-Terry: P(i above j) = sigmoid((score_i -
score_j) / temperature). The data come with people's temperature in rating units; a unit is std(scores) / std(mean
ratings) on held-out human sentences (not a regression: its slope shrinks with the labeler's errors, and so would count
them as people's disagreement).

Papers: Luce 1959, Plackett 1975 (rankings); Stiennon et al. 2020; Ouyang et al. 2022 (K responses per prompt).
"""
import hashlib
import json
import math
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from common import Stage, check, generator, run, set_up, visible
from data import encode_prompt, load_tokenizer, prompt_limit, read_jsonl, report_truncated, write_jsonl
from model import load_model
from reward import encode_rankings, score_many
from sampling import sample_many

@dataclass
class SampleConfig:
    out: str = "out/tiny/samples"  # folder for samples.jsonl
    model: str = "out/tiny/sft"    # language model that responds
    prompts: str = "data/reviews/prompts_label.jsonl"  # {"prompt"}
    prompts_limit: int = 0         # only the first so many prompts; 0: all
    K: int = 4                     # responses per prompt
    response_tokens: int = 32      # longest response
    temperature: float = 0.7       # divides the logits
    keep_truncated: bool = False   # keep responses that did not reach EOS, too
    overwrite: bool = False        # replace another run that --out holds, instead of refusing
    seed: int = 1                  # of the samples
    device: str = "auto"           # auto, cpu, cuda, mps
    dtype: str = "auto"            # auto, float32, bfloat16 (autocast)

@dataclass
class RankConfig:
    labeler: str = "out/tiny/labeler"  # folder of a reward model
    samples: str = "out/tiny/samples/samples.jsonl"  # {"id", "prompt", "responses"}
    out: str = "out/tiny/label"        # folder for rankings.jsonl
    limit: int = 0                     # only the first so many samples; 0: all
    noise: float = 1.0                 # as a multiple of people's disagreement; 0: none
    flip: float = 0.0                  # share of the rankings that are reversed: a bad labeler
    calibrate: str = "data/reviews/rankings_test.jsonl"  # human ratings for the noise, with summary.json beside it
    overwrite: bool = False            # replace another run that --out holds, instead of refusing
    seed: int = 1                      # of the noise
    device: str = "auto"               # auto, cpu, cuda, mps
    dtype: str = "auto"                # auto, float32, bfloat16 (autocast)

PRESETS = {"tiny": {"dtype": "bfloat16"}, "smollm": {"dtype": "bfloat16", "response_tokens": 28},
           "smoke": {"prompts_limit": 24, "response_tokens": 16, "keep_truncated": True}}  # has hardly met an EOS

RANK_PRESETS = {"tiny": {"dtype": "bfloat16"}, "smollm": {"dtype": "bfloat16"}, "smoke": {}}

# ---- sample --------------------------------------------------------------------------------------------------------

def draw_responses(model, enc, prompts, cfg, autocast):
    """For each prompt (text) up to K different response texts; and a Counter of what became of the samples.

    reward.py reads the EOS behind each response, so one that has none is sampled again, in four rounds at most, like
    one that is empty, no UTF-8, a duplicate, or has a special token inside.
    """
    limit = prompt_limit(model.config.block_size, cfg.response_tokens)
    counts = Counter()
    encoded = [encode_prompt(enc, prompt, limit, counts) for prompt in prompts]
    report_truncated(counts)
    specials = set(enc.settings["special"].values())  # as text they would be ordinary tokens
    random = torch.Generator(next(model.parameters()).device).manual_seed(cfg.seed)
    kept, counts = [[] for _ in prompts], Counter()
    for _ in range(4):
        missing = [i for i, texts in enumerate(kept) for _ in range(cfg.K - len(texts))]
        if not missing:
            break
        with autocast():
            drawn = sample_many(model, [encoded[i] for i in missing], cfg.response_tokens, enc.end,
                                temperature=cfg.temperature, random=random)
        for i, ids in zip(missing, drawn):
            ended = ids[-1] == enc.end
            text = enc.decode(ids[:-1] if ended else ids)
            text = text.strip() if enc.chat else text
            fate = ("special token" if any(i in specials for i in ids[:-1]) else
                    "truncated" if not (ended or cfg.keep_truncated) else "empty" if not text.strip() else
                    "no UTF-8" if re.search("[\0\ufffd]", text) else "duplicate" if text in kept[i] else "kept")
            counts[fate] += 1
            if fate == "kept":
                kept[i].append(text)
    return kept, counts

def shuffled(texts, *key):
    """The texts in an order that depends on the key (integers) alone: the likelier samples tend to come first."""
    return [texts[i] for i in torch.randperm(len(texts), generator=generator(*key)).tolist()]

def sample(cfg):
    check(cfg.K > 1, f"--K is {cfg.K}: it must be 2 or more")
    device, autocast = set_up(cfg)
    stage = Stage(cfg, "model", "prompts")
    prompts = list(dict.fromkeys(row["prompt"] for row in read_jsonl(cfg.prompts, {"prompt": str})))
    prompts = prompts[:cfg.prompts_limit or len(prompts)]
    if spaces := sum(prompt.endswith(" ") for prompt in prompts):
        print(f"{spaces:,} of {len(prompts):,} prompts end in a space (does it belong to the response?)")
    model, enc = load_model(cfg.model, device), load_tokenizer(cfg.model)
    stage.open()
    kept, counts = draw_responses(model, enc, prompts, cfg, autocast)
    print(f"{counts.total():,} samples: " + ", ".join(f"{n:,} {fate}" for fate, n in counts.most_common()))
    rows = []
    for i, (prompt, texts) in enumerate(zip(prompts, kept)):
        if len(texts) > 1:  # the id depends on the texts, whatever their order
            name = hashlib.sha256(json.dumps([prompt, sorted(texts)]).encode()).hexdigest()[:12]
            rows.append({"id": name, "prompt": prompt, "responses": shuffled(texts, cfg.seed, i)})
    check(rows, "no prompt has two different responses (larger --response-tokens or --keep-truncated may help)")
    print("\n    ...".join(map(visible, [rows[0]["prompt"] + " ..."] + rows[0]["responses"])))  # look at samples
    write_jsonl(stage.folder / "samples.jsonl", rows)
    stage.finish(prompts=len(rows), prompts_dropped=len(prompts) - len(rows),
                 prompts_below_K=sum(len(row["responses"]) < cfg.K for row in rows), **counts)

# ---- rank ----------------------------------------------------------------------------------------------------------

def noisy_order(scores, temperature, random):
    """Indices of scores (K,) from best to worst, with Plackett-Luce noise; temperature 0: the plain order."""
    gumbel = -torch.empty_like(scores).exponential_(generator=random).log()
    return (scores + temperature * gumbel).argsort(descending=True, stable=True).tolist()

def order_kept(margins, temperature, flip=0.0):
    """Share of pairs, margins (N,) apart in score, that (a noisy and the noiseless, two noisy) rankings order alike."""
    keep = torch.sigmoid(margins.abs() / temperature) if temperature > 0 else torch.ones(1)
    keep = keep * (1 - flip) + (1 - keep) * flip
    return keep.mean().item(), (keep**2 + (1 - keep)**2).mean().item()

def calibrated_temperature(scores, means, people):
    """People's temperature, from rating units to score units: scores, means (N,) of the same sentences."""
    check(scores.std() > 0 and means.std() > 0, "all scores or all ratings are the same: use --noise 0")
    return people * (scores.std() / means.std()).item()

def read_ratings(path):
    """{held-out movie sentence: mean rating}, and people's temperature from the summary.json beside the file."""
    mean_of = {}
    for row in read_jsonl(path, {"prompt": str, "responses": list}):
        check("means" in row, f"{path}: means: expected one rating per response (or rank with --noise 0)")
        if row.get("domain", "movie") == "movie":  # the temperature is that of raters of movie reviews
            mean_of.update(zip((row["prompt"] + text for text in row["responses"]), row["means"]))
    summary = Path(path).parent / "summary.json"
    check(summary.is_file(), f"{summary}: missing (python -m prepare.reviews writes it; or use --noise 0)")
    return mean_of, json.loads(summary.read_text())

def rank(cfg):
    """Order each sample by the labeler's scores and calibrated noise, and write rankings.jsonl."""
    check(cfg.flip <= 1, f"--flip is {cfg.flip}: it must be from 0 to 1")
    device, autocast = set_up(cfg)
    stage = Stage(cfg, "labeler", "samples", *(["calibrate"] if cfg.noise else []))
    check(not (stage.folder / "answers.jsonl").exists(), f"--out {stage.folder}: holds the work of another labeler")
    samples = read_jsonl(cfg.samples, {"id": str, "prompt": str, "responses": list})[:cfg.limit or None]
    mean_of, facts = read_ratings(cfg.calibrate) if cfg.noise else ({}, {})
    model, enc = load_model(cfg.labeler, device, kind="reward"), load_tokenizer(cfg.labeler)
    stage.open()
    rows = samples + ([{"prompt": "", "responses": list(mean_of)}] if mean_of else [])
    with autocast():
        encoded = encode_rankings(enc, rows, model.config.block_size, Counter())
        scores = score_many(model, [text for texts in encoded for text in texts]).split(list(map(len, encoded)))
    human = scores[-1]
    temperature, distances = 0.0, [torch.pdist(s[:, None], p=1) for s in scores[:len(samples)]]
    margins = {"these samples": torch.cat(distances)}
    if mean_of:
        means = torch.tensor(list(mean_of.values()), dtype=torch.float)
        temperature = cfg.noise * calibrated_temperature(human, means, facts["temperature"])
        margins["held-out human sentences"] = torch.pdist(human[:2000, None], p=1)
        print(f"{len(means):,} held-out human sentences: std of ratings {means.std():.3f}, scores {human.std():.3f}; "
              f"temperature {facts['temperature']} in ratings, times noise {cfg.noise:g}, {temperature:.3f} in scores")
    shares = {name: order_kept(part, temperature, cfg.flip) for name, part in margins.items()}
    for name, (one, two) in shares.items():
        print(f"{name}: a noisy ranking keeps {one:.3f} of the pairs in order, two noisy ones agree on {two:.3f}")
    if mean_of:
        agreement = facts.get("agreement", {}).get("movie", {}).get("random", [math.nan] * 2)[1]
        print(f"(of held-out human sentences, two people agree on {agreement:.3f})")
    ranked = []
    for row, s in zip(samples, scores):  # the noise depends on the id, not on the place in the file
        random = generator(cfg.seed, zlib.crc32(row["id"].encode()))
        order = noisy_order(s, temperature, random)
        order = order[::-1] if torch.rand(1, generator=random) < cfg.flip else order
        ranked.append({**row, "responses": [row["responses"][i] for i in order], "labeler": cfg.labeler})
    write_jsonl(stage.folder / "rankings.jsonl", ranked)
    stage.finish(rankings=len(ranked), temperature=round(temperature, 4),
                 order_kept=round(shares["these samples"][0], 4))

STEPS = {"sample": (sample, SampleConfig, PRESETS), "rank": (rank, RankConfig, RANK_PRESETS)}

if __name__ == "__main__":
    step = (sys.argv[1:] or [""])[0]
    if step in STEPS:
        run(*STEPS[step], argv=sys.argv[2:])
    else:
        print(__doc__)
        sys.exit(0 if step in ("-h", "--help") else 2)
