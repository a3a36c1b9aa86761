"""Turbo VAE: the losses, the teacher over whole clips, what moves and what is exported, and that it learns."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_stub
from processes import Launcher
from safetensors.torch import load_file, save_file

from magihuman.codecs.wan import WanCodec
from magihuman.codecs.wan_decoder import WanDecoder, WanDecoderConfig
from magihuman.config import OptimSettings, StrategySettings, TrainerSettings
from magihuman.errors import UserError
from magihuman.io.export import Size
from magihuman.models.latent_contract import Contract
from magihuman.training import decoder_losses as losses
from magihuman.training.context import TrainingContext
from magihuman.training.discriminator import Discriminator, Gan, adversarial_losses
from magihuman.training.latent_file import SampledLatents
from magihuman.training.optim import Ramp, build_optimizer
from magihuman.training.rng import BatchRng
from magihuman.zoo import decoders
from recipes.turbo_vae import TurboVAE

TEACHER = WanDecoderConfig(3, 4, multipliers=(1, 1, 2), double_time=(True, True), blocks=1)
STUDENT = {
    "layout": "causal",
    "network": {
        "latent_channels": 3,
        "stages": [
            {"width": 8, "blocks": 1, "kind": "full", "up": [2, 2]},
            {"width": 8, "blocks": 1, "kind": "split"},
        ],
        "patch": [2, 2],
    },
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    latents = decoders.Latents.of(training_stub.CONTRACT)
    folder = tmp_path_factory.mktemp("teacher") / "export"
    network = WanDecoder.build(TEACHER)
    return decoders.save(
        folder, network.state_dict(), decoders.DecoderConfig("wan", TEACHER.to_dict(), latents)
    )


def recipe(contract: Contract = training_stub.CONTRACT, **settings: Any) -> TurboVAE:
    context = TrainingContext(
        model=None, pack=None, codecs="stub", contract=contract, size=Size(9, 16, 16),
        null_text=torch.zeros(1, 5), optim=OptimSettings(lr=1e-2, ema_decay=0.9),
        trainer=TrainerSettings(100, precision="fp32"), strategy=StrategySettings(),
    )  # fmt: skip
    made = TurboVAE(context, **{"student": STUDENT, **settings})
    made.configure_model()
    return made


def batch(count: int = 4) -> dict[str, Any]:
    """Clips whose frames follow from their latents: every pixel shows its latent, over 2."""
    made = training_stub.batch(range(count))
    spread = made["video"].repeat_interleave(4, 3).repeat_interleave(4, 4).repeat_interleave(4, 2)[:, :, 3:]
    made["frames"] = ((spread / 2 + 1) * 127.5).round().clamp(0, 255).byte()
    return made


def rng(count: int, number: int = 0) -> BatchRng:
    return BatchRng(0, number, range(count))


# Losses


def test_pixel_detail_and_change_have_their_closed_forms() -> None:
    truth = torch.rand(2, 3, 5, 16, 16)
    assert losses.charbonnier(truth, truth) == 0
    assert losses.charbonnier(truth + 0.3, truth).item() == pytest.approx((0.09 + 1e-4) ** 0.5 - 1e-2)
    assert losses.laplacian(truth + 0.3, truth).item() == pytest.approx(
        0, abs=1e-6
    )  # no detail in a constant
    assert [band.shape[-1] for band in losses.laplacian_bands(truth)] == [16, 8, 4]
    stripes = torch.zeros(1, 3, 1, 16, 16)
    stripes[..., ::2] = 1.0
    finest = losses.laplacian_bands(stripes)[0]
    assert finest.abs().mean().item() == pytest.approx(0.5)  # one pixel's stripes are all in the finest band
    assert losses.laplacian_bands(stripes)[1].abs().max() == 0
    assert losses.flicker(truth + 0.3, truth).item() == pytest.approx(0, abs=1e-6)
    ramp = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert losses.flicker(truth + ramp, truth).item() == pytest.approx(1)


def test_features_are_compared_in_the_teachers_units_and_reach_its_resolution() -> None:
    teacher = torch.randn(4, 2, 5, 6, 6) * torch.tensor([1.0, 100.0]).view(1, 2, 1, 1, 1)
    off = teacher + teacher.std(dim=(0, 2, 3, 4), keepdim=True)  # each channel by its own deviation
    assert losses.aligned(off, teacher).item() == pytest.approx(1, abs=1e-5)
    head = losses.AlignmentHead(3, 2, time=2, space=2)
    x = torch.randn(1, 3, 4, 3, 3)
    assert head(x).shape == (1, 2, 7, 6, 6)
    # Frame 2t - 1 + k, row 2y + i, column 2x + j of channel c is output (c, 1 - k.., i, j) of the map at (t, y, x).
    flat = head.map(x)
    assert torch.equal(head(x)[0, 1, 2 * 2 - 1 + 1, 2 * 1 + 1, 2 * 2], flat[0, 8 + 4 + 2 + 0, 2, 1, 2])
    assert torch.equal(
        head(x)[0, 0, 0, 0, 0], flat[0, 4, 0, 0, 0]
    )  # of the first latent the last frame is kept


# The teacher


def test_a_whole_clip_equals_latent_by_latent_and_features_are_those_of_the_full_decoder() -> None:
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
    seen: dict[str, list[torch.Tensor]] = {"mid": [], "up": []}
    for name, block in (("mid", vae.decoder.mid_block), ("up", vae.decoder.up_blocks[0])):
        block.register_forward_hook(lambda _m, _i, out, name=name: seen[name].append(out))
    decoded = codec.decode(latents)
    parts = {name: torch.cat(pieces, 2) for name, pieces in seen.items()}
    whole = WanDecoder.from_codec(codec)
    assert whole.stride == codec.stride
    torch.testing.assert_close(whole.decode(latents), decoded, atol=2e-5, rtol=1e-4)
    features = whole.truncated(1).features(latents)
    kept = {id(p) for p in whole.parameters()}
    assert not any(id(p) in kept for p in (*vae.encoder.parameters(), *vae.quant_conv.parameters()))
    assert [f.shape for f in features] == [(2, 8, 4, 3, 2), (2, 8, 7, 6, 4)]
    for mine, theirs in zip(features, parts.values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
    single = WanDecoder.build(TEACHER).decode(torch.randn(1, 3, 1, 2, 2))
    assert single.shape == (1, 3, 1, 8, 8)


def test_a_teacher_is_saved_with_its_contract_and_opened_again(teacher: Path) -> None:
    opened = decoders.load(teacher)
    assert isinstance(opened, WanDecoder)
    assert (opened.channels, opened.stride) == (3, (4, 4, 4))
    assert opened.decode(torch.zeros(1, 3, 3, 2, 2)).shape == (1, 3, 9, 8, 8)
    with pytest.raises(UserError, match="teacher_blocks=4, but this teacher has 3 up blocks"):
        opened.truncated(4)


def test_the_published_vae_teaches_students_of_its_latents(tmp_path: Path) -> None:
    """Its file in the original layout, small; a student with B's stages; frames of the published stride."""
    from diffusers import AutoencoderKLWan

    from magihuman.codecs.wan import key_map

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=4, z_dim=48, dim_mult=[1, 2, 2, 2], num_res_blocks=1, is_residual=True,
        temperal_downsample=[False, True, True], in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16,
    )  # fmt: skip
    state = vae.state_dict()
    file = tmp_path / "Wan2.2_VAE.pth"
    torch.save({name: state[inner].contiguous() for name, inner in key_map(vae).items()}, file)
    network = decoders.arch("b")["network"]
    network["stages"] = [{**stage, "width": 8, "blocks": 1} for stage in network["stages"]]
    contract = replace(
        training_stub.CONTRACT, video_codec="wan2.2", video_channels=48, video_stride=(4, 16, 16)
    )
    made = recipe(
        contract=contract, student={"layout": "causal", "network": network}, teacher=str(file), align=1.0
    )
    assert made.taps == [0, 1]
    given = {
        "video": torch.randn(1, 48, 2, 3, 2),
        "frames": torch.randint(0, 256, (1, 3, 5, 48, 32)).byte(),
    }
    loss = made.loss(given, rng(1))
    loss.backward()
    assert all(p.grad is not None for p in made.heads.parameters())
    with pytest.raises(UserError, match=r"takes 48 channels and upsamples by \[4, 16, 16\], the student 3"):
        recipe(teacher=str(file), align=1.0)


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


