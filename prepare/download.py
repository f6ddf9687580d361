"""Files of the Hugging Face hub: downloaded once, and used only if their sha256 is right."""
import os
from http.client import HTTPException
from pathlib import Path

from torch.hub import download_url_to_file

from common import UserError, check, digest, say


def download(address, path, sha256):
    """The path of a file with this sha256: the one on disk, or else the download from an address on the hub (or on the
    mirror that HF_ENDPOINT names), under a temporary name until it is verified."""
    path = Path(path)
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{address}"
    if not path.exists():
        say(f"downloading {url}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, HTTPException, RuntimeError, ValueError) as error:
            raise UserError(f"{url}: {error} (put the file at {path} by hand; its sha256 is {sha256})") from None
    found = digest(path)
    check(found == sha256, f"{path}: not the expected file: expected sha256 {sha256}, found {found} (delete it)")
    return path
