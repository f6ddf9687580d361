"""Bad input through the real scripts: one line that names the file or the flag, exit code 2, and nothing written.

What read_jsonl makes of a damaged file is test_data.py's. Here every script gets it, at every flag that names a file.
"""
import functools
import gzip
import inspect
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest

import agreement
import answers
import checkpoint
import data
import dpo
import evaluate
import label
import model as model_module
import person
import ppo
import reward
import rlaif
import runs
import sample
import sft
from common import run
from conftest import ppo_config
from model import GPT, GPTConfig, ScalarModel

TEXT = "the film was good and the plot was bad, but the actor was funny and sad"
NINE = range(9)  # rows of each good file
GOOD = {  # kind of file: (its rows, the field that is damaged)
    "texts": ([{"text": f"{TEXT} {i}"} for i in NINE], "text"),
    "demonstrations": ([{"prompt": f"the film {i}", "completion": " was good"} for i in NINE], "completion"),
    "rankings": ([{"prompt": f"the film {i}", "responses": [" good", " plain", " bad"]} for i in NINE], "responses"),
    "pairs": ([{"prompt": f"the film {i}", "chosen": " good", "rejected": " bad"} for i in NINE], "chosen"),
    "prompts": ([{"prompt": f"the film {i}"} for i in NINE], "prompt"),
    "samples": ([{"id": f"a{i}", "prompt": f"the film {i}", "responses": [" good", " bad"]} for i in NINE],
                "responses"),
    "answers": ([{"id": f"a{i}", "prompt": f"the film {i}", "labeler": "ann", "shown": [" good", " bad"],
                  "order": "2 1", "seconds": 1.5} for i in NINE], "shown"),
    "ratings": ([{"prompt": f"the film {i}", "responses": [" good", " bad"], "means": [1.5, i]} for i in NINE],
                "responses"),
}
SUMMARY = {"temperature": 0.5, "agreement": {}}  # stands beside the ratings
SCRIPTS = {  # name: its guard's arguments, and the flags of a tiny run in the names of good files
    "base": ((sft.main, sft.Config, sft.PRESETS), "--vocab {vocab} --train {texts} --test {texts} --n-layer 1 "
             "--n-head 2 --width 16 --block-size 32 --pack 32"),
    "sft": ((sft.main, sft.Config, sft.PRESETS), "--model {sft} --train {demonstrations} --test {demonstrations}"),
    "reward": ((reward.main, reward.Config, reward.PRESETS), "--model {sft} --train {rankings} --pairs {pairs} "
               "--sft {sft} --prompts {prompts} --samples 8 --response-tokens 8"),
    "ppo": ((ppo.main, ppo.Config, ppo.PRESETS), "--sft {sft} --reward {reward} --prompts {prompts} --iterations 1 "
            "--episodes 8 --response-tokens 8"),
    "dpo": ((dpo.main, dpo.Config, dpo.PRESETS), "--model {sft} --train {rankings}"),
    "label sample": ((label.sample, label.SampleConfig, label.PRESETS), "--model {sft} --prompts {prompts} "
                     "--response-tokens 8 --keep-cut true"),
    "label rank": ((label.rank, label.RankConfig), "--labeler {reward} --samples {samples} --calibrate {ratings}"),
    "label rank me": ((label.rank, label.RankConfig), "--labeler me --samples {samples}"),
    "label rank vader": ((label.rank, label.RankConfig), "--labeler vader --samples {samples} --pairs {pairs}"),
    "label merge": ((answers.merge, answers.MergeConfig), "--files {answers} --samples {samples}"),
    "label report": ((agreement.report, agreement.ReportConfig), "--files {answers}"),
    "evaluate": ((evaluate.main, evaluate.Config, evaluate.PRESETS), "--sft {sft} --policies {policy} --reward {reward}"
                 " --labeler {reward} --judge {reward} --prompts {prompts} --text {texts} --response-tokens 8 "
                 "--bootstrap 20 --best-of 3"),
    "sample": ((sample.main, sample.Config), "--model {sft} --reward {reward} --response-tokens 8"),
}
SEEDED = [name for name, (guard, _) in SCRIPTS.items() if hasattr(guard[1], "seed")]
READERS = [  # (script, flag, kind of file)
    ("base", "--train", "texts"), ("base", "--test", "texts"), ("sft", "--train", "demonstrations"),
    ("sft", "--test", "demonstrations"), ("reward", "--train", "rankings"), ("reward", "--train", "pairs"),
    ("reward", "--test", "rankings"), ("reward", "--pairs", "pairs"), ("reward", "--prompts", "prompts"),
    ("dpo", "--train", "rankings"), ("dpo", "--train", "pairs"), ("ppo", "--prompts", "prompts"),
    ("label sample", "--prompts", "prompts"), ("label rank", "--samples", "samples"),
    ("label rank", "--calibrate", "ratings"), ("label rank me", "--samples", "samples"),
    ("label rank vader", "--samples", "samples"), ("label rank vader", "--pairs", "pairs"),
    ("label merge", "--samples", "samples"), ("label merge", "--files", "answers"),
    ("label report", "--files", "answers"),
    ("evaluate", "--prompts", "prompts"), ("evaluate", "--others", "prompts"), ("evaluate", "--text", "texts")]
