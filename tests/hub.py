"""A small Hugging Face hub on loopback, with faults to plant.

It speaks the part of the hub's protocol that `huggingface_hub` and `transformers` use for public
models: the model's description and its tree, `HEAD` and `GET` of files at a commit, large files
behind a redirect to another host (the server itself under its other name), ranges, and the headers
and error codes that the clients read.
"""

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO = r"/(?P<repo>[^/]+/[^/]+)"
DESCRIPTION = re.compile(rf"/api/models{REPO}/revision/(?P<commit>[^/]+)")
TREE = re.compile(rf"/api/models{REPO}/tree/(?P<commit>[^/]+)")
FILE = re.compile(rf"{REPO}/resolve/(?P<commit>[^/]+)/(?P<name>.+)")
LARGE = re.compile(r"/large/(?P<digest>[0-9a-f]{64})")
PORTAL = b"<html>Log in to use this network.</html>"


class Hub:
    """Serves `models`, `{(repo, commit): {file name: content}}`, while it is entered.

    `fault` is what goes wrong from now on, None or one of

    - `503`: every answer is 503
    - `stall`: connections are taken, and never answered
    - `portal`: every answer is a page that asks for a login, as in a hotel
    - `stalled weights`: half of a large file, then nothing
    - `cut weights`: half of a large file, then the connection is closed
    - `short weights`: a large file without its last byte, in good order otherwise
    - `altered weights`: one bit of a large file is another
    - `altered configuration`: one bit of every small file is another
    - `loop`: a large file is redirected to itself
    - `no lfs`: the list says nothing of large file storage, as that of a mirror may

    `release()` lets go of what is stalled. `requests` lists what was asked, as "GET /path";
    `tokens` lists the paths to which a client sent its token.
    """

    def __init__(self, models: dict[tuple[str, str], dict[str, bytes]]) -> None:
        self.models = models
        self.large = {
            hashlib.sha256(content).hexdigest(): content
            for files in models.values()
            for name, content in files.items()
            if is_large(name)
        }
        self.fault: str | None = None
        self.requests: list[str] = []
        self.tokens: list[str] = []
        self._released = threading.Event()
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._server = _Server(("127.0.0.1", self._port), _Handler)
        self._server.hub = self
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening: connections are refused from now on."""
        self.release()
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()

    def wait(self) -> None:
        """Stall the calling thread until `release`."""
        self._released.wait()

    def release(self) -> None:
        self._released.set()
        self._released = threading.Event()

    def until_asked(self, request: str, seconds: float = 60) -> None:
        """Wait until a request that begins with `request` has come."""
        end = time.monotonic() + seconds
        while not any(asked.startswith(request) for asked in self.requests):
            if time.monotonic() > end:
                raise TimeoutError(f"no {request} came, only {self.requests}")
            time.sleep(0.02)

    def reset(self) -> None:
        """A healthy hub that was asked nothing yet."""
        self.fault = None
        self.release()
        self.requests.clear()
        self.tokens.clear()


def is_large(name: str) -> bool:
    """Whether the hub keeps a file in its large file storage."""
    return name.endswith((".safetensors", ".bin"))


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    """Can end the connections that clients keep open: they would be served after it has stopped."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._connections: list[socket.socket] = []

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def hang_up(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_) -> None:
        """Tests read `Hub.requests` instead."""

    def _answer(self) -> None:
        self.hub: Hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if "Authorization" in self.headers:
            self.hub.tokens.append(path)
        if self.hub.fault == "stall":
            self.hub.wait()
            self.close_connection = True
        elif self.hub.fault == "503":
            self._send(503)
        elif self.hub.fault == "portal":
            self._send(200, PORTAL, {"Content-Type": "text/html"})
        elif match := LARGE.fullmatch(path):
            self._large(match["digest"])
        elif match := DESCRIPTION.fullmatch(path) or TREE.fullmatch(path) or FILE.fullmatch(path):
            self._of_model(match)
        else:
            self._send(404)

    def _of_model(self, match: re.Match) -> None:
        repo, commit = match["repo"], match["commit"]
        files = self.hub.models.get((repo, commit))
        if files is None:
            known = any(repo == other for other, _ in self.hub.models)
            # Of a name that it does not know the hub says that it may be private.
            status, code = (404, "RevisionNotFound") if known else (401, "RepoNotFound")
            self._send(status, headers={"X-Error-Code": code})
        elif match.re is DESCRIPTION:
            siblings = [_sibling(name, content) for name, content in files.items()]
            if self.hub.fault == "no lfs":
                siblings = [{k: v for k, v in one.items() if k != "lfs"} for one in siblings]
            self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings})
        elif match.re is TREE:
            self._json([_entry(name, content) for name, content in files.items()])
        elif match["name"] not in files:
            self._send(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            self._file(commit, match["name"], files[match["name"]])

    def _file(self, commit: str, name: str, content: bytes) -> None:
        headers = {"X-Repo-Commit": commit}
        if is_large(name):
            digest = hashlib.sha256(content).hexdigest()
            headers["X-Linked-Etag"] = f'"{digest}"'
            headers["X-Linked-Size"] = str(len(content))
            headers["Location"] = f"{self.hub.url}/large/{digest}".replace("127.0.0.1", "localhost")
            self._send(302, headers=headers)
        else:
            headers["ETag"] = f'"{git_blob_id(content)}"'
            altered = self.hub.fault == "altered configuration"
            self._send(200, _altered(content) if altered else content, headers)

    def _large(self, digest: str) -> None:
        content, fault = self.hub.large[digest], self.hub.fault
        if fault == "loop":
            return self._send(302, headers={"Location": self.path})
        if fault == "altered weights":
            content = _altered(content)
        if fault == "short weights":
            content = content[:-1]
        headers, status, start = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}, 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        broken = fault in ("stalled weights", "cut weights")
        self._send(status, content[start:], headers, broken=broken)
        if fault == "stalled weights":
            self.hub.wait()

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes = b"", headers: dict | None = None, *, broken: bool = False
    ) -> None:
        """Answer; a `broken` answer promises the whole body, holds half, and closes."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if broken else body)
            self.wfile.flush()
        self.close_connection = broken


def _altered(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def _sibling(name: str, content: bytes) -> dict:
    sibling = {"rfilename": name, "size": len(content), "blobId": git_blob_id(content)}
    if is_large(name):
        digest = hashlib.sha256(content).hexdigest()
        sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
    return sibling


def _entry(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": git_blob_id(content)}
    if is_large(name):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry
