"""A stand-in for the Hugging Face Hub, over HTTP: the routes that pushing and pulling an adapter
use, with commits and branches in memory. The client is the real library."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(
        default_factory=lambda: {"0" * 40: {".gitattributes": b""}}
    )
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """The state of the hub. ``refuse``: the status to answer on routes that contain a text, such as
    ``hub.refuse["/commit/"] = 403``."""

    repos: dict[str, Repo] = field(default_factory=dict)
    refuse: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _git(data: bytes) -> str:
    """The id that git gives to a file with these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _RefusedError(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_HEAD = do_GET  # noqa: N815

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for fragment, status in self.hub.refuse.items():
                if fragment in path:
                    raise _RefusedError(status, "")
            content, headers = self._answer(
                [unquote(fragment) for fragment in path.strip("/").split("/")], body
            )
            self._send(200, content, headers)
        except _RefusedError as refused:
            status, code, *content = refused.args
            self._send(
                status,
                json.dumps(content[0] if content else {}).encode(),
                {"X-Error-Code": code} if code else {},
            )

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self, segments: list[str], body: bytes) -> tuple[bytes, dict[str, str]]:
        match segments:
            case ["api", "validate-yaml"]:
                return self._json({"warnings": [], "errors": []})
            case ["api", "repos", "create"]:
                request = json.loads(body)
                name = f"{request['organization']}/{request['name']}"
                if name in self.hub.repos:
                    raise _RefusedError(409, "", {"url": f"{self.hub.url}/{name}"})
                self.hub.repos[name] = Repo(request.get("visibility") == "private")
                return self._json({"url": f"{self.hub.url}/{name}"})
            case ["api", "models", owner, name]:
                return self._info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                return self._info(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision]:
                _, files = self._commit(f"{owner}/{name}", revision)
                return self._json(
                    [
                        {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
                        for path, data in files.items()
                    ]
                )
            case ["api", "models", owner, name, "branch", branch]:
                branches = self._repo(f"{owner}/{name}").branches
                if branch in branches:
                    raise _RefusedError(409, "")
                branches[branch] = branches["main"]
                return self._json({})
            case ["api", "models", owner, name, "preupload", revision]:
                _, committed = self._commit(f"{owner}/{name}", revision)
                files = []
                for path in (file["path"] for file in json.loads(body)["files"]):
                    blob = {"oid": _git(committed[path])} if path in committed else {}
                    files.append(
                        {"path": path, "uploadMode": "regular", "shouldIgnore": False, **blob}
                    )
                return self._json({"files": files})
            case ["api", "models", owner, name, "commit", revision]:
                return self._change(f"{owner}/{name}", revision, body)
            case [owner, name, "resolve", revision, *path]:
                sha, files = self._commit(f"{owner}/{name}", revision)
                if "/".join(path) not in files:
                    raise _RefusedError(404, "EntryNotFound")
                data = files["/".join(path)]
                return data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha}
        raise _RefusedError(404, "")

    def _json(self, value: object) -> tuple[bytes, dict[str, str]]:
        return json.dumps(value).encode(), {"Content-Type": "application/json"}

    def _repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise _RefusedError(401, "RepoNotFound")
        return self.hub.repos[name]

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(name)
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _RefusedError(404, "RevisionNotFound")
        return sha, repo.commits[sha]

    def _info(self, name: str, revision: str) -> tuple[bytes, dict[str, str]]:
        sha, files = self._commit(name, revision)
        siblings = [{"rfilename": path} for path in files]
        return self._json(
            {"id": name, "sha": sha, "private": self._repo(name).private, "siblings": siblings}
        )

    def _change(self, name: str, branch: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        _, files = self._commit(name, branch)
        repo, files = self._repo(name), dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    repo.messages.append(value["summary"])
                case "file":
                    assert value["encoding"] == "base64"
                    files[value["path"]] = base64.b64decode(value["content"])
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise AssertionError(other)
        sha = hashlib.sha1(body + str(len(repo.commits)).encode()).hexdigest()
        repo.commits[sha], repo.branches[branch] = files, sha
        return self._json(
            {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"}
        )
