"""Diversity of attributes not fixed by the caption, and energy distance between generated and real clips.

A puppet's caption (`data.tiny.puppets`) leaves open the skin tone, the voice's pitch and the times of the syllables, in the
world `scene` also the object on the wall and often place, size, voice and background sound. A model may lose that variety
without an error in any prompted attribute. Clips of one prompt are therefore compared with each other, and with real puppets
of the same caption, in the latents of the codec's encoder. Real and generated clips are both encoded from decoded frames and
audio: only differences in these count, and losses of the codec are not attributed to a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tiny.puppets import WORLDS, Puppet, draw_puppet
from eval.clips import HELD_OUT_SEED, Clips, ground_truth, through_codec

if TYPE_CHECKING:
    from magihuman.codecs.bundle import CodecBundle

SPACES = ("look", "motion", "voice")
REFERENCE_DRAWS = 6  # real puppets per caption of the reference: twice every skin tone
DRAWS_APART = 100_000  # between puppet numbers of one draw and the next: beyond any number of prompts


def real_draw(puppets: Sequence[Puppet], draw: int) -> list[Puppet]:
    """Other puppets with the same captions: attributes that a caption leaves open are drawn anew.

    Args:
        draw: number of the draw; 0 gives the puppets themselves.
    """
    if draw == 0:
        return list(puppets)
    return [
        draw_puppet(HELD_OUT_SEED, draw * DRAWS_APART + index, puppet.world, like=puppet)
        for index, puppet in enumerate(puppets)
    ]


def embed(clips: Clips, codecs: "CodecBundle", batch: int = 10) -> dict[str, np.ndarray]:
    """Clips as vectors fp32 [n,D] in each of `SPACES`, with entries of deviation about 1.

    look    appearance: latents of the frames, averaged over time (identity, sharpness, saturation)
    motion  standard deviation over time of every entry: how much moves where, at any time
    voice   latents of the audio: pitch, timbre and times
    """
    import torch

    parts: dict[str, list[Any]] = {space: [] for space in SPACES}
    with torch.no_grad():
        for first in range(0, len(clips.frames), batch):
            part = slice(first, first + batch)
            frames, waves = clips.as_tensors(part)
            video = codecs.video_codec.encode(frames)  # [B,C,T,h,w]
            parts["look"].append(video.mean(2).flatten(1))
            parts["motion"].append(video.std(2).flatten(1))
            parts["voice"].append(codecs.audio_codec.encode(waves).flatten(1))
    return {space: torch.cat(values).numpy() for space, values in parts.items()}


def by_prompt(draws: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Embeddings of S draws of P prompts, [P,D] each -> [P,S,D]."""
    return {space: np.stack([draw[space] for draw in draws], 1) for space in SPACES}


def distances_within(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square differences [P,S,R] of clips [P,S,D] and [P,R,D], within each prompt."""
    return np.sqrt(np.square(a[:, :, None] - b[:, None]).mean(-1))


def distances_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Root mean square differences [P,P] of clips [P,S,D] and [P,R,D], each the mean over a pair of prompts."""
    x, y = (c.reshape(-1, c.shape[-1]).astype(np.float64) for c in (a, b))
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
    distances = np.sqrt(np.maximum(squares, 0) / x.shape[1])
    return distances.reshape(len(a), -1, len(b), b.shape[1]).mean((1, 3))


@dataclass(frozen=True)
class DistributionMetrics:
    """Diversity of a set of clips and its distances to real ones.

    Attributes:
        dispersion: space -> mean distance of different clips of a prompt [P]; absent with one clip per prompt.
        nearest: distance in appearance to the nearest of a few real puppets of the prompt [P,S].
        energy: space -> mean distances between prompts [P,P]: of these clips and real ones, of these clips, of real
            ones; the statistic is 2 x first - second - third over pairs of different prompts, see `Reference`.
    """

    dispersion: dict[str, np.ndarray]
    nearest: np.ndarray
    energy: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


class Reference:
    """Real puppets with the prompts' captions, through the codec: the reference of `DistributionMetrics`.

    Distances between distributions are energy distances (Szekely and Rizzo 2013), 2 E|X-Y| - E|X-X'| - E|Y-Y'|, of
    clips minus the mean of a few real ones of their caption, which cancels the prompt's own attributes.
    Clips of different prompts are compared, so the estimate is unbiased: two real samples have distance 0 but for
    noise. Blur and over-saturation, a lost mode and an in-between one all move it away from 0.

    Args:
        puppets: of the prompts.
        first_draw: number of the first draw of real puppets; the draws before it are left to what is compared.
    """

    def __init__(self, puppets: Sequence[Puppet], codecs: "CodecBundle", first_draw: int) -> None:
        skin = WORLDS[puppets[0].world].attributes["skin"]
        found = []
        for draw in range(REFERENCE_DRAWS):
            drawn = real_draw(puppets, first_draw + draw)
            if skin.shares is None:  # every tone equally often: fewer puppets, less noise
                tones = skin.values
                drawn = [replace(puppet, skin=tones[(index + draw) % len(tones)]) for index, puppet in enumerate(drawn)]
            found.append(embed(through_codec(ground_truth(drawn), codecs), codecs))
        half = REFERENCE_DRAWS // 2
        real, centre, self.target = by_prompt(found), by_prompt(found[:half]), by_prompt(found[half:])
        self.look = real["look"]
        self.centre = {space: centre[space].mean(1, keepdims=True) for space in SPACES}
        self.among = {
            space: distances_between(self._of(self.target, space), self._of(self.target, space)) for space in SPACES
        }

    def _of(self, clips: dict[str, np.ndarray], space: str) -> np.ndarray:
        return clips[space] - self.centre[space]

    def distances(self, clips: dict[str, np.ndarray]) -> DistributionMetrics:
        """Compare embedded clips [P,S,D] of the same prompts."""
        dispersion, energy = {}, {}
        for space in SPACES:
            own, count = self._of(clips, space), clips[space].shape[1]
            if count > 1:
                dispersion[space] = distances_within(own, own).sum((1, 2)) / (count * (count - 1))
            across = distances_between(own, self._of(self.target, space))
            energy[space] = (across, distances_between(own, own), self.among[space])
        return DistributionMetrics(dispersion, distances_within(clips["look"], self.look).min(2), energy)
