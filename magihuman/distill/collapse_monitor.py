"""Whether a distillation is still healthy: the student against its teacher at fixed prompts and fixed noise.

Distribution matching is a mode-seeking game with a moving critic, and its losses say little: a student that
gives everybody the same face has a small gradient. So the samples themselves are compared. Before the first
step the teacher samples a few prompts, several times each, as it is meant to be sampled; every so many cycles
the student does so in its own way, from the same noise.

    std      standard deviation of the latents, student / teacher: above 1 it saturates, below it goes grey
    spread   distance between samples of one prompt, student / teacher: towards 0 it forgets modes
    lag      error of the critic on student samples / the teacher's there: well above 1 it says nothing
    balance  size of the audio's gradient / the video's: one modality drowns the other

Of several processes each looks at prompts of its own; all go by the mean, so that none ends the run alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magihuman.distill.rollout import Sampler, Shape
from magihuman.errors import UserError
from magihuman.flow.path import masked_mean_per_sample, velocity_target
from magihuman.flow.sampling import MODALITIES, Pair
from magihuman.training.parallel import average_figures

ADVICE = {
    "std": "lower recipe.guidance or optim.lr, or raise recipe.critic.updates",
    "spread": "raise recipe.critic.updates or recipe.critic.lr, or lower optim.lr",
    "lag": "the critic lags behind: raise recipe.critic.lr, .updates or .warmup, or lower optim.lr",
    "balance": "change recipe.video_weight and recipe.audio_weight towards the modality that is drowned",
}


WORSE = 0.05
"""Share by which std and spread may leave the place where the student began, when that is outside of the limits."""


@dataclass(frozen=True)
class HealthLimits:
    """What has to hold, looked at every `every` cycles; `patience` looks in a row outside of it end the run, counted
    from the student's first update on. An undistilled student may begin outside of std and spread, far from a guided
    teacher; it then has to get no worse.

    Attributes:
        every: 0 switches all of it off.
        prompts, samples: texts, and samples of each.
        std, spread, lag, balance: lowest and highest value of each signal.
    """

    every: int = 20
    prompts: int = 4
    samples: int = 6
    patience: int = 3
    std: tuple[float, float] = (0.8, 1.25)
    spread: tuple[float, float] = (0.7, 1.5)
    lag: tuple[float, float] = (0.0, 1.25)
    balance: tuple[float, float] = (0.05, 20.0)

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.samples < 2 or self.patience < 1:
            raise UserError(
                "recipe.health needs at least 1 prompt, 2 samples of it and a patience of 1, not "
                f"{self.prompts}, {self.samples} and {self.patience}"
            )


def standard_deviation(latents: Tensor) -> float:
    """Of all entries together."""
    return float(latents.float().std())


def spread(latents: Tensor, samples: int) -> float:
    """Mean distance (root mean square over entries) between samples of one prompt.

    Video is averaged over time first: what a clip shows tells prompts and people apart, not when a mouth opens.

    Args:
        latents: [prompts * samples, ...], samples of a prompt side by side.
    """
    x = latents.float().mean(2) if latents.ndim == 5 else latents.float()
    x = x.flatten(1).unflatten(0, (-1, samples))  # [prompts, samples, entries]
    squared = (x[:, :, None] - x[:, None]).square().mean(-1)  # [prompts, samples, samples]
    row, column = torch.triu_indices(samples, samples, 1)
    return float(squared[:, row, column].sqrt().mean())


@torch.no_grad()
def turn_signals(
    x0: Pair, noise: Pair, gradient: Pair, plain: Pair, fake: Pair, mask: Pair
) -> dict[str, tuple[Tensor, Tensor]]:
    """Figures of a student's turn, [B] each with weights [B] (0 where a modality is wholly given).

    Args:
        x0: student samples, noised with noise; gradient: their matching gradient.
        plain, fake: velocities of teacher (without guidance) and critic there.
    """
    figures = {}
    for m, name in enumerate(MODALITIES):
        used = mask[m].flatten(1).amax(1) * (1.0 if x0[m].numel() else 0.0)
        target = velocity_target(x0[m], noise[m])
        figures[f"dm/{name}"] = masked_mean_per_sample(gradient[m].square(), mask[m]).sqrt(), used
        for network, velocity in (("critic", fake[m]), ("teacher", plain[m])):
            error = masked_mean_per_sample((velocity - target).square(), mask[m])
            figures[f"{network}_error/{name}"] = error, used
    return figures


class Health:
    """Compares, remembers how often in a row a signal was bad, and ends the run.

    Attributes:
        reference: texts and the teacher's figures, once made, and where the student began; part of the checkpoint.
        strikes: looks in a row outside of the limits, by signal.
    """

    def __init__(self, limits: HealthLimits, seed: int) -> None:
        self.limits = limits
        self.seed = seed
        self.reference: dict[str, Any] | None = None
        self.strikes: dict[str, int] = {}
        self.sums: dict[str, float] = {}

    def remember(self, figures: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a turn's figures to those since the last look."""
        for name, (values, weights) in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + float((values * weights).sum())

    def ratios(self, device: torch.device | str = "cpu") -> dict[str, float]:
        """`health/lag_video`, `health/balance` and so on since the last look, of all processes together.

        Args:
            device: where processes exchange sums.
        """
        found, self.sums = average_figures(self.sums, device), {}

        def ratio(over: str, under: str) -> float | None:
            return found[over] / found[under] if found.get(under, 0.0) > 0 else None

        figures = {f"health/lag_{m}": ratio(f"critic_error/{m}", f"teacher_error/{m}") for m in MODALITIES}
        figures["health/balance"] = ratio("dm/audio", "dm/video")
        return {name: value for name, value in figures.items() if value is not None}

    def due(self, step: int) -> bool:
        return self.limits.every > 0 and step % self.limits.every == 0

    def refer(self, texts: Sequence[Tensor], latents: Pair, teacher: Sampler) -> None:
        """Sample the teacher, once per run, on some of a batch's texts; later calls do nothing."""
        if self.reference is None:
            kept = [text.cpu() for text in texts[: self.limits.prompts]]
            shape = (list(latents.video.shape[1:]), list(latents.audio.shape[1:]))
            self.reference = {"texts": kept, "shape": shape, **self._measure(kept, shape, teacher)}

    def look(self, student: Sampler, device: torch.device | str = "cpu") -> dict[str, float]:
        """`health/std_video` and so on: the student's figures over the teacher's, the mean over processes."""
        assert self.reference is not None
        mine = self._measure(self.reference["texts"], self.reference["shape"], student)
        ratios = {f"health/{name}": value / max(self.reference[name], 1e-6) for name, value in mine.items()}
        found = average_figures(ratios, device)
        self.reference.setdefault("start", found)
        return found

    def _measure(self, texts: Sequence[Tensor], shape: Shape, sampler: Sampler) -> dict[str, float]:
        many = [text for text in texts for _ in range(self.limits.samples)]
        noise = [torch.Generator().manual_seed(self.seed + i) for i in range(len(many))]
        latents = sampler(many, noise, shape)
        figures = {}
        for name, values in zip(MODALITIES, latents, strict=True):
            if values.numel():
                figures[f"std_{name}"] = standard_deviation(values)
                figures[f"spread_{name}"] = spread(values, self.limits.samples)
        return figures

    def judge(self, figures: Mapping[str, float], step: int) -> None:
        """Count what is out of its limits.

        Raises:
            UserError: when a signal was bad `patience` times in a row, with what to change.
        """
        for name, value in figures.items():
            signal = name.split("/")[-1].split("_")[0]
            low, high = getattr(self.limits, signal)
            begun = (self.reference or {}).get("start", {}).get(name)
            if begun is not None:
                low, high = min(low, (1 - WORSE) * begun), max(high, (1 + WORSE) * begun)
            self.strikes[name] = 0 if low <= value <= high else self.strikes.get(name, 0) + 1
            if self.strikes[name] >= self.limits.patience:
                why = "it forgets modes: " if signal == "spread" and value < low else ""
                raise UserError(
                    f"the student collapses: {name} is {value:.3g} at step {step}, outside of {low:g} to {high:g} for "
                    f"{self.limits.patience} looks in a row; {why}{ADVICE[signal]} "
                    f"(recipe.health.{signal} sets the limits)"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self.reference, "strikes": dict(self.strikes), "sums": dict(self.sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reference, self.strikes = state["reference"], dict(state["strikes"])
        self.sums = dict(state["sums"])
