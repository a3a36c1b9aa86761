"""Evaluation of few-step students of puppets: against their teacher, the teacher in few steps, and real puppets.

    python -m eval.dmd2 student=runs/dmd2/NAME
    python -m eval.dmd2 student=runs/dmd2/a,runs/dmd2/b,runs/dmd2/c one_recipe=true      # verdict on the recipe

All columns are clips of the same held-out prompts (`eval.clips`), models from the same noise; decoders and metrics
are the same for all (`eval.paired`). Claims (`eval.verdicts`) are on quality, against the teacher and its few-step
baselines; on what is matched, against real puppets and against the distillation's target: the teacher with the guidance of
the training; and on speed.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval import puppet_tables
from eval.clip_values import reported, sync_values, write_clip_values
from eval.clips import BOUND, HELD_OUT_SEED, Clips, SheetColumn, ground_truth, held_out, through_codec
from eval.diversity import Reference, by_prompt, embed, real_draw
from eval.generate import Sampler, sample_all, tiny_pipelines
from eval.output import folder_for, publish, require_at_least, short_names
from eval.paired import ROWS, Column, Comparison, column, share_distance_of
from eval.scores import Scores
from eval.verdicts import match_claim, quality_claim, scope, speed_claim
from magihuman.errors import UserError

if TYPE_CHECKING:
    from inference.settings import Settings
    from magihuman.flow.guidance import Guidance

FORMAT = "magihuman-compare/2"


def run(
    student: str,
    teacher: str = "scene/base",
    prompts: int = 120,
    seeds: int = 4,
    one_recipe: bool = False,
    batch: int = 10,
    output: str | None = None,
    cache: str | None = "tiny_world/compare",
    device: str = "auto",
    keep: int = 4,
    progress: bool = True,
) -> dict[str, Any]:
    """Compare distilled students with their teacher, on held-out prompts.

    Prints the table and a verdict in words; writes compare.json, compare.md, compare.png, sheet.png and sample clips.
    For one student clip_values.json is written, too, and in its run folder report.md and report.png.

    Args:
        student: shipped name, exported folder or run folder; several with commas
        teacher: checkpoint that they were distilled from, likewise
        prompts: number of captions
        seeds: clips of each caption; diversity needs at least 2
        one_recipe: the students are one recipe trained with several seeds: one verdict, on the recipe
        batch: clips sampled at once; changes memory and speed only
        output: folder; none is compare/ in a run folder, else runs/compare/NAME
        cache: folder in which the teacher's latents are cached for the next comparison; none caches nothing
        device: auto, cpu or cuda
        keep: number of captions whose clips are shown and saved
        progress: show bars

    Returns:
        Where compare.json and the report are, the verdicts per student, and of one student per metric value, low, high
        and the bound's value.

    Raises:
        UserError: an unknown checkpoint, one of no puppet world, students of different sampling, students that are not one
            recipe, or a value that cannot be used.
    """
    require_at_least(prompts=(prompts, 2), seeds=(seeds, 1), batch=(batch, 1), keep=(keep, 1))
    names = [part.strip() for part in student.split(",") if part.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"student={student} should name one or more checkpoints, each once, with commas")
    if one_recipe:
        require_one_recipe(names)
    start = time.perf_counter()
    samplers, targets = _samplers(names, teacher, device)
    folder = Path(output) if output else folder_for("compare", *names)
    captions = [puppet.caption for puppet in held_out(prompts, samplers[0].pipeline.codecs.name)]
    sample_all(
        samplers, captions, range(seeds), batch=batch, folder=None if cache is None else Path(cache), progress=progress
    )  # fmt: skip
    columns, shown = _measured(samplers, captions, seeds, min(keep, prompts), progress)
    values = _values(Comparison(columns), targets, one_recipe, {"prompts": prompts, "seeds": list(range(seeds))})
    values["seconds"] = round(time.perf_counter() - start, 1)
    from eval import figures

    drawn = {"compare": partial(figures.comparison_points, values), "sheet": partial(figures.contact_sheet, shown)}
    publish(folder, "compare", values, drawn, puppet_tables.comparison_text(values))
    saved: list[Path] = []
    for one in shown:
        if one.role in ("teacher", "student"):
            title = one.name.split(",")[0].replace("student ", "").replace("/", "-").strip(".- ")
            saved += one.write(folder / "clips", title)
    report, found = None, {}
    if len(names) == 1:
        found = _keep_values(folder, captions, columns, values)
    if len(names) == 1 and (Path(names[0]) / "metrics.csv").is_file():
        report = _write_report(Path(names[0]), folder, values, shown, saved)
    return {
        "compare": str(folder / "compare.json"),
        "report": None if report is None else str(report),
        "verdicts": {
            name: {claim["about"]: claim["verdict"] for claim in claims} for name, claims in values["claims"].items()
        },
        **reported(found),
    }


def _keep_values(
    folder: Path, captions: Sequence[str], columns: Sequence[Column], values: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Write the student's values per clip; its measures with the bound's value."""
    (student,), (bound,) = ([c for c in columns if c.role == role] for role in ("student", "bound"))
    rows, best = (values["columns"][c.name]["rows"] for c in (student, bound))
    found = {key: {**measure, "bound": best[key]["value"]} for key, measure in rows.items()}
    per_clip = [
        {**c.values, **sync_values(c.values["own"], bound.values["own"], bound.values["other"])}
        for c in (student, bound)
    ]
    write_clip_values(folder, captions, found, *per_clip)
    return found


