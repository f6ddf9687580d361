"""The tokenizer, truncation, files as people have them, padding, batches, and the command line."""
import resource
from collections import Counter

import pytest
import torch

import common
import data
import evaluate
import ppo
from common import UserError, load_config
from conftest import SENTENCES, log_of
from data import (END, batches, encode_prompt, encode_texts, length_mask, load_tokenizer, pad_prompts, pad_responses,
                  prompt_limit, read_jsonl, read_rankings)
from reward import encode_rankings


@pytest.fixture(scope="module")
def enc(checkpoints):
    return load_tokenizer(checkpoints.vocab)


@pytest.mark.parametrize("text", ["", " the  film \n\n was\tgood ", "naïve café 電影 🎬👍🏽 ﷽", "\0\x7f\ufeff\u2028",
                                  "''don't''...!?", "1234567890", f"a {END}{END} <|im_end|>", "\U0010ffff", "a" * 1000])
def test_any_text_round_trips(enc, text):
    """A byte without a token, text changed on the way, or a literal "<|endoftext|>" that becomes the special id."""
    ids = enc.encode_ordinary(text)
    assert enc.decode(ids) == text
    assert enc.end not in ids and enc.end == enc.n_vocab - 1 == 269 and all(0 <= i < 269 for i in ids)


def test_text_split_before_a_space_keeps_its_tokens(enc):
    """Prompt and response with other tokens than the whole text had in training: words break at the border."""
    for text in SENTENCES + ["it's 12345 o'clock, isn't it? the film 'was' good... (really) ¡sí!", "a - b -- c 4.5 $6"]:
        for place in (i for i, character in enumerate(text) if character == " "):
            parts = enc.encode_ordinary(text[:place]) + enc.encode_ordinary(text[place:])
            assert parts == enc.encode_ordinary(text), text[:place]


def test_encode_prompt_and_prompt_limit(enc):
    """A prompt that loses its last words, or of EOS alone; with its response, one token more than the block has."""
    assert encode_prompt(enc, "", 8) == [269] and encode_prompt(enc, "xyz", 1) == [269]
    assert enc.decode(encode_prompt(enc, "xyzw", 3)) == END + "zw"
    assert enc.decode(encode_prompt(enc, "xyzw", 5)) == END + "xyzw"
    assert prompt_limit(32, 8) == 24 and prompt_limit(32, 30) == 2
    with pytest.raises(UserError, match="--response-tokens 31.* no room .* block size 32"):
        prompt_limit(32, 31)


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


def test_a_long_turn_keeps_the_marks_of_its_chat_format():
    """A question that is longer than the context, and reaches the model without a word that it is a user's turn."""
    marks = {END: 256, "<|im_start|>": 257, "<|im_end|>": 258}
    enc = data.Tokenizer({bytes([i]): i for i in range(256)}, {"pattern": data.PATTERN, "special": marks, "end": 256,
                         "chat": {"format": "chatml", "end": 258, "begin": 256}}, True)
    turns = [{"role": "system", "content": "Hm."}, {"role": "user", "content": "one"},
             {"role": "assistant", "content": "two"}, {"role": "user", "content": "abcdefghij" * 9}]
    head = f"{END}<|im_start|>system\nHm.<|im_end|>\n<|im_start|>user\n"
    for limit in (70, 110):
        ids = encode_prompt(enc, turns, limit, counts := Counter())
        text = enc.decode(ids)
        assert len(ids) == limit and counts["prompts truncated"] == 1
        assert text.startswith(head) and text.endswith("hij<|im_end|>\n<|im_start|>assistant\n")
    assert enc.decode(encode_prompt(enc, turns, 20)).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert len(encode_prompt(enc, [turns[1]], 12)) == len(encode_prompt(enc, "\n\nAssistant: abcdefghij", 12)) == 12


@pytest.mark.parametrize("block, prompt, responses, kept, prompts_truncated, responses_truncated", [
    (16, 3, [2, 4], 3, 0, 0),     # letters, one token each
    (16, 10, [2, 4], 10, 0, 0),   # to the last token: 1 + 10 and 4 + 1
    (16, 11, [2, 4], 10, 1, 0),   # the prompt keeps what the longest response leaves
    (16, 30, [2, 7], 7, 1, 0),
    (16, 30, [2, 8], 7, 1, 1),    # never less than half of the block
    (16, 3, [20, 30], 3, 0, 2),   # a short prompt leaves the responses more than half
    (64, 40, [1, 22], 40, 0, 0)])  # the first word, which may decide, stays while the responses are short
def test_what_encode_texts_truncates(enc, block, prompt, responses, kept, prompts_truncated, responses_truncated):
    """A prompt under half of the block, another for each response, EOS behind a truncated response, a wrong count."""
    counts, texts, prompt = Counter(), ["y" * n for n in responses], "z" + "x" * (prompt - 1)
    ids, encoded = encode_texts(enc, prompt, texts, block, counts)
    assert enc.decode(ids) == END + prompt[-kept:]
    assert [enc.decode(text) for text in encoded] == [
        text + END if 1 + kept + len(text) < block else text[:block - 1 - kept] for text in texts]
    assert counts == {"prompts": 1, "prompts truncated": prompts_truncated, "responses": 2,
                      "responses truncated": responses_truncated}
    (ranking,) = encode_rankings(enc, [{"prompt": prompt, "responses": texts}], block, counts)
    assert ranking == [ids + text for text in encoded] and counts["prompts"] == 2


def test_what_is_truncated_is_reported(tmp_path, capsys):
    """A model that never learns to stop, and nobody was told why."""
    for truncated, told in ((0, ""), (60, "60 of 90 responses are truncated: they have no EOS")):
        data.report_truncated(Counter({"responses": 90, "responses truncated": truncated}), common.Log(tmp_path))
        assert told in capsys.readouterr().out and (tmp_path / "log.jsonl").exists() == bool(told)
    assert log_of(tmp_path) == [{"truncated": {"prompts": 0, "responses": 60, "of": 90}}]


