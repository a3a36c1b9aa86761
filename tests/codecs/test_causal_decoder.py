"""Our streaming decoder: sizes, arithmetic, causality, chunks of any length, memory that does not grow."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from magihuman.codecs.causal_decoder import (
    CausalConv,
    CausalDecoder,
    CausalDecoderCodec,
    CausalDecoderConfig,
    DecoderStage,
    Memory,
    norm_silu,
    shuffle,
)
from magihuman.codecs.causal_decoder_config import LONGEST_CHUNK, POSITIONS
from magihuman.codecs.turbo_vaed import TurboCodec, TurboConfig, TurboDecoder
from magihuman.errors import UserError
from magihuman.zoo import decoders
from magihuman.zoo.memory_tracker import Allocations

PATCHED = CausalDecoderConfig(  # time is doubled in a stage and in the patch, as in `tiny`
    4, (DecoderStage(8, 1, "full", (2, 2)), DecoderStage(6, 2, "split")), (2, 2)
)
STAGED = CausalDecoderConfig(  # time is doubled in two stages, as in A and B
    4,
    (
        DecoderStage(8, 1, "full", (2, 2)),
        DecoderStage(6, 1, "full", (2, 2)),
        DecoderStage(4, 1, "split", (1, 2)),
        DecoderStage(4, 1, "split"),
    ),
    (1, 2),
)
CONFIGS = {"patched": PATCHED, "staged": STAGED}


def _student(config: CausalDecoderConfig, seed: int = 0) -> CausalDecoder:
    torch.manual_seed(seed)
    return CausalDecoder(config).eval().requires_grad_(False)


def _latents(config: CausalDecoderConfig, frames: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, config.latent_channels, frames, 3, 4, generator=generator)


@pytest.fixture(params=CONFIGS)
def config(request: Any) -> CausalDecoderConfig:
    return CONFIGS[request.param]


# Sizes


@pytest.mark.parametrize(
    ("name", "millions", "teraflops"),
    # Parameters, and FLOPs of a latent frame at 448x256: the design's figures (research/turbo_vae.md 1.6 and 4.1).
    [("a", 70.6, 0.252), ("b", 63.8, 0.146), ("released", 107.1, 1.545)],
)
def test_sizes_and_arithmetic_are_those_of_the_design(name: str, millions: float, teraflops: float) -> None:
    described = decoders.arch(name)
    network = decoders.build(
        decoders.DecoderConfig(described["layout"], described["network"], decoders.Latents("wan2.2", 48, (4, 16, 16))),
        "meta",
    )
    count = sum(p.numel() for p in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)
    latents = torch.empty(1, 48, 1, 16, 28, device="meta")
    with torch.no_grad():
        run: Callable[[], Any]
        if isinstance(network, CausalDecoder):
            _, state = network.step(latents)
            run = lambda: network.step(latents, state)  # noqa: E731
        else:
            run = lambda: network.decoder(latents, first=False)  # noqa: E731
        with FlopCounterMode(display=False) as counter:
            run()
    assert counter.get_total_flops() / 1e12 == pytest.approx(teraflops, abs=0.0006)


def test_frames_per_latent_and_pixels_per_position(config: CausalDecoderConfig) -> None:
    network = _student(config)
    time, space, _ = config.stride
    assert (time, space) == {PATCHED: (4, 4), STAGED: (4, 16)}[config]
    for frames in (1, 2, 5):
        shape = network(_latents(config, frames, batch=2)).shape
        assert shape == (2, 3, time * (frames - 1) + 1, 3 * space, 4 * space)


# Causality and streaming


def _in_chunks(network: CausalDecoder, z: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    state, parts, start = None, [], 0
    for size in sizes:
        frames, state = network.step(z[:, :, start : start + size], state)
        parts.append(frames)
        start += size
    assert start == z.shape[2]
    return torch.cat(parts, 2)


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [2, 2, 2, 2, 1], [3, 3, 3], [5, 4], [1, 4, 2, 2], [8, 1]])
def test_chunks_of_any_length_make_the_whole_clip(config: CausalDecoderConfig, sizes: list[int]) -> None:
    network, z = _student(config), _latents(config, 9, batch=2)
    whole = network(z)
    assert whole.std() > 0.05
    torch.testing.assert_close(_in_chunks(network, z, sizes), whole, rtol=0, atol=1e-5)


def test_a_prefix_of_the_latents_is_the_prefix_of_the_frames_to_the_bit(config: CausalDecoderConfig) -> None:
    network, z = _student(config), _latents(config, 9)
    whole = CausalDecoderCodec(network, chunk=1).decode(z)
    for count in range(1, 9):
        prefix = CausalDecoderCodec(network, chunk=1).decode(z[:, :, :count])
        assert torch.equal(prefix, whole[:, :, : 4 * count - 3])


def test_a_latent_changes_its_own_frames_and_later_ones_only(config: CausalDecoderConfig) -> None:
    network, z = _student(config), _latents(config, 7)
    other = z.clone()
    other[:, :, 3] += 1
    difference = (network(other) - network(z)).abs().amax(dim=(0, 1, 3, 4))
    assert (difference[:9] == 0).all()
    assert (difference[9:] > 1e-3).all(), "the past reaches no further than its own frames"


def test_the_state_is_a_value_and_a_clip_can_go_on_in_two_ways() -> None:
    network, z = _student(PATCHED), _latents(PATCHED, 6)
    _, state = network.step(z[:, :, :3])
    kept = [tensor.clone() for tensor in state]
    first, _ = network.step(z[:, :, 3:], state)
    network.step(z[:, :, 3:] + 1, state)
    again, _ = network.step(z[:, :, 3:], state)
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(kept, state, strict=True))


def test_the_state_has_one_size_and_its_own_memory() -> None:
    network = _student(STAGED)
    sizes = []
    for frames in (1, 2, 7):
        _, state = network.step(_latents(STAGED, frames))
        sizes.append(sum(t.untyped_storage().nbytes() for t in state))
        assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state)
    assert len(set(sizes)) == 1


def test_training_may_carry_the_state_of_a_chunk_before() -> None:
    network = _student(PATCHED).requires_grad_(True)
    z = _latents(PATCHED, 4).requires_grad_(True)
    _, state = network.step(z[:, :, :2])
    frames, _ = network.step(z[:, :, 2:], state)
    frames.square().sum().backward()
    assert z.grad is not None
    assert z.grad[:, :, :2].abs().sum() > 0


def test_peak_memory_does_not_grow_with_the_clip() -> None:
    network = CausalDecoder(STAGED).to("meta").eval().requires_grad_(False)
    codec, peaks = CausalDecoderCodec(network, chunk=2), []
    for frames in (8, 64):
        z = torch.empty(1, 4, frames, 3, 4, device="meta")
        with Allocations().ignore(*network.parameters(), z) as memory:
            for part in codec.decode_stream(z):
                del part
        peaks.append(memory.peak)
    assert peaks[1] == peaks[0]
    with Allocations().ignore(*network.parameters(), z) as whole:
        network(z)
    assert whole.peak > 10 * peaks[1], "and the whole at once would need far more"


def test_the_first_frames_come_before_the_second_latent_is_looked_at() -> None:
    network, z = _student(PATCHED), _latents(PATCHED, 3)
    z[:, :, 1:] = torch.nan
    first = next(iter(CausalDecoderCodec(network, chunk=1).decode_stream(z)))
    assert first.shape[2] == 1
    assert first.isfinite().all()


def test_chunks_follow_the_size_of_the_picture() -> None:
    codec = CausalDecoderCodec(_student(PATCHED))
    shapes = {(1, 16, 28): 8, (1, 32, 56): 4, (1, 68, 120): 1, (2, 32, 56): 2, (1, 200, 200): 1}
    for (batch, height, width), expected in shapes.items():
        assert codec.chunk_for(torch.empty(batch, 4, 9, height, width, device="meta")) == expected
    parts = list(codec.decode_stream(_latents(PATCHED, 10)))
    assert [part.shape[2] for part in parts] == [4 * 8 - 3, 4 * 2]
    assert POSITIONS >= 68 * 120
    assert LONGEST_CHUNK == 8


# Parts


def test_shuffle_puts_channels_into_time_rows_and_columns() -> None:
    x = torch.arange(24).view(1, 1, 1, 1, 24)
    y = shuffle(x, 2, 2)
    assert y.shape == (1, 2, 2, 2, 3)
    for t in range(2):
        for row in range(2):
            for column in range(2):
                start = 3 * (4 * t + 2 * row + column)
                assert y[0, t, row, column].tolist() == [start, start + 1, start + 2]


@torch.no_grad()
def test_norm_has_fp32_statistics_in_bf16() -> None:
    x = torch.randn(1, 1, 1, 64, 256, generator=torch.Generator().manual_seed(0)) * 300
    expected = F.silu(x / x.square().mean(-1, keepdim=True).sqrt())
    torch.testing.assert_close(norm_silu(x), expected, rtol=1e-5, atol=1e-5)
    half = x.bfloat16()
    once = F.silu((half.float() / half.float().square().mean(-1, keepdim=True).sqrt()).bfloat16())
    assert (norm_silu(half) == once).float().mean() > 0.999  # nothing but the product is rounded


@pytest.mark.parametrize("gradients", [True, False])
def test_norm_of_small_activations_has_its_constant_under_the_root(gradients: bool) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-3, -1e-3]])  # mean squares 0 and 1e-6, as large as the constant
    y = torch.tensor([[0.0, 0.0], [0.5**0.5, -(0.5**0.5)]])
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(norm_silu(x), F.silu(y))


def test_before_a_clip_its_first_frame_is_repeated() -> None:
    torch.manual_seed(0)
    layer, x = CausalConv(3, 5, spatial=True), torch.randn(1, 3, 4, 6, 3)
    y = layer(x, Memory(None))
    kernel, bias = layer.conv.weight, layer.conv.bias  # [5,3,3 frames,3,3]
    frames = x.permute(0, 1, 4, 2, 3)[0]  # [3 frames,3,4,6]
    first = F.conv2d(frames[:1], kernel.sum(2), bias, padding=1)
    second = F.conv2d(frames[:1], kernel[:, :, :2].sum(2), bias, padding=1) + F.conv2d(
        frames[1:2], kernel[:, :, 2], padding=1
    )
    torch.testing.assert_close(y[:, :2].permute(0, 1, 4, 2, 3)[0], torch.cat([first, second]), rtol=1e-4, atol=1e-5)


def test_bf16_stays_close_to_fp32(config: CausalDecoderConfig) -> None:
    network, z = _student(config), _latents(config, 5)
    exact = network(z)
    half = network.bfloat16()(z).float()
    error = (half - exact).square().mean() / exact.square().mean()
    assert 10 * torch.log10(1 / error) > 35


def test_the_released_layout_is_a_student_too() -> None:
    small = {
        **decoders.arch("released")["network"],
        "decoder_block_out_channels": [4, 4, 8, 8],
        "decoder_layers_per_block": [1] * 5,
    }
    torch.manual_seed(0)
    config = TurboConfig.from_json(small)
    student = TurboCodec(TurboDecoder(config), config)
    z = torch.randn(1, 48, 3, 2, 2)
    frames = student(z)
    assert frames.shape == (1, 3, 9, 32, 32)
    assert frames.requires_grad
    raw = z * student.std + student.mean
    torch.testing.assert_close(frames, student.decoder(raw, first=True), rtol=1e-4, atol=1e-5)


# What cannot be


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 5, 2, 3, 4), r"takes \[B,4,T,h,w\]"), ((4, 2, 3, 4), "takes"), ((1, 4, 0, 3, 4), "T >= 1")],
)
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _student(PATCHED)(torch.zeros(shape))
    with pytest.raises(ValueError, match=words):
        CausalDecoderCodec(_student(PATCHED)).decode(torch.zeros(shape))


def test_a_clip_cannot_go_on_with_another_size_or_batch() -> None:
    network = _student(PATCHED)
    _, state = network.step(torch.zeros(1, 4, 2, 3, 4))
    for shape in ((2, 4, 1, 3, 4), (1, 4, 1, 3, 5)):
        with pytest.raises(ValueError, match="do not continue this clip"):
            network.step(torch.zeros(shape), state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": [{"width": 8, "blocks": 1, "kind": "full", "up": [2, 2]}]}, "the last stage does not upsample"),
        ({"stages": [{"width": 8, "blocks": 1, "kind": "wide"}]}, "kind is full or split"),
        ({"stages": []}, "at least one stage"),
        ({"stages": [{"width": 8, "kind": "full"}]}, "blocks"),
        ({"patch": [0, 2]}, "patch"),
        ({"depth": 3}, "depth"),
    ],
)
def test_settings_that_cannot_be_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CausalDecoderConfig.from_dict({**PATCHED.to_dict(), **change})


def test_settings_survive_json() -> None:
    for config in CONFIGS.values():
        assert CausalDecoderConfig.from_dict(config.to_dict()) == config
