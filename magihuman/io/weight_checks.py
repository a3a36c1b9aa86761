"""Checks of weights: that their bytes are those that were written, and that every number in them is finite.

Folders that this package writes hold `checksums.json`, a CRC-32 of every safetensors file. Published weights have none, and a
folder without it is read as it is. Each check takes every byte once.
"""

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from magihuman.errors import UserError
from magihuman.io.text import load_json

CHECKSUMS = "checksums.json"
_BLOCK = 1 << 20


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` of the safetensors files in a folder."""
    sums = {file.name: _crc32(file) for file in sorted(folder.glob("*.safetensors"))}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")


def check_checksums(files: Iterable[Path]) -> None:
    """Compare files with the checksums beside them, where there are any.

    Raises:
        UserError: a file has changed since it was written.
    """
    for file in files:
        noted = file.with_name(CHECKSUMS)
        if not noted.is_file():
            continue
        try:
            wanted = dict(load_json(noted)).get(file.name)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{noted} cannot be read ({error}); copy the folder again") from None
        if wanted is not None and _crc32(file) != wanted:
            raise UserError(
                f"{file} is damaged: its checksum is not that in {CHECKSUMS}; copy it again, or delete {CHECKSUMS} if the "
                "file was changed on purpose"
            )


def _crc32(file: Path) -> str:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def require_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        source: where the tensors come from, for the message.

    Raises:
        UserError: naming the first such tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            if not math.isfinite(low) or not math.isfinite(high):
                raise UserError(
                    f"{source}: {name} holds numbers that are not finite (NaN or infinity); the training that made it "
                    "diverged, or the file is damaged"
                )
