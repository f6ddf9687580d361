"""What tools/export.py writes, read by transformers: the same logits, scores and ids."""
import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import SENTENCES, ppo_config

from common import UserError, save_checkpoint
from data import END, chat_ids, load_tokenizer, pad_prompts, pad_responses, turns_of
from model import GPT, GPTConfig, ScalarModel, load_model
from prepare import pretrained
from prepare.reviews import save_ranks, train_bpe
from prepare.vocabulary import read_json
from reward import score_many
from sampling import sample_many
from tools import export

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
# Characters at which regular expressions, Unicode tables and byte pairs differ between libraries.
ODD = "aaabbc  \n\t\r'sStTre\x00\x07\x1b\x85\xa0\u2003\u200b\u200d\u0301\u0903\ufeff0123.,!?-_éßªº²½ⅷ漢字🙂👩🏽ſK³¹¼¾"
ROPE = {"rope": 5000.0, "rms_norm": True, "swiglu": True, "bias": "none", "n_kv_head": 1, "mlp_width": 24}
FAMILIES = {
    "GPT2": {}, "GPT2, tanh": {"gelu": "tanh"}, "Llama": ROPE, "Qwen2": {**ROPE, "bias": "qkv", "norm_eps": 1e-6},
    "Llama, scaled": {**ROPE, "rope_scaling": (8.0, 1.0, 4.0, 16), "tied": False},
    "Qwen3": {**ROPE, "qk_norm": True, "head_size": 12, "norm_eps": 1e-6}}
every_family = pytest.mark.parametrize("family", FAMILIES)


def chat(special, **settings):
    """Settings of a vocabulary that begins with these special tokens, or whose dialogues are in a chat format."""
    return {"pattern": r"\p{L}+|\s+|[^\s\p{L}]", "special": {text: i for i, text in enumerate(special)}, "end": 0,
            "dialogues": "chat" in settings, **settings}


