"""Command line of the zoo: python -m magihuman.zoo list | inspect | verify | convert | plan | peaks."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from magihuman.errors import UserError, report_and_exit


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m magihuman.zoo",
        description="Architectures and checkpoints: list, inspect, convert, verify, plan memory.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "list",
        help="architectures with their sizes, and the checkpoints that ship with the package",
        description=(
            "Print every architecture of configs/model and every student decoder of configs/decoder with its size, and "
            "every shipped checkpoint and decoder."
        ),
    )
    inspect = commands.add_parser(
        "inspect",
        help="content of a checkpoint",
        description="Print tensors, shapes, dtypes, sizes, config and provenance of a checkpoint.",
    )
    inspect.add_argument("path", help="safetensors file, exported folder, run folder, or a shipped name (tiny/base)")
    verify = commands.add_parser(
        "verify",
        help="run stored vectors against this implementation",
        description=(
            "Run every case of a vector folder (manifest.json and safetensors files) and print case, kind, largest "
            "absolute error, tolerance and pass. Exit status: 0 all passed, 1 something failed, 2 no such folder."
        ),
    )
    verify.add_argument("folder", type=Path, help="folder that holds manifest.json")
    verify.add_argument("--strict", action="store_true", help="count unsupported cases as failures")
    verify.add_argument("--only", default="", metavar="PREFIX", help="only cases whose name starts so, say dit_")
    # Only for the list of commands: settings of the next three are key=value, see `main`.
    commands.add_parser("convert", help="convert a checkpoint to another layout: export, released, diffusers")
    commands.add_parser("plan", help="memory of a run, and what to change if it does not fit")
    commands.add_parser("peaks", help="peak memory of inference in every mode, as a table and as JSON")
    return parser


def _convert(arguments: list[str]) -> str:
    from magihuman.cli import settings, usage
    from magihuman.zoo.commands import convert

    program = "python -m magihuman.zoo convert"
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        return usage(convert, program).replace("src=... dst=...", "SRC DST")
    # The first two may come without their names, as in any copy command.
    for position, name in enumerate(("src", "dst")):
        if position < len(arguments) and not arguments[position].startswith(f"{name}="):
            arguments[position] = f"{name}={arguments[position]}"
    return convert(**settings(convert, arguments, program))


def _sized(function: Callable[..., str], name: str, arguments: list[str]) -> str:
    """Run `plan` or `peaks`, whose first setting, the model, may come without its name."""
    from magihuman.cli import settings, usage

    program = f"python -m magihuman.zoo {name}"
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        return usage(function, program).replace("model=...", "MODEL")
    if "=" not in arguments[0]:
        arguments[0] = f"model={arguments[0]}"
    return function(**settings(function, arguments, program))


def _list() -> str:
    from magihuman import zoo
    from magihuman.zoo import decoders
    from magihuman.zoo.checkpoints import WEIGHTS

    lines = ["architectures"]
    for name in sorted(zoo.arch_names(), key=lambda n: zoo.arch(n).parameter_count()):
        config = zoo.arch(name)
        lines.append(
            f"  {name:<8} {config.parameter_count():>14,} parameters  {config.num_layers} layers, "
            f"hidden {config.hidden_size}, {config.num_heads} heads, {config.num_query_groups} key/value heads, "
            f"patch {zoo.pack(name).patch_size}"
        )
    lines.append("student decoders")
    for name in decoders.arch_names():
        lines.append(f"  {name:<8} {decoders.summary(name)}")
    for title, names in (("checkpoints", zoo.checkpoint_names()), ("decoders", decoders.names())):
        lines.append(title)
        for name in names:
            size = sum(f.stat().st_size for f in (WEIGHTS / name).glob("*.safetensors"))
            lines.append(f"  {name:<8} {size / 1e6:.1f} MB")
        lines += [] if names else ["  none yet"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["convert"]:
        print(_convert(given[1:]))
        return 0
    if given[:1] == ["plan"]:
        from magihuman.zoo.commands import plan

        print(_sized(plan, "plan", given[1:]))
        return 0
    if given[:1] == ["peaks"]:
        from magihuman.zoo.commands import peaks

        print(_sized(peaks, "peaks", given[1:]))
        return 0
    arguments = _parser().parse_args(given)
    if arguments.command == "list":
        print(_list())
        return 0
    if arguments.command == "inspect":
        from magihuman import zoo
        from magihuman.zoo import decoders
        from magihuman.zoo.checkpoints import WEIGHTS
        from magihuman.zoo.inspect import describe

        name, shipped = arguments.path, [*zoo.checkpoint_names(), *decoders.names()]
        print(describe(WEIGHTS / name if name in shipped else name))
        return 0
    from magihuman.zoo.verify import report, verify

    text, status = report(verify(arguments.folder, arguments.only), arguments.strict)
    print(text)
    return status


def command() -> None:
    """The command `python -m magihuman.zoo`, also installed as `magihuman-zoo`."""
    try:
        sys.exit(main())
    except UserError as error:
        report_and_exit(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    command()
