"""A local W&B server: answers the queries of `wandb.Api` for runs and files, and receives runs.

The fields and their types are those of the fragments in `wandb.apis.public` (`RunFragment`, `RunFilesFragment`) and of
the queries of wandb-core: config, summaries and history are JSON texts, a config value is wrapped as {"value": ...},
ids are base64. Requests for artifacts are recorded, but no artifacts are stored.
"""

import base64
import copy
import gzip
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

EMPTY = {"history": [], "events": [], "summary": "{}", "config": "{}", "files": {}, "complete": False}
TEAM = {"id": "RW50aXR5OjE=", "name": "team"}


class WandbServer(ThreadingHTTPServer):
    """Serves `runs`, a list of dicts: id, name, group, config, summary, created, folder (whose files it has).

    Attributes:
        live: {id: what a run has sent: history, events, summary, config, files, and whether it is complete}.
        asked: (operation, variables), in order.
    """

    daemon_threads = True

    def __init__(self, runs):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs = runs
        self.live = {}
        self.asked = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def go_away(self):
        """Stop answering."""
        self.shutdown()
        self.server_close()

    def has_begun(self, name, rows):
        """Start with a run that has already sent these rows of its history."""
        rows = [row | {"_step": number, "_runtime": number} for number, row in enumerate(rows)]
        summary = {key: value for row in rows for key, value in row.items()}
        self.live[name] = copy.deepcopy(EMPTY) | {"history": [*map(json.dumps, rows)], "summary": json.dumps(summary)}
        return self.live[name]


