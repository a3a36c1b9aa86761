"""Files with the text features of one prompt: a safetensors file with `text` [S,Ct] in fp16, as in shards.

`null_text.safetensors` of shards is one; `python -m inference.encode_text` makes one of any text.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from magihuman.errors import UserError
from magihuman.io.files import atomic_path


def write_text_features(path: str | Path, features: torch.Tensor, facts: dict[str, str]) -> None:
    """Write features [S,Ct] in fp16; `facts` are stored in the file's metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        save_file({"text": features.half().cpu().contiguous()}, partial, metadata=facts)


def read_text_features(path: str | Path, channels: int, setting: str) -> torch.Tensor:
    """Features of one prompt, fp32 [S,Ct].

    Args:
        channels: Ct that the network takes; setting: that names the file, for messages.

    Raises:
        UserError: the file is missing, damaged, or of another text encoder.
    """
    remedy = f"make it with `python -m inference.encode_text output={path}`"
    if not Path(path).is_file():
        raise UserError(f"{setting}={path} is not a file; {remedy}")
    try:
        text = load_file(path)["text"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{setting}={path} holds no text features ({error}); {remedy}") from error
    if text.ndim != 2 or not len(text) or text.shape[1] != channels or not text.isfinite().all():
        raise UserError(
            f"{setting}={path} holds text features of shape {list(text.shape)}, or not finite ones, and the network takes "
            f"{channels} channels; {remedy}"
        )
    return text
