"""Names to networks: the only constructor of models.

`arch(name)` reads hyperparameters from configs/model, `build` makes a network, `load` opens a checkpoint: one
that ships with the package ("tiny/base"), an exported folder, a run folder, or the published weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magihuman.errors import UserError
from magihuman.models.config import DiTConfig, PackConfig

if TYPE_CHECKING:
    import torch

    from magihuman.io.export import ExportConfig
    from magihuman.models.denoiser import Denoiser

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
WEIGHTS = Path(__file__).resolve().parent / "weights"


@dataclass(frozen=True)
class Loaded:
    """A checkpoint ready to run: the denoiser in eval mode, its config, and the folder it came from."""

    denoiser: "Denoiser"
    config: "ExportConfig"
    folder: Path


def arch_names() -> list[str]:
    """Names of the architectures in configs/model."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def arch(name: str) -> DiTConfig:
    """Hyperparameters of a named network.

    Raises:
        UserError: for an unknown name, listing the choices.
    """
    return DiTConfig.from_dict(_hyperparameters(name)["dit"])


def pack(name: str) -> PackConfig:
    """Token packing that belongs to a named network. Raises UserError as `arch` does."""
    return PackConfig.from_dict(_hyperparameters(name).get("pack", {}))


def _hyperparameters(name: str) -> dict[str, Any]:
    import yaml

    path = CONFIGS / f"{name}.yaml"
    if name not in arch_names():
        raise UserError(f"architecture {name!r} is unknown; choose from {', '.join(arch_names())}")
    return yaml.safe_load(path.read_text())


def build(
    config: DiTConfig,
    pack_config: PackConfig,
    *,
    compute_dtype: "torch.dtype",
    linear_dtype: "torch.dtype | None" = None,
    device: "torch.device | str" = "cpu",
    seed: int | None = None,
) -> "Denoiser":
    """Build a network with random weights.

        zoo.build(zoo.arch("small"), zoo.pack("small"), compute_dtype=torch.bfloat16, seed=1)

    Args:
        compute_dtype: torch.float32 or torch.bfloat16.
        linear_dtype: storage of the block matrices; None is fp32 (master weights).
        device: "meta" makes shapes only.
        seed: of the initial weights; None draws from torch's default generator.
    """
    import torch

    from magihuman.models.denoiser import Denoiser
    from magihuman.models.dit import SingleStreamDiT

    with torch.device(device):
        model = SingleStreamDiT(config, compute_dtype=compute_dtype, linear_dtype=linear_dtype or torch.float32)
    if torch.device(device).type != "meta":
        model.init_weights(seed)
    return Denoiser(model, pack_config)


def checkpoint_names() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return sorted(
        path.parent.relative_to(WEIGHTS).as_posix() for path in WEIGHTS.glob("**/model.safetensors.index.json")
    )


def find(checkpoint: str | Path) -> Path:
    """Folder of a checkpoint: a shipped name, an exported folder, a run folder, a published folder (base, distill,
    540p_sr, 1080p_sr), or OWNER/NAME[/FOLDER] in the cache of the Hugging Face Hub.

    Raises:
        UserError: when it is none of these, with the choices or the command that fetches it.
    """
    shipped = checkpoint_names()
    if str(checkpoint) in shipped:
        return WEIGHTS / str(checkpoint)
    from magihuman.zoo.sources import locate

    return locate(checkpoint, shipped)


def config_of(checkpoint: str | Path) -> "ExportConfig":
    """The config of a checkpoint, see `find`; published weights get the config that belongs to them.

    Raises:
        UserError: when it cannot be found or read.
    """
    from magihuman.zoo.sources import read_config

    return read_config(find(checkpoint))


def load(
    checkpoint: str | Path,
    device: "torch.device | str" = "cpu",
    compute_dtype: "torch.dtype | None" = None,
    lora: str | Path | None = None,
) -> Loaded:
    """Load a checkpoint for inference or evaluation.

        denoiser = zoo.load("tiny/base").denoiser

    Args:
        checkpoint: see `find`.
        compute_dtype: also of the stored block matrices; None is bf16 on a GPU and fp32 elsewhere.
        lora: folder of a LoRA (`magihuman.zoo.lora_files`) to merge into the weights; the config is then its own.

    Raises:
        UserError: when checkpoint or LoRA cannot be found or do not fit.
    """
    import torch

    from magihuman.io.export import load_state_dict
    from magihuman.zoo import lora_files
    from magihuman.zoo.sources import read_config

    folder = find(checkpoint)
    config = read_config(folder)
    device = torch.device(device)
    dtype = compute_dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    denoiser = build(config.model, config.pack, compute_dtype=dtype, linear_dtype=dtype, device="meta")
    dtypes = {key: tensor.dtype for key, tensor in denoiser.model.state_dict().items()}
    stored: Iterable[tuple[str, torch.Tensor]] = load_state_dict(folder, config.model).items()
    if lora is not None:
        config = lora_files.config_with_lora(config, lora, str(checkpoint))
        stored = lora_files.apply(dict(stored), lora, config.model)
    state = {key: tensor.to(device, dtypes[key]) for key, tensor in stored}
    denoiser.model.load_state_dict(state, assign=True)
    return Loaded(denoiser.eval(), config, folder)
