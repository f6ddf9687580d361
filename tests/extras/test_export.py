"""What tools/export.py writes, read by transformers: the same logits, scores and ids."""
import json
import random

import pytest
import torch
from common import save_checkpoint
from conftest import SENTENCES, ppo_config, random_model
from data import load_tokenizer, pad_prompts, pad_responses
from model import GPT, ScalarModel, load_model
from prepare import pretrained
from prepare.reviews import save_ranks, train_bpe
from reward import score_many
from sampling import sample_many
from tools import export

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
# Characters at which regular expressions, Unicode tables and byte pairs differ between libraries.
ODD = "aaabbc  \n\t\r'sStTre\x00\x07\x1b\x85\xa0\u2003\u200b\u200d\u0301\u0903\ufeff0123.,!?-_éßªº²½ⅷ漢字🙂👩🏽ſK³¹¼¾"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function: a random model of a kind, saved and exported: (model, exported folder, our tokenizer)."""
    vocab = tmp_path_factory.mktemp("export") / "vocab.tiktoken"
    save_ranks(train_bpe((SENTENCES + ["it's 1999's film, isn't it?  naïve 漢字 🙂🙂"]) * 9, 400), vocab)

    def export_of(kind, **changes):
        folder, enc = tmp_path_factory.mktemp("exported"), load_tokenizer(vocab)
        model = random_model(kind, vocab_size=enc.n_vocab, dropout=0.1, **changes)
        if kind is ScalarModel:
            model.gain.fill_(1.7), model.bias.fill_(-0.6)
        save_checkpoint(folder / "ours", model, ppo_config(), vocab)
        export.main(export.Config(model=str(folder / "ours"), out=str(folder / "theirs")))
        return load_model(folder / "ours", kind=kind.kind), folder / "theirs", enc
    return export_of


@pytest.mark.parametrize("gelu", ["none", "tanh"])
@torch.no_grad()
def test_policy(exported, tmp_path, gelu):
    """Other logits, unused rows of the vocabulary, a text that cannot be continued; a way out that is no way back."""
    model, folder, enc = exported(GPT, gelu=gelu)
    theirs, end = transformers.AutoModelForCausalLM.from_pretrained(folder), enc.end
    prompts = [[end] + [5 * i + j for j in range(2 * i + 1)] for i in range(4)]
    tokens, pad = pad_prompts(prompts, end)
    mask = (torch.arange(tokens.size(1)) >= pad[:, None]).long()
    expected = theirs(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert torch.allclose(model(tokens, pad)[mask.bool()], expected[mask.bool()], atol=1e-4)
    drawn = theirs.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, tokens.size(1):]
    ours = sample_many(model, prompts, 8, end, temperature=0)
    assert [row[:len(ids)] for ids, row in zip(ours, drawn.tolist())] == ours
    pretrained.main(pretrained.Config(init=str(folder), out=str(tmp_path / "back")))
    assert torch.equal(load_model(tmp_path / "back")(tokens, pad), model(tokens, pad))


@torch.no_grad()
def test_reward_model(exported):
    """Scores without gain or bias, or read before the EOS because that is taken for padding."""
    model, folder, enc = exported(ScalarModel)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [[enc.end] + enc.encode_ordinary(text)[:20] + [enc.end] for text in SENTENCES]
    for batch in (texts, texts[:1], texts[1:2]):  # with padding, and alone
        tokens, mask = pad_responses(batch, tokenizer.pad_token_id)
        scores = theirs(tokens, attention_mask=mask.long()).logits.squeeze(1)
        assert torch.allclose(scores, score_many(model, batch), atol=1e-5)


def test_tokenizer(exported):
    """Other ids, or another transcript, than the models were trained on; no begin token, or two; merges that versions
    before 0.20 cannot read."""
    _, folder, enc = exported(GPT)
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
