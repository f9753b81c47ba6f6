"""A Hub on loopback: as much of the Hugging Face Hub's HTTP API as the real client uses to push and load a model.

    with HubServer() as hub:
        ...  # a fresh process with hub.environment(cache) in its environment: huggingface_hub reads it at import
    hub.repos["me/thing"].files("main")["README.md"]

Every request is in `hub.requests`. `hub.failures` maps a part of "METHOD path" to what shall happen there instead: a
status, or None to break the connection off.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

ME, READER = "hf_writes", "hf_reads_only"


class Repo:
    """A repository: its branches and pull requests, each a list of commits, the newest last."""

    def __init__(self, private=False):
        self.private = private
        self.refs = {"main": [{"oid": hashlib.sha1(b"first").hexdigest(), "files": {}, "summary": "initial commit"}]}

    def head(self, revision):
        """The newest commit of a branch, or the one with that id."""
        if revision in self.refs:
            return self.refs[revision][-1]
        for commits in self.refs.values():
            for commit in commits:
                if commit["oid"] == revision:
                    return commit
        return None

    def files(self, revision="main"):
        return self.head(revision)["files"]

    def commit(self, revision, files, **about):
        parent = self.refs[revision][-1]
        oid = hashlib.sha1(repr((parent["oid"], about, sorted(files))).encode()).hexdigest()
        self.refs[revision].append({"oid": oid, "files": {**parent["files"], **files}, **about})
        return oid


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.large, self.requests, self.failures = {}, {}, [], {}
        self.tokens = {ME: "me", READER: "me"}
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.elsewhere = f"http://localhost:{self.server_port}"  # where large files are: another host, to the client

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def environment(self, cache, token=ME):
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost",
        }  # fmt: skip

    def add(self, repo_id, folder):
        """Put a folder's files into a public repository."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.repos[repo_id] = Repo()
        self.repos[repo_id].commit("main", files, summary="added")


