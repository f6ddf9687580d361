"""Each script reads its files through the one reader (see test_data.py): a bad line ends it, and nothing is written."""
import contextlib
import gzip
import importlib
import io
import json
import re
import shutil
import sys

import pytest

import common
import data
import stages
from common import UserError

LABELER, SFT = {"labeler": "reward", "samples": "samples"}, {"model": "sft", "train": "demos", "valid": "demos"}
BASE = {"vocab": "vocab", "block_size": 32, "pack": 16, "train": "texts", "valid": "texts"}
REWARD = {"model": "sft", "sft": "sft", "prompts": "prompts", "train": "rankings", "test": "rankings", "pairs": "pairs",
          "response_tokens": 6}
EVALUATE = {"sft": "sft", "policies": "policy", "reward": "reward", "judge": "reward", "labeler": "", "text": "texts",
            "prompts": "prompts", "others": "rankings", "response_tokens": 6}
# Script, its flags (names of what stages.make_inputs and the fixture below make), and the flag whose file is bad.
CASES = [("sft", SFT, "train"), ("sft", SFT, "valid"), ("sft", BASE, "train"), ("sft", BASE, "valid"),
         *(("reward", REWARD, flag) for flag in ("train", "test", "prompts", "pairs")),
         ("dpo", {"model": "sft", "train": "rankings", "test": "pairs"}, "train"),
         ("ppo", {"sft": "sft", "reward": "reward", "prompts": "prompts", "response_tokens": 6}, "prompts"),
         ("label sample", {"model": "sft", "prompts": "prompts", "response_tokens": 6}, "prompts"),
         ("label rank", {**LABELER, "noise": 0.0}, "samples"),
         ("label rank", {**LABELER, "calibrate": "rankings"}, "calibrate"),
         *(("evaluate", EVALUATE, flag) for flag in ("prompts", "others", "text"))]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    inputs = stages.make_inputs(tmp_path_factory.mktemp("inputs"))
    (inputs / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (inputs / "samples.jsonl").write_text('{"id": "a", "prompt": "b", "responses": ["c", "d"]}\n')
    shutil.copytree(inputs / "sft", inputs / "policy")
    return inputs


def run(script, flags, inputs):
    """Run a script, or a step of one, on these flags."""
    name, _, step = script.partition(" ")
    module = importlib.import_module(name)
    main, Config = module.STEPS[step][:2] if step else (module.main, module.Config)
    common.run(main, Config, argv=stages.arguments({"device": "cpu", **flags}, inputs))


@pytest.mark.parametrize("script, flags, bad", [*CASES, ("sample", {"model": "reward"}, "")])
def test_a_bad_line_ends_the_script(inputs, tmp_path, monkeypatch, capsys, script, flags, bad):
    """A traceback, a message without file and line, or an output folder for a run that cannot begin."""
    expected = f"{inputs}/reward: this is a checkpoint of kind reward, expected lm"
    if bad:
        lines = (inputs / f"{flags[bad]}.jsonl").read_text().splitlines()
        (tmp_path / "bad.jsonl").write_text(f'{lines[0]}\n{{"prompt": 7}}\n')
        flags = {**flags, bad: tmp_path / "bad.jsonl", "out": tmp_path / "out"}
        expected = rf"{tmp_path}/bad.jsonl:2: (id|prompt|text): [^;]+"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as stop:
        run(script, flags, inputs)
    assert stop.value.code == 2 and re.fullmatch(f"error: {expected}\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, more", [
    ("reward", {}), ("label sample", {}), ("ppo", {"episodes": 2, "iterations": 1}),
    ("evaluate", {"best_of": 0, "others": ""})])
def test_truncated_prompts_are_told(inputs, tmp_path, capsys, script, more):
    """Prompts that lose their beginning before a response is sampled, or end in its space, and nobody is told."""
    flags = next(flags for name, flags, _ in CASES if name == script)
    (tmp_path / "long.jsonl").write_text("".join(f'{{"prompt": "{i} {"x" * i * 20}"}}\n' for i in range(4)))
    with contextlib.suppress(SystemExit):  # a random model may not say enough to go on
        run(script, {**flags, **more, "prompts": tmp_path / "long.jsonl", "out": tmp_path / "out"}, inputs)
    out = capsys.readouterr().out
    assert re.search(r"^2 of \d+ prompts are truncated$", out, re.MULTILINE)
    assert ("1 of 4 prompts end in a space" in out) == (script == "label sample")


@pytest.mark.parametrize("typed", [b"the film\r\nso \r\n", b"\xef\xbb\xbfthe film\nso \n", b"the film\nso "])
def test_prompts_from_standard_input(inputs, monkeypatch, capsys, typed):
    """A carriage return or a byte-order mark that becomes a token; a space at the end that nobody is told of."""
    printed = []
    for content in (b"the film\nso \n", typed):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", newline="\n"))
        run("sample", {"model": "sft", "response_tokens": 4, "count": 1}, inputs)
        printed.append(capsys.readouterr())
    assert printed[0] == printed[1] and printed[0].err.count("ends in a space") == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("caf\xe9".encode("latin-1")), encoding="utf-8"))
    with pytest.raises(SystemExit):
        run("sample", {"model": "sft"}, inputs)
    assert "not text in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("write", [
    lambda text: text.replace("\n", "\r\n").encode(), lambda text: text.encode("utf-8-sig"),
    lambda text: f"\n{text.rstrip()}".encode(), lambda text: gzip.compress(text.encode())])
def test_files_of_other_systems(tmp_path, write):
    """A row lost, or a character that is no part of the text, in a file from Windows, packed, or cut off cleanly."""
    rows = [{"prompt": "café", "completion": " a\u2028b\x85"}, {"prompt": "x\r\n", "completion": " 🎬"}]
    path = tmp_path / ("a.gz" if write("").startswith(b"\x1f\x8b") else "a.jsonl")
    path.write_bytes(write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)))
    assert data.read_jsonl(path, {"prompt": str, "completion": str}) == rows


@pytest.mark.parametrize("content", ['{\n "model": 1}', "#version: 0.2\na b\n", ""])
def test_what_is_no_vocabulary_is_named(tmp_path, content):
    """A traceback for the natural mistake: tokenizer.json or merges.txt in place of tiktoken's format."""
    (tmp_path / "x").write_text(content)
    with pytest.raises(UserError, match="x: not a vocabulary"):
        data.load_tokenizer(tmp_path / "x")


def test_a_comma_in_a_name_is_no_border(tmp_path):
    """The command that another script prints for this very file, and that cannot be pasted."""
    files = [tmp_path / name for name in ("a,b", "c")]
    for file in files:
        file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert len(data.read_rankings(str(files[0]))) == 1 and len(data.read_rankings(f"{files[1]},{files[1]}")) == 2
