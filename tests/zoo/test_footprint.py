"""Formulas of memory against counted tensors: on shapes alone at full size, and in real runs of the tiny network."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import magihuman.models.dit as dit
from inference.memory.offload import LayerStream
from inference.memory.quantization import store_weights
from magihuman import zoo
from magihuman.codecs import costs
from magihuman.models.config import Checkpointing, DiTConfig
from magihuman.models.dit import SingleStreamDiT
from magihuman.models.tokens import Layout
from magihuman.zoo import footprint
from magihuman.zoo.footprint import TokenCounts
from magihuman.zoo.memory_tracker import Allocations

GRIDS = {"256p": (32, 8, 14), "540p": (32, 16, 28), "1080p": (32, 34, 60)}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused kernel on any device: no scores, one log-sum-exp per query."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out.squeeze(0).transpose(0, 1)

    monkeypatch.setattr(dit, "attention", attend)


def _inputs(config: DiTConfig, tokens: TokenCounts, grid: tuple[int, int, int], device: str) -> tuple[Any, ...]:
    layout = Layout.build(grid, tokens.audio, [tokens.text])
    layout = replace(layout, coords=layout.coords.to(device), modality=layout.modality.to(device))
    layout = layout.with_rotary(torch.zeros(tokens.total, config.head_dim * 3 // 4, device=device))
    return (
        torch.zeros(tokens.video, config.video_in_channels, device=device),
        torch.zeros(tokens.audio, config.audio_in_channels, device=device),
        torch.zeros(tokens.text, config.text_in_channels, device=device),
        layout,
    )


def _meta(config: DiTConfig, dtype: torch.dtype, linear: torch.dtype) -> SingleStreamDiT:
    with torch.device("meta"):
        return SingleStreamDiT(config, compute_dtype=dtype, linear_dtype=linear)


@pytest.mark.parametrize("name", ["tiny", "small", "1b", "15b"])
def test_weights_are_exact(name: str) -> None:
    config = zoo.arch(name)
    for form, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        state = _meta(config, dtype, dtype).state_dict()
        assert footprint.weight_bytes(config, form) == sum(t.numel() * t.element_size() for t in state.values())
    if name == "15b":  # SPEC 1.2
        assert footprint.weight_bytes(config, "bf16") == 30_642_008_128
        assert footprint.weight_bytes(config, "fp32") == 61_197_676_608


@pytest.mark.parametrize("form", ["bf16", "fp8", "int4"])
def test_stored_and_streamed_weights(form: str) -> None:
    config = zoo.arch("tiny")
    model = zoo.build(config, zoo.pack("tiny"), compute_dtype=torch.float32, seed=0).model
    store_weights(model, form, "cpu", "cpu")
    state = [*model.parameters(), *model.buffers()]
    held = sum(t.numel() * t.element_size() for t in state)
    assert footprint.weight_bytes(config, form) == held
    in_layers = sum(t.numel() * t.element_size() for t in model.block.state_dict().values())
    stream = LayerStream(list(model.block.layers), "cpu")
    stream.enter()
    storages = [t.untyped_storage() for t in model.block.state_dict().values()]
    slots = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    # The slots round every tensor up to 256 bytes.
    assert 0 <= slots - (footprint.streamed_bytes(config, form) - (held - in_layers)) <= 2 * 12 * 256


@pytest.mark.parametrize("resolution", GRIDS)
@pytest.mark.parametrize(("name", "dtype"), [("15b", torch.bfloat16), ("1b", torch.float32)])
def test_forward_at_full_size(fused: None, name: str, dtype: torch.dtype, resolution: str) -> None:
    config, grid = zoo.arch(name), GRIDS[resolution]
    tokens = TokenCounts(grid[0] * grid[1] * grid[2], 126, 340)
    model, inputs = _meta(config, dtype, dtype), _inputs(config, tokens, grid, "meta")
    with torch.no_grad(), Allocations() as counted:
        model(*inputs)
    computed = footprint.forward_bytes(config, tokens, dtype.itemsize)
    table = tokens.total * 4 * config.head_dim * 3 // 4  # made before
    assert computed - table == pytest.approx(counted.peak, rel=0.01)
    assert computed >= counted.peak


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("tiny", torch.float32), ("small", torch.float32), ("small", torch.bfloat16), ("15b", torch.bfloat16)],
)
@pytest.mark.parametrize("checkpointing", [False, True, "attention"])
def test_training(fused: None, name: str, checkpointing: Checkpointing, dtype: torch.dtype) -> None:
    config = zoo.arch(name)
    if name == "15b":
        config = replace(config, num_layers=6, mm_layers=(0, 5), gelu7_layers=(0,))
    grid = (32, 16, 28)
    tokens = TokenCounts(32 * 16 * 28, 126, 340)
    model, inputs = _meta(config, dtype, torch.float32), _inputs(config, tokens, grid, "meta")
    model.gradient_checkpointing = checkpointing
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    with Allocations() as counted:
        video, audio = model(*inputs)
        (video.sum() + audio.sum()).backward()
    computed = footprint.training_bytes(config, tokens, dtype.itemsize, checkpointing)
    computed += footprint.cast_bytes(config, dtype.itemsize, checkpointing)
    assert computed == pytest.approx(counted.peak, rel=0.03)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_a_real_forward_on_the_cpu(name: str) -> None:
    config, grid = zoo.arch(name), (8, 12, 12)
    tokens = TokenCounts(1152, 13, 20)
    denoiser = zoo.build(config, zoo.pack(name), compute_dtype=torch.float32, seed=0)
    model = denoiser.model.eval()
    model.attention_backend = "sdpa"
    inputs = _inputs(config, tokens, grid, "cpu")
    with torch.no_grad(), Allocations() as counted:
        model(*inputs)
    # So many tokens that the peak is in the activation: the CPU's sorted copy of the weight is gone by then.
    assert footprint.forward_bytes(config, tokens, 4) == pytest.approx(counted.peak, rel=0.05)


def test_restored_matrices_on_the_cpu() -> None:
    config = zoo.arch("tiny")
    for form in ("fp8", "int4"):
        model = zoo.build(config, zoo.pack("tiny"), compute_dtype=torch.float32, seed=0).model
        store_weights(model, form, "cpu", "cpu")
        widest = max((m for m in model.modules() if hasattr(m, "codes")), key=lambda m: m.codes.numel())
        with Allocations() as counted:
            for matrix in widest.slices(torch.float32):
                del matrix
        computed = footprint.restored_bytes(config, form, 4)
        assert counted.peak <= computed
        assert counted.peak >= computed * 0.5


def test_released_turbo_decoder() -> None:
    from magihuman.codecs.turbo_vaed import TurboConfig, TurboDecoder

    settings = TurboConfig(
        48, (64, 128, 256, 512), (2, 2, 2, 3, 3), (False, True, True, True), (False, True, False, False),
        (False,) * 5, 7, 7, True,
    )  # fmt: skip
    with torch.device("meta"):
        decoder = TurboDecoder(settings).to(torch.bfloat16)
    weights = sum(p.numel() * p.element_size() for p in decoder.parameters())
    assert costs.TURBO_DECODER.weights == weights
    z = torch.zeros(1, 48, 9, 16, 28, device="meta", dtype=torch.bfloat16)
    with torch.no_grad(), Allocations() as counted:
        decoder(z, first=False)
    assert costs.TURBO_DECODER.activations(256 * 448) == pytest.approx(counted.peak, rel=0.01)


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("size", [(256, 448), (512, 896), (1088, 1920)])
def test_our_decoders(name: str, size: tuple[int, int]) -> None:
    from inference.benchmark.video_decoders import decode_cost
    from magihuman.codecs.causal_decoder_config import CausalDecoderConfig
    from magihuman.zoo import decoders

    config = CausalDecoderConfig.from_dict(decoders.arch(name)["network"])
    chunk = config.chunk(size[0] * size[1] // 256)
    counted = decode_cost(name, *size, 2 * chunk + 1)
    computed = costs.causal_decoder_memory(config, *size)
    assert computed.weights == counted["weight_bytes"]
    # The pictures of a chunk are counted, too; the plan adds them apart.
    whole = computed.weights + computed.activations(0) + footprint.clip_bytes(4 * chunk, *size, 4)
    assert counted["peak_bytes"] <= whole <= 1.5 * counted["peak_bytes"]


@pytest.mark.parametrize("tile", [256, 512, 1024])
def test_our_decoders_in_tiles(tile: int) -> None:
    from inference.benchmark.components import random_codec
    from inference.decoding import Decoder, to_uint8
    from magihuman.codecs.causal_decoder_config import CausalDecoderConfig
    from magihuman.zoo import decoders

    height, width = 1088, 1920
    config = CausalDecoderConfig.from_dict(decoders.arch("b")["network"])
    codec, z = random_codec("b", "meta"), torch.empty(1, 48, 3, height // 16, width // 16, device="meta")
    with torch.no_grad(), Allocations().ignore(*codec.parameters(), *codec.buffers(), z) as counted:
        for part in Decoder(codec, tile=tile).frames(z):
            to_uint8(part)
            del part
    computed = costs.causal_decoder_memory(config, height, width, tile).activations(0)
    # The tiles' own pictures are small; that those of 1024 pixels are cut to 816 and less is not computed.
    whole = computed + footprint.clip_bytes(4, height, width, 4)
    assert 0.95 * counted.peak <= whole <= 1.4 * counted.peak


def test_released_video_codec() -> None:
    from magihuman.codecs.wan import WanCodec, _build

    vae = _build(
        {
            "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 2, "temperal_downsample": [False, True, True], "is_residual": True,
            "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
        }
    )  # fmt: skip
    codec = WanCodec(vae.to(torch.bfloat16)).to("meta")
    assert costs.WAN_DECODER.weights == sum(2 * p.numel() for p in vae.parameters())
    with Allocations() as counted:
        for _ in codec.decode_stream(torch.zeros(1, 48, 3, 16, 28, device="meta")):
            pass
    assert costs.WAN_DECODER.activations(256 * 448) == pytest.approx(counted.peak, rel=0.03)
    with Allocations() as counted:
        codec.encode(torch.zeros(1, 3, 1, 256, 448, device="meta"))
    assert costs.WAN_ENCODER.activations(256 * 448) == pytest.approx(counted.peak, rel=0.03)


def test_text_encoder() -> None:
    from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    shape: Any = {
        "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 256, "vocab_size": 256_000,
    }  # fmt: skip

    def count(layers: int) -> int:
        module = T5GemmaModuleConfig(num_hidden_layers=layers, **shape)
        config = T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
        with torch.device("meta"):
            return sum(p.numel() for p in T5GemmaEncoderModel(config).parameters())

    one = count(1)
    assert costs.text_encoder_bytes() == 2 * (one + 41 * (count(2) - one))
    assert costs.text_encoder_bytes() == pytest.approx(18.5e9, rel=0.01)


def test_adapters() -> None:
    config = zoo.arch("15b")
    assert footprint.lora_count(config, 64) == pytest.approx(264e6, rel=0.005)
    assert footprint.lora_count(config, 128) == 2 * footprint.lora_count(config, 64)
