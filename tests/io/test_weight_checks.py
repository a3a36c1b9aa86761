"""Weights with changed bytes, with NaN, or with impossible settings are refused in one line, wherever they are read."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small_dit
import torch
import training_stub
from safetensors.torch import load_file, save_file
from small_dit import LOCAL, SIZE, adapted

from magihuman import zoo
from magihuman.codecs.causal_decoder_config import CausalDecoderConfig
from magihuman.errors import UserError
from magihuman.io.export import ExportConfig, released_dtypes, save_export
from magihuman.io.released_files import read_json, read_state
from magihuman.io.weight_checks import CHECKSUMS, require_finite
from magihuman.models import lora
from magihuman.models.config import Contract, DiTConfig, PackConfig
from magihuman.schema import check_limits
from magihuman.zoo import decoders, lora_files
from magihuman.zoo.commands import convert

CONTRACT = Contract(**{**training_stub.CONTRACT.to_dict(), "audio_channels": 6, "text_channels": 10})
CONFIG = ExportConfig(LOCAL, PackConfig(2, "v2", 1), "stub", CONTRACT)
DECODER = decoders.DecoderConfig(
    "causal",
    {"latent_channels": 3, "stages": [{"width": 4, "blocks": 1, "kind": "full"}], "patch": [1, 4]},
    decoders.Latents("stub", 3, (1, 4, 4)),
)


def base(folder: Path, spoil: Callable[[torch.Tensor], object] = id) -> Path:
    state = released_dtypes(lora.base_state(adapted().model.state_dict()), LOCAL)
    spoil(state["block.layers.0.mlp.down_proj.weight"])
    return save_export(folder / "base", state, CONFIG)


def adapter(folder: Path, spoil: Callable[[torch.Tensor], object] = id) -> Path:
    state = lora.lora_state(adapted().model.state_dict(), "student")
    spoil(state["block.layers.0.mlp.down_proj.lora.A"])
    return lora_files.save_lora(folder / "adapter", state, SIZE, CONFIG, "tiny/base")


def decoder(folder: Path, spoil: Callable[[torch.Tensor], object] = id) -> Path:
    state = decoders.build(DECODER, seed=0).state_dict()
    spoil(next(iter(state.values())))
    return decoders.save(folder / "decoder", state, DECODER)


def load(folder: Path) -> object:
    if folder.name == "adapter":
        return lora_files.load_lora(folder, LOCAL)
    return decoders.load(folder) if folder.name == "decoder" else zoo.load(folder)


kinds = pytest.mark.parametrize("make", [base, adapter, decoder], ids=lambda function: function.__name__)


@kinds
def test_flipped_bytes_are_found_when_weights_are_read(make, tmp_path: Path) -> None:
    folder = make(tmp_path)
    load(folder)
    [file] = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    for byte in range(len(data) - 8, len(data)):
        data[byte] ^= 1  # changes a little, and is finite
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{file.name} is damaged: its checksum"):
        load(folder)
    (folder / CHECKSUMS).unlink()  # published weights have none
    load(folder)


def test_flipped_bytes_are_found_when_a_checkpoint_is_converted(tmp_path: Path) -> None:
    folder = base(tmp_path)
    convert(str(folder), str(tmp_path / "copy"))
    zoo.load(tmp_path / "copy")
    for damaged in (folder, tmp_path / "copy"):
        [file] = damaged.glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(data)
        with pytest.raises(UserError, match="is damaged"):
            convert(str(damaged), str(tmp_path / "again"))


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_read(make, value: float, tmp_path: Path) -> None:
    def spoil(tensor: torch.Tensor) -> None:
        tensor.view(-1)[3] = value

    with pytest.raises(UserError, match="holds numbers that are not finite"):
        make(tmp_path, spoil)
    assert list(tmp_path.iterdir()) == []
    folder = make(tmp_path)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors)
    spoil(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    (folder / CHECKSUMS).unlink()
    with pytest.raises(UserError, match="holds numbers that are not finite"):
        load(folder)


def test_a_pickle_with_nan_is_refused_and_other_types_pass(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a.pth: a holds numbers that are not finite"):
        read_state(tmp_path / "a.pth")
    require_finite({"a": torch.zeros(0), "b": torch.ones(2, dtype=torch.int64), "c": torch.ones(2).bool()}, "x")
    require_finite({"d": torch.ones(2).to(torch.float8_e4m3fn), "e": torch.full((2,), 3e38).bfloat16()}, "x")


HUGE = [
    ("model", "num_layers", 3_000_000),
    ("model", "hidden_size", 10**12),
    ("model", "num_query_groups", 10**9),
    ("model", "head_dim", 2**40),
    ("model", "text_in_channels", 1e300),
    ("model", "mm_layers", list(range(100_000))),
    ("pack", "patch_size", 10**9),
    ("pack", "frame_receptive_field", float("inf")),
    ("contract", "video_channels", 10**10),
    ("contract", "fps", float("nan")),
    ("sampling", "steps", 10**6),
    ("sampling", "shift", float("nan")),
    ("size", "frames", 10**9),
    ("size", "width", 10**15),
]


@pytest.mark.parametrize(("part", "setting", "value"), HUGE, ids=lambda v: v if isinstance(v, str) else "")
def test_impossible_settings_of_a_checkpoint_are_refused_at_once(
    part: str, setting: str, value, tmp_path: Path
) -> None:
    folder = base(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config[part][setting] = value
    (folder / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    with pytest.raises(UserError, match=f"{setting}.*(is impossible|more than 1000)") as raised:
        zoo.load(folder)
    assert len(str(raised.value)) < 300
    assert time.process_time() - start < 0.5


def test_impossible_settings_of_decoders_and_codecs_are_refused_at_once(tmp_path: Path) -> None:
    stage = {"width": 4, "blocks": 3_000_000, "kind": "full"}
    with pytest.raises(UserError, match=r"blocks=3000000 is impossible"):
        CausalDecoderConfig.from_dict({"latent_channels": 3, "stages": [stage]})
    folder = decoder(tmp_path)
    for layout, network in (
        ("causal", {"latent_channels": 3, "stages": [stage]}),
        ("wan", {"latent_channels": 3, "width": 4, "multipliers": [1], "double_time": [], "blocks": 3_000_000}),
        ("released", {**decoders.arch("released")["network"], "decoder_layers_per_block": [1, 1, 3_000_000]}),
    ):
        config = {**DECODER.to_dict(), "layout": layout, "network": network}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"3000000 is impossible"):
            decoders.load(folder)
    check_limits(small_dit.LOCAL.to_dict() | {"note": "text", "flag": True, "none": None}, "model")
    with pytest.raises(UserError, match="impossible"):
        DiTConfig(**{**LOCAL.to_dict(), "num_layers": 10**7})


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"format": ' + "9" * 5000 + "}", "{} " * 10])
def test_hostile_json_is_one_line(text: str, tmp_path: Path) -> None:
    for make in (base, decoder, adapter):
        folder = make(tmp_path / make.__name__)
        for name in ("config.json", "adapter_config.json", "model.safetensors.index.json", CHECKSUMS):
            if (folder / name).exists():
                whole = (folder / name).read_text()
                (folder / name).write_text(text)
                with pytest.raises(UserError) as raised:
                    zoo.load(base(tmp_path), lora=folder) if make is adapter else load(folder)
                assert "\n" not in str(raised.value)
                assert len(str(raised.value)) < 700
                (folder / name).write_text(whole)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError):
        read_json(tmp_path / "x.json", "a test")
