"""Run folders as the comparison sees them: settings, status, curves, scores, clips, parents. Nothing in them is executed.

    read_folder(Path("runs/dmd2/a")).scores["compare: sync_skill"]["value"]

What cannot be read is a `reason`, never an exception: one broken folder must not hide 499 others.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from eval.clip_values import FILE, SCORE, ClipValues, read_clip_values
from magihuman.config import WITHOUT_EFFECT
from magihuman.io.text import load_json, read_text
from magihuman.training.lock import state_of

STATES = ("finished", "running", "queued", "preempted", "interrupted", "failed", "lost", "missing", "broken")
"""Statuses of a run: those of run.json, "lost" (killed), "missing" (no folder yet), "broken" (run.json cannot be read)."""
NO_SETTING = (*WITHOUT_EFFECT, "sweep", "provenance")
"""Settings that do not tell two trainings apart."""
_NO_GROUP = tuple(f"{name}." for name in NO_SETTING)
MAX_SAMPLES = 8
"""Sampled steps of a run that are shown: the last one and others, evenly."""
MAX_COLUMNS, MAX_CURVES = 2000, 256 << 20
"""Columns and bytes of a metrics.csv that is read."""


class Series(NamedTuple):
    """A logged metric: steps [N], ascending, and values [N], float64; values may be NaN or infinite."""

    steps: np.ndarray
    values: np.ndarray


class RunClip(NamedTuple):
    """A clip that a run has made.

    Attributes:
        kind: "step" of a sample during the training, or the name of the evaluation.
        step: of the training, -1 at its end.
        prompt, seed: what it was made of; the seed is that of its number in the evaluation.
        path: of the mp4.
    """

    kind: str
    step: int
    prompt: str
    seed: int
    path: Path


@dataclass
class RunRecord:
    """A training run.

    Attributes:
        name: short name, unique on the page.
        place: its folder as it was given, or its address at W&B.
        status: one of `STATES`; reason: why it is not finished, or what of it could not be read.
        settings: dotted name -> value as text; partial: they are those of a sweep's point only, which has not begun.
        metrics: name -> curve.
        scores: "evaluation: metric" -> {"value", "low", "high", "n", "bound"}.
        values: evaluation -> values per clip.
        parents: [{"role", "name", "sha256"}] of run.json; sha256: of its export where it is recorded.
        seconds: of training; devices: that trained at once; batch: samples per step; None where unknown.
        folder: None for a run that is known from W&B only.
    """

    name: str
    place: str
    status: str = "finished"
    reason: str = ""
    recipe: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    partial: bool = False
    metrics: dict[str, Series] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, ClipValues] = field(default_factory=dict)
    clips: list[RunClip] = field(default_factory=list)
    parents: list[dict[str, str]] = field(default_factory=list)
    sha256: str = ""
    step: int | None = None
    max_steps: int | None = None
    seconds: float | None = None
    devices: int = 1
    batch: int | None = None
    on_gpu: bool = False
    folder: Path | None = None

    @property
    def hours(self) -> float | None:
        """Device-hours of training."""
        return None if self.seconds is None else self.seconds * self.devices / 3600

    @property
    def samples(self) -> int | None:
        """Samples that it was trained on."""
        return None if self.batch is None or self.step is None else self.batch * self.step

    def add_reason(self, text: str) -> None:
        """Add a line to the reason."""
        self.reason = "; ".join(filter(None, (self.reason, " ".join(text.split())[:300])))

    def last(self, metric: str) -> float | None:
        """Last value of a metric."""
        series = self.metrics.get(metric)
        return None if series is None or not len(series.values) else float(series.values[-1])


# ---- Settings ----


# In C: 500 files take seconds, not a minute.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _load_yaml(text: str) -> Any:
    """Plain values of YAML without aliases, which can make a small file a huge value."""
    if "&" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_LOADER)):
        raise ValueError("it holds an alias")
    return yaml.load(text, Loader=_LOADER)


def flatten(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting; lists are values."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, node


def settings_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Settings that may tell trainings apart, as text.

    References to other settings are followed, and the run's own folder becomes "${folder}", so that run folders, which keep
    the references, and W&B, which keeps the values, give the same.
    """
    flat = dict(flatten(config))
    folder = flat.get("folder")

    def text(path: str, value: Any, depth: int = 0) -> Any:
        if isinstance(value, str):
            if "${" in value and (whole := re.fullmatch(r"\$\{([\w.]+)\}", value)) and depth < 10:
                target = _absolute(path, whole[1])
                if target in flat and target != "folder":
                    return text(target, flat[target], depth + 1)
                return value if target == "folder" else _below(config, target, value)
            return value.replace(str(folder), "${folder}") if folder else value
        return value

    found = {}
    for path, value in flat.items():
        if path in NO_SETTING or path.startswith(_NO_GROUP):
            continue
        plain = text(path, value)
        for name, inner in flatten(plain, path) if isinstance(plain, Mapping) else [(path, plain)]:
            found[name] = _shown(inner)
    return found


