"""GPT-2's weights in, against transformers; the checkpoint that gpt2.py writes; weights that are none."""
import dataclasses
import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import tiktoken
import torch

import data
import gpt2
from common import UserError
from conftest import SENTENCES
from model import GPT, load_model
from sampling import sample

SHAPES = [pytest.param({"vocab_size": 50, "n_positions": 20, "n_embd": 8, "n_layer": 1, "n_head": 1}, id="one head"),
          pytest.param({"vocab_size": 64, "n_positions": 24, "n_embd": 12, "n_layer": 3, "n_head": 3}, id="64 tokens"),
          pytest.param({"vocab_size": 131, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4,
                        "activation_function": "gelu"}, id="exact GELU"),
          pytest.param({"vocab_size": 70, "n_positions": 20, "n_embd": 8, "n_layer": 1, "n_head": 2,
                        "activation_function": "gelu_pytorch_tanh"}, id="GELU by another name")]


def their_model(folder, safe=True, **shape):
    """A random GPT2LMHeadModel with large weights, saved by transformers; as weights under torch.save if not safe."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(attn_implementation="eager", **shape)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    model.save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return model


def padded(B, T, V):
    """Random tokens (B, T) with padding on the left, pad (B,), and what transformers wants to know about it."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (B, T), generator=random)
    pad = torch.arange(B) * 2  # none in the first row
    mask = (torch.arange(T) >= pad[:, None]).long()
    return tokens, pad, {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, shape, safe):
    """A weight in the wrong place or not transposed, the wrong GELU, an epsilon, positions under left padding."""
    theirs = their_model(tmp_path, safe, **shape)
    ours = GPT.from_gpt2(str(tmp_path))
    tokens, pad, how = padded(4, 16, shape["vocab_size"])
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=tolerance, rtol=0)
        real = how["attention_mask"].bool()
        torch.testing.assert_close(ours(tokens, pad)[real], theirs(tokens, **how).logits[real], atol=tolerance, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_greedy_sampling_is_that_of_transformers(tmp_path, shape):
    """A cache or a padded vocabulary that changes a token: ours with a cache, theirs without and with."""
    theirs = their_model(tmp_path, **shape)
    tokens, pad, how = padded(4, 10, shape["vocab_size"])
    ours, lengths, _ = sample(GPT.from_gpt2(tmp_path), tokens, pad, 8, end=0, temperature=0)
    for cached in (False, True):
        drawn = theirs.generate(tokens, attention_mask=how["attention_mask"], max_new_tokens=8, do_sample=False,
                                use_cache=cached, eos_token_id=0, pad_token_id=0)[:, 10:]
        for row, n, expected in zip(ours.tolist(), lengths.tolist(), drawn.tolist()):
            assert row[:n] == expected[:n]


def test_unused_rows_of_the_vocabulary_are_never_seen(tmp_path):
    """A padded vocabulary that adds logits, or gives the padding probability."""
    their_model(tmp_path, vocab_size=50, n_positions=20, n_embd=8, n_layer=1, n_head=1)
    model = GPT.from_gpt2(tmp_path)
    assert model.trunk.token_embedding.weight.shape == (64, 8) and not model.trunk.token_embedding.weight[50:].any()
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 50)
    model.trunk.token_embedding.weight.data[50:] = 1e6  # would win every softmax
    tokens = torch.randint(50, (64, 4), generator=torch.Generator().manual_seed(0))
    responses, *_ = sample(model, tokens, None, 8, end=0, random=torch.Generator().manual_seed(0))
    assert responses.max() < 50


