"""A benchmark suite from a checkpoint: generate its clips, score them, and say with which settings.

    python -m eval.run suite=puppets checkpoint=tiny/distill limit=4 output=out
    torchrun --nproc-per-node 8 -m eval.run suite=versebench suite_path=verse_bench checkpoint=RELEASE/distill output=out \\
        metrics=cheap,videoscore2 resolution=540p sr=RELEASE/540p_sr

Options of `python -m magihuman.infer` are passed on to generating, MEASUREMENT.OPTION=VALUE to scoring. The same command
continues what was stopped; when all is there, nothing is generated and nothing is measured. A folder that holds clips of
other settings is refused.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.output import portable, require_at_least
from eval.published import SOURCE, ComparedMetrics, published_rows
from eval.score import clip_sets, require_coverage, require_share, split_options
from eval.score_cache import DEFAULT
from eval.suites.suite_items import MANIFEST, SETTINGS, Suite, SuiteItem, SuiteOptions
from inference.requests import MANIFEST as MADE
from inference.requests import InferOptions
from inference.torchrun import from_first, ranks, together, wait_for_all
from magihuman.cli import option
from magihuman.errors import UserError
from magihuman.io.files import write_atomically, write_result
from magihuman.io.provenance import file_hash, fingerprint
from magihuman.io.text import load_json, parse_json

if TYPE_CHECKING:
    from eval.clip_file import ClipFile
    from eval.scoring import Scored

PROGRAM = "python -m eval.run"
FORMAT = "magihuman-suite/1"
PROMPTS, CLIPS = "prompts.jsonl", "clips"
"""List of prompts and folder of clips in the output folder."""
OURS = ("prompt", "prompts", "image", "audio", "gallery")
"""Options of generating that the suite decides."""
SPEED = ("batch", "memory", "progress", "gallery", "output", "prompts", "seed")
"""Options that clips of one folder may differ in; seeds are in the list of prompts."""


@dataclass(frozen=True, kw_only=True)
class SuiteRunOptions(SuiteOptions):
    """Generate the clips of a benchmark suite with a checkpoint and score them.

    Writes clips/, prompts.jsonl, manifest.jsonl (for eval.score), suite.json (settings), and the results: results.jsonl,
    summary.json, summary.md, summary.png. The same command continues a stopped one. Started by torchrun, the processes
    share the clips, in generating as in scoring.
    """

    checkpoint: str = option("as of python -m magihuman.infer; suite=puppets takes the puppets of its world")
    output: str = option("folder")
    clips_per_prompt: int = option("clips of every prompt, each with a seed of its own", 1)
    seed: int = option("of the noise; clip k of prompt i gets (seed + k) * 1000003 + i, unless the suite has seeds", 0)
    limit: int | None = option("only the first so many prompts; a later run with more keeps the clips", None)
    metrics: str | None = option(
        "as of eval.score: cheap, all, or names with commas; none is cheap and those that the paper gives for the suite",
        None,
    )
    bound: bool = option("score the references through the codec of the checkpoint, too", False)
    judge_score: str = option("score of VideoScore2 beside the published one: hard, soft or expected", "hard")
    wer_average: str = option(
        "word error rate beside the published one: pooled over all words, or mean of clips", "pooled"
    )
    min_coverage: float = option("least share of clips that a metric must have a value of; below, exit 1", 0.9)
    cache: str | None = option("SQLite file of known values; none measures all again", DEFAULT)
    workers: int = option(
        "processes for measurements without a model; 0 is half of the cores, at most 8, and one per 3.2 GB of free memory",
        0,
    )
    show_parts: bool = option("tables by part of the suite in summary.md; summary.json always has them", False)
    progress: bool = option("show bars with the time left", True)


def run(
    options: SuiteRunOptions,
    generating: Mapping[str, Any] | None = None,
    measuring: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Generate and score a suite.

        run(SuiteRunOptions(suite="puppets", checkpoint="tiny/distill", output="out", limit=4))

    Args:
        generating: options of `InferOptions` by name.
        measuring: measurement -> option -> text.

    Returns:
        The content of summary.json; {} in all processes but the first.

    Raises:
        UserError: bad input, or a folder with clips of other settings.
        SystemExit: status 1 where too few clips could be measured, after everything is written.
    """
    from eval.score_report import write_scores
    from eval.scoring import CHEAP, plan, select
    from eval.suites.suite_catalog import read_suite

    require_at_least(
        clips_per_prompt=(options.clips_per_prompt, 1), seed=(options.seed, 0), workers=(options.workers, 0)
    )
    require_share(options.min_coverage)
    if options.limit is not None:
        require_at_least(limit=(options.limit, 1))
    compared = ComparedMetrics(options.judge_score, options.wer_average)
    making = _infer_options(options, generating or {})
    suite, folder = read_suite(options), Path(options.output)
    published = published_rows(suite.published, compared)
    names = [CHEAP, *(compared.key(metric) for metric in suite.published)]
    if options.metrics is not None:
        names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    plan(select(names), measuring or {})  # a wrong name or option is found before anything is made
    rank, processes, _ = ranks()
    for note in suite.notes if rank == 0 else ():
        print(f"note: {note}", file=sys.stderr)
    items = suite.items[: options.limit]
    settings = _settings(options, suite, len(items), making)
    with together(processes):
        clips = from_first(_prepared(folder, suite, items, settings, options) if rank == 0 else None)
        if from_first(rank == 0 and not _all_made(folder / CLIPS, clips)):
            from inference.infer_command import run as generate

            generate(making)
        elif rank == 0:
            print(f"{folder / CLIPS}: all {len(clips)} clips are there", file=sys.stderr)
        if rank == 0:
            write_atomically(folder / MANIFEST, _manifest(folder, clips))
        wait_for_all()
        columns = _columns(folder, options, making, names, measuring or {})
    if rank:
        return {}
    facts = {"suite": settings, "show_parts": options.show_parts, **({"published_source": SOURCE} if published else {})}
    values = write_scores(folder, columns, facts, published)
    require_coverage(values, options.min_coverage, names if options.metrics else [])
    return values


