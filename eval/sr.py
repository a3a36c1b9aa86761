"""Evaluation of a super-resolution checkpoint of a puppet world: against plain enlarging, with and without the audio.

    python -m eval.sr checkpoint=scene/sr output=eval/results/scene_sr

The clips are those of held-out puppets (`eval.clips`); the second stage gets two sets of them:

clip    the puppet drawn at 64 pixels, through the codec. The truth at 128 pixels is known, so PSNR and SSIM are.
base    samples of the first stage for the puppet's caption, with its own audio. There is no truth; sharpness and lip
        sync can be measured.

Columns: bicubic (decoded, then enlarged), latents (enlarged trilinearly, then decoded: the second stage's input
without noise), sr, with `steps=5,2,1` sr in other numbers of steps, and as the codec bound the puppet drawn at 128 pixels,
through the codec.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.tiny.puppets import synthesise
from eval import stats
from eval.clip_values import reported, sync_values, write_clip_values
from eval.clips import HELD_OUT_SEED, frames_tensor, ground_truth, held_out, noise_seed
from eval.generate import require_tiny, tiny_pipelines
from eval.image_metrics import psnr, ssim
from eval.metrics.puppet_clips import CANDIDATES
from eval.metrics.registry import metrics
from eval.output import folder_for, publish, require_at_least, short_names, training_record
from eval.puppet_layout import mouth_pixels
from eval.puppet_scores import correlation
from eval.puppet_speech import called_opening
from eval.puppet_tables import step_count
from eval.puppet_vision import measure_frames
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
        mouths: per clip with a truth the region of the mouth, bool [F,H,W].
        world: of the puppets.
    """

    video: "Tensor"
    audio: "Tensor"
    text: "list[Tensor]"
    called: list[np.ndarray | None]
    truth: list[np.ndarray] | None
    mouths: list[np.ndarray] = field(default_factory=list)
    world: str = "tiny"


Method = Callable[[StageInputs, slice], "Tensor"]
"""(clips, batch of them) -> their enlarged latents, or frames uint8 [B,F,H,W,3]."""


class Measured(NamedTuple):
    """Of frames that a method made: values per clip [n] by name, the first clips [F,H,W,3], seconds per clip."""

    values: dict[str, np.ndarray]
    frames: list[np.ndarray]
    seconds: float


def drawn_clips(count: int, codecs: "CodecBundle", size: int, sr_size: int) -> StageInputs:
    """The puppets themselves, drawn at the first stage's size and encoded."""
    import torch

    puppets = held_out(count, codecs.name)
    waves = [synthesise(p) for p in puppets]
    audio = torch.cat([codecs.audio_codec.encode(torch.from_numpy(w)[None, None].float()) for w in waves])
    return StageInputs(
        video=encode(codecs, ground_truth(puppets, size).frames),
        audio=audio,
        text=codecs.text_encoder.encode([p.caption for p in puppets]),
        called=[called_opening(w, codecs.frames, codecs.name) for w in waves],
        truth=ground_truth(puppets, sr_size).frames,
        mouths=[mouth_pixels(p, sr_size) for p in puppets],
        world=codecs.name,
    )


