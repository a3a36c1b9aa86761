"""Predicted times: the work of a stage at the rates of kernels, and the expected gain of each optimisation.

A prediction is a sum of parts that do not overlap: products, attention, pointwise kernels, embedders and heads, host.
The rates of `LADDER` are assumptions of the study that came before the first measurement (published kernel rates and
one measured product); they are to be replaced by measured ones. Nothing here is measured.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from inference.benchmark.roofline.cases import ClipCase, DenoisingStage, make
from inference.benchmark.roofline.work import PUBLISHED, bound, forward, limits, network, video_decoder
from magihuman.models.config import DiTConfig
from magihuman.models.flops import BF16, attention_pairs, pointwise_bytes
from magihuman.models.gpu_specs import GPUS, Gpu, recognise
from magihuman.zoo.footprint import TokenCounts

TILE = (128, 256)
"""Rows and columns of the output that one multiprocessor computes at a time."""

_GOOD_TILING = 0.97  # at which the rates were measured: only further losses are charged
_SHORT = 600.0  # tokens: attention reaches n / (n + this) of its rate for long sequences
_ENDS = 60e12  # FLOP/s of fp32 products
_COPY = 0.9  # share of the bandwidth that a kernel reaches


H200 = replace(GPUS["h200"], name="H200", bandwidth=4.3e12)
H100 = replace(GPUS["h100"], name="H100", bandwidth=2.9e12)


@dataclass(frozen=True)
class Rates:
    """Rates of kernels, in 10^12 FLOP/s.

    Attributes:
        products: of the blocks; down: of SwiGLU's down projection, whose rows may be badly aligned.
        attention, local: with all pairs, and in windows.
        pointwise: traffic of pointwise kernels as a multiple of the least (`work.pointwise_bytes`).
        fp32_boundary: queries, keys and values also pass through memory in fp32 and through permutations.
        separate: one product per expert, so that small ones fill the device badly.
        host: seconds per pass in which the device waits.
        padding: feed-forward widths are a multiple of this.
    """

    products: float
    down: float
    attention: float
    local: float
    pointwise: float = 1.0
    fp32_boundary: bool = False
    separate: bool = False
    host: float = 0.0005
    padding: int = 4


@dataclass(frozen=True)
class Rung:
    """All optimisations up to one; `name` is that of the last one, `key` finds its measurement."""

    key: str
    name: str
    rates: Rates


CUDNN = 580, 545
"""10^12 FLOP/s assumed of cuDNN's attention, with all pairs and in windows: FlashAttention-3 is not on PyPI."""

LADDER = (
    Rung("eager", "eager, cuDNN attention, Flex windows, three products per expert layer",
         Rates(680, 300, 580, 380, 4.0, True, True, 0.012)),
    Rung("pad", "feed-forward width padded to 13696, bf16 at the attention boundary",
         Rates(680, 680, 580, 380, 3.6, False, True, 0.012, 128)),
    Rung("compile", "regions compiled with static shapes, all that is constant made once",
         Rates(680, 680, 580, 380, 1.15, False, True, 0.004, 128)),
    Rung("grouped", "one product for all experts, no waiting for the host (CUDA graphs)",
         Rates(685, 685, 580, 380, 1.05, False, False, 0.0007, 128)),
    Rung("windows", "windows as dense attention by cuDNN, merged by log-sum-exp",
         Rates(685, 685, *CUDNN, 1.05, False, False, 0.0007, 128)),
    Rung("attention", "FlashAttention-3 or -4 instead of cuDNN",
         Rates(685, 685, 640, 600, 1.05, False, False, 0.0007, 128)),
    Rung("tuned", "tuned products, activation in the product's epilogue",
         Rates(715, 715, 650, 630, 0.75, False, False, 0.0005, 128)),
    Rung("fp8", "FP8 linears", Rates(1120, 1120, 650, 630, 1.0, False, False, 0.0005, 128)),
    Rung("fp8_attention", "FP8 attention", Rates(1120, 1120, 950, 900, 1.0, False, False, 0.0005, 128)),
)  # fmt: skip


_TIERS = {"fast": "attention", "fp8": "fp8", "fp8_attention": "fp8_attention"}


def rates_of(tier: str, kernel: str) -> Rates:
    """Assumed rates of a tier with the attention kernel that really ran; a rung of the ladder assumes the best one.

    Args:
        tier: fast, fp8 or fp8_attention; kernel: a name of `inference.fast.kernels`.
    """
    rates = next(rung.rates for rung in LADDER if rung.key == _TIERS[tier])
    if kernel in ("fa3", "fp8"):
        return rates
    return replace(rates, attention=CUDNN[0], local=CUDNN[1])