EVERY_READER = pytest.mark.parametrize("script, flag, kind", [pytest.param(*reader, id=" ".join(reader))
                                                              for reader in READERS])

# What costs most and is the same in every run: models and tokenizers (nothing is trained where these are used), and the
# source of a Config, of which its help is made. Loaded once.
LOADERS = {name: functools.cache(getattr(model_module, name)) for name in ("load_model", "load_trunk")}
LOADERS["load_tokenizer"] = functools.cache(data.load_tokenizer)
SOURCE = functools.cache(inspect.getsource)


class Accepted(Exception):
    """Raised where training or sampling would begin."""


class Hang(BaseException):
    """Raised when a script has taken five seconds (a whole run: sixty); no except clause of the code catches it."""


def lines(rows):
    """The content of a JSONL file, as bytes."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module")
def good(checkpoints, tmp_path_factory):
    """{name: path} of good files of every kind, and of checkpoints."""
    folder = tmp_path_factory.mktemp("good")
    for kind, (rows, _) in GOOD.items():
        (folder / f"{kind}.jsonl").write_bytes(lines(rows))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    shutil.copytree(checkpoints.sft, folder / "policy")  # evaluate.py wants another name than sft
    for name, kind in (("short_sft", GPT), ("short_reward", ScalarModel)):
        size = data.load_tokenizer(checkpoints.vocab).n_vocab
        short = kind(GPTConfig(size, block_size=16, n_layer=1, n_head=2, width=16))
        checkpoint.save_checkpoint(folder / name, short, ppo_config(), checkpoints.vocab)
    return {**vars(checkpoints), **{kind: folder / f"{kind}.jsonl" for kind in GOOD}, "folder": folder,
            **{name: folder / name for name in ("policy", "short_sft", "short_reward", "nowhere")}}


@pytest.fixture
def desk(good, tmp_path, monkeypatch, capsys):
    """desk.call(script, flag, ...): (exit code, 0 if the input is accepted; stderr). whole: the script runs to its end.

    desk.refused(script, flag, ...): stderr of a run that must end as bad input has to. desk.file(content): its path.
    """
    out, folder = tmp_path / "out", tmp_path / "in"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(SUMMARY))

    def accept(*_):
        raise Accepted

    def hang(*_):
        raise Hang

    def call(script, *flags, whole=False):
        guard, plain = SCRIPTS[script]
        flags = [*plain.format(**good).split(), *["--device=cpu", "--dtype=float32"] * hasattr(guard[1], "device"),
                 *map(str, flags)]
        flags += [f"--out={out}"] * (script != "sample")
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *flags])
            if not whole:
                patch.setattr(runs.Stage, "open", accept)
                patch.setattr(sample, "respond", accept)
                patch.setattr(person, "ask", accept)
                patch.setattr(rlaif, "vader", lambda: None)
                for module in (answers, agreement):
                    patch.setattr(module, "open_folder", accept)
                for module, name in itertools.product((sft, reward, dpo, ppo, label, evaluate, sample), LOADERS):
                    if hasattr(module, name):
                        patch.setattr(module, name, LOADERS[name])
            signal.setitimer(signal.ITIMER_REAL, 60 if whole else 5)
            try:
                run(*guard)
                code = 0
            except Accepted:
                code = 0
            except SystemExit as end:
                code = end.code
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        return code, capsys.readouterr().err

    def refused(script, *flags, whole=False):
        before = sorted(tmp_path.rglob("*"))
        code, err = call(script, *flags, whole=whole)
        check_refusal(code, err)
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return err

    def file(content):
        (folder / "file.jsonl").write_bytes(content)
        return folder / "file.jsonl"

    for module in (sft, reward, dpo, ppo):
        monkeypatch.setattr(module, "announce", lambda *_: None)  # measures this machine: a tenth of a second each time
    monkeypatch.setattr(inspect, "getsource", SOURCE)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and the disk is not what is tested
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}  # the guard sets its own
    handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, hang)
    yield SimpleNamespace(call=call, refused=refused, file=file, folder=folder, out=out)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def check_refusal(code, err):
    """Exit code 2 and one line on stderr, of which a terminal shows one line too."""
    assert code == 2 and err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1, (code, err)
    assert err[:-1].isprintable()


def check_outcome(desk, code, err):
    """The run has ended well, or was refused before anything was written."""
    assert code in (0, 2), err
    if code == 2:
        check_refusal(code, err)
        assert not desk.out.exists()


# ---- files -----------------------------------------------------------------------------------------------------------


def on_line(change):
    """A fault in the second line only."""
    def damage(content, _):
        first, second, rest = content.split(b"\n", 2)
        return b"\n".join([first, change(second), rest])
    return damage


def on_field(*value):
    """The field of the second line gets this value, or is lost if there is none. A text takes the first place in a list
    of texts."""
    def damage(content, field):
        first, second, rest = content.split(b"\n", 2)
        row = json.loads(second)
        old = row.pop(field)
        if value:
            row[field] = [*value, *old[1:]] if isinstance(old, list) and isinstance(*value, str) else value[0]
        return b"\n".join([first, json.dumps(row).encode(), rest])
    return damage


def before_fields(text):
    """More fields at the beginning of the second line."""
    return on_line(lambda line: line.replace(b"{", b"{" + text + b", ", 1))


FAULTS = {  # name: (content and field -> content, what the message says behind the name of the file)
    "empty": (lambda content, _: b"", ": empty"),
    "only blank lines": (lambda content, _: b"\n \r\n\n", ": empty"),
    "cut last line": (lambda content, _: content[:-4], ":9: not JSON"),
    "latin-1": (lambda content, _: content.replace(b"film 1", b"f\xeflm 1").replace(b"sad 1", b"s\xe2d 1"),
                ": not UTF-8 text at byte"),
    "UTF-16": (lambda content, _: content.decode().encode("utf-16"), ": UTF-16"),
    "UTF-16 without a mark": (lambda content, _: content.decode().encode("utf-16-le"), ": UTF-16"),
    "gzip": (lambda content, _: gzip.compress(content), ": compressed by gzip"),
    "zip": (lambda content, _: b"PK\3\4" + content, ": a zip archive"),
    "parquet": (lambda content, _: b"PAR1\x15\4\x15\xff" + content, ": a Parquet file"),
    "HTML": (lambda content, _: b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n", ": HTML"),
    "Git LFS": (lambda content, _: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", ": a Git LFS"),
    "no JSON": (on_line(lambda line: line.replace(b'"', b"'")), ":2: not JSON"),
    "raw NUL": (before_fields(b'"x": "\0"'), ":2: not JSON"),
    "two objects in a line": (on_line(lambda line: line + line), ":2: not JSON"),
    "a list": (on_line(lambda line: b"[" + line + b"]"), ":2: expected an object.*, found list"),
    "a string": (on_line(lambda line: b'"the film"'), ":2: expected an object.*, found str"),
    "null": (on_line(lambda line: b"null"), ":2: expected an object.*, found NoneType"),
    "duplicate key": (before_fields(b'"x": 1, "x": 2'), ":2: a key stands twice"),
    "NaN": (before_fields(b'"x": NaN'), ":2: NaN is not a finite number"),
    "-Infinity": (before_fields(b'"x": {"y": [-Infinity]}'), ":2: -Infinity is not a finite number"),
    "1e999": (before_fields(b'"x": 1e999'), ":2: 1e999 is not a finite number"),
    "number of 5,000 digits": (before_fields(b'"x": ' + b"1" * 5000), ":2: "),
    "deep nesting": (before_fields(b'"x": ' + b"[" * 100_000), ":2: not JSON"),
    "missing field": (on_field(), ":2: {field}: missing"),
    "number for a text": (on_field(7), ":2: {field}: expected (str|list), found int"),
    "null for a text": (on_field(None), ":2: {field}: expected (str|list), found NoneType"),
    "object for a text": (on_field({"role": "user"}), ":2: {field}: expected (str|list), found dict"),
    "lone surrogate": (on_field("a\ud83d"), ":2: {field}: holds a NUL or half a surrogate pair"),
    "escaped NUL": (on_field("a\0b"), ":2: {field}: holds a NUL"),
}
RESPONSE = {"empty text": (on_field(""), ":2: {field}: empty"),
            "white space": (on_field(" \n\t"), ":2: {field}: empty")}
RANKING = {"no response": (on_field([]), ":2: responses: 0 of them"),
           "one response": (on_field(["a"]), ":2: responses: 1 of them"),
           "the same twice": (on_field(["a", "b", "a"]), ":2: responses: the same text twice"),
           "number in a ranking": (on_field(["a", 7]), ":2: responses: expected text, found int"),
           "lists in a ranking": (on_field([["a"], ["b"]]), ":2: responses: expected text, found list")}
PAIR = {"chosen is rejected": (on_field(" bad"), ":2: chosen: the same as rejected"),
        "no rejected": (on_line(lambda line: line.replace(b"rejected", b"loser")), ":2: rejected: missing")}
NOT_FOR_PROMPTS = {kind: {**RESPONSE, **(PAIR if kind == "pairs" else RANKING if field == "responses" else {})}
                   for kind, (_, field) in GOOD.items() if kind != "prompts"}  # a prompt may be empty


@pytest.mark.parametrize("script, flag, kind, damage, problem", [
    pytest.param(*reader, *fault, id=f"{' '.join(reader)}: {name}") for reader in READERS
    for name, fault in {**FAULTS, **NOT_FOR_PROMPTS.get(reader[2], {})}.items()
    if (reader[2], name) != ("answers", "cut last line")])  # which is left out: test_answers.py
def test_damaged_file(desk, script, flag, kind, damage, problem):
    """A script that reads a file by itself, after its folder is made, or as another kind because of one line."""
    rows, field = GOOD[kind]
    path = desk.file(damage(lines(rows), field))
    err = desk.refused(script, flag, path)
    assert re.match(re.escape(f"error: {path}") + problem.format(field=field), err), err


@EVERY_READER
@pytest.mark.parametrize("content", [b"", b"[1]\n"])
def test_expected_fields_are_named(desk, script, flag, kind, content):
    """A message that says "an object with" and no field: what should stand in the file is then anybody's guess."""
    assert re.search(r"an object with \w+", desk.refused(script, flag, desk.file(content)))


