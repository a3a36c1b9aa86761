"""Decoders by name and folder: architectures, exports, the latent contract, and what is said of bad ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from magihuman.codecs.bundle import load_bundle
from magihuman.codecs.causal_decoder import CausalDecoder, CausalDecoderCodec
from magihuman.codecs.causal_decoder_config import CausalDecoderConfig, DecoderStage
from magihuman.codecs.turbo_vaed import TurboCodec
from magihuman.errors import UserError
from magihuman.zoo import decoders, names
from magihuman.zoo.decoders import DecoderConfig, Latents

LATENTS = Latents("tiny-0123", 4, (4, 4, 4))
SMALL = CausalDecoderConfig(4, (DecoderStage(8, 1, "full", (2, 2)), DecoderStage(4, 1, "split")), (2, 2))
CONFIG = DecoderConfig("causal", SMALL.to_dict(), LATENTS, {"seed": 0})


def _export(folder: Path, config: DecoderConfig = CONFIG) -> Path:
    return decoders.save(folder, decoders.build(config, seed=3).state_dict(), config)


def test_every_architecture_fits_its_world() -> None:
    assert names.arch_names("decoder") == ["a", "b", "released", "tiny"]
    tiny = Latents.of(load_bundle("tiny").contract)
    described = {name: decoders.arch(name) for name in ("tiny", "b")}
    assert DecoderConfig("causal", described["tiny"]["network"], tiny).latents.channels == 12
    with pytest.raises(UserError, match=r"upsamples by \[4, 16, 16\], but its latents are of 'tiny-"):
        DecoderConfig("causal", described["b"]["network"], tiny)
    with pytest.raises(UserError, match="'big' is unknown; choose from a, b, released, tiny"):
        decoders.arch("big")


def test_build_draws_from_its_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = (decoders.build(CONFIG, seed=s).state_dict() for s in (1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(one["conv_out.weight"], two["conv_out.weight"])
    again = decoders.build(CONFIG, seed=1).state_dict()
    assert all(torch.equal(one[key], again[key]) for key in one)


def test_an_export_decodes_as_the_network_it_came_from(tmp_path: Path) -> None:
    folder = _export(tmp_path / "run" / "export")
    network = decoders.build(CONFIG, seed=3).eval()
    z = torch.randn(2, 4, 3, 5, 5)
    for source in (folder, tmp_path / "run"):  # a run folder holds its export
        codec = decoders.load(source)
        assert isinstance(codec, CausalDecoderCodec)
        with torch.no_grad():
            assert torch.equal(codec.decode(z), network(z))
    assert decoders.config_of(tmp_path / "run") == CONFIG
    assert not any(p.requires_grad for p in codec.parameters())
    assert next(decoders.load(folder, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("codec", ["wan2.2", "another"])
def test_the_released_layout_is_exported_with_the_statistics_of_its_codec(tmp_path: Path, codec: str) -> None:
    network = {
        **decoders.arch("released")["network"],
        "decoder_block_out_channels": [4, 4, 8, 8],
        "decoder_layers_per_block": [1] * 5,
    }
    config = DecoderConfig("released", network, Latents(codec, 48, (4, 16, 16)))
    student = decoders.build(config, seed=0)
    assert isinstance(student, TurboCodec)
    assert bool((student.mean != 0).any()) == (codec == "wan2.2")
    loaded = decoders.load(decoders.save(tmp_path / "d", student.state_dict(), config))
    assert isinstance(loaded, TurboCodec)
    z = torch.randn(1, 48, 3, 2, 2)
    with torch.no_grad():
        # One window holds the whole clip, its last latent repeated up to seven.
        whole = student(z[:, :, [0, 1, 2, 2, 2, 2, 2]])[:, :, :9]
        torch.testing.assert_close(loaded.decode(z), whole, rtol=0, atol=1e-5)


def test_a_state_that_does_not_fit_is_not_exported(tmp_path: Path) -> None:
    state = decoders.build(CONFIG).state_dict()
    del state["conv_out.bias"]
    with pytest.raises(UserError, match=r"1 missing \(conv_out.bias\)"):
        decoders.save(tmp_path / "d", state, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_export_is_named(tmp_path: Path) -> None:
    folder = _export(tmp_path / "d")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "extra": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"unexpected \(extra\)"):
        decoders.load(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "format": "magihuman-decoder/9"}))
    with pytest.raises(UserError, match=r"config.json: format is 'magihuman-decoder/9'"):
        decoders.load(folder)
    del values["latents"]["codec"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"Latents.* missing .*'codec'"):
        decoders.load(folder)


def test_a_decoder_of_other_latents_is_refused() -> None:
    LATENTS.require(Latents("tiny-0123", 4, (4, 4, 4)), "turbo=x", "the world")
    with pytest.raises(UserError, match=r"turbo=x takes latents of 'tiny-0123' .* the world has those of 'tiny-9'"):
        LATENTS.require(Latents("tiny-9", 4, (4, 4, 4)), "turbo=x", "the world")
    with pytest.raises(UserError, match="layout 'acausal' is unknown"):
        DecoderConfig("acausal", {}, LATENTS)


def test_what_is_no_decoder_is_taken_for_the_published_one(tmp_path: Path) -> None:
    assert decoders.find(tmp_path) is None
    with pytest.raises(UserError, match=r"turbo_vae/checkpoint-340000\.ckpt.*decoders that ship with the package"):
        decoders.load(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="a run folder whose training has exported nothing yet"):
        decoders.load(tmp_path)
    for name, told in (
        ("tiny/turb", r"\(scene/teacher, scene/turbo, tiny/teacher, tiny/turbo; did you mean 'tiny/turbo'\?\)$"),
        ("tiny/nosuch", r"\(scene/teacher, scene/turbo, tiny/teacher, tiny/turbo\)$"),
        ("b", "'b' is the architecture of a decoder, which has no weights"),
        ("tiny/base", "'tiny/base' is a checkpoint, for checkpoint="),
    ):
        with pytest.raises(UserError, match=told) as caught:
            decoders.load(name)
        assert "hf download" not in str(caught.value)


def test_worlds_of_latents_and_their_teachers() -> None:
    codecs = ("tiny-0123", "scene-9a", "another-1", "wan2.2")
    assert [Latents(codec, 4, (4, 4, 4)).world for codec in codecs] == ["tiny", "scene", None, None]
    assert decoders.teacher_of("scene") == "scene/teacher"
    with pytest.raises(
        UserError, match="no teacher decoder ships for the codecs 'released', only for tiny, scene; give"
    ):
        decoders.teacher_of("released")


def test_a_network_is_a_student_of_ours() -> None:
    assert isinstance(decoders.build(CONFIG, "meta"), CausalDecoder)
