"""Samples and rankings: seeds, order, noise, calibration, and a person's session through a pipe and a real terminal."""
import json
import math
import os
import runpy
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import answers
import label
import terminal
from answers import parse_order
from checkpoint import save_checkpoint
from common import UserError, generator
from data import load_tokenizer, read_rankings, save_ranks, train_bpe, write_jsonl
from label import RankConfig, SampleConfig
from model import GPT, GPTConfig, ScalarModel, load_model, score_many
from reward import encode_rankings
from terminal import visible

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["The film", "A plot", "Rarely", "This is", "One of", "My dog"]
SAMPLES = [{"id": f"id{i}", "prompt": prompt, "responses": [f" {prompt} {word}." for word in ("a", "b", "c", "d")]}
           for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random language model and reward model, prompts, samples and human ratings."""
    folder = tmp_path_factory.mktemp("label")
    save_ranks(train_bpe(["the film is good", "the plot is bad", "a good dog"] * 3, 280), folder / "vocab.tiktoken")
    enc = load_tokenizer(folder)
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=enc.n_vocab, block_size=48, n_layer=1, n_head=2, width=16)
    lm, reward = GPT(shape), ScalarModel(shape)
    with torch.no_grad():  # readable bytes only, and an end of text now and then: 0.1 of the draws
        hidden_bias = torch.full((enc.n_vocab,), -20.0)
        hidden_bias[[ord(c) for c in " abcdefgh"] + [enc.eot_token]] = 0.0
        lm.trunk.norm.weight.zero_()
        lm.trunk.norm.bias.zero_()
        lm.trunk.norm.bias[0] = 1.0
        lm.trunk.token_embedding.weight[:enc.n_vocab, 0] = hidden_bias
    save_checkpoint(folder / "lm", lm, RankConfig(), folder / "vocab.tiktoken")
    save_checkpoint(folder / "reward", reward, RankConfig(), folder / "vocab.tiktoken")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    write_jsonl(folder / "samples.jsonl", SAMPLES)
    write_jsonl(folder / "ratings.jsonl", [
        {"prompt": "", "responses": ["the film is good", "the plot is bad"], "means": [2.0, -1.0], "domain": "movie"},
        {"prompt": "", "responses": ["a very good dog", "bad bad film"], "means": [0.5, -3], "domain": "movie"},
        {"prompt": "", "responses": ["not a film", "the news"], "means": [4.0, -4.0], "domain": "nyt"}])
    (folder / "summary.json").write_text(json.dumps({"temperature": 0.5}))
    return folder


def sampled(folder, out, **flags):
    cfg = SampleConfig(**{"out": str(out), "model": str(folder / "lm"), "prompts": str(folder / "prompts.jsonl"),
                          "response_tokens": 30, "device": "cpu", "dtype": "float32", **flags})
    label.sample(cfg)
    return [json.loads(line) for line in (Path(out) / "samples.jsonl").read_text().splitlines()]


def ranked(folder, out, **flags):
    cfg = RankConfig(**{"out": str(out), "labeler": str(folder / "reward"), "samples": str(folder / "samples.jsonl"),
                        "calibrate": str(folder / "ratings.jsonl"), "device": "cpu", "dtype": "float32", **flags})
    label.rank(cfg)
    return [json.loads(line) for line in (Path(out) / "rankings.jsonl").read_text().splitlines()]


# ---- sample --------------------------------------------------------------------------------------------------------


def test_samples_are_a_function_of_the_seed(folder, tmp_path):
    first, again = sampled(folder, tmp_path / "a"), sampled(folder, tmp_path / "b")
    assert first == again != sampled(folder, tmp_path / "c", seed=2)
    assert [row["prompt"] for row in first] == PROMPTS
    for row in first:
        assert 2 <= len(set(row["responses"])) == len(row["responses"]) <= 4
        assert all(text.strip() for text in row["responses"])
    assert len({row["id"] for row in first}) == len(first)
    assert json.loads((tmp_path / "a/done.json").read_text())["prompts"] == 6


def test_id_depends_on_the_texts_and_not_on_their_order():
    assert label.sample_id("p", ["a", "b"]) == label.sample_id("p", ["b", "a"]) != label.sample_id("p", ["a", "c"])
    assert label.sample_id("p", ["a", "b"]) == "f98223de264b"  # files of an earlier run stay valid


def test_cut_empty_and_repeated_responses_are_drawn_again_and_counted(folder, tmp_path, capsys):
    # Two tokens at most: one letter and end of text. Nine letters and spaces are all that can be kept.
    rows = sampled(folder, tmp_path, response_tokens=2)
    assert all(len(text) == 1 and text != " " for row in rows for text in row["responses"])
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["cut before end of text"] > done["empty"] > 0 and done["kept"] > 0
    assert done["prompts"] + done["prompts_dropped"] == 6 and done["prompts_below_K"] > 0
    assert "cut before end of text" in capsys.readouterr().out
    kept = sampled(folder, tmp_path / "cut", response_tokens=2, keep_cut=True)
    assert {len(text) for row in kept for text in row["responses"]} >= {2}


def test_prompts_limit_and_sampling_errors(folder, tmp_path):
    assert len(sampled(folder, tmp_path / "a", prompts_limit=2)) == 2
    for flags, message in [({"K": 1}, "--K must be 2"), ({"temperature": 0.0}, "--temperature"),
                           ({"response_tokens": 48}, "block size 48"), ({"prompts_limit": -1}, "--prompts-limit"),
                           ({"model": str(folder / "reward")}, "expected lm"), ({"prompts": "x"}, "no such file")]:
        with pytest.raises(UserError, match=message):
            sampled(folder, tmp_path / "b", **flags)
        assert not (tmp_path / "b").exists()


# ---- rank: a reward model ------------------------------------------------------------------------------------------


def test_noiseless_ranking_is_the_order_of_the_scores(folder, tmp_path):
    model, enc = load_model(folder / "reward", kind="reward"), load_tokenizer(folder / "reward")
    rows = ranked(folder, tmp_path, noise=0.0, calibrate="not needed")
    for row, sample, texts in zip(rows, SAMPLES, encode_rankings(enc, rows, 48)):
        scores = score_many(model, texts).tolist()
        assert scores == sorted(scores, reverse=True)
        assert sorted(row["responses"]) == sorted(sample["responses"]) and row["id"] == sample["id"]
        assert row["labeler"] == str(folder / "reward")
    assert len(read_rankings(tmp_path / "rankings.jsonl")) == 6


def test_noise_of_a_ranking_depends_on_seed_and_id_only(folder, tmp_path):
    rows = ranked(folder, tmp_path / "a", noise=5.0)
    write_jsonl(tmp_path / "half.jsonl", SAMPLES[3:])
    assert ranked(folder, tmp_path / "b", noise=5.0, samples=str(tmp_path / "half.jsonl")) == rows[3:]
    assert ranked(folder, tmp_path / "c", noise=5.0, seed=2) != rows


def test_noisy_pairs_are_bradley_terry():
    scores, temperature, random, draws = torch.tensor([1.0, 0.4, -0.3]), 0.7, generator(1), 10_000
    wins = torch.zeros(3, 3)
    for _ in range(draws):
        order = label.noisy_order(scores, temperature, random)
        for place, i in enumerate(order):
            wins[i, order[place + 1:]] += 1
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        expected = torch.sigmoid((scores[i] - scores[j]) / temperature).item()
        assert abs(wins[i, j].item() / draws - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)
    assert label.noisy_order(scores, 0.0, random) == [0, 1, 2]


def test_calibration_and_agreement_in_closed_form():
    means = torch.tensor([-1.0, 0.0, 1.0, 4.0])
    assert label.calibrated_temperature(3 * means + 7, means, 0.5) == pytest.approx(1.5)
    assert label.order_kept(torch.tensor([0.0]), 1.0) == pytest.approx((0.5, 0.5))
    assert label.order_kept(torch.tensor([math.log(3)]), 1.0) == pytest.approx((0.75, 0.75**2 + 0.25**2))
    assert label.order_kept(torch.tensor([-math.log(3)]), 0.0) == (1.0, 1.0)
    with pytest.raises(UserError, match="--noise 0"):
        label.calibrated_temperature(torch.ones(4), means, 0.5)


def test_temperature_comes_from_the_movie_ratings(folder, tmp_path):
    ranked(folder, tmp_path, noise=2.0)
    model, enc = load_model(folder / "reward", kind="reward"), load_tokenizer(folder / "reward")
    texts = ["the film is good", "the plot is bad", "a very good dog", "bad bad film"]
    scores = score_many(model, encode_rankings(enc, [{"prompt": "", "responses": texts}], 48)[0])
    expected = 2 * 0.5 * scores.std() / torch.tensor([2.0, -1.0, 0.5, -3.0]).std()
    assert json.loads((tmp_path / "done.json").read_text())["temperature"] == pytest.approx(expected.item(), abs=1e-4)


def test_ranking_errors_write_nothing(folder, tmp_path):
    write_jsonl(tmp_path / "twice.jsonl", [SAMPLES[0], SAMPLES[0]])
    (tmp_path / "far").mkdir()
    write_jsonl(tmp_path / "far/ratings.jsonl", [{"prompt": "", "responses": ["a", "b"], "means": [1, 2]}])
    write_jsonl(tmp_path / "bare.jsonl", [{"prompt": "", "responses": ["a", "b"]}])
    for flags, message in [({"noise": -1.0}, "--noise"), ({"noise": math.nan}, "--noise"),
                           ({"labeler": "no/where"}, "no checkpoint here, and no folder"), ({"labeler": "Zoë"}, "no folder, and no name"),
                           ({"labeler": str(folder / "lm")}, "expected reward"), ({"samples": "x"}, "no such file"),
                           ({"samples": str(tmp_path / "twice.jsonl")}, "id: the same one twice"),
                           ({"calibrate": str(tmp_path / "far/ratings.jsonl")}, "summary.json: no temperature"),
                           ({"calibrate": str(tmp_path / "bare.jsonl")}, "means: expected one number")]:
        with pytest.raises(UserError, match=message):
            ranked(folder, tmp_path / "out", **flags)
        assert not (tmp_path / "out").exists()


# ---- rank: a person ------------------------------------------------------------------------------------------------


def test_orders_that_a_person_may_type():
    assert parse_order("3142", 4) == parse_order("3 1 4 2", 4) == parse_order(" 3,1, 4,2 ", 4) == [[3], [1], [4], [2]]
    assert parse_order("3=1 4 2", 4) == parse_order("3 = 1, 42", 4) == [[3, 1], [4], [2]]
    assert parse_order("1=2=3=4", 4) == [[1, 2, 3, 4]]
    assert parse_order("2=1", 2) == [[2, 1]]
    for wrong in "", "314", "31422", "3141", "3145", "0123", "=3142", "3142=", "3==142", "3-1-4-2", "abc", "³142":
        with pytest.raises(ValueError):
            parse_order(wrong, 4)


def test_model_text_cannot_act_on_the_terminal():
    assert visible("a\x1b[2Jb\rc\x07\x9b\u202e\u2028") == r"a\x1b[2Jb\rc\x07\x9b\u202e\u2028"
    assert visible("héllo 👩\u200d💻 שלום <script>") == "héllo 👩\u200d💻 שלום <script>"


def test_responses_stand_side_by_side_where_there_is_room(monkeypatch, capsys):
    """Columns that run into each other, or a line wider than the terminal."""
    texts = ["\x1b[2J" + " good" * 20, " 好" * 30, " x"]
    for columns, beside in [(160, True), (60, False)]:
        monkeypatch.setenv("COLUMNS", str(columns))
        terminal.show("1 of 2", "The film", texts)
        lines = capsys.readouterr().out.splitlines()
        assert all(terminal.cells(line) < columns for line in lines)
        assert any("1  ..." in line and "3  ..." in line for line in lines) == beside
        assert sum("\\x1b" in line for line in lines) == 1 and not any("\x1b" in line for line in lines)
        assert " ".join(lines).count("good") == 20 and "".join(lines).count("好") == 30


class Keys:
    """Answers to input(), in place of a person."""

    def __init__(self, monkeypatch, *keys):
        self.keys = list(keys)
        monkeypatch.setattr("builtins.input", self)

    def __call__(self, question):
        if not self.keys:
            raise EOFError
        return self.keys.pop(0)


def person(folder, out, monkeypatch, *keys, labeler="me", **flags):
    """A session with these answers, then quit: rows of answers.jsonl and rankings.jsonl."""
    Keys(monkeypatch, *keys)
    label.rank(RankConfig(labeler=labeler, out=str(out), samples=str(folder / "samples.jsonl"), **flags))
    return [[json.loads(line) for line in (out / name).read_text().splitlines()]
            for name in ("answers.jsonl", "rankings.jsonl")]


def shown(sample, labeler="me"):
    return answers.shown_to(labeler, sample)


def test_an_answer_becomes_a_ranking_best_first(folder, tmp_path, monkeypatch):
    (answer,), (row,) = person(folder, tmp_path, monkeypatch, "3142")
    one, two, three, four = shown(SAMPLES[0])
    assert row == {"id": "id0", "prompt": "The film", "responses": [three, one, four, two], "ties": [], "labeler": "me"}
    assert answer["shown"] == [one, two, three, four] and answer["order"] == "3 1 4 2" and answer["labeler"] == "me"
    assert 0 <= answer["seconds"] < 60 and "acceptable" not in answer


def test_tied_responses_form_no_pair_and_are_kept(folder, tmp_path, monkeypatch):
    (_, equal), (row,) = person(folder, tmp_path, monkeypatch, "3=1 4 2", "1=2=3=4")
    one, two, three, four = shown(SAMPLES[0])
    assert row["responses"] == [one, four, two] and row["ties"] == [[one, three]]
    assert (equal["id"], equal["order"]) == ("id1", "1=2=3=4")
    assert read_rankings(tmp_path / "rankings.jsonl")[0]["responses"] == [one, four, two]


def test_none_is_acceptable_and_the_order_still_counts(folder, tmp_path, monkeypatch):
    rows, rankings = person(folder, tmp_path, monkeypatch, "3142!", "1234", "!")
    assert [row.get("acceptable") for row in rows] == [False, None] and len(rankings) == 2
    assert rows[0]["order"] == "3 1 4 2"


def test_one_number_decides_between_two(folder, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "samples.jsonl", [{**row, "responses": row["responses"][:2]} for row in SAMPLES])
    rows, rankings = person(tmp_path, tmp_path / "out", monkeypatch, "2", "1 !", "=", "3", "s!")
    assert [row["order"] for row in rows] == ["2 1", "1 2", "1=2", ""] and len(rankings) == 2
    assert [row.get("acceptable") for row in rows] == [None, False, None, None]


def test_skip_undo_and_invalid_answers(folder, tmp_path, monkeypatch, capsys):
    rows, rankings = person(folder, tmp_path, monkeypatch, "u", "s", "u", "1234", "99", "u", "4321", "s", "?", "Q")
    assert [row["id"] for row in rankings] == ["id0"] and [row["order"] for row in rows] == ["4 3 2 1", ""]
    assert rankings[0]["responses"] == shown(SAMPLES[0])[::-1]
    out = capsys.readouterr().out
    assert "nothing to undo" in out and "each of 1 to 4" in out
    assert "2 answered, 1 of them with a preference, 4 left" in out
    rows, rankings = person(folder, tmp_path, monkeypatch, "u", "u", "1234")  # reaches back into the last session
    assert rankings[0]["responses"] == shown(SAMPLES[0]) and len(rows) == 1


def test_resume_asks_only_what_is_left(folder, tmp_path, monkeypatch, capsys):
    person(folder, tmp_path, monkeypatch, "1234", "s", "1234")
    capsys.readouterr()
    rows, rankings = person(folder, tmp_path, monkeypatch, "1234", "1234", "s", "u", "1234", "")
    assert "4 of 6" in capsys.readouterr().out
    assert [row["id"] for row in rankings] == ["id0", "id2", "id3", "id4", "id5"] and len(rows) == 6
    assert len(person(folder, tmp_path / "two", monkeypatch, "1234", "1234", "", limit=2)[0]) == 2


def test_labelers_see_different_orders_and_do_not_mix(folder, tmp_path, monkeypatch):
    """One order for all, so that a bias towards the first shown would look like agreement."""
    assert any(shown(row, "ann") != shown(row, "bob") for row in SAMPLES)
    person(folder, tmp_path, monkeypatch, "1234", labeler="ann")
    with pytest.raises(UserError, match="another labeler's"):
        person(folder, tmp_path, monkeypatch, "1234", labeler="bob")


def test_cut_last_line_is_dropped_and_asked_again(folder, tmp_path, monkeypatch, capsys):
    person(folder, tmp_path, monkeypatch, "1234", "1234")
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    rows, _ = person(folder, tmp_path, monkeypatch, "4321")
    assert "cut short" in capsys.readouterr().out
    assert [row["id"] for row in rows] == ["id0", "id1"] and rows[1]["order"] == "4 3 2 1"
    path.write_bytes(path.read_bytes()[:-1])  # only the line end is missing
    rows, _ = person(folder, tmp_path, monkeypatch, "1234")
    assert [row["id"] for row in rows] == ["id0", "id1", "id2"]
    path.write_bytes(b'{"id": "id0", "promp')  # nothing else in the file
    assert person(folder, tmp_path, monkeypatch) == [[], []]


def test_answers_to_other_samples_stay(folder, tmp_path, monkeypatch, capsys):
    person(folder, tmp_path, monkeypatch, "1234", "1234")
    write_jsonl(tmp_path / "samples.jsonl", [{**SAMPLES[0], "id": "new"}, SAMPLES[1]])
    rows, _ = person(tmp_path, tmp_path, monkeypatch, "1234", "")
    assert [row["id"] for row in rows] == ["id0", "id1", "new"]
    assert "answers to other samples (1)" in capsys.readouterr().out


def test_a_persons_and_a_models_rankings_do_not_overwrite_each_other(folder, tmp_path, monkeypatch):
    person(folder, tmp_path / "me", monkeypatch, "1234")
    before = (tmp_path / "me/rankings.jsonl").read_text()
    with pytest.raises(UserError, match="another kind of labeler"):
        ranked(folder, tmp_path / "me")
    assert (tmp_path / "me/rankings.jsonl").read_text() == before
    ranked(folder, tmp_path / "model")
    with pytest.raises(UserError, match="another labeler's"):
        person(folder, tmp_path / "model", monkeypatch, "1234")
    assert (tmp_path / "model/done.json").exists()
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo/done.json").write_text("{}")  # of another stage
    with pytest.raises(UserError, match="another labeler's"):
        person(folder, tmp_path / "ppo", monkeypatch, "1234")
    assert not (tmp_path / "ppo/answers.jsonl").exists()


def test_ctrl_c_and_keys_that_are_no_text(monkeypatch):
    def interrupt(question):
        raise KeyboardInterrupt
    monkeypatch.setattr("builtins.input", interrupt)
    assert terminal.ask("> ") == "q"
    monkeypatch.setattr("builtins.input", lambda question: b"\xe9".decode())
    with pytest.raises(ValueError):
        parse_order(terminal.ask("> "), 4)


# ---- the real script -----------------------------------------------------------------------------------------------


def command(folder, out):
    return [sys.executable, ROOT / "label.py", "rank", "--labeler", "me", "--samples", folder / "samples.jsonl",
            "--out", out]


def test_rank_three_quit_resume_rank_two_through_a_pipe(folder, tmp_path):
    for keys in ("3142\n1234\n4321\nq\n", "2143\n1=2 3 4\n"):  # the second time the input just ends
        made = subprocess.run(command(folder, tmp_path), input=keys, text=True, capture_output=True, timeout=60)
        assert made.returncode == 0, made.stderr
    assert "4 of 6" in made.stdout and "5 answered, 5 of them with a preference, 1 left" in made.stdout
    assert f"reward.py --train {tmp_path}/rankings.jsonl" in made.stdout
    assert len(read_rankings(tmp_path / "rankings.jsonl")) == 5


def test_rank_three_kill_resume_rank_two_at_a_real_terminal(folder, tmp_path):
    pty = pytest.importorskip("pty")
    rows = [{**row, "responses": [text + "\x1b[2J" for text in row["responses"]]} for row in SAMPLES]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    screen = b""
    for keys in (["3142", "12", "1234", "4321"], ["2143", "1234", "q"]):
        pid, fd = pty.fork()
        if pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="60")
            os.execv(sys.executable, list(map(str, command(tmp_path, tmp_path / "out"))))
        for key in keys + ["wait"]:  # each key once the question is there, as a person types
            seen, end = b"", time.time() + 60
            while not seen.endswith(b"> ") and time.time() < end and select.select([fd], [], [], 60)[0]:
                try:
                    part = os.read(fd, 65536)
                except OSError:  # the script has ended
                    break
                if not part:
                    break
                seen += part
            screen += seen
            if key != "wait":
                os.write(fd, key.encode() + b"\n")
        if keys[-1] != "q":
            os.kill(pid, 9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (0 if keys[-1] == "q" else -9)
        os.close(fd)
    assert len(read_rankings(tmp_path / "out/rankings.jsonl")) == 5
    assert b"5 answered, 5 of them with a preference, 1 left" in screen
    assert b"\x1b[2J" not in screen and rb"\x1b[2J" in screen


@pytest.mark.parametrize("words, code", [(["--help"], None), ([], 2), (["rnak"], 2)])
def test_help_and_a_wrong_first_word(words, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["label.py", *words])
    try:
        runpy.run_path(str(ROOT / "label.py"), run_name="__main__")
    except SystemExit as end:
        assert end.code == code
    else:
        assert code is None
    out, err = capsys.readouterr()
    assert "label.py sample" in (err if code else out) and "label.py rank" in (err if code else out)


def test_a_fault_of_the_user_is_one_line_and_exit_code_2():
    made = subprocess.run([sys.executable, ROOT / "label.py", "rank", "--samples", "nowhere"],
                          text=True, capture_output=True, timeout=60)
    assert (made.returncode, made.stderr) == (2, "error: nowhere: no such file\n")
