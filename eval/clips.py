"""Clips of puppets that are evaluated: held-out puppets, their ground truth, and the same through the codec.

    truth = ground_truth(held_out(40))
    scores = through_codec(truth, load_bundle("scene")).score()

The puppets are 0, 1, 2, ... of the seed `HELD_OUT_SEED`; no recipe trains on that seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.tiny.puppets import FPS, SAMPLE_RATE, Puppet, draw_puppet, render, synthesise
from eval.processes import in_processes
from eval.puppet_scores import ClipScore
from eval.scores import Scores, score_clips

if TYPE_CHECKING:
    from torch import Tensor

    from magihuman.codecs.bundle import CodecBundle

HELD_OUT_SEED = 1_000_003
BOUND = "through codec"


@dataclass
class Clips:
    """A set of clips: frames uint8 [F,H,W,3], waves fp32 [N] or None, captions."""

    frames: list[np.ndarray] = field(default_factory=list)
    waves: list[np.ndarray | None] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)

    def score(self, reference: Scores | None = None) -> Scores:
        return score_clips(self.frames, self.waves, self.captions, reference)

    def add(self, frames: "Tensor", waves: "Tensor", captions: Sequence[str]) -> None:
        """Append decoded clips: frames [B,3,F,H,W] in [-1,1], waves [B,channels,N]."""
        from magihuman.media.images import frames_to_uint8

        self.frames += list(frames_to_uint8(frames).numpy())
        self.waves += list(waves.float().mean(1).clamp(-1, 1).numpy())
        self.captions += captions

    def as_tensors(self, part: slice) -> "tuple[Tensor, Tensor]":
        """Clips of `part` as codecs encode them: frames fp32 [B,3,F,H,W] in [-1,1], waves fp32 [B,1,N].

        Clips without audio get silence.
        """
        import torch

        silence = np.zeros(len(self.frames[part.start]) * SAMPLE_RATE // FPS)
        waves = np.stack([silence if wave is None else wave for wave in self.waves[part]])
        return frames_tensor(self.frames[part]), torch.from_numpy(waves).float()[:, None]


@dataclass(frozen=True)
class SheetColumn:
    """A column on a contact sheet: its clips, of which the first are shown, and the scores of these."""

    name: str
    role: str
    clips: Clips
    scores: Sequence[ClipScore]

    def write(self, folder: Path, name: str, digits: int = 1) -> list[Path]:
        """Write the shown clips as NAME-0.mp4, ... with their captions in .txt files; returns the mp4 files."""
        from magihuman.media.mp4 import write_mp4

        paths = [folder / f"{name}-{number:0{digits}}.mp4" for number in range(len(self.scores))]
        for path, movie, wave, caption in zip(
            paths, self.clips.frames, self.clips.waves, self.clips.captions, strict=False
        ):
            write_mp4(path, movie, FPS, None if wave is None else wave[None], SAMPLE_RATE)
            path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
        return paths


def frames_tensor(clips: Sequence[np.ndarray]) -> "Tensor":
    """Clips uint8 [F,H,W,3] as codecs encode them: fp32 [B,3,F,H,W] in [-1,1]."""
    import torch

    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def held_out(count: int, world: str = "tiny") -> list[Puppet]:
    """The first `count` puppets of a world that no training sees, with pairs of attributes that none sees."""
    return [draw_puppet(HELD_OUT_SEED, index, world, novel=True) for index in range(count)]


def ground_truth(puppets: Sequence[Puppet], size: int = 64) -> Clips:
    """The puppets as they are drawn and spoken."""
    drawn = in_processes(partial(_drawn, size=size), puppets)
    return Clips([frames for frames, _ in drawn], [wave for _, wave in drawn], [p.caption for p in puppets])


def _drawn(puppet: Puppet, size: int) -> tuple[np.ndarray, np.ndarray]:
    return render(puppet, size), synthesise(puppet)


def through_codec(clips: Clips, codecs: "CodecBundle", batch: int = 8) -> Clips:
    """The same clips encoded and decoded again by the puppets' codecs."""
    result = Clips()
    for start in range(0, len(clips.frames), batch):
        part = slice(start, start + batch)
        frames, waves = clips.as_tensors(part)
        video, audio = codecs.video_codec, codecs.audio_codec
        result.add(video.decode(video.encode(frames)), audio.decode(audio.encode(waves)), clips.captions[part])
    return result


def noise_seed(seed: int, index: int) -> int:
    """Seed of the noise of prompt `index`: a clip depends neither on the batch nor on the number of prompts."""
    return seed * 1_000_003 + index
