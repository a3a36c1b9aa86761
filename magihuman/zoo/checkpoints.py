"""Names to networks: the only constructor of models.

`arch(name)` reads hyperparameters from configs/model, `build` makes a network, `load` opens a checkpoint: one
that ships with the package ("scene/base"), an exported folder, a run folder, or the published weights, also in the local
cache of the Hugging Face Hub; nothing is downloaded. Finding one needs no torch.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from magihuman.codecs.bundle import RELEASED_REPO, ROLES
from magihuman.errors import UserError
from magihuman.io.files import hub_folder, is_hub_id
from magihuman.io.text import load_json
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.zoo import names
from magihuman.zoo.names import choices

if TYPE_CHECKING:
    import torch

    from magihuman.io.export import ExportConfig
    from magihuman.models.denoiser import Denoiser

DIFFUSERS_INDEX = "model_index.json"

RUNS = "runs"
"""Default folder of training runs: RUNS/recipe/name."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint ready to run: the denoiser in eval mode, its config, and the folder it came from."""

    denoiser: "Denoiser"
    config: "ExportConfig"
    folder: Path


def arch(name: str) -> DiTConfig:
    """Hyperparameters of a named network.

    Raises:
        UserError: for an unknown name, listing the choices.
    """
    return DiTConfig.from_dict(names.arch_settings(name)["dit"])


def pack(name: str) -> PackConfig:
    """Token packing that belongs to a named network. Raises UserError as `arch` does."""
    return PackConfig.from_dict(names.arch_settings(name).get("pack", {}))


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


def find(checkpoint: str | Path) -> Path:
    """Folder of a checkpoint: a shipped name, an exported folder, a run folder (its export/), a published folder (base,
    distill, 540p_sr, 1080p_sr), or OWNER/NAME[/FOLDER] in the cache of the Hugging Face Hub.

    Raises:
        UserError: when it is none of these, with the choices or the command that fetches it.
    """
    text, shipped = str(checkpoint), names.checkpoint_names()
    if text in shipped:
        return names.WEIGHTS / text
    folder = Path(os.path.expanduser(checkpoint))
    if folder.is_dir():
        return _within(folder, text)
    if folder.exists():
        raise UserError(
            f"{folder} is a file; a checkpoint is a folder. Make one of it with: "
            f"python -m magihuman.zoo convert {folder} NEW"
        )
    owner, _, rest = text.partition("/")
    name, _, inner = rest.partition("/")
    repo, inner = f"{owner}/{name}", inner.strip("/")
    ours = owner in {each.partition("/")[0] for each in shipped}
    a_run = folder.parts[:1] == (RUNS,)
    # A first part that exists here, or `runs`, means a misspelt path and not a Hub id.
    if is_hub_id(repo) and not ours and not a_run and not Path(repo).parent.exists():
        return _in_hub_cache(repo, inner)
    more = f"; {_fetch_into(folder)}" if folder.name in ROLES and not ours else ""
    if a_run:
        found = sorted(Path(RUNS).glob("*/*/export"), key=lambda path: path.stat().st_mtime)
        newest = [str(path.parent) for path in reversed(found[-5:])]
        more = f"; newest finished runs here: {', '.join(newest) or 'none'}"
    raise UserError(f"{_missing(text)}{more}")


def config_of(checkpoint: str | Path) -> "ExportConfig":
    """The config of a checkpoint, see `find`; published weights get the config that belongs to them.

    Raises:
        UserError: when it cannot be found or read.
    """
    return read_config(find(checkpoint))


