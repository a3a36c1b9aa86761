"""Codec bundles: the video codec, audio codec and text encoder that a model works with, and their latent contract.

    bundle_spec("released").resolutions["540p"]     # facts that need no weights
    load_bundle("scene").video_codec.encode(frames)  # [B,3,F,H,W] in [-1,1] -> latents

`tiny` and `scene` are the worlds of puppets (`magihuman.codecs.tiny_captions`): the same codecs, which ship with the zoo and
run anywhere. `released` is the bundle of the published weights: Wan 2.2 VAE, Stable Audio
Oobleck and T5-Gemma, which the user has to fetch (their licences differ, see magihuman/zoo/README.md). A name of the
form `package.module:function` is an own bundle: the function takes a device and returns a `CodecBundle`. Checkpoints
and shards name their bundle; since such a name is code, it is imported only after the user has named it, too
(`allow_codecs`).
"""

import importlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from magihuman.codecs import tiny_captions
from magihuman.codecs.protocols import AudioCodec, TextEncoder, VideoCodec
from magihuman.errors import UserError
from magihuman.io.files import WEIGHTS
from magihuman.io.provenance import file_hash
from magihuman.models.config import Contract

if TYPE_CHECKING:
    import torch

    from magihuman.codecs.oobleck import OobleckCodec
    from magihuman.codecs.wan import WanCodec

NAMES = (*tiny_captions.FORMS, "released")

RELEASED_REPO = "GAIR/daVinci-MagiHuman"
ROLES = ("base", "distill", "540p_sr", "1080p_sr")
"""The released networks, as their folders are called."""

# Environment variables with the paths of the released parts, for parts whose path is not given.
RELEASED_VARIABLES = {
    "video_codec": "MAGIHUMAN_WAN_VAE",
    "audio_codec": "MAGIHUMAN_STABLE_AUDIO",
    "text_encoder": "MAGIHUMAN_T5GEMMA",
}

RELEASED_TEXT_CHANNELS = 3584
"""Width of the released text encoder's features."""

Resolution = tuple[tuple[int, int], tuple[int, int] | None]
"""(height, width) in pixels of the first stage, and of the second where there is one."""


@dataclass(frozen=True)
class Length:
    """Length of a clip: pixel frames, and audio latents A of 1/fps seconds each."""

    frames: int
    audio: int


def frames_for(seconds: float, fps: float, stride: int) -> int:
    """The number of frames stride * k + 1 that is nearest to `seconds` at `fps`, at least 1.

    Raises:
        UserError: seconds is not positive.
    """
    _require_positive(seconds)
    return max(0, round((seconds * fps - 1) / stride)) * stride + 1


def _require_positive(seconds: float) -> None:
    if not 0 < seconds < math.inf:
        raise UserError(f"seconds={seconds:g} must be positive")


@dataclass(frozen=True)
class BundleSpec:
    """Facts about a codec bundle that are known without loading it; the defaults are those of tiny and own bundles.

    Attributes:
        name: tiny, scene, released, or package.module:function.
        published: the codecs of the published weights: their checkpoints have the published layout, and the memory and
            FLOPs of their codecs are known (`magihuman.zoo.footprint`).
        variables: parts to be fetched by the user, with the environment variables of their paths.
        resolutions: sizes by name.
        patch: side of a video token in latents, in the models of these codecs; 1 where it is unknown.
        batch: clips computed at once by default.
        many_lengths: the models were trained on clips of many lengths, not on one.
        negative_prompt: guided models expect a negative prompt.
        turbo: folder next to a checkpoint with the light decoder that is used by default where it is there, or None.
        crf: x264's quality of written clips.
    """

    name: str
    published: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    resolutions: Mapping[str, Resolution] = field(default_factory=dict)
    patch: int = 1
    batch: int = 8
    many_lengths: bool = False
    negative_prompt: bool = False
    turbo: str | None = None
    crf: int = 18

    def seconds(self, frames: int, contract: Contract) -> float:
        """The setting seconds= of a clip of that many frames."""
        return frames / contract.fps

    def length(self, seconds: float, contract: Contract, given_audio: float | None = None) -> Length:
        """The possible length nearest to `seconds`: as many audio latents as frames; short given audio is padded.

        Args:
            given_audio: seconds of the audio that the clip gets, or None.

        Raises:
            UserError: seconds is not positive, or the given audio is shorter than one latent.
        """
        frames = frames_for(seconds, contract.fps, contract.video_stride[0])
        return Length(frames, frames)

    def paths(self, given: Mapping[str, str | None]) -> dict[str, str]:
        """Paths of the parts to be fetched: the given ones, then those of the environment.

        Raises:
            UserError: the bundle has no such part.
        """
        chosen = {part: path for part, path in given.items() if path is not None}
        for part in chosen:
            if part not in self.variables:
                raise UserError(f"{part}= is for released checkpoints, and the codecs here are {self.name!r}")
        known = {part: os.environ.get(variable) for part, variable in self.variables.items()}
        return {part: path for part, path in {**known, **chosen}.items() if path}


