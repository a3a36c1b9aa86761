"""Text encoder, codecs and decoder of a timed request; the released ones with random weights.

A component that this machine cannot run is `Missing`, with the reason; its stage is then reported as not measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from inference.benchmark.roofline.cases import ClipCase
from inference.benchmark.roofline.work import decoders as released_decoders
from magihuman.codecs import costs
from magihuman.codecs.causal_decoder import CausalDecoder, CausalDecoderCodec
from magihuman.codecs.causal_decoder_config import CausalDecoderConfig
from magihuman.codecs.turbo_vaed import TurboCodec, TurboConfig, TurboDecoder
from magihuman.errors import UserError
from magihuman.zoo import decoders as students
from magihuman.zoo import footprint, names

WAN: dict[str, Any] = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True], "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip
OOBLECK: dict[str, Any] = {
    "encoder_hidden_size": 128, "downsampling_ratios": [2, 4, 4, 8, 8], "channel_multiples": [1, 2, 4, 8, 16],
    "decoder_channels": 128, "decoder_input_channels": 64, "audio_channels": 2, "sampling_rate": 44100,
}  # fmt: skip
T5GEMMA: dict[str, Any] = {
    "hidden_size": costs.T5GEMMA_WIDTH, "intermediate_size": costs.T5GEMMA_INNER,
    "num_hidden_layers": costs.T5GEMMA_LAYERS, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 256, "vocab_size": costs.T5GEMMA_WORDS,
}  # fmt: skip

_WORKSPACE = 1.3  # a decoder's activations with the workspaces of its convolutions, relative to activations alone
_USABLE = 0.95  # of the device's memory


@dataclass(frozen=True)
class Missing:
    """Reason for a missing component."""

    reason: str


@dataclass(frozen=True)
class Parts:
    """Of a request; each a codec or encoder, or `Missing`.

    Attributes:
        text: encodes the prompt; video: encodes images; audio: encodes and decodes waveforms; decoder: decodes frames.
        prompt: that gives the case's number of text tokens.
        decoder_name, decoder_weights: of the decoder, in words.
    """

    text: Any
    video: Any
    audio: Any
    decoder: Any
    prompt: str
    decoder_name: str
    decoder_weights: str


def make(case: ClipCase, decoder: str, device: torch.device, dtype: torch.dtype) -> Parts:
    """All parts of a case, on the device.

    Args:
        decoder: a name of `decoder_names`, or auto.

    Raises:
        UserError: an unknown decoder.
    """
    if case.released:
        name = "turbo" if decoder == "auto" else decoder
        return Parts(
            text=_text(case, device),
            video=_had(lambda: _wan(device), "diffusers", device),
            audio=_had(lambda: _oobleck(device), "diffusers", device),
            decoder=released_decoder(name, device, dtype),
            prompt="",
            decoder_name=name,
            decoder_weights="random",
        )
    from magihuman.codecs.bundle import load_bundle
    from magihuman.codecs.tiny_captions import FORMS

    codecs = load_bundle("tiny", device)
    chosen: Any = codecs.video_codec
    name, weights = "codec", codecs.contract.video_codec
    if decoder not in ("auto", "codec"):
        known = decoder_names(case)
        if decoder not in known:
            raise UserError(f"decoder={decoder} is unknown for size=tiny; choose one of {', '.join(known)}")
        name = weights = decoder
        trained = decoder in names.decoder_names()
        chosen = students.load(decoder, device) if trained else random_codec(decoder, device, torch.float32)
    return Parts(
        text=codecs.text_encoder,
        video=codecs.video_codec,
        audio=codecs.audio_codec,
        decoder=chosen,
        prompt=FORMS["tiny"].example,
        decoder_name=name,
        decoder_weights=weights,
    )


def _text(case: ClipCase, device: torch.device) -> Any:
    if device.type == "cpu":
        return Missing("its 9 B parameters are for a GPU")
    if device.type == "cuda":  # "meta" tensors take no memory
        last = case.stages[-1]
        needed = footprint.weight_bytes(last.config, "bf16") + costs.text_encoder_bytes()
        needed += int(_WORKSPACE * costs.TURBO_DECODER.activations(case.pixels[0] * case.pixels[1]))
        memory = torch.cuda.get_device_properties(device).total_memory
        # Else a clip's decoder runs out of memory, and with it goes the clip's total.
        if needed > _USABLE * memory:
            return Missing(f"{memory / 1e9:.0f} GB do not hold it together with the network and the running decoder")
    return _had(lambda: _t5gemma(device, case.stages[0].text), "transformers", device)


def decoder_names(case: ClipCase) -> tuple[str, ...]:
    """Decoders of a case's latents; grows with configs/decoder and the decoders that ship with the package."""
    if case.released:
        return released_decoders()
    own = [name for name in names.arch_names("decoder") if students.arch(name)["codecs"] == "tiny"]
    return ("codec", *own, *(name for name in names.decoder_names() if name.startswith("tiny/")))


