"""Every "SPEC n.m" and "On" in the repository is a section or an anchor of magihuman/models/README.md."""

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
README = REPO / "magihuman" / "models" / "README.md"
SECTIONS = re.compile(r"\bSPEC\s+((?:\d+(?:\.\d+)?(?:,\s+|\s+and\s+)?)+)")
ODDITIES = re.compile(r"\b(?:SPEC |oddity )?O(\d+)\b")


def _sources() -> list[Path]:
    folders = ("magihuman", "recipes", "data", "inference", "eval", "configs", "slurm", "tests")
    found = [p for f in folders for ending in ("py", "yaml", "md") for p in (REPO / f).rglob(f"*.{ending}")]
    return [path for path in found if path not in (README, Path(__file__))]


def test_citations_resolve() -> None:
    text = README.read_text()
    sections = set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?) ", text, re.MULTILINE))
    anchors = set(re.findall(r'<a id="o(\d+)"></a>O\1 ', text))
    assert {"1", "1.5", "2.1", "12"} <= sections
    assert anchors == {str(n) for n in range(1, 19)}
    cited, wrong = 0, []
    for path in _sources():
        source = path.read_text()
        for match in SECTIONS.finditer(source):
            numbers = re.findall(r"\d+(?:\.\d+)?", match[1])
            cited += len(numbers)
            wrong += [f"{path.relative_to(REPO)}: SPEC {n}" for n in numbers if n not in sections]
        wrong += [f"{path.relative_to(REPO)}: O{n}" for n in ODDITIES.findall(source) if n not in anchors]
    assert cited > 80  # the pattern finds them
    assert not wrong
