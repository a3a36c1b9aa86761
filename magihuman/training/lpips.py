"""LPIPS, the learned perceptual distance of pictures, from files on this machine (Zhang et al. 2018, arXiv 1801.03924).

The weights of the five linear maps come with torchmetrics. The backbone is VGG-16 as torchvision publishes it
(vgg16-397923af.pth); the user fetches it, nothing here does.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from magihuman.errors import UserError
from magihuman.io.released_files import read_state

# Convolutions of VGG-16 as torchvision numbers them, with their widths; the last of each row is followed by a tap.
ROWS = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the pictures, on [-1,1]


class LPIPS(nn.Module):
    """Mean distance of two clips [B,3,F,H,W] in [-1,1], a scalar; frozen, differentiable in the clips.

    Args:
        backbone: file of torchvision's VGG-16 weights (.pth or .safetensors).

    Raises:
        UserError: it is missing, or not VGG-16.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: str) -> None:
        super().__init__()
        path = Path(backbone).expanduser()
        if not path.is_file():
            raise UserError(
                f"recipe.lpips_backbone={backbone} is not a file; fetch torchvision's VGG-16 weights "
                "(https://download.pytorch.org/models/vgg16-397923af.pth), or set recipe.lpips=0"
            )
        state = read_state(path)
        self.rows = nn.ModuleList()
        width = 3
        for row in ROWS:
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if self.rows else []
            for number, channels in row:
                convolution = nn.Conv2d(width, channels, 3, padding=1)
                try:
                    convolution.load_state_dict(
                        {part: state[f"features.{number}.{part}"] for part in ("weight", "bias")}
                    )
                except (KeyError, RuntimeError) as error:
                    raise UserError(
                        f"recipe.lpips_backbone={backbone} does not hold torchvision's VGG-16 (features.{number})"
                    ) from error
                layers += [convolution, nn.ReLU()]
                width = channels
            self.rows.append(nn.Sequential(*layers))
        self.heads = nn.ParameterList(_heads())
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, prediction: Tensor, truth: Tensor) -> Tensor:
        x, y = (
            (clip.transpose(1, 2).flatten(0, 1) - self.shift) / self.scale for clip in (prediction, truth)
        )
        total = prediction.new_zeros(())
        for row, head in zip(self.rows, self.heads, strict=True):
            x, y = row(x), row(y)
            total = total + ((_unit(x) - _unit(y)).square() * head.view(1, -1, 1, 1)).sum(1).mean()
        return total


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _heads() -> list[nn.Parameter]:
    """The linear maps [C] of the five taps, from torchmetrics' own files."""
    import torchmetrics.functional.image as images

    file = Path(images.__file__).parent / "lpips_models" / "vgg.pth"
    state = torch.load(file, map_location="cpu", weights_only=True)
    return [nn.Parameter(state[f"lin{i}.model.1.weight"].flatten()) for i in range(len(ROWS))]
