"""The tokenizer, truncation, files as people have them, padding, batches, and the command line."""
import random
import re
from collections import Counter

import pytest
import torch

import common
import data
import dpo
import evaluate
import label
import ppo
import reward
import sample
import sft
from common import UserError
from conftest import SENTENCES, log_of
from data import (END, batches, encode_prompt, encode_texts, length_mask, load_tokenizer, pad_prompts, pad_responses,
                  prompt_limit, read_jsonl, read_rankings, write_jsonl)


@pytest.fixture(scope="module")
def enc(checkpoints):
    return load_tokenizer(checkpoints.vocab)


@pytest.mark.parametrize("text", ["", " the  film \n\n was\tgood ", "naïve café 電影 🎬👍🏽 ﷽", "\0\x7f\ufeff\u2028",
                                  "''don't''...!?", "1234567890", f"a {END}{END} <|im_end|>", "\U0010ffff", "a" * 1000])
def test_any_text_round_trips(enc, text):
    """A byte without a token, text changed on the way, or a literal "<|endoftext|>" that becomes the special id."""
    ids = enc.encode_ordinary(text)
    assert enc.decode(ids) == text
    assert enc.eot_token not in ids and enc.eot_token == enc.n_vocab - 1 == 269 and all(0 <= i < 269 for i in ids)


def test_text_split_before_a_space_keeps_its_tokens(enc):
    """Prompt and response with other tokens than the whole text had in training: words break at the border."""
    for text in SENTENCES + ["it's 12345 o'clock, isn't it? the film 'was' good... (really) ¡sí!", "a - b -- c 4.5 $6"]:
        for place in (i for i, character in enumerate(text) if character == " "):
            parts = enc.encode_ordinary(text[:place]) + enc.encode_ordinary(text[place:])
            assert parts == enc.encode_ordinary(text), text[:place]


def test_models_of_one_run_share_a_vocabulary(tmp_path):
    """Ids of one vocabulary scored by a model of another."""
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.tiktoken").write_text(content)
    data.check_same_vocab(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="do not share"):
        data.check_same_vocab(tmp_path / "a", tmp_path / "b", tmp_path / "c")


def test_encode_prompt_and_prompt_limit(enc):
    """A prompt that loses its last words, or of EOS alone; with its response, one token more than the block has."""
    assert encode_prompt(enc, "", 8) == [269] and encode_prompt(enc, "xyz", 1) == [269]
    assert enc.decode(encode_prompt(enc, "xyzw", 3)) == END + "zw"
    assert enc.decode(encode_prompt(enc, "xyzw", 5)) == END + "xyzw"
    ids = encode_prompt(enc, "\n\nHuman: " + "word " * 50 + "\n\nAssistant:", 20)  # the only turn is too long
    assert len(ids) == 20 and enc.decode(ids).endswith("word \n\nAssistant:")
    assert prompt_limit(32, 8) == 24 and prompt_limit(32, 30) == 2
    with pytest.raises(UserError, match="--response-tokens 31 leaves no room for a prompt in block size 32"):
        prompt_limit(32, 31)


GOOD = b'{"prompt": "the film", "completion": " was good"}\n'
COMPLETION = {"prompt": str, "completion": str}
DIALOGUE = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: four\n\nHuman: five\n\nAssistant:"


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_long_dialogue_loses_whole_turns(enc, turns):
    """A prompt that begins in the middle of somebody's words; one token of room too much or too little."""
    start = DIALOGUE.split("\n\nHuman:")[1 + turns:]
    kept = "".join("\n\nHuman:" + part for part in start)
    size = 1 + len(enc.encode_ordinary(kept))
    for room in (size, size + 3) if turns else (size,):
        assert enc.decode(encode_prompt(enc, "System." * turns + DIALOGUE, room)) == END + kept
    rest = "".join("\n\nHuman:" + part for part in start[1:]) or kept  # one token less of room: one turn more is gone
    shorter = enc.decode(encode_prompt(enc, DIALOGUE, size - 1)[1:])
    assert shorter == rest if start[1:] else kept.endswith(shorter) and shorter != kept


