"""Evaluation of a super-resolution checkpoint of the tiny world: against plain enlarging, with and without the audio.

    python -m eval.sr checkpoint=tiny/sr output=eval/results/tiny_sr

The clips are those of held-out puppets (`eval.puppets`); the second stage gets two sets of them:

clip    the puppet drawn at 64 pixels, through the codec. The truth at 128 pixels is known, so PSNR and SSIM are.
base    samples of the first stage for the puppet's caption, with its own audio. There is no truth; sharpness and lip
        sync can be measured.

Columns: bicubic (decoded, then enlarged), latents (enlarged trilinearly, then decoded: the second stage's input
without noise), sr, and as the codec bound the puppet drawn at 128 pixels, through the codec.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tiny.puppets import synthesise
from eval import stats
from eval.image_metrics import psnr, ssim
from eval.output import folder_for, publish, require_at_least, short_names, training_record
from eval.puppet_speech import called_opening
from eval.puppet_vision import measure_frames, mouth_region
from eval.puppets import HELD_OUT_SEED, frames_tensor, ground_truth, held_out, noise_seed, require_tiny, tiny_pipelines
from eval.scores import correlation
from eval.tables import CANDIDATES, METRICS
from magihuman.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from magihuman.codecs.bundle import CodecBundle
    from magihuman.zoo import Loaded

PARTS = ("table", "audio", "steps", "others")
COARSE = (1, 2, 4, 8)
STEPS = (1, 2, 3, 5, 8, 16)


@dataclass
class StageInputs:
    """Held-out clips as inputs of the second stage.

    Attributes:
        video [n,C,T,h,w], audio [n,A,Ca]: first-stage latents; text: n tensors [S,Ct].
        called: per clip the mouth opening that its audio calls for, [F].
        truth: true frames uint8 [F,H,W,3] at the second stage's size, or None where there are none.
    """

    video: "Tensor"
    audio: "Tensor"
    text: "list[Tensor]"
    called: list[np.ndarray | None]
    truth: list[np.ndarray] | None


# A batch (slice) of the clips -> their enlarged latents, or frames uint8 [B,F,H,W,3].
Method = Callable[[slice], "Tensor"]


def drawn_clips(count: int, codecs: "CodecBundle", size: int, sr_size: int) -> StageInputs:
    """The puppets themselves, drawn at the first stage's size and encoded."""
    import torch

    puppets = held_out(count)
    waves = [synthesise(p) for p in puppets]
    audio = torch.cat([codecs.audio_codec.encode(torch.from_numpy(w)[None, None].float()) for w in waves])
    return StageInputs(
        video=encode(codecs, ground_truth(puppets, size).frames),
        audio=audio,
        text=codecs.text_encoder.encode([p.caption for p in puppets]),
        called=[called_opening(w, codecs.frames) for w in waves],
        truth=ground_truth(puppets, sr_size).frames,
    )


def sampled_clips(count: int, checkpoint: str, seed: int, batch: int, progress: bool) -> StageInputs:
    """Samples of the first stage for the puppets' captions, with the mouth openings that their own audio calls for."""
    import torch
    from tqdm import tqdm

    (pipeline,) = tiny_pipelines("eval.sr", checkpoint, device="cpu")
    settings, captions = pipeline.settings(), [p.caption for p in held_out(count)]
    drafts = []
    for first in tqdm(range(0, count, batch), desc="first stage", disable=not progress):
        part = captions[first : first + batch]
        drafts += pipeline.draft(part, [noise_seed(seed, first + k) for k in range(len(part))], settings)
    waves = [pipeline.wave(draft)[0].numpy().mean(0) for draft in drafts]
    return StageInputs(
        video=torch.stack([draft.video for draft in drafts]),
        audio=torch.stack([draft.audio for draft in drafts]),
        text=pipeline.codecs.text_encoder.encode(captions),
        called=[called_opening(wave, pipeline.codecs.frames) for wave in waves],
        truth=None,
    )


def encode(codecs: "CodecBundle", frames: Sequence[np.ndarray], batch: int = 10) -> "Tensor":
    """Frames uint8 [F,H,W,3] of n clips -> latents [n,C,T,h,w]."""
    import torch

    batches = [frames[first : first + batch] for first in range(0, len(frames), batch)]
    return torch.cat([codecs.video_codec.encode(frames_tensor(part)) for part in batches])


