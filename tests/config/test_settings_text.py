"""Settings as text: the reader of ours agrees with PyYAML on all that we write, and command lines take both styles."""

from pathlib import Path

import pytest
import yaml

from magihuman.cli import settings
from magihuman.errors import UserError
from magihuman.settings_text import parse, parse_plain

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NETWORKS = sorted(path for folder in ("model", "turbo") for path in (CONFIGS / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", NETWORKS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_networks_read_the_same_without_pyyaml(path: Path) -> None:
    text = path.read_text()
    assert parse_plain(text) == yaml.safe_load(text)
    assert len(parse_plain(text)) > 1


@pytest.mark.parametrize(
    "text",
    ["5", "-3", "0.5", "1.5e+3", "1e-3", "true", "Off", "null", "", "~", "540p", "a b", "[1, 2]", "[]", "'x y'",
     "tiny/base", "1080p", "[exact, fp8]", "0", "- a\n- 2",
     "a: {b: 1, c: [1, {d: 2}]}\ne:\n  - {f: 1}\n  - g\nh:", "[[1, 2], []]"],
)  # fmt: skip
def test_values_read_the_same_without_pyyaml(text: str) -> None:
    assert parse_plain(text) == yaml.safe_load(text) == parse(text)
    assert type(parse_plain(text)) is type(yaml.safe_load(text))


@pytest.mark.parametrize("text", ["a: [b", "a:\n    b: 1\n  c: 2", "a: &x 1", "a: |\n  b", "- - a"])
def test_what_is_more_than_simple_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"PyYAML|indented"):
        parse_plain(text)


def _command(
    tier: str = "exact", steps: int = 8, check: bool = False, sizes: list[str] | None = None
) -> None:
    """A command.

    Args:
        tier: of speed
    """


def test_both_styles_of_command_line() -> None:
    wanted = {"tier": "fp8", "steps": 4, "check": True}
    for line in ("tier=fp8 steps=4 check=true", "--tier fp8 --steps 4 --check", "--check --tier=fp8 steps=4"):
        assert settings(_command, line.split(), "program") == wanted
    assert settings(_command, ["--sizes", "[256p, 540p]"], "program") == {"sizes": ["256p", "540p"]}
    for line in ("tier", "--tier", "--tier --check"):
        with pytest.raises(UserError, match="not of the form key=value"):
            settings(_command, line.split(), "program")
