"""Plain settings against the types of what they are for: check, name the mistake, convert, call.

A schema is a dataclass, a class or a function; a *call* is a node with `_target_`, whose schema is the signature of
the target. Messages name the setting and what to write instead. `PlainConfig` is the base of dataclasses that are stored
in JSON and YAML. Imports neither torch nor Lightning by itself.
"""

import difflib
import functools
import importlib
import inspect
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, Self, Union, cast, get_args, get_origin, get_type_hints

from magihuman.errors import UserError

_RESERVED = ("_target_", "_partial_")


def divisors(number: int) -> str:
    """The divisors of a number as "1, 2, 4"."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def one_line(text: str) -> str:
    """Any message as one line."""
    return "; ".join(line.strip() for line in str(text).splitlines() if line.strip())


def suggest(key: str, known: Sequence[str]) -> str:
    """ ", did you mean ...?" or nothing."""
    close = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _expected(hint: Any) -> str:
    if hint is None or hint is types.NoneType:
        return "null"
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(a) for a in args)
    if origin in (list, tuple, Sequence):
        count = f" of {len(args)}" if origin is tuple and Ellipsis not in args else ""
        return f"a list{count}" + (f", each {_expected(args[0])}" if args else "")
    if hint is dict or origin is dict:
        return "a mapping"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _fits(value: Any, hint: Any, path: str) -> bool:
    """Whether a plain value satisfies a type hint; nested dataclasses and calls are checked by `check`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, str):
        return True
    if isinstance(value, Mapping) and "_target_" in value:
        check_call(value, path)
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)  # 1 is not true
    if origin in (Union, types.UnionType):
        nested = next((a for a in args if is_dataclass(a)), None)
        if nested is not None and isinstance(value, Mapping):
            return _fits(value, nested, path)
        return any(_fits(value, a, path) for a in args)
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            check(value, cast(type, hint), path)
            return True
        return isinstance(value, cast(type, hint))
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if hint in (list, tuple) or origin in (list, tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(
                _fits(v, a, f"{path}.{i}") for i, (v, a) in enumerate(zip(value, args, strict=True))
            )
        return not args or all(_fits(v, args[0], f"{path}.{i}") for i, v in enumerate(value))
    if hint is dict or origin is dict:
        return isinstance(value, Mapping)
    return True


def _schema(target: Callable[..., Any]) -> tuple[dict[str, Any], set[str], bool]:
    """(name -> hint, required names, whether any further name is taken) of a dataclass or callable.

    The further names of a class whose constructor takes `**settings` are those of its base class.
    """
    if is_dataclass(target):
        hints = get_type_hints(target)
        required = {f.name for f in fields(target) if f.init and f.default is MISSING and f.default_factory is MISSING}
        return {f.name: hints[f.name] for f in fields(target) if f.init}, required, False
    functions = [target]
    if inspect.isclass(target):
        functions = [vars(base)["__init__"] for base in target.__mro__[:-1] if "__init__" in vars(base)]
    names: dict[str, Any] = {}
    required = set()
    further = False
    for function in functions:
        try:
            hints = get_type_hints(function)
        except (NameError, TypeError):
            hints = {}
        parameters = list(inspect.signature(function).parameters.values())
        for parameter in parameters[1:] if inspect.isclass(target) else parameters:  # without self
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                if parameter.name not in names and parameter.default is parameter.empty:
                    required.add(parameter.name)
                names.setdefault(parameter.name, hints.get(parameter.name, Any))
        further = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        if not further:
            break
    return names, required, further


def check(node: Any, schema: Callable[..., Any], path: str, provided: Sequence[str] = ()) -> None:
    """Raise unless `node` has exactly the settings that `schema` takes, with their types.

    Args:
        node: plain containers (from `OmegaConf.to_container`).
        schema: a dataclass, class or function.
        path: where the node stands, for messages ("" at the top).
        provided: arguments that the program passes itself.

    Raises:
        UserError: unknown key, missing key, or wrong type.
    """
    dot = f"{path}." if path else ""
    if not isinstance(node, Mapping):
        raise UserError(f"{path}={node!r} is not a group of settings")
    names, required, open_ended = _schema(schema)
    for key, value in node.items():
        if key in _RESERVED:
            continue
        if key in provided:
            raise UserError(f"{dot}{key} is set by the program; remove it from the configuration")
        if key not in names:
            if open_ended:
                continue
            known = sorted(set(names) - set(provided))
            where = path or "the configuration"
            raise UserError(f"unknown setting {dot}{key}{suggest(key, known)}; {where} has: {', '.join(known)}")
        if value == "???":
            raise UserError(f"{dot}{key} is not given; set it with {dot}{key}=VALUE")
        if not _fits(value, names[key], f"{dot}{key}"):
            raise UserError(f"{dot}{key}={value!r} should be {_expected(names[key])}")
    missing = sorted(required - set(node) - set(provided))
    if missing and not node.get("_partial_", False):
        raise UserError(f"{dot}{missing[0]} is not given; set it with {dot}{missing[0]}=VALUE")


def locate(target: str, path: str) -> Callable[..., Any]:
    """The object that a `_target_` string names.

    Raises:
        UserError: when it cannot be imported.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{path}._target_={target} cannot be imported: {one_line(str(error))}") from error
    return found


def check_call(node: Mapping[str, Any], path: str, provided: Sequence[str] = ()) -> None:
    """`check` a node with `_target_` against the signature of its target."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UserError(f"{path} needs a _target_ (the dotted name of a class or function)")
    target = locate(node["_target_"], path)
    check(node, target, path, provided)
    names, _, _ = _schema(target)
    for key, value in node.items():  # settings that are dataclasses check their own values when they are made
        if key in names:
            _convert(value, names[key], calls=False)


def build(schema: type, node: Mapping[str, Any]) -> Any:
    """A settings dataclass from its (checked) node; nested dataclasses and tuples included, calls left as they are."""
    hints = get_type_hints(schema)
    return schema(**{key: _convert(value, hints[key], calls=False) for key, value in node.items()})


def _convert(value: Any, hint: Any, calls: bool) -> Any:
    """A plain value as its hint wants it; only conversions that lose nothing.

    Args:
        calls: whether nodes with `_target_` are called.
    """
    if isinstance(value, Mapping) and "_target_" in value:
        return call(value) if calls else value
    inner = next((a for a in (hint, *get_args(hint)) if is_dataclass(a)), None)
    if inner is not None and isinstance(value, Mapping):
        return build(inner, value)  # type: ignore[arg-type]
    if isinstance(value, list | tuple):
        items = [_convert(v, Any, calls) for v in value]
        return tuple(items) if get_origin(hint) is tuple else items
    if isinstance(value, Mapping):
        return {k: _convert(v, Any, calls) for k, v in value.items()}
    return value


def call(node: Mapping[str, Any], path: str = "call", **provided: Any) -> Any:
    """Call the target of a (checked) node with its settings, converted by the target's type hints.

    With `_partial_: true` the result takes the remaining arguments later.

    Args:
        provided: arguments that the program passes itself.
    """
    target = locate(node["_target_"], path)
    names, _, _ = _schema(target)
    settings = {
        key: _convert(value, names.get(key, Any), calls=True) for key, value in node.items() if key not in _RESERVED
    }
    if node.get("_partial_", False):
        return functools.partial(target, **settings, **provided)
    return target(**settings, **provided)


MOST_LAYERS, LARGEST, LONGEST = 1000, 1 << 20, 1000
_COUNTS = re.compile("layers|blocks|stages|steps")


def check_limits(values: Any, name: str) -> None:
    """Refuse impossible sizes in settings of a network, which may come from a file, before anything is made from them.

    Args:
        values: plain containers; name: of the settings, for the message.

    Raises:
        UserError: a number that is not finite or above `LARGEST`, one that counts layers, blocks or steps above
            `MOST_LAYERS`, a list of more than `LONGEST` values, or containers in each other without end.
    """
    waiting = [(values, name, 0)]
    while waiting:
        value, name, depth = waiting.pop()
        if isinstance(value, Mapping | list | tuple):
            if len(value) > LONGEST or depth > 20:
                raise UserError(
                    f"{name} has {len(value)} values, in {depth} others; more than {LONGEST} or 20 are refused"
                )
            items = value.items() if isinstance(value, Mapping) else ((name.rpartition(".")[2], v) for v in value)
            prefix = name if isinstance(value, Mapping) else name.rpartition(".")[0]
            waiting += [(inner, f"{prefix}.{key}", depth + 1) for key, inner in items]
        elif isinstance(value, int | float):
            most = MOST_LAYERS if _COUNTS.search(name.rpartition(".")[2]) else LARGEST
            if not abs(value) <= most:
                shown = str(value) if abs(value) < 1e18 else f"{float(value):.3g}"
                raise UserError(f"{name}={shown} is impossible; give at most {most}")


class PlainConfig:
    """`from_dict` and `to_dict` of a dataclass whose fields are plain values or tuples of them."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make the config from plain values; lists become tuples.

        Raises:
            UserError: for an unknown or a missing key, naming it.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(
                f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}"
            )
        check_limits(values, cls.__name__)
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise UserError(f"{cls.__name__}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, tuples as lists, ready for JSON or YAML."""
        values = asdict(self)  # type: ignore[call-overload]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def differences(self, other: "PlainConfig", but: Collection[str] = ()) -> list[str]:
        """Texts `field: mine against theirs` for every field, `but` for some, in which another config of the kind differs."""
        a, b = self.to_dict(), other.to_dict()
        return [f"{k}: {a[k]!r} against {b[k]!r}" for k in a if a[k] != b[k] and k not in but]
