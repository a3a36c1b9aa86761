"""Command lines: key=value and --key value, values read as YAML."""

from dataclasses import dataclass

import pytest

from magihuman.cli import call_with, option, schema_of, settings, usage
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


@dataclass(frozen=True)
class _Options:
    """A command with a dataclass of settings."""

    name: str = option("of the clip")
    steps: int = option("of the solver", 8)


def _run(options: _Options) -> str:
    return f"{options.name} {options.steps}"


def test_a_command_may_take_a_dataclass_of_settings() -> None:
    assert schema_of(_run) is _Options
    assert schema_of(_command) is _command
    assert call_with(_run, settings(schema_of(_run), ["name=a", "steps=2"], "program")) == "a 2"
    help_text = usage(schema_of(_run), "program")
    assert "usage: program name=... [key=value ...]" in help_text
    assert "steps        of the solver (default 8)" in help_text


@dataclass(frozen=True)
class _Texts:
    """Settings of which one may be an empty text."""

    kept: str | None = option("of two", "usual", keep_empty=True)
    other: str | None = option("of two", "usual")


def test_an_empty_text_is_none_unless_the_setting_keeps_it() -> None:
    assert settings(_Texts, ["kept=", "other="], "program") == {"kept": "", "other": None}
    assert settings(_Texts, ["kept=null", "other=none"], "program") == {"kept": None, "other": None}
