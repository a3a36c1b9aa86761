"""A local HTTP server for a folder that fails on purpose."""

import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Failure = tuple[str, int] | None
"""Kind and bytes of the body before it: reset, truncate, stall, slow, garble; or status and its number."""


class FailingServer(ThreadingHTTPServer):
    """Serves the files of a folder, as a context manager.

        with FailingServer(folder) as server:
            read(server.url)

    Args:
        fails: (file name, number of its request from 0 on) -> how it fails, None for a proper answer.
        ranges: whether requests for a part of a file are honoured.

    Attributes:
        requests: by file name; sent: bytes of bodies by file name; failed: by kind; passwords: that came with requests.
    """

    daemon_threads = True

    def __init__(
        self, folder: Path, fails: Callable[[str, int], Failure] = lambda name, number: None, ranges: bool = True
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.fails, self.ranges = folder, fails, ranges
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.passwords: set[str] = set()
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/data"

    def __enter__(self) -> "FailingServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """Nothing: clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: FailingServer
    wbufsize = 0

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        with self.server.lock:
            number = self.server.requests[name]
            self.server.requests[name] += 1
            if "Authorization" in self.headers:
                self.server.passwords.add(self.headers["Authorization"])
        kind, amount = self.server.fails(name, number) or ("", 0)
        file = self.server.folder / name
        if kind:
            self.server.failed[kind] += 1
        if kind == "status" or not file.is_file():
            self.send_error(amount if kind == "status" else 404)
            return
        data = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.server.ranges else None
        start = int(found[1]) if found else 0
        if start > len(data):
            self.send_error(416)
            return
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self._send_body(name, data[start:], kind, amount)

    def _send_body(self, name: str, body: bytes, kind: str, amount: int) -> None:
        if kind == "garble":
            body = body[:amount] + bytes(255 - byte for byte in body[amount : amount + 64]) + body[amount + 64 :]
        whole = body if kind in ("", "garble", "slow") else body[:amount]
        step = len(whole) if kind != "slow" else max(1, amount)
        for first in range(0, len(whole), step or 1):
            self.wfile.write(whole[first : first + step])
            self.server.sent[name] += len(whole[first : first + step])
            if kind == "slow":
                time.sleep(0.005)
        if kind == "stall":
            self.server.ended.wait(20)
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


KINDS: list[Failure] = [
    ("reset", 30_000), ("status", 500), ("truncate", 50_000), ("slow", 8_000), ("stall", 10_000), ("reset", 0), ("status", 503),
]  # fmt: skip


def first_requests_fail(name: str, number: int) -> Failure:
    """The first two requests of every shard fail, each shard in another way."""
    if not name.endswith(".tar") or number > 1:
        return None
    return KINDS[(int(name[6:12]) + number) % len(KINDS)]
