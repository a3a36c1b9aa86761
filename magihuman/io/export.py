"""Exported checkpoints: weights in the released layout (SPEC 9) with a config that is sufficient for loading.

A folder holds `model-XXXXX-of-XXXXX.safetensors`, `model.safetensors.index.json`, `checksums.json` and `config.json`,
and `README.md`, the model card (`magihuman.zoo.model_card`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.files import atomic_path
from magihuman.io.provenance import README
from magihuman.io.released_files import read_json, require_fit
from magihuman.io.text import load_json
from magihuman.io.weight_checks import check_checksums, require_finite, write_checksums
from magihuman.models.config import Contract, DiTConfig, PackConfig
from magihuman.schema import check, check_limits

FORMAT = "magihuman/1"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Sampling:
    """Default sampling settings of a checkpoint; command lines override them."""

    solver: str = "unipc"
    steps: int = 32
    shift: float = 5.0
    guidance: Guidance = field(default_factory=Guidance)
    negative_prompt: str = ""


@dataclass(frozen=True)
class Size:
    """Length in frames and size in pixels of the training clips."""

    frames: int = 25
    height: int = 64
    width: int = 64


@dataclass(frozen=True)
class ExportConfig:
    """Content of config.json of an exported checkpoint.

    Attributes:
        codecs: name of the codecs and text encoder (`magihuman.codecs.bundle`), stored under "world"; contract: their latents.
        sigma_prior: distribution of noise levels in training; None if it is unknown: of the released weights, and of what was
            trained from them.
        provenance: facts about the training (command, seed, parents by sha256, metrics).
    """

    model: DiTConfig
    pack: PackConfig
    codecs: str
    contract: Contract
    sigma_prior: SigmaPrior | None = None
    sampling: Sampling = field(default_factory=Sampling)
    size: Size = field(default_factory=Size)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def assumed_prior(self) -> SigmaPrior:
        """`sigma_prior`, or uniform noise levels if it is unknown."""
        return self.sigma_prior or SigmaPrior("uniform")

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model.to_dict(),
            "pack": self.pack.to_dict(),
            "world": self.codecs,
            "contract": self.contract.to_dict(),
            "sigma_prior": None if self.sigma_prior is None else self.sigma_prior.to_dict(),
            "sampling": asdict(self.sampling),
            "size": asdict(self.size),
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExportConfig":
        """Raises UserError for another format, a missing part or an unknown key."""
        found = values.get("format")
        if found != FORMAT:
            raise UserError(f"the checkpoint's format is {found!r}, this version reads {FORMAT!r}")
        try:
            for name, schema in (("sampling", Sampling), ("size", Size)):
                check_limits(values[name], name)
                check(values[name], schema, name)
            sampling, prior, provenance = dict(values["sampling"]), values["sigma_prior"], values.get("provenance", {})
            if "released" in provenance:  # before version 0.3.0 these files called the unknown prior uniform
                prior = None
            return cls(
                model=DiTConfig.from_dict(values["model"]),
                pack=PackConfig.from_dict(values["pack"]),
                codecs=values["world"],
                contract=Contract.from_dict(values["contract"]),
                sigma_prior=None if prior is None else SigmaPrior.from_dict(prior),
                sampling=Sampling(**{**sampling, "guidance": Guidance.from_dict(sampling["guidance"])}),
                size=Size(**values["size"]),
                provenance=provenance,
            )
        except KeyError as error:
            raise UserError(f"the checkpoint's config.json has no {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the checkpoint's config.json does not fit: {error}") from None


def released_dtypes(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Block matrices in bf16, everything else in fp32, as the release stores them (SPEC 1.2)."""
    matrices = {key for key, _, is_bf16 in config.tensors() if is_bf16}
    return {k: v.to(torch.bfloat16 if k in matrices else torch.float32) for k, v in state.items()}


