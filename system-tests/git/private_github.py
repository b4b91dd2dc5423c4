"""github.com in private: git's own server behind a password, and Git LFS, whose objects are elsewhere and take no password. It answers
over HTTP, and over TLS as a proxy that is asked for github.com.

usage: private_github.py FOLDER CERTIFICATE KEY      FOLDER/OWNER/NAME is a bare repository, and its file `token` the password
Prints its port. Ends with its standard input.
"""

import base64
import gzip
import http.server
import json
import os
import pathlib
import ssl
import subprocess
import sys
import threading

FOLDER, CERTIFICATE, KEY = sys.argv[1:]
CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
CONTEXT.load_cert_chain(CERTIFICATE, KEY)


class GitHub(http.server.BaseHTTPRequestHandler):
    timeout = 30

    def do_CONNECT(self):
        if self.path != "github.com:443":
            return self.send_error(403)
        self.send_response(200, "Connection established")
        self.end_headers()
        self.request = CONTEXT.wrap_socket(self.request, server_side=True)
        self.setup()
        self.close_connection = False

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path.startswith("/objects/"):
            return self.object(pathlib.Path(FOLDER, "objects", path.removeprefix("/objects/")))
        repository = pathlib.Path(FOLDER, *path.split("/")[1:3])
        if repository.suffix == ".git":
            repository = repository.with_suffix("")
        token = (repository / "token").read_text() if (repository / "token").is_file() else None
        allowed = "Basic " + base64.b64encode(f"x-access-token:{token}".encode()).decode()
        if token is None or self.headers.get("Authorization") != allowed:
            # As GitHub does: who may not see it is not told whether it is there.
            return self.answer("401 Unauthorized", [("WWW-Authenticate", 'Basic realm="GitHub"')], b"Repository not found.")
        body = self.body()
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        rest = "/".join(path.split("/")[3:])
        if rest == "info/lfs/objects/batch":
            return self.lfs(json.loads(body))
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(repository),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REMOTE_USER": "x-access-token",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": f"/{rest}",
            "QUERY_STRING": query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
        }
        said = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True, timeout=30).stdout
        head, _, body = said.partition(b"\r\n\r\n")
        fields = [line.split(": ", 1) for line in head.decode().split("\r\n")]
        status = next((value for name, value in fields if name == "Status"), "200 OK")
        self.answer(status, [field for field in fields if field[0] != "Status"], body)

    do_POST = do_PUT = do_GET

    def lfs(self, asked):
        def located(object):
            href = f"http://127.0.0.1:{server.server_port}/objects/{object['oid']}"
            action = {"href": href, "header": {"X-Object": object["oid"]}}
            return {**object, "authenticated": True, "actions": {asked["operation"]: action}}

        answer = {"transfer": "basic", "objects": [located(object) for object in asked["objects"]]}
        self.answer("200 OK", [("Content-Type", "application/vnd.git-lfs+json")], json.dumps(answer).encode())

    def object(self, file):
        if self.headers.get("X-Object") != file.name or "Authorization" in self.headers:
            return self.answer("403 Forbidden", [], b"")
        if self.command == "PUT":
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(self.body())
            return self.answer("200 OK", [], b"")
        self.answer("200 OK", [("Content-Type", "application/octet-stream")], file.read_bytes())

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline() or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status, fields, body):
        code, _, reason = status.partition(" ")
        self.send_response(int(code), reason)
        for name, value in [*fields, ("Content-Length", str(len(body))), ("Connection", "close")]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), GitHub)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port, flush=True)
sys.stdin.read()
