"""Scoring of clips: every measurement on every clip, as a value or null with a status and a reason, from a cache where known.

    scored = score(read_clips(Path("clips")), ["loudness"])
    scored.rows[0].values["loudness"], scored.summary()["loudness"]

Values, and reasons that follow from the clip's content, are cached; unexpected errors are not, and are tried again by the next
run. Measurements without a model are made together, clip by clip, so that a clip is decoded once; those with a model one after
the other, so that one model is in memory. A model that takes batches gets them (`eval.metrics.registry.InBatches`); a clip
that cannot be measured leaves the others of its batch alone.
"""

import hashlib
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.clip_file import ClipFile, MeasurementError, NotMeasured, UnreadableClip
from eval.metrics.registry import (
    InBatches,
    Measurement,
    MissingDependency,
    SetMeasurement,
    measurements,
    metrics,
    plain_options,
)
from eval.score_cache import ScoreCache
from eval.score_rows import FAILED, OK, SKIPPED, UNAVAILABLE, ClipRow, Value
from eval.score_summary import summarise
from magihuman.errors import UserError

CHEAP, ALL = "cheap", "all"
MEMORY_PER_WORKER = 32 * 10**8
"""Bytes: a clip of 5 s in 1080p and its reference take 3.15 GB (`cost_1080p.json`)."""
_EXPECTED = (NotMeasured, MeasurementError, UnreadableClip)
"""Follow from the clip alone; any other error may be the machine's."""
Options = Mapping[str, Mapping[str, Any]]
"""Settings of measurements: measurement -> setting -> value, a text as on the command line or a value."""


@dataclass
class Scored:
    """Result of `score`.

    Attributes:
        rows: a row per clip, in the clips' order.
        sets: values of set measurements by key, each {"value", "low", "high", "n", "status", "reason"}, and "reference", a hash
            of the reference clips that were used.
        used: measurement -> {"version", "identity"} of those that could run.
        measured: how many values had to be measured; 0 where all came from the cache.
    """

    rows: list[ClipRow]
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    used: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: int = 0

    def summary(self) -> dict[str, dict[str, Any]]:
        """Metric -> value, low, high, n, total, status, reason; see `eval.score_summary.summarise`."""
        return {**summarise(self.rows), **self.sets}


@dataclass
class _Plan:
    """A measurement with its options, and what is missing to run it."""

    name: str
    measurement: Measurement | SetMeasurement
    options: Any
    missing: MissingDependency | None
    identity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batches(self) -> InBatches | None:
        """How it measures several clips at once; None where it takes one at a time."""
        measure = self.measurement.measure if isinstance(self.measurement, Measurement) else None
        return measure if isinstance(measure, InBatches) else None