@torch.no_grad()
def test_fewer_positions_change_no_logit(tmp_path):
    """A cut position table that is cut at the wrong end."""
    their_model(tmp_path, vocab_size=50, n_positions=20, n_embd=8, n_layer=1, n_head=1)
    tokens = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    short = GPT.from_gpt2(tmp_path, block_size=8)
    assert torch.equal(short(tokens), GPT.from_gpt2(tmp_path)(tokens))
    with pytest.raises(UserError, match="9 tokens do not fit"):
        short(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(UserError, match="--block-size 21.* has 20 positions"):
        GPT.from_gpt2(tmp_path, block_size=21)


# ---- without transformers --------------------------------------------------------------------------------------------


def small_gpt2(folder, settings=None, **changes):
    """A folder with a GPT-2 of one layer under its own names; changes: other tensors (None: left out)."""
    weights = {"wte.weight": torch.randn(300, 8), "wpe.weight": torch.randn(16, 8), "ln_f.weight": torch.ones(8),
               "ln_f.bias": torch.zeros(8), "h.0.attn.bias": torch.ones(1, 1, 16, 16)}  # the last is a mask, no weight
    linear = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}
    for name, size in linear.items():
        weights |= {f"h.0.{name}.weight": torch.randn(size), f"h.0.{name}.bias": torch.zeros(size[1])}
    for name in ("ln_1", "ln_2"):
        weights |= {f"h.0.{name}.weight": torch.ones(8), f"h.0.{name}.bias": torch.zeros(8)}
    weights |= changes
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({name: x for name, x in weights.items() if x is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 2} | (settings or {})))
    return folder


@pytest.mark.parametrize("settings, changes, problem", [
    pytest.param({"model_type": "llama"}, {}, "model_type is 'llama'", id="another model"),
    pytest.param({"layer_norm_epsilon": 1e-6}, {}, "layer_norm_epsilon is 1e-06", id="epsilon"),
    pytest.param({"scale_attn_by_inverse_layer_idx": True}, {}, "scale_attn_by_inverse_layer", id="scaled by layer"),
    pytest.param({"activation_function": "relu"}, {}, "activation_function is 'relu'", id="ReLU"),
    pytest.param({"n_head": 3}, {}, "n_head is 3 for width 8", id="heads"),
    pytest.param({"n_head": None}, {}, "n_head", id="no heads"),
    pytest.param({"n_head": True}, {}, "n_head is True", id="heads that are no number"),
    pytest.param({"scale_attn_weights": False}, {}, "scale_attn_weights is False", id="unscaled"),
    pytest.param({"add_cross_attention": True}, {}, "add_cross_attention", id="cross-attention"),
    pytest.param({"activation_function": ["gelu"]}, {}, "activation_function", id="list of activations"),
    pytest.param({"n_layer": 2}, {}, "n_layer is 1 there, but 2", id="fewer layers than config.json says"),
    pytest.param({}, {"score.weight": torch.randn(1, 8)}, "score.weight: no weight of a language", id="classifier"),
    pytest.param({}, {"ln_f.bias": torch.zeros(8, dtype=torch.int8)}, "torch.int8", id="integers"),
    pytest.param({}, {"h.0.mlp.c_fc.weight": torch.randn(8, 16), "h.0.mlp.c_fc.bias": torch.zeros(16),
                      "h.0.mlp.c_proj.weight": torch.randn(16, 8)}, "blocks.0.up.weight.*not the shape",
                 id="narrow MLP"),
    pytest.param({}, {"ln_f.bias": None}, "ln_f.bias is missing", id="a weight missing"),
    pytest.param({}, {"wte.weight": None}, "wte.weight and wpe.weight", id="no embedding"),
    pytest.param({}, {"lm_head.weight": torch.randn(300, 8)}, "lm_head is not tied", id="own head"),
])
def test_weights_that_would_compute_something_else_are_refused(tmp_path, settings, changes, problem):
    """A model that loads and computes something else than the one it was."""
    with pytest.raises(UserError, match=problem):
        GPT.from_gpt2(small_gpt2(tmp_path / "theirs", settings, **changes))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [
    pytest.param(b"", id="empty"), pytest.param(b"<!DOCTYPE html><html>", id="HTML"),
    pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", id="LFS pointer"),
    pytest.param(b"\xff" * 64, id="header of 2^64 bytes"), pytest.param(b"\x02" + b"\0" * 7 + b"{}", id="no tensor"),
])
def test_files_that_are_no_weights_are_named(tmp_path, name, content):
    """A traceback, or worse, for what a failed download leaves."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        GPT.from_gpt2(tmp_path)


def test_a_pickle_in_the_weights_is_not_run(tmp_path):
    """A pytorch_model.bin that runs code when it is loaded."""
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "run"), "w")
    torch.save({"wte.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: not a file of weights"):
        GPT.from_gpt2(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where, problem", [("nowhere", "neither gpt2"), (".", "neither model.safetensors nor")])
def test_nothing_there(tmp_path, monkeypatch, where, problem):
    """A misspelt size that is downloaded, or a traceback."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=problem):
        GPT.from_gpt2(where)


