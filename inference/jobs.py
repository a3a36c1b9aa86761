"""Jobs: requests with resolved settings, the record of a clip on disk, and when a clip counts as done.

A record has all that is needed to make the clip again and nothing that changes from run to run (no dates, no
durations), so the same command gives the same bytes. A clip is done when its record describes the same request and its
mp4 has the recorded hash; a run killed at any point continues with the others.
"""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.conditioning import RELEASE_VARIABLE
from inference.requests import AUTO, FORMAT, InferOptions, Request
from inference.settings import longest, parse_output_size, resolve
from inference.torchrun import ranks
from magihuman.codecs.bundle import bundle_spec
from magihuman.codecs.oobleck import WINDOW_LATENTS
from magihuman.codecs.tiny_captions import order_fault
from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.provenance import code_version, file_hash
from magihuman.io.text import load_json, parse_json

if TYPE_CHECKING:
    from inference.loading import Source
    from inference.settings import Settings
    from magihuman.codecs.bundle import CodecBundle


LONG = 2.5
"""Times the usual length from which a clip of a checkpoint for many lengths counts as untried; 10 s of the release's 4."""


@dataclass(frozen=True)
class Job:
    """A request with everything resolved.

    Attributes:
        path: of the mp4.
        options: of the command that makes this clip alone.
    """

    request: Request
    settings: "Settings"
    path: Path
    options: InferOptions
    resolver: "Resolver"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The part of the record that decides the clip; hashes its files, so made only when it is needed."""
        request, described = self.request, self.resolver.described
        return {
            "format": FORMAT,
            "prompt": request.prompt,
            "seed": request.seed,
            "image": described(request.image),
            "audio": described(request.audio),
            "settings": self.settings.to_dict(),
            **self.resolver.source.parents,
            **self.options.identity(),
        }

    @property
    def record_path(self) -> Path:
        """Path of the JSON record, next to the mp4."""
        return self.path.with_suffix(".json")

    def finished(self) -> dict[str, Any] | None:
        """The record on disk if it belongs to this job and its mp4 is whole, else None."""
        try:
            record = load_json(self.record_path)
            # Compared as JSON: tuples have become lists there.
            same = all(record.get(key) == value for key, value in json.loads(json.dumps(self.identity)).items())
            return record if same and file_hash(self.path) == record["sha256"] else None
        except (OSError, ValueError, AttributeError, KeyError):
            return None


def write(job: Job, save: Callable[[Path], dict[str, Any]], manifest: Path | None) -> None:
    """Write a clip's mp4, then its record, then its line of the manifest, each whole or not at all.

    Args:
        save: writes the mp4 and returns facts about it for the record.

    Raises:
        UserError: the disk is full, the folder cannot be written, or the like.
    """
    try:
        facts = save(job.path)
        record = {
            **job.identity,
            "file": job.path.name,
            "sha256": file_hash(job.path),
            **facts,
            "versions": versions(),
            "command": shlex.join(job.options.command()),
        }
        write_atomically(job.record_path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        if manifest is not None:
            append_line(manifest, manifest_line(job.request.name, record))
    except OSError as error:
        raise UserError(f"cannot write {job.path}: {error.strerror or error}") from error


def remove_leftovers(folder: Path, jobs: Sequence[Job]) -> None:
    """Remove temporary files of these clips that a killed run has left (`magihuman.io.files.atomic_path`)."""
    names = {path.name for job in jobs for path in (job.path, job.record_path)}
    # Once for all clips: a search per clip takes time in proportion to the square of their number.
    for path in list(folder.glob(".*.part")):
        if path.name[1:].rsplit(".", 2)[0] in names:
            path.unlink(missing_ok=True)


def texts_of(jobs: Sequence[Job]) -> list[str]:
    """Prompts and negative prompts that the jobs need, each once."""
    negative = [job.settings.negative_prompt for job in jobs if job.settings.needs_negative]
    return list(dict.fromkeys([*(job.request.prompt for job in jobs), *negative]))


def manifest_line(name: str, record: dict[str, Any]) -> str:
    """A finished clip as its line of the manifest."""
    line = {"name": name, **{key: record[key] for key in ("file", "prompt", "seed", "sha256")}}
    return json.dumps(line, ensure_ascii=False)


def repair_manifest(path: Path, finished: dict[str, dict[str, Any] | None]) -> None:
    """Make the manifest say what is done.

    A kill may have left a torn last line, or a clip without its line; a clip that is to be made again must
    lose its line. Lines of clips that are not asked about stay.

    Args:
        finished: the record, or None where the clip is still to be made, by name.
    """
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            if parse_json(line)["name"] not in finished:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    kept += [manifest_line(name, record) for name, record in finished.items() if record is not None]
    write_atomically(path, "".join(line + "\n" for line in kept))


def append_line(path: Path, line: str) -> None:
    """Append one line by a single write, so that lines of several processes never mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (line + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@cache
def versions() -> dict[str, Any]:
    """Of what the bytes of a clip depend on."""
    packages = {name: metadata.version(name) for name in ("magihuman", "torch", "av", "numpy")}
    return {"python": platform.python_version(), **packages, "code": code_version()}


def note(text: str) -> None:
    """A line that the user should see, above any progress bar."""
    from tqdm import tqdm

    tqdm.write(f"note: {text}", file=sys.stderr)


class Resolver:
    """Turns requests into jobs.

    Conditions are read once, so that bad ones stop the run at its start, before any weights are loaded.

    Args:
        folder: of the clips.
    """

    def __init__(self, source: "Source", folder: Path) -> None:
        self.source, self.folder = source, folder
        self._hashes: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        self._pictures: set[tuple[str, tuple[int, int]]] = set()
        self._noted: set[str] = set()

    def job(self, request: Request) -> Job:
        """One request resolved.

        Raises:
            UserError: a setting that cannot be, or a condition that cannot be used.
        """
        settings = self._settings(request)
        self._announce(request, settings)
        if request.image is not None and (request.image, settings.size) not in self._pictures:
            from inference.conditioning import read_image

            self._note_on(request.image, read_image(request.image, *settings.size)[1])
            self._pictures.add((request.image, settings.size))
        path = self.folder / f"{request.name}.mp4"
        options = replace(
            self.source.options,
            prompt=request.prompt,
            output=str(path),
            seed=request.seed,
            image=request.image,
            audio=request.audio,
            **settings.options(),
        )
        return Job(request, settings, path, options, self)

    def check_prompts(self, codecs: "CodecBundle", prompts: Sequence[str]) -> None:
        """Note once if prompts do not have the form that the text encoder or the published weights were made for."""
        if bundle_spec(codecs.name).published:
            from inference.prompting.format import check_form

            if faults := [found[0] for p in prompts if (found := check_form(p).faults)]:
                many = f"{len(faults)} prompts are" if len(faults) > 1 else "the prompt is"
                self._note(
                    f"{many} not of the release's form: {faults[0]} (python -m inference.prompting check= names all faults)"
                )
        if codecs.prompt_pattern is None:
            return
        strange = [p for p in prompts if not re.fullmatch(codecs.prompt_pattern, " ".join(p.split()))]
        if strange:
            short = strange[0] if len(strange[0]) <= 60 else strange[0][:57] + "..."
            more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
            fault = order_fault(strange[0], codecs.name)
            ending = f", such as {codecs.prompt_example!r}" if fault is None else f": {fault}"
            self._note(
                f"the prompt {short!r}{more} is not of the only form that the {codecs.name} text encoder knows{ending}"
            )

    def _settings(self, request: Request) -> "Settings":
        source, audio_seconds = self.source, None
        own = {key: getattr(request, key) for key in ("negative_prompt", "seconds")}  # of a line of a prompt file
        options = replace(source.options, **{key: value for key, value in own.items() if value is not None})
        if request.audio is not None:
            if request.audio not in self._seconds:
                from inference.conditioning import audio_seconds_of
                from magihuman.media.reading import probe

                self._seconds[request.audio] = audio_seconds_of(request.audio, source.config.contract.audio_rate)
                self._note_on(request.audio, probe(request.audio).audio_note)
            audio_seconds = self._seconds[request.audio]
        if options.seconds == AUTO:
            options = replace(options, seconds=self._auto(request, audio_seconds))
        return resolve(source.config, source.second, options, audio_seconds)

    def _auto(self, request: Request, audio_seconds: float | None) -> float | None:
        """seconds=auto: as long as the conditioning audio, else as the dialogue takes; None for the usual length."""
        wanted = audio_seconds
        if audio_seconds is None:
            from inference.prompting.format import seconds_for

            wanted = seconds_for(request.prompt)
        if wanted is None:
            self._note("seconds=auto: the prompt has no dialogue, so the clip gets the checkpoint's usual length")
            return None
        limit = longest(self.source.config)
        if wanted > limit:
            self._note(f"seconds=auto: {wanted:g} s are needed, {limit:g} s is the most for this checkpoint")
        return min(wanted, limit)

    def _announce(self, request: Request, settings: "Settings") -> None:
        """Notes on settings of the clip that differ from the requested ones."""
        sizes = {"height": settings.height, "width": settings.width}
        if settings.sr is not None:
            from magihuman.media.images import same_aspect

            sr = settings.sr
            sizes |= {"sr_height": sr.height, "sr_width": sr.width}
            if not same_aspect((settings.height, settings.width), settings.size):
                self._note(
                    f"the second stage's {sr.width}x{sr.height} is of another shape than the first's "
                    f"{settings.width}x{settings.height}, so frames are stretched; see sr_width= and sr_height="
                )
        for name, found in sizes.items():
            asked = getattr(self.source.options, name)
            if asked not in (None, found):
                self._note(f"{name}={asked} is rounded down to {found}, a multiple of what the network can make")
        if request.audio is not None:
            length, used = self._seconds[request.audio], settings.audio / self.source.config.contract.fps
            if length > used + 0.05:
                self._note(f"{request.audio} lasts {length:.2f} s; its first {used:.2f} s are used (see seconds=)")
        if self.source.options.audio_overlap is not None and (
            request.audio is None or settings.audio <= WINDOW_LATENTS
        ):
            self._note("audio_overlap= changes nothing: it is for given audio that is longer than a window of 29 s")
        self._announce_shape(settings)
        spec = bundle_spec(self.source.config.codecs)
        if output := self.source.options.output_size:
            from magihuman.media.images import same_aspect

            if not same_aspect(settings.size, parse_output_size(output)):
                self._note(f"output_size={output} is of another shape than the clip, so frames are stretched")
        asked = self.source.options.negative_prompt if request.negative_prompt is None else request.negative_prompt
        if asked and not settings.needs_negative:
            self._note("negative_prompt= changes nothing here: no stage is guided (see cfg= and sr_cfg=)")
        if spec.negative_prompt and settings.needs_negative and not settings.negative_prompt:
            self._note(
                f"guidance without the release's negative prompt, which changes every clip: set {RELEASE_VARIABLE} to a "
                "checkout of its code, or give negative_prompt_file="
            )

    def _announce_shape(self, settings: "Settings") -> None:
        """Notes on a size or length that the checkpoint has not seen in training."""
        config, second = self.source.config, self.source.second
        stages = [("height= and width=", (settings.height, settings.width), config.size)]
        if second is not None and settings.sr is not None:
            stages.append(("sr_height= and sr_width=", settings.size, second.size))
        for names, (height, width), usual in stages:
            if not (_near(height, usual.height) and _near(width, usual.width)):
                self._note_untrained(f"{width}x{height} is another size", f"{usual.width}x{usual.height}", names)
        length, usual_length = (frames / config.contract.fps for frames in (settings.frames, config.size.frames))
        many = bundle_spec(config.codecs).many_lengths
        if length > (LONG if many else 1) * usual_length:
            self._note_untrained(f"{length:g} s is longer", f"{usual_length:g} s", "seconds=")
        elif not many and length < usual_length and not _near(length, usual_length):
            self._note_untrained(f"{length:g} s is shorter", f"{usual_length:g} s", "seconds=")

    def _note_untrained(self, asked: str, usual: str, names: str) -> None:
        # A config holds only the most frequent size of the training clips.
        self._note(
            f"{asked} than this checkpoint's usual {usual}; unless it was trained on both, the clip may fall apart (see "
            f"{names})"
        )

    def _note_on(self, path: str, text: str) -> None:
        if text:
            self._note(f"{path}: {text}")

    def _note(self, text: str) -> None:
        # Every process of a torchrun command resolves all requests; one of them speaks.
        if text not in self._noted and ranks()[0] == 0:
            self._noted.add(text)
            note(text)

    def described(self, path: str | None) -> dict[str, str] | None:
        """A conditioning file in the record."""
        if path is None:
            return None
        if path not in self._hashes:
            self._hashes[path] = file_hash(Path(path))
        return {"path": path, "sha256": self._hashes[path]}


def _near(value: float, usual: float) -> bool:
    """Within a tenth: a checkpoint for 448x256 makes the release's default, 480x256, as well."""
    return abs(value - usual) <= 0.1 * usual


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
