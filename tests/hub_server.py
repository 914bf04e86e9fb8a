"""The Hub's HTTP interface on loopback, as far as huggingface_hub 2.4 asks for it.

A real server that keeps repositories in memory: creating, branches, which files go by LFS, uploads
by LFS, commits, what a revision holds, and files with redirects, ETags and commits as the Hub sends
them. Without Xet, which a repository need not have. Faults are asked for by :meth:`Hub.fail`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_a_token_of_the_tests"
READER = "hf_that_may_only_read"
ANSWER = {"EntryNotFound": 404, "RevisionNotFound": 404, "RepoNotFound": 404}


@dataclass
class Repository:
    """Branches are names of commits; a commit is what its files hold."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """A commit, which the branch then is."""
        said = json.dumps([message, len(self.commits), sorted(files)]).encode()
        commit = hashlib.sha1(said + b"".join(files.values())).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        self.messages.append(message)
        return commit

    def find(self, revision: str) -> str | None:
        """The commit of a branch, or of itself."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Fault:
    """What goes wrong with some requests."""

    what: re.Pattern[str]
    status: int
    times: int
    headers: dict[str, str]


class Hub:
    """The service; ``url`` is its address.

    Attributes:
        asked: ``METHOD /path`` of every request so far.
        changes: ``METHOD /path`` and what is done to the bytes of an answer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: list[Fault] = []
        self.damage: Any = None
        hub = self

        class Handler(_Handler):
            service = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.store = f"http://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        """End the service."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, what: str, status: int, times: int = 10**6, **headers: str) -> None:
        """Answer requests that match with a status, so many times; 0: break the connection off."""
        self.faults.append(Fault(re.compile(what), status, times, headers))

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        found = self.repositories[repository]
        return found.commits[found.find(revision) or ""]

    def keep(self, repository: str, files: dict[str, bytes], **more: Any) -> str:
        """Make a repository that holds these files; its commit."""
        made = self.repositories.setdefault(repository, Repository(**more))
        return made.add("main", files, "kept")


