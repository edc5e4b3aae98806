"""A hub of Hugging Face's kind on loopback, as far as its client asks: repositories, commits, files."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """Repositories by name: whether they are private, and their commits, each a dict of files, the newest last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Add a commit; gives its name."""
        history = self.commits.setdefault(repo, [])
        everything = (history[-1][1] if history else {}) | files
        name = hashlib.sha1(repr(sorted(everything.items())).encode()).hexdigest()
        history.append((name, everything))
        return name

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        history = self.commits.get(repo, [])
        return next((c for c in reversed(history) if revision in ("main", c[0])), None)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def missing(self, code: str) -> None:
        self.answer({"error": "not found"}, 404, {"X-Error-Code": code, "X-Error-Message": "not found"})

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        known = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+)(/.*)?$", path)
        repo, rest = (known[1], known[2] or "") if known else ("", "")
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in hub.private or (hub.private[repo] and not signed_in):
            return self.missing("RepoNotFound")
        asked = re.match(r"/(revision|tree|resolve)/([^/]+)/?(.*)$", rest)
        name, files = hub.find(repo, asked[2] if asked else "main") or ("", {})
        if asked and not name:
            return self.missing("RevisionNotFound")
        if asked and asked[1] == "tree":
            entries = [{"type": "file", "path": p, "size": len(d), "oid": sha(d)} for p, d in files.items()]
            return self.answer(entries)
        if asked and asked[1] == "resolve":
            if asked[3] not in files:
                return self.missing("EntryNotFound")
            data = files[asked[3]]
            return self.answer(data, headers={"ETag": f'"{sha(data)}"', "X-Repo-Commit": name})
        siblings = [{"rfilename": path} for path in files]
        return self.answer({"id": repo, "sha": name, "private": hub.private[repo], "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815 - the server's own name

    def do_POST(self) -> None:
        hub, path, body = self.server, self.path.partition("?")[0], self.body()
        hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":  # of a card's front matter
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "unauthorized"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if repo in hub.private:
                return self.answer({"error": "exists", "url": f"{hub.url}/{repo}"}, 409)
            hub.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            hub.commit(repo, {".gitattributes": b""})
            return self.answer({"url": f"{hub.url}/{repo}", "name": repo, "id": repo})
        repo = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        added = [json.loads(line) for line in body.splitlines()]
        name = hub.commit(
            repo, {a["value"]["path"]: base64.b64decode(a["value"]["content"]) for a in added if a["key"] == "file"}
        )
        return self.answer({"success": True, "commitOid": name, "commitUrl": f"{hub.url}/{repo}/commit/{name}"})


def sha(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
