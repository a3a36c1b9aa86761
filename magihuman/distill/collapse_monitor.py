"""Collapse monitor of a distillation: statistics of student samples compared with the teacher's.

The losses of distribution matching do not show mode collapse: a student with one face for every prompt has a small
gradient. The monitor therefore compares samples, at fixed prompts and from fixed noise. The teacher is sampled once, with
its own settings, before the first step; the student every `every` iterations, with the settings of its export.

    std        standard deviation of the latents, student / teacher: > 1 is saturation, < 1 loss of contrast
    diversity  distance between samples of a prompt, student / teacher: towards 0 is mode collapse
    lag        error of the fake score on student samples / the teacher's: well above 1, the fake score is inaccurate
    balance    norm of the audio's gradient / the video's: far from 1, one modality dominates

Every process samples prompts of its own samples: its share of them, but at least one. Processes of a context group, which train
on the same samples, have the same prompts. All use the mean over processes, so that they stop together.

    monitor = CollapseMonitor(MonitorSettings(every=20, patience=3), seed=0)
    monitor.sample_teacher(texts, latents, teacher_sampler)
    monitor.check(monitor.measure(student_sampler), step=20)     # raises after `patience` violations in a row
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magihuman.distill.rollout import Sampler
from magihuman.errors import UserError
from magihuman.flow.path import masked_mean_per_sample, velocity_target
from magihuman.flow.sampling import MODALITIES, Pair, Shapes, seeded
from magihuman.training.parallel import average_metrics

ADVICE = {
    "std": "lower recipe.guidance or optim.lr, or raise recipe.fake_score.updates",
    "diversity": "raise recipe.fake_score.updates or recipe.fake_score.lr, or lower optim.lr",
    "lag": "the fake score lags behind: raise recipe.fake_score.lr, .updates or .warmup, or lower optim.lr",
    "balance": "change recipe.video_weight and recipe.audio_weight in favour of the modality with the small gradient",
}

MARGIN = 0.05
"""Relative change allowed to statistics that are outside of the limits before the student's first update."""


@dataclass(frozen=True)
class MonitorSettings:
    """Settings of the collapse monitor (config `recipe.monitor`).

    `patience` consecutive checks outside of the limits end the run; checks before the student's first update do not
    count. Where the undistilled student is outside of the limits of std or diversity (it can be far from a guided
    teacher), its own value is the limit.

    Attributes:
        every: iterations between checks; 0 disables the monitor.
        prompts, samples: number of prompts over all processes, and samples of each.
        std, diversity, lag, balance: lowest and highest value of each statistic.

    Raises:
        UserError: at construction, for too few prompts, samples or checks.
    """

    every: int = 20
    prompts: int = 4
    samples: int = 6
    patience: int = 3
    std: tuple[float, float] = (0.8, 1.25)
    diversity: tuple[float, float] = (0.7, 1.5)
    lag: tuple[float, float] = (0.0, 1.25)
    balance: tuple[float, float] = (0.05, 20.0)

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.samples < 2 or self.patience < 1 or self.every < 0:
            raise UserError(
                "recipe.monitor needs at least 1 prompt, 2 samples of it, a patience of 1 and every=0 (off), not "
                f"{self.prompts}, {self.samples}, {self.patience} and {self.every}"
            )


def standard_deviation(latents: Tensor) -> float:
    """Standard deviation over all entries."""
    return float(latents.float().std())


def diversity(latents: Tensor, samples: int) -> float:
    """Mean root-mean-square distance between the samples of a prompt.

    Video is averaged over time first, which leaves what differs between clips and removes mouth movements.

    Args:
        latents: [prompts * samples, ...], the samples of a prompt next to each other.
    """
    x = latents.float().mean(2) if latents.ndim == 5 else latents.float()
    x = x.flatten(1).unflatten(0, (-1, samples))  # [prompts, samples, entries]
    squared = (x[:, :, None] - x[:, None]).square().mean(-1)  # [prompts, samples, samples]
    row, column = torch.triu_indices(samples, samples, 1)
    return float(squared[:, row, column].sqrt().mean())


@torch.no_grad()
def update_statistics(
    x0: Pair, noise: Pair, gradient: Pair, teacher: Pair, fake: Pair, mask: Pair
) -> dict[str, tuple[Tensor, Tensor]]:
    """Statistics of a student update: values [B] and weights [B] (0 where a modality is conditioning only).

    Args:
        x0: student samples, noised with `noise`; gradient: their matching gradient.
        teacher, fake: velocities of the teacher (without guidance) and of the fake score there.
    """
    found = {}
    for m, name in enumerate(MODALITIES):
        used = mask[m].flatten(1).amax(1) * (1.0 if x0[m].numel() else 0.0)
        target = velocity_target(x0[m], noise[m])
        found[f"dm/{name}"] = masked_mean_per_sample(gradient[m].square(), mask[m]).sqrt(), used
        for network, velocity in (("fake_score", fake[m]), ("teacher", teacher[m])):
            error = masked_mean_per_sample((velocity - target).square(), mask[m])
            found[f"{network}_error/{name}"] = error, used
    return found


