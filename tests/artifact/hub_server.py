"""A small server on this machine that answers as the Hugging Face hub does: repositories, commits, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_" + "x" * 34


class HubServer:
    """``files`` of each repository by its name, ``private`` ones, and what was asked for.

    Files that end in .data go by LFS, the rest with the commit.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: dict[str, str] = {}
        self.messages: list[str] = []
        self.served: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.refusal: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, b"")

            def do_GET(self) -> None:
                hub.answer(self, b"")

            def do_POST(self) -> None:
                hub.answer(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            def do_PUT(self) -> None:
                self.do_POST()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: Any, body: bytes) -> None:
        """Answer one request."""
        path = unquote(handler.path.partition("?")[0])
        signed = handler.headers.get("Authorization") == f"Bearer {TOKEN}"
        code, data, headers = self._answer(path, body, signed)
        if handler.command == "GET" and "/resolve/" in path and code == 200:
            self.served.append(path.split("/", 5)[5])
        handler.send_response(code)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data)

    def _answer(self, path: str, body: bytes, signed: bool) -> tuple[int, bytes, dict[str, str]]:
        if self.refusal is not None:
            return self.refusal, b'{"error": "no"}', {}
        if path == "/verified":
            return _json({})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path.startswith("/objects/"):
            if body:
                self.objects[path.removeprefix("/objects/")] = body
            return _json({})
        if path == "/api/repos/create":
            if not signed:
                return 401, b'{"error": "Invalid credentials"}', {}
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            if name not in self.files:
                # The library says it in one way or the other, by its version.
                self.files[name] = {}
                self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return _json({"url": f"{self.address}/{name}", "id": name})
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            return self._model(name, "/".join(path.split("/")[5:]), body, signed)
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            for one in wanted:
                href = f"{self.address}/objects/{one['oid']}"
                one["actions"] = {"upload": {"href": href}, "verify": {"href": f"{self.address}/verified"}}
            return _json({"transfer": "basic", "objects": wanted})
        if "/resolve/" in path:
            _, user, model, _, _, file = path.split("/", 5)
            name = f"{user}/{model}"
            if not self._readable(name, signed) or file not in self.files[name]:
                return 404, b"", {"X-Error-Code": "EntryNotFound"}
            found = self.files[name][file]
            tag = f'"{hashlib.sha256(found).hexdigest()}"'
            return 200, found, {"ETag": tag, "X-Repo-Commit": self.commits[name], "Accept-Ranges": "bytes"}
        return 404, b"{}", {"X-Error-Code": "RepoNotFound"}

    def _readable(self, name: str, signed: bool) -> bool:
        return name in self.files and (signed or not self.private[name])

    def _model(self, name: str, rest: str, body: bytes, signed: bool) -> tuple[int, bytes, dict[str, str]]:
        if not self._readable(name, signed):
            return 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}
        files = self.files[name]
        if rest.startswith("preupload/"):
            asked = json.loads(body)["files"]
            modes = {one["path"]: "lfs" if one["path"].endswith(".data") else "regular" for one in asked}
            told = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
            return _json({"files": told})
        if rest.startswith("commit/"):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    self.messages.append(value["summary"])
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
            return _json(
                {"commitUrl": f"{self.address}/{name}/commit/{self.changed(name)}", "commitOid": "0" * 40}
            )
        if rest.startswith("tree/"):
            entries = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                for n, d in files.items()
            ]
            return _json(entries)
        siblings = [{"rfilename": n} for n in files]
        facts = {"id": name, "modelId": name, "sha": self.commits.get(name), "siblings": siblings}
        return _json(facts | {"private": self.private[name]})

    def changed(self, name: str) -> str:
        """Give the repository ``name`` a new commit, and return it."""
        stamp = json.dumps([name, {n: hashlib.sha1(d).hexdigest() for n, d in self.files[name].items()}])
        self.commits[name] = hashlib.sha1(stamp.encode()).hexdigest()
        return self.commits[name]


def _json(found: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(found).encode(), {"Content-Type": "application/json"}
