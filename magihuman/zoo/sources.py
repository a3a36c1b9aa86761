"""Locating checkpoints: folders, run folders, published folders, ids in the local Hub cache; nothing is downloaded."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from magihuman.errors import UserError
from magihuman.io.export import CONFIG, INDEX, SINGLE, ExportConfig, load_config, read_header, weight_files
from magihuman.io.released_files import is_hub_id
from magihuman.zoo.lora_files import is_lora
from magihuman.zoo.released import REPO, ROLES, Shapes, config_for

DIFFUSERS_INDEX = "model_index.json"

RUNS = "runs"
"""Default folder of training runs: RUNS/recipe/name."""


def locate(checkpoint: str | Path, shipped: Sequence[str] = ()) -> Path:
    """Folder of a checkpoint: an exported folder, a run folder (its export/), a published folder such as base/,
    or OWNER/NAME[/FOLDER] in the cache of the Hugging Face Hub.

    Args:
        shipped: names of shipped checkpoints, for messages.

    Raises:
        UserError: when it is none of these, with the choices or the command that fetches it.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return _within(folder, str(checkpoint))
    if folder.exists():
        raise UserError(
            f"{folder} is a file; a checkpoint is a folder. Make one of it with: "
            f"python -m magihuman.zoo convert {folder} NEW"
        )
    text = str(checkpoint)
    repo, _, inner = _split_hub_id(text)
    ours = text.partition("/")[0] in {name.partition("/")[0] for name in shipped}
    a_run = folder.parts[:1] == (RUNS,)
    # A first part that exists here, or `runs`, means a misspelt path and not a Hub id.
    if repo and not ours and not a_run and not Path(repo).parent.exists():
        return _in_hub_cache(repo, inner, shipped)
    more = f"; {_fetch_into(folder)}" if folder.name in ROLES and not ours else ""
    if a_run:
        found = sorted(Path(RUNS).glob("*/*/export"), key=lambda path: path.stat().st_mtime)
        names = [str(path.parent) for path in reversed(found[-5:])]
        more = f"; newest finished runs here: {', '.join(names) or 'none'}"
    raise UserError(f"checkpoint {text!r} is neither a folder nor a shipped name ({choices(text, shipped)}){more}")


def read_config(folder: Path, role: str | None = None, shapes: Shapes | None = None) -> ExportConfig:
    """The config of a folder found by `locate`: its own, or that of the published model which it holds.

    Args:
        role: published model, where the folder's name does not say it.
        shapes: of its tensors, if already known.

    Raises:
        UserError: it does not fit, or nothing says which model it is.
    """
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


def choices(name: str, shipped: Sequence[str]) -> str:
    """The shipped names for a message, and the one closest to `name`."""
    close = difflib.get_close_matches(name, shipped, n=1)
    return (", ".join(shipped) or "none yet") + (f"; did you mean {close[0]!r}?" if close else "")


def _fetch_into(folder: Path) -> str:
    """Command that downloads the published weights of that name to `folder`."""
    return f"fetch it with: hf download {REPO} --include '{folder.name}/*' --local-dir {folder.parent}"


def _within(folder: Path, label: str) -> Path:
    for candidate in (folder, folder / "export"):
        if _has_weights(candidate):
            return candidate
    lora = next((inner for inner in (folder, folder / "adapter") if is_lora(inner)), None)
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
    raise UserError(f"{folder} holds no exported checkpoint (config.json, or export/config.json of a run)")


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (INDEX, SINGLE, f"{SINGLE}.zst"))


def _is_foreign(config: Path) -> bool:
    """Whether a config.json is not ours: a JSON object without a format."""
    try:
        values = json.loads(config.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "format" not in values


def _split_hub_id(text: str) -> tuple[str, str, str]:
    owner, _, rest = text.partition("/")
    name, slash, inner = rest.partition("/")
    repo = f"{owner}/{name}"
    return (repo if is_hub_id(repo) else ""), slash, inner.strip("/")


def _in_hub_cache(repo: str, inner: str, shipped: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    part = f" --include '{inner}/*'" if inner else ""
    fetch = f"fetch it with: hf download {repo}{part}"
    try:
        root = Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        name = "/".join(filter(None, (repo, inner)))
        missing = f"checkpoint {name!r} is neither a folder nor a shipped name ({choices(name, shipped)})"
        if not inner and Path(repo).name in ROLES:  # as in weights/base: a folder for the published weights
            raise UserError(f"{missing}; {_fetch_into(Path(repo))}") from None
        raise UserError(f"{missing}, and the Hub's {repo} is not on this machine; {fetch}") from None
    if not (root / inner).is_dir():
        known = f" (published are {', '.join(ROLES)})" if repo == REPO else ""
        raise UserError(f"the part {inner!r} of {repo} is not on this machine{known}; {fetch}")
    folder = _within(root / inner, "/".join(filter(None, (repo, inner))))
    try:
        weight_files(folder, compressed=True)
    except UserError as error:
        raise UserError(f"{error}; {fetch}") from None
    return folder