class _Handler(BaseHTTPRequestHandler):
    service: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        length = str(len(data))
        if self.service.damage is not None and self.command == "GET" and isinstance(body, bytes):
            data = self.service.damage(data)
        self.send_response(status)
        for name, value in {"Content-Length": length, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        if len(data) != int(length):
            self.close_connection = True

    def _refuse(self, code: str, message: str, status: int | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._answer(status or ANSWER[code], {"error": message}, **headers)

    def _handle(self) -> None:
        place = urlsplit(self.path)
        self.service.asked.append(f"{self.command} {place.path}")
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for fault in self.service.faults:
            if fault.times > 0 and fault.what.search(f"{self.command} {place.path}"):
                fault.times -= 1
                if fault.status == 0:
                    self.close_connection = True
                    return
                self._answer(fault.status, {"error": "of the test"}, **fault.headers)
                return
        said = self.headers.get("Authorization", "")
        self.token = said.removeprefix("Bearer ") or None
        if self.token not in (None, TOKEN, READER):
            self._answer(401, {"error": "Invalid username or password."})
            return
        for method, pattern, function in _ROUTES:
            found = re.fullmatch(pattern, place.path)
            if found and self.command in method:
                function(self, *map(unquote, found.groups()))
                return
        self._answer(404, {"error": "no such page"})

    def __getattr__(self, name: str) -> Any:
        if name in ("do_GET", "do_HEAD", "do_POST", "do_PUT"):
            return self._handle
        raise AttributeError(name)

    def _json(self) -> Any:
        return json.loads(self.content)

    def _may_write(self) -> bool:
        if self.token == TOKEN:
            return True
        self._answer(401 if self.token is None else 403, {"error": "no right to write"})
        return False

    def _repository(self, name: str) -> Repository | None:
        found = self.service.repositories.get(name)
        if found is None or (found.private and self.token is None):
            # The Hub does not tell who it does not know whether there is one.
            self._refuse("RepoNotFound", "Repository not found", 404 if self.token else 401)
            return None
        return found

    def _commit_of(self, name: str, revision: str) -> tuple[Repository, str] | None:
        found = self._repository(name)
        if found is None:
            return None
        commit = found.find(revision)
        if commit is None:
            self._refuse("RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return found, commit

    def create(self) -> None:
        if not self._may_write():
            return
        said = self._json()
        name = f"{said['organization']}/{said['name']}"
        url = f"{self.service.url}/{name}"
        if name in self.service.repositories:
            self._answer(409, {"error": "You already created this model repo", "url": url})
            return
        made = Repository(private=said.get("visibility") == "private")
        made.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.service.repositories[name] = made
        self._answer(200, {"url": url})

    def info(self, name: str, revision: str = "main") -> None:
        found = self._commit_of(name, revision)
        if found is not None:
            repository, commit = found
            siblings = [{"rfilename": file} for file in repository.commits[commit]]
            said = {"id": name, "sha": commit, "private": repository.private, "tags": []}
            self._answer(200, {**said, "siblings": siblings})

    def branch(self, name: str, branch: str) -> None:
        found = self._repository(name) if self._may_write() else None
        if found is None:
            return
        if branch in found.branches:
            self._answer(409, {"error": "Reference already exists"})
            return
        found.branches[branch] = found.branches["main"]
        self._answer(201)

    def paths(self, name: str, revision: str) -> None:
        found = self._commit_of(name, revision)
        if found is None:
            return
        files = found[0].commits[found[1]]
        asked = parse_qs(self.content.decode())["paths"]
        self._answer(200, [_described(path, files[path]) for path in asked if path in files])

    def preupload(self, name: str, revision: str) -> None:
        found = self._commit_of(name, revision) if self._may_write() else None
        if found is None:
            return
        files = found[0].commits[found[1]]
        said = []
        for file in self._json()["files"]:
            path = file["path"]
            one = {"path": path, "uploadMode": _mode(path), "shouldIgnore": False}
            if path in files:
                described = _described(path, files[path])
                one["oid"] = described.get("lfs", described)["oid"]
            said.append(one)
        self._answer(200, {"files": said})

    def batch(self, name: str) -> None:
        if not self._may_write():
            return
        said = []
        for one in self._json()["objects"]:
            if one["oid"] in self.service.stored:
                said.append(one)
                continue
            place = {"href": f"{self.service.store}/lfs/{one['oid']}"}
            said.append({**one, "actions": {"upload": place}})
        self._answer(200, {"transfer": "basic", "objects": said})

    def upload(self, oid: str) -> None:
        assert self.token is None
        assert hashlib.sha256(self.content).hexdigest() == oid
        self.service.stored[oid] = self.content
        self._answer(200)

    def commit(self, name: str, branch: str) -> None:
        found = self._commit_of(name, branch) if self._may_write() else None
        if found is None:
            return
        repository, before = found
        files, message = dict(repository.commits[before]), ""
        for line in self.content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", before) != before:
                    self._answer(412, {"error": "A commit has happened since."})
                    return
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.service.stored[value["oid"]]
        commit = repository.add(branch, files, message)
        url = f"{self.service.url}/{name}/commit/{commit}"
        self._answer(200, {"commitOid": commit, "commitUrl": url, "success": True})

    def check_card(self) -> None:
        block = self._json()["content"].split("---")[1]
        try:
            said = yaml.safe_load(block)
            assert isinstance(said, dict)
            # The Hub knows a list of them, all written so.
            assert re.fullmatch(r"[a-z0-9.-]+", said.get("license", "mit")), '"license" is unknown'
            self._answer(200, {"errors": [], "warnings": []})
        except (AssertionError, yaml.YAMLError) as error:
            self._answer(400, {"errors": [{"message": str(error)}], "warnings": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self._commit_of(name, revision)
        if found is None:
            return
        files, commit = found[0].commits[found[1]], found[1]
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self._answer(404, {"error": "Entry not found"}, **headers)
            return
        described = _described(path, files[path])
        if "lfs" not in described:
            headers = {"ETag": f'"{described["oid"]}"', "X-Repo-Commit": commit}
            self._answer(200, files[path], **headers)
            return
        oid = described["lfs"]["oid"]
        headers = {
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(files[path])),
            "X-Repo-Commit": commit,
            # Another host, as the Hub's store is: tokens are not for it.
            "Location": f"{self.service.store}/cdn/{name}/{commit}/{path}",
        }
        self._answer(302, {}, **headers)

    def cdn(self, name: str, commit: str, path: str) -> None:
        assert self.token is None
        self._answer(200, self.service.repositories[name].commits[commit][path])


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _described(path: str, data: bytes) -> dict[str, Any]:
    """As the Hub describes a file; git's hash of its content, or of the pointer to it."""
    said: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    if _mode(path) == "lfs":
        oid = hashlib.sha256(data).hexdigest()
        said["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
        data = f"version https://git-lfs\noid sha256:{oid}\nsize {len(data)}\n".encode()
    return {**said, "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


_NAME = r"([^/]+/[^/]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.check_card),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/paths-info/(.+)", _Handler.paths),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.upload),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (("HEAD", "GET"), rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/cdn/{_NAME}/([0-9a-f]{{40}})/(.+)", _Handler.cdn),
]
