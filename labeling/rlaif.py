"""Machines in people's place: a language model behind a server (RLAIF), and VADER's rules, which need none.

    llama-server -m MODEL.gguf --port 8080         or vLLM, Ollama, a hosted service: whatever speaks OpenAI's chat API
    python -m labeling.rlaif rank --labeler http://localhost:8080/v1 --model NAME     (--dry-run calls nothing)
    python -m labeling.rlaif rank --labeler vader  (pip install vaderSentiment==3.3.2)
    python -m labeling.rlaif judge --labeler http://localhost:8080/v1 --model NAME    policies of an evaluation

The idea is from Bai et al. 2022 (arXiv:2212.08073), the method from Lee et al. 2023 (arXiv:2309.00267): the rubric, two
responses, and the probabilities of the answers "1" and "2". Which response is shown first sways a model, so each pair
is asked about in both orders and the two probabilities averaged. More than two responses, which the paper does not
rank, are ordered by the expected number of others that each beats. A response may try to give orders to its judge:
nothing here can stop that. Left out: chain of thought, examples (write them into the rubric), soft labels in training.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

import torch

from common import Stage, UserError, check, digest, generator, open_folder, progress, run, visible, write_json
from data import pair_accuracy, read_jsonl
from evaluate import load_json, mean_interval
from label import shuffled
from labeling.answers import read_answers, read_samples, write_answers, write_order

WAITS = (1, 2, 4, 8, 16)  # seconds between the six tries of a call
STORED = "(the answers so far are stored: the same command resumes)"

@dataclass
class Flags:
    labeler: str = ""        # a server's address, such as http://localhost:8080/v1; or vader
    model: str = ""          # the name under which the server knows the model
    limit: int = 0           # only the first so many samples, or prompts; 0: all
    rubric: str = "labeling/rubrics/mood.txt"  # file that says what makes a response better
    logprobs: bool = True    # ask for log-probabilities; false, for a server that refuses: the answer's text counts
    pairs: str = "data/reviews/pairs_test.jsonl"  # people's comparisons to agree with; empty: none
    pairs_count: int = 200   # how many of them; 0: all
    max_calls: int = 1000    # stop after so many calls; the same command resumes
    parallel: int = 4        # calls at the same time
    timeout: float = 60.0    # seconds without an answer until a call is tried again
    dry_run: bool = False    # print the first question and the number of calls, and call nothing
    seed: int = 1            # of the choice of --pairs, and of the resamples behind intervals

@dataclass
class Config(Flags):
    samples: str = "out/tiny/samples/samples.jsonl"  # {"id", "prompt", "responses"}
    out: str = ""            # folder for rankings.jsonl; empty: out/tiny/label-ai or out/tiny/label-vader
    overwrite: bool = False  # overwrite another run's rankings in --out, instead of refusing

@dataclass
class JudgeConfig(Flags):
    evaluate: str = "out/tiny/evaluate"  # folder of a finished evaluation: its samples.jsonl, and verdict.json

# ---- labelers: functions from [(prompt, first, second)] to the probabilities that the first is better ----------------

def question(rubric, prompt, first, second):
    """What a language model is asked: the preamble, the two responses, and how to answer."""
    return (f"{rubric.strip()}\n\n" + (f"Beginning - {prompt.strip()}\n" if prompt.strip() else "")
            + f"Response 1 - {first.strip()}\nResponse 2 - {second.strip()}\n\n"
            "Which response is better? Answer with 1 or 2 and nothing else.\nPreferred response =")

def probability_of_1(choice):
    """The probability of "1" against "2" in one choice of a chat completion: from the log-probabilities at the token
    that answers, if there are any, else 1 or 0 from the text. None if it holds no answer."""
    tokens = (choice.get("logprobs") or {}).get("content") or []
    answers = [token for token in tokens if token["token"].strip() in ("1", "2")]
    for token in answers[:1] or tokens[:1]:  # without an answer: what it might have said at once
        listed = token.get("top_logprobs") or [token]
        one, two = (sum(math.exp(each["logprob"]) for each in listed if each["token"].strip() == number)
                    for number in ("1", "2"))
        if one + two > 0:
            return one / (one + two)
    said = set(re.findall(r"\b[12]\b", choice["message"]["content"] or ""))
    return float(said == {"1"}) if len(said) == 1 else None

class NoRedirect(urllib.request.HTTPRedirectHandler):
    redirect_request = lambda *_: None  # a redirect is an error: it would carry the key to another server

class Server:
    """A language model as a labeler; None stands for an answer that can't be read. Each answer is stored in calls.jsonl
    as soon as it is there, and no question is asked twice. The key, if the server wants one, comes from the environment
    (LABELER_API_KEY), goes over https or to this machine only, and into no file."""

    def __init__(self, cfg, path):
        address, self.key = urlsplit(cfg.labeler), os.environ.get("LABELER_API_KEY", "").strip()
        local = address.hostname in ("localhost", "127.0.0.1", "::1")
        check(address.scheme in ("http", "https") and address.hostname and "@" not in address.netloc,
              "--labeler: expected vader, or a server's http(s) address (its key: in the environment, LABELER_API_KEY)")
        check(not self.key or address.scheme == "https" or local,
              f"--labeler {cfg.labeler}: LABELER_API_KEY is sent over https only (or to this machine)")
        check(cfg.model, "--model is empty: the name under which the server knows the model")
        self.cfg, self.path, self.rubric, self.calls = cfg, path, Path(cfg.rubric).read_text(encoding="utf-8"), 0
        self.opener = urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler({} if local else None))
        stored = path.read_text().splitlines(keepends=True) if path.exists() else []
        if stored and not stored[-1].endswith("\n"):  # killed, or on a full disk: that question is asked again
            path.write_text("".join(stored := stored[:-1]))
        self.known = {row["key"]: row["first"] for row in map(json.loads, stored)}

    def key_of(self, pair):
        """What an answer is stored under: it depends on everything that was asked, and on whom."""
        asked = [self.cfg.labeler, self.cfg.model, *[False] * (not self.cfg.logprobs), question(self.rubric, *pair)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    def missing(self, pairs):
        """The pairs that the server has not been asked about yet, each once."""
        return list({key: pair for pair in pairs if (key := self.key_of(pair)) not in self.known}.values())

    def __call__(self, pairs):
        new = self.missing(pairs)
        allowed = new[:self.cfg.max_calls - self.calls]
        self.calls += len(allowed)
        with ThreadPoolExecutor(self.cfg.parallel) as pool:
            list(pool.map(self.ask, allowed))  # raises the first problem; what has not begun is not asked
        check(allowed == new, f"stopped at --max-calls {self.cfg.max_calls} {STORED}", 1)
        return [self.known[self.key_of(pair)] for pair in pairs]

    def ask(self, pair):
        """Ask one question, up to six times if the server is busy or away, and store the answer in one write."""
        for wait in (*WAITS, None):
            try:
                choice = self.post(question(self.rubric, *pair))
                first, text = probability_of_1(choice), choice["message"]["content"]
                break
            except HTTPError as error:
                said = error.read().decode("utf-8", "replace").replace(self.key or "\0", "(the key)")[:300]
                problem, temporary = f"HTTP {error.code} {error.reason}: {said}", error.code in (429, *range(500, 600))
            except (OSError, HTTPException) as error:
                problem, temporary = f"cannot be reached: {error}", True
            except (ValueError, KeyError, IndexError, TypeError):
                problem, temporary = "its answer is not a chat completion of OpenAI's API", False
            if not temporary or not wait:
                raise UserError(f"{self.cfg.labeler}: {problem} {STORED}", 1)
            time.sleep(wait)
        with open(self.path, "a") as file:
            file.write(json.dumps({"key": self.key_of(pair), "first": first, "text": str(text)[:100]}) + "\n")
        self.known[self.key_of(pair)] = first

    def post(self, text):
        """The first choice of the server's completion."""
        body = {"model": self.cfg.model, "max_tokens": 4, "temperature": 0,  # some begin with a space or a newline
                "messages": [{"role": "user", "content": text}]}
        if self.cfg.logprobs:
            body |= {"logprobs": True, "top_logprobs": 20}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = f"{self.cfg.labeler.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with self.opener.open(request, timeout=self.cfg.timeout) as response:
            return json.load(response)["choices"][0]

