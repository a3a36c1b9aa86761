"""The recipe `recipes.dmd2` on points: its own loop, with small networks and an exact teacher in the roles.

A point of D numbers is one frame of a video latent [B,D,P,1,1]; a sample holds P independent points, so that
the price of a random generator per sample is shared. Points with sound have audio latents [B,P,E] too.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import training_stub
from torch import Tensor, nn

from magihuman.config import OptimSettings, StrategySettings, TrainerSettings
from magihuman.distill.collapse_monitor import MonitorSettings
from magihuman.distill.networks import Networks
from magihuman.distill.rollout import roll_out
from magihuman.flow.guidance import Guidance
from magihuman.flow.sampling import Conditioning, Pair
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.export import ExportConfig, Sampling, Size, released_dtypes, save_export
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.dit import SingleStreamDiT
from magihuman.training.context import TrainingContext
from magihuman.training.optim import EMA
from recipes.dmd2 import DMD2

DIT = DiTConfig(2, 16, 8, 1, 12, 4, 5, mm_layers=(0,), gelu7_layers=(0,))
PRIOR = SigmaPrior(shift=5.0)
UNGUIDED = Guidance(1, 1, 0, 1)

Field = Callable[[Tensor, Tensor], Tensor]
"""Velocities of points [B,D] at levels [B]."""


def make_context(
    folder: Path,
    *,
    steps: int = 100,
    seed: int = 0,
    precision: str = "fp32",
    guidance: Guidance = UNGUIDED,
    **optim: Any,
) -> TrainingContext:
    """Settings of a recipe whose teacher is a small network with random weights, saved in `folder`."""
    size = Size(9, 16, 16)
    sampling = Sampling("unipc", 6, 5.0, guidance)
    config = ExportConfig(
        DIT, PackConfig(), "stub", training_stub.CONTRACT, PRIOR, sampling, size, provenance={"motion_floor": 1.0}
    )
    network = SingleStreamDiT(DIT, compute_dtype=torch.float32, linear_dtype=torch.float32)
    network.init_weights(seed=1)
    draw = torch.Generator().manual_seed(1)
    for head in (network.final_linear_video, network.final_linear_audio):  # they start at zero
        nn.init.normal_(head.weight, std=0.1, generator=draw)
    save_export(folder, released_dtypes(network.state_dict(), DIT), config)
    settings = {"lr": 5e-4, "betas": (0.0, 0.999), "schedule": "constant", "warmup": 1, "ema_decay": 0.95}
    return TrainingContext(
        model=DIT, pack=PackConfig(), codecs="stub", contract=training_stub.CONTRACT, size=size,
        null_text=torch.zeros(2, 5), optim=OptimSettings(**{**settings, **optim}),
        trainer=TrainerSettings(steps, precision=precision), strategy=StrategySettings(), seed=seed, init=str(folder),
    )  # fmt: skip


def join(x: Pair) -> Tensor:
    """Points [B*P,D+E]."""
    video = x.video.flatten(2).transpose(1, 2).flatten(0, 1)
    return torch.cat([video, x.audio.flatten(0, 1)], 1) if x.audio.numel() else video


def part(points: Tensor, samples: int, sound: int = 0) -> Pair:
    """The inverse of `join`: the last `sound` numbers of each point are audio."""
    points = points.unflatten(0, (samples, -1))  # [B,P,D+E]
    video, audio = points.split([points.shape[2] - sound, sound], 2)
    return Pair(video.transpose(1, 2)[..., None, None], audio if sound else audio[:, :0])


class Net(nn.Module):
    """A perceptron's velocity; blind ones do not look at the level."""

    def __init__(self, dimensions: int, blind: bool, width: int = 128) -> None:
        super().__init__()
        self.blind = blind
        self.layers = nn.Sequential(
            nn.Linear(dimensions + (0 if blind else 2), width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, dimensions),
        )  # fmt: skip

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        if not self.blind:
            x = torch.cat([x, sigma[:, None], (sigma[:, None] + 0.02).log()], 1)
        return self.layers(x)


