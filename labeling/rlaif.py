"""Machines in people's place: a language model behind a server (RLAIF), and VADER's rules, which need none.

    llama-server -m MODEL.gguf --port 8080               or vLLM, Ollama, a hosted service: whatever speaks OpenAI's API
    python label.py rank --labeler http://localhost:8080/v1 --model NAME --dry-run true
    python label.py rank --labeler http://localhost:8080/v1 --model NAME
    python label.py rank --labeler vader                 (pip install vaderSentiment==3.3.2)

The method of Lee et al. 2023 (arXiv:2309.00267): a preamble with the rubric, two responses, and the probabilities that
the model gives to the answers "1" and "2". Which response stands first sways a model, so each pair is asked about both
ways and the two probabilities averaged. (The idea is of Bai et al. 2022, Constitutional AI, arXiv:2212.08073.) More
than two responses, which the paper does not rank, are ordered by the sum of their probabilities to beat each other one.
"preferences" in answers.jsonl keeps the soft labels.

Every answer of the server is on disk (calls.jsonl) once it is there, and no question is asked twice. The responses come
from a model and may try to give orders to the one that reads them: nothing here can stop that. Left out on purpose:
chain of thought, examples in the preamble (write them into the rubric), training on the soft labels.
"""
import hashlib
import itertools
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from answers import check_owner, mend, uncut, write_answers, write_order
from checkpoint import write_json
from common import UserError, check, check_positive, generator, progress
from data import checked, read_jsonl, read_rows, read_text
from people import read_summary
from reward import share
from runs import Stage
from server import Client, Enough, Refused
from terminal import append, visible

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
        listed = [(each["token"].strip(), math.exp(min(each["logprob"], 0.0)))  # in this order nan stays nan
                  for each in token.get("top_logprobs") or [token]]
        if not all(p >= 0 for _, p in listed):
            raise ValueError("a log-probability that is no number")
        one, two = (sum(p for said, p in listed if said == number) for number in ("1", "2"))
        if one + two > 0:  # what is not listed is no likelier than the least that is
            least = min(p for _, p in listed) if len(listed) > 1 else 0.0
            return (one or least) / ((one or least) + (two or least))
    said = set(re.findall(r"\b[12]\b", text))
    return float(said == {"1"}) if len(said) == 1 else None


