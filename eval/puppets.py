"""Evaluation of a checkpoint of a puppet world, or of a folder of clips, on held-out prompts, with two upper bounds.

    python -m eval.puppets checkpoint=scene/base
    python -m eval.puppets clips=FOLDER_OF_MP4_AND_TXT

The prompts are those of held-out puppets (`eval.clips`). The bounds are the puppets themselves, and the puppets through the
codec, which no model of its latents can beat.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tiny.puppets import FPS, SAMPLE_RATE, parse_caption
from eval import puppet_tables
from eval.clip_values import reported, sync_values, write_clip_values
from eval.clips import BOUND, HELD_OUT_SEED, Clips, SheetColumn, ground_truth, held_out, noise_seed, through_codec
from eval.generate import require_tiny, tiny_pipelines
from eval.metrics.puppet_clips import CLIP_METRICS
from eval.output import folder_for, publish, require_at_least
from eval.puppet_vision import require_measurable
from eval.scores import Scores, clip_values, skills
from magihuman.errors import UserError
from magihuman.io.files import write_result

if TYPE_CHECKING:
    from magihuman.codecs.bundle import CodecBundle

FORMAT = "magihuman-scores/1"


def bounds(count: int, codecs: "CodecBundle", size: int = 64) -> dict[str, Scores]:
    """Scores of the ground truth and of the ground truth through the codec, the reference of lip-sync skill."""
    truth = ground_truth(held_out(count, codecs.name), size)
    coded = through_codec(truth, codecs).score()
    coded = replace(coded, table={**coded.table, **skills(coded.own, coded, paired=True)})  # 1 by definition
    return {"ground truth": truth.score(coded), BOUND: coded}


def generate(
    checkpoint: str,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch: int = 20,
    device: str = "auto",
    progress: bool = True,
    **overrides: Any,
) -> tuple[Clips, dict[str, Any], "CodecBundle"]:
    """Sample a checkpoint of a puppet world.

    Args:
        overrides: of the checkpoint's sampling settings, see `inference.pipeline.Pipeline.settings`.

    Returns:
        clips, facts (settings, seconds), codecs.

    Raises:
        UserError: unknown checkpoint, one of no puppet world, or a setting that cannot be.
    """
    (pipeline,) = tiny_pipelines("eval.puppets", checkpoint, device=device)
    from tqdm import tqdm

    settings = pipeline.settings(**overrides)
    clips, start = Clips(), time.perf_counter()
    with tqdm(total=len(prompts), desc="sampling", unit="clip", disable=not progress) as bar:
        for first in range(0, len(prompts), batch):
            part = list(prompts[first : first + batch])
            seeds = [noise_seed(seed, first + k) for k in range(len(part))]
            for clip in map(pipeline.decode, pipeline.draft(part, seeds, settings)):
                clips.frames.append(clip.frames.numpy())
                clips.waves.append(clip.wave.numpy().mean(0) if clip.wave.numel() else None)
                clips.captions.append(clip.prompt)
            bar.update(len(part))
    facts = {
        "checkpoint": str(checkpoint),
        "sampling": settings.to_dict(),
        "sampling_seed": seed,
        "seconds": round(time.perf_counter() - start, 2),
        "seconds_by_stage": {stage: round(value, 2) for stage, value in pipeline.times.items()},
        "device": str(pipeline.device),
    }
    return clips, facts, pipeline.codecs


def read_folder(folder: str | Path, limit: int, progress: bool = True) -> tuple[Clips, dict[str, str]]:
    """The first `limit` mp4 files of a folder with their captions, and the reasons why others could not be used.

    Raises:
        UserError: no folder, no mp4 in it, none that can be used, or clips of several worlds.
    """
    from tqdm import tqdm

    from magihuman.media.container import MediaError
    from magihuman.media.reading import read_clip

    movies = sorted(Path(folder).glob("*.mp4"))[:limit]
    if not movies:
        raise UserError(
            f"clips={folder} holds no .mp4; give a folder of mp4 files, each with a caption in a .txt of the same name"
        )
    clips, refused = Clips(), {}
    first: dict[str, str] = {}  # world -> its first clip
    for movie in tqdm(movies, desc="reading", unit="clip", disable=not progress):
        try:
            caption = movie.with_suffix(".txt").read_text(encoding="utf-8").strip()
            world, *_ = parse_caption(caption)
            clip = read_clip(movie, fps=FPS, rate=SAMPLE_RATE)
            frames = clip.frames.numpy()
            require_measurable(frames, world)
        except (OSError, ValueError, MediaError) as error:
            refused[movie.name] = str(error)
            continue
        if len(first := {world: movie.name} | first) > 1:
            named = " and ".join(f"{name} is of {world}" for world, name in sorted(first.items()))
            raise UserError(f"clips={folder} holds clips of several worlds: {named}; give a folder of one world")
        clips.frames.append(frames)
        clips.waves.append(None if clip.wave is None else clip.wave.numpy().mean(0))
        clips.captions.append(caption)
    if not clips.captions:
        name, why = next(iter(refused.items()))
        raise UserError(f"clips={folder}: none of {len(movies)} files can be used; the first, {name}: {why}")
    return clips, refused


def run(
    checkpoint: str | None = None,
    clips: str | None = None,
    prompts: int = 200,
    steps: int | None = None,
    solver: str | None = None,
    cfg: float | None = None,
    seed: int = 0,
    batch: int = 20,
    output: str | None = None,
    device: str = "auto",
    keep: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a checkpoint of a puppet world, or a folder of clips, with its upper bounds.

    Prints the table; writes scores.json, scores.md, scores.png, clips.json, clips.png, clip_values.json and a few mp4 files.

    Args:
        checkpoint: shipped name, exported folder or run folder; its clips are sampled from held-out prompts
        clips: instead of a checkpoint, a folder of mp4 files with .txt captions
        prompts: how many prompts (of `clips`: at most so many files)
        steps: solver steps; none takes the checkpoint's
        solver: none takes the checkpoint's
        cfg: guidance scale, 1 is no guidance; none takes the checkpoint's
        seed: of the sampling noise
        batch: clips sampled at once; changes memory and speed only
        output: folder; none is eval/ in a run folder, else runs/eval/NAME
        device: auto, cpu or cuda
        keep: how many clips to save and show
        progress: show bars

    Returns:
        Where scores.json is, and per row of the table value, low, high and the bound's value (None: not
        available; scores.json says why).

    Raises:
        UserError: not exactly one of checkpoint and clips, or a value that cannot be used.
    """
    if (checkpoint is None) == (clips is None):
        raise UserError("give either checkpoint=NAME_OR_FOLDER or clips=FOLDER")
    require_at_least(prompts=(prompts, 1), batch=(batch, 1), keep=(keep, 0), seed=(seed, 0))
    start = time.perf_counter()
    refused: dict[str, str] = {}
    facts: dict[str, Any] = {}
    if checkpoint is not None:
        captions = [puppet.caption for puppet in held_out(prompts, require_tiny("eval.puppets", checkpoint))]
        made, facts, codecs = generate(
            checkpoint, captions, seed=seed, batch=batch, device=device, progress=progress, steps=steps, solver=solver,
            cfg=cfg,
        )  # fmt: skip
    else:
        made, refused = read_folder(str(clips), prompts, progress)
        from magihuman.codecs.bundle import load_bundle

        codecs, facts = load_bundle(parse_caption(made.captions[0])[0]), {"clips": str(clips), "refused": refused}
    folder = Path(output) if output else folder_for("eval", str(checkpoint or clips))
    limits = bounds(prompts if checkpoint else len(made.captions), codecs, made.frames[0].shape[1])
    name = _name_of(checkpoint, clips)
    scores = made.score(limits[BOUND])
    columns = {**limits, name: scores}
    shown = {column: found.to_dict() for column, found in columns.items()}
    shown[name] = {**facts, **shown[name]}
    values = {
        "format": FORMAT,
        "held_out_seed": HELD_OUT_SEED,
        "seconds": round(time.perf_counter() - start, 1),
        "columns": shown,
    }
    from eval import figures

    drawn = {"scores": partial(figures.score_bars, values)}
    if keep:
        first = SheetColumn(name, "model", made, scores.clips[:keep])
        first.write(folder / "clips", "clip", digits=6)
        drawn["clips"] = partial(figures.contact_sheet, [first])
    for file, why in refused.items():
        print(f"not used: {file}: {why}")
    write_result(folder / "clips.json", {of: [clip.to_dict() for clip in c.clips] for of, c in columns.items()})
    publish(folder, "scores", values, drawn, puppet_tables.scores_text(values))
    bound = limits[BOUND].table
    found = {key: {**m.to_dict(), "bound": bound[key].value} for key, m in scores.table.items()}
    write_clip_values(
        folder, made.captions, found, *(values_per_clip(column, limits[BOUND]) for column in (scores, limits[BOUND]))
    )
    return {"scores": str(folder / "scores.json"), "n": len(scores.clips), **reported(found)}


def values_per_clip(scores: Scores, bound: Scores) -> dict[str, np.ndarray]:
    """Metric -> one value per clip [n], lip sync included; both sets are of the same captions."""
    values = {key: clip_values(metric, scores.clips) for key, metric in CLIP_METRICS.items()}
    sync = (
        sync_values(scores.own, bound.own, bound.other) if scores.captions == bound.captions else {"sync_r": scores.own}
    )
    return {**values, "sync_retrieval": scores.found, **sync}


def _name_of(checkpoint: str | None, clips: str | None) -> str:
    """Of the column: a shipped name as it is, of a folder the last part."""
    from magihuman.zoo import checkpoint_names

    name = str(checkpoint or clips).rstrip("/")
    return name if checkpoint is not None and name in checkpoint_names() else name.rsplit("/", 1)[-1]


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.puppets")
