"""Server of a human study: one page per rater, clips with range requests, and votes, by the standard library alone.

    GET  /r/TOKEN           the page (study_page.html)
    GET  /r/TOKEN/next      the first unanswered pair, as JSON
    POST /r/TOKEN/play      {"trial", "side", "event": "start" | "end"}
    POST /r/TOKEN/vote      {"trial", "choice": "left" | "tie" | "right"}
    GET  /media/ID.mp4      a clip

Nothing that is sent names a system, a file or, unless the plan says so, a prompt. Paths are looked up in tables, never
on the disk.
"""

import hashlib
import json
import re
import sys
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from eval.human.study_plan import LINKS, MEDIA, PLAN, VOTES, StudyPlan, read_plan
from eval.human.vote_store import CHOICES, SIDES, VoteRefused, VoteStore
from magihuman.errors import UserError

PLAYED = 0.9
"""Share of a clip's length that must pass between its start and its end; the rest is for delays of the network."""
LARGEST_BODY = 4096
PIECE = 1 << 18
PAGE = Path(__file__).with_name("study_page.html")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; media-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the rater's token
    "X-Robots-Tag": "noindex",
}


class Refusal(Exception):
    """An answer with an error status and a line for the page."""

    def __init__(self, status: int, reason: str, **more: Any) -> None:
        super().__init__(reason)
        self.status, self.content = status, {"error": reason, **more}


class StudyServer(ThreadingHTTPServer):
    """The server of one study; `server_address[1]` is its port.

    Args:
        folder: made by `plan`.

    Raises:
        UserError: no study, media missing, votes of another plan, or the port is taken.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 8000) -> None:
        self.plan = read_plan(folder)
        self.raters = {token: number for number, token in enumerate(self.plan.tokens)}
        self.media = {
            self.address(rater, number, side): folder / MEDIA / f"{name}.mp4"
            for rater, trials in enumerate(self.plan.trials)
            for number, trial in enumerate(trials)
            for side, name in self.plan.sides(trial).items()
        }
        missing = sorted({path.name for path in self.media.values() if not path.is_file()})
        if missing:
            raise UserError(
                f"{folder / MEDIA} lacks {len(missing)} clips of the plan, such as {missing[0]}; copy the whole study"
            )
        self.store = open_votes(folder)
        try:
            super().__init__((host, port), StudyHandler)
        except (OSError, OverflowError) as error:
            self.store.close()
            raise UserError(f"cannot listen on {host}:{port}: {error}; choose another port= or host=") from error

    def server_bind(self) -> None:
        """Without the look-up of the host's name of `HTTPServer`, which may ask the network."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of a clip is no error; others are printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    def address(self, rater: int, trial: int, side: str) -> str:
        """ID of a clip as raters see it, of one question only: a clip that comes again is not known by its address."""
        return hashlib.sha256(f"{self.plan.tokens[rater]} {trial} {side}".encode()).hexdigest()[:16]

    def next_trial(self, rater: int) -> dict[str, Any]:
        """What the page shows: progress, and the first unanswered trial."""
        trials = self.plan.trials[rater]
        number = self.store.answered(rater)
        found: dict[str, Any] = {
            "question": self.plan.settings.question,
            "instructions": self.plan.instructions,
            "answered": number,
            "total": len(trials),
        }
        if number < len(trials):
            found["trial"] = {
                "number": number,
                **{side: f"{self.address(rater, number, side)}.mp4" for side in SIDES},
                "played": self.store.heard(rater, number),
            }
            if self.plan.settings.show_prompt:
                found["trial"]["prompt"] = self.plan.pairs[trials[number].pair].prompt
        return found

    def play(self, rater: int, given: dict[str, Any]) -> dict[str, Any]:
        """Record that a clip began or ended."""
        trial, side, event = _trial(self.plan, rater, given), given.get("side"), given.get("event")
        if side not in SIDES or event not in ("start", "end"):
            raise Refusal(HTTPStatus.BAD_REQUEST, "side must be left or right, event start or end")
        if trial > self.store.answered(rater):
            raise Refusal(HTTPStatus.CONFLICT, "an earlier pair is not answered")
        now = time.time()
        if event == "start":
            self.store.play(rater, trial, side, now)
        else:
            media = self.plan.sides(self.plan.trials[rater][trial])[side]
            self.store.played(rater, trial, side, now, PLAYED * self.plan.media[media])
        return {"played": self.store.heard(rater, trial)}

    def vote(self, rater: int, given: dict[str, Any]) -> dict[str, Any]:
        """Store a vote; the next trial."""
        trial, choice = _trial(self.plan, rater, given), given.get("choice")
        if choice not in CHOICES:
            raise Refusal(HTTPStatus.BAD_REQUEST, "choice must be left, tie or right")
        self.store.vote(rater, trial, choice, time.time())
        found = self.next_trial(rater)
        if found["answered"] in (1, found["total"]):
            print(f"rater {rater + 1}: {found['answered']} of {found['total']} answered", flush=True)
        return found


def _trial(plan: StudyPlan, rater: int, given: dict[str, Any]) -> int:
    trial = given.get("trial")
    if type(trial) is not int or not 0 <= trial < len(plan.trials[rater]):
        raise Refusal(HTTPStatus.BAD_REQUEST, "no such pair")
    return trial