def released_decoder(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A decoder of the released latents with random weights, or `Missing`.

    Args:
        device: "meta" makes shapes only.

    Raises:
        UserError: unknown name.
    """
    if name not in released_decoders():
        raise UserError(f"decoder={name} is unknown; choose one of {', '.join(released_decoders())}")
    if name == "wan":
        return _had(lambda: _wan(device), "diffusers", device)
    return random_codec("released" if name == "turbo" else name, device, dtype)


def random_codec(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> CausalDecoderCodec | TurboCodec:
    """An architecture of configs/decoder with random weights, always the same ones.

    Args:
        device: "meta" makes shapes only.
    """
    described = students.arch(name)
    with torch.random.fork_rng(), torch.device(device), torch.no_grad():
        torch.manual_seed(0)
        if described["layout"] == "causal":
            return CausalDecoderCodec(CausalDecoder(CausalDecoderConfig.from_dict(described["network"])).to(dtype))
        config = TurboConfig.from_json(described["network"])
        return TurboCodec(TurboDecoder(config).to(dtype), config).eval().requires_grad_(False)


def _had(build: Callable[[], Any], needs: str, device: torch.device) -> Any:
    """The component, or why it is missing: its library, memory, or a version of the library with other names."""
    if find_spec(needs) is None:
        return Missing(f"{needs} is not installed")
    try:
        with torch.no_grad():
            return build()
    except torch.OutOfMemoryError:
        return Missing(f"the memory of {device} does not hold it")
    except Exception as error:  # the networks' times are wanted all the same
        return Missing(f"{needs} cannot build it ({reason_of(error)})")


def reason_of(error: BaseException) -> str:
    """Message of an error in one line; of the innermost one where errors wrap others, as compilers' do."""
    while isinstance(cause := getattr(error, "inner_exception", None) or error.__cause__, BaseException):
        error = cause
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


def _wan(device: torch.device) -> Any:
    from diffusers import AutoencoderKLWan

    from magihuman.codecs.wan import WanCodec

    with torch.device(device):
        return WanCodec(AutoencoderKLWan.from_config(WAN).to(torch.bfloat16)).to(device)


def _oobleck(device: torch.device) -> Any:
    from diffusers import AutoencoderOobleck

    from magihuman.codecs.oobleck import OobleckCodec

    with torch.device(device):
        return OobleckCodec(AutoencoderOobleck.from_config(OOBLECK)).to(device)


class _Words:
    """Stands for the tokenizer: any prompt has this many tokens."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, prompt: str, return_tensors: str = "pt") -> Any:
        from transformers import BatchEncoding

        ids = torch.arange(self.count).remainder(1000)[None]
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _t5gemma(device: torch.device, tokens: int) -> Any:
    from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    from magihuman.codecs.text_encoders import T5GemmaEncoder, uncapped_attention

    side = T5GemmaModuleConfig(**T5GEMMA)
    config = T5GemmaConfig(encoder=side, decoder=side, is_encoder_decoder=False)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = T5GemmaEncoderModel(config)
            model.set_attn_implementation(uncapped_attention())  # as the release's
    finally:
        torch.set_default_dtype(usual)
    return T5GemmaEncoder(model, _Words(tokens)).to(device)