def vader():
    """VADER's rules as a labeler: its probabilities are 0, 1 and, for a tie, 0.5."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("--labeler vader needs VADER's rules: pip install vaderSentiment==3.3.2") from None
    analyzer = SentimentIntensityAnalyzer()
    mood = functools.cache(lambda text: analyzer.polarity_scores(text)["compound"])

    def prefer(pairs):
        margins = [mood(prompt + first) - mood(prompt + second) for prompt, first, second in pairs]
        return [0.5 + 0.5 * ((margin > 0) - (margin < 0)) for margin in margins]
    return prefer

def labeler_of(cfg, folder):
    """The name of what --labeler stands for, and the labeler; a server's answers are stored in the folder."""
    return ("vader", vader()) if cfg.labeler == "vader" else (cfg.model, Server(cfg, folder / "calls.jsonl"))

def show_calls(prefer, pairs):
    """Print how many calls these pairs take, and the first question."""
    new = prefer.missing(both_ways(pairs)) if isinstance(prefer, Server) else []
    print(f"{len(new):,} calls, the first:\n\n{visible(question(prefer.rubric, *new[0])) if new else '-'}")

def both_ways(pairs):
    """Each pair (prompt, a, b), followed by the same in the other order."""
    return [way for prompt, a, b in pairs for way in ((prompt, a, b), (prompt, b, a))]

