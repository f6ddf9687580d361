"""GPT-2's weights as a base model, instead of training one: a checkpoint folder like that of any other stage.

    python gpt2.py --init gpt2 --block-size 128 --out out/gpt2/base
    python gpt2.py --init FOLDER --out out/own/base         a GPT-2 in Hugging Face's format that is on disk already

Radford et al. 2019, *Language Models are Unsupervised Multitask Learners*. The weights come from the Hugging Face hub,
at a pinned revision and sha256, into the cache that its own libraries use: a copy that is there already is used. The
vocabulary comes through tiktoken. Nothing that is read can run code: safetensors, or torch.load(weights_only=True).
"""
import json
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import tiktoken
import torch
import torch.nn.functional as F

from common import UserError, check, run
from data import load_tokenizer, save_ranks
from download import download, hub, verified
from model import GPT, GPTConfig
from runs import Stage

# name: layers, heads, width, revision on the hub, sha256 of its model.safetensors
SIZES = {
    "gpt2": (12, 12, 768, "607a30d783dfa663caf39e06633721c8d4cfcd7e",
             "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"),
    "gpt2-medium": (24, 16, 1024, "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
                    "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"),
    "gpt2-large": (36, 20, 1280, "32b71b12589c2f8d625668d2335a01cac3249519",
                   "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"),
    "gpt2-xl": (48, 25, 1600, "15ea56dee5df4983c59b2538573817e1667135e2",
                "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"),
}
# Within a block: our name, GPT-2's. Its linear layers are stored (in, out), ours (out, in).
LINEAR = {"attention.qkv": "attn.c_attn", "attention.proj": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
NORM = {"norm1": "ln_1", "norm2": "ln_2"}
# What their configuration may say, and would be computed in another way than here.
EXPECTED = {"layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False}
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # their activation function: ours


@dataclass
class Config:
    out: str = "out/gpt2/base"  # folder for the checkpoint
    init: str = "gpt2"          # gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or file with weights on disk
    block_size: int = 0         # keep this many positions only: the longest sequence of all later stages; 0: all 1,024
    random: bool = False        # fresh weights of that size instead of a download: to try out a preset
    vocab: str = ""             # tokenizer file of weights on disk; empty: the one beside them, else GPT-2's
    restart: bool = False       # begin again where --out holds another run, instead of refusing
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


def fetch(name):
    """Path of the verified model.safetensors of one of SIZES, in the cache of the Hugging Face libraries."""
    *_, revision, sha256 = SIZES[name]
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or home) / "hub").expanduser()
    for folder in (f"models--openai-community--{name}", f"models--{name}"):
        # A snapshot's file is a link to a blob with its sha256 as name; where links are not allowed, the file itself.
        for path in (cache / folder / "blobs" / sha256, cache / folder / "snapshots" / revision / "model.safetensors"):
            if path.is_file():
                return verified(path, sha256)
    folder = cache / f"models--openai-community--{name}"
    blob, link = folder / "blobs" / sha256, folder / "snapshots" / revision / "model.safetensors"
    download(hub(f"openai-community/{name}/resolve/{revision}/model.safetensors"), blob, sha256)
    try:  # a courtesy, so that the other libraries find it
        link.parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        link.symlink_to(Path("..", "..", "blobs", sha256))
        with open(folder / "refs" / "main", "x") as file:
            file.write(revision)
    except OSError:
        pass  # something is there already, or links are not allowed
    return blob


def read_weights(path):
    """{name: tensor} of a safetensors file, or of what torch.save wrote; UserError for anything else.

    Which of them is seen in the content, as a file in the cache is named by its sha256.
    """
    try:
        with open(path, "rb") as file:
            safe = file.read(9)[8:] == b"{"  # its header is JSON, behind 8 bytes that give the length
        weights = (safetensors.torch.load_file(path) if safe else
                   torch.load(path, map_location="cpu", weights_only=True))
        if not isinstance(weights, dict) or not all(torch.is_tensor(x) for x in weights.values()):
            raise ValueError
        return weights
    except Exception as error:  # damaged files and forbidden content: many types
        raise UserError(f"{path}: not a file of weights, or damaged ({type(error).__name__})") from None


def read_settings(path):
    """What the config.json beside the weights says, checked: a dict; empty if there is none."""
    path = path.parent / "config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError:
        settings = None
    check(isinstance(settings, dict), f"{path}: not JSON (is it a whole file?)")
    check(settings.get("model_type", "gpt2") == "gpt2",
          f"{path}: model_type is {settings.get('model_type')!r}: only gpt2 can be read")
    for name, value in EXPECTED.items():
        found = settings.get(name, value)
        check(found == value, f"{path}: {name} is {found!r}: only {value!r} can be computed here")
    activation = settings.setdefault("activation_function", "gelu_new")
    check(str(activation) in GELU, f"{path}: activation_function is {activation!r}: only {', '.join(GELU)} are known")
    return settings


