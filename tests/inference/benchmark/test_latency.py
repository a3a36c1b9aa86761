"""Latency on the CPU: every command at tiny size, distances from the reference, one network for both stages."""

import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_case import small_case

from inference.benchmark import bench_networks, components, micro, result_files, timers, video_decoders
from inference.benchmark.__main__ import COMMANDS, measure
from inference.benchmark.case_options import MeasureOptions
from inference.benchmark.roofline.cases import make
from inference.benchmark.timers import Stopwatch, summary, time_call
from magihuman import zoo
from magihuman.cli import run_one
from magihuman.errors import UserError
from magihuman.models.denoiser import Denoiser

CPU = torch.device("cpu")


def test_spread_by_hand() -> None:
    found = summary([1.0, 4.0, 2.0])
    assert (found["median"], found["min"], found["max"], found["n"]) == (2.0, 1.0, 4.0, 3)
    assert found["cv"] == pytest.approx(1.527525 / 2.333333, abs=1e-4)
    with pytest.raises(ValueError, match="nothing"):
        summary([])


def test_stopwatch_adds_up_stages() -> None:
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch.stage("sleep"):
            time.sleep(0.02)
    with watch.stage("work", host=True):
        sum(range(10000))
    times = watch.finish()
    assert 0.04 <= times["sleep"] <= times["request"]
    assert times["sleep"] + times["work"] <= times["request"]
    assert watch.worked["sleep"] < 0.02  # sleeping is no work
    calls: list[int] = []
    found = time_call(lambda: calls.append(1), CPU, warm=2, least=3, most=3)
    assert (len(calls), found["n"]) == (5, 3)


def test_both_stages_run_on_one_network() -> None:
    """Views of the second stage's network: the base one without windows and with its own coordinates."""
    case = small_case()
    network, words = bench_networks.build(case, CPU, torch.float32, None)
    assert words == "random, float32, the same for both stages"
    state = network.model.state_dict()
    for stage in case.stages:
        alone = zoo.build(stage.config, stage.pack, compute_dtype=torch.float32)
        alone.model.load_state_dict(state)
        given = bench_networks.draw(stage, network, CPU)
        seen = bench_networks.view(network, stage)
        assert seen.model.block is network.model.block
        for a, b in zip(bench_networks.one_pass(seen, given), bench_networks.one_pass(alone, given), strict=True):
            assert torch.equal(a, b)
    base, sr = (bench_networks.view(network, stage) for stage in case.stages)
    given = bench_networks.draw(case.stages[1], network, CPU)
    assert not torch.equal(bench_networks.one_pass(base, given)[0], bench_networks.one_pass(sr, given)[0])


@pytest.mark.parametrize("tier", ["exact", "fast"])
def test_faster_tiers_share_a_network_too(tier: str) -> None:
    case = small_case()
    network, _ = bench_networks.build(case, CPU, torch.float32, None)
    fast = bench_networks.faster(network, tier, CPU, False, {})
    for stage in case.stages:
        given = bench_networks.draw(stage, network, CPU)
        truth = bench_networks.ReferenceOutput(bench_networks.view(network, stage), given, exact=True)
        found = truth.errors(bench_networks.one_pass(bench_networks.view(fast, stage), given))
        distance = found["against_float32_reference"]["video_relative_l2"]
        assert distance == 0 if tier == "exact" else distance < 1e-5


def test_distances_from_the_reference() -> None:
    case = small_case()
    stage = case.stages[0]
    network, _ = bench_networks.build(case, CPU, torch.bfloat16, None)
    given = bench_networks.draw(stage, network, CPU)
    truth = bench_networks.ReferenceOutput(bench_networks.view(network, stage), given, exact=True)
    assert truth.own is not None
    video, audio = truth.own
    found = truth.errors((1.5 * video, audio))
    own = found["against_bfloat16_reference"]
    assert own["video_relative_l2"] == pytest.approx(0.5, rel=1e-3)
    assert own["audio_relative_l2"] == 0
    assert own["video_max_abs"] == pytest.approx(0.5 * float(video.abs().max()), rel=1e-3)
    # bf16 has 8 bits: the reference itself is about 1e-2 from fp32.
    assert 1e-4 < found["reference_against_float32"]["video_relative_l2"] < 5e-2
    assert found["against_float32_reference"]["video_relative_l2"] > 0.4
    assert [bench_networks.affordable(make(size).stages[-1]) for size in ("540p", "1080p")] == [True, False]
    far = bench_networks.ReferenceOutput(bench_networks.view(network, stage), given, exact=False)
    assert far.errors((video, audio))["against_float32_reference"]["status"] == "n/a"
    with pytest.raises(ValueError, match="not finite"):
        truth.errors((video * torch.nan, audio))