def both_orders(prefer, pairs):
    """Probabilities of a, shown first and shown second, for each pair (prompt, a, b); None: an unreadable answer."""
    turned = prefer(both_ways(pairs))
    return [(p, None if q is None else 1 - q) for p, q in zip(turned[::2], turned[1::2])]

def average(p, q):
    """The mean of both orders' probabilities; 0.5 if one is unread, as one order alone is mostly position bias."""
    return 0.5 if p is None or q is None else (p + q) / 2

def expected_wins(K, preferences):
    """Levels of the numbers 1 to K, best first, by the expected number of others that each beats, from preferences
    [i, j, p]: i beats j with probability p. Equal sums (to 1e-9) are a tie."""
    wins = [round(sum(p for i, _, p in preferences if i == number)
                  + sum(1 - p for _, j, p in preferences if j == number), 9) for number in range(1, K + 1)]
    return [[n + 1 for n in range(K) if wins[n] == level] for level in sorted(set(wins), reverse=True)]

def position_card(name, pairs):
    """How much the order sways, printed: of the pairs decided in both orders ("read"), the share with another choice in
    the other order, and the share of choices that went to the first shown; and how many answers could not be read."""
    read = [(p, q) for p, q in pairs if p is not None and q is not None and 0.5 not in (p, q)]
    first = [x for p, q in read for x in (p > 0.5, q < 0.5)]
    card = {"pairs": len(pairs), "read": len(read), "unread": sum(x is None for pair in pairs for x in pair),
            "flipped": round(sum((p > 0.5) != (q > 0.5) for p, q in read) / max(1, len(read)), 4),
            "first_shown_wins": round(sum(first) / max(1, len(first)), 4)}
    print("{}: {pairs} pairs, {unread} answers unread; of {read} pairs decided in both orders, {flipped:.3f} were "
          "decided differently in the other order; the first shown won {first_shown_wins:.3f}".format(name, **card))
    return card

def people_card(pairs, probabilities):
    """Agreement with people on pairs (prompt, chosen, rejected), printed: pair_accuracy of the averaged preferences."""
    number = {text: i for i, text in enumerate(sorted({text for _, *texts in pairs for text in texts}))}
    ends = torch.tensor([[number[text] for text in texts] for _, *texts in pairs])
    card = pair_accuracy(torch.tensor([average(p, q) - 0.5 for p, q in probabilities]), ends)
    low, high = card["interval"]
    print(f"agrees with people on {card['pairs']} held-out pairs: {card['accuracy']:.3f} ({low:.3f} to {high:.3f})")
    return {"both orders": card, **position_card("people's pairs", probabilities)}

def people_pairs(cfg):
    """Held-out pairs that people ordered; of the built-in data, random pairs of film reviews, as the task is."""
    rows = read_jsonl(cfg.pairs, {"prompt": str, "chosen": str, "rejected": str}) if cfg.pairs else []
    rows = [row for row in rows if (row.get("domain"), row.get("sample")) == ("movie", "random")] or rows
    rows = shuffled(rows, cfg.seed)[:cfg.pairs_count or None]
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]

