"""Answers of several labelers: the format, and what merge accepts, refuses and says; and the blind test of two
policies."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import answers
import blind
from answers import MergeConfig, levels_of, merge, parse_order, ranking_of, write_order
from common import UserError
from data import read_rankings, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = [{"id": f"s{i}", "prompt": f"Prompt {i}", "responses": [f" {word} {i}" for word in "abc"]} for i in range(4)]


def given(labeler, sample, order, **more):
    """One answer to a sample whose responses were shown as they stand there."""
    return {"id": sample["id"], "prompt": sample["prompt"], "labeler": labeler, "shown": sample["responses"],
            "order": order, "seconds": 1.5, **more}


@pytest.fixture
def folder(tmp_path):
    """Three labelers: ann and bob as pages save them, and a machine's rankings."""
    write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    write_jsonl(tmp_path / "ann.jsonl", [given("ann", SAMPLES[0], "3 1=2"), given("ann", SAMPLES[1], "")])
    write_jsonl(tmp_path / "bob.jsonl", [given("bob", SAMPLES[0], "1 2 3", acceptable=False),
                                         given("bob", SAMPLES[2], "1=2=3")])
    write_jsonl(tmp_path / "model.jsonl", [{**SAMPLES[3], "labeler": "out/tiny/labeler"}])
    return tmp_path


def merged(folder, *names):
    """merge of these files: rows of answers.jsonl and rankings.jsonl."""
    merge(MergeConfig(files=",".join(str(folder / name) for name in names), samples=str(folder / "samples.jsonl"),
                      out=str(folder / "out")))
    return [[json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]
            for name in ("answers.jsonl", "rankings.jsonl")]


def test_an_answer_as_levels_and_as_a_ranking():
    answer = given("ann", SAMPLES[0], "3=1 2")
    assert levels_of(answer) == [[" a 0", " c 0"], [" b 0"]]
    ranking = ranking_of(answer)
    assert ranking == {"id": "s0", "prompt": "Prompt 0", "responses": [" a 0", " b 0"], "ties": [[" a 0", " c 0"]],
                       "labeler": "ann"}
    assert levels_of(ranking) == levels_of(answer)  # a ranking loses nothing of the order
    assert levels_of(given("ann", SAMPLES[0], "")) == [] and ranking_of(given("ann", SAMPLES[0], "")) is None
    assert ranking_of(given("ann", SAMPLES[0], "1=2=3")) is None
    for order in "3 1=2", "1=2=3", "2 1 3":
        assert write_order(parse_order(order, 3)) == order


def test_three_labelers_merge_and_can_be_trained_on(folder, capsys):
    rows, rankings = merged(folder, "ann.jsonl", "bob.jsonl", "model.jsonl")
    assert [(row["labeler"], row["id"]) for row in rows] == [
        ("ann", "s0"), ("ann", "s1"), ("bob", "s0"), ("bob", "s2"), ("out/tiny/labeler", "s3")]
    assert [(row["labeler"], row["responses"]) for row in rankings] == [
        ("ann", [" c 0", " a 0"]), ("bob", [" a 0", " b 0", " c 0"]), ("out/tiny/labeler", [" a 3", " b 3", " c 3"])]
    assert len(read_rankings(folder / "out/rankings.jsonl")) == 3
    out = capsys.readouterr().out
    assert "ann: 2 answers\n" in out and "5 answers, 3 rankings\n" in out
    assert "--epochs 426 --out" in out  # 80 steps of three rankings
    assert merged(folder, "out/answers.jsonl")[1] == rankings  # what was merged can be merged


def test_an_answer_that_is_there_twice_counts_once(folder, capsys):
    write_jsonl(folder / "again.jsonl", [given("ann", SAMPLES[0], "3 2=1"), given("ann", SAMPLES[3], "1 2 3")])
    shown = {**given("bob", SAMPLES[0], "3 2 1"), "shown": SAMPLES[0]["responses"][::-1]}  # the same, shown otherwise
    write_jsonl(folder / "turned.jsonl", [shown])
    rows, _ = merged(folder, "ann.jsonl", "bob.jsonl", "again.jsonl", "turned.jsonl")
    assert len(rows) == 5
    out = capsys.readouterr().out
    assert out.count("again.jsonl: 1 answers that are there already") == 1 and "turned.jsonl: 1 answers" in out


