"""Labels: first samples, then rankings, so that several labelers can rank the same. The first word chooses the step:

    python label.py sample --model out/tiny/sft          K responses per prompt, drawn from the SFT model
    python label.py rank --labeler out/tiny/labeler      order them best to worst: a reward model in people's place
    python label.py rank --labeler ann                   order them yourself, at the terminal, under any name
    python label.py rank --labeler vader                 ... or by VADER's rules
    python label.py rank --labeler http://localhost:8080/v1 --model NAME     ... or by a language model: RLAIF
    python label.py page                                 a page to rank in, for a browser or a phone
    python label.py merge FILE FILE ...                  put the answers of several labelers together
    python label.py report FILE FILE ...                 how far labelers, and reward models, agree
    python label.py sample --help, ...                   the flags of a step

People disagree at times, so the stand-in does too. Sorting score + temperature * Gumbel noise draws a ranking from the
Plackett-Luce model, whose pairs are Bradley-Terry: P(i above j) = sigmoid((score_i - score_j) / temperature). The data
come with people's temperature in rating units; a unit is std(scores) / std(mean ratings) on held-out human sentences.
Not a regression: its slope shrinks with the labeler's errors, and so would count them as people's disagreement. Noisy
rankings now differ as people's do, around the labeler's own opinion; how good that opinion is, reward.py measures.

Papers: Luce 1959, Plackett 1975 (rankings); Stiennon et al. 2020; Ouyang et al. 2022 (K responses per prompt).
What an answer and a ranking are: answers.py. People: person.py. Machines other than reward models: rlaif.py.
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

from agreement import ReportConfig, report
from answers import MergeConfig, how_to_train, merge, ranking_of, read_samples, shuffled
from common import check, check_positive, generator, run, set_up
from data import encode_prompt, load_tokenizer, read_jsonl, write_jsonl
from model import load_model, prompt_room, score_many
from reward import encode_rankings
from page import PageConfig, page
from people import read_summary
from person import NAME, rank_by_person
from runs import Stage
from sampling import sample_many
from terminal import visible, words_for


@dataclass
class SampleConfig:
    out: str = "out/tiny/samples"  # folder for samples.jsonl
    model: str = "out/tiny/sft"    # language model that responds
    prompts: str = "data/reviews/prompts_label.jsonl"  # {"prompt"}
    prompts_limit: int = 0         # only the first so many prompts; 0: all
    K: int = 4                     # responses per prompt
    response_tokens: int = 32      # longest response
    temperature: float = 0.7       # of the softmax that tokens are drawn from
    keep_cut: bool = False         # keep responses that did not reach end of text, too
    restart: bool = False          # begin again where --out holds another run, instead of refusing
    seed: int = 1                  # of the draws
    device: str = "auto"           # auto, cpu, cuda, mps
    dtype: str = "auto"            # auto, float32, bfloat16 (autocast; the weights stay float32)


@dataclass
class RankConfig:
    labeler: str = "out/tiny/labeler"  # folder of a reward model, a person's name, vader, or a server's URL
    samples: str = "out/tiny/samples/samples.jsonl"  # {"id", "prompt", "responses"}
    limit: int = 0                     # only the first so many samples; 0: all
    out: str = ""                      # folder for rankings.jsonl; empty: out/tiny/label, label-NAME, -vader or -ai
    noise: float = 1.0                 # a reward model's noise, as a multiple of people's disagreement; 0: none
    flip: float = 0.0                  # share of a reward model's rankings that are turned upside down: a bad labeler
    calibrate: str = "data/reviews/rankings_test.jsonl"  # human ratings for the noise, with summary.json beside it
    model: str = ""                    # a server: the name under which it knows the model
    rubric: str = "rubrics/mood.txt"   # a server: file with what makes a response better
    max_calls: int = 1000              # a server: stop after so many calls; the same command goes on
    parallel: int = 4                  # a server: calls at the same time
    timeout: float = 60.0              # a server: seconds without an answer until a call is tried again
    dry_run: bool = False              # a server: print the first question and the number of calls, and call nothing
    pairs: str = "data/reviews/pairs_test.jsonl"  # a server, vader: people's comparisons to agree with; empty: none
    pairs_count: int = 200             # a server, vader: how many of them; 0: all
    restart: bool = False              # begin again where --out holds another run, instead of refusing
    seed: int = 1                      # of the noise, and of the choice of --pairs
    device: str = "auto"               # auto, cpu, cuda, mps
    dtype: str = "auto"                # auto, float32, bfloat16 (autocast; the weights stay float32)


PRESETS = {"tiny": {},  # of sample; the smoke model has hardly met an end of text
           "smoke": {"prompts_limit": 24, "response_tokens": 16, "keep_cut": True},
           "gpt2": {"response_tokens": 24}}


# ---- sample --------------------------------------------------------------------------------------------------------


def draw_responses(model, enc, prompts, cfg, autocast):
    """For each prompt (text) up to K different response texts; and a Counter of what became of the draws.

    reward.py reads end of text behind each response, which would be a lie behind a cut one: it is drawn again, in four
    rounds at most, like one that is empty, no UTF-8 or the same as another.
    """
    room = prompt_room(model.config, cfg.response_tokens)
    random = torch.Generator(next(model.parameters()).device).manual_seed(cfg.seed)
    kept, counts = [[] for _ in prompts], Counter()
    for _ in range(4):
        missing = [i for i, texts in enumerate(kept) for _ in range(cfg.K - len(texts))]
        with autocast():
            drawn = sample_many(model, [encode_prompt(enc, prompts[i], room) for i in missing], cfg.response_tokens,
                                enc.eot_token, temperature=cfg.temperature, random=random)
        for i, ids in zip(missing, drawn):
            ended = ids[-1] == enc.eot_token
            text = enc.decode(ids[:-1] if ended else ids)
            fate = ("cut before end of text" if not (ended or cfg.keep_cut) else "empty" if not text.strip() else
                    "no UTF-8" if re.search("[\0\ufffd]", text) else "repeated" if text in kept[i] else "kept")
            counts[fate] += 1
            if fate == "kept":
                kept[i].append(text)
    return kept, counts


def sample_id(prompt, responses):
    """A short name that depends on the texts, whatever their order."""
    return hashlib.sha256(json.dumps([prompt, sorted(responses)]).encode()).hexdigest()[:12]


def sample(cfg):
    check_positive(cfg, "response_tokens", "temperature")
    check(cfg.K > 1 and cfg.prompts_limit >= 0, "--K must be 2 or more, and --prompts-limit 0 (all) or more")
    stage = Stage(cfg, "model", "prompts")
    prompts = list(dict.fromkeys(row["prompt"] for row in read_jsonl(cfg.prompts, {"prompt": str})))
    prompts = prompts[:cfg.prompts_limit or len(prompts)]
    device, autocast = set_up(cfg)
    model, enc = load_model(cfg.model, device), load_tokenizer(cfg.model)
    prompt_room(model.config, cfg.response_tokens)
    stage.open()
    kept, counts = draw_responses(model, enc, prompts, cfg, autocast)
    print(f"{counts.total():,} draws: " + ", ".join(f"{n:,} {fate}" for fate, n in counts.most_common()))
    # Shuffled, because of different texts the likelier ones tend to be drawn first.
    rows = [{"id": sample_id(prompt, texts), "prompt": prompt, "responses": shuffled(texts, cfg.seed, i)}
            for i, (prompt, texts) in enumerate(zip(prompts, kept)) if len(texts) > 1]
    check(rows, "no prompt has two different responses (larger --response-tokens or --keep-cut true may help)")
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
    """{held-out sentence: mean rating}, movie reviews only where domains are named, and the facts of summary.json."""
    mean_of = {}
    for row in read_jsonl(path, {"prompt": str, "responses": list}):
        means = row.get("means")
        check(isinstance(means, list) and len(means) == len(row["responses"])
              and all(isinstance(mean, (int, float)) and abs(mean) < 1e9 for mean in means),
              f"{path}: means: expected one number per response (or rank with --noise 0)")
        if row.get("domain", "movie") == "movie":  # the temperature is that of raters of movie reviews
            mean_of.update(zip((row["prompt"] + text for text in row["responses"]), means))
    check(len(set(mean_of.values())) > 1, f"{path}: means: no two different ratings of movies (or rank with --noise 0)")
    facts = read_summary(summary := Path(path).parent / "summary.json")
    check(facts["temperature"], f"{summary}: no temperature there (python data.py writes it; or use --noise 0)")
    return mean_of, facts


def rank_by_model(samples, cfg, folder):
    """Order each sample by the labeler's scores and calibrated noise, and write rankings.jsonl."""
    check(math.isfinite(cfg.noise) and cfg.noise >= 0, f"--noise is {cfg.noise}: it must be 0 or more")
    check(0 <= cfg.flip <= 1, f"--flip is {cfg.flip}: it must be from 0 to 1")
    check(Path(cfg.labeler).is_dir(), f"{cfg.labeler}: no checkpoint here, and no folder (a server's address "
          "begins with http)")
    stage = Stage(cfg, "labeler", "samples", *(["calibrate"] if cfg.noise else []), folder=folder)
    check(not (folder / "answers.jsonl").exists(), f"{folder} holds the work of another kind of labeler: change --out")
    mean_of, facts = read_ratings(cfg.calibrate) if cfg.noise else ({}, {})
    device, autocast = set_up(cfg)
    model, enc = load_model(cfg.labeler, device, kind="reward"), load_tokenizer(cfg.labeler)
    stage.open()
    human = [{"prompt": "", "responses": list(mean_of)}]
    with autocast():
        texts = [text for row in encode_rankings(enc, samples + human, model.config.block_size) for text in row]
        *scores, human = score_many(model, texts).split([len(row["responses"]) for row in samples + human])
    margins, temperature = {"these samples": torch.cat([torch.pdist(s[:, None], p=1) for s in scores])}, 0.0
    if mean_of:
        means = torch.tensor(list(mean_of.values()), dtype=torch.float)
        temperature = cfg.noise * calibrated_temperature(human, means, facts["temperature"])
        margins["held-out human sentences"] = torch.pdist(human[:2000, None], p=1)
        print(f"{len(means):,} held-out human sentences: std of ratings {means.std():.3f}, scores {human.std():.3f}; "
              f"temperature {facts['temperature']} in ratings, times noise {cfg.noise:g}, {temperature:.3f} in scores")
    shares = {name: order_kept(part, temperature, cfg.flip) for name, part in margins.items()}
    for name, (one, two) in shares.items():
        print(f"{name}: a noisy ranking keeps {one:.3f} of the pairs in order, two noisy ones agree on {two:.3f}")
    if mean_of and "random" in facts["agreement"].get("movie", {}):
        print(f"(of held-out human sentences, two people agree on {facts['agreement']['movie']['random'][1]:.3f})")
    rows = []
    for row, s in zip(samples, scores):  # the noise depends on the id, not on the place in the file
        random = generator(cfg.seed, zlib.crc32(row["id"].encode()))
        order = noisy_order(s, temperature, random)
        order = order[::-1] if torch.rand(1, generator=random) < cfg.flip else order
        rows.append({**row, "responses": [row["responses"][i] for i in order], "labeler": cfg.labeler})
    write_jsonl(folder / "rankings.jsonl", rows)
    stage.finish(rankings=len(rows), temperature=round(temperature, 4), order_kept=round(shares["these samples"][0], 4))


