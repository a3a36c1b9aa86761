"""python -m magihuman.zoo convert: every layout and back, bit for bit."""

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_bundle import fake_checkpoint
from fake_release import (
    SHARDS,
    dit_config,
    left_in,
    make_hollow,
    make_stable_audio,
    make_turbo,
    make_wan,
    same,
    tensors_of,
)
from safetensors.torch import load_file, save_file

from magihuman import zoo
from magihuman.errors import UserError
from magihuman.io import streamed_safetensors
from magihuman.io.export import INDEX, load_config, weight_files
from magihuman.io.streamed_safetensors import SafetensorsWriter, read_specs
from magihuman.zoo.__main__ import main
from magihuman.zoo.commands import convert
from magihuman.zoo.convert import parse_size
from magihuman.zoo.inspect import describe

LAST = "model-00007-of-00007.safetensors"
MATRICES = {key for key, _, is_matrix in dit_config(8).tensors() if is_matrix}


class TestFiles:
    """Reading and writing in pieces."""

    def test_writes_the_bytes_of_the_library(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        state = {
            name: (torch.randn(3, 5) * 9).to(dtype)
            for name, dtype in {**streamed_safetensors.DTYPES, "é": torch.float32}.items()
        } | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
        save_file(state, tmp_path / "theirs", {"format": "pt"})
        specs = read_specs(tmp_path / "theirs")
        with SafetensorsWriter(tmp_path / "ours", specs) as writer:
            for name in reversed(list(state)):
                writer.write(name, iter(state[name].reshape(-1).split(4)))
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()

    def test_nothing_may_be_forgotten(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "x.safetensors")
        specs = read_specs(tmp_path / "x.safetensors")
        with pytest.raises(RuntimeError, match="1 tensors were not written, for example b"):
            with SafetensorsWriter(tmp_path / "y", specs) as writer:
                writer.write("a", iter([torch.zeros(2)]))
        with pytest.raises(RuntimeError, match="a: 4 bytes, not 8"):
            with SafetensorsWriter(tmp_path / "y", specs) as writer:
                writer.write("a", iter([torch.zeros(1)]))

    def test_sizes(self) -> None:
        assert [parse_size(s) for s in ("5GB", "500 mb", "1.5k", "7")] == [5 * 10**9, 5 * 10**8, 1500, 7]
        for wrong in ("", "much", "0", "-1GB", "5TB"):
            with pytest.raises(UserError, match=f"max_shard={wrong} is not a size"):
                parse_size(wrong)


class TestRoundTrips:
    """Layout to layout."""

    def test_released_to_export_and_back(self, release: Path, tmp_path: Path) -> None:
        source = tensors_of(release / "base")
        assert main(["convert", str(release / "base"), str(tmp_path / "a")]) == 0
        assert same(tensors_of(tmp_path / "a"), source)
        assert load_config(tmp_path / "a") == zoo.config_of(release / "base")
        convert(str(tmp_path / "a"), str(tmp_path / "base"), to="released", max_shard="40kB")
        assert same(tensors_of(tmp_path / "base"), source)
        assert not (tmp_path / "base" / "config.json").exists()
        assert zoo.config_of(tmp_path / "base") == zoo.config_of(release / "base")
        index = json.loads((tmp_path / "base" / INDEX).read_text())
        published = json.loads((release / "base" / INDEX).read_text())
        assert index["metadata"] == published["metadata"]
        sizes = [sum(spec.nbytes for spec in read_specs(f).values()) for f in weight_files(tmp_path / "base")]
        assert len(sizes) > SHARDS["base"]
        assert max(sizes) <= 40000
        assert left_in(tmp_path) == ["a", "base"]

    def test_same_plan_gives_the_same_files(self, tmp_path: Path) -> None:
        make_hollow(tmp_path / "distill", dit_config(8), limit=30000)
        convert(str(tmp_path / "distill"), str(tmp_path / "again"), to="released", max_shard="30kB")
        files = weight_files(tmp_path / "distill")
        assert len(files) > 3
        assert [f.name for f in files] == [f.name for f in weight_files(tmp_path / "again")]
        for file in files:
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()

    def test_through_a_diffusers_style_folder(self, release: Path, tmp_path: Path) -> None:
        from diffusers import AutoencoderKLWan, AutoencoderOobleck

        from magihuman.codecs.oobleck import OobleckCodec
        from magihuman.codecs.wan import WanCodec

        make_wan(tmp_path / "wan")
        make_stable_audio(tmp_path / "sound")
        there = tmp_path / "there"
        convert(
            str(release / "1080p_sr"), str(there), "diffusers", vae=str(tmp_path / "wan"),
            audio_vae=str(tmp_path / "sound"),
        )  # fmt: skip
        names = ["README.md", "audio_vae", "magihuman.json", "model_index.json", "scheduler"]
        names += ["training.json", "transformer", "vae"]
        assert left_in(there) == names
        text = describe(there)
        assert f"python -m magihuman.zoo convert {there} NEW" in text
        for part in (
            "MagiHumanDiT",
            "AutoencoderKLWan",
            "vae: 144 tensors",
            "block.layers.0.attention.linear_qkv.weight",
        ):
            assert part in text
        with pytest.raises(UserError, match=rf"holds several checkpoints; choose one: .*{there}"):
            describe(tmp_path)
        parts = json.loads((there / "model_index.json").read_text())
        assert parts["vae"] == ["diffusers", "AutoencoderKLWan"]
        assert same(tensors_of(there / "transformer", "diffusion_pytorch_model"), tensors_of(release / "1080p_sr"))
        # diffusers itself reads its two, and the codecs are what they were.
        assert AutoencoderKLWan.from_pretrained(there, subfolder="vae").config.latents_std[0] == 0.4765
        assert AutoencoderOobleck.from_pretrained(there, subfolder="audio_vae").config.decoder_input_channels == 4
        for kind, original in ((WanCodec, "wan"), (OobleckCodec, "sound")):
            a, b = kind.load(there), kind.load(tmp_path / original)  # type: ignore[attr-defined]
            assert same(a.state_dict(), b.state_dict())
        # Codecs in diffusers' layout are taken as they are.
        convert(str(there), str(tmp_path / "twice"), "diffusers", vae=str(there), audio_vae=str(there))
        for part in ("vae", "audio_vae", "transformer"):
            assert same(
                tensors_of(there / part, "diffusion_pytorch_model"),
                tensors_of(tmp_path / "twice" / part, "diffusion_pytorch_model"),
            )
        convert(str(there), str(tmp_path / "back"))
        assert same(tensors_of(tmp_path / "back"), tensors_of(release / "1080p_sr"))
        assert load_config(tmp_path / "back") == zoo.config_of(release / "1080p_sr")

    def test_an_export_of_another_world(self, tmp_path: Path) -> None:
        export = fake_checkpoint(tmp_path / "run" / "export")
        said = convert(str(tmp_path / "run"), str(tmp_path / "there"), "diffusers")
        assert "without vae and audio_vae" in said
        convert(str(tmp_path / "there"), str(tmp_path / "back"))
        assert load_config(tmp_path / "back") == load_config(export)
        assert same(tensors_of(tmp_path / "back"), tensors_of(export))
        with pytest.raises(UserError, match="belongs to the codecs 'tiny'"):
            convert(str(export), str(tmp_path / "x"), "released")

    def test_types(self, release: Path, tmp_path: Path) -> None:
        full, mixed = tensors_of(release / "distill"), tensors_of(release / "base")
        convert(str(release / "distill"), str(tmp_path / "a"), dtype="bf16")
        assert same(tensors_of(tmp_path / "a"), {k: v.bfloat16() if k in MATRICES else v for k, v in full.items()})
        assert {str(v.dtype) for v in mixed.values()} == {"torch.float32", "torch.bfloat16"}
        said = convert(str(release / "base"), str(tmp_path / "b"), dtype="fp32")
        assert "warning" not in said
        assert same(tensors_of(tmp_path / "b"), {k: v.float() for k, v in mixed.items()})

    def test_what_a_port_rounded_is_reported(self, base: Path, tmp_path: Path) -> None:
        for file in weight_files(base):
            save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
        said = convert(str(base), str(tmp_path / "a"))
        count = len(list(dit_config(8).tensors())) - len(MATRICES)
        assert f"warning: {count} tensors that the release keeps in fp32 came rounded" in said
        for name, tensor in tensors_of(tmp_path / "a").items():
            assert tensor.dtype == (torch.bfloat16 if name in MATRICES else torch.float32)

    def test_one_file(self, release: Path, tmp_path: Path) -> None:
        state = tensors_of(release / "distill")
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / "all.ckpt")
        torch.save(state, tmp_path / "older.pth", _use_new_zipfile_serialization=False)
        save_file(state, tmp_path / "all.safetensors")
        for name in ("all.ckpt", "older.pth", "all.safetensors"):
            convert(str(tmp_path / name), str(tmp_path / f"of-{name}" / "x"), role="distill")
            assert same(tensors_of(tmp_path / f"of-{name}" / "x"), state)
            assert zoo.config_of(tmp_path / f"of-{name}" / "x") == zoo.config_of(release / "distill")
        with pytest.raises(UserError, match="does not say which model it holds; add role= one of base"):
            convert(str(tmp_path / "all.ckpt"), str(tmp_path / "x"))
        with pytest.raises(UserError, match="has a config of its own"):
            convert(str(tmp_path / "of-all.ckpt" / "x"), str(tmp_path / "y"), role="base")

    def test_pickle_to_safetensors(self, tmp_path: Path) -> None:
        from magihuman.codecs.turbo_vaed import TurboCodec

        make_turbo(tmp_path / "turbo_vae")
        make_wan(tmp_path / "wan")
        pickled = tmp_path / "turbo_vae" / "checkpoint-340000.ckpt"
        wanted = TurboCodec.load(tmp_path / "turbo_vae").state_dict()
        convert(str(pickled), str(tmp_path / "turbo_vae" / "model.safetensors"))
        pickled.unlink()
        assert same(TurboCodec.load(tmp_path / "turbo_vae").state_dict(), wanted)
        convert(str(tmp_path / "wan" / "Wan2.2_VAE.pth"), str(tmp_path / "wan.safetensors"))
        assert same(load_file(tmp_path / "wan.safetensors"), torch.load(tmp_path / "wan" / "Wan2.2_VAE.pth"))
        with pytest.raises(UserError, match="its tensors stay as they are"):
            convert(str(tmp_path / "wan.safetensors"), str(tmp_path / "y.safetensors"), dtype="bf16")

    def test_compressed_shards(self, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        zstandard = pytest.importorskip("zstandard")
        wanted = tensors_of(base)
        for file in weight_files(base)[1:]:
            packed = zstandard.ZstdCompressor().compress(file.read_bytes())
            Path(f"{file}.zst").write_bytes(packed)
            file.unlink()
        convert(str(base), str(tmp_path / "a"))
        assert same(tensors_of(tmp_path / "a"), wanted)
        last = base / f"{LAST}.zst"
        packed = last.read_bytes()
        for damaged in (packed[: len(packed) // 2], packed[:20], b"nonsense", b""):
            last.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{LAST}\.zst .*fetch it again") as caught:
                convert(str(base), str(tmp_path / "b"))
            assert "\n" not in str(caught.value)
        small = struct.pack("<Q", 64) + b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'.ljust(64)
        for content, why in (
            (small + bytes(30_000_000), "holds more than its header states; fetch it again"),
            (
                small.replace(b"[0,4]}}          ", b"[0,9000000000]}} "),
                "claims 9.0 GB in .* bytes, which weights never are",
            ),
            (struct.pack("<Q", 200_000) + b"[" * 200_000, "is not a safetensors file"),
        ):
            last.write_bytes(zstandard.ZstdCompressor().compress(content))
            with pytest.raises(UserError, match=why), streamed_safetensors.open_tensors(last, tmp_path):
                pass
        last.write_bytes(packed)
        with monkeypatch.context() as full:
            full.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
            with (
                pytest.raises(UserError, match=r"needs 0\.0 GB in .* to be unpacked, which has 0\.0; make room"),
                streamed_safetensors.open_tensors(last, tmp_path),
            ):
                pass
        monkeypatch.setitem(sys.modules, "zstandard", None)
        with pytest.raises(UserError, match="needs a package more: pip install zstandard"):
            convert(str(base), str(tmp_path / "b"))
        assert left_in(tmp_path) == ["a", "src"]
