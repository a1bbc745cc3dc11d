# SPDX-License-Identifier: Apache-2.0

"""A small Hub on loopback for the real client: repositories in memory, tokens, permissions, failures on demand."""

import base64
import hashlib
import json
import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin")
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Commit:
    """One commit: its title, the paths it names and all files after it."""

    title: str
    paths: list[str]
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{id(self)}{self.title}{self.paths}".encode()).hexdigest()


@dataclass
class Repo:
    """A repository: its commits, oldest first; the first is empty."""

    private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit("initial commit", [], {})])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files

    def at(self, revision: str) -> Commit:
        if revision in ("main", "HEAD"):
            return self.commits[-1]
        for commit in self.commits:
            if commit.sha == revision:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")


class Hub:
    """
    The server's state, and the switches that tests turn.

    `tokens` maps a token to `(user, role)`; a user writes to the repositories of the own name with role "write".
    """

    def __init__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.lock = threading.Lock()
        self.reset()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Forget everything."""
        self.tokens: dict[str, tuple[str, str]] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.stored: list[str] = []
        self._failures: list[tuple[str, int]] = []
        self._lost: list[str] = []
        self._busy: Callable[[], bool] = lambda: False

    def fail_next(self, count: int, path: str = "", status: int = 503) -> None:
        """Answer the next `count` requests whose path has `path` in it with `status`."""
        self._failures += [(path, status)] * count

    def lose_next(self, path: str) -> None:
        """Do what the next request whose path has `path` in it wants, and answer with 503."""
        self._lost.append(path)

    def be_busy(self, share: float, seed: int) -> None:
        """Answer a random share of all writes with 503."""
        generator = random.Random(seed)
        self._busy = lambda: generator.random() < share

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def answer_failure(self, method: str, path: str) -> None:
        with self.lock:
            if method in ("POST", "PUT") and self._busy():
                raise Refusal(503, "Busy")
            for failure in self._failures:
                if failure[0] in path:
                    self._failures.remove(failure)
                    raise Refusal(failure[1], "Failing on demand")

    # Who may do what.

    def user(self, token: str | None) -> tuple[str, str] | None:
        if token is not None and token not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def readable(self, kind: str, repo_id: str, token: str | None) -> Repo:
        repo, user = self.repos.get((kind, repo_id)), self.user(token)
        if repo is None or (repo.private and (user is None or user[0] != repo_id.split("/")[0])):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, kind: str, repo_id: str, token: str | None) -> Repo:
        repo = self.readable(kind, repo_id, token)
        self.check_write(repo_id.split("/")[0], token)
        return repo

    def check_write(self, namespace: str, token: str | None) -> None:
        user = self.user(token)
        if user is None:
            raise Refusal(401, "Unauthorized")
        if user[1] != "write" or user[0] != namespace:
            raise Refusal(403, f"You don't have the rights to write to {namespace}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        """Silence: tests look at what the client says."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub: Hub = self.server.hub
        self.is_lost = False
        self.hub.requests.append(f"{self.command} {url.path}")
        try:
            self.hub.answer_failure(self.command, url.path)
            for pattern, method, answer in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method:
                    self.is_lost = any(path in url.path for path in self.hub._lost)
                    answer(self, **{k: v and unquote(v) for k, v in match.groupdict().items()})
                    if self.is_lost:
                        self.is_lost, self.hub._lost = False, [p for p in self.hub._lost if p not in url.path]
                        raise Refusal(503, "Done, but the answer was lost")
                    return
            raise Refusal(404, f"No route {self.command} {url.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self.send_json({"error": str(refusal)}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    @property
    def token(self) -> str | None:
        header = self.headers.get("Authorization")
        return header.removeprefix("Bearer ") if header else None

    def send_json(self, value, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        if self.is_lost:
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def whoami(request: _Handler) -> None:
    user = request.hub.user(request.token)
    if user is None:
        raise Refusal(401, "Unauthorized")
    auth = {"accessToken": {"role": user[1], "displayName": "test"}}
    request.send_json({"type": "user", "id": user[0], "name": user[0], "orgs": [], "auth": auth})


def create_repo(request: _Handler) -> None:
    hub, wanted = request.hub, json.loads(request.body)
    user = hub.user(request.token)
    if user is None:
        raise Refusal(401, "Unauthorized")
    kind, namespace = wanted.get("type") or "model", wanted.get("organization") or user[0]
    hub.check_write(namespace, request.token)
    repo_id = f"{namespace}/{wanted['name']}"
    is_new = (kind, repo_id) not in hub.repos
    if is_new:
        hub.repos[kind, repo_id] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    address = f"{hub.url}/{PREFIXES[kind]}{repo_id}"
    request.send_json({"url": address, "name": repo_id, "id": repo_id}, 200 if is_new else 409)


def validate_yaml(request: _Handler) -> None:
    content = json.loads(request.body)["content"]
    block = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.S)
    try:
        valid = block is None or isinstance(yaml.safe_load(block[1]), dict)
    except yaml.YAMLError:
        valid = False
    errors = [] if valid else [{"message": "The metadata is no YAML mapping"}]
    request.send_json({"errors": errors, "warnings": []}, 200 if valid else 400)


def preupload(request: _Handler, kind: str, repo: str, revision: str) -> None:
    files = request.hub.writable(kind, repo, request.token).at(revision).files
    answers = []
    for wanted in json.loads(request.body)["files"]:
        path = wanted["path"]
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        oid = None if path not in files else (sha256 if mode == "lfs" else git_oid)(files[path])
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    request.send_json({"files": answers})


def commit(request: _Handler, kind: str, repo: str, revision: str) -> None:
    hub = request.hub
    repository = hub.writable(kind, repo, request.token)
    files, paths, title = dict(repository.at(revision).files), [], ""
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            title = value["summary"]
        elif item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            files[value["path"]] = hub.blobs[value["oid"]]
        elif item["key"] == "deletedFile":
            del files[value["path"]]
        paths += [value["path"]] if "path" in value else []
    repository.commits.append(Commit(title, paths, files))
    sha = repository.commits[-1].sha
    address = f"{hub.url}/{PREFIXES[kind]}{repo}/commit/{sha}"
    request.send_json({"commitUrl": address, "commitOid": sha, "success": True})


def lfs_batch(request: _Handler, prefix: str, repo: str) -> None:
    hub, batch = request.hub, json.loads(request.body)
    hub.writable(_kind(prefix), repo, request.token)
    objects = []
    for wanted in batch["objects"]:
        upload = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}
        objects.append({**wanted, **({} if wanted["oid"] in hub.blobs else {"actions": upload})})
    request.send_json({"transfer": "basic", "objects": objects})


