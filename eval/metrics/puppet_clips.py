"""Metrics of puppets' clips: what a puppet shows and says, against its caption and its own audio.

    CLIP_METRICS["vowels"].of(score_clip(frames, wave, caption))

A new metric of a clip is one entry of METRICS (eval/README.md). Entries without `of` are of sets of clips (`eval.scores`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from eval.clip_file import ClipFile, NotMeasured
from eval.metrics.registry import Measurement, Metric

if TYPE_CHECKING:
    from eval.puppet_scores import ClipScore

CANDIDATES = 20
"""Audio tracks, the clip's own among them, in audio retrieval: fixed, so that the metric means the same for every n."""


@dataclass(frozen=True)
class PuppetMetric(Metric):
    """A metric with one value per clip of puppets.

    Attributes:
        of: value of a clip; None where it has none, such as the mouth at consonants of a clip without consonants.
        lacks: why a clip has none; needed where `of` may give None.
        compared: whether `eval.dmd2` compares it between columns.
    """

    of: "Callable[[ClipScore], float | None]" = lambda clip: None
    compared: bool = False
    lacks: str = ""


LOOKS = ("face", "hair", "shirt", "wall")
LAYOUT = ("side", "size", "camera")
RECOGNISABLE = 0.3
"""Largest error of the nearest layout of a clip that shows one puppet (`eval.puppet_layout`)."""


def _right(clip: "ClipScore", names: tuple[str, ...]) -> float | None:
    """Share of these attributes that are as prompted, of those that the prompt states; None where it states none."""
    stated = [clip.right[name] for name in names if name in clip.right]
    return sum(stated) / len(stated) if stated else None


def _is_right(*names: str) -> "Callable[[ClipScore], float | None]":
    return partial(_right, names=names)


def _recognisable(clip: "ClipScore") -> float | None:
    return None if clip.vision.layout_error is None else float(clip.vision.layout_error < RECOGNISABLE)


def _open_recognisable(clip: "ClipScore") -> float | None:
    """Of a prompt that leaves side or size open: whether one puppet is shown instead of a mixture."""
    return _recognisable(clip) if {"side", "size"} - clip.stated.keys() else None


def _novel_pair(clip: "ClipScore") -> float | None:
    return _right(clip, ("shirt", "wall")) if clip.novel else None


