"""Pipeline from prompts to clips: text, conditioning, sampling, super-resolution, decoding (SPEC 4).

    clip = pipeline.generate(["a prompt"], seeds=[1], steps=8)[0]
    clip.save("x.mp4")

Each stage (text, condition, sample, refine, decode) names the networks that it needs, so that `inference.memory.offload.Stages`
can keep one of them on the device at a time.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inference import decoding as clips
from inference.decoding import Clip, Decoder, device_of
from inference.memory.offload import Stages
from inference.requests import InferOptions
from inference.sampling import sample
from inference.settings import SAMPLING_OPTIONS, Settings, latent_shape, require_role, resolve
from inference.super_resolution import draw, refine
from magihuman import zoo
from magihuman.codecs.bundle import CodecBundle, frames_for
from magihuman.errors import UserError
from magihuman.flow.guidance import frame_scales
from magihuman.flow.sampling import draw_noise, seeded
from magihuman.flow.solvers import make_solver
from magihuman.media.images import resize_frames
from magihuman.models.config import PackConfig
from magihuman.zoo import Loaded

__all__ = ["Clip", "Draft", "Pipeline", "Settings", "StageProgress", "frames_for"]

TEXTS_KEPT = 128
"""Different prompts whose features are kept in CPU memory, 9.2 MB each at most with the published text encoder."""

# Called when a step of a stage is done: (stage, step, of how many).
StageProgress = Callable[[str, int, int], None]
Files = Sequence[str | Path] | None


@dataclass
class Draft:
    """A clip as latents: video [C,T,h,w], audio [A,Ca], fp32 on the CPU; `audio_file`: the conditioning audio."""

    prompt: str
    seed: int
    video: torch.Tensor
    audio: torch.Tensor
    audio_file: str | Path | None = None


class Pipeline:
    """Checkpoints with their codecs, ready to generate.

    Args:
        loaded: the base stage; second: super-resolution, or None.
        decoder: decodes instead of the bundle's video codec (a Turbo decoder), or None.
        tile: pixels a side of the tiles in which large frames are decoded, or None, see `inference.decoding`.
        stages: keeps networks on the device while they are needed; None leaves everything where it is.
        output_size: (height, width) in pixels to which frames are resized, or None.
        crf: x264's quality of written clips.

    Attributes:
        folder: of the base checkpoint.
        dtype: of the network's products, such as "float32".
        tier: optimisation level of the base network, see `inference.fast`.
        times: seconds spent per stage so far: text, condition, sample, refine, decode.

    Raises:
        UserError: a checkpoint was trained on latents of other codecs, or is for the other stage.
    """

    def __init__(
        self,
        loaded: Loaded,
        codecs: CodecBundle,
        *,
        second: Loaded | None = None,
        decoder: Any = None,
        tile: int | None = None,
        stages: Stages | None = None,
        output_size: tuple[int, int] | None = None,
        crf: int = 18,
    ) -> None:
        loaded.config.contract.require(codecs.contract, "the checkpoint", f"codecs {codecs.name!r}")
        require_role(loaded.config, loaded.folder, first=True)
        if second is not None:
            second.config.contract.require(codecs.contract, "the checkpoint of sr=", f"codecs {codecs.name!r}")
            require_role(second.config, second.folder, first=False)
        if decoder is not None:
            found = decoder.channels, tuple(decoder.stride)
            wanted = codecs.contract.video_channels, tuple(codecs.contract.video_stride)
            if found != wanted:
                raise UserError(
                    f"the decoder takes {found[0]} channels at strides {found[1]}, the codecs have {wanted}"
                )
        self.denoiser = loaded.denoiser.eval()
        self.config = loaded.config
        self.folder = loaded.folder
        self.codecs = codecs
        self.second = second
        codec = codecs.video_codec if decoder is None else decoder
        self.decoder = None if codec is None else Decoder(codec, tile)
        self.stages = stages
        self.output_size, self.crf = output_size, crf
        self.device = next(self.denoiser.parameters()).device if stages is None else stages.device
        self.dtype = str(self.denoiser.model.compute_dtype).removeprefix("torch.")
        self.times: dict[str, float] = defaultdict(float)
        self._texts: dict[str, torch.Tensor] = {}

    def settings(self, given_audio: float | None = None, **options: Any) -> Settings:
        """The checkpoints' own sampling settings with the given ones in their place.

        Args:
            given_audio: seconds of the audio that the clip is conditioned on.
            options: of `InferOptions`, such as steps=4, cfg=1, height=128.

        Raises:
            UserError: an unknown option, or an impossible value, with the possible ones.
        """
        unknown = sorted(set(options) - set(SAMPLING_OPTIONS))
        if unknown:
            raise UserError(f"{unknown[0]} is not a sampling option; they are {', '.join(SAMPLING_OPTIONS)}")
        second = None if self.second is None else self.second.config
        return resolve(self.config, second, InferOptions(**options), given_audio)

    @contextmanager
    def stage(self, name: str, wait: bool = True) -> Iterator[None]:
        """A stage's networks on the device; adds the time to `times[name]`.

        Args:
            wait: for the device at the end, so that the time is the stage's own.
        """
        start = time.perf_counter()
        if self.stages is not None:
            self.stages.enter(name)
        yield
        if wait and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times[name] += time.perf_counter() - start

    def text(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Features [S,Ct] fp32 of each prompt on the model's device, see `encode_texts`."""
        features = self.encode_texts(prompts)
        here = {prompt: found.to(self.device) for prompt, found in features.items()}
        return [here[prompt] for prompt in prompts]

    def encode_texts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Features [S,Ct] fp32 of each prompt, in CPU memory, where the last `TEXTS_KEPT` ones stay for later calls."""
        wanted = list(dict.fromkeys(prompts))
        new = [prompt for prompt in wanted if prompt not in self._texts]
        if new:
            with self.stage("text"):
                for prompt in new:  # one by one, so that the device holds one prompt's features at a time
                    self._texts[prompt] = self.codecs.text_encoder.encode([prompt])[0].cpu()
        found = {prompt: self._texts.pop(prompt) for prompt in wanted}
        self._texts |= found  # the last ones are the last used
        for prompt in list(self._texts)[: -max(TEXTS_KEPT, len(wanted))]:
            del self._texts[prompt]
        return found

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        batch: int = 8,
        image: str | Path | None = None,
        audio: str | Path | None = None,
        progress: StageProgress | None = None,
        decode: bool = True,
        **options: Any,
    ) -> list[Clip]:
        """Make a clip per prompt.

        Args:
            batch: how many are computed at once; it changes memory and speed, not the clips.
            decode: False samples without decoding and returns no clips, on processes that compute the network together
                with the one that decodes.
            image, audio: first frame and audio track, the same for all prompts.
            options: as for `settings`.

        Raises:
            UserError: a setting or condition that cannot be used.
        """
        given_audio = None
        if audio is not None:
            from inference.conditioning import audio_seconds_of

            given_audio = audio_seconds_of(audio, self.codecs.audio_codec.sample_rate)
        chosen = self.settings(given_audio, **options)
        made = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            image_files = None if image is None else [image] * len(part)
            audio_files = None if audio is None else [audio] * len(part)
            drafts = self.draft(part, seeds[start : start + batch], chosen, image_files, audio_files, progress)
            made += [self.decode(draft) for draft in drafts] if decode else []
        return made

    def draft(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        image_files: Files = None,
        audio_files: Files = None,
        progress: StageProgress | None = None,
    ) -> list[Draft]:
        """Latents of one batch, all with the same settings.

        Args:
            image_files, audio_files: files of a first frame and an audio track for each prompt, or None.

        Raises:
            UserError: a condition that cannot be used, or a network whose output is not finite.
        """
        count = len(prompts)
        generators = seeded(seeds)
        text = self.text(prompts)
        negative = self.text([settings.negative_prompt]) * count if settings.needs_negative else None
        if self.second is not None and settings.sr is not None:
            other = negative if settings.sr.guidance != 1 else None
            require_positions(self.second.denoiser.pack, text, other, settings.audio)
        image = self.encode_image_files(image_files, settings.height, settings.width)
        large = None if settings.sr is None else self.encode_image_files(image_files, *settings.size)
        audio_latent = self.encode_audio_files(audio_files, settings, generators)
        shape = latent_shape(self.config, settings, (settings.height, settings.width))
        with self.stage("sample"):
            noise = None
            if audio_latent is not None and settings.compat == "o2" and not settings.guidance.needed:
                steps = settings.steps if make_solver(settings.solver, 1).stochastic else 0
                noise = draw_noise(shape, generators, steps, self.device, audio=audio_latent)
            video, audio = sample(
                self.denoiser,
                text,
                negative,
                shape,
                settings.steps,
                settings.solver,
                settings.guidance,
                settings.shift,
                generators,
                image_latent=image,
                audio_latent=audio_latent if noise is None else None,
                progress=_for_stage(progress, "sample"),
                noise=noise,
                cfg_passes=settings.cfg_passes,
                device=self.device,
            )
        require_finite(video, audio, settings)
        if settings.sr is not None:
            assert self.second is not None  # `resolve` gives a second stage to its checkpoint alone
            stage, shape = settings.sr, latent_shape(self.second.config, settings, settings.size)
            scales = None
            if stage.guidance != 1:
                early = stage.early_frames, stage.early_guidance
                scales = frame_scales(stage.guidance, shape[0][1], *early, device=self.device)
            with self.stage("refine"):
                video = refine(
                    self.second.denoiser,
                    video,
                    audio,
                    text,
                    negative,
                    shape,
                    draw(shape, generators, self.device, stage.noise_index),
                    noise_index=stage.noise_index,
                    audio_noise=stage.audio_noise,
                    steps=stage.steps,
                    shift=stage.shift,
                    guidance=scales,
                    image_latent=large,
                    progress=_for_stage(progress, "refine"),
                    cfg_passes=settings.cfg_passes,
                    device=self.device,
                )
            require_finite(video, audio, settings)
        video, audio = video.cpu(), audio.cpu()
        given = [None] * count if audio_files is None or noise is not None else list(audio_files)
        return [
            Draft(prompt, seed, video[i], audio[i], given[i])
            for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]

    def encode_image_files(self, paths: Files, height: int, width: int) -> torch.Tensor | None:
        """Image files as first latent frames [B,C,1,h,w]; each is encoded alone (SPEC 4.3)."""
        from inference.conditioning import read_image

        if paths is None:
            return None
        codec = self.codecs.video_codec
        with self.stage("condition"):
            latents = [codec.encode(read_image(path, height, width)[0].to(device_of(codec))) for path in paths]
        return torch.cat(latents).to(self.device)

    def encode_audio_files(
        self, paths: Files, settings: Settings, generators: Sequence[torch.Generator]
    ) -> torch.Tensor | None:
        """Audio of media files as latents [B,A,Ca], cut or padded to the clip's length.

        They are read as one channel (SPEC 4.7). A codec with a random bottleneck draws from each clip's
        generator, before all other noise (SPEC 4.2).
        """
        from inference.conditioning import read_audio_track

        if paths is None:
            return None
        codec: Any = self.codecs.audio_codec
        latents, samples = [], codec.hop * settings.audio
        released = getattr(codec, "samples_bottleneck", False)
        # What is too short for a latent of its own still reaches the last one through the encoder's convolutions.
        spare = int(settings.seconds * codec.sample_rate) - samples if released else 0
        tail = min(max(spare, 0), codec.hop - 1)
        with self.stage("condition"):
            for path, generator in zip(paths, generators, strict=True):
                wave = read_audio_track(path, codec.sample_rate, 1, samples, tail).to(device_of(codec))
                given = {"generator": generator, "overlap": settings.audio_overlap} if released else {}
                latents.append(codec.encode(wave, **given))
        return torch.cat(latents).to(self.device)

    def decode(self, draft: Draft) -> Clip:
        """A draft's frames and audio."""
        frames = torch.cat(list(self.frames(draft)))
        wave, rate = self.wave(draft)
        fps = self.codecs.contract.fps
        return Clip(draft.prompt, draft.seed, frames, wave, rate, fps, draft.video, draft.audio, self.crf)

    def write(self, draft: Draft, path: str | Path) -> dict[str, Any]:
        """Decode a draft into an mp4, frame by frame where the decoder can; adds to `times["write"]`.

        Returns:
            facts about the file for its record.

        Raises:
            UserError: odd size.
            OSError: the file cannot be written.
        """
        wave, rate = clips.playable(*self.wave(draft))
        start, before = time.perf_counter(), self.times["decode"]
        fps = self.codecs.contract.fps
        frames, height, width = clips.write(path, self.frames(draft), fps, wave, rate, self.crf)
        self.times["write"] += time.perf_counter() - start - (self.times["decode"] - before)
        facts = {"fps": fps, "frames": frames, "height": height, "width": width}
        return facts | {"sample_rate": rate if wave.numel() else 0, "samples": wave.shape[1]}

    def frames(self, draft: Draft) -> Iterator[torch.Tensor]:
        """A draft's frames, uint8 [n,H,W,3] on the CPU each, in as many parts as the decoder makes."""
        assert self.decoder is not None
        parts = self.decoder.stream(draft.video)
        while True:
            # The next chunk may be on the device while this one is written: waiting for it would end that.
            with self.stage("decode", wait=False):
                frames = next(parts, None)
            if frames is None:
                return
            yield frames if self.output_size is None else resize_frames(frames, *self.output_size)

    def wave(self, draft: Draft) -> tuple[torch.Tensor, int]:
        """A draft's audio, fp32 [channels,N], and its rate: the conditioning audio itself, or the decoded latents."""
        codec = self.codecs.audio_codec
        if draft.audio_file is not None:
            from inference.conditioning import read_audio_track

            rate = clips.playback_rate(codec.sample_rate)
            samples = round(len(draft.audio) / self.codecs.contract.fps * rate)
            return read_audio_track(draft.audio_file, rate, codec.waveform_channels, samples)[0], rate
        with self.stage("decode"):
            wave = codec.decode(draft.audio[None].to(device_of(codec)))[0]
            return wave.float().clamp(-1, 1).cpu(), codec.sample_rate


