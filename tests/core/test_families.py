"""Every family of pretrained models against transformers: logits, padding, sampling, file formats, refusals."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import UserError
from model import GPT, ScalarModel, hub_weights
from sampling import sample

transformers = pytest.importorskip("transformers")

V = 100
LLAMA = {"vocab_size": V, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
SCALED = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
FAMILIES = {  # name: configuration class and its settings
    "gpt2": ("GPT2Config", {"vocab_size": V, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt2, exact": ("GPT2Config", {"vocab_size": V, "n_embd": 48, "n_layer": 1, "n_head": 3, "n_inner": 80,
                                   "n_positions": 64, "activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
    "llama, one head": ("LlamaConfig", {**LLAMA, "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "llama, all heads": ("LlamaConfig", {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, scaled": ("LlamaConfig", {**LLAMA, "rope_parameters": SCALED, "num_hidden_layers": 3}),
    "qwen2": ("Qwen2Config", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2, untied": ("Qwen2Config", {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3, untied": ("Qwen3Config", {**LLAMA, "head_dim": 16, "num_key_value_heads": 1}),
}
PAD = torch.arange(7)  # on the left
TOKENS = torch.randint(1, V, (7, 12), generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(12) >= PAD[:, None]).long()  # transformers'
every_family = pytest.mark.parametrize("family", FAMILIES)


def their_model(family, folder, dtype=torch.float32, shard="1GB"):
    """A random model with large weights, saved and read again by transformers."""
    Config, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, Config)(**settings))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write(folder, settings=(), weights=()):
    """Change some settings of a saved model's config.json, and add some weights to it."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **dict(settings)}))
    save_file({**load_file(folder / "model.safetensors"), **dict(weights)}, folder / "model.safetensors")


@every_family
@torch.no_grad()
def test_logits_are_those_of_transformers(family, tmp_path):
    """A weight misplaced or transposed, the wrong pairs in RoPE, an epsilon, a bias; positions counted from padding."""
    theirs, ours = their_model(family, tmp_path), GPT.from_pretrained(tmp_path)
    position = (MASK.cumsum(1) - 1).clamp(min=0)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        theirs, ours = theirs.to(dtype), ours.to(dtype)
        logits = theirs(TOKENS, attention_mask=MASK, position_ids=position).logits
        torch.testing.assert_close(ours(TOKENS, PAD)[MASK.bool()], logits[MASK.bool()], atol=tolerance, rtol=0)
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=tolerance, rtol=0)
    for row, skip in enumerate(PAD.tolist()):
        alone = ours(TOKENS[row:row + 1, skip:])[0]
        torch.testing.assert_close(ours(TOKENS, PAD)[row, skip:], alone, atol=1e-9, rtol=0)


@every_family
@torch.no_grad()
def test_greedy_sampling_is_generate(family, tmp_path):
    """A cache of unrotated keys, of keys per query head, or of keys with positions that start again at 0."""
    theirs, ours = their_model(family, tmp_path), GPT.from_pretrained(tmp_path)
    got, lengths, _ = sample(ours, TOKENS, PAD, 20, end=0, temperature=0)
    expected = theirs.generate(TOKENS, attention_mask=MASK, max_new_tokens=20, do_sample=False, eos_token_id=0,
                               pad_token_id=0)[:, TOKENS.size(1):]
    for row, n, other in zip(got.tolist(), lengths.tolist(), expected.tolist()):
        assert row[:n] == other[:n]


@pytest.mark.parametrize("family", ["gpt2", "llama, scaled", "qwen3"])
@pytest.mark.parametrize("dtype, shard", [(torch.float32, "20KB"), (torch.bfloat16, "1GB"), (torch.float16, "10KB")])
@torch.no_grad()
def test_files_of_every_kind(family, dtype, shard, tmp_path):
    """Weights of one shard only, or numbers of 16 bits read as others; names that the index gives to other files, and
    files that it does not name, or an index that is older than the one file."""
    theirs, index = their_model(family, tmp_path, dtype, shard), tmp_path / "model.safetensors.index.json"
    assert index.exists() == (shard != "1GB")
    weights = load_file(next(tmp_path.glob("*.safetensors")))
    save_file({name: x * 0 for name, x in weights.items()}, tmp_path / "model_average.safetensors")
    if not index.exists():
        index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "model_average.safetensors")}))
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


