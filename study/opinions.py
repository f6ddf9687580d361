"""What outsiders say of a finished run's responses:   python -m study.opinions out/smollm --judges out/tiny/judge

The judge of train_all.sh shares architecture and kind of data with the reward model. These share less: VADER's rules
(if `pip install vaderSentiment==3.3.2`), which count words of mood; judges of other runs, which read the text with
their own tokenizer; and the untouched base model, under which gibberish has a high perplexity and repetition a low one.
Reads evaluate/samples.jsonl; writes evaluate/opinions.json and prints it as a table.
"""
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from common import check, generator, run, set_up, write_json
from data import encode_texts, load_tokenizer, read_rows
from evaluate import mean_interval
from model import load_model, row_logprobs
from reward import encode_rankings, score_many
from study.markdown import table

@dataclass
class Config:
    folder: str = "out/smollm"  # a run of train_all.sh
    judges: str = ""            # reward models of other runs: folder,folder
    seed: int = 1               # of the resamples behind the intervals
    device: str = "auto"        # auto, cpu, cuda, mps
    dtype: str = "auto"         # auto, float32, bfloat16 (autocast)

def vader(rows):
    """Compound scores, -1 to 1, of whole texts: (policies, prompts)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    analyzer = SentimentIntensityAnalyzer()
    return torch.tensor([[analyzer.polarity_scores(row["prompt"] + response)["compound"]
                          for response in row["responses"]] for row in rows], dtype=torch.float).T

def judged(folder, rows, device, autocast):
    """Scores (policies, prompts) by a reward model, in the tokens of its own vocabulary."""
    model, enc = load_model(folder, device, "reward"), load_tokenizer(folder)
    encoded = encode_rankings(enc, rows, model.config.block_size, Counter())
    with torch.no_grad(), autocast():
        return score_many(model, [text for texts in encoded for text in texts]).view(len(rows), -1).T

def perplexities(folder, rows, device, autocast):
    """Perplexity per token of each policy's responses, without EOS, under a language model: (policies,)."""
    model, enc = load_model(folder, device), load_tokenizer(folder)
    nats, tokens = torch.zeros(2, len(rows[0]["responses"]), dtype=torch.double)
    for row in rows:
        prompt, responses = encode_texts(enc, row["prompt"], row["responses"], model.config.block_size, Counter())
        responses = [[token for token in ids if token != enc.end] for ids in responses]
        with torch.no_grad():
            nats -= row_logprobs(model, [(prompt + ids, len(prompt)) for ids in responses], enc.end, device,
                                 autocast).double().cpu()
        tokens += torch.tensor([len(ids) for ids in responses])
    return (nats / tokens).exp()

def main(cfg):
    device, autocast = set_up(cfg)
    folder = Path(cfg.folder)
    samples = read_rows(folder / "evaluate/samples.jsonl", dict)
    names = [name for name in samples[0] if name not in ("prompt", "judge")]
    samples = [row for row in samples if row.keys() >= {*names}]  # best-of-n may have fewer prompts
    check("sft" in names, f"{folder}/evaluate/samples.jsonl: no responses of the SFT model")
    rows = [{"prompt": row["prompt"], "responses": [row[name] for name in names]} for row in samples]
    found = {name: {"prompts": len(rows)} for name in names}
    check((folder / "base/model.pt").is_file(), f"{folder}/base: no base model")
    scores = {"/".join(Path(path).parts[-2:]): judged(path, rows, device, autocast)
              for path in cfg.judges.split(",") if path}
    try:
        scores["VADER"] = vader(rows)
    except ImportError:
        print("VADER's rules are not installed (pip install vaderSentiment==3.3.2): left out")
    for scorer, by_policy in scores.items():
        for name, mine in zip(names, by_policy):
            wins = 0.5 + 0.5 * torch.sign(mine - by_policy[names.index("sft")])
            rate, interval = mean_interval(wins, 2000, generator(cfg.seed))
            found[name] |= {scorer: round(mine.mean().item(), 3), f"win rate, {scorer}": rate,
                            f"win rate, {scorer}, interval": interval}
    for name, perplexity in zip(names, perplexities(folder / "base", rows, device, autocast)):
        found[name]["perplexity under the base model"] = round(perplexity.item(), 2)
    write_json(folder / "evaluate/opinions.json", found)
    titles = [title for title in found["sft"] if not title.endswith("interval")]
    print(table(["policy", *titles], [[name, *(str(row[title]) for title in titles)] for name, row in found.items()]))
    check(math.isfinite(sum(row["perplexity under the base model"] for row in found.values())), "not finite", 1)

if __name__ == "__main__":
    run(main, Config, words=("folder",))
