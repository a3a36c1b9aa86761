"""Scores of clips that a training samples (`callbacks=scores`), by metrics of the registry that need no model.

scorer = TrainingScorer(clips=16)
prompts = scorer.choose("scene")                       # of the clips to sample
scorer(files, prompts, "scene")["vowels"]["value"]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.clip_list import spoken
from eval.metrics.registry import Measurement, measurements
from magihuman.codecs.tiny_captions import FORMS
from magihuman.errors import UserError


@dataclass(frozen=True)
class TrainingScorer:
    """Chooses prompts and scores their clips.

    Attributes:
        clips: how many.
        prompts: of codecs other than the puppets'; with fewer prompts than clips they come in turn.
        metrics: measurements or keys of metrics; None: of puppets their own, else all that need the clip alone.
    """

    clips: int = 16
    prompts: Sequence[str] = ()
    metrics: Sequence[str] | None = None

    def choose(self, codecs: str) -> list[str]:
        """A prompt per clip; of puppets captions that no training sees.

        Raises:
            UserError: no clips, no prompts, or metrics that are unknown or need a model.
        """
        if self.clips < 1:
            raise UserError(f"callbacks.scores.scorer.clips={self.clips} is impossible; give at least 1")
        self.measurements(codecs)
        if codecs in FORMS:
            from eval.clips import held_out

            return [puppet.caption for puppet in held_out(self.clips, codecs)]
        if not self.prompts:
            raise UserError("callbacks.scores has no prompts to sample; give prompts=[...], or callbacks=default")
        return [self.prompts[number % len(self.prompts)] for number in range(self.clips)]

    def measurements(self, codecs: str) -> list[str]:
        """Names of the measurements; errors as of `choose`."""
        from eval.scoring import select

        known = measurements()
        if self.metrics is None:
            if codecs in FORMS:
                return ["puppets"]
            return [
                name
                for name, found in known.items()
                if isinstance(found, Measurement) and not found.costly and {*found.inputs} <= {"frames", "audio"}
            ]
        names = select(self.metrics)
        costly = [name for name in names if known[name].costly or not isinstance(known[name], Measurement)]
        if costly:
            raise UserError(
                f"callbacks.scores.scorer.metrics: {costly[0]} needs a model or reference clips; score the samples after the "
                "training: python -m eval.score"
            )
        return names

    def __call__(self, files: Sequence[Path], prompts: Sequence[str], codecs: str) -> Mapping[str, Mapping[str, Any]]:
        """Scores of clips.

        Args:
            files: of the clips, prompts: of the same.

        Returns:
            Metric -> {"value", "low", "high", "status", "reason", ...}, as in the summary of `python -m eval.score`.
        """
        from eval.clip_file import ClipFile
        from eval.scoring import score

        clips = []
        for number, (file, prompt) in enumerate(zip(files, prompts, strict=True)):
            dialogue, language = spoken(prompt)
            clips.append(ClipFile(file, f"{number:06d}", prompt=prompt, dialogue=dialogue, language=language))
        return score(clips, self.measurements(codecs), progress=False).summary()
