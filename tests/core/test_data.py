"""The tokenizer against a slow one, files as people really have them, padding, batches, and the command line."""
import gzip
import os
import random
import time
from collections import Counter

import pytest
import regex
import torch

import checkpoint
import common
import data
import dpo
import evaluate
import export
import gpt2
import hh
import own
import ppo
import report
import reward
import sft
import study
from common import UserError
from conftest import SENTENCES
from data import (END, batches, encode_prompt, encode_response, length_mask, load_tokenizer, pad_prompts, pad_responses,
                  read_jsonl, read_rankings, train_bpe, write_jsonl)


@pytest.fixture(scope="module")
def enc(checkpoints):
    return load_tokenizer(checkpoints.vocab)


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def slow_bpe(texts, vocab_size):
    """Count every pair of neighbours anew before each merge: {token bytes: rank}."""
    words = [list(word.encode()) for text in texts for word in regex.findall(data.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 1:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word in words:
            k = 0
            while k < len(word) - 1:
                if (word[k], word[k + 1]) == best:
                    word[k:k + 2] = [len(tokens)]
                k += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("texts", [SENTENCES, ["aaa banana bandana cabana"] * 3,
                                   ["don't, can't 12345 éé 🎬🎬 ..."] * 3])
def test_train_bpe_merges_the_most_frequent_pair(texts):
    """Counts that go stale after a merge, overlapping pairs (aaa) counted twice, ties broken by chance."""
    assert list(train_bpe(texts, 265).items()) == list(slow_bpe(texts, 265).items())


def test_train_bpe_stops_when_nothing_repeats():
    """An endless loop, or merges learned from a single occurrence, when the text is too short for the vocabulary."""
    assert len(train_bpe(["abc"], 500)) == 256
    with pytest.raises(UserError, match="--vocab-size is 257"):
        train_bpe(["abc"], 257)


@pytest.mark.parametrize("text", ["", " ", "the film", " the  film \n\n was\tgood ",
                                  "naïve café 電影 🎬👍🏽 ﷽", "\0\x01\x7f\ufeff\u2028", "''don't''...!?",
                                  "1234567890", END, f"a {END}{END} b", "\U0010ffff", "a" * 1000])
def test_any_text_round_trips(enc, text):
    """A byte without a token, text changed on the way, or a literal "<|endoftext|>" that becomes the special id."""
    ids = enc.encode_ordinary(text)
    assert enc.decode(ids) == text
    assert enc.eot_token not in ids and enc.eot_token == enc.n_vocab - 1 == 269 and all(0 <= i < 269 for i in ids)


def test_random_text_round_trips(enc):
    """The same for any code points outside the surrogates."""
    rng = random.Random(0)
    for size in range(200):
        text = "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0xd800), rng.randrange(0xe000, 0x110000)]))
                       for _ in range(size))
        assert enc.decode(enc.encode_ordinary(text)) == text


def test_text_cut_before_a_space_keeps_its_tokens(enc):
    """Prompt and response with other tokens than the whole text had in training: words break at the cut."""
    texts = SENTENCES + ["it's 12345 o'clock, isn't it? the film 'was' good... (really) ¡sí!", "a - b -- c 4.5 $6"]
    for text in texts:
        whole = enc.encode_ordinary(text)
        for cut in (i for i, character in enumerate(text) if character == " "):
            assert enc.encode_ordinary(text[:cut]) + enc.encode_ordinary(text[cut:]) == whole, text[:cut]


@pytest.mark.parametrize("damage", [lambda lines: lines[:100], lambda lines: lines[:-5] + ["???? 5"],
                                    lambda lines: lines[5:], lambda lines: lines + ["AAAA 9999"],
                                    lambda lines: ["<html>"] + lines])
def test_damaged_vocabulary(checkpoints, tmp_path, damage):
    """A cut or altered vocabulary that silently gives every text other ids."""
    path = tmp_path / "vocab.tiktoken"
    path.write_text("\n".join(damage(checkpoints.vocab.read_text().splitlines())) + "\n")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="no tokenizer here"):
        load_tokenizer(tmp_path / "nowhere")


