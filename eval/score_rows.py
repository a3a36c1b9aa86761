"""Rows of scored clips: a value per metric, or null with a status and a reason.

    ClipRow.from_dict(json.loads(line)).values["loudness"]    # Value(value=-23.1, status="ok", reason="")

| status | meaning |
|---|---|
| ok | there is a value |
| skipped | the measurement does not apply to the clip: no audio, no reference, nobody speaks |
| failed | it applies and gave no value: the file cannot be decoded, an answer cannot be parsed, an error |
| unavailable | a package or weights are missing on this machine |
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OK, SKIPPED, FAILED, UNAVAILABLE = "ok", "skipped", "failed", "unavailable"


class Value(NamedTuple):
    """A metric of a clip: a value, or None with the reason."""

    value: float | None
    status: str = OK
    reason: str = ""


@dataclass
class ClipRow:
    """What was measured on a clip: values by metric key, and texts such as a transcript by key.

    Attributes:
        part: of a suite, as "age/19-30"; "" without.
        inputs: hash of the prompt, reference, voice and whatever else is known of the clip; "" where it was not written.
        fps: frames per second of the file, 0 without video; None where it cannot be read or was not written.
        influence: distance of sets -> the clip's share of what its group moves the distance by; see `eval.set_distance`.
    """

    clip: str
    group: str
    prompt: str
    language: str | None
    sha256: str | None
    values: dict[str, Value] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    fps: float | None = None
    influence: dict[str, float] = field(default_factory=dict)
    part: str = ""
    inputs: str = ""

    def to_dict(self) -> dict[str, Any]:
        values = {
            key: {"value": v.value, "status": v.status, **({"reason": v.reason} if v.reason else {})}
            for key, v in self.values.items()
        }
        return {
            "clip": self.clip, "group": self.group, "prompt": self.prompt, "language": self.language,
            "sha256": self.sha256, "inputs": self.inputs, "fps": self.fps, "values": values, "texts": self.texts,
            **({"influence": self.influence} if self.influence else {}), **({"part": self.part} if self.part else {}),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "ClipRow":
        """Raises KeyError, TypeError or ValueError for content of another form."""
        values = {
            str(k): Value(_number(v["value"]), str(v["status"]), str(v.get("reason", "")))
            for k, v in content["values"].items()
        }
        return cls(
            str(content["clip"]), str(content["group"]), str(content.get("prompt", "")), content.get("language"),
            content.get("sha256"), values, dict(content.get("texts", {})), _number(content.get("fps")),
            {str(key): float(value) for key, value in content.get("influence", {}).items()}, str(content.get("part", "")),
            str(content.get("inputs", "")),
        )  # fmt: skip


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
