"""Timed sampling of several checkpoints and samplers from the same prompts and noise.

Every batch is sampled by each sampler before the next, so that times compare on a machine whose load changes. Latents
that are measured again and again (a teacher's) can be cached in a folder; the cache is used only if the first batch,
sampled anew, gives the same latents.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.output import training_record
from eval.puppets import Clips, noise_seed
from magihuman.io.files import atomic_path
from magihuman.io.provenance import code_version, fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from inference.pipeline import Pipeline
    from inference.settings import Settings

TIMED = 3  # batches sampled of a cached sampler, for its time
SAME = 1e-2  # root mean square difference of latents, of deviation 1, that other threads or machines may make


@dataclass
class Sampler:
    """A checkpoint with its sampling settings, and the clips sampled so.

    Attributes:
        name: of the column.
        cache: whether its latents are worth caching.
        video [n,C,T,h,w], audio [n,A,Ca]: latents fp32 of all clips, on the CPU.
        seconds: of denoising, per clip, of each batch that was sampled in this process.
        cached: date and code of the cached latents; None where all are new.
    """

    name: str
    pipeline: "Pipeline"
    settings: "Settings"
    cache: bool = False
    video: "Tensor | None" = None
    audio: "Tensor | None" = None
    seconds: list[float] = field(default_factory=list)
    cached: dict[str, Any] | None = None

    @property
    def calls(self) -> int:
        """Network calls per clip; guidance needs two per step."""
        return self.settings.steps * (2 if self.settings.guidance.needed else 1)

    def time(self) -> float:
        """Seconds of denoising per clip: the median over batches."""
        return float(np.median(self.seconds))

    def facts(self) -> dict[str, Any]:
        """Checkpoint, settings, times and training, for a result file."""
        folder = self.pipeline.folder
        return {
            "checkpoint": {"name": _short(folder), **fingerprint(folder)},
            "sampling": self.settings.to_dict(),
            "calls": self.calls,
            "seconds_per_clip": self.time(),
            "seconds_of_batches": [round(value, 4) for value in self.seconds],
            "kept": self.cached,
            "trained": training_record(folder.parent if folder.name == "export" else folder),
        }

    def clips(self, prompts: Sequence[str], first: int, batch: int = 10) -> Clips:
        """Decoded clips of the latents from number `first` on, one per prompt."""
        assert self.video is not None
        assert self.audio is not None
        codecs, made = self.pipeline.codecs, Clips()
        for start in range(first, first + len(prompts), batch):
            part = slice(start, min(start + batch, first + len(prompts)))
            made.add(
                codecs.video_codec.decode(self.video[part]), codecs.audio_codec.decode(self.audio[part]),
                prompts[start - first : part.stop - first],
            )  # fmt: skip
        return made


def sample_all(
    samplers: Sequence[Sampler],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch: int = 10,
    folder: Path | None = None,
    progress: bool = True,
) -> None:
    """Fill the latents and the times of all samplers.

    Clips are numbered seed by seed: number s * len(prompts) + p is prompt p under the s-th seed.

    Args:
        batch: clips sampled at once; changes memory and speed only.
        folder: of the cache; None caches nothing.
    """
    import torch
    from tqdm import tqdm

    texts = list(prompts) * len(seeds)
    noise = [noise_seed(seed, index) for seed in seeds for index in range(len(prompts))]
    stores = {s.name: _Store(s, texts, noise, folder) for s in samplers if s.cache and folder is not None}
    for store in stores.values():
        store.read()
    batches = [slice(first, first + batch) for first in range(0, len(texts), batch)]
    made: dict[str, list[tuple[Tensor, Tensor]]] = {sampler.name: [] for sampler in samplers}
    total = sum(sampler.calls for _, sampler in _schedule(samplers, batches))
    with tqdm(total=total, desc="sampling", unit="call", disable=not progress) as bar:
        for part, sampler in _schedule(samplers, batches):
            bar.set_postfix_str(sampler.name)
            latents = _sampled(sampler, texts[part], noise[part])
            if sampler.cached is not None and not made[sampler.name] and not _same(sampler, part, latents):
                sampler.cached = sampler.video = sampler.audio = None  # made by other code
            made[sampler.name].append(latents)
            bar.update(sampler.calls)
    for sampler in samplers:
        if sampler.cached is None:
            sampler.video, sampler.audio = (torch.cat(parts) for parts in zip(*made[sampler.name], strict=True))
            if sampler.name in stores:
                stores[sampler.name].write()


def _schedule(samplers: Sequence[Sampler], batches: Sequence[slice]) -> Iterator[tuple[slice, Sampler]]:
    """Every batch with every sampler; `TIMED` batches are enough of cached ones."""
    for number, part in enumerate(batches):
        for sampler in samplers:
            if sampler.cached is None or number < TIMED:
                yield part, sampler


def _sampled(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int]) -> "tuple[Tensor, Tensor]":
    import torch

    before = sampler.pipeline.times["sample"]
    drafts = sampler.pipeline.draft(prompts, seeds, sampler.settings)
    sampler.seconds.append((sampler.pipeline.times["sample"] - before) / len(prompts))
    return torch.stack([d.video for d in drafts]), torch.stack([d.audio for d in drafts])


def _same(sampler: Sampler, part: slice, latents: "tuple[Tensor, Tensor]") -> bool:
    assert sampler.video is not None
    assert sampler.audio is not None
    pairs = zip((sampler.video[part], sampler.audio[part]), latents, strict=True)
    return all(float((old - new).square().mean().sqrt()) < SAME for old, new in pairs)


def _short(folder: Path) -> str:
    """Last two parts of a checkpoint's folder, as its user knows it."""
    parts = folder.parts[:-1] if folder.name == "export" else folder.parts
    return "/".join(parts[-2:])


@dataclass
class _Store:
    """Cached latents of one sampler: a file whose name hashes all that they depend on, except the code."""

    sampler: Sampler
    prompts: list[str]
    seeds: list[int]
    folder: Path | None

    @property
    def file(self) -> Path:
        assert self.folder is not None
        pipeline = self.sampler.pipeline
        key = {
            "checkpoint": fingerprint(pipeline.folder)["sha256"],
            "world": repr(pipeline.codecs.contract),
            "settings": self.sampler.settings.to_dict(),
            "dtype": pipeline.dtype,
            "clips": list(zip(self.prompts, self.seeds, strict=True)),
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"latents-{name}.safetensors"

    def read(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, "pt") as tensors:
                self.sampler.video, self.sampler.audio = (tensors.get_tensor("video"), tensors.get_tensor("audio"))
                self.sampler.cached = json.loads(tensors.metadata()["made"])
        except (OSError, SafetensorError):  # not there yet, or cut off
            self.sampler.video = self.sampler.audio = self.sampler.cached = None

    def write(self) -> None:
        from safetensors.torch import save_file

        assert self.sampler.video is not None
        assert self.sampler.audio is not None
        self.file.parent.mkdir(parents=True, exist_ok=True)
        made = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "code": code_version()}
        tensors = {"video": self.sampler.video.contiguous(), "audio": self.sampler.audio.contiguous()}
        with atomic_path(self.file) as partial:
            save_file(tensors, partial, {"made": json.dumps(made)})