# ---- Settings ----


def _infer_options(options: SuiteRunOptions, generating: Mapping[str, Any]) -> InferOptions:
    """Raises UserError for an option that the suite decides."""
    own = {f.name for f in fields(SuiteRunOptions)}
    if taken := [name for name in generating if name in OURS]:
        raise UserError(f"{taken[0]}= is decided by the suite; leave it out")
    folder = Path(options.output)
    return InferOptions(
        **{name: value for name, value in generating.items() if name not in own}, checkpoint=options.checkpoint,
        prompts=str(folder / PROMPTS), output=str(folder / CLIPS), gallery=True, progress=options.progress,
    )  # fmt: skip


def _settings(options: SuiteRunOptions, suite: Suite, used: int, making: InferOptions) -> dict[str, Any]:
    """What is recorded under "suite" in summary.json, and in suite.json."""
    shown = {name: value for name, value in asdict(making).items() if name not in (*OURS, *SPEED)}
    return {
        "format": FORMAT,
        "suite": suite.name,
        "suite_path": None if options.suite_path is None else portable(options.suite_path),
        **suite.facts,
        "items": len(suite.items),
        "limit": options.limit,
        "used": used,
        "clips_per_prompt": options.clips_per_prompt,
        "seed": options.seed,
        "template": options.template,
        "first_frame": options.first_frame,
        "transcripts": None if options.transcripts is None else Path(options.transcripts).name,
        "speech_language": options.speech_language,
        "judge_score": options.judge_score,
        "wer_average": options.wer_average,
        "generating": {name: portable(value) if isinstance(value, str) else value for name, value in shown.items()},
        "weights": _weights(making),
    }


def _weights(making: InferOptions) -> dict[str, Any]:
    """Identity of the checkpoint and of every file of weights that the options or the environment name."""
    from magihuman import zoo
    from magihuman.codecs.bundle import RELEASED_VARIABLES

    paths: dict[str, Path] = {"checkpoint": zoo.find(making.checkpoint)}
    for name in ("lora", "sr", "turbo", *RELEASED_VARIABLES):
        given = getattr(making, name)
        if given is None and making.checkpoint not in zoo.checkpoint_names():
            given = os.environ.get(RELEASED_VARIABLES.get(name, ""))
        if given is not None and Path(given).expanduser().exists():
            paths[name] = Path(given).expanduser()
    return {name: fingerprint(_exported(path)) for name, path in paths.items()}


