"""Requests with everything resolved: settings, identity for the record, the command that makes each alone."""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.conditioning import read_picture, sound_seconds
from inference.loading import ranks
from inference.prompting.format import seconds_for
from inference.records import FORMAT, Job
from inference.requests import AUTO, Request
from inference.settings import longest, resolve
from magihuman.codecs.bundle import bundle_spec
from magihuman.io.provenance import file_hash
from magihuman.media import images

if TYPE_CHECKING:
    from inference.loading import Source
    from inference.settings import Settings
    from magihuman.codecs.bundle import CodecBundle


def note(text: str) -> None:
    """A line that the user should see, above any progress bar."""
    from tqdm import tqdm

    tqdm.write(f"note: {text}", file=sys.stderr)


class Resolver:
    """Turns requests into jobs.

    Conditions are read once, so that bad ones stop the run at its start, before any weights are loaded.

    Args:
        overrides: of the checkpoint's settings, see `inference.settings.resolve`.
    """

    def __init__(self, source: "Source", folder: Path, overrides: dict[str, Any]) -> None:
        self.source, self.folder, self.overrides = source, folder, overrides
        self._parents = source.parents()
        self._hashes: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        self._pictures: set[tuple[str, int, int]] = set()
        self._said: set[str] = set()

    def job(self, request: Request) -> Job:
        """One request resolved.

        Raises:
            UserError: a setting that cannot be, or a condition that cannot be used.
        """
        settings = self._settings(request)
        self._announce(request, settings)
        if request.image is not None:
            self._check_picture(request.image, *settings.size)
        identity = {
            "format": FORMAT,
            "prompt": request.prompt,
            "seed": request.seed,
            "image": self._described(request.image),
            "audio": self._described(request.audio),
            "settings": settings.to_dict(),
            **self._parents,
            "dtype": self.source.dtype_name,
            "device": self.source.device.type,
            "weights": self.source.weights,
            "tier": self.source.tier,
            "tile": self.source.tile,
        }
        path = self.folder / f"{request.name}.mp4"
        return Job(request, settings, identity, path, command(self.source, request, settings, path))

    def check_prompts(self, codecs: "CodecBundle", prompts: Sequence[str]) -> None:
        """Say once if there are prompts that mean nothing to these codecs."""
        if codecs.prompt_pattern is None:
            return
        strange = [p for p in prompts if not re.fullmatch(codecs.prompt_pattern, " ".join(p.split()))]
        if strange:
            short = strange[0] if len(strange[0]) <= 60 else strange[0][:57] + "..."
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            self._say(
                f"the prompt {short!r}{more} is not of the only form that the {codecs.name} world knows, such as "
                f"{codecs.prompt_example!r}"
            )

    def _settings(self, request: Request) -> "Settings":
        config, second = self.source.config, self.source.second
        given = dict(self.overrides)
        if request.negative_prompt is not None:
            given["negative_prompt"] = request.negative_prompt
        sound = None
        if request.audio is not None:
            if request.audio not in self._seconds:
                self._seconds[request.audio] = sound_seconds(request.audio, config.contract.audio_rate)
            sound = self._seconds[request.audio]
        if request.seconds is not None:
            given["seconds"] = request.seconds
        if given.get("seconds") == AUTO:
            given["seconds"] = self._auto(request, sound)
        return resolve(config, second, **given, sound=sound)

    def _auto(self, request: Request, sound: float | None) -> float | None:
        """seconds=auto: as long as the given sound, else as what is said takes; None for the usual length."""
        wanted: float | None = sound
        if sound is None:
            wanted = seconds_for(request.prompt)
        if wanted is None:
            self._say(
                "seconds=auto: the prompt has no dialogue, so the clip gets the checkpoint's usual length"
            )
            return None
        limit = longest(self.source.config)
        if wanted > limit:
            self._say(f"seconds=auto: {wanted:g} s are needed, {limit:g} s is the most for this checkpoint")
        return min(wanted, limit)

    def _announce(self, request: Request, settings: "Settings") -> None:
        """What the clip gets other than was asked for."""
        sizes = {"height": settings.height, "width": settings.width}
        if settings.sr is not None:
            sizes |= {"sr_height": settings.sr.height, "sr_width": settings.sr.width}
        for name, found in sizes.items():
            asked = self.overrides.get(name)
            if asked not in (None, found):
                self._say(
                    f"{name}={asked} is rounded down to {found}, a multiple of what the network can make"
                )
        small, sr = (settings.height, settings.width), settings.sr
        if sr is not None and not images.same_aspect(small, (sr.height, sr.width)):
            self._say(
                f"the second stage's {sr.width}x{sr.height} is of another shape than the first's "
                f"{settings.width}x{settings.height}, so pictures are stretched; see sr_width= and sr_height="
            )
        if request.audio is not None:
            length, used = self._seconds[request.audio], settings.audio / self.source.config.contract.fps
            if length > used + 0.05:
                self._say(
                    f"{request.audio} lasts {length:.2f} s; its first {used:.2f} s are used (see seconds=)"
                )
        config = self.source.config
        spec = bundle_spec(config.codecs)
        if not spec.many_lengths and settings.frames > config.size.frames:
            asked, usual = (frames / config.contract.fps for frames in (settings.frames, config.size.frames))
            self._say(
                f"{asked:g} s is longer than the {usual:g} s that this checkpoint was trained on; the clip may "
                "fall apart (see seconds=)"
            )
        if spec.negative_prompt and settings.guidance.needed and not settings.negative_prompt.strip():
            self._say("guidance without a negative prompt; the release has one: see negative_prompt_file=")

    def _say(self, text: str) -> None:
        # Every process of a torchrun command resolves all requests; one of them speaks.
        if text not in self._said and ranks()[0] == 0:
            self._said.add(text)
            note(text)

    def _check_picture(self, path: str, height: int, width: int) -> None:
        if (path, height, width) not in self._pictures:
            read_picture(path, height, width)
            self._pictures.add((path, height, width))

    def _described(self, path: str | None) -> dict[str, str] | None:
        if path is None:
            return None
        if path not in self._hashes:
            self._hashes[path] = file_hash(Path(path))
        return {"path": path, "sha256": self._hashes[path]}