@EVERY_READER
@pytest.mark.parametrize("make, problem", [
    pytest.param(lambda path: None, "no such file", id="missing"),
    pytest.param(lambda path: path.mkdir(), "a folder, not a file", id="folder"),
    pytest.param(os.mkfifo, "not a plain file", id="FIFO"),
    pytest.param(lambda path: path.symlink_to("nowhere"), "no such file", id="dangling link"),
    pytest.param(lambda path: path.symlink_to(path.name), "no such file", id="link to itself")])
def test_no_file(desk, script, flag, kind, make, problem):
    """A pipe that is waited for without end (already when its sha256 is taken), or errno as a traceback."""
    make(path := desk.folder / "place.jsonl")
    assert desk.refused(script, flag, path).startswith(f"error: {path}: {problem}")


@EVERY_READER
@pytest.mark.parametrize("change", [
    pytest.param(lambda content, _: content.replace(b"\n", b"\n \n\n"), id="blank lines"),
    pytest.param(lambda content, _: b"\xef\xbb\xbf" + content, id="BOM"),
    pytest.param(lambda content, _: content.replace(b"\n", b"\r\n"), id="CRLF"),
    pytest.param(lambda content, _: content.strip(), id="no last line end"),
    pytest.param(before_fields(b'"source": null, "n": [1, {}]'), id="more fields")])