def test_a_cut_last_line_is_left_out_with_a_line(folder, capsys):
    path = folder / "ann.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    rows, _ = merged(folder, "ann.jsonl", "bob.jsonl")
    assert [row["labeler"] for row in rows] == ["ann", "bob", "bob"]
    assert capsys.readouterr().out.count("the last line was cut short and is left out") == 1


def test_a_line_that_is_cut_within_a_letter(folder, capsys):
    """é is two bytes: half of it is no UTF-8, and a labeler who was stopped there could not go on."""
    path = folder / "ann.jsonl"
    path.write_bytes(path.read_bytes() + '{"id": "s3", "prompt": "é'.encode()[:-1])
    assert len(merged(folder, "ann.jsonl")[0]) == 2 and "cut short" in capsys.readouterr().out


def test_merge_does_not_drop_what_its_folder_holds(folder):
    """bob's file merged into ann's folder, and ann's answers gone."""
    merged(folder, "ann.jsonl")
    with pytest.raises(UserError, match="holds 2 answers that are in none of the files"):
        merged(folder, "bob.jsonl")
    assert len(merged(folder, "out/answers.jsonl", "bob.jsonl")[0]) == 4


@pytest.mark.parametrize("row, message", [
    ({**given("cy", SAMPLES[0], "1 2 3"), "preferences": [[1, 4, 0.5]]}, "preferences: expected"),
    ({**given("cy", SAMPLES[0], "1 2 3"), "preferences": ["x"]}, "preferences: expected"),
    (given("ann", SAMPLES[0], "1 2 3"), r"id: 'ann' has answered 's0' otherwise in .*ann\.jsonl"),
    ({**given("cy", SAMPLES[0], "1 2 3"), "id": "new"}, r"id: 'new' is not in .*samples\.jsonl"),
    ({**given("cy", SAMPLES[0], "1 2 3"), "prompt": "Other"}, "id: 's0' has other texts in"),
    ({**given("cy", SAMPLES[0], "1 2 3"), "shown": [" a 0", " b 0", " x"]}, "id: 's0' has other texts in"),
    ({**given("cy", SAMPLES[0], "1 2"), "shown": [" a 0", " b 0"]}, "id: 's0' has other texts in"),
    (given("cy", SAMPLES[0], "1 2"), "order: each of 1 to 3"),
    (given("cy", SAMPLES[0], 123), "order: missing, or no text"),
    ({**given("cy", SAMPLES[0], "1 2 3"), "seconds": "5"}, "seconds: expected a number"),
    ({**given("cy", SAMPLES[0], "1 2 3"), "labeler": " "}, "labeler: empty"),
    ({"id": "s3", "prompt": "Prompt 3", "labeler": "m", "responses": [" a 3", " b 3"], "ties": [" c 3"]},
     "ties: expected"),
    ({"id": "s3", "prompt": "Prompt 3", "labeler": "m", "responses": [" a 3"]}, "responses: 1 of them"),
    ({"id": "s3"}, "prompt: missing"), ([], "expected an object with id, .*found list")])
