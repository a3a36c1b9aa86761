"""Word and character error rate of a clip's speech: a recogniser's transcript against the dialogue that was asked for.

    model = load(SpeechErrorsOptions(model="whisper"))
    measure(ClipFile(Path("a.mp4"), dialogue="good morning", language="en"), model)["wer"]

Characters for Chinese, Cantonese, Japanese and Korean, words for others, see `eval.transcripts`. `wer` of several clips is
pooled: all errors over all units, so that long clips count more; `wer_clip_mean` is the mean of the clips' rates. Both may
exceed 1. A clip in which nobody should speak has no error rate; words that are heard in it are `hallucinated_speech`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eval.clip_file import SILENT_PEAK, ClipFile, MeasurementError, NotMeasured
from eval.languages import language_code
from eval.metrics.registry import Measurement, Metric, MissingDependency
from eval.speech_recognition import RATE, Recogniser, load_recogniser, missing_recogniser, recogniser_identity
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto: bfloat16 on a GPU, else float32", "auto")


def missing(options: SpeechErrorsOptions) -> MissingDependency | None:
    """The recogniser's weights or package."""
    return missing_recogniser(options.model)


def load(options: SpeechErrorsOptions) -> Recogniser:
    """The recogniser."""
    return load_recogniser(options.model, options.device, options.dtype)


def identity(options: SpeechErrorsOptions) -> Mapping[str, Any]:
    """Model with its revision, and the precision."""
    return {**recogniser_identity(options.model), "dtype": options.dtype}


def measure(clip: ClipFile, recogniser: Recogniser) -> Mapping[str, Any]:
    """Error rates of a clip, with the transcript, its recogniser and the unit as texts.

    Returns:
        Values by key; those that do not apply are `NotMeasured`: rates where nobody should speak, hallucinated speech where
        somebody should.

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
    if not len(wave) or np.abs(wave).max() < SILENT_PEAK:
        heard, source = "", "none, the audio is silent"
    else:
        transcript = recogniser.transcribe([wave], [language])[0]
        heard, source = transcript.text, f"{transcript.model}, {transcript.revision}"
        source += f"; {transcript.note}" if transcript.note else ""
    rules = rules_for(clip.dialogue, language)
    texts = {"transcript_text": heard, "recogniser_text": source, "unit_text": rules.note}
    words_heard = float(bool(units(heard, rules)))
    found = compare(clip.dialogue, heard, language)
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
        options=SpeechErrorsOptions,
        missing=missing,
        load=load,
        identity=identity,
        costly=True,
    ),
)