def test_harmless_file(desk, monkeypatch, script, flag, kind, change):
    """A refusal of what editors leave behind, a row lost to it, or a reader beside read_rows that is stricter."""
    rows, found, read = GOOD[kind][0], {}, data.read_rows
    path = desk.file(change(lines(rows), ""))

    def keep(name, *rest, **more):
        found[str(name)] = read(name, *rest, **more)
        return found[str(name)]
    for module in (data, answers):
        monkeypatch.setattr(module, "read_rows", keep)
    assert desk.call(script, flag, path) == (0, "")
    assert [{name: row[name] for name in rows[0]} for row in found[str(path)]] == rows


@EVERY_READER
def test_all_bad_lines_are_counted(desk, script, flag, kind):
    """A person who mends one line per run: faults of every sort are found in one reading."""
    rows, field = GOOD[kind]
    without = [{name: value for name, value in row.items() if name != field} for row in rows]
    path = desk.file(lines([rows[0], [], without[1], "a", rows[2], without[2], 7, without[3]]) + b"{")
    err = desk.refused(script, flag, path)
    more = 1 if kind == "answers" else 2  # of answers a last line that was cut short is left out
    assert re.findall(re.escape(str(path)) + r":(\d):", err) == list("23467") and f"(and {more} more bad lines)" in err


@pytest.mark.parametrize("script, flag, kind, fields", [
    ("base", "--train", "texts", ["text"]), ("sft", "--train", "demonstrations", ["prompt", "completion"]),
    ("reward", "--train", "rankings", ["prompt", "responses"]), ("reward", "--train", "pairs", ["prompt", "chosen"]),
    ("dpo", "--train", "rankings", ["prompt", "responses"]), ("dpo", "--train", "pairs", ["prompt", "chosen"]),
    ("ppo", "--prompts", "prompts", ["prompt"]), ("label sample", "--prompts", "prompts", ["prompt"]),
    ("label rank", "--samples", "samples", ["prompt", "responses"]), ("evaluate", "--prompts", "prompts", ["prompt"]),
    ("sample", "--prompt", "", [])])
def test_end_of_text_in_a_text_is_ordinary(desk, good, monkeypatch, script, flag, kind, fields):
    """A text that ends a document, or that is refused, because somebody wrote <|endoftext|>: the first batch that
    reaches a model holds the special id as often as with another text of the same length."""
    enc, batches = data.load_tokenizer(good["vocab"]), []
    assert len(enc.encode_ordinary(data.END)) == len(enc.encode_ordinary("<|endofpage|>"))

    def stop(trunk, tokens, *_, **__):
        batches.append(tokens)
        raise Accepted
    monkeypatch.setattr(model_module.Trunk, "forward", stop)
    for text in (data.END, "<|endofpage|>"):
        rows = [{**row, **{name: [text + "a", text + "b"] if name == "responses" else text for name in fields}}
                for row in GOOD[kind][0]] if kind else []
        rows = [{**row, "prompt": text + str(i)} if "prompt" in row else row for i, row in enumerate(rows)]
        path = desk.file(lines(rows))
        shutil.rmtree(desk.out, ignore_errors=True)
        assert desk.call(script, flag, path if kind else text, whole=True) == (0, "")
    special, plain = batches
    assert special.shape == plain.shape and (special != plain).any()
    assert (special == enc.eot_token).sum() == (plain == enc.eot_token).sum() > 0


@pytest.mark.parametrize("script, flag, kind", [reader for reader in READERS if "prompt" in GOOD[reader[2]][0][0]
                                                and reader[0] != "label merge"])  # which has no model
def test_a_prompt_longer_than_the_model_is_cut(desk, script, flag, kind):
    """A refusal of a long prompt: it loses its beginning, which leaves room for a response, in every script."""
    rows = [{**row, "prompt": f"{TEXT} " * 20 + row["prompt"]} for row in GOOD[kind][0]]
    assert desk.call(script, flag, desk.file(lines(rows))) == (0, "")


