"""VideoScore2 (arXiv:2509.22799): a Qwen2.5-VL that sees a video and its prompt, reasons, and gives three grades from 1 to 5.

    hf download TIGER-Lab/VideoScore2
    python -m eval.score clips=DIR metrics=videoscore2

The paper of daVinci-MagiHuman reports three numbers without saying which of the scores they are: the grades, the model
card's soft scores and the expectations are all given. The answer is greedy unless samples= asks for several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from eval.clip_file import MeasurementError
from eval.fingerprint import fingerprint, local_model, missing_model
from eval.metrics.registry import InBatches, Measurement, Metric, MissingDependency, plain_options
from eval.video_judge import (
    CHAT,
    GRADES,
    QUESTION,
    parse_answer,
    sampled_frames,
    soft_scores,
    video_patches,
)  # fmt: skip
from magihuman.cli import option
from magihuman.errors import UserError

if TYPE_CHECKING:
    import torch

    from eval.clip_file import ClipFile

_DIMENSIONS = {"visual": "visual quality", "alignment": "text alignment", "physics": "physical consistency"}
_SCORES = {"": "", "_soft": ", card's soft score", "_expected": ", expectation"}
_BETWEEN = "\n\n---\n\n"


@dataclass
class JudgeOptions:
    """Settings of videoscore2."""

    weights: str = option("folder or Hub name of the judge", "TIGER-Lab/VideoScore2")
    fps: float = option("frames per second that the judge sees", 2.0)
    samples: int = option("answers that are sampled and averaged; 0: one greedy answer", 0)
    temperature: float = option("of sampled answers", 0.7)
    seed: int = option("of sampled answers, the same for every clip", 0)
    max_tokens: int = option("longest answer", 1024)
    dtype: Literal["bfloat16", "float32"] = option(
        "of the weights: 2 or 4 bytes for each of 8.3e9 parameters", "bfloat16"
    )
    device: str = option("auto, cpu, cuda or cuda:0", "auto")
    batch: int = option(
        "clips of a batch (with samples=, one at a time); each takes about 1 GB for 5 s in 1080p, in addition to 17 GB of "
        "weights in bfloat16, so that 4 should fit into 24 GB",
        4,
    )

    def __post_init__(self) -> None:
        if self.samples < 0 or self.max_tokens < 1 or not self.fps > 0:
            raise UserError(
                f"videoscore2: samples={self.samples}, max_tokens={self.max_tokens}, fps={self.fps}: samples are 0 or more, "
                "the others positive"
            )
        if self.batch < 1:
            raise UserError(f"videoscore2.batch={self.batch} must be at least 1")
        if self.samples and not self.temperature > 0:
            raise UserError(f"videoscore2.temperature={self.temperature} must be positive; samples=0 is greedy")


@dataclass
class Answer:
    """What the judge said: its text, and for each dimension the grade and the logits of the digits 1 to 5 there."""

    text: str
    grades: tuple[int, ...]
    digits: tuple[np.ndarray, ...]


class Judge:
    """The model with its tokenizer.

        judge = Judge(JudgeOptions())
        judge.answers([judge.inputs(frames, fps=25, prompt="A woman ...")])

    Raises:
        UserError: the weights are not here, lack tensors, or are no Qwen2.5-VL.
    """

    def __init__(self, options: JudgeOptions) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        from inference.loading import choose_device

        folder = local_model(options.weights)
        self.options = options
        self.device = choose_device(options.device)
        offline = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **offline)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder, **offline, dtype=getattr(torch, options.dtype), output_loading_info=True
            )
        except Exception as error:  # transformers raises many kinds for damaged or foreign files
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"videoscore2.weights={options.weights} cannot be loaded: {reason}") from error
        model, report = loaded
        if lost := sorted(report["missing_keys"]):  # transformers fills them with random numbers
            raise UserError(
                f"videoscore2.weights={options.weights} lacks {len(lost)} tensors, such as {lost[0]}; copy it again"
            )
        if model.config.model_type != "qwen2_5_vl":
            raise UserError(f"videoscore2.weights={options.weights} is a {model.config.model_type}, not a qwen2_5_vl")
        self.model: Any = model.eval().to(device=self.device)
        digits = [self.tokenizer.encode(str(grade), add_special_tokens=False) for grade in GRADES]
        if any(len(ids) != 1 for ids in digits):
            raise UserError(f"videoscore2.weights={options.weights}: its tokenizer has no token for each digit")
        self.digits = [ids[0] for ids in digits]
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}

    def inputs(self, frames: np.ndarray, fps: float, prompt: str) -> "dict[str, torch.Tensor]":
        """Arguments of the model for frames uint8 [F,H,W,3] of a video at `fps`, on the CPU: of the sampled frames only.

        The prompt is only text: special tokens that are spelled in it are not read as such.
        """
        import torch

        vision = self.model.config.vision_config
        shown = frames[sampled_frames(len(frames), fps, self.options.fps)]
        patches, grid = video_patches(shown, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        video = [self.model.config.video_token_id] * int(grid.prod() // vision.spatial_merge_size**2)
        before, after, end = (self.tokenizer.encode(text, add_special_tokens=False) for text in CHAT)
        question = QUESTION.replace("{prompt}", prompt)
        asked = self.tokenizer.encode(question, add_special_tokens=False, split_special_tokens=True)
        ids = torch.tensor([[*before, *video, *after, *asked, *end]])
        kinds = torch.zeros_like(ids)
        kinds[:, len(before) : len(before) + len(video)] = 2  # video; 0 is text
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": kinds,
            "pixel_values_videos": patches,
            "video_grid_thw": grid,
            # As the card's script does, by the wanted rate, not by the one that rounding gives.
            "second_per_grid_ts": torch.tensor([vision.temporal_patch_size / self.options.fps]),
        }

    def _joined(self, clips: "Sequence[Mapping[str, torch.Tensor]]") -> "dict[str, torch.Tensor]":
        """Inputs of several clips as one batch on the judge's device: texts padded on the left, patches and grids in a row."""
        import torch

        longest = max(clip["input_ids"].shape[1] for clip in clips)
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in clips[0]}
        for clip in clips:
            # Padding is the first token of every question: a penalty on repetition (the checkpoint may have one) must not
            # count a token that the clip alone would not have. Masked, it is seen by nothing else.
            fill = {"input_ids": int(clip["input_ids"][0, 0]), "attention_mask": 0, "mm_token_type_ids": 0}
            for name, value in clip.items():
                if name in fill:
                    value = torch.nn.functional.pad(value, (longest - value.shape[1], 0), value=fill[name])
                parts[name].append(value)
        return {name: torch.cat(values).to(self.device) for name, values in parts.items()}

    def answers(self, clips: "Sequence[Mapping[str, torch.Tensor]]") -> list[list[Answer] | MeasurementError]:
        """Of each clip one greedy answer, all made at once, or as many sampled ones as the options ask for, one by one.

        Args:
            clips: of `inputs`.

        Returns:
            For each clip its answers, or the error where one of them has no scores.
        """
        options = self.options
        if not options.samples:
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            return [self._read([made]) for made in self._generate(self._joined(clips), greedy)]
        sampling = {"do_sample": True, "temperature": options.temperature}
        return [self._read(self._samples(self._joined([clip]), sampling)) for clip in clips]

    def _samples(self, given: "dict[str, torch.Tensor]", sampling: Mapping[str, Any]) -> list[tuple[list[int], Any]]:
        """As many sampled answers of one clip as the options ask for: alone, so that no other clip takes random numbers."""
        import torch

        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.options.seed)
            return [self._generate(given, sampling)[0] for _ in range(self.options.samples)]

    def _generate(
        self, given: "dict[str, torch.Tensor]", sampling: Mapping[str, Any]
    ) -> "list[tuple[list[int], torch.Tensor]]":
        """Of each clip the tokens of an answer, to its end token, and for each token the logits [5] of the digits, fp32.

        Of all logits (0.6 GB for one long answer) only those of the digits are kept, before temperature and penalties.
        """
        import torch

        seen: list[torch.Tensor] = []

        def keep(head: Any, hidden: Any, logits: "torch.Tensor") -> None:
            seen.append(logits[:, -1, self.digits].float())

        hook = self.model.get_output_embeddings().register_forward_hook(keep)
        try:
            with torch.inference_mode():
                tokens = self.model.generate(**given, **sampling, max_new_tokens=self.options.max_tokens, num_beams=1)
        finally:
            hook.remove()
        digits = torch.stack(seen, 1).cpu()
        found = []
        for row, ids in enumerate(tokens[:, given["input_ids"].shape[1] :].tolist()):
            ended = next((place + 1 for place, token in enumerate(ids) if token in self.ends), len(ids))
            found.append((ids[:ended], digits[row, :ended]))
        return found

    def _read(self, made: "Sequence[tuple[list[int], torch.Tensor]]") -> list[Answer] | MeasurementError:
        """Answers of a clip from their tokens and logits [T,5] of digits; an error where one of them has no scores."""
        answers, failures = [], []
        texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids, _ in made]
        for text, (ids, digits) in zip(texts, made, strict=True):
            try:
                answers.append(replace(self._scored(ids, digits), text=text))
            except MeasurementError as error:
                failures.append(str(error))
        if not failures:
            return answers
        # The mean of those that can be read would be of other answers than asked for.
        several = f"{len(failures)} of {len(texts)} answers have no scores; " if len(texts) > 1 else ""
        return MeasurementError(several + failures[0], {"videoscore2_text": _BETWEEN.join(texts)})

    def _scored(self, ids: list[int], digits: "torch.Tensor") -> Answer:
        """Text, grades and digits' logits of an answer's tokens; `digits` fp32 [T,5]."""
        text = self._text(ids)
        grades = parse_answer(text)
        places = {len(self._text(ids[:n])): n for n, token in enumerate(ids) if token in self.digits}
        found = []
        for grade in grades:
            if (place := places.get(grade.position)) is None:
                raise MeasurementError(f"the score at character {grade.position} of the answer is no token of its own")
            found.append(digits[place].numpy())
        return Answer(text, tuple(grade.value for grade in grades), tuple(found))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def prepare(clip: "ClipFile", judge: Judge) -> "dict[str, torch.Tensor]":
    """Input of the judge, of the sampled frames only: 70 MB for 5 s in 1080p.

    Raises:
        MeasurementError: too few frames, or too narrow ones.
    """
    return judge.inputs(clip.frames, clip.fps, clip.prompt)


