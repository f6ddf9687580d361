"""Machines as labelers: the question, the probabilities, both orders, retries, the cap, the key; against a server of
our own that answers as told. And VADER's rules, where the package is there."""
import http.server
import json
import math
import sys
import threading
from pathlib import Path

import pytest
import torch

import label
import rlaif
import server as server_module
from answers import ranking_of
from common import UserError
from data import write_jsonl
from label import RankConfig
from reward import share
from rlaif import average, both_orders, expected_wins, people_card, position_card, probability_of_1, question

ROOT = Path(__file__).resolve().parent.parent
MOODS = {"good": 2, "fine": 1, "dull": 0, "bad": -1}
SAMPLES = [{"id": f"s{i}", "prompt": f"The film {i}", "responses": [f" is {mood} {i}." for mood in order.split()]}
           for i, order in enumerate(["bad fine good dull", "dull bad fine good", "fine good bad dull"])]


def token(text, *others):
    """One position of a chat completion's log-probabilities: this token, and what else is listed, as (token, p)."""
    listed = [{"token": said, "logprob": math.log(p)} for said, p in others]
    return {"token": text, "logprob": listed[0]["logprob"] if listed else -0.1, "top_logprobs": listed}


def choice(text, *tokens):
    return {"message": {"content": text}, **({"logprobs": {"content": list(tokens)}} if tokens else {})}


@pytest.mark.parametrize("given, expected", [
    (choice("1", token("1", ("1", 0.6), ("2", 0.2), ("The", 0.1))), 0.75),
    (choice(" 2", token(" 2", (" 2", 0.6), ("1", 0.1), (" 1", 0.1), ("x", 0.01))), 0.25),  # with and without a space
    (choice("\n1", token("\n", ("\n", 0.9), ("1", 0.05), ("2", 0.05)), token("1", ("1", 0.9), ("2", 0.1))), 0.9),
    # What it might have said.
    (choice("Response", token("Response", ("Response", 0.9), ("1", 0.03), ("2", 0.01))), 0.75),
    (choice("1", token("1", ("1", 0.9), ("x", 0.1))), 0.9),  # "2" is not listed: as unlikely as the least that is
    (choice("1", {"token": "1", "logprob": -0.1, "top_logprobs": []}), 1.0),
    (choice("The", token("The", ("The", 0.9), ("A", 0.1))), None),
    (choice("1"), 1.0), (choice("Response 2."), 0.0), (choice("2, not 1"), None), (choice("12"), None),
    (choice(""), None),
    ({"message": {"content": None}}, None), ({"message": None, "logprobs": None}, None), ({"text": "1"}, None)])
def test_probability_of_an_answer(given, expected):
    """The mass of the wrong token; an answer from a number that is part of another; a crash on a model that says
    nothing."""
    assert probability_of_1(given) == (expected if expected is None else pytest.approx(expected))


def test_a_log_probability_that_is_no_number_is_no_answer():
    """NaN, which the server's arithmetic may leave, taken for certainty."""
    given = choice("1", token("1", ("1", 0.6), ("2", 0.2)))
    given["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = math.nan
    with pytest.raises(ValueError):
        probability_of_1(given)


def test_question_holds_rubric_and_both_responses_in_order():
    text = question("Rubric.\n", "The film", " is A.", " is B.")
    assert text.index("Rubric.") < text.index("The film") < text.index("1 - is A.") < text.index("2 - is B.")
    assert "Beginning" not in question("Rubric.", "", "A", "B")
    for name in ("mood", "helpful", "harmless"):
        assert len((ROOT / "rubrics" / f"{name}.txt").read_text()) > 100


def test_both_orders_cancel_a_liking_for_the_first_place():
    """A sign lost for the swapped question makes the average favour the first."""
    def prefer(pairs):  # a better by 0.2, and the first place by 0.15
        return [0.5 + 0.15 + (0.2 if first == "a" else -0.2) for _, first, _ in pairs]
    (p, q), = both_orders(prefer, [("", "a", "b")])
    assert (p, q) == (pytest.approx(0.85), pytest.approx(0.55)) and average(p, q) == pytest.approx(0.7)
    (p, q), = both_orders(prefer, [("", "b", "a")])
    assert average(p, q) == pytest.approx(0.3)
    assert average(None, 0.2) == average(0.9, None) == average(None, None) == 0.5  # one order alone is a place's
    first = both_orders(lambda pairs: [0.9] * len(pairs), [("", "a", "b")] * 3)  # the first, whatever it is
    assert position_card(first) == {"pairs": 3, "read": 3, "flipped": 1.0, "first_shown_wins": 1.0, "unread": 0}
    sure = both_orders(lambda pairs: [0.9 if a == "a" else 0.1 for _, a, _ in pairs], [("", "a", "b"), ("", "b", "a")])
    assert position_card(sure) == {"pairs": 2, "read": 2, "flipped": 0.0, "first_shown_wins": 0.5, "unread": 0}
    assert position_card([(None, 0.2), (0.5, 0.5)])["unread"] == 1


def test_rank_by_expected_wins():
    assert expected_wins(3, [[1, 2, 0.9], [1, 3, 0.2], [2, 3, 0.4]]) == [[3], [1], [2]]  # 1.4, 1.1, 0.5
    assert expected_wins(4, [[i, j, 0.5] for i in range(1, 5) for j in range(i + 1, 5)]) == [[1, 2, 3, 4]]
    assert expected_wins(3, [[1, 2, 0.5], [1, 3, 1.0], [2, 3, 1.0]]) == [[1, 2], [3]]


def test_agreement_with_people_does_not_credit_a_place():
    """A labeler that always says "1" agrees with every pair whose chosen text is shown first: that must count for
    half."""
    rows = [{"prompt": "", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(100)]
    asked = [("", row["chosen"], row["rejected"]) for row in rows]
    card = people_card(rows, both_orders(lambda pairs: [0.9] * len(pairs), asked))
    assert card["both orders"]["accuracy"] == card["one order"]["accuracy"] == 0.5 and card["flipped"] == 1
    right = people_card(rows, [(0.6, 0.6)] * 80 + [(0.1, 0.1)] * 20)
    ends = torch.tensor([[i, 100 + i] for i in range(100)])
    assert right["both orders"] == share(torch.tensor([0.1] * 80 + [-0.4] * 20), ends)


# ---- against a server ------------------------------------------------------------------------------------------------


class Stub(http.server.BaseHTTPRequestHandler):
    """Prefers by mood, and a little the first place; self.server.plan has what to do wrong first."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        status, headers, content = 200, {}, None
        if self.server.plan:
            status, headers, content = self.server.plan.pop(0)
        if body.get("logprobs") and self.server.logprobs == "refused":
            status, content = 400, '{"error": "logprobs is not supported"}'
        if content is None:
            one, two = ([MOODS[mood] for mood in MOODS if mood in line][0] for line in
                        body["messages"][0]["content"].splitlines() if line.startswith("Response "))
            p = 1 / (1 + math.exp(-(one - two) - 0.3))
            answer = choice("1" if p > 0.5 else "2", *([token("1" if p > 0.5 else "2", ("1", p), ("2", 1 - p))]
                                                        if body.get("logprobs") else []))
            content = json.dumps({"choices": [answer]})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content.encode())
        except BrokenPipeError:
            pass  # the client has given up waiting

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The stub, at work; its address is server.url. Waiting takes no time."""
    class Quick(threading.Event):
        def wait(self, timeout=None):
            stub.waits.append(timeout)

    monkeypatch.setattr(server_module, "Event", Quick)
    monkeypatch.delenv("LABELER_API_KEY", raising=False)
    stub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    stub.plan, stub.seen, stub.waits, stub.logprobs = [], [], [], ""
    stub.url = f"http://127.0.0.1:{stub.server_port}/v1"
    threading.Thread(target=stub.serve_forever, args=(0.01,), daemon=True).start()
    yield stub
    stub.shutdown()
    stub.server_close()


def ranked(tmp_path, labeler, **flags):
    """label.py rank by a machine: rows of answers.jsonl."""
    write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    pairs = [{"prompt": "", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(5)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    label.rank(RankConfig(**{"labeler": labeler, "model": "stub", "samples": str(tmp_path / "samples.jsonl"),
                             "out": str(tmp_path / "out"), "pairs": str(tmp_path / "pairs.jsonl"), "device": "cpu",
                             "dtype": "float32", **flags}))
    return [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]


def moods(row):
    """The moods of a ranking's responses, best first."""
    return [text.split()[1] for text in row["responses"]]


def test_a_server_ranks_and_its_soft_labels_are_kept(tmp_path, server, capsys):
    rows = ranked(tmp_path, server.url)
    rankings = [json.loads(line) for line in (tmp_path / "out/rankings.jsonl").read_text().splitlines()]
    assert [moods(row) for row in rankings] == [["good", "fine", "dull", "bad"]] * 3
    assert {row["labeler"] for row in rankings} == {"stub"} and rows[0]["shown"] == SAMPLES[0]["responses"]
    i, j, p = rows[0]["preferences"][0]  # bad against fine: 2 apart, from both sides
    assert (i, j) == (1, 2)
    assert p == pytest.approx((1 / (1 + math.exp(2 - 0.3)) + 1 - 1 / (1 + math.exp(-2 - 0.3))) / 2, abs=1e-4)
    assert len(server.seen) == 3 * 12 + 5 * 2  # every pair of four in both orders, and people's
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and body["model"] == "stub"
    assert body["temperature"] == 0 and body["logprobs"] is True
    assert "Authorization" not in headers
    card = json.loads((tmp_path / "out/agreement.json").read_text())
    assert card["people"]["both orders"]["accuracy"] == 1
    assert card["samples"]["flipped"] == 0 and card["samples"]["pairs"] == 18
    assert "agrees with people on 5 held-out pairs, both orders: 1.000" in capsys.readouterr().out
    with pytest.raises(UserError, match="finished already"):
        ranked(tmp_path, server.url)
    with pytest.raises(UserError, match="holds another run: --rubric was"):
        ranked(tmp_path, server.url, rubric="rubrics/helpful.txt")


def test_without_log_probabilities_the_text_counts(tmp_path, server):
    server.logprobs = "refused"
    rows = ranked(tmp_path, server.url)
    assert [moods(row) for row in map(ranking_of, rows)] == [["good", "fine", "dull", "bad"]] * 3
    assert {p for row in rows for _, _, p in row["preferences"]} <= {0.0, 0.5, 1.0}
    asked = [bool(body.get("logprobs")) for _, _, body in server.seen]
    assert 1 <= sum(asked) <= 4 and not any(asked[8:])  # those under way at once; then it is known


@pytest.mark.parametrize("wrong", [(500, {}, "oops"), (503, {}, ""), (429, {"Retry-After": "7"}, "slow down"),
                                   (200, {}, "<html>"), (200, {}, '{"choices": []}'), (200, {}, '{"error": "x"}'),
                                   (200, {}, "[1]"),
                                   (200, {}, '{"choices": [{"logprobs": {"content": [{"x": 1}]}}]}')])
def test_what_passes_is_tried_again(tmp_path, server, wrong):
    server.plan = [wrong, wrong]
    rows = ranked(tmp_path, server.url, parallel=1)
    assert len(rows) == 3 and server.waits == ([7, 7] if wrong[0] == 429 else [1, 2])


def test_a_slow_server_is_asked_again(tmp_path, server, monkeypatch):
    real, slow = Stub.do_POST, [True]

    def late(self):
        if slow and slow.pop():
            threading.Event().wait(0.6)
        real(self)
    monkeypatch.setattr(Stub, "do_POST", late)
    assert len(ranked(tmp_path, server.url, timeout=0.3, parallel=1)) == 3
    assert server.waits == [1]


def test_a_question_that_the_server_refuses_is_left_unread(tmp_path, server):
    """One text that is too long for the server, and no run ever ends."""
    server.plan = [(200, {}, None)] * 3 + [(400, {}, "too long")] * 2
    rows = ranked(tmp_path, server.url, parallel=1)
    assert len(rows) == 3 and json.loads((tmp_path / "out/agreement.json").read_text())["people"]["unread"] == 1
    calls = [json.loads(line) for line in (tmp_path / "out/calls.jsonl").read_text().splitlines()]
    assert [call["text"] for call in calls if call["first"] is None] == ["HTTP 400 Bad Request: too long"]
    assert all(body.get("logprobs") for _, _, body in server.seen[5:])  # that was not for the log-probabilities


def test_a_small_cap_and_a_cap_on_tries(tmp_path, server):
    """A cap below what is asked at once, that never comes on; and tries that are paid but not counted."""
    for calls in (3, 6, 9):
        ranked(tmp_path, server.url, max_calls=3)
        assert len(server.seen) == calls
    server.plan = [(500, {}, "")] * 50
    ranked(tmp_path, server.url, max_calls=4)
    assert len(server.seen) == 13


def test_another_labelers_answers_are_not_overwritten(tmp_path, server, monkeypatch):
    """A person's evening, lost to a machine that was given the same folder."""
    monkeypatch.setattr(rlaif, "vader", lambda: lambda pairs: [0.5] * len(pairs))
    before = [{"id": "s0", "prompt": "The film 0", "labeler": "ann", "shown": SAMPLES[0]["responses"],
               "order": "1 2 3 4", "seconds": 1}]
    (tmp_path / "out").mkdir()
    write_jsonl(tmp_path / "out/answers.jsonl", before)
    for labeler in ("vader", server.url):
        with pytest.raises(UserError, match="another labeler's work"):
            ranked(tmp_path, labeler)
    assert json.loads((tmp_path / "out/answers.jsonl").read_text()) == before[0]


@pytest.mark.parametrize("wrong, message, tries", [
    ((401, {}, "bad key"), "HTTP 401 Unauthorized: bad key", 1), ((404, {}, ""), "does the address end in /v1", 1),
    ((302, {"Location": "http://127.0.0.1:1/steal"}, ""), "HTTP 302", 1),
    ((500, {}, "\x1b[2J down"), r"HTTP 500 .*\\x1b\[2J down", 6),
    ((200, {}, "no json"), "no chat completion", 6)])
def test_what_does_not_pass_is_one_line_and_what_was_answered_stays(tmp_path, server, wrong, message, tries):
    answered = 4
    server.plan = [(200, {}, None)] * answered + [wrong] * 6
    with pytest.raises(UserError, match=message):
        ranked(tmp_path, server.url, parallel=1)
    assert len(server.seen) == answered + tries
    assert len((tmp_path / "out/calls.jsonl").read_text().splitlines()) == answered
    server.plan = []
    assert len(ranked(tmp_path, server.url, parallel=1)) == 3  # goes on
    assert len(server.seen) == tries + 3 * 12 + 5 * 2  # no question twice


def test_nobody_there_is_one_line(tmp_path, server):
    with pytest.raises(UserError, match="127.0.0.1:9/v1/chat/completions: cannot be reached"):
        ranked(tmp_path, "http://127.0.0.1:9/v1", parallel=1)
    assert server.waits == [1, 2, 4, 8, 16]


def test_the_cap_stops_and_the_same_command_goes_on(tmp_path, server, capsys):
    """A cap that is overrun, or a run that asks and pays twice."""
    assert len(ranked(tmp_path, server.url, max_calls=10 + 12 + 5)) == 1
    assert len(server.seen) == 27 and not (tmp_path / "out/done.json").exists()
    assert "stopped at --max-calls 27: 1 of 3 samples are ranked" in capsys.readouterr().out
    path = tmp_path / "out/calls.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # killed while writing: this one is asked again
    assert len(ranked(tmp_path, server.url, max_calls=100)) == 3 and len(server.seen) == 46 + 1
    assert (tmp_path / "out/done.json").exists()


def test_a_dry_run_calls_nothing(tmp_path, server, capsys):
    with pytest.raises(FileNotFoundError):
        ranked(tmp_path, server.url, dry_run=True)
    out = capsys.readouterr().out
    assert not server.seen and not (tmp_path / "out").exists()
    assert "46 calls (5 pairs of people's, 18 of samples, both orders; 0 answered already" in out
    assert "Response 2 - " in out


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(tmp_path, server, monkeypatch, capsys):
    """A key in a log, in a file, in an error message, or sent to whom a redirect names."""
    monkeypatch.setenv("LABELER_API_KEY", "sk-secret")
    ranked(tmp_path, server.url)
    assert all(headers["Authorization"] == "Bearer sk-secret" for _, headers, _ in server.seen)
    server.plan = [(403, {}, "x" * 280 + " the key sk-secret is not valid")]
    with pytest.raises(UserError) as error:
        ranked(tmp_path, server.url, out=str(tmp_path / "second"), parallel=1)
    assert "sk-secret" not in str(error.value) and "sk-" not in str(error.value) and "(the key)" in str(error.value)
    server.plan, asked = [(307, {"Location": f"{server.url}/thief"}, "")], len(server.seen)
    with pytest.raises(UserError, match="HTTP 307"):
        ranked(tmp_path, server.url, out=str(tmp_path / "second"), parallel=1)
    assert len(server.seen) == asked + 1  # nobody was asked at the other address
    assert "sk-secret" not in capsys.readouterr().out
    assert not any(b"sk-secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for url, message in [("http://example.org/v1", "over https only"),
                         ("http://u:sk-secret@127.0.0.1/v1", "LABELER_API_KEY"),
                         ("http://:sk-secret@127.0.0.1/v1", "LABELER_API_KEY"),
                         ("ftp://u:sk-secret@host/v1", "LABELER_API_KEY"), ("ftp://host/v1", "not an http"),
                         ("http:///v1", "not an http"), ("http://[bad/v1", "not an address"),
                         ("http://localhost:abc/v1", "not an address"), ("https://ho st/v1", "not an http")]:
        with pytest.raises(UserError, match=message) as error:
            ranked(tmp_path, url, out=str(tmp_path / "third"))
        assert "sk-secret" not in str(error.value)
    monkeypatch.setenv("LABELER_API_KEY", "two\nlines")
    with pytest.raises(UserError, match="no key has"):
        ranked(tmp_path, server.url, out=str(tmp_path / "third"))


def test_errors_write_nothing(tmp_path, server):
    (tmp_path / "empty.txt").write_text(" \n")
    for flags, message in [({"model": ""}, "--model is empty"), ({"rubric": "no.txt"}, "no such file"),
                           ({"max_calls": 0}, "--max-calls"), ({"rubric": str(tmp_path / "empty.txt")}, "empty"),
                           ({"parallel": 0}, "--parallel"), ({"limit": -1}, "--limit"),
                           ({"pairs": "no.jsonl"}, "no such file"), ({"timeout": math.nan}, "--timeout")]:
        with pytest.raises(UserError, match=message):
            ranked(tmp_path, server.url, **flags)
        assert not (tmp_path / "out").exists() and not server.seen


# ---- VADER -----------------------------------------------------------------------------------------------------------


def test_vader_ranks_by_its_rules(tmp_path):
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not there: pip install -r tests/requirements.txt")
    texts = [" is bad.", " is here.", " is great!", " was there."]
    write_jsonl(tmp_path / "samples.jsonl", [{"id": "a", "prompt": "The film", "responses": texts}])
    (tmp_path / "machine").mkdir()
    rows = ranked(tmp_path / "machine", "vader", model="", samples=str(tmp_path / "samples.jsonl"))
    assert rows[0]["order"] == "3 2=4 1" and rows[0]["labeler"] == "vader"
    ranking = json.loads((tmp_path / "machine/out/rankings.jsonl").read_text())
    assert ranking["responses"] == [" is great!", " is here.", " is bad."]
    assert ranking["ties"] == [[" is here.", " was there."]]


def test_without_the_package_vader_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match="pip install vaderSentiment==3.3.2"):
        ranked(tmp_path, "vader")
    assert not (tmp_path / "out").exists()
