"""Evaluation of students of puppets conditioned on a first frame, on audio, and on both, against their teacher.

    python -m eval.conditioning student=scene/distill

First frames and audio are those of held-out puppets. A prompt leaves the skin tone open; with a first frame it is known.
With conditioning audio, the mouth is compared with the opening that this audio calls for.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.tiny.puppets import Puppet
from eval import stats
from eval.clips import Clips, ground_truth, held_out, noise_seed, through_codec
from eval.dmd2 import sampler_words
from eval.generate import Sampler, tiny_pipelines
from eval.output import folder_for, publish, require_at_least
from eval.scores import Scores

# Set -> whether clips are conditioned on (first frame, audio).
CONDITIONING = {"first frame": (True, False), "audio": (False, True), "first frame and audio": (True, True)}
SHOWN = ("attributes", "skin", "sync_skill", "sync_retrieval", "vowels")


def run(
    student: str = "scene/distill",
    teacher: str = "scene/base",
    clips: int = 100,
    seed: int = 0,
    batch: int = 10,
    output: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Sample held-out prompts with their own first frame, their own audio, and both; measure teacher and student.

    Prints a table for each; writes conditions.json and conditions.md.

    Args:
        student: shipped name, exported folder or run folder
        teacher: likewise
        clips: number of prompts
        seed: of all noise
        batch: clips sampled at once; changes memory and speed only
        output: folder; none is conditions/ in a run folder, else runs/conditions/NAME
        progress: show a bar

    Raises:
        UserError: an unknown checkpoint, or one of no puppet world.
    """
    from tqdm import tqdm

    require_at_least(clips=(clips, 2), batch=(batch, 1))
    own, other = tiny_pipelines("eval.conditioning", student, teacher, device="cpu")
    full, few = other.settings(), own.settings()
    samplers = [
        Sampler(f"teacher, {sampler_words(full)}", other, full),
        Sampler(f"teacher, {sampler_words(few)}", other, few),
        Sampler(f"student, {sampler_words(few)}", own, few),
    ]
    codecs = own.codecs
    puppets = held_out(clips, codecs.name)
    truth = ground_truth(puppets)
    bound = through_codec(truth, codecs).score()
    sets: dict[str, Any] = {}
    total = len(CONDITIONING) * len(samplers) * clips
    with tqdm(total=total, desc="sampling", unit="clip", disable=not progress) as bar:
        for name, conditions in CONDITIONING.items():
            columns = {}
            for sampler in samplers:
                made = Clips()
                for first in range(0, clips, batch):
                    part = slice(first, min(first + batch, clips))
                    _sample(sampler, truth, part, conditions, seed, made)
                    bar.update(part.stop - part.start)
                columns[sampler.name] = conditioning_column(made.score(bound), puppets, first_frame=conditions[0])
            sets[name] = columns
    values = {
        "format": "magihuman-conditions/1", "clips": clips, "seed": seed, "student": student, "teacher": teacher,
        "sets": sets,
    }  # fmt: skip
    return publish(Path(output) if output else folder_for("conditions", student), "conditions", values)


def conditioning_column(scores: Scores, puppets: Sequence[Puppet], first_frame: bool) -> dict[str, Any]:
    """Measures of one column, with 95 % intervals over clips.

    Args:
        first_frame: whether clips were conditioned on it; without it the skin tone is the model's choice.
    """
    right = [clip.vision.attributes["skin"] == puppet.skin for clip, puppet in zip(scores.clips, puppets, strict=True)]
    skin = stats.share(np.array(right)) if first_frame else stats.unavailable("no first frame", len(right))
    found = {**scores.table, "skin": skin}
    return {name: found[name].to_dict() for name in SHOWN}


def _sample(sampler: Sampler, truth: Clips, part: slice, conditions: tuple[bool, bool], seed: int, made: Clips) -> None:
    """Add clips of the prompts `part` to `made`, conditioned on the truth's (first frame, audio)."""
    from inference.sampling import sample
    from inference.settings import latent_shape
    from magihuman.flow.sampling import seeded

    pipeline, settings, captions = sampler.pipeline, sampler.settings, truth.captions[part]
    video_codec, audio_codec = pipeline.codecs.video_codec, pipeline.codecs.audio_codec
    frames, waves = truth.as_tensors(part)
    negative = pipeline.text([settings.negative_prompt]) * len(captions) if settings.needs_negative else None
    shape = latent_shape(pipeline.config, settings, (settings.height, settings.width))
    video, audio = sample(
        pipeline.denoiser, pipeline.text(captions), negative, shape, settings.steps, settings.solver,
        settings.guidance, settings.shift, seeded([noise_seed(seed, k) for k in range(part.start, part.stop)]),
        image_latent=video_codec.encode(frames[:, :, :1]) if conditions[0] else None,
        audio_latent=audio_codec.encode(waves)[:, : shape[1][0]] if conditions[1] else None,
    )  # fmt: skip
    made.add(video_codec.decode(video), audio_codec.decode(audio), captions)


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.conditioning")