VOCABULARIES = {
    "chatml": chat([END, "<|im_start|>", "<|im_end|>"],
                   chat={"format": "chatml", "end": 2, "system": "You're \"it\"."}),
    "think": chat([END, "<|im_start|>", "<|im_end|>", "<think>", "</think>"], nfc=True,
                  chat={"format": "chatml", "end": 2, "think": [3, 15, 4, 15]}),  # 15 is a line feed
    "llama3": chat([END, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"], begin=4,
                   chat={"format": "llama3", "end": 3, "begin": 4, "preamble": "It is Monday.\n\n"})}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function: a random model of a kind, saved and exported: (model, exported folder, our tokenizer)."""
    texts = (SENTENCES + ["it's 1999's film, isn't it?  naïve 漢字 🙂🙂"]) * 9
    ranks = train_bpe(texts, 400)

    def export_of(kind=GPT, settings=None, **changes):
        folder = tmp_path_factory.mktemp("exported")
        first = len(settings["special"]) if settings else 0
        save_ranks({token: first + rank for token, rank in ranks.items()}, folder / "vocab.tiktoken", settings)
        enc = load_tokenizer(folder / "vocab.tiktoken")
        torch.manual_seed(0)
        model = kind(GPTConfig(**{"vocab_size": enc.n_vocab, "block_size": 32, "n_layer": 2, "n_head": 2, "width": 16,
                                  "dropout": 0.1, **changes}))
        for weight in model.parameters():
            weight.data.normal_(std=0.3) if weight.dim() > 1 else weight.data.add_(torch.randn_like(weight) * 0.1)
        if kind is ScalarModel:
            model.gain.fill_(1.7), model.bias.fill_(-0.6)
        save_checkpoint(folder / "ours", model, ppo_config(), folder / "vocab.tiktoken")
        export.main(export.Config(model=str(folder / "ours"), out=str(folder / "theirs")))
        return load_model(folder / "ours", kind=kind.kind), folder / "theirs", enc
    return export_of


@every_family
@torch.no_grad()
def test_policy(exported, tmp_path, family):
    """Other logits, unused rows of the vocabulary, a text that cannot be continued; a way out that is no way back."""
    model, folder, enc = exported(**FAMILIES[family])
    theirs, end = transformers.AutoModelForCausalLM.from_pretrained(folder), enc.end
    assert type(theirs).__name__.startswith(family.split(",")[0])
    prompts = [[end] + [5 * i + j for j in range(2 * i + 1)] for i in range(4)]
    tokens, pad = pad_prompts(prompts, end)
    mask = (torch.arange(tokens.size(1)) >= pad[:, None]).long()
    expected = theirs(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert torch.allclose(model(tokens, pad)[mask.bool()], expected[mask.bool()], atol=1e-4)
    drawn = theirs.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, tokens.size(1):]
    ours = sample_many(model, prompts, 8, end, temperature=0)
    assert [row[:len(ids)] for ids, row in zip(ours, drawn.tolist())] == ours
    pretrained.main(pretrained.Config(str(folder), str(tmp_path / "back")))
    back = load_model(tmp_path / "back")
    assert torch.equal(back(tokens, pad), model(tokens, pad)) and back.config == replace(model.config, dropout=0.0)


@every_family
@torch.no_grad()
def test_reward_model(exported, family, capsys):
    """Scores without gain or bias, or read before the EOS because that is taken for padding; a constant lost in
    silence where transformers has no place for it."""
    model, folder, enc = exported(ScalarModel, **FAMILIES[family])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert ("scores are +0.6000" in capsys.readouterr().out) == ("GPT2" not in family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [[enc.end] + enc.encode_ordinary(text)[:20] + [enc.end] for text in SENTENCES]
    for batch in (texts, texts[:1], texts[1:2]):  # with padding, and alone
        tokens, mask = pad_responses(batch, tokenizer.pad_token_id)
        scores = theirs(tokens, attention_mask=mask.long()).logits.squeeze(1)
        scores = scores + getattr(theirs.config, "score_bias", 0.0)
        assert torch.allclose(scores, score_many(model, batch), atol=1e-5)


def test_a_mixture_is_refused(exported):
    """A model that no family of transformers computes, exported as one that computes something else."""
    for changes in ({"rms_norm": True}, {**ROPE, "swiglu": False}, {**ROPE, "bias": "all"}, {"n_kv_head": 1}):
        with pytest.raises(UserError, match="no model that computes what this one does"):
            exported(**changes)


def test_tokenizer(exported):
    """Other ids, or another transcript, than the models were trained on; no begin token, or two; merges that versions
    before 0.20 cannot read."""
    _, folder, enc = exported()
    tokenizer, draw = transformers.AutoTokenizer.from_pretrained(folder), random.Random(0)
    texts = SENTENCES + ["".join(draw.choice(ODD) for _ in range(draw.randint(1, 30))) for _ in range(1000)]
    for text in texts + [f"it'd{c} x" for c in ODD]:  # where the border of a word differs
        ids = enc.encode_ordinary(text)
        assert tokenizer(text)["input_ids"] == [enc.end] + ids, repr(text)
        assert tokenizer.decode(ids) == enc.decode(ids)
    assert (tokenizer.padding_side, tokenizer.eos_token_id, len(tokenizer)) == ("left", enc.end, enc.n_vocab)
    assert all(isinstance(x, str) for x in json.loads((folder / "tokenizer.json").read_text())["model"]["merges"])
    turns = [("system", "Be brief."), ("user", " A river? "), ("assistant", "The Nile.\n"), ("user", "Another?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = "Be brief.\n\nHuman: A river?\n\nAssistant: The Nile."
    assert tokenizer.apply_chat_template(messages[:3], tokenize=False) == f"<|endoftext|>{text}<|endoftext|>"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(text + "\n\nHuman: Another?\n\nAssistant:")["input_ids"]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_chat_formats(exported, tmp_path, name):
    """Special tokens under other ids, a template that writes other turns than the models were trained on, a begin token
    twice, a system message left out; a tokenizer.json that does not lead back."""
    _, folder, enc = exported(settings=VOCABULARIES[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": " A river?"}, {"role": "assistant", "content": "The Nile.\n"},
                {"role": "user", "content": "Another isn't it?"}]
    for turns in (messages, [{"role": "system", "content": "Be brief. "}, *messages]):
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert ids == chat_ids(enc, turns_of(turns))
        whole = [*turns, {"role": "assistant", "content": "Rhine"}]
        text = tokenizer.apply_chat_template(whole, tokenize=False)
        assert text.startswith(tokenizer.decode([*ids, *enc.encode_ordinary("Rhine"), enc.end]))
    for text in [*SENTENCES, "cafe\u0301 <|x", ""]:
        assert tokenizer(text)["input_ids"] == [4] * (name == "llama3") + enc.encode_ordinary(text)
    assert (tokenizer.eos_token_id, len(tokenizer)) == (enc.end, enc.n_vocab)
    ranks, settings = read_json(json.loads((folder / "tokenizer.json").read_text()), "it")
    ours = {key: enc.settings.get(key) for key in ("pattern", "special", "end", "nfc")}
    assert ranks == enc._mergeable_ranks and {key: settings.get(key) for key in ours} == ours
