"""An S3-speaking server on this machine (moto's, a whole one over HTTP), for as long as a test session.

It needs a Python of its own (`make s3-server`), since its libraries want another python-dateutil than the tested set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

BUCKET = "prefloop-tests"
WHY_NOT = "no S3 server here: make s3-server, or PREFLOOP_S3_SERVER=…/moto_server"


def server_command() -> Path | None:
    """The server's program, where one is installed."""
    named = os.environ.get("PREFLOOP_S3_SERVER")
    found = Path(named) if named else Path(sys.prefix) / "s3-server" / "bin" / "moto_server"
    return found if found.exists() else None


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The variables by which its clients find it; an empty bucket is there."""
    command = server_command()
    if command is None:
        pytest.skip(WHY_NOT)
    with TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        # Into a file: a pipe that nobody reads would fill up with requests and stop the server.
        process = subprocess.Popen([command, "-H", "127.0.0.1", "-p", "0"], stdout=log, stderr=subprocess.STDOUT)
        try:
            url = _url(Path(folder) / "log", process)
            request = urllib.request.Request(f"{url}/{BUCKET}", method="PUT")
            urllib.request.urlopen(request, timeout=10).close()
            keys = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}
            yield keys | {"AWS_ENDPOINT_URL": url}
        finally:
            process.terminate()
            process.wait()


def _url(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Where it listens, as it says itself once it does."""
    while process.poll() is None:
        if found := re.search(r"Running on (\S+)\n", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@contextmanager
def without_header(url: str, header: str) -> Iterator[str]:
    """The same server as one that knows nothing of a header, as older ones know no conditions: where it listens."""

    class Overlooking(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kept = {name: value for name, value in self.headers.items() if name.lower() != header.lower()}
            request = urllib.request.Request(url + self.path, content or None, kept, method=self.command)
            try:
                answer = urllib.request.urlopen(request, timeout=10)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                body = answer.read()
                self.send_response(answer.status)
                for name in ("ETag", "Last-Modified", "Content-Type"):
                    if name in answer.headers:
                        self.send_header(name, answer.headers[name])
                length = answer.headers["Content-Length"] if self.command == "HEAD" else str(len(body))
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(body)

        do_GET = do_HEAD = do_DELETE = do_POST = do_PUT

        def log_message(self, *_: object) -> None:
            """Nothing is told."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Overlooking)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