def bicubic(frames: "Tensor", size: int) -> "Tensor":
    """Frames uint8 [B,F,h,w,3] -> uint8 [B,F,size,size,3]."""
    import torch
    import torch.nn.functional as F

    flat = frames.flatten(0, 1).permute(0, 3, 1, 2).float()
    large = F.interpolate(flat, (size, size), mode="bicubic", align_corners=False)
    return large.add(0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])


def _clip_values(frames: np.ndarray, number: int, inputs: StageInputs, mouth: np.ndarray) -> dict[str, float]:
    """Metrics of one clip, frames uint8 [F,H,W,3].

    `own` and `other` are the mouth's correlation with the clip's own audio and, in the mean, with that of the next
    clips; a static mouth counts 0, since it follows nothing.
    """
    count = len(inputs.text)
    vision = measure_frames(frames)
    called = [inputs.called[(number + k) % count] for k in range(min(CANDIDATES, count))]
    follows = [0.0 if vision.static or c is None else correlation(vision.openness, c) for c in called]
    values = {
        "sharpness": vision.sharpness,
        "mouth_sharpness": vision.mouth_sharpness,
        "flicker": vision.flicker,
        "own": follows[0],
        "other": float(np.mean(follows[1:])) if count > 1 else 0.0,
    }
    if inputs.truth is not None:
        truth = inputs.truth[number]
        values["psnr"], values["mouth_psnr"] = psnr(frames, truth), psnr(frames, truth, mouth)
        values["ssim"] = ssim(frames, truth)
    return values


def paired_columns(values: Mapping[str, Mapping[str, np.ndarray]], against: str) -> dict[str, Any]:
    """Measures of every column, and the paired differences of column `against` and each other column.

    Args:
        values: column -> name -> values per clip [n]; "bound" is the reference of the skill.
    """
    level = values["bound"]["other"]
    best = values["bound"]["own"] - level
    per_clip, measures = {}, {}
    for name, column in values.items():
        skill = (column["own"] - level) / float(best.mean())  # a clip's share: differences of skills are means of these
        rows = {**column, "sync_r": column["own"], "sync_skill": skill}
        per_clip[name] = {key: rows[key] for key in METRICS if key in rows}
        measures[name] = {key: stats.mean(row).to_dict() for key, row in per_clip[name].items()}
        measures[name]["sync_skill"] = stats.ratio(column["own"] - level, best).to_dict()
    own = per_clip[against]
    differences = {
        name: {key: stats.difference(own[key], rows[key]).to_dict() for key in own if key in rows}
        for name, rows in per_clip.items()
        if name not in (against, "bound")
    }
    return {"columns": measures, "against": against, "differences": differences}


