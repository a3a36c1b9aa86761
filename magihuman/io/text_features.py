"""Files with the text features of one prompt: a safetensors file with `text` [S,Ct] in fp16, as in shards.

`null_text.safetensors` of shards is one; `python -m inference.encode_text` makes one of any text.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from magihuman.errors import UserError
from magihuman.io.files import atomic_path
from magihuman.models.config import Contract


def write_text_features(path: str | Path, features: torch.Tensor, facts: dict[str, str]) -> None:
    """Write features [S,Ct] in fp16; `facts` are stored in the file's metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        save_file({"text": features.half().cpu().contiguous()}, partial, metadata=facts)


def read_text_features(path: str | Path, setting: str, codecs: str, contract: Contract) -> torch.Tensor:
    """Features of one prompt, fp32 [S,Ct].

    Args:
        setting: that names the file, for messages.
        codecs: whose text encoder the network takes; contract: theirs. Files that do not name their encoder, such as
            null_text.safetensors, are checked by their channels alone.

    Raises:
        UserError: the file is missing, damaged, or of another text encoder.
    """
    of = "" if codecs == "released" else f' text="..." codecs={codecs}'
    remedy = f"make it with `python -m inference.encode_text output={path}{of}`"
    if not Path(path).is_file():
        raise UserError(f"{setting}={path} is not a file; {remedy}")
    try:
        with safe_open(path, "pt") as file:
            text = file.get_tensor("text").float()
            encoder = (file.metadata() or {}).get("encoder", contract.text_encoder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{setting}={path} holds no text features ({error}); {remedy}") from error
    if encoder != contract.text_encoder:
        raise UserError(
            f"{setting}={path} holds features of the text encoder {encoder}, and the network takes those of "
            f"{contract.text_encoder}; {remedy}"
        )
    if text.ndim != 2 or not len(text) or text.shape[1] != contract.text_channels or not text.isfinite().all():
        raise UserError(
            f"{setting}={path} holds text features of shape {list(text.shape)}, or not finite ones, and the network takes "
            f"{contract.text_channels} channels; {remedy}"
        )
    return text
