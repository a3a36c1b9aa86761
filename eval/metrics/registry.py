"""The registry of metrics: every module of `eval.metrics` that declares METRICS or MEASUREMENTS.

    metrics()["psnr"].heading                # "PSNR, dB ↑"
    measurements()["speech_errors"].missing(options)

A *metric* is a name with a unit and a direction: a row of a table. A *measurement* is a pure function that gives the values
of one or several metrics for a clip (or a set of clips), with what it needs. A new one is one file in `eval.metrics`; no
other file is touched. Modules of metrics import nothing heavy outside of functions, so that the whole registry loads in
a few milliseconds.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    from eval.clip_file import ClipFile

SIGNS = {"up": "↑", "down": "↓", "target": "=", "": ""}
BETTER = {"up": "higher is better", "down": "lower is better", "target": "nearer to the target is better", "": ""}


@dataclass(frozen=True)
class Metric:
    """Name of a metric, its unit, which way is better, and how values of clips are averaged.

    Attributes:
        key: in result files; lower case with underscores, unique in the registry.
        direction: up, down, or target: nearer to `target` (where it is None: to the reference's own value, or to the codec
            bound) is better from either side; empty for counts and levels of chance, which have no better side.
        best: value that no clip can beat, such as 1 of SSIM or 0 of an error rate; None where there is none.
        target: number that is aimed at where `direction` is target.
        weight: key of a metric of the same measurement: the average is sum(weight x value) / sum(weight), pooled; empty:
            the mean of clips.
        share: whether values lie in [0,1] and an average of only zeros or ones gets Wilson's interval.
        sees: faults of `eval.faults` whose strengths it claims to order, from none to strong.
        margin: largest difference between two models that a comparison (`eval.verdicts`) calls equal: in the metric's unit, of
            one with a target a share of the value that is aimed at. None: .1 with a target, .05 of shares, else no equality.
        per_frame: whether the same scene has another value at another frame rate, as the change from frame to frame has: clips
            of different rates are then not compared.
    """

    key: str
    label: str
    unit: str = ""
    direction: Literal["up", "down", "target", ""] = ""
    best: float | None = None
    target: float | None = None
    weight: str = ""
    share: bool = False
    sees: tuple[str, ...] = ()
    per_frame: bool = False
    margin: float | None = None

    @property
    def title(self) -> str:
        """Label with unit: "PSNR, dB"."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    @property
    def heading(self) -> str:
        """Title with the direction's sign, as in the tables: "PSNR, dB ↑"."""
        return f"{self.title} {SIGNS[self.direction]}".rstrip()

    @property
    def better(self) -> str:
        """Which way is better, in words: "higher is better"; empty where no side is."""
        return BETTER[self.direction]


