"""Reward servers for tests: real HTTP servers on a free port of this machine, with planted faults.

`serving` answers OpenRLHF's requests, vLLM's /classify, and chat completions; `faults` are taken one a request, in
order: a status with its headers, seconds to wait, or text to answer with.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Fault:
    """What a request meets in the place of its answer."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    wait_s: float = 0.0


@dataclass
class Served:
    """A server under way: what it was asked, and what the next requests meet."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    poison: str | None = None  # a request with this text fails always

    @property
    def num_answers(self) -> int:
        """Answers that it was asked about, over all requests."""
        return sum(len(body.get("query") or body.get("input") or [0]) for body in self.asked)

    def close(self) -> None:
        """Stop serving: nobody listens on the port any more."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    _server: Any = None
    _connections: list[socket.socket] = field(default_factory=list)


def by_length(query: str, prompt: str, label: str | None) -> float:
    return float(len(query) - len(prompt))


@contextmanager
def serving(
    reward: Callable[[str, str, str | None], float] = by_length,
    judge: Callable[[str], str] = lambda text: f"Score: {len(text) % 10}",
    *,
    port: int = 0,
) -> Iterator[Served]:
    """A server for the length of the block."""
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            served._connections.append(self.connection)

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"])).decode()
            body = json.loads(raw)
            served.asked.append(body)
            served.headers.append(dict(self.headers))
            served.times.append(time.monotonic())
            fault = served.faults.pop(0) if served.faults else Fault()
            if served.poison is not None and served.poison in raw:
                fault = Fault(status=500)
            time.sleep(fault.wait_s)
            text = fault.text if fault.text is not None else json.dumps(self._answer(body))
            content = text.encode()
            self.send_response(fault.status)
            for name, value in fault.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            try:
                self.wfile.write(content)
            except OSError:
                self.close_connection = True  # who asked has given up

        def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
            if self.path.startswith("/get_reward"):
                labels = body["labels"]
                return {
                    "rewards": [reward(*asked) for asked in zip(body["query"], body["prompts"], labels, strict=True)]
                }
            if self.path.startswith("/classify"):
                texts = body.get("input") or [body["messages"][-1]["content"]]
                rows = [
                    {"index": i, "label": None, "probs": [len(text) / 1], "num_classes": 1}
                    for i, text in enumerate(texts)
                ]
                return {"object": "list", "model": body["model"], "data": rows[::-1]}
            reply = {"role": "assistant", "content": judge(body["messages"][-1]["content"])}
            return {"object": "chat.completion", "choices": [{"index": 0, "message": reply, "finish_reason": "stop"}]}

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        allow_reuse_address = True

    server = Server(("127.0.0.1", port), Handler)
    served._server, served.url = server, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.close()
