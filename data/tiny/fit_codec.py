"""Fit a puppet world's codecs on rendered puppets: `python -m data.tiny.fit_codec output=FOLDER world=scene`.

The audio codec is closed-form (PCA, seconds). The video codec starts as PCA and is trained for a few minutes on
reconstruction at two sizes and on upsampling: decode(up(encode(small))) must give the clip at twice the size,
and up(encode(small)) must equal encode(large), so that the super-resolution recipe starts from usable latents.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.tiny.dataset import check_appearance
from data.tiny.puppets import (
    MOUTH_CENTRE,
    Puppet,
    camera_track,
    draw_puppet,
    puppet_points,
    render,
    scene_points,
    synthesise,
)
from magihuman.codecs.tiny_captions import FORMS
from magihuman.io.files import write_atomically
from magihuman.io.provenance import code_version

if TYPE_CHECKING:  # torch takes a second to import and --help does not need it
    import torch

    from magihuman.codecs.tiny import TinyAudioCodec, TinyVideoCodec

FIT_SEED = 7001  # of the puppets; training and evaluation use others
AUDIO_CLIPS, AUDIO_CHANNELS = 800, 64
VIDEO_CLIPS, VIDEO_BATCH = 300, 6
VIDEO_FRAMES = 17  # of a clip in a step; the codec does not look across latent frames
WHITENING = 0.5
"""1 gives every channel the same variance, so that a model's loss is mostly unpredictable detail; with 0 the first few
channels dominate."""


def puppet_frames(indices: range, size: int, world: str = "tiny") -> torch.Tensor:
    """Frames of the puppets of FIT_SEED: uint8 [N,3,F,size,size]."""
    import torch

    stack = np.stack([render(draw_puppet(FIT_SEED, i, world), size) for i in indices])
    return torch.from_numpy(stack).permute(0, 4, 1, 2, 3).contiguous()


def _float(frames: torch.Tensor) -> torch.Tensor:
    return frames.float() / 127.5 - 1


def _normalising_scale(variance: torch.Tensor) -> torch.Tensor:
    """Per-channel factors: variance^(-WHITENING/2), then a common factor to mean variance 1."""
    factor = variance.clamp_min(1e-8) ** (-WHITENING / 2)
    return factor / (variance * factor**2).mean().sqrt()


def fit_audio(world: str) -> TinyAudioCodec:
    """PCA of weighted log-spectrum columns of the puppets of a world."""
    import torch

    from magihuman.codecs.tiny import TinyAudioCodec

    codec = TinyAudioCodec(AUDIO_CHANNELS, FORMS[world].audio_floor)
    waves = torch.from_numpy(np.stack([synthesise(draw_puppet(FIT_SEED, i, world)) for i in range(AUDIO_CLIPS)]))
    features = codec.features(waves[:, None]).flatten(0, 1).double()
    codec.mean.copy_(features.mean(0))
    covariance = torch.cov(features.T)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:AUDIO_CHANNELS], vectors.flip(1)[:, :AUDIO_CHANNELS]
    codec.basis.copy_(vectors)
    codec.scale.copy_(_normalising_scale(values))
    return codec


def _initialise_by_pca(codec: TinyVideoCodec, blocks: torch.Tensor) -> None:
    """Set the linear maps to the principal components of `blocks` [N,192,h,w]."""
    import torch

    flat = blocks.movedim(1, -1).flatten(0, -2).double()
    mean = flat.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov(flat.T))
    basis = vectors.flip(1)[:, : codec.channels].float()  # [192,C]
    with torch.no_grad():
        codec.encode_linear.weight.copy_(basis.T[:, :, None, None])
        assert codec.encode_linear.bias is not None
        assert codec.decode_linear.bias is not None
        codec.encode_linear.bias.copy_(-(mean.float() @ basis))
        codec.decode_linear.weight.copy_(basis[:, :, None, None])
        codec.decode_linear.bias.copy_(mean.float())


def _upsample(latents: torch.Tensor, batch: int) -> torch.Tensor:
    """[B*T,C,h,w] -> [B*T,C,2h,2w], trilinear with aligned corners as in SPEC 4.4."""
    from torch.nn import functional as F

    clip = latents.unflatten(0, (batch, -1)).transpose(1, 2)
    count, height, width = clip.shape[2:]
    up = F.interpolate(clip, size=(count, 2 * height, 2 * width), mode="trilinear", align_corners=True)
    return up.transpose(1, 2).flatten(0, 1)


def _mouth_window(puppet: Puppet, size: int) -> torch.Tensor:
    """Pixels around the mouth: bool [F,H,W]."""
    import torch

    near: dict[tuple[float, float], np.ndarray] = {}
    views = [(float(shift), float(zoom)) for shift, zoom in camera_track(puppet.camera, puppet.frames)]
    for view in dict.fromkeys(views):
        x, y = puppet_points(puppet.side, puppet.size, *scene_points(size, view))
        near[view] = (np.abs(x - MOUTH_CENTRE[0]) < 0.18) & (np.abs(y - MOUTH_CENTRE[1]) < 0.16)
    return torch.from_numpy(np.stack([near[view] for view in views]))


def fit_video(channels: int, steps: int, world: str) -> TinyVideoCodec:
    """Train the video codec; the module's docstring describes the loss."""
    import torch

    from magihuman.codecs.tiny import TinyVideoCodec

    torch.manual_seed(FIT_SEED)
    codec = TinyVideoCodec(channels)
    large, small = (puppet_frames(range(VIDEO_CLIPS), size, world) for size in (128, 64))
    _initialise_by_pca(codec, codec.blocks(_float(small[:100])))
    matrices = [p for n, p in codec.named_parameters() if p.ndim > 1]
    vectors = [p for n, p in codec.named_parameters() if p.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors}], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [4e-3, 3e-3], total_steps=steps, pct_start=0.1)
    puppets = [draw_puppet(FIT_SEED, i, world) for i in range(VIDEO_CLIPS)]
    windows = {size: torch.stack([_mouth_window(puppet, size) for puppet in puppets]) for size in (64, 128)}
    order = torch.Generator().manual_seed(FIT_SEED)
    began = time.monotonic()

    def error(prediction: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        # Pixels around the mouth count three times as much as the others.
        weight = 1 + 2 * windows[truth.shape[-1]][chosen, seen].float()  # [B,F,H,W]
        weight /= weight.mean(dim=(1, 2, 3), keepdim=True)
        return ((prediction - truth).square() * weight[:, None]).mean()

    def jitter(latents: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        level = 0.05 * torch.rand(len(latents), 1, 1, 1, generator=order)
        return latents + level * deviation * torch.randn(latents.shape, generator=order)

    for step in range(steps):
        chosen = torch.randint(VIDEO_CLIPS, (VIDEO_BATCH,), generator=order)
        first = int(torch.randint(large.shape[2] - VIDEO_FRAMES + 1, (1,), generator=order))
        seen = slice(first, first + VIDEO_FRAMES)
        big, little = _float(large[chosen, :, seen]), _float(small[chosen, :, seen])
        low, high = codec.encode_blocks(codec.blocks(little)), codec.encode_blocks(codec.blocks(big))
        lifted = _upsample(low, VIDEO_BATCH)
        deviation = low.detach().std()
        loss = (
            error(codec.frames(codec.decode_blocks(jitter(low, deviation)), VIDEO_BATCH), little)
            + error(codec.frames(codec.decode_blocks(jitter(high, deviation)), VIDEO_BATCH), big)
            + 2 * error(codec.frames(codec.decode_blocks(jitter(lifted, deviation)), VIDEO_BATCH), big)
            + 0.02 * (lifted - high).square().mean() / high.detach().var()
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.5f}  {time.monotonic() - began:.0f} s", flush=True)
    with torch.no_grad():
        latents = codec.encode_blocks(codec.blocks(_float(small))).movedim(1, -1).flatten(0, -2)
        codec.mean.copy_(latents.mean(0))
        values, rotation = torch.linalg.eigh(torch.cov(latents.T.double()))
        codec.rotation.copy_(rotation.flip(1))
        codec.scale.copy_(_normalising_scale(values.flip(0)).float())
    return codec


def psnr(prediction: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of frames in [-1,1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return float(peak_signal_noise_ratio(prediction.clamp(-1, 1), truth, data_range=2.0))


def report(codec: TinyVideoCodec, clips: int = 16, world: str = "tiny") -> dict[str, float]:
    """PSNR (dB) on puppets outside the training set: reconstruction at 64 and 128 px, latent x2, bicubic x2."""
    import torch
    from torch.nn import functional as F

    held_out = range(100_000, 100_000 + clips)
    little, big = _float(puppet_frames(held_out, 64, world)), _float(puppet_frames(held_out, 128, world))
    latents = codec.encode(little)
    decoded = codec.decode(latents)
    size = (latents.shape[2], 2 * latents.shape[3], 2 * latents.shape[4])
    lifted = codec.decode(F.interpolate(latents, size=size, mode="trilinear", align_corners=True))
    bicubic = F.interpolate(decoded.transpose(1, 2).flatten(0, 1), scale_factor=2, mode="bicubic")
    bicubic = bicubic.unflatten(0, (clips, -1)).transpose(1, 2)
    windows = torch.stack([_mouth_window(draw_puppet(FIT_SEED, i, world), 64) for i in held_out])
    mouth = windows[:, None].expand_as(little)
    return {
        "rec64": psnr(decoded, little),
        "rec64_mouth": psnr(decoded[mouth], little[mouth]),
        "rec128": psnr(codec.decode(codec.encode(big)), big),
        "latent_x2": psnr(lifted, big),
        "bicubic_x2": psnr(bicubic, big),
        "noise_0.05": psnr(codec.decode(latents + 0.05 * torch.randn_like(latents)), little),
        "noise_0.15": psnr(codec.decode(latents + 0.15 * torch.randn_like(latents)), little),
    }


def _save(codec: torch.nn.Module, file: Path) -> None:
    """Matrices in fp16, vectors (means and scales) in fp32."""
    from safetensors.torch import save_file

    save_file({k: (v.half() if v.ndim > 1 else v).contiguous() for k, v in codec.state_dict().items()}, file)


def fit(output: str, channels: int = 12, steps: int = 900, world: str = "scene") -> dict[str, float]:
    """Fit a puppet world's codecs and write them with their reconstruction quality.

    Args:
        output: folder for video_codec.safetensors, audio_codec.safetensors and codecs.json.
        channels: video latent channels.
        steps: training steps of the video codec (about half a CPU-second each).
        world: scene or tiny.

    Raises:
        UserError: an unknown world.
    """
    check_appearance({}, world)
    import torch

    torch.set_num_threads(1)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    _save(fit_audio(world), folder / "audio_codec.safetensors")
    video = fit_video(channels, steps, world)
    _save(video, folder / "video_codec.safetensors")
    figures = report(video, world=world)
    record = {
        "command": f"python -m data.tiny.fit_codec output={folder.name} channels={channels} steps={steps} world={world}",
        "psnr_db": {name: round(value, 2) for name, value in figures.items()},
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
        **code_version(),
    }
    write_atomically(folder / "codecs.json", json.dumps(record, indent=1) + "\n")
    for name, value in figures.items():
        print(f"{name:12s} {value:6.2f} dB")
    return figures


if __name__ == "__main__":
    from magihuman.cli import run

    run(fit, "python -m data.tiny.fit_codec")
