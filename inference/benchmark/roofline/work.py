"""FLOPs and bytes of every stage of a clip, and the least time that a device's limits allow for them.

Exact for the transformer; codecs by coefficients counted on shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from inference.benchmark.roofline.cases import ClipCase, DenoisingStage
from magihuman.codecs import costs
from magihuman.codecs.bundle import bundle_spec
from magihuman.codecs.causal_decoder_config import CausalDecoderConfig
from magihuman.errors import UserError
from magihuman.models.flops import BF16, FP32, ForwardFlops, forward_flops, pointwise_bytes, product_bytes
from magihuman.models.gpu_specs import Gpu
from magihuman.zoo import footprint
from magihuman.zoo.footprint import TokenCounts

PUBLISHED_DECODERS = ("turbo", "wan")


@dataclass(frozen=True)
class Work:
    """One stage of a request.

    Attributes:
        flops: of the whole stage.
        moved: bytes of device memory that it cannot avoid: weights once per pass, and for networks every activation
            between kernels once out and once in; for codecs only what enters and leaves.
        sent: bytes over the link to the host.
    """

    stage: str
    flops: int
    moved: int
    sent: int = 0
    tokens: TokenCounts | None = None
    passes: int = 1


def stages(case: ClipCase, decoder: str = "turbo") -> list[Work]:
    """All stages in the order in which they run. Image and audio encoders run only where those are given; the tiny
    world's codecs and text encoder are not counted.

    Raises:
        UserError: unknown decoder.
    """
    networks = [network(stage) for stage in case.stages]
    if not case.released or case.size == "layer":
        return networks
    return [
        text_encoder(case.stages[0].text),
        picture_encoder(case),
        sound_encoder(case),
        *networks,
        video_decoder(case, decoder),
        Work("to host", 0, case.bytes_out, case.bytes_out),
        sound_decoder(case),
    ]


def forward(stage: DenoisingStage) -> ForwardFlops:
    """Of one pass."""
    tokens = stage.tokens
    return forward_flops(
        stage.config, tokens.video, tokens.audio, tokens.text, frames=stage.frames, window=stage.window
    )


def network(stage: DenoisingStage) -> Work:
    """A denoising loop, products in bf16."""
    moved = (
        footprint.weight_bytes(stage.config, "bf16")
        + product_bytes(stage.config, stage.tokens.total)
        + pointwise_bytes(stage.config, stage.tokens.total)
    )
    return Work(stage.name, stage.passes * forward(stage).total, stage.passes * moved, 0, stage.tokens, stage.passes)


def text_encoder(tokens: int) -> Work:
    """Encoder half of T5-Gemma, one prompt."""
    moved = costs.text_encoder_bytes() - BF16 * costs.T5GEMMA_WIDTH * (costs.T5GEMMA_WORDS - tokens)
    return Work("text", costs.text_encoder_flops(tokens), moved)


def picture_encoder(case: ClipCase) -> Work:
    """Wan encoder, one image of every stage's size."""
    flops = sum(costs.wan_encoder_flops(stage.height, stage.width) for stage in case.stages)
    pixels = sum(3 * stage.height * stage.width * case.stride[1] * case.stride[2] for stage in case.stages)
    moved = BF16 * (len(case.stages) * costs.WAN_ENCODER_PARAMETERS + pixels)
    return Work("image", flops, moved)


def sound_encoder(case: ClipCase) -> Work:
    """Oobleck encoder; fp32."""
    return Work("sound", costs.OOBLECK_ENCODE * case.audio, FP32 * costs.OOBLECK_ENCODER_PARAMETERS)


def sound_decoder(case: ClipCase) -> Work:
    """Oobleck decoder; fp32."""
    moved = FP32 * costs.OOBLECK_DECODER_PARAMETERS
    return Work("audio decode", costs.OOBLECK_DECODE * case.audio, moved)


def video_decoder(case: ClipCase, decoder: str = "turbo") -> Work:
    """The last stage's latents to 8-bit frames on the device."""
    last = case.stages[-1]
    flops = decoder_flops(decoder, last.frames, last.height, last.width)
    return Work("video decode", flops, BF16 * decoder_parameters(decoder) + case.bytes_out)


def decoders() -> tuple[str, ...]:
    """Decoders of the released latents: the published two, and our students of configs/decoder."""
    return (*PUBLISHED_DECODERS, *_students())


def decoder_parameters(decoder: str) -> int:
    """Raises UserError for an unknown decoder."""
    return _counts(decoder)[0]


def decoder_flops(decoder: str, frames: int, height: int, width: int) -> int:
    """FLOPs of a decoder for latents [T,h,w]; the released Turbo in overlapping windows.

    Raises:
        UserError: unknown decoder.
    """
    return _counts(decoder)[1](frames, height, width)


def _counts(decoder: str) -> tuple[int, Callable[[int, int, int], int]]:
    """Parameters, and the function of FLOPs."""
    known = {name: (own.parameter_count(), own.flops) for name, own in _students().items()}
    known["turbo"] = costs.TURBO_PARAMETERS, costs.turbo_decoder_flops
    known["wan"] = costs.WAN_DECODER_PARAMETERS, costs.wan_decoder_flops
    if decoder not in known:
        raise UserError(f"decoder={decoder} is unknown; choose one of {', '.join(decoders())}")
    return known[decoder]


def _students() -> dict[str, CausalDecoderConfig]:
    from magihuman.zoo import decoders as students
    from magihuman.zoo import names

    described = {name: students.arch(name) for name in names.arch_names("decoder")}
    return {
        name: CausalDecoderConfig.from_dict(values["network"])
        for name, values in described.items()
        if values["layout"] == "causal" and bundle_spec(values["codecs"]).published
    }


# -- bounds

PUBLISHED = {
    "256p": {"base": 1.6, "decode": 0.4, "total": 2.0},
    "540p": {"base": 1.6, "sr": 5.1, "decode": 1.3, "total": 8.0},
    "1080p": {"base": 1.6, "sr": 31.0, "decode": 5.8, "total": 38.4},
}
"""Seconds that the paper gives for a 5-second clip on one H100."""


def limits(device: Gpu, tflops: float | None = None, bandwidth: float | None = None) -> Gpu:
    """A device with measured peaks (10^12 FLOP/s, 10^12 bytes per second) in place of the data sheet's."""
    return replace(
        device,
        name=device.name + (f" at {tflops:g} TFLOP/s" if tflops else ""),
        bf16=tflops * 1e12 if tflops else device.bf16,
        bandwidth=bandwidth * 1e12 if bandwidth else device.bandwidth,
    )


@dataclass(frozen=True)
class Bound:
    """The least time of a stage in seconds, and the limit that sets it: compute, memory or link."""

    seconds: float
    by: str


def bound(work: Work, device: Gpu) -> Bound:
    """Where arithmetic and traffic overlap perfectly."""
    compute, memory, link = work.flops / device.bf16, work.moved / device.bandwidth, work.sent / device.link
    times = {"compute": compute, "memory": memory, "link": link}
    by = max(times, key=lambda name: times[name])
    return Bound(times[by], by)
