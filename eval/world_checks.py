"""Checks of a puppet world by a model that was trained in it: can it tell a good recipe from a bad one?

    python -m eval.world_checks checkpoint=scene/base

A world is worth training in if guidance matters, few steps hurt, the early steps decide something, and no row is at its
ceiling. The checkpoint is sampled with its own settings and with fewer steps, with and without guidance, from the same noise,
and compared prompt by prompt. What the early steps decide is shown by exchanging the prompt on the way: the first k of 8 steps
see prompt A, the others prompt B, or A's prompt without the attribute ("any"); counted is how often the clip shows A's value.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tiny.puppets import WORLDS, Puppet, draw_puppet
from eval import puppet_tables, stats, verdicts
from eval.clips import BOUND, HELD_OUT_SEED, Clips, SheetColumn, ground_truth, held_out, noise_seed, through_codec
from eval.dmd2 import sampler_words
from eval.formatting import format_interval
from eval.generate import Sampler, sample_all, tiny_pipelines
from eval.metrics.puppet_clips import CLIP_METRICS
from eval.metrics.registry import metrics
from eval.output import folder_for, publish, require_at_least
from eval.scores import Scores, clip_values

if TYPE_CHECKING:
    from inference.pipeline import Pipeline

FORMAT = "magihuman-world-checks/1"
FEW = (8, 4, 2, 1)
SWAP_STEPS = 8
SWAPPED = ("side", "size", "camera", "wall", "voice")
SHOWN = 4  # prompts on the contact sheet
CEILING = 0.99
"""A share that reaches this in few steps without guidance leaves nothing to improve."""
ROWS = (
    "attributes", "layout", "voice", "sound", "novel_pair", "recognisable", "open_recognisable", "vowels", "onsets",
    "words_exact", "sync_r", "sync_retrieval", "lip_shape", "lips_open", "layout_error", "amplitude",
)  # fmt: skip


def run(
    checkpoint: str = "scene/base",
    prompts: int = 60,
    swaps: int = 16,
    seed: int = 0,
    batch: int = 12,
    output: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Check what a puppet world can tell, by a checkpoint that was trained in it.

    Prints the tables; writes world_checks.json, world_checks.md, world_checks.png and sheet.png.

    Args:
        checkpoint: shipped name, exported folder or run folder
        prompts: number of held-out captions
        swaps: number of pairs of captions that are exchanged on the way; 0 leaves this check out
        seed: of the noise
        batch: clips sampled at once; changes memory and speed only
        output: folder; none is world_checks/ in a run folder, else runs/world_checks/NAME
        device: auto, cpu or cuda
        progress: show bars

    Returns:
        Where world_checks.json is, and the checks.

    Raises:
        UserError: an unknown checkpoint, one of no puppet world, or a value that cannot be used.
    """
    require_at_least(prompts=(prompts, stats.FEWEST), swaps=(swaps, 0), batch=(batch, 1), seed=(seed, 0))
    start = time.perf_counter()
    (pipeline,) = tiny_pipelines("eval.world_checks", checkpoint, device=device)
    world = pipeline.codecs.name
    samplers = _samplers(pipeline)
    puppets = held_out(prompts, world)
    captions = [puppet.caption for puppet in puppets]
    sample_all(samplers, captions, [seed], batch=batch, progress=progress)
    truth = ground_truth(puppets)
    bound = through_codec(truth, pipeline.codecs)
    bound_scores = bound.score()
    clips = {BOUND: bound, **{sampler.name: sampler.clips(captions, 0) for sampler in samplers}}
    scores = {name: bound_scores if name == BOUND else made.score(bound_scores) for name, made in clips.items()}
    per_clip = {name: _per_clip(found) for name, found in scores.items()}
    full = samplers[0].name
    values: dict[str, Any] = {
        "format": FORMAT, "world": world, "held_out_seed": HELD_OUT_SEED, "prompts": prompts, "sampling_seed": seed,
        "full": full,
        "columns": {
            name: {key: _measure(key, found[key]).to_dict() for key in ROWS if np.isfinite(found[key]).any()}
            for name, found in per_clip.items()
        },
        "calls": {sampler.name: sampler.calls for sampler in samplers},
        "samplers": {
            sampler.name: {
                "steps": sampler.settings.steps,
                "solver": sampler.settings.solver,
                "guided": sampler.settings.guidance.needed,
            }
            for sampler in samplers
        },
        "against_full": {s.name: _compared(per_clip[s.name], per_clip[full]) for s in samplers[1:]},
        "shares": {name: _open_shares(found, world) for name, found in scores.items()},
        "checkpoint": samplers[0].facts()["checkpoint"],
        "trained": samplers[0].facts()["trained"],
    }  # fmt: skip
    if swaps:
        values["swaps"] = swaps
        values["swap"] = _swap(pipeline, world, swaps, seed, batch, progress)
    values["checks"] = checks(values)
    values["seconds"] = round(time.perf_counter() - start, 1)
    from eval import figures

    folder = Path(output) if output else folder_for("world_checks", checkpoint)
    drawn = {
        "world_checks": partial(figures.world_checks, values),
        "sheet": partial(
            figures.contact_sheet,
            [
                SheetColumn(name, "", made, scores[name].clips[:SHOWN])
                for name, made in clips.items()
                if _is_shown(name, full)
            ],
        ),
    }
    publish(folder, "world_checks", values, drawn, puppet_tables.world_checks(values))
    return {"world_checks": str(folder / "world_checks.json"), "checks": values["checks"]}


