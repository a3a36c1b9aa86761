"""Measures what students of the tiny world do with a given first frame and a given sound, beside their teacher.

    python -m eval.conditioning student=tiny/distill

Frames and sounds are those of held-out puppets. A prompt leaves the skin tone open; with a first frame it is known.
With a given sound, the mouth is compared with what that very sound calls for.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval import stats
from eval.dmd2 import words_for
from eval.puppets import Clips, ground_truth, held_out, through_codec
from eval.report import folder_for, provenance
from eval.scores import CANDIDATES, Scores
from magihuman.errors import UserError

if TYPE_CHECKING:
    from data.tiny.puppets import Puppet
    from inference.pipeline import Pipeline
    from inference.settings import Settings

FORMAT = "magihuman-conditions/1"
GIVEN = {"first frame": (True, False), "sound": (False, True), "first frame and sound": (True, True)}
ROWS = {
    "attributes": "face, hair, shirt and wall as prompted",
    "skin": "skin tone of the given frame",
    "sync_skill": "lip-sync skill (chance 0, codec bound 1)",
    "sync_retrieval": f"own voice found among {CANDIDATES}",
    "vowels": "vowels right",
}


@dataclass(frozen=True)
class _Way:
    name: str
    pipeline: "Pipeline"
    settings: "Settings"


def run(
    student: str = "tiny/distill",
    teacher: str = "tiny/base",
    clips: int = 100,
    seed: int = 0,
    batch: int = 10,
    output: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Sample held-out prompts with their own first frame, their own sound, and both; measure teacher and student.

    Prints a table for each; writes conditions.json and conditions.md.

    Args:
        student: shipped name, exported folder or run folder
        teacher: likewise
        clips: how many prompts
        seed: of all noise
        batch: clips sampled at once; changes memory and speed only
        output: folder; none is conditions/ in a run folder, else runs/conditions/NAME
        progress: show a bar

    Raises:
        UserError: an unknown checkpoint, or one of other codecs.
    """
    from tqdm import tqdm

    if clips < 2:
        raise UserError(f"clips={clips}: at least 2 are needed")
    ways = _ways(teacher, student)
    codecs = ways[0].pipeline.codecs
    puppets = held_out(clips)
    truth = ground_truth(puppets)
    bound = through_codec(truth, codecs).score()
    sets: dict[str, Any] = {}
    total = len(GIVEN) * len(ways) * clips
    with tqdm(total=total, desc="sampling", unit="clip", disable=not progress) as bar:
        for name, given in GIVEN.items():
            columns = {}
            for way in ways:
                made = Clips()
                for first in range(0, clips, batch):
                    part = slice(first, min(first + batch, clips))
                    _sample(way, truth, part, given, seed, made)
                    bar.update(part.stop - part.start)
                columns[way.name] = measure(made.score(bound), bound, puppets, seen=given[0])
            sets[name] = columns
    values = {
        "format": FORMAT,
        "clips": clips,
        "seed": seed,
        "student": student,
        "teacher": teacher,
        "sets": sets,
        "provenance": provenance(),
    }
    folder = Path(output) if output else folder_for("conditions", student)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "conditions.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    text = markdown(values)
    (folder / "conditions.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"written to {folder}")
    return values


def measure(scores: Scores, bound: Scores, puppets: Sequence["Puppet"], seen: bool) -> dict[str, Any]:
    """Rows of one column, with 95 % intervals over clips.

    Args:
        bound: of the puppets through the codec.
        seen: whether the first frame was given, without which the skin tone is the model's choice.
    """
    right = [
        clip.seen.attributes["skin"] == puppet.skin
        for clip, puppet in zip(scores.clips, puppets, strict=True)
    ]
    rows = {name: scores.table[name] for name in ROWS if name in scores.table}
    rows["skin"] = (
        stats.share(np.array(right, float)) if seen else stats.unavailable("no frame was given", len(right))
    )
    return {name: rows[name].to_dict() for name in ROWS}


def markdown(values: dict[str, Any]) -> str:
    """A table for each set, as Markdown."""
    lines: list[str] = []
    for given, columns in values["sets"].items():
        lines += ["", f"Given: {given}", ""]
        lines += [f"| n={values['clips']} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
        for row, about in ROWS.items():
            cells = [_cell(column[row]) for column in columns.values()]
            if any(cells):
                lines.append(f"| {about} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def _cell(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return ""
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _ways(teacher: str, student: str) -> list[_Way]:
    """The teacher as it is meant to be sampled and in the student's sampler; the student."""
    from inference.pipeline import Pipeline
    from magihuman import zoo
    from magihuman.codecs.bundle import load_bundle

    codecs = load_bundle("tiny")
    for name in (teacher, student):
        if (of := zoo.config_of(name).codecs) != "tiny":
            raise UserError(f"eval.conditioning measures the tiny world, and {name} is of {of!r}")
    pipelines = [Pipeline(zoo.load(name), codecs) for name in (teacher, student)]
    full, few = (pipeline.settings() for pipeline in pipelines)
    return [
        _Way(f"teacher, {words_for(full)}", pipelines[0], full),
        _Way(f"teacher, {words_for(few)}", pipelines[0], few),
        _Way(f"student, {words_for(few)}", pipelines[1], few),
    ]


def _sample(way: _Way, truth: Clips, part: slice, given: tuple[bool, bool], seed: int, made: Clips) -> None:
    """Add the clips `part` to `made`; with a given sound, the clip's sound is that sound."""
    import torch

    from inference.sampling import sample
    from inference.settings import latent_shape
    from magihuman.flow.sampling import seeded
    from magihuman.media.images import frames_to_uint8

    pipeline, settings, captions = way.pipeline, way.settings, truth.captions[part]
    codecs, count = pipeline.codecs, len(captions)
    frames = torch.from_numpy(np.stack(truth.frames[part])).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    waves = np.stack([np.zeros(0) if wave is None else wave for wave in truth.waves[part]])
    image = codecs.video_codec.encode(frames[:, :, :1]) if given[0] else None
    sound = codecs.audio_codec.encode(torch.from_numpy(waves).float()[:, None]) if given[1] else None
    negative = pipeline.text([settings.negative_prompt]) * count if settings.needs_negative else None
    shape = latent_shape(pipeline.config, settings, (settings.height, settings.width))
    if sound is not None:
        sound = sound[:, : shape.audio]
    video, audio = sample(
        pipeline.denoiser, pipeline.text(captions), negative, shape, settings.steps, settings.solver,
        settings.guidance, settings.shift, seeded([seed * 1_000_003 + k for k in range(part.start, part.stop)]),
        image_latent=image, audio_latent=sound,
    )  # fmt: skip
    made.frames += list(frames_to_uint8(codecs.video_codec.decode(video)).numpy())
    made.waves += list(codecs.audio_codec.decode(audio).float().mean(1).clamp(-1, 1).numpy())
    made.captions += captions


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.conditioning")
