"""A hub of models on this machine, as far as its library talks to one: no network, no accounts.

Files of some kinds go by the protocol for large files, the others inside the commit itself.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, READER = "hf_writes", "hf_reads"
LARGE = (".safetensors",)
Files = dict[str, bytes]


@dataclass
class Repository:
    """One repository: its commits, oldest first, each with all its files."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)

    def add(self, files: Files) -> str:
        """Commit files as all that there is; return the commit."""
        content = b"".join(name.encode() + files[name] for name in sorted(files))
        commit = hashlib.sha1(content + str(len(self.commits)).encode()).hexdigest()
        self.commits[commit] = files
        return commit

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    def resolve(self, revision: str) -> str | None:
        return self.head if revision == "main" else revision if revision in self.commits else None


class FakeHub(ThreadingHTTPServer):
    """The server: what it holds, and what was asked of it; `trouble` spoils answers by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.trouble: dict[str, int | str | Callable[[], object]] = {}
        """By a part of "METHOD path": a status, "cut" for a body that breaks off, or what to do."""
        self.sizes: dict[str, int] = {}
        """Sizes that are told for files instead of their own."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error here."""


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Run a hub in a thread until the block ends."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body, parts = self.rfile.read(length), urlsplit(self.path)
        path, asked = unquote(parts.path), f"{self.command} {unquote(self.path)}"
        self.server.asked.append(asked)
        trouble = next((t for part, t in self.server.trouble.items() if part in asked), None)
        if isinstance(trouble, int):
            self._fail(trouble, "")
            return
        if callable(trouble):
            trouble()
        for pattern, name in _ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                query = parse_qs(parts.query)
                getattr(self, name)(*found.groups(), body=body, query=query, cut=trouble == "cut")
                return
        self._fail(404, "")

    def _send(
        self,
        status: int,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        cut: bool = False,
    ) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str = "") -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message or str(status)})

    def _token(self) -> str:
        return (self.headers.get("authorization") or "").removeprefix("Bearer ")

    def _find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """Backbones a repository and commit, or answer why not."""
        repository = self.server.repositories.get(name)
        if self._token() not in ("", TOKEN, READER):
            self._fail(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and not self._token()):
            self._fail(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        elif (commit := repository.resolve(revision)) is None:
            self._fail(404, "RevisionNotFound", "Invalid rev id")
        else:
            return repository, commit
        return None

    def _may_write(self) -> bool:
        if self._token() == TOKEN:
            return True
        self._fail(403 if self._token() == READER else 401, "", "You have no right to write here")
        return False

    def create(self, body: bytes, **_: object) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may_write():
            return
        if name in self.server.repositories:
            self._json({"error": "You already created this model repo"}, 409)
            return
        own = self.server.repositories[name] = Repository(bool(asked.get("private")))
        own.add({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def info(self, name: str, revision: str | None = None, **_: object) -> None:
        if (found := self._find(name, revision or "main")) is None:
            return
        repository, commit = found
        siblings = [
            {"rfilename": path, "size": self.server.sizes.get(path, len(content))}
            for path, content in repository.commits[commit].items()
        ]
        told = {"id": name, "sha": commit, "private": repository.private, "siblings": siblings}
        self._json(told | {"tags": [], "downloads": 0})

    def validate(self, body: bytes, **_: object) -> None:
        content = json.loads(body)["content"]
        is_sound = content.startswith("---\n")
        errors = [] if is_sound else [{"message": "no metadata"}]
        self._json({"errors": errors, "warnings": []}, 200 if is_sound else 400)

    def preupload(self, name: str, revision: str, body: bytes, **_: object) -> None:
        if self._find(name, revision) is None or not self._may_write():
            return
        files = [
            {
                "path": own["path"],
                "uploadMode": "lfs" if own["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for own in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def batch(self, name: str, body: bytes, **_: object) -> None:
        objects = []
        for own in json.loads(body)["objects"]:
            place = {"href": f"{self.server.url}/large/{own['oid']}"}
            objects.append({**own, "actions": {"upload": place}})
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str, body: bytes, **_: object) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self._send(200)

    def commit(self, name: str, revision: str, body: bytes, **_: object) -> None:
        if (found := self._find(name, revision)) is None or not self._may_write():
            return
        repository, commit = found
        files = dict(repository.commits[commit])
        for line in body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "header" and value.get("parentCommit", commit) != commit:
                self._fail(412, "", "A commit has happened since")
                return
            if told["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif told["key"] == "deletedFile":
                del files[value["path"]]
        made = repository.add(files)
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{made}", "commitOid": made})

    def resolve(self, name: str, revision: str, path: str, cut: bool, **_: object) -> None:
        if (found := self._find(name, revision)) is None:
            return
        repository, commit = found
        content = repository.commits[commit].get(path)
        if content is None:
            self._fail(404, "EntryNotFound", "Entry not found")
            return
        etag = hashlib.sha256(content).hexdigest()
        told = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Content-Length": str(len(content))}
        self._send(200, content, told, cut)


_NAME = r"([^/]+/[^/]+)"
_ROUTES = (
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"GET /api/models/{_NAME}", "info"),
    (rf"GET /api/models/{_NAME}/revision/(.+)", "info"),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", "preupload"),
    (rf"POST /api/models/{_NAME}/commit/(.+)", "commit"),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /large/(\w+)", "put"),
    (rf"(?:HEAD|GET) /{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
)
