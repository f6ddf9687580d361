"""Machines in people's place: a language model behind a server (RLAIF), and VADER's rules, which need none.

    llama-server -m MODEL.gguf --port 8080               or vLLM, Ollama, a hosted service: whatever speaks OpenAI's API
    python label.py rank --labeler http://localhost:8080/v1 --model NAME --dry-run true
    python label.py rank --labeler http://localhost:8080/v1 --model NAME
    python label.py rank --labeler vader                 (pip install vaderSentiment==3.3.2)

The method of Lee et al. 2023 (arXiv:2309.00267): a preamble with the rubric, two responses, and the probabilities that
the model gives to the answers "1" and "2". Which response stands first sways a model, so each pair is asked about both
ways and the two probabilities averaged. Responses are ranked by the sum of their probabilities to beat each of the
others. "preferences" in answers.jsonl keeps these as soft labels: [i, j, p], shown response i beats j in a share of p.

Every answer of the server is on disk (calls.jsonl) once it is there, and no question is asked twice. A key for
a hosted server comes from the environment, LABELER_API_KEY. The responses come from a model and may try to give orders
to the one that reads them: nothing here can stop that. Left out on purpose: chain of thought, examples in the preamble
(write them into the rubric), training on the soft labels.
"""
import hashlib
import itertools
import json
import math
import os
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

import torch

from answers import uncut, write_answers, write_order
from checkpoint import write_atomic, write_json
from common import UserError, check, check_positive, generator, progress
from data import read_jsonl, read_text
from people import read_summary
from reward import share
from runs import Stage
from terminal import append, visible

WAITS = (1, 2, 4, 8, 16)  # seconds between the six tries of a call
ANSWER_TOKENS = 4  # some models begin with a space or a line end


def question(rubric, prompt, first, second):
    """What a language model is asked: the preamble, the two responses, and how to answer."""
    return (f"{rubric.strip()}\n\n" + (f"Beginning - {prompt.strip()}\n" if prompt.strip() else "")
            + f"Response 1 - {first.strip()}\nResponse 2 - {second.strip()}\n\n"
            "Which response is better? Answer with 1 or 2 and nothing else.\nPreferred response =")


def probability_of_1(choice):
    """The probability of "1" against "2" in one choice of a chat completion: from the log-probabilities at the token
    where the answer stands, if there are any, else 1 or 0 from the text. None if it holds no answer."""
    text = (choice.get("message") or {}).get("content") or ""
    tokens = (choice.get("logprobs") or {}).get("content") or []
    answers = [token for token in tokens if token["token"].strip() in ("1", "2")]
    for token in answers[:1] or tokens[:1]:  # without an answer: what it might have said at once
        listed = [(each["token"].strip(), math.exp(min(0.0, each["logprob"]))) for each in
                  token.get("top_logprobs") or [token]]
        one, two = (sum(p for said, p in listed if said == number) for number in ("1", "2"))
        if one + two > 0:  # what is not listed is no likelier than the least that is
            least = min(p for _, p in listed) if len(listed) > 1 else 0.0
            return (one or least) / ((one or least) + (two or least))
    said = set(re.findall(r"\b[12]\b", text))
    return float(said == {"1"}) if len(said) == 1 else None


class Enough(Exception):
    """The cap on calls is reached."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key to another server."""

    def redirect_request(self, *_):
        return None