def test_the_cache_of_the_hub_is_used(tmp_path, monkeypatch):
    """A second download of what another program has downloaded; a cache entry that other programs cannot use."""
    content = (small_gpt2(tmp_path / "theirs") / "model.safetensors").read_bytes()
    requested = []

    def download(url, path, sha256):
        if not path.exists():
            requested.append(url)
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
        return path
    monkeypatch.setattr(gpt2, "download", download)
    monkeypatch.setattr(gpt2, "verified", lambda path, sha256: path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    first = gpt2.fetch("gpt2-medium")
    revision, sha256 = gpt2.SIZES["gpt2-medium"][3:]
    assert requested == [f"https://huggingface.co/openai-community/gpt2-medium/resolve/{revision}/model.safetensors"]
    folder = tmp_path / "hub" / "models--openai-community--gpt2-medium"
    assert first == folder / "blobs" / sha256
    assert (folder / "snapshots" / revision / "model.safetensors").resolve() == first.resolve()
    assert (folder / "refs" / "main").read_text() == revision
    folder.rename(tmp_path / "hub" / "models--gpt2-medium")  # under the older name too
    assert gpt2.fetch("gpt2-medium").exists() and len(requested) == 1
    # By its name, which is a hash, nobody can see what kind of file it is.
    monkeypatch.setitem(gpt2.SIZES, "gpt2-medium", (1, 2, 8, revision, sha256))
    theirs, ours = (GPT.from_gpt2(where).state_dict() for where in (tmp_path / "theirs", "gpt2-medium"))
    assert all(torch.equal(x, y) for x, y in zip(theirs.values(), ours.values(), strict=True))


@pytest.mark.parametrize("there", ["refs", "link", "folder"])
def test_what_is_in_the_cache_stays(tmp_path, monkeypatch, there):
    """A newer revision of another program that is no longer found; a traceback after a download of half a gigabyte."""
    content = (small_gpt2(tmp_path / "theirs") / "model.safetensors").read_bytes()
    revision, sha256 = gpt2.SIZES["gpt2"][3:]
    folder = tmp_path / "hub" / "models--openai-community--gpt2"
    link = folder / "snapshots" / revision / "model.safetensors"
    (folder / "refs").mkdir(parents=True)
    link.parent.mkdir(parents=True)
    if there == "refs":
        (folder / "refs" / "main").write_text("newer")
    elif there == "link":
        link.symlink_to("nowhere")
    else:
        link.mkdir()

    def download(url, path, sha256):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path
    monkeypatch.setattr(gpt2, "download", download)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert gpt2.fetch("gpt2") == folder / "blobs" / sha256
    assert there != "refs" or (folder / "refs" / "main").read_text() == "newer"


def test_the_home_of_the_cache(tmp_path, monkeypatch):
    """A folder with the name ~ in the place where the script is run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", "~/models")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(gpt2, "download", lambda url, path, sha256: path.parent.mkdir(parents=True))
    assert str(gpt2.fetch("gpt2")).startswith(str(tmp_path / "models" / "hub"))


def test_offline_says_what_to_put_where(tmp_path, monkeypatch):
    """An offline machine that is told about sockets."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"(?s){tmp_path}.*gpt2/resolve/.*{gpt2.SIZES['gpt2'][4]}"):
        GPT.from_gpt2("gpt2")

    def offline(name):
        raise ConnectionError("no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        gpt2.gpt2_tokenizer()


def test_a_base_checkpoint_from_weights_on_disk(tmp_path, checkpoints):
    """gpt2.py: a folder that later stages cannot load, another vocabulary, or positions that were not cut."""
    vocab = data.load_tokenizer(checkpoints.vocab)
    small_gpt2(tmp_path / "theirs", **{"wte.weight": torch.randn(vocab.n_vocab, 8)})
    cfg = gpt2.Config(init=str(tmp_path / "theirs"), block_size=12, vocab=str(checkpoints.vocab),
                      out=str(tmp_path / "base"))
    gpt2.main(cfg)
    model, enc = load_model(tmp_path / "base"), data.load_tokenizer(tmp_path / "base")
    assert (model.config.block_size, model.config.gelu, model.config.n_head) == (12, "tanh", 2)
    assert enc.encode_ordinary(SENTENCES[0]) == vocab.encode_ordinary(SENTENCES[0])
    tokens = torch.randint(vocab.n_vocab, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens), GPT.from_gpt2(tmp_path / "theirs", 12)(tokens))
    assert json.loads((tmp_path / "base" / "done.json").read_text())["block_size"] == 12
    with pytest.raises(UserError, match="the folder of --init"):
        gpt2.main(dataclasses.replace(cfg, out=str(tmp_path / "theirs")))
    small_gpt2(tmp_path / "theirs")
    with pytest.raises(UserError, match="holds another run: --init"):
        gpt2.main(cfg)
    with pytest.raises(UserError, match="vocabulary of 300 tokens.* of 270"):
        gpt2.main(dataclasses.replace(cfg, restart=True))


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_another_vocabulary_is_not_taken_for_gpt2s(tmp_path, monkeypatch, name):
    """A model with merges of its own that is trained on the ids of GPT-2's."""
    ranks = {bytes([i % 256, i // 256]): i for i in range(299)}
    monkeypatch.setattr(gpt2, "gpt2_tokenizer", lambda: SimpleNamespace(_mergeable_ranks=ranks))
    folder, letters = small_gpt2(tmp_path / "theirs"), gpt2.byte_letters()
    for shift in (0, 1):
        words = {"".join(letters[byte] for byte in token): (rank + shift) % 299 for token, rank in ranks.items()}
        (folder / name).write_text(json.dumps(words if name == "vocab.json" else {"model": {"vocab": words}}))
        if shift:
            with pytest.raises(UserError, match="its tokenizer is not GPT-2's"):
                gpt2.main(gpt2.Config(init=str(folder), out=str(tmp_path / "other")))
        else:
            gpt2.main(gpt2.Config(init=str(folder), out=str(tmp_path / "base")))


def test_fresh_weights_of_a_size(tmp_path, monkeypatch, checkpoints):
    """--random true that downloads, or has another architecture than the real one."""
    monkeypatch.setitem(gpt2.SIZES, "gpt2", (1, 2, 8, "", ""))
    ranks = {bytes([i % 256, i // 256]): i for i in range(50256)}
    monkeypatch.setattr(gpt2, "gpt2_tokenizer", lambda: SimpleNamespace(_mergeable_ranks=ranks))
    gpt2.main(gpt2.Config(random=True, block_size=4, out=str(tmp_path)))
    config = load_model(tmp_path).config
    assert (config.vocab_size, config.padded_vocab, config.gelu, config.block_size) == (50257, 50304, "tanh", 4)


def test_gpt2_pattern(tmp_path):
    """Text split as our own vocabulary splits it, under GPT-2's merges: other ids than GPT-2 was trained on."""
    try:
        theirs = tiktoken.get_encoding("gpt2")
    except Exception:
        pytest.skip("GPT-2's vocabulary is not on this machine and cannot be fetched")
    ranks = dict(sorted(gpt2.gpt2_tokenizer()._mergeable_ranks.items(), key=lambda item: item[1]))
    text = "It's 1234567 o'clock,  isn't IT?\n\n  Né 漢字 🙂\t'tis x'''s  \n"
    data.save_ranks(ranks, tmp_path / "vocab.tiktoken")
    enc = data.load_tokenizer(tmp_path)
    assert enc.encode_ordinary(text) == theirs.encode_ordinary(text)
    assert (enc.eot_token, enc.n_vocab) == (50256, 50257)