def save_export(
    folder: str | Path, state: Mapping[str, Tensor], config: ExportConfig, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write an exported checkpoint in one step: readers find the old folder or the complete new one.

        save_export("export", state, config)

    Args:
        state: tensors under the released names, in the dtypes to store.
        max_shard_bytes: upper bound of a file, except for a single larger tensor.

    Raises:
        UserError: when the state does not fit config.model, or holds NaN or infinity.
    """
    check_fit({k: tuple(v.shape) for k, v in state.items()}, config.model, "the state to export")
    require_finite(state, "the state to export")
    folder = Path(folder)
    with atomic_path(folder, folder=True) as new:
        sizes = {key: tensor.nbytes for key, tensor in state.items()}
        for file, names in write_index(new, "model", sizes, max_shard_bytes).items():
            tensors = {name: state[name].detach().cpu().contiguous() for name in names}
            save_file(tensors, new / file, metadata={"format": "pt"})
        write_checksums(new)
        write_json(new / CONFIG, config.to_dict())
        keep_readme(folder, new)
    return folder


def keep_readme(old: Path, new: Path) -> None:
    """Copy the model card, which people edit, from an export to the one that replaces it."""
    if (old / README).is_file():
        (new / README).write_bytes((old / README).read_bytes())


def load_config(folder: str | Path, name: str = CONFIG) -> ExportConfig:
    """Config of an exported checkpoint.

    Args:
        name: of the file.

    Raises:
        UserError: when it is absent, not JSON, or does not fit.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{folder} is not an exported checkpoint: it has no {name}")
    values = read_json(path, "the settings of the checkpoint")
    try:
        return ExportConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_state_dict(folder: str | Path, config: DiTConfig) -> dict[str, Tensor]:
    """All tensors of an exported checkpoint, after comparing every name and shape with the config.

    Raises:
        UserError: naming missing, unexpected and wrong-shaped tensors, a tensor with NaN or infinity, or the file that cannot
            be read or has changed since it was written.
    """
    files = weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        shapes.update({name: shape for name, (shape, _) in read_header(path).items()})
    check_fit(shapes, config, str(folder))
    check_checksums(files)
    state: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as shard:
            state.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    require_finite(state, folder)
    return state


def weight_files(folder: str | Path, compressed: bool = False, stem: str = "model") -> list[Path]:
    """Safetensors files of a checkpoint folder: those of its index, or the single file.

    Args:
        compressed: take FILE.zst where FILE is not there, as the release allows (SPEC 9).
        stem: start of the file names.

    Raises:
        UserError: when there are none, or the index names a file that is not there.
    """
    folder = Path(folder)
    index = folder / f"{stem}.safetensors.index.json"
    single = f"{stem}.safetensors"
    if index.exists():
        try:
            weight_map = load_json(index)["weight_map"]
            names = sorted({str(name) for name in weight_map.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not an index of safetensors files ({error!r})") from None
    elif (folder / single).exists() or (folder / f"{single}.zst").exists():
        names = [single]
    else:
        raise UserError(f"{folder} holds no weights: neither {index.name} nor {single} is there")
    files = []
    for name in names:
        path, packed = folder / name, folder / f"{name}.zst"
        if Path(name).name == name and path.is_file():
            files.append(path)
        elif Path(name).name == name and packed.is_file():
            if not compressed:
                raise UserError(
                    f"{packed} is compressed; unpack the checkpoint: python -m magihuman.zoo convert {folder} NEW"
                )
            files.append(packed)
        else:
            raise UserError(f"{index} names the shard {name!r}, which is not in {folder}; copy it there")
    return files


def read_header(path: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of a safetensors file, without reading the tensors.

    Raises:
        UserError: when the file is absent, cut short or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None


def check_fit(shapes: Mapping[str, tuple[int, ...]], config: DiTConfig, source: str) -> None:
    """Raises UserError where names and shapes are not those of the config's network (see `require_fit`)."""
    require_fit(shapes, {key: shape for key, shape, _ in config.tensors()}, source)


def write_index(folder: Path, stem: str, sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Write the index of a checkpoint's files, see `plan_shards`; returns the tensors of each file, which is to be made."""
    shards = plan_shards(sizes, limit)
    files = {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    write_json(folder / f"{stem}.safetensors.index.json", index)
    return files


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Distribute tensors, in order, over files of at most `limit` bytes; a larger tensor gets its own file.

    With 5 GB the released network makes 7 files in mixed types and 13 in fp32, as published (SPEC 9).
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n")
