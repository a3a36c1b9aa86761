"""FLOPs and bytes of every stage of a clip, and the least time that a device's limits allow for them.

Exact for the transformer; codecs by coefficients counted on shapes.
"""

from dataclasses import dataclass

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
    """Wan encoder, one picture of every stage's size."""
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
    """The last stage's latents to 8-bit pictures on the device."""
    last = case.stages[-1]
    flops = decoder_flops(decoder, last.frames, last.height, last.width)
    return Work("video decode", flops, BF16 * decoder_parameters(decoder) + case.bytes_out)


def decoders() -> tuple[str, ...]:
    """Decoders of the released latents: the published two, and our students of configs/decoder."""
    from magihuman.zoo import names

    own = [name for name in names.arch_names("decoder") if _student(name) is not None]
    return (*PUBLISHED_DECODERS, *own)


def decoder_parameters(decoder: str) -> int:
    """Raises UserError for an unknown decoder."""
    published = {"turbo": costs.TURBO_PARAMETERS, "wan": costs.WAN_DECODER_PARAMETERS}
    if decoder in published:
        return published[decoder]
    return _known_student(decoder).parameter_count()


def _student(name: str) -> CausalDecoderConfig | None:
    """An architecture of ours for the released latents; None for others."""
    from magihuman.zoo.decoders import arch

    described = arch(name)
    if not bundle_spec(described["codecs"]).published or described["layout"] != "causal":
        return None
    return CausalDecoderConfig.from_dict(described["network"])


def _known_student(name: str) -> CausalDecoderConfig:
    found = _student(name) if name in decoders() else None
    if found is None:
        raise UserError(f"decoder={name} is unknown; choose one of {', '.join(decoders())}")
    return found


def decoder_flops(decoder: str, frames: int, height: int, width: int) -> int:
    """FLOPs of a decoder for latents [T,h,w]; the released Turbo in overlapping windows.

    Raises:
        UserError: unknown decoder.
    """
    published = {"wan": costs.wan_decoder_flops, "turbo": costs.turbo_decoder_flops}
    count = published[decoder] if decoder in published else _known_student(decoder).flops
    return count(frames, height, width)


# -- bounds

PUBLISHED = {
    "256p": {"base": 1.6, "decode": 0.4, "total": 2.0},
    "540p": {"base": 1.6, "sr": 5.1, "decode": 1.3, "total": 8.0},
    "1080p": {"base": 1.6, "sr": 31.0, "decode": 5.8, "total": 38.4},
}
"""Seconds that the paper gives for a 5-second clip on one H100."""


@dataclass(frozen=True)
class DeviceLimits:
    """Peak rates of a device: FLOP/s, bytes per second of its memory and of the link to the host."""

    name: str
    flops: float
    bandwidth: float
    link: float

    @classmethod
    def of(cls, device: Gpu, tflops: float | None = None, bandwidth: float | None = None) -> "DeviceLimits":
        """Those of the data sheet, or measured ones in their place (10^12 FLOP/s, 10^12 bytes per second)."""
        name = device.name + (f" at {tflops:g} TFLOP/s" if tflops else "")
        flops = tflops * 1e12 if tflops else device.bf16
        return cls(name, flops, bandwidth * 1e12 if bandwidth else device.bandwidth, device.link)


@dataclass(frozen=True)
class Bound:
    """The least time of a stage in seconds, and the limit that sets it: compute, memory or link."""

    seconds: float
    by: str


def bound(work: Work, limits: DeviceLimits) -> Bound:
    """Where arithmetic and traffic overlap perfectly."""
    compute, memory, link = work.flops / limits.flops, work.moved / limits.bandwidth, work.sent / limits.link
    times = {"compute": compute, "memory": memory, "link": link}
    by = max(times, key=lambda name: times[name])
    return Bound(times[by], by)


def utilisation(work: Work, seconds: float, peak: float) -> float:
    """Share of the peak FLOP/s that a measured time means (MFU)."""
    return work.flops / seconds / peak