def _absolute(path: str, target: str) -> str:
    """The dotted name that "..a" in the setting `path` refers to."""
    dots = len(target) - len(target.lstrip("."))
    above = path.split(".")[:-dots] if dots else []
    return ".".join([*above, target[dots:]])


def _below(config: Mapping[str, Any], path: str, default: Any) -> Any:
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def _shown(value: Any) -> str:
    if value is None or value in ({}, []):
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# ---- Curves ----


def read_metrics(file: Path) -> dict[str, Series]:
    """Curves of a metrics.csv; a torn last line is left out.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    if file.stat().st_size > MAX_CURVES:
        raise ValueError(f"it has more than {MAX_CURVES >> 20} MiB")
    data = file.read_bytes()
    head, _, body = data.partition(b"\n")
    names = next(csv.reader([head.decode("utf-8", "replace").strip("\r")]), [])
    if not names or names[0] != "step":
        raise ValueError("it has no column step")
    if len(names) > MAX_COLUMNS:
        raise ValueError(f"it has {len(names)} columns")
    body = body[: body.rfind(b"\n") + 1].replace(b"\r", b"")
    table = _parse(body, len(names))
    order = np.argsort(table[:, 0], kind="stable")
    table = table[order]
    cells = {}
    for number, name in enumerate(names[1:], 1):
        known = ~np.isnan(table[:, number])
        if known.any():
            cells[name] = Series(table[known, 0], table[known, number])
    return cells


def _parse(body: bytes, columns: int) -> np.ndarray:
    """Numbers [rows, columns] of lines; NaN where a cell is empty. numpy's parser is ten times as fast as csv's."""
    if not body:
        return np.zeros((0, columns))
    filled = body.replace(b",,", b",nan,").replace(b",,", b",nan,").replace(b",\n", b",nan\n")
    try:
        return np.loadtxt(io.BytesIO(filled), delimiter=",", ndmin=2, comments=None, usecols=range(columns))
    except (ValueError, IndexError):
        return _parse_slowly(body, columns)


def _parse_slowly(body: bytes, columns: int) -> np.ndarray:
    """Lines with as many cells as the header and numbers only; others were torn by a kill."""
    rows = []
    for row in csv.reader(body.decode("utf-8", "replace").split("\n")):
        try:
            if len(row) == columns:
                rows.append([float(cell) if cell else np.nan for cell in row])
        except ValueError:
            continue
    return np.array(rows, float).reshape(len(rows), columns)


def thin(series: Series, points: int) -> Series:
    """At most `points` of a curve: the least and the greatest of equal parts, the first and the last value."""
    count = len(series.steps)
    if count <= points:
        return series
    parts = max(1, (points - 2) // 2)
    size = -(-(count - 2) // parts)
    inner = np.pad(series.values[1:-1], (0, parts * size - (count - 2)), mode="edge").reshape(parts, size)
    inner = np.where(np.isfinite(inner), inner, 0.0)
    first = 1 + size * np.arange(parts)
    chosen = np.unique(np.minimum([first + inner.argmin(1), first + inner.argmax(1)], count - 1))
    chosen = np.union1d(chosen, [0, count - 1])
    return Series(series.steps[chosen], series.values[chosen])


# ---- Run folders ----


def read_folder(folder: Path) -> RunRecord:
    """What is known of a run folder; its faults are in `status` and `reason`."""
    run = RunRecord(folder.name, str(folder), folder=folder)
    if not folder.is_dir():
        run.status, run.reason = "missing", "there is no folder yet"
        return run
    try:
        record = load_json(folder / "run.json")
        if not isinstance(record, dict):
            raise ValueError("it is no JSON object")
        _apply_record(run, record)
    except FileNotFoundError:
        run.status, run.reason = "broken", "it has no run.json"
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        run.status, run.reason = "broken", ""
        run.add_reason(f"run.json cannot be read: {error}")
    for read, file in ((_apply_config, "config.yaml"), (_apply_metrics, "metrics.csv")):
        try:
            read(run, folder / file)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            run.add_reason(f"{file} cannot be read: {error}")
    for kept in sorted(folder.glob(f"*/{FILE}")):
        try:
            values = read_clip_values(kept)
        except (OSError, ValueError) as error:
            run.add_reason(f"{kept.relative_to(folder)} cannot be read: {error}")
            continue
        evaluation = kept.parent.name
        run.values[evaluation] = values
        run.scores |= {f"{evaluation}: {name}": score for name, score in values.scores.items()}
    run.clips = [*_training_clips(run, folder), *_evaluation_clips(folder)]
    return run


def _apply_record(run: RunRecord, record: Mapping[str, Any]) -> None:
    """Fill in what run.json says."""
    status = str(record.get("status", "running"))
    if status == "running" and run.folder is not None:
        status = state_of(run.folder) or status
    run.status = status if status in STATES else "running"
    run.recipe = str(record.get("recipe", "")).rpartition(".")[2]
    run.add_reason(_reason_of(run.status, record))
    progress = record.get("progress") or {}
    step = progress.get("step") if run.status == "running" else None
    step = record.get("steps") if step is None else step
    run.step = None if step is None else int(step)
    run.parents = [
        {key: str(parent.get(key, "")) for key in ("role", "name", "sha256")} for parent in record.get("parents") or []
    ]
    run.sha256 = str((record.get("export") or {}).get("sha256", ""))
    for name, result in (record.get("results") or {}).items():
        run.scores |= scores_of(str(name), result)


def _reason_of(status: str, record: Mapping[str, Any]) -> str:
    """Why a run has its status, from its run.json."""
    stage = f"in {record['stage']}" if record.get("stage") else ""
    if status == "failed":
        return str(record.get("error", ""))
    if status == "preempted" and record.get("requeue") not in (None, "accepted"):
        told = str(record["requeue"])
        return f"{stage}; {'' if told.startswith('held: ') else 'not requeued: '}{told}".lstrip("; ")
    if status == "lost":
        where = f"on {record['host']}" if record.get("host") else ""
        job = f"Slurm job {record['job']}" if record.get("job") else ""
        return f"killed {' '.join(filter(None, (stage, where, job)))}".strip()
    left = (record.get("progress") or {}).get("seconds_left") if status == "running" else None
    return f"{stage}, about {left / 60:.0f} min left" if left else stage if status in ("running", "preempted") else ""


def scores_of(evaluation: str, result: Any) -> dict[str, dict[str, Any]]:
    """Scores among what an evaluation returned: its entries with a value."""
    if not isinstance(result, Mapping):
        return {}
    return {
        f"{evaluation}: {metric}": {key: _number(measure.get(key)) for key in SCORE}
        for metric, measure in result.items()
        if isinstance(measure, Mapping) and "value" in measure
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _apply_config(run: RunRecord, file: Path) -> None:
    config = _load_yaml(read_text(file, "config.yaml", 16 << 20))
    if not isinstance(config, dict):
        raise ValueError("it holds no settings")
    apply_settings(run, config)


def apply_settings(run: RunRecord, config: Mapping[str, Any]) -> None:
    """Fill in settings, and what follows from them: longest step, devices, samples."""
    run.settings = settings_of(config)
    trainer = config.get("trainer") or {}
    run.max_steps = _whole(trainer.get("max_steps"))
    run.devices = (_whole(trainer.get("devices")) or 1) * (_whole(trainer.get("nodes")) or 1)
    run.on_gpu = trainer.get("accelerator") == "cuda"
    run.recipe = run.recipe or str((config.get("recipe") or {}).get("_target_", "")).rpartition(".")[2]
    batch = _whole(((config.get("data") or {}).get("module") or {}).get("batch_size"))
    if batch is not None:
        run.batch = batch * (_whole(trainer.get("accumulate")) or 1)


def apply_curves(run: RunRecord, metrics: dict[str, Series]) -> None:
    """Fill in curves, and what follows from them: the step and the seconds."""
    run.metrics = metrics
    if metrics:
        reached = int(max(series.steps[-1] for series in metrics.values()))
        run.step = reached if run.step is None else max(run.step, reached)
    run.seconds = run.last("seconds")
    run.on_gpu = run.on_gpu or "mfu" in metrics


def _apply_metrics(run: RunRecord, file: Path) -> None:
    apply_curves(run, read_metrics(file))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _training_clips(run: RunRecord, folder: Path) -> Iterator[RunClip]:
    """Sample clips during the training; number NN is of prompt and seed NN."""
    try:
        prompts = json.loads(run.settings.get("prompts", "[]"))
    except ValueError:
        prompts = []
    prompts = prompts if isinstance(prompts, list) else []
    steps = sorted(
        (int(found[1]), path)
        for path in (folder / "samples").glob("step-*")
        if (found := re.fullmatch(r"step-(\d{1,12})", path.name)) and path.is_dir()
    )
    if len(steps) > MAX_SAMPLES:
        places = np.linspace(0, len(steps) - 1, MAX_SAMPLES).round().astype(int)
        steps = [steps[place] for place in places]
    for step, path in steps:
        for clip in sorted(path.glob("*.mp4")):
            if clip.stem.isdigit():
                number = int(clip.stem)
                prompt = str(prompts[number]) if number < len(prompts) else f"prompt {number}"
                yield RunClip("step", step, prompt, number, clip)


def _evaluation_clips(folder: Path) -> Iterator[RunClip]:
    """Clips that evaluations kept of the run's own model, each with its caption."""
    for clip in sorted(folder.glob("*/clips/*.mp4")):
        kind, _, number = clip.stem.rpartition("-")
        caption = clip.with_suffix(".txt")
        if kind != "teacher" and number.isdigit() and caption.is_file():
            with caption.open(encoding="utf-8", errors="replace") as file:
                prompt = file.read(2000).strip()
            yield RunClip(clip.parents[1].name, -1, prompt, int(number), clip)
