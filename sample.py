"""Talk to any checkpoint.

    python sample.py out/tiny/ppo                                  type prompts, one per line
    python sample.py out/tiny/ppo "The film is" --count 5          one prompt, five samples
    python sample.py out/tiny/sft --reward out/tiny/reward         with scores, best first (best-of-n)
    head prompts.txt | python sample.py out/tiny/base              a prompt per line from standard input
    python sample.py out/smollm2/base --chat                       talk turn by turn, in the model's chat format
    python sample.py out/chat/sft --chat --compare out/chat/ppo    several models, each its own dialogue
"""
import re
import sys
from dataclasses import dataclass

import torch

from common import check, run, set_up, visible
from data import check_same_vocab, encode_prompt, load_tokenizer, prompt_limit
from model import load_model
from reward import score_many
from sampling import sample_many

@dataclass
class Config:
    model: str = ""            # checkpoint folder of a language model
    compare: str = ""          # more of them, with the same vocabulary: folder,folder
    prompt: str = ""           # the text to continue; empty: read prompts from standard input, one per line
    chat: bool = False         # each line is a user's turn, answered by one sample, and the dialogue goes on
    reward: str = ""           # reward model that scores the samples, best first
    count: int = 3             # samples per prompt
    response_tokens: int = 0   # longest sample; 0: 32 tokens; with --chat 200, or half of the block size
    temperature: float = 0.7   # divides the logits; 0: always the likeliest token
    top_k: int = 0             # sample from the k likeliest tokens only; 0: all
    top_p: float = 1.0         # sample from the likeliest tokens that reach this probability
    seed: int = 1              # the same seed, the same samples
    device: str = "auto"       # auto, cpu, cuda, mps
    dtype: str = "auto"        # auto, float32, bfloat16 (autocast)

def likeliest(probs, top_k, top_p):
    """probs (B, V) of the k likeliest tokens (0: all), or of the likeliest that reach share p, and 0 of the others."""
    if 0 < top_k < probs.size(-1):
        probs = probs.masked_fill(probs < probs.topk(top_k).values[:, -1:], 0)
    ordered, index = (probs / probs.sum(-1, keepdim=True)).sort(descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p  # the likelier tokens alone reach the share
    return probs.masked_fill(beyond.scatter(1, index, beyond), 0) if top_p < 1 else probs

@torch.no_grad()
def respond(text, cfg, policy, reward, enc, autocast, how):
    """Print cfg.count responses to one prompt; with a reward model the best comes first."""
    if text.endswith(" "):
        print("the prompt ends in a space: does that belong to the response?", file=sys.stderr)
    block_size = min(model.config.block_size for model in (policy, reward) if model)
    prompt = encode_prompt(enc, text, prompt_limit(block_size, cfg.response_tokens))
    with autocast():
        responses = sample_many(policy, [prompt] * cfg.count, cfg.response_tokens, enc.end, **how)
        scores = score_many(reward, [prompt + ids for ids in responses]).tolist() if reward else [None] * cfg.count
    for score, ids in sorted(zip(scores, responses), key=lambda pair: -(pair[0] or 0)):
        ended = ids[-1] == enc.end
        shown = visible(text + enc.decode(ids[:-1] if ended else ids)) + ("" if ended else " ...")
        print(shown if score is None else f"{score:6.2f}  {shown}", flush=True)

@torch.no_grad()
def answer(turns, cfg, policy, enc, autocast, how):
    """Print a response to a dialogue and add it to its turns."""
    prompt = encode_prompt(enc, turns, prompt_limit(policy.config.block_size, cfg.response_tokens))
    with autocast():
        ids, = sample_many(policy, [prompt], cfg.response_tokens, enc.end, **how)
    turns.append({"role": "assistant", "content": enc.decode([token for token in ids if token != enc.end]).strip()})
    print(visible(turns[-1]["content"]), flush=True)

def main(cfg):
    check(cfg.model, "name a checkpoint folder, such as: python sample.py out/tiny/ppo")
    check(not (cfg.chat and cfg.reward), "--chat gives one answer: --reward has nothing to choose from")
    check(0 < cfg.top_p <= 1, f"--top-p is {cfg.top_p}: it must be above 0 and at most 1")
    device, autocast = set_up(cfg)
    policies = {folder: load_model(folder, device) for folder in [cfg.model, *filter(None, cfg.compare.split(","))]}
    enc, block_size = load_tokenizer(cfg.model, cfg.chat), policies[cfg.model].config.block_size
    cfg.response_tokens = cfg.response_tokens or (min(200, block_size // 2) if cfg.chat else 32)
    reward = load_model(cfg.reward, device, kind="reward") if cfg.reward else None
    check_same_vocab(*policies, cfg.reward or cfg.model)
    how = {folder: {"temperature": cfg.temperature, "random": torch.Generator(device).manual_seed(cfg.seed),
                    "only": lambda probs: likeliest(probs, cfg.top_k, cfg.top_p)} for folder in policies}
    dialogues = {folder: [] for folder in policies}
    if sys.stdin.isatty() and not cfg.prompt:
        print("prompt, then Enter; an empty prompt starts from nothing; Ctrl-D ends")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # to notice bytes that are no UTF-8
    for line in [cfg.prompt] if cfg.prompt else sys.stdin:
        line = line.lstrip("\ufeff").rstrip("\r\n")
        check(not re.search("[\0\ud800-\udfff]", line), "the prompt is not text in UTF-8")
        for folder, policy in policies.items():
            print(f"{folder}:\n" * bool(cfg.compare), end="")
            if cfg.chat:
                dialogues[folder].append({"role": "user", "content": line.strip()})
                answer(dialogues[folder], cfg, policy, enc, autocast, how[folder])
            else:
                respond(line, cfg, policy, reward, enc, autocast, how[folder])
        print()

if __name__ == "__main__":
    run(main, Config, words=("model", "prompt"))