def _samplers(pipeline: "Pipeline") -> list[Sampler]:
    """The checkpoint's own settings, the same without guidance, and fewer steps of both solvers."""
    own = pipeline.settings()
    settings = [own, pipeline.settings(cfg=1.0)]
    for steps in FEW:
        settings.append(pipeline.settings(steps=steps))
        settings.append(pipeline.settings(steps=steps, cfg=1.0))
    settings += [pipeline.settings(steps=steps, cfg=1.0, solver="renoise") for steps in FEW]
    found: dict[str, Sampler] = {}
    for one in settings:
        found.setdefault(sampler_words(one), Sampler(sampler_words(one), pipeline, one))
    return list(found.values())


def _is_shown(name: str, full: str) -> bool:
    """Whether the contact sheet has this column: bound, own settings, few UniPC steps without guidance."""
    return name in (BOUND, full, *(f"{steps} steps, no CFG" for steps in FEW))


def _per_clip(scores: Scores) -> dict[str, np.ndarray]:
    """Row -> value of every clip, NaN where it has none."""
    found = {key: clip_values(CLIP_METRICS[key], scores.clips) for key in ROWS if key in CLIP_METRICS}
    return {**found, "sync_r": scores.own, "sync_retrieval": scores.found}


def _measure(key: str, values: np.ndarray) -> stats.Measure:
    known = values[np.isfinite(values)]
    return stats.share(known) if key in CLIP_METRICS and CLIP_METRICS[key].share else stats.mean(known)


def _open_shares(scores: Scores, world: str) -> dict[str, dict[str, Any]]:
    """Of each attribute that captions may leave open: values shown where it was open, expected shares, p-value."""
    found = {}
    for name, attribute in WORLDS[world].open.items():
        shown = [clip.shown[name] for clip in scores.clips if name not in clip.stated and name in clip.shown]
        counts = np.array([shown.count(value) for value in attribute.values])
        if counts.sum():
            expected = np.array(attribute.expected)
            found[name] = {
                "counts": dict(zip(attribute.values, counts.tolist(), strict=True)),
                "expected": dict(zip(attribute.values, attribute.expected, strict=True)),
                "p": stats.fit_of_shares(counts, expected),
            }
    return found


# ---- Exchange of the prompt ----


@dataclass(frozen=True)
class _Exchange:
    """A clip whose first `steps` steps see the caption of `first`, the others that of `then`; noise as of prompt `index`."""

    attribute: str
    kind: str
    steps: int
    index: int
    first: Puppet
    then: Puppet


