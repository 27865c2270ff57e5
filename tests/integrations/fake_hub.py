"""A model hub on the loopback interface: the few endpoints that pushing a model and loading it by its id ask for."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """Keeps repositories in memory; large files go the way of LFS, as on the real one.

    Attributes:
        repositories: {id: {path: content}}, as of the last commit.
        unknown: "METHOD path" of the requests that nothing here answers.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.large, self.unknown = {}, {}, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub():
    """Run a hub while the block runs."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def _is_large(path):
    return path.endswith(".safetensors")


def _commit(files):
    return hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return answer(self, body, *found.groups())
        self.server.unknown.append(f"{self.command} {path}")
        return self._answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _create(self, body):
        asked = json.loads(body)
        repository = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        known = repository in self.server.repositories
        self.server.repositories.setdefault(repository, {})
        self._answer(409 if known else 200, {"url": f"{self.server.url}/{repository}", "id": repository})

    def _validate(self, body):
        self._answer(200, {"errors": [], "warnings": []})

    def _preupload(self, body, repository):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, body, repository):
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.url}/upload/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _upload(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self._answer(200)

    def _take_commit(self, body, repository):
        files = self.server.repositories[repository]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        url = f"{self.server.url}/{repository}/commit/{_commit(files)}"
        self._answer(200, {"success": True, "commitOid": _commit(files), "commitUrl": url, "hookOutput": ""})

    def _info(self, body, repository, revision=None):
        files = self.server.repositories.get(repository)
        if files is None:
            return self._answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": name} for name in files]
        return self._answer(200, {"id": repository, "sha": _commit(files), "siblings": siblings, "tags": []})

    def _tree(self, body, repository, revision):
        files = self.server.repositories[repository]
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in files.items()
        ]
        self._answer(200, entries)

    def _resolve(self, body, repository, revision, name):
        files = self.server.repositories.get(repository, {})
        if name not in files:
            return self._answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
        etag = hashlib.sha1(files[name]).hexdigest()
        return self._answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=_commit(files))


_ID = r"([^/]+/[^/]+)"
_ROUTES = [
    (("POST",), r"/api/repos/create", _Handler._create),
    (("POST",), r"/api/validate-yaml", _Handler._validate),
    (("POST",), rf"/api/models/{_ID}/preupload/main", _Handler._preupload),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", _Handler._batch),
    (("PUT",), r"/upload/(\w+)", _Handler._upload),
    (("POST",), rf"/api/models/{_ID}/commit/main", _Handler._take_commit),
    (("GET",), rf"/api/models/{_ID}", _Handler._info),
    (("GET",), rf"/api/models/{_ID}/revision/([^/]+)", _Handler._info),
    (("GET",), rf"/api/models/{_ID}/tree/([^/]+)", _Handler._tree),
    (("GET", "HEAD"), rf"/{_ID}/resolve/([^/]+)/(.+)", _Handler._resolve),
]