# ---- Columns ----


def sampler_words(settings: "Settings") -> str:
    """Name of sampling settings in a table: "32 steps, CFG"."""
    kind = {"unipc": "", "renoise": "re-noise "}.get(settings.solver, f"{settings.solver} ")
    return f"{settings.steps} {kind}steps, {'CFG' if settings.guidance.needed else 'no CFG'}"


def training_settings(checkpoint: str) -> Mapping[str, Any]:
    """Settings that a checkpoint was trained with, from its run folder or its export; {} where there is no record.

    Raises:
        UserError: an unknown checkpoint, or a record that cannot be read.
    """
    import yaml

    from magihuman import zoo

    folder = zoo.find(checkpoint)
    homes = (folder.parent, folder) if folder.name == "export" else (folder,)
    files = [home / name for home in homes for name in ("config.yaml", "training.yaml")]
    file = next((file for file in files if file.is_file()), None)
    try:
        return {} if file is None else dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); restore it") from None


def require_one_recipe(names: Sequence[str]) -> None:
    """Refuse students that are not one recipe trained with several seeds.

    Raises:
        UserError: a student without a record of its settings, two of the same seed, or settings that differ.
    """
    from eval.compare_runs.run_records import NO_SETTING, flatten

    ignored = {*NO_SETTING, "seed", "after_fit", "prompts", "callbacks"}  # what changes no weights
    known = {name: training_settings(name) for name in names}
    if unknown := [name for name, settings in known.items() if not settings]:
        raise UserError(f"one_recipe=true, but {unknown[0]} has no record of its settings (config.yaml, training.yaml)")
    plain = [
        {
            path: value
            for path, value in flatten(settings)
            if not any(path == name or path.startswith(f"{name}.") for name in ignored)
        }
        for settings in known.values()
    ]
    paths = sorted({path for settings in plain for path in settings})
    differ = [path for path in paths if any(settings.get(path) != plain[0].get(path) for settings in plain)]
    if differ:
        raise UserError(f"one_recipe=true, but {', '.join(names)} differ in {', '.join(differ)}; leave one_recipe out")
    if len(names) < 2 or len({settings.get("seed") for settings in known.values()}) < len(names):
        raise UserError(f"one_recipe=true needs two or more students of different seeds, not {', '.join(names)}")


def _target_guidance(name: str, own: "Guidance") -> "Guidance | None":
    """Guidance of the teacher in a student's training, its own where the settings say null; None where it is not known."""
    from magihuman.flow.guidance import Guidance

    recipe = training_settings(name).get("recipe") or {}
    if "guidance" not in recipe:
        return None
    return own if recipe["guidance"] is None else Guidance.from_dict(recipe["guidance"])