def together(clips: "Sequence[Mapping[str, torch.Tensor]]", judge: Judge) -> list[Mapping[str, Any] | MeasurementError]:
    """Of each clip grades, soft scores and expectations of the three dimensions, means over the answers; and the answers."""
    return [found if isinstance(found, MeasurementError) else _values(found) for found in judge.answers(clips)]


def _values(answers: Sequence[Answer]) -> dict[str, Any]:
    values: dict[str, Any] = {"videoscore2_text": _BETWEEN.join(answer.text for answer in answers)}
    for number, key in enumerate(_DIMENSIONS):
        scores = [(answer.grades[number], *soft_scores(answer.digits[number])) for answer in answers]
        for suffix, of_answers in zip(_SCORES, zip(*scores, strict=True), strict=True):
            values[f"videoscore2_{key}{suffix}"] = float(np.mean(of_answers))
    return values


def missing(options: JudgeOptions) -> MissingDependency | None:
    """The weights, where they are not on this machine."""
    return missing_model(options.weights)


def identity(options: JudgeOptions) -> Mapping[str, Any]:
    """Weights and all settings that answers depend on."""
    unused = {"weights", "device", "batch"} | (set() if options.samples else {"temperature", "seed"})
    kept = {name: value for name, value in plain_options(options).items() if name not in unused}
    # Without the folder's path: results hold no path of a machine, and the same weights elsewhere are the same judge.
    name = Path(options.weights).expanduser().name
    return {"weights": name, "fingerprint": fingerprint(local_model(options.weights)), **kept}


MEASUREMENTS = (
    Measurement(
        "videoscore2",
        tuple(
            Metric(f"videoscore2_{key}{suffix}", f"VideoScore2: {label}{score}", "1 to 5", "up", 5.0)
            for key, label in _DIMENSIONS.items()
            for suffix, score in _SCORES.items()
        ),
        InBatches(prepare, together),
        inputs=("frames", "prompt"),
        options=JudgeOptions,
        missing=missing,
        load=Judge,
        identity=identity,
        costly=True,
    ),
)
