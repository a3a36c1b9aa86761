"""Turbo VAE: the losses, the teacher over whole clips, what moves and what is exported, and that it learns."""

import json
from pathlib import Path

import pytest
import torch
import training_stub
from safetensors.torch import load_file, save_file
from small_turbo import batch, recipe, rng

from magihuman.codecs.wan import WanCodec
from magihuman.codecs.wan_decoder import WanDecoder, WanDecoderConfig
from magihuman.config import OptimSettings
from magihuman.errors import UserError
from magihuman.training import decoder_training as losses
from magihuman.training.decoder_training import SampledLatents
from magihuman.training.optim import build_optimizer
from magihuman.zoo import decoders

TEACHER = WanDecoderConfig(3, 4, multipliers=(1, 1, 2), double_time=(True, True), blocks=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    latents = decoders.Latents.of(training_stub.CONTRACT)
    folder = tmp_path_factory.mktemp("teacher") / "export"
    network = WanDecoder.build(TEACHER)
    return decoders.save(folder, network.state_dict(), decoders.DecoderConfig("wan", TEACHER.to_dict(), latents))


# Losses


def test_pixel_detail_and_change_have_their_closed_forms() -> None:
    truth = torch.rand(2, 3, 5, 16, 16)
    assert losses.charbonnier(truth, truth) == 0
    assert losses.charbonnier(truth + 0.3, truth).item() == pytest.approx((0.09 + 1e-4) ** 0.5 - 1e-2)
    assert losses.laplacian(truth + 0.3, truth).item() == pytest.approx(0, abs=1e-6)  # no detail in a constant
    assert [band.shape[-1] for band in losses.laplacian_bands(truth)] == [16, 8, 4]
    stripes = torch.zeros(1, 3, 1, 16, 16)
    stripes[..., ::2] = 1.0
    finest = losses.laplacian_bands(stripes)[0]
    assert finest.abs().mean().item() == pytest.approx(0.5)  # one pixel's stripes are all in the finest band
    assert losses.laplacian_bands(stripes)[1].abs().max() == 0
    assert losses.flicker(truth + 0.3, truth).item() == pytest.approx(0, abs=1e-6)
    ramp = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert losses.flicker(truth + ramp, truth).item() == pytest.approx(1)


# The teacher


def test_a_whole_clip_equals_latent_by_latent() -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=4, z_dim=5, dim_mult=[1, 2, 2, 2], num_res_blocks=1, is_residual=True,
        temperal_downsample=[False, True, True], in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16,
    )  # fmt: skip
    mean, std = torch.randn(5), torch.rand(5) + 0.5
    codec = WanCodec(vae, mean, std)
    latents = torch.randn(2, 5, 4, 3, 2)
    raw = vae.post_quant_conv(latents * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1))
    whole = WanDecoder(vae.decoder, 2)
    assert whole.stride == codec.stride
    torch.testing.assert_close(whole.decode(raw), codec.decode(latents), atol=2e-5, rtol=1e-4)
    single = WanDecoder.build(TEACHER).decode(torch.randn(1, 3, 1, 2, 2))
    assert single.shape == (1, 3, 1, 8, 8)


def test_a_teacher_is_saved_with_its_contract_and_opened_again(teacher: Path) -> None:
    opened = decoders.load(teacher)
    assert isinstance(opened, WanDecoder)
    assert (opened.channels, opened.stride) == (3, (4, 4, 4))
    assert opened.decode(torch.zeros(1, 3, 3, 2, 2)).shape == (1, 3, 9, 8, 8)


# The recipe


def test_muon_takes_the_inner_convolutions_as_matrices() -> None:
    made = recipe()
    settings = OptimSettings("muon", lr=0.5, adamw_lr=1e-3, momentum=0.0)
    optimizer = build_optimizer(made.trained, None, settings)
    inner = {id(p) for group in optimizer.param_groups if group["experts"] for p in group["params"]}
    named = dict(made.trained.named_parameters())
    assert {name for name, p in named.items() if id(p) in inner} == {
        "stages.0.blocks.0.conv1.conv.weight", "stages.0.blocks.0.conv2.conv.weight", "stages.0.up.weight",
        "stages.1.blocks.0.conv1.weight", "stages.1.blocks.0.over_time.conv.weight",
        "stages.1.blocks.0.conv2.weight",
    }  # fmt: skip
    weight = named["stages.0.blocks.0.conv1.conv.weight"]  # [8,8,3,3,3]
    before = weight.detach().clone()
    made.loss(batch(), rng(4)).backward()
    optimizer.step()
    spread = torch.linalg.svdvals((before - weight.detach()).flatten(1))
    assert spread.min() > 0.5 * 0.6  # of lr 0.5 times about 1
    assert spread.max() < 0.5 * 1.3


def test_crops_of_latents_and_frames_show_the_same_place() -> None:
    made, given = recipe(crop=2), batch(8)
    latents, frames = made.examples(given, rng(8))
    assert (latents.shape, frames.shape) == ((8, 3, 3, 2, 2), (8, 3, 9, 8, 8))
    shown = latents.repeat_interleave(4, 3).repeat_interleave(4, 4).repeat_interleave(4, 2)[:, :, 3:]
    torch.testing.assert_close(frames, shown / 2, atol=1 / 127, rtol=0)
    assert len({tuple(clip.flatten().tolist()) for clip in latents}) > 2
    again = made.examples(given, rng(8))[0]
    assert torch.equal(latents, again)


