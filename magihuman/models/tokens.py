"""Latents to tokens and back, packing of a batch, and `Layout`, the description of a packed batch.

    layout = Layout.build((T, h // p, w // p), audio=A, text=[S])   # one sample
    tokens = patchify(latents, p)                                   # [B,C,T,h,w] -> [B,N,C p p]

Symbols used in the whole code base: B batch, T latent frames, h w latent height and width, C latent channels,
p patch size, N = T (h/p) (w/p) video tokens of a sample, A audio latents, S text tokens, L packed tokens of the
whole batch, H hidden size, D head dimension, K solver steps, sigma noise level (1 = noise),
v velocity = noise - x0.

Packing is **modality-major**: the video tokens of all samples, then all audio, then all text, so that every
expert has one contiguous slice and token-wise operations need no permutation. For one sample this
is the released order. Samples of a batch share T, h, w and A; only their text lengths differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from magihuman.models.config import COORDS_STYLES

VIDEO, AUDIO, TEXT = 0, 1, 2


def patchify(z: Tensor, patch: int) -> Tensor:
    """Video latents [B,C,T,h,w] -> tokens [B,N,C p p]; channels of a token in the order (C, row, column).

    Raises:
        ValueError: when h or w is not a multiple of the patch size.
    """
    height, width = z.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {patch} x {patch}")
    grid = z.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # [B,C,T,h/p,p,w/p,p]
    return grid.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: int, channels: int) -> Tensor:
    """Model output [B,N,p p C], channels last inside a token, -> latents [B,C,T,h,w] (SPEC 2).

    Not the inverse of `patchify`: the released model writes its output in a different channel order than its input (O5).

    Args:
        grid: (T, h, w) of the latents.
    """
    frames, height, width = grid
    x = tokens.reshape(-1, frames, height // patch, width // patch, patch, patch, channels)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(-1, channels, frames, height, width)


def pad_or_trim(features: Tensor, length: int) -> tuple[Tensor, int]:
    """Text features [B,n,Ct] -> ([B,length,Ct] zero-padded or cut, true length min(n, length)) (SPEC 5)."""
    true_length = min(features.shape[1], length)
    padded = features.new_zeros(features.shape[0], length, *features.shape[2:])
    padded[:, :true_length] = features[:, :true_length]
    return padded, true_length


@dataclass(frozen=True, eq=False)
class Layout:
    """Lengths, coordinates and modality of all tokens of a packed batch; made once per request or batch, immutable.

    Attributes:
        video_len, audio_len: tokens per sample; text_lens: S of each sample.
        frames: latent frames T, for local attention; 0 for routed tokens.
        coords: fp32 [L,9] in packed order.
        modality: int64 [L]: 0 video, 1 audio, 2 text.
        order, inverse: int64 [L], or None for one sample. Permutation from packed to sample-major order, in which
            samples are sorted by length, and its inverse.
        groups: (samples, length) of each run of equal lengths in sample-major order.
        cu_seqlens: int32 [B+1], starts of the samples in sample-major order.
        rotary: fp32 [L, 3D/4] table for a model, or None.
        block_masks: cache of FlexAttention's block masks by window (`magihuman.models.attention`).
    """

    video_len: int
    audio_len: int
    text_lens: tuple[int, ...]
    frames: int
    coords: Tensor
    modality: Tensor
    order: Tensor | None
    inverse: Tensor | None
    groups: tuple[tuple[int, int], ...]
    cu_seqlens: Tensor
    rotary: Tensor | None = None
    block_masks: dict[int | None, Any] = field(default_factory=dict, init=False, repr=False)
    _routes: dict[tuple[int, int, tuple[int, ...]], "Layout"] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls,
        video_grid: tuple[int, int, int],
        audio: int,
        text: Sequence[int],
        *,
        coords_style: str = "v2",
        text_offset: int = 0,
        device: torch.device | str = "cpu",
    ) -> "Layout":
        """Lay out a batch of len(text) samples.

        Args:
            video_grid: (T, h/p, w/p) of each sample.
            audio: audio tokens of each sample; 0 without audio.
            text: text tokens of each sample.
            text_offset: first text position, style v1 only.

        Raises:
            ValueError: for an unknown style, an empty batch, or lengths for which style v1 has no positions
                (one text token, or one audio token with several frames: SPEC 2.1).
        """
        coords = _coords(video_grid, audio, text, coords_style, text_offset)
        frames, rows, columns = video_grid
        return cls._assemble(frames * rows * columns, audio, tuple(text), frames, coords.to(device))

    @classmethod
    def _assemble(cls, video: int, audio: int, text: tuple[int, ...], frames: int, coords: Tensor) -> "Layout":
        device, batch = coords.device, len(text)
        sizes = torch.tensor([batch * video, batch * audio, sum(text)])
        modality = torch.repeat_interleave(torch.arange(3), sizes).to(device)
        by_length = sorted(range(batch), key=lambda i: text[i])
        lengths = [video + audio + text[i] for i in by_length]
        groups = tuple((lengths.count(n), n) for n in sorted(set(lengths)))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        order = inverse = None
        if batch > 1:
            order = torch.cat([_rows(i, video, audio, text) for i in by_length])
            inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).to(device)
            order = order.to(device)
        return cls(video, audio, text, frames, coords, modality, order, inverse, groups, cu_seqlens)

    @property
    def batch(self) -> int:
        return len(self.text_lens)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Packed rows of video, audio and text; the expert slices."""
        return self.batch * self.video_len, self.batch * self.audio_len, sum(self.text_lens)

    @property
    def length(self) -> int:
        return sum(self.sizes)

    @property
    def max_seqlen(self) -> int:
        return self.groups[-1][1]

    @property
    def uniform(self) -> bool:
        """All samples have the same length."""
        return len(self.groups) == 1

    def sample_rows(self, sample: int) -> Tensor:
        """Packed rows of one sample in the released order video, audio, text; int64 on the CPU."""
        return _rows(sample, self.video_len, self.audio_len, self.text_lens)

    def with_rotary(self, table: Tensor) -> "Layout":
        return replace(self, rotary=table)

    def attend(
        self, attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, backend: str, window: int | None
    ) -> Tensor:
        """`attention` of these tokens; overridden by layouts that are one process's share of a sequence."""
        return attention(q, k, v, self, backend, window)

    def route(self, rate: float) -> tuple[Tensor, "Layout"]:
        """Draw the tokens that take part in routed layers: the same share of each modality of each sample.

        Counts depend on lengths only, so there is no synchronisation with the device.

        Returns:
            rows: int64 [L'], packed rows kept, ascending; and the layout of the kept tokens.
        """
        device = self.coords.device

        def keep(length: int) -> int:
            return min(length, max(1, round(rate * length)))

        def draw(samples: int, length: int, start: int) -> Tensor:
            score = torch.rand(samples, length, device=device)
            kept = score.argsort(dim=1)[:, : keep(length)].sort(dim=1).values
            return (kept + start + length * torch.arange(samples, device=device).unsqueeze(1)).flatten()

        video, audio, _ = self.sizes
        parts = [draw(self.batch, self.video_len, 0), draw(self.batch, self.audio_len, video)]
        start = video + audio
        runs = [(self.batch, self.text_lens[0])] if self.uniform else [(1, n) for n in self.text_lens]
        for samples, length in runs:
            parts.append(draw(samples, length, start))
            start += samples * length
        rows = torch.cat(parts)
        table = None if self.rotary is None else self.rotary[rows]
        return rows, replace(self._routed(keep), coords=self.coords[rows], rotary=table)

    def _routed(self, keep: Callable[[int], int]) -> "Layout":
        """Layout of the kept tokens without coordinates; equal for every draw, so cached."""
        lengths = keep(self.video_len), keep(self.audio_len), tuple(keep(n) for n in self.text_lens)
        if lengths not in self._routes:
            # Frames lose tokens unequally, so windows of frames have no meaning here: frames = 0.
            self._routes[lengths] = self._assemble(*lengths, 0, self.coords[:0])
        return self._routes[lengths]