GOOD = b'{"prompt": "the film", "completion": " was good"}\n'


@pytest.mark.parametrize("content, problem", [
    (None, ": no such file"), (b"\n \n\n", ": empty"),
    (GOOD * 900 + b'{"prompt": "caf\xe9"}\n', ":901: .utf-8. codec can.t decode"),
    (GOOD[:30], ":1: not JSON"), (b'["a", "b"]', ":1: expected an object .* found list"),
    (b'{"prompt": "a"}', ":1: completion: "), (b'{"prompt": "a", "completion": 3}', ":1: completion: expected str"),
    (b'{"prompt": "a", "completion": " \\n "}', ":1: completion: empty"),
    (rb'{"prompt": "a\ud83d", "completion": "c"}', ":1: prompt: holds a NUL or half a surrogate"),
    (b'\n{"prompt": "a", "chosen": "b", "rejected": "b"}', ":2: chosen: the same as rejected"),
    (b'{"prompt": "a", "responses": ["b"]}', ":1: responses: a ranking needs two"),
    (b'{"prompt": "a", "responses": ["b", "c", "b"]}', ":1: responses: .* different"),
    (b'{"prompt": "a", "responses": ["b", 4]}', ":1: responses: expected text, found int"),
    (GOOD + b'{"a": 1, "b": 2}', ":2: prompt: expected str, found no such field among"),
])
def test_bad_input_is_named(tmp_path, content, problem):
    """A traceback, a line without its number, or one message per run, for what people have in their files."""
    path = tmp_path / "file.jsonl"
    if content is not None:
        path.write_bytes(content)
    pairs = content and (b"chosen" in content or b"responses" in content)
    with pytest.raises(UserError, match=rf"file\.jsonl{problem}") as error:
        read_rankings(path) if pairs else read_jsonl(path, {"prompt": str, "completion": str})
    assert error.value.code == 2 and "\n" not in str(error.value)


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
    lengths = [1 + i * i % 39 for i in range(1003)]
    made = batches(lengths, 8, 1, 0)
    assert sorted(row for batch in made for row in batch) == list(range(1003))
    assert sorted(map(len, made)) == [3] + [8] * 125
    assert made == batches(lengths, 8, 1, 0) != batches(lengths, 8, 1, 1) and made != batches(lengths, 8, 2, 0)
    lengths = [1 + i % 40 for i in range(2048)]
    longest = [max(lengths[row] for row in batch) for batch in batches(lengths, 16, 3)]
    assert sum(top * 16 for top in longest) / sum(lengths) < 1.2
    assert longest != sorted(longest) and abs(sum(longest[:64]) / 64 - sum(longest[64:]) / 64) < 8


@pytest.mark.parametrize("flags, expected", [
    ("", {}), ("--lr 0 --kl-coef 0 --missing-eos-score -2 --seed -3",
               {"lr": 0.0, "kl_coef": 0.0, "missing_eos_score": -2.0, "seed": -3}),
    ("--whiten-rewards --seed 2", {"whiten_rewards": True, "seed": 2}),
    ("--preset fast", {"lr": 0.5, "epochs": 9, "whiten_rewards": True}),
    ("--preset fast --epochs 2 --whiten-rewards false", {"lr": 0.5, "epochs": 2})])
def test_flags_go_before_the_preset_and_that_before_defaults(flags, expected):
    """A preset that overrides a flag, "false" that is read as true, a 0 or a minus that makes sense but is refused."""
    presets = {"fast": {"lr": 0.5, "epochs": 9, "whiten_rewards": True}}
    assert load_config(ppo.Config, presets, flags.split()) == ppo.Config(**expected)
    assert load_config(evaluate.Config, {}, ["--best-of", "0"]).best_of == 0  # a count, but its help says what 0 does


@pytest.mark.parametrize("flags", ["--learning-rate 1", "--see 1", "--preset none", "--epochs two", "stray",
                                   "--whiten-rewards 2", "--epochs 0", "--epochs -1", "--lr -0.1", "--lr nan",
                                   "--lr inf", "--kl-ceiling -1"])
def test_flags_that_make_no_sense_stop(flags, capsys):
    """A typing error that runs for hours with the default; an abbreviation; a number that trains nothing, or to NaN."""
    with pytest.raises(UserError, match=flags.split()[0].strip("-")) as stop:
        load_config(ppo.Config, ppo.PRESETS, flags.split())
    assert stop.value.code == 2 and "\n" not in str(stop.value) and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("content", ["x" * 9999, lambda file: torch.save(torch.zeros(9999), file)])
def test_a_full_disk_leaves_what_was_there(tmp_path, content):
    """A traceback, the old file gone or half overwritten, or a .tmp that takes the last room there is."""
    path, limits = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    common.write_atomic(path, "old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(UserError, match="file: cannot be written: ") as stop:
            common.write_atomic(path, content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == 1 and "\n" not in str(stop.value)
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_transcript_may_begin_without_empty_lines():
    """A user's first turn that becomes the system message, as the file was stripped."""
    turns = data.turns_of(f"{data.TURN} a{data.REPLY} b{data.TURN} c{data.REPLY}")
    assert [turn["content"] for turn in turns] == ["a", "b", "c", ""] and turns[0]["role"] == "user"
    assert data.turns_of(f"Human: a{data.REPLY} b{data.TURN} c{data.REPLY}") == turns
    assert data.turns_of(f"Be brief.{data.TURN} a{data.REPLY}")[0] == {"role": "system", "content": "Be brief."}
