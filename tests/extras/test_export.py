"""What export.py writes, read by transformers: the same logits, scores and ids."""
import json
import random

import pytest
import torch

import checkpoint
import data
import export
from common import UserError
from conftest import SENTENCES, ppo_config, random_model
from data import load_tokenizer, pad_prompts, pad_responses
from model import GPT, ScalarModel, load_model, score_many
from sampling import sample_many

# Characters at which regular expressions, Unicode tables and byte pairs differ between libraries.
ODD = "aaabbc  \n\t\r'sStTre\x00\x07\x1b\x1c\x85\xa0\u2003\u200b\u200c\u200d\u0301\u0903\ufeff0123.,!?-_éßªº²½ⅷ漢字🙂👩🏽ſK"


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    """A vocabulary with merges of several levels."""
    path = tmp_path_factory.mktemp("export") / "vocab.tiktoken"
    data.save_ranks(data.train_bpe((SENTENCES + ["it's 1999's film, isn't it?  naïve 漢字 🙂🙂"]) * 9, 400), path)
    return path


def exported(folder, vocab, kind, **changes):
    """A random checkpoint of this kind with this vocabulary, and its export: (model, path of the exported folder)."""
    size = load_tokenizer(vocab).n_vocab
    model = random_model(kind, vocab_size=size, dropout=0.1, **changes)
    if kind is ScalarModel:
        model.gain.fill_(1.7)
        model.bias.fill_(-0.6)
    checkpoint.save_checkpoint(folder / "ours", model, ppo_config(), vocab)
    export.main(export.Config(model=str(folder / "ours"), out=str(folder / "theirs")))
    return load_model(folder / "ours", kind="lm" if kind is GPT else "reward"), folder / "theirs"


@pytest.mark.parametrize("gelu", ["none", "tanh"])
@torch.no_grad()
def test_policy(tmp_path, vocab, gelu):
    """An exported model that computes other logits, keeps unused rows of the vocabulary, or cannot go on a text."""
    transformers = pytest.importorskip("transformers")
    model, folder = exported(tmp_path, vocab, GPT, gelu=gelu)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == "GPT2LMHeadModel" and not theirs.training
    prompts = [[model.config.vocab_size - 1] + [5 * i + j for j in range(2 * i + 1)] for i in range(4)]
    end = model.config.vocab_size - 1
    tokens, pad = pad_prompts(prompts, end)
    mask = (torch.arange(tokens.size(1)) >= pad[:, None]).long()
    expected = theirs(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert torch.allclose(model(tokens, pad)[mask.bool()], expected[mask.bool()], atol=1e-4)
    ours = sample_many(model, prompts, 8, end, temperature=0)
    drawn = theirs.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, tokens.size(1):]
    assert [row[:len(ids)] for ids, row in zip(ours, drawn.tolist())] == ours


@torch.no_grad()
def test_reward_model(tmp_path, vocab):
    """Scores without gain or bias, or read before the end of text because that is taken for padding."""
    transformers = pytest.importorskip("transformers")
    model, folder = exported(tmp_path, vocab, ScalarModel)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, enc = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(vocab)
    texts = [[enc.eot_token] + enc.encode_ordinary(text)[:20] + [enc.eot_token] for text in SENTENCES]
    ours = score_many(model, texts)
    for batch in (texts, texts[:1], texts[1:2]):  # with padding, and alone
        tokens, mask = pad_responses(batch, tokenizer.pad_token_id)
        scores = theirs(tokens, attention_mask=mask.long()).logits.squeeze(1)
        assert torch.allclose(scores, ours[[texts.index(text) for text in batch]], atol=1e-5)
    as_text = [f"<|endoftext|>{enc.decode(text[1:-1])}<|endoftext|>" for text in texts]
    assert tokenizer(as_text, padding=True)["input_ids"] == pad_responses(texts, tokenizer.pad_token_id)[0].tolist()


def test_tokenizer(tmp_path, vocab):
    """Other ids than those the model was trained on, for ordinary text or for odd characters."""
    transformers = pytest.importorskip("transformers")
    _, folder = exported(tmp_path, vocab, GPT)
    tokenizer, enc = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(vocab)
    draw = random.Random(0)
    texts = SENTENCES + ["".join(draw.choice(ODD) for _ in range(draw.randint(1, 30))) for _ in range(3000)]
    texts += [f"it'd{c} x" for c in ODD + "\u00b2\u00b3\u00b9\u00bc\u00bd\u00be"]  # where the border of a word differs
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids == enc.encode_ordinary(text), repr(text)
        assert tokenizer.decode(ids) == enc.decode(ids), repr(text)
    assert tokenizer.padding_side == "left"  # prompts are padded before they go on
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == enc.eot_token and len(tokenizer) == enc.n_vocab


def test_the_export_can_be_imported(tmp_path, vocab):
    """A way out that is no way back: gpt2.py on an exported folder gives the same model and vocabulary."""
    import gpt2
    model, folder = exported(tmp_path, vocab, GPT)
    gpt2.main(gpt2.Config(init=str(folder), out=str(tmp_path / "back")))
    back = load_model(tmp_path / "back")
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), back.state_dict().values(), strict=True)
               if x.size(0) != model.config.padded_vocab)
    tokens = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens), back(tokens))


def test_merges_are_those_of_the_training(vocab):
    """A merge that is missing or made of other parts, which the tokenizer of another library would not make."""
    ranks = load_tokenizer(vocab)._mergeable_ranks
    made = list(export.merges(ranks))
    assert [left + right for left, right in made] == [token for token in ranks if len(token) > 1]
    assert all(max(ranks[left], ranks[right]) < ranks[left + right] for left, right in made)


def test_bad_folders(tmp_path, vocab):
    """A checkpoint overwritten by its own export; a traceback for a missing one."""
    exported(tmp_path, vocab, GPT)
    with pytest.raises(UserError, match="is a checkpoint of ours"):
        export.main(export.Config(model=str(tmp_path / "ours"), out=str(tmp_path / "ours")))
    with pytest.raises(UserError, match="no checkpoint here"):
        export.main(export.Config(model=str(tmp_path / "nowhere"), out=str(tmp_path / "x")))
    with pytest.raises(UserError, match="name a checkpoint"):
        export.main(export.Config())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        export.main(export.Config(model=str(tmp_path / "ours"), out=str(tmp_path / "file")))
    untrained = random_model(ScalarModel, vocab_size=load_tokenizer(vocab).n_vocab)
    untrained.head.weight.data.zero_()
    checkpoint.save_checkpoint(tmp_path / "zero", untrained, ppo_config(), vocab)
    with pytest.raises(UserError, match="the head of this reward model is zero"):
        export.main(export.Config(model=str(tmp_path / "zero"), out=str(tmp_path / "x")))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["kind"] == "lm"
