"""One page of samples along KL: what a policy without a KL penalty writes on its way out.

    python ppo.py --preset smollm --sft out/smollm/sft --reward out/smollm/reward --kl-coef 0 --kl-horizon 0 \\
        --kl-ceiling 0 --lr 2e-4 --iterations 16 --snapshots 8 --out out/smollm/free
    python -m study.along_kl out/smollm            writes out/smollm/free/along_kl.md and along_kl.json

Of the run's snapshots those with the KL closest to 3, 6, 12 and 25 nats, and the last; the SFT model is KL 0. The
samples are of the first prompts of the evaluation file, not chosen. Over-optimisation: Gao et al. 2022.
"""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import check, progress, run, set_up, write_atomic, write_json
from data import encode_prompt, load_tokenizer, prompt_limit, read_jsonl
from evaluate import respond, unique_bigrams, wins_over
from model import load_model
from study.markdown import escape, table
from study.opinions import perplexities

TARGETS = (3, 6, 12, 25)  # nats

@dataclass
class Config:
    folder: str = "out/smollm"  # a run of train_all.sh
    policy: str = "free"        # folder in it of a PPO run with snapshots
    prompts: str = "data/reviews/prompts_eval.jsonl"  # held-out prompts
    count: int = 128            # prompts to measure each snapshot with
    shown: int = 12             # prompts whose responses are shown: the first of the file
    response_tokens: int = 28   # longest response
    temperature: float = 0.7    # of the samples
    seed: int = 1               # of the samples
    device: str = "auto"        # auto, cpu, cuda, mps
    dtype: str = "auto"         # auto, float32, bfloat16 (autocast)

def closest(points, targets=TARGETS):
    """Of points with a KL, in order of training: the first (the SFT model), the closest to each target that the run
    reaches, and the last."""
    kls = [point["kl"] for point in points]
    near = [min(range(len(kls)), key=lambda i: abs(kls[i] - target)) for target in targets if target <= max(kls)]
    return [points[i] for i in sorted({0, *near, len(points) - 1})]

def main(cfg):
    device, autocast = set_up(cfg)
    folder, enc = Path(cfg.folder), load_tokenizer(f"{cfg.folder}/sft")
    ref = load_model(folder / "sft", device)
    scorers = {name: load_model(folder / place, device, "reward") for name, place in (
        ("proxy", "reward"), ("labeler", "labeler"), ("judge", "judge")) if (folder / place).is_dir()}
    check("judge" in scorers and (folder / "base").is_dir(), f"{folder}: no judge, or no base model")
    limit = prompt_limit(min(model.config.block_size for model in (ref, *scorers.values())), cfg.response_tokens)
    texts = [row["prompt"] for row in read_jsonl(cfg.prompts, {"prompt": str})][:cfg.count]
    prompts = [encode_prompt(enc, text, limit, Counter()) for text in texts]
    paths = sorted(path.parent for path in (folder / cfg.policy).glob("snapshots/*/model.pt"))
    check(paths, f"{folder / cfg.policy}: no snapshots")

    points, base = [], None
    for path in progress([folder / "sft", *paths], "snapshots"):
        model = ref if base is None else load_model(path, device)
        measured = respond(model, ref, scorers, prompts, enc, cfg, autocast)
        base = base or measured
        points.append({"iteration": 0 if measured is base else int(path.name), "kl": measured["kl"].mean().item(),
                       "win rate": wins_over(measured, base).mean().item(),
                       **{name: scores.mean().item() for name, scores in measured["scores"].items()},
                       "length": measured["length"].mean().item(),
                       "unique bigrams": unique_bigrams(measured["responses"]), "texts": measured["texts"]})
    rows = [{"prompt": text, "responses": [point["texts"][i] for point in points]} for i, text in enumerate(texts)]
    for point, perplexity in zip(points, perplexities(folder / "base", rows, device, autocast).tolist()):
        point["perplexity under the base model"] = perplexity
    write_json(folder / cfg.policy / "along_kl.json", [
        {name: round(x, 4) for name, x in point.items() if name != "texts"} for point in points])

    chosen = closest(points)
    names = [name for name in points[0] if name not in ("iteration", "kl", "texts")]
    columns = ["", *(f"KL {point['kl']:.1f}" for point in chosen)]
    numbers = [[name, *(f"{point[name]:.2f}" for point in chosen)] for name in ["iteration", *names]]
    samples = [[escape(text), *(escape(point["texts"][i]) for point in chosen)]
               for i, text in enumerate(texts[:cfg.shown])]
    page = "\n\n".join([
        "# Samples along KL", f"The run `{cfg.policy}` as it leaves the SFT model (first column). {len(prompts)} "
        f"held-out prompts, temperature {cfg.temperature}, nats per response. Win rate and `judge` are the independent "
        "judge's, `proxy` is what the run maximises.", table(columns, numbers),
        f"The responses to the first {cfg.shown} prompts of the evaluation file:",
        table(["prompt", *columns[1:]], samples)])
    write_atomic(folder / cfg.policy / "along_kl.md", page + "\n")
    print(folder / cfg.policy / "along_kl.md")

if __name__ == "__main__":
    run(main, Config, words=("folder",))