@contextmanager
def serving(runs):
    server = WandbServer(runs)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.go_away()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/file_stream"):
            return self._stream(self.path.split("/")[-2], json.loads(body))
        if self.path != "/graphql":
            return self._answer(404, b"")
        request = json.loads(body)
        operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
        variables = request.get("variables") or {}
        self.server.asked.append((operation, variables))
        answer = getattr(self, f"_{operation}", None)
        if answer is None:
            return self._json({"errors": [{"message": f"unknown operation {operation}"}]})
        return self._json({"data": answer(variables)})

    def do_PUT(self):
        _, _, run, name = self.path.split("/", 3)
        self.server.live[run]["files"][name] = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(200, b"")

    def _stream(self, name, sent):
        run = self.server.live[name]
        for file, lines in (("wandb-history.jsonl", run["history"]), ("wandb-events.jsonl", run["events"])):
            if file in sent.get("files", {}):
                part = sent["files"][file]
                lines[part["offset"] :] = part["content"]
        if "wandb-summary.json" in sent.get("files", {}):
            run["summary"] = sent["files"]["wandb-summary.json"]["content"][-1]
        run["complete"] = sent.get("complete", False)
        self._json({"exitcode": None, "limits": {}})

    def _RunResumeStatus(self, variables):
        run = self.server.live.get(variables["name"])
        if run is None:
            return {"model": None}
        bucket = {
            "id": _id("Run", variables["name"]),
            "name": variables["name"],
            "displayName": "",
            "summaryMetrics": run["summary"],
            "logLineCount": 0,
            "historyLineCount": len(run["history"]),
            "eventsLineCount": len(run["events"]),
            "historyTail": json.dumps(run["history"][-1:]),
            "eventsTail": json.dumps(run["events"][-1:]),
            "config": run["config"],
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": {"5": "0.31.0"}}),
        }
        return {"model": {"id": _id("Project", 7), "name": "nli-sft", "entity": TEAM, "bucket": bucket}}

    def _UpsertBucket(self, variables):
        name = variables["name"]
        inserted = name not in self.server.live
        run = self.server.live.setdefault(name, copy.deepcopy(EMPTY))
        run["config"] = variables["config"] or run["config"]
        bucket = {
            "id": _id("Run", name),
            "name": name,
            "displayName": name,
            "description": "",
            "config": run["config"],
            "sweepName": None,
            "project": {
                "id": _id("Project", 7),
                "name": "nli-sft",
                "entity": {"id": _id("Entity", 1), "name": "team"},
            },
            "historyLineCount": len(run["history"]),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _CreateRunFiles(self, variables):
        run = variables["run"]
        files = [{"name": name, "uploadUrl": f"{self.server.url}/files/{run}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": _id("Run", run), "uploadHeaders": [], "files": files}}

    def _CreateArtifact(self, variables):
        artifact = _id("Artifact", variables["input"]["digest"])  # as if its files had been uploaded
        sequence = {"latestArtifact": {"id": artifact}}
        return {"createArtifact": {"artifact": {"id": artifact, "state": "COMMITTED", "artifactSequence": sequence}}}

    def _UseArtifact(self, variables):
        return {"useArtifact": {"artifact": {"id": variables["input"]["artifactID"]}}}

    def _ServerFeaturesQuery(self, variables):
        return {"serverInfo": {"features": []}}

    def do_GET(self):
        _, _, run, name = self.path.split("/", 3)
        folder = next(one["folder"] for one in self.server.runs if one["id"] == run)
        self._answer(200, (Path(folder) / name).read_bytes())

    def _Viewer(self, variables):
        return {"viewer": {"id": _id("User", 1), "entity": "team", "username": "me", "email": "", "flags": "{}"}}

    def _GetDefaultEntity(self, variables):
        return {"viewer": {"id": _id("User", 1), "entity": "team"}}

    def _Runs(self, variables):
        if variables["project"] != "snli":
            return {"project": None}
        wanted = json.loads(variables["filters"])
        runs = [run for run in self.server.runs if all(_value(run, key) == value for key, value in wanted.items())]
        nodes = [_node(run) for run in sorted(runs, key=lambda run: run["created"])]
        page = _connection(nodes, variables["cursor"], min(2, variables["perPage"]))  # so that there is a next page
        return {"project": {"internalId": "7", "runCount": len(nodes), "readOnly": False, "runs": page}}

    def _RunFiles(self, variables):
        run = next(run for run in self.server.runs if run["id"] == variables["name"])
        paths = sorted(path for path in Path(run["folder"]).rglob("*") if path.is_file())
        nodes = [_file(self.server, run, path) for path in paths]
        page = _connection(nodes, variables["fileCursor"], variables["fileLimit"])
        return {"project": {"internalId": "7", "run": {"fileCount": len(nodes), "files": page}}}

    def _json(self, content):
        self._answer(200, json.dumps(content).encode(), "application/json")

    def _answer(self, status, body, kind="application/octet-stream"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def _id(kind, number):
    return base64.b64encode(f"{kind}:{number}".encode()).decode()


def _connection(nodes, cursor, limit):
    start = int(cursor or 0)
    edges = [{"node": node, "cursor": str(number)} for number, node in enumerate(nodes, start=1)][start:][:limit]
    end = start + len(edges)
    return {"edges": edges, "pageInfo": {"endCursor": str(end), "hasNextPage": end < len(nodes)}}


def _file(server, run, path):
    name = str(path.relative_to(run["folder"]))
    url = f"{server.url}/files/{run['id']}/{name}"
    return {
        "id": _id("File", name),
        "name": name,
        "url": url,
        "directUrl": url,
        "sizeBytes": path.stat().st_size,
        "mimetype": "",
        "updatedAt": run["created"],
        "md5": "",
    }


def _value(run, key):
    """W&B's filters are MongoDB's. Only equality of a field or config key is supported here."""
    return run["config"].get(key.removeprefix("config.")) if key.startswith("config.") else run.get(key)


def _node(run):
    return {
        "projectId": "7",
        "id": _id("Run", f"v1:{run['id']}:snli:team"),
        "tags": ["smoke"],
        "name": run["id"],
        "displayName": run["name"],
        "sweepName": None,
        "state": "finished",
        "config": json.dumps({key: {"value": value, "desc": None} for key, value in run["config"].items()}),
        "group": run.get("group"),
        "jobType": "train",
        "commit": None,
        "readOnly": False,
        "createdAt": run["created"],
        "heartbeatAt": run["created"],
        "description": "",
        "notes": None,
        "systemMetrics": "{}",
        "summaryMetrics": json.dumps(run.get("summary", {})),
        "historyLineCount": 0,
        "user": {"name": "Me", "username": "me"},
        "historyKeys": None,
    }
