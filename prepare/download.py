"""Files from the network: fetched once, in as many pieces as it takes, and used only if their sha256 is right.

GPT-2's weights and Anthropic's dialogues come from the Hugging Face hub. HF_ENDPOINT names another server with the same
paths (a mirror), and HF_HUB_OFFLINE=1 says that there is no network.
"""
import os
import re
import sys
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

from tqdm import tqdm

from checkpoint import digest, sync
from common import DISK, UserError, check, say
from runs import lock

WAITS = (1, 2, 4, 8)  # seconds between the five tries
TIMEOUT = 30  # seconds without a byte until a connection counts as cut


def hub(path):
    """URL of a path on the Hugging Face hub, or on the server that HF_ENDPOINT names."""
    return f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{path}"


def download(url, path, sha256):
    """The path of a file with this sha256, fetched over HTTP if it is not there yet.

    What has arrived is kept in path + ".part", where the next try or the next call goes on. UserError if the file is
    another one, or can't be fetched: then it says which file to put where.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        if path.exists():
            return verified(path, sha256)
        by_hand = f"put the file at {path} by hand: {url}, sha256 {sha256}"
        resumed = part.exists()
        fetch(url, part, by_hand)
        if resumed and digest(part) != sha256:  # its beginning may have been of something else
            part.unlink()
            fetch(url, part, by_hand)
        found, size = digest(part), part.stat().st_size
        if found != sha256:
            with open(part, "rb") as file:
                page = re.match(rb"\s*<(!doctype )?html", file.read(1000), re.IGNORECASE)
            part.unlink()
            problem = "a web page instead of the file (a login or a proxy?)" if page else "not the expected file"
            raise UserError(f"{url}: {problem}: expected sha256 {sha256}, found {found} ({size:,} bytes); "
                            "nothing was kept")
        sync(part)
        os.replace(part, path)  # only the verified file ever has the final name
    except OSError as error:  # of the disk: fetch and receive deal with those of the network
        raise UserError(f"{error.filename or path}: {error.strerror or error}", DISK) from None
    return path


def verified(path, sha256):
    """The path of a file on disk, if it has this sha256; else UserError."""
    found = digest(path)
    check(found == sha256, f"{path}: not the expected file: expected sha256 {sha256}, found {found} "
                           f"({path.stat().st_size:,} bytes) (delete it, and it is fetched again)")
    return path


def fetch(url, part, by_hand):
    """Complete the file part from url, in up to five tries; UserError that ends with by_hand if that fails."""
    check(re.match("https?://", url), f"{url}: neither an http:// nor an https:// address (see HF_ENDPOINT)")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    check(not offline, f"HF_HUB_OFFLINE is set, so nothing is fetched ({by_hand})")
    part.parent.mkdir(parents=True, exist_ok=True)
    lock(part.parent)
    say(f"fetching {url}")
    for wait in (*WAITS, None):
        problem, passing = receive(url, part)
        if not problem:
            return
        if wait is None or not passing:
            raise UserError(f"{url}: {problem} ({by_hand})")
        say(f"{problem}: trying again in {wait} s")
        time.sleep(wait)


def receive(url, part):
    """One request for what part does not hold yet: (problem in words or "", whether another try may help)."""
    have = part.stat().st_size if part.exists() else 0
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {}), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code != 416 or not have:
            return f"HTTP {error.code} {error.reason}", error.code == 429 or error.code >= 500
        if error.headers["Content-Range"] == f"bytes */{have}":
            return "", False  # part is complete already: a run was stopped before it could check
        part.unlink()
        return receive(url, part)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a host name that can't be one
        reason = getattr(error, "reason", error)
        # No such host or nobody there at the very start means no network: said at once, not after all the waits.
        offline = isinstance(error, (URLError, ValueError)) and not isinstance(reason, TimeoutError) and not have
        return f"cannot be reached: {reason}", not offline
    resumed = have and response.status == 206  # a server without ranges sends the whole file, as 200
    if resumed and not (response.headers["Content-Range"] or "").startswith(f"bytes {have}-"):
        response.close()
        part.unlink()
        return receive(url, part)
    have = have if resumed else 0
    total = None if response.length is None else have + response.length
    with response, open(part, "ab" if resumed else "wb") as file, tqdm(
            total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, dynamic_ncols=True, leave=False,
            disable=not sys.stderr.isatty()) as bar:
        while True:
            try:
                block = response.read1(2**20)
            except (OSError, HTTPException) as error:
                return f"cut after {have:,} bytes: {error or type(error).__name__}", True
            if not block:
                break
            file.write(block)
            have += len(block)
            bar.update(len(block))
    return ("" if total in (None, have) else f"cut after {have:,} of {total:,} bytes"), True
