"""Input and output of a Qwen2.5-VL that judges videos: the question, the frames as it takes them, the scores in its answer.

Facts about VideoScore2 are from its repository, TIGER-AI-Lab/VideoScore2 (vs2_inference.py), and its model card; about the
input of Qwen2.5-VL from the packages qwen-vl-utils and transformers. They are implemented here because transformers
reads videos only with torchvision, and decodes them itself.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eval.clip_file import MeasurementError

if TYPE_CHECKING:
    import torch

QUESTION = """
You are an expert for evaluating AI-generated videos from three dimensions:
(1) visual quality – clarity, smoothness, artifacts;
(2) text-to-video alignment – fidelity to the prompt;
(3) physical/common-sense consistency – naturalness and physics plausibility.

Video prompt: {prompt}

Please output in this format:
visual quality: <v_score>;
text-to-video alignment: <t_score>,
physical/common-sense consistency: <p_score>
"""
"""The text that VideoScore2 is asked with: an input that it was trained for, to the character."""

CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>",
    "<|vision_end|>",
    "<|im_end|>\n<|im_start|>assistant\n",
)
"""Qwen2.5-VL's chat format around the tokens of the video and the question."""

GRADES = (1, 2, 3, 4, 5)
_PIXELS = (128 * 28 * 28, 768 * 28 * 28)  # least and most of a frame
_ALL_PIXELS = int(128000 * 28 * 28 * 0.9)  # most of a video
_FRAMES = (4, 768)


def sampled_frames(total: int, rate: float, fps: float) -> np.ndarray:
    """Numbers of the frames that are shown, an even number of them, evenly spaced from first to last: int [n].

    Args:
        total, rate: frames of the video and its frames per second; fps: frames per second to show, roughly.

    Raises:
        MeasurementError: the video has fewer than two frames.
    """
    least, most = _FRAMES
    count = int(min(max(total / rate * fps, least), most, total) // 2 * 2)
    if count < 2:
        raise MeasurementError(f"the judge needs 2 frames, and the clip has {total}")
    return np.linspace(0, total - 1, count).round().astype(int)


def shown_size(height: int, width: int, frames: int, multiple: int = 28) -> tuple[int, int]:
    """Height and width that frames are scaled to: multiples of 28 within the model's budget of pixels.

    Raises:
        MeasurementError: one side is over 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise MeasurementError(f"frames of {width}x{height} are too narrow for the judge (200:1 at most)")
    least, most = _PIXELS
    most = max(min(most, _ALL_PIXELS * 2 // frames), int(least * 1.05))
    rounded = (round(height / multiple) * multiple, round(width / multiple) * multiple)
    if rounded[0] * rounded[1] > most:
        scale = (height * width / most) ** 0.5
        return tuple(max(multiple, int(side / scale // multiple) * multiple) for side in (height, width))  # type: ignore[return-value]
    if rounded[0] * rounded[1] < least:
        scale = (least / (height * width)) ** 0.5
        return tuple(-int(-side * scale // multiple) * multiple for side in (height, width))  # type: ignore[return-value]
    return rounded


def video_patches(
    frames: np.ndarray, patch: int = 14, merge: int = 2, depth: int = 2
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Frames uint8 [F,H,W,3] -> patches fp32 [N, 3*depth*patch^2] and their grid int64 [1,3] (time, height, width).

    Bicubic scaling with antialiasing, rounded to 8 bits, then CLIP's mean and deviation; patches of `merge` x `merge`
    neighbours stand together, as the vision tower merges them.

    Args:
        patch, merge, depth: pixels, patches and frames that make a patch or a token; of the model's vision config.
    """
    import torch
    from torch.nn.functional import interpolate
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    size = shown_size(frames.shape[1], frames.shape[2], len(frames), patch * merge)
    images = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    scaled = [interpolate(image[None].float(), size, mode="bicubic", antialias=True) for image in images]
    video = torch.cat(scaled).round().clamp(0, 255) / 255
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    video = (video - mean) / deviation
    video = torch.cat([video, *[video[-1:]] * (-len(video) % depth)])
    grid = (len(video) // depth, size[0] // patch, size[1] // patch)
    cells = video.reshape(
        grid[0], depth, 3, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
    )  # fmt: skip
    patches = cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid[0] * grid[1] * grid[2], -1)
    return patches, torch.tensor([grid])


# ---- The answer ----

_NAMES = (r"visual quality", r"text(?:-to-video)? alignment", r"physical(?:\s*/\s*common-sense)? consistency")
# "visual quality: 4; ..." as asked for, or "(1) visual quality – clarity, smoothness, artifacts: 4", as in the training data.
_ANSWER = re.compile(r".*?".join(rf"{name}[^:\n]*:[*\s]*(\d+(?:\.\d+)?)" for name in _NAMES), re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Grade:
    """A score of an answer, 1 to 5, and the place of its digit in the text."""

    value: int
    position: int


def parse_answer(text: str) -> tuple[Grade, Grade, Grade]:
    """Visual quality, text alignment and physical consistency: the last scores after the reasoning (`</think>`).

    Raises:
        MeasurementError: there are none, they are no whole numbers from 1 to 5, or the reasoning did not end.
    """
    head, closed, _ = text.rpartition("</think>")
    start = len(head) + len(closed)
    if not closed and "<think>" in text:
        raise MeasurementError(f"the answer ends within its reasoning: {_end_of(text)}")
    found = None
    for found in _ANSWER.finditer(text, start):  # noqa: B007
        pass
    if found is None:
        raise MeasurementError(f"no scores in the answer: {_end_of(text)}")
    if not all(score in map(str, GRADES) for score in found.groups()):
        raise MeasurementError(f"scores {', '.join(found.groups())} are no whole numbers from 1 to 5")
    visual, alignment, physics = (Grade(int(found[n]), found.start(n)) for n in (1, 2, 3))
    return visual, alignment, physics


def _end_of(text: str) -> str:
    shown = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return f"...{shown[-200:]}" if len(shown) > 200 else (shown or "it is empty")


def soft_scores(logits: np.ndarray) -> tuple[float, float]:
    """Scores from the logits [5] of the digits 1 to 5 at the place of a score: the model card's, and the expectation.

    The card's is the likeliest digit times its share of the five probabilities: 4 at a share of .6 counts 2.4. It
    falls with uncertainty and can order two videos the wrong way; the expectation is sum(digit x share).
    """
    values = np.asarray(logits, np.float64)
    shares = np.exp(values - values.max())
    shares /= shares.sum()
    best = int(shares.argmax())
    return float(GRADES[best] * shares[best]), float(shares @ np.array(GRADES))