def read_gpt2(where, block_size=0):
    """(GPTConfig, state_dict of the trunk in float32) of GPT-2's weights.

    where: a name of SIZES, a folder that holds model.safetensors or pytorch_model.bin, or such a file. What config.json
    beside it says is checked; without one it must be a size of GPT-2. UserError that names the file and what is wrong.
    """
    path = Path(fetch(where) if where in SIZES else where)
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        check(found, f"{path}: neither model.safetensors nor pytorch_model.bin is there (weights in several files? "
                     "save them with a larger max_shard_size)")
        path = found[0]
    check(path.exists(), f"{where}: neither {', '.join(SIZES)} nor a file or folder")
    settings = {} if where in SIZES else read_settings(path)
    weights = {name.removeprefix("transformer."): x for name, x in read_weights(path).items()}
    sizes = {name: tuple(x.shape) for name, x in weights.items()}
    check(len(sizes.get("wte.weight", ())) == 2 == len(sizes.get("wpe.weight", ())),
          f"{path}: wte.weight and wpe.weight, which every GPT-2 has, are not there")
    (V, C), positions = sizes["wte.weight"], sizes["wpe.weight"][0]
    n_layer = sum(name.endswith("ln_1.weight") for name in sizes)
    for name, found in {"vocab_size": V, "n_embd": C, "n_positions": positions, "n_layer": n_layer}.items():
        said = settings.get(name, found)
        check(said == found, f"{path}: {name} is {found} there, but {said!r} in the config.json beside it")
    heads = {(layers, width): heads for layers, heads, width, *_ in SIZES.values()}
    n_head = settings.get("n_head") or heads.get((n_layer, C))
    check(n_head, f"{path}: no config.json beside it that says n_head, and not a size of GPT-2")
    check(type(n_head) is int and n_head > 0 and C % n_head == 0, f"{path}: n_head is {n_head!r} for width {C}")
    block_size = block_size or positions
    check(0 < block_size <= positions, f"--block-size {block_size}: {path} has {positions} positions")
    config = GPTConfig(V, block_size, n_layer, n_head, C, gelu=GELU[settings.get("activation_function", "gelu_new")])
    head = weights.pop("lm_head.weight", weights["wte.weight"])
    check(torch.equal(head, weights["wte.weight"]), f"{path}: lm_head is not tied to the token embedding: not a GPT-2")
    state = {}
    for ours, theirs, transposed in names(n_layer):
        check(theirs in weights, f"{path}: {theirs} is missing")
        x = weights.pop(theirs)  # out of the way: the largest GPT-2 has 6 GB
        check(x.is_floating_point(), f"{path}: {theirs} holds {x.dtype}: only weights in floating point can be read")
        state[ours] = x.float().T.contiguous() if transposed else x.float()
    left = [name for name in weights if not name.endswith(("attn.bias", "attn.masked_bias"))]  # these are masks
    check(not left, f"{path}: {', '.join(left[:3])}: no weight of a language model with this architecture")
    state["token_embedding.weight"] = F.pad(state["token_embedding.weight"], (0, 0, 0, config.padded_vocab - V))
    state["position_embedding.weight"] = state["position_embedding.weight"][:block_size].clone()
    with torch.device("meta"):
        wrong = [name for name, x in GPT(config).trunk.state_dict().items() if x.shape != state[name].shape]
    check(not wrong, f"{path}: {', '.join(wrong[:3])}: not the shape that {n_layer} layers of width {C} have")
    return config, state


def gpt2_tokenizer():
    """GPT-2's tiktoken.Encoding, which is downloaded once."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its HTTP library raises
        raise UserError(f"GPT-2's vocabulary cannot be fetched ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a "
                        "folder that tiktoken filled on a machine with a network, by TIKTOKEN_CACHE_DIR=FOLDER "
                        "python -c 'import tiktoken; tiktoken.get_encoding(\"gpt2\")'") from None


def byte_letters():
    """GPT-2's letter for each byte (Radford et al. 2019): printable bytes stand for themselves, the others for letters
    from 256 on, so that a token is a string without white space."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def has_gpt2_words(folder):
    """Whether the tokenizer in a folder, if there is one, has GPT-2's vocabulary: the same ids for the same tokens."""
    letters = byte_letters()
    try:
        if (folder / "vocab.json").is_file():
            words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        elif (folder / "tokenizer.json").is_file():
            words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        else:
            return True
        return all(words["".join(letters[byte] for byte in token)] == rank
                   for token, rank in gpt2_tokenizer()._mergeable_ranks.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def main(cfg):
    stage = Stage(cfg, "init", "vocab")
    folder = Path(cfg.init) if Path(cfg.init).is_dir() else Path(cfg.init).parent
    vocab = cfg.vocab
    if cfg.init not in SIZES and not vocab:
        vocab = str(folder / "vocab.tiktoken") if (folder / "vocab.tiktoken").is_file() else ""
        check(vocab or has_gpt2_words(folder), f"{folder}: its tokenizer is not GPT-2's (--vocab names a vocabulary in "
                                               "tiktoken's format)")
    ranks = load_tokenizer(vocab)._mergeable_ranks if vocab else gpt2_tokenizer()._mergeable_ranks
    if cfg.random:
        check(cfg.init in SIZES, f"--random true needs --init {', '.join(SIZES)}, found {cfg.init}")
        n_layer, n_head, width, *_ = SIZES[cfg.init]
        torch.manual_seed(cfg.seed)
        model = GPT(GPTConfig(50257, cfg.block_size or 1024, n_layer, n_head, width, gelu="tanh"))
    else:
        model = GPT.from_gpt2(cfg.init, cfg.block_size)
    check(len(ranks) + 1 == model.config.vocab_size, f"--init {cfg.init} has a vocabulary of {model.config.vocab_size} "
          f"tokens, {vocab or 'that of GPT-2'} of {len(ranks) + 1} (--vocab names another)")
    check(cfg.init in SIZES or stage.folder.resolve() != folder.resolve(), f"--out {cfg.out}: the folder of --init")
    stage.open()
    save_ranks(dict(sorted(ranks.items(), key=lambda item: item[1])), stage.folder / "vocab.tiktoken")
    stage.save(model, stage.folder / "vocab.tiktoken")
    stage.finish(parameters=sum(p.numel() for p in model.parameters()), block_size=model.config.block_size)


if __name__ == "__main__":
    run(main, Config)
