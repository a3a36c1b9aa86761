"""Parameters, FLOPs and memory of the released codecs, the text encoder and our decoders; no torch.

Coefficients of the released networks are counted on shapes alone ("meta" device); tests count them again. Workspaces of
convolutions and attention are not included.
"""

from dataclasses import dataclass

from magihuman.codecs.causal_decoder_config import REACH, CausalDecoderConfig
from magihuman.models.flops import BF16, FP32


@dataclass(frozen=True)
class CodecMemory:
    """Bytes of a codec half: weights; activations = fixed + per_unit * units, where a unit is a pixel of one frame's
    area for video and a latent for audio."""

    weights: int
    per_unit: float
    fixed: int = 0

    def activations(self, units: int) -> int:
        return int(self.fixed + self.per_unit * units)


# -- text: encoder half of T5-Gemma 9B-9B

T5GEMMA_LAYERS, T5GEMMA_WIDTH, T5GEMMA_INNER, T5GEMMA_WORDS = 42, 3584, 14336, 256_000
T5GEMMA_QUERIES, T5GEMMA_KEYS = 16 * 256, 8 * 256
TEXT_LIMIT = 640
"""Tokens that reach the model (SPEC 5)."""
USUAL_TEXT = 340
"""Tokens of the released example prompt's 254 words, about 1.33 each."""


def text_encoder_bytes(streamed: bool = False) -> int:
    """Weights in bf16; with streamed layers two of them at a time."""
    attention = 2 * T5GEMMA_WIDTH * (T5GEMMA_QUERIES + T5GEMMA_KEYS)
    layer = attention + 3 * T5GEMMA_WIDTH * T5GEMMA_INNER + 4 * T5GEMMA_WIDTH
    layers = 2 if streamed else T5GEMMA_LAYERS
    return BF16 * (T5GEMMA_WORDS * T5GEMMA_WIDTH + layers * layer + T5GEMMA_WIDTH)


def text_activation_bytes(tokens: int) -> int:
    """One prompt: the MLP's two products, the residual, and the fp32 scores of eager attention (SDPA needs fewer)."""
    return tokens * (BF16 * 3 * T5GEMMA_INNER + 8 * T5GEMMA_WIDTH) + 2 * FP32 * 16 * tokens * tokens


def text_encoder_flops(tokens: int) -> int:
    """One prompt."""
    products = 2 * T5GEMMA_WIDTH * (T5GEMMA_QUERIES + T5GEMMA_KEYS) + 3 * T5GEMMA_WIDTH * T5GEMMA_INNER
    return T5GEMMA_LAYERS * (2 * tokens * products + 4 * tokens**2 * T5GEMMA_QUERIES)


# -- video: Wan 2.2 in bf16, one latent frame at a time, which keeps two frames before every convolution

WAN_PARAMETERS, WAN_ENCODER_PARAMETERS, WAN_DECODER_PARAMETERS = 704_688_668, 149_637_088, 555_051_580
WAN_ENCODER = CodecMemory(BF16 * WAN_PARAMETERS, 984)
WAN_DECODER = CodecMemory(BF16 * WAN_PARAMETERS, 10_850)
# FLOPs per latent position (row times column) of the first and of each later latent frame; width of the attention
# within a frame.
WAN_FIRST, WAN_LATER, WAN_MID = 5_830_775_296, 18_835_608_064, 1024
WAN_ENCODE_FIRST, WAN_ENCODE_MID = 1_188_800_512, 640


def wan_encoder_flops(height: int, width: int) -> int:
    """One frame, of latents [h,w]."""
    area = height * width
    return WAN_ENCODE_FIRST * area + 4 * area**2 * WAN_ENCODE_MID


def wan_decoder_flops(frames: int, height: int, width: int) -> int:
    """Latents [T,h,w]."""
    area = height * width
    return area * (WAN_FIRST + WAN_LATER * (frames - 1)) + frames * 4 * area**2 * WAN_MID


# -- video: the released Turbo decoder in bf16, in overlapping windows of nine latents (SPEC 8.3)

TURBO_PARAMETERS = 107_122_892
TURBO_DECODER = CodecMemory(BF16 * TURBO_PARAMETERS, 12_800)
TURBO_FIRST, TURBO_LATER = 1_131_724_800, 3_448_127_488
TURBO_CHUNK, TURBO_STEP = 7, 7


def turbo_windows(frames: int) -> list[int]:
    """Latents in each window, context included (`magihuman.codecs.turbo_vaed.windows`)."""
    later = -(-max(0, frames - TURBO_CHUNK) // TURBO_STEP)
    if not later:
        return [TURBO_CHUNK]
    return [TURBO_CHUNK + 1, *[TURBO_STEP + 2] * (later - 1), TURBO_STEP + 1]


def turbo_decoder_flops(frames: int, height: int, width: int) -> int:
    """Latents [T,h,w]."""
    first, *later = turbo_windows(frames)
    return height * width * (TURBO_FIRST + TURBO_LATER * (first - 1 + sum(later)))


# -- video: our decoders


def causal_decoder_memory(config: CausalDecoderConfig, height: int, width: int, tile: int | None = None) -> CodecMemory:
    """One of our decoders in bf16 for frames of this size, in tiles of so many pixels a side.

    Alive in its widest stage are a block's input, its middle, the same with its past, and a convolution's result; and
    the state twice, before and after. Of tiles, which overlap by a quarter (inference.decoding), one is decoded at a
    time while all of them keep a state; the blended frames are not included.
    """
    space = config.stride[1]
    rows, columns = height // space, width // space
    chunk = config.chunk(rows * columns)
    area = rows * columns
    kept = 1.0 * config.state_size() * area
    if tile is not None and tile < max(height, width):
        area = min(rows, tile // space) * min(columns, tile // space)
        kept *= 4 / 3 * (4 / 3 if tile < min(height, width) else 1)
    state = kept + config.state_size() * area
    past = 1 + REACH / (chunk * config.stride[0] / config.patch[0])
    work = (3 + past) * config.widest() * chunk * area
    return CodecMemory(BF16 * config.parameter_count(), 0, int(BF16 * (state + work)))


# -- audio: Oobleck in fp32 on the whole clip; the fixed part is its normalised weights

OOBLECK_PARAMETERS = 156_112_514
OOBLECK_ENCODER_PARAMETERS, OOBLECK_DECODER_PARAMETERS = 77_989_888, 78_122_626
OOBLECK_ENCODER = CodecMemory(FP32 * OOBLECK_PARAMETERS, 4.69e6, 75_000_000)
OOBLECK_DECODER = CodecMemory(FP32 * OOBLECK_PARAMETERS, 4.72e6, 313_000_000)
# FLOPs per audio latent.
OOBLECK_DECODE, OOBLECK_ENCODE = 5_042_339_840, 5_042_077_696

# -- the puppets' linear maps; a few copies of the clip

TINY_VIDEO = CodecMemory(219_200, 12 * FP32)
TINY_AUDIO = CodecMemory(136_160, 8 * FP32 * 640)