def test_a_crop_cuts_the_longer_side_of_a_picture_alone() -> None:
    made = recipe(crop=4)
    wide = torch.arange(6.0).expand(2, 3, 3, 4, 6)
    shown = (wide * 10).repeat_interleave(4, 3).repeat_interleave(4, 4).repeat_interleave(4, 2)[:, :, 3:]
    latents, frames = made.examples({"video": wide, "frames": shown.byte()}, rng(2))
    assert (latents.shape, frames.shape) == ((2, 3, 3, 4, 4), (2, 3, 9, 16, 16))
    assert torch.equal(((frames + 1) * 12.75).round()[..., ::4], latents[:, :, :1, :1].expand(-1, -1, 9, 16, -1))
    square = {"video": torch.zeros(2, 3, 3, 4, 4)}
    assert made.batch_flops({"video": wide}) == made.batch_flops(square) == recipe().batch_flops(square)


def test_sampled_latents_take_their_share_with_their_own_frames(tmp_path: Path) -> None:
    file = tmp_path / "sampled.safetensors"
    marks = torch.arange(5).view(5, 1, 1, 1, 1)
    save_file(
        {
            "video": (100.0 + marks).expand(5, 3, 3, 4, 4).half().contiguous(),
            "frames": (200 + marks).expand(5, 3, 9, 16, 16).byte().contiguous(),
        },
        file,
    )
    assert len(SampledLatents(file, 3)) == 5
    made, given = recipe(sampled=str(file), sampled_share=0.5), batch(8)
    before, count = given["video"].clone(), 0
    for number in range(20):
        latents, frames = made.examples(given, rng(8, number))
        chosen = latents[:, 0, 0, 0, 0] >= 100
        count += int(chosen.sum())
        expected = (latents[chosen][:, 0, 0, 0, 0] + 100) / 127.5 - 1
        torch.testing.assert_close(frames[chosen][:, 0, 0, 0, 0], expected)
        assert torch.equal(latents[~chosen], before[~chosen])
    assert torch.equal(given["video"], before)
    assert 60 <= count <= 100  # of 160
    with pytest.raises(UserError, match="needs 7 channels"):
        SampledLatents(file, 7)
    small = tmp_path / "small.safetensors"  # clips that none of the shards' could be replaced by
    tensors = {"video": torch.zeros(2, 3, 3, 2, 2), "frames": torch.zeros(2, 3, 9, 8, 8).byte()}
    save_file(tensors, small, {"codec": "stub"})
    with pytest.raises(UserError, match=r"holds frames \[3, 9, 8, 8\], the shards mostly \[3, 9, 16, 16\]"):
        recipe(sampled=str(small))
    save_file(tensors, small, {"codec": "another"})
    with pytest.raises(UserError, match="holds latents of 'another', not of 'stub'"):
        recipe(sampled=str(small))
    with pytest.raises(UserError, match=r"python -m inference\.sample_latents"):
        SampledLatents(tmp_path / "none", 3)


def test_shards_without_frames_say_what_makes_them() -> None:
    given = batch()
    del given["frames"]
    with pytest.raises(UserError, match="pixels=true"):
        recipe().loss(given, rng(4))


def test_the_export_holds_the_averaged_student(tmp_path: Path) -> None:
    made = recipe()
    made.loss(batch(), rng(4)).backward()
    assert all(p.grad is not None for p in made.trained.parameters())
    made.export(tmp_path / "export")
    exported = load_file(tmp_path / "export" / decoders.MODEL)
    assert exported.keys() == made.trained.state_dict().keys()
    assert made.network is made.ema.module


def test_it_learns() -> None:
    made, given = recipe(), batch(4)
    optimizer = torch.optim.Adam(made.trained.parameters(), 1e-2)
    before = made.validation_metrics(made.trained, given, rng(4))["val/psnr"]
    for number in range(60):
        optimizer.zero_grad()
        made.loss(given, rng(4, number)).backward()
        optimizer.step()
    after = made.validation_metrics(made.trained, given, rng(4))["val/psnr"]
    assert after > before + 8, (before, after)


def test_it_starts_from_another_decoder_and_names_mistakes(tmp_path: Path) -> None:
    shards = training_stub.write_shards(tmp_path / "shards")
    parent = training_stub.train_here(tmp_path / "a", shards, ["+recipe=turbo_vae", "recipe.crop=2"])
    child = training_stub.train_here(
        tmp_path / "c", shards, ["+recipe=turbo_vae", f"init={parent}", "optim.lr=1e-12", "optim.adamw_lr=1e-12"]
    )
    old, new = (load_file(run / "export" / decoders.MODEL) for run in (parent, child))
    assert all(torch.allclose(old[k], new[k], atol=1e-6) for k in old)
    assert [p["role"] for p in json.loads((child / "run.json").read_text())["parents"]] == ["shards", "init"]
    for overrides, message in {
        ("init=nothing",): "is not a decoder",
        ("strategy=fsdp2",): "runs with strategy=single or ddp",
        ("trainer.compile=true",): "trainer.compile=false",
        ("recipe.align=1",): "unknown setting recipe.align",
        ("recipe.student=b",): "recipe.student='b' should be a mapping",
        ("recipe.student.layout=wan",): "cannot be trained; choose causal or released",
        ("recipe.student.size=3",): r"has \['layout', 'network', 'size'\]; choose decoder=NAME",
        ("recipe.crop=0",): "recipe.crop=0 is at least 1 or null",
        ("recipe.sampled_share=25",): r"recipe.sampled_share=25 lies in \[0, 1\]",
    }.items():
        with pytest.raises(UserError, match=message):
            training_stub.train_here(tmp_path / "d", shards, ["+recipe=turbo_vae", *overrides])