def _exported(path: Path) -> Path:
    """The weights in a run folder, whose other files change with every command; another path as it is."""
    if (path / "run.json").is_file():
        return next((inner for inner in (path / "export", path / "adapter") if inner.is_dir()), path)
    return path


GROWING = ("limit", "used", "items", "clips_per_prompt", "judge_score", "wer_average", "suite_path", "published_items")
"""Settings that a later run in the same folder may change."""


def _require_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError where the folder has clips of other settings, naming them."""
    file = folder / SETTINGS
    if not file.is_file():
        return
    try:
        known = load_json(file)
        before, now = _flat(known), _flat(json.loads(json.dumps(settings)))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}); remove the folder or give another output=") from error
    other = [
        f"{name.removeprefix('generating.')}={_shown(before.get(name))} there, {_shown(now.get(name))} here"
        for name in sorted(before.keys() | now.keys())
        if name.split(".")[0] not in GROWING and before.get(name) != now.get(name)
    ]
    if other:
        raise UserError(
            f"output={folder} holds clips of other settings ({'; '.join(other[:3])}); give another output=, or remove it"
        )


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"sha256 {value['sha256'][:8]}"
    return "none" if value is None else str(value)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, those of "generating" as generating.steps."""
    flat = {name: value for name, value in values.items() if not isinstance(value, dict)}
    for outer, inner in values.items():
        if isinstance(inner, dict):
            flat |= {f"{outer}.{name}": value for name, value in inner.items()}
    return flat


# ---- Clips ----


def _prepared(
    folder: Path, suite: Suite, items: Sequence[SuiteItem], settings: Mapping[str, Any], options: SuiteRunOptions
) -> "list[SuiteClip]":
    """The clips to make, once their pictures, references and the list of prompts are there.

    Raises:
        UserError: the folder holds clips of other settings, or cannot be written.
    """
    from tqdm import tqdm

    _require_same(folder, settings)
    try:
        write_result(folder / SETTINGS, settings)
        bar = tqdm(
            items, desc="pictures and references", unit="item", disable=not options.progress, leave=False, delay=1
        )
        clips = _clips([suite.prepare(item, folder / "references") for item in bar], options)
        if options.bound and not any(clip.item.reference for clip in clips):
            raise UserError(f"bound=true needs reference clips, and suite={options.suite} has none; leave it out")
        lines = [json.dumps(clip.request, ensure_ascii=False) + "\n" for clip in clips]
        write_atomically(folder / PROMPTS, "".join(lines))
    except OSError as error:
        raise UserError(f"output={folder} cannot be written: {error.strerror or error}") from error
    return clips


@dataclass(frozen=True)
class SuiteClip:
    """A clip of an item: its line of the list of prompts."""

    item: SuiteItem
    request: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.request["name"])


def _clips(items: Sequence[SuiteItem], options: SuiteRunOptions) -> list[SuiteClip]:
    """`clips_per_prompt` clips of each item, all first ones first, so that a larger number adds at the end."""
    clips = []
    for k in range(options.clips_per_prompt):
        for index, item in enumerate(items):
            request = {
                "name": item.name if k == 0 else f"{item.name}_s{k}",
                "prompt": item.prompt,
                "seed": (options.seed + k) * 1_000_003 + index if item.seed is None else item.seed + k,
                "image": None if item.image is None else str(item.image.absolute()),
                "audio": None if item.audio is None else str(item.audio.absolute()),
                "seconds": item.seconds,
                "negative_prompt": item.negative_prompt,
            }
            clips.append(SuiteClip(item, {name: value for name, value in request.items() if value is not None}))
    return clips


