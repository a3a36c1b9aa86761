"""Scores of sampled clips during a training, as curves with their intervals (`callbacks=scores`)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import lightning as L

from magihuman.errors import UserError
from magihuman.schema import one_line
from magihuman.training.callbacks import SampledClips, spent


class ClipScorer(Protocol):
    """What scores clips; of another package, injected by the configuration."""

    def choose(self, codecs: str) -> list[str]:
        """A prompt per clip to sample."""

    def __call__(self, files: Sequence[Path], prompts: Sequence[str], codecs: str) -> Mapping[str, Mapping[str, Any]]:
        """Metric -> {"value", "low", "high", "reason"} of clips in mp4 files."""


class ScoreCurves(SampledClips):
    """Scores of sampled clips: every so many steps the averages of cheap metrics with their 95 % intervals.

    Logged are `scores/KEY`, `scores/KEY_low` and `scores/KEY_high`, and the share of the time as `time/scores`. The clips of
    every step have the same prompts and the same noise. A metric without a value and an error of the scorer are notes. The
    training's random numbers are not touched (see `SampledClips`).

    Args:
        scorer: chooses the prompts and scores the clips.
        pipeline, every_steps, settings: as of `SampledClips`; every_steps is a multiple of `trainer.log_every`, so that no
            value waits for a log line.
    """

    def __init__(
        self,
        pipeline: Callable[..., Any] | None,
        scorer: ClipScorer,
        every_steps: int = 200,
        settings: dict[str, Any] | None = None,
    ) -> None:
        if pipeline is None:
            raise UserError(
                "callbacks.scores samples clips as callbacks.samples does, which is null, as where a recipe makes no clips "
                "from prompts; choose callbacks=default"
            )
        super().__init__("scores", pipeline, every_steps, settings)
        self.scorer = scorer
        self._prompts: list[str] = []
        self._said: set[str] = set()

    def on_fit_start(self, trainer: L.Trainer, recipe: Any) -> None:
        """Raises UserError for an interval between log lines, or prompts or metrics that the scorer refuses."""
        super().on_fit_start(trainer, recipe)
        lines = recipe.context.trainer.log_every
        if self.every_steps % lines:
            raise UserError(
                f"callbacks.scores.every_steps={self.every_steps} is no multiple of trainer.log_every={lines}; give "
                f"{max(1, round(self.every_steps / lines)) * lines}"
            )
        self._prompts = self.scorer.choose(recipe.context.codecs)

    def on_train_batch_end(self, trainer: L.Trainer, recipe: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.due(recipe):
            return
        with spent(recipe, "scores"):
            found: dict[str, float] = {}
            if self.takes_part(trainer, recipe):
                clips = self.generate(trainer, recipe, self._prompts)
                if trainer.is_global_zero:
                    found = self._score(clips, recipe)
            found = trainer.strategy.broadcast(found)  # averages are taken over processes
        for name, value in found.items():
            recipe.meter.add(name, value)

    def _score(self, clips: Sequence[Any], recipe: Any) -> dict[str, float]:
        """Values to log by name."""
        try:
            with TemporaryDirectory(prefix="magihuman-scores-") as folder:
                files = [Path(folder) / f"{number:06d}.mp4" for number in range(len(clips))]
                for clip, file in zip(clips, files, strict=True):
                    clip.save(file)
                summary = self.scorer(files, self._prompts, recipe.context.codecs)
        except Exception as error:  # of a metric: no reason to end a training
            self._note(f"the clips of step {recipe.step} are not scored", f"{type(error).__name__}: {error}")
            return {}
        found: dict[str, float] = {}
        for key, measure in summary.items():
            if measure.get("value") is None:
                self._note(f"scores/{key} has no value at step {recipe.step}", str(measure.get("reason") or "unknown"))
                continue
            ends = {"": "value", "_low": "low", "_high": "high"}
            found |= {f"scores/{key}{end}": measure[of] for end, of in ends.items() if measure.get(of) is not None}
        return found

    def _note(self, what: str, reason: str) -> None:
        """Say something once per reason."""
        if reason not in self._said:
            self._said.add(reason)
            print(f"note: {what}: {one_line(reason)[:300]}", flush=True)
