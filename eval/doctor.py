"""Which metrics can be measured on this machine, what is missing for the others, and how to get it.

    python -m eval.doctor
    python -m eval.doctor metrics=wer,videoscore2 speech_errors.model=whisper

Loads no model and opens no connection.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from magihuman.cli import option
from magihuman.errors import UserError, report_and_exit


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """List measurements: their metrics and options, and for those that cannot run what is missing and the remedy.

    Weights are given as MEASUREMENT.OPTION=VALUE, as for eval.score. Ends with status 1 where one of the named metrics cannot
    be measured. Loads no model and opens no connection.
    """

    metrics: str = option("all, cheap, or names of measurements or metrics with commas", "all")


def run(options: DoctorOptions, of_measurements: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Print what can be measured here.

    Args:
        of_measurements: measurement -> option -> text.

    Returns:
        Measurement -> {"metrics", "status" (ready or missing), "missing", "remedy"}.

    Raises:
        UserError: unknown metrics or options.
        SystemExit: 1, one of the named metrics cannot be measured.
    """
    from eval.scoring import ALL, CHEAP, plan, select

    names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    found: dict[str, Any] = {}
    lines = []
    for p in plan(select(names), of_measurements):
        entry: dict[str, Any] = {"metrics": [metric.key for metric in p.measurement.metrics]}
        if p.missing is None:
            entry["status"] = "ready"
        else:
            entry |= {"status": "missing", "missing": p.missing.what, "remedy": p.missing.remedy}
        found[p.name] = entry
        lines += _lines(p.name, entry, p.measurement)
    ready = sum(entry["status"] == "ready" for entry in found.values())
    print("\n".join([*lines, "", f"{ready} of {len(found)} measurements can run here"]))
    if ready < len(found) and not {ALL, CHEAP} & set(names):
        raise SystemExit(1)
    return found


def _lines(name: str, entry: Mapping[str, Any], measurement: Any) -> list[str]:
    """A measurement for the terminal."""
    import textwrap

    needs = ", ".join(measurement.inputs)
    lines = [f"{name}: {entry['status']} (needs {needs})"]
    if entry["status"] == "missing":
        lines += [f"  missing: {entry['missing']}", f"  remedy:  {entry['remedy']}"]
    lines += textwrap.wrap(", ".join(entry["metrics"]), 100, initial_indent="  metrics: ", subsequent_indent="    ")
    for setting in fields(measurement.options) if measurement.options else ():
        about = f"  {name}.{setting.name}={setting.default}  {setting.metadata.get('help', '')}"
        lines += textwrap.wrap(about, 110, initial_indent="  ", subsequent_indent="      ")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    from eval.score import split_options
    from magihuman import cli

    try:
        rest, options = split_options(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        report_and_exit(error)

    def command(given: DoctorOptions) -> dict[str, Any]:
        return run(given, options)

    cli.run(command, "python -m eval.doctor", rest)


if __name__ == "__main__":
    main()
