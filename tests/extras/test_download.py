"""Downloads against a real server on this machine that does everything wrong that servers and networks do."""
import hashlib
import http.server
import os
import socket
import struct
import threading
from types import SimpleNamespace

import pytest

import download as module
from common import UserError
from download import download, hub

BODY = bytes(range(256)) * 40
SHA256 = hashlib.sha256(BODY).hexdigest()
HALF = len(BODY) // 2


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers request number n by server.script[n] (the last one again and again), and notes its Range header."""

    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers["Range"])
        server.script[min(len(server.ranges), len(server.script)) - 1](self)

    def log_message(self, *_):
        pass

    def answer(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


def good(handler):
    """The file, or the part of it that the Range header asks for."""
    wanted = handler.headers["Range"]
    start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
    if wanted and start >= len(BODY):
        handler.answer(416, b"", Content_Range=f"bytes */{len(BODY)}")
    elif wanted:
        handler.answer(206, BODY[start:], Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
    else:
        handler.answer(200, BODY)


def says(status, body=b"", **more):
    return lambda handler: handler.answer(status, body, **more)


def half(handler):
    """Half of the file under the Content-Length of all of it."""
    handler.answer(200, BODY[:HALF], length=len(BODY))


def reset(handler):
    """Half of the file, then a connection that is torn down, not closed."""
    half(handler)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()  # it shares the connection, which else stays open
    handler.connection.close()


def silent(handler):
    """Half of the file, and the rest so late that the other side should have lost patience."""
    half(handler)
    handler.server.enough.wait(2)
    handler.wfile.write(BODY[HALF:])


def chunked(handler):
    """A stream without a length that stops within a chunk."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"%x\r\n" % HALF + BODY[:HALF] + b"\r\n%x\r\n" % HALF + BODY[HALF:-9])


@pytest.fixture
def serve(monkeypatch):
    """serve(answer, ...) starts a server: .url of the file, .ranges of the requests that came."""
    monkeypatch.setattr(module, "WAITS", (0, 0, 0, 0))
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(*script):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.script, server.ranges, server.enough = script, [], threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        started.append(server)
        return SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/a/file.bin", ranges=server.ranges)
    yield start
    for server in started:
        server.enough.set()
        server.shutdown()
        server.server_close()


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


FROM_START, FROM_HALF = None, f"bytes={HALF}-"


@pytest.mark.parametrize("script, ranges", [
    pytest.param([good], [FROM_START], id="at once"),
    pytest.param([half, good], [FROM_START, FROM_HALF], id="short body"),
    pytest.param([silent, good], [FROM_START, FROM_HALF], id="silence"),
    pytest.param([says(500), says(503), says(429), good], [FROM_START] * 4, id="busy"),
    pytest.param([half, says(502), good], [FROM_START, FROM_HALF, FROM_HALF], id="busy in between"),
    pytest.param([half, says(200, BODY)], [FROM_START, FROM_HALF], id="no ranges"),
    pytest.param([half, half, half, half, says(200, BODY)], [FROM_START] + [FROM_HALF] * 4, id="no ranges, four cuts"),
    pytest.param([half, says(206, BODY[5:], Content_Range=f"bytes 5-{len(BODY) - 1}/{len(BODY)}"), good],
                 [FROM_START, FROM_HALF, FROM_START], id="another range"),
    pytest.param([half, says(206, BODY[HALF:]), good], [FROM_START, FROM_HALF, FROM_START], id="unnamed range"),
    pytest.param([half, says(416), good], [FROM_START, FROM_HALF, FROM_START], id="range refused"),
])
def test_whole_file_in_the_end(serve, tmp_path, script, ranges):
    """A cut body taken for the file, a part appended at the wrong place, a try that starts again from nothing."""
    server, path = serve(*script), tmp_path / "deep" / "file.bin"
    assert download(server.url, path, SHA256) == path and path.read_bytes() == BODY
    assert server.ranges == ranges
    assert left_in(path.parent) == ["file.bin"]


