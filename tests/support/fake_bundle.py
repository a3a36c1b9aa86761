"""A world of a few lines for tests: 32 x 32 px, 17 frames at 25 fps, 16 kHz, codecs without weights."""

from pathlib import Path

import torch

from magihuman import zoo
from magihuman.codecs.bundle import CodecBundle
from magihuman.codecs.text_encoders import ByteTextEncoder
from magihuman.flow.guidance import Guidance
from magihuman.io.export import ExportConfig, Sampling, Size, save_export
from magihuman.models.config import Contract, DiTConfig, PackConfig

FRAMES, SIDE, HOP = 17, 32, 640


class FakeVideoCodec:
    """Latents are the mean colour of each 4 x 4 px cell at every fourth frame."""

    channels = 3
    stride = (4, 4, 4)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool3d(frames[:, :, ::4], (1, 4, 4))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        big = latents.repeat_interleave(4, 3).repeat_interleave(4, 4)
        return torch.cat([big[:, :, :1], big[:, :, 1:].repeat_interleave(4, 2)], dim=2)


class FakeAudioCodec:
    """Latents are four means of each 40 ms of sound."""

    channels = 4
    sample_rate = 16000
    hop = HOP
    waveform_channels = 1

    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        return waveform[:, 0].unflatten(1, (-1, 4, HOP // 4)).mean(3)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.repeat_interleave(HOP // 4, 2).flatten(1)[:, None]


def fake_bundle(name: str = "tiny", device: object = "cpu", fps: float = 25.0) -> CodecBundle:
    """Stands in for `magihuman.codecs.bundle.load_bundle`."""
    video, audio, text = FakeVideoCodec(), FakeAudioCodec(), ByteTextEncoder()
    contract = Contract("fake", "fake", "bytes-1", 3, 4, text.channels, (4, 4, 4), fps, 16000, 1)
    return CodecBundle(name, contract, video, audio, text, height=SIDE, width=SIDE, frames=FRAMES)


def fake_checkpoint(folder: Path, guidance: Guidance | None = None, seed: int = 0) -> Path:
    """A small untrained network of that world, exported to `folder`."""
    config = DiTConfig(
        num_layers=2,
        hidden_size=32,
        head_dim=16,
        num_query_groups=1,
        video_in_channels=12,
        audio_in_channels=4,
        text_in_channels=128,
        mm_layers=(0,),
        gelu7_layers=(0,),
    )
    denoiser = zoo.build(config, PackConfig(), compute_dtype=torch.float32, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for head in (denoiser.model.final_linear_video, denoiser.model.final_linear_audio):
        torch.nn.init.normal_(head.weight, std=0.1, generator=generator)
    export = ExportConfig(
        model=config,
        pack=PackConfig(),
        codecs="tiny",
        contract=fake_bundle().contract,
        sampling=Sampling(steps=2, guidance=guidance or Guidance(3, 2, audio=2)),
        size=Size(FRAMES, SIDE, SIDE),
    )
    return save_export(folder, denoiser.model.state_dict(), export)