@pytest.mark.parametrize("script", ["reward", "ppo", "label sample", "evaluate", "sample"])
@pytest.mark.parametrize("tokens", [31, 32, 10**6])
def test_no_room_for_a_prompt(desk, script, tokens):
    """Responses that leave no place for a prompt in a block of 32, noticed in the midst of sampling; 30 leave two."""
    assert f"--response-tokens {tokens} leaves no room" in desk.refused(script, "--response-tokens", tokens)
    assert desk.call(script, "--response-tokens", 30, *["--prompt", "the"] * (script == "sample")) == (0, "")


@pytest.mark.parametrize("script, flag, kind", [reader for reader in READERS if reader[0] in ("reward", "dpo")
                                                and reader[1] in ("--train", "--test")])
def test_equal_once_cut(desk, script, flag, kind):
    """A division by zero, or a comparison of a text with itself, when nothing is left of any ranking; and a refusal of
    the whole file when it is one row of many."""
    long = f" {TEXT}" * 20
    new = {"responses": [long + "a", long + "b"]} if kind == "rankings" else {"chosen": long + "a", "rejected": long}
    rows = [{**row, **new} for row in GOOD[kind][0]]
    path = desk.file(lines(rows))
    err = desk.refused(script, flag, path)
    assert "equal within the block size" in err and (str(path) in err or flag in err)
    path = desk.file(lines([*GOOD[kind][0], rows[1]]))
    assert desk.call(script, flag, path) == (0, "")


# ---- too few ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, flag, kind, problem", [
    pytest.param("reward", "--train", "rankings", "one prompt only", id="reward"),
    pytest.param("dpo", "--train", "pairs", "one prompt only", id="dpo"),
    pytest.param("ppo", "--prompts", "prompts", "1 prompts do not fill --episodes 8", id="ppo")])
def test_too_few_rows(desk, script, flag, kind, problem):
    """One prompt, of which none can be held out, or a rollout smaller than the flags say; without the file's name."""
    path = desk.file(lines(GOOD[kind][0][:1]))
    err = desk.refused(script, flag, path)
    assert problem in err and (str(path) in err or flag in err)


def test_too_little_text(desk):
    """No row of packed text at all: a training set of nothing."""
    path = desk.file(lines([{"text": "the film"}]))
    for flag in ("--train", "--test"):
        assert re.search(re.escape(str(path)) + ": .* do not fill one row of --pack", desk.refused("base", flag, path))


@pytest.mark.parametrize("script, flag, kind, count", [
    ("sft", "--train", "demonstrations", 1), ("reward", "--train", "rankings", 2), ("reward", "--train", "pairs", 2),
    ("reward", "--pairs", "pairs", 1), ("reward", "--test", "rankings", 1), ("reward", "--prompts", "prompts", 1),
    ("dpo", "--train", "rankings", 2), ("dpo", "--train", "pairs", 2), ("label rank", "--samples", "samples", 1),
    ("label rank", "--calibrate", "ratings", 1), ("evaluate", "--prompts", "prompts", 1)])
def test_few_rows_are_enough(desk, script, flag, kind, count):
    """A crash, or NaN in what is written, of a run with fewer rows than a batch: which is no fault, as a batch may be
    smaller (ppo.py needs --episodes rows, because its flags promise that many)."""
    path = desk.file(lines(GOOD[kind][0][:count]))
    assert desk.call(script, flag, path, whole=True) == (0, "")
    assert (desk.out / "done.json").is_file()
    assert not [path for path in desk.out.glob("*.json*") if re.search(r"\b(NaN|Infinity)\b", path.read_text())]


# ---- flags -----------------------------------------------------------------------------------------------------------