@pytest.mark.parametrize("broken", [pytest.param(reset, id="reset"), pytest.param(chunked, id="cut chunk")])
def test_torn_connection(serve, tmp_path, broken):
    """Connections that end by another exception than a body that is too short."""
    server = serve(broken, good)
    assert download(server.url, tmp_path / "file.bin", SHA256).read_bytes() == BODY and len(server.ranges) == 2


def test_second_call_asks_for_the_rest(serve, tmp_path):
    """A program that was stopped, or gave up, and starts 6 GB again; a half file under the final name."""
    server, path = serve(half, says(404), good), tmp_path / "file.bin"
    with pytest.raises(UserError, match="HTTP 404"):
        download(server.url, path, SHA256)
    assert left_in(tmp_path) == ["file.bin.part"] and (tmp_path / "file.bin.part").read_bytes() == BODY[:HALF]
    assert download(server.url, path, SHA256).read_bytes() == BODY
    assert server.ranges == [FROM_START, FROM_HALF, FROM_HALF] and left_in(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("extra, requests", [pytest.param(b"", 1, id="complete"), pytest.param(b"x", 2, id="too long")])
def test_part_of_full_length(serve, tmp_path, extra, requests):
    """A program stopped just before the check that fetches everything again, or fails for ever; bytes too many."""
    server = serve(good)
    (tmp_path / "file.bin.part").write_bytes(BODY + extra)
    assert download(server.url, tmp_path / "file.bin", SHA256).read_bytes() == BODY
    assert len(server.ranges) == requests


def test_a_part_of_another_file_is_fetched_again(serve, tmp_path):
    """A server that is blamed for the beginning that was here before, and a whole download thrown away."""
    server = serve(good)
    (tmp_path / "file.bin.part").write_bytes(b"?" * HALF)
    assert download(server.url, tmp_path / "file.bin", SHA256).read_bytes() == BODY
    assert server.ranges == [FROM_HALF, FROM_START] and left_in(tmp_path) == ["file.bin"]


def test_redirect_keeps_the_range(serve, tmp_path):
    """The hub sends every request on to a storage server: a resumed download that gets the whole file from it."""
    storage = serve(good)
    server = serve(half, says(302, Location=storage.url))
    assert download(server.url, tmp_path / "file.bin", SHA256).read_bytes() == BODY
    assert server.ranges == [FROM_START, FROM_HALF] and storage.ranges == [FROM_HALF]


@pytest.mark.parametrize("body, problem", [
    pytest.param(BODY[:-1] + b"x", "not the expected file", id="other content"),
    pytest.param(b"\n<!DOCTYPE html><html>Log in", "a web page instead of the file", id="login page"),
    pytest.param(b"<HTML><body>Proxy", "a web page instead of the file", id="proxy page"),
    pytest.param(b"", "not the expected file", id="nothing"),
])
def test_wrong_file(serve, tmp_path, body, problem):
    """Another file used, or kept so that every later call goes on from it; a message without what was found."""
    server, path = serve(says(200, body), good), tmp_path / "file.bin"
    with pytest.raises(UserError) as caught:
        download(server.url, path, SHA256)
    message = str(caught.value)
    assert problem in message and SHA256 in message and hashlib.sha256(body).hexdigest() in message
    assert f"({len(body):,} bytes)" in message and "\n" not in message and left_in(tmp_path) == []
    assert download(server.url, path, SHA256).read_bytes() == BODY  # the next call starts afresh


@pytest.mark.parametrize("answer, requests, problem", [
    pytest.param(says(404), 1, "HTTP 404 Not Found", id="404"), pytest.param(says(401), 1, "HTTP 401", id="401"),
    pytest.param(says(416), 1, "HTTP 416", id="416"), pytest.param(says(500), 5, "HTTP 500", id="500"),
    pytest.param(says(429), 5, "HTTP 429", id="429"),
    pytest.param(half, 5, f"cut after {HALF:,} of {len(BODY):,} bytes", id="always cut"),
])
def test_refused(serve, tmp_path, answer, requests, problem):
    """Endless tries, tries that can't help, a message that does not say what to put where."""
    server, path = serve(answer), tmp_path / "file.bin"
    with pytest.raises(UserError) as caught:
        download(server.url, path, SHA256)
    assert len(server.ranges) == requests and f"{server.url}: {problem}" in str(caught.value)
    assert f"put the file at {path} by hand: {server.url}, sha256 {SHA256}" in str(caught.value)
    assert not path.exists()


def test_waits_grow(serve, tmp_path, monkeypatch):
    """A busy server asked again at once; a wait after the last try."""
    waits = []
    monkeypatch.setattr(module, "WAITS", (1, 2, 4, 8))
    monkeypatch.setattr(module.time, "sleep", waits.append)
    with pytest.raises(UserError):
        download(serve(says(503)).url, tmp_path / "file.bin", SHA256)
    assert waits == [1, 2, 4, 8]


def test_file_already_there(serve, tmp_path, monkeypatch):
    """A request for a file that is there, or a wrong file used or overwritten."""
    server, path = serve(good), tmp_path / "file.bin"
    path.write_bytes(BODY)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no obstacle here
    assert download(server.url, path, SHA256) == path
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match=rf"{SHA256}, found {hashlib.sha256(b'mine').hexdigest()} \(4 bytes\) \(delete"):
        download(server.url, path, SHA256)
    assert path.read_bytes() == b"mine" and server.ranges == []


