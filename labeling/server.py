"""A client for any server that speaks OpenAI's chat API (vLLM, llama.cpp, Ollama, hosted ones), for rlaif.py. A reader
may skip this file: it is about what goes wrong on the way.

The key, if a server wants one, comes from the environment (LABELER_API_KEY). It is sent over https or to this machine
only, to no proxy for this machine and to nobody that a redirect names, and is taken out of messages.
"""
import json
import math
import os
import re
import time
import urllib.request
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from threading import Event, Lock
from urllib.error import HTTPError
from urllib.parse import urlsplit

from common import UserError, check
from terminal import visible

WAITS = (1, 2, 4, 8, 16)  # seconds between the six tries of a call
LOCAL = ("localhost", "127.0.0.1", "::1")


class Enough(Exception):
    """The cap on calls is reached."""


class Refused(Exception):
    """The server has answered other questions, but not this one: too long for it, say."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key to another server."""

    def redirect_request(self, *_):
        return None


def check_address(address, key):
    """UserError unless the address is one, and one that the key may be sent to. A password in it is not repeated."""
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"--labeler: not an address: {error}") from None
    check("@" not in parts.netloc and not parts.query,
          "--labeler: a password or key has no place in the address: put it into the environment as LABELER_API_KEY")
    check(parts.scheme in ("http", "https") and host and re.fullmatch(r"[\x21-\x7e]+", address),
          f"--labeler {address}: not an http or https address")
    check(not key or parts.scheme == "https" or host in LOCAL,
          f"--labeler {address}: LABELER_API_KEY is sent over https only (or to this machine)")
    check(re.fullmatch(r"[\x21-\x7e]*", key), "LABELER_API_KEY holds characters that no key has")


class Client:
    """post(body) from several threads: the first choice of a chat completion."""

    def __init__(self, address, timeout, max_calls):
        self.key = os.environ.get("LABELER_API_KEY", "")
        check_address(address, self.key)
        self.url, self.timeout, self.max_calls = address.rstrip("/") + "/chat/completions", timeout, max_calls
        direct = [urllib.request.ProxyHandler({})] if urlsplit(address).hostname in LOCAL else []
        self.opener = urllib.request.build_opener(NoRedirect, *direct)
        self.calls, self.answered, self.lock = 0, 0, Lock()  # calls so far, and how many of them gave an answer
        self.logprobs = True  # until the server refuses to give them
        self.broken, self.stop = None, Event()  # the problem of one thread is everyone's

    def end(self, problem):
        """Have all threads stop."""
        self.broken = self.broken or problem
        self.stop.set()

    def post(self, body, accept):
        """accept(choice) of the server's answer; accept raises ValueError, KeyError, ... if it is none. Tried again
        where that may help. Then Refused, if the fault may be this question's, or UserError."""
        for wait in (*WAITS, None):
            if self.broken:
                raise self.broken
            found, problem, lasting, later = self.send(body, accept)
            if not problem:
                self.answered += 1
                return found
            if lasting == "question" and self.answered:
                raise Refused(problem)
            if lasting or wait is None:
                kept = "" if lasting else " (what was answered is kept: the same command goes on)"
                raise UserError(f"{self.url}: {problem}{kept}")
            self.stop.wait(max(wait, min(60, later)))

    def send(self, body, accept):
        """One request, and another without log-probabilities if it is refused with them: (what accept returned, problem
        in words or "", how far it reaches: "" (it may pass), "question" or "all", seconds to wait)."""
        for logprobs in (True, False) if self.logprobs else (False,):
            with self.lock:
                if self.calls >= self.max_calls:
                    raise Enough
                self.calls += 1
            data = json.dumps({**body, **({"logprobs": True, "top_logprobs": 20} if logprobs else {})}).encode()
            headers = {"Content-Type": "application/json"}
            headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
            try:
                request = urllib.request.Request(self.url, data, headers)
                with self.opener.open(request, timeout=self.timeout) as response:
                    found = accept(json.loads(response.read(2**22))["choices"][0])
            except HTTPError as error:
                problem, later = self.words(error), seconds_until(error.headers.get("Retry-After"))
                if error.code in (400, 413, 422):
                    if logprobs:
                        continue  # is it for them?
                    return None, problem, "question", 0
                return None, problem, "" if error.code in (408, 409, 425, 429) or error.code >= 500 else "all", later
            except (OSError, HTTPException) as error:
                return None, f"cannot be reached: {getattr(error, 'reason', error) or type(error).__name__}", "", 0
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
                return None, "its answer is no chat completion of OpenAI's API", "", 0
            if self.logprobs and not logprobs:
                self.logprobs = False
                print("the server gives no log-probabilities: the answer's text counts")
            return found, "", "", 0

    def words(self, error):
        """An HTTP error in one line, without the key."""
        try:
            said = error.read(2**16).decode("utf-8", "replace")
        except (OSError, HTTPException):
            said = ""
        said = " ".join(visible(said.replace(self.key or "\0", "(the key)")).split())[:300]
        hint = " (is it the right --model, and does the address end in /v1?)" if error.code == 404 else ""
        return f"HTTP {error.code} {error.reason}{': ' * bool(said)}{said}{hint}"


def seconds_until(later):
    """The seconds that a Retry-After header asks for, which gives a number or a date; 0 for anything else."""
    try:
        number = re.fullmatch("[0-9.]+", later)
        seconds = float(later) if number else parsedate_to_datetime(later).timestamp() - time.time()
        return max(0.0, seconds) if math.isfinite(seconds) else 0.0
    except (TypeError, ValueError):
        return 0.0