def _all_made(folder: Path, clips: Sequence[SuiteClip]) -> bool:
    """Whether every clip is whole and of its request, by its record. Settings and weights were compared before."""
    hashes: dict[str, str] = {}

    def condition(path: str | None) -> str | None:
        if path is not None and path not in hashes:
            hashes[path] = file_hash(Path(path))
        return None if path is None else hashes[path]

    try:
        lines = (folder / MADE).read_text(encoding="utf-8").splitlines()
        listed = {parse_json(line)["name"] for line in lines}
        for clip in clips:
            record = load_json(folder / f"{clip.name}.json")
            same = clip.name in listed and all(record[key] == clip.request[key] for key in ("prompt", "seed"))
            for key in ("image", "audio"):
                same = same and (record[key] or {}).get("sha256") == condition(clip.request.get(key))
            if not same or record["sha256"] != file_hash(folder / f"{clip.name}.mp4"):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _manifest(folder: Path, clips: Sequence[SuiteClip]) -> str:
    """The clips as `eval.clip_list` reads them; files in the folder relative to it."""

    def shown(path: Path | None) -> str | None:
        if path is None:
            return None
        inside = os.path.relpath(path, folder)
        return str(path.absolute()) if inside.startswith("..") else inside

    lines = []
    for clip in clips:
        item = clip.item
        line = {
            "clip": f"{CLIPS}/{clip.name}.mp4",
            "name": clip.name,
            "prompt": item.prompt,
            "dialogue": item.dialogue,
            "language": item.language,
            "group": item.group or item.prompt or item.name,
            "reference": shown(item.reference),
            "voice": shown(item.voice or item.audio),
            "image": shown(item.image),
            "part": item.part or None,
        }
        lines.append(json.dumps({key: value for key, value in line.items() if value is not None}, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


# ---- Scores ----


def _columns(
    folder: Path,
    options: SuiteRunOptions,
    making: InferOptions,
    names: Sequence[str],
    measuring: Mapping[str, Mapping[str, str]],
) -> "dict[str, Scored]":
    """Scored clips, their references, and these through the codec.

    Processes of torchrun measure a share each into the cache, and the first one then finds all there; {} in the others.
    """
    from eval.clip_list import read_clips
    from eval.scoring import default_workers, score

    rank, processes, local = ranks()
    found = read_clips(folder / MANIFEST)
    store = None if options.cache is None else Path(options.cache)
    workers = options.workers or default_workers(processes)

    def bound(clips: "Sequence[ClipFile]") -> "list[ClipFile]":
        from eval.codec_bound import bound_clips

        paths = {name: getattr(making, name) for name in ("video_codec", "audio_codec")}
        show = options.progress and rank == 0
        return bound_clips(clips, options.checkpoint, folder / "bound", show, device=making.device, paths=paths)

    def columns(part: "Sequence[ClipFile]") -> "dict[str, Scored]":
        sets = clip_sets(part, bound if options.bound and any(clip.reference for clip in part) else None)
        show = options.progress and rank == 0
        return {name: score(clips, names, measuring, store, show, workers) for name, clips in sets.items()}

    if processes > 1 and store is not None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(local)  # where measurements put their models
        columns(found[rank::processes])
        wait_for_all()
    return {} if rank else columns(found)


# ---- Command line ----


def help_text() -> str:
    """Own options, then the names of those that are passed on."""
    from magihuman.cli import usage

    own = {f.name for f in fields(SuiteRunOptions)}
    passed = [f.name for f in fields(InferOptions) if f.name not in own | {*OURS}]
    return (
        f"{usage(SuiteRunOptions, PROGRAM)}\n\n"
        f"options of generating, see python -m magihuman.infer --help:\n  {', '.join(passed)}\n\n"
        "options of scoring: MEASUREMENT.OPTION=VALUE, see python -m eval.doctor"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; 0 when done, 1 where too few clips could be measured, 2 after a one-line error."""
    from magihuman.cli import calm_bars, errors_in_one_line, settings
    from magihuman.infer import configured

    calm_bars()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or any(argument in ("-h", "--help", "help") for argument in arguments):
        print(help_text())
        return
    from magihuman.io.files import require_writable

    with errors_in_one_line("interrupted; the same command continues"):
        rest, measuring = split_options(arguments)
        names = {f.name for f in fields(SuiteRunOptions)}
        own = [argument for argument in rest if argument.lstrip("-").partition("=")[0] in names]
        passed = [argument for argument in rest if argument not in own]
        _, schema, defaults = configured()
        known = {f.name for f in fields(InferOptions)} | names
        if unknown := [a for a in passed if a.lstrip("-").partition("=")[0] not in known]:
            raise UserError(
                f"{unknown[0]!r} is no option of this command, of generating or of scoring; see `{PROGRAM} --help`"
            )
        usual = {name: value for name, value in defaults.items() if name not in OURS}
        options = SuiteRunOptions(**settings(SuiteRunOptions, own, PROGRAM))
        require_writable(Path(options.output), "output")
        run(options, {**usual, **settings(schema, passed, PROGRAM)}, measuring)


if __name__ == "__main__":
    main()
