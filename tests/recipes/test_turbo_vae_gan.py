"""Turbo VAE with LPIPS and a discriminator: the losses, when they act, and an exact continuation."""

import json
from pathlib import Path

import pytest
import torch
import training_stub
from processes import Launcher
from small_turbo import batch, recipe, rng

from magihuman.errors import UserError
from recipes.turbo_vae_gan import LPIPS, ROWS, Gan, PatchDiscriminator, TurboVAEGAN, adversarial_losses


class Vgg16(torch.nn.Module):
    """The backbone as torchvision numbers its layers, with LPIPS' five taps."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        layers, width = torch.nn.ModuleDict(), 3
        for channels in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if channels:
                layers[str(len(layers))] = torch.nn.Conv2d(width, channels, 3, padding=1)
                layers[str(len(layers))] = torch.nn.ReLU()
                width = channels
            else:
                layers[str(len(layers))] = torch.nn.MaxPool2d(2, 2)
        self.features = layers
        self.load_state_dict(state)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        taps = []
        for name, layer in self.features.items():
            x = layer(x)
            if name in ("3", "8", "15", "22", "29"):
                taps.append(x)
        return taps


def test_lpips_needs_nothing_but_the_backbones_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.functional.image import lpips as theirs

    torch.manual_seed(0)
    state, width = {}, 3
    for number, channels in (layer for row in ROWS for layer in row):
        state[f"features.{number}.weight"] = torch.randn(channels, width, 3, 3) * (2 / (9 * width)) ** 0.5
        state[f"features.{number}.bias"] = torch.zeros(channels)
        width = channels
    file = tmp_path / "vgg16.pth"
    torch.save(state, file)
    distance = LPIPS(str(file))
    assert not any(p.requires_grad for p in distance.parameters())
    clip = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    assert distance(clip, clip) == 0
    other = (clip + 0.3 * torch.randn_like(clip)).requires_grad_()
    near = distance(clip + 0.03 * torch.randn_like(clip), clip)
    far = distance(other, clip)
    assert 0 < near < far
    far.backward()
    assert float(other.grad.abs().sum()) > 0
    # torchmetrics' own, on a backbone that needs no torchvision; images are averaged.
    monkeypatch.setattr(theirs, "Vgg16", lambda **_: Vgg16(state))
    two = torch.rand(2, 3, 2, 32, 32) * 2 - 1
    wanted = theirs._LPIPS(net="vgg")(*(x.transpose(1, 2).flatten(0, 1) for x in (two, two.roll(1, 0)))).mean()
    torch.testing.assert_close(distance(two, two.roll(1, 0)), wanted, rtol=1e-3, atol=0)
    del state["features.28.bias"]
    torch.save(state, file)
    with pytest.raises(UserError, match=r"does not hold torchvision's VGG-16 \(features.28\)"):
        LPIPS(str(file))


def test_the_adversarial_stage_begins_late_and_its_gradients_do_not_meet() -> None:
    made = recipe(kind=TurboVAEGAN, gan=Gan(start=0.5, weight=0.1, width=8))
    made.loss(batch(), rng(4)).backward()
    assert isinstance(made, TurboVAEGAN)
    assert made.discriminator is not None
    assert all(float(p.grad.abs().sum()) == 0 for p in made.discriminator.parameters())
    made.step = 60
    made.loss(batch(), rng(4)).backward()
    assert sum(float(p.grad.abs().sum()) for p in made.discriminator.parameters()) > 0

    made = recipe(kind=TurboVAEGAN, gan=Gan(start=0.5, lr=0.01, width=8))
    chosen = made.configure_optimizers()
    groups = chosen["optimizer"].param_groups
    decoders = {group["lr"] for group in groups[:-1]}
    for _ in range(90):
        chosen["optimizer"].step()
        chosen["lr_scheduler"]["scheduler"].step()
    assert {group["lr"] for group in groups[:-1]} != decoders
    assert groups[-1]["lr"] == 0.01  # however little is left of the decoder's

    discriminator, last = PatchDiscriminator(8), torch.nn.Parameter(torch.ones(()))
    truth = torch.rand(1, 3, 5, 16, 16)
    decoded = truth * last
    others = 0.01 * (decoded - 2).square().mean()
    generator, own = adversarial_losses(discriminator, decoded, truth, others, last)
    assert torch.autograd.grad(own, last, allow_unused=True, retain_graph=True)[0] is None
    assert all(
        g is None
        for g in torch.autograd.grad(generator, list(discriminator.parameters()), allow_unused=True, retain_graph=True)
    )
    pull = torch.autograd.grad(others, last, retain_graph=True)[0].abs()
    push = torch.autograd.grad(generator, last)[0].abs()
    assert push.item() == pytest.approx(pull.item(), rel=1e-2)  # as strong as the others before the weight


def test_it_continues_exactly_and_names_mistakes(tmp_path: Path) -> None:
    shards = training_stub.write_shards(tmp_path / "shards")
    common = ["+recipe=turbo_vae_gan", "recipe.gan={start: 0.3, width: 8}", "recipe.crop=2"]
    through = training_stub.train_here(tmp_path / "a", shards, common)
    halves = training_stub.train_here(tmp_path / "b", shards, [*common, "trainer.max_time=00:00:00"])
    assert json.loads((halves / "run.json").read_text())["steps"] == 1
    training_stub.train_here(halves, shards, common)
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (through, halves)]
    assert states[0].keys() == states[1].keys()
    assert {key.partition(".")[0] for key in states[0]} == {"decoder", "ema", "discriminator"}
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    for overrides, message in {
        ("recipe.gan={start: 1.0}",): "start=1.0 and width=32; start lies in",
        ("recipe.lpips=1",): "needs recipe.lpips_backbone",
        ("recipe.lpips=1", "recipe.lpips_backbone=/nowhere"): "is not a file",
    }.items():
        with pytest.raises(UserError, match=message):
            training_stub.train_here(tmp_path / "d", shards, ["+recipe=turbo_vae_gan", *overrides])


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The gradients of one process, and no weight without its gradient in any stage."""
    shards = training_stub.write_shards(tmp_path / "shards")
    # The second step adds what each process computes by itself: the balance of the adversarial loss.
    common = [
        "+recipe=turbo_vae_gan", "optim=adamw", "optim.warmup=1", "trainer.max_steps=2", "trainer.precision=fp32",
        "data.module.batch_size=4", "callbacks.validation=null", "checkpoint.every_steps=1", "recipe.crop=2",
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
    moved = {key.partition(".")[0] for key, value in last[1]["state_dict"].items() if (value != still[key]).all()}
    assert {"decoder", "discriminator"} <= moved
