"""A stand-in of the Hugging Face Hub on the loopback address: the endpoints that upload and download models.

- Repositories live in memory; every request is logged, so that a test can count what was sent.
- `failing` makes uploads of large files fail, repositories can be gated or private, as on the real Hub.
- huggingface_hub reads its endpoint when it is imported, so its clients run in processes of their own: `python`.

    with LocalHub(tmp_path) as hub:
        hub.add("owner/model", folder)
        print(hub.python("import medisyn; medisyn.load_pipeline('owner/model')").stdout)
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
TOKEN, USER = "hf_standin", "tester"
LARGE = (".safetensors", ".png", ".bin")  # kept outside of git, as by the Hub's default .gitattributes


@dataclass
class Repository:
    """Its commits: identifier -> path -> content, the newest last."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def find(self, revision: str | None) -> str | None:
        """The commit that a revision names; None: there is no such."""
        return self.head if revision in (None, "main") else revision if revision in self.commits else None

    def commit(self, files: dict[str, bytes]) -> None:
        number = f"{len(self.commits)}{sorted(files)}".encode()
        self.commits[hashlib.sha1(number).hexdigest()] = files


class LocalHub:
    """The server, in a thread; leaves by itself at the end of the `with` block.

    Attributes:
        repositories: By name.
        stored: Large files by their SHA-256.
        requests: (method, path) of everything that was asked.
        failing: SHA-256 of large files whose upload is refused.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failing: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, folder: Path, **options: bool) -> None:
        """Put a folder there, without uploading."""
        repository = self.repositories[name] = Repository(**options)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        repository.commit({file.relative_to(folder).as_posix(): file.read_bytes() for file in files})

    def count(self, method: str, pattern: str) -> int:
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.requests)

    def environment(self, cache: str = "cache") -> dict[str, str]:
        """That of a client process, with a cache of its own."""
        names = ("HF_", "HUGGINGFACE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE")
        clean = {name: value for name, value in os.environ.items() if not name.upper().startswith(names)}
        clean = {name: value for name, value in clean.items() if "proxy" not in name.lower()}
        return clean | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.folder / cache),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

    def python(self, code: str, *, cache: str = "cache", **environment: str) -> subprocess.CompletedProcess:
        """Run Python code as a client of this hub, in a folder of its own."""
        folder = self.folder / "client"
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            env=self.environment(cache) | environment,
            cwd=folder,
            timeout=300,
        )


def git_hash(content: bytes) -> str:
    """A file's identifier in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        self.hub.requests.append((self.command, self.path))
        name = r"(?P<name>[^/]+/[^/]+)"
        for method, pattern, answer in (
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/validate-yaml", self._validate),
            ("POST", "/api/repos/create", self._create),
            ("GET", f"/api/models/{name}(/revision/(?P<revision>[^/]+))?", self._info),
            ("GET", f"/api/models/{name}/tree/(?P<revision>[^/]+)", self._tree),
            ("POST", f"/api/models/{name}/preupload/main", self._preupload),
            ("POST", f"/{name}.git/info/lfs/objects/batch", self._batch),
            ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", self._store),
            ("POST", f"/api/models/{name}/commit/main", self._commit),
            ("HEAD", f"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._file),
            ("GET", f"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self._file),
        ):
            match = re.fullmatch(pattern, self.path)
            if method == self.command and match:
                answer(**match.groupdict())
                return
        self._send(404, {"error": f"the stand-in has no {self.command} {self.path}"})

    # ---- accounts and repositories ----

    def _whoami(self) -> None:
        if self._authorized():
            self._send(200, {"name": USER, "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def _validate(self) -> None:
        text = json.loads(self.body)["content"]
        try:
            header = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
            errors = [] if isinstance(header, dict) else [{"message": "the metadata are no mapping"}]
        except (yaml.YAMLError, IndexError) as error:
            errors = [{"message": str(error)}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _create(self) -> None:
        if not self._authorized():
            return
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        known = name in self.hub.repositories
        if not known:
            self.hub.repositories[name] = Repository(private=private)
            self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send(409 if known else 200, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def _info(self, name: str, revision: str | None = None) -> None:
        if (repository := self._repository(name)) and (commit := self._commit_of(repository, revision)):
            facts = {"id": name, "modelId": name, "sha": commit, "tags": [], "downloads": 0, "likes": 0}
            facts |= {"private": repository.private, "gated": "auto" if repository.gated else False}
            self._send(200, facts | {"siblings": [{"rfilename": path} for path in repository.commits[commit]]})

    def _tree(self, name: str, revision: str) -> None:
        if (repository := self._repository(name)) and (commit := self._commit_of(repository, revision)):
            self._send(200, [_entry(path, content) for path, content in repository.commits[commit].items()])

    # ---- upload ----

    def _preupload(self, name: str) -> None:
        if self._authorized() and (repository := self._repository(name)):
            answers = []
            for file in json.loads(self.body)["files"]:
                there = repository.files.get(file["path"])
                mode = "lfs" if file["path"].endswith(LARGE) else "regular"
                oid = None if there is None else _entry(file["path"], there).get("lfs", {}).get("oid", git_hash(there))
                answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._send(200, {"files": answers})

    def _batch(self, name: str) -> None:
        if self._authorized() and self._repository(name):
            objects = json.loads(self.body)["objects"]
            for one in objects:
                if one["oid"] not in self.hub.stored:  # else there is nothing to do
                    one["actions"] = {"upload": {"href": f"{self.hub.endpoint}/storage/{one['oid']}"}}
            self._send(200, {"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        whole = hashlib.sha256(self.body).hexdigest() == oid
        if oid in self.hub.failing or not whole:
            self._send(403 if whole else 400, {"error": "the upload was interrupted"})
            return
        self.hub.stored[oid] = self.body
        self._send(200, {})

    def _commit(self, name: str) -> None:
        if not (self._authorized() and (repository := self._repository(name))):
            return
        files = dict(repository.files)
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        repository.commit(files)
        url = f"{self.hub.endpoint}/{name}/commit/{repository.head}"
        self._send(200, {"success": True, "commitOid": repository.head, "commitUrl": url})

    # ---- download ----

    def _file(self, name: str, revision: str, file: str) -> None:
        if not (repository := self._repository(name)):
            return
        if repository.gated:
            self._refuse(403, "GatedRepo", f"Access to model {name} is restricted.")
        elif (commit := self._commit_of(repository, revision)) is None:
            return
        elif file not in (files := repository.commits[commit]):
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        else:
            content = files[file]
            entry = _entry(file, content)
            headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if "lfs" in entry:
                headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
            self._send_bytes(200, content, headers)

    def _commit_of(self, repository: Repository, revision: str | None) -> str | None:
        if (commit := repository.find(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # ---- answers ----

    def _authorized(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._send(401, {"error": "Invalid username or password."})
        return False

    def _repository(self, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        hidden = repository is not None and repository.private
        if repository is None or (hidden and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self._refuse(401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        more = {"X-Error-Code": code, "X-Error-Message": message} | (headers or {})
        self._send(status, {"error": message}, more)

    def _send(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(answer).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send_bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content


def _entry(path: str, content: bytes) -> dict:
    """A file as the tree lists it."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
