"""The start of the super-resolution stage."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from magihuman.flow.sigmas import zero_snr_table
from magihuman.flow.super_resolution import AUDIO_NOISE, NOISE_INDEX, noise_audio, noise_video, upsample_latents


def test_start_equals_the_release(golden: Path) -> None:
    vector = load_file(golden / "sr_prepare.safetensors")
    upsampled = upsample_latents(vector["br_video"], 8, 12)
    torch.testing.assert_close(upsampled, vector["upsampled"], atol=1e-6, rtol=0)
    signal = float(zero_snr_table()[NOISE_INDEX])
    start = noise_video(upsampled, vector["video_noise"], signal)
    torch.testing.assert_close(start, vector["sr_video_init"], atol=1e-6, rtol=0)
    audio = noise_audio(vector["br_audio"], vector["audio_noise"])
    torch.testing.assert_close(audio, vector["sr_audio"], atol=1e-6, rtol=0)


def test_corners_stay_and_time_is_untouched() -> None:
    latents = torch.randn(1, 2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    up = upsample_latents(latents, 7, 11)
    assert up.shape == (1, 2, 3, 7, 11)
    torch.testing.assert_close(up[..., [0, 0, -1, -1], [0, -1, 0, -1]], latents[..., [0, 0, -1, -1], [0, -1, 0, -1]])
    torch.testing.assert_close(up[..., ::2, ::2], latents)


def test_video_noise_keeps_variance_and_audio_noise_is_a_mix() -> None:
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 1, 4, 5, 40, 40, generator=generator)
    assert abs(noise_video(z, noise, 0.8389104).std().item() - 1) < 0.02
    assert torch.equal(noise_video(z, noise, 1.0), z)
    mixed = noise_audio(torch.ones(1, 2, 3), torch.full((1, 2, 3), 11.0))
    torch.testing.assert_close(mixed, torch.full((1, 2, 3), 11 * AUDIO_NOISE + 0.3))
