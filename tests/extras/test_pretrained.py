"""GPT-2's weights in, against transformers; the checkpoint made of them; weights that would compute something else."""
import pytest
import tiktoken
import torch
from safetensors.torch import save_file

import data
from common import UserError
from model import load_model
from prepare.pretrained import Config, main, read_folder, read_gpt2
from sampling import sample

SHAPES = [{"vocab_size": 50, "n_embd": 8, "n_layer": 1, "n_head": 1},
          {"vocab_size": 64, "n_embd": 12, "n_layer": 3, "n_head": 3},
          {"vocab_size": 131, "n_embd": 32, "n_layer": 2, "n_head": 4, "activation_function": "gelu"}]


def their_model(folder, how="one file", **shape):
    """A random GPT2LMHeadModel with large weights, saved by transformers in one of several ways."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(attn_implementation="eager", n_positions=24, **shape)
    model = transformers.GPT2LMHeadModel(config).to(torch.bfloat16 if how == "bfloat16" else torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    model.save_pretrained(folder, max_shard_size="4KB" if how == "sharded" else "1GB")
    return model.float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["one file", "sharded", "bfloat16"])
@torch.no_grad()
def test_logits_and_samples_are_those_of_transformers(tmp_path, shape, how):
    """A weight misplaced or not transposed, the wrong GELU, an epsilon, positions under left padding, a cache."""
    theirs, V = their_model(tmp_path, how, **shape), shape["vocab_size"]
    assert how != "sharded" or len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = read_gpt2(*read_folder(tmp_path), V)
    tokens, pad = torch.randint(V, (4, 10), generator=torch.Generator().manual_seed(1)), torch.arange(4) * 2
    mask = (torch.arange(10) >= pad[:, None]).long()
    samples, lengths, _ = sample(ours, tokens, pad, 8, end=0, temperature=0)
    drawn = theirs.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=0,
                            pad_token_id=0)
    for row, n, expected in zip(samples.tolist(), lengths.tolist(), drawn[:, 10:].tolist()):
        assert row[:n] == expected[:n]
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        logits = theirs.to(dtype)(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(ours.to(dtype)(tokens), theirs(tokens).logits, atol=tolerance, rtol=0)
        torch.testing.assert_close(ours(tokens, pad)[mask.bool()], logits[mask.bool()], atol=tolerance, rtol=0)


def test_weights_that_would_compute_something_else_are_refused(tmp_path):
    """A model that loads and computes something else than the one it was."""
    their_model(tmp_path, **SHAPES[0])
    theirs, weights = read_folder(tmp_path)
    for settings, changes, problem in (({"layer_norm_epsilon": 1e-6}, {}, "layer_norm_epsilon is 1e-06"),
                                       ({}, {"score.weight": torch.ones(1, 8)}, "score.weight: no weights of"),
                                       ({}, {"lm_head.weight": torch.ones(50, 8)}, "lm_head: not tied")):
        with pytest.raises(UserError, match=problem):
            read_gpt2({**theirs, **settings}, {**weights, **changes}, 50)


def test_a_checkpoint_from_weights_on_disk(tmp_path, checkpoints, capsys, monkeypatch):
    """Unused rows of a vocabulary that win the softmax, positions cut at the wrong end, a longer tokenizer."""
    their_model(tmp_path / "theirs", **{**SHAPES[0], "vocab_size": 270})
    settings, weights = read_folder(tmp_path / "theirs")
    more = torch.cat([weights.pop("transformer.wte.weight"), torch.full((50, 8), 1e6)])
    save_file({"transformer.wte.weight": more, **weights}, tmp_path / "theirs" / "model.safetensors")
    cfg = Config(init=str(tmp_path / "theirs"), out=str(tmp_path / "base"), vocab=str(checkpoints.vocab), block_size=12)
    main(cfg)
    model, tokens = load_model(cfg.out), torch.arange(12)[None]
    assert "50 rows of the token embedding are dropped" in capsys.readouterr().out
    assert (model.config.vocab_size, model.config.block_size, model.config.gelu) == (270, 12, "tanh")
    assert torch.equal(model(tokens), read_gpt2(settings, {"wte.weight": more[:270], **weights}, 270)(tokens))
    assert (tmp_path / "base" / "vocab.tiktoken").read_bytes() == checkpoints.vocab.read_bytes()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: data.load_tokenizer(checkpoints.vocab))
    (tmp_path / "theirs" / "vocab.json").write_text('{"a": 5}')
    with pytest.raises(UserError, match="its tokenizer is not GPT-2's"):
        main(Config(init=cfg.init, out=str(tmp_path / "other")))
