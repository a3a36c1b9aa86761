"""From prompts to clips: encode the conditions, denoise, decode (SPEC 4.1 to 4.5, base stage)."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from inference.sample import LatentShape, Progress, sample, seeded
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.flow.solvers import SOLVERS
from magihuman.postprocess import PLAYBACK_RATE, frames_to_uint8, to_playback_rate
from magihuman.world import World
from magihuman.zoo import Loaded

# A clip far longer than what a model was trained on is noise at best and exhausts the memory at worst.
LONGEST = 16
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


@dataclass(frozen=True)
class Settings:
    """What decides a clip beside prompt, seed, conditions and checkpoint.

    Attributes:
        solver, steps, shift, guidance: as in `inference.sample.sample`.
        negative_prompt: the other side of the guidance; "" is the null text of training.
        frames, height, width: of the clip, in pixels; frames = stride (T - 1) + 1.
    """

    solver: str
    steps: int
    shift: float
    guidance: Guidance
    negative_prompt: str
    frames: int
    height: int
    width: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass
class Clip:
    """One generated clip.

    Attributes:
        frames: uint8 [F,H,W,3]; wave: fp32 [channels,N] in [-1,1].
        sample_rate: Hz; fps: frames per second.
        video: the latents [C,T,h,w] fp32 it was decoded from; audio: [A,Ca] fp32.
    """

    prompt: str
    seed: int
    frames: torch.Tensor
    wave: torch.Tensor
    sample_rate: int
    fps: float
    video: torch.Tensor
    audio: torch.Tensor

    def save(self, path: str | Path) -> None:
        """Write an mp4 (H.264, and AAC where there is sound).

        Raises:
            UserError: the file cannot be written.
        """
        from magihuman.media import write_mp4

        wave, rate = self.wave, self.sample_rate
        if rate not in AAC_RATES:  # the released codec works at 51.2 kHz (SPEC 4.5)
            wave, rate = to_playback_rate(wave, rate), PLAYBACK_RATE
        write_mp4(path, self.frames, self.fps, wave if wave.numel() else None, rate)


class Pipeline:
    """A checkpoint in its world, ready to generate.

    Attributes:
        folder: of the checkpoint.
        dtype: of the network's products, such as "float32".
        times: seconds spent per stage so far: text, condition, sample, decode.

    Raises:
        UserError: the checkpoint was trained on latents of another world.
    """

    def __init__(self, loaded: Loaded, world: World) -> None:
        loaded.config.contract.require(world.contract, "the checkpoint", f"the world {world.name!r}")
        self.denoiser = loaded.denoiser.eval()
        self.config = loaded.config
        self.folder = loaded.folder
        self.world = world
        self.device = next(self.denoiser.parameters()).device
        self.dtype = str(self.denoiser.model.compute_dtype).removeprefix("torch.")
        self.times: dict[str, float] = defaultdict(float)
        self._texts: dict[str, torch.Tensor] = {}

    def settings(
        self,
        *,
        steps: int | None = None,
        solver: str | None = None,
        shift: float | None = None,
        guidance: Guidance | float | None = None,
        negative_prompt: str | None = None,
        seconds: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Settings:
        """The checkpoint's own sampling settings with the given ones in their place.

        Args:
            guidance: one scale for both modalities at every step (1 is none), or a `Guidance`.
            seconds: rounded to the nearest possible number of frames.

        Raises:
            UserError: a value that cannot be, with what can.
        """
        own, size, contract = self.config.sampling, self.config.size, self.world.contract
        scales = own.guidance if guidance is None else guidance
        if not isinstance(scales, Guidance):
            scales = Guidance(scales, scales, audio=scales)
        chosen = Settings(
            solver=own.solver if solver is None else solver,
            steps=own.steps if steps is None else steps,
            shift=own.shift if shift is None else shift,
            guidance=scales,
            negative_prompt=own.negative_prompt if negative_prompt is None else negative_prompt,
            frames=size.frames,
            height=size.height if height is None else height,
            width=size.width if width is None else width,
        )
        if seconds is not None:
            frames = frames_for(seconds, contract.fps, contract.video_stride[0])
            if frames > LONGEST * size.frames:
                limit = LONGEST * size.frames / contract.fps
                raise UserError(
                    f"seconds={seconds:g} is too long for this checkpoint; give at most {limit:g}"
                )
            chosen = replace(chosen, frames=frames)
        if chosen.solver not in SOLVERS:
            raise UserError(f"solver={chosen.solver} is unknown; choose one of {', '.join(SOLVERS)}")
        if not 1 <= chosen.steps <= 1000:
            raise UserError(f"steps={chosen.steps} is impossible; give 1 to 1000")
        if not 0 < chosen.shift < math.inf:
            raise UserError(f"shift={chosen.shift:g} is impossible; give a positive number")
        if not all(1 <= scale < math.inf for scale in (scales.video_high, scales.video_low, scales.audio)):
            raise UserError(f"guidance {scales.to_dict()} is impossible; scales start at 1, which is none")
        self._latent_shape(chosen)
        return chosen

    def _latent_shape(self, settings: Settings) -> LatentShape:
        contract, patch = self.world.contract, self.config.pack.patch_size
        stride_t, *strides = contract.video_stride
        for name, stride in zip(("height", "width"), strides, strict=True):
            pixels, unit = getattr(settings, name), stride * patch
            if pixels < unit or pixels % unit:
                nearest = max(1, round(pixels / unit)) * unit
                raise UserError(f"{name}={pixels} is not a multiple of {unit}; the nearest is {nearest}")
        return LatentShape(
            channels=contract.video_channels,
            frames=(settings.frames - 1) // stride_t + 1,
            height=settings.height // strides[0],
            width=settings.width // strides[1],
            audio=settings.frames,
            audio_channels=contract.audio_channels,
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to `times[name]`, waiting for the device at its end."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times[name] += time.perf_counter() - start

    def text(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Features [S,Ct] fp32 of each prompt on the model's device; every prompt is encoded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self._texts.update(zip(new, self.world.text_encoder.encode(new), strict=True))
        return [self._texts[prompt].to(self.device) for prompt in prompts]

    def encode_image(self, path: str | Path, settings: Settings) -> torch.Tensor:
        """A picture file as the first latent frame [1,C,1,h,w]; it is encoded alone (SPEC 4.3)."""
        from inference.conditions import read_picture

        frame = read_picture(path, settings.height, settings.width)
        with self.stage("condition"):
            return self.world.video_codec.encode(frame.to(_device(self.world.video_codec))).to(self.device)

    def encode_audio(self, path: str | Path, settings: Settings) -> torch.Tensor:
        """The sound of a media file as audio latents [1,A,Ca], cut or padded to the clip's length."""
        from inference.conditions import read_sound

        codec = self.world.audio_codec
        wave = read_sound(path, codec.sample_rate, codec.waveform_channels, codec.hop * settings.frames)
        with self.stage("condition"):
            return codec.encode(wave.to(_device(codec))).to(self.device)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        batch: int = 8,
        image: str | Path | None = None,
        audio: str | Path | None = None,
        progress: Progress | None = None,
        **overrides: Any,
    ) -> list[Clip]:
        """Make a clip per prompt.

        Args:
            batch: how many are computed at once; it changes memory and speed, not the clips.
            image, audio: given first frame and sound track, the same for all prompts.
            overrides: of the checkpoint's settings, see `settings`.

        Raises:
            UserError: a setting or condition that cannot be used.
        """
        chosen = self.settings(**overrides)
        first = None if image is None else self.encode_image(image, chosen)
        sound = None if audio is None else self.encode_audio(audio, chosen)
        clips = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            clips += self.make(prompts[part], seeds[part], chosen, first, sound, progress)
        return clips

    def make(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        image_latent: torch.Tensor | None = None,
        audio_latent: torch.Tensor | None = None,
        progress: Progress | None = None,
    ) -> list[Clip]:
        """One batch, all with the same settings; conditions [B,...] or [1,...] for all."""
        count = len(prompts)
        with self.stage("text"):
            text = self.text(prompts)
            negative = self.text([settings.negative_prompt]) * count if settings.guidance.needed else None
        with self.stage("sample"):
            video, sound = sample(
                self.denoiser,
                text,
                negative,
                self._latent_shape(settings),
                settings.steps,
                settings.solver,
                settings.guidance,
                settings.shift,
                seeded(seeds),
                image_latent=_for_all(image_latent, count),
                audio_latent=_for_all(audio_latent, count),
                progress=progress,
            )
        if not (video.isfinite().all() and sound.isfinite().all()):
            raise UserError(
                f"the network's output is not finite at solver={settings.solver}, steps={settings.steps}; "
                "its training diverged, or the guidance is far too strong"
            )
        with self.stage("decode"):
            codecs = self.world.video_codec, self.world.audio_codec
            frames = frames_to_uint8(codecs[0].decode(video.to(_device(codecs[0])))).cpu()
            waves = codecs[1].decode(sound.to(_device(codecs[1]))).float().clamp(-1, 1).cpu()
        rate, fps = codecs[1].sample_rate, self.world.contract.fps
        video, sound = video.cpu(), sound.cpu()
        return [
            Clip(prompt, seed, frames[i], waves[i], rate, fps, video[i], sound[i])
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]


def frames_for(seconds: float, fps: float, stride: int) -> int:
    """The number of frames stride * k + 1 that is nearest to `seconds` at `fps`, at least 1.

    Raises:
        UserError: seconds is not positive.
    """
    if not 0 < seconds < float("inf"):
        raise UserError(f"seconds={seconds} must be positive")
    return max(0, round((seconds * fps - 1) / stride)) * stride + 1


def _for_all(condition: torch.Tensor | None, count: int) -> torch.Tensor | None:
    return None if condition is None else condition.expand(count, *condition.shape[1:])


def _device(codec: Any) -> torch.device:
    """Where a codec's tensors are; codecs without any work on the CPU."""
    if isinstance(codec, torch.nn.Module):
        for tensor in (*codec.parameters(), *codec.buffers()):
            return tensor.device
    return torch.device("cpu")