def _swap(
    pipeline: "Pipeline", world: str, count: int, seed: int, batch: int, progress: bool
) -> dict[str, dict[str, list[float]]]:
    """Attribute -> {"to_other": share of clips that show A's value after k = 0..8 steps with A's prompt, "to_any": ...}."""
    from tqdm import tqdm

    jobs = _exchanges(world, count, seed)
    shown: dict[tuple[str, str, int], list[bool]] = {}
    with tqdm(total=len(jobs), desc="exchanging prompts", unit="clip", disable=not progress) as bar:
        for first in range(0, len(jobs), batch):
            part = jobs[first : first + batch]
            for job, clip in zip(part, _exchanged(pipeline, part, seed).score().clips, strict=True):
                right = clip.shown[job.attribute] == getattr(job.first, job.attribute)
                shown.setdefault((job.attribute, job.kind, job.steps), []).append(right)
            bar.update(len(part))
    found: dict[str, dict[str, list[float]]] = {}
    for (name, kind, k), right in shown.items():
        found.setdefault(name, {}).setdefault(kind, [0.0] * (SWAP_STEPS + 1))[k] = float(np.mean(right))
    return found


def _exchanges(world: str, count: int, seed: int) -> list[_Exchange]:
    rng = np.random.Generator(np.random.PCG64(seed))
    attributes, jobs = WORLDS[world].attributes, []
    for name in [name for name in SWAPPED if name in attributes]:
        for index in range(count):
            puppet = draw_puppet(HELD_OUT_SEED, index, world)
            first = replace(puppet, stated=puppet.stated | {name})
            others = [value for value in attributes[name].values if value != getattr(first, name)]
            if name == "wall":  # pairs that no training has seen test something else
                others = [value for value in others if (puppet.shirt, value) not in WORLDS[world].novel_pairs]
            then = {"to_other": replace(first, **{name: others[int(rng.integers(len(others)))]})}  # type: ignore[arg-type]
            if attributes[name].stated < 1:
                then["to_any"] = replace(first, stated=first.stated - {name})
            for kind, other in then.items():
                jobs += [_Exchange(name, kind, k, index, first, other) for k in range(SWAP_STEPS + 1)]
    return jobs


def _exchanged(pipeline: "Pipeline", jobs: Sequence[_Exchange], seed: int) -> Clips:
    """Clips of 8 UniPC steps without guidance: the first steps of each clip see one caption, the others another."""
    import torch

    from inference.settings import latent_shape
    from magihuman.flow.sampling import Pair, denoise, draw_noise, seeded
    from magihuman.flow.solvers import make_solver

    settings = pipeline.settings(steps=SWAP_STEPS, cfg=1.0, solver="unipc")
    first, then = (pipeline.text([getattr(job, side).caption for job in jobs]) for side in ("first", "then"))
    video, audio = (make_solver(settings.solver, SWAP_STEPS, settings.shift) for _ in range(2))
    shape = latent_shape(pipeline.config, settings, (settings.height, settings.width))
    noise = draw_noise(shape, seeded([noise_seed(seed, job.index) for job in jobs]), 0, pipeline.device)

    def velocity(x: Pair, i: int) -> Pair:
        text = [first[n] if i < job.steps else then[n] for n, job in enumerate(jobs)]
        return Pair(*pipeline.denoiser(x.video, x.audio, text))

    made = Clips()
    with torch.no_grad():
        end = denoise(velocity, (video, audio), noise)
        frames, waves = pipeline.codecs.video_codec.decode(end.video), pipeline.codecs.audio_codec.decode(end.audio)
        made.add(frames, waves, [job.first.caption for job in jobs])
    return made


# ---- Checks ----


