"""The checks of codecs and pictures find deliberate mistakes, also where they allow for fp32 rounding."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from magihuman.zoo import checks
from magihuman.zoo.checks import Parameters, Result, VectorCase, checker, kind_of


def case_of(golden: Path, name: str) -> VectorCase:
    meta = json.loads((golden / "manifest.json").read_text())["files"][name]["meta"]
    return VectorCase(name, Parameters(meta), load_file(golden / f"{name}.safetensors"))


def run(case: VectorCase) -> dict[str, Result]:
    kind = kind_of(case.name)
    assert kind is not None
    return {result.what.split(" (")[0]: result for result in checker(kind)(case)}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("wan22_latent_stats", 2),
        ("wan22_vae_tiny", 13),
        ("oobleck_tiny", 3),
        ("oobleck_five", 3),
        ("audio_encode_short", 1),
        ("audio_utils", 7),
        ("image_resizecrop", 16),
        ("video_uint8", 3),
        ("sr_prepare", 3),
    ],
)
def test_case_passes_in_every_part(golden: Path, name: str, count: int) -> None:
    results = run(case_of(golden, name))
    assert len(results) == count
    assert [what for what, result in results.items() if not result.passed] == []


@pytest.mark.parametrize(
    ("name", "weight", "found_by"),
    [
        ("wan22_vae_tiny", "w/conv1.bias", "len5/latent"),
        ("wan22_vae_tiny", "w/decoder.head.2.bias", "len9/decoded"),
        ("oobleck_five", "w/encoder.layers.7.bias", "enc/latent"),
        ("oobleck_five", "w/decoder.layers.6.alpha", "dec/wav"),
        ("audio_encode_short", "w/encoder.layers.7.bias", "out"),
    ],
)
def test_a_wrong_weight_is_found(
    golden: Path, name: str, weight: str, found_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one thread the sums differ from the vectors', so that the allowance for rounding is in force.
    monkeypatch.setattr("magihuman.zoo.checks.network.THREADS", 1)
    case = case_of(golden, name)
    case.tensors[weight] += 0.05
    assert not run(case)[found_by].passed


def test_a_wrong_key_map_and_statistic_are_found(golden: Path) -> None:
    vae = case_of(golden, "oobleck_tiny")
    vae.meta["key_map_to_diffusers"]["encoder.layers.0.bias"] = "encoder.conv9.bias"
    assert run(vae)["key map"].error == 1
    statistics = case_of(golden, "wan22_latent_stats")
    statistics.tensors["std"][7] += 1e-4
    assert [r.passed for r in run(statistics).values()] == [True, False]


def test_codec_kinds_are_registered() -> None:
    assert kind_of("wan22_latent_stats") == "wan22_latent_stats"
    assert kind_of("wan22_vae_wide") == "wan22_"
    assert all(checks.checker(kind) for kind in checks.KINDS)