class _ReleasedSpec(BundleSpec):
    """One audio latent more than fps * seconds, and as many latent frames as they begin (SPEC 4.1)."""

    def seconds(self, frames: int, contract: Contract) -> float:
        return (frames - 1) / contract.fps

    def length(self, seconds: float, contract: Contract, given_audio: float | None = None) -> Length:
        """See `BundleSpec.length`. Given audio decides: its latents are counted after it was cut to `seconds`, so short
        audio makes a short clip. Above 29 s, where it is encoded in windows, a started latent counts (SPEC 4.7)."""
        from magihuman.codecs.oobleck import WINDOW_LATENTS

        _require_positive(seconds)
        if given_audio is None:
            audio = round(contract.fps * seconds) + 1
        else:
            latents = round(min(given_audio, seconds) * contract.fps, 6)  # a sample is worth 5e-4 latents
            audio = math.floor(latents) if latents <= WINDOW_LATENTS else math.ceil(latents)
            if audio < 1:
                raise UserError(f"the given audio lasts {given_audio:.3f} s; give at least {1 / contract.fps:g} s")
        stride = contract.video_stride[0]
        return Length((audio - 1) // stride * stride + 1, audio)


SPECS = {
    **{world: BundleSpec(world, patch=4) for world in tiny_captions.FORMS},
    "released": _ReleasedSpec(
        "released",
        published=True,
        patch=2,
        variables=RELEASED_VARIABLES,
        resolutions={
            "256p": ((256, 448), None),
            "540p": ((256, 448), (512, 896)),
            "1080p": ((256, 448), (1088, 1920)),  # not cut to 1080
        },
        batch=1,
        many_lengths=True,
        negative_prompt=True,
        turbo="turbo_vae",
        crf=10,
    ),
}


def bundle_spec(name: str) -> BundleSpec:
    """Facts about the codec bundle called `name`; own bundles get the defaults, and nothing is imported."""
    return SPECS.get(name) or BundleSpec(name)


_allowed: set[str] = set()


def allow_codecs(name: str | None) -> None:
    """Let this process import the own bundle `name`, which the user has named in a setting; None for none."""
    if name is not None:
        _allowed.add(name)


def require_allowed(name: str) -> None:
    """Raises UserError for an own bundle that only a file names: loading it would run code that the user did not choose."""
    if ":" in name and name not in _allowed:
        raise UserError(
            f"the codecs {name} are code that a file names; if you trust them, give codecs={name} "
            f"(for training data.module.codecs={name})"
        )


@dataclass(frozen=True)
class CodecBundle:
    """Codecs, text encoder and contract; `height`, `width` and `frames` are the usual clip. Codecs are None where a process
    samples and does not decode.

        CodecBundle("own", contract, video_codec, audio_codec, text_encoder, height=64, width=64, frames=25)

    Where only prompts of one form mean anything, `prompt_pattern` is a regular expression that matches them whole
    and `prompt_example` is one of them.
    """

    name: str
    contract: Contract
    video_codec: VideoCodec | Any
    audio_codec: AudioCodec | Any
    text_encoder: TextEncoder
    height: int
    width: int
    frames: int
    prompt_pattern: str | None = None
    prompt_example: str | None = None


def load_bundle(name: str, device: "str | torch.device" = "cpu", **paths: str | None) -> CodecBundle:
    """Load the codec bundle called `name`.

    Args:
        paths: for `released`: video_codec, audio_codec, text_encoder (files or folders). A path that is not given
            comes from the environment: MAGIHUMAN_WAN_VAE, MAGIHUMAN_STABLE_AUDIO, MAGIHUMAN_T5GEMMA.

    Raises:
        UserError: unknown name, a part of `released` that is not on this machine, or an own bundle that cannot be
            imported or that the user has not named (see `allow_codecs`).
    """
    import torch

    if name in tiny_captions.FORMS:
        return _tiny_bundle(name, torch.device(device))
    if name == "released":
        return _released_bundle(torch.device(device), paths)
    if ":" in name:
        return _own_bundle(name, str(device))
    raise UserError(
        f"codecs {name!r} are unknown; choose one of {', '.join(NAMES)}, or package.module:function of your own"
    )


def _own_bundle(name: str, device: str) -> CodecBundle:
    require_allowed(name)
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)(device)
    except (ImportError, AttributeError) as error:
        raise UserError(f"codecs={name}: {error}; give package.module:function") from error
    if not isinstance(made, CodecBundle):
        raise UserError(f"codecs={name} returns a {type(made).__name__}, not a CodecBundle")
    return made


