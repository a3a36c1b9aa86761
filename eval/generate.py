"""Clips of several checkpoints and samplers from the same prompts and noise, timed side by side.

Every batch is sampled in each way in turn, so that times compare although a machine is not always equally busy.
Latents of ways that are measured again and again (a teacher) can be kept in a folder. What is found there is
trusted only if the first batch, sampled anew, gives the same latents.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.puppets import Clips
from eval.trained import trained
from inference.pipeline import Pipeline
from inference.settings import Settings
from magihuman.io.files import atomic_path
from magihuman.io.provenance import code_version, fingerprint
from magihuman.media.images import frames_to_uint8

TIMED = 3  # batches sampled of what is kept, for its time
SAME = 1e-2  # root mean square difference of latents, of deviation 1, that other threads or machines may make


@dataclass
class Way:
    """A checkpoint and its sampling settings, and the clips that came of them.

    Attributes:
        name: of the column.
        keep: whether its latents are worth keeping.
        video [n,C,T,h,w], audio [n,A,Ca]: latents fp32 of all clips, on the CPU.
        seconds: of denoising, per clip, of each batch that was sampled in this process.
        kept: when and with which code kept latents were made; None where all are new.
    """

    name: str
    pipeline: Pipeline
    settings: Settings
    keep: bool = False
    video: Tensor | None = None
    audio: Tensor | None = None
    seconds: list[float] = field(default_factory=list)
    kept: dict[str, Any] | None = None

    @property
    def calls(self) -> int:
        """Network calls per clip; guidance needs two per step."""
        return self.settings.steps * (2 if self.settings.guidance.needed else 1)

    def time(self) -> float:
        """Seconds of denoising per clip: the median over batches."""
        return float(np.median(self.seconds))

    def facts(self) -> dict[str, Any]:
        """What was sampled, for a result file."""
        folder = self.pipeline.folder
        return {
            "checkpoint": {"name": _short(folder), **fingerprint(folder)},
            "sampling": self.settings.to_dict(),
            "calls": self.calls,
            "seconds_per_clip": self.time(),
            "seconds_of_batches": [round(value, 4) for value in self.seconds],
            "kept": self.kept,
            "trained": trained(folder.parent if folder.name == "export" else folder),
        }

    def clips(self, prompts: Sequence[str], first: int, batch: int = 10) -> Clips:
        """Decoded clips of the latents from number `first` on, one per prompt."""
        assert self.video is not None
        assert self.audio is not None
        codecs, made = self.pipeline.codecs, Clips(captions=list(prompts))
        for start in range(first, first + len(prompts), batch):
            part = slice(start, min(start + batch, first + len(prompts)))
            made.frames += list(frames_to_uint8(codecs.video_codec.decode(self.video[part])).numpy())
            waves = codecs.audio_codec.decode(self.audio[part]).float().mean(1)
            made.waves += list(waves.clamp(-1, 1).numpy())
        return made


def noise_seed(seed: int, index: int) -> int:
    """Of the clip of prompt `index`; that of `eval.puppets`, so that clips are the same ones."""
    return seed * 1_000_003 + index


def sample_all(
    ways: Sequence[Way],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch: int = 10,
    folder: Path | None = None,
    progress: bool = True,
) -> None:
    """Fill the latents and the times of all ways.

    Clips are numbered seed by seed: number s * len(prompts) + p is prompt p under the s-th seed.

    Args:
        batch: clips sampled at once; changes memory and speed only.
        folder: where latents are kept; None keeps nothing.
    """
    from tqdm import tqdm

    texts = list(prompts) * len(seeds)
    noise = [noise_seed(seed, index) for seed in seeds for index in range(len(prompts))]
    stores = {way.name: _Store(way, texts, noise, folder) for way in ways if way.keep and folder is not None}
    for store in stores.values():
        store.read()
    batches = [slice(first, first + batch) for first in range(0, len(texts), batch)]
    made: dict[str, list[tuple[Tensor, Tensor]]] = {way.name: [] for way in ways}
    total = sum(way.calls for _, way in _turns(ways, batches))
    with tqdm(total=total, desc="sampling", unit="call", disable=not progress) as bar:
        for part, way in _turns(ways, batches):
            bar.set_postfix_str(way.name)
            latents = _sampled(way, texts[part], noise[part])
            if way.kept is not None and not made[way.name] and not _same(way, part, latents):
                way.kept = way.video = way.audio = None  # made by other code
            made[way.name].append(latents)
            bar.update(way.calls)
    for way in ways:
        if way.kept is None:
            way.video, way.audio = (torch.cat(parts) for parts in zip(*made[way.name], strict=True))
            if way.name in stores:
                stores[way.name].write()


def _turns(ways: Sequence[Way], batches: Sequence[slice]) -> Iterator[tuple[slice, Way]]:
    """Every batch in every way; of what is kept, `TIMED` batches are enough."""
    for number, part in enumerate(batches):
        for way in ways:
            if way.kept is None or number < TIMED:
                yield part, way


def _sampled(way: Way, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    before = way.pipeline.times["sample"]
    drafts = way.pipeline.draft(prompts, seeds, way.settings)
    way.seconds.append((way.pipeline.times["sample"] - before) / len(prompts))
    return torch.stack([d.video for d in drafts]), torch.stack([d.audio for d in drafts])


def _same(way: Way, part: slice, latents: tuple[Tensor, Tensor]) -> bool:
    assert way.video is not None
    assert way.audio is not None
    pairs = zip((way.video[part], way.audio[part]), latents, strict=True)
    return all(float((old - new).square().mean().sqrt()) < SAME for old, new in pairs)


def _short(folder: Path) -> str:
    """A checkpoint's folder as its user knows it, without what lies above on this machine."""
    parts = folder.parts[:-1] if folder.name == "export" else folder.parts
    return "/".join(parts[-2:])


@dataclass
class _Store:
    """Kept latents of one way: a file whose name says all that they depend on, but for the code."""

    way: Way
    prompts: list[str]
    seeds: list[int]
    folder: Path | None

    @property
    def file(self) -> Path:
        assert self.folder is not None
        pipeline = self.way.pipeline
        key = {
            "checkpoint": fingerprint(pipeline.folder)["sha256"],
            "world": repr(pipeline.codecs.contract),
            "settings": self.way.settings.to_dict(),
            "dtype": pipeline.dtype,
            "clips": list(zip(self.prompts, self.seeds, strict=True)),
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"latents-{name}.safetensors"

    def read(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, "pt") as tensors:
                self.way.video, self.way.audio = tensors.get_tensor("video"), tensors.get_tensor("audio")
                self.way.kept = json.loads(tensors.metadata()["made"])
        except (OSError, SafetensorError):  # not there yet, or cut off
            self.way.video = self.way.audio = self.way.kept = None

    def write(self) -> None:
        from safetensors.torch import save_file

        assert self.way.video is not None
        assert self.way.audio is not None
        self.file.parent.mkdir(parents=True, exist_ok=True)
        made = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "code": code_version()}
        tensors = {"video": self.way.video.contiguous(), "audio": self.way.audio.contiguous()}
        with atomic_path(self.file) as partial:
            save_file(tensors, partial, {"made": json.dumps(made)})
