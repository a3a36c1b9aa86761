"""The released Turbo decoder: golden vectors, names of the release, windows, files, and what bad files get."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_release import TURBO_SETTINGS
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from magihuman.codecs.turbo_vaed import (
    CONFIG_FILES,
    REPO,
    ResidualBlock,
    TurboCodec,
    TurboConfig,
    TurboDecoder,
    UpStage,
    Window,
    rms_norm,
    unpatchify,
    windows,
)
from magihuman.errors import UserError
from magihuman.zoo.checks import Parameters, VectorCase
from magihuman.zoo.checks.autoencoders import check_turbo

SMALL = {
    **TURBO_SETTINGS,
    "decoder_block_out_channels": [4, 4, 8, 8],
    "decoder_layers_per_block": [1, 1, 1, 1, 1],
    "first_chunk_size": 2,
    "step_size": 2,
}
WEIGHTS = "checkpoint-340000.ckpt"


def small_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    decoder = TurboDecoder(TurboConfig.from_json(SMALL))
    return {f"decoder.{key}": value for key, value in decoder.state_dict().items()}


def released_file(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As the distillation left it: averaged weights under a prefix, beside heads and other state."""
    averaged = {f"module.{key}": value for key, value in state.items()}
    averaged["module.aligned_feature_projection_heads.0.0.conv.weight"] = torch.zeros(2, 2, 1, 1, 1)
    return {
        "ema_state_dict": averaged,
        "state_dict": {key: torch.zeros_like(value) for key, value in state.items()},
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-4}]},
        "step": 340000,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The release's turbo_vae folder, tiny."""
    path = tmp_path / "release" / "turbo_vae"
    path.mkdir(parents=True)
    (path / CONFIG_FILES[0]).write_text(json.dumps(SMALL))
    torch.save(released_file(small_state()), path / WEIGHTS)
    return path


@pytest.fixture(scope="module")
def codec() -> TurboCodec:
    return TurboCodec.from_released(small_state(), TurboConfig.from_json(SMALL), "test")


def latents(length: int, batch: int = 1, channels: int = 48) -> torch.Tensor:
    return torch.randn(batch, channels, length, 2, 3, generator=torch.Generator().manual_seed(length))


def vector(golden: Path, name: str) -> VectorCase:
    meta = json.loads((golden / "manifest.json").read_text())["files"][name]["meta"]
    return VectorCase(name, Parameters(meta), load_file(golden / f"{name}.safetensors"))


@pytest.mark.parametrize(("name", "results"), [("turbo_vaed_tiny", 9), ("turbo_vaed_dw", 5)])
def test_equals_the_released_decoder(golden: Path, name: str, results: int) -> None:
    found = check_turbo(vector(golden, name))
    assert len(found) == results
    assert [result.what for result in found if not result.passed] == []


def test_the_check_finds_mistakes(golden: Path) -> None:
    def failing(case: VectorCase) -> list[str]:
        return [result.what for result in check_turbo(case) if not result.passed]

    case = vector(golden, "turbo_vaed_dw")
    case.meta["keys"][3] = "decoder.other.weight"
    case.meta["num_params"] += 1
    assert failing(case) == ["names that differ", "parameters"]
    case = vector(golden, "turbo_vaed_dw")
    case.tensors["std"][0] += 0.01
    assert failing(case) == ["raw/first_chunk_true", "raw/first_chunk_false", "len4/video"]
    case = vector(golden, "turbo_vaed_dw")
    case.meta["config"]["step_size"] = 2  # no window ends where it should
    assert failing(case) == ["len4/video"]


def test_bf16_costs_what_it_costs_the_release(golden: Path) -> None:
    case = vector(golden, "turbo_vaed_tiny")
    config = TurboConfig.from_json(case.meta["config"])
    statistics = case.tensors["mean"], case.tensors["std"]
    codec = TurboCodec.from_released(case.group("w/"), config, "v", *statistics, dtype=torch.bfloat16)
    assert (codec.mean.dtype, codec.std.dtype) == (torch.float32, torch.float32)
    clip, stored = codec.decode(case.tensors["len3/z"]), case.tensors["len3/video"]
    assert clip.dtype == torch.float32
    error = ((clip - stored).norm() / stored.norm()).item()
    published = case.meta["errors"]["len3"]["fp32_vs_bf16"]["rel_l2"]
    assert published / 2 < error < published * 2


