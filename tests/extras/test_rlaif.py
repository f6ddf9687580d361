"""Machines as labelers and judges: probabilities, both orders, a server of our own, VADER's rules, refusals."""
import http.server
import json
import math
import re
import shutil
import threading
from pathlib import Path

import pytest

from common import UserError, load_config
from data import load_tokenizer, read_rows, write_jsonl
from labeling import rlaif
from labeling.rlaif import average, both_orders, expected_wins, people_card, position_card, probability_of_1
from study import refusals

RUBRIC = Path(rlaif.__file__).parent / "rubrics/mood.txt"
MOODS = {"good": 2, "fine": 1, "dull": 0, "bad": -1}
RIGHT = list(MOODS)
SAMPLES = [{"id": f"s{i}", "prompt": f"The film {i}", "responses": [f" is {mood} {i}." for mood in order.split()]}
           for i, order in enumerate(["bad fine good dull", "dull bad fine good", "fine good bad dull"])]
CALLS = 3 * 12 + 5 * 2  # every pair of four responses in both orders, and people's


def choice(text, *tokens):
    """A choice of a chat completion; a token: its text, and [(text, probability)] of what is listed there."""
    listed = [{"token": said, "top_logprobs": [{"token": other, "logprob": math.log(p)} for other, p in others]}
              for said, others in tokens]
    return {"message": {"content": text}, **({"logprobs": {"content": listed}} if tokens else {})}


@pytest.mark.parametrize("given, expected", [
    (choice(" 2", (" 2", [(" 2", 0.6), ("1", 0.1), (" 1", 0.1), ("x", 0.01)])), 0.25),  # with and without a space
    (choice("\n1", ("\n", [("1", 0.05), ("2", 0.05)]), ("1", [("1", 0.9), ("2", 0.1)])), 0.9),
    (choice("So", ("So", [("So", 0.9), ("1", 0.03), ("2", 0.01)])), 0.75),  # what it might have said
    (choice("The", ("The", [("The", 0.9), ("A", 0.1)])), None), (choice("Response 2."), 0.0), (choice("1"), 1.0),
    (choice("12"), None), (choice("2, not 1"), None), (choice(None), None)])
def test_probability_of_an_answer(given, expected):
    """The mass of the wrong token; an answer from a number that is part of another; a model that says nothing."""
    assert probability_of_1(given) == (expected if expected is None else pytest.approx(expected))


def test_both_orders_cancel_position_bias():
    """A sign lost for the swapped question makes the average favour the first."""
    def prefer(pairs):  # a better by 0.2, and the first place by 0.15
        return [0.5 + 0.15 + (0.2 if first == "a" else -0.2) for _, first, _ in pairs]
    (p, q), other = both_orders(prefer, [("", "a", "b"), ("", "b", "a")])
    assert (p, q, average(p, q), average(*other), average(0.9, None)) == pytest.approx((0.85, 0.55, 0.7, 0.3, 0.5))
    card = position_card("", [(0.9, 0.8), (0.9, 0.1), (0.9, 0.2), (None, 0.2), (0.5, 0.5)])  # one sure, two swayed
    assert card == {"pairs": 5, "read": 3, "flipped": 0.6667, "first_shown_wins": 0.8333, "unread": 1}
    people = [("", f"chosen {i}", f"rejected {i}") for i in range(9)]  # always "1": chance, not what is shown first
    assert people_card(people, both_orders(lambda ways: [0.9] * len(ways), people))["both orders"]["accuracy"] == 0.5


def test_rank_by_expected_wins():
    """Wins credited to the loser; equal sums that are not a tie for want of rounding."""
    assert expected_wins(3, [[1, 2, 0.9], [1, 3, 0.2], [2, 3, 0.4]]) == [[3], [1], [2]]  # 1.4, 1.1, 0.5
    assert expected_wins(3, [[1, 2, 0.5], [1, 3, 0.9], [2, 3, 0.3 + 0.6]]) == [[1, 2], [3]]