def _for_stage(progress: StageProgress | None, stage: str) -> Callable[..., None] | None:
    return None if progress is None else lambda step, of, *_: progress(stage, step, of)


def require_positions(
    pack: PackConfig, text: Sequence[torch.Tensor], negative: Sequence[torch.Tensor] | None, audio: int
) -> None:
    """Raises UserError for a single token, for which coordinates v1 have no place (SPEC 2.1)."""
    if pack.coords_style != "v1":
        return
    if any(len(features) < 2 for features in text):
        raise UserError("the second stage needs a prompt of at least two tokens; say more")
    if any(len(features) < 2 for features in negative or ()):
        raise UserError("the second stage needs a negative prompt of at least two tokens; give one, or sr_cfg=1")
    if audio < 2:
        raise UserError("the second stage needs at least two audio latents; make a longer clip")


def require_finite(video: torch.Tensor, audio: torch.Tensor, settings: Settings) -> None:
    """Raises UserError for latents that hold NaN or infinity."""
    if not (video.isfinite().all() and audio.isfinite().all()):
        raise UserError(
            f"the network's output is not finite at solver={settings.solver}, steps={settings.steps}; "
            "its training diverged, or the guidance is far too strong"
        )


_first_stages: dict[tuple[str, str], Loaded] = {}


def with_first_stage(loaded: Loaded, codecs: CodecBundle, first: str | None = None) -> Pipeline:
    """The second stage `loaded` behind the checkpoint `first`, which is read once per process, to the same device.

    Args:
        first: None is the shipped base of the codecs' world, such as scene/base.

    Raises:
        UserError: a checkpoint that cannot be found, or of other codecs; None where no base ships for the codecs.
    """
    if first is None:
        first = f"{codecs.name}/base"
        if first not in zoo.checkpoint_names():
            raise UserError(
                f"no first stage ships for codecs={codecs.name}; set callbacks.samples.pipeline.first to its checkpoint"
            )
    device = next(loaded.denoiser.parameters()).device
    key = first, str(device)
    if key not in _first_stages:
        _first_stages[key] = zoo.load(first, device)
    return Pipeline(_first_stages[key], codecs, second=loaded)
