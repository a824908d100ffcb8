"""
A local server with the part of the Hub's HTTP API that `huggingface_hub` uses to create repositories, upload with LFS,
commit and download.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_ENDINGS = (".safetensors", ".png")


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> files
    titles: list[str] = field(default_factory=list)  # titles of the uploaded commits, oldest first

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        summary = repr((len(self.commits), sorted((n, hashlib.sha1(c).hexdigest()) for n, c in files.items())))
        sha = hashlib.sha1(summary.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class Hub:
    """
    Context manager that serves at `address`.

    Attributes:
        tokens (`dict[str, str]`): Role of each token: "write", "read" or "fineGrained". All tokens belong to the user
            "me", who has write access in the organization "lab" and read access in "library".
        break_after (`int`, *optional*): Closes the connection after this number of bytes of an LFS upload.
    """

    def __init__(self):
        self.tokens = {"hf_write": "write", "hf_read": "read"}
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.uploads: Counter[str] = Counter()  # number of uploads of each LFS object, by its hash
        self.break_after: int | None = None
        self.pull_requests = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def __getattr__(self, name):
                if name.startswith("do_"):
                    return lambda: hub.respond(self)
                raise AttributeError(name)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    # ---- one request ----

    def respond(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        length = int(request.headers.get("Content-Length") or 0)
        if parts[0] == "lfs" and self.break_after is not None and length > self.break_after:
            request.rfile.read(self.break_after)
            request.connection.close()
            return
        if request.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(request.rfile.readline(), 16):
                body += request.rfile.read(size)
                request.rfile.readline()
            request.rfile.readline()
        else:
            body = request.rfile.read(length)
        role = self.tokens.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        try:
            status, headers, content = self.route(request.command, parts, query, body, role)
        except HubError as error:
            status, content = error.status, json.dumps({"error": error.message}).encode()
            headers = {"X-Error-Code": error.code} if error.code else {}
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json"} | headers
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def route(self, method: str, parts: list[str], query: dict, body: bytes, role: str | None):
        match method, parts:
            case "GET", ["api", "whoami-v2"]:
                if role is None:
                    raise HubError(401, "Invalid username or password.")
                orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "library", "roleInOrg": "read"}]
                access = {"accessToken": {"role": role, "displayName": "token"}}
                return 200, {}, {"type": "user", "name": "me", "orgs": orgs, "auth": access}
            case "POST", ["api", "repos", "create"]:
                self.check_write_access(role)
                request = json.loads(body)
                name = f"{request.get('organization') or 'me'}/{request['name']}"
                if name in self.repositories:
                    return 409, {}, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
                repository = self.repositories[name] = Repository(
                    request.get("visibility") == "private" or request.get("private", False)
                )
                repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
                return 200, {}, {"url": f"{self.address}/{name}", "name": name}
            case "POST", ["api", "validate-yaml"]:
                return 200, {}, {"errors": [], "warnings": []}
            case "PUT", ["lfs", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    raise HubError(400, "The content does not match its hash.")
                self.lfs[oid] = body
                self.uploads[oid] += 1
                return 200, {}, b""
            case _, ["api", "models", owner, name, *rest]:
                return self.models(method, f"{owner}/{name}", rest, query, body, role)
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                self.check_write_access(role)
                objects = []
                for entry in json.loads(body)["objects"]:
                    href = {"href": f"{self.address}/lfs/{entry['oid']}"}
                    objects.append(entry if entry["oid"] in self.lfs else entry | {"actions": {"upload": href}})
                return 200, {"Content-Type": "application/vnd.git-lfs+json"}, {"transfer": "basic", "objects": objects}
            case _, [owner, name, "resolve", revision, *path]:
                files, sha = self.files(f"{owner}/{name}", revision, role)
                content = files.get("/".join(path))
                headers = {"X-Repo-Commit": sha}
                if content is None:
                    raise HubError(404, "Entry not found", "EntryNotFound")
                return 200, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content
        raise HubError(404, f"Not implemented: {method} /{'/'.join(parts)}")

    def models(self, method: str, name: str, rest: list[str], query: dict, body: bytes, role: str | None):
        repository = self.repository(name, role)
        match method, rest:
            case "GET", [] | ["revision", _]:
                files, sha = self.files(name, rest[1] if rest else "main", role)
                siblings = [{"rfilename": path} for path in sorted(files)]
                return 200, {}, {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}
            case "GET", ["tree", revision]:
                files, _ = self.files(name, revision, role)
                return 200, {}, [self.entry(path, content) for path, content in sorted(files.items())]
            case "POST", ["paths-info", revision]:
                files, _ = self.files(name, revision, role)
                request = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
                return 200, {}, [self.entry(path, files[path]) for path in request if path in files]
            case "POST", ["branch", branch]:
                self.check_write_access(role)
                if branch in repository.branches:
                    raise HubError(409, "Reference already exists")
                repository.branches[branch] = repository.branches["main"]
                return 200, {}, {}
            case "POST", ["preupload", revision]:
                self.check_write_access(role)
                files, _ = self.files(name, revision, role)
                uploads = []
                for entry in json.loads(body)["files"]:
                    mode = "lfs" if entry["path"].endswith(LFS_ENDINGS) else "regular"
                    old = self.entry(entry["path"], files[entry["path"]])["oid"] if entry["path"] in files else None
                    uploads.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old})
                return 200, {}, {"files": uploads}
            case "POST", ["commit", revision]:
                self.check_write_access(role)
                files = dict(self.files(name, revision, role)[0])
                for line in body.splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "header":
                        repository.titles.append(value["summary"])
                    elif entry["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        if value["oid"] not in self.lfs:
                            raise HubError(400, f"{value['path']} was not uploaded.")
                        files[value["path"]] = self.lfs[value["oid"]]
                    elif entry["key"] == "deletedFile":
                        files.pop(value["path"], None)
                response = {"hookOutput": ""}
                if query.get("create_pr") == "1":
                    self.pull_requests += 1
                    response["pullRequestUrl"] = f"{self.address}/{name}/discussions/{self.pull_requests}"
                    revision = f"refs/pr/{self.pull_requests}"
                sha = repository.commit(revision, files)
                response |= {"commitOid": sha, "commitUrl": f"{self.address}/{name}/commit/{sha}", "success": True}
                return 200, {}, response
        raise HubError(404, f"Not implemented: {method} models {rest}")

    def repository(self, name: str, role: str | None) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and role is None):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def files(self, name: str, revision: str, role: str | None) -> tuple[dict[str, bytes], str]:
        repository = self.repository(name, role)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise HubError(404, "Invalid rev id", "RevisionNotFound")
        return repository.commits[sha], sha

    def entry(self, path: str, content: bytes) -> dict:
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
        if path.endswith(LFS_ENDINGS):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def check_write_access(self, role: str | None) -> None:
        if role is None:
            raise HubError(401, "Invalid username or password.")
        if role != "write":
            raise HubError(403, "Forbidden: the token is read-only.")


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