class CollapseMonitor:
    """Statistics of teacher and student, and the number of consecutive violations of each limit.

    Attributes:
        reference: texts, statistics of the teacher, and those of the student at its first check (`start`); saved in
            checkpoints.
        strikes: consecutive violations by statistic.
    """

    def __init__(self, settings: MonitorSettings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.reference: dict[str, Any] | None = None
        self.strikes: dict[str, int] = {}
        self.sums: dict[str, float] = {}

    def due(self, step: int) -> bool:
        return self.settings.every > 0 and step % self.settings.every == 0

    def add(self, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Accumulate `update_statistics` until the next check."""
        for name, (values, weights) in statistics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float((values * weights).sum())

    def ratios(self) -> dict[str, float]:
        """`monitor/lag_video`, `monitor/balance` etc. over the updates since the last check and all processes."""
        found, self.sums = average_metrics(self.sums), {}

        def ratio(over: str, under: str) -> float | None:
            return found[over] / found[under] if found.get(under, 0.0) > 0 else None

        ratios = {f"monitor/lag_{m}": ratio(f"fake_score_error/{m}", f"teacher_error/{m}") for m in MODALITIES}
        ratios["monitor/balance"] = ratio("dm/audio", "dm/video")
        return {name: value for name, value in ratios.items() if value is not None}

    def sample_teacher(self, texts: Sequence[Tensor], latents: Pair, teacher: Sampler, together: int = 1) -> None:
        """Measure the teacher on the first prompts of a process's batch, once per run; later calls do nothing.

        Args:
            together: processes that train on the same samples (strategy.context_parallel).
        """
        if self.reference is None:
            processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            kept = [text.cpu() for text in texts[: -(-self.settings.prompts * together // processes)]]
            shape = (list(latents.video.shape[1:]), list(latents.audio.shape[1:]))
            self.reference = {"texts": kept, "shape": shape, **self._sample(kept, shape, teacher)}

    def measure(self, student: Sampler) -> dict[str, float]:
        """`monitor/std_video` etc.: statistics of the student / the teacher's, mean over the processes that have them: where
        shards are streamed, the first batch of a process may have no sound."""
        assert self.reference is not None
        mine = self._sample(self.reference["texts"], self.reference["shape"], student)
        ratios = {f"monitor/{name}": value / max(self.reference[name], 1e-6) for name, value in mine.items()}
        found = average_metrics(ratios)
        self.reference.setdefault("start", found)
        return found

    def _sample(self, texts: Sequence[Tensor], shape: Shapes, sampler: Sampler) -> dict[str, float]:
        repeated = [text for text in texts for _ in range(self.settings.samples)]
        latents = sampler(repeated, seeded(range(self.seed, self.seed + len(repeated))), shape)
        found = {}
        for name, values in zip(MODALITIES, latents, strict=True):
            if values.numel():
                found[f"std_{name}"] = standard_deviation(values)
                found[f"diversity_{name}"] = diversity(values, self.settings.samples)
        return found

    def check(self, statistics: Mapping[str, float], step: int) -> None:
        """Count violations of the limits.

        Raises:
            UserError: after `patience` violations of a limit in a row, with the settings to change.
        """
        for name, value in statistics.items():
            kind = name.split("/")[-1].split("_")[0]
            low, high = getattr(self.settings, kind)
            start = (self.reference or {}).get("start", {}).get(name)
            if start is not None:
                low, high = min(low, (1 - MARGIN) * start), max(high, (1 + MARGIN) * start)
            self.strikes[name] = 0 if low <= value <= high else self.strikes.get(name, 0) + 1
            if self.strikes[name] >= self.settings.patience:
                why = "mode collapse: " if kind == "diversity" and value < low else ""
                raise UserError(
                    f"the student collapses: {name} is {value:.3g} at step {step}, outside of {low:g} to {high:g} in "
                    f"{self.settings.patience} checks in a row; {why}{ADVICE[kind]} "
                    f"(recipe.monitor.{kind} sets the limits)"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference, "strikes": dict(self.strikes), "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference, self.strikes = state["reference"], dict(state["strikes"])
        self.sums = dict(state["sums"])
