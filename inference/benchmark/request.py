"""A timed request, stage by stage as inference runs it: from text to an mp4 file with sound."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from inference.benchmark.bench_networks import SEED
from inference.benchmark.components import Missing, Parts, reason_of
from inference.benchmark.roofline.cases import FPS, ClipCase
from inference.benchmark.timers import Stopwatch, host_waits
from inference.decoding import Decoder, to_uint8
from inference.sampling import sample
from inference.super_resolution import draw, refine
from magihuman.codecs.bundle import bundle_spec
from magihuman.flow.guidance import Guidance
from magihuman.flow.sampling import Shapes, draw_noise, seeded
from magihuman.flow.solvers import make_solver
from magihuman.models.denoiser import Denoiser

T = TypeVar("T")
CONDITIONS = ("image", "sound")
"""Stages that run only where an image or audio is given; timed in addition to the request, not as part of it."""
STAGES = ("text", "noise", "base", "sr", "video decode", "to host", "audio decode", "encode and mux")
PUBLISHED_STAGES = ("base", "sr", "video decode", "to host")
"""Whose sum is compared with the published totals: diffusion, and frames in the host's memory."""


@dataclass
class TimedRequest:
    """A clip to make again and again.

    Args:
        denoisers: by stage; parts: None where only the loops are timed.

    Attributes:
        missing: why a stage cannot run here.
        worked: processor time of the last run's stages, see `Stopwatch`.
        waits: by loop, where the host waited for a GPU in the last run that looked.
    """

    case: ClipCase
    denoisers: dict[str, Denoiser]
    parts: Parts | None
    device: torch.device
    missing: dict[str, str] = field(default_factory=dict)
    worked: dict[str, float] = field(default_factory=dict)
    waits: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        case, base = self.case, self.case.stages[0]
        self.guidance = Guidance() if base.sides > 1 else None
        self.solver = "renoise" if self.guidance is None else "unipc"
        generator = torch.Generator().manual_seed(SEED)
        words = torch.randn(base.text, base.config.text_in_channels, generator=generator)
        self.words = words.to(self.device)
        self._host: list[Tensor] = []
        if self.parts is None:
            return
        for stage, part in (
            ("text", self.parts.text), ("image", self.parts.video), ("sound", self.parts.audio),
            ("video decode", self.parts.decoder), ("audio decode", self.parts.audio),
        ):  # fmt: skip
            if isinstance(part, Missing):
                self.missing[stage] = part.reason
        if "video decode" in self.missing:
            self.missing["to host"] = "no frames"
        if find_spec("av") is None:
            self.missing["encode and mux"] = "av is not installed"
        elif "video decode" in self.missing or "audio decode" in self.missing:
            self.missing["encode and mux"] = "no frames or no audio"
        side = case.pixels if len(case.stages) == 1 else (base.height * case.stride[1], base.width * case.stride[2])
        self.images = [torch.rand(1, 3, 1, *size, generator=generator) * 2 - 1 for size in {side, case.pixels}]

    @torch.no_grad()
    def run(self, look_for_waits: bool = False) -> dict[str, float]:
        """Seconds of every stage there is, and `request`, of all but the conditions.

        Args:
            look_for_waits: fill in `waits`; a run that does not count.

        Raises:
            ValueError: latents that are not finite.
        """
        watch, parts = Stopwatch(self.device), self.parts
        text = None
        if parts is not None:
            on_host = not (isinstance(parts.text, torch.nn.Module) and self.device.type == "cuda")
            text = self._apart(watch, "text", lambda: parts.text.encode([parts.prompt])[0].to(self.device), on_host)
        video, audio = self._denoise(watch, self.words if text is None else text, look_for_waits)
        if parts is not None:
            frames = self._decode(watch, parts.decoder, video)
            wave = self._apart(watch, "audio decode", lambda: parts.audio.decode(audio)[0].float().clamp(-1, 1).cpu())
            if frames is None or wave is None:
                self.missing.setdefault("encode and mux", "no frames or no audio")
            self._apart(watch, "encode and mux", lambda: self._write(frames, wave), host=True)
        times, self.worked = watch.finish(), watch.worked
        if not (torch.isfinite(video).all() and torch.isfinite(audio).all()):
            raise ValueError("the request's latents are not finite")
        return times | self._conditions()

    def _denoise(self, watch: Stopwatch, text: Tensor, look_for_waits: bool) -> tuple[Tensor, Tensor]:
        base, *further = self.case.stages
        denoiser = self.denoisers["base"]
        shape = _shape(denoiser, base)
        generators = seeded([SEED])
        with watch.stage("noise"):
            steps = base.steps if make_solver(self.solver, 1).stochastic else 0
            noise = draw_noise(shape, generators, steps, self.device)
            large = draw(_shape(self.denoisers["sr"], further[0]), generators, self.device) if further else None
        negative = None if self.guidance is None else [self.words]
        looked_at = self.device if look_for_waits else torch.device("cpu")
        with watch.stage("base"), host_waits(looked_at) as found:
            video, audio = sample(
                denoiser,
                [text],
                negative,
                shape,
                base.steps,
                self.solver,
                self.guidance,
                noise=noise,
                device=self.device,
            )
        self.waits = {"base": found}
        if large is not None:
            denoiser, steps, shape = self.denoisers["sr"], further[0].steps, _shape(self.denoisers["sr"], further[0])
            with watch.stage("sr"), host_waits(looked_at) as found:
                video = refine(denoiser, video, audio, [text], None, shape, large, steps=steps, device=self.device)
            self.waits["sr"] = found
        return video, audio

    def _decode(self, watch: Stopwatch, codec: Any, video: Tensor) -> list[Tensor] | None:
        """Frames in the host's memory."""
        parts = self._apart(watch, "video decode", lambda: [to_uint8(part) for part in Decoder(codec).frames(video)])
        if parts is None:
            self.missing.setdefault("to host", "no frames")
            return None
        if not self._host:  # memory that the device can copy into, taken once
            self._host = [torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda) for part in parts]
        with watch.stage("to host"):
            for target, part in zip(self._host, parts, strict=True):
                target.copy_(part, non_blocking=True)
        return self._host

    def _apart(self, watch: Stopwatch, stage: str, work: Callable[[], T], host: bool = False) -> T | None:
        """Time a stage that the loops do not need. One that fails is `missing` from then on, with the reason."""
        if stage in self.missing:
            return None
        try:
            with watch.stage(stage, host):
                return work()
        except Exception as error:
            self.missing[stage] = reason_of(error)
            return None

    def _write(self, frames: list[Tensor] | None, wave: Tensor | None) -> None:
        from inference import decoding

        assert self.parts is not None
        assert frames is not None
        assert wave is not None
        with tempfile.TemporaryDirectory() as folder:
            sound = decoding.playable(wave, self.parts.audio.sample_rate)
            crf = bundle_spec("released" if self.case.released else "tiny").crf
            decoding.write(Path(folder) / "clip.mp4", iter(frames), FPS, *sound, crf)

    def _conditions(self) -> dict[str, float]:
        """An image for every stage, and audio of the clip's length."""
        if self.parts is None:
            return {}
        watch, parts = Stopwatch(self.device), self.parts

        def encode_sound() -> Tensor:
            shape = 1, parts.audio.waveform_channels, parts.audio.hop * self.case.audio
            return parts.audio.encode(0.1 * torch.randn(shape, device=self.device))

        self._apart(watch, "image", lambda: [parts.video.encode(image.to(self.device)) for image in self.images])
        self._apart(watch, "sound", encode_sound)
        times = watch.finish()
        del times["request"]
        return times


def _shape(denoiser: Denoiser, stage: Any) -> Shapes:
    video = denoiser.latent_channels, stage.frames, stage.height, stage.width
    return video, (stage.audio, stage.config.audio_in_channels)
