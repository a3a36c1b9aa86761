"""Word and character error rate of a clip's speech: a recogniser's transcript against the dialogue that was asked for.

    model = load(SpeechErrorsOptions(model="whisper"))
    measure(ClipFile(Path("a.mp4"), dialogue="good morning", language="en"), model)["wer"]

Characters for Chinese, Cantonese, Japanese and Korean, words for others, see `eval.transcripts`. `wer` of several clips is
pooled: all errors over all units, so that long clips count more; `wer_clip_mean` is the mean of the clips' rates. Both may
exceed 1. A clip in which nobody should speak has no error rate; words that are heard in it are `hallucinated_speech`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eval.clip_file import SILENT_PEAK, ClipFile, MeasurementError, NotMeasured
from eval.languages import language_code
from eval.metrics.registry import InBatches, Measurement, Metric, MissingDependency
from eval.speech_recognition import (
    RATE,
    Recogniser,
    Transcript,
    load_recogniser,
    missing_recogniser,
    recogniser_identity,
)
from eval.transcripts import compare, error_rate, rules_for, units
from magihuman.cli import option
from magihuman.errors import UserError

NO_REFERENCE = "no reference text; give a manifest with dialogue or prompts with a block 'Dialogue:'"


@dataclass(frozen=True)
class SpeechErrorsOptions:
    """Settings of the recogniser."""

    model: str = option(
        "speech recogniser: glm (as in the paper), whisper, qwen3, a Hub name in the local cache, or a folder; "
        "smoke: English digits by pocketsphinx, a check without weights",
        "glm",
    )
    device: str = option("auto, cpu, cuda or cuda:0", "auto")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "of weights and arithmetic, on every device; float32: 4 bytes for each of 1.5e9 parameters of glm or whisper, and "
        "transcripts that hardly depend on rounding",
        "float32",
    )
    batch: int = option(
        "clips of a batch; each takes about 0.5 GB with whisper in float32, in addition to the weights", 8
    )

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"speech_errors.batch={self.batch} must be at least 1")


def missing(options: SpeechErrorsOptions) -> MissingDependency | None:
    """The recogniser's weights or package."""
    return missing_recogniser(options.model)


def load(options: SpeechErrorsOptions) -> Recogniser:
    """The recogniser."""
    return load_recogniser(options.model, options.device, options.dtype)


def identity(options: SpeechErrorsOptions) -> Mapping[str, Any]:
    """Model with its revision, and the precision; it is the same on every device."""
    return {**recogniser_identity(options.model), "dtype": options.dtype}


@dataclass(frozen=True)
class _Speech:
    """Of a clip: the words that are asked for, their language's code, and the audio fp32 [N] at `RATE`; None is silence."""

    dialogue: str
    language: str | None
    wave: np.ndarray | None


def prepare(clip: ClipFile, recogniser: Recogniser) -> _Speech:
    """What the recogniser and the comparison need of a clip.

    Raises:
        NotMeasured: the spoken words are not known.
        MeasurementError: the language is not known.
    """
    if clip.dialogue is None:
        raise NotMeasured(NO_REFERENCE)
    try:
        language = language_code(clip.language) if clip.language else None
    except UserError as error:
        raise MeasurementError(str(error)) from error
    wave = clip.wave(RATE)
    silent = not len(wave) or np.abs(wave).max() < SILENT_PEAK
    return _Speech(clip.dialogue, language, None if silent else wave)


def together(clips: Sequence[_Speech], recogniser: Recogniser) -> list[Mapping[str, Any]]:
    """Error rates of each clip, with the transcript, its recogniser and the unit as texts; silence is not recognised.

    Returns:
        Values by key; those that do not apply are `NotMeasured`: rates where nobody should speak, hallucinated speech where
        somebody should.
    """
    waves = [(clip.wave, clip.language) for clip in clips if clip.wave is not None]
    transcripts = iter(recogniser.transcribe([w for w, _ in waves], [code for _, code in waves]) if waves else ())
    return [_values(clip, None if clip.wave is None else next(transcripts)) for clip in clips]


def _values(clip: _Speech, transcript: Transcript | None) -> Mapping[str, Any]:
    heard, source = "", "none, the audio is silent"
    if transcript is not None:
        heard, source = transcript.text, f"{transcript.model}, {transcript.revision}"
        source += f"; {transcript.note}" if transcript.note else ""
    rules = rules_for(clip.dialogue, clip.language)
    texts = {"transcript_text": heard, "recogniser_text": source, "unit_text": rules.note}
    words_heard = float(bool(units(heard, rules)))
    found = compare(clip.dialogue, heard, clip.language)
    counted = found.edits
    if not counted.reference:
        nobody = NotMeasured("nobody should speak (the dialogue is empty); see hallucinated_speech")
        return {**texts, **{metric.key: nobody for metric in _OF_DIALOGUE}, "hallucinated_speech": words_heard}
    values: dict[str, Any] = {
        "wer": found.rate,
        "wer_clip_mean": found.rate,
        "wer_substitutions": counted.substitutions / counted.reference,
        "wer_deletions": counted.deletions / counted.reference,
        "wer_insertions": counted.insertions / counted.reference,
        "wer_units": counted.reference,
        "mer": error_rate(found.mixed),
        "mer_units": found.mixed.reference,
        "speech_recognised": words_heard,
        "hallucinated_speech": NotMeasured("words are asked for"),
    }
    if found.korean_words is None:
        values |= dict.fromkeys(("korean_wer", "korean_words"), NotMeasured("the dialogue is not Korean"))
    else:
        values |= {"korean_wer": error_rate(found.korean_words), "korean_words": found.korean_words.reference}
    return {**texts, **values}


measure = InBatches(prepare, together)


def _rate(key: str, label: str, weight: str = "wer_units", sees: tuple[str, ...] = ()) -> Metric:
    return Metric(key, label, direction="down", best=0, weight=weight, sees=sees)


_OF_DIALOGUE = (
    _rate("wer", "word or character error rate, pooled", sees=("words",)),
    _rate("wer_clip_mean", "word or character error rate, mean of clips", weight=""),
    _rate("wer_substitutions", "substituted words or characters"),
    _rate("wer_deletions", "missing words or characters"),
    _rate("wer_insertions", "added words or characters"),
    _rate("mer", "mixed error rate: characters and Latin words", "mer_units"),
    _rate("korean_wer", "word error rate of Korean", "korean_words"),
    Metric("speech_recognised", "clips with dialogue in which words are heard", "", "up", best=1, share=True),
    Metric("wer_units", "words or characters asked for", "per clip"),
    Metric("mer_units", "characters and Latin words asked for", "per clip"),
    Metric("korean_words", "Korean words asked for", "per clip"),
)
MEASUREMENTS = (
    Measurement(
        "speech_errors",
        (
            *_OF_DIALOGUE,
            Metric(
                "hallucinated_speech", "clips without dialogue in which words are heard", "", "down", best=0, share=True
            ),
        ),
        measure,
        inputs=("audio", "dialogue"),
        version=2,
        options=SpeechErrorsOptions,
        missing=missing,
        load=load,
        identity=identity,
        costly=True,
    ),
)
