"""Sensitivity of metrics: planted faults against all metrics, as a matrix that shows the blind spots.

    python -m eval.sensitivity output=eval/results/sensitivity

    values = matrix(clean, {"hiss": [weak, strong]}, metrics)     # each a list of {key: value} per clip
    figure(values).savefig("sensitivity.png")

`matrix` and `figure` know nothing of the clips' origin; the command plants the faults into the clips of `eval.talking_faces`.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval import stats
from eval.faults import FAULTS, Fault
from eval.metrics.registry import Measurement, Metric, measurements
from eval.score_cache import DEFAULT
from magihuman.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from eval.clip_file import ClipFile
    from eval.talking_faces import TalkingFace

FORMAT = "magihuman-sensitivity/1"
SMALLEST_EFFECT = 0.2
"""Change below which a fault counts as unseen, in standard deviations of the clean clips."""
LARGEST_EFFECT = 99.0
"""Reported for larger effects, as of metrics that are equal for all clean clips."""
FEWEST_CLIPS = 3

ClipValues = Mapping[str, float | None]
"""Values of one clip by metric; None, or absent, where the metric gives none."""


# ---- The matrix ----


def matrix(
    clean: Sequence[ClipValues],
    faulty: Mapping[str, Sequence[Sequence[ClipValues]]],
    metrics: Mapping[str, Metric],
    faults: Mapping[str, Fault] = FAULTS,
) -> dict[str, Any]:
    """How each metric answers to each fault.

    Args:
        clean: values of every clip without a fault.
        faulty: fault -> for each of its strengths, weak to strong, the values of the same clips in the same order.

    Returns:
        Content of a result file: {"format", "clips", "faults": {name: {"label", "unit", "strengths"}}, "metrics": {key:
        {"title", "direction", "claims", "clean": {"mean", "sd"}, "faults": {name: cell}}}}; a cell is as `cell` returns it.

    Raises:
        ValueError: other numbers of clips or of strengths than expected.
    """
    for name, sets in faulty.items():
        if len(sets) != len(faults[name].strengths) or any(len(found) != len(clean) for found in sets):
            raise ValueError(f"{name}: expected {len(faults[name].strengths)} strengths of {len(clean)} clips each")
    rows = {}
    for key, metric in metrics.items():
        column = _column(clean, key)
        known = column[np.isfinite(column)]
        if not len(known) and not any(np.isfinite(_column(s, key)).any() for sets in faulty.values() for s in sets):
            continue
        spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
        rows[key] = {
            "title": metric.title,
            "direction": metric.direction,
            "claims": [name for name in metric.sees if name in faulty],
            "clean": {"mean": float(known.mean()) if len(known) else None, "sd": spread, "n": len(known)},
            "faults": {name: cell(metric, column, [_column(s, key) for s in sets]) for name, sets in faulty.items()},
        }
    described = {
        name: {"label": faults[name].label, "unit": faults[name].unit, "strengths": list(faults[name].strengths)}
        for name in faulty
    }
    return {"format": FORMAT, "clips": len(clean), "faults": described, "metrics": rows}


def _column(clips: Sequence[ClipValues], key: str) -> np.ndarray:
    return np.array([np.nan if (value := clip.get(key)) is None else value for clip in clips], float)


def cell(metric: Metric, clean: np.ndarray, faulty: Sequence[np.ndarray]) -> dict[str, Any]:
    """Answer of one metric to one fault.

    Worse is: lower (up), higher (down), farther from the number (target with a number), farther from the clean clip in the
    direction of the strongest fault (the rest).

    Args:
        clean: [clips], nan where there is no value; faulty: the same for every strength.

    Returns:
        "verdict": "ordered" (worse at the strongest, and with every step), "seen" (worse at the strongest only), "reversed"
        (better at the strongest), "blind", or "no value" (fewer than `FEWEST_CLIPS` clips have one); "effect": mean change
        to the worse at the strongest, in standard deviations of the clean clips; "low", "high": its 95 % interval over
        clips; "means": of the clean clips and of every strength; "n": clips with all values.
    """
    values = np.stack([clean, *faulty])
    values = values[:, np.isfinite(values).all(0)]
    n = values.shape[1]
    if n < FEWEST_CLIPS:
        return {"verdict": "no value", "effect": None, "low": None, "high": None, "means": None, "n": n}
    if metric.direction == "target" and metric.target is not None:
        worse = np.abs(values - metric.target)
    else:
        worse = values if metric.direction == "down" else -values
    change = worse[1:] - worse[0]
    if metric.direction == "" or (metric.direction == "target" and metric.target is None):
        change = change * (np.sign(change[-1].mean()) or 1.0)
    known = clean[np.isfinite(clean)]
    scale = max(float(known.std(ddof=1)), 1e-3 * abs(float(known.mean())), 1e-9)
    measure = stats.mean(change[-1] / scale)
    effect, low, high = (float(np.clip(x, -LARGEST_EFFECT, LARGEST_EFFECT)) for x in _ends(measure))
    rising = bool((np.diff(np.concatenate([[0.0], change.mean(1)])) > 0).all())
    if effect >= SMALLEST_EFFECT and low > 0:
        verdict = "ordered" if rising else "seen"
    else:
        verdict = "reversed" if effect <= -SMALLEST_EFFECT and high < 0 else "blind"
    return {
        "verdict": verdict, "effect": effect, "low": low, "high": high,
        "means": [float(x) for x in values.mean(1)], "n": n,
    }  # fmt: skip


def _ends(measure: stats.Measure) -> tuple[float, float, float]:
    assert measure.value is not None
    assert measure.low is not None
    assert measure.high is not None
    return measure.value, measure.low, measure.high


def broken_claims(values: Mapping[str, Any]) -> list[str]:
    """Claims of metrics that a matrix does not confirm: "flicker does not order blur: seen"."""
    return [
        f"{key} does not order {fault}: {row['faults'][fault]['verdict']}"
        for key, row in values["metrics"].items()
        for fault in row["claims"]
        if row["faults"][fault]["verdict"] != "ordered"
    ]


def blind_spots(values: Mapping[str, Any]) -> list[str]:
    """Faults that no metric orders."""
    return [
        fault
        for fault in values["faults"]
        if not any(row["faults"][fault]["verdict"] == "ordered" for row in values["metrics"].values())
    ]


# ---- Figure ----

LEAST_WIDTH = 7.5
"""Inches, for the legend and the line below the matrix, which do not wrap."""
COLOURS = {"ordered": "#3b8f5a", "seen": "#a8d5a2", "reversed": "#e8a13a", "blind": "#f1f1f1", "no value": "#ffffff"}
MEANINGS = {
    "ordered": "seen, strengths ordered",
    "seen": "seen, not ordered",
    "reversed": "called better",
    "blind": "blind",
    "no value": "no value (skipped with a reason)",
}


def figure(values: Mapping[str, Any]) -> "Figure":
    """The matrix as a picture: a row per metric, a column per fault, in the cells the effect; claims have a frame."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    faults, rows = values["faults"], values["metrics"]
    size = max(3.6 + 0.46 * len(faults), LEAST_WIDTH), 2.2 + 0.27 * len(rows)
    drawn = Figure(figsize=size, layout="constrained")
    axes = drawn.add_subplot()
    for down, row in enumerate(rows.values()):
        for right, fault in enumerate(faults):
            found = row["faults"][fault]
            claimed = fault in row["claims"]
            axes.add_patch(
                Rectangle((right - 0.5, down - 0.5), 1, 1, fc=COLOURS[found["verdict"]], ec="#d0d0d0", lw=0.5)
            )
            if claimed:
                axes.add_patch(
                    Rectangle((right - 0.46, down - 0.45), 0.92, 0.9, fill=False, ec="black", lw=1.4, zorder=3)
                )
            if found["verdict"] in ("ordered", "seen", "reversed"):
                size = found["effect"]
                shown = f"{size:.0f}" if abs(size) >= 9.95 else f"{size:.1f}"
                dark = found["verdict"] == "ordered"
                axes.text(right, down, shown, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xlim(-0.5, len(faults) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    labels = [f"{fault['label']}" for fault in faults.values()]
    axes.set_xticks(range(len(faults)), labels, rotation=55, ha="left", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows.values()], fontsize=8)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    handles = [Patch(fc=colour, ec="#b0b0b0", label=MEANINGS[name]) for name, colour in COLOURS.items()]
    handles.append(Patch(fc="white", ec="black", lw=1.4, label="the metric claims to see it"))
    about = (
        f"Numbers: change to the worse at the strongest fault, in standard deviations of {values['clips']} clean clips"
    )
    drawn.legend(
        handles=handles, fontsize=8, loc="outside lower center", ncols=3, frameon=False, title=about, title_fontsize=8
    )
    return drawn


# ---- The command ----

CRF = 12
"""Quality of the clips' H.264: nearly without loss."""


def run(
    output: str = "runs/sensitivity",
    clips: int = 14,
    metrics: str = "all",
    faults: str = "all",
    seed: int = 0,
    cache: str | None = DEFAULT,
    progress: bool = True,
) -> dict[str, Any]:
    """Plant faults into made clips of talking faces and see which metric notices which fault.

    Writes sensitivity.json, sensitivity.md and sensitivity.png. Every clip is its own reference, so that metrics that need one
    can be measured. Values are cached: an interrupted run goes on where it was.

    Args:
        output: folder of the results
        clips: number of clips; seven languages by turns
        metrics: all that can run here, cheap (without a model), or names with commas
        faults: all, or names with commas, of eval.faults
        seed: of the clips and of random faults
        cache: SQLite file of known values; none measures all again
        progress: show a bar with the time left

    Returns:
        The content of sensitivity.json.

    Raises:
        UserError: unknown names, fewer than three clips, or packages that are missing.
    """
    from functools import partial

    from eval.output import publish, require_at_least
    from eval.scoring import select

    require_at_least(clips=(clips, FEWEST_CLIPS))
    chosen = list(FAULTS) if faults == "all" else [name.strip() for name in faults.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in FAULTS]:
        raise UserError(f"faults={unknown[0]} is not known; it can be all, {', '.join(FAULTS)}")
    names = [name for name in select(metrics.split(",")) if isinstance(measurements()[name], Measurement)]
    values = measure_faults(clips, names, chosen, seed, Path(cache) if cache else None, progress)
    for claim in broken_claims(values):
        print(f"broken claim: {claim}")
    print(f"faults that no metric orders: {', '.join(blind_spots(values)) or 'none'}")
    return publish(Path(output), "sensitivity", values, {"sensitivity": partial(figure, values)}, text="")


def measure_faults(
    clips: int,
    names: Sequence[str],
    faults: Sequence[str],
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """`matrix` of measurements over made clips with every fault and strength.

    A measurement that does not read what a fault changes keeps the values of the clean clips.

    Args:
        names: measurements; those that lack a package or weights here are said and left out.

    Raises:
        UserError: a package that makes or changes the clips is missing.
    """
    from tqdm import tqdm

    from eval.metrics.registry import missing_package
    from eval.talking_faces import draw_clips

    for package in (
        missing_package("espeakng_loader", "espeakng-loader"),
        missing_package("cv2", "opencv-python-headless"),
    ):
        if package is not None:
            raise UserError(f"the clips cannot be made: {package}")
    begun = time.monotonic()
    able = _able(names)
    drawn = draw_clips(clips, seed)
    keys = [metric.key for name in able for metric in measurements()[name].metrics]
    registered = {metric.key: metric for name in able for metric in measurements()[name].metrics}
    clean: list[ClipValues] = []
    faulty: dict[str, list[list[ClipValues]]] = {fault: [[] for _ in FAULTS[fault].strengths] for fault in faults}
    steps = sum(1 + sum(len(FAULTS[fault].strengths) for fault in faults) for _ in drawn)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=steps, unit="clip", disable=not progress) as bar:
        for number, face in enumerate(drawn):
            truth = _written(face, face, Path(folder) / "truth.mp4")
            own = _values(truth, able, cache)
            clean.append(own)
            bar.update()
            # Sound first, as long as the flow of the clean picture is known.
            for fault in sorted(faults, key=lambda name: FAULTS[name].track == "frames"):
                reading = [name for name in able if _reads(name, FAULTS[fault].track)]
                for place, strength in enumerate(FAULTS[fault].strengths):
                    changed = _written(face, _planted(face, fault, strength, seed), Path(folder) / "faulty.mp4")
                    found = _values(changed, reading, cache)
                    kept = {key: own.get(key) for key in keys if key not in found and not _of(reading, key)}
                    faulty[fault][place].append({**kept, **found})
                    bar.update()
            bar.set_description(f"clip {number + 1} of {clips}")
    values = matrix(clean, faulty, registered)
    return {
        **values,
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
        "left_out": sorted(set(names) - set(able)),
    }


def _able(names: Sequence[str]) -> list[str]:
    """Measurements that can run here; says which cannot."""
    from eval.scoring import plan

    able = []
    for planned in plan(names, {}):
        if planned.missing is None:
            able.append(planned.name)
        else:
            print(f"without {planned.name}: {planned.missing}")
    return able


def _reads(name: str, track: str) -> bool:
    """Whether a measurement reads a track; the timing between the two concerns those that read both."""
    inputs = measurements()[name].inputs
    # A single track shifted in time is another one: silence comes first.
    return ("audio" if track == "timing" else track) in inputs


def _of(names: Sequence[str], key: str) -> bool:
    return any(key == metric.key for name in names for metric in measurements()[name].metrics)


def _planted(face: "TalkingFace", fault: str, strength: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames and audio of a made clip with a fault."""
    from eval.talking_faces import FPS, RATE

    apply = FAULTS[fault].apply
    if apply is None:
        return face.frames, face.spoken(fault, strength).wave
    rng = np.random.default_rng([seed, face.number, list(FAULTS).index(fault)])
    return apply(face.frames, FPS, face.wave, RATE, strength, rng)


def _written(face: "TalkingFace", made: "TalkingFace | tuple[np.ndarray, np.ndarray]", path: Path) -> "ClipFile":
    """A file of a made clip, whose reference is the clip without a fault."""
    from scipy.io import wavfile

    from eval.clip_file import ClipFile
    from eval.talking_faces import FPS, RATE
    from magihuman.media.mp4 import write_mp4

    frames, wave = made if isinstance(made, tuple) else (made.frames, made.wave)
    write_mp4(path, frames, FPS, wave[None], RATE, crf=CRF)
    voice = path.with_name("voice.wav")
    if not isinstance(made, tuple):
        wavfile.write(voice, RATE, face.voice())
    known = {"dialogue": face.sentence, "language": face.language, "voice": voice}
    truth = ClipFile(path.with_name("truth.mp4"), f"face{face.number}", **known)  # type: ignore[arg-type]
    return ClipFile(path, f"face{face.number}", reference=truth, **known)  # type: ignore[arg-type]


def _values(clip: "ClipFile", names: Sequence[str], cache: Path | None) -> dict[str, float | None]:
    from eval.scoring import score

    row = score([clip], names, cache=cache, progress=False).rows[0]
    return {key: value.value for key, value in row.values.items()}


if __name__ == "__main__":
    from magihuman.cli import run as run_command

    run_command(run, "python -m eval.sensitivity")