def lfs_put(request: _Handler, oid: str) -> None:
    if sha256(request.body) != oid:
        raise Refusal(400, "The content is not that of its hash")
    request.hub.blobs[oid] = request.body
    request.hub.stored.append(oid)
    request.send_json({})


def info(request: _Handler, kind: str, repo: str, revision: str | None = None) -> None:
    repository = request.hub.readable(kind, repo, request.token)
    at = repository.at(revision or "main")
    siblings = [{"rfilename": path} for path in at.files]
    request.send_json({"id": repo, "sha": at.sha, "private": repository.private, "siblings": siblings, "tags": []})


def tree(request: _Handler, kind: str, repo: str, revision: str, path: str | None = None) -> None:
    files = request.hub.readable(kind, repo, request.token).at(revision).files
    start = f"{path}/" if path else ""
    below = [name for name in files if name.startswith(start)]
    if path and not below:
        raise Refusal(404, f"{path} does not exist", "EntryNotFound")
    entries = [_entry(name, files[name]) for name in below]
    folders = {start + "/".join(name.removeprefix(start).split("/")[:-1][:d]) for name in below for d in range(1, 9)}
    entries += [{"type": "directory", "path": name, "oid": git_oid(name.encode()), "size": 0}
                for name in sorted(folders - {start, start.rstrip("/")})]  # fmt: skip
    is_deep = request.query.get("recursive", "").lower() in ("true", "1")
    request.send_json([e for e in entries if is_deep or "/" not in e["path"].removeprefix(start)])


def paths_info(request: _Handler, kind: str, repo: str, revision: str) -> None:
    files = request.hub.readable(kind, repo, request.token).at(revision).files
    paths = [path.rstrip("/") for path in parse_qs(request.body.decode())["paths"]]
    found = [_entry(path, files[path]) for path in paths if path in files]
    folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
    request.send_json(found + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders])


def resolve(request: _Handler, prefix: str | None, repo: str, revision: str, path: str) -> None:
    at = request.hub.readable(_kind(prefix), repo, request.token).at(revision)
    headers = {"X-Repo-Commit": at.sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if path not in at.files:
        error = {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return request.send_json({"error": "Entry not found"}, 404, error)
    content = at.files[path]
    headers["ETag"] = f'"{_entry(path, content)["oid"]}"'
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not wanted:
        return request.send(content, 200, headers)
    first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    request.send(content[first : last + 1], 206, headers)


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if path.endswith(LFS_SUFFIXES):
        entry |= {"oid": sha256(content)[:40], "lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 1}}
    return entry


def _kind(prefix: str | None) -> str:
    return (prefix or "models/").removesuffix("s/")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_API = r"/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)"
_SITE = r"/(?P<prefix>datasets/|spaces/)?(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (r"/api/whoami-v2", "GET", whoami),
    (r"/api/repos/create", "POST", create_repo),
    (r"/api/validate-yaml", "POST", validate_yaml),
    (_API + r"/preupload/(?P<revision>[^/]+)", "POST", preupload),
    (_API + r"/commit/(?P<revision>[^/]+)", "POST", commit),
    (_API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "GET", tree),
    (_API + r"/paths-info/(?P<revision>[^/]+)", "POST", paths_info),
    (_API + r"(?:/revision/(?P<revision>[^/]+))?", "GET", info),
    (_SITE + r"\.git/info/lfs/objects/batch", "POST", lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]+)", "PUT", lfs_put),
    (_SITE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "GET HEAD", resolve),
]