def rank(cfg):
    samples = read_samples(cfg.samples, cfg.limit)
    check(cfg.labeler, "--labeler is empty: a reward model's folder, your name, vader, or a server's URL")
    check(cfg.labeler.lower() != "vader" or cfg.labeler == "vader", f"--labeler {cfg.labeler}: write vader")
    if "://" in cfg.labeler or cfg.labeler == "vader":
        import rlaif  # only machines need it
        rlaif.rank(samples, cfg, Path(cfg.out or f"out/tiny/label-{'ai' if '://' in cfg.labeler else 'vader'}"))
    elif "/" in cfg.labeler or Path(cfg.labeler).is_dir():
        rank_by_model(samples, cfg, Path(cfg.out or "out/tiny/label"))
    else:
        check(re.fullmatch(NAME, cfg.labeler), f"--labeler {cfg.labeler}: no folder, and no name (letters and digits, "
              "then also dots, hyphens, underscores)")
        folder = Path(cfg.out or f"out/tiny/label-{cfg.labeler}")
        if any(map(ranking_of, rank_by_person(samples, cfg.labeler, folder))):
            print(f"to train:  {how_to_train(folder)}")


STEPS = {"sample": (sample, SampleConfig, PRESETS), "rank": (rank, RankConfig), "page": (page, PageConfig),
         "merge": (merge, MergeConfig), "report": (report, ReportConfig)}


if __name__ == "__main__":
    step = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if step in STEPS:
        sys.argv[:2] = [f"label.py {step}"]  # the flags that follow are the step's
        if step in ("merge", "report"):
            words_for("files", several=True)
        run(*STEPS[step])
    elif step in ("-h", "--help"):
        print(__doc__)
    else:
        print(f"{__doc__}\nerror: expected {', '.join(STEPS)}, found {step}", file=sys.stderr)
        sys.exit(2)