def test_only_the_student_and_the_maps_move_and_the_maps_stay_behind(teacher: Path, tmp_path: Path) -> None:
    made = recipe(teacher=str(teacher), align=1.0)
    assert made.taps == [0, 1]  # the middle block's resolution, and that of the first up block
    made.loss(batch(), rng(4)).backward()
    assert all(p.grad is not None for p in [*made.trained.parameters(), *made.heads.parameters()])
    assert all(p.grad is None and not p.requires_grad for p in made._teacher[0].parameters())
    assert not any("teacher" in key for key in made.state_dict())
    optimizer = made.configure_optimizers()["optimizer"]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(
        [*made.trained.parameters(), *made.heads.parameters()]
    )
    made.export(tmp_path / "export")
    exported = load_file(tmp_path / "export" / decoders.MODEL)
    assert exported.keys() == made.trained.state_dict().keys()
    assert made.network is made.ema.module


def test_alignment_fades_out(teacher: Path) -> None:
    made = recipe(teacher=str(teacher), align=Ramp(1.0, 0.0, 0.5, 0.8))
    figures = {}
    for step in (0, 65, 90):
        made.step = step
        made.trained.zero_grad()
        made.heads.zero_grad()
        made.loss(batch(), rng(4)).backward()
        figures[step] = float(sum(p.grad.abs().sum() for p in made.heads.parameters()))
    assert figures[0] > 0
    assert figures[65] == pytest.approx(figures[0] / 2, rel=1e-4)
    assert figures[90] == 0  # zero, but there: every weight takes part in every step


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
    assert torch.equal(
        ((frames + 1) * 12.75).round()[..., ::4], latents[:, :, :1, :1].expand(-1, -1, 9, 16, -1)
    )
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


