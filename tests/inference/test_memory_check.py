"""infer refuses what cannot fit before it loads weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import inference.memory.memory_check as room
from inference.loading import Source
from inference.requests import InferOptions
from inference.settings import SecondStage, Settings
from magihuman import zoo
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.io.export import ExportConfig
from magihuman.models.config import Contract
from magihuman.zoo.memory_plan import stage_memory

CONTRACT = Contract("wan", "oobleck", "t5", 48, 64, 3584, (4, 16, 16), 25.0, 51200, 2)
CONFIG = ExportConfig(zoo.arch("15b"), zoo.pack("15b"), "released", CONTRACT)
SETTINGS = Settings("unipc", 32, 5.0, Guidance(), "", 5.0, 125, 126, 256, 448)
LARGE = Settings(
    "unipc", 32, 5.0, Guidance(), "", 5.0, 125, 126, 256, 448, 1, None, SecondStage(5, 5.0, 1.0, 1088, 1920)
)


def _source(**changes: Any) -> Source:
    values: dict[str, Any] = {
        "folder": Path("base"), "second_folder": None,
        "config": CONFIG, "second": CONFIG, "device": torch.device("cuda"), "dtype": torch.bfloat16,
        "decoder": None,
    }  # fmt: skip
    options = {"checkpoint": "base", "sr": "1080p_sr", "tier": "reference"}
    options |= {name: changes.pop(name) for name in list(changes) if name not in values}
    return Source(**(values | changes), options=InferOptions(**options))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(total_memory=80 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    return found


def test_what_fits_passes(gpu: SimpleNamespace) -> None:
    room.check_fits(_source(), [SETTINGS], 1)
    room.check_fits(_source(memory="balanced"), [SETTINGS, LARGE], 1)


def test_the_largest_clip_decides(gpu: SimpleNamespace) -> None:
    with pytest.raises(UserError, match=r"and the GPU has 80\.0 GB; use memory=balanced \("):
        room.check_fits(_source(), [SETTINGS, LARGE, SETTINGS], 1)


def test_a_batch_counts(gpu: SimpleNamespace) -> None:
    gpu.total_memory = 60 * 10**9
    room.check_fits(_source(), [SETTINGS], 1)
    with pytest.raises(UserError, match="the stage sample decides"):
        room.check_fits(_source(), [SETTINGS], 8)


def test_on_the_cpu_nothing_is_asked() -> None:
    room.check_fits(_source(device=torch.device("cpu")), [LARGE] * 3, 100)


def test_a_light_decoder_counts_as_what_it_is(gpu: SimpleNamespace) -> None:
    from magihuman.zoo import decoders

    described = decoders.arch("b")
    latents = decoders.Latents("wan", 48, (4, 16, 16))
    ours = decoders.DecoderConfig(described["layout"], described["network"], latents)
    decode = {
        name: stage_memory(room.request_for(_source(**changes), LARGE, 1))[-1].activations
        for name, changes in {
            "wan": {},
            "published": {"turbo": "turbo_vae"},
            "b": {"turbo": "run", "decoder": ours},
            "tiled": {"turbo": "run", "decoder": ours, "tile": 512},
            "published tiled": {"turbo": "turbo_vae", "tile": 512},
        }.items()
    }
    assert decode["b"] < 2.5e9 < 20e9 < decode["wan"] < decode["published"]
    assert decode["tiled"] < decode["b"]
    assert decode["published tiled"] < 0.25 * decode["published"]