@dataclass(frozen=True)
class MissingDependency:
    """What a measurement lacks on this machine, and the command or setting that gets it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


@dataclass(frozen=True)
class InBatches:
    """`measure` of a measurement whose model takes several clips at once; called with one clip, it is a batch of one.

    The measurement's options have a field `batch`, the clips of a batch: in memory at once, no part of the identity.

    Attributes:
        prepare: (clip, model) -> what the model needs of a clip. Raises as `measure` does. The decoded clip is released when it
            returns, so it keeps no view of all frames.
        together: (what `prepare` returned, one or more, model) -> values of each, as `measure` gives, in the same order;
            a clip that has none is its `NotMeasured` or `MeasurementError`, returned and not raised. Whatever it raises is
            the whole batch's: the clips are then measured one by one.
    """

    prepare: Callable[["ClipFile", Any], Any]
    together: Callable[[Sequence[Any], Any], "Sequence[Mapping[str, Any] | Exception]"]

    def __call__(self, clip: "ClipFile", model: Any) -> Mapping[str, Any]:
        """Values of one clip; raises as `prepare`, and the exception that `together` returns."""
        (found,) = self.together([self.prepare(clip, model)], model)
        if isinstance(found, Exception):
            raise found
        return found


@dataclass(frozen=True)
class Measurement:
    """How values of metrics are measured on one clip.

    Attributes:
        name: as in `metrics=` on the command line; unique.
        metrics: all that it gives.
        measure: (clip, model) -> values by key, without side effects. `model` is what `load` returned, else the options. The
            value of a metric that does not apply, of several, is `NotMeasured(reason)`; where one is absent or None the clip
            has failed. A key that ends in "_text" is kept in the clip's row as text (a transcript, a judge's answer), not as
            a metric. `InBatches` where a model is much faster with several clips at once.
        inputs: of "frames", "audio", "reference", "prompt", "dialogue", "voice", "image": what a clip must have; a clip without
            one is skipped with that reason before `measure` is called.
        optional: inputs that are used where a clip has them. `measure` sees no other input than these two name, so a value
            in the cache depends on nothing else.
        options: dataclass of its settings, fields made by `magihuman.cli.option`; NAME.FIELD=value on the command line.
        missing: options -> what is not there, or None. Imports and loads nothing, opens no connection.
        load: options -> model, once per run, only when a value is not in the cache.
        identity: options -> what a value depends on besides the clip, for the cache's key (weights by their fingerprint);
            without it all options by value. The size of a batch is left out.
        version: raise it whenever values change.
        costly: whether it needs a model: left out of `metrics=cheap`.
        applies_to: prompt -> whether it measures clips of such a prompt; `metrics=cheap` leaves it out where no clip has one.
    """

    name: str
    metrics: tuple[Metric, ...]
    measure: Callable[["ClipFile", Any], Mapping[str, Any]]
    inputs: tuple[str, ...] = ("frames",)
    options: type | None = None
    missing: Callable[[Any], MissingDependency | None] = lambda options: None
    load: Callable[[Any], Any] | None = None
    identity: Callable[[Any], Mapping[str, Any]] | None = None
    version: int = 1
    costly: bool = False
    optional: tuple[str, ...] = ()
    applies_to: Callable[[str], bool] = lambda prompt: True


@dataclass(frozen=True)
class SetMeasurement:
    """A distance between a set of clips and a set of reference clips.

    Attributes:
        name, metrics, inputs, optional, options, missing, load, identity, version, costly: as of `Measurement`.
        features: (clip, model) -> fp32 [D] or [k,D], cached per clip.
        compare: (features of the clips, of the reference clips, groups of the clips, of the reference clips) -> values by key,
            each a value, an `eval.stats.Measure` or an `eval.set_distance.Distance`.
    """

    name: str
    metrics: tuple[Metric, ...]
    features: Callable[["ClipFile", Any], "np.ndarray"]
    compare: "Callable[[Sequence[np.ndarray], Sequence[np.ndarray], Sequence[str], Sequence[str]], Mapping[str, Any]]"
    inputs: tuple[str, ...] = ("frames",)
    options: type | None = None
    missing: Callable[[Any], MissingDependency | None] = lambda options: None
    load: Callable[[Any], Any] | None = None
    identity: Callable[[Any], Mapping[str, Any]] | None = None
    version: int = 1
    costly: bool = True
    optional: tuple[str, ...] = ()


def missing_package(module: str, package: str = "") -> MissingDependency | None:
    """Whether `module` can be imported; `package`: what pip installs, where it is called otherwise. Imports nothing."""
    from importlib.util import find_spec

    if find_spec(module) is not None:
        return None
    return MissingDependency(f"the package {package or module} is not installed", f"pip install {package or module}")


def plain_options(options: Any) -> dict[str, Any]:
    """Settings of a measurement by name; {} for None."""
    return {} if options is None else {field.name: getattr(options, field.name) for field in fields(options)}


# ---- Discovery ----


@cache
def _modules() -> tuple[Any, ...]:
    import eval.metrics as package

    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    return tuple(importlib.import_module(f"{package.__name__}.{name}") for name in names)


@cache
def measurements() -> Mapping[str, Measurement | SetMeasurement]:
    """All measurements by name.

    Raises:
        ValueError: two of the same name.
    """
    found: dict[str, Measurement | SetMeasurement] = {}
    for module in _modules():
        for measurement in getattr(module, "MEASUREMENTS", ()):
            if measurement.name in found:
                raise ValueError(
                    f"two measurements are called {measurement.name!r}; the second is in {module.__name__}"
                )
            found[measurement.name] = measurement
    return found


def _declared(module: Any) -> list[Metric]:
    """Metrics that a module lists in METRICS, then those of its measurements."""
    measured = [metric for given in getattr(module, "MEASUREMENTS", ()) for metric in given.metrics]
    return list(dict.fromkeys([*getattr(module, "METRICS", ()), *measured]))


@cache
def metrics() -> Mapping[str, Metric]:
    """All metrics by key, module by module: first those that it lists in METRICS, then those of its measurements.

    This is the order of the rows in tables.

    Raises:
        ValueError: two of the same key.
    """
    found: dict[str, Metric] = {}
    for module in _modules():
        for metric in _declared(module):
            if metric.key in found and found[metric.key] is not metric:
                raise ValueError(f"two metrics have the key {metric.key!r}; the second is in {module.__name__}")
            found[metric.key] = metric
    return found


def rate_bound(used: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Metrics whose values depend on the clips' frame rate, as measured.

    Args:
        used: measurement -> {"identity": ...}, as in summary.json; one with a set `fps` reads all clips at that rate.
    """
    return {
        metric.key
        for name, one in measurements().items()
        for metric in one.metrics
        if metric.per_frame and not used.get(name, {}).get("identity", {}).get("fps")
    }


def metrics_of(*modules: str) -> list[Metric]:
    """Metrics of modules of `eval.metrics`, named by their last part.

    Raises:
        KeyError: no such module.
    """
    known = {module.__name__.rpartition(".")[2]: module for module in _modules()}
    return [metric for name in modules for metric in _declared(known[name])]
