"""Hyperparameters: arithmetic of SPEC 1.2 and refusal of what does not fit."""

import pytest

from magihuman.errors import UserError
from magihuman.models.config import DiTConfig, PackConfig, TreadConfig


def make(**changes: object) -> DiTConfig:
    values: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 64,
        "head_dim": 16,
        "num_query_groups": 2,
        "video_in_channels": 16,
        "audio_in_channels": 8,
        "text_in_channels": 24,
    }
    return DiTConfig(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("hidden", "width"), [(5120, 13652), (64, 168), (80, 212), (96, 256)])
def test_swiglu_width_is_the_released_arithmetic(hidden: int, width: int) -> None:
    config = make(hidden_size=hidden, num_query_groups=1, gelu7_layers=[1])
    assert config.intermediate_size(0) == width
    assert config.up_width(0) == 2 * width
    assert config.intermediate_size(1) == config.up_width(1) == 4 * hidden


def test_expert_layers_hold_three_of_everything() -> None:
    shapes = {key: shape for key, shape, _ in make(mm_layers=[1], post_norm_layers=[1]).tensors()}
    for name in ("attention.linear_qkv", "mlp.up_gate_proj", "attention.q_norm", "mlp.pre_norm"):
        single, triple = shapes[f"block.layers.0.{name}.weight"], shapes[f"block.layers.1.{name}.weight"]
        assert triple == (3 * single[0], *single[1:])
    assert shapes["block.layers.1.attn_post_norm.weight"] == (192,)
    assert "block.layers.0.attn_post_norm.weight" not in shapes


def test_gate_is_one_column_per_query_head() -> None:
    assert make().qkv_width - make(enable_attn_gating=False).qkv_width == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 60}, "multiple of head_dim"),
        ({"head_dim": 4}, "multiple of 8"),
        ({"num_query_groups": 3}, "does not divide"),
        ({"mm_layers": [2]}, "names layer 2"),
        ({"gelu7_layers": "all"}, "list of layer numbers"),
        ({"num_layers": 0}, "positive whole number"),
        ({"hidden_size": 64.0}, "positive whole number"),
    ],
)
def test_misfits_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_round_trip_and_unknown_key() -> None:
    config = make(mm_layers=[1, 0, 1])
    assert config.mm_layers == (0, 1)
    assert DiTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="no field layers"):
        DiTConfig.from_dict({**config.to_dict(), "layers": 3})
    with pytest.raises(UserError, match="num_layers"):
        DiTConfig.from_dict({})


def test_pack_and_tread_refuse_nonsense() -> None:
    with pytest.raises(UserError, match="v3"):
        PackConfig(coords_style="v3")
    with pytest.raises(UserError, match="patch_size"):
        PackConfig(patch_size=0)
    with pytest.raises(UserError, match="selection_rate"):
        TreadConfig(selection_rate=0)
    with pytest.raises(UserError, match="start_layer"):
        TreadConfig(start_layer=3, end_layer=2)
