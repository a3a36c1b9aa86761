"""`python -m magihuman.infer` in this process, for tests of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from magihuman import infer


def run(*arguments: object) -> None:
    given = [str(argument) for argument in arguments]
    here = [] if any(argument.startswith("device=") for argument in given) else ["device=cpu"]
    infer.main([*given, *here, "progress=false"])


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error line of a command that must fail with status 2."""
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def write_prompts(folder: Path, count: int = 5) -> Path:
    path = folder / "prompts.txt"
    path.write_text("".join(f"prompt number {i}\n" for i in range(count)))
    return path
