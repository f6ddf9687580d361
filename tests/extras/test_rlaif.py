"""Machines as labelers: the question, the probabilities, both orders, retries, the cap, the key; against a server of
our own that answers as told. And VADER's rules, where the package is there."""
import http.server
import json
import math
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from common import UserError
from data import pair_accuracy, write_jsonl
from labeling import rlaif
from labeling.rlaif import average, both_orders, expected_wins, people_card, position_card, probability_of_1

RUBRIC = Path(rlaif.__file__).parent / "rubrics/mood.txt"
MOODS = {"good": 2, "fine": 1, "dull": 0, "bad": -1}
RIGHT = list(MOODS)
SAMPLES = [{"id": f"s{i}", "prompt": f"The film {i}", "responses": [f" is {mood} {i}." for mood in order.split()]}
           for i, order in enumerate(["bad fine good dull", "dull bad fine good", "fine good bad dull"])]
CALLS = 3 * 12 + 5 * 2  # every pair of four responses in both orders, and people's


def token(text, *others):
    """One position of a chat completion's log-probabilities: this token, and what else is listed, as (token, p)."""
    listed = [{"token": said, "logprob": math.log(p)} for said, p in others]
    return {"token": text, "logprob": listed[0]["logprob"] if listed else -0.1, "top_logprobs": listed}


def choice(text, *tokens):
    return {"message": {"content": text}, **({"logprobs": {"content": list(tokens)}} if tokens else {})}


@pytest.mark.parametrize("given, expected", [
    (choice(" 2", token(" 2", (" 2", 0.6), ("1", 0.1), (" 1", 0.1), ("x", 0.01))), 0.25),  # with and without a space
    (choice("\n1", token("\n", ("\n", 0.9), ("1", 0.05), ("2", 0.05)), token("1", ("1", 0.9), ("2", 0.1))), 0.9),
    (choice("So", token("So", ("So", 0.9), ("1", 0.03), ("2", 0.01))), 0.75),  # what it might have said
    (choice("1", {"token": "1", "logprob": -0.1, "top_logprobs": []}), 1.0), (choice("Response 2."), 0.0),
    (choice("The", token("The", ("The", 0.9), ("A", 0.1))), None), (choice("12"), None), (choice("2, not 1"), None),
    (choice(None), None)])
def test_probability_of_an_answer(given, expected):
    """The mass of the wrong token; an answer from a number that is part of another; a model that says nothing."""
    assert probability_of_1(given) == (expected if expected is None else pytest.approx(expected))


def test_both_orders_cancel_position_bias():
    """A sign lost for the swapped question makes the average favour the first."""
    def prefer(pairs):  # a better by 0.2, and the first place by 0.15
        return [0.5 + 0.15 + (0.2 if first == "a" else -0.2) for _, first, _ in pairs]
    (p, q), = both_orders(prefer, [("", "a", "b")])
    assert (p, q) == (pytest.approx(0.85), pytest.approx(0.55)) and average(p, q) == pytest.approx(0.7)
    (p, q), = both_orders(prefer, [("", "b", "a")])
    assert average(p, q) == pytest.approx(0.3)
    assert average(None, 0.2) == average(0.9, None) == average(None, None) == 0.5
    first = both_orders(lambda pairs: [0.9] * len(pairs), [("", "a", "b")] * 3)  # the first, whatever it is
    assert position_card("", first) == {"pairs": 3, "read": 3, "flipped": 1.0, "first_shown_wins": 1.0, "unread": 0}
    sure = both_orders(lambda pairs: [0.9 if a == "a" else 0.1 for _, a, _ in pairs], [("", "a", "b"), ("", "b", "a")])
    assert position_card("", sure) == {"pairs": 2, "read": 2, "flipped": 0.0, "first_shown_wins": 0.5, "unread": 0}
    assert position_card("", [(None, 0.2), (0.5, 0.5)])["unread"] == 1


