"""Downloads from a server on this machine."""
import hashlib
import http.server
import threading

import pytest

from common import UserError
from prepare.download import download

SHA256 = hashlib.sha256(b"right").hexdigest()


@pytest.mark.parametrize("answer, problem", [(b"right", ""), (b"<html>log in", "invalid hash"), (b"", "HTTP Error 404")])
def test_only_the_right_file_gets_the_name(tmp_path, monkeypatch, answer, problem):
    """A login page, half a file or an error taken for the file; a second download; the mirror in HF_ENDPOINT ignored."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if answer else 404)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass
    asked, path = [], tmp_path / "raw" / "file"
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        if problem:
            with pytest.raises(UserError, match=f"{problem}.*put the file at {path} by hand; its sha256 is {SHA256}"):
                download("a/b", path, SHA256)
            assert not list(path.parent.iterdir())
        else:
            assert download("a/b", path, SHA256) == download("a/b", path, SHA256) == path
        server.shutdown()
    assert asked == ["/a/b"]
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="file: not the expected file: expected sha256"):
        download("a/b", path, SHA256)
