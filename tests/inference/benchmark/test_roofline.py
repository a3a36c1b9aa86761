"""Computed costs against torch's counters and the published networks' shapes; the floors; no torch at start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from inference.benchmark.roofline import predict, work
from inference.benchmark.roofline.__main__ import COMMANDS, ladder
from inference.benchmark.roofline.cases import make
from inference.benchmark.roofline.work import bound, limits
from magihuman import zoo
from magihuman.cli import run_one
from magihuman.codecs import costs
from magihuman.errors import UserError
from magihuman.models.flops import pointwise_bytes
from magihuman.models.gpu_specs import GPUS

REPO = Path(__file__).resolve().parents[3]
AT_790 = limits(GPUS["h200"], tflops=790)


def _counted(function: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("number", [0, 1])
def test_tiny_network_is_counted_exactly(number: int) -> None:
    """Both loops' passes, on the shipped architecture and with its own shapes."""
    stage = make("tiny").stages[number]
    denoiser = zoo.build(stage.config, stage.pack, compute_dtype=torch.float32, seed=0)
    denoiser.model.attention_backend = "reference"  # plain products, which the counter sees
    video = torch.zeros(1, denoiser.latent_channels, stage.frames, stage.height, stage.width)
    audio = torch.zeros(1, stage.audio, stage.config.audio_in_channels)
    text = torch.zeros(stage.text, stage.config.text_in_channels)
    counted = _counted(lambda: denoiser(video, audio, [text]))
    assert work.forward(stage).total == counted
    assert work.network(stage).flops == stage.steps * counted
    assert stage.tokens.total == denoiser.layout_for(video.shape, stage.audio, [stage.text]).length


def test_floors_of_the_study() -> None:
    """1.03, 3.18 and 24.25 s at 790 TFLOP/s: no exact bf16 path can pass these."""
    least = {size: bound(work.network(make(size).stages[-1]), AT_790).seconds for size in ("256p", "540p", "1080p")}
    assert least["256p"] == pytest.approx(1.03, abs=0.005)
    assert least["540p"] == pytest.approx(3.18, abs=0.005)
    assert least["1080p"] == pytest.approx(24.25, abs=0.01)
    shown = {size: predict.floor(make(size)) for size in predict.SIZES}
    assert [(cell["base"], cell["sr"]) for cell in shown.values()] == [
        pytest.approx((1.03, loop), abs=0.006) for loop in (0, 3.18, 24.25)
    ]
    assert all(bound(w, AT_790).by == "compute" for w in work.stages(make("1080p")) if w.passes > 1)


def test_tokens_and_flops_of_the_published_sizes() -> None:
    stages = {size: make(size).stages[-1] for size in ("256p", "540p", "1080p")}
    assert [s.tokens.total for s in stages.values()] == [4050, 14802, 65746]
    assert [s.tokens.video for s in stages.values()] == [3584, 14336, 65280]
    per_pass = {size: work.forward(stage) for size, stage in stages.items()}
    assert per_pass["256p"].total == pytest.approx(101.9e12, rel=1e-3)
    assert per_pass["540p"].attention == pytest.approx(179.5e12, rel=1e-3)
    # 8 layers see everything, 32 see 11 frames to each side.
    assert per_pass["1080p"].attention == pytest.approx(8 * 88.5e12 + 32 * 52.7e12, rel=2e-3)
    base = work.network(make("256p").stages[0])
    assert base.flops / 1.6 / GPUS["h100"].bf16 == pytest.approx(0.515, abs=0.001)
    assert make("256p", guided=True).stages[0].passes == 16


def test_pointwise_and_product_traffic_by_hand() -> None:
    config = make("layer").stages[0].config
    hidden, inner, qkv = 5120, 13652, 5120 + 2 * 1024 + 40
    assert config.qkv_width == qkv
    pointwise = 24 * hidden + 4 * (hidden + 1024) + 4 * hidden + 2 * 3 * inner
    assert pointwise_bytes(config, 10) == 10 * pointwise
    products = (
        2 * (hidden + qkv) + 2 * (hidden + 2 * 1024) + 2 * hidden + 4 * hidden + 2 * (2 * inner + inner) + 2 * hidden
    )
    assert work.product_bytes(config, 10) == 10 * (products + 2 * hidden - 2 * hidden)


