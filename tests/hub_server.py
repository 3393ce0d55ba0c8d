"""A Hub on loopback, for tests: it speaks what huggingface_hub calls, keeps real files, and can be told to fail."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.utils.sha import git_hash


TOKENS = {"good-token": "user", "other-token": "other"}
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LARGE_SUFFIX = ".safetensors"
LICENSES = ["apache-2.0", "mit"]


class File(NamedTuple):
    """A file of a commit: `sha256` names its bytes on disk, `oid` is what git calls it."""

    sha256: str
    size: int
    oid: str
    is_large: bool


class Commit(NamedTuple):
    oid: str
    parent: str | None
    title: str
    files: dict[str, File]


class Fault(NamedTuple):
    """The next `times` requests of this method whose path matches get a status of 500 or are cut off in the middle."""

    method: str
    pattern: str
    kind: str
    times: int


class Answer(NamedTuple):
    status: int
    content: Any = None
    headers: dict[str, str] = {}
    path: Path | None = None


class Repository:
    def __init__(self, owner: str, private: bool):
        self.owner, self.private = owner, private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}

    def find(self, revision: str) -> Commit | None:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.commits[self.refs[name]]
        return self.commits.get(revision)

    def log(self, revision: str) -> list[Commit]:
        commit, commits = self.find(revision), []
        while commit is not None:
            commits.append(commit)
            commit = self.commits.get(commit.parent)
        return commits


class Hub:
    """The state of the server. `requests` has a line for each request, `received` the names of what was uploaded."""

    def __init__(self, root: Path):
        self.root = root
        self.endpoint = ""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.received: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def path(self, sha256: str) -> Path:
        return self.root / sha256

    def store(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        self.path(sha256).write_bytes(data)
        return sha256

    def fail_next(self, method: str, pattern: str, kind: str, times: int = 1) -> None:
        self.faults.append(Fault(method, pattern, kind, times))

    def take_fault(self, method: str, path: str) -> str | None:
        with self.lock:
            for place, fault in enumerate(self.faults):
                if fault.method == method and re.search(fault.pattern, path):
                    self.faults[place : place + 1] = [fault._replace(times=fault.times - 1)] if fault.times > 1 else []
                    return fault.kind
        return None

    def create(self, repo_id: str, private: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(repo_id.partition("/")[0], private)
        self.commit(repository, "refs/heads/main", "initial commit", {".gitattributes": self.small(ATTRIBUTES)})
        return repository

    def small(self, data: bytes) -> File:
        return File(self.store(data), len(data), git_hash(data), False)

    def large(self, sha256: str, size: int) -> File:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return File(sha256, size, git_hash(pointer.encode()), True)

    def commit(self, repository: Repository, ref: str, title: str, files: dict[str, File]) -> Commit:
        parent = repository.refs.get(ref)
        oid = hashlib.sha1(json.dumps([parent, title, files, len(repository.commits)]).encode()).hexdigest()
        repository.commits[oid] = Commit(oid, parent, title, files)
        repository.refs[ref] = oid
        return repository.commits[oid]

    def content(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision."""
        files = self.repositories[repo_id].find(revision).files
        return {name: self.path(file.sha256).read_bytes() for name, file in files.items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Else each answer waits 40 ms for the client to acknowledge its headers.
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *args):
        pass

    def do_any(self):
        self.url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {self.url.path}")
        fault = self.hub.take_fault(self.command, self.url.path)
        if fault == "cut":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.shutdown(2)
            return
        body = self.read_body()
        if fault is not None:
            self.send(Answer(500, {"error": "the server was told to fail"}))
            return
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, self.url.path)
            if match and self.command in method.split():
                with self.hub.lock:
                    self.send(answer(self, body, *map(unquote, match.groups())))
                return
        self.send(Answer(404, {"error": f"no such endpoint: {self.command} {self.path}"}))

    do_GET = do_HEAD = do_POST = do_PUT = do_any  # noqa: N815

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, answer: Answer) -> None:
        data = json.dumps(answer.content).encode() if answer.path is None else answer.path.read_bytes()
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repository(self, repo_id: str) -> Repository | None:
        repository = self.hub.repositories.get(repo_id)
        hidden = repository is not None and repository.private and self.user != repository.owner
        return None if hidden else repository


