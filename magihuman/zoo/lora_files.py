"""LoRA checkpoints in peft's format, with the config of the network that results from base and LoRA.

    adapter_model.safetensors   base_model.model.block.layers.0.mlp.down_proj.lora_A.weight, ...lora_B.weight, ...
    adapter_config.json         peft's: r, lora_alpha, target_modules, patterns, modules_to_save
    config.json                 ours: an `ExportConfig` as in an export, sampling settings included

A stack of E experts has E pairs A_e [r, columns], B_e [rows, r], while peft stores one pair per matrix. The stacked
update equals diag(B_1 ... B_E) [E rows, E r] times the stacked A [E r, columns], so a stack is written as one pair of
rank E r, listed in rank_pattern, with alpha_pattern E alpha, which keeps alpha / r. The zeros off the diagonal take
disk space (at 15 B and r = 64: 1.65 GB instead of 1.14 GB in fp32); in return peft, and any tool that adds B A to
weights by name, applies the file exactly (tested with peft in tests/zoo/test_lora_files.py).
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from magihuman.errors import UserError
from magihuman.io.export import CONFIG, ExportConfig, keep_readme, load_config, read_header, write_json
from magihuman.io.files import atomic_path
from magihuman.io.text import load_json
from magihuman.io.weight_checks import check_checksums, require_finite, write_checksums
from magihuman.models.config import DiTConfig, LoraConfig
from magihuman.models.lora import merge

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
PREFIX = "base_model.model."
TARGETS = ("linear_qkv", "linear_proj", "up_gate_proj", "down_proj")


def lora_in(folder: Path) -> Path | None:
    """Folder of a LoRA checkpoint: itself, or adapter/ of a run folder; None where there is none."""
    return next((inner for inner in (folder, folder / "adapter") if (inner / ADAPTER_CONFIG).is_file()), None)


def find(lora: str | Path) -> Path:
    """See `lora_in`.

    Raises:
        UserError: when there is none.
    """
    found = lora_in(Path(os.path.expanduser(lora)))
    if found is None:
        raise UserError(f"{lora} holds no LoRA ({ADAPTER_CONFIG}); give the folder adapter/ of a run with recipe=lora")
    return found


def save_lora(
    folder: str | Path, state: Mapping[str, Tensor], lora: LoraConfig, config: ExportConfig, base: str
) -> Path:
    """Write a LoRA checkpoint atomically: a reader sees the old folder or the whole new one.

    Args:
        state: see `magihuman.models.lora.lora_state`.
        config: of the network with the LoRA, sampling settings included.
        base: name of the checkpoint that the LoRA belongs to.
    """
    folder = Path(folder)
    require_finite(state, "the LoRA to save")
    tensors = {key: t.detach().cpu().contiguous() for key, t in _to_peft(state, config.model, lora)}
    with atomic_path(folder, folder=True) as new:
        save_file(tensors, new / ADAPTER_MODEL, metadata={"format": "pt"})
        write_checksums(new)
        write_json(new / ADAPTER_CONFIG, peft_config(config.model, lora, base))
        write_json(new / CONFIG, config.to_dict())
        keep_readme(folder, new)
    return folder


def peft_config(model: DiTConfig, lora: LoraConfig, base: str) -> dict[str, Any]:
    """Content of adapter_config.json."""
    alpha = lora.scale * lora.rank
    stacks = {key: count for key, count in _experts(model).items() if count > 1}
    ends = sorted({key.rpartition(".")[0] for key in _ends(model)})
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(TARGETS),
        "rank_pattern": {key: count * lora.rank for key, count in stacks.items()},
        "alpha_pattern": {key: count * alpha for key, count in stacks.items()},
        "modules_to_save": ends if lora.heads else None,
    }


def lora_config(folder: str | Path) -> LoraConfig:
    """Rank, alpha and heads of a saved LoRA.

    Raises:
        UserError: its adapter_config.json is damaged, or describes another peft method.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        values = load_json(path)
        kind, rank = values["peft_type"], values["r"]
        found = LoraConfig(rank, float(values["lora_alpha"]), bool(values.get("modules_to_save")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}); export the LoRA again") from None
    if kind != "LORA" or values.get("use_dora") or values.get("use_rslora"):
        raise UserError(f"{path} describes another method than plain LoRA; only plain LoRA can be applied")
    return found