def test_what_does_not_fit_is_refused_by_its_line(folder, row, message):
    (folder / "bad.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(given("cy", SAMPLES[1], "1 2 3")) + "\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:1: " + message):
        merged(folder, "ann.jsonl", "bob.jsonl", "bad.jsonl")
    assert not (folder / "out").exists()


def test_merge_at_the_command_line(folder):
    (folder / "bad.jsonl").write_text('{"id": "s0", "pro\n' + json.dumps(given("cy", SAMPLES[1], "1 2 3")) + "\n")
    for names, line in [(["bad.jsonl"], "bad.jsonl:1: not JSON"), ([], "name the files to merge"),
                        (["nowhere.jsonl"], "nowhere.jsonl: no such file")]:
        command = [sys.executable, ROOT / "label.py", "merge", *(folder / name for name in names),
                   "--samples", folder / "samples.jsonl", "--out", folder / "out"]
        made = subprocess.run(command, text=True, capture_output=True, timeout=60)
        assert made.returncode == 2 and made.stderr.startswith("error: ") and line in made.stderr
        assert made.stderr.count("\n") == 1 and not (folder / "out").exists()


def test_another_stages_folder_is_left_alone(folder):
    (folder / "out").mkdir()
    (folder / "out/done.json").write_text("{}")
    with pytest.raises(UserError, match="another stage's work"):
        merged(folder, "ann.jsonl")


# ---- the blind test --------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluation(tmp_path):
    """A finished evaluation of two policies: the judge prefers ppo in three of four prompts that can be asked about."""
    rows = [{"prompt": f"P{i}", "sft": f" sft {i}", "ppo": f" ppo {i}", "dpo": " d",
             "judge": {"sft": 0.0, "ppo": margin, "dpo": 1.0}}
            for i, margin in enumerate([1.0, 2.0, -1.0, 0.5])]
    rows.append({**rows[0], "prompt": "equal", "ppo": " sft 0"})
    write_jsonl(tmp_path / "samples.jsonl", rows)
    return tmp_path


def answered(evaluation, preferred, name="ann.jsonl"):
    """A file in which ann prefers these policies, in the order of the samples; "" skips and = ties."""
    rows = []
    for sample, policy in zip(answers.read_samples(evaluation / "ask-sft-ppo/samples.jsonl"), preferred):
        best = next((i for i, text in enumerate(sample["responses"]) if policy and text.startswith(" " + policy)), None)
        order = {"": "", "=": "1=2"}.get(policy) if best is None else f"{best + 1} {2 - best}"
        rows.append(given("ann", sample, order))
    write_jsonl(evaluation / name, rows)
    return evaluation / name


def test_blind_result_by_hand(evaluation, capsys):
    """The wrong policy credited; ties or skips counted as losses; agreement with the judge on ties."""
    blind.main(blind.Config(ask="page", out=str(evaluation)))
    assert "1 prompts are left out" in capsys.readouterr().out and (evaluation / "ask-sft-ppo/page.html").is_file()
    pairs = blind.read_pairs(blind.Config(out=str(evaluation)))
    order = [pairs[row["id"]]["margin"] for row in answers.read_samples(evaluation / "ask-sft-ppo/samples.jsonl")]
    choice = {1.0: "ppo", 2.0: "=", -1.0: "ppo", 0.5: ""}
    path = answered(evaluation, [choice[margin] for margin in order])
    blind.main(blind.Config(ask=str(path), out=str(evaluation)))
    row = json.loads((evaluation / "ask-sft-ppo/result-ann.json").read_text())
    assert row["win_rate"] == pytest.approx((1 + 0.5 + 1) / 3, abs=1e-4) and row["answers"] == 3
    assert (row["ties"], row["skipped"], row["judged"], row["judge_agrees"]) == (1, 1, 2, 0.5)
    assert row["judge_win_rate"] == pytest.approx(2 / 3, abs=1e-4)
    low, high = row["interval"]
    assert 0.5 <= low < row["win_rate"] < high <= 1


def test_blind_at_the_terminal_shows_no_names(evaluation, monkeypatch, capsys):
    keys = iter(["1", "2", "q"])
    monkeypatch.setattr("builtins.input", lambda question: next(keys))
    rows = [{"prompt": f"P{i}", "sft": f" dull {i}", "ppo": f" fine {i}", "judge": {"sft": 0, "ppo": 1}}
            for i in range(3)]
    write_jsonl(evaluation / "samples.jsonl", rows)
    blind.main(blind.Config(ask="ann", out=str(evaluation)))
    out = capsys.readouterr().out
    assert "ann prefers ppo to sft: " in out and "2 answers" in out
    asked = out.split("1 of 3")[1].split("ann prefers")[0]
    assert "dull" in asked and "ppo" not in asked and "sft" not in asked
    shown = [row["shown"] for row in answers.read_answers(evaluation / "ask-sft-ppo/ann/answers.jsonl")]
    assert len(shown) == 2


@pytest.mark.parametrize("flags, message", [
    ({"between": "sft,gpt"}, "expected two of sft, ppo, dpo"), ({"between": "sft"}, "expected two"),
    ({"between": "sft,sft"}, "expected two"), ({"ask": "a/b"}, "no such file"), ({"ask": ".."}, "no such file"),
    ({"ask": "answers-x.jsonl"}, "no such file"),
    ({"count": 0}, "--count"), ({"out": "no"}, "no such file")])
def test_blind_errors(evaluation, flags, message):
    with pytest.raises(UserError, match=message):
        blind.main(blind.Config(**{"ask": "ann", "out": str(evaluation), **flags}))
    assert not (evaluation / "ask-sft-ppo").exists()
