"""Codec bundles: the video codec, audio codec and text encoder that a model works with, and their latent contract.

`tiny` ships with the zoo and runs anywhere. `released` is that of the published weights: Wan 2.2 VAE, Stable Audio
Oobleck and T5-Gemma, which the user has to fetch (their licences differ, see the README).
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from magihuman.codecs import tiny_captions
from magihuman.codecs.base import AudioCodec, TextEncoder, VideoCodec
from magihuman.errors import UserError
from magihuman.models.latent_contract import Contract

NAMES = ("tiny", "released")
TINY_FILES = Path(__file__).resolve().parents[1] / "zoo" / "weights" / "tiny" / "codecs"

# Where the parts of `released` are looked for when no path is given.
RELEASED_VARIABLES = {
    "video_codec": "MAGIHUMAN_WAN_VAE",
    "audio_codec": "MAGIHUMAN_STABLE_AUDIO",
    "text_encoder": "MAGIHUMAN_T5GEMMA",
}


@dataclass(frozen=True)
class CodecBundle:
    """Codecs, text encoder and contract; `height`, `width` and `frames` are the usual clip.

    Where only prompts of one form mean anything, `prompt_pattern` is a regular expression that matches them whole
    and `prompt_example` is one of them.
    """

    name: str
    contract: Contract
    video_codec: VideoCodec
    audio_codec: AudioCodec
    text_encoder: TextEncoder
    height: int
    width: int
    frames: int
    prompt_pattern: str | None = None
    prompt_example: str | None = None


def load_bundle(name: str, device: str | torch.device = "cpu", **paths: str | None) -> CodecBundle:
    """Build the codec bundle called `name`.

    Args:
        paths: for `released`: video_codec, audio_codec, text_encoder (files or folders). A path that is not given
            comes from the environment: MAGIHUMAN_WAN_VAE, MAGIHUMAN_STABLE_AUDIO, MAGIHUMAN_T5GEMMA.

    Raises:
        UserError: unknown name, or a part of `released` that is not on this machine.
    """
    if name == "tiny":
        return _tiny_bundle(torch.device(device))
    if name == "released":
        return _released_bundle(torch.device(device), paths)
    raise UserError(f"codecs {name!r} are unknown; choose one of {', '.join(NAMES)}")


def _contract(
    names: tuple[str, str, str], video: VideoCodec, audio: AudioCodec, text: TextEncoder
) -> Contract:
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


def _fitted(module: Any, file: Path) -> str:
    """Load `file` strictly into `module`; returns a short content hash for the contract."""
    from safetensors.torch import load_file

    if not file.exists():
        raise UserError(
            f"the tiny world's codec {file} is missing; make it with `python -m data.tiny.fit_codec`"
        )
    module.load_state_dict({k: v.float() for k, v in load_file(file).items()})
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


def _tiny_bundle(device: torch.device) -> CodecBundle:
    from safetensors import safe_open

    from magihuman.codecs.text_encoders import ByteTextEncoder
    from magihuman.codecs.tiny import TinyAudioCodec, TinyVideoCodec

    video_file, audio_file = TINY_FILES / "video_codec.safetensors", TINY_FILES / "audio_codec.safetensors"
    if not video_file.exists():
        raise UserError(
            f"the tiny world's codec {video_file} is missing; make it with `python -m data.tiny.fit_codec`"
        )
    with safe_open(video_file, "pt") as tensors:
        channels = tensors.get_slice("mean").get_shape()[0]
    video, audio, text = TinyVideoCodec(channels), TinyAudioCodec(), ByteTextEncoder()
    video_hash, audio_hash = _fitted(video, video_file), _fitted(audio, audio_file)
    names = (f"tiny-{video_hash}", f"tiny-{audio_hash}", "bytes-1")
    contract = _contract(names, video, audio, text)
    video.to(device).eval().requires_grad_(False)
    audio.to(device).eval().requires_grad_(False)
    return CodecBundle(
        "tiny", contract, video, audio, text, height=64, width=64, frames=25,
        prompt_pattern=tiny_captions.CAPTION, prompt_example=tiny_captions.EXAMPLE,
    )  # fmt: skip


def _released_bundle(device: torch.device, paths: dict[str, str | None]) -> CodecBundle:
    from magihuman.codecs.oobleck import OobleckCodec
    from magihuman.codecs.text_encoders import T5GemmaEncoder
    from magihuman.codecs.wan import WanCodec

    unknown = set(paths) - set(RELEASED_VARIABLES)
    if unknown:
        raise UserError(
            f"the released codecs have no part {sorted(unknown)}; parts are {list(RELEASED_VARIABLES)}"
        )
    found = {
        part: paths.get(part) or os.environ.get(variable) for part, variable in RELEASED_VARIABLES.items()
    }
    missing = [f"{part} (or {RELEASED_VARIABLES[part]})" for part, path in found.items() if not path]
    if missing:
        raise UserError(
            f"the released codecs need a path for {', '.join(missing)}; the README says where to get them"
        )
    video = WanCodec.load(str(found["video_codec"]), device=device)
    audio = OobleckCodec.load(str(found["audio_codec"]), device=device)
    text = T5GemmaEncoder.load(str(found["text_encoder"]), device=device)
    names = ("wan2.2", "stable-audio-oobleck", "t5gemma-9b-9b-ul2")
    contract = _contract(names, video, audio, text)
    return CodecBundle("released", contract, video, audio, text, height=256, width=448, frames=101)