class Refused(Exception):
    def __init__(self, status, message, code=None, body=None):
        self.status, self.message, self.code, self.body = status, message, code, body


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def _serve(self):
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {self.route}"
        self.server.requests.append(request)
        try:
            for part, status in self.server.failures.items():
                if part in request:
                    if status is None:
                        self.close_connection = True
                        return self.connection.close()
                    raise Refused(status, "Out of order")
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, self.route)
                if match and self.command in method.split():
                    return answer(self, *map(unquote, match.groups()))
            raise Refused(404, f"no such endpoint: {request}")
        except Refused as refused:
            body = refused.body if refused.body is not None else {"error": refused.message}
            headers = {"X-Error-Message": refused.message, **({"X-Error-Code": refused.code} if refused.code else {})}
            return self._answer(body, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _answer(self, body, status=200, headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _token(self):
        """The token that the request carries, checked; None if it carries none."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.server.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return token

    def _writer(self, repo_id=None):
        token = self._token()
        if token is None:
            raise Refused(401, "Invalid username or password.")
        user = self.server.tokens[token]
        if token == READER or (repo_id is not None and repo_id.split("/")[0] != user):
            raise Refused(403, "You don't have the required permissions")
        return user

    def _repo(self, repo_id):
        repo, token = self.server.repos.get(repo_id), self._token()
        owner = token is not None and self.server.tokens[token] == repo_id.split("/")[0]
        if repo is None or (repo.private and not owner):
            raise Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _head(self, repo_id, revision):
        commit = self._repo(repo_id).head(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _create(self):
        asked = json.loads(self.body)
        user = self._writer()
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        self._writer(repo_id)
        found = {"url": f"{self.server.url}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repos:
            message = "You already created this model repo"
            raise Refused(409, message, body={**found, "error": message})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repos[repo_id] = Repo(private=bool(private))
        self._answer(found)

    def _validate(self):
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.S)
        errors, data = [], yaml.safe_load(match[1]) if match else {}
        for name in ("library_name", "base_model", "base_model_relation", "pipeline_tag", "license"):
            if not isinstance(data.get(name, ""), str):
                errors.append({"message": f'"{name}" must be a string'})
        for index in data.get("model-index", []):
            for result in index["results"]:
                for metric in result["metrics"]:
                    if not isinstance(metric["value"], (int, float)) or not metric["type"]:
                        errors.append({"message": f'"model-index" has a wrong metric {metric}'})
                if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                    errors.append({"message": '"model-index" lacks a task or dataset'})
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, repo_id, revision):
        if "create_pr" not in self.query:
            self._writer(repo_id)
        self._head(repo_id, revision)
        asked = json.loads(self.body)["files"]
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in asked
        ]
        self._answer({"files": answers})

    def _batch(self, repo_id):
        self._repo(repo_id)
        if self._token() is None:
            raise Refused(401, "Invalid username or password.")
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            new = {"upload": {"href": f"{self.server.elsewhere}/upload/{repo_id}/{wanted['oid']}"}}
            new["verify"] = {"href": f"{self.server.url}/verify/{repo_id}"}
            objects.append({**wanted, **({} if wanted["oid"] in self.server.large else {"actions": new})})
        self._answer({"transfer": "basic", "objects": objects})

    def _put(self, repo_id, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The content is not what was announced")
        self.server.large[oid] = self.body
        self._answer(b"")

    def _verify(self, repo_id):
        asked = json.loads(self.body)
        if len(self.server.large.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(400, "The content has another size")
        self._answer({})

    def _commit(self, repo_id, revision):
        create_pr = "create_pr" in self.query
        if not create_pr:
            self._writer(repo_id)
        elif self._token() is None:
            raise Refused(401, "Invalid username or password.")
        repo, _ = self._repo(repo_id), self._head(repo_id, revision)
        files, about = {}, {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                about = {"summary": value["summary"], "description": value["description"]}
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.large:
                    raise Refused(400, f"{value['path']} was never uploaded")
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                raise Refused(400, f"unknown operation {item['key']}")
        found = {}
        if create_pr:
            number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
            target, revision = revision, f"refs/pr/{number}"
            repo.refs[revision] = list(repo.refs[target])
            found["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{number}"
        oid = repo.commit(revision, files, **about)
        self._answer({"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid, **found})

    def _branch(self, repo_id, name):
        self._writer(repo_id)
        repo = self._repo(repo_id)
        if name in repo.refs:
            raise Refused(409, f"Reference already exists: {name}")
        repo.refs[name] = list(repo.refs["main"])
        self._answer({})

    def _info(self, repo_id, revision="main"):
        repo, commit = self._repo(repo_id), self._head(repo_id, revision)
        siblings = [{"rfilename": path} for path in commit["files"]]
        self._answer({"id": repo_id, "sha": commit["oid"], "private": repo.private, "siblings": siblings, "tags": []})

    def _resolve(self, repo_id, revision, path):
        commit = self._head(repo_id, revision)
        headers = {"X-Repo-Commit": commit["oid"]}
        if path not in commit["files"]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = commit["files"][path]
        oid = hashlib.sha256(data).hexdigest()
        if path.endswith(".safetensors"):  # large files come from elsewhere
            self.server.large.setdefault(oid, data)
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
            return self._answer(b"", 302, {**headers, "Location": f"{self.server.elsewhere}/large/{oid}"})
        return self._answer(data, 200, {**headers, "ETag": f'"{oid}"'})

    def _large(self, oid):
        self._answer(self.server.large[oid], 200, {"ETag": f'"{oid}"'})

    def _who(self):
        self._answer({"type": "user", "name": self._writer(), "orgs": []})


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", r"/api/repos/create", Handler._create),
    ("POST", r"/api/validate-yaml", Handler._validate),
    ("GET", r"/api/whoami-v2", Handler._who),
    ("POST", rf"/api/models/{ID}/preupload/([^/]+)", Handler._preupload),
    ("POST", rf"/api/models/{ID}/commit/([^/]+)", Handler._commit),
    ("POST", rf"/api/models/{ID}/branch/([^/]+)", Handler._branch),
    ("GET", rf"/api/models/{ID}", Handler._info),
    ("GET", rf"/api/models/{ID}/revision/([^/]+)", Handler._info),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler._batch),
    ("PUT", rf"/upload/{ID}/(\w+)", Handler._put),
    ("GET HEAD", r"/large/(\w+)", Handler._large),
    ("POST", rf"/verify/{ID}", Handler._verify),
    ("GET HEAD", rf"/{ID}/resolve/([^/]+)/(.+)", Handler._resolve),
]