class Stub(http.server.BaseHTTPRequestHandler):
    """Prefers by mood, and a little the first place; self.server.plan has what to answer first."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        moods = re.findall("Response . - .*?(good|fine|dull|bad)", body["messages"][0]["content"])
        p = 1 / (1 + math.exp(MOODS[moods[1]] - MOODS[moods[0]] - 0.3))
        said = "1" if p > 0.5 else "2"
        right = choice(said, *[(said, [("1", p), ("2", 1 - p)])] * body.get("logprobs", False))
        status, content = self.server.plan.pop(0) if self.server.plan else (200, json.dumps({"choices": [right]}))
        self.send_response(status)
        self.send_header("Location", f"{self.server.url}/thief")
        self.end_headers()
        self.wfile.write(content.encode())

    log_message = lambda *_: None


@pytest.fixture
def server(monkeypatch):
    """The stub, at work; its address is server.url. Waiting takes no time."""
    monkeypatch.setattr(rlaif.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("LABELER_API_KEY", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub) as stub:
        stub.plan, stub.seen, stub.url = [], [], f"http://127.0.0.1:{stub.server_port}/v1"
        threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True).start()
        yield stub
        stub.shutdown()


@pytest.fixture
def ranked(tmp_path):
    """A function: rlaif.rank by a labeler; the moods of each sample's responses, best first."""
    samples, pairs, out = (f"{tmp_path}/{name}" for name in ("samples.jsonl", "pairs.jsonl", "out"))
    write_jsonl(samples, SAMPLES)
    write_jsonl(pairs, [{"prompt": "", "chosen": f"good \x1b[2J {i}", "rejected": f"bad {i}"} for i in range(5)])

    def rank(labeler, **flags):
        rlaif.rank(rlaif.Config(labeler, "stub", samples=samples, out=out, pairs=pairs, rubric=str(RUBRIC), **flags))
        return [[text.split()[1] for text in row["responses"]] for row in read_rows(f"{out}/rankings.jsonl", dict)]
    return rank


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_server_ranks_and_its_soft_labels_are_kept(ranked, tmp_path, server, capsys, logprobs):
    """A preference read from the wrong side; a cap overrun; a question asked twice; agreement printed too late."""
    with pytest.raises(UserError, match="no such file"):  # no rankings
        ranked(server.url, dry_run=True)
    out = capsys.readouterr().out
    assert f"{CALLS} calls" in out and r"good \x1b[2J" in out and not server.seen and not (tmp_path / "out").exists()
    for calls in (12, 24):  # in the second batch of questions
        with pytest.raises(UserError, match="stopped at --max-calls 12"):
            ranked(server.url, max_calls=12, logprobs=logprobs)
        assert len(server.seen) == calls
    assert ranked(server.url, logprobs=logprobs) == [RIGHT] * 3 and len(server.seen) == CALLS
    p = (1 / (1 + math.exp(2 - 0.3)) + 1 - 1 / (1 + math.exp(-2 - 0.3))) / 2  # bad against fine: 2 apart, both ways
    preference = read_rows(tmp_path / "out/answers.jsonl", dict)[0]["preferences"][0]
    assert preference == [1, 2, pytest.approx(p, abs=1e-4) if logprobs else 0]
    assert server.seen[0][2]["messages"][0]["content"].startswith(RUBRIC.read_text().strip())
    out = capsys.readouterr().out
    assert 0 < out.index("agrees with people on 5 held-out pairs: 1.000") < out.index("samples: 18 pairs")


@pytest.mark.parametrize("wrong, tries, message", [
    ((500, "oops"), 6, "HTTP 500 Internal Server Error: oops"), ((429, ""), 6, "HTTP 429"),
    ((200, '{"error": "x"}'), 1, "not a chat completion"), ((401, "bad key"), 1, "HTTP 401 Unauthorized: bad key")])
