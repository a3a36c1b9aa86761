"""Scores of any folder of clips, ours or another model's: values with intervals, or the reason why there is none.

    python -m eval.score clips=FOLDER
    python -m eval.score clips=manifest.jsonl reference=REAL metrics=all speech_errors.model=whisper

`python -m eval.doctor` lists the measurements, what each needs and its options.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.output import folder_for, require_at_least
from eval.score_cache import DEFAULT
from magihuman.cli import option
from magihuman.errors import UserError, report_and_exit

if TYPE_CHECKING:
    from eval.clip_file import ClipFile
    from eval.scoring import Options, Scored


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Score clips: pixels, sound, speech, lip sync, judges, distances to real clips.

    Prints a table; writes results.jsonl (a line per clip: every value, or its status and reason), summary.json, summary.md and
    summary.png. Values are cached by content: scoring again measures only what is new. A model's options are given as
    MEASUREMENT.OPTION=VALUE; `python -m eval.doctor` lists them.
    """

    clips: str = option(
        "folder of media files, each with its prompt in NAME.txt or NAME.json, or a manifest (.csv, .tsv, .jsonl, .json) with "
        "the column clip and any of name, prompt, dialogue, language, group, reference, voice, image, part"
    )
    reference: str | None = option("folder or manifest of true clips of the same names; they are scored, too", None)
    metrics: str = option("cheap (all without a model), all, or names of measurements or metrics with commas", "cheap")
    output: str | None = option("folder; none is runs/scores/NAME", None)
    bound: bool = option(
        "score the reference clips through the video and audio codec, too: what no model of their latents can beat",
        False,
    )
    codecs: str = option("checkpoint whose codecs bound=true uses", "scene/base")
    min_coverage: float = option(
        "least share of clips, of those that a metric applies to, that must have a value; below, exit 1", 0.9
    )
    cache: str | None = option("SQLite file of known values; none measures all again", DEFAULT)
    workers: int = option(
        "processes for measurements without a model; 0 is half of the cores, at most 8, and one per 3.2 GB of free memory",
        0,
    )
    show_parts: bool = option(
        "tables by part (the manifest's column) in summary.md; summary.json always has them", False
    )
    progress: bool = option("show bars with the time left", True)


def run(options: ScoreOptions, of_measurements: "Options | None" = None) -> dict[str, Any]:
    """Score clips and write a result folder.

    Args:
        of_measurements: measurement -> option -> value.

    Returns:
        The content of summary.json.

    Raises:
        UserError: unknown clips, metrics or options.
        SystemExit: 1, with a line on stderr: too few clips have a value, see `require_coverage`.
    """
    from eval.clip_list import read_clips
    from eval.score_report import write_scores
    from eval.scoring import default_workers, plan, score, select

    require_at_least(workers=(options.workers, 0))
    require_share(options.min_coverage)
    names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    plan(select(names), of_measurements or {})  # a wrong option is found before clips are read
    reference = Path(options.reference) if options.reference else None
    source = Path(options.clips)
    name = source if source.is_dir() else source.with_suffix("")  # a folder's name may have dots: step.100
    folder = Path(options.output) if options.output else folder_for("scores", name.as_posix())
    made = (folder / "bound").resolve()  # clips of an earlier run, where the output is below clips=
    found = [clip for clip in read_clips(source, reference) if not clip.path.resolve().is_relative_to(made)]
    if reference is not None and (alone := [clip.name for clip in found if clip.reference is None]):
        print(
            f"note: reference={reference} has no clip of the name of {len(alone)} of {len(found)} clips, such as {alone[0]!r}",
            file=sys.stderr,
        )
    store = Path(options.cache) if options.cache else None
    processes = options.workers or default_workers()

    def scored(part: "Sequence[ClipFile]") -> "Scored":
        return score(part, names, of_measurements, store, options.progress, processes)

    def bound(clips: "Sequence[ClipFile]") -> "list[ClipFile]":
        from eval.codec_bound import bound_clips

        return bound_clips(clips, options.codecs, folder / "bound", options.progress)

    sets = clip_sets(found, bound if options.bound else None)
    columns = {name: scored(part) for name, part in sets.items()}
    asked = {"clips": options.clips, "reference": options.reference, "metrics": names}
    values = write_scores(folder, columns, {"source": asked, "show_parts": options.show_parts})
    require_coverage(values, options.min_coverage, names)
    return values


