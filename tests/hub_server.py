"""A small Hugging Face Hub on the loopback: real HTTP for the real client, with faults on request.

It serves what the client asks of models: file metadata and content with ranges, gated and missing things with the Hub's error
codes, repository creation, the pre-upload check, LFS uploads and commits.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LFS_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")


@dataclass
class Repo:
    """A model repository: the files of each commit, and where the branches point."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated_for: str | None = None

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit to a branch; returns its hash."""
        merged = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        digest = hashlib.sha1(repr((len(self.commits), sorted(merged))).encode()).hexdigest()
        self.commits[digest] = merged
        self.branches[branch] = digest
        return digest

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or of its own hash."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong with the next downloads of a file.

    Attributes:
        drop_after: close the connection after that many bytes, ``times`` times.
        corrupt: flip a byte of the content.
        status: answer with this status instead.
        drip: send pieces of that many bytes, with ``pause`` seconds after each.
        silent_after: send nothing more after that many bytes, and keep the connection.
    """

    drop_after: int | None = None
    times: int = 1
    corrupt: bool = False
    status: int | None = None
    drip: int | None = None
    pause: float = 0.0
    silent_after: int | None = None


class HubServer:
    """The server; use as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.lfs: dict[str, bytes] = {}
        self.closing = threading.Event()
        server = self

        class Handler(_Handler):
            hub = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def repo(self, name: str) -> Repo:
        """The repository of that name, made if need be."""
        return self.repos.setdefault(name, Repo())

    def downloads(self, file: str) -> list[str | None]:
        """The range header of each GET of a file, in order."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(f"/{file}")]

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are recorded in the server instead of printed."""

    def do_HEAD(self) -> None:
        self._serve_file(with_body=False)

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", self.path.partition("?")[0]):
            self._repo_info(found[1], found[2] or "main")
        else:
            self._serve_file(with_body=True)

    def _repo_info(self, name: str, revision: str) -> None:
        repo = self.hub.repos.get(name)
        commit = repo.resolve(revision) if repo else None
        if repo is None or commit is None:
            return self._answer(404, error="RepoNotFound" if repo is None else "RevisionNotFound")
        siblings = [{"rfilename": file} for file in repo.commits[commit]]
        self._answer(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "private": False})

    def _serve_file(self, with_body: bool) -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        found = re.fullmatch(r"/(.+?)/resolve/(.+?)/(.+)", self.path.partition("?")[0])
        if not found:
            return self._answer(404)
        name, revision, file = found.groups()
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._answer(401, error="RepoNotFound")
        if repo.gated_for and self.headers.get("Authorization") != f"Bearer {repo.gated_for}":
            return self._answer(401, error="GatedRepo")
        commit = repo.resolve(revision)
        if commit is None:
            return self._answer(404, error="RevisionNotFound")
        content = repo.commits[commit].get(file)
        if content is None:
            return self._answer(404, error="EntryNotFound", headers={"X-Repo-Commit": commit})
        fault = self.hub.faults.get(file, Fault())
        if fault.status:
            return self._answer(fault.status)
        is_lfs = file.endswith(LFS_SUFFIXES)
        etag = hashlib.sha256(content).hexdigest() if is_lfs else hashlib.sha1(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if fault.corrupt:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
        start, status = 0, 200
        if wanted := self.headers.get("Range"):
            start, status = int(re.match(r"bytes=(\d+)-", wanted)[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if not with_body:
            return
        if fault.drop_after is not None and fault.times > 0:
            fault.times -= 1
            self.wfile.write(body[: fault.drop_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        if fault.drip is not None:
            with contextlib.suppress(OSError):  # the client may give up
                for start in range(0, len(body), fault.drip):
                    self.wfile.write(body[start : start + fault.drip])
                    self.wfile.flush()
                    if self.hub.closing.wait(fault.pause):
                        break
            self.close_connection = True
            return
        if fault.silent_after is not None:
            self.wfile.write(body[: fault.silent_after])
            self.wfile.flush()
            self.hub.closing.wait()
            self.close_connection = True
            return
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self._body()
        self.hub.requests.append(("POST", self.path, None))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.hub.repo(name)
            return self._answer(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", self.path):
            repo = self.hub.repo(found[1])
            repo.branches[found[2]] = repo.branches.get("main", "")
            return self._answer(200, {})
        if re.fullmatch(r"/api/models/(.+)/preupload/(.+)", self.path.partition("?")[0]):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": wanted["oid"],
                    "size": wanted["size"],
                    "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}},
                }
                for wanted in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", self.path.partition("?")[0]):
            files = {}
            for line in body.decode().splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = self.hub.lfs[value["oid"]]
            commit = self.hub.repo(found[1]).commit(files, found[2])
            url = f"{self.hub.endpoint}/{found[1]}/commit/{commit}"
            return self._answer(200, {"commitUrl": url, "commitOid": commit, "success": True})
        return self._answer(404)

    def do_PUT(self) -> None:
        body = self._body()
        self.hub.lfs[self.path.rsplit("/", 1)[1]] = body
        self._answer(200)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(
        self, status: int, content: Any = None, error: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        body = json.dumps(content if content is not None else {"error": error}).encode()
        self.send_response(status)
        for key, value in {
            **(headers or {}),
            **({"X-Error-Code": error, "X-Error-Message": error} if error else {}),
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