def test_released_decoders_are_counted_exactly() -> None:
    from magihuman.codecs.turbo_vaed import TurboCodec, TurboConfig, TurboDecoder, windows
    from magihuman.codecs.wan import WanCodec, _build

    settings = TurboConfig(
        48, (64, 128, 256, 512), (2, 2, 2, 3, 3), (False, True, True, True), (False, True, False, False),
        (False,) * 5, 7, 7, True,
    )  # fmt: skip
    with torch.device("meta"):
        codec = TurboCodec(TurboDecoder(settings).to(torch.bfloat16), settings)
    for frames in (3, 16):
        latents = torch.zeros(1, 48, frames, 6, 8, device="meta")
        counted = _counted(lambda latents=latents: list(codec.decode_stream(latents)))
        assert work.decoder_flops("turbo", frames, 6, 8) == counted
    for frames in (1, 7, 8, 14, 15, 32, 33):
        assert costs.turbo_windows(frames) == [w.stop - w.start for w in windows(frames, 7, 7)]
    vae = _build(
        {
            "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 2, "temperal_downsample": [False, True, True], "is_residual": True,
            "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
        }
    )  # fmt: skip
    wan = WanCodec(vae.to(torch.bfloat16)).to("meta")
    counted = _counted(lambda: list(wan.decode_stream(torch.zeros(1, 48, 2, 6, 8, device="meta"))))
    assert work.decoder_flops("wan", 2, 6, 8) == counted
    picture = torch.zeros(1, 3, 1, 256, 448, device="meta")
    assert work.picture_encoder(make("256p")).flops == _counted(lambda: wan.encode(picture))


def test_sound_codec_is_counted_exactly() -> None:
    from diffusers import AutoencoderOobleck

    with torch.device("meta"):
        vae = AutoencoderOobleck(
            encoder_hidden_size=128, downsampling_ratios=[2, 4, 4, 8, 8], channel_multiples=[1, 2, 4, 8, 16],
            decoder_channels=128, decoder_input_channels=64, audio_channels=2,
        )  # fmt: skip
        latents, wave = torch.zeros(1, 64, 26), torch.zeros(1, 2, 26 * 2048)
    case = make("256p", seconds=1)
    assert work.sound_decoder(case).flops == _counted(lambda: vae.decoder(latents))
    assert work.sound_encoder(case).flops == _counted(lambda: vae.encoder(wave))


def test_ladder_is_that_of_the_study(tmp_path: Path) -> None:
    """Predictions in perf.md's order, and each optimisation brings something."""
    file = tmp_path / "ladder.json"
    ladder(output=str(file))
    values = json.loads(file.read_text())
    assert values["kind"] == "predicted"
    assert "not measured" in values["provenance"]["how"]
    times = {row["key"]: row["seconds"] for row in values["rows"]}
    expected = {
        "eager": (2.10, 5.60, 45.97), "pad": (1.72, 4.77, 42.30), "compile": (1.46, 4.26, 40.18),
        "grouped": (1.37, 4.19, 39.98), "windows": (1.37, 4.19, 33.20), "attention": (1.35, 4.04, 31.19),
        "tuned": (1.28, 3.86, 29.73), "fp8": (0.93, 3.09, 26.31),
        "fp8_attention": (0.87, 2.63, 20.52),
    }  # fmt: skip
    assert list(times) == list(expected)
    for key, row in expected.items():
        assert list(times[key].values()) == pytest.approx(row, abs=0.0051)
    first, *_, last = values["rows"]
    for size in predict.SIZES:
        clip = last["clips"][size]
        assert clip["total"] == pytest.approx(clip["base"] + clip["sr"] + clip["decode"], abs=2e-4)
        assert values["floor"]["clips"][size]["total"] < first["clips"][size]["total"]
        assert last["student_totals"][size] < clip["total"]
    assert {row["key"]: row["target"]["1080p"] for row in values["rows"] if "target" in row} == {
        "attention": 35.0, "fp8": 30.0, "fp8_attention": 24.0,
    }  # fmt: skip


def test_a_wave_is_full_or_not() -> None:
    assert predict.wave_efficiency(128 * 11, 256 * 12, 132) == 1.0
    assert predict.wave_efficiency(1, 256, 132) == pytest.approx(1 / (128 * 132))


def test_commands_start_without_torch() -> None:
    code = (
        "import sys; from inference.benchmark.roofline.__main__ import COMMANDS; from magihuman.cli import call_with;"
        "[print(call_with(f, {})) for f in COMMANDS.values()];"
        "heavy = {'torch', 'numpy', 'yaml', 'hydra', 'omegaconf'} & (set(sys.modules) - {'yaml'});"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "3584+126+340=4050" in done.stdout
    assert "computed, not measured" in done.stdout


def test_other_networks_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert make("256p", model="1b").stages[0].config == zoo.arch("1b")
    assert make("tiny", model="tiny/base").stages[0].config == zoo.config_of("tiny/base").model
    for line, message in (
        (["size=4k"], "size=4k is unknown"),
        (["size=540p", "model=tiny"], "size=540p is not for tiny"),
        (["steps=0"], "steps=0 is impossible"),
        (["device=h1"], "device=h1 is unknown"),
        (["bounds"], "has no command 'bounds'"),
    ):
        with pytest.raises(SystemExit) as caught:
            run_one(COMMANDS, "python -m inference.benchmark.roofline", line)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="decoder=x is unknown"):
        work.stages(make("256p"), "x")


def test_rates_are_assumed_for_two_cards_alone() -> None:
    assert predict.machine_of("NVIDIA H100 80GB HBM3") is predict.H100
    assert predict.machine_of("NVIDIA H200") is predict.H200
    assert all(predict.machine_of(name) is None for name in ("NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "Tesla T4"))
