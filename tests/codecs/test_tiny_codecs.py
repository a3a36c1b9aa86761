"""Puppets' codecs, text features and contract."""

import hashlib

import numpy as np
import pytest
import torch

from data.tiny.puppets import draw_puppet, render, synthesise
from magihuman.codecs.bundle import CodecBundle, load_bundle
from magihuman.codecs.text_encoders import ByteTextEncoder
from magihuman.codecs.tiny import TinyAudioCodec, TinyVideoCodec
from magihuman.errors import UserError


@pytest.fixture(scope="module")
def world() -> CodecBundle:
    return load_bundle("tiny")


def _clip(size: int, index: int = 3) -> torch.Tensor:
    frames = torch.from_numpy(render(draw_puppet(50, index), size))
    return frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def test_blocks_and_frames_are_inverse() -> None:
    codec, frames = TinyVideoCodec(4), _clip(64)
    blocks = codec.blocks(frames)
    assert blocks.shape == (7, 192, 16, 16)
    assert torch.equal(codec.frames(blocks, 1), frames)
    # Latent frame 0 holds the first frame alone: its four copies are equal.
    first = blocks[0].unflatten(0, (12, 16)).unflatten(0, (4, 3))
    assert torch.equal(first[0], first[3])


def test_video_codec_keeps_puppets(world: CodecBundle) -> None:
    for size, least in ((64, 29.0), (128, 30.5)):
        frames = torch.cat([_clip(size, i) for i in range(4)])
        latents = world.video_codec.encode(frames)
        assert latents.shape == (4, world.video_codec.channels, 7, size // 4, size // 4)
        error = (world.video_codec.decode(latents).clamp(-1, 1) - frames).square().mean()
        assert 10 * torch.log10(4 / error) > least


def test_video_latents_are_normalised_and_batches_do_not_mix(world: CodecBundle) -> None:
    frames = torch.cat([_clip(64, i) for i in range(16)])
    latents = world.video_codec.encode(frames)
    assert 0.5 < latents.std() < 1.5
    assert latents.mean().abs() < 0.25
    alone = world.video_codec.encode(frames[5:6])
    torch.testing.assert_close(latents[5:6], alone, atol=1e-5, rtol=1e-5)


def test_still_image_is_one_latent_frame(world: CodecBundle) -> None:
    still = _clip(64)[:, :, :1]
    latents = world.video_codec.encode(still)
    assert latents.shape[2] == 1
    torch.testing.assert_close(latents[:, :, 0], world.video_codec.encode(_clip(64))[:, :, 0], atol=1e-5, rtol=1e-5)
    assert world.video_codec.decode(latents).shape == still.shape


def test_video_codec_names_bad_geometry() -> None:
    with pytest.raises(ValueError, match="4k\\+1 frames"):
        TinyVideoCodec(4).encode(torch.zeros(1, 3, 24, 64, 64))


def test_spectrum_and_waveform_are_inverse() -> None:
    codec = TinyAudioCodec()
    wave = torch.from_numpy(synthesise(draw_puppet(50, 1)))[None]
    # Half a window at each end is covered by fewer columns; it is silent in these clips.
    torch.testing.assert_close(codec._waveform(codec._spectrum(wave)), wave, atol=1e-3, rtol=0)


def test_audio_codec_keeps_the_spectrum(world: CodecBundle) -> None:
    waves = torch.from_numpy(np.stack([synthesise(draw_puppet(50, i)) for i in range(6)]))[:, None]
    latents = world.audio_codec.encode(waves)
    assert latents.shape == (6, 25, world.audio_codec.channels)
    codec = TinyAudioCodec()
    before = codec._spectrum(waves[:, 0]).abs()
    after = codec._spectrum(world.audio_codec.decode(latents)[:, 0]).abs()
    signal_to_error = 20 * torch.log10(before.norm() / (before - after).norm())
    assert signal_to_error > 10.5


def test_audio_latent_k_belongs_to_video_frame_k(world: CodecBundle) -> None:
    wave = torch.zeros(1, 1, 16000)
    wave[..., 640 * 9 : 640 * 10] = torch.sin(torch.arange(640) * 0.3) * 0.4
    change = (world.audio_codec.encode(wave) - world.audio_codec.encode(torch.zeros_like(wave))).square().sum(-1)[0]
    assert change.argmax() == 9


def test_decoding_is_deterministic(world: CodecBundle) -> None:
    latents = torch.randn(1, 25, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(world.audio_codec.decode(latents), world.audio_codec.decode(latents))


def test_text_features_are_fixed_for_ever() -> None:
    features = ByteTextEncoder().encode(["round face, ginger hair, says ma bi so"])[0]
    assert features.shape == (8, 128)
    digest = hashlib.sha256(features[:, :96].numpy().round(4).tobytes()).hexdigest()
    assert digest[:16] == "ce3c452b333d314a"
    assert 0.8 < features.std() < 1.2


def test_text_features_tell_words_places_and_neighbours_apart() -> None:
    encode = ByteTextEncoder().encode
    one, other = encode(["says ma bi", "says bi ma"])
    assert not torch.allclose(one[1], other[1])  # another word
    assert torch.equal(one[1, :64], other[2, :64])  # the same word elsewhere
    assert not torch.allclose(one[1, 96:], other[2, 96:])  # at another place
    assert torch.equal(encode([""])[0], torch.zeros(1, 128))
    assert len(encode(["a " * 1000])[0]) == 640


def test_world_contract_names_the_fitted_codec(world: CodecBundle) -> None:
    contract = world.contract
    assert contract.video_channels == world.video_codec.channels
    assert contract.to_dict() == type(contract).from_dict(contract.to_dict()).to_dict()
    other = type(contract).from_dict({**contract.to_dict(), "video_codec": "tiny-00000000"})
    with pytest.raises(UserError, match=r"video_codec: .* against 'tiny-00000000'"):
        contract.require(other, "checkpoint", "shards")


def test_unknown_world_lists_the_choices() -> None:
    with pytest.raises(UserError, match="tiny, scene, released"):
        load_bundle("big")


def test_released_world_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MAGIHUMAN_WAN_VAE", "MAGIHUMAN_STABLE_AUDIO", "MAGIHUMAN_T5GEMMA"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=r"MAGIHUMAN_WAN_VAE.*MAGIHUMAN_STABLE_AUDIO.*MAGIHUMAN_T5GEMMA"):
        load_bundle("released")


def test_the_worlds_pattern_is_that_of_its_captions() -> None:
    import re

    from data.tiny.puppets import draw_puppet
    from magihuman.codecs.tiny_captions import FORMS

    captions = [draw_puppet(5, index).caption for index in range(300)]
    assert all(re.fullmatch(FORMS["tiny"].pattern, caption) for caption in [*captions, FORMS["tiny"].example])
    for other in ("a cat on a sofa", captions[0] + "x", captions[0].replace("face", "head")):
        assert not re.fullmatch(FORMS["tiny"].pattern, other)
