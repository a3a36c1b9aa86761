"""Command line of the zoo: python -m magihuman.zoo list | inspect | verify | convert | card | plan | peaks."""

import inspect
import sys

from magihuman.errors import UserError, report_and_exit

PROGRAM = "python -m magihuman.zoo"
HELP = ("-h", "--help", "help")


def main(argv: list[str] | None = None) -> int:
    """Run one command, whose first settings may come without their names; returns the exit status."""
    from magihuman.cli import call_with, schema_of, settings, usage
    from magihuman.schema import suggest
    from magihuman.zoo.commands import COMMANDS

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in HELP:
        print(f"usage: {PROGRAM} COMMAND ...\n\ncommands (COMMAND --help tells more):")
        for name, function in COMMANDS.items():
            about = (inspect.getdoc(schema_of(function)) or "").partition("\n\n")[0]
            print(f"  {name:<8} {' '.join(about.split())}")
        return 0
    name, *arguments = words
    if name not in COMMANDS:
        raise UserError(f"the zoo has no command {name!r}{suggest(name, list(COMMANDS))}; it has {', '.join(COMMANDS)}")
    function, program = COMMANDS[name], f"{PROGRAM} {name}"
    schema = schema_of(function)
    parameters = inspect.signature(schema).parameters.values()
    unnamed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if (unnamed and not arguments) or any(argument in HELP for argument in arguments):
        text = usage(schema, program)
        for setting in unnamed:
            text = text.replace(f"{setting}=...", setting.upper())
        print(text)
        return 0
    result = call_with(function, settings(schema, arguments, program, unnamed))
    text, status = result if isinstance(result, tuple) else (result, 0)
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
