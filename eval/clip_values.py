"""Scores and values per clip of one evaluated model, kept so that trainings can be compared prompt by prompt.

    write_clip_values(folder, captions, scores, model={"vowels": values}, bound={"vowels": best})
    read_clip_values(folder / FILE).paired["vowels"]     # prompt -> mean over its clips

Every evaluation that trainings start when they end writes this file next to its result file; `eval.compare_runs` reads it.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.metrics.registry import metrics
from magihuman.io.files import write_result
from magihuman.io.text import load_json

FILE = "clip_values.json"
FORMAT = "magihuman-clip-values/1"

SCORE = ("value", "low", "high", "n", "bound")
"""Keys of a score."""

PromptMeans = dict[str, float]
"""Prompt -> mean over its clips; prompts of which a clip has no value are left out."""


@dataclass(eq=False)
class ClipValues:
    """Content of a file.

    Attributes:
        scores: metric -> {"value", "low", "high", "n", "bound"}, all of which may be None.
        paired, bound: metric -> values by prompt, of the model and of what no model can beat.
        prompts: how many were evaluated.
    """

    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    paired: dict[str, PromptMeans] = field(default_factory=dict)
    bound: dict[str, PromptMeans] = field(default_factory=dict)
    prompts: int = 0


def sync_values(own: np.ndarray, bound_own: np.ndarray, bound_other: np.ndarray) -> dict[str, np.ndarray]:
    """Lip sync per clip: the correlation, and the clip's share of the skill, whose mean is the skill.

    Args:
        own: correlation with the own audio, of the model; bound_own, bound_other: of the bound with the own audio and with
            that of other clips; all of the same shape.
    """
    best = float((bound_own - bound_other).mean())
    skill = {} if best < 0.05 else {"sync_skill": (own - bound_other) / best}
    return {"sync_r": own, **skill}


def write_clip_values(
    folder: Path,
    prompts: Sequence[str],
    scores: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, np.ndarray],
    bound: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write the file of one evaluated model into the evaluation's folder.

    Args:
        prompts: of the P clips, or of the P groups of S clips.
        scores: metric -> measure as a dictionary, with the bound's value as "bound" where there is one.
        model, bound: metric -> values [P] or [P,S], NaN where a clip has none.

    Raises:
        UserError: it cannot be written.
    """

    def plain(columns: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
        return {
            name: [[float(f"{v:.6g}") if np.isfinite(v) else None for v in row] for row in _rows(values, prompts)]
            for name, values in columns.items()
            if name in metrics()
        }

    kept = {name: {**measure, "n": scores[name].get("n")} for name, measure in reported(scores).items()}
    content = {
        "format": FORMAT,
        "scores": kept,
        "labels": {name: metrics()[name].heading for name in kept if name in metrics()},
        "prompts": list(prompts),
        "model": plain(model),
        "bound": plain(bound or {}),
    }
    return write_result(folder / FILE, content)


def _rows(values: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    return np.asarray(values, float).reshape(len(prompts), -1)  # [P,S]


def reported(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What an evaluation returns of its scores, for run.json: metric -> value, low, high and the bound's value."""
    return {
        name: {key: measure.get(key) for key in ("value", "low", "high", "bound")} for name, measure in scores.items()
    }


def read_clip_values(file: Path) -> ClipValues:
    """Content of a file.

    Raises:
        OSError, ValueError: it cannot be read, or has another form.
    """
    content = load_json(file)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT}")
        prompts = [str(prompt) for prompt in content["prompts"]]
        scores = {str(name): _score(measure) for name, measure in content["scores"].items()}
        model, bound = (
            {str(name): _means(prompts, rows) for name, rows in content[part].items()} for part in ("model", "bound")
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not of the form {FORMAT} ({type(error).__name__}: {error})") from error
    return ClipValues(scores, model, bound, len(set(prompts)))


def _score(measure: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if (value := measure.get(key)) is None else float(value)
        for key in ("value", "low", "high", "n", "bound")
    }


def _means(prompts: Sequence[str], rows: Sequence[Sequence[float | None]]) -> PromptMeans:
    """Mean per prompt. Held-out puppets can have the same caption: their clips are of one prompt, too."""
    if len(rows) != len(prompts):
        raise ValueError(f"it has {len(rows)} values of {len(prompts)} prompts")
    clips: dict[str, list[float]] = defaultdict(list)
    for prompt, value in zip(prompts, np.array(rows, float).mean(1).tolist(), strict=True):  # None is NaN
        clips[prompt].append(value)
    means = {prompt: sum(values) / len(values) for prompt, values in clips.items()}
    return {prompt: value for prompt, value in means.items() if math.isfinite(value)}