def test_rank_by_expected_wins():
    """Wins credited to the loser; equal sums that are not a tie for want of rounding."""
    assert expected_wins(3, [[1, 2, 0.9], [1, 3, 0.2], [2, 3, 0.4]]) == [[3], [1], [2]]  # 1.4, 1.1, 0.5
    assert expected_wins(4, [[i, j, 0.5] for i in range(1, 5) for j in range(i + 1, 5)]) == [[1, 2, 3, 4]]
    assert expected_wins(3, [[1, 2, 0.5], [1, 3, 0.9], [2, 3, 0.3 + 0.6]]) == [[1, 2], [3]]


def test_agreement_with_people_does_not_credit_a_place():
    """A labeler that always says "1" agrees with every pair whose chosen text is shown first: that must be chance."""
    pairs = [("", f"c{i}", f"r{i}") for i in range(100)]
    card = people_card(pairs, both_orders(lambda pairs: [0.9] * len(pairs), pairs))
    assert card["both orders"]["accuracy"] == 0.5 and card["flipped"] == 1
    right = people_card(pairs, [(0.6, 0.6)] * 80 + [(0.1, 0.1)] * 20)
    ends = torch.tensor([[i, 100 + i] for i in range(100)])
    assert right["both orders"] == pair_accuracy(torch.tensor([0.1] * 80 + [-0.4] * 20), ends)


class Stub(http.server.BaseHTTPRequestHandler):
    """Prefers by mood, and a little the first place; self.server.plan has what to do wrong first."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        one, two = (MOODS[mood] for mood in re.findall("Response . - .*?(good|fine|dull|bad)",
                                                       body["messages"][0]["content"]))
        p = 1 / (1 + math.exp(-(one - two) - 0.3))
        said = "1" if p > 0.5 else "2"
        right = choice(said, *[token(said, ("1", p), ("2", 1 - p))] * body.get("logprobs", False))
        status, content = self.server.plan.pop(0) if self.server.plan else (200, json.dumps({"choices": [right]}))
        self.send_response(status)
        self.send_header("Location", f"{self.server.url}/thief")
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The stub, at work; its address is server.url. Waiting takes no time."""
    stub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    stub.plan, stub.seen, stub.url = [], [], f"http://127.0.0.1:{stub.server_port}/v1"
    monkeypatch.setattr(rlaif.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("LABELER_API_KEY", raising=False)
    threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True).start()
    yield stub
    stub.shutdown()
    stub.server_close()


@pytest.fixture
def ranked(tmp_path):
    """A function: rlaif.rank by a labeler; the moods of each sample's responses, best first."""
    samples, pairs, out = (str(tmp_path / name) for name in ("samples.jsonl", "pairs.jsonl", "out"))
    write_jsonl(samples, SAMPLES)
    write_jsonl(pairs, [{"prompt": "", "chosen": f"good \x1b[2J {i}", "rejected": f"bad {i}"} for i in range(5)])

    def rank(labeler, **flags):
        rlaif.rank(rlaif.Config(labeler, "stub", samples, out=out, pairs=pairs, rubric=str(RUBRIC), **flags))
        return [[text.split()[1] for text in row["responses"]] for row in rows_of(tmp_path / "out/rankings.jsonl")]
    return rank


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_server_ranks_and_its_soft_labels_are_kept(ranked, tmp_path, server, capsys, logprobs):
    """A question that leaves something out; a preference read from the wrong side; a finished run that asks again."""
    with pytest.raises(FileNotFoundError):
        ranked(server.url, dry_run=True)
    out = capsys.readouterr().out
    assert f"{CALLS} calls" in out and r"good \x1b[2J" in out and not server.seen and not (tmp_path / "out").exists()
    assert ranked(server.url, parallel=4, logprobs=logprobs) == [RIGHT] * 3 and len(server.seen) == CALLS
    row = rows_of(tmp_path / "out/answers.jsonl")[0]
    p = (1 / (1 + math.exp(2 - 0.3)) + 1 - 1 / (1 + math.exp(-2 - 0.3))) / 2  # bad against fine: 2 apart, both ways
    assert row["preferences"][0] == [1, 2, pytest.approx(p, abs=1e-4) if logprobs else 0]
    path, _, body = server.seen[0]
    assert path == "/v1/chat/completions" and body["model"] == "stub" and body["temperature"] == 0
    assert body["messages"][0]["content"].startswith(RUBRIC.read_text().strip())
    card = json.loads((tmp_path / "out/agreement.json").read_text())
    assert card["people"]["both orders"]["accuracy"] == 1 and card["samples"]["pairs"] == 18
    out = capsys.readouterr().out
    assert 0 < out.index("agrees with people on 5 held-out pairs: 1.000") < out.index("samples: 18 pairs")
    assert "\x1b" not in out
    with pytest.raises(UserError, match="finished already"):
        ranked(server.url, logprobs=logprobs)