TRAIN = ["base", "sft", "reward", "dpo"]
STAGES = [*TRAIN, "ppo", "label sample", "label rank", "evaluate"]
FLAGS = [  # (scripts, flags, what the message says)
    (TRAIN, "--lr 0", "--lr is 0.0: it must be above 0"),
    *[([*TRAIN, "ppo"], f"--lr {lr}", f"--lr is {float(lr)}: ") for lr in ("-1", "nan", "inf", "1e999")],
    *[([*TRAIN, "ppo"], f"--lr={lr}", "argument --lr: invalid float value") for lr in ("fast", "1,5", "")],
    (TRAIN, "--batch-size 0", "--batch-size is 0: "), (TRAIN, "--batch-size -4", "--batch-size is -4: "),
    ([*TRAIN, "ppo"], "--microbatch 0", "--microbatch is 0: "), (TRAIN, "--epochs 0", "--epochs is 0"),
    (["base", "sft"], "--epochs nan", "--epochs is nan"), (TRAIN, "--batch-size 2.5", "--batch-size: invalid int"),
    (TRAIN, "--warmup nan", "--warmup"), (["base", "reward"], "--dropout 1", "--dropout is 1"),
    (["ppo"], "--episodes 0", "--episodes is 0: "), (["ppo"], "--minibatches 0", "--minibatches is 0: "),
    (["ppo"], "--iterations 0", "--iterations is 0: "), (["evaluate", "sample"], "--count 0", "--count is 0: "),
    (["label sample"], "--K 1", "--K must be 2 or more"), (["label rank"], "--noise -1", "--noise is -1.0: "),
    (["label rank"], "--noise nan", "--noise is nan: "), (["reward"], "--samples 0", "--samples is 0: "),
    (["reward"], "--samples 1", "--samples"), (["reward", "dpo"], "--test-share 1", "--test-share"),
    (["reward", "dpo"], "--test-share nan", "--test-share"), (["dpo"], "--beta 0", "--beta is 0.0: "),
    (["evaluate"], "--bootstrap 1", "--bootstrap is 1: "), (["evaluate"], "--best-of 1", "--best-of is 1: "),
    (["evaluate"], "--best-of -2", "--best-of is -2: "), (["evaluate"], "--best-of-count 0", "--best-of-count is 0: "),
    (["ppo", "evaluate"], "--ensemble max", "--ensemble is 'max': write mean or min"),
    (["dpo"], "--comparisons some", "--comparisons is 'some': write all or ends"),
    (["label rank"], "--flip 1.5", "--flip is 1.5: "), (["label rank"], "--flip nan", "--flip is nan: "),
    *[(["reward", "ppo", "label sample", "evaluate"], f"--temperature {t}", f"--temperature is {float(t)}: ")
      for t in ("0", "-1", "nan", "inf")],
    *[(["sample"], f"--temperature {t}", f"--temperature is {float(t)}: ") for t in ("-1", "nan")],
    *[(["sample"], f"--top-p {p}", f"--top-p is {float(p)}: ") for p in ("1.5", "0", "-1", "nan")],
    (["sample"], "--top-k -1", "--top-k is -1: "),
    *[(["reward", "ppo", "label sample", "evaluate", "sample"], f"--response-tokens {n}", f"--response-tokens is {n}: ")
      for n in (0, -1)],
    (["base"], "--block-size 0", "--block-size is 0: "), (["base"], "--n-layer 0", "--n-layer is 0: "),
    (["base"], "--n-head 3", "--width 16 is not divisible by --n-head 3"), (["base"], "--pack 0", "--pack is 0: "),
    (["base"], "--pack 33", "--pack 33 is more than block size 32"),
    (list(SCRIPTS), "--learning-rate 1", "unrecognized arguments: --learning-rate 1"),
    (list(SCRIPTS), "--see 1", "unrecognized arguments: --see 1"),  # no abbreviations: another flag might be meant
    (list(SCRIPTS), "stray", "unrecognized arguments: stray"),
    (SEEDED, "--seed", "argument --seed: expected one argument"),
    (SEEDED, "--seed x", "argument --seed: invalid int value: 'x'"),
    ([*STAGES, "sample"], f"--seed {10**30}", "--seed"), ([*STAGES, "sample"], "--device abacus", "--device abacus: "),
    ([*STAGES, "sample"], "--dtype float8", "--dtype is 'float8': "),
    (STAGES, "--restart maybe", "argument --restart: 'maybe': write true or false"),
    ([*TRAIN, "ppo", "label sample", "evaluate"], "--preset huge", "argument --preset: invalid choice"),
    *[(["ppo"], f"--episodes {n} --minibatches {of}", f"--episodes {n} is not divisible by --minibatches {of} (try "
       f"--episodes {near})") for n, of, near in ((10, 4, "8 or 12"), (15, 8, "8 or 16"), (3, 8, "8 or 16"))],
]


@pytest.mark.parametrize("script, flags, problem", [pytest.param(script, flags, problem, id=f"{script} {flags}")
                                                    for scripts, flags, problem in FLAGS for script in scripts])
def test_bad_flag(desk, script, flags, problem):
    """A value that trains nothing, divides by zero or ends in NaN after an hour; a mistyped flag that is ignored."""
    assert problem in desk.refused(script, *flags.split(" "))


@pytest.mark.parametrize("script, flags", [
    ("ppo", ["--lr", "0"]), ("sample", ["--temperature", "0", "--prompt", "the"]), ("sft", ["--seed", "-1"]),
    ("ppo", ["--no-end-score", "nan"]), ("label rank", ["--noise", "0", "--calibrate", "nowhere"]),
    ("reward", ["--pairs", ""]), ("evaluate", ["--labeler", ""]),
    ("evaluate", ["--best-of", "0"]), ("reward", ["--sft", "", "--prompts", "nowhere"])])
def test_flags_that_mean_something(desk, script, flags):
    """A check too strict: learning rate 0 tests PPO, temperature 0 takes the likeliest token, and some files may be
    left out."""
    assert desk.call(script, *flags) == (0, "")


# ---- stages out of order ---------------------------------------------------------------------------------------------

LM, REWARD = "this is a lm checkpoint, expected reward", "this is a reward checkpoint, expected lm"
NONE = "no (checkpoint|tokenizer) here"
LANGUAGE_MODELS = [("sft", "--model"), ("reward", "--model"), ("reward", "--sft"), ("ppo", "--sft"),
                   ("dpo", "--model"), ("label sample", "--model"), ("evaluate", "--sft"), ("evaluate", "--policies"),
                   ("sample", "--model")]
REWARD_MODELS = [("ppo", "--reward"), ("label rank", "--labeler"), ("evaluate", "--reward"), ("evaluate", "--labeler"),
                 ("evaluate", "--judge"), ("sample", "--reward")]
