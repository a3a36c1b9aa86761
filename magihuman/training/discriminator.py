"""A judge of clips for the last stage of a decoder's training: patches in space and time, hinge losses.

The patch discriminator of Isola et al. (2017, arXiv 1611.07004) with a third dimension, and group norms, which do
not care how many clips a batch has. Hinge losses as in Lim and Ye (2017, arXiv 1705.02894); the weight of the
adversarial loss follows the gradients at the last layer as in VQGAN (Esser et al. 2021, arXiv 2012.09841), with a cap.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from magihuman.errors import UserError

CAP = 10.0  # of the weight that balances gradients


@dataclass(frozen=True)
class Gan:
    """The adversarial stage.

    Attributes:
        start: share of the training after which it begins, in [0, 1).
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


class Discriminator(nn.Module):
    """Clips [B,3,F,H,W] -> judgements [B,1,F',H',W'], high for real ones."""

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
        """The same judgements, with gradients for the clips alone."""
        weights = {name: weight.detach() for name, weight in self.named_parameters()}
        return functional_call(self, weights, (clips,))


def adversarial_losses(
    discriminator: Discriminator, decoded: Tensor, truth: Tensor, others: Tensor, last: nn.Parameter
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
