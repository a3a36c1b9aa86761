"""Command lines: key=value and --key value, values read as YAML."""

import pytest

from magihuman.cli import settings
from magihuman.errors import UserError


def _command(tier: str = "exact", steps: int = 8, check: bool = False, sizes: list[str] | None = None) -> None:
    """A command.

    Args:
        tier: of speed
    """


def test_values_without_names() -> None:
    wanted = {"tier": "runs/a=b", "steps": 4}
    for line in ("runs/a=b 4", "steps=4 runs/a=b", "--steps 4 runs/a=b"):
        unnamed = ["tier", "steps"] if line.endswith("4") else ["tier"]
        assert settings(_command, line.split(), "program", unnamed) == wanted
    with pytest.raises(UserError, match="'more' is not of the form key=value"):
        settings(_command, ["fast", "more"], "program", ["tier"])


def test_both_styles_of_command_line() -> None:
    wanted = {"tier": "fp8", "steps": 4, "check": True}
    for line in ("tier=fp8 steps=4 check=true", "--tier fp8 --steps 4 --check", "--check --tier=fp8 steps=4"):
        assert settings(_command, line.split(), "program") == wanted
    assert settings(_command, ["--sizes", "[256p, 540p]"], "program") == {"sizes": ["256p", "540p"]}
    for line in ("tier", "--tier", "--tier --check"):
        with pytest.raises(UserError, match="not of the form key=value"):
            settings(_command, line.split(), "program")