@pytest.mark.parametrize("error, begun, tries", [
    pytest.param(None, b"", 1, id="nobody there"),
    pytest.param(None, b"some", 5, id="nobody there any more"),
    pytest.param(socket.gaierror(-2, "Name or service not known"), b"", 1, id="no such name"),
    pytest.param(socket.gaierror(-2, "Name or service not known"), b"some", 5, id="no such name any more"),
    pytest.param(TimeoutError("timed out"), b"", 5, id="slow"),
])
def test_unreachable(tmp_path, monkeypatch, serve, error, begun, tries):
    """Fifteen seconds of waiting on a machine without a network; a long download given up when the network blinks."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file.bin"

    def fail(*_, **__):
        raise error
    if error:
        monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(module, "receive", lambda *args, plain=module.receive: asked.append(1) or plain(*args))
    if begun:
        (tmp_path / "file.bin.part").write_bytes(begun)
    with pytest.raises(UserError, match="cannot be reached.*put the file at"):
        download(url, tmp_path / "file.bin", SHA256)
    assert len(asked) == tries


def test_hub_offline(serve, tmp_path, monkeypatch):
    """A request in spite of HF_HUB_OFFLINE; HF_HUB_OFFLINE=0 taken for a yes."""
    server = serve(good)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=f"HF_HUB_OFFLINE is set.*put the file at .*{SHA256}"):
        download(server.url, tmp_path / "file.bin", SHA256)
    assert server.ranges == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert download(server.url, tmp_path / "file.bin", SHA256).read_bytes() == BODY


def test_hub_address(serve, monkeypatch):
    """A mirror that is ignored, or gets two slashes; an empty variable that leaves no server."""
    assert hub("gpt2/a.bin") == "https://huggingface.co/gpt2/a.bin"
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert hub("gpt2/a.bin") == "https://huggingface.co/gpt2/a.bin"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror:8080/hf/")
    assert hub("gpt2/a.bin") == "http://mirror:8080/hf/gpt2/a.bin"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a/b", "mirror/file", "http://", "http://a..b/",
                                 "http://[/", "http://a:port/", "http://a b/"])
def test_addresses_that_are_none(serve, tmp_path, url):
    """A local file read through urllib, a traceback for a mistyped HF_ENDPOINT."""
    with pytest.raises(UserError, match="neither an http|cannot be reached"):
        download(url, tmp_path / "file.bin", SHA256)


def test_folder_that_cannot_be_written(serve, tmp_path):
    """A traceback for a folder that can't be made, or a folder where the file should be."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken: File exists"):
        download(serve(good).url, tmp_path / "taken" / "file.bin", SHA256)
    with pytest.raises(UserError, match="Is a directory"):
        download(serve(good).url, tmp_path, SHA256)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_disk_full(serve, tmp_path):
    """A full disk taken for a fault of the network and tried five times; a traceback."""
    server = serve(good)
    (tmp_path / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        download(server.url, tmp_path / "file.bin", SHA256)
    assert len(server.ranges) == 1
