"""Checkpoints of puppet worlds, and timed sampling of several of them from the same prompts and noise.

Every batch is sampled by each sampler before the next, so that times compare on a machine whose load changes. Latents
that are measured again and again (a teacher's) can be cached in a folder; the cache is used only if the first batch,
sampled anew, gives the same latents.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tiny.puppets import WORLDS
from eval.clips import Clips, noise_seed
from eval.output import training_record
from magihuman.errors import NotApplicable, UserError
from magihuman.io.files import atomic_path
from magihuman.io.provenance import code_version, fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from inference.pipeline import Pipeline
    from inference.settings import Settings

TIMED = 3  # batches sampled of a cached sampler, for its time
SAME = 1e-2  # root mean square difference of latents, of deviation 1, that other threads or machines may make


def require_tiny(command: str, *checkpoints: str) -> str:
    """Refuse checkpoints that are unknown, which needs no torch, or not of one puppet world, whose name is returned.

    Raises:
        UserError: the first such checkpoint.
    """
    from magihuman import zoo

    for name in checkpoints:
        zoo.find(name)
    for name in checkpoints:
        if (codecs := zoo.config_of(name).codecs) not in WORLDS:
            raise NotApplicable(f"{command} measures puppets ({', '.join(WORLDS)}), and {name} is of {codecs!r}")
    worlds = {name: zoo.config_of(name).codecs for name in checkpoints}
    if len(set(worlds.values())) > 1:
        listed = ", ".join(f"{name} is of {world}" for name, world in worlds.items())
        raise UserError(
            f"{command} compares checkpoints of one world: {listed}; give teacher= or base= of the same world"
        )
    return worlds[checkpoints[0]]


def tiny_pipelines(command: str, *checkpoints: str, device: str) -> "list[Pipeline]":
    """Checkpoints of one puppet world with the same codecs, on the device auto, cpu or cuda; see `require_tiny`.

    The tier is `exact`, which gives the reference's bits in less time; the products are fp32 on the CPU, bf16 on a GPU.
    """
    world = require_tiny(command, *checkpoints)
    import torch

    from inference.fast import prepare
    from inference.pipeline import Pipeline
    from magihuman import zoo
    from magihuman.codecs.bundle import load_bundle

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    codecs = load_bundle(world)
    loaded = (zoo.load(name, chosen) for name in checkpoints)
    return [Pipeline(replace(one, denoiser=prepare(one.denoiser, "exact", release=True)), codecs) for one in loaded]


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
    video: "Tensor" = field(init=False)
    audio: "Tensor" = field(init=False)
    seconds: list[float] = field(default_factory=list)
    cached: dict[str, Any] | None = None

    @property
    def calls(self) -> int:
        """Network calls per clip; guidance needs two per step."""
        return self.settings.steps * (2 if self.settings.guidance.needed else 1)

    def facts(self) -> dict[str, Any]:
        """Checkpoint, settings, times and training, for a result file."""
        folder = self.pipeline.folder
        known = folder.parent if folder.name == "export" else folder  # as its user knows it
        return {
            "checkpoint": {"name": "/".join(known.parts[-2:]), **fingerprint(folder)},
            "sampling": self.settings.to_dict(),
            "calls": self.calls,
            "seconds_per_clip": float(np.median(self.seconds)),
            "seconds_of_batches": [round(value, 4) for value in self.seconds],
            "kept": self.cached,
            "trained": training_record(known),
        }

    def clips(self, prompts: Sequence[str], first: int, batch: int = 10) -> Clips:
        """Decoded clips of the latents from number `first` on, one per prompt."""
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
    files = {s.name: _cache_file(folder, s, texts, noise) for s in samplers if s.cache and folder is not None}
    for sampler in samplers:
        if sampler.name in files:
            _read_cache(sampler, files[sampler.name])
    batches = [slice(first, first + batch) for first in range(0, len(texts), batch)]
    made: dict[str, list[tuple[Tensor, Tensor]]] = {sampler.name: [] for sampler in samplers}
    total = sum(sampler.calls for _, sampler in _schedule(samplers, batches))
    with tqdm(total=total, desc="sampling", unit="call", disable=not progress) as bar:
        for part, sampler in _schedule(samplers, batches):
            bar.set_postfix_str(sampler.name)
            before = sampler.pipeline.times["sample"]
            drafts = sampler.pipeline.draft(texts[part], noise[part], sampler.settings)
            sampler.seconds.append((sampler.pipeline.times["sample"] - before) / len(drafts))
            latents = torch.stack([d.video for d in drafts]), torch.stack([d.audio for d in drafts])
            if sampler.cached is not None and not made[sampler.name]:
                pairs = zip((sampler.video[part], sampler.audio[part]), latents, strict=True)
                if any(float((old - new).square().mean().sqrt()) >= SAME for old, new in pairs):
                    sampler.cached = None  # made by other code
            made[sampler.name].append(latents)
            bar.update(sampler.calls)
    for sampler in samplers:
        if sampler.cached is None:
            sampler.video, sampler.audio = (torch.cat(parts) for parts in zip(*made[sampler.name], strict=True))
            if sampler.name in files:
                _write_cache(sampler, files[sampler.name])


def _schedule(samplers: Sequence[Sampler], batches: Sequence[slice]) -> Iterator[tuple[slice, Sampler]]:
    """Every batch with every sampler; `TIMED` batches are enough of cached ones."""
    for number, part in enumerate(batches):
        for sampler in samplers:
            if sampler.cached is None or number < TIMED:
                yield part, sampler


def _cache_file(folder: Path, sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int]) -> Path:
    """File of a sampler's latents; its name hashes all that they depend on, except the code."""
    key = {
        "checkpoint": fingerprint(sampler.pipeline.folder)["sha256"],
        "world": repr(sampler.pipeline.codecs.contract),
        "settings": sampler.settings.to_dict(),
        "dtype": sampler.pipeline.dtype,
        "clips": list(zip(prompts, seeds, strict=True)),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"latents-{name}.safetensors"


def _read_cache(sampler: Sampler, file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            sampler.video, sampler.audio = tensors.get_tensor("video"), tensors.get_tensor("audio")
            sampler.cached = json.loads(tensors.metadata()["made"])
    except (OSError, SafetensorError):  # not there yet, or cut off
        sampler.cached = None


def _write_cache(sampler: Sampler, file: Path) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    made = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "code": code_version()}
    tensors = {"video": sampler.video.contiguous(), "audio": sampler.audio.contiguous()}
    with atomic_path(file) as partial:
        save_file(tensors, partial, {"made": json.dumps(made)})
