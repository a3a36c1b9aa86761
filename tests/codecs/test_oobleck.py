"""The Oobleck audio VAE: golden vectors, long sounds, file layouts, and what bad files get."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from magihuman.codecs import oobleck
from magihuman.codecs.oobleck import OobleckCodec, cross_fade, split_windows
from magihuman.errors import UserError

RELEASE = {
    "encoder": {
        "type": "oobleck",
        "config": {
            "in_channels": 2,
            "channels": 128,
            "c_mults": [1, 2, 4, 8, 16],
            "strides": [2, 4, 4, 8, 8],
            "latent_dim": 128,
            "use_snake": True,
        },
    },
    "decoder": {
        "type": "oobleck",
        "config": {
            "out_channels": 2,
            "channels": 128,
            "c_mults": [1, 2, 4, 8, 16],
            "strides": [2, 4, 4, 8, 8],
            "latent_dim": 64,
            "use_snake": True,
            "final_tanh": False,
        },
    },
    "bottleneck": {"type": "vae"},
    "latent_dim": 64,
    "downsampling_ratio": 2048,
    "io_channels": 2,
}


def tiny_config() -> dict:
    """The release's structure with few channels and a hop of 8."""
    config = copy.deepcopy(RELEASE)
    for side, latent in (("encoder", 4), ("decoder", 2)):
        config[side]["config"] |= {"channels": 4, "c_mults": [1, 1], "strides": [2, 4], "latent_dim": latent}
    return config


def released_state(config: dict) -> dict[str, torch.Tensor]:
    """Random weights in stable-audio-tools' names and shapes."""
    from diffusers import AutoencoderOobleck

    torch.manual_seed(0)
    vae = AutoencoderOobleck(**oobleck.released_config(config, "test"))
    state = vae.state_dict()
    flat = {name: state[inner] for name, inner in oobleck.key_map(vae).items()}
    return {name: t.flatten() if name.endswith((".alpha", ".beta")) else t for name, t in flat.items()}