@pytest.mark.parametrize("wrong, tries, message", [
    ((500, "oops"), 6, "HTTP 500 Internal Server Error: oops"), ((429, ""), 6, "HTTP 429"),
    ((200, '{"error": "x"}'), 1, "not a chat completion"), ((401, "bad key"), 1, "HTTP 401 Unauthorized: bad key")])
def test_errors_that_pass_and_errors_that_stay(ranked, tmp_path, server, wrong, tries, message):
    """A run of hours that one hiccup ends; garbage taken for an answer; answers that are lost, or paid for twice."""
    right = json.dumps({"choices": [choice("1")]})
    server.plan = [(200, right)] * 4 + [wrong] * 99  # four of the first ten questions are answered
    with pytest.raises(UserError, match=message):
        ranked(server.url, parallel=1)
    assert len(rows_of(tmp_path / "out/calls.jsonl")) == 4 and (99 - len(server.plan)) % tries == 0
    server.plan = [wrong] * (tries - 1)
    before = len(server.seen)
    assert ranked(server.url) == [RIGHT] * 3 and len(server.seen) - before == CALLS - 4 + tries - 1


def test_the_cap_stops_and_the_same_command_resumes(ranked, server):
    """A cap that is overrun; a run that asks and pays twice."""
    for calls in (12, 24):  # in the second batch of questions
        with pytest.raises(UserError, match="stopped at --max-calls 12"):
            ranked(server.url, max_calls=12)
        assert len(server.seen) == calls
    assert ranked(server.url, max_calls=100) == [RIGHT] * 3 and len(server.seen) == CALLS


def test_the_key_goes_to_the_server_and_nowhere_else(ranked, tmp_path, server, monkeypatch, capsys):
    """A key in a file, in an error message, over plain http, or sent to whom a redirect names."""
    monkeypatch.setenv("LABELER_API_KEY", "sk-secret")
    for status, message in ((403, "(the key)"), (307, "HTTP 307")):
        server.plan = [(status, "x" * 280 + " the key sk-secret")] * 99
        with pytest.raises(UserError, match=message) as error:
            ranked(server.url)
        assert "sk-" not in str(error.value)
    server.plan = []
    ranked(server.url)
    assert all(path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret"
               for path, headers, _ in server.seen)  # nobody was asked at the other address
    assert "sk-secret" not in capsys.readouterr().out
    assert not any(b"sk-secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for url in "http://example.org/v1", "ftp://host/v1", "https://u:sk-secret@host/v1":
        with pytest.raises(UserError, match="LABELER_API_KEY") as error:
            ranked(url)
        assert "sk-secret" not in str(error.value)


def test_vader_ranks_by_its_rules(ranked, tmp_path, monkeypatch):
    """Scores upside down, or ties broken; a traceback where the package is missing."""
    with monkeypatch.context() as patched, pytest.raises(UserError, match="pip install vaderSentiment==3.3.2"):
        patched.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
        ranked("vader")
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed: VADER as a labeler was not tried")
    texts = [" is bad.", " is here.", " is great!", " was there."]
    write_jsonl(tmp_path / "samples.jsonl", [{"id": "a", "prompt": "The film", "responses": texts}])
    assert ranked("vader") == [["great!", "here.", "bad."]]
    assert rows_of(tmp_path / "out/answers.jsonl")[0]["order"] == "3 2=4 1"