def sampled_clips(count: int, checkpoint: str, seed: int, batch: int, progress: bool) -> StageInputs:
    """Samples of the first stage for the puppets' captions, with the mouth openings that their own audio calls for."""
    import torch
    from tqdm import tqdm

    (pipeline,) = tiny_pipelines("eval.sr", checkpoint, device="cpu")
    settings, codecs = pipeline.settings(), pipeline.codecs
    captions = [puppet.caption for puppet in held_out(count, codecs.name)]
    drafts = []
    for first in tqdm(range(0, count, batch), desc="first stage", disable=not progress):
        part = captions[first : first + batch]
        drafts += pipeline.draft(part, [noise_seed(seed, first + k) for k in range(len(part))], settings)
    waves = [pipeline.wave(draft)[0].numpy().mean(0) for draft in drafts]
    return StageInputs(
        video=torch.stack([draft.video for draft in drafts]),
        audio=torch.stack([draft.audio for draft in drafts]),
        text=codecs.text_encoder.encode(captions),
        called=[called_opening(wave, codecs.frames, codecs.name) for wave in waves],
        truth=None,
        world=codecs.name,
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


def _clip_values(frames: np.ndarray, number: int, inputs: StageInputs) -> dict[str, float]:
    """Metrics of one clip, frames uint8 [F,H,W,3].

    `own` and `other` are the mouth's correlation with the clip's own audio and, in the mean, with that of the next
    clips; a static mouth counts 0, since it follows nothing.
    """
    count = len(inputs.text)
    vision = measure_frames(frames, inputs.world)
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
        values["psnr"], values["mouth_psnr"] = psnr(frames, truth), psnr(frames, truth, inputs.mouths[number])
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
        per_clip[name] = {key: rows[key] for key in metrics() if key in rows}
        measures[name] = {key: stats.mean(row).to_dict() for key, row in per_clip[name].items()}
        measures[name]["sync_skill"] = stats.ratio(column["own"] - level, best).to_dict()
    own = per_clip[against]
    differences = {
        name: {key: stats.mean(own[key] - rows[key]).to_dict() for key in own if key in rows}
        for name, rows in per_clip.items()
        if name not in (against, "bound")
    }
    return {"columns": measures, "against": against, "differences": differences}


def run(
    checkpoint: str = "scene/sr",
    base: str | None = None,
    clips: int = 200,
    parts: str = "table,audio,steps",
    others: str | None = None,
    steps: int | str | None = None,
    first_size: int | None = None,
    seed: int = 0,
    batch: int = 10,
    output: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a super-resolution checkpoint of a puppet world on held-out clips.

    Prints the tables; writes, for each part, PART.json and PART.md, and figures: clips.png, audio.png, steps.png.

    Args:
        checkpoint: shipped name, exported folder or run folder of the second stage
        base: first stage, whose samples are refined, too; none takes the base of the checkpoint's world
        clips: number of clips
        parts: any of table, audio, steps, others, with commas: against enlarging without a network; with and
            without the audio on coarser and coarser first stages; over the number of solver steps; against other
            checkpoints
        others: run folders or names of the other checkpoints, with commas, for parts=others
        steps: solver steps, none takes each checkpoint's own; several with commas (5,2,1): the first compared with the
            others; parts=audio takes the first alone
        first_size: side of the first stage's clips in pixels; none takes that of the base. With another size the clips are
            drawn puppets alone, so parts=table is refused
        seed: of all noise
        batch: clips computed at once; changes memory and speed only
        output: folder; none is eval/ in a run folder, else runs/eval/NAME
        progress: show bars

    Returns:
        Where the first part's JSON is, per part its table, and with parts=table per metric of the clips' second stage
        value, low, high and the bound's value.

    Raises:
        UserError: a checkpoint of no puppet world, of another one, or of the other stage, or a value that cannot be used.
    """
    chosen = [part.strip() for part in parts.split(",")]
    for part in chosen:
        if part not in PARTS:
            raise UserError(f"parts={parts}: {part!r} is unknown; choose from {', '.join(PARTS)}")
    require_at_least(clips=(clips, 2), batch=(batch, 1))
    if first_size is not None and "table" in chosen:
        raise UserError(
            f"parts=table refines samples of the base at its own size; leave out first_size={first_size} or table"
        )
    counts = _step_counts(steps)
    if ("others" in chosen) != (others is not None):
        raise UserError("parts=others and others=RUN,RUN belong together; give both or none")
    compared = [checkpoint, *(str(others).split(",") if others is not None else [])]
    world = require_tiny("eval.sr", *compared)
    base = base or f"{world}/base"
    require_tiny("eval.sr", checkpoint, base)
    from inference.settings import require_role
    from magihuman import zoo
    from magihuman.codecs.bundle import load_bundle

    for name, first in [(base, True), *((name, False) for name in compared)]:
        require_role(zoo.config_of(name), name, first)
    _require_different(compared)
    second = zoo.load(checkpoint)
    codecs, size = load_bundle(second.config.codecs), second.config.size.height
    folder = Path(output) if output else folder_for("eval", checkpoint)
    counts = counts or [second.config.sampling.steps]
    count = counts[0]
    stride = second.config.contract.video_stride[1]
    if first_size is not None and not (0 < first_size <= size and first_size % stride == 0):
        raise UserError(f"first_size={first_size}: give a multiple of {stride}, the codec's stride, up to {size}")
    drawn = drawn_clips(clips, codecs, first_size or zoo.config_of(base).size.height, size)
    evaluation = Evaluation(second, codecs, drawn, size, count, seed, batch)
    results: dict[str, Any] = {"scores": str(folder / f"{chosen[0]}.json")}
    from eval import figures

    for part in chosen:
        start, drawings = time.perf_counter(), {}
        if part == "table":
            sampled = sampled_clips(clips, base, seed, batch, progress)
            values, frames = _table(evaluation, sampled, counts[1:])
            drawings["clips"] = partial(figures.sr_frames, frames)
            results |= reported(_keep_values(folder, evaluation, values["sets"]["clip"]["columns"]))
        elif part == "audio":
            if counts[1:]:
                print(
                    f"parts=audio is measured in {step_count(count)}, the first of steps={steps}; the others are ignored"
                )
            values = _audio(evaluation)
            drawings["audio"] = partial(figures.sr_audio, values)
        elif part == "others":
            loaded = {checkpoint: second} | {name: zoo.load(name) for name in compared[1:]}
            values = _others(evaluation, loaded, counts if steps is not None else [])
        else:
            values = _steps(evaluation, counts if counts[1:] else [*STEPS, count])
            drawings["steps"] = partial(figures.sr_steps, values)
        facts = {
            "format": "magihuman-sr/1", "part": part, "checkpoint": checkpoint, "base": base, "clips": clips,
            **({"first_size": first_size} if first_size else {}), "steps": count,
            "sampling_seed": seed, "held_out_seed": HELD_OUT_SEED,
            "seconds": round(time.perf_counter() - start, 1), **values,
        }  # fmt: skip
        publish(folder, part, facts, drawings)
        results[part] = values["sets"]
    return results


def _step_counts(steps: int | str | None) -> list[int]:
    """Numbers of the option steps=, each once, in its order; none for None.

    Raises:
        UserError: something else than whole numbers from 1 on.
    """
    words = [] if steps is None else str(steps).split(",")
    if wrong := [word for word in words if not word.strip().isdecimal() or int(word) < 1]:
        raise UserError(f"steps={steps}: {wrong[0]!r} is no number of steps; give for example steps=5 or steps=5,2,1")
    return list(dict.fromkeys(map(int, words)))


def _require_different(checkpoints: Sequence[str]) -> None:
    """Raises UserError for a checkpoint that is given twice, also under two names of its folder."""
    from magihuman import zoo

    seen: dict[Path, str] = {}
    for name in checkpoints:
        folder = zoo.find(name).resolve()
        if folder in seen:
            raise UserError(f"others={name} is the same checkpoint as {seen[folder]}; give each checkpoint once")
        seen[folder] = name


def _column(name: str, steps: int) -> str:
    return f"{name}, {step_count(steps)}"


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

    def measure(self, method: Method, inputs: StageInputs) -> Measured:
        """Metrics of the frames that `method` makes of all clips."""
        import torch

        from magihuman.media.images import frames_to_uint8

        values: dict[str, list[float]] = defaultdict(list)
        kept: list[np.ndarray] = []
        spent, count = 0.0, len(inputs.text)
        for first in range(0, count, self.batch):
            start = time.perf_counter()
            made = method(inputs, slice(first, min(count, first + self.batch)))
            spent += time.perf_counter() - start
            if made.dtype != torch.uint8:
                made = frames_to_uint8(self.codecs.video_codec.decode(made))
            for i, frames in enumerate(made.numpy(), first):
                for name, value in _clip_values(frames, i, inputs).items():
                    values[name].append(value)
            kept += list(made.numpy())[: 8 - len(kept)]
        return Measured({name: np.array(column) for name, column in values.items()}, kept, round(spent / count, 4))

    @property
    def edge(self) -> int:
        """Height and width of the second stage's latents."""
        return self.size // self.second.config.contract.video_stride[1]

    def refine(self, inputs: StageInputs, part: slice, steps: int | None = None, with_audio: bool = True) -> "Tensor":
        """Method: refinement as in inference; clip i has its own noise. Without audio there is noise in its place."""
        from inference.super_resolution import draw, refine
        from magihuman.flow.sampling import seeded
        from magihuman.flow.super_resolution import AUDIO_NOISE

        low, audio = inputs.video, inputs.audio
        shape = (*low.shape[1:3], self.edge, self.edge), audio.shape[1:]
        seeds = [noise_seed(self.seed, 500_000 + i) for i in range(part.start, part.stop)]
        return refine(
            self.second.denoiser, low[part], audio[part], inputs.text[part], None, shape,
            draw(shape, seeded(seeds), "cpu"), steps=steps or self.steps,
            shift=self.second.config.sampling.shift, audio_noise=AUDIO_NOISE if with_audio else 1.0,
        )  # fmt: skip

    def bicubic(self, inputs: StageInputs, part: slice) -> "Tensor":
        """Method: decoded, then enlarged."""
        from magihuman.media.images import frames_to_uint8

        return bicubic(frames_to_uint8(self.codecs.video_codec.decode(inputs.video[part])), self.size)

    def upsampled(self, inputs: StageInputs, part: slice) -> "Tensor":
        """Method: enlarged latents."""
        from magihuman.flow.super_resolution import upsample_latents

        return upsample_latents(inputs.video[part], self.edge, self.edge)

    def untrained(self) -> dict[str, Method]:
        """Enlarging without a network, by column."""
        return {"bicubic": self.bicubic, "latents": self.upsampled}

    def enlarged(self, inputs: StageInputs, steps: Sequence[int] = ()) -> dict[str, Measured]:
        """Clips enlarged by three methods, and by the second stage in other numbers of steps."""
        measured = {name: self.measure(method, inputs) for name, method in self.untrained().items()}
        measured["sr"] = self.refined if inputs is self.drawn else self.measure(self.refine, inputs)
        return measured | {_column("sr", n): self.measure(partial(self.refine, steps=n), inputs) for n in steps}

    @cached_property
    def refined(self) -> Measured:
        """The second stage as it is, on the clips themselves."""
        return self.measure(self.refine, self.drawn)

    @cached_property
    def bound(self) -> dict[str, np.ndarray]:
        """Values of the true frames through the codec."""
        truth = self.drawn.truth or []
        return self.measure(lambda _, part: encode(self.codecs, truth[part], self.batch), self.drawn).values

    def set_of(self, measured: Mapping[str, Measured], against: str = "sr") -> dict[str, Any]:
        """The columns with the codec bound, see `paired_columns`."""
        return paired_columns({**{name: m.values for name, m in measured.items()}, "bound": self.bound}, against)


def _table(
    evaluation: Evaluation, sampled: StageInputs, steps: Sequence[int]
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Both sets of clips enlarged by three methods, by the second stage in other numbers of steps, too, and the codec bound."""
    sets: dict[str, Any] = {}
    measured: dict[str, Measured] = {}
    for name, inputs in (("clip", evaluation.drawn), ("base", sampled)):
        columns = evaluation.enlarged(inputs, steps)
        measured |= {f"{name}: {column}": found for column, found in columns.items()}
        sets[name] = evaluation.set_of(columns)
    frames = {name: found.frames for name, found in measured.items()}
    seconds = {name: found.seconds for name, found in measured.items()}
    # The names of the other columns have their steps.
    steps_of = {"steps_of": {"sr": evaluation.steps}} if steps else {}
    return {**steps_of, "sets": sets, "seconds_per_clip": seconds}, {
        **frames,
        "truth": (evaluation.drawn.truth or [])[:8],
    }


def _keep_values(folder: Path, evaluation: Evaluation, columns: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write the second stage's values per clip; its measures with the bound's value."""
    bound = evaluation.bound
    found = {key: {**m, "bound": columns["bound"].get(key, {}).get("value")} for key, m in columns["sr"].items()}
    per_clip = [
        {**column, **sync_values(column["own"], bound["own"], bound["other"])}
        for column in (evaluation.refined.values, bound)
    ]
    write_clip_values(
        folder, [puppet.caption for puppet in held_out(len(bound["own"]), evaluation.codecs.name)], found, *per_clip
    )
    return found


def _audio(evaluation: Evaluation) -> dict[str, Any]:
    """Coarser and coarser first stages, refined with the audio and with noise instead of it."""
    from magihuman.flow.super_resolution import coarsen

    sets = {}
    for factor in COARSE:
        inputs = evaluation.drawn
        if factor > 1:
            inputs = replace(inputs, video=coarsen(inputs.video, factor))
        noise = evaluation.measure(partial(evaluation.refine, with_audio=False), inputs)
        sets[str(factor)] = evaluation.set_of({**evaluation.enlarged(inputs), "sr, noise for sound": noise})
    return {"sets": sets}


def _steps(evaluation: Evaluation, counts: Sequence[int]) -> dict[str, Any]:
    """The second stage with different numbers of solver steps."""
    measured = {
        str(count): evaluation.refined
        if count == evaluation.steps
        else evaluation.measure(partial(evaluation.refine, steps=count), evaluation.drawn)
        for count in sorted(set(counts))
    }
    sets = {"clip": evaluation.set_of(measured, against=str(evaluation.steps))}
    return {"sets": sets, "seconds_per_clip": {count: found.seconds for count, found in measured.items()}}


def _others(evaluation: Evaluation, checkpoints: Mapping[str, "Loaded"], counts: Sequence[int]) -> dict[str, Any]:
    """Several second stages on the same clips with the same noise, in the steps of their exports or in all of `counts`, and
    the clips enlarged without a network."""
    short = dict(zip(checkpoints, short_names(list(checkpoints)), strict=True))
    measured: dict[str, Measured] = {}
    steps_of: dict[str, int] = {}
    for name, loaded in checkpoints.items():
        for steps in counts or [loaded.config.sampling.steps]:
            column = short[name]
            if counts[1:]:
                column = _column(column, steps)
            else:
                steps_of[column] = steps
            measured[column] = replace(evaluation, second=loaded, steps=steps).refined
    first = next(iter(measured))
    measured |= {name: evaluation.measure(method, evaluation.drawn) for name, method in evaluation.untrained().items()}
    return {
        "steps_of": steps_of,
        "sets": {"clip": evaluation.set_of(measured, against=first)},
        "trained": {short[name]: training_record(name) for name in checkpoints},
    }


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.sr")
