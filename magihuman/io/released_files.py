"""Locating and strictly loading released weight files, without network access.

Files are searched on this machine only: at a path, or in the cache of the Hugging Face Hub. The error for a missing
file contains the command that downloads it.
"""

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from magihuman.errors import UserError
from magihuman.io.files import is_hub_id
from magihuman.io.text import load_json
from magihuman.io.weight_checks import check_checksums, require_finite
from magihuman.schema import check_limits

_LISTED = 4  # names shown per kind of mismatch before "and N more"


def locate(source: str | Path, wanted: Sequence[str], repo: str) -> Path:
    """Find one weight file.

    Args:
        source: the file itself, a folder that holds one of `wanted`, or a Hub id whose snapshot is cached.
        wanted: names relative to the folder or repository, best first.
        repo: where the file is published; named in the error.

    Returns:
        Path of an existing file.

    Raises:
        UserError: nothing found; the message holds the command that fetches it.
    """
    path = Path(os.path.expanduser(source))
    fetch = f"fetch it with: hf download {repo} {wanted[0]} --local-dir FOLDER"
    if path.is_file():
        return path
    if path.is_dir():
        for name in wanted:
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path} holds none of {', '.join(wanted)}; {fetch}")
    if is_hub_id(source):
        from huggingface_hub import try_to_load_from_cache

        for name in wanted:
            cached = try_to_load_from_cache(str(source), name)
            if isinstance(cached, str):
                return Path(cached)
        raise UserError(
            f"{source} is not on this machine; fetch it with: hf download {source} {wanted[0]} "
            "(accept its licence on the Hub and run `hf auth login` first where it is gated)"
        )
    raise UserError(f"no file or folder {source}; {fetch}")


def read_json(path: Path, purpose: str) -> dict:
    """Read a JSON object.

    Raises:
        UserError: absent, not JSON, or not an object; `purpose` says what the file is for.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: it holds {purpose}; copy it into the folder of the weights")
    try:
        values = load_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return values


def diffusers_config(path: Path, kind: str) -> dict:
    """Read the config.json next to the weights of a diffusers VAE.

    Args:
        path: of the weights; kind: name of the diffusers class, such as AutoencoderKLWan.

    Raises:
        UserError: absent, damaged, or of another class.
    """
    config = read_json(path.with_name("config.json"), "the configuration of the diffusers VAE")
    if config.get("_class_name") != kind:
        raise UserError(f"{path} is not of class {kind}: its config.json names {config.get('_class_name')!r}")
    check_limits(config, "config.json")
    return config


def read_state(path: Path, prefix: str = "", wrappers: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Read tensors from a safetensors file or a pickled state dict, on CPU.

    Pickles are opened with `weights_only=True` and nothing else, so that no code in them can run.

    Args:
        prefix: only keys that start with it are read; it is removed from the names.
        wrappers: keys under which a pickle of a whole training may keep its weights; the first found is read.

    Raises:
        UserError: unreadable, truncated, changed since it was written, not a plain dictionary of tensors, or with NaN or
            infinity in one.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        check_checksums([path])

        try:
            with safe_open(path, framework="pt") as file:
                found = {
                    key.removeprefix(prefix): file.get_tensor(key)
                    for key in file.keys()  # noqa: SIM118 (the handle is not iterable)
                    if key.startswith(prefix)
                }
                require_finite(found, path)
                return found
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or damaged ({error}); fetch it again") from error

    import pickle

    try:
        # Only the zip format can be mapped into memory; the older one is read in full.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a plain state dict: it holds objects other than tensors, or is damaged; nothing "
            "in it was executed. Use the file as published, or its safetensors version"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path} is truncated or damaged ({reason}); fetch it again") from error
    if isinstance(state, dict):
        state = next((state[key] for key in wrappers if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} is not a plain dictionary of tensors; use the file as published")
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    require_finite(found, path)
    return found


def load_strict(
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    key_map: Mapping[str, str] | None,
    source: str | Path,
    dtype: torch.dtype,
) -> None:
    """Load `state` into `module`, which may be on the meta device, after comparing every name and shape.

    Args:
        key_map: name in the file -> name in the module, complete for the module; None where they are the same.
        dtype: of the module afterwards.
        source: name of the file in error messages.

    Raises:
        UserError: naming missing, unexpected and wrong-shaped tensors by their names in the file.
    """
    expected = module.state_dict()
    key_map = key_map or {key: key for key in expected}
    require_fit(
        {key: tuple(value.shape) for key, value in state.items()},
        {key: tuple(expected[inner].shape) for key, inner in key_map.items()},
        source,
    )
    named = {key_map[key]: value.to(dtype) for key, value in state.items()}
    module.load_state_dict(named, strict=True, assign=True)


def require_fit(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], source: str | Path
) -> None:
    """Compare the names and shapes of all tensors in a file with those of a network.

    Raises:
        UserError: naming missing, unexpected and wrong-shaped tensors.
    """
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    wrong = [
        f"{key} is {list(found[key])}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    problems = [
        f"{len(names)} {kind} ({_some(names)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of wrong shape", wrong))
        if names
    ]
    if problems:
        raise UserError(
            f"{source} does not fit the network; tensors: {', '.join(problems)}; use weights and config that belong "
            "together, as they were published or exported"
        )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    return "; ".join(names[:_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