def test_release_has_its_tensors_and_parameters(golden: Path) -> None:
    published = json.loads((golden.parent / "spec" / "turbo_release_keys.json").read_text())
    with torch.device("meta"):
        codec = TurboCodec(
            TurboDecoder(TurboConfig.from_json(TURBO_SETTINGS)), TurboConfig.from_json(TURBO_SETTINGS), None, None
        )
    assert {key: list(value.shape) for key, value in codec.state_dict().items()} == published
    assert len(published) == 80
    assert sum(parameter.numel() for parameter in codec.parameters()) == 107_122_892
    assert (codec.channels, codec.stride) == (48, (4, 16, 16))


def test_lists_are_turned_round() -> None:
    assert TurboConfig.from_json(TURBO_SETTINGS).stages == (
        UpStage(512, 512, 3, "space_time", False),
        UpStage(512, 256, 2, "space_time", False),
        UpStage(256, 128, 2, "space", False),
        UpStage(128, 64, 2, "none", False),
    )
    depthwise = TurboConfig.from_json({**TURBO_SETTINGS, "decoder_is_dw_conv": [False, False, False, True, True]})
    assert [stage.depthwise for stage in depthwise.stages] == [True, False, False, False]


def test_only_stages_that_upsample_begin_with_relu() -> None:
    decoder = TurboDecoder(TurboConfig.from_json(SMALL))
    assert [[block.relu for block in stage.resnets] for stage in decoder.up_blocks] == [[True], [True], [True], [False]]
    assert decoder.up_blocks[2].conv_in is not None
    assert not decoder.up_blocks[2].conv_in.relu
    assert not decoder.mid_block["resnets"][0].relu


def test_a_depthwise_stage_is_depthwise_throughout() -> None:
    settings = {**SMALL, "decoder_is_dw_conv": [False, True, False, False, False]}
    keys = TurboDecoder(TurboConfig.from_json(settings)).state_dict()
    block = {key: list(value.shape) for key, value in keys.items() if key.startswith("up_blocks.2.conv_in")}
    assert block["up_blocks.2.conv_in.conv1.depthwise_conv.weight"] == [8, 1, 5, 5, 5]
    assert block["up_blocks.2.conv_in.conv_shortcut.depthwise_conv.weight"] == [8, 1, 1, 1, 1]
    assert block["up_blocks.2.conv_in.conv_shortcut.pointwise_conv.weight"] == [4, 8, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_causal": True}, "decoder_causal false"),
        ({"patch_size": 4}, "patch_size 2"),
        ({"decoder_layers_per_block": [2, 2, 2, 3]}, "decoder_layers_per_block .* must have 5 entries"),
        ({"decoder_block_out_channels": []}, "decoder_block_out_channels .* must have 1 entries"),
        ({"step_size": 0}, "step_size must be at least 1"),
        ({"decoder_dw_kernel_size": 4}, "must be odd"),
        ({"use_unpatchify": False, "decoder_block_out_channels": [6, 8, 8, 8]}, "multiple of 4"),
        ({"decoder_spatio_only": [False] * 4}, "by 16 in space and 8 in time"),
        ({"latent_channels": "many"}, "not the settings of a Turbo decoder"),
        ({"decoder_spatio_only": None}, "not the settings of a Turbo decoder"),
    ],
)
def test_refuses_other_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TurboConfig.from_json({**TURBO_SETTINGS, **change})


def test_absent_and_unknown_settings_are_named() -> None:
    with pytest.raises(UserError, match="'step_size'"):
        TurboConfig.from_json({key: value for key, value in TURBO_SETTINGS.items() if key != "step_size"})
    with pytest.warns(UserWarning, match="unknown settings are ignored: shiny$"):
        assert TurboConfig.from_json({**TURBO_SETTINGS, "shiny": 1}) == TurboConfig.from_json(TURBO_SETTINGS)


def test_schedule_of_a_released_clip() -> None:
    assert windows(26, 7, 7) == [Window(0, 8, 0, 4), Window(6, 15, 4, 4), Window(13, 22, 4, 4), Window(20, 28, 4, 8)]
    assert windows(5, 7, 7) == [Window(0, 7, 0, 8)]
    assert windows(7, 7, 7) == [Window(0, 7, 0, 0)]
    assert sum(window.stop - window.start for window in windows(32, 7, 7)) == 43