def open_votes(folder: Path) -> VoteStore:
    """The votes of a study; they belong to the plan as it was when the study was first served.

    Raises:
        UserError: plan.json has changed since.
    """
    return VoteStore(folder / VOTES, hashlib.sha256((folder / PLAN).read_bytes()).hexdigest())


class StudyHandler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    server: StudyServer

    def version_string(self) -> str:
        """For the header `Server`: no versions."""
        return "study"

    def log_message(self, format: str, *args: Any) -> None:
        """No log of requests: it would hold the raters' tokens."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Errors of the protocol itself, without an echo of the request."""
        self.close_connection = True
        self._send(code, b"this request is not understood\n", "text/plain; charset=utf-8")

    def do_GET(self) -> None:
        """Pages, the next trial, clips."""
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/r/([\w-]{1,64})(/next)?", path):
            rater = self.server.raters.get(match[1])
            if rater is None and match[2]:
                self._json(404, {"error": "this link is not valid"})
            elif rater is None:
                self._send(404, b"This link is not valid. Please ask for a new one.\n", "text/plain; charset=utf-8")
            elif match[2]:
                self._json(200, self.server.next_trial(rater))
            else:
                self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif (match := re.fullmatch(r"/media/(\w{1,64})\.mp4", path)) and match[1] in self.server.media:
            self._clip(self.server.media[match[1]])
        else:
            self._send(404, b"Nothing is here. Please use the link that you were given.\n", "text/plain; charset=utf-8")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Plays and votes."""
        try:
            given = self._body()
            match = re.fullmatch(r"/r/([\w-]{1,64})/(play|vote)", self.path.partition("?")[0])
            rater = self.server.raters.get(match[1]) if match else None
            if match is None or rater is None:
                raise Refusal(HTTPStatus.NOT_FOUND, "this link is not valid")
            self._json(200, (self.server.vote if match[2] == "vote" else self.server.play)(rater, given))
        except Refusal as refusal:
            self._json(refusal.status, refusal.content)
        except VoteRefused as refused:
            self._json(HTTPStatus.CONFLICT, {"error": str(refused), "wait": round(refused.wait, 3)})

    def _body(self) -> dict[str, Any]:
        """The JSON object in the body.

        Raises:
            Refusal: no length, too long, or no JSON object; the connection is closed, since the rest is not read.
        """
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not re.fullmatch(r"\d{1,9}", length):
            self.close_connection = True
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed")
        if int(length) > LARGEST_BODY:
            self.close_connection = True
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {LARGEST_BODY} bytes")
        try:
            given = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, "a JSON object is needed")
        return given

    def _json(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self._head(status, {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _clip(self, path: Path) -> None:
        """A clip, or the part of it that `Range` asks for, as RFC 9110 says; Safari plays nothing without."""
        size = path.stat().st_size
        wanted = _range(self.headers.get("Range", ""), size)
        headers = {"Content-Type": "video/mp4", "Accept-Ranges": "bytes", "Cache-Control": "private, max-age=86400"}
        if wanted == ():
            self._head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
            return
        first, end = wanted or (0, size)
        if wanted:
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        self._head(206 if wanted else 200, {**headers, "Content-Length": str(end - first)})
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(first)
            while first < end and (piece := file.read(min(PIECE, end - first))):
                self.wfile.write(piece)
                first += len(piece)


def _range(header: str, size: int) -> tuple[int, int] | tuple[()] | None:
    """First byte and end of a range of bytes; None: the whole file; (): impossible. Several ranges give the whole file."""
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        count = min(int(match[2]), size)
        return (size - count, size) if count else ()
    first, end = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
    if match[2] and int(match[2]) < first:
        return None
    return (first, end) if first < size else ()


def links(plan: StudyPlan, address: str) -> list[str]:
    """Link of every rater."""
    return [f"{address.rstrip('/')}/r/{token}" for token in plan.tokens]


def serve_study(study: str, port: int = 8000, host: str = "127.0.0.1", url: str | None = None) -> None:
    """Serve until Ctrl-C; the command `serve`.

    Raises:
        UserError: as of `StudyServer`, or an impossible port or url.
    """
    from magihuman.io.files import write_atomically

    if not 0 <= port < 65536:
        raise UserError(f"port={port} is impossible; give 0 to 65535")
    if url is not None and not re.match(r"https?://[^/]", url):
        raise UserError(f"url={url} gives links that cannot be clicked; begin it with https:// or http://")
    folder = Path(study)
    with StudyServer(folder, host, port) as server:
        try:
            name = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
            lines = [f"rater {number}: {link}" for number, link in enumerate(
                links(server.plan, url or f"http://{name}:{server.server_address[1]}"), 1
            )]  # fmt: skip
            write_atomically(folder / LINKS, "\n".join(lines) + "\n")
            (folder / LINKS).chmod(0o600)
            done = sum(server.store.answered(rater) for rater in range(len(lines)))
            print("\n".join(lines))
            print(
                f"links are in {folder / LINKS}; {done} of {sum(map(len, server.plan.trials))} questions are answered"
            )
            print(f"listening on {host}:{server.server_address[1]}; Ctrl-C stops, nothing is lost", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"stopped; next: python -m eval.human report study={study}")
        finally:
            server.store.close()