ORDER = [*[(*flag, "reward", REWARD) for flag in LANGUAGE_MODELS], *[(*flag, "sft", LM) for flag in REWARD_MODELS],
         *[(*flag, given, NONE) for flag in LANGUAGE_MODELS + REWARD_MODELS
           for given in ("nowhere", "folder", "prompts")]]


@pytest.mark.parametrize("script, flag, given, problem",
                         [pytest.param(*case, id=" ".join(case[:3])) for case in ORDER])
def test_stages_out_of_order(desk, good, script, flag, given, problem):
    """PPO without a reward model, or with the SFT model in its place; a report that stops after an hour since one of
    its policies is none. given: a checkpoint of another kind, no folder, a folder without one, or a file."""
    err = desk.refused(script, flag, good[given], whole=True)
    assert re.match(f"error: {re.escape(str(good[given]))}.*: .*{problem}", err), err


@pytest.mark.parametrize("script, flags", [
    ("base", "--vocab {prompts}"), ("base", "--vocab {nowhere}"), ("base", "--vocab {folder}")])
def test_no_vocabulary(desk, good, script, flags):
    """A new model without a tokenizer, or with one that is no vocabulary."""
    flag, path = flags.format(**good).split()
    assert desk.refused(script, flag, path).startswith(f"error: {path}")


@pytest.mark.parametrize("script, flags", [
    ("ppo", "--reward {short_reward}"), ("reward", "--model {short_sft}"), ("evaluate", "--judge {short_reward}"),
    ("evaluate", "--policies {short_sft}")])
def test_models_of_unequal_block_size(desk, good, script, flags):
    """A run that breaks off at the first long prompt, as one of its models is shorter than the one that sets the limit:
    either it is refused before it begins, or prompts are cut to what all models take."""
    path = desk.file(lines([{"prompt": f"{TEXT} {i}"} for i in NINE]))
    code, err = desk.call(script, "--prompts", path, "--response-tokens", 12, *flags.format(**good).split(), whole=True)
    check_outcome(desk, code, err)


# ---- what stands beside the files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [
    pytest.param({"domain": "movie", "gap": "wide"}, id="gap: text"),
    pytest.param({"domain": "movie", "gap": None}, id="gap: null"),
    pytest.param({"domain": "movie", "gap": -1}, id="gap below 0"), pytest.param({"gap": 1}, id="no domain"),
    pytest.param({"domain": ["movie"], "gap": 1}, id="domain: list"),
    pytest.param({"domain": "\x1b[2J\n"}, id="domain: escape codes"),
    pytest.param({"domain": "\ud800"}, id="domain: lone surrogate")])
def test_fields_of_the_report_card(desk, more):
    """A reward model that is lost after its training, because the report card stumbles over a field of one pair."""
    rows = [{**pair, "sample": "random", **more} for pair in GOOD["pairs"][0]]
    code, err = desk.call("reward", "--pairs", desk.file(lines(rows)), whole=True)
    check_outcome(desk, code, err)


@pytest.mark.parametrize("content", [
    pytest.param(b"", id="empty"), pytest.param(b'{"temperature": 0.5', id="cut"), pytest.param(b"[1]", id="list"),
    pytest.param(b'{"temperature": 0.5, "agreement": 3}', id="wrong type"), pytest.param(b"\xff\xfe{", id="UTF-16"),
    pytest.param(b'{"temperature": 0.5, "agreement": {"movie": {}}}', id="half of it"),
    pytest.param(b'{"temperature": 0.5, "agreement": {"all": {"all": 1}}}', id="number for a list"),
    pytest.param(b'{"temperature": Infinity}', id="no temperature"), pytest.param(b"[" * 100_000, id="deep nesting")])
@pytest.mark.parametrize("script, flag, kind", [("reward", "--pairs", "pairs"),
                                                ("label rank", "--calibrate", "ratings")])
def test_damaged_summary(desk, script, flag, kind, content):
    """A traceback because of the file that stands beside the one that was named, or noise of a temperature that is no
    number: only the people's agreement, which is shown and not used, may be missing."""
    (desk.folder / "summary.json").write_bytes(content)
    code, err = desk.call(script, flag, desk.file(lines(GOOD[kind][0])), whole=True)
    check_outcome(desk, code, err)
    assert code == 2 or script == "reward" or b'"temperature": 0.5,' in content


@pytest.mark.parametrize("change", [
    pytest.param({"means": None}, id="null"), pytest.param({"means": [1]}, id="one for two"),
    pytest.param({"means": [1, "2"]}, id="text"), pytest.param({"means": [10**400, 1]}, id="no float"),
    pytest.param({"means": [1e39, 1]}, id="infinite in float32"), pytest.param({"means": [2, 2]}, id="all equal"),
    pytest.param({"domain": "books"}, id="of another domain")])
def test_ratings_that_calibrate_nothing(desk, change):
    """Rankings without the noise that was asked for, or a division by zero or infinity behind it."""
    path = desk.file(lines([{**row, **change} for row in GOOD["ratings"][0]]))
    assert str(path) in desk.refused("label rank", "--calibrate", path, whole=True)


