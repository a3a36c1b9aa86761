"""Speech recognisers behind one protocol: GLM-ASR, Whisper, Qwen3-ASR, and a recogniser of digits that needs no weights.

    recogniser = load_recogniser("glm")                        # or a Hub name, or a folder
    recogniser.transcribe([wave], ["en"])[0].text              # wave: fp32 [N] at 16 kHz

Models are read from a folder or from the local Hugging Face cache, never fetched. Decoding is greedy, so that a transcript
repeats. The class follows from `model_type` in config.json.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eval.fingerprint import fingerprint, local_model, missing_model
from eval.metrics.registry import MissingDependency, missing_package
from magihuman.errors import UserError

RATE = 16000
SHORTEST = 400
"""Samples; less is shorter than a window of the networks' spectrograms and holds no word."""
MAX_TOKENS = 500
"""Of a transcript; one that is longer is cut and says so."""
MODELS = {"glm": "zai-org/GLM-ASR-Nano-2512", "whisper": "openai/whisper-large-v3", "qwen3": "Qwen/Qwen3-ASR-1.7B-hf"}
SMOKE = "smoke"
_CLASSES = {
    "glmasr": "GlmAsrForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "qwen3_asr": "Qwen3ASRForConditionalGeneration",
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Transcript:
    """What a recogniser understood.

    Attributes:
        text: as the model wrote it, "" where it heard no words.
        model, revision: Hub name or folder's name, and commit or hash of the weights.
        note: what a reader must know of this transcript, such as that it was cut; else "".
    """

    text: str
    model: str
    revision: str
    note: str = ""


class Recogniser(Protocol):
    """Turns speech into text."""

    def transcribe(self, waves: Sequence[np.ndarray], languages: Sequence[str | None]) -> list[Transcript]:
        """Transcripts of a batch, the same as one by one but for rounding, which float32 makes rare.

        Args:
            waves: each fp32 [N] in [-1,1] at `RATE`.
            languages: codes of `eval.languages.LANGUAGES`, given to models that take one; None: the model finds out.
        """
        ...


# ---- Where a model is ----


def _source(model: str) -> str:
    return MODELS.get(model, model)


def missing_recogniser(model: str) -> MissingDependency | None:
    """What a recogniser lacks on this machine; imports and loads nothing."""
    if model == SMOKE:
        return missing_package("pocketsphinx")
    if lacking := missing_package("transformers") or missing_model(_source(model)):
        return lacking
    try:
        kind = _kind(local_model(_source(model)))
    except UserError as error:
        return MissingDependency(str(error), f"give one of {', '.join((*MODELS, SMOKE))}, a Hub name or a folder")
    return _missing_class(kind)


def recogniser_identity(model: str) -> dict[str, str]:
    """Name and revision of a recogniser, and the version of the package that runs it; without loading it."""
    from importlib.metadata import version

    if model == SMOKE:
        return {"model": "pocketsphinx digits", "revision": version("pocketsphinx"), "package": "pocketsphinx"}
    folder = local_model(_source(model))
    return {
        "model": _name(model),
        "revision": fingerprint(folder),
        "package": f"transformers {version('transformers')}",
    }


def _name(model: str) -> str:
    """Hub name, or the last part of a folder's path: results hold no path of a machine."""
    return _source(model) if not Path(model).expanduser().is_dir() else Path(model).expanduser().resolve().name


def _kind(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/config.json cannot be read: {error}; fetch the model again") from error
    if kind not in _CLASSES:
        raise UserError(f"{folder} is of type {kind!r}, no speech recogniser that is known ({', '.join(_CLASSES)})")
    return str(kind)


def _missing_class(kind: str) -> MissingDependency | None:
    """Whether the installed transformers has the model's code; looked up among its files, since it is slow to import."""
    from importlib.metadata import version
    from importlib.util import find_spec

    spec = find_spec("transformers")
    folders = spec.submodule_search_locations if spec is not None else None
    if folders and any((Path(folder) / "models" / kind).is_dir() for folder in folders):
        return None
    return MissingDependency(
        f"transformers {version('transformers')} has no {_CLASSES[kind]}", "pip install -U transformers"
    )


def load_recogniser(model: str, device: str = "auto", dtype: str = "float32") -> Recogniser:
    """A recogniser that is on this machine.

    Args:
        model: glm, whisper, qwen3, smoke, a Hub name in the local cache, or a folder.
        device: auto (a GPU if there is one), cpu, cuda or cuda:0.
        dtype: float32, bfloat16 or float16.

    Raises:
        UserError: absent, incomplete, damaged, or no speech recogniser.
    """
    if lacking := missing_recogniser(model):
        raise UserError(str(lacking))
    if model == SMOKE:
        return DigitRecogniser()
    return TransformersRecogniser(model, device, dtype)


# ---- Networks of transformers ----


class TransformersRecogniser:
    """GLM-ASR, Whisper or Qwen3-ASR; arguments and errors as of `load_recogniser`."""

    def __init__(self, model: str, device: str = "auto", dtype: str = "float32") -> None:
        import torch
        import transformers

        from inference.loading import choose_device

        folder = local_model(_source(model))
        self._kind, self._name, self._revision = _kind(folder), _name(model), fingerprint(folder)
        place = choose_device(device)
        try:
            self._processor: Any = transformers.AutoProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            network, report = getattr(transformers, _CLASSES[self._kind]).from_pretrained(
                folder, local_files_only=True, dtype=getattr(torch, dtype), output_loading_info=True
            )
        except Exception as error:  # transformers raises many kinds for damaged files
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{model} cannot be loaded ({type(error).__name__}: {reason}); fetch it again") from error
        if report["missing_keys"]:  # transformers fills them with random numbers
            raise UserError(f"{model} lacks {len(report['missing_keys'])} tensors; fetch it again")
        self._network: Any = network.to(place).eval()

    def transcribe(self, waves: Sequence[np.ndarray], languages: Sequence[str | None]) -> list[Transcript]:
        """See `Recogniser`."""
        hints = [self._hint(language) for language in languages]
        found = [Transcript("", self._name, self._revision, "less than 25 ms of audio")] * len(waves)
        # One batch holds what is decoded alike: of one language, and shorter or longer than a window of Whisper.
        groups: dict[tuple[str, bool], list[int]] = {}
        for index, (wave, hint) in enumerate(zip(waves, hints, strict=True)):
            if len(wave) >= SHORTEST:
                groups.setdefault((hint or "", self._is_long(wave)), []).append(index)
        for (hint, long), members in groups.items():
            batch = [np.asarray(waves[index], np.float32) for index in members]
            for index, (text, note) in zip(members, self._transcribe(batch, hint or None, long), strict=True):
                found[index] = Transcript(text.strip(), self._name, self._revision, note)
        return found

    def _is_long(self, wave: np.ndarray) -> bool:
        return self._kind == "whisper" and len(wave) > self._processor.feature_extractor.n_samples

    def _hint(self, language: str | None) -> str | None:
        """The language as the model takes it, None where it takes none or does not know it."""
        if language is None or self._kind == "glmasr":
            return None
        if self._kind == "whisper":
            known = getattr(self._network.generation_config, "lang_to_id", None) or {}
            return language if f"<|{language}|>" in known else None
        from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME

        return LANGUAGE_CODE_TO_NAME.get(language)

    def _transcribe(self, waves: list[np.ndarray], hint: str | None, long: bool) -> list[tuple[str, str]]:
        """(text, note) of each wave of a batch."""
        import torch

        greedy: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        if self._kind == "whisper":
            whole = {"truncation": False, "padding": "longest"} if long else {}
            inputs = self._processor.feature_extractor(
                waves, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True, **whole
            )
            greedy |= {"return_timestamps": True} if long else {}
            greedy |= {"language": hint, "task": "transcribe"} if hint else {}
        elif self._kind == "qwen3_asr":
            inputs = self._processor.apply_transcription_request(waves, language=hint)
        else:
            inputs = self._processor.apply_transcription_request(waves)
        if self._kind != "whisper":  # whose own limit is that of its positions
            greedy["max_new_tokens"] = MAX_TOKENS
        inputs = inputs.to(self._network.device, self._network.dtype)
        with torch.inference_mode():
            tokens = self._network.generate(**inputs, **greedy)
        tokens = tokens[:, inputs["input_ids"].shape[1] :] if self._kind != "whisper" else tokens
        cut = "cut at the longest transcript that is decoded"
        notes = ["" if long or self._ended(row) else cut for row in tokens]
        return list(zip(self._decode(tokens), notes, strict=True))

    def _decode(self, tokens: Any) -> list[str]:
        if self._kind == "qwen3_asr":
            return list(self._processor.decode(tokens, return_format="transcription_only"))
        return list(self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def _ended(self, tokens: Any) -> bool:
        """Whether a transcript ended by itself: its row has an end token, or is shorter than the limit."""
        config = self._network.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list | tuple) else [config.eos_token_id]
        # Of Whisper's positions, four are taken by start, language, task and "no timestamps".
        limit = config.max_length - 4 if self._kind == "whisper" else MAX_TOKENS
        return len(tokens) < limit or any(bool((tokens == end).any()) for end in ends)


# ---- Digits by pocketsphinx ----


class DigitRecogniser:
    """English digits, spoken one after the other, by pocketsphinx: a check of the way from clip to error rate, offline.

    It hears digits in everything, so its errors say nothing of a model's speech.
    """

    DITHER = 120.0
    """Noise in 16-bit levels: without it, synthetic speech, whose pauses are exactly 0, is understood badly."""

    def __init__(self) -> None:
        import pocketsphinx

        self._models = Path(pocketsphinx.get_model_path()) / "en-us"
        self._revision = recogniser_identity(SMOKE)["revision"]
        lines = (self._models / "cmudict-en-us.dict").read_text().splitlines()
        self._words = "\n".join(line for line in lines if re.split(r"[\s(]", line)[0] in DIGITS)

    def transcribe(self, waves: Sequence[np.ndarray], languages: Sequence[str | None]) -> list[Transcript]:
        """See `Recogniser`; languages are not used."""
        return [Transcript(self._digits(wave), "pocketsphinx digits", self._revision) for wave in waves]

    def _digits(self, wave: np.ndarray) -> str:
        import tempfile

        import pocketsphinx

        if len(wave) < SHORTEST:
            return ""
        # A new decoder per clip (.2 s): one that is kept adapts to what it has heard.
        with tempfile.TemporaryDirectory() as folder:
            words, grammar = Path(folder, "words"), Path(folder, "grammar")
            words.write_text(self._words + "\n")
            grammar.write_text(f"#JSGF V1.0;\ngrammar digits;\npublic <digits> = ( {' | '.join(DIGITS)} )+ ;\n")
            decoder = pocketsphinx.Decoder(
                hmm=str(self._models / "en-us"), dict=str(words), jsgf=str(grammar), lm=None, loglevel="FATAL"
            )
        padded = np.pad(np.asarray(wave, np.float64), round(0.3 * RATE)) * 32767
        padded += np.random.RandomState(0).uniform(-self.DITHER, self.DITHER, len(padded))
        decoder.start_utt()
        decoder.process_raw(np.clip(padded, -32768, 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return str(found.hypstr) if found is not None else ""
