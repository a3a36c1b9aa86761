"""Description of a checkpoint: safetensors file, exported or diffusers-style folder, LoRA or run folder (`zoo inspect`)."""

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from magihuman.errors import UserError
from magihuman.io.export import CONFIG, INDEX, SINGLE, read_header, weight_files
from magihuman.io.markdown import aligned
from magihuman.io.released_files import read_json
from magihuman.io.streamed_safetensors import DTYPES
from magihuman.zoo.checkpoints import DIFFUSERS_INDEX
from magihuman.zoo.diffusers_style import OUR_CONFIG, STEM
from magihuman.zoo.lora_files import ADAPTER_CONFIG, lora_in
from magihuman.zoo.names import choices

BUFFERS = ("adapter.rope.bands",)  # not counted by `DiTConfig.parameter_count`


def describe(path: str | Path) -> str:
    """Text with run record, config, tensors and totals of a checkpoint.

    Raises:
        UserError: when there is no checkpoint.
    """
    path = Path(path)
    if path.is_file():
        return _tensor_table([path])
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist; give a safetensors file, an exported or diffusers-style folder, a LoRA, a run "
            f"folder or a shipped name ({choices(str(path), 'checkpoint', 'decoder')})"
        )
    parts = []
    if (path / "run.json").is_file():
        parts.append(_json_block("run", path / "run.json"))
    if (path / DIFFUSERS_INDEX).is_file():
        parts += _diffusers_parts(path)
    export = path / "export" if (path / "export").is_dir() else path
    if (export / CONFIG).is_file():
        parts.append(_json_block(f"config ({export / CONFIG})", export / CONFIG))
    if (export / INDEX).is_file() or (export / SINGLE).is_file():
        parts.append(_tensor_table(weight_files(export)))
    elif loose := sorted(export.glob("*.safetensors")):
        parts.append(_tensor_table(loose))
    lora = lora_in(path)
    if lora is not None:
        file = lora / ADAPTER_CONFIG
        parts.append(_json_block(f"LoRA ({file})", file))
        if lora != path:
            parts.append(_tensor_table(sorted(lora.glob("*.safetensors"))))
    checkpoints = sorted((path / "checkpoints").glob("*")) if (path / "checkpoints").is_dir() else []
    if checkpoints:
        parts.append("checkpoints\n" + "\n".join(f"  {file.name}" for file in checkpoints))
    if not parts:
        held = sorted(file.parent.name for file in (*path.glob(f"*/{DIFFUSERS_INDEX}"), *path.glob("*/*.safetensors")))
        if held:
            choose = ", ".join(str(path / name) for name in dict.fromkeys(held))
            raise UserError(f"{path} holds several checkpoints; choose one: {choose}")
        raise UserError(f"{path} holds no checkpoint: no run.json, no {CONFIG}, no safetensors files")
    return "\n\n".join(parts)


def _diffusers_parts(path: Path) -> list[str]:
    """A diffusers-style folder: its JSON files, all tensors of the transformer, the totals of the other networks.

    Raises:
        UserError: the transformer is missing or incomplete.
    """
    files = {"transformer": weight_files(path / "transformer", stem=STEM)}
    parts = [
        f"diffusers-style folder, as FastVideo's; to use it: python -m magihuman.zoo convert {path} NEW",
        _json_block(f"index ({path / DIFFUSERS_INDEX})", path / DIFFUSERS_INDEX),
    ]
    if (path / OUR_CONFIG).is_file():
        parts.append(_json_block(f"config ({path / OUR_CONFIG})", path / OUR_CONFIG))
    for folder in sorted(each for each in path.iterdir() if each.is_dir()):
        if (folder / CONFIG).is_file():
            parts.append(_json_block(f"{folder.name} ({folder / CONFIG})", folder / CONFIG))
        if found := files.get(folder.name) or sorted(folder.glob("*.safetensors")):
            table = _tensor_table(found)
            parts.append(table if folder.name in files else f"{folder.name}: {table.splitlines()[-1]}")
    return parts


def _json_block(title: str, path: Path) -> str:
    return title + "\n" + "\n".join(_flat_lines(read_json(path, "a description of the checkpoint"), "  "))


def _flat_lines(values: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", *_flat_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {value if isinstance(value, str) else json.dumps(value)}")
    return lines


def _tensor_table(files: list[Path]) -> str:
    rows, numbers, sizes, buffered = [], Counter[str](), Counter[str](), 0
    for file in files:
        for name, (shape, dtype) in read_header(file).items():
            count = prod(shape)
            size = count * DTYPES[dtype].itemsize if dtype in DTYPES else 0
            buffered += count if name in BUFFERS else 0
            rows.append((name, str(list(shape)), dtype, readable_size(size)))
            numbers[dtype] += count
            sizes[dtype] += size
    lines = aligned(rows)
    kinds = ", ".join(f"{numbers[dtype]:,} {dtype}" for dtype in sorted(numbers))
    apart = f", of which {buffered:,} in buffers" if buffered else ""
    where = f"{len(files)} file{'s' * (len(files) != 1)}"
    total = f"{len(rows)} tensors in {where}, {numbers.total():,} numbers{apart} ({kinds})"
    return "tensors\n" + "\n".join(f"  {line}" for line in lines) + f"\n{total}, {readable_size(sizes.total())}"


def readable_size(count: float) -> str:
    """Bytes with a unit, such as 30.64 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