@pytest.mark.parametrize(("first", "step"), [(1, 1), (2, 2), (3, 1), (1, 4), (7, 7)])
def test_kept_frames_adjoin(first: int, step: int) -> None:
    for length in range(1, 25):
        end = 0
        for window in windows(length, first, step):
            # Frame 0 belongs to latent 0 alone; latent t holds frames 4t-3 to 4t.
            begin = 4 * window.start - 3 + window.head if window.head else 0
            assert begin == end
            end = 4 * window.stop - 3 - window.tail
        assert end == 4 * length - 3


def test_stream_is_the_clip_in_pieces(codec: TurboCodec) -> None:
    z = latents(7, batch=2)
    pieces = list(codec.decode_stream(z))
    assert [list(piece.shape) for piece in pieces] == [[2, 3, count, 32, 48] for count in (5, 8, 8, 4)]
    assert torch.equal(torch.cat(pieces, 2), codec.decode(z))
    torch.testing.assert_close(codec.decode(z[1:]), codec.decode(z)[1:], atol=1e-4, rtol=0)


def test_a_piece_needs_one_latent_beyond_itself(codec: TurboCodec) -> None:
    z = latents(7)
    known, unknown = z.clone(), z.clone()
    known[:, :, 3:], unknown[:, :, 2:] = math.nan, math.nan
    assert torch.equal(next(codec.decode_stream(known)), codec.decode(z)[:, :, :5])
    assert next(codec.decode_stream(unknown)).isnan().any()


def test_the_last_latent_is_repeated_to_a_whole_window(codec: TurboCodec) -> None:
    z = latents(3)
    longer = torch.cat([z, z[:, :, -1:]], 2)
    assert torch.equal(codec.decode(z), codec.decode(longer)[:, :, :9])


def test_latents_are_denormalised_in_fp32(folder: Path) -> None:
    codec = TurboCodec.load(folder)
    z = latents(1)
    exact = z.bfloat16().double() * codec.std.double() + codec.mean.double()
    taken = codec.denormalise(z)
    assert taken.dtype == torch.bfloat16
    assert ((taken.double() - exact).abs() <= exact.abs() * 2**-8).all()


@pytest.mark.parametrize("shape", [(48, 2, 2, 2), (1, 16, 2, 2, 2), (1, 48, 0, 2, 2)])
def test_refuses_other_latents(codec: TurboCodec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \[B,48,T,h,w\]"):
        codec.decode(torch.zeros(shape))


def test_training_and_inference_compute_the_same(codec: TurboCodec) -> None:
    decoder = TurboDecoder(codec.config)
    decoder.load_state_dict(codec.decoder.state_dict())
    z = latents(2)
    before = z.clone()
    trained = decoder(z, True)
    with torch.no_grad():
        assert torch.equal(decoder(z, True), trained)
    assert torch.equal(z, before)  # nothing that the caller owns is overwritten
    trained.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in decoder.conv_in.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 6, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            y = rms_norm(x, 1e-6)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=0)
    assert torch.equal(rms_norm(torch.zeros(1, 4, 1, 1, 1), 1e-8), torch.zeros(1, 4, 1, 1, 1))


def test_a_shortcut_is_normalised_with_the_configured_constant() -> None:
    # The vectors cannot tell: their inputs are large against 1e-6.
    block = ResidualBlock(3, 2, depthwise=None, shortcut_eps=1e-6)
    torch.nn.init.zeros_(block.conv2.conv.weight)
    torch.nn.init.zeros_(block.conv2.conv.bias)
    torch.nn.init.ones_(block.conv_shortcut.conv.weight)
    torch.nn.init.zeros_(block.conv_shortcut.conv.bias)
    y = block(torch.full((1, 3, 1, 1, 1), 1e-3))
    torch.testing.assert_close(y, torch.full((1, 2, 1, 1, 1), 3 / math.sqrt(2)))


