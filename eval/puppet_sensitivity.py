"""Sensitivity of the puppets' metrics: planted faults against all of them, as a matrix that shows the blind spots.

    python -m eval.puppet_sensitivity output=eval/results/sensitivity_puppets

As `eval.sensitivity`, which measures clips of talking faces. The last column is no fault: the puppets through the codec, which
is the best that a model can reach.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.tiny.puppets import Puppet
from eval.clips import Clips, ground_truth, held_out, through_codec
from eval.faults import Applied, Fault
from eval.metrics.puppet_clips import CLIP_METRICS
from eval.output import publish, require_at_least
from eval.puppet_faults import PUPPET_FAULTS, drawn
from eval.puppet_scores import score_clip
from eval.sensitivity import figure, matrix
from magihuman.errors import UserError

CODEC = Fault("codec", "through the codec (no fault)", "", (1,), None, "frames")


def _values(clip: Applied, caption: str) -> dict[str, float | None]:
    scored = score_clip(*clip, caption)
    return {key: metric.of(scored) for key, metric in CLIP_METRICS.items()}


def puppet_matrix(puppets: Sequence[Puppet], faults: Sequence[str], progress: bool = False) -> dict[str, Any]:
    """How each metric answers to each fault, see `eval.sensitivity.matrix`.

    Args:
        puppets: at least three; the next one in the list lends its mouth and voice.
        faults: names in `PUPPET_FAULTS`.
    """
    from tqdm import tqdm

    clean = [_values(drawn(puppet), puppet.caption) for puppet in tqdm(puppets, "clean", disable=not progress)]
    faulty: dict[str, list[list[dict[str, float | None]]]] = {}
    steps = [(name, strength) for name in faults for strength in PUPPET_FAULTS[name].fault.strengths]
    for name, strength in tqdm(steps, "faults", disable=not progress):
        rows = []
        for number, puppet in enumerate(puppets):
            rng = np.random.default_rng([number, list(PUPPET_FAULTS).index(name)])  # the same for all strengths
            clip = PUPPET_FAULTS[name].plant(puppet, puppets[(number + 1) % len(puppets)], strength, rng)
            rows.append(_values(clip, puppet.caption))
        faulty.setdefault(name, []).append(rows)
    from magihuman.codecs.bundle import load_bundle

    coded: Clips = through_codec(ground_truth(puppets), load_bundle("tiny"))
    clips = zip(coded.frames, coded.waves, coded.captions, strict=True)
    faulty[CODEC.name] = [[_values((frames, wave), caption) for frames, wave, caption in clips if wave is not None]]
    described = {name: found.fault for name, found in PUPPET_FAULTS.items()} | {CODEC.name: CODEC}
    return matrix(clean, faulty, CLIP_METRICS, described)


def run(clips: int = 40, faults: str = "all", output: str | None = None, progress: bool = True) -> dict[str, Any]:
    """Plant faults into held-out puppets and measure them with all metrics of puppets.

    Prints the matrix; writes sensitivity.json, sensitivity.md and sensitivity.png.

    Args:
        clips: number of puppets
        faults: names with commas, or all
        output: folder; none is runs/sensitivity/puppets
        progress: show bars

    Raises:
        UserError: an unknown fault, or too few clips.
    """
    require_at_least(clips=(clips, 3))
    names = list(PUPPET_FAULTS) if faults == "all" else [name.strip() for name in faults.split(",") if name.strip()]
    for name in names:
        if name not in PUPPET_FAULTS:
            raise UserError(f"faults={name} is not known; it can be all, {', '.join(PUPPET_FAULTS)}")
    start = time.perf_counter()
    values = puppet_matrix(held_out(clips), names, progress)
    values["seconds"] = round(time.perf_counter() - start, 1)
    folder = Path(output) if output else Path("runs") / "sensitivity" / "puppets"
    return publish(folder, "sensitivity", values, {"sensitivity": partial(figure, values)})


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.puppet_sensitivity")