class Alone(DMD2):
    """The recipe without a trainer. Settings that say nothing else: no conditions, no collapse monitor."""

    def __init__(self, context: TrainingContext, **settings: Any) -> None:
        defaults = {"first_frame": 0.0, "audio_conditioning": 0.0, "monitor": MonitorSettings(every=0)}
        super().__init__(context, **{**defaults, **settings})

    def configure_model(self) -> None:
        super().configure_model()
        self.made = self.configure_optimizers()

    def optimizers(self, *_: Any, **__: Any) -> Any:
        return self.made[0]

    def lr_schedulers(self) -> Any:
        return self.made[1][0]["scheduler"]

    def manual_backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        loss.backward()


@dataclass
class Call:
    """One pass through a network: latents in and velocities out, and whether gradients were kept."""

    role: str
    x: Pair
    text: list[Tensor]
    v: Pair
    gradients: bool


class Watched(Alone):
    """The recipe with small real networks, which writes down their calls."""

    def __init__(self, context: TrainingContext, **settings: Any) -> None:
        super().__init__(context, **settings)
        self.calls: list[Call] = []

    def velocity(self, role: str, text: list[Tensor], x: Pair, sigma: Pair) -> Pair:
        v = super().velocity(role, text, x, sigma)
        if v.video.requires_grad:
            v.video.retain_grad()
            v.audio.retain_grad()
        self.calls.append(Call(role, x, text, v, v.video.requires_grad))
        return v


class PointDMD2(Alone):
    """The recipe on points, with a network and an exact teacher that are put in from outside.

    Args:
        start: what student and fake_score begin as; teacher: exact field.
        sound: how many numbers of a point are audio.
    """

    def __init__(
        self, context: TrainingContext, start: nn.Module, teacher: Field, sound: int = 0, **settings: Any
    ) -> None:
        super().__init__(context, **settings)
        self.start, self.field, self.sound = start, teacher, sound

    def configure_model(self) -> None:
        self.denoiser, self.fake_score = copy.deepcopy(self.start), copy.deepcopy(self.start)
        if self.context.optim.ema_decay:
            self.ema = EMA(self.denoiser, self.context.optim.ema_decay)
        self.networks = Networks(self.field, self.fake_score, self.denoiser, self.network)
        self.made = self.configure_optimizers()

    def velocity(self, role: str, text: list[Tensor], x: Pair, sigma: Pair) -> Pair:
        points = join(x)
        level = sigma.video.repeat_interleave(x.video.shape[2])
        return part(self.networks.role(role)(points, level), len(x.video), self.sound)

    def run(self, cycles: int, batch: int, points: int = 8) -> None:
        """Train; the batches hold nothing but their size: samples, and points in each."""
        self.configure_model()
        dimensions = self.start.layers[-1].out_features
        empty = part(torch.zeros(batch * points, dimensions), batch, self.sound)
        for cycle in range(cycles):
            index = torch.arange(cycle * batch, (cycle + 1) * batch)
            self.training_step(
                {"video": empty.video, "audio": empty.audio, "text": [torch.zeros(2, 5)] * batch, "index": index}, 0
            )

    @torch.no_grad()
    def points(self, role: str, count: int) -> Tensor:
        """Samples [count,D] of a role, as inference makes them."""
        dimensions = self.start.layers[-1].out_features
        like = part(torch.zeros(count, dimensions), 1, self.sound)
        generators = [torch.Generator().manual_seed(0)]
        velocity = partial(self.velocity, role, [])
        return join(roll_out(self.sampling, velocity, generators, Conditioning.nothing(like)).end)


def pretrained(field: Field, truth: Any, blind: bool, updates: int, batch: int = 256, width: int = 128) -> Net:
    """A network that was fitted to a velocity for a while."""
    torch.manual_seed(1)
    draw = torch.Generator().manual_seed(1)
    net = Net(truth.means.shape[1], blind, width)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(updates):
        x0, _ = truth.draw(batch, draw)
        noise = torch.randn(x0.shape, generator=draw)
        sigma, _ = PRIOR.sample(batch, draw)
        x = (1 - sigma[:, None]) * x0 + sigma[:, None] * noise
        loss = (net(x, sigma) - field(x, sigma)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net
