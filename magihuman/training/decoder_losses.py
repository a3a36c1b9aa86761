"""What makes a decoder's frames right: pixels, detail at several scales, stillness of what is still, features.

All take and return fp32; frames are [B,3,F,H,W] in about [-1,1]. None needs a download (`training.lpips` does).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def charbonnier(prediction: Tensor, truth: Tensor, eps: float = 1e-2) -> Tensor:
    """Mean of sqrt(d^2 + eps^2) - eps: absolute error, round at zero (Charbonnier et al. 1994). A scalar."""
    return ((prediction - truth).square() + eps**2).sqrt().mean() - eps


def laplacian_bands(frames: Tensor, levels: int = 3) -> list[Tensor]:
    """What each halving of the resolution loses, finest first: pictures [N,3,H/2^i,W/2^i] (Burt and Adelson 1983).

    Smaller pictures have fewer levels: a side is halved while it is even.
    """
    x = frames.transpose(1, 2).flatten(0, 1)  # [N,3,H,W]
    bands = []
    for _ in range(levels):
        if x.shape[-1] % 2 or x.shape[-2] % 2:
            break
        small = F.avg_pool2d(x, 2)
        bands.append(x - F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False))
        x = small
    return bands


def laplacian(prediction: Tensor, truth: Tensor, levels: int = 3) -> Tensor:
    """Mean absolute difference of the bands, summed over scales: weighs edges and texture as the eye does. A scalar."""
    pairs = zip(laplacian_bands(prediction, levels), laplacian_bands(truth, levels), strict=True)
    parts = [(a - b).abs().mean() for a, b in pairs]
    return torch.stack(parts).sum() if parts else prediction.new_zeros(())


def flicker(prediction: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error of the change from frame to frame; 0 for a single frame. A scalar."""
    if prediction.shape[2] < 2:
        return prediction.new_zeros(())
    return (prediction.diff(dim=2) - truth.diff(dim=2)).abs().mean()


class AlignmentHead(nn.Module):
    """A linear map from a student's features to a teacher's, of equal resolution or 2^n times that.

    Args:
        student, teacher: channels.
        time, space: how many times more frames and rows the teacher's have; a clip's first frame stays single.
    """

    def __init__(self, student: int, teacher: int, time: int = 1, space: int = 1) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.map = nn.Conv3d(student, teacher * time * space**2, 1)

    def forward(self, features: Tensor) -> Tensor:
        """[B,Cs,T,h,w] -> [B,Ct,time (T-1) + 1,space h,space w]."""
        x = self.map(features).unflatten(1, (-1, self.time, self.space, self.space))  # [B,Ct,t,y,x,T,h,w]
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, self.time - 1 :]


def aligned(prediction: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of features [B,C,T,h,w], each channel in units of its standard deviation in this batch. A scalar.

    Without that the few loud channels of a decoder would be all that is learned.
    """
    teacher = teacher.detach().float()
    spread = teacher.std(dim=(0, 2, 3, 4), keepdim=True).clamp_min(1e-6)
    return ((prediction.float() - teacher) / spread).square().mean()