_NOT_STATED = "its prompt leaves it open"
_NO_SYNC = "its mouth does not move, or its audio is silent"
METRICS: tuple[Metric, ...] = (
    PuppetMetric(
        "attributes",
        "face, hair, shirt and wall as prompted",
        direction="up",
        share=True,
        of=_is_right(*LOOKS),
        compared=True,
        sees=("looks",),
    ),
    PuppetMetric("face", "face shape as prompted", direction="up", share=True, of=_is_right("face")),
    PuppetMetric("hair", "hair colour as prompted", direction="up", share=True, of=_is_right("hair")),
    PuppetMetric("shirt", "shirt colour as prompted", direction="up", share=True, of=_is_right("shirt")),
    PuppetMetric("wall", "wall colour as prompted", direction="up", share=True, of=_is_right("wall")),
    PuppetMetric(
        "layout",
        "side, size and camera as prompted",
        direction="up",
        share=True,
        of=_is_right(*LAYOUT),
        lacks=_NOT_STATED,
        compared=True,
    ),
    *(
        PuppetMetric(name, f"{title} as prompted", direction="up", share=True, of=_is_right(name), lacks=_NOT_STATED)
        for name, title in (("side", "side"), ("size", "size of the puppet"), ("camera", "camera"))
    ),
    *(
        PuppetMetric(
            name,
            f"{title} as prompted",
            direction="up",
            share=True,
            of=_is_right(name),
            lacks=_NOT_STATED,
            compared=True,
        )
        for name, title in (("voice", "low or high voice"), ("sound", "background sound"))
    ),
    PuppetMetric(
        "novel_pair",
        "shirt and wall right in pairs that no training sees",
        direction="up",
        share=True,
        of=_novel_pair,
        lacks="its pair of shirt and wall is not held out of training",
        compared=True,
    ),
    PuppetMetric(
        "layout_error",
        "pixels that no drawable layout explains",
        "share of the puppet's",
        "down",
        margin=0.05,
        of=lambda clip: clip.vision.layout_error,
        lacks="puppets of the world tiny have one layout",
        compared=True,
    ),
    PuppetMetric(
        "recognisable",
        "one recognisable puppet",
        direction="up",
        share=True,
        of=_recognisable,
        lacks="puppets of the world tiny have one layout",
        compared=True,
    ),
    PuppetMetric(
        "open_recognisable",
        "one recognisable puppet where the prompt leaves side or size open",
        direction="up",
        share=True,
        of=_open_recognisable,
        lacks="its prompt leaves neither side nor size open, or its world has one layout",
        compared=True,
    ),
    Metric("skin", "skin tone of the conditioning frame", direction="up"),
    PuppetMetric(
        "vowels",
        "vowels right",
        direction="up",
        share=True,
        of=lambda clip: clip.vowels.hits / clip.vowels.reference,
        compared=True,
        sees=("vowels", "mute"),
    ),
    PuppetMetric(
        "vowels_exact",
        "whole vowel sequence right",
        direction="up",
        share=True,
        of=lambda clip: float(clip.vowels.errors == 0),
        compared=True,
    ),
    PuppetMetric(
        "syllable_error",
        "syllable error rate, (S + D + I) / N",
        direction="down",
        best=0.0,
        of=lambda clip: clip.syllables.errors / clip.syllables.reference,
        sees=("consonants", "vowels"),
    ),
    PuppetMetric(
        "words_exact",
        "all syllables right, none added",
        direction="up",
        share=True,
        of=lambda clip: float(clip.syllables.errors == 0),
    ),
    PuppetMetric(
        "onsets",
        "consonants right",
        direction="up",
        share=True,
        of=lambda clip: clip.onsets.hits / clip.onsets.reference,
        compared=True,
        sees=("consonants",),
    ),
    # A static or silent clip has correlation 0: its mouth does not follow its audio.
    PuppetMetric(
        "sync_r",
        "lip sync: correlation of mouth and own audio",
        direction="up",
        of=lambda clip: clip.sync.r or 0.0,
        sees=("freeze", "judder", "other_mouth", "other_voice"),
    ),
    Metric("sync_other", "chance: correlation of mouth and other clips' audio"),
    PuppetMetric(
        "sync_shifted", "chance: correlation of mouth and own audio, shifted", of=lambda clip: clip.sync.shifted or 0.0
    ),
    Metric("sync_skill", "lip-sync skill (other clips' audio 0, codec bound 1)", direction="up", margin=0.02),
    Metric("sync_skill_shifted", "lip-sync skill (shifted audio 0, codec bound 1)", direction="up"),
    PuppetMetric(
        "sync_lag0",
        "best lag of mouth and audio is 0 frames",
        direction="up",
        share=True,
        of=lambda clip: None if clip.sync.lag is None else float(clip.sync.lag == 0),
        lacks=_NO_SYNC,
    ),
    PuppetMetric(
        "sync_lag",
        "size of the best lag of mouth and audio",
        "frames",
        "down",
        of=lambda clip: None if clip.sync.lag is None else float(abs(clip.sync.lag)),
        lacks=_NO_SYNC,
        sees=("delay",),
    ),
    Metric("sync_retrieval", f"own audio found among {CANDIDATES}", direction="up"),
    PuppetMetric(
        "static",
        "clips whose mouth does not move",
        direction="down",
        share=True,
        of=lambda clip: float(clip.vision.static),
    ),
    PuppetMetric(
        "silent", "clips without audible audio", direction="down", share=True, of=lambda clip: float(clip.speech.silent)
    ),
    PuppetMetric(
        "amplitude",
        "range of the mouth opening",
        "share of the image",
        "target",
        of=lambda clip: clip.vision.amplitude,
        compared=True,
    ),
    PuppetMetric(
        "lip_shape",
        "lip shape: error of width over height at the heard vowels",
        "log ratio",
        "down",
        of=lambda clip: clip.lip_shape,
        lacks="no vowel is heard",
        compared=True,
        margin=0.02,
        sees=("lip_shape",),
    ),
    PuppetMetric(
        "lips_open",
        "opening of the mouth at heard m and b",
        "share of their vowel's",
        "down",
        of=lambda clip: clip.lips_open,
        lacks="neither m nor b is heard",
        compared=True,
        margin=0.05,
        sees=("open_lips",),
    ),
    PuppetMetric(
        "eyes",
        "contrast of the weaker eye (drawn: 1)",
        direction="target",
        of=lambda clip: clip.vision.eyes,
        compared=True,
        sees=("eyes",),
    ),
    PuppetMetric(
        "sharpness",
        "sharpness (variance of the Laplacian)",
        direction="target",
        of=lambda clip: clip.vision.sharpness,
        compared=True,
        sees=("blur",),
    ),
    PuppetMetric(
        "mouth_sharpness",
        "sharpness around the mouth",
        direction="target",
        of=lambda clip: clip.vision.mouth_sharpness,
        compared=True,
        sees=("blur",),
    ),
    # The codec makes some; less motion than that of true clips through it is no better.
    PuppetMetric(
        "flicker",
        "change between frames outside the mouth",
        direction="target",
        of=lambda clip: clip.vision.flicker,
        compared=True,
        sees=("flicker", "pixel_noise"),
    ),
    PuppetMetric(
        "pause_hiss",
        "hiss in pauses",
        "dB to the audio",
        "down",
        of=lambda clip: None if clip.stated.get("sound", clip.shown.get("sound")) == "rain" else clip.hiss,
        lacks="its audio is silent, or it rains",
        compared=True,
        margin=3.0,
        sees=("hiss",),
    ),
    PuppetMetric(
        "mains_hum",
        "hum at 50 or 60 Hz",
        "dB to the audio",
        "down",
        of=lambda clip: clip.hum,
        lacks="its audio is silent",
        compared=True,
        margin=3.0,
        sees=("hum",),
    ),
    Metric("skin_distance", "skin tones: total variation from the world's shares", direction="down"),
)