def machine_of(device_name: str) -> Gpu | None:
    """The machine with this device name in torch; None where no rates are assumed for it."""
    return {GPUS["h200"]: H200, GPUS["h100"]: H100}.get(known) if (known := recognise(device_name)) else None


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of one pass."""

    products: float
    attention: float
    pointwise: float
    ends: float
    host: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.pointwise + self.ends + self.host


def one_pass(stage: DenoisingStage, rates: Rates, machine: Gpu) -> PassSeconds:
    """Predicted seconds of a forward pass."""
    config, tokens = stage.config, stage.tokens
    products = attention = 0.0
    for layer in range(config.num_layers):
        split = rates.separate and config.experts(layer) > 1
        groups = (tokens.video, tokens.audio, tokens.text) if split else (tokens.total,)
        for name, columns, rows in _matrices(config, layer, rates.padding):
            aligned = name != "down" or layer in config.gelu7_layers
            rate = (rates.products if aligned else rates.down) * 1e12
            for count in groups:
                tiling = min(1.0, wave_efficiency(count, rows, machine.units) / _GOOD_TILING)
                seconds = 2.0 * count * columns * rows / rate / tiling
                products += max(seconds, BF16 * columns * rows / machine.bandwidth)
        local = stage.window is not None and layer in config.local_attn_layers
        pairs = attention_pairs(tokens.video, tokens.audio + tokens.text, stage.frames, stage.window if local else None)
        reached = (rates.local if local else rates.attention) * 1e12 * tokens.total / (tokens.total + _SHORT)
        attention += 4.0 * pairs * config.hidden_size / reached
    traffic = rates.pointwise * pointwise_bytes(config, tokens.total)
    if rates.fp32_boundary:
        traffic += _boundary_bytes(config, tokens)
    channels = tokens.video * config.video_in_channels + tokens.audio * config.audio_in_channels
    ends = 2.0 * config.hidden_size * (2 * channels + tokens.text * config.text_in_channels)
    return PassSeconds(products, attention, traffic / (_COPY * machine.bandwidth), ends / _ENDS, rates.host)


def wave_efficiency(rows: int, columns: int, units: int) -> float:
    """Share of the device that a product's tiles fill: ragged edges, and multiprocessors idle in the last round."""
    tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    return rows * columns / (math.ceil(tiles / units) * units * TILE[0] * TILE[1])


def _matrices(config: DiTConfig, layer: int, padding: int) -> list[tuple[str, int, int]]:
    """(name, columns, rows) of one expert's weights; x [n,columns] -> [n,rows]."""
    hidden, inner = config.hidden_size, config.intermediate_size(layer)
    wide = -(-inner // padding) * padding
    up = wide * (config.up_width(layer) // inner)
    return [("qkv", hidden, config.qkv_width), ("proj", hidden, hidden), ("up", hidden, up), ("down", wide, hidden)]


def _boundary_bytes(config: DiTConfig, tokens: TokenCounts) -> int:
    """Queries, keys and values read in bf16, written and read in fp32 and cast; the result permuted."""
    rows = (config.num_heads + 2 * config.num_query_groups) * config.head_dim
    return config.num_layers * tokens.total * (rows * 8 + 4 * config.hidden_size)


# -- whole clips

SIZES = tuple(PUBLISHED)
REACHED = 790.0
"""10^12 FLOP/s of a large bf16 product on an H200, measured before this project; the lower bounds use it."""

TARGETS = {
    "attention": {"256p": 1.55, "540p": 6.0, "1080p": 35.0},
    "fp8": {"256p": 1.1, "540p": 4.6, "1080p": 30.0},
    "fp8_attention": {"256p": 1.0, "540p": 4.0, "1080p": 24.0},
}
"""Seconds of base, SR and decode together that a rung of the ladder is to reach; `attention` is the last exact one."""

STUDENT = "b"
"""Our lightest decoder of the released latents (configs/decoder)."""

_DECODE = 350e12  # FLOP/s assumed of a tuned video decoder
_LINK = 50e9  # bytes per second assumed from pinned memory of the device to the host

Cell = dict[str, float]


def clip(case: ClipCase, rates: Rates, machine: Gpu, decoder: str = "turbo") -> Cell:
    """Predicted seconds of base, sr (0 where there is none), decode with the copy to the host, and their total."""
    loops = {stage.name: stage.passes * one_pass(stage, rates, machine).total for stage in case.stages}
    decode = video_decoder(case, decoder).flops / _DECODE + case.bytes_out / _LINK
    return _summed(loops["base"], loops.get("sr", 0.0), decode)


def floor(case: ClipCase, tflops: float = REACHED) -> Cell:
    """Lower bound of any exact bf16 path, as `clip`: all arithmetic at this rate, and nothing else."""
    device = limits(GPUS["h200"], tflops)
    loops = {stage.name: bound(network(stage), device).seconds for stage in case.stages}
    return _summed(loops["base"], loops.get("sr", 0.0), bound(video_decoder(case), device).seconds)


def _summed(base: float, sr: float, decode: float) -> Cell:
    cells = {"base": base, "sr": sr, "decode": decode, "total": base + sr + decode}
    return {name: round(seconds, 4) for name, seconds in cells.items()}


def predictions(machine: Gpu) -> dict[str, Any]:
    """All of it for one device: `stages` that are computed, `floor`, and a row for every rung of the ladder.

    A row's `seconds` are those of the clip's last loop alone; its `clips` those of base, SR and decode by the published
    Turbo decoder; `student_totals` those with our lightest decoder instead.
    """
    cases = {size: make(size) for size in SIZES}
    rows = []
    for rung in LADDER:
        last = {
            size: round(case.stages[-1].passes * one_pass(case.stages[-1], rung.rates, machine).total, 4)
            for size, case in cases.items()
        }
        clips = {size: clip(case, rung.rates, machine) for size, case in cases.items()}
        student = {size: clip(case, rung.rates, machine, STUDENT)["total"] for size, case in cases.items()}
        row = {"key": rung.key, "after": rung.name, "seconds": last, "clips": clips, "student_totals": student}
        rows.append(row | ({"target": TARGETS[rung.key]} if rung.key in TARGETS else {}))
    stages = {
        size: {
            "stage": case.stages[-1].name,
            "steps": case.stages[-1].steps,
            "tokens": case.stages[-1].tokens.total,
            "flops_per_pass": forward(case.stages[-1]).total,
        }
        for size, case in cases.items()
    }
    return {
        "machine": machine.name,
        "stages": stages,
        "assumed": {
            "student": STUDENT,
            "decode_tflops": _DECODE / 1e12,
            "link_gbps": _LINK / 1e9,
            "rates": {rung.key: vars(rung.rates) for rung in LADDER},
        },
        "floor": {"tflops": REACHED, "clips": {size: floor(case) for size, case in cases.items()}},
        "rows": rows,
    }
