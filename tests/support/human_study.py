"""Small human studies for tests: folders of tiny clips of several systems, their plan, and a rater that speaks HTTP."""

import http.client
import json
from pathlib import Path
from typing import Any

import numpy as np

from eval.human.study_plan import StudyPlan, StudySettings, make_plan
from magihuman.media.mp4 import write_mp4

SYSTEMS = ("alphamodel", "bravomodel", "charliemodel")
SECRET = "secretclip"
PROMPT = "confidentialprompt"


def write_clips(
    folder: Path, count: int, frames: int = 3, size: tuple[int, int] = (36, 64), level: float = 0.1
) -> None:
    """Clips of coloured noise with a tone, with prompts beside them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(len(folder.name))
    rate = 16000
    for k in range(count):
        coarse = rng.integers(0, 255, (frames, size[0] // 4, size[1] // 4, 3), dtype=np.uint8)
        pixels = coarse.repeat(4, 1).repeat(4, 2)
        time = np.arange(round(frames / 25 * rate)) / rate
        wave = (level * np.sin(2 * np.pi * (300 + 20 * k) * time))[None].astype(np.float32)
        write_mp4(folder / f"{SECRET}{k:03d}.mp4", pixels, 25, wave, rate)
        (folder / f"{SECRET}{k:03d}.txt").write_text(f"{PROMPT} {k}")


def made_study(folder: Path, clips: int = 6, frames: int = 3, systems: int = 3, **settings: Any) -> StudyPlan:
    """A planned study in folder/study."""
    names = SYSTEMS[:systems]
    for name in names:
        write_clips(folder / name, clips, frames)
    given = {"raters": 2, "pairs": 6, "repeats": 1, "checks": 2, "output": str(folder / "study"), **settings}
    places = ",".join(f"{name}={folder / name}" for name in names)
    return make_plan(StudySettings(systems=places, focus=names[0], **given))


class HttpRater:
    """One rater's requests; every byte that the server sends is kept in `received`."""

    def __init__(self, port: int, token: str) -> None:
        self.port, self.token, self.received = port, token, bytearray()

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        head = {name.lower(): value for name, value in answer.getheaders()}
        self.received += f"{answer.reason} {answer.getheaders()}".encode() + content
        return answer.status, head, content

    def post(self, what: str, **content: Any) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a play or vote."""
        status, _, body = self.request("POST", f"/r/{self.token}/{what}", json.dumps(content).encode())
        return status, json.loads(body)

    def next(self) -> dict[str, Any]:
        """The first unanswered trial."""
        found: dict[str, Any] = json.loads(self.request("GET", f"/r/{self.token}/next")[2])
        return found
