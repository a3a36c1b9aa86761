"""`python -m magihuman.infer`: from text to clips. Thin: configs/infer.yaml says what is called."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from magihuman.errors import UserError, report_and_exit

PROGRAM = "python -m magihuman.infer"
EXAMPLES = """\
examples:
  python -m magihuman.infer prompt="round face, ginger hair, blue shirt, green wall, says ma bi so" output=x.mp4
  python -m magihuman.infer checkpoint=runs/pretrain/first prompts=prompts.txt output=clips gallery=true
  python -m magihuman.infer image=face.png audio=speech.wav prompt="..." output=x.mp4
  python -m magihuman.infer checkpoint=RELEASE/distill resolution=540p seconds=auto prompt="..." output=x.mp4
  torchrun --nproc-per-node 8 -m magihuman.infer checkpoint=RELEASE/base prompts=p.jsonl output=clips
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; 0 when done, 2 after a one-line error, 130 after Ctrl-C."""
    from magihuman.cli import settings, usage

    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        target, defaults = configured()
        if not given or any(argument in ("-h", "--help", "help") for argument in given):
            print(f"{usage(target, PROGRAM)}\n\n{EXAMPLES}", end="")
            return
        target(**{**defaults, **settings(target, given, PROGRAM)})
    except UserError as error:
        report_and_exit(error)
    except KeyboardInterrupt:
        print("interrupted; with prompts= the same command continues", file=sys.stderr)
        raise SystemExit(130) from None


def configured() -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that configs/infer.yaml names, and the defaults set there.

    Raises:
        UserError: the file names what cannot be imported, or a setting that the function does not take.
    """
    import yaml

    from magihuman.config import CONFIGS
    from magihuman.schema import check_call, locate

    node = yaml.safe_load((CONFIGS / "infer.yaml").read_text(encoding="utf-8"))
    check_call(node, "infer")
    return locate(node.pop("_target_"), "infer"), node


if __name__ == "__main__":
    main()