@pytest.mark.parametrize("prompt, responses, kept, prompts_truncated, responses_truncated", [
    (3, [2, 4], 3, 0, 0),     # letters, one token each; the block has 16
    (10, [2, 4], 10, 0, 0),   # to the last token: 1 + 10 and 4 + 1
    (11, [2, 4], 10, 1, 0),   # the prompt keeps what the longest response leaves
    (30, [2, 7], 7, 1, 0),
    (30, [2, 8], 7, 1, 1),    # never less than half of the block
    (3, [20, 30], 3, 0, 2),   # a short prompt leaves the responses more than half
])
def test_what_encode_texts_truncates(enc, prompt, responses, kept, prompts_truncated, responses_truncated):
    """A prompt under half of the block, another for each response, EOS behind a truncated response, a wrong count."""
    counts, texts = Counter(), ["y" * n for n in responses]
    ids, encoded = encode_texts(enc, "x" * prompt, texts, 16, counts)
    assert enc.decode(ids) == END + "x" * kept
    assert [enc.decode(text) for text in encoded] == [
        text + END if 1 + kept + len(text) < 16 else text[:15 - kept] for text in texts]
    assert counts == {"prompts": 1, "prompts truncated": prompts_truncated, "responses": 2,
                      "responses truncated": responses_truncated}
    (ranking,) = data.encode_rankings(enc, [{"prompt": "x" * prompt, "responses": texts}], 16, counts)
    assert ranking == [ids + text for text in encoded] and counts["prompts"] == 2


def test_report_truncated(enc, tmp_path, capsys):
    """A model that never learns to stop, and nobody was told why."""
    counts, log = Counter(), common.Log(tmp_path)
    data.report_truncated(counts, log)
    assert capsys.readouterr().out == "" and not log.path.exists()
    data.encode_rankings(enc, [{"prompt": "x", "responses": ["y" * 40, "z" * 41]}] * 30, 16, counts)
    data.report_truncated(counts, log)
    told = "60 of 60 responses are truncated: they have no EOS, and the model will not learn to stop"
    assert told in capsys.readouterr().out
    assert log_of(tmp_path) == [{"truncated": {"prompts": 0, "responses": 60, "of": 60}}]


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [GOOD.strip(), b"\n" + GOOD + b"\n  \n", b"\xef\xbb\xbf" + GOOD,
                                     GOOD.replace(b"\n", b"\r\n") + b"\r\n", GOOD.replace(b"{", b'{"more": 1, ')])
def test_accepted_files(tmp_path, content):
    """A refusal of what editors leave behind: blank lines, a byte-order mark, CRLF, no last newline, more fields."""
    (tmp_path / "file.jsonl").write_bytes(content)
    (row,) = read_jsonl(tmp_path / "file.jsonl", COMPLETION)
    assert (row["prompt"], row["completion"]) == ("the film", " was good")


@pytest.mark.parametrize("content, problem", [
    (None, ": no such file"), (b"\n \n\n", ": empty"), (b'{"prompt": "caf\xe9"}\n', ": not UTF-8 text"),
    (GOOD[:30], ":1: not JSON"), (b'["a", "b"]', ":1: expected an object .* found list"),
    (b'{"prompt": "a"}', ":1: completion: "), (b'{"prompt": "a", "completion": 3}', ":1: completion: expected str"),
    (b'{"prompt": "a", "completion": " \\n "}', ":1: completion: empty"),
    (rb'{"prompt": "a\ud83d", "completion": "c"}', ":1: prompt: holds a NUL or half a surrogate"),
    (b'\n{"prompt": "a", "chosen": "b", "rejected": "b"}', ":2: chosen: the same as rejected"),
    (b'{"prompt": "a", "responses": ["b"]}', ":1: responses: a ranking needs two"),
    (b'{"prompt": "a", "responses": ["b", "c", "b"]}', ":1: responses: .* different"),
    (b'{"prompt": "a", "responses": ["b", 4]}', ":1: responses: expected text, found int"),
    ((GOOD + b"{}\n") * 7, r":2: [^:]*:[^:]*:4: .*:6: .*:8: .*:10: [^:]*: [^:]*and 2 more bad lines"),
])
def test_bad_input_is_named(tmp_path, content, problem):
    """A traceback, a line without its number, or one message per run, for what people have in their files."""
    path = tmp_path / "file.jsonl"
    if content is not None:
        path.write_bytes(content)
    pairs = content and (b"chosen" in content or b"responses" in content)
    with pytest.raises(UserError, match=rf"file\.jsonl{problem}") as error:
        read_rankings(path) if pairs else read_jsonl(path, COMPLETION)
    assert error.value.code == 2 and "\n" not in str(error.value)