def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak rates of small products and copies: those in bf16 take minutes on a CPU without it."""
    monkeypatch.setitem(timers._SIDE, "cpu", 1 << 8)
    monkeypatch.setitem(timers._COPIED, "cpu", 1 << 20)


def test_every_command_at_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_peaks(monkeypatch)
    monkeypatch.setattr(micro.Microbenchmark, "budget", 0.0)
    monkeypatch.setattr(video_decoders, "make", partial(make, seconds=0.36))
    short = ["size=tiny", f"output={tmp_path}"]
    for line in (
        "micro what=products,experts",
        "micro what=attention",
        "measure tier=reference,fast seconds=0.36 steps=1 sr_steps=1 repeat=2 warm=1 budget=0.1",
        "measure tier=fp8 seconds=0.36 steps=1 sr_steps=1 repeat=1 warm=1 budget=0.1",
        "decode repeat=1",
        "ladder repeat=1 options=compile=off",
    ):
        command, *arguments = line.split()
        run_one(COMMANDS, "python -m inference.benchmark", [command, *arguments, *short])
    by_kind: dict[str, list[Any]] = {}
    for values in result_files.read(tmp_path):
        by_kind.setdefault(values["kind"], []).extend(values["rows"])
        made = values["provenance"]
        assert {"command", "code", "date", "machine", "libraries", "load_average"} <= set(made)
    _check_rows(by_kind)


def _check_rows(by_kind: dict[str, list[Any]]) -> None:
    reference, fast, _ = by_kind["measure"]
    assert [reference["tier"], fast["tier"]] == ["reference", "fast"]
    assert fast["exactness"] == "E1"
    assert fast["weights"].startswith("tiny/base, float32")
    assert fast["geometry"]["base"]["tokens"] == {"video": 48, "audio": 9, "text": 12, "total": 69}
    stages = fast["stages"]
    assert set(stages) == {
        "text", "noise", "base", "sr", "video decode", "to host", "audio decode", "encode and mux", "image", "sound",
    }  # fmt: skip
    assert all(cell["median"] > 0 for cell in stages.values())
    parts_sum = sum(stages[n]["min"] for n in ("base", "sr", "video decode", "to host"))
    assert parts_sum <= fast["comparable"]["max"] <= fast["request"]["max"]
    assert fast["errors"]["sr"]["against_float32_reference"]["video_relative_l2"] < 1e-5
    assert set(fast["faster_than_reference"]) == {"base", "sr"}
    times = fast["processor_time"] if torch.get_num_threads() == 1 else stages
    seconds = times["base"]["median"]
    rate, counted = fast["rates"]["base"], fast["geometry"]["base"]["flops_per_pass"]
    assert rate["tflops"] == pytest.approx(counted / seconds / 1e12, rel=0.01, abs=1e-5)
    assert {"build", "prepare", "first_pass", "first_request"} == set(fast["cold"])

    peak, *rows = (row for row in by_kind["micro"] if row["what"] != "roof" or row is by_kind["micro"][0])
    assert peak["tflops"] > 0
    forms = {(row["what"], row["name"], row["form"]) for row in rows}
    assert {("product", "down", "as is"), ("product", "down", "padded"), ("experts", "up", "grouped")} <= forms
    plain = next(row for row in rows if row["form"] == "plain")
    assert plain["relative_l2_to_fp32"] < 1e-5
    cudnn = next(row for row in rows if row["form"] == "cudnn")
    assert "needs an NVIDIA GPU" in cudnn["reason"]

    rungs = {row["key"]: row for row in by_kind["ladder"]}
    assert rungs["pad"]["options"]["pad"]
    assert not rungs["pad"]["options"]["grouped"]
    assert rungs["grouped"]["options"]["grouped"]
    assert rungs["eager"]["errors"]["base"]["against_float32_reference"]["video_relative_l2"] == 0
    assert rungs["fp8_attention"]["status"] == "n/a"
    assert {row["decoder"] for row in by_kind["decode"]} >= {"codec", "tiny"}


def test_released_parts_with_narrow_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of the released sizes with a small transformer, a student decoder and thin codecs."""
    small_peaks(monkeypatch)
    narrow = {"base_dim": 8, "decoder_base_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    monkeypatch.setattr(components, "WAN", {**components.WAN, **narrow})
    thin = {"encoder_hidden_size": 8, "channel_multiples": [1, 1, 1, 1, 1], "decoder_channels": 8}
    monkeypatch.setattr(components, "OOBLECK", {**components.OOBLECK, **thin})
    whole = components.students.arch

    def narrow_arch(name: str) -> dict[str, Any]:
        found = deepcopy(whole(name))
        for stage in found["network"]["stages"] if name == "b" else ():
            stage["width"] //= 16
        return found

    monkeypatch.setattr(components.students, "arch", narrow_arch)
    chosen = MeasureOptions(
        size="256p", steps=1, seconds=0.12, text=8, decoder="b", model="small", warm=1, repeat=1, budget=0.1,
        output=str(tmp_path),
    )  # fmt: skip
    told = measure(chosen)
    (values,) = result_files.read(tmp_path)
    (row,) = values["rows"]
    assert row["stages"]["text"] == {"status": "n/a", "reason": "its 9 B parameters are for a GPU"}
    assert row["decoder"] == {"name": "b", "weights": "random"}
    assert row["weights"] == "random, bfloat16"
    assert row["clip"] == {"seconds": 0.12, "frames": 1, "pixels": [256, 448]}
    for stage in ("base", "video decode", "audio decode", "encode and mux", "image", "sound"):
        assert row["stages"][stage]["n"] == 1, told
    bound = row["errors"]["base"]
    assert (
        bound["against_float32_reference"]["video_relative_l2"]
        < 2 * bound["reference_against_float32"]["video_relative_l2"]
    )


def test_text_encoder_of_the_released_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    narrow |= {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 1000}
    monkeypatch.setattr(components, "T5GEMMA", narrow)
    encoder = components._t5gemma(CPU, 21)
    assert encoder.encode([""])[0].shape == (21, 16)
    assert next(encoder.parameters()).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_released_decoders_by_name() -> None:
    names = components.decoder_names(make("1080p"))
    assert {"turbo", "wan", "a", "b"} <= set(names)
    counts = {
        name: sum(
            p.numel() for p in components.released_decoder(name, torch.device("meta"), torch.bfloat16).parameters()
        )
        for name in names
        if name != "wan"
    }
    assert counts["turbo"] == 107_122_892
    from inference.benchmark.roofline.work import decoder_parameters

    assert all(counts[name] == decoder_parameters(name) for name in counts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("size=256p", "needs a GPU"),
        ("--tier slow", "tier=slow is unknown"),
        ("--size 4k", "size=4k is unknown"),
        ("size=tiny decoder=c", "decoder=c is unknown"),
        ("size=tiny device=cuda", "finds no GPU"),
        ("size=tiny options=compile", "not of the form name=value"),
        ("size=tiny options=speed=9", "has no option speed"),
        ("micro what=x", "what=x is unknown"),
        ("ladder size=tiny rungs=x", "rungs=x is unknown"),
        ("decode size=tiny decoder=x", "decoder=x is unknown"),
        ("size=tiny repeat=0", "repeat=0 is impossible"),
        ("suite minutes=0", "minutes=0 is impossible"),
        ("suite dry=true steps=fp9", "steps=fp9 is unknown; choose from roof, build"),
        ("suite minute=3", "minute"),
        ("train minutes=-1", "minutes=-1 is impossible"),
        ("train dry=true steps=lora", "steps=lora is unknown; choose from roof, lora build"),
        ("collect input=nowhere.jsonl", "nowhere.jsonl cannot be read: No such file"),
        ("size=tiny checkpoint=tiny/base model=small", "size=tiny is not for small"),
    ],
)
def test_mistakes_are_one_line(line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as caught:
        run_one(COMMANDS, "python -m inference.benchmark", [*line.split(), f"output={tmp_path}"])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_layer_on_a_gpu(tmp_path: Path) -> None:
    measure(MeasureOptions(size="layer", tier="reference,fast", repeat=3, budget=1, output=str(tmp_path)))
    (values,) = result_files.read(tmp_path)
    assert values["provenance"]["gpu"]
    assert all(row["peak_memory_bytes"] > 5e8 for row in values["rows"])


def test_a_network_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not of the shape of"):
        bench_networks.build(small_case(), CPU, torch.float32, "tiny/base")
    assert isinstance(bench_networks.build(make("tiny"), CPU, torch.float32, "tiny/base")[0], Denoiser)