def select(names: Sequence[str], prompts: Sequence[str] | None = None) -> list[str]:
    """Names of measurements for what a user lists: measurements, metric keys, cheap, all.

    Args:
        prompts: of the clips, where they are known: cheap has only what applies to one of them.

    Raises:
        UserError: an unknown name, with similar ones.
    """
    known, owner = measurements(), _owners()
    chosen: dict[str, None] = {}
    for name in names:
        if name == ALL:
            chosen.update(dict.fromkeys(known))
        elif name == CHEAP:
            chosen.update(dict.fromkeys(n for n, one in known.items() if not one.costly and _applies(one, prompts)))
        elif name in known or name in owner:
            chosen[name if name in known else owner[name]] = None
        else:
            from difflib import get_close_matches

            near = get_close_matches(name, [*known, *owner, CHEAP, ALL], n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"it can be cheap, all, {', '.join(known)}"
            raise UserError(f"metrics={name} is not known; {hint}")
    if not chosen:
        raise UserError("metrics= is empty; give cheap, all or names, see `python -m eval.doctor`")
    return list(chosen)


def _applies(measurement: Measurement | SetMeasurement, prompts: Sequence[str] | None) -> bool:
    """Whether a measurement applies to a clip of one of the prompts; true where they are not known."""
    if prompts is None or not isinstance(measurement, Measurement):
        return True
    return any(map(measurement.applies_to, prompts))


def default_workers(processes: int = 1) -> int:
    """Processes for measurements without a model: half of the cores, at most 8, one per `MEMORY_PER_WORKER` of free memory.

    Args:
        processes: that start workers on this machine, as of torchrun; they share it.
    """
    import psutil

    free = psutil.virtual_memory().available // MEMORY_PER_WORKER
    return max(1, int(min(8, (os.cpu_count() or 2) // 2, free)) // processes)


def _owners() -> dict[str, str]:
    """Metric -> measurement that gives it, of those that are not called the same."""
    known = measurements()
    return {m.key: name for name, one in known.items() for m in one.metrics if m.key not in known}


def plan(names: Sequence[str], options: Options) -> list[_Plan]:
    """Measurements with checked options, and what each lacks; nothing is loaded.

    Raises:
        UserError: an unknown name or option, or a value of the wrong type.
    """
    from magihuman.cli import settings

    known, owner = measurements(), _owners()
    for name in options:
        first = next(iter(options[name]), "")
        if name in owner:
            raise UserError(f"{name}.{first}: {name} is a metric of {owner[name]}; give {owner[name]}.{first}=...")
        if name not in known:
            raise UserError(f"{name}.{first}: there is no measurement {name!r}; see `python -m eval.doctor`")
        if name not in names:
            raise UserError(f"{name}.{first} has no effect: {name} is not in metrics=")
    plans = []
    for name in names:
        measurement = known[name]
        given = options.get(name, {})
        made = None
        if measurement.options is not None:
            texts = [f"{key}={value}" for key, value in given.items() if isinstance(value, str)]
            try:
                values = settings(measurement.options, texts, f"{name}.OPTION=VALUE")
            except UserError as error:
                raise UserError(f"{name}.: {error}") from error
            made = measurement.options(**values, **{k: v for k, v in given.items() if not isinstance(v, str)})
        elif given:
            raise UserError(f"{name} has no options, and {name}.{next(iter(given))} was given")
        one = _Plan(name, measurement, made, measurement.missing(made))
        if one.missing is None and measurement.identity:
            one.identity = measurement.identity(made)
        elif one.missing is None:
            unused = {"batch"} if one.batches else set()
            one.identity = {key: value for key, value in plain_options(made).items() if key not in unused}
        plans.append(one)
    return plans


def score(
    clips: Sequence[ClipFile],
    names: Sequence[str],
    options: Options | None = None,
    cache: Path | None = None,
    progress: bool = True,
    workers: int = 1,
) -> Scored:
    """Measure clips.

    Args:
        names: measurements, metric keys, "cheap" or "all".
        options: measurement -> setting -> value.
        cache: SQLite file of known values; None keeps nothing.
        progress: show a bar.
        workers: processes for measurements without a model.

    Returns:
        Rows in the order of the clips: a clip that cannot be read has a row, too.

    Raises:
        UserError: an unknown name or option, or a cache that cannot be used.
    """
    plans = plan(select(names, [clip.prompt for clip in clips]), options or {})
    with ScoreCache(cache) as store:
        return _Run(clips, plans, store, progress, workers).result()


class _Run:
    """One call of `score`."""

    def __init__(
        self, clips: Sequence[ClipFile], plans: Sequence[_Plan], cache: ScoreCache, progress: bool, workers: int
    ) -> None:
        self.clips, self.plans, self.cache, self.progress, self.workers = clips, plans, cache, progress, workers
        self.hashes: dict[Path, str] = {}
        self.rows = [
            ClipRow(c.name, c.group, c.prompt, c.language, self._hash(c.path), part=c.part, inputs=self._inputs(c))
            for c in clips
        ]
        self.measured = 0

    def result(self) -> Scored:
        able = [p for p in self.plans if p.missing is None]
        for unable in (p for p in self.plans if p.missing is not None):
            for row in self.rows:
                self._fill(row, unable, {}, UNAVAILABLE, str(unable.missing))
        per_clip = [p for p in able if isinstance(p.measurement, Measurement)]
        alone = [p for p in per_clip if p.measurement.costly or p.batches]
        together = [p for p in per_clip if p not in alone]
        for group in [together, *([p] for p in alone)]:
            self._measure(group)
        sets: dict[str, dict[str, Any]] = {}
        for p in self.plans:
            if isinstance(p.measurement, SetMeasurement):
                sets.update(self._compare(p))
        self._rates()
        for row in self.rows:
            row.values = {key: row.values[key] for key in metrics() if key in row.values}
        used = {p.name: {"version": p.measurement.version, "identity": dict(p.identity)} for p in able}
        return Scored(self.rows, sets, used, self.measured)

    def _rates(self) -> None:
        """Frame rates of the clips, for comparisons; cached, since a file has to be opened for its own."""
        keys = [row.sha256 and self.cache.key(fact="fps", clip=row.sha256) for row in self.rows]
        known = self.cache.get(key for key in keys if key)
        fresh: dict[str, bytes] = {}
        for row, clip, key in zip(self.rows, self.clips, keys, strict=True):
            if key and key in known:
                row.fps = float(known[key])
                continue
            try:
                row.fps = clip.fps
            except UnreadableClip:  # its values say so
                continue
            if key:
                fresh[key] = repr(row.fps).encode()
        self.cache.put(fresh)

    def _hash(self, path: Path | None) -> str | None:
        if path is None:
            return None
        if path not in self.hashes:
            try:
                self.hashes[path] = self.cache.sha256(path)
            except OSError:
                return None
        return self.hashes[path]

    def _inputs(self, clip: ClipFile) -> str:
        """Hash of a clip's prompt, dialogue, language, reference, voice and image."""
        reference = self._hash(clip.reference.path) if clip.reference else None
        return self.cache.key(
            prompt=clip.prompt, dialogue=clip.dialogue, language=clip.language, reference=reference,
            voice=self._hash(clip.voice), image=self._hash(clip.image),
        )[:16]  # fmt: skip

    def _key(self, p: _Plan, clip: ClipFile) -> str | None:
        """Key of a measurement of a clip; None where the file cannot be read."""
        if (content := self._hash(clip.path)) is None:
            return None
        seen = _seen(p.measurement, clip)
        return self.cache.key(
            measurement=p.name, version=p.measurement.version, identity=dict(p.identity), clip=content,
            reference=self._hash(seen.reference.path) if seen.reference else None, prompt=seen.prompt,
            dialogue=seen.dialogue, language=seen.language, voice=self._hash(seen.voice), image=self._hash(seen.image),
        )  # fmt: skip

    def _bar(self, total: int, what: str) -> Any:
        from tqdm import tqdm

        return tqdm(total=total, desc=what, unit="clip", disable=not self.progress or total == 0)

    # ---- Measurements of single clips ----

    def _measure(self, group: Sequence[_Plan]) -> None:
        keys = {(p.name, index): self._key(p, clip) for p in group for index, clip in enumerate(self.clips)}
        known = self.cache.get(key for key in set(keys.values()) if key is not None)
        todo: list[tuple[int, list[_Plan]]] = []
        for index, row in enumerate(self.rows):
            left = []
            for p in group:
                stored = known.get(keys[p.name, index] or "")
                if stored is None:
                    left.append(p)
                else:
                    self._fill(row, p, **json.loads(stored))
            if left:
                todo.append((index, left))
        if not todo:
            return
        models = self._models(group)
        what = "measuring" if len(group) > 1 else f"measuring {group[0].name}"
        with self._bar(len(todo), what) as bar:
            for index, found in self._found(todo, models):
                fresh = {}
                for p in group:
                    if p.name not in found:
                        continue
                    content, keep = found[p.name]
                    self._fill(self.rows[index], p, **content)
                    key = keys[p.name, index]
                    self.measured += 1
                    if keep and key is not None:
                        fresh[key] = json.dumps(content).encode()
                self.cache.put(fresh)
                bar.update()

    def _models(self, group: Sequence[_Plan]) -> dict[str, Any]:
        """What `load` returns, by name; a measurement that cannot load is missing from now on."""
        models = {}
        for p in group:
            if p.measurement.load is None:
                models[p.name] = p.options
                continue
            try:
                models[p.name] = p.measurement.load(p.options)
            except (UserError, OSError, ImportError, ValueError, RuntimeError) as error:
                p.missing = MissingDependency(
                    f"{p.name} cannot be loaded ({_words(error)})", "see `python -m eval.doctor`"
                )
        return models

    def _found(
        self, todo: Sequence[tuple[int, list[_Plan]]], models: Mapping[str, Any]
    ) -> Iterator[tuple[int, dict[str, tuple[dict[str, Any], bool]]]]:
        """Content by measurement of every clip, and whether it may be cached; in any order."""
        first = todo[0][1][0]
        if first.batches and first.missing is None:
            yield from self._in_batches(first, first.batches, [index for index, _ in todo], models[first.name])
            return
        light = all(p.measurement.load is None for _, left in todo for p in left)
        if self.workers > 1 and light and len(todo) > 1:
            import multiprocessing
            from concurrent.futures import ProcessPoolExecutor
            from concurrent.futures.process import BrokenProcessPool

            jobs = [(index, self.clips[index], [(p.name, p.options) for p in left]) for index, left in todo]
            context = multiprocessing.get_context("spawn")
            try:
                with ProcessPoolExecutor(min(self.workers, len(jobs)), mp_context=context) as pool:
                    yield from pool.map(_measure_in_worker, jobs, chunksize=1)
            except BrokenProcessPool as error:
                raise UserError(
                    f"a process that measured clips was killed, perhaps for want of memory; run again with workers=1 (now "
                    f"{self.workers})"
                ) from error
            return
        for index, left in todo:
            clip = self.clips[index]
            found = {}
            for p in left:
                if p.missing is not None:
                    found[p.name] = ({"values": {}, "status": UNAVAILABLE, "reason": str(p.missing)}, False)
                else:
                    found[p.name] = _measure_one(p.measurement, clip, models[p.name])
            clip.release()
            yield index, found

    def _in_batches(
        self, p: _Plan, batches: InBatches, todo: Sequence[int], model: Any
    ) -> Iterator[tuple[int, dict[str, tuple[dict[str, Any], bool]]]]:
        """As `_found`, of a measurement that takes batches: clips that lack something take no place in one."""
        size, waiting = int(p.options.batch), {}
        for number, index in enumerate(todo):
            clip = self.clips[index]
            try:
                _require(p.measurement, clip)
                waiting[index] = batches.prepare(_seen(p.measurement, clip), model)
            except Exception as error:
                yield index, {p.name: _content(p.measurement, error)}
            finally:
                clip.release()
            if waiting and (len(waiting) >= size or number == len(todo) - 1):
                found, problem = _together(batches, list(waiting.values()), model)
                if problem:
                    note = (
                        f"{p.name}: a batch of {len(waiting)} clips failed ({problem}); they were measured one by one"
                    )
                    if all(isinstance(one, (Mapping, *_EXPECTED)) for one in found):
                        # No clip was at fault: more batches of this size would fail, too, each after its time.
                        size = len(waiting) // 2
                        note += f", and the next batches have {size}; {p.name}.batch={size} avoids this"
                    self._say(note)
                for done, one in zip(waiting, found, strict=True):
                    yield done, {p.name: _content(p.measurement, one)}
                waiting = {}

    @staticmethod
    def _say(text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)

    def _fill(
        self,
        row: ClipRow,
        p: _Plan,
        values: Mapping[str, Any],
        status: str,
        reason: str = "",
        texts: Mapping[str, str] | None = None,
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        """Put the content of a measurement into a row."""
        if isinstance(p.measurement, SetMeasurement):
            return
        row.texts.update(texts or {})
        for metric in p.measurement.metrics:
            value = values.get(metric.key)
            if value is not None:
                row.values[metric.key] = Value(value)
            elif status == OK:
                row.values[metric.key] = Value(None, SKIPPED, (reasons or {})[metric.key])
            else:
                row.values[metric.key] = Value(None, status, reason)

    # ---- Measurements of sets ----

    def _compare(self, p: _Plan) -> dict[str, dict[str, Any]]:
        """Values of a set measurement; all None with a reason where it cannot be had."""
        measurement = p.measurement
        assert isinstance(measurement, SetMeasurement)

        def none(status: str, reason: str, n: int = 0) -> dict[str, dict[str, Any]]:
            empty = {"value": None, "low": None, "high": None, "n": n, "total": len(self.clips)}
            return {metric.key: {**empty, "status": status, "reason": reason} for metric in measurement.metrics}

        if p.missing is not None:
            return none(UNAVAILABLE, str(p.missing))
        # By content: clips of one prompt share a reference, and a kernel distance counts no clip twice.
        found_by: dict[str, tuple[ClipFile, str]] = {}
        for c in self.clips:
            if c.reference is not None:
                found_by.setdefault(self._hash(c.reference.path) or c.name, (c.reference, c.group))
        references = [clip for clip, _ in found_by.values()]
        if not references:
            return none(SKIPPED, "there are no reference clips; give reference=FOLDER")
        load = _LazyModel(p)
        own, lost, failed = self._features(p, self.clips, load, "clips")
        real, lost_real, failed_real = self._features(p, references, load, "reference clips")
        if p.missing is not None:
            return none(UNAVAILABLE, str(p.missing))
        if len(real) < len(references):
            lost = f"{len(references) - len(real)} of {len(references)} reference clips are left out ({lost_real})"
        counts = {"failed": failed} if failed else {}
        if not own or not real:
            status = FAILED if failed or failed_real else SKIPPED
            return {key: {**measure, **counts} for key, measure in none(status, lost).items()}
        try:
            groups, of_reference = [self.clips[i].group for i in own], [list(found_by.values())[i][1] for i in real]
            found = measurement.compare(list(own.values()), list(real.values()), groups, of_reference)
        except NotMeasured as error:
            return none(SKIPPED, _words(error), len(own))
        except Exception as error:
            return none(FAILED, f"{type(error).__name__}: {_words(error)}", len(own))
        result = none(SKIPPED, "not defined for these clips", len(own))
        used = hashlib.sha256("".join(sorted(list(found_by)[i] for i in real)).encode()).hexdigest()[:16]
        clips_of = Counter(row.group for row in self.rows)
        for key, value in found.items():
            plain: dict[str, Any]
            plain = value.to_dict() if hasattr(value, "to_dict") else {"value": float(value), "low": None, "high": None}
            influence: Mapping[str, float] = plain.pop("influence", {})
            for row in self.rows if influence else ():
                row.influence[key] = influence.get(row.group, 0.0) / clips_of[row.group]
            result[key] = {
                "status": OK,
                "reason": "",
                **plain,
                "n": len(own),
                "total": len(self.clips),
                "reference": used,
            }
        for measure in result.values():
            measure.update(counts, reason=measure["reason"] or lost)
        return result

    def _features(
        self, p: _Plan, clips: Sequence[ClipFile], load: "_LazyModel", what: str
    ) -> tuple[dict[int, np.ndarray], str, int]:
        """Features of the clips that have them by their number, the last reason why one has none, and how many failed."""
        keys = [self._key(p, clip) for clip in clips]
        known = self.cache.get(key for key in keys if key is not None)
        features: dict[int, np.ndarray] = {}
        lost, failed = "", 0
        missing = sum(key not in known for key in keys)
        with self._bar(missing, f"{p.name}: {what}") as bar:
            for number, (clip, key) in enumerate(zip(clips, keys, strict=True)):
                if key is not None and key in known:
                    features[number] = np.load(io.BytesIO(known[key]), allow_pickle=False)
                    continue
                try:
                    _require(p.measurement, clip)
                    found = np.asarray(p.measurement.features(clip.only(p.measurement.inputs), load()), np.float32)  # type: ignore[union-attr]
                    if not np.isfinite(found).all():
                        raise MeasurementError("its features are not finite")
                except Exception as error:
                    lost = f"{clip.name}: {_words(error)}"
                    failed += not isinstance(error, NotMeasured)
                else:
                    features[number] = found
                    if key is not None:
                        file = io.BytesIO()
                        np.save(file, found, allow_pickle=False)
                        self.cache.put({key: file.getvalue()})
                    self.measured += 1
                clip.release()
                bar.update()
                if p.missing is not None:
                    break
        return features, lost, failed


class _LazyModel:
    """The model of a set measurement, loaded when the first clip asks for it."""

    def __init__(self, p: _Plan) -> None:
        self._plan, self._model = p, None

    def __call__(self) -> Any:
        load = self._plan.measurement.load
        if load is None:
            return self._plan.options
        if self._model is None:
            try:
                self._model = load(self._plan.options)
            except (UserError, OSError, ImportError, ValueError, RuntimeError) as error:
                name = self._plan.name
                self._plan.missing = MissingDependency(
                    f"{name} cannot be loaded ({_words(error)})", "see `python -m eval.doctor`"
                )
                raise
        return self._model


def _require(measurement: Measurement | SetMeasurement, clip: ClipFile) -> None:
    """Raises NotMeasured where a clip lacks an input, UnreadableClip where the file cannot be read."""
    speech = "no reference text; give a manifest with dialogue or prompts with a block 'Dialogue:'"
    asked = {
        "reference": (clip.reference is not None, "there is no reference clip; give reference=FOLDER"),
        "prompt": (bool(clip.prompt), "the prompt is unknown; put it into NAME.txt or a manifest"),
        "dialogue": (clip.dialogue is not None, speech),
        "voice": (clip.voice is not None, "there is no voice to compare with; give a manifest with the column voice"),
        "image": (clip.image is not None, "there is no image to compare with; give a manifest with the column image"),
    }  # fmt: skip
    # First, since an unreadable file has not failed at what it was not asked for.
    for name in measurement.inputs:
        there, reason = asked.get(name, (True, ""))
        if not there:
            raise NotMeasured(reason)
    info = clip.info
    if "frames" in measurement.inputs and info.kind != "video":
        raise NotMeasured("the file has no video" if info.kind == "audio" else "the file has one frame")
    if "audio" in measurement.inputs and not info.has_audio:
        raise NotMeasured("the file has no audio")


def _seen(measurement: Measurement | SetMeasurement, clip: ClipFile) -> ClipFile:
    """The clip with what a measurement declares."""
    return clip.only((*measurement.inputs, *measurement.optional))


def _measure_one(measurement: Measurement | SetMeasurement, clip: ClipFile, model: Any) -> tuple[dict[str, Any], bool]:
    """Content of a measurement of a clip, and whether it may be cached; see `_content`."""
    assert isinstance(measurement, Measurement)
    try:
        _require(measurement, clip)
        found: Mapping[str, Any] | Exception = dict(measurement.measure(_seen(measurement, clip), model))
    except Exception as error:
        found = error
    return _content(measurement, found)


def _together(
    batches: InBatches, prepared: Sequence[Any], model: Any
) -> tuple[Sequence[Mapping[str, Any] | Exception], str]:
    """Values or exception of every clip of a batch, and why it failed as a whole and was measured again clip by clip; else "".

    One clip's unexpected error is then its own, and a batch that is too large for the memory costs time only.
    """
    try:
        found = batches.together(prepared, model)
        if len(found) != len(prepared):
            raise RuntimeError(f"{len(found)} results for {len(prepared)} clips")
        return found, ""
    except Exception as error:
        if len(prepared) == 1:
            return [error], ""
        problem = f"{type(error).__name__}: {_words(error)[:200]}"
    # Outside of `except`: the error's traceback keeps the tensors of the failed batch alive.
    return [_together(batches, [one], model)[0][0] for one in prepared], problem


def _content(
    measurement: Measurement | SetMeasurement, found: Mapping[str, Any] | Exception
) -> tuple[dict[str, Any], bool]:
    """What is stored of a clip's values or exception, and whether it follows from the clip alone, so that it may be cached."""
    if isinstance(found, NotMeasured):
        return {"values": {}, "status": SKIPPED, "reason": _words(found)}, True
    if isinstance(found, Exception) and not isinstance(found, _EXPECTED):
        return {"values": {}, "status": FAILED, "reason": f"{type(found).__name__}: {_words(found)}"}, False
    if isinstance(found, Exception):
        texts = found.texts if isinstance(found, MeasurementError) else {}
        return {"values": {}, "status": FAILED, "reason": _words(found), "texts": texts}, True
    found = dict(found)
    texts = {key: str(found.pop(key)) for key in list(found) if key.endswith("_text")}
    declared = {metric.key for metric in measurement.metrics}
    if unknown := found.keys() - declared:
        raise ValueError(f"the measurement {measurement.name} gives {min(unknown)!r}, which it does not declare")
    reasons = {key: _words(value) for key, value in found.items() if isinstance(value, NotMeasured)}
    values = {key: None if value is None or key in reasons else float(value) for key, value in found.items()}
    wrong = [key for key, value in values.items() if value is not None and not math.isfinite(value)]
    if wrong:
        return {"values": {}, "status": FAILED, "reason": f"{wrong[0]} is {values[wrong[0]]}", "texts": texts}, True
    if lacking := [metric.key for metric in measurement.metrics if found.get(metric.key) is None]:
        problem = f"{measurement.name} gives neither a value of {lacking[0]} nor NotMeasured with a reason"
        return {"values": {}, "status": FAILED, "reason": problem, "texts": texts}, False
    return {"values": values, "status": OK, "texts": texts, "reasons": reasons}, True


def _measure_in_worker(
    job: tuple[int, ClipFile, list[tuple[str, Any]]],
) -> tuple[int, dict[str, tuple[dict[str, Any], bool]]]:
    index, clip, wanted = job
    import torch

    torch.set_num_threads(1)  # there is a process per core
    found = {name: _measure_one(measurements()[name], clip, options) for name, options in wanted}
    clip.release()
    return index, found


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
