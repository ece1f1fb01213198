"""A local Hub: an HTTP server with the endpoints that huggingface_hub calls, which can fail on request.

It keeps repositories with their commits in memory and records every request. Small files are stored as in Git, large
ones as in LFS; Xet is off (`ENVIRONMENT`).
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback_writes"
READ_TOKEN = "hf_loopback_reads"
USER = "me"
LARGE = 4096  # bytes from which a file goes through LFS; the Hub's 10 MB would make tests slow


@dataclass
class Repository:
    """Branches and commits of one repository; a commit is {path: content}."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        content = "".join(f"{path}{hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)}{content}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


@dataclass
class Fault:
    """How to fail matching requests: with a status, or by cutting the connection if it is `None`."""

    method: str
    path: str
    status: int | None
    times: int


class LoopbackHub:
    """The server. Use as a context manager; `environment` points a subprocess to it."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.elsewhere: dict[str, bytes] = {}  # files of other hosts, by their URL without https://
        self.requests: list[str] = []
        self.received_bytes = 0
        self._faults: list[Fault] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path, token: str | None = TOKEN) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": token or "",
        }

    def add(self, repo_id: str, files: dict[str, bytes], repo_type: str = "model", **fields) -> Repository:
        repository = self.repositories[repo_type, repo_id] = Repository(**fields)
        repository.commit(files)
        return repository

    def add_folder(self, repo_id: str, folder: Path, repo_type: str = "model") -> Repository:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return self.add(repo_id, {str(p.relative_to(folder)): p.read_bytes() for p in paths}, repo_type)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories["model", repo_id].at(revision)[1]

    @contextmanager
    def failing(self, method: str, path: str, status: int | None, times: int = 1000):
        """While open, requests whose path matches fail: with a status, or by a cut connection if it is `None`."""
        self._faults = [Fault(method, path, status, times)]
        try:
            yield
        finally:
            self._faults = []

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self._faults:
            if fault.method == method and re.search(fault.path, path) and fault.times > 0:
                fault.times -= 1
                return fault
        return None


def git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            """Print nothing."""

        def do(self):
            url = urlsplit(self.path)
            path, self.query = url.path, {key: values[0] for key, values in parse_qs(url.query).items()}
            hub.requests.append(f"{self.command} {unquote(path)}")
            fault = hub.fault(self.command, path)
            length = int(self.headers.get("Content-Length") or 0)
            if fault is not None and fault.status is None:
                self.rfile.read(min(length, 1024))
                self.connection.close()
                return
            self.body = self._read_body(length)
            hub.received_bytes += len(self.body)
            if fault is not None:
                self.reply({"error": f"ordered to fail with {fault.status}"}, fault.status)
                return
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if method == self.command and match:
                    answer(self, **{name: unquote(value) for name, value in match.groupdict(default="").items()})
                    return
            self.error(404, "EntryNotFound", f"no route for {self.command} {path}")

        do_GET = do_HEAD = do_POST = do_PUT = do

        def _read_body(self, length: int) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(length)
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def reply(self, content, status=200, headers=()):
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            if not (isinstance(content, bytes) and self.command == "HEAD"):
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def error(self, status, code, message):
            self.reply({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

        @property
        def token(self):
            return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

        def may_write(self) -> bool:
            if self.token not in (TOKEN, READ_TOKEN):
                self.reply({"error": "Invalid credentials in Authorization header"}, 401)
            elif self.token == READ_TOKEN:
                self.error(403, "Forbidden", "This token has the role read")
            return self.token == TOKEN

        def found(self, kind, repo, revision="main"):
            """(repository, commit, files), or `None` after replying with an error."""
            repository = hub.repositories.get((kind or "model", repo))
            if repository is None or (repository.private and self.token not in (TOKEN, READ_TOKEN)):
                # Like the Hub, do not reveal a private repository.
                self.error(404 if self.token else 401, "RepoNotFound", "Repository not found")
                return None
            at = repository.at(revision)
            if at is None:
                self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return None
            return repository, *at

        def whoami(self):
            if self.token not in (TOKEN, READ_TOKEN):
                self.reply({"error": "Invalid credentials in Authorization header"}, 401)
            else:
                self.reply({"type": "user", "name": USER, "orgs": [], "auth": {}})

        def create(self):
            if not self.may_write():
                return
            wanted = json.loads(self.body)
            repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
            kind = wanted.get("type") or "model"
            url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{repo}"
            if (kind, repo) in hub.repositories:
                self.reply({"error": "You already created this model repo", "url": url}, 409)
                return
            hub.add(repo, {".gitattributes": b""}, kind, private=wanted.get("visibility") == "private")
            self.reply({"url": url, "id": repo, "name": repo})

        def validate_yaml(self):
            self.reply({"errors": [], "warnings": []})

        def info(self, kind, repo, revision="main"):
            found = self.found(kind, repo, revision or "main")
            if found is None:
                return
            repository, oid, files = found
            card = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), re.DOTALL)
            self.reply(
                {
                    "id": repo,
                    "sha": oid,
                    "private": repository.private,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    "cardData": yaml.safe_load(card[1]) if card else None,
                    "siblings": [{"rfilename": path} for path in files],
                }
            )

        def tree(self, kind, repo, revision, folder=""):
            found = self.found(kind, repo, revision)
            if found is None:
                return
            prefix = f"{folder}/" if folder else ""
            entries, seen = [], set()
            for path, data in sorted(found[2].items()):
                if not path.startswith(prefix):
                    continue
                inner = path[len(prefix) :].split("/")
                for depth in range(1, len(inner)):
                    directory = prefix + "/".join(inner[:depth])
                    if directory not in seen and (depth == 1 or self.query.get("recursive", "").lower() == "true"):
                        seen.add(directory)
                        entries.append({"type": "directory", "path": directory, "oid": git_oid(b""), "size": 0})
                if len(inner) == 1 or self.query.get("recursive", "").lower() == "true":
                    entries.append(_file_entry(path, data))
            if folder and not entries:
                self.error(404, "EntryNotFound", f"{folder} does not exist on {revision}")
                return
            self.reply(entries)

        def paths_info(self, kind, repo, revision):
            found = self.found(kind, repo, revision)
            if found is None:
                return
            wanted = parse_qs(self.body.decode())["paths"]
            entries = [_file_entry(path, found[2][path]) for path in wanted if path in found[2]]
            for path in wanted:
                if path not in found[2] and any(other.startswith(f"{path}/") for other in found[2]):
                    entries.append({"type": "directory", "path": path, "oid": git_oid(b""), "size": 0})
            self.reply(entries)

        def refs(self, kind, repo):
            found = self.found(kind, repo)
            if found is not None:
                branches = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
                    for name, oid in found[0].branches.items()
                ]
                self.reply({"branches": branches, "converts": [], "tags": []})

        def branch(self, kind, repo, branch):
            if not self.may_write():
                return
            found = self.found(kind, repo)
            if found is None:
                return
            repository, oid, _ = found
            if branch in repository.branches:
                self.reply({"error": f"Reference already exists: {branch}"}, 409)
                return
            repository.branches[branch] = oid
            self.reply({})

        def preupload(self, kind, repo, revision):
            if not self.may_write():
                return
            found = self.found(kind, repo, revision)
            if found is None:
                return
            there = found[2]
            self.reply(
                {
                    "files": [
                        {
                            "path": entry["path"],
                            "uploadMode": "lfs" if entry["size"] >= LARGE else "regular",
                            "shouldIgnore": False,
                            "oid": _file_entry(entry["path"], there[entry["path"]])["oid"]
                            if entry["path"] in there
                            else None,
                        }
                        for entry in json.loads(self.body)["files"]
                    ]
                }
            )

        def batch(self, kind, repo):
            if not self.may_write():
                return
            objects = []
            for entry in json.loads(self.body)["objects"]:
                actions = {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}"}}
                objects.append(entry if entry["oid"] in hub.lfs else entry | {"actions": actions})
            self.reply({"transfer": "basic", "objects": objects})

        def upload(self, oid):
            if hashlib.sha256(self.body).hexdigest() != oid:
                self.reply({"error": "the content does not have this hash"}, 400)
                return
            hub.lfs[oid] = self.body
            self.reply({})

        def commit(self, kind, repo, revision):
            if not self.may_write():
                return
            found = self.found(kind, repo, revision)
            if found is None:
                return
            repository, _, files = found
            files = dict(files)
            for line in self.body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = hub.lfs[value["oid"]]
                elif operation["key"] == "deletedFile":
                    del files[value["path"]]
            if self.query.get("create_pr"):
                number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
                revision = f"refs/pr/{number}"
            oid = repository.commit(files, revision)
            self.reply(
                {
                    "commitUrl": f"{hub.url}/{repo}/commit/{oid}",
                    "commitOid": oid,
                    "pullRequestUrl": f"{hub.url}/{repo}/discussions/{revision.rpartition('/')[2]}",
                    "success": True,
                }
            )

        def other_host(self, path):
            if path in hub.elsewhere:
                data = hub.elsewhere[path]
                self.reply(data, headers={"Content-Length": str(len(data))} if self.command == "HEAD" else {})
            else:
                self.reply({"error": "not found"}, 404)

        def resolve(self, kind, repo, revision, path):
            found = self.found(kind, repo, revision)
            if found is None:
                return
            _, oid, files = found
            if path not in files:
                self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
                return
            data = files[path]
            entry = _file_entry(path, data)
            etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if self.command == "HEAD":
                self.reply(b"", 200, headers | {"Content-Length": str(len(data))})
            elif asked:
                start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                self.reply(data[start : end + 1], 206, headers)
            else:
                self.reply(data, 200, headers)

    def _file_entry(path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if len(data) >= LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            # huggingface_hub compares this hash to skip unchanged files.
            entry["oid"] = entry["lfs"]["oid"]
        return entry

    kind = r"(?P<kind>model|dataset|space)s"
    repo = r"(?P<repo>[^/]+/[^/]+)"
    api = rf"/api/{kind}/{repo}"
    revision = r"(?P<revision>[^/]+)"
    ROUTES = [
        ("GET", r"/elsewhere/(?P<path>.+)", Handler.other_host),
        ("HEAD", r"/elsewhere/(?P<path>.+)", Handler.other_host),
        ("GET", r"/api/whoami-v2", Handler.whoami),
        ("POST", r"/api/repos/create", Handler.create),
        ("POST", r"/api/validate-yaml", Handler.validate_yaml),
        ("GET", api, Handler.info),
        ("GET", rf"{api}/revision/{revision}", Handler.info),
        ("GET", rf"{api}/tree/{revision}(?:/(?P<folder>.+))?", Handler.tree),
        ("POST", rf"{api}/paths-info/{revision}", Handler.paths_info),
        ("GET", rf"{api}/refs", Handler.refs),
        ("POST", rf"{api}/branch/(?P<branch>[^/]+)", Handler.branch),
        ("POST", rf"{api}/preupload/{revision}", Handler.preupload),
        ("POST", rf"{api}/commit/{revision}", Handler.commit),
        ("POST", rf"/(?:{kind}/)?{repo}\.git/info/lfs/objects/batch", Handler.batch),
        ("PUT", r"/lfs/(?P<oid>\w+)", Handler.upload),
        ("GET", rf"/(?:{kind}/)?{repo}/resolve/{revision}/(?P<path>.+)", Handler.resolve),
        ("HEAD", rf"/(?:{kind}/)?{repo}/resolve/{revision}/(?P<path>.+)", Handler.resolve),
    ]
    return Handler
