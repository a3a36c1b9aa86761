"""Encoding of planned clips to shards of latents: the tasks that `data.prepare` runs in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.clip_plan import PlannedClip
from data.options import PrepareOptions
from data.scan import MediaFile, probe_file
from data.shards import LARGE, NULL_TEXT, REMEDIES, TRANSIENT, Bucket, Entry, ShardWriter
from data.worker_pool import Tick
from magihuman.io.files import write_atomically
from magihuman.media.container import MediaError
from magihuman.media.image_files import read_image
from magihuman.media.reading import MediaClip, MediaReader

if TYPE_CHECKING:  # the parent process imports the tasks only by name
    import torch

    from magihuman.codecs.bundle import CodecBundle

PRELOADED = ("data.encode", "torch", "webdataset.writer", "magihuman.codecs.bundle")  # once for all workers
AGAIN = "the same command tries again"
CRASHED = f"crashes the decoder (its process died twice; {AGAIN})"
SILENCE = 1e-4  # peak below which audio counts as silent (-80 dB)


VERSION = 1
"""Raise it when the same file, caption and options give other samples: shards of earlier code are not added to then."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write.

    Attributes:
        stored: by key, (shard, entry) of samples that are copied from there; refused: reasons known by key.
    """

    path: Path
    clips: Sequence[PlannedClip]
    options: PrepareOptions
    stored: Mapping[str, tuple[Path, Entry]]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class ShardResult:
    """Samples written (without any there is no file), and the reasons for rejected clips by key.

    transient: keys of clips that were rejected for an error of the machine, which the next run tries again.
    """

    entries: list[Entry]
    rejected: dict[str, str]
    transient: frozenset[str] = frozenset()


@lru_cache(maxsize=1)
def open_bundle(name: str, device: str) -> CodecBundle:
    """Codecs and text encoder, built once per process.

    Raises:
        UserError: it does not exist or cannot be built.
    """
    from magihuman.codecs.bundle import allow_codecs, load_bundle

    allow_codecs(name)
    return load_bundle(name, device)


def describe_codecs(payload: tuple[str, str, str], tick: Tick, excluded: frozenset[str]) -> dict[str, Any]:
    """Task: the properties of the codecs that planning needs; writes the features of the empty prompt to a folder.

    Args:
        payload: (codecs, device, output folder).
    """
    from safetensors.torch import save

    name, device, folder = payload
    codecs = open_bundle(name, device)
    null = codecs.text_encoder.encode([""])[0]
    write_atomically(Path(folder) / NULL_TEXT, save({"text": null.half().cpu().contiguous()}), sync=True)
    computed_by = getattr(codecs.text_encoder, "computed_by", None)
    return {
        "contract": codecs.contract.to_dict(),
        "height": codecs.height,
        "width": codecs.width,
        "frames": codecs.frames,
        # Text features of another attention or library do not belong into the same shards.
        **({} if computed_by is None else {"text_computed_by": computed_by}),
    }


def probe_files(files: Sequence[MediaFile], tick: Tick, excluded: frozenset[str]) -> list[MediaFile]:
    """Task: probe files."""
    results = []
    for found in files:
        tick(found.path)
        crashed = found.path in excluded
        results.append(replace(found, problem=CRASHED) if crashed else probe_file(found))
    return results


def write_shard(job: ShardJob, tick: Tick, excluded: frozenset[str]) -> ShardResult:
    """Task: read, encode and store the clips of one shard."""
    options = job.options
    codecs = open_bundle(options.codecs, options.device)
    rejected, transient = dict(job.refused), set[str]()
    with ShardWriter(job.path) as writer:
        known = {key for key, (shard, entry) in job.stored.items() if writer.copy(shard, entry)} | rejected.keys()
        new = [planned for planned in job.clips if planned.key not in known]
        for planned, clip, is_transient in _read(new, codecs, tick, excluded):
            if isinstance(clip, str):
                rejected[planned.key] = clip
                if is_transient:
                    transient.add(planned.key)
                continue
            audio = clip.wave is not None and float(clip.wave.abs().max()) >= SILENCE
            if not audio and not planned.still and not options.silent:
                state = "is silent" if clip.wave is not None else "is missing"
                rejected[planned.key] = f"its audio {state} (silent=true takes it)"
                continue
            tensors = encode_clip(
                codecs, clip if audio else replace(clip, wave=None), planned, options.pixels, options.device
            )
            if problem := store(writer, codecs, planned, tensors):
                rejected[planned.key] = problem
    return ShardResult(writer.entries, rejected, frozenset(transient))


def _read(
    clips: Sequence[PlannedClip], codecs: CodecBundle, tick: Tick, excluded: frozenset[str]
) -> Iterator[tuple[PlannedClip, MediaClip | str, bool]]:
    """Every clip, or the reason why it cannot be read and whether that may pass.

    Consecutive clips of a file are read in one pass.
    """
    contract = codecs.contract
    for path, of_file in groupby(clips, key=attrgetter("path")):
        reader: MediaReader | None = None
        failed: Exception | None = None
        with ExitStack() as stack:
            for planned in of_file:
                tick(path)
                if path in excluded:
                    yield planned, CRASHED, True  # perhaps it was killed for its memory
                    continue
                size = planned.large or (planned.height, planned.width)
                try:
                    if planned.still:
                        yield planned, MediaClip(_still(path, size), None), False
                        continue
                    if failed is not None and reader is None:
                        raise failed
                    reader = reader or stack.enter_context(MediaReader(path))
                    clip = reader.read(
                        fps=contract.fps, start=planned.start, frames=planned.frames, size=size,
                        rate=contract.audio_rate, channels=contract.waveform_channels,
                    )  # fmt: skip
                    yield planned, clip, False
                except Exception as error:  # a bug of a decoder must not end the run
                    failed, is_transient = error, _is_transient(error)
                    known = isinstance(error, MediaError)
                    problem = str(error) if known else f"cannot be decoded: {type(error).__name__}: {error}"[:200]
                    yield planned, f"{problem} ({AGAIN})" if is_transient else problem, is_transient


def _is_transient(error: BaseException) -> bool:
    """Whether an error is of the machine, not of the file's bytes."""
    return any(
        isinstance(found, MemoryError) or getattr(found, "errno", None) in (*TRANSIENT, *REMEDIES)
        for found in (error, error.__cause__)
    )