def read_config(
    folder: Path, role: str | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> "ExportConfig":
    """The config of a folder found by `find`: its own, or that of the published model which it holds.

    Args:
        role: published model, where the folder's name does not say it.
        shapes: of its tensors, if already known.

    Raises:
        UserError: it does not fit, or nothing says which model it is.
    """
    from magihuman.io.export import CONFIG, load_config, read_header, weight_files
    from magihuman.zoo.released import config_for

    if (folder / CONFIG).is_file() and not _is_foreign(folder / CONFIG):
        if role is not None:
            raise UserError(f"{folder} has a config of its own ({CONFIG}); leave role= out")
        return load_config(folder)
    if not _has_weights(folder):
        return load_config(folder)  # raises with the reason
    if role is None:
        role = next((name for name in (folder.name, folder.resolve().name) if name in ROLES), None)
    if role is None:
        raise UserError(
            f"{folder} is not an exported checkpoint (no config of ours), and its name does not say which published "
            f"model it is; rename it to one of {', '.join(ROLES)}, or convert it with role=ONE_OF_THESE"
        )
    if shapes is None:
        headers = [read_header(path) for path in weight_files(folder)]
        shapes = {name: shape for header in headers for name, (shape, _) in header.items()}
    return config_for(role, shapes, folder)


def load(
    checkpoint: str | Path,
    device: "torch.device | str" = "cpu",
    compute_dtype: "torch.dtype | None" = None,
    lora: str | Path | None = None,
) -> Loaded:
    """Load a checkpoint for inference or evaluation.

        denoiser = zoo.load("scene/base").denoiser

    Args:
        checkpoint: see `find`.
        compute_dtype: also of the stored block matrices; None is bf16 on a GPU and fp32 elsewhere.
        lora: folder of a LoRA (`magihuman.zoo.lora_files`) to merge into the weights; the config is then its own.

    Raises:
        UserError: when checkpoint or LoRA cannot be found or do not fit.
    """
    import torch

    from magihuman.io.export import load_state_dict
    from magihuman.models.lora import merge
    from magihuman.zoo import lora_files

    folder = find(checkpoint)
    config = config_of(checkpoint)
    device = torch.device(device)
    dtype = compute_dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    denoiser = build(config.model, config.pack, compute_dtype=dtype, linear_dtype=dtype, device="meta")
    dtypes = {key: tensor.dtype for key, tensor in denoiser.model.state_dict().items()}
    stored: Iterable[tuple[str, torch.Tensor]] = load_state_dict(folder, config.model).items()
    if lora is not None:
        config = lora_files.config_with_lora(config, lora, str(checkpoint))
        stored = merge(dict(stored), *lora_files.load_lora(lora, config.model))
    state = {key: tensor.to(device, dtypes[key]) for key, tensor in stored}
    denoiser.model.load_state_dict(state, assign=True)
    return Loaded(denoiser.eval(), config, folder)


# -- finding checkpoints


def _missing(name: str) -> str:
    return f"checkpoint {name!r} is neither a folder nor a shipped name ({choices(name, 'checkpoint')})"


def _fetch_into(folder: Path) -> str:
    """Command that downloads the published weights of that name to `folder`."""
    return f"fetch it with: hf download {RELEASED_REPO} --include '{folder.name}/*' --local-dir {folder.parent}"


def _within(folder: Path, label: str) -> Path:
    from magihuman.io.export import CONFIG
    from magihuman.zoo.lora_files import lora_in

    for candidate in (folder, folder / "export"):
        if _has_weights(candidate):
            return candidate
    lora = lora_in(folder)
    if lora is not None:
        raise UserError(f"{lora} is a LoRA; give the checkpoint that it changes, and lora={lora}")
    held = [name for name in ROLES if _has_weights(folder / name)]
    if held:
        listed = ", ".join(f"{label.rstrip('/')}/{name}" for name in held)
        raise UserError(f"{folder} holds several checkpoints; choose one: {listed}")
    if (folder / DIFFUSERS_INDEX).is_file():
        raise UserError(
            f"{folder} is a diffusers-style folder; make an export of it with: "
            f"python -m magihuman.zoo convert {folder} NEW"
        )
    for candidate in (folder, folder / "export"):
        if (candidate / CONFIG).is_file():
            return candidate
    if (folder / "run.json").is_file():
        raise UserError(
            f"{folder} is a run that has exported nothing yet; let it finish, or give its training command with "
            f"folder={folder} after_fit=null and trainer.max_steps set to the step of its newest checkpoint, which exports that"
        )
    raise UserError(f"{folder} holds no exported checkpoint (config.json, or export/config.json of a run)")


def _has_weights(folder: Path) -> bool:
    from magihuman.io.export import INDEX, SINGLE

    return any((folder / name).is_file() for name in (INDEX, SINGLE, f"{SINGLE}.zst"))


def _is_foreign(config: Path) -> bool:
    """Whether a config.json is not ours: a JSON object without a format."""
    try:
        values = load_json(config)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "format" not in values


def _in_hub_cache(repo: str, inner: str) -> Path:
    part = f" --include '{inner}/*'" if inner else ""
    fetch = f"fetch it with: hf download {repo}{part}"
    root = hub_folder(repo)
    if root is None:
        missing = _missing("/".join(filter(None, (repo, inner))))
        if not inner and Path(repo).name in ROLES:  # as in weights/base: a folder for the published weights
            raise UserError(f"{missing}; {_fetch_into(Path(repo))}")
        raise UserError(f"{missing}, and the Hub's {repo} is not on this machine; {fetch}")
    if not (root / inner).is_dir():
        known = f" (published are {', '.join(ROLES)})" if repo == RELEASED_REPO else ""
        raise UserError(f"the part {inner!r} of {repo} is not on this machine{known}; {fetch}")
    from magihuman.io.export import weight_files

    folder = _within(root / inner, "/".join(filter(None, (repo, inner))))
    try:
        weight_files(folder, compressed=True)
    except UserError as error:
        raise UserError(f"{error}; {fetch}") from None
    return folder