def test_encode_prompt_and_response(enc):
    """A prompt that loses its last words, a response that loses its end of text, an empty prompt of no tokens."""
    assert encode_prompt(enc, "", 8) == [269] and encode_prompt(enc, "xyz", 1) == [269]
    assert enc.decode(encode_prompt(enc, "xyzw", 3)) == END + "zw"
    assert enc.decode(encode_prompt(enc, "xyzw", 5)) == END + "xyzw"
    assert enc.decode(encode_response(enc, "xyz", 4)) == "xyz" + END
    assert enc.decode(encode_response(enc, "xyz", 3)) == "xyz"
    assert encode_response(enc, END, 99).count(269) == 1  # only the real end


DIALOGUE = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: four\n\nHuman: five\n\nAssistant:"


@pytest.mark.parametrize("turns", [0, 2, 4])
def test_a_long_dialogue_loses_whole_turns(enc, turns):
    """A prompt that begins in the middle of somebody's words; one token of room too much or too little."""
    start = DIALOGUE.split("\n\nHuman:", 1)[1].split("\n\nHuman:")[turns // 2:]
    kept = "".join("\n\nHuman:" + part for part in start)
    size = 1 + len(enc.encode_ordinary(kept))
    longer = 1 + len(enc.encode_ordinary(DIALOGUE)) if turns == 0 else size + 3
    assert enc.decode(encode_prompt(enc, DIALOGUE, size)) == END + kept
    assert enc.decode(encode_prompt(enc, DIALOGUE, longer)) == END + kept
    rest = "".join("\n\nHuman:" + part for part in start[1:]) or kept  # one token less of room: one turn more is gone
    shorter = enc.decode(encode_prompt(enc, DIALOGUE, size - 1)[1:])
    assert shorter == rest if start[1:] else kept.endswith(shorter) and shorter != kept


def test_a_dialogue_of_a_million_letters_is_cut_at_once(enc):
    """Encoding the rest again for every turn that is dropped: an hour for a long chat."""
    start = time.process_time()
    prompt = "A system message." + "\n\nHuman: a\n\nAssistant: b" * 40_000 + "\n\nHuman: c\n\nAssistant:"
    ids = encode_prompt(enc, prompt, 99)
    assert time.process_time() - start < 10
    assert len(ids) <= 99 and enc.decode(ids[1:]).startswith("\n\nHuman: a") and prompt.endswith(enc.decode(ids[1:]))


def test_a_turn_that_is_too_long_loses_its_beginning(enc):
    """A prompt without any words because its only turn does not fit, or without its last word, the reply's mark."""
    ids = encode_prompt(enc, "\n\nHuman: " + "word " * 50 + "\n\nAssistant:", 20)
    assert len(ids) == 20 and enc.decode(ids).endswith("word \n\nAssistant:")


# ---- files -----------------------------------------------------------------------------------------------------------

GOOD = b'{"prompt": "the film", "completion": " was good"}\n'
COMPLETION = {"prompt": str, "completion": str}
RANKING = {"prompt": str, "responses": list}
PAIR = {"prompt": str, "chosen": str, "rejected": str}


def file_with(folder, content):
    path = folder / "file.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", [GOOD, GOOD.strip(), b"\n" + GOOD + b"\n  \n", b"\xef\xbb\xbf" + GOOD,
                                     GOOD.replace(b"\n", b"\r\n") + b"\r\n", GOOD.replace(b"{", b'{"more": 1, ')])
def test_accepted_files(tmp_path, content):
    """A refusal of what editors leave behind: blank lines, a byte-order mark, CRLF, no last newline, more fields."""
    (row,) = read_jsonl(file_with(tmp_path, content), COMPLETION)
    assert (row["prompt"], row["completion"]) == ("the film", " was good")