def test_settings_as_the_hub_has_them(tmp_path):
    """Files from before transformers 5: rope_theta and rope_scaling apart, its type called type, head_dim null."""
    theirs, scaling = their_model("llama, scaled", tmp_path), {**SCALED, "type": SCALED["rope_type"]}
    del scaling["rope_type"], scaling["rope_theta"]
    write(tmp_path, {"rope_parameters": None, "rope_theta": 5000.0, "rope_scaling": scaling, "head_dim": None})
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


@every_family
@torch.no_grad()
def test_fewer_positions_and_rows(family, tmp_path):
    """Rows beyond the tokenizer's that stay in the head, unused rows that hold whatever was in memory."""
    their_model(family, tmp_path)
    whole, part = GPT.from_pretrained(tmp_path), GPT.from_pretrained(tmp_path, 12, 77)
    assert (part.config.block_size, part.config.vocab_size, part.config.padded_vocab) == (12, 77, 128)
    torch.testing.assert_close(part(TOKENS % 77, PAD), whole(TOKENS % 77, PAD)[..., :77], atol=1e-5, rtol=0)
    assert not part.trunk.token_embedding.weight[77:].any()
    assert part.config.tied or not part.lm_head.weight[77:].any()  # 0 times whatever was in memory may be NaN
    with pytest.raises(UserError, match="vocab_size 101: the model has 100"):
        GPT.from_pretrained(tmp_path, vocab_size=101)


@every_family
def test_names_lead_back(family, tmp_path):
    """A table that is right in one direction only: a model under their names must be one that transformers can load."""
    theirs, ours = dict(their_model(family, tmp_path).named_parameters()), GPT.from_pretrained(tmp_path)
    prefix = "transformer." if family.startswith("gpt2") else "model."
    names = {name if name == "lm_head.weight" else prefix + name: part for name, part in hub_weights(ours)}
    assert names.keys() == theirs.keys() and all(torch.equal(names[name], theirs[name]) for name in names)
    scalar = {prefix + name for name, _ in hub_weights(ScalarModel(ours.config))}
    assert scalar - {prefix + "head.weight"} == theirs.keys() - {"lm_head.weight"}


@pytest.mark.parametrize("family, settings, problem", [
    ("qwen3", {"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"), ("llama, scaled", {"mlp_bias": True}, "mlp_bias"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"), ("qwen3", {"num_experts": 8}, "num_experts 8"),
    ("qwen3", {"attention_bias": True}, "attention_bias"), ("llama, scaled", {"hidden_act": "gelu"}, "hidden_act 'g"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}, "rope_type 'yarn'"),
    ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by")])
def test_what_would_compute_something_else_is_refused(family, settings, problem, tmp_path):
    """A setting that is passed over in silence: the model runs, and writes nonsense."""
    their_model(family, tmp_path)
    write(tmp_path, settings)
    with pytest.raises(UserError, match=f"config.json: {problem}.* is not supported"):
        GPT.from_pretrained(tmp_path)


def test_weights_that_would_be_passed_over_are_refused(tmp_path):
    """A bias that is left out in silence; but not a head where the embedding is one, which transformers passes over."""
    head, bias = "lm_head.weight", "layers.0.self_attn.o_proj.bias"
    embedding = their_model("qwen2", tmp_path).model.embed_tokens.weight.data
    write(tmp_path, weights={head: embedding.clone(), "model.layers.0.rotary_emb.inv_freq": torch.ones(6)})
    GPT.from_pretrained(tmp_path)
    write(tmp_path, weights={f"model.{bias}": torch.ones(48)})
    with pytest.raises(UserError, match=bias):
        GPT.from_pretrained(tmp_path)