NO_REPO = Answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
NO_REVISION = Answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
NO_ENTRY = Answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
FORBIDDEN = Answer(403, {"error": "You don't have the rights to write here"})
INVALID_TOKEN = Answer(
    401, {"error": "Invalid token"}, {"X-Error-Message": "Invalid credentials in Authorization header"}
)


def whoami(request: Handler, body: bytes) -> Answer:
    if request.user is None:
        return INVALID_TOKEN
    return Answer(200, {"type": "user", "name": request.user, "orgs": []})


def create_repo(request: Handler, body: bytes) -> Answer:
    if request.user is None:
        return INVALID_TOKEN
    wanted = json.loads(body)
    repo_id = f"{wanted.get('organization') or request.user}/{wanted['name']}"
    if not repo_id.startswith(request.user + "/"):
        return FORBIDDEN
    url = {"url": f"{request.hub.endpoint}/{repo_id}"}
    if repo_id in request.hub.repositories:
        return Answer(409, {"error": "You already created this model repo", **url})
    request.hub.create(repo_id, wanted.get("visibility") == "private")
    return Answer(200, url)


def model_info(request: Handler, body: bytes, repo_id: str, revision: str = "main") -> Answer:
    repository = request.repository(repo_id)
    if repository is None:
        return NO_REPO
    commit = repository.find(revision)
    if commit is None:
        return NO_REVISION
    siblings = [{"rfilename": name} for name in commit.files]
    info = {"id": repo_id, "modelId": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings}
    return Answer(200, info)


def tree_entry(name: str, file: File) -> dict:
    entry = {"type": "file", "path": name, "size": file.size, "oid": file.oid}
    large = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 134}}
    return {**entry, **(large if file.is_large else {})}


def list_tree(request: Handler, body: bytes, repo_id: str, revision: str) -> Answer:
    repository = request.repository(repo_id)
    if repository is None:
        return NO_REPO
    commit = repository.find(revision)
    return NO_REVISION if commit is None else Answer(200, [tree_entry(*item) for item in commit.files.items()])


def list_refs(request: Handler, body: bytes, repo_id: str) -> Answer:
    repository = request.repository(repo_id)
    if repository is None:
        return NO_REPO

    def refs(prefix: str) -> list[dict]:
        found = {ref: oid for ref, oid in repository.refs.items() if ref.startswith(prefix)}
        return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid} for ref, oid in found.items()]

    kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
    return Answer(200, {"converts": [], **{kind: refs(prefix) for kind, prefix in kinds.items()}})


def preupload(request: Handler, body: bytes, repo_id: str, revision: str) -> Answer:
    repository = request.repository(repo_id)
    if repository is None:
        return NO_REPO
    commit = repository.find(revision)
    if commit is None:
        return NO_REVISION
    files = []
    for wanted in json.loads(body)["files"]:
        name, now = wanted["path"], commit.files.get(wanted["path"])
        oid = None if now is None else now.sha256 if now.is_large else now.oid
        mode = "lfs" if name.endswith(LARGE_SUFFIX) else "regular"
        files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Answer(200, {"files": files})


def lfs_batch(request: Handler, body: bytes, repo_id: str) -> Answer:
    if request.user is None:
        return INVALID_TOKEN
    objects = []
    for wanted in json.loads(body)["objects"]:
        answer = dict(wanted)
        if not request.hub.path(wanted["oid"]).exists():
            links = {"upload": f"/upload/{wanted['oid']}", "verify": f"/verify/{wanted['oid']}"}
            answer["actions"] = {name: {"href": request.hub.endpoint + link} for name, link in links.items()}
        objects.append(answer)
    return Answer(200, {"transfer": "basic", "objects": objects})


def upload(request: Handler, body: bytes, oid: str) -> Answer:
    if hashlib.sha256(body).hexdigest() != oid:
        return Answer(400, {"error": "these are not the bytes that were announced"})
    request.hub.store(body)
    request.hub.received.append(oid)
    return Answer(200)


def verify(request: Handler, body: bytes, oid: str) -> Answer:
    path = request.hub.path(oid)
    return Answer(200 if path.exists() and path.stat().st_size == json.loads(body)["size"] else 400)