@pytest.mark.parametrize("content, fields, problem", [
    pytest.param(GOOD[:30], COMPLETION, "not JSON", id="cut last line"),
    pytest.param(b'{"prompt": "a\0b", "completion": "c"}', COMPLETION, "not JSON", id="raw NUL"),
    pytest.param(rb'{"prompt": "a\u0000b", "completion": "c"}', COMPLETION, "prompt: holds a NUL", id="escaped NUL"),
    pytest.param(rb'{"prompt": "a\ud83d", "completion": "c"}', COMPLETION, "prompt: holds a NUL", id="lone surrogate"),
    pytest.param(b'{"prompt": "a", "prompt": "b", "completion": "c"}', COMPLETION, "twice", id="duplicate key"),
    pytest.param(b'{"prompt": "a", "completion": "c", "score": NaN}', COMPLETION, "NaN", id="NaN"),
    pytest.param(b'["a", "b"]', COMPLETION, "expected an object .* found list", id="list"),
    pytest.param(b'"a"', COMPLETION, "expected an object .* found str", id="string"),
    pytest.param(b"[" * 200_000, COMPLETION, "not JSON", id="deep nesting"),
    pytest.param(b'{"prompt": "a", "score": ' + b"9" * 5000 + b"}", COMPLETION, "", id="long number"),
    pytest.param(b'{"prompt": "a"}', COMPLETION, r"completion: missing \(found: prompt\)", id="missing field"),
    pytest.param(b"{}", COMPLETION, r"prompt: missing \(found: nothing\)", id="no field"),
    pytest.param(b'{"prompt": "a", "completion": 3}', COMPLETION, "expected str, found int", id="wrong type"),
    pytest.param(b'{"prompt": null, "completion": "c"}', COMPLETION, "prompt: expected str, found NoneType", id="null"),
    pytest.param(b'{"prompt": "a", "completion": ""}', COMPLETION, "completion: empty", id="empty response"),
    pytest.param(b'{"prompt": "a", "completion": " \\n "}', COMPLETION, "completion: empty", id="white space"),
    pytest.param(b'{"prompt": "a", "chosen": "b", "rejected": "b"}', PAIR, "chosen: the same as", id="equal pair"),
    pytest.param(b'{"prompt": "a", "responses": ["b"]}', RANKING, "responses: 1 of them", id="one response"),
    pytest.param(b'{"prompt": "a", "responses": []}', RANKING, "responses: 0 of them", id="no response"),
    pytest.param(b'{"prompt": "a", "responses": ["b", "c", "b"]}', RANKING, "responses: .* twice", id="same twice"),
    pytest.param(b'{"prompt": "a", "responses": ["b", " "]}', RANKING, "responses: empty", id="empty among them"),
    pytest.param(b'{"prompt": "a", "responses": ["b", 4]}', RANKING, "expected text, found int", id="not text"),
    pytest.param(b'{"prompt": "a", "responses": "bc"}', RANKING, "expected list, found str", id="not a list"),
    pytest.param(b"<!DOCTYPE html>", COMPLETION, "not JSON", id="HTML"),
    pytest.param(b"version https://git-lfs.github.com/spec/v1", COMPLETION, "not JSON", id="LFS pointer"),
])
def test_bad_lines_are_named(tmp_path, content, fields, problem):
    """A traceback, or a line without its number, for what people really have in their files."""
    path = file_with(tmp_path, b"\n" + content + b"\n")
    with pytest.raises(UserError, match=rf"file\.jsonl:2: .*{problem}") as error:
        read_jsonl(path, fields)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("content, problem", [
    pytest.param(b"", "empty", id="empty"),
    pytest.param(b"\n \n\n", "empty", id="blank lines only"),
    pytest.param('{"prompt": "café"}\n'.encode("latin-1"), "not UTF-8 text at byte 15", id="latin-1"),
    pytest.param('{"prompt": "café"}\n'.encode("utf-16"), "UTF-16", id="UTF-16"),
    pytest.param('{"prompt": "cafe"}\n'.encode("utf-16-le"), ": UTF-16", id="UTF-16 without a mark"),
    pytest.param('{"prompt": "cafe"}\n'.encode("utf-16-be"), ": UTF-16", id="UTF-16, the other bytes first"),
    pytest.param(b"\xfe\xff" + '{"prompt": "cafe"}\n'.encode("utf-16-be"), ": UTF-16", id="UTF-16, with a mark"),
    pytest.param(gzip.compress(GOOD), "compressed by gzip", id="gzip"),
    pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", id="LFS pointer"),
    pytest.param(b"<!DOCTYPE html>\n<html>", "HTML", id="HTML"),
    pytest.param(b"PAR1\x15\x04\x15\xff\xfe", "a Parquet file", id="parquet"),
])
def test_bad_files_are_named(tmp_path, content, problem):
    """A decoding error as a traceback, for a file that is no JSONL at all."""
    with pytest.raises(UserError, match=rf"file\.jsonl.*{problem}"):
        read_jsonl(file_with(tmp_path, content), COMPLETION)