def command(source: "Source", request: Request, settings: "Settings", path: Path) -> list[str]:
    """The command line that makes this clip alone, every setting written out."""
    scales, second = settings.guidance.to_dict(), settings.sr
    values: dict[str, Any] = {
        "checkpoint": source.checkpoint,
        "lora": source.lora,
        "sr": source.sr,
        "turbo": source.turbo,
        "tile": source.tile,
        "codecs": source.codecs,
        **source.codec_paths,
        "prompt": request.prompt,
        # On the command line nothing means the checkpoint's own, a space means nothing.
        "negative_prompt": settings.negative_prompt or " ",
        "output": path,
        "seed": request.seed,
        "steps": settings.steps,
        "solver": settings.solver,
        "shift": settings.shift,
        "cfg": "{" + ", ".join(f"{key}: {value}" for key, value in scales.items()) + "}",
        "cfg_passes": settings.cfg_passes,
        "compat": settings.compat,
        "seconds": settings.seconds,
        "height": settings.height,
        "width": settings.width,
        "sr_steps": second and second.steps,
        "sr_cfg": second and second.guidance,
        "sr_height": second and second.height,
        "sr_width": second and second.width,
        "image": request.image,
        "audio": request.audio,
        "device": source.device.type,
        "dtype": source.dtype_name,
        "memory": source.memory,
        "weights": source.weights,
        "tier": source.tier,
    }
    given = [f"{key}={value}" for key, value in values.items() if value is not None]
    return ["python", "-m", "magihuman.infer", *given]


def batches(jobs: list[Job], size: int) -> list[list[Job]]:
    """Neighbours that can be computed together: same settings, same kinds of condition, at most `size`."""
    parts: list[list[Job]] = []
    for job in jobs:
        if not parts or len(parts[-1]) == size or _kind(job) != _kind(parts[-1][0]):
            parts.append([])
        parts[-1].append(job)
    return parts


def _kind(job: Job) -> tuple[Any, ...]:
    # How many seconds were asked for does not matter where the clips come out equal.
    settings = replace(job.settings, seconds=0.0)
    return settings, job.request.image is None, job.request.audio is None