def clip_sets(
    clips: "Sequence[ClipFile]", bound: "Callable[[Sequence[ClipFile]], list[ClipFile]] | None" = None
) -> "dict[str, Sequence[ClipFile]]":
    """The columns of a result: clips, and of those with a reference this through a codec, and itself, under the clip's name.

    Args:
        bound: clips with references -> these through a codec, see `eval.codec_bound`; None leaves them out.

    Raises:
        UserError: a bound is wanted and there is no reference.
    """
    sets: dict[str, Sequence[ClipFile]] = {"clips": clips}
    paired = [clip for clip in clips if clip.reference is not None]
    if bound is not None:
        if not paired:
            raise UserError("bound=true needs reference clips; give reference=FOLDER or a manifest with reference")
        sets["bound"] = bound(paired)
    if paired:
        names = ("name", "prompt", "dialogue", "language", "group", "voice", "image", "part")
        sets["reference"] = [
            replace(clip.reference, **{name: getattr(clip, name) for name in names})
            for clip in paired
            if clip.reference is not None
        ]
    return sets


def require_share(min_coverage: float) -> None:
    """Raises UserError unless 0 <= min_coverage <= 1."""
    if not 0 <= min_coverage <= 1:
        raise UserError(f"min_coverage={min_coverage:g} should be between 0 and 1")


def require_coverage(values: dict[str, Any], min_coverage: float, named: Sequence[str]) -> None:
    """End with exit status 1 and a line per metric that too few clips have a value of.

    Clips that a metric does not apply to are not counted, nor are metrics that were kept from an earlier run. A metric or
    measurement that was asked for by name must have a value.
    """
    from eval.metrics.registry import measurements

    owner = {metric.key: name for name, one in measurements().items() for metric in one.metrics}
    problems: dict[str, str] = {}
    for key, measure in values["columns"]["clips"].items():
        if key in values["kept"]:
            continue
        failed = measure.get("failed", 0)
        applies = measure["n"] + failed
        if applies and measure["n"] < min_coverage * applies:
            problems[key] = (
                f"{failed} of {applies} clips failed ({measure['reason']}); min_coverage is {min_coverage:g}"
            )
        elif measure["value"] is None and measure["status"] == "unavailable" and {key, owner.get(key)} & set(named):
            problems[key] = f"unavailable: {measure['reason']}"
    by_reason: dict[str, list[str]] = {}
    for key, reason in problems.items():
        by_reason.setdefault(reason, []).append(key)
    for reason, keys in by_reason.items():
        print(f"{', '.join(keys)}: {reason}", file=sys.stderr)
    if problems:
        raise SystemExit(1)


def split_options(argv: Sequence[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Arguments of the command, and those of the form MEASUREMENT.OPTION=VALUE as measurement -> option -> text.

    Raises:
        UserError: an option is given twice.
    """
    rest: list[str] = []
    options: dict[str, dict[str, str]] = {}
    for argument in argv:
        key, equals, text = argument.lstrip("-").partition("=")
        name, dot, option = key.partition(".")
        if not (equals and dot and name.isidentifier() and option.isidentifier()):
            rest.append(argument)
        elif option in options.setdefault(name, {}):
            raise UserError(f"{key} is given twice")
        else:
            options[name][option] = text
    return rest, options


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    from magihuman import cli

    try:
        rest, options = split_options(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        report_and_exit(error)

    def command(given: ScoreOptions) -> dict[str, Any]:
        return run(given, options)

    cli.run(command, "python -m eval.score", rest)


if __name__ == "__main__":
    main()