def rank(cfg):
    """answers.jsonl, rankings.jsonl, and agreement.json: how far the labeler agrees with people and with itself."""
    folder = Path(cfg.out or f"out/tiny/label-{'vader' if cfg.labeler == 'vader' else 'ai'}")
    samples, human = read_samples(cfg.samples, cfg.limit), people_pairs(cfg)
    asked = [[(row["prompt"], a, b) for a, b in itertools.combinations(row["responses"], 2)] for row in samples]
    labeler, prefer = labeler_of(cfg, folder)
    if cfg.dry_run:
        return show_calls(prefer, human + sum(asked, []))
    stage = Stage(cfg, "samples", "pairs", "rubric", folder=folder)
    read_answers(folder, labeler)  # which must not be another's
    stage.open()
    answers, ways, card = [], [], {}
    if human:  # before the samples are asked about: is it worth it?
        card["people"] = people_card(human, both_orders(prefer, human))
    for row, pairs in zip(progress(samples, "rank"), asked):
        ways += (probabilities := both_orders(prefer, pairs))
        numbers = itertools.combinations(range(1, len(row["responses"]) + 1), 2)
        preferences = [[i, j, round(average(p, q), 4)] for (i, j), (p, q) in zip(numbers, probabilities)]
        answers.append({"id": row["id"], "prompt": row["prompt"], "labeler": labeler, "shown": row["responses"],
                        "order": write_order(expected_wins(len(row["responses"]), preferences)),
                        "preferences": preferences})
    card["samples"] = position_card("samples", ways)
    write_json(folder / "agreement.json", card)
    stage.finish(answers=len(answers), rankings=write_answers(folder, answers))

def judge(cfg):
    """verdict.json: how often the labeler prefers each policy's response to the SFT model's, by its probabilities
    averaged over both orders; first of all, how far it agrees with people. The same text twice is a tie, not asked."""
    folder, path = Path(cfg.evaluate), Path(cfg.evaluate) / "samples.jsonl"
    rows, human = read_jsonl(path, {"prompt": str})[:cfg.limit or None], people_pairs(cfg)
    names = [name for name in rows[0] if name not in ("prompt", "judge", "sft")]
    check("sft" in rows[0] and names, f"{path}: expected responses of sft and of another policy")
    pairs = {name: [(row["prompt"], row[name], row["sft"]) for row in rows if name in row] for name in names}
    asked = {name: [pair for pair in pairs[name] if pair[1].strip() != pair[2].strip()] for name in names}
    labeler, prefer = labeler_of(cfg, folder)
    if cfg.dry_run:
        return show_calls(prefer, human + sum(asked.values(), []))
    before = load_json(open_folder(folder) / "verdict.json").get("labeler", labeler)
    check(before == labeler, f"{folder}/verdict.json is of {before}: move or delete it")
    people, policies = people_card(human, both_orders(prefer, human)) if human else {}, {}
    agrees = people and "; agrees with people on {accuracy:.3f} of {pairs} pairs".format(**people["both orders"])
    for name in names:
        ways = [way for i in progress(range(0, len(asked[name]), 16), name)
                for way in both_orders(prefer, asked[name][i:i + 16])]
        lead = torch.tensor([average(p, q) - 0.5 for p, q in ways] + [0.0] * (len(pairs[name]) - len(ways)))
        rate, interval = mean_interval(0.5 + 0.5 * lead.sign(), 2000, generator(cfg.seed))
        row = {"win_rate": rate, "win_rate_interval": interval, "prompts": len(lead), "ties": int((lead == 0).sum())}
        policies[name] = {**row, **position_card(name, ways)}
        print("{} prefers {} to sft: {win_rate:.3f} ({win_rate_interval[0]:.3f} to {win_rate_interval[1]:.3f}), "
              "{prompts} prompts, {ties} ties{}".format(labeler, name, agrees or "", **row))
    write_json(folder / "verdict.json", {"labeler": labeler, "rubric": cfg.rubric, "date": time.strftime("%Y-%m-%d"),
                                         "samples": digest(path), "people": people, "policies": policies})

STEPS = {"rank": (rank, Config), "judge": (judge, JudgeConfig)}  # the first word of the command line; none: rank

if __name__ == "__main__":
    words = sys.argv[1:]
    run(*STEPS[words.pop(0) if words and words[0] in STEPS else "rank"], argv=words)
