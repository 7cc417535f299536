"""A small Hugging Face Hub on loopback, spoken to through huggingface_hub itself.

    with LocalHub() as hub:
        hub.add("owner/name", {"model.pt": b"..."})
        hub.use(monkeypatch, tmp_path / "cache")

It serves the routes that download, listing and upload use, and can misbehave on request: break a
transfer midway, serve other bytes than it announces, gate a repository.
"""

import base64
import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

LARGE = 1000  # bytes from which a file is stored as LFS: named by its sha256


@dataclass
class Repository:
    """Files by branch, and how the repository misbehaves."""

    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    gated: bool = False
    break_after: int | None = None  # the next transfer ends after this many bytes
    corrupt: bool = False  # serves flipped bytes under the true sha256
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, file, Range
    message: str = ""  # of the last commit

    def commit(self, branch: str) -> str:
        """The branch's commit: 40 hex digits that depend on its content."""
        digest = hashlib.sha1()
        for name, content in sorted(self.branches[branch].items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def branch_of(self, revision: str) -> str | None:
        """The branch that a branch name or commit means."""
        if revision in self.branches:
            return revision
        return next((name for name in self.branches if self.commit(name) == revision), None)


def etag(content: bytes) -> str:
    """sha256 for large files, git's blob sha1 for small ones."""
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LocalHub:
    """The server; `repositories` is its whole state."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # uploaded LFS objects
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As when the network is down."""
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], **behaviour: object) -> Repository:
        """Create a repository `owner/name` with these files on main."""
        self.repositories[name] = Repository(**behaviour)
        self.repositories[name].branches["main"].update(files)
        return self.repositories[name]

    def environment(self, cache: Path) -> dict[str, str]:
        """For a subprocess."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_local",
        }

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Point this process's huggingface_hub, which read its environment on import, here."""
        from huggingface_hub import constants, hf_api

        monkeypatch.setenv("HF_TOKEN", "hf_local")
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.0"  # a connection per request, so that stop() stops

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._resolve(send_body=False)

    def do_GET(self) -> None:
        parts = self._parts()
        if parts[:2] == ["api", "whoami-v2"]:
            self._json({"name": "local", "type": "user", "orgs": [], "auth": {}})
        elif parts[:2] == ["api", "models"]:
            self._model(parts)
        else:
            self._resolve(send_body=True)

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self._send(200, b"")

    def do_POST(self) -> None:
        parts, body = self._parts(), self._body()
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'local'}/{asked['name']}"
            existed = name in self.hub.repositories
            self.hub.repositories.setdefault(name, Repository())
            self._json({"url": f"{self.hub.url}/{name}"}, 409 if existed else 200)
        elif parts == ["api", "validate-yaml"]:
            self._validate(json.loads(body)["content"])
        elif parts[-1:] == ["batch"]:
            objects = [self._upload_action(item) for item in json.loads(body)["objects"]]
            self._json({"transfer": "basic", "objects": objects})
        elif "preupload" in parts:
            files = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for item in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif "branch" in parts:
            repository = self.hub.repositories["/".join(parts[2:4])]
            repository.branches.setdefault(parts[-1], dict(repository.branches["main"]))
            self._json({})
        elif "commit" in parts:
            self._commit(parts, body)
        else:
            self._error(404, "EntryNotFound")

    def _upload_action(self, item: dict) -> dict:
        upload = {"href": f"{self.hub.url}/objects/{item['oid']}", "header": {}}
        return {**item, "actions": {"upload": upload}}

    def _commit(self, parts: list[str], body: bytes) -> None:
        name, branch = "/".join(parts[2:4]), unquote(parts[-1])
        repository = self.hub.repositories[name]
        files = repository.branches[branch]
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                repository.message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = repository.commit(branch)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit})

    def _validate(self, card: str) -> None:
        try:
            facts = yaml.safe_load(card.split("---")[1])
            assert isinstance(facts, dict), "no metadata"
        except (IndexError, yaml.YAMLError, AssertionError) as error:
            self._send(400, str(error).encode())
        else:
            self._json({"errors": [], "warnings": []})

    def _model(self, parts: list[str]) -> None:
        name = "/".join(parts[2:4])
        revision = unquote(parts[5]) if len(parts) > 5 else "main"
        found = self._find(name, revision)
        if found is None:
            return
        repository, branch = found
        files = repository.branches[branch]
        if len(parts) > 4 and parts[4] == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
                for path, content in files.items()
            ]
            self._json(entries)
        else:
            siblings = [{"rfilename": path} for path in files]
            sha = repository.commit(branch)
            self._json({"id": name, "modelId": name, "sha": sha, "siblings": siblings})

    def _find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and branch; answers with the Hub's error where there is none."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._error(404, "RepoNotFound")
        elif repository.gated:
            self._error(403, "GatedRepo")
        elif (branch := repository.branch_of(revision)) is None:
            self._error(404, "RevisionNotFound")
        else:
            return repository, branch
        return None

    def _resolve(self, send_body: bool) -> None:
        """owner / name / resolve / revision / file."""
        parts = self._parts()
        name, revision, path = "/".join(parts[:2]), unquote(parts[3]), "/".join(parts[4:])
        found = self._find(name, revision)
        if found is None:
            return
        repository, branch = found
        content = repository.branches[branch].get(path)
        asked = self.headers.get("Range", "")
        repository.requests.append((self.command, path, asked))
        headers = {"X-Repo-Commit": repository.commit(branch)}
        if content is None:
            self._error(404, "EntryNotFound", headers)
            return
        headers["ETag"] = f'"{etag(content)}"'
        if repository.corrupt:
            content = bytes([content[0] ^ 255]) + content[1:]
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        self._send(206 if asked else 200, body if send_body else None, headers, len(body))

    def _parts(self) -> list[str]:
        return urlsplit(self.path).path.strip("/").split("/")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        body = None if self.command == "HEAD" else b"{}"
        self._send(status, body, {"X-Error-Code": code, **(headers or {})}, 2)

    def _send(
        self,
        status: int,
        body: bytes | None,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body or b"") if length is None else length))
        self.end_headers()
        if body is None:
            return
        repository = self.hub.repositories.get("/".join(self._parts()[:2]))
        if repository and repository.break_after is not None and status in (200, 206):
            body, repository.break_after = body[: repository.break_after], None
            self.close_connection = True
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)