def _samplers(names: Sequence[str], teacher: str, device: str) -> tuple[list[Sampler], dict[str, str | None]]:
    """The teacher with its own settings, as the students' target, in as few steps, with their sampler; the students.

    Returns:
        samplers, and for each student's the name of its target's; None where the guidance of its training is not known.
    """
    pipelines = tiny_pipelines("eval.dmd2", teacher, *names, device=device)
    full, few = pipelines[0].settings(), pipelines[1].settings()
    for name, pipeline in zip(names, pipelines[1:], strict=True):
        if pipeline.settings() != few:
            own = pipeline.settings()
            raise UserError(
                f"{name} is sampled otherwise than {names[0]} ({sampler_words(own)}, shift {own.shift:g}, against "
                f"{sampler_words(few)}, shift {few.shift:g}); compare them one by one"
            )
    in_few = pipelines[0].settings(steps=few.steps, cfg=1.0)
    alone = few if few.guidance.needed else replace(few, guidance=in_few.guidance)
    guidances = {name: _target_guidance(name, full.guidance) for name in names}
    aims = {
        name: None if guidance is None else replace(full, guidance=guidance) for name, guidance in guidances.items()
    }
    samplers: list[Sampler] = []
    few_alone = replace(alone, negative_prompt=full.negative_prompt)
    for settings in (full, *(aim for aim in aims.values() if aim is not None), in_few, few_alone):
        name = f"teacher, {sampler_words(settings)}"
        if settings not in [sampler.settings for sampler in samplers]:
            scales = settings.guidance
            more = f"shift {settings.shift:g}, scales {scales.video_high:g}, {scales.video_low:g}, {scales.audio:g}"
            taken = name in [sampler.name for sampler in samplers]
            samplers.append(Sampler(f"{name}, {more}" if taken else name, pipelines[0], settings, cache=True))
    titles = ["student"] if len(names) == 1 else [f"student {name}" for name in short_names(names)]
    targets: dict[str, str | None] = {}
    for name, title, pipeline in zip(names, titles, pipelines[1:], strict=True):
        student = Sampler(f"{title}, {sampler_words(few)}", pipeline, few)
        targets[student.name] = next((sampler.name for sampler in samplers if sampler.settings == aims[name]), None)
        samplers.append(student)
    return samplers, targets


def _measured(
    samplers: Sequence[Sampler], captions: Sequence[str], seeds: int, keep: int, progress: bool
) -> tuple[list[Column], list[SheetColumn]]:
    """All columns, ground truth and codec bound first, and the clips of the first prompts for the contact sheet."""
    from tqdm import tqdm

    codecs = samplers[0].pipeline.codecs
    puppets = held_out(len(captions), codecs.name)
    columns: list[Column] = []
    shown: list[SheetColumn] = []
    with tqdm(total=len(samplers) + 3, desc="measuring", unit="column", disable=not progress) as bar:
        reference = Reference(puppets, codecs, first_draw=seeds)
        bar.update()
        truths = [ground_truth(real_draw(puppets, draw)) for draw in range(seeds)]
        bounds = [through_codec(truth, codecs) for truth in truths]
        bound_scores = [clips.score() for clips in bounds]

        def add(name: str, role: str, draws: Sequence[Clips], facts: dict[str, Any] | None = None) -> None:
            scores: list[Scores] = bound_scores
            if role != "bound":
                scores = [c.score(b) for c, b in zip(draws, bound_scores, strict=True)]
            distribution = reference.distances(by_prompt([embed(clips, codecs) for clips in draws]))
            columns.append(column(name, role, scores, [clips.waves for clips in draws], distribution, facts))
            if role != "truth":
                shown.append(SheetColumn(name, role, draws[0], scores[0].clips[:keep]))
            bar.update()

        add("ground truth", "truth", truths)
        add(BOUND, "bound", bounds)
        for number, sampler in enumerate(samplers):
            role = "student" if not sampler.cache else "teacher" if number == 0 else "baseline"
            draws = [sampler.clips(captions, draw * len(captions)) for draw in range(seeds)]
            add(sampler.name, role, draws, sampler.facts())
    return columns, shown