def run(
    checkpoint: str = "tiny/sr",
    base: str = "tiny/base",
    clips: int = 200,
    parts: str = "table,audio,steps",
    others: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch: int = 10,
    output: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a super-resolution checkpoint of the tiny world on held-out clips.

    Prints the tables; writes, for each part, PART.json and PART.md, and figures: clips.png, audio.png, steps.png.

    Args:
        checkpoint: shipped name, exported folder or run folder of the second stage
        base: first stage, whose samples are refined, too
        clips: number of clips
        parts: any of table, audio, steps, others, with commas: against enlarging without a network; with and
            without the audio on coarser and coarser first stages; over the number of solver steps; against other
            checkpoints
        others: run folders or names of the other checkpoints, with commas, for parts=others
        steps: solver steps; none takes the checkpoint's
        seed: of all noise
        batch: clips computed at once; changes memory and speed only
        output: folder; none is eval/ in a run folder, else runs/eval/NAME
        progress: show bars

    Returns:
        Where the first part's JSON is, and per part its table.

    Raises:
        UserError: a checkpoint other than of the tiny world, or of the other stage, or a value that cannot be used.
    """
    chosen = [part.strip() for part in parts.split(",")]
    for part in chosen:
        if part not in PARTS:
            raise UserError(f"parts={parts}: {part!r} is unknown; choose from {', '.join(PARTS)}")
    require_at_least(clips=(clips, 2), batch=(batch, 1))
    if ("others" in chosen) != (others is not None):
        raise UserError("parts=others and others=RUN,RUN belong together; give both or none")
    compared = [checkpoint, *(str(others).split(",") if others is not None else [])]
    require_tiny("eval.sr", base, *compared)
    from inference.settings import require_role
    from magihuman import zoo
    from magihuman.codecs.bundle import load_bundle

    for name, first in [(base, True), *((name, False) for name in compared)]:
        require_role(zoo.config_of(name), name, first)
    second = zoo.load(checkpoint)
    codecs, size = load_bundle("tiny"), second.config.size.height
    folder = Path(output) if output else folder_for("eval", checkpoint)
    count = second.config.sampling.steps if steps is None else steps
    drawn = drawn_clips(clips, codecs, zoo.config_of(base).size.height, size)
    evaluation = Evaluation(second, codecs, drawn, size, count, seed, batch)
    results: dict[str, Any] = {"scores": str(folder / f"{chosen[0]}.json")}
    from eval import figures

    for part in chosen:
        start, drawn_figures = time.perf_counter(), {}
        if part == "table":
            sampled = sampled_clips(clips, base, seed, batch, progress)
            values, frames = _table(evaluation, sampled)
            drawn_figures["clips"] = figures.sr_frames(frames)
        elif part == "audio":
            values = _audio(evaluation)
            drawn_figures["audio"] = figures.sr_audio(values)
        elif part == "others":
            values = _others(evaluation, {checkpoint: second} | {name: zoo.load(name) for name in compared[1:]})
        else:
            values = _steps(evaluation)
            drawn_figures["steps"] = figures.sr_steps(values)
        facts = {
            "format": "magihuman-sr/1", "part": part, "checkpoint": checkpoint, "base": base, "clips": clips,
            "steps": count, "sampling_seed": seed, "held_out_seed": HELD_OUT_SEED,
            "seconds": round(time.perf_counter() - start, 1), **values,
        }  # fmt: skip
        publish(folder, part, facts, drawn_figures)
        results[part] = values["sets"]
    return results


@dataclass
class Evaluation:
    """A second stage with its inputs and settings, and the measurement of methods of enlarging.

    Attributes:
        drawn: the puppets themselves, with the truth; size: of the frames; steps: of the solver; seed: of the noise.
    """

    second: "Loaded"
    codecs: "CodecBundle"
    drawn: StageInputs
    size: int
    steps: int
    seed: int = 0
    batch: int = 10

    def measure(
        self, method: Method, inputs: StageInputs | None = None
    ) -> tuple[dict[str, np.ndarray], list[np.ndarray], float]:
        """Values per clip [n] by name of the frames that `method` makes, the first frames, seconds per clip."""
        import torch

        from magihuman.media.images import frames_to_uint8

        inputs = inputs or self.drawn
        values: dict[str, list[float]] = {}
        kept: list[np.ndarray] = []
        spent, count = 0.0, len(inputs.text)
        for first in range(0, count, self.batch):
            part = slice(first, min(count, first + self.batch))
            start = time.perf_counter()
            made = method(part)
            spent += time.perf_counter() - start
            if made.dtype != torch.uint8:
                made = frames_to_uint8(self.codecs.video_codec.decode(made))
            for i, frames in enumerate(made.numpy(), first):
                for name, value in _clip_values(frames, i, inputs, mouth_region(self.size)).items():
                    values.setdefault(name, []).append(value)
            kept += list(made.numpy())[: 8 - len(kept)]
        return {name: np.array(column) for name, column in values.items()}, kept, round(spent / count, 4)

    def refiner(
        self,
        inputs: StageInputs | None = None,
        steps: int | None = None,
        video: "Tensor | None" = None,
        with_audio: bool = True,
    ) -> Method:
        """Refinement as in inference; clip i has its own noise.

        Args:
            video: first-stage latents [n,C,T,h,w] instead of the inputs' own.
            with_audio: False replaces the audio by noise.
        """
        from inference.super_resolution import draw, refine
        from magihuman.flow.sampling import seeded
        from magihuman.flow.super_resolution import AUDIO_NOISE

        given = inputs or self.drawn
        low = given.video if video is None else video
        edge = self.size // self.second.config.contract.video_stride[1]
        shape = (*low.shape[1:3], edge, edge), given.audio.shape[1:]

        def method(part: slice) -> "Tensor":
            seeds = [noise_seed(self.seed, 500_000 + i) for i in range(len(given.text))[part]]
            return refine(
                self.second.denoiser, low[part], given.audio[part], given.text[part], None, shape,
                draw(shape, seeded(seeds), "cpu"), steps=steps or self.steps,
                shift=self.second.config.sampling.shift, audio_noise=AUDIO_NOISE if with_audio else 1.0,
            )  # fmt: skip

        return method

    def bicubic(self, video: "Tensor") -> Method:
        from magihuman.media.images import frames_to_uint8

        codec = self.codecs.video_codec
        return lambda part: bicubic(frames_to_uint8(codec.decode(video[part])), self.size)

    def upsampled(self, video: "Tensor") -> Method:
        from magihuman.flow.super_resolution import upsample_latents

        edge = self.size // self.second.config.contract.video_stride[1]
        return lambda part: upsample_latents(video[part], edge, edge)

    @cached_property
    def result(self) -> tuple[dict[str, np.ndarray], list[np.ndarray], float]:
        """The second stage as it is, on the clips themselves."""
        return self.measure(self.refiner())

    @cached_property
    def bound(self) -> dict[str, np.ndarray]:
        """Values of the true frames through the codec."""
        truth = self.drawn.truth or []
        return self.measure(lambda part: encode(self.codecs, truth[part], self.batch))[0]


def _table(evaluation: Evaluation, sampled: StageInputs) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Both sets of clips enlarged in three ways, and the codec bound."""
    sets, frames, seconds = {}, {}, {}
    for name, inputs in (("clip", evaluation.drawn), ("base", sampled)):
        drawn = inputs is evaluation.drawn
        measured = {
            "bicubic": evaluation.measure(evaluation.bicubic(inputs.video), inputs),
            "latents": evaluation.measure(evaluation.upsampled(inputs.video), inputs),
            "sr": evaluation.result if drawn else evaluation.measure(evaluation.refiner(inputs), inputs),
        }
        for column, (_, kept, spent) in measured.items():
            frames[f"{name}: {column}"], seconds[f"{name}: {column}"] = kept, spent
        columns = {column: values for column, (values, _, _) in measured.items()}
        sets[name] = paired_columns({**columns, "bound": evaluation.bound}, against="sr")
    frames["truth"] = (evaluation.drawn.truth or [])[:8]
    return {"sets": sets, "seconds_per_clip": seconds}, frames


def _audio(evaluation: Evaluation) -> dict[str, Any]:
    """Coarser and coarser first stages, refined with the audio and with noise instead of it."""
    from magihuman.flow.super_resolution import coarsen

    sets = {}
    for factor in COARSE:
        video = coarsen(evaluation.drawn.video, factor)
        columns = {
            "bicubic": evaluation.measure(evaluation.bicubic(video))[0],
            "latents": evaluation.measure(evaluation.upsampled(video))[0],
            "sr": (evaluation.result if factor == 1 else evaluation.measure(evaluation.refiner(video=video)))[0],
            "sr, noise for sound": evaluation.measure(evaluation.refiner(video=video, with_audio=False))[0],
            "bound": evaluation.bound,
        }
        sets[str(factor)] = paired_columns(columns, against="sr")
    return {"sets": sets}


def _steps(evaluation: Evaluation) -> dict[str, Any]:
    """The second stage with different numbers of solver steps."""
    columns, seconds = {}, {}
    for count in STEPS:
        known = count == evaluation.steps
        measured = evaluation.result if known else evaluation.measure(evaluation.refiner(steps=count))
        columns[str(count)], _, seconds[str(count)] = measured
    sets = {"clip": paired_columns({**columns, "bound": evaluation.bound}, against=str(evaluation.steps))}
    return {"sets": sets, "seconds_per_clip": seconds}


def _others(evaluation: Evaluation, checkpoints: Mapping[str, "Loaded"]) -> dict[str, Any]:
    """Several second stages on the same clips with the same noise."""
    short = dict(zip(checkpoints, short_names(list(checkpoints)), strict=True))
    columns = {short[name]: replace(evaluation, second=loaded).result[0] for name, loaded in checkpoints.items()}
    return {
        "sets": {"clip": paired_columns({**columns, "bound": evaluation.bound}, against=next(iter(columns)))},
        "trained": {short[name]: training_record(name) for name in checkpoints},
    }


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.sr")
