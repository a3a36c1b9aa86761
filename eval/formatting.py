"""Values, intervals and rows of metrics as text, the same in every table and figure of the evaluation.

    format_interval({"value": 0.953, "low": 0.921, "high": 0.978})   # 0.953 [0.921, 0.978]

Names, units and directions of metrics, and the order of rows, are in `eval.metrics`; the tables of puppets are in
`eval.puppet_tables`, those of clips of any origin in `eval.clip_tables`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from eval.metrics.registry import metrics, metrics_of
from magihuman.io.markdown import table

Values = Mapping[str, Any]
"""Content of a result file or of a part of it. A measure in it is the dictionary of an `eval.stats.Measure`."""


def digits_for(*values: float | None) -> int:
    """Decimals that give about three significant digits of the largest of `values`."""
    size = max((abs(value) for value in values if value is not None), default=0.0)
    return 2 if size >= 2 else 3 if size >= 0.1 or size == 0 else 4 if size >= 0.01 else 5


def format_value(value: float | None, digits: int | None = None, signed: bool = False) -> str:
    """ "0.953"; n/a for None; a zero has no sign."""
    if value is None:
        return "n/a"
    shown = f"{value:{'+' if signed else ''}.{digits_for(value) if digits is None else digits}f}"
    return shown.lstrip("+-") if float(shown) == 0 else shown


def format_interval(
    measure: Values, scale: float = 1, signed: bool = False, unit: str = "", digits: int | None = None
) -> str:
    """ "0.953 [0.921, 0.978]"; the value alone without an interval, n/a without a value.

    Args:
        scale: factor, 100 for percent; signed: + before positive numbers; unit: behind the value; digits: decimals, about
            three significant digits where it is None.
    """
    if measure["value"] is None:
        return "n/a"
    ends = [None if measure[key] is None else scale * measure[key] for key in ("value", "low", "high")]
    digits = digits_for(*ends) if digits is None else digits
    value, low, high = (format_value(end, digits, signed) for end in ends)
    return f"{value}{unit}" if "n/a" in (low, high) else f"{value}{unit} [{low}, {high}]"


def format_deviation(measure: Values) -> str:
    """Interval; where the measure has a target and knows its deviation: "0.0119 (+9.40 % [-4.80, +24.40])"."""
    if measure.get("off") is None or measure["value"] is None:
        return format_interval(measure)
    return f"{format_value(measure['value'])} ({format_interval(measure['off'], 100, signed=True, unit=' %')})"


def format_half(measure: Values) -> str:
    """Value with half the width of its interval: "0.953 ±0.029", with a target "0.0119 (+9.4 ±14.6 %)"."""
    if measure["value"] is None:
        return "n/a"

    def width(of: Values) -> float:
        return float(max(of["high"] - of["value"], of["value"] - of["low"]))

    digits, off = digits_for(measure["value"]), measure.get("off")
    shown = format_value(measure["value"], digits)
    if off is None:
        return f"{shown} ±{width(measure):.{digits}f}"
    return f"{shown} ({100 * off['value']:+.1f} ±{100 * width(off):.1f} %)"


def metric_rows(
    columns: Mapping[str, Values], keys: Iterable[str], show: Callable[[Values], str] = format_interval
) -> list[list[str]]:
    """A row per metric, a cell per column of measures; n/a where a column lacks the metric.

    Raises:
        KeyError: a key that no metric has.
    """
    return [
        [metrics()[key].heading, *(show(column[key]) if key in column else "n/a" for column in columns.values())]
        for key in keys
    ]


def chosen(columns: Mapping[str, Values], keys: Sequence[str]) -> Sequence[str]:
    """`keys`, or all metrics of the columns where there are none.

    Raises:
        KeyError: a key that is in no column.
    """
    known = dict.fromkeys(key for column in columns.values() for key in column)
    if unknown := [key for key in keys if key not in known]:
        raise KeyError(f"no column has {', '.join(unknown)}")
    return keys or sorted(known, key=list(metrics()).index)


def glossary(*modules: str) -> str:
    """Markdown of the metrics that modules of `eval.metrics` declare: key in result files, name, unit, direction.

    Raises:
        KeyError: no such module.
    """
    rows = [[f"`{metric.key}`", metric.label, metric.unit, metric.better] for metric in metrics_of(*modules)]
    return table(["key", "metric", "unit", "direction"], rows, "llll")