# ---- Result files ----


def _values(
    found: Comparison, targets: Mapping[str, str | None], one_recipe: bool, facts: dict[str, Any]
) -> dict[str, Any]:
    """Content of compare.json; `targets`: of a student's column, the column that its training matched."""
    columns = {}
    for own in found.columns:
        rows = {}
        for row in ROWS:
            rows[row.name] = found.value(own, row).to_dict()
            if row.direction == "target" and own.role not in ("truth", "bound"):
                rows[row.name]["off"] = found.off(own, row).to_dict()
        shares = {}
        for name, attribute in own.open.items():
            counts = dict(zip(attribute.shares, attribute.counts.sum(0).astype(int).tolist(), strict=True))
            world = share_distance_of([attribute])
            w, p = (world.value, world.p) if world else (None, None)
            shares[name] = {"counts": counts, "expected": attribute.shares, "w": w, "p": p}
        columns[own.name] = {"role": own.role, "n": own.clips, "shares": shares, **own.facts, "rows": rows}
    students = found.of_role("student")
    judged = {f"recipe, {len(students)} training seeds": students} if one_recipe else {s.name: [s] for s in students}
    return {
        "format": FORMAT, "held_out_seed": HELD_OUT_SEED, **facts, "columns": columns,
        "scope": {name: scope(len(own)) for name, own in judged.items()},
        "claims": {name: _claims(found, own, targets[own[0].name]) for name, own in judged.items()},
    }  # fmt: skip


def _claims(found: Comparison, own: Sequence[Column], target: str | None) -> list[dict[str, Any]]:
    """Claims on a checkpoint, or on a recipe of several training seeds."""
    others = found.of_role("teacher", "baseline")
    claims = [quality_claim(other.name, found.quality(own, other)) for other in others]
    claims.append(match_claim("real puppets, through the codec", found.match(own, found.bound)))
    aim = next((other for other in others if other.name == target), None)
    about = "the distillation's target"
    if aim is None:
        claims.append({**match_claim(f"{about}, which its settings do not say", {}), "verdict": "n/a"})
    else:
        claims.append(match_claim(f"{about}: {aim.name}", found.match(own, aim)))
    teacher = found.of_role("teacher")[0]
    mine = {key: float(np.mean([c.facts[key] for c in own])) for key in ("seconds_per_clip",) if key in own[0].facts}
    if mine and "seconds_per_clip" in teacher.facts:
        claims.append(speed_claim({**own[0].facts, **mine}, teacher.name, teacher.facts))
    return claims


def _write_report(
    run: Path, folder: Path, values: dict[str, Any], shown: Sequence[SheetColumn], saved: Sequence[Path]
) -> Path:
    """Write report.md and report.png into a run folder; `folder` has the comparison's own files, `saved` are its clips."""
    from eval.figures import run_page
    from magihuman.training.report import heading, sample_sheets

    run_page(run / "metrics.csv", shown).savefig(run / "report.png", dpi=90)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    compare, sheet, numbers, *clips = (
        os.path.relpath(path, run)
        for path in (*(folder / name for name in ("compare.png", "sheet.png", "compare.json")), *saved)
    )
    about = f"Metric by metric: [compare.png]({compare}), all clips: [sheet.png]({sheet}), all values: [compare.json]"
    paragraphs = [
        puppet_tables.comparison(values),
        "![curves and clips](report.png)",
        f"{about}({numbers}).",
        "Clips: " + ", ".join(f"[{Path(link).stem}]({link})" for link in clips) + ".",
    ]
    lines = [*heading(record), "\n\n".join(paragraphs), "", *sample_sheets(run)]
    (run / "report.md").write_text("\n".join(lines), encoding="utf-8")
    return run / "report.md"


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.dmd2")
