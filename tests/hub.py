"""A small server that speaks what the Hub's client needs to pull and push models."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest


class Hub:
    """repositories: {"owner/name": {revision: {file name: content}}}. Uploads go to "main", unless `read_only`.

    private: names of those that are shown with a token only. asked: the paths of all requests.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.read_only, self.private, self.asked = False, set(), []
        hub = self

        class Handler(_Handler):
            repositories, private, asked = hub.repositories, hub.private, hub.asked
            read_only = property(lambda self: hub.read_only)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The client reads HF_ENDPOINT once, when it is imported: here its constants are set."""
    from huggingface_hub import constants

    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    yield hub
    hub.close()


def commit_of(revision: str, files: dict[str, bytes]) -> str:
    parts = [(name, hashlib.sha1(data).hexdigest()) for name, data in sorted(files.items())]
    return hashlib.sha1(repr((revision, parts)).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision; answers itself where there is none."""
        if repo in self.private and "Authorization" not in self.headers:  # as if it were not there
            return self.answer(401, b"{}", X_Error_Code="RepoNotFound")
        if repo not in self.repositories:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        for name, files in self.repositories[repo].items():
            if revision in (name, commit_of(name, files)):
                return commit_of(name, files), files
        return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[4:5] == ["tree"]:
            if found := self.find("/".join(parts[2:4]), parts[5]):
                files = [{"type": "file", "path": name, "size": len(data)} for name, data in found[1].items()]
                self.answer_json([file | {"oid": commit_of("", {file["path"]: b""})} for file in files])
        elif parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            if found := self.find(repo, revision):
                siblings = [{"rfilename": name} for name in found[1]]
                self.answer_json({"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings})
        elif parts[2:3] == ["resolve"]:
            if found := self.find("/".join(parts[:2]), parts[3]):
                name = "/".join(parts[4:])
                if name not in found[1]:
                    return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=found[0])
                etag = hashlib.sha1(found[1][name]).hexdigest()
                self.answer(200, found[1][name], ETag=f'"{etag}"', X_Repo_Commit=found[0])
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            if self.read_only:
                return self.answer(403, b'{"error": "You may not write here"}')
            order = json.loads(body)
            repo = f"{order.get('organization') or 'owner'}/{order['name']}"
            self.repositories.setdefault(repo, {"main": {}})
            self.answer_json({"url": f"http://{self.headers['Host']}/{repo}", "name": repo, "id": repo})
        elif parts == ["api", "validate-yaml"]:
            self.answer_json({"errors": [], "warnings": []})
        elif parts[4:5] == ["preupload"]:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer_json({"files": files})
        elif parts[4:5] == ["commit"]:
            repo = "/".join(parts[2:4])
            files = self.repositories[repo]["main"]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/{repo}/commit/main"
            self.answer_json({"success": True, "commitOid": commit_of("main", files), "commitUrl": address})
        else:
            self.answer(404)