class Server:
    """Asks a language model about pairs: called with [(prompt, first, second)], returns for each the probability that
    the first is better, or None where there is no answer that can be read."""

    def __init__(self, cfg, folder):
        self.client = Client(cfg.labeler, cfg.timeout, cfg.max_calls)
        check(cfg.model, "--model is empty: the name under which the server knows the model")
        self.cfg, self.rubric, self.path = cfg, read_text(cfg.rubric), folder / "calls.jsonl"
        check(self.rubric.strip(), f"{cfg.rubric}: empty (expected what makes a response better)")
        text = uncut(self.path) if self.path.exists() else ""
        self.known = dict(read_rows(self.path, self.checked_call, "a call", text=text)) if text.strip() else {}

    @staticmethod
    def checked_call(row):
        """(key, probability or None) of a line of calls.jsonl; ValueError if it is none."""
        first = checked(row, {"key": str}).get("first", "missing")
        if first is not None and not (isinstance(first, (int, float)) and 0 <= first <= 1):
            raise ValueError("first: expected a probability or null")
        return row["key"], first

    def key_of(self, pair):
        """What an answer is kept under: it depends on everything that was asked, and on whom."""
        asked = [self.cfg.labeler, self.cfg.model, question(self.rubric, *pair)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    def missing(self, pairs):
        """The pairs that the server has not been asked about yet, each once."""
        return list({key: pair for pair in pairs if (key := self.key_of(pair)) not in self.known}.values())

    def __call__(self, pairs):
        while new := self.missing(pairs):
            part = new[:min(4 * self.cfg.parallel, self.cfg.max_calls - self.client.calls)]
            if not part:
                raise Enough
            with ThreadPoolExecutor(self.cfg.parallel) as pool:
                try:
                    asked = {pool.submit(self.ask, pair): self.key_of(pair) for pair in part}
                    for done in as_completed(asked):  # what was answered is kept, whatever becomes of the others
                        if not done.exception():
                            self.known[asked[done]], text = done.result()
                            append(self.path, {"key": asked[done], "first": self.known[asked[done]], "text": text})
                except BaseException as problem:  # Ctrl-C, or a full disk
                    self.client.end(problem)
                    raise
            if self.client.broken:
                raise self.client.broken
        return [self.known[self.key_of(pair)] for pair in pairs]

    def ask(self, pair):
        """One question: (probability that the first is better or None, the answer's text)."""
        def accept(choice):
            text = (choice.get("message") or {}).get("content") or ""
            return probability_of_1(choice), text[:100].encode("utf-8", "replace").decode()
        body = {"model": self.cfg.model, "max_tokens": ANSWER_TOKENS, "temperature": 0,
                "messages": [{"role": "user", "content": question(self.rubric, *pair)}]}
        try:
            return self.client.post(body, accept)
        except Refused as problem:
            return None, str(problem)
        except Exception as problem:
            self.client.end(problem)
            raise


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
    """The mean of both orders' probabilities; 0.5 if one is unread: one order alone is mostly a liking for a place."""
    return 0.5 if p is None or q is None else (p + q) / 2


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
    the other order and the share of choices that went to the first shown, both of the pairs that were decided in both
    orders ("read"); and the number of answers that could not be read."""
    read = [(p, q) for p, q in pairs if p is not None and q is not None and 0.5 not in (p, q)]
    first = [x for p, q in read for x in (p > 0.5, q < 0.5)]
    return {"pairs": len(pairs), "read": len(read),
            "flipped": round(sum((p > 0.5) != (q > 0.5) for p, q in read) / max(1, len(read)), 4),
            "first_shown_wins": round(sum(first) / max(1, len(first)), 4),
            "unread": sum(x is None for pair in pairs for x in pair)}


def people_pairs(cfg):
    """Held-out pairs that people ordered; of the built-in data, random pairs of film reviews, as the task is."""
    rows = read_jsonl(cfg.pairs, {"prompt": str, "chosen": str, "rejected": str}) if cfg.pairs else []
    if any(row.get("domain") == "movie" for row in rows):
        rows = [row for row in rows if row.get("domain") == "movie" and row.get("sample") == "random"]
    order = torch.randperm(len(rows), generator=generator(cfg.seed)).tolist()
    return [rows[i] for i in order[:cfg.pairs_count or len(rows)]]


def people_card(rows, probabilities):
    """Agreement with people on pairs {"prompt", "chosen", "rejected"}: share() of the averaged preference, and of one
    order alone, in which every other pair has the chosen response first."""
    texts = {text: i for i, text in enumerate(sorted({row[side] for row in rows for side in ("chosen", "rejected")}))}
    ends = torch.tensor([[texts[row["chosen"]], texts[row["rejected"]]] for row in rows])
    single = [pair[number % 2] for number, pair in enumerate(probabilities)]
    both, one = (torch.tensor([x - 0.5 for x in given]) for given in (
        [average(*pair) for pair in probabilities], [0.5 if p is None else p for p in single]))
    return {"both orders": share(both, ends), "one order": share(one, ends), **position_card(probabilities)}


def print_card(name, card):
    """What agreement.json holds of some pairs, in a few lines."""
    for way in ("both orders", "one order"):
        if way in card:
            print("agrees with people on {pairs} held-out pairs, {way}: {accuracy:.3f} ({0:.3f} to {1:.3f})".format(
                *card[way]["interval"], way=way, **card[way]))
    print(f"{name}: {card['pairs']} pairs, {card['unread']} answers unread; of {card['read']} pairs that were decided "
          f"in both orders, {card['flipped']:.3f} were decided otherwise in the other order, and the first shown won "
          f"{card['first_shown_wins']:.3f} of the decisions", flush=True)


def rank(samples, cfg, folder):
    """Rank the samples by a server or by VADER: answers.jsonl, rankings.jsonl, and agreement.json, how far it agrees
    with people and with itself."""
    check_positive(cfg, "max_calls", "parallel", "timeout", or_zero=("pairs_count",))
    check(all(len(row["responses"]) < 10 for row in samples), f"{cfg.samples}: more than nine responses to order")
    rules, rows = cfg.labeler == "vader", people_pairs(cfg)
    labeler = "vader" if rules else cfg.model
    check(not (rules and cfg.dry_run), "--dry-run is for a server: --labeler vader calls none")
    stage = None if cfg.dry_run else Stage(cfg, "samples", *(["pairs"] if rows else []), *([] if rules else ["rubric"]),
                                           folder=folder)  # which locks the folder
    check_owner(folder, labeler)
    prefer = vader() if rules else Server(cfg, folder)
    human = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    asked = [[(row["prompt"], a, b) for a, b in itertools.combinations(row["responses"], 2)] for row in samples]
    if not rules:
        everything = both_ways([*human, *itertools.chain(*asked)])
        new = prefer.missing(everything)
        print(f"{len(new):,} calls ({len(human)} pairs of people's, {sum(map(len, asked)):,} of samples, both orders; "
              f"{len(everything) - len(new):,} answered already or repeated); --max-calls is {cfg.max_calls:,}")
        if cfg.dry_run:
            print(f"\n---- the first of them:\n{visible(question(prefer.rubric, *(new or everything)[0]))}\n----")
            return
    stage.open()
    if not rules:
        mend(prefer.path)
    answers, ways, card, capped = [], [], {}, False
    try:
        if human:
            card["people"] = people_card(rows, both_orders(prefer, human))
            print_card("people's pairs", card["people"])  # before the samples are asked about: is it worth it?
            people = read_summary(Path(cfg.pairs).parent / "summary.json")["agreement"].get("movie", {}).get("random")
            if people:
                print(f"(one person agrees with the mean of the others on {people[0]:.3f}, ties left out)")
        for row, pairs in zip(progress(samples, "rank"), asked):
            probabilities = both_orders(prefer, pairs)
            numbers = itertools.combinations(range(1, len(row["responses"]) + 1), 2)
            preferences = [[i, j, round(average(p, q), 4)] for (i, j), (p, q) in zip(numbers, probabilities)]
            ways += probabilities
            answers.append({"id": row["id"], "prompt": row["prompt"], "labeler": labeler, "shown": row["responses"],
                            "order": write_order(expected_wins(len(row["responses"]), preferences)),
                            "preferences": preferences})
    except Enough:
        capped = True
    card["samples"] = position_card(ways)
    write_json(folder / "agreement.json", card)
    rankings = write_answers(folder, answers)
    print_card("samples", card["samples"])
    if capped:
        print(f"stopped at --max-calls {cfg.max_calls}: {len(answers)} of {len(samples)} samples are ranked; the same "
              "command goes on")
    else:
        stage.finish(answers=len(answers), rankings=rankings)
