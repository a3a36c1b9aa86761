"""Evaluation of a super-resolution checkpoint of the tiny world: against plain enlarging, with and without the audio.

    python -m eval.sr checkpoint=tiny/sr output=eval/results/tiny_sr

The clips are those of inputs-out puppets (`eval.puppets`); the second stage gets two sets of them:

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
from eval import stats, tables
from eval.image_metrics import psnr, ssim
from eval.lip_sync import correlation
from eval.output import folder_for, provenance, training_record, write_results
from eval.puppet_speech import called_opening
from eval.puppet_vision import measure_frames, mouth_region
from eval.puppets import HELD_OUT_SEED, Clips, ground_truth, held_out, noise_seed, require_tiny
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

    from inference.pipeline import Pipeline
    from magihuman import zoo
    from magihuman.codecs.bundle import load_bundle

    loaded = zoo.load(checkpoint)
    codecs = load_bundle(loaded.config.codecs)
    pipeline = Pipeline(loaded, codecs)
    settings, captions = pipeline.settings(), [p.caption for p in held_out(count)]
    drafts = []
    for first in tqdm(range(0, count, batch), desc="first stage", disable=not progress):
        part = captions[first : first + batch]
        drafts += pipeline.draft(part, [noise_seed(seed, first + k) for k in range(len(part))], settings)
    waves = [pipeline.wave(draft)[0].numpy().mean(0) for draft in drafts]
    return StageInputs(
        video=torch.stack([draft.video for draft in drafts]),
        audio=torch.stack([draft.audio for draft in drafts]),
        text=codecs.text_encoder.encode(captions),
        called=[called_opening(wave, codecs.frames) for wave in waves],
        truth=None,
    )


def encode(codecs: "CodecBundle", frames: Sequence[np.ndarray], batch: int = 10) -> "Tensor":
    """Frames uint8 [F,H,W,3] of n clips -> latents [n,C,T,h,w]."""
    import torch

    clips = Clips(list(frames), [None] * len(frames))
    parts = [
        codecs.video_codec.encode(clips.as_tensors(slice(first, first + batch))[0])
        for first in range(0, len(frames), batch)
    ]
    return torch.cat(parts)


def bicubic(frames: "Tensor", size: int) -> "Tensor":
    """Frames uint8 [B,F,h,w,3] -> uint8 [B,F,size,size,3]."""
    import torch
    import torch.nn.functional as F

    flat = frames.flatten(0, 1).permute(0, 3, 1, 2).float()
    large = F.interpolate(flat, (size, size), mode="bicubic", align_corners=False)
    return large.add(0.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])


def refined(
    second: "Loaded",
    inputs: StageInputs,
    part: slice,
    *,
    steps: int,
    size: int,
    seed: int = 0,
    audio_noise: float | None = None,
    video: "Tensor | None" = None,
) -> "Tensor":
    """Latents of a batch of the clips, refined as in inference; clip i has its own noise.

    Args:
        audio_noise: noise level of the audio; None takes inference's, 1 replaces the audio by noise.
        video: first-stage latents [n,C,T,h,w] instead of the clips' own.
    """
    from inference.sampling import LatentShape
    from inference.super_resolution import draw, refine
    from magihuman.flow.sampling import seeded
    from magihuman.flow.super_resolution import AUDIO_NOISE

    low, audio = (inputs.video if video is None else video)[part], inputs.audio[part]
    stride = second.config.contract.video_stride[1]
    channels, frames, edge = low.shape[1], low.shape[2], size // stride
    shape = LatentShape(channels, frames, edge, edge, audio.shape[1], audio.shape[2])
    numbers = range(len(inputs.text))[part]
    noise = draw(shape, seeded([noise_seed(seed, 500_000 + i) for i in numbers]), "cpu")
    return refine(
        second.denoiser, low, audio, inputs.text[part], None, shape, noise,
        steps=steps, shift=second.config.sampling.shift, audio_noise=AUDIO_NOISE if audio_noise is None else audio_noise,
    )  # fmt: skip


def measure_method(
    method: Method, inputs: StageInputs, codecs: "CodecBundle", size: int, batch: int = 10
) -> tuple[dict[str, np.ndarray], list[np.ndarray], float]:
    """Values per clip [n] by name of the frames that `method` makes, the first frames, seconds of the method."""
    import torch

    from magihuman.media.images import frames_to_uint8

    values: dict[str, list[float]] = {}
    kept: list[np.ndarray] = []
    spent, count = 0.0, len(inputs.text)
    for first in range(0, count, batch):
        part = slice(first, min(count, first + batch))
        start = time.perf_counter()
        made = method(part)
        spent += time.perf_counter() - start
        if made.dtype != torch.uint8:
            made = frames_to_uint8(codecs.video_codec.decode(made))
        for i, frames in enumerate(made.numpy(), first):
            for name, value in _clip_values(frames, i, inputs, mouth_region(size)).items():
                values.setdefault(name, []).append(value)
            if len(kept) < 8:
                kept.append(frames)
    return {name: np.array(column) for name, column in values.items()}, kept, spent


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


def paired_columns(
    values: Mapping[str, Mapping[str, np.ndarray]], order: Sequence[str], against: str
) -> dict[str, Any]:
    """Measures of every column, and the paired differences of column `against` and each other column.

    Args:
        values: column -> name -> values per clip [n]; "bound" is the reference of the skill.
    """
    bound = values["bound"]
    level = bound["other"]
    per_clip = {}  # with a clip's share of the skill: differences of skills are means of these
    for name in order:
        column = values[name]
        skill = (column["own"] - level) / float((bound["own"] - level).mean())
        rows = {**column, "sync_r": column["own"], "sync_skill": skill}
        per_clip[name] = {key: rows[key] for key in METRICS if key in rows}
    measures = {name: {key: stats.mean(row) for key, row in rows.items()} for name, rows in per_clip.items()}
    for name, rows in measures.items():
        rows["sync_skill"] = stats.ratio(values[name]["own"] - level, bound["own"] - level)
    own = per_clip[against]
    differences = {
        name: {key: stats.difference(own[key], rows[key]).to_dict() for key in own if key in rows}
        for name, rows in per_clip.items()
        if name not in (against, "bound")
    }
    return {
        "columns": {name: {key: m.to_dict() for key, m in rows.items()} for name, rows in measures.items()},
        "against": against,
        "differences": differences,
    }


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
    """Measure a super-resolution checkpoint of the tiny world on inputs-out clips.

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
    if clips < 2 or batch < 1:
        raise UserError(f"clips={clips} and batch={batch} are impossible; give at least 2 clips and a batch of 1")
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
    folder.mkdir(parents=True, exist_ok=True)
    count = second.config.sampling.steps if steps is None else steps
    drawn = drawn_clips(clips, codecs, zoo.config_of(base).size.height, size)
    setting = _Setting(second, codecs, drawn, size, count, seed, batch)
    results: dict[str, Any] = {"scores": str(folder / f"{chosen[0]}.json")}
    from eval import figures

    for part in chosen:
        start = time.perf_counter()
        if part == "table":
            sampled = sampled_clips(clips, base, seed, batch, progress)
            values, frames = _table(setting, sampled)
            figures.sr_frames(frames).savefig(folder / "clips.png", dpi=80)
        elif part == "audio":
            values = _audio(setting)
            figures.sr_audio(values).savefig(folder / "audio.png", dpi=110)
        elif part == "others":
            values = _others(setting, {checkpoint: second} | {name: zoo.load(name) for name in compared[1:]})
        else:
            values = _steps(setting)
            figures.sr_steps(values).savefig(folder / "steps.png", dpi=110)
        facts = {
            "format": "magihuman-sr/1", "part": part, "checkpoint": checkpoint, "base": base, "clips": clips,
            "steps": count, "sampling_seed": seed, "held_out_seed": HELD_OUT_SEED,
            "seconds": round(time.perf_counter() - start, 1), **values, "provenance": provenance(),
        }  # fmt: skip
        text = tables.super_resolution(facts)
        write_results(folder, part, facts, text)
        print(text, flush=True)
        results[part] = values["sets"]
    return results