def _rows(sample: int, video: int, audio: int, text: Sequence[int]) -> Tensor:
    batch, before = len(text), sum(text[:sample])
    first_audio, first_text = batch * video, batch * (video + audio)
    return torch.cat(
        [
            torch.arange(sample * video, (sample + 1) * video),
            torch.arange(first_audio + sample * audio, first_audio + (sample + 1) * audio),
            torch.arange(first_text + before, first_text + before + text[sample]),
        ]
    )


def _coords(grid: tuple[int, int, int], audio: int, text: Sequence[int], style: str, offset: int) -> Tensor:
    """Packed coordinates fp32 [L,9] (SPEC 2.1), on the CPU."""
    frames, rows, columns = grid
    if style not in COORDS_STYLES:
        raise ValueError(f"unknown coordinates style {style!r}; choose v1 or v2")
    if not text:
        raise ValueError("a batch needs at least one sample; text holds one length per sample")
    if style == "v1" and 1 in text:
        raise ValueError("coordinates v1 have no position for a single text token; use two or more, or style v2")
    if style == "v1" and audio == 1 and frames > 1:
        raise ValueError("coordinates v1 have no scale for a single audio token with several video frames")
    position = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).view(-1, 3)
    video = _coordinate_rows(position, grid, grid)
    audio_frames = frames if style == "v1" else (audio - 1) // 4 + 1
    audio_rows = _coordinate_rows(_on_time_axis(audio), (audio, 1, 1), (audio_frames, 1, 1))
    words = []
    for length in text:
        first = offset if style == "v1" else -length
        reference = 2 if style == "v1" else 1
        words.append(_coordinate_rows(_on_time_axis(length, first), (length, 1, 1), (reference, 1, 1)))
    return torch.cat([video.repeat(len(text), 1), audio_rows.repeat(len(text), 1), *words])


def _on_time_axis(length: int, first: int = 0) -> Tensor:
    return torch.nn.functional.pad(torch.arange(first, first + length).unsqueeze(1), (0, 2))


def _coordinate_rows(position: Tensor, size: tuple[int, ...], reference: tuple[int, ...]) -> Tensor:
    extent = torch.tensor([*size, *reference]).expand(len(position), 6)
    return torch.cat([position, extent], dim=1).to(torch.float32)
