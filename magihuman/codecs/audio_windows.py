"""Long audio is encoded in overlapping windows that are cross-faded in latent space (SPEC 4.7)."""

import torch
from torch.nn import functional as F

WINDOW_LATENTS = 725  # 29 s at 25 latents a second


def split_windows(waveform: torch.Tensor, window: int) -> list[torch.Tensor]:
    """Cut [B,channels,N] into windows of `window` samples, half a window apart; the last is zero-padded.

    A waveform that fits one window is returned as it is, unpadded.
    """
    samples = waveform.shape[-1]
    if samples <= window:
        return [waveform]
    pieces: list[torch.Tensor] = []
    start = 0
    while not pieces or start - window // 2 + window < samples:
        piece = waveform[..., start : start + window]
        pieces.append(F.pad(piece, (0, window - piece.shape[-1])))
        start += window // 2
    return pieces


def cross_fade(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Merge equally long latent blocks [B,A,Ca] into one [B, A + (n-1)(A - A//2), Ca].

    Neighbours overlap by A//2 latents; at offset k of the overlap the later block weighs k/(A//2). With odd A
    the blocks advance by half a latent more than the audio does (oddity O13): the release does so, too.
    """
    merged = blocks[0]
    overlap = merged.shape[1] // 2
    # Weights in double precision, then rounded: the release scales by Python numbers. [1,overlap,1]
    rising = (torch.arange(overlap, dtype=torch.float64) / max(overlap, 1)).view(1, -1, 1)
    weight_old, weight_new = (1 - rising).to(merged), rising.to(merged)
    for block in blocks[1:]:
        kept, tail = merged[:, : merged.shape[1] - overlap], merged[:, merged.shape[1] - overlap :]
        mixed = tail * weight_old + block[:, :overlap] * weight_new
        merged = torch.cat([kept, mixed, block[:, overlap:]], dim=1)
    return merged