def _still(path: str, size: tuple[int, int]) -> torch.Tensor:
    """An image file, or the only frame of a video file: uint8 [1,H,W,3]."""
    from PIL import UnidentifiedImageError

    try:
        return read_image(path, size)
    except MediaError as error:
        if not isinstance(error.__cause__, UnidentifiedImageError):
            raise
    with MediaReader(path) as reader:
        return reader.read(fps=1000.0, frames=1, size=size).frames


def encode_clip(
    codecs: CodecBundle, clip: MediaClip, planned: PlannedClip, pixels: bool = False, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Tensors of a clip's sample: video, text, audio where the clip has a wave, and what the arguments ask for.

    By itself, because codecs round otherwise in batches: a sample must not depend on the clips that are encoded with it.

    Args:
        clip: at the size of `planned` (`large` where it has one) and at the codecs' frame and sample rate.
        pixels: add the frames.
    """
    from magihuman.flow.super_resolution import shrink_pictures

    frames = clip.frames[None].to(device)  # [1,F,H,W,3]
    pictures = frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    tensors: dict[str, torch.Tensor] = {}
    if planned.large is not None:
        tensors[LARGE] = codecs.video_codec.encode(pictures)[0].cpu()
        # From the same pixels, so that both sizes are aligned to a fraction of a pixel.
        pictures = shrink_pictures(pictures, planned.height, planned.width)
    tensors["video"] = codecs.video_codec.encode(pictures)[0].cpu()
    if pixels:
        tensors["frames"] = ((pictures[0] + 1) * 127.5).round().clamp(0, 255).byte().cpu()  # [3,F,H,W]
    if clip.wave is not None:
        # One audio latent per pixel frame: the wave is as long as the frames, to the sample.
        wave = clip.wave[:, : codecs.audio_codec.hop * planned.frames]
        tensors["audio"] = codecs.audio_codec.encode(wave[None].to(device))[0].cpu()
    tensors["text"] = codecs.text_encoder.encode([planned.caption])[0].cpu()
    return tensors


def store(writer: ShardWriter, codecs: CodecBundle, planned: PlannedClip, tensors: Mapping[str, torch.Tensor]) -> str:
    """Add a clip's sample to a shard; returns why it cannot be, or ""."""
    import torch

    if not all(bool(torch.isfinite(value.half()).all()) for value in tensors.values()):
        return "its latents are not finite in half precision"
    bucket = Bucket(planned.frames, planned.height, planned.width, "audio" in tensors)
    meta = {
        "caption": planned.caption,
        "source": planned.relative.encode("utf-8", "backslashreplace").decode(),
        "fps": codecs.contract.fps,
        "seconds": bucket.frames / codecs.contract.fps,
        "width": bucket.width,
        "height": bucket.height,
        "bucket": str(bucket),
        "has_audio": bucket.audio,
        "start": round(planned.start, 6),
    }
    writer.add(planned.key, str(bucket), tensors, meta)
    return ""
