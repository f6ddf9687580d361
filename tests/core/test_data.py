"""The tokenizer against a slow one, truncation, files as people have them, padding, batches, and the command line."""
import random
from collections import Counter

import pytest
import regex
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
from prepare.reviews import train_bpe


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


# ---- truncation ------------------------------------------------------------------------------------------------------


def test_encode_prompt(enc):
    """A prompt that loses its last words, an empty prompt of no tokens, or a turn without its last word, the mark."""
    assert encode_prompt(enc, "", 8) == [269] and encode_prompt(enc, "xyz", 1) == [269]
    assert enc.decode(encode_prompt(enc, "xyzw", 3)) == END + "zw"
    assert enc.decode(encode_prompt(enc, "xyzw", 5)) == END + "xyzw"
    ids = encode_prompt(enc, "\n\nHuman: " + "word " * 50 + "\n\nAssistant:", 20)
    assert len(ids) == 20 and enc.decode(ids).endswith("word \n\nAssistant:")


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
    """A prompt shorter than the block allows or under half of it, another prompt for each response of a ranking, EOS
    behind a truncated response, or a truncation that is not counted."""
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
    assert ("60 of 60 responses are truncated: they have no EOS, and the model will not learn to stop"
            in capsys.readouterr().out)
    assert log_of(tmp_path) == [{"truncated": {"prompts": 0, "responses": 60, "of": 60}}]


def test_prompt_limit():
    """A prompt and a response that together are one token too long, or a prompt of EOS alone."""
    assert prompt_limit(32, 8) == 24 and prompt_limit(32, 30) == 2
    with pytest.raises(UserError, match="--response-tokens 31 leaves no room for a prompt in block size 32"):
        prompt_limit(32, 31)


# ---- files -----------------------------------------------------------------------------------------------------------

GOOD = b'{"prompt": "the film", "completion": " was good"}\n'
COMPLETION = {"prompt": str, "completion": str}
RANKING, PAIR = {"prompt": str, "responses": list}, {"prompt": str, "chosen": str, "rejected": str}


@pytest.mark.parametrize("content", [GOOD.strip(), b"\n" + GOOD + b"\n  \n", b"\xef\xbb\xbf" + GOOD,
                                     GOOD.replace(b"\n", b"\r\n") + b"\r\n", GOOD.replace(b"{", b'{"more": 1, ')])
def test_accepted_files(tmp_path, content):
    """A refusal of what editors leave behind: blank lines, a byte-order mark, CRLF, no last newline, more fields."""
    (tmp_path / "file.jsonl").write_bytes(content)
    (row,) = read_jsonl(tmp_path / "file.jsonl", COMPLETION)
    assert (row["prompt"], row["completion"]) == ("the film", " was good")


@pytest.mark.parametrize("content, fields, problem", [
    pytest.param(None, COMPLETION, ": no such file", id="missing file"),
    pytest.param(b"\n \n\n", COMPLETION, ": empty", id="empty file"),
    pytest.param('{"prompt": "café"}\n'.encode("latin-1"), COMPLETION, ": not UTF-8 text", id="not UTF-8"),
    pytest.param(GOOD[:30], COMPLETION, ":1: not JSON", id="not JSON"),
    pytest.param(b'["a", "b"]', COMPLETION, ":1: expected an object .* found list", id="not an object"),
    pytest.param(b'{"prompt": "a"}', COMPLETION, ":1: completion: ", id="missing field"),
    pytest.param(b'{"prompt": "a", "completion": 3}', COMPLETION, ":1: completion: expected str, found int", id="type"),
    pytest.param(b'{"prompt": "a", "responses": ["b", 4]}', RANKING, ":1: responses: expected text, found int", id="4"),
    pytest.param(b'{"prompt": "a", "completion": " \\n "}', COMPLETION, ":1: completion: empty", id="empty response"),
    pytest.param(rb'{"prompt": "a\ud83d", "completion": "c"}', COMPLETION, ":1: prompt: holds a NUL", id="surrogate"),
    pytest.param(b'\n{"prompt": "a", "chosen": "b", "rejected": "b"}', PAIR, ":2: chosen: the same as", id="equal pair"),
    pytest.param(b'{"prompt": "a", "responses": ["b"]}', RANKING, ":1: responses: a ranking needs two", id="one response"),
    pytest.param(b'{"prompt": "a", "responses": ["b", "c", "b"]}', RANKING, ":1: responses: .* different", id="duplicate"),
])
def test_bad_input_is_named(tmp_path, content, fields, problem):
    """A traceback, or a line without its number, for what people have in their files."""
    path = tmp_path / "file.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"file\.jsonl{problem}") as error:
        read_jsonl(path, fields) if fields is COMPLETION else read_rankings(path)
    assert error.value.code == 2 and "\n" not in str(error.value)