@pytest.fixture
def stable_audio(tmp_path: Path) -> Path:
    """A folder laid out as stabilityai/stable-audio-open-1.0, with tiny widths."""
    config = tiny_config()
    state = {oobleck.PREFIX + name: tensor for name, tensor in released_state(config).items()}
    save_file({**state, "model.model.to_timestep_embed.0.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model_config.json").write_text(
        json.dumps({"model": {"pretransform": {"type": "autoencoder", "config": config}}})
    )
    return tmp_path


def waveform(samples: int, channels: int = 2) -> torch.Tensor:
    return torch.rand(1, channels, samples, generator=torch.Generator().manual_seed(2)) - 0.5


def golden_codec(golden: Path, name: str) -> tuple[OobleckCodec, dict[str, torch.Tensor], dict]:
    tensors = load_file(golden / f"{name}.safetensors")
    meta = json.loads((golden / "manifest.json").read_text())["files"][name]["meta"]
    state = {key.removeprefix("w/"): value for key, value in tensors.items() if key.startswith("w/")}
    return OobleckCodec.from_released(state, meta["config"]["model"], name), tensors, meta


def test_equals_the_released_vae(golden: Path) -> None:
    codec, vector, meta = golden_codec(golden, "oobleck_tiny")
    assert oobleck.key_map(codec.vae) == meta["key_map_to_diffusers"]
    sound, noise = vector["enc/wav"][None], vector["enc/noise"].transpose(1, 2)
    mean, std = codec._moments(sound)
    expected_mean, expected_scale = vector["enc/pre_bottleneck"].chunk(2, dim=1)
    torch.testing.assert_close(mean, expected_mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(std, F.softplus(expected_scale) + 1e-4, atol=1e-4, rtol=0)
    sample = codec.encode(sound, noise=[noise])
    torch.testing.assert_close(sample.transpose(1, 2), vector["enc/latent"], atol=1e-4, rtol=0)
    decoded = codec.decode(vector["dec/latent"].T[None])
    torch.testing.assert_close(decoded, vector["dec/wav"], atol=1e-4, rtol=0)


def test_five_levels_equal_the_released_vae(golden: Path) -> None:
    # These random weights make fp32 rounding visible (outputs near 100): relative to the output instead.
    codec, vector, meta = golden_codec(golden, "oobleck_five")
    assert oobleck.key_map(codec.vae) == meta["key_map_to_diffusers"]
    assert (codec.sample_rate, codec.hop, codec.channels, codec.waveform_channels) == (51200, 2048, 2, 2)
    sample = codec.encode(vector["enc/wav"][None], noise=[vector["enc/noise"].transpose(1, 2)])
    assert relative(sample.transpose(1, 2), vector["enc/latent"]) < 1e-4
    assert relative(codec.decode(vector["dec/latent"].T[None]), vector["dec/wav"]) < 1e-4


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["audio_encode_short", "audio_encode_long"])
def test_given_sound_equals_the_release(golden: Path, name: str) -> None:
    codec, vector, meta = golden_codec(golden, name)
    t = np.arange(meta["samples"]) / 51200
    sound = 0.5 * np.sin(2 * np.pi * 220 * t) + 0.3 * np.sin(2 * np.pi * 50 * t * t)
    mono = torch.from_numpy(sound.astype(np.float32))[: meta["seconds"] * 51200]
    noise = [vector[key].transpose(1, 2) for key in sorted(vector) if key.startswith("noise/")]
    latents = codec.encode(mono[None, None], noise=noise).transpose(1, 2)
    assert latents.shape == vector["out"].shape
    assert relative(latents, vector["out"]) < 5e-4
    assert relative(codec.encode(mono[None, None]).transpose(1, 2), vector["out"]) > 1e-3  # the mean differs


def test_release_has_its_tensors_and_parameters() -> None:
    vae = oobleck._build(oobleck.released_config(RELEASE, "release"))
    assert len(oobleck.key_map(vae)) == 365
    assert sum(tensor.numel() for tensor in vae.state_dict().values()) == 156_112_514


def test_loads_a_stable_audio_folder(stable_audio: Path) -> None:
    codec = OobleckCodec.load(stable_audio)
    assert (codec.hop, codec.sample_rate, codec.channels, codec.waveform_channels) == (8, 200, 2, 2)
    latents = codec.encode(waveform(80))
    assert latents.shape == (1, 10, 2)
    assert codec.decode(latents).shape == (1, 2, 80)
    by_file = OobleckCodec.load(stable_audio / "model.safetensors")
    assert torch.equal(by_file.encode(waveform(80)), latents)


def test_diffusers_folder_equals_original_file(stable_audio: Path, tmp_path: Path) -> None:
    codec = OobleckCodec.load(stable_audio)
    codec.vae.save_pretrained(tmp_path / "release" / "audio_vae")
    assert torch.equal(OobleckCodec.load(tmp_path / "release").encode(waveform(80)), codec.encode(waveform(80)))


def test_bottleneck_mean_sample_and_seed(stable_audio: Path) -> None:
    codec = OobleckCodec.load(stable_audio)
    sound = waveform(800)
    mean = codec.encode(sound)
    assert torch.equal(mean, codec.encode(sound))
    first = codec.encode(sound, torch.Generator().manual_seed(5))
    assert torch.equal(first, codec.encode(sound, torch.Generator().manual_seed(5)))
    # Drawn as [B,Ca,A], the order of the release.
    noise = torch.randn(1, 2, 100, generator=torch.Generator().manual_seed(5)).transpose(1, 2)
    assert torch.equal(first, codec.encode(sound, noise=[noise]))
    _, std = codec._moments(sound)
    torch.testing.assert_close((first - mean) / noise, std.transpose(1, 2), rtol=1e-2, atol=1e-4)
    mono = waveform(800, channels=1)
    assert torch.equal(codec.encode(mono), codec.encode(mono.repeat(1, 2, 1)))


def test_refuses_sounds_it_cannot_encode(stable_audio: Path) -> None:
    codec = OobleckCodec.load(stable_audio)
    for sound in (waveform(80, channels=3), waveform(7)):
        with pytest.raises(ValueError, match="1 or 2 channels and at least 8 samples"):
            codec.encode(sound)
    with pytest.raises(ValueError, match="1 noise tensors for 2 windows"):
        codec.encode(waveform(726 * 8), noise=[torch.zeros(1, 725, 2)])


def test_long_sound_agrees_with_one_piece_away_from_the_seams(stable_audio: Path) -> None:
    codec = OobleckCodec.load(stable_audio)
    sound = waveform(900 * 8 + 3)
    latents = codec.encode(sound)
    whole = codec._moments(sound)[0].transpose(1, 2)
    assert latents.shape == (1, 901, 2)
    # Up to the second window's start nothing is mixed.
    torch.testing.assert_close(latents[:, :360], whole[:, :360], atol=1e-4, rtol=1e-4)


def test_windows_cover_the_sound_and_stop() -> None:
    sound = torch.arange(1.0, 26.0).view(1, 1, 25)
    assert [w.shape[-1] for w in split_windows(sound[..., :10], 10)] == [10]
    assert torch.equal(split_windows(sound[..., :7], 10)[0], sound[..., :7])
    windows = split_windows(sound, 10)
    assert [w[0, 0, 0].item() for w in windows] == [1, 6, 11, 16]
    assert windows[-1][0, 0].tolist() == [16, 17, 18, 19, 20, 21, 22, 23, 24, 25]
    padded = split_windows(sound[..., :12], 10)[1]
    assert padded[0, 0].tolist() == [6, 7, 8, 9, 10, 11, 12, 0, 0, 0]


def test_windows_overlap_by_a_share() -> None:
    windows = split_windows(torch.arange(18.0).view(1, 1, -1), 10, 0.2)
    assert [w.flatten().tolist() for w in windows] == [list(range(10)), list(range(8, 18))]


def test_cross_fade_equals_the_release(golden: Path) -> None:
    vector = load_file(golden / "audio_utils.safetensors")
    for case in range(3):
        merged = cross_fade(list(vector[f"{case}/in"]))
        torch.testing.assert_close(merged, vector[f"{case}/out"], atol=1e-6, rtol=0)


def test_cross_fade_is_linear_between_blocks() -> None:
    blocks = [torch.zeros(1, 8, 1), torch.ones(1, 8, 1)]
    expected = [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert cross_fade(blocks)[0, :, 0].tolist() == expected


def test_names_what_does_not_fit(stable_audio: Path) -> None:
    state = load_file(stable_audio / "model.safetensors")
    del state[oobleck.PREFIX + "encoder.layers.0.bias"]
    state[oobleck.PREFIX + "decoder.layers.3.alpha"] = torch.zeros(9)
    state[oobleck.PREFIX + "stray"] = torch.zeros(1)
    save_file(state, stable_audio / "model.safetensors")
    with pytest.raises(UserError) as error:
        OobleckCodec.load(stable_audio)
    assert "1 missing (encoder.layers.0.bias)" in str(error.value)
    assert "1 unexpected (stray)" in str(error.value)
    assert "decoder.layers.3.alpha is [1, 9, 1], expected [1, 4, 1]" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["bottleneck"].update(type="dac_rvq"), "bottleneck.type is vae"),
        (lambda c: c["decoder"]["config"].update(final_tanh=True), "final_tanh is false"),
        (lambda c: c["encoder"]["config"].update(strides=[4, 2]), "strides agree"),
        (lambda c: c["encoder"]["config"].update(latent_dim=8), "latent_dim equals its channels"),
        (lambda c: c.pop("decoder"), "lacks 'decoder'"),
    ],
)
def test_refuses_other_networks(change: object, message: str) -> None:
    config = tiny_config()
    change(config)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        oobleck.released_config(config, "file")


def test_absence_names_the_command_that_fetches_it(stable_audio: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hf download stabilityai/stable-audio-open-1\.0 model\.safetensors"):
        OobleckCodec.load(tmp_path / "absent")
    (stable_audio / "model_config.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match=r"no model\.pretransform\.config"):
        OobleckCodec.load(stable_audio)
    (stable_audio / "model_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        OobleckCodec.load(stable_audio)
    (stable_audio / "model_config.json").unlink()
    with pytest.raises(UserError, match=r"model_config\.json is missing"):
        OobleckCodec.load(stable_audio)
