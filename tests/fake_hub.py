"""A hub on loopback: makes repositories, takes files in the ways that huggingface_hub sends them, keeps every request.
It believes nothing: what is committed must have been uploaded, with the size and the sha256 that were announced."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

TOKEN = "hf_atokenthatnobodymaysee"
LARGE = (".safetensors", ".onnx")
"""What the hub's .gitattributes of a new model repository send to large-file storage."""


@dataclass
class Hub:
    """What is in it, and what it was asked."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    validated: list[str] = field(default_factory=list)
    commits: int = 0
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Beginning of a request's line -> status and message it is answered with."""
    url: str = ""

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.repositories[name])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.stored[value["oid"]]  # KeyError: never uploaded
                assert (len(content), value["algo"]) == (value["size"], "sha256")
                files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert line["key"] == "header"
        self.repositories[name] = files
        self.commits += 1


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        hub = self.hub
        request = f"{self.command} {self.path}"
        hub.requests.append(request)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for start, (status, message) in hub.refuse.items():
            if request.startswith(start):
                return self._answer({"error": message, "errors": [{"message": message}]}, status)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not self.path.startswith("/storage/"):
            return self._answer({"error": "Invalid username or password."}, 401)
        for pattern, answer in self._routes.items():
            if (match := re.fullmatch(pattern, request.partition("?")[0])) is not None:
                return answer(self, content, *match.groups())
        return self._answer({"error": f"no such address: {request}"}, 404)

    do_GET = do_POST = do_PUT = _handle

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _create(self, content: bytes) -> None:
        asked = json.loads(content)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if name in self.hub.repositories:
            return self._answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.hub.private[name] = asked.get("visibility") == "private"
        return self._answer({"url": f"{self.hub.url}/{name}"})

    def _validate(self, content: bytes) -> None:
        self.hub.validated.append(json.loads(content)["content"])
        self._answer({"warnings": [], "errors": []})

    def _tree(self, _: bytes, name: str) -> None:
        files = self.hub.repositories[name]
        self._answer(
            [{"type": "file", "path": path, "size": len(data), "oid": _git(data)} for path, data in files.items()]
        )

    def _revision(self, _: bytes, name: str) -> None:
        self._answer({"id": name, "sha": f"{self.hub.commits:040x}", "siblings": [], "tags": []})

    def _preupload(self, content: bytes, name: str) -> None:
        there = self.hub.repositories[name]
        answers = []
        for file in json.loads(content)["files"]:
            large = file["path"].endswith(LARGE)
            known = there.get(file["path"])
            digest = None if known is None else hashlib.sha256(known).hexdigest() if large else _git(known)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": digest})
        self._answer({"files": answers})

    def _batch(self, content: bytes, name: str) -> None:
        objects = []
        for one in json.loads(content)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/storage/{one['oid']}"}}
            objects.append({**one, **({} if one["oid"] in self.hub.stored else {"actions": actions})})
        self._answer({"transfer": "basic", "objects": objects})

    def _store(self, content: bytes, oid: str) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer({"error": "other content than was announced"}, 400)
        self.hub.stored[oid] = content
        return self._answer({})

    def _commit(self, content: bytes, name: str) -> None:
        self.hub.commit(name, [json.loads(line) for line in content.splitlines()])
        self._answer(
            {
                "commitUrl": f"{self.hub.url}/{name}/commit/{self.hub.commits:040x}",
                "commitOid": f"{self.hub.commits:040x}",
            }
        )

    _routes: ClassVar = {
        r"POST /api/repos/create": _create,
        r"POST /api/validate-yaml": _validate,
        r"GET /api/models/([^/]+/[^/]+)/tree/main": _tree,
        r"GET /api/models/([^/]+/[^/]+)/revision/main": _revision,
        r"POST /api/models/([^/]+/[^/]+)/preupload/main": _preupload,
        r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": _batch,
        r"PUT /storage/([0-9a-f]{64})": _store,
        r"POST /api/models/([^/]+/[^/]+)/commit/main": _commit,
    }


def _git(content: bytes) -> str:
    """git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at hub.url while the block lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