@pytest.mark.parametrize("change, problem", [
    pytest.param({"id": ""}, "id: empty", id="empty"), pytest.param({"id": 7}, "id: expected str", id="number"),
    pytest.param({"id": "a0"}, "id: the same one twice", id="twice")])
@pytest.mark.parametrize("script", ["label rank", "label rank me"])
def test_ids_of_samples(desk, script, change, problem):
    """Answers that cannot be told apart."""
    rows, _ = GOOD["samples"]
    path = desk.file(lines([rows[0], {**rows[1], **change}, *rows[2:]]))
    err = desk.refused(script, "--samples", path)
    assert str(path) in err and problem in err


def test_names_of_files_and_fields(desk):
    """Two lines for one error, a terminal that obeys the name of a file or of a field, or a file that cannot be used
    because its name, from an old disk, is no UTF-8."""
    path = desk.folder / "a\n\x1b[2Jerror: b.jsonl"
    path.write_bytes(lines([{"\x1b]0;title\7\r\n\u202e\ud800": 1}]))
    assert r"a\n\x1b[2Jerror: b.jsonl:1: prompt: missing (found: \x1b]0;title" in desk.refused("dpo", "--train", path)
    path = path.with_name(os.fsdecode(b"caf\xe9.jsonl"))
    path.write_bytes(lines(GOOD["rankings"][0]))
    assert desk.call("dpo", "--train", path) == (0, "")


@pytest.mark.parametrize("content, code", [
    pytest.param(b"", 0, id="empty"), pytest.param(b"\n", 0, id="blank line"), pytest.param(b"a\0b\n", 0, id="NUL"),
    pytest.param(b"caf\xe9\n", None, id="latin-1"), pytest.param("the film\n".encode("utf-16"), None, id="UTF-16"),
    pytest.param(b"\xef\xbb\xbfthe film\r\n", 0, id="BOM and CRLF"),
    pytest.param(data.END.encode(), 0, id="literal end")])
def test_prompts_from_standard_input(desk, monkeypatch, content, code):
    """sample.py at the end of a pipe: a traceback for bytes that are no UTF-8 (which is refused, or replaced)."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    found, err = desk.call("sample", whole=True)
    assert found == code or code is None
    check_outcome(desk, found, err)


# ---- many faults -----------------------------------------------------------------------------------------------------

AWKWARD = ["\0", "\ud800", "\udc00", "\ufeff", "\u2028", "\x85", "\u202e", "\x1b", "\r", "\n", "\t", "\xe9", '"', "\\",
           "\U0001f3ac", "{", "]", ",", ":", data.END]
VALUES = [None, True, 0, -1, 2.5, 1e300, 10**30, "", " ", "x", "\ud800", data.END, [], ["x"], [None], ["x", "x"],
          [["x"], 1], {}, {"x": 1}]


def mutated(content, rng):
    """The content of a file with a fault or two in it."""
    for _ in range(rng.randint(1, 2)):
        fault, size = rng.randrange(8), len(content)
        start = rng.randrange(size + 1)
        end = min(size, start + rng.randint(1, 9))
        rows = content.split(b"\n")
        if fault == 0:
            flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in content[start:end])
            content = content[:start] + flipped + content[end:]
        elif fault == 1:
            content = content[:start] + content[end:]
        elif fault == 2:
            content = content[:start] + rng.randbytes(rng.randint(1, 4)) + content[start:]
        elif fault == 3:
            content = content[:end] + content[start:]  # a piece twice
        elif fault == 4:
            rng.shuffle(rows)
            content = b"\n".join(rows)
        elif fault == 5:
            content = content[:start]
        elif fault == 6:
            new = rng.choice(AWKWARD)
            new = rng.choice([new.encode("utf-8", "surrogatepass"), json.dumps(new)[1:-1].encode()])
            content = content[:start] + new + content[start + 1:]
        else:
            content = with_other_value(content, rng)
    return content


def with_other_value(content, rng):
    """A value of another type in one place, if all of the content is JSON still."""
    try:
        rows = [json.loads(line) for line in content.splitlines()]
    except ValueError:
        return content
    inner, key = rows, rng.randrange(len(rows)) if rows else None
    while rows and isinstance(inner[key], (dict, list)) and inner[key] and rng.random() < 0.8:
        inner = inner[key]
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    if rows:
        inner[key] = rng.choice(VALUES)
    return lines(rows)


@EVERY_READER
def test_2000_damaged_files_are_accepted_or_refused(desk, script, flag, kind):
    """An exception that is nobody's, an exit code of another meaning, two lines, or a script that never ends: 112
    files for each of the 18 readers, from a seed."""
    rng, content, codes = random.Random(f"{script} {flag} {kind}"), lines(GOOD[kind][0]), []
    for number in range(112):
        path = desk.file(bad := mutated(content, rng))
        try:
            code, err = desk.call(script, flag, path)
            if code != 0:
                check_refusal(code, err)
        except (Exception, Hang) as error:
            pytest.fail(f"file {number}, {bad}: {type(error).__name__}: {error}")
        assert not desk.out.exists() or script == "label rank me"  # which makes its folder first, for the lock
        codes.append(code)
    assert codes.count(0) > 5 and codes.count(2) > 50
