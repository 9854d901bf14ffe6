"""A hub on the loopback interface: as much of the Hub's HTTP protocol as a push and a pull of a model use.

Written from what `huggingface_hub` sends and expects, with no code of `hf_stompp`: a test compares what lies in
[`LoopbackHub.head`] afterwards with the files that were pushed. Faults are put in its way by method and path.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
USER = "user"


@dataclass(frozen=True)
class Commit:
    """A commit: what was said of it, and all files of the repository as it left them."""

    sha: str
    title: str
    parent: str | None
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits, and the branches (and pull requests) by name."""

    private: bool
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, Commit] = field(default_factory=dict)

    def commit(self, title: str, files: dict[str, bytes], parent: Commit | None) -> Commit:
        sha = hashlib.sha1(f"{len(self.commits)}{title}".encode()).hexdigest()
        self.commits.append(Commit(sha, title, parent and parent.sha, files))
        return self.commits[-1]

    def find(self, revision: str) -> Commit | None:
        return self.branches.get(revision) or next((c for c in self.commits if c.sha == revision), None)


@dataclass
class Fault:
    """What happens to a request: a status; a connection that is cut before ("drop") or after ("lost") its work; or
    something that is done just before, and it then goes on as usual."""

    method: str
    path: str
    kind: int | str | Callable[[], Any]
    times: float


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class LoopbackHub:
    """Serves in a thread: `with LoopbackHub() as hub: ...`; `hub.url` is its endpoint.

    Attributes:
        repos: `user/name` → [`Repo`].
        large: sha256 → the large files that were uploaded, whether or not a commit names them.
        requests: `METHOD path` of all requests so far.
        refused_size: Uploads and commits of more bytes than this get a 413.
    """

    def __init__(self) -> None:
        self.reset()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def reset(self) -> None:
        """Forgets everything but the address."""
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.refused_size = float("inf")

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, method: str, path: str, kind: int | str | Callable[[], Any], times: float = float("inf")) -> None:
        """The next `times` requests of `method` whose path matches the regular expression go wrong."""
        self.faults.append(Fault(method, path, kind, times))

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """Makes a repository as the Hub does, with one commit, and `files` besides."""
        repo = self.repos[repo_id] = Repo(private)
        repo.branches["main"] = repo.commit("initial commit", {".gitattributes": b"", **(files or {})}, None)
        return repo

    def head(self, repo_id: str, branch: str = "main") -> Commit:
        return self.repos[repo_id].branches[branch]

    def next_fault(self, method: str, path: str) -> Any:
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault.kind
        return None

    # --- what the Hub does; `_ROUTES` says at which address ----------------------------------------------------------

    def create_repo(self, query: dict[str, str], body: bytes) -> Any:
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or USER}/{asked['name']}"
        if repo_id.startswith("nobody/"):
            raise Refused(404, message="There is no such organization")
        if not repo_id.startswith(f"{USER}/"):
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repos:
            return 409, answer | {"error": "You already created this model repo"}
        self.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return answer

    def create_branch(self, query: dict[str, str], body: bytes, repo_id: str, branch: str) -> Any:
        repo = self._repo(repo_id)
        if branch in repo.branches:
            raise Refused(409, message="Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return {}

    def info(self, query: dict[str, str], body: bytes, repo_id: str, revision: str | None) -> Any:
        commit = self._commit(repo_id, revision or "main")
        files = [{"rfilename": name} for name in commit.files]
        return {"id": repo_id, "sha": commit.sha, "private": self.repos[repo_id].private, "siblings": files}

    def tree(self, query: dict[str, str], body: bytes, repo_id: str, revision: str) -> Any:
        files = self._commit(repo_id, revision).files.items()
        oids = {name: hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() for name, content in files}
        return [{"type": "file", "path": name, "size": len(content), "oid": oids[name]} for name, content in files]

    def preupload(self, query: dict[str, str], body: bytes, repo_id: str, revision: str) -> Any:
        """Which files are large, and what of them is there already."""
        there = self._commit(repo_id, revision).files
        ignored = there.get(".gitignore", b"").decode().split()
        files = []
        for file in json.loads(body)["files"]:
            large, old = file["path"].endswith(".safetensors"), there.get(file["path"])
            git = old is not None and hashlib.sha1(b"blob %d\0" % len(old) + old).hexdigest()
            oid = (hashlib.sha256(old).hexdigest() if large else git) if old is not None else None
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "oid": oid}
            files.append(answer | {"shouldIgnore": file["path"] in ignored})
        return {"files": files}

    def large_batch(self, query: dict[str, str], body: bytes, repo_id: str) -> Any:
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.large:
                entry["actions"] = {"upload": {"href": f"{self.url}/upload/{entry['oid']}"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def upload(self, query: dict[str, str], body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="The content has another hash")
        self.large[oid] = body
        return {}

    def commit(self, query: dict[str, str], body: bytes, repo_id: str, revision: str) -> Any:
        """All lines are read before anything changes."""
        repo, parent = self._repo(repo_id), self._commit(repo_id, revision)
        header, *lines = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", parent.sha) != parent.sha:
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if len(self.large.get(value["oid"], b"")) != value["size"]:
                    raise Refused(400, message=f"{path} was not uploaded")
                files[path] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[path]
            else:
                raise Refused(400, message=f"Unknown operation {line['key']}")
        commit = repo.commit(header["value"]["summary"], files, parent)
        pull_request = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.branches) + 1}"
        repo.branches[pull_request if "create_pr" in query else revision] = commit
        answer = {"commitUrl": f"{self.url}/{repo_id}/commit/{commit.sha}", "commitOid": commit.sha}
        if "create_pr" in query:
            answer["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{pull_request.rpartition('/')[2]}"
        return answer

    def validate_card(self, query: dict[str, str], body: bytes) -> Any:
        if json.loads(body)["content"].startswith("---\n"):
            return {"errors": [], "warnings": []}
        return 400, {"errors": [{"message": "no metadata"}], "warnings": []}

    def resolve(self, query: dict[str, str], body: bytes, repo_id: str, revision: str, path: str) -> Any:
        commit = self._commit(repo_id, revision)
        if path not in commit.files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha256(commit.files[path]).hexdigest()
        return 200, commit.files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": commit.sha}

    def _repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return self.repos[repo_id]

    def _commit(self, repo_id: str, revision: str) -> Commit:
        commit = self._repo(repo_id).find(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        return commit


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", "/api/repos/create", LoopbackHub.create_repo),
    ("POST", "/api/validate-yaml", LoopbackHub.validate_card),
    ("POST", f"/api/models/{_REPO}/branch/([^/]+)", LoopbackHub.create_branch),
    ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", LoopbackHub.preupload),
    ("POST", f"/api/models/{_REPO}/commit/([^/]+)", LoopbackHub.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", LoopbackHub.large_batch),
    ("PUT", "/upload/([0-9a-f]+)", LoopbackHub.upload),
    ("GET", f"/api/models/{_REPO}(?:/revision/([^/]+))?", LoopbackHub.info),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)", LoopbackHub.tree),
    ("GET", f"/{_REPO}/resolve/([^/]+)/(.+)", LoopbackHub.resolve),
]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        address = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {address.path}")
            fault = self.hub.next_fault(self.command, address.path)
        if isinstance(fault, int):
            return self.answer(fault, b"<html>no JSON</html>" if fault >= 500 else b"", {"X-Error-Message": "a fault"})
        if callable(fault):
            fault()
        if fault != "drop":
            status, content, headers = self.work(address.path, parse_qs(address.query), body)
        if fault in ("drop", "lost"):
            self.close_connection = True
            return self.connection.close()
        self.answer(status, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def work(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        method = "GET" if self.command == "HEAD" else self.command
        try:
            if len(body) > self.hub.refused_size:
                raise Refused(413, message="Payload too large")
            # Large files go to addresses that are signed themselves.
            if method != "PUT" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                given = self.headers.get("Authorization") is not None
                raise Refused(401, message="Invalid credentials in Authorization header" if given else "")
            for verb, pattern, action in _ROUTES:
                if verb == method and (match := re.fullmatch(pattern, path)):
                    groups = [group and unquote(group) for group in match.groups()]
                    with self.hub.lock:
                        answer = action(self.hub, {k: v[0] for k, v in query.items()}, body, *groups)
                    break
            else:
                raise Refused(404, "EntryNotFound", "No such address")
        except Refused as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            return error.status, b"{}", {key: value for key, value in headers.items() if value}
        status, content, headers = (*answer, {})[:3] if isinstance(answer, tuple) else (200, answer, {})
        return status, content if isinstance(content, bytes) else json.dumps(content).encode(), headers

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""
