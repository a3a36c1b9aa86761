"""Command `python -m magihuman.infer`: clips from text. configs/infer.yaml names the function that it calls."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

PROGRAM = "python -m magihuman.infer"
EXAMPLES = """\
examples:
  python -m magihuman.infer prompt="round face, ginger hair, blue shirt, green wall, says ma bi do ne, left, rain" output=x.mp4
  python -m magihuman.infer checkpoint=runs/pretrain/first prompts=prompts.txt output=clips gallery=true
  python -m magihuman.infer image=face.png audio=speech.wav prompt="..." output=x.mp4
  python -m magihuman.infer checkpoint=RELEASE/distill resolution=540p seconds=auto prompt="..." output=x.mp4
  torchrun --nproc-per-node 8 -m magihuman.infer checkpoint=RELEASE/base prompts=p.jsonl output=clips
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; 0 when done, 2 after a one-line error, 130 after Ctrl-C."""
    from magihuman.cli import calm_bars, errors_in_one_line, settings, usage

    calm_bars()
    given = list(sys.argv[1:] if arguments is None else arguments)
    with errors_in_one_line("interrupted; with prompts= the same command continues"):
        run, options, defaults = configured()
        if not given or any(argument in ("-h", "--help", "help") for argument in given):
            print(f"{usage(options, PROGRAM)}\n\n{EXAMPLES}", end="")
            return
        run(options(**{**defaults, **settings(options, given, PROGRAM)}))


def configured() -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]:
    """The function and the class of options that configs/infer.yaml names, and the defaults set there.

    Raises:
        UserError: the file has a name that cannot be imported, or an unknown option.
    """
    import yaml

    from magihuman.io.files import CONFIGS
    from magihuman.schema import check_call, locate

    node = yaml.safe_load((CONFIGS / "infer.yaml").read_text(encoding="utf-8"))
    check_call(node, "infer")
    defaults = node["options"]
    options = locate(defaults.pop("_target_"), "infer.options")
    return locate(node["_target_"], "infer"), options, defaults


if __name__ == "__main__":
    main()
