"""Measures few-step students of the tiny world beside their teacher, the teacher in few steps, and real puppets.

    python -m eval.dmd2 student=tiny/distill
    python -m eval.dmd2 student=runs/dmd2/a,runs/dmd2/b teacher=tiny/base prompts=40 seeds=3

All columns are clips of the same held-out prompts (`eval.puppets`), models from the same noise, and all go through
the same decoders and measures (`eval.compare`).
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tiny.puppets import SKINS
from eval import distill_pictures, distill_report
from eval.compare import ROWS, Column, Comparison, column
from eval.distill_pictures import Shown
from eval.diversity import Reference, by_prompt, embed, real_draw
from eval.generate import Way, sample_all
from eval.puppets import BOUND, HELD_OUT_SEED, Clips, ground_truth, held_out, through_codec
from eval.report import folder_for, provenance
from eval.scores import Scores
from magihuman.errors import UserError

if TYPE_CHECKING:
    from inference.pipeline import Pipeline
    from inference.settings import Settings
    from magihuman.codecs.bundle import CodecBundle

FORMAT = "magihuman-compare/1"


def run(
    student: str,
    teacher: str = "tiny/base",
    prompts: int = 40,
    seeds: int = 3,
    batch: int = 10,
    output: str | None = None,
    cache: str | None = "tiny_world/compare",
    device: str = "auto",
    keep: int = 4,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare distilled students of the tiny world with their teacher, on held-out prompts.

    Prints the table and a verdict in words; writes compare.json, compare.md, compare.png, sheet.png and sample clips.
    For one student that is a run folder, its report.md and report.png are written, too.

    Args:
        student: shipped name, exported folder or run folder; several with commas
        teacher: what they were distilled from, likewise
        prompts: how many captions
        seeds: clips of each caption; diversity needs at least 2
        batch: clips sampled at once; changes memory and speed only
        output: folder; none is compare/ in a run folder, else runs/compare/NAME
        cache: folder in which the teacher's latents are kept for the next comparison; none keeps nothing
        device: auto, cpu or cuda
        keep: of how many captions to show and save clips
        progress: show bars

    Returns:
        Where compare.json and the report are, and the verdicts per student.

    Raises:
        UserError: an unknown checkpoint, one of other codecs, students of different sampling, or a value that cannot
            be used.
    """
    for name, value, least in (
        ("prompts", prompts, 2),
        ("seeds", seeds, 1),
        ("batch", batch, 1),
        ("keep", keep, 1),
    ):
        if value < least:
            raise UserError(f"{name}={value} is impossible; give at least {least}")
    names = [part.strip() for part in student.split(",") if part.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"student={student} should name one or more checkpoints, each once, with commas")
    start = time.perf_counter()
    codecs, ways = _ways(names, teacher, device)
    folder = Path(output) if output else folder_for("compare", *names)
    captions = [puppet.caption for puppet in held_out(prompts)]
    sample_all(
        ways, captions, range(seeds), batch=batch, folder=None if cache is None else Path(cache), progress=progress
    )  # fmt: skip
    columns, shown = _measured(codecs, ways, captions, seeds, min(keep, prompts), progress)
    values = _values(Comparison(columns), {"prompts": prompts, "seeds": list(range(seeds))})
    values["seconds"] = round(time.perf_counter() - start, 1)
    values["provenance"] = provenance()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (folder / "compare.md").write_text(distill_report.markdown(values) + "\n", encoding="utf-8")
    distill_pictures.multiples(values).savefig(folder / "compare.png", dpi=100)
    distill_pictures.sheet(shown).savefig(folder / "sheet.png", dpi=90)
    saved = distill_pictures.save_clips(shown, folder / "clips")
    report = None
    if len(names) == 1 and (Path(names[0]) / "metrics.csv").is_file():
        report = distill_pictures.write_page(Path(names[0]), folder, values, shown, saved)
    print(distill_report.text(values), flush=True)
    print(f"written to {folder} ({time.perf_counter() - start:.0f} s)")
    return {
        "compare": str(folder / "compare.json"),
        "report": None if report is None else str(report),
        "verdicts": {
            name: {claim["about"]: claim["verdict"] for claim in claims}
            for name, claims in values["claims"].items()
        },
    }


# ----------------------------------------------------------------------------------------------------
# Columns
# ----------------------------------------------------------------------------------------------------


def words_for(settings: "Settings") -> str:
    """A sampler in words: "32 steps, CFG"."""
    kind = {"unipc": "", "renoise": "re-noise "}.get(settings.solver, f"{settings.solver} ")
    return f"{settings.steps} {kind}steps, {'CFG' if settings.guidance.needed else 'no CFG'}"