def test_no_file(tmp_path):
    """A directory or a missing file as a traceback, or a pipe that is waited for without end."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, problem in ((tmp_path, "a folder"), (tmp_path / "nowhere.jsonl", "no such file"),
                          (tmp_path / "pipe.jsonl", "not a plain file")):
        with pytest.raises(UserError, match=f"{path.name}: {problem}"):
            read_jsonl(path, COMPLETION)


def test_all_bad_lines_are_counted(tmp_path):
    """A person who mends one line per run: the first five are shown, and the rest is counted."""
    path = file_with(tmp_path, (GOOD + b"{}\n") * 7)
    with pytest.raises(UserError) as error:
        read_jsonl(path, COMPLETION)
    shown = [number for number in range(1, 15) if f"file.jsonl:{number}:" in str(error.value)]
    assert shown == [2, 4, 6, 8, 10] and "2 more bad lines" in str(error.value)


def test_rows_survive_writing(tmp_path):
    """Text changed by escapes, line separators inside a text that split a row, or a temporary file left behind."""
    rows = [{"prompt": "", "completion": "a\nb\r\n\u2028\u0085 \"c\" \\ 🎬 é"}, {"prompt": END, "completion": " x"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl", COMPLETION) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rankings_and_pairs(tmp_path):
    """Pairs in the format of other tools read with the rejected text first, or refused."""
    pair, ranking = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "responses": ["b", "c", "d"]}
    for name, row, expected in (("pairs", pair, ["b", "c"]), ("rankings", ranking, ["b", "c", "d"])):
        write_jsonl(tmp_path / name, [row])
        assert read_rankings(tmp_path / name)[0]["responses"] == expected
    write_jsonl(tmp_path / "bad", [pair, {**pair, "rejected": "b"}])
    with pytest.raises(UserError, match="bad:2: chosen: the same as rejected"):
        read_rankings(tmp_path / "bad")


# ---- tokens and batches ----------------------------------------------------------------------------------------------


def test_padding_and_masks():
    """Padding on the wrong side, or a mask that takes the real end of text for padding."""
    tokens, pad = pad_prompts([[9, 1, 2], [9], [9, 3]], 9)
    assert tokens.tolist() == [[9, 1, 2], [9, 9, 9], [9, 9, 3]] and pad.tolist() == [0, 2, 1]
    tokens, mask = pad_responses([[1, 9], [9], [2, 3, 4]], 9)
    assert tokens.tolist() == [[1, 9, 9], [9, 9, 9], [2, 3, 4]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]] and mask.dtype == torch.float32
    assert length_mask(torch.tensor([0, 2]), 2).tolist() == [[0, 0], [1, 1]]


def test_batches_hold_every_row_once():
    """Rows lost or repeated at the end of an epoch, an order that depends on more than the seed, or none at all."""
    rng = random.Random(0)
    lengths = [rng.randrange(1, 40) for _ in range(1003)]
    made = batches(lengths, 8, 1, 0)
    assert sorted(row for batch in made for row in batch) == list(range(1003))
    assert sorted(map(len, made)) == [3] + [8] * 125
    assert made == batches(lengths, 8, 1, 0) != batches(lengths, 8, 1, 1) and made != batches(lengths, 8, 2, 0)
    assert batches([5] * 4, 99, 1) and sorted(batches([5] * 4, 99, 1)[0]) == [0, 1, 2, 3]


def test_batches_hold_rows_of_similar_length():
    """Batches that are mostly padding, or batches sorted from short to long, which training would notice."""
    lengths = [1 + i % 40 for i in range(2048)]
    longest = [max(lengths[row] for row in batch) for batch in batches(lengths, 16, 3)]
    padding = sum(top * 16 for top in longest) / sum(lengths) - 1
    assert padding < 0.2
    assert longest != sorted(longest) and abs(sum(longest[:64]) / 64 - sum(longest[64:]) / 64) < 8


def test_generator_depends_on_the_whole_key():
    """Epochs of two runs that share their order because the key is a sum."""
    keys = [(1,), (2,), (1, 0), (0, 1), (1, 1), (1, 2), (2, 1), (1, 0, 0)]
    drawn = {tuple(torch.randint(2**31, (4,), generator=common.generator(*key)).tolist()) for key in keys}
    assert len(drawn) == len(keys)


# ---- the command line ------------------------------------------------------------------------------------------------

SCRIPTS = pytest.mark.parametrize("script", [data, gpt2, hh, own, sft, reward, ppo, dpo, evaluate, report, study,
                                             export],
                                  ids=lambda script: script.__name__)


def test_default_preset_flag():
    """A preset that overrides a flag, a default that overrides a preset, or "false" that is read as true."""
    presets = {"fast": {"lr": 0.5, "epochs": 9}}
    assert common.load_config(ppo.Config, presets, []) == ppo.Config()
    assert common.load_config(ppo.Config, presets, ["--preset", "fast"]) == ppo.Config(lr=0.5, epochs=9)
    flags = ["--epochs", "2", "--kl-coef", "0", "--whiten-rewards", "true", "--no-end-score", "-3"]
    expected = ppo.Config(lr=0.5, epochs=2, kl_coef=0.0, whiten_rewards=True, no_end_score=-3.0)
    assert common.load_config(ppo.Config, presets, ["--preset", "fast", *flags]) == expected
    on = {"on": {"whiten_rewards": True}}
    assert common.load_config(ppo.Config, on, ["--preset", "on", "--whiten-rewards", "false"]) == ppo.Config()
    for alone in (["--whiten-rewards"], ["--whiten-rewards", "--seed", "1"], ["--seed", "1", "--whiten-rewards"]):
        assert common.load_config(ppo.Config, {}, alone) == ppo.Config(whiten_rewards=True)


@pytest.mark.parametrize("flags", [["--learning-rate", "1"], ["--see", "1"], ["--preset", "none"], ["--epochs", "two"],
                                   ["--whiten-rewards", "1"], ["stray"]])
def test_unknown_flags_stop(flags, capsys):
    """A typing error that runs for hours with the default; an abbreviation that means something else next year."""
    with pytest.raises(UserError, match=flags[0].strip("-")) as stop:
        common.load_config(ppo.Config, ppo.PRESETS, flags)
    assert stop.value.code == 2 and "\n" not in str(stop.value) and capsys.readouterr() == ("", "")


@SCRIPTS
def test_every_flag_has_its_help(script, capsys):
    """A knob without an explanation, or an explanation cut off or given to another knob."""
    with pytest.raises(SystemExit) as stop:
        common.load_config(script.Config, getattr(script, "PRESETS", {}), ["--help"])
    text = "".join(capsys.readouterr().out.split())  # it is wrapped, at hyphens too
    assert stop.value.code == 0
    for line in open(script.__file__).read().split("class Config:")[1].split("\n\n")[0].splitlines()[1:]:
        name, comment = line.split(":")[0].strip(), line.partition("  # ")[2]
        assert comment, f"{name} has no comment"
        value = "[X]" if isinstance(getattr(script.Config(), name), bool) else "X"  # true may be left out
        assert f"--{name.replace('_', '-')} {value} {comment} (default:".replace(" ", "") in text


@SCRIPTS
def test_presets_name_real_flags(script):
    """A preset that names a knob which no longer exists."""
    for name, values in getattr(script, "PRESETS", {}).items():
        config = script.Config(**values)
        assert all(type(getattr(config, key)) is type(getattr(script.Config(), key)) for key in values), name


def test_write_atomic_leaves_the_old_file(tmp_path):
    """A half-written file in place of the old one when the disk is full."""
    path = tmp_path / "file"
    path.write_text("old")

    def full(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="No space left"):
        checkpoint.write_atomic(path, full)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_models_of_one_run_share_a_vocabulary(tmp_path):
    """Ids of one vocabulary scored by a model of another, or a traceback for a folder that is not there."""
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.tiktoken").write_text(content)
    data.check_same_vocab(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="do not share a vocabulary"):
        data.check_same_vocab(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    with pytest.raises(UserError, match="no checkpoint here"):
        data.check_same_vocab(tmp_path / "a", tmp_path / "nowhere")