class Server:
    """Asks a server about pairs: called with [(prompt, first, second)], returns for each the probability that the first
    is better, or None where the answer could not be read."""

    def __init__(self, cfg, folder):
        parts = urlsplit(cfg.labeler)
        self.key = os.environ.get("LABELER_API_KEY", "")
        check(parts.scheme in ("http", "https") and parts.hostname, f"--labeler {cfg.labeler}: not an http(s) address")
        check(not (parts.username or parts.query), "--labeler: a password or key has no place in the address: put it "
                                                   "into the environment as LABELER_API_KEY")
        check(not self.key or parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1"),
              f"--labeler {cfg.labeler}: LABELER_API_KEY is sent over https only (or to this machine)")
        check(re.fullmatch(r"[\x21-\x7e]*", self.key), "LABELER_API_KEY holds characters that no key has")
        check(cfg.model, "--model is empty: the name under which the server knows the model")
        self.cfg, self.rubric, self.path = cfg, read_text(cfg.rubric), folder / "calls.jsonl"
        check(self.rubric.strip(), f"{cfg.rubric}: empty (expected what makes a response better)")
        self.url = cfg.labeler.rstrip("/") + "/chat/completions"
        self.opener = urllib.request.build_opener(NoRedirect)
        self.known, self.calls, self.logprobs, self.broken = self.earlier_calls(), 0, True, None

    def earlier_calls(self):
        """{key: answer} of the calls that calls.jsonl holds."""
        if not self.path.exists():
            return {}
        text = uncut(self.path)
        write_atomic(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return {row["key"]: row["first"] for row in read_jsonl(self.path, {"key": str})} if text.strip() else {}

    def key_of(self, pair):
        """What an answer is kept under: it depends on everything that was asked, and on the model."""
        return hashlib.sha256(json.dumps([self.cfg.model, question(self.rubric, *pair)]).encode()).hexdigest()[:16]

    def missing(self, pairs):
        """The pairs that the server has not been asked about yet, each once."""
        return list({key: pair for pair in pairs if (key := self.key_of(pair)) not in self.known}.values())

    def __call__(self, pairs):
        new = self.missing(pairs)
        for start in range(0, len(new), 4 * self.cfg.parallel):
            part = new[start:start + 4 * self.cfg.parallel]
            if self.calls + len(part) > self.cfg.max_calls:
                raise Enough
            self.calls += len(part)
            with ThreadPoolExecutor(self.cfg.parallel) as pool:
                try:
                    asked = {pool.submit(self.ask, pair): self.key_of(pair) for pair in part}
                    for done in as_completed(asked):  # what was answered is kept, whatever becomes of the others
                        if not done.exception():
                            self.known[asked[done]], text = done.result()
                            append(self.path, {"key": asked[done], "first": self.known[asked[done]], "text": text})
                except BaseException as stop:  # Ctrl-C, or a full disk: what has not been asked yet is not asked
                    self.broken = stop
                    raise
            if self.broken:
                raise self.broken
        return [self.known[self.key_of(pair)] for pair in pairs]

    def ask(self, pair):
        """One question: (probability that the first is better or None, the answer's text)."""
        body = {"model": self.cfg.model, "messages": [{"role": "user", "content": question(self.rubric, *pair)}],
                "max_tokens": ANSWER_TOKENS, "temperature": 0}
        try:
            choice = self.post(body)
        except Exception as error:
            self.broken = self.broken or error
            raise
        return probability_of_1(choice), ((choice.get("message") or {}).get("content") or "")[:100]

    def post(self, body):
        """The first choice of the server's answer; it is tried again where that may help, else UserError."""
        for wait in (*WAITS, None):
            if self.broken:  # another thread has failed, and with it the run
                raise self.broken
            asked = self.logprobs
            data = json.dumps({**body, **({"logprobs": True, "top_logprobs": 20} if asked else {})}).encode()
            headers, later = {"Content-Type": "application/json"}, None
            headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
            try:
                request = urllib.request.Request(self.url, data, headers)
                with self.opener.open(request, timeout=self.cfg.timeout) as response:
                    choice = json.loads(response.read(2**22))["choices"][0]
                    probability_of_1(choice)  # raises where something else is in the place of the answer
                    return choice
            except HTTPError as error:
                said = " ".join(visible(error.read(300).decode("utf-8", "replace")).split())
                error.close()
                problem = f"HTTP {error.code} {error.reason}: {said}".replace(self.key or "\0", "(the key)")
                if error.code in (400, 422) and asked:
                    self.logprobs = False  # tried once more without; what is wrong otherwise comes back
                    continue
                if error.code == 404:
                    problem += " (is it the right --model, and does the address end in /v1?)"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    raise UserError(f"{self.url}: {problem}") from None
                later = error.headers.get("Retry-After")
            except (OSError, HTTPException) as error:
                problem = f"cannot be reached: {getattr(error, 'reason', error) or type(error).__name__}"
            except (ValueError, KeyError, IndexError, TypeError, AttributeError):
                problem = "its answer is no chat completion of OpenAI's API"
            if wait is None:
                raise UserError(f"{self.url}: {problem} (what was answered is kept: the same command goes on)")
            time.sleep(max(wait, min(60, seconds_until(later))))


def seconds_until(later):
    """The seconds that a Retry-After header asks for, which gives a number or a date; 0 for anything else."""
    try:
        return max(0.0, float(later) if re.fullmatch("[0-9.]+", later) else
                   parsedate_to_datetime(later).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def vader():
    """VADER's rules as a labeler: a function like Server, whose probabilities are 0, 1 and, for a tie, 0.5."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("--labeler vader needs VADER's rules: pip install vaderSentiment==3.3.2") from None
    analyzer, known = SentimentIntensityAnalyzer(), {}

    def mood(text):
        if text not in known:
            known[text] = analyzer.polarity_scores(text)["compound"]
        return known[text]

    def prefer(pairs):
        margins = [mood(prompt + first) - mood(prompt + second) for prompt, first, second in pairs]
        return [0.5 + 0.5 * ((margin > 0) - (margin < 0)) for margin in margins]
    return prefer


# ---- from preferences between two to rankings ------------------------------------------------------------------------


def both_ways(pairs):
    """Each pair (prompt, a, b), and behind it the same the other way round."""
    return [way for prompt, a, b in pairs for way in ((prompt, a, b), (prompt, b, a))]


def both_orders(prefer, pairs):
    """Ask about each pair (prompt, a, b) in both orders: [(probability of a from a first, from b first)], None where an
    answer could not be read."""
    turned = prefer(both_ways(pairs))
    return [(p, None if q is None else 1 - q) for p, q in zip(turned[::2], turned[1::2])]


def average(p, q):
    """The mean of those of two probabilities that there are; 0.5 if there is none."""
    given = [x for x in (p, q) if x is not None]
    return sum(given) / len(given) if given else 0.5


def expected_wins(K, preferences):
    """Levels of the numbers 1 to K, best first, by the expected number of others that each beats, from preferences
    [i, j, p]: i beats j with probability p. Equal sums (to 1e-9) are a tie."""
    wins = [0.0] * (K + 1)
    for i, j, p in preferences:
        wins[i] += p
        wins[j] += 1 - p
    levels = []
    for number in sorted(range(1, K + 1), key=lambda number: (-round(wins[number], 9), number)):
        if levels and round(wins[levels[-1][0]], 9) == round(wins[number], 9):
            levels[-1].append(number)
        else:
            levels.append([number])
    return levels


def position_card(pairs):
    """How much the order sways: of pairs of probabilities as both_orders gives them, the share with another choice in
    the other order, the share of choices that went to the first shown, and the number of unread answers."""
    read = [(p, q) for p, q in pairs if p is not None and q is not None and 0.5 not in (p, q)]
    first = [x for p, q in read for x in (p > 0.5, q < 0.5)]
    return {"pairs": len(pairs), "flipped": round(sum((p > 0.5) != (q > 0.5) for p, q in read) / max(1, len(read)), 4),
            "first_shown_wins": round(sum(first) / max(1, len(first)), 4),
            "unread": sum(x is None for pair in pairs for x in pair)}


def people_pairs(cfg):
    """Held-out pairs that people's ratings order: of movie reviews, drawn at random, where domains and samples are
    named."""
    rows = read_jsonl(cfg.pairs, {"prompt": str, "chosen": str, "rejected": str}) if cfg.pairs else []
    rows = [row for row in rows if row.get("domain", "movie") == "movie" and row.get("sample", "random") == "random"]
    order = torch.randperm(len(rows), generator=generator(cfg.seed)).tolist()
    return [rows[i] for i in order[:cfg.pairs_count or len(rows)]]


def people_card(rows, probabilities):
    """Agreement with people on pairs {"prompt", "chosen", "rejected"}: share() of the averaged preference, and of each
    of the two orders alone, where a coin (the row's number) says which response stood first."""
    texts = {text: i for i, text in enumerate(sorted({row[side] for row in rows for side in ("chosen", "rejected")}))}
    ends = torch.tensor([[texts[row["chosen"]], texts[row["rejected"]]] for row in rows])
    single = [pair[number % 2] for number, pair in enumerate(probabilities)]
    both, one = (torch.tensor([x - 0.5 for x in given]) for given in (
        [average(*pair) for pair in probabilities], [average(p, None) for p in single]))
    return {"both orders": share(both, ends), "one order": share(one, ends), **position_card(probabilities)}


def print_card(card, people):
    """What agreement.json holds, in two or three lines."""
    if "people" in card:
        for name in ("both orders", "one order"):
            print("agrees with people on {pairs} held-out pairs, {name}: {accuracy:.3f} ({0:.3f} to {1:.3f})".format(
                *card["people"][name]["interval"], name=name, **card["people"][name]))
        if people:
            print(f"(one person agrees with the mean of the others on {people:.3f})")
    for name, part in card.items():
        print(f"{name}: {part['pairs']} pairs, {part['flipped']:.3f} answered otherwise in the other order, the first "
              f"shown preferred in {part['first_shown_wins']:.3f}, {part['unread']} answers unread")


def rank(samples, cfg, folder):
    """Rank the samples by a server or by VADER: answers.jsonl, rankings.jsonl, and agreement.json, how far it agrees
    with people and with itself."""
    check_positive(cfg, "max_calls", "parallel", "timeout", or_zero=("pairs_count",))
    machine = cfg.labeler == "vader"
    prefer, rows = vader() if machine else Server(cfg, folder), people_pairs(cfg)
    human = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    asked = [[(row["prompt"], a, b) for a, b in itertools.combinations(row["responses"], 2)] for row in samples]
    if not machine:
        everything = both_ways([*human, *itertools.chain(*asked)])
        new = prefer.missing(everything)
        print(f"{len(new):,} calls ({len(human)} pairs of people's, {sum(map(len, asked)):,} of samples, both orders; "
              f"{len(everything) - len(new):,} answered already or repeated); --max-calls is {cfg.max_calls:,}")
        if cfg.dry_run:
            print(f"\n---- the first of them:\n{visible(question(prefer.rubric, *(new or everything)[0]))}\n----")
            return
    stage = Stage(cfg, "samples", *(["pairs"] if rows else []), *([] if machine else ["rubric"]), folder=folder)
    check((folder / "answers.jsonl").exists() or not (folder / "rankings.jsonl").exists(),
          f"{folder} holds another labeler's work: change --out")
    stage.open()
    labeler, answers, ways, card, capped = "vader" if machine else cfg.model, [], [], {}, False
    try:
        if human:
            card["people"] = people_card(rows, both_orders(prefer, human))
        for row, pairs in zip(progress(samples, "rank"), asked):
            start, probabilities = time.monotonic(), both_orders(prefer, pairs)
            numbers = itertools.combinations(range(1, len(row["responses"]) + 1), 2)
            preferences = [[i, j, round(average(p, q), 4)] for (i, j), (p, q) in zip(numbers, probabilities)]
            ways += probabilities
            answers.append({"id": row["id"], "prompt": row["prompt"], "labeler": labeler, "shown": row["responses"],
                            "order": write_order(expected_wins(len(row["responses"]), preferences)),
                            "preferences": preferences, "seconds": round(time.monotonic() - start, 3)})
    except Enough:
        capped = True
    card["samples"] = position_card(ways)
    write_json(folder / "agreement.json", card)
    rankings = write_answers(folder, answers)
    people = read_summary(Path(cfg.pairs).parent / "summary.json")["agreement"] if rows else {}
    print_card(card, people.get("movie", {}).get("random", [None])[0])
    if capped:
        print(f"stopped at --max-calls {cfg.max_calls}: {len(answers)} of {len(samples)} samples are ranked; the same "
              "command goes on")
    else:
        stage.finish(answers=len(answers), rankings=rankings)
