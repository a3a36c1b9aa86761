"""LPIPS from a local file: against torchmetrics' own, on a backbone of the test's."""

from pathlib import Path

import pytest
import torch

from magihuman.errors import UserError


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

    from magihuman.training.lpips import LPIPS, ROWS

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
    # torchmetrics' own, on a backbone that needs no torchvision; pictures are averaged.
    monkeypatch.setattr(theirs, "Vgg16", lambda **_: Vgg16(state))
    two = torch.rand(2, 3, 2, 32, 32) * 2 - 1
    wanted = theirs._LPIPS(net="vgg")(
        *(x.transpose(1, 2).flatten(0, 1) for x in (two, two.roll(1, 0)))
    ).mean()
    torch.testing.assert_close(distance(two, two.roll(1, 0)), wanted, rtol=1e-3, atol=0)
    del state["features.28.bias"]
    torch.save(state, file)
    with pytest.raises(UserError, match=r"does not hold torchvision's VGG-16 \(features.28\)"):
        LPIPS(str(file))
