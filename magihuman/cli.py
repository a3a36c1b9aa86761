"""Command lines of the form key=value, made from the signature of a function or dataclass: `run(function)` is a program.

The function's defaults are the program's, its docstring's first lines and `Args:` are the help, its type
hints are what values are checked against; Hydra's `_target_` can call the same function from a recipe.
"""

import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from magihuman.errors import UserError, report_and_exit


def run(function: Callable[..., Any], program: str, argv: Sequence[str] | None = None) -> Any:
    """Call `function` with the settings of `argv` (default: of the process) and return what it returns.

    --help prints the help and exits 0; a place that `output` names is tried before the work; `errors_in_one_line` says how
    errors end.

    Args:
        function: takes the settings, or one dataclass of settings, see `schema_of`.
        program: what the user typed, such as "python -m data.tiny".
    """
    calm_bars()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(a in ("-h", "--help", "help") for a in arguments):
        print(usage(schema_of(function), program))
        raise SystemExit(0)
    with errors_in_one_line():
        given = settings(schema_of(function), arguments, program)
        if given.get("output"):
            from magihuman.io.files import require_writable

            require_writable(Path(given["output"]), "output")
        return call_with(function, given)


@contextmanager
def errors_in_one_line(interrupted: str = "interrupted") -> Iterator[None]:
    """The end of a command: a `UserError` or an error of the disk is one line and exit 2, Ctrl-C one line and exit 130."""
    try:
        yield
    except UserError as error:
        report_and_exit(error)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        from magihuman.io.files import disk_problem

        if (problem := disk_problem(error)) is None:
            raise
        report_and_exit(problem)


def schema_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """What declares a command's settings: the dataclass that is the function's only parameter, else the function."""
    hints = [get_type_hints(function).get(name) for name in inspect.signature(function).parameters]
    return hints[0] if len(hints) == 1 and is_dataclass(hints[0]) else function  # type: ignore[return-value]


def call_with(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """Call a function with settings by name, or with the dataclass of settings that it takes."""
    schema = schema_of(function)
    return function(**given) if schema is function else function(schema(**given))


def option(help: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A field of a dataclass of settings with its line of --help and further metadata; required without a default.

    Metadata keep_empty=True: `name=` is an empty text on the command line, not None as for other settings.
    """
    return field(default=default, metadata={"help": help, **metadata})


def calm_bars() -> None:
    """Progress bars that go to a file write a line every ten seconds; without this a log is mostly bars.

    tqdm reads its environment when it is imported: call this before.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")


def run_one(functions: Mapping[str, Callable[..., Any]], program: str, argv: Sequence[str] | None = None) -> Any:
    """`run` the function that the first argument names; the first of `functions` where it names none.

    --help alone lists the names; behind a name it is that function's help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-") and "=" not in arguments[0] and arguments[0] != "help":
        name = arguments.pop(0)
        if name not in functions:
            report_and_exit(UserError(f"{program} has no command {name!r}; it has {', '.join(functions)}"))
        return run(functions[name], f"{program} {name}", arguments)
    first = next(iter(functions))
    if arguments not in (["-h"], ["--help"], ["help"]):
        return run(functions[first], program, arguments)
    lines = [f"usage: {program} [COMMAND] [key=value ...]", "", "commands (COMMAND --help tells more):"]
    for name, function in functions.items():
        about = (inspect.getdoc(schema_of(function)) or "").partition("\n\n")[0]
        usual = " (the usual one)" if name == first else ""
        lines.append(f"  {name:<10} {' '.join(about.split())}{usual}")
    print("\n".join(lines))
    raise SystemExit(0)


def settings(
    function: Callable[..., Any], arguments: Sequence[str], program: str, unnamed: Sequence[str] = ()
) -> dict[str, Any]:
    """Values by name from key=value texts (or --key value), checked against the signature of `function`.

    Args:
        unnamed: settings that may be given by their values alone, in this order.

    Raises:
        UserError: not key=value, given twice, unknown, missing or of the wrong type.
    """
    from magihuman.schema import check

    hints = get_type_hints(function)
    values: dict[str, Any] = {}
    kept = {f.name for f in fields(function) if f.metadata.get("keep_empty")} if is_dataclass(function) else ()
    waiting = list(unnamed)
    for argument in _joined(arguments, hints):
        key, equals, text = argument.lstrip("-").partition("=")
        if waiting and not (equals and key.isidentifier()):  # a path may hold "=", too
            key, equals, text = waiting.pop(0), "=", argument
        if not equals:
            raise UserError(f"{argument!r} is not of the form key=value; see `{program} --help`")
        if key in values:
            raise UserError(f"{key} is given twice")
        values[key] = text if key in kept and not text else _value(text, hints.get(key, Any))
    check(values, function, "")
    return values


def _joined(arguments: Sequence[str], hints: dict[str, Any]) -> list[str]:
    """`--key value` as key=value, and `--key` alone, where a truth value is wanted, as key=true."""
    joined, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--") and "=" not in argument:
            if hints.get(argument[2:]) is bool:
                argument += "=true"
            elif rest and not rest[0].startswith("--"):
                argument += f"={rest.pop(0)}"
        joined.append(argument)
    return joined


def _value(text: str, hint: Any) -> Any:
    """`text` as a string where the hint wants one, else as YAML reads it."""
    import yaml

    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if text in ("", "null", "none") and types.NoneType in choices:
        return None
    if str in choices:
        return text
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if isinstance(value, str) and float in choices:  # YAML reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def usage(function: Callable[..., Any], program: str) -> str:
    """The help: the docstring's first paragraphs, then every setting, its line of `Args:` and its default."""
    text = inspect.getdoc(function) or ""
    head, _, rest = text.partition("\nArgs:\n")
    entries = dict(re.findall(r"^    (\w+): ((?:.+\n?)(?:^ {8}.+\n?)*)", rest.split("\nRaises:")[0], flags=re.M))
    if is_dataclass(function):
        entries = {f.name: f.metadata.get("help", "") for f in fields(function)}
    parameters = inspect.signature(function).parameters.values()
    needed = [f"{p.name}=..." for p in parameters if p.default is p.empty]
    lines = [f"usage: {' '.join([program, *needed])} [key=value ...]", "", head.split("\nRaises:")[0].rstrip(), ""]
    for parameter in parameters:
        about = " ".join(entries.get(parameter.name, "").split())
        default = "required" if parameter.default is parameter.empty else f"default {_shown(parameter.default)}"
        lines.append(f"  {parameter.name:<12} {about} ({default})")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