def test_rows_survive_writing(tmp_path):
    """Text changed by escapes, a line separator inside a text that splits a row, pairs read with the rejected first."""
    rows = [{"prompt": "", "completion": "a\nb\r\n\u2028\u0085 \"c\" \\ 🎬 é"}, {"prompt": END, "completion": " x"}]
    write_jsonl(tmp_path / "rows", rows)
    assert read_jsonl(tmp_path / "rows", COMPLETION) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    for row in ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "responses": ["b", "c"]}):
        write_jsonl(tmp_path / "rows", [row])
        assert read_rankings(tmp_path / "rows")[0]["responses"] == ["b", "c"]


def test_padding_and_masks():
    """Padding on the wrong side, or a mask that takes the real EOS for padding."""
    tokens, pad = pad_prompts([[9, 1, 2], [9], [9, 3]], 9)
    assert tokens.tolist() == [[9, 1, 2], [9, 9, 9], [9, 9, 3]] and pad.tolist() == [0, 2, 1]
    tokens, mask = pad_responses([[1, 9], [9], [2, 3, 4]], 9)
    assert tokens.tolist() == [[1, 9, 9], [9, 9, 9], [2, 3, 4]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]] and mask.dtype == torch.float32
    assert length_mask(torch.tensor([0, 2]), 2).tolist() == [[0, 0], [1, 1]]


def test_batches_hold_every_row_once():
    """Rows lost or repeated, an order that depends on more than the seed; batches of padding, or from short to long."""
    rng = random.Random(0)
    lengths = [rng.randrange(1, 40) for _ in range(1003)]
    made = batches(lengths, 8, 1, 0)
    assert sorted(row for batch in made for row in batch) == list(range(1003))
    assert sorted(map(len, made)) == [3] + [8] * 125
    assert made == batches(lengths, 8, 1, 0) != batches(lengths, 8, 1, 1) and made != batches(lengths, 8, 2, 0)
    lengths = [1 + i % 40 for i in range(2048)]
    longest = [max(lengths[row] for row in batch) for batch in batches(lengths, 16, 3)]
    assert sum(top * 16 for top in longest) / sum(lengths) < 1.2
    assert longest != sorted(longest) and abs(sum(longest[:64]) / 64 - sum(longest[64:]) / 64) < 8


def test_default_preset_flag():
    """A preset that overrides a flag, a default that overrides a preset, or "false" that is read as true."""
    presets = {"fast": {"lr": 0.5, "epochs": 9, "whiten_rewards": True}}
    flags = ["--preset", "fast", "--epochs", "2", "--kl-coef", "0", "--whiten-rewards", "false"]
    assert common.load_config(ppo.Config, presets, []) == ppo.Config()
    assert common.load_config(ppo.Config, presets, flags) == ppo.Config(lr=0.5, epochs=2, kl_coef=0.0)
    for alone in (["--whiten-rewards"], ["--whiten-rewards", "--seed", "1"], ["--seed", "1", "--whiten-rewards"]):
        assert common.load_config(ppo.Config, {}, alone) == ppo.Config(whiten_rewards=True)


@pytest.mark.parametrize("flags", [["--learning-rate", "1"], ["--see", "1"], ["--preset", "none"], ["--epochs", "two"],
                                   ["stray"], pytest.param(["--whiten-rewards", "1"], marks=pytest.mark.xfail(
                                       strict=True, reason="common.load_config raises KeyError for a bad bool"))])
def test_unknown_flags_stop(flags, capsys):
    """A typing error that runs for hours with the default; an abbreviation that means something else next year."""
    with pytest.raises(UserError, match=flags[0].strip("-")) as stop:
        common.load_config(ppo.Config, ppo.PRESETS, flags)
    assert stop.value.code == 2 and "\n" not in str(stop.value) and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("Config", [sft.Config, reward.Config, label.SampleConfig, label.RankConfig, dpo.Config,
                                    ppo.Config, evaluate.Config, sample.Config])
def test_every_flag_has_its_help(Config, capsys):
    """A flag without an explanation."""
    with pytest.raises(SystemExit):
        common.load_config(Config, {}, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not [name for name in vars(Config()) if re.search(rf"--{name.replace('_', '-')} (\[X\]|X) \(default", text)]