def make_commit(request: Handler, body: bytes, repo_id: str, revision: str) -> Answer:
    hub, repository = request.hub, request.repository(repo_id)
    if repository is None:
        return NO_REPO
    is_pull_request = "create_pr" in parse_qs(request.url.query)
    if request.user is None or (request.user != repository.owner and not is_pull_request):
        return FORBIDDEN
    base = repository.find(revision)
    if base is None:
        return NO_REVISION
    header, *operations = [json.loads(line) for line in body.splitlines()]
    if header["value"].get("parentCommit", base.oid) != base.oid:
        return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
    files = dict(base.files)
    for kind, value in [(operation["key"], operation["value"]) for operation in operations]:
        name = value["path"]
        if kind == "file":
            files[name] = hub.small(base64.b64decode(value["content"]))
        elif kind == "lfsFile" and hub.path(value["oid"]).exists():
            files[name] = hub.large(value["oid"], value["size"])
        elif kind == "deletedFile":
            del files[name]
        else:
            return Answer(400, {"error": f"cannot commit {kind} {name}"})
        hub.received.append(name)
    ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
    number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
    if is_pull_request:
        ref = f"refs/pr/{number}"
        repository.refs[ref] = base.oid
    commit = hub.commit(repository, ref, header["value"]["summary"], files)
    url = f"{hub.endpoint}/{repo_id}"
    answer = {"commitUrl": f"{url}/commit/{commit.oid}", "commitOid": commit.oid, "success": True}
    return Answer(200, {**answer, **({"pullRequestUrl": f"{url}/discussions/{number}"} if is_pull_request else {})})


def make_ref(request: Handler, body: bytes, repo_id: str, kind: str, name: str) -> Answer:
    repository, wanted = request.repository(repo_id), json.loads(body)
    if repository is None:
        return NO_REPO
    if request.user != repository.owner:
        return FORBIDDEN
    ref = f"refs/heads/{name}" if kind == "branch" else f"refs/tags/{wanted['tag']}"
    commit = repository.find(wanted.get("startingPoint", "main") if kind == "branch" else name)
    if commit is None:
        return NO_REVISION
    if ref in repository.refs:
        return Answer(409, {"error": f"{ref} already exists"})
    repository.refs[ref] = commit.oid
    return Answer(200)


def validate_yaml(request: Handler, body: bytes) -> Answer:
    try:
        metadata = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
    except (IndexError, yaml.YAMLError) as error:
        return Answer(400, {"errors": [{"message": str(error)}], "warnings": []})
    unknown = [] if metadata.get("license") in LICENSES else [{"message": f'"license" must be one of {LICENSES}'}]
    return Answer(400 if unknown else 200, {"errors": unknown, "warnings": []})


def resolve(request: Handler, body: bytes, repo_id: str, revision: str, name: str) -> Answer:
    repository = request.repository(repo_id)
    if repository is None:
        return NO_REPO
    commit = repository.find(revision)
    if commit is None:
        return NO_REVISION
    headers = {"X-Repo-Commit": commit.oid}
    if name not in commit.files:
        return NO_ENTRY._replace(headers={**NO_ENTRY.headers, **headers})
    file = commit.files[name]
    tag = f'"{file.sha256 if file.is_large else file.oid}"'
    headers |= {"ETag": tag, "X-Linked-Etag": tag, "X-Linked-Size": str(file.size)}
    return Answer(200, headers=headers, path=request.hub.path(file.sha256))


REPO, REST = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repo),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("GET", rf"/api/models/{REPO}", model_info),
    ("GET", rf"/api/models/{REPO}/revision/{REST}", model_info),
    ("GET", rf"/api/models/{REPO}/tree/{REST}", list_tree),
    ("GET", rf"/api/models/{REPO}/refs", list_refs),
    ("POST", rf"/api/models/{REPO}/preupload/{REST}", preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REST}", make_commit),
    ("POST", rf"/api/models/{REPO}/(branch|tag)/{REST}", make_ref),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/upload/(\w+)", upload),
    ("POST", r"/verify/(\w+)", verify),
    ("GET HEAD", rf"/{REPO}/resolve/{REST}/(.+)", resolve),
]


@contextmanager
def run_hub(root: Path) -> Iterator[Hub]:
    """Serves on a free port of 127.0.0.1 for as long as the context lasts."""
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
