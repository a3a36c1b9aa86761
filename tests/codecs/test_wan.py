"""The Wan 2.2 VAE: golden vectors, file layouts, and what bad files get."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from magihuman.codecs import wan
from magihuman.codecs.wan import WanCodec
from magihuman.errors import UserError

RELEASE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
TINY = {**RELEASE, "base_dim": 8, "decoder_base_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}


@pytest.fixture(scope="module")
def released_state() -> dict[str, torch.Tensor]:
    """A tiny VAE in the layout of Wan2.2_VAE.pth."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(**TINY)
    state = vae.state_dict()
    return {name: state[inner].contiguous() for name, inner in wan.key_map(vae).items()}


@pytest.fixture
def checkpoint(tmp_path: Path, released_state: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "Wan2.2_VAE.pth"
    torch.save(released_state, path)
    return path


def frames(count: int = 5, size: int = 32) -> torch.Tensor:
    return torch.rand(1, 3, count, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def golden_vae(golden: Path) -> tuple[WanCodec, dict[str, torch.Tensor], dict]:
    tensors = load_file(golden / "wan22_vae_tiny.safetensors")
    meta = json.loads((golden / "manifest.json").read_text())["files"]["wan22_vae_tiny"]["meta"]
    state = {key.removeprefix("w/"): value for key, value in tensors.items() if key.startswith("w/")}
    return WanCodec.from_released(state, "vector", tensors["mean"], tensors["std"]), tensors, meta


@pytest.mark.parametrize("length", [1, 5, 9])
def test_equals_the_released_vae(golden_vae: tuple, length: int) -> None:
    codec, vector, _ = golden_vae
    latents, decoded = vector[f"len{length}/latent"], vector[f"len{length}/decoded"]
    torch.testing.assert_close(codec.encode(vector[f"len{length}/video"]), latents, atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.decode(latents), decoded, atol=1e-4, rtol=0)
    assert decoded.abs().max() > 1  # so this also shows that nothing is clamped


def test_key_map_equals_the_published_one(golden_vae: tuple) -> None:
    codec, _, meta = golden_vae
    assert wan.key_map(codec.vae) == meta["key_map_to_diffusers"]


def test_statistics_are_the_published_ones(golden: Path) -> None:
    published = load_file(golden / "wan22_latent_stats.safetensors")
    assert list(wan.LATENT_MEAN) == published["mean"].tolist()
    assert list(wan.LATENT_STD) == published["std"].tolist()


def test_release_has_its_tensors_and_parameters() -> None:
    vae = wan._build(RELEASE)
    shapes = vae.state_dict()
    names = wan.key_map(vae)
    assert len(names) == 196
    assert sum(tensor.numel() for tensor in shapes.values()) == 704_688_668
    assert sum(t.numel() for key, t in shapes.items() if key.startswith("encoder.")) == 149_627_776
    state = {name: shapes[inner] for name, inner in names.items()}
    assert wan.released_config(state, "file") == RELEASE


def test_loads_the_original_file(checkpoint: Path) -> None:
    codec = WanCodec.load(checkpoint, dtype=torch.float32)
    assert (codec.channels, codec.stride) == (48, (4, 16, 16))
    latents = codec.encode(frames())
    assert latents.shape == (1, 48, 2, 2, 2)
    assert latents.dtype == torch.float32
    moments = codec.vae.encode(frames()).latent_dist.mode()
    mean = torch.tensor(wan.LATENT_MEAN).view(1, -1, 1, 1, 1)
    std = torch.tensor(wan.LATENT_STD).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(latents * std + mean, moments, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(WanCodec.load(checkpoint.parent, dtype=torch.float32).encode(frames()), latents)


def test_reads_the_older_pickle_format_and_safetensors(
    tmp_path: Path, released_state: dict[str, torch.Tensor], checkpoint: Path
) -> None:
    older, tensors = tmp_path / "older.pth", tmp_path / "Wan.safetensors"
    torch.save(released_state, older, _use_new_zipfile_serialization=False)
    save_file(released_state, tensors)
    wanted = WanCodec.load(checkpoint).encode(frames())
    for path in (older, tensors):
        assert torch.equal(WanCodec.load(path).encode(frames()), wanted)


def test_diffusers_folder_equals_original_file(tmp_path: Path, checkpoint: Path) -> None:
    codec = WanCodec.load(checkpoint, dtype=torch.float32)
    codec.vae.register_to_config(latents_mean=list(wan.LATENT_MEAN), latents_std=list(wan.LATENT_STD))
    codec.vae.save_pretrained(tmp_path / "other" / "vae")
    again = WanCodec.load(tmp_path / "other", dtype=torch.float32)
    assert torch.equal(again.encode(frames()), codec.encode(frames()))


def test_stream_is_the_clip_in_pieces(checkpoint: Path) -> None:
    codec = WanCodec.load(checkpoint, dtype=torch.float32)
    latents = torch.randn(2, 48, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    pieces = list(codec.decode_stream(latents))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4]
    assert torch.equal(torch.cat(pieces, 2), codec.decode(latents))
    # Causal: a prefix decodes to a prefix, and two streams at a time do not disturb each other.
    torch.testing.assert_close(codec.decode(latents[:, :, :2]), torch.cat(pieces[:2], 2), atol=1e-5, rtol=1e-5)
    both = [torch.cat(pair) for pair in zip(*(codec.decode_stream(z[None]) for z in latents), strict=True)]
    torch.testing.assert_close(torch.cat(both, 2), codec.decode(latents), atol=1e-5, rtol=1e-5)


def test_bf16_rounds_the_statistics_too(checkpoint: Path) -> None:
    exact, rounded = WanCodec.load(checkpoint, dtype=torch.float32), WanCodec.load(checkpoint)
    assert rounded.mean.dtype == rounded.std.dtype == torch.bfloat16
    latents = rounded.encode(frames())
    moments = rounded.vae.encode(frames().bfloat16()).latent_dist.mode()
    assert torch.equal(latents, ((moments - rounded.mean) * (1.0 / rounded.std)).float())
    difference = (latents - exact.encode(frames())).norm() / latents.norm()
    assert 1e-4 < difference < 5e-2


@pytest.mark.parametrize("shape", [(1, 3, 4, 32, 32), (1, 3, 5, 24, 32), (1, 3, 5, 32, 40)])
def test_refuses_sizes_that_would_be_cut(checkpoint: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        WanCodec.load(checkpoint).encode(torch.zeros(shape))


def test_names_what_does_not_fit(tmp_path: Path, released_state: dict[str, torch.Tensor]) -> None:
    state = dict(released_state)
    state["decoder.middle.1.proj.bias"] = torch.zeros(3)
    del state["encoder.head.0.gamma"]
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(UserError) as error:
        WanCodec.load(tmp_path / "bad.pth")
    message = str(error.value)
    assert "1 missing (encoder.head.0.gamma)" in message
    assert "1 unexpected (extra.weight)" in message
    assert "decoder.middle.1.proj.bias is [3], expected [8]" in message
    assert "\n" not in message


def test_names_the_first_tensor_of_another_network(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"not a Wan 2\.2 VAE: it lacks encoder\.conv1\.weight"):
        WanCodec.load(tmp_path / "other.pth")


class Trap:
    def __reduce__(self) -> tuple:
        return (Path("trap_was_sprung").write_text, ("code ran",))


def test_pickled_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    for name in ("trap.pth", "plain.pth"):
        with pytest.raises(UserError, match="nothing in it was executed"):
            WanCodec.load(tmp_path / name)
    assert not (tmp_path / "trap_was_sprung").exists()


def test_truncated_and_foreign_files_are_one_line_errors(checkpoint: Path, tmp_path: Path) -> None:
    content = checkpoint.read_bytes()
    save_file({"x": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    cases = {
        "cut.pth": content[: len(content) // 2],
        "empty.pth": b"",
        "text.pth": b"not a checkpoint at all",
        "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes()[:200],
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="damaged") as error:
            WanCodec.load(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="not a plain dictionary of tensors"):
        WanCodec.load(tmp_path / "list.pth")


@pytest.mark.parametrize("source", ["nowhere/at/all.pth", "Wan-AI/Wan2.2-TI2V-5B"])
def test_absence_names_the_command_that_fetches_it(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"hf download Wan-AI/Wan2\.2-TI2V-5B Wan2\.2_VAE\.pth"):
        WanCodec.load(source)
    with pytest.raises(UserError, match="holds none of Wan2"):
        WanCodec.load(tmp_path)


def test_finds_the_file_in_the_hub_cache(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--Wan-AI--Wan2.2-TI2V-5B"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc" / "Wan2.2_VAE.pth").write_bytes(checkpoint.read_bytes())
    wanted = WanCodec.load(checkpoint).encode(frames())
    assert torch.equal(WanCodec.load("Wan-AI/Wan2.2-TI2V-5B").encode(frames()), wanted)
