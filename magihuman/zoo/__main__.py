"""Command line of the zoo: python -m magihuman.zoo list | inspect | verify | convert | plan | peaks."""

import argparse
import sys
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
    # Only for the list of commands: settings of the next three are key=value, see `_run`.
    commands.add_parser("convert", help="convert a checkpoint to another layout: export, released, diffusers")
    commands.add_parser("plan", help="memory of a run, and what to change if it does not fit")
    commands.add_parser("peaks", help="peak memory of inference in every mode, as a table and as JSON")
    return parser


def _run(name: str, arguments: list[str]) -> str:
    """Run `convert`, `plan` or `peaks`, whose first settings may come without their names, as in any copy command."""
    from magihuman.cli import settings, usage
    from magihuman.zoo import commands

    function, program = getattr(commands, name), f"python -m magihuman.zoo {name}"
    unnamed = ("src", "dst") if name == "convert" else ("model",)
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        text = usage(function, program)
        for setting in unnamed:
            text = text.replace(f"{setting}=...", setting.upper())
        return text
    for position, (setting, argument) in enumerate(zip(unnamed, arguments, strict=False)):
        if "=" not in argument or (name == "convert" and not argument.startswith(f"{setting}=")):
            arguments[position] = f"{setting}={argument}"
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
    if given[:1] in (["convert"], ["plan"], ["peaks"]):
        print(_run(given[0], given[1:]))
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
