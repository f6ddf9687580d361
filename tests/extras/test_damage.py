"""Damaged checkpoints and checkpoints from strangers, given to every script that loads one: one line, nothing run."""
import ast
import importlib
import io
import os
import pickle
import shutil
import signal
import sys
import zipfile

import pytest
import torch

import checkpoint
import runs
import faults
from common import UserError
from data import write_jsonl


class Evil:
    """Makes a file when it is unpickled, as a stranger's checkpoint might do worse."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def flipped(content, place):
    """content with one bit of the byte at this place (a share of the length) the other way round."""
    at = int(place * len(content))
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1:]


def saved(content):
    """What torch.save writes."""
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def sealed(content, tmp_path):
    """What checkpoint.save writes: with the right checksum."""
    checkpoint.save(tmp_path / "sealed.pt", content)
    return (tmp_path / "sealed.pt").read_bytes()


def other_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("report.txt", "nothing of interest")
    return (tmp_path / "other.zip").read_bytes()


DAMAGE = {  # name: function of the good content, the good facts and a folder
    "empty": lambda good, facts, tmp: b"",
    "short": lambda good, facts, tmp: b"PK\3\4",
    "cut at the end": lambda good, facts, tmp: good[:-1],
    "cut in the middle": lambda good, facts, tmp: good[:len(good) // 2],
    "bit flipped in a tensor": lambda good, facts, tmp: flipped(good, 0.5),
    "bit flipped in the header": lambda good, facts, tmp: flipped(good, 0.0),
    "bit flipped in the list of parts": lambda good, facts, tmp: flipped(good, 0.97),
    "bit flipped in the checksum": lambda good, facts, tmp: flipped(good, 0.9999),
    "trailing junk": lambda good, facts, tmp: good + b"junk",
    "zeros": lambda good, facts, tmp: bytes(len(good)),
    "zeros at the end": lambda good, facts, tmp: good[:len(good) // 2] + bytes(len(good) // 2),
    "HTML": lambda good, facts, tmp: b"<!DOCTYPE html><html>Sign in to go on</html>" * 9,
    "LFS pointer": lambda good, facts, tmp: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n" * 2,
    "unrelated zip": lambda good, facts, tmp: other_zip(tmp),
    "plain torch.save": lambda good, facts, tmp: saved(facts["weights"]),
    "plain pickle": lambda good, facts, tmp: pickle.dumps(Evil(tmp / "ran")),
    "malicious file": lambda good, facts, tmp: sealed({"weights": Evil(tmp / "ran")}, tmp),
    "malicious weight": lambda good, facts, tmp: sealed(
        {**facts, "weights": {**facts["weights"], "trunk.norm.bias": Evil(tmp / "ran")}}, tmp),
    "malicious fact": lambda good, facts, tmp: sealed({**facts, "stage": {"seed": Evil(tmp / "ran")}}, tmp),
    "malicious key": lambda good, facts, tmp: sealed({**facts, Evil(tmp / "ran"): 1}, tmp),
    "malicious extra": lambda good, facts, tmp: sealed({**facts, "extra": [Evil(tmp / "ran")]}, tmp),
    "no dict": lambda good, facts, tmp: sealed([facts], tmp),
    "nothing in it": lambda good, facts, tmp: sealed({}, tmp),
    "another format": lambda good, facts, tmp: sealed({**facts, "format": 99}, tmp),
    "weights of other sizes": lambda good, facts, tmp: sealed({**facts, "model": {**facts["model"], "width": 32}}, tmp),
    "an unknown size": lambda good, facts, tmp: sealed({**facts, "model": {**facts["model"], "depth": 32}}, tmp),
    "a size that is no number": lambda good, facts, tmp: sealed(
        {**facts, "model": {**facts["model"], "width": "x"}}, tmp),
    "a missing weight": lambda good, facts, tmp: sealed(
        {**facts, "weights": {n: x for n, x in facts["weights"].items() if "norm" not in n}}, tmp),
    "another vocabulary": lambda good, facts, tmp: sealed({**facts, "vocab": "0" * 64}, tmp),
}
# Every flag of every script that names a checkpoint: script, its main and Config, the flag, and whether it is a scalar
# model's.
FLAGS = [("sft", "main", "Config", "model", False), ("reward", "main", "Config", "model", False),
         ("reward", "main", "Config", "sft", False), ("ppo", "main", "Config", "sft", False),
         ("ppo", "main", "Config", "reward", True), ("dpo", "main", "Config", "model", False),
         ("label", "sample", "SampleConfig", "model", False), ("label", "rank", "RankConfig", "labeler", True),
         ("evaluate", "main", "Config", "sft", False), ("evaluate", "main", "Config", "policies", False),
         ("evaluate", "main", "Config", "reward", True), ("evaluate", "main", "Config", "labeler", True),
         ("evaluate", "main", "Config", "judge", True), ("sample", "main", "Config", "model", False),
         ("sample", "main", "Config", "reward", True), ("export", "main", "Config", "model", False)]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    given = faults.make_inputs(folder)
    write_jsonl(folder / "samples.jsonl", [{"id": "a", "prompt": "the", "responses": [" film", " plot"]}])
    return given


def good_flags(script, main, given, tmp_path):
    """A command line that would run."""
    folder = given.vocab.parent
    common = {"device": "cpu", "out": str(tmp_path / "out")}
    demos = {"train": str(folder / "demos.jsonl"), "test": str(folder / "demos.jsonl")}
    return {"sft": {**common, "model": given.sft, **demos},
            "reward": {**common, "model": given.sft, "sft": given.sft, "train": given.rankings, "pairs": "",
                       "prompts": given.prompts, "response_tokens": 6},
            "ppo": {**common, "sft": given.sft, "reward": given.reward, "prompts": given.prompts, "episodes": 4,
                    "response_tokens": 6},
            "dpo": {**common, "model": given.sft, "train": given.rankings},
            "sample": {**common, "model": given.sft, "prompts": given.prompts, "response_tokens": 6},
            "rank": {**common, "labeler": given.reward, "samples": str(folder / "samples.jsonl"), "noise": 0.0},
            "evaluate": {**common, "sft": given.sft, "policies": str(folder / "policy"), "reward": given.reward,
                         "labeler": given.reward, "judge": given.reward, "prompts": given.prompts, "response_tokens": 6,
                         "text": str(folder / "texts.jsonl")},
            "talk": {"device": "cpu", "model": given.sft, "reward": given.reward, "prompt": "a", "response_tokens": 6},
            "export": {"model": given.sft, "out": str(tmp_path / "out")},
            }[{"sample": "talk"}.get(script, main if script == "label" else script)]


@pytest.mark.parametrize("script, main, Config, flag, scalar", FLAGS, ids=lambda x: str(x))
def test_every_script_refuses_every_damage(given, tmp_path, monkeypatch, capsys, script, main, Config, flag, scalar):
    """A flipped bit that is trained on, a traceback, a program of somebody else's that runs, or a message that does not
    say which file it was."""
    module = importlib.import_module(script)
    folder, source = tmp_path / "a checkpoint", given.reward if scalar else given.sft
    shutil.copytree(source, folder)
    shutil.copytree(given.sft, given.vocab.parent / "policy", dirs_exist_ok=True)
    good, facts = (folder / "model.pt").read_bytes(), checkpoint.load(folder / "model.pt")
    flags = {**good_flags(script, main, given, tmp_path), flag: str(folder)}
    monkeypatch.setattr(sys, "argv", [script, *(f"--{n.replace('_', '-')}={value}" for n, value in flags.items())])
    for name, damage in DAMAGE.items():
        (folder / "model.pt").write_bytes(damage(good, facts, tmp_path))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            module.run(getattr(module, main), getattr(module, Config))
        out, err = capsys.readouterr()
        assert (stop.value.code, err.count("\n")) == (2, 1), f"{name}: {err}"
        assert err.startswith("error: ") and str(folder) in err, f"{name}: {err}"
        assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists(), name
    (folder / "model.pt").write_bytes(good)
    monkeypatch.setattr(runs.Stage, "open", None)  # where a run would begin
    for name in ("respond", "save_ranks"):  # sample.py and export.py have no stage
        monkeypatch.setattr(module, name, None, raising=False)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        module.run(getattr(module, main), getattr(module, Config))


@pytest.mark.parametrize("stage", ["base", "reward", "ppo", "dpo"])
def test_a_damaged_state_is_refused(given, tmp_path, monkeypatch, capsys, stage):
    """A run that goes on from flipped bits, or from the state of another run."""
    script, flags = faults.settings(stage, given, tmp_path / "out")
    module, keep = importlib.import_module(script), runs.Stage.keep

    def stopped(self, step):
        self.received = signal.SIGTERM
        keep(self, step)
    with monkeypatch.context() as patch:
        patch.setattr(runs.Stage, "keep", stopped)
        with pytest.raises(UserError, match="stopped after step 1"):
            module.main(module.Config(**flags))
    path = tmp_path / "out" / "resume.pt"
    good, state = path.read_bytes(), checkpoint.load(path)
    model = next(iter(state["parts"]))
    damages = {name: damage for name, damage in DAMAGE.items() if name not in (
        "malicious weight", "malicious fact", "malicious key", "another format", "weights of other sizes",
        "an unknown size", "a size that is no number", "a missing weight", "another vocabulary")}
    damages["another model's"] = lambda *_: sealed(
        {**state, "parts": {**state["parts"], model: {"weight": torch.ones(2)}}}, tmp_path)
    damages["a part is missing"] = lambda *_: sealed({**state, "parts": {}}, tmp_path)
    damages["no step"] = lambda *_: sealed({"parts": state["parts"]}, tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *(f"--{n.replace('_', '-')}={value}" for n, value in flags.items())])
    for name, damage in damages.items():
        path.write_bytes(damage(good, {**state, "weights": {}}, tmp_path))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            module.run(module.main, module.Config)
        err = capsys.readouterr().err
        assert (stop.value.code, err.count("\n")) == (2, 1) and str(path) in err, f"{name}: {err}"
        assert not (tmp_path / "ran").exists()
    path.write_bytes(good)
    module.main(module.Config(**flags))


def test_every_single_bit_counts(given, tmp_path):
    """A part of the file that the checksum does not cover."""
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"x": torch.arange(7.0)})
    good = path.read_bytes()
    for at in range(0, len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1:])
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)
    path.write_bytes(good)
    assert torch.equal(checkpoint.load(path)["x"], torch.arange(7.0))
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(7.0))  # anybody can read it


def test_no_code_from_files():
    """A script that loads in another way than torch.load(weights_only=True), which runs nothing."""
    for path in faults.ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"pickle", "joblib", "shelve", "marshal"} & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "np.load"), f"{path}:{node.lineno}"
                assert called != "torch.load" or "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno}"