def checks(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the world can tell: [{"about", "verdict": yes, partly, no, undecided or n/a, "details"}]."""
    known = values["samplers"]
    full = known[values["full"]]

    def unguided(steps: int) -> str | None:
        """The column with the own solver, without guidance."""
        wanted = {**full, "steps": steps, "guided": False}
        return next((name for name, one in known.items() if one == wanted), None)

    return [
        _worse_check("guidance matters", values, unguided(full["steps"]) if full["guided"] else None),
        *(_worse_check(f"{steps} steps without training hurt", values, unguided(steps)) for steps in FEW),
        *_early_checks(values),
        *_ceiling_checks(values, unguided(FEW[0])),
    ]


def _worse_check(about: str, values: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Whether some row gets worse than with the checkpoint's own settings, after Holm's correction for the rows."""
    rows = values["against_full"].get(name)
    if not rows:
        return {"about": about, "verdict": "n/a", "details": ["no such column"]}
    words = {key: row["verdict"] for key, row in rows.items()}
    listed = {
        word: "; ".join(f"{key} {format_interval(rows[key], signed=True)}" for key in words if words[key] == word)
        for word in ("worse", "better", "undecided")
    }
    verdict = "yes" if listed["worse"] else "undecided" if listed["undecided"] else "no"
    return {
        "about": about,
        "verdict": verdict,
        "details": [
            f"{word} than {values['full']}: {text}" for word, text in listed.items() if text and word != "undecided"
        ],
    }


def _compared(own: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Rows with a better side, prompt by prompt; see `eval.verdicts.decide`."""
    found = {}
    for key in ROWS:
        metric = metrics()[key]
        change = own[key] - other[key]
        change = change[np.isfinite(change)]
        if metric.direction not in ("up", "down") or not len(change):
            continue
        if len(change) < stats.FEWEST:
            found[key] = verdicts.not_measured("difference", f"needs {stats.FEWEST} prompts with a value", len(change))
            continue
        sign = 1 if metric.direction == "up" else -1
        share = key in CLIP_METRICS and CLIP_METRICS[key].share
        # As in `eval.paired`: the interval of equal shares has a width, too.
        variance = float(change.var(ddof=1)) / len(change) + (1 / (len(change) + 2) ** 2 if share else 0.0)
        gain = stats.Estimate(sign * float(change.mean()), ((variance, len(change) - 1.0),))
        margin = metric.margin if metric.margin is not None else verdicts.SHARE_MARGIN if share else None
        found[key] = verdicts.of_gain(gain, margin, len(change), sign)
    return verdicts.decide(found)


def _early_checks(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Whether half of the steps already decide an attribute, by the interval of the share of the way that they go.

    Yes: at least a quarter of the way from none of the steps to all; no: less.
    """
    found = []
    for name, kinds in values.get("swap", {}).items():
        for kind, shares in kinds.items():
            count = values["swaps"]
            (_, before), (low, high), (after, _) = (
                _interval(shares[k], count) for k in (0, SWAP_STEPS // 2, SWAP_STEPS)
            )
            quarter = shares[0] + 0.25 * (shares[-1] - shares[0])
            decided = after > before  # the prompt decides it at all
            word = "yes" if decided and low >= quarter else "no" if decided and high < quarter else "undecided"
            about = f"the first half of the steps decides {name} ({kind.replace('_', ' ')})"
            listed = " ".join(f"{share:.2f}" for share in shares)
            found.append({"about": about, "verdict": word, "details": [listed]})
    return found


def _interval(share: float, count: int) -> tuple[float, float]:
    measure = stats.proportion(round(share * count), count)
    assert measure.low is not None
    assert measure.high is not None
    return measure.low, measure.high


def _ceiling_checks(values: Mapping[str, Any], name: str | None) -> list[dict[str, Any]]:
    """Rows that few steps without training have at their ceiling."""
    about = f"no row is at its ceiling in {FEW[0]} steps without guidance"
    if name is None:
        return [{"about": about, "verdict": "n/a", "details": ["no such column"]}]
    column = values["columns"][name]
    shares = [key for key in column if key in CLIP_METRICS and CLIP_METRICS[key].share]
    full = [key for key in shares if column[key]["value"] >= CEILING]
    word = "yes" if not full else "no" if len(full) > len(shares) / 2 else "partly"
    return [{"about": about, "verdict": word, "details": [", ".join(full) or "none"]}]


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.world_checks")