def test_columns_vary_slower_than_rows_in_a_patch() -> None:
    four = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 4, 1, 1, 1)
    assert unpatchify(four)[0, 0, 0].tolist() == [[0.0, 2.0], [1.0, 3.0]]
    two = torch.arange(8.0).view(1, 8, 1, 1, 1)
    assert unpatchify(two)[0, :, 0].tolist() == [[[0.0, 2.0], [1.0, 3.0]], [[4.0, 6.0], [5.0, 7.0]]]


def test_pictures_are_padded_with_zeros_and_time_with_copies() -> None:
    conv = TurboDecoder(TurboConfig.from_json(SMALL)).conv_in
    x = latents(3)
    padded = F.pad(F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate"), (1, 1, 1, 1))
    wanted = F.conv3d(padded, conv.conv.weight, conv.conv.bias)
    torch.testing.assert_close(conv(x), wanted, atol=1e-5, rtol=1e-5)


def test_loads_the_averaged_weights_of_the_released_file(folder: Path, codec: TurboCodec) -> None:
    wanted = codec.decode(latents(3))
    for source in (folder / WEIGHTS, folder, folder.parent):
        assert torch.equal(TurboCodec.load(source, dtype=torch.float32).decode(latents(3)), wanted)
    assert TurboCodec.load(folder).decoder.conv_out.conv.weight.dtype == torch.bfloat16


def test_loads_safetensors_and_the_bare_decoder(tmp_path: Path, codec: TurboCodec) -> None:
    state = small_state()
    bare = {key.removeprefix("decoder."): value for key, value in state.items()}
    for name, tensors in (("whole", state), ("bare", bare)):
        place = tmp_path / name
        place.mkdir()
        (place / "config.json").write_text(json.dumps(SMALL))
        save_file(tensors, place / "model.safetensors")
        again = TurboCodec.load(place, dtype=torch.float32)
        assert torch.equal(again.decode(latents(2)), codec.decode(latents(2)))


def test_names_what_does_not_fit(folder: Path) -> None:
    state = small_state()
    state["decoder.conv_in.conv.bias"] = torch.zeros(3)
    del state["decoder.conv_out.conv.bias"]
    state["decoder.extra.weight"] = torch.zeros(1)
    torch.save(released_file(state), folder / WEIGHTS)
    with pytest.raises(UserError) as error:
        TurboCodec.load(folder)
    message = str(error.value)
    assert "1 missing (decoder.conv_out.conv.bias)" in message
    assert "1 unexpected (decoder.extra.weight)" in message
    assert "decoder.conv_in.conv.bias is [3], expected [8]" in message
    assert "aligned" not in message
    assert "\n" not in message


class Trap:
    def __reduce__(self) -> tuple:
        return (Path("trap_was_sprung").write_text, ("code ran",))


def test_bad_files_are_one_line_errors(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = (folder / WEIGHTS).read_bytes()

    def error() -> str:
        with pytest.raises(UserError) as caught:
            TurboCodec.load(folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    torch.save({**released_file(small_state()), "optimizer": Trap()}, folder / WEIGHTS)
    assert "nothing in it was executed" in error()
    assert not Path("trap_was_sprung").exists()
    last = {key: value for key, value in released_file(small_state()).items() if key != "ema_state_dict"}
    torch.save(last, folder / WEIGHTS)
    assert "not a plain dictionary of tensors" in error()
    torch.save({"ema_state_dict": [torch.zeros(1)]}, folder / WEIGHTS)
    assert "not a plain dictionary of tensors" in error()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in error()
    (folder / WEIGHTS).write_bytes(whole)
    (folder / CONFIG_FILES[0]).write_text("{")
    assert f"{CONFIG_FILES[0]} cannot be read as JSON" in error()
    (folder / CONFIG_FILES[0]).unlink()
    assert f"{CONFIG_FILES[0]} is missing" in error()


def test_absence_names_the_command_that_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source in (REPO, tmp_path):
        with pytest.raises(UserError, match=f"hf download {REPO} turbo_vae/{WEIGHTS}"):
            TurboCodec.load(source)


def test_statistics_must_fit_the_decoder(codec: TurboCodec) -> None:
    settings = TurboConfig.from_json({**SMALL, "latent_channels": 8})
    with pytest.raises(UserError, match="8 latent channels, but mean has 48 values"):
        TurboCodec(TurboDecoder(settings), settings)