@dataclass
class _Setting:
    second: "Loaded"
    codecs: "CodecBundle"
    drawn: StageInputs
    size: int
    steps: int
    seed: int
    batch: int

    def measure(self, method: Method, inputs: StageInputs | None = None) -> tuple[Any, list[np.ndarray], float]:
        return measure_method(method, inputs or self.drawn, self.codecs, self.size, self.batch)

    def refiner(self, inputs: StageInputs | None = None, steps: int | None = None, **options: Any) -> Method:
        chosen, count = inputs or self.drawn, steps or self.steps
        return lambda part: refined(self.second, chosen, part, steps=count, size=self.size, seed=self.seed, **options)

    @cached_property
    def result(self) -> tuple[dict[str, np.ndarray], list[np.ndarray], float]:
        """The second stage as it is, on the clips themselves."""
        return self.measure(self.refiner())

    def bicubic(self, video: "Tensor") -> Method:
        from magihuman.media.images import frames_to_uint8

        codec = self.codecs.video_codec
        return lambda part: bicubic(frames_to_uint8(codec.decode(video[part])), self.size)

    def upsampled(self, video: "Tensor") -> Method:
        from magihuman.flow.super_resolution import upsample_latents

        edge = self.size // self.second.config.contract.video_stride[1]
        return lambda part: upsample_latents(video[part], edge, edge)

    @cached_property
    def bound(self) -> dict[str, np.ndarray]:
        assert self.drawn.truth is not None
        truth = self.drawn.truth
        return self.measure(lambda part: encode(self.codecs, truth[part], self.batch))[0]