def _contract(names: tuple[str, str, str], video: VideoCodec, audio: AudioCodec, text: TextEncoder) -> Contract:
    """The contract of these parts at 25 fps; `names` of video codec, audio codec and text encoder."""
    return Contract(
        *names,
        video_channels=video.channels,
        audio_channels=audio.channels,
        text_channels=text.channels,
        video_stride=video.stride,
        fps=25.0,
        audio_rate=audio.sample_rate,
        waveform_channels=audio.waveform_channels,
    )


def _tiny_state(world: str, codec: str) -> tuple[dict[str, "torch.Tensor"], str]:
    """The fitted weights of a codec of the puppets in fp32, and its name in the contract with a short content hash."""
    from safetensors.torch import load_file

    file = WEIGHTS / world / "codecs" / f"{codec}.safetensors"
    if not file.exists():
        raise UserError(f"the puppets' codec {file} is missing; make it with `python -m data.tiny.fit_codec`")
    return {key: tensor.float() for key, tensor in load_file(file).items()}, f"{world}-{file_hash(file)[:8]}"


def _tiny_bundle(world: str, device: "torch.device") -> CodecBundle:
    from magihuman.codecs.text_encoders import ByteTextEncoder
    from magihuman.codecs.tiny import TinyAudioCodec, TinyVideoCodec

    form = tiny_captions.FORMS[world]
    video_state, video_name = _tiny_state(world, "video_codec")
    audio_state, audio_name = _tiny_state(world, "audio_codec")
    video, text = TinyVideoCodec(len(video_state["mean"])), ByteTextEncoder()
    audio = TinyAudioCodec(floor=form.audio_floor)
    for codec, state in ((video, video_state), (audio, audio_state)):
        codec.load_state_dict(state)
        codec.to(device).eval().requires_grad_(False)
    return CodecBundle(
        world, _contract((video_name, audio_name, "bytes-1"), video, audio, text), video, audio, text,
        height=64, width=64, frames=form.frames, prompt_pattern=form.pattern, prompt_example=form.example,
    )  # fmt: skip


def load_media_codecs(
    name: str, device: "str | torch.device" = "cpu", **paths: str | None
) -> tuple[VideoCodec, AudioCodec]:
    """Video and audio codec of a bundle; of `released` without its text encoder, which is by far the largest part.

    Arguments and errors as of `load_bundle`.
    """
    import torch

    if name != "released":
        bundle = load_bundle(name, device, **paths)
        return bundle.video_codec, bundle.audio_codec
    found = _released_paths({part: path for part, path in paths.items() if part != "text_encoder"}, text=False)
    return _released_media(found, torch.device(device))


def _released_paths(paths: Mapping[str, str | None], text: bool) -> dict[str, str]:
    """Paths of the released parts; raises UserError naming those that are missing."""
    found = bundle_spec("released").paths(paths)
    wanted = [part for part in RELEASED_VARIABLES if text or part != "text_encoder"]
    missing = [f"{part} (or {RELEASED_VARIABLES[part]})" for part in wanted if part not in found]
    if missing:
        raise UserError(
            f"the released codecs need a path for {', '.join(missing)}; magihuman/zoo/README.md says where to get them"
        )
    return found


def _released_media(paths: Mapping[str, str], device: "torch.device") -> "tuple[WanCodec, OobleckCodec]":
    from magihuman.codecs.oobleck import OobleckCodec
    from magihuman.codecs.wan import WanCodec

    return WanCodec.load(paths["video_codec"], device=device), OobleckCodec.load(paths["audio_codec"], device=device)


def _released_bundle(device: "torch.device", paths: Mapping[str, str | None]) -> CodecBundle:
    from magihuman.codecs.text_encoders import T5GemmaEncoder

    found = _released_paths(paths, text=True)
    video, audio = _released_media(found, device)
    text = T5GemmaEncoder.load(found["text_encoder"], device=device)
    contract = _contract(("wan2.2", "stable-audio-oobleck", "t5gemma-9b-9b-ul2"), video, audio, text)
    return CodecBundle("released", contract, video, audio, text, height=256, width=448, frames=101)