def load_lora(folder: str | Path, model: DiTConfig) -> tuple[dict[str, Tensor], LoraConfig]:
    """Read a LoRA checkpoint.

    Args:
        model: config of the base; every name and shape is checked against it.

    Returns:
        state as in `magihuman.models.lora.lora_state`, and its size.

    Raises:
        UserError: naming what does not fit.
    """
    folder = find(folder)
    lora = lora_config(folder)
    path = folder / ADAPTER_MODEL
    shapes = {key: shape for key, (shape, _) in read_header(path).items()}
    expected = dict(_peft_shapes(model, lora))
    wrong = sorted(shapes.items() ^ expected.items())
    if wrong:
        key = wrong[0][0]
        has, wants = (list(s[key]) if key in s else "nothing" for s in (shapes, expected))
        raise UserError(f"{folder} does not fit this network: {key} is {has} where {wants} belongs")
    scales = load_json(folder / ADAPTER_CONFIG).get("alpha_pattern") or {}
    if scales != peft_config(model, lora, "")["alpha_pattern"]:
        raise UserError(
            f"{folder} does not fit this network: alpha_pattern scales stacked experts otherwise than alpha / r"
        )
    check_checksums([path])
    state: dict[str, Tensor] = {}
    with safe_open(path, framework="pt") as file:
        for key, count in _experts(model).items():
            down, up = (file.get_tensor(f"{PREFIX}{key}.lora_{part}.weight") for part in "AB")
            blocks = up.unflatten(1, (count, -1)).unflatten(0, (count, -1))  # [E, rows, E, r]
            own = torch.stack([blocks[e, :, e] for e in range(count)])  # [E, rows, r]
            if count > 1 and up.count_nonzero() != own.count_nonzero():
                raise UserError(f"{folder} does not fit this network: {key} mixes the experts, which ours keep apart")
            state[f"{key}.lora.A"], state[f"{key}.lora.B"] = down, own.flatten(0, 1)
        for key in _ends(model) if lora.heads else ():
            state[f"lora.{key}"] = file.get_tensor(PREFIX + key)
    require_finite(state, folder)
    return state, lora


def config_with_lora(base: ExportConfig, folder: str | Path, name: str) -> ExportConfig:
    """Config of a base with a LoRA: the LoRA's own, with the codec bundle of the base.

    Args:
        name: of the base, for messages.

    Raises:
        UserError: the LoRA is for another network or other latents.
    """
    own = load_config(find(folder))
    for part in ("model", "pack"):
        if wrong := getattr(own, part).differences(getattr(base, part)):
            raise UserError(
                f"lora={folder} was made for another network than {name} ({'; '.join(wrong)}); give its own base, "
                f"{own.provenance.get('init', 'see its adapter_config.json')}"
            )
    own.contract.require(base.contract, f"lora={folder}", name)
    return replace(own, codecs=base.codecs)


def merged(
    base: Mapping[str, Tensor], lora: Mapping[str, Tensor], size: LoraConfig, model: DiTConfig
) -> dict[str, Tensor]:
    """A base with a LoRA merged into it, summed in fp32 and rounded to the stored dtypes, one tensor at a time."""
    dtypes = {key: torch.bfloat16 if is_bf16 else torch.float32 for key, _, is_bf16 in model.tensors()}
    return {key: tensor.to(dtypes[key]) for key, tensor in merge(base, lora, size)}


def _experts(model: DiTConfig) -> dict[str, int]:
    """Module -> stacked experts, of every matrix that a LoRA changes."""
    return {
        key.removesuffix(".weight"): model.experts(int(key.split(".")[2]))
        for key, _, is_matrix in model.tensors()
        if is_matrix
    }


def _ends(model: DiTConfig) -> list[str]:
    """Keys of which a LoRA may have its own."""
    return [k for k, _, _ in model.tensors() if not k.startswith("block.") and k != "adapter.rope.bands"]


def _to_peft(state: Mapping[str, Tensor], model: DiTConfig, lora: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    for key, count in _experts(model).items():
        yield f"{PREFIX}{key}.lora_A.weight", state[f"{key}.lora.A"]
        yield f"{PREFIX}{key}.lora_B.weight", torch.block_diag(*state[f"{key}.lora.B"].chunk(count))
    for key in _ends(model) if lora.heads else ():
        yield PREFIX + key, state[f"lora.{key}"]


def _peft_shapes(model: DiTConfig, lora: LoraConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    shapes = {key: shape for key, shape, _ in model.tensors()}
    for key, count in _experts(model).items():
        rows, columns = shapes[f"{key}.weight"]
        yield f"{PREFIX}{key}.lora_A.weight", (count * lora.rank, columns)
        yield f"{PREFIX}{key}.lora_B.weight", (rows, count * lora.rank)
    for key in _ends(model) if lora.heads else ():
        yield PREFIX + key, shapes[key]
