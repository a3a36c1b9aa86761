"""Words of the training's command line -> overrides of Hydra; what Hydra would misread or ignore is quoted or refused."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magihuman.config import TEXTS, available, groups
from magihuman.errors import UserError
from magihuman.schema import suggest

ALIASES = {"deepspeed": "zero2", "fsdp": "fsdp2", "hsdp": "fsdp2"}
"""Names that people look for -> the choice that means it."""


def overrides(arguments: Sequence[str]) -> list[str]:
    """Command-line words as Hydra takes them: `recipe=NAME` becomes `+recipe=NAME`, any other key=value `++key=value`.

    Hydra then accepts unknown settings, and `magihuman.config.validate` refuses them with the nearest known name. Hydra's
    options come first. A value that its grammar cannot read, such as one with an umlaut, is quoted; `~/` is the home.

    Raises:
        UserError: an unknown option, a choice that its group does not have, two recipes, or an empty mapping.
    """
    options, settings = _split(arguments)
    words: list[str] = []
    chosen: dict[str, str] = {}
    for word in settings:
        key, equals, value = word.partition("=")
        name = key.lstrip("+")
        if not name or (not equals and not key.startswith("~")):
            meant = f"; did you mean +recipe={key}?" if key in available("recipe") else ""
            raise UserError(f"{word!r} is not of the form key=value{meant}")
        if not equals or key.startswith("~") or name.startswith("hydra") or "@" in name:
            words.append(word)
            continue
        if name == "sweep":
            raise UserError(
                f"{word}: sweeps are run by python -m magihuman.sweep {value}; to put a single training into a group of W&B "
                f"set the variable MAGIHUMAN_SWEEP={value}"
            )
        if re.fullmatch(r"\{\s*\}", value):
            raise UserError(f"{name}={value} changes nothing, since mappings are merged; {name}=null switches it off")
        if name not in groups():
            words.append(f"++{name}={_readable(name, value)}")
            continue
        known = available(name)
        for choice in value.split(",") if re.fullmatch(r"[\w,-]+", value) else ():
            if choice not in known:
                meant = suggest(ALIASES.get(choice, choice), known)
                raise UserError(f"no {name} {choice!r}{meant}; choose from {', '.join(known)}")
        if name in ("recipe", "experiment"):
            if name in chosen:
                raise UserError(f"{name} is given twice, as {chosen[name]} and as {value}; give one")
            chosen[name] = value
        words.append(f"+{name}={value}" if name in ("recipe", "experiment") else word)
    return [*options, *words]


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of Hydra with their values, and the other words.

    Raises:
        UserError: an option that Hydra does not have.
    """
    from hydra._internal.utils import get_args_parser

    known = get_args_parser()._option_string_actions
    options: list[str] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        if not option.startswith("-"):
            others.append(word)
            continue
        follows = rest[0] if rest and not rest[0].startswith("-") and "=" not in rest[0] else None
        if option not in known:
            raise UserError(f"there is no option {option}; write {option.lstrip('-')}={value or follows or 'VALUE'}")
        options.append(word)
        if known[option].nargs != 0 and not equals and follows is not None:
            options.append(rest.pop(0))
    return options, others


def _readable(name: str, value: str) -> str:
    """A value as Hydra's grammar reads it; a text where the setting `name` is one, such as name=12345."""
    import yaml
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if value.startswith("~/"):
        value = str(Path(value).expanduser())
    if name in TEXTS and re.fullmatch(r"[\w.+-]+", value) and value != "null":
        return f"'{value}'"
    try:
        OverridesParser.create().parse_override(f"++{name}={value}")
    except HydraException:
        if value[0] not in "[{'\"":
            return quoted(value)
        try:
            return quoted(yaml.safe_load(value))
        except yaml.YAMLError:
            pass  # a mistake, which Hydra explains
    return value


def quoted(value: Any) -> str:
    """A plain value in Hydra's grammar, texts in quotes."""
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    if isinstance(value, list):
        return f"[{','.join(map(quoted, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{quoted(each)}' for key, each in value.items())}}}"
    return "null" if value is None else str(value).lower()


def swept(words: Sequence[str]) -> set[str]:
    """Names of the settings that have several values in overrides for a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    _, settings = _split(words)
    return {o.key_or_group for o in OverridesParser.create().parse_overrides(settings) if o.is_sweep_override()}