def test_the_adversarial_stage_begins_late_and_its_gradients_do_not_meet() -> None:
    made = recipe(gan=Gan(start=0.5, weight=0.1, width=8))
    made.loss(batch(), rng(4)).backward()
    assert made.discriminator is not None
    assert all(float(p.grad.abs().sum()) == 0 for p in made.discriminator.parameters())
    made.step = 60
    made.loss(batch(), rng(4)).backward()
    assert sum(float(p.grad.abs().sum()) for p in made.discriminator.parameters()) > 0

    made = recipe(gan=Gan(start=0.5, lr=0.01, width=8))
    chosen = made.configure_optimizers()
    groups = chosen["optimizer"].param_groups
    decoders = {group["lr"] for group in groups[:-1]}
    for _ in range(90):
        chosen["optimizer"].step()
        chosen["lr_scheduler"]["scheduler"].step()
    assert {group["lr"] for group in groups[:-1]} != decoders
    assert groups[-1]["lr"] == 0.01  # however little is left of the decoder's

    judge, last = Discriminator(8), torch.nn.Parameter(torch.ones(()))
    truth = torch.rand(1, 3, 5, 16, 16)
    decoded = truth * last
    others = 0.01 * (decoded - 2).square().mean()
    wanted, judged = adversarial_losses(judge, decoded, truth, others, last)
    assert torch.autograd.grad(judged, last, allow_unused=True, retain_graph=True)[0] is None
    assert all(
        g is None
        for g in torch.autograd.grad(wanted, list(judge.parameters()), allow_unused=True, retain_graph=True)
    )
    pull = torch.autograd.grad(others, last, retain_graph=True)[0].abs()
    push = torch.autograd.grad(wanted, last)[0].abs()
    assert push.item() == pytest.approx(pull.item(), rel=1e-2)  # as strong as the others before the weight


def test_it_learns(teacher: Path) -> None:
    made, given = recipe(teacher=str(teacher), align=0.1), batch(4)
    optimizer = torch.optim.Adam([*made.trained.parameters(), *made.heads.parameters()], 1e-2)
    before = made.validation_metrics(made.trained, given, rng(4))["val/psnr"]
    for number in range(60):
        optimizer.zero_grad()
        made.loss(given, rng(4, number)).backward()
        optimizer.step()
    after = made.validation_metrics(made.trained, given, rng(4))["val/psnr"]
    assert after > before + 8, (before, after)


