"""Short runs of every training stage, for the tests of resuming: in them every item of the state matters."""
import hashlib
import importlib
import json
from pathlib import Path

import torch

from common import FREE, load, load_config, save_checkpoint
from data import write_jsonl
from model import GPT, GPTConfig, ScalarModel
from ppo import Config
from prepare.reviews import save_ranks

TIMES = {"seconds", "tokens_per_second", "rollout_tokens_per_second", "update_tokens_per_second", "peak_memory_mb",
         "peak_gpu_memory_mb"}
SENTENCES = ["the film was good and the plot was good", "a bad film with a bad plot", "the actor was funny, and sad"]
SCRIPT = {"base": "sft", "sft": "sft", "reward": "reward", "ppo": "ppo", "rloo": "ppo", "grpo": "ppo", "dpo": "dpo"}
STEPS = {"base": 9, "sft": 8, "reward": 8, "ppo": 6, "rloo": 6, "grpo": 6, "dpo": 8}
FLAGS = {  # dropout, a best loss in the middle, log lines of several steps, a KL coefficient that moves
    "base": {"train": "texts", "valid": "texts", "vocab": "vocab", "n_layer": 1, "n_head": 2, "width": 16,
             "block_size": 32, "pack": 16, "batch_size": 8, "lr": 1e-2, "epochs": 3, "dropout": 0.2, "evals": 3},
    "sft": {"model": "sft", "train": "demos", "valid": "other", "batch_size": 4, "epochs": 4, "lr": 0.2, "dropout": 0.2,
            "evals": 4},
    "reward": {"model": "sft", "sft": "sft", "train": "rankings", "test": "rankings", "prompts": "prompts", "pairs": "",
               "batch_size": 4, "epochs": 4, "lr": 1e-3, "dropout": 0.2, "log_every": 3, "samples": 8,
               "response_tokens": 6},
    "ppo": {"sft": "sft", "reward": "reward", "prompts": "prompts", "iterations": 6, "episodes": 4, "epochs": 2,
            "minibatches": 2, "microbatch": 3, "lr": 1e-3, "response_tokens": 6, "kl_horizon": 8.0, "kl_target": 0.01,
            "snapshots": 3, "missing_eos_score": "nan"},
    "dpo": {"model": "sft", "train": "rankings", "test": "rankings", "batch_size": 4, "epochs": 4, "lr": 1e-3,
            "log_every": 3}}
FLAGS |= {kind: {**FLAGS["ppo"], "advantages": kind, "group": 2} for kind in ("rloo", "grpo")}


def make_inputs(folder, ranks={bytes([byte]): byte for byte in range(256)}):
    """Everything that the stages read, in this folder: its path. ranks: {token bytes: rank}, the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    save_ranks(ranks, folder / "vocab.tiktoken")
    torch.manual_seed(0)
    for name, kind in (("sft", GPT), ("reward", ScalarModel)):
        model = kind(GPTConfig(len(ranks) + 1, block_size=32, n_layer=1, n_head=2, width=16, dropout=0.2))
        save_checkpoint(folder / name, model, Config(), folder / "vocab.tiktoken", inputs={})
    # Of the held-out text the demonstrations say nothing: its loss soon rises, and the best is not the last.
    words = 2 * ["good", "bad", "so", "sad"]
    rows = {"texts": [{"text": f"the plot was {word}, and the film too"} for word in words],
            "demos": [{"prompt": "the film", "completion": f" was {word}"} for word in words],
            "other": [{"prompt": "the plot", "completion": " z y x w"}] * 4,
            "prompts": [{"prompt": " ".join(x.split()[:n])} for x in SENTENCES for n in range(1, 5)],
            "rankings": [{"prompt": f"film {i}", "responses": [f" good {i}", " plain", " bad bad"][:2 + i % 2]}
                         for i in range(8)]}
    for name, content in rows.items():
        write_jsonl(folder / f"{name}.jsonl", content)
    return folder


def arguments(flags, inputs):
    """A command line of these flags; the name of a file or folder in inputs, without its ending, becomes its path."""
    there = {path.stem: path for path in inputs.iterdir()} | {"False": "false", "True": "true"}
    return [f"--{name.replace('_', '-')}={there.get(str(value), value)}" for name, value in flags.items()]


def command(stage, inputs, out, **changes):
    """(module, its command line) of a stage's run into the folder out; inputs: from make_inputs."""
    flags = {"device": "cpu", "dtype": "float32", "save_every": 1e9, "out": out, **FLAGS[stage], **changes}
    return importlib.import_module(SCRIPT[stage]), arguments(flags, inputs)


def run(*args, **changes):
    """A stage's run in this process; arguments as for command."""
    module, flags = command(*args, **changes)
    module.main(load_config(module.Config, module.PRESETS, flags))


def outcome(folder):
    """What a run left, times aside and flags that change no result: log lines, facts, and the digest of all weights."""
    folder = Path(folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines.append(json.loads((folder / "done.json").read_text()))
    left = {"lines": [{name: value for name, value in line.items() if name not in TIMES} for line in lines],
            "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))}
    for path in sorted(folder.rglob("model.pt")):
        facts = load(path)
        facts["stage"] = {name: value for name, value in facts["stage"].items() if name not in FREE.split()}
        weights = [name.encode() + x.numpy().tobytes() for name, x in facts.pop("weights").items()]
        left[str(path.relative_to(folder))] = repr(facts), hashlib.sha256(b"".join(weights)).hexdigest()
    return left