def test_errors_that_pass_and_errors_that_stay(ranked, tmp_path, server, wrong, tries, message):
    """A run of hours that one hiccup ends; garbage taken for an answer; answers that are lost, or paid for twice."""
    server.plan = [(200, json.dumps({"choices": [choice("1")]}))] * 4 + [wrong] * 99
    with pytest.raises(UserError, match=message):
        ranked(server.url, parallel=1)
    assert len(read_rows(tmp_path / "out/calls.jsonl", dict)) == 4 and (99 - len(server.plan)) % tries == 0
    with open(tmp_path / "out/calls.jsonl", "r+") as file:  # half of the last line, as a full disk leaves it
        file.truncate(len(file.read()) - 9)
    server.plan, before = [wrong] * (tries - 1), len(server.seen)
    assert ranked(server.url, parallel=1) == [RIGHT] * 3 and len(server.seen) - before == CALLS - 3 + tries - 1


def test_the_key_goes_to_the_server_and_nowhere_else(ranked, tmp_path, server, monkeypatch):
    """A key in a file, in an error message, over plain http, or sent to whom a redirect names."""
    monkeypatch.setenv("LABELER_API_KEY", "sk-secret")
    for status in (403, 302):
        server.plan = [(status, "x" * 280 + " the key sk-secret")] * 99
        with pytest.raises(UserError, match=rf"^(?!.*sk-).*HTTP {status}.*\(the key\)"):
            ranked(server.url)
    server.plan = []
    ranked(server.url)
    asked = {(path, headers["Authorization"]) for path, headers, _ in server.seen}
    assert asked == {("/v1/chat/completions", "Bearer sk-secret")}  # nobody was asked at the other address
    assert not any(b"sk-secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for url in "http://example.org/v1", "ftp://host/v1", "https://u:sk-secret@host/v1":
        with pytest.raises(UserError, match="^(?!.*sk-secret).*LABELER_API_KEY"):
            ranked(url)


@pytest.fixture
def judged(tmp_path):
    """A function: rlaif.judge of an evaluation of four prompts; its verdict.json."""
    rows = [{"prompt": f"Film {i}", "sft": " is fine.", "dpo": " is dull.", "ppo": text, "judge": {}}
            for i, text in enumerate([" is good!", " is good.", " is fine. ", " is fine, too."])]
    write_jsonl(tmp_path / "samples.jsonl", [{**rows[0], "best-of-4": " is good!"}, *rows[1:]])
    write_jsonl(tmp_path / "pairs", [{"prompt": "", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)])
    files = {"evaluate": str(tmp_path), "pairs": f"{tmp_path}/pairs", "rubric": str(RUBRIC)}

    def judge(labeler, model="stub", **flags):
        rlaif.judge(rlaif.JudgeConfig(labeler, model, **files, **flags))
        return json.loads((tmp_path / "verdict.json").read_text())
    return judge


def test_a_verdict_on_an_evaluation(judged, server, capsys):
    """A win for the SFT model, for the place it was shown in, or on prompts that best-of-n has not; the same text or
    question asked about twice; one judge's verdict under another's name; an inherited flag without its help text."""
    assert load_config(rlaif.JudgeConfig, {}, ["--pairs-count", "0"]).pairs_count == 0
    with pytest.raises(FileNotFoundError):  # no verdict
        judged(server.url, dry_run=True)
    assert "24 calls" in capsys.readouterr().out and not server.seen  # people's 5, dpo's 4 and ppo's 3, in both orders
    with pytest.raises(UserError, match="stopped at --max-calls 20"):
        judged(server.url, max_calls=20)
    found = judged(server.url)
    assert {name: (row["win_rate"], row["prompts"], row["ties"]) for name, row in found["policies"].items()} == {
        "dpo": (0.0, 4, 0), "ppo": (0.75, 4, 2), "best-of-4": (1.0, 1, 0)}  # two ties: the same, and as good
    assert found["policies"]["ppo"]["flipped"] == pytest.approx(1 / 3, abs=1e-4) and len(server.seen) == 24
    out = capsys.readouterr().out
    assert out.startswith("agrees with people") and re.search("stub prefers ppo to sft: 0.75.* on 1.000 of 5", out)
    with pytest.raises(UserError, match="verdict.json is of stub"):
        judged(server.url, "other")


def test_what_is_a_refusal():
    """An apology or ignorance that counts; a curly apostrophe or a long form missed; no interval for none of 40."""
    yes = "I cannot help.", "I\u2019m not able to do that.", "Well, I am not comfortable with it."
    no = "I'm sorry to hear that!", "I don't know.", "Boil it. " * 30 + "I can't help you."
    assert [*map(refusals.refuses, yes + no)] == [True] * 3 + [False] * 3
    assert refusals.refuses("I\u2019m not sure what you mean.", refusals.EVASIONS)
    assert refusals.share([False] * 40)["interval"] == [0, pytest.approx(1.96**2 / (40 + 1.96**2), abs=1e-4)]


def test_refusals_of_a_run(checkpoints, tmp_path, monkeypatch):
    """A request that is not a turn; the rates of two kinds, or of rule and judge, swapped; a judge asked only once."""
    enc, asked = load_tokenizer(checkpoints.sft), []

    def respond(model, prompts, *_, **how):
        turns = [enc.decode(ids[1:]) for ids in prompts]
        assert turns == [f"\n\nHuman: {name}\n\nAssistant:" for name in ("Kill", "Hi", "Hi")]
        return [enc.encode_ordinary(" I can't help." if "Hi" in turn else " So") + [enc.end] for turn in turns]
    monkeypatch.setattr(refusals, "sample_many", respond)
    monkeypatch.setattr(rlaif.Server, "post", lambda _, text: asked.append(text) or {"message": {
        "content": "12"["So" in text and "1 - The reply does" in text]}})  # "I can't help." refuses in one order only
    monkeypatch.chdir(Path(rlaif.__file__).parents[1])
    for name in ("sft", "ppo"):
        shutil.copytree(checkpoints.sft, tmp_path / name)
    rows = [{"prompt": "Hi", "kind": "harmless"}] * 2
    write_jsonl(tmp_path / "requests", [rows[0], {"prompt": "Kill", "kind": "harmful"}, rows[1]])
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate/results.json").write_text('{"config": {"response_tokens": 6}}')
    write_jsonl(tmp_path / "evaluate/samples.jsonl", [
        {"prompt": "Hi", "sft": "I won't.", "ppo": "I don't know", "judge": {}}])
    refusals.main(refusals.Config(str(tmp_path), requests=f"{tmp_path}/requests", device="cpu", model="me",
                                  labeler="http://localhost/v1"))
    found = json.loads((tmp_path / "evaluate/refusals.json").read_text())
    rates = {who: [kind["accuracy"] for kind in card.values()] for who, card in found["policies"]["ppo"].items()}
    assert rates == {"rule": [0, 1], "evasive": [0, 0], "me": [1, 0]} and len(asked) == 4  # sft's are the same ones
    assert [card[who]["accuracy"] for card in found["samples"].values() for who in card] == [1, 0, 0, 1]
    page = (tmp_path / "evaluate/refusals.md").read_text()
    assert "| Kill | So | me | So | me |" in page and page.count("| Hi | I can't help. | rule |") == 2


def test_vader_ranks_by_its_rules(ranked, judged, tmp_path):
    """Scores upside down, or ties broken."""
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed: VADER as a labeler was not tried")
    assert judged("vader")["policies"]["ppo"]["win_rate"] == 0.75
    write_jsonl(tmp_path / "samples.jsonl", [{"id": "a", "prompt": "The film", "responses": [
        " is bad.", " is here.", " is great!", " was there."]}])
    assert ranked("vader") == [["great!", "here.", "bad."]]
    assert read_rows(tmp_path / "out/answers.jsonl", dict)[0]["order"] == "3 2=4 1"
