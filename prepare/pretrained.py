"""GPT-2's weights as a base model, instead of training one: a checkpoint folder like that of any other stage.

    python -m prepare.pretrained --block-size 128 --out out/gpt2/base
    python -m prepare.pretrained --init FOLDER --out out/own/base         a GPT-2 on disk, in Hugging Face's format

Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*. The weights come from the Hugging Face hub,
at a pinned revision, the vocabulary through tiktoken. Nothing that is read can run code.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from common import Stage, UserError, check, run, say
from data import load_tokenizer
from model import GPT, GPTConfig
from prepare.download import download
from prepare.reviews import save_ranks

SIZES = {  # name: layers, heads, width, revision on the hub, sha256 of its model.safetensors
    "gpt2": (12, 12, 768, "607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": (24, 16, 1024, "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": (36, 20, 1280, "32b71b12589c2f8d625668d2335a01cac3249519",
                   "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": (48, 25, 1600, "15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a")}
# Within a block: our name, GPT-2's. Its linear layers are stored (in, out), ours (out, in).
LINEAR = {"attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
NORM = {"norm1": "ln_1", "norm2": "ln_2"}
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # their activation function: ours
POSSIBLE = {"model_type": ["gpt2"], "activation_function": list(GELU), "layer_norm_epsilon": [1e-5],  # default first
            "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False]}


@dataclass
class Config:
    out: str = "out/gpt2/base"  # folder for the checkpoint
    init: str = "gpt2"          # gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with weights on disk
    block_size: int = 0         # keep this many positions only: the longest sequence of all later stages; 0: all
    random: bool = False        # fresh weights of that size instead of a download: to try out a preset
    vocab: str = ""             # tokenizer file of weights on disk; empty: the one beside them, else GPT-2's
    overwrite: bool = False     # overwrite what another run left in --out, instead of refusing
    seed: int = 1               # of fresh weights


def names(n_layer):
    """(our name in the trunk, GPT-2's name, stored transposed?) of every weight."""
    yield "token_embedding.weight", "wte.weight", False
    yield "position_embedding.weight", "wpe.weight", False
    for part in ("weight", "bias"):
        yield f"norm.{part}", f"ln_f.{part}", False
        for i in range(n_layer):
            for ours, theirs in (LINEAR | NORM).items():
                yield f"blocks.{i}.{ours}.{part}", f"h.{i}.{theirs}.{part}", ours in LINEAR and part == "weight"


def read_folder(folder):
    """(content of config.json, {name: tensor}) of a folder in Hugging Face's format, weights in one or more files."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    check(files, f"{folder}: neither model.safetensors nor pytorch_model.bin is there")
    weights = {}
    for file in files:
        weights |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    return json.loads((folder / "config.json").read_text()), weights


def read_gpt2(settings, weights, vocab_size, block_size=0):
    """GPT in eval mode, in float32, from GPT-2's settings (those of config.json) and weights. Rows of the token
    embedding beyond vocab_size are dropped, and positions beyond block_size (0: none)."""
    for name, values in POSSIBLE.items():
        value = settings.get(name, values[0])
        check(value in values, f"{name} is {value!r}: model.py computes only {', '.join(map(str, values))}")
    weights = {name.removeprefix("transformer."): x for name, x in weights.items()
               if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # these are masks
    embedding, positions = weights["wte.weight"], len(weights["wpe.weight"])
    check(torch.equal(weights.pop("lm_head.weight", embedding), embedding), "lm_head: not tied to the token embedding")
    rows, width = embedding.shape
    check(rows >= vocab_size, f"the weights know {rows:,} tokens, the tokenizer {vocab_size:,} (--vocab names another)")
    if rows > vocab_size:
        say(f"{rows - vocab_size} rows of the token embedding are dropped: the tokenizer has no such tokens")
    check(block_size <= positions, f"--block-size {block_size}: the weights have {positions} positions")
    config = GPTConfig(vocab_size, block_size or positions, settings["n_layer"], settings["n_head"], width,
                       gelu=GELU[settings.get("activation_function", "gelu_new")])
    state = {}
    for ours, theirs, transposed in names(config.n_layer):
        x = weights.pop(theirs).float()
        state[ours] = x.T.contiguous() if transposed else x
    check(not weights, f"{', '.join(list(weights)[:3])}: no weights of a language model with this architecture")
    state["token_embedding.weight"] = F.pad(embedding[:vocab_size].float(), (0, 0, 0, config.padded_vocab - vocab_size))
    state["position_embedding.weight"] = state["position_embedding.weight"][:config.block_size].clone()
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        model = GPT(config)
    model.trunk.load_state_dict(state, assign=True)
    return model.eval()


def read_ranks(folder, vocab=""):
    """{token: rank} of the file vocab, or of vocab.tiktoken in the folder, or else of GPT-2, which tiktoken downloads
    once. UserError if the folder has another tokenizer than that."""
    if vocab or (folder / "vocab.tiktoken").is_file():
        return load_tokenizer(vocab or folder)._mergeable_ranks
    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except OSError as error:
        raise UserError(f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}): set TIKTOKEN_CACHE_DIR "
                        "to a folder in which tiktoken.get_encoding('gpt2') has run with a network") from None
    for name in ("vocab.json", "tokenizer.json"):
        if (folder / name).is_file():
            ids = json.loads((folder / name).read_text(encoding="utf-8"))
            ids = ids["model"]["vocab"] if name == "tokenizer.json" else ids
            letters = {token.decode(): rank for token, rank in ranks.items() if token.isalpha()}  # the same in both
            check(letters.items() <= ids.items(),
                  f"{folder}: its tokenizer is not GPT-2's (--vocab names a vocabulary in tiktoken's format)")
    return ranks


def main(cfg):
    named = cfg.init in SIZES
    stage = Stage(cfg, *([] if named else ["init"]), "vocab")
    check(named or not cfg.random, f"--random needs a size: --init {', '.join(SIZES)}")
    ranks = read_ranks(Path(cfg.init), cfg.vocab)
    n_layer, n_head, width, revision, sha256 = SIZES.get(cfg.init, [0] * 5)
    if cfg.random:
        torch.manual_seed(cfg.seed)
        model = GPT(GPTConfig(len(ranks) + 1, cfg.block_size or 1024, n_layer, n_head, width, gelu="tanh"))
    elif named:
        file = download(f"openai-community/{cfg.init}/resolve/{revision}/model.safetensors",
                        f"data/gpt2/{cfg.init}.safetensors", sha256)
        model = read_gpt2({"n_layer": n_layer, "n_head": n_head}, load_file(file), len(ranks) + 1, cfg.block_size)
    else:
        model = read_gpt2(*read_folder(Path(cfg.init)), len(ranks) + 1, cfg.block_size)
    stage.open()
    save_ranks(dict(sorted(ranks.items(), key=lambda item: item[1])), stage.folder / "vocab.tiktoken")
    stage.save(model, stage.folder / "vocab.tiktoken")
    stage.finish(parameters=sum(p.numel() for p in model.parameters()), block_size=model.config.block_size)


if __name__ == "__main__":
    run(main, Config)
