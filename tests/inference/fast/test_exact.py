"""Tier exact: bit by bit the reference, on the released vectors, random networks and the shipped checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_networks import DEEP, inputs, network, velocities
from released_loop import check_released_loop
from safetensors.torch import load_file

from inference.fast import TIERS, options_for, prepare
from magihuman import zoo
from magihuman.errors import UserError
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import SingleStreamDiT
from magihuman.zoo.checks import Parameters, VectorCase, loop
from magihuman.zoo.checks.network import dit_config, vector_arithmetic
from magihuman.zoo.verify import read_manifest

SMALL = DiTConfig(4, 32, 16, 1, 12, 6, 10, mm_layers=(0, 3), gelu7_layers=(0,))
KINDS = {
    "sandwich": SMALL,
    "post norms": replace(SMALL, post_norm_layers=(0, 1)),
    "local": replace(SMALL, local_attn_layers=(0, 1, 3)),
    "no experts": replace(SMALL, mm_layers=(), gelu7_layers=(2,)),
    "experts first": replace(SMALL, mm_layers=(0, 1)),
    "no gates, 4:2 heads": replace(SMALL, hidden_size=64, num_query_groups=2, enable_attn_gating=False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equal_bit_by_bit(kind: str, dtype: torch.dtype) -> None:
    reference = network(KINDS[kind], dtype)
    exact = prepare(reference, "exact")
    assert exact is not reference
    for text, audio in (([4], 5), ([4, 1, 2], 5), ([3, 3], 5), ([2], 0)):
        batch = inputs(text, audio)
        wanted = velocities(reference, batch)
        assert wanted.abs().max() > 0.1
        assert torch.equal(velocities(exact, batch), wanted), (text, audio)


@pytest.mark.parametrize("name", ["dit_v2_mm_gelu", "dit_v1_local", "dit_postnorm"])
def test_released_vectors(golden: Path, name: str) -> None:
    """Equal to the reference on them, so also to the released outputs wherever the reference is."""
    tensors = load_file(golden / f"{name}.safetensors")
    case = VectorCase(name, Parameters(read_manifest(golden)[name]["meta"]), tensors)
    proxy, lengths = case.meta["data_proxy"], case.meta
    pack = PackConfig(proxy["patch_size"], proxy["coords_style"], proxy["frame_receptive_field"])
    video, audio = tensors["in/x_t"], tensors["in/audio_x_t"][:, : lengths["audio_feat_len"][0]]
    text = [tensors["in/txt_feat"][0, : lengths["txt_feat_len"][0]]]
    for dtype in (torch.float32, torch.bfloat16):
        model = SingleStreamDiT(dit_config(case.meta["model_config"]), compute_dtype=dtype, linear_dtype=torch.bfloat16)
        model.load_state_dict(case.group("w/"))
        model.attention_backend = "reference"
        reference = Denoiser(model, pack).eval()
        exact = prepare(reference, "exact")
        with vector_arithmetic(), torch.no_grad():
            for ours, theirs in zip(exact(video, audio, text), reference(video, audio, text), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["loop_base_t2v", "loop_distill_sr_cfg1", "loop_base_ti2v_sr"])
@pytest.mark.parametrize("tier", ["exact", "fast"])
def test_released_loops(golden: Path, name: str, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages with all their steps pass the same comparison as the reference."""
    plain = loop._LoopRun.denoiser

    def prepared(self: Any, *arguments: Any) -> Denoiser:
        return prepare(plain(self, *arguments), tier)

    monkeypatch.setattr(loop._LoopRun, "denoiser", prepared)
    results = check_released_loop(golden, name)
    assert len(results) >= 8
    assert [result for result in results if not result.passed] == []


def test_the_shipped_checkpoint() -> None:
    reference = zoo.load("tiny/base").denoiser
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(2, 12, 2, 16, 16, generator=generator)
    audio = torch.randn(2, 5, 64, generator=generator)
    text = [torch.randn(n, 128, generator=generator) for n in (9, 1)]
    assert torch.equal(*(velocities(each, (video, audio, text)) for each in (reference, prepare(reference, "exact"))))


def test_forty_layers() -> None:
    reference = network(DEEP, torch.bfloat16)
    assert torch.equal(*(velocities(each, inputs([4])) for each in (reference, prepare(reference, "exact"))))


def test_matrices_that_keep_their_form_are_shared() -> None:
    reference = network(SMALL)
    exact: Any = prepare(reference, "exact")
    for block, layer in zip(reference.model.block.layers, exact.model.layers, strict=True):
        attention: Any = block.attention
        assert layer.qkv.weight.data_ptr() == attention.linear_qkv.weight.data_ptr()
    assert exact.latent_channels == reference.latent_channels
    assert next(exact.parameters()).device == next(reference.parameters()).device


def test_released_layers_are_gone_from_the_reference() -> None:
    reference = network(SMALL)
    wanted = velocities(reference, inputs([4]))
    taken = prepare(reference, "exact", release=True)
    assert torch.equal(velocities(taken, inputs([4])), wanted)
    assert sum(p.numel() for p in reference.model.block.parameters()) == 0
    with pytest.raises(RuntimeError, match="gave its layers to a faster tier"):
        velocities(reference, inputs([4]))


def test_tiers_are_named_and_the_reference_is_itself() -> None:
    reference = network(SMALL)
    assert prepare(reference, "reference") is reference
    assert TIERS == {
        "reference": "E0",
        "exact": "E0",
        "fast": "E1",
        "fp8": "approximate",
        "fp8_attention": "approximate",
        "cached": "approximate",
    }
    with pytest.raises(UserError, match="tier=turbo is unknown; choose one of reference, exact, fast"):
        prepare(reference, "turbo")
    with pytest.raises(UserError, match="tier fast has no option padding; the options are planes, pad"):
        prepare(reference, "fast", padding=True)
    with pytest.raises(UserError, match="compile=yes is unknown; choose one of off, auto, static"):
        options_for("fast", "cpu", compile="yes")


def test_for_inference_only() -> None:
    exact = prepare(network(SMALL), "exact")
    with pytest.raises(RuntimeError, match="for inference: call the network"):
        exact(*inputs([4]))
    with torch.no_grad(), pytest.raises(ValueError, match="merge 'style' into the weights first"):
        exact(*inputs([4]), lora="style")
    stored = network(SMALL)
    from inference.memory.quantization import store_weights

    store_weights(stored.model, "fp8", "cpu", "cpu")
    with pytest.raises(UserError, match="stored in fewer bits; leave out weights="):
        prepare(stored, "exact")
