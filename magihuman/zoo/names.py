"""Names of what ships with the package: architectures, checkpoints and decoders (`python -m magihuman.zoo list`)."""

import difflib
from pathlib import Path
from typing import Any

from magihuman.errors import UserError
from magihuman.io.files import CONFIGS, WEIGHTS
from magihuman.io.text import load_json

_USES = {
    "checkpoint": "a checkpoint, for checkpoint= or sr=",
    "decoder": "a decoder, for turbo=",
    "architecture": "an architecture, which has no weights",
    "student decoder": "the architecture of a decoder, which has no weights",
}


def arch_names(group: str = "model") -> list[str]:
    """Names of the architectures in configs/model, or of the student decoders in configs/decoder."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def arch_settings(name: str, group: str = "model") -> dict[str, Any]:
    """Content of configs/GROUP/NAME.yaml.

    Raises:
        UserError: for an unknown name, listing the choices.
    """
    import yaml

    if name not in arch_names(group):
        kind = {"model": "architecture", "decoder": "student decoder"}[group]
        raise UserError(f"{kind} {name!r} is unknown; choose from {choices(name, kind)}")
    return yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())


def checkpoint_names() -> list[str]:
    """Names of the checkpoints that ship with the package."""
    return _folders("model.safetensors.index.json")


def decoder_names() -> list[str]:
    """Names of the decoders that ship with the package."""
    return [name for name in _folders("config.json") if is_decoder(WEIGHTS / name)]


def _folders(file: str) -> list[str]:
    return sorted(path.parent.relative_to(WEIGHTS).as_posix() for path in WEIGHTS.glob(f"**/{file}"))


def is_decoder(folder: str | Path) -> bool:
    """Whether a folder is an exported decoder."""
    try:
        values = load_json(Path(folder) / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and str(values.get("format", "")).startswith("magihuman-decoder")


def choices(name: str, *kinds: str) -> str:
    """The names of some kinds for a message, and what `name` may have meant: a similar one, or a name of another kind.

    Args:
        kinds: out of architecture, checkpoint, decoder, student decoder.
    """
    known = {
        "checkpoint": checkpoint_names(),
        "decoder": decoder_names(),
        "architecture": arch_names(),
        "student decoder": arch_names("decoder"),
    }
    own = [each for kind in kinds for each in known[kind]]
    other = next((kind for kind, names in known.items() if name in names), None)
    last, lasts = name.rpartition("/")[2], {each.rpartition("/")[2] for each in own}
    close = difflib.get_close_matches(last, lasts)
    close.sort(key=lambda each: len(each) != len(last))  # 14b is meant to be 15b rather than 1b
    # Several names may end alike, such as tiny/base and scene/base.
    alike = [each for each in own if close and each.rpartition("/")[2] == close[0]]
    hint = f"; did you mean {difflib.get_close_matches(name, alike, cutoff=0)[0]!r}?" if alike else ""
    if other is not None:
        hint = f"; {name!r} is {_USES[other]}"
    return ", ".join(own) + hint