def test_all_bad_lines_are_counted(tmp_path):
    """A person who mends one line per run: the first five are shown, and the rest is counted."""
    (tmp_path / "file.jsonl").write_bytes((GOOD + b"{}\n") * 7)
    with pytest.raises(UserError, match="2 more bad lines") as error:
        read_jsonl(tmp_path / "file.jsonl", COMPLETION)
    assert [n for n in range(1, 15) if f"file.jsonl:{n}:" in str(error.value)] == [2, 4, 6, 8, 10]


def test_rows_survive_writing(tmp_path):
    """Text changed by escapes, a line separator inside a text that splits a row, pairs read with the rejected first."""
    rows = [{"prompt": "", "completion": "a\nb\r\n\u2028\u0085 \"c\" \\ 🎬 é"}, {"prompt": END, "completion": " x"}]
    write_jsonl(tmp_path / "rows", rows)
    assert read_jsonl(tmp_path / "rows", COMPLETION) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
    for row in ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "responses": ["b", "c"]}):
        write_jsonl(tmp_path / "rows", [row])
        assert read_rankings(tmp_path / "rows")[0]["responses"] == ["b", "c"]


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_padding_and_masks():
    """Padding on the wrong side, or a mask that takes the real EOS for padding."""
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
    assert sorted(batches([5] * 4, 99, 1)[0]) == [0, 1, 2, 3]


def test_batches_hold_rows_of_similar_length():
    """Batches that are mostly padding, or batches sorted from short to long, which training would notice."""
    lengths = [1 + i % 40 for i in range(2048)]
    longest = [max(lengths[row] for row in batch) for batch in batches(lengths, 16, 3)]
    assert sum(top * 16 for top in longest) / sum(lengths) < 1.2
    assert longest != sorted(longest) and abs(sum(longest[:64]) / 64 - sum(longest[64:]) / 64) < 8


# ---- the command line ------------------------------------------------------------------------------------------------


def test_default_preset_flag():
    """A preset that overrides a flag, a default that overrides a preset, or "false" that is read as true."""
    presets = {"fast": {"lr": 0.5, "epochs": 9, "whiten_rewards": True}}
    flags = ["--preset", "fast", "--epochs", "2", "--kl-coef", "0", "--whiten-rewards", "false"]
    assert common.load_config(ppo.Config, presets, []) == ppo.Config()
    assert common.load_config(ppo.Config, presets, flags) == ppo.Config(lr=0.5, epochs=2, kl_coef=0.0)
    for alone in (["--whiten-rewards"], ["--whiten-rewards", "--seed", "1"], ["--seed", "1", "--whiten-rewards"]):
        assert common.load_config(ppo.Config, {}, alone) == ppo.Config(whiten_rewards=True)


@pytest.mark.parametrize("flags", [["--learning-rate", "1"], ["--see", "1"], ["--preset", "none"], ["--epochs", "two"],
                                   ["--whiten-rewards", "1"], ["stray"]])
def test_unknown_flags_stop(flags, capsys):
    """A typing error that runs for hours with the default; an abbreviation that means something else next year."""
    with pytest.raises(UserError, match=flags[0].strip("-")) as stop:
        common.load_config(ppo.Config, ppo.PRESETS, flags)
    assert stop.value.code == 2 and "\n" not in str(stop.value) and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("Config, presets", [(sft.Config, sft.PRESETS), (reward.Config, reward.PRESETS),
                                             (label.SampleConfig, label.PRESETS), (label.RankConfig, label.RANK_PRESETS),
                                             (dpo.Config, dpo.PRESETS), (ppo.Config, ppo.PRESETS),
                                             (evaluate.Config, evaluate.PRESETS), (sample.Config, {})])
def test_every_flag_has_its_help(Config, presets, capsys):
    """A flag without an explanation, or a preset that names a flag which no longer exists, or another type."""
    for values in presets.values():
        assert all(type(getattr(Config(**values), name)) is type(getattr(Config(), name)) for name in values)
    with pytest.raises(SystemExit):
        common.load_config(Config, presets, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not [name for name in vars(Config()) if regex.search(rf"--{name.replace('_', '-')} \[?X\]? \(default", text)]