CLIP_METRICS = {metric.key: metric for metric in METRICS if isinstance(metric, PuppetMetric)}


def is_caption(prompt: str) -> bool:
    """Whether a prompt is a caption of a puppet that says something."""
    from data.tiny.puppets import parse_caption

    try:
        parse_caption(prompt)
    except ValueError:
        return False
    return True


def _measure(clip: ClipFile, _: Any) -> Mapping[str, float | NotMeasured | None]:
    """Values of a clip whose prompt is a caption of a puppet, by key."""
    from data.tiny.puppets import FPS, SAMPLE_RATE
    from eval.puppet_scores import score_clip

    if not is_caption(clip.prompt):
        raise NotMeasured("its prompt is no caption of a puppet")
    info = clip.info
    if abs(clip.fps - FPS) > 0.01 or info.height != info.width:
        raise NotMeasured(f"it has {info.width}x{info.height} at {clip.fps:g} fps; puppets are square at {FPS} fps")
    scores = score_clip(clip.frames, clip.wave(SAMPLE_RATE) if clip.has_audio else None, clip.prompt)
    values = {key: metric.of(scores) for key, metric in CLIP_METRICS.items()}
    lacks = {
        key: NotMeasured(metric.lacks) for key, metric in CLIP_METRICS.items() if values[key] is None and metric.lacks
    }
    return values | lacks


MEASUREMENTS = (
    Measurement(
        "puppets",
        tuple(CLIP_METRICS.values()),
        _measure,
        inputs=("frames", "prompt"),
        optional=("audio",),
        version=3,
        applies_to=is_caption,
    ),
)
