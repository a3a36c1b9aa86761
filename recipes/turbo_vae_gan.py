"""Turbo VAE with LPIPS and an adversarial last stage: `recipes.turbo_vae`, and two losses that real video may need.

LPIPS is the learned perceptual distance of images (Zhang et al. 2018, arXiv 1801.03924). The discriminator is the patch
discriminator of Isola et al. (2017, arXiv 1611.07004) with a third dimension, and with group norms, which do not depend
on the number of clips in a batch. Its losses are hinge losses (Lim and Ye 2017, arXiv 1705.02894); the weight of the
adversarial loss follows the gradients at the decoder's last layer as in VQGAN (Esser et al. 2021, arXiv 2012.09841),
with a cap.

In the puppet world the adversarial stage changed nothing beyond noise (eval/results/tiny_turbo/ablation_400), so it is a
recipe of its own. The discriminator stays in the checkpoints; the export holds the decoder alone.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from magihuman.errors import UserError
from magihuman.io.released_files import read_state
from magihuman.training.context import TrainingContext
from magihuman.training.optim import build_optimizer, build_schedule, clip_gradients
from magihuman.training.rng import stream
from recipes.turbo_vae import TurboVAE

CAP = 10.0  # of the weight that balances gradients

# Convolutions of VGG-16 as torchvision numbers them, with their widths; the last of each row is followed by a tap.
ROWS = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the images, on [-1,1]


@dataclass(frozen=True)
class Gan:
    """The adversarial stage.

    Attributes:
        start: share of the training after which it starts, in [0, 1).
        weight: of the adversarial loss, relative to a gradient as strong as the other losses'.
        lr: learning rate of the discriminator, constant: where it begins late, little would be left of the decoder's.
        width: of its first layer, a multiple of 4.

    Raises:
        UserError: a start after the end, or another width.
    """

    start: float = 0.8
    weight: float = 0.05
    lr: float = 2e-4
    width: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1 or self.width < 4 or self.width % 4:
            raise UserError(
                f"recipe.gan has start={self.start} and width={self.width}; start lies in [0, 1), width is a "
                "multiple of 4"
            )


class PatchDiscriminator(nn.Module):
    """Patch discriminator: clips [B,3,F,H,W] -> scores [B,1,F',H',W'], high for real ones."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv3d(3, width, (3, 4, 4), (1, 2, 2), (1, 1, 1)), nn.LeakyReLU(0.2)]
        for level in range(2):
            before, after = width * 2**level, width * 2 ** (level + 1)
            layers += [
                nn.Conv3d(before, after, (3, 4, 4), (2 if level else 1, 2, 2), (1, 1, 1)),
                nn.GroupNorm(8, after),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv3d(4 * width, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, clips: Tensor) -> Tensor:
        return self.layers(clips)

    def frozen(self, clips: Tensor) -> Tensor:
        """The same scores, with gradients for the clips alone."""
        weights = {name: weight.detach() for name, weight in self.named_parameters()}
        return functional_call(self, weights, (clips,))


def adversarial_losses(
    discriminator: PatchDiscriminator, decoded: Tensor, truth: Tensor, others: Tensor, last: nn.Parameter
) -> tuple[Tensor, Tensor]:
    """(generator's loss, balanced against the other losses; discriminator's loss), scalars.

    Their gradients do not meet: the first has none for the discriminator, the second none for the decoder, so
    one backward pass and one optimiser serve both.

    Args:
        decoded: clips with gradients; others: the sum of the other losses; last: the decoder's last weight.
    """
    wanted = -discriminator.frozen(decoded).mean()
    pull = torch.autograd.grad(others, last, retain_graph=True)[0].norm()
    push = torch.autograd.grad(wanted, last, retain_graph=True)[0].norm()
    balance = (pull / (push + 1e-6)).clamp(max=CAP).detach()
    judged = F.relu(1 - discriminator(truth)).mean() + F.relu(1 + discriminator(decoded.detach())).mean()
    return balance * wanted, 0.5 * judged


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
        path = Path(os.path.expanduser(backbone))
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
        x, y = ((clip.transpose(1, 2).flatten(0, 1) - self.shift) / self.scale for clip in (prediction, truth))
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


class TurboVAEGAN(TurboVAE):
    """`TurboVAE` with LPIPS, and with a discriminator in the last stage.

    Args:
        gan: the adversarial stage, or None.
        lpips: weight of LPIPS; lpips_backbone: file of its VGG-16 (torchvision's).
        settings: of `TurboVAE`.
    """

    def __init__(
        self,
        context: TrainingContext,
        *,
        gan: Gan | None = None,
        lpips: float = 0.0,
        lpips_backbone: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(context, **settings)
        self.gan, self.lpips = gan, lpips
        self.discriminator: PatchDiscriminator | None = None
        if lpips and lpips_backbone is None:
            raise UserError("recipe.lpips needs recipe.lpips_backbone, a file of torchvision's VGG-16 weights")
        # Frozen; in a tuple, so that neither checkpoints nor optimisers contain it.
        self._perceptual: tuple[LPIPS, ...] = (LPIPS(lpips_backbone),) if lpips and lpips_backbone is not None else ()

    def configure_model(self) -> None:
        if self.decoder is not None:
            return
        super().configure_model()
        if self.gan is not None:
            with torch.random.fork_rng():
                torch.manual_seed(stream(self.context.seed, "heads"))
                self.discriminator = PatchDiscriminator(self.gan.width)

    def configure_optimizers(self) -> Any:
        if self.discriminator is None or self.gan is None:
            return super().configure_optimizers()
        optimizer = build_optimizer(self.trained, None, self.context.optim)
        weights = list(self.discriminator.parameters())
        optimizer.add_param_group({"params": weights, "lr": self.gan.lr, "weight_decay": 0.0})
        schedule = build_schedule(optimizer, self.context.optim, self.max_steps, constant=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        super().configure_gradient_clipping(optimizer)
        if self.discriminator is not None:
            clip_gradients(list(self.discriminator.parameters()), self.context.optim.clip_norm)

    def on_fit_start(self) -> None:
        for part in self._perceptual:
            part.to(self.device)

    def objective(self, decoded: Tensor, truth: Tensor) -> Tensor:
        total = super().objective(decoded, truth)
        for part in self._perceptual:
            distance = part(decoded, truth)
            self.meter.add("loss/lpips", distance)
            total = total + self.lpips * distance
        if self.discriminator is not None:
            total = total + self._adversarial(decoded, truth, total)
        return total

    def _adversarial(self, decoded: Tensor, truth: Tensor, others: Tensor) -> Tensor:
        assert self.gan is not None
        assert self.discriminator is not None
        if self.progress < self.gan.start:
            # A zero gradient for every weight, which spares DDP the search for unused ones.
            return torch.stack([w.sum() * 0.0 for w in self.discriminator.parameters()]).sum()
        last = [p for p in self.trained.parameters() if p.ndim > 1][-1]
        generator, discriminator = adversarial_losses(self.discriminator, decoded, truth, others, last)
        self.meter.add("loss/adversarial", generator)
        self.meter.add("loss/discriminator", discriminator)
        return self.gan.weight * generator + discriminator
