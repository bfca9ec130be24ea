"""A small server on loopback that speaks as much of the Hub's protocol as publishing and loading a model need.

Repositories live in memory. A commit is a whole set of files; a branch is the last of its commits. Large files (those
that are not text) go through git LFS's batch protocol, as the Hub's do where xet is turned off.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


TOKEN = "hf_of_the_tests"
USER = "someone"
LARGE = (".safetensors", ".png", ".bin")
NEW = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass
class Repository:
    """commits: the files of each, by its sha. branches: name -> sha. history: shas, oldest first."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.history)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.history.append(sha)
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub:
    """What the server holds, and how it is told to fail.

    cut_uploads: how many further uploads of large files end in mid-transfer. cut_commits: commits that are not made
    and get no answer. cut_answers: those that are made and get none. cut_afterwards: whether nothing is answered then.
    before_commit: called once, before the next commit is looked at.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.cut_uploads = 0
        self.cut_commits = 0
        self.cut_answers = 0
        self.cut_afterwards = False
        self.silent = False
        self.before_commit: Any = None
        self.requests: list[str] = []

    def model(self, name: str) -> Repository:
        return self.repositories[name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.resolve(revision)]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.answer(status, {"error": message}, **headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    def handle_any(self) -> None:
        if self.hub.silent:
            return self.cut()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {TOKEN}":
            self.body()
            return self.refuse(401, "Invalid username or password.")
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                if "write" in method and given is None:
                    self.body()
                    return self.refuse(401, "Invalid username or password.")
                return handler(self, *match.groups())
        self.body()
        return self.refuse(404, f"no such place here: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def found(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.headers.get("Authorization") is None):
            self.refuse(404 if self.headers.get("Authorization") else 401, "Repository not found", "RepoNotFound")
            return None
        sha = repository.resolve(revision)
        if sha is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return repository, sha

    def whoami(self) -> None:
        self.answer(200, {"name": USER, "type": "user", "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body())
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not name.startswith(f"{USER}/"):
            return self.refuse(403, f"You don't have the rights to create a model under the namespace {name}")
        if name in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"})
            return
        made = self.hub.repositories[name] = Repository(asked.get("private") or asked.get("visibility") == "private")
        made.commit("main", dict(NEW), "initial commit")
        self.answer(200, {"url": f"{self.url}/{name}", "name": name, "id": name})

    @property
    def url(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host}:{port}"

    def branch(self, name: str, branch: str) -> None:
        self.body()
        if (found := self.found(name)) is None:
            return
        repository, sha = found
        if branch in repository.branches:
            return self.refuse(409, f"Reference already exists: {branch}")
        repository.branches[branch] = sha
        self.answer(200, {})

    def info(self, name: str, revision: str | None = None) -> None:
        if (found := self.found(name, revision or "main")) is None:
            return
        repository, sha = found
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        self.answer(200, {"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        if (found := self.found(name, revision)) is None:
            return
        repository, sha = found
        self.answer(200, [listed(*each) for each in sorted(repository.commits[sha].items())])

    def preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self.body())["files"]
        if self.found(name, revision) is None:
            return
        modes = {each["path"]: "lfs" if each["path"].endswith(LARGE) else "regular" for each in asked}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self.answer(200, {"files": files})

    def batch(self, name: str) -> None:
        asked = json.loads(self.body())["objects"]
        objects = []
        for each in asked:
            upload = {"upload": {"href": f"{self.url}/large/{each['oid']}", "header": {}}}
            known = each["oid"] in self.hub.large
            objects.append({**each, "authenticated": True, **({} if known else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if self.hub.cut_uploads:
            self.hub.cut_uploads -= 1
            self.rfile.read(16)
            return self.cut()
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, "the content is not what was announced")
        self.hub.large[oid] = content
        self.answer(200)

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        if self.hub.cut_commits:
            self.hub.cut_commits -= 1
            return self.cut()
        interfere, self.hub.before_commit = self.hub.before_commit, None
        if interfere is not None:
            interfere()
        if (found := self.found(name, revision)) is None:
            return
        repository, sha = found
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, sha):
            return self.refuse(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[sha])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self.refuse(400, f"the large file {value['path']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
        made = repository.commit(revision, files, header["summary"])
        if self.hub.cut_answers:
            self.hub.cut_answers -= 1
            self.hub.silent = self.hub.cut_afterwards
            return self.cut()
        self.answer(200, {"commitUrl": f"{self.url}/{name}/commit/{made}", "commitOid": made, "success": True})

    def download(self, name: str, revision: str, path: str) -> None:
        if (found := self.found(name, revision)) is None:
            return
        repository, sha = found
        content = repository.commits[sha].get(path)
        if content is None:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        size = {"Content_Length": str(len(content))}
        self.answer(200, content, ETag=f'"{blob(content)}"', X_Repo_Commit=sha, **size)

    def card_check(self) -> None:
        asked = json.loads(self.body())
        good = asked["content"].startswith("---\n") and "\n---" in asked["content"][4:]
        self.answer(200, {"errors": [] if good else [{"message": "no metadata"}], "warnings": []})


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def listed(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it: a large one by its pointer and by its own hash."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        entry |= {"oid": blob(pointer), "lfs": {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}}
    return entry


REPOSITORY = r"([^/]+/[^/]+)"
ROUTES = (
    ("GET write", "/api/whoami-v2", Handler.whoami),
    ("POST write", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.card_check),
    ("POST write", rf"/api/models/{REPOSITORY}/branch/([^/]+)", Handler.branch),
    ("POST write", rf"/api/models/{REPOSITORY}/preupload/([^/]+)", Handler.preupload),
    ("POST write", rf"/api/models/{REPOSITORY}/commit/([^/]+)", Handler.commit),
    ("GET", rf"/api/models/{REPOSITORY}/tree/([^/]+)", Handler.tree),
    ("GET", rf"/api/models/{REPOSITORY}/revision/([^/]+)", Handler.info),
    ("GET", rf"/api/models/{REPOSITORY}", Handler.info),
    ("POST write", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/large/([0-9a-f]+)", Handler.upload),
    ("GET HEAD", rf"/{REPOSITORY}/resolve/([^/]+)/(.+)", Handler.download),
)


@contextmanager
def serve() -> Iterator[tuple[str, Hub]]:
    """A running server: its address and what it holds."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