def _table(setting: _Setting, sampled: StageInputs) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Both sets of clips enlarged in three ways, and the codec bound."""
    bound = setting.bound
    sets, frames, seconds = {}, {}, {}
    for name, inputs in (("clip", setting.drawn), ("base", sampled)):
        columns = {"bound": bound}
        methods = {
            "bicubic": setting.bicubic(inputs.video),
            "latents": setting.upsampled(inputs.video),
            "sr": setting.refiner(inputs),
        }
        for column, method in methods.items():
            known = column == "sr" and inputs is setting.drawn
            columns[column], kept, spent = setting.result if known else setting.measure(method, inputs)
            frames[f"{name}: {column}"] = kept
            seconds[f"{name}: {column}"] = round(spent / len(inputs.text), 4)
        sets[name] = paired_columns(columns, order=("bicubic", "latents", "sr", "bound"), against="sr")
    assert setting.drawn.truth is not None
    frames["truth"] = setting.drawn.truth[:8]
    return {"sets": sets, "seconds_per_clip": seconds}, frames


def _audio(setting: _Setting) -> dict[str, Any]:
    """Coarser and coarser first stages, refined with the audio and with noise instead of it."""
    from magihuman.flow.super_resolution import coarsen

    bound, sets = setting.bound, {}
    for factor in COARSE:
        video = coarsen(setting.drawn.video, factor)
        columns = {
            "bicubic": setting.measure(setting.bicubic(video))[0],
            "latents": setting.measure(setting.upsampled(video))[0],
            "sr": (setting.result if factor == 1 else setting.measure(setting.refiner(video=video)))[0],
            "sr, noise for sound": setting.measure(setting.refiner(video=video, audio_noise=1.0))[0],
            "bound": bound,
        }
        sets[str(factor)] = paired_columns(columns, order=tuple(columns), against="sr")
    return {"sets": sets}


def _steps(setting: _Setting) -> dict[str, Any]:
    """The second stage with different numbers of solver steps."""
    columns, seconds = {"bound": setting.bound}, {}
    for count in STEPS:
        known = count == setting.steps
        measured = setting.result if known else setting.measure(setting.refiner(steps=count))
        columns[str(count)], _, spent = measured
        seconds[str(count)] = round(spent / len(setting.drawn.text), 4)
    order = (*map(str, STEPS), "bound")
    return {
        "sets": {"clip": paired_columns(columns, order=order, against=str(setting.steps))},
        "seconds_per_clip": seconds,
    }


def _others(setting: _Setting, checkpoints: Mapping[str, "Loaded"]) -> dict[str, Any]:
    """Several second stages on the same clips with the same noise."""
    short = {name: _short(name) for name in checkpoints}
    if len(set(short.values())) < len(short):  # runs of different folders
        short = {name: name for name in checkpoints}
    columns = {"bound": setting.bound}
    for name, loaded in checkpoints.items():
        columns[short[name]] = replace(setting, second=loaded).result[0]
    order = (*short.values(), "bound")
    return {
        "sets": {"clip": paired_columns(columns, order=order, against=order[0])},
        "trained": {short[name]: training_record(name) for name in checkpoints},
    }


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.sr")