def test_everything_on_continues_exactly_and_starts_from_another_ones_weights(
    teacher: Path, tmp_path: Path
) -> None:
    shards = training_stub.write_shards(tmp_path / "shards")
    common = [
        "+recipe=turbo_vae", f"recipe.teacher={teacher}", "recipe.align={start: 1.0, end: 0.0}",
        "recipe.gan={start: 0.3, width: 8}", "recipe.crop=2",
    ]  # fmt: skip
    through = training_stub.train_here(tmp_path / "a", shards, common)
    halves = training_stub.train_here(tmp_path / "b", shards, [*common, "trainer.max_time=00:00:00"])
    assert json.loads((halves / "run.json").read_text())["steps"] == 1
    training_stub.train_here(halves, shards, common)
    states = [
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in (through, halves)
    ]
    assert states[0].keys() == states[1].keys()
    assert {key.partition(".")[0] for key in states[0]} == {"decoder", "ema", "heads", "discriminator"}
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    child = training_stub.train_here(
        tmp_path / "c",
        shards,
        ["+recipe=turbo_vae", f"init={through}", "optim.lr=1e-12", "optim.adamw_lr=1e-12"],
    )
    old, new = (load_file(run / "export" / decoders.MODEL) for run in (through, child))
    assert all(torch.allclose(old[k], new[k], atol=1e-6) for k in old)
    assert [p["role"] for p in json.loads((child / "run.json").read_text())["parents"]] == ["shards", "init"]
    for overrides, message in {
        ("init=nothing",): "is no decoder",
        ("strategy=fsdp2",): "runs with strategy=single or ddp",
        ("trainer.compile=true",): "trainer.compile=false",
        ("recipe.align=1",): "recipe.align needs recipe.teacher",
        ("recipe.teacher=tiny/techer",): r"no decoder of ours \(tiny/teacher, tiny/turbo\)",
        ("recipe.gan={start: 1.0}",): "start=1.0 and width=32; start lies in",
        ("recipe.student=b",): "48 channels",
        ("recipe.student.layout=wan",): "is no student's; choose causal or released",
        ("recipe.crop=0",): "recipe.crop=0 is at least 1 or null",
        ("recipe.sampled_share=25",): r"recipe.sampled_share=25 lies in \[0, 1\]",
        ("recipe.lpips=1",): "needs recipe.lpips_backbone",
        ("recipe.lpips=1", "recipe.lpips_backbone=/nowhere"): "is not a file",
        (f"recipe.teacher={through}", "recipe.align=1"): "no decoder of layout wan",
    }.items():
        with pytest.raises(UserError, match=message):
            training_stub.train_here(tmp_path / "d", shards, ["+recipe=turbo_vae", *overrides])


def test_shards_without_frames_say_what_makes_them() -> None:
    given = batch()
    del given["frames"]
    with pytest.raises(UserError, match="pixels=true"):
        recipe().loss(given, rng(4))


def test_two_processes_train_as_one(teacher: Path, tmp_path: Path) -> None:
    """The gradients of one process, and no weight without its gradient in any stage."""
    shards = training_stub.write_shards(tmp_path / "shards")
    # The second step brings what is each process's own: units of features, balance of the adversary.
    common = [
        "+recipe=turbo_vae", "optim=adamw", "optim.warmup=1", "trainer.max_steps=2", "trainer.precision=fp32",
        "data.module.batch_size=4", "callbacks.validation=null", "checkpoint.every_steps=1", "recipe.crop=2",
        f"recipe.teacher={teacher}", "recipe.align={start: 0.0, end: 1.0, finish: 0.5}",
        "recipe.gan={start: 0.5, width: 8}",
    ]  # fmt: skip
    training_stub.train_here(tmp_path / "one", shards, common)
    world = Launcher(shards, [*common, "trainer.devices=%d", "strategy=%s"])
    assert world.run(tmp_path / "two", "ddp", 2) == [0, 0]
    first, last = (
        [torch.load(tmp_path / run / "checkpoints" / name, weights_only=True) for run in ("one", "two")]
        for name in ("step-00000001.ckpt", "last.ckpt")
    )
    one, two = (list(saved["optimizer_states"][0]["state"].values()) for saved in first)
    for mine, shared in zip(one, two, strict=True):
        torch.testing.assert_close(shared["exp_avg"], mine["exp_avg"], rtol=1e-3, atol=1e-6)
    still = first[1]["state_dict"]
    moved = {
        key.partition(".")[0] for key, value in last[1]["state_dict"].items() if (value != still[key]).all()
    }
    assert {"decoder", "heads", "discriminator"} <= moved