def _ways(names: Sequence[str], teacher: str, device: str) -> tuple["CodecBundle", list[Way]]:
    """The teacher as it is meant to be sampled, in as few steps as the students, in their own sampler; the students."""
    from magihuman.codecs.bundle import load_bundle

    codecs = load_bundle("tiny")
    pipelines = [_pipeline(name, codecs, device) for name in (teacher, *names)]
    full, few = pipelines[0].settings(), pipelines[1].settings()
    for name, pipeline in zip(names, pipelines[1:], strict=True):
        if pipeline.settings() != few:
            own = pipeline.settings()
            raise UserError(
                f"{name} is sampled otherwise than {names[0]} ({words_for(own)}, shift {own.shift:g}, against "
                f"{words_for(few)}, shift {few.shift:g}); compare them one by one"
            )
    in_few = pipelines[0].settings(steps=few.steps, guidance=1.0)
    alone = few if few.guidance.needed else replace(few, guidance=in_few.guidance)
    ways: list[Way] = []
    for settings in (full, in_few, replace(alone, negative_prompt=full.negative_prompt)):
        name = f"teacher, {words_for(settings)}"
        if settings not in [way.settings for way in ways]:
            taken = name in [way.name for way in ways]
            ways.append(
                Way(f"{name}, shift {settings.shift:g}" if taken else name, pipelines[0], settings, keep=True)
            )
    short = _short_names(names)
    for name, pipeline in zip(short, pipelines[1:], strict=True):
        ways.append(Way(f"{name}, {words_for(few)}", pipeline, few))
    return codecs, ways


def _pipeline(name: str, codecs: "CodecBundle", device: str) -> "Pipeline":
    import torch

    from inference.pipeline import Pipeline
    from magihuman import zoo

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    config = zoo.config_of(name)
    if config.codecs != "tiny":
        raise UserError(f"eval.dmd2 measures the tiny world, and {name} is of {config.codecs!r}")
    return Pipeline(zoo.load(name, chosen), codecs)


def _short_names(names: Sequence[str]) -> list[str]:
    """ "student" for one, else "student" and the last part, the whole path where that is not enough."""
    if len(names) == 1:
        return ["student"]
    last = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    twice = Counter(last)
    return [f"student {name if twice[end] > 1 else end}" for name, end in zip(names, last, strict=True)]


def _measured(
    codecs: "CodecBundle", ways: Sequence[Way], captions: Sequence[str], seeds: int, keep: int, progress: bool
) -> tuple[list[Column], list[Shown]]:
    """All columns, the truth and its bound first, and the clips of the first prompts for the pictures."""
    from tqdm import tqdm

    puppets = held_out(len(captions))
    columns: list[Column] = []
    shown: list[Shown] = []
    with tqdm(total=len(ways) + 3, desc="measuring", unit="column", disable=not progress) as bar:
        reference = Reference(puppets, codecs, first_draw=seeds)
        bar.update()
        truths = [ground_truth(real_draw(puppets, draw)) for draw in range(seeds)]
        bounds = [through_codec(truth, codecs) for truth in truths]
        bound_scores = [clips.score() for clips in bounds]

        def add(name: str, role: str, draws: Sequence[Clips], facts: dict[str, Any] | None = None) -> None:
            scores: list[Scores] = bound_scores
            if role != "bound":
                scores = [c.score(b) for c, b in zip(draws, bound_scores, strict=True)]
            place = reference.place(by_prompt([embed(clips, codecs) for clips in draws]))
            columns.append(column(name, role, scores, [clips.waves for clips in draws], place, facts))
            if role != "truth":
                first = draws[0]
                shown.append(
                    Shown(name, role, first.frames[:keep], first.waves[:keep], scores[0].clips[:keep])
                )
            bar.update()

        add("ground truth", "truth", truths)
        add(BOUND, "bound", bounds)
        for number, way in enumerate(ways):
            role = "student" if not way.keep else "teacher" if number == 0 else "baseline"
            add(
                way.name,
                role,
                [way.clips(captions, draw * len(captions)) for draw in range(seeds)],
                way.facts(),
            )
    return columns, shown


# ----------------------------------------------------------------------------------------------------
# The result file
# ----------------------------------------------------------------------------------------------------


def _values(found: Comparison, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything that is reported, as plain values."""
    columns = {}
    for own in found.columns:
        rows = {}
        for row in ROWS:
            rows[row.name] = found.value(own, row).to_dict()
            if row.better == "bound" and own.role not in ("truth", "bound"):
                rows[row.name]["off"] = found.off(own, row).to_dict()
        counts = np.bincount(own.skins.ravel(), minlength=len(SKINS)).tolist()
        columns[own.name] = {
            "role": own.role, "n": own.clips, "skins": dict(zip(SKINS, counts, strict=True)), **own.facts, "rows": rows
        }  # fmt: skip
    against: dict[str, Any] = {}
    diversity: dict[str, Any] = {}
    for own in found.of_role("student"):
        against[own.name] = {
            other.name: {row.name: found.against(own, other, row).to_dict() for row in ROWS}
            for other in found.of_role("teacher", "baseline")
        }
        kept = {row.name: found.kept(own, row) for row in ROWS if row.of == "diversity"}
        diversity[own.name] = {
            name: {"ratio": ratio.to_dict(), "verdict": word} for name, (ratio, word) in kept.items()
        }
    values = {
        "format": FORMAT,
        "held_out_seed": HELD_OUT_SEED,
        **facts,
        "columns": columns,
        "against": against,
        "diversity": diversity,
        "rows": {row.name: {"about": row.about, "better": row.better, "of": row.of} for row in ROWS},
    }
    values["claims"] = {name: distill_report.claims(values, name) for name in against}
    return values


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.dmd2")
