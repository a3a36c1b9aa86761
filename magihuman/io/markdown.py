"""Markdown pages with tables that are rendered from committed result files.

A block of a page between `<!-- KIND WORDS -->` and `<!-- end -->` is what the function of that kind returns for the words.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from magihuman.errors import UserError

Kinds = Mapping[str, Callable[..., str]]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], alignment: str = "") -> str:
    """A table of cells.

    Args:
        alignment: a letter for each column, l left or r right; all but the first are right-aligned where it is empty.
    """
    letters = alignment or "l" + "r" * (len(heads) - 1)
    ruler = "|" + "".join("---:|" if letter == "r" else "---|" for letter in letters)
    head, *lines = ("| " + " | ".join(row) + " |" for row in (heads, *rows))
    return "\n".join([head, ruler, *lines])


def aligned(rows: Sequence[Sequence[str]], alignment: str = "") -> list[str]:
    """Lines of a table for a terminal, every column as wide as its widest cell.

    Args:
        alignment: a letter for each column, l left or r right; all are left-aligned where it is empty.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    letters = alignment or "l" * len(widths)

    def cell(text: str, width: int, letter: str) -> str:
        return text.rjust(width) if letter == "r" else text.ljust(width)

    return ["  ".join(map(cell, row, widths, letters)).rstrip() for row in rows]


def commit(code: Mapping[str, Any]) -> str:
    """The commit, or the hash of the sources, of a result's provenance."""
    name = code.get("commit") or f"sources {code.get('sources', 'unknown')}"
    return name[:12] + (" with changes" if code.get("changed") else "")


def origin(file: str, made: Mapping[str, Any]) -> str:
    """Where a table comes from: result file, date, machine and torch where it was measured, commit."""
    where = f"{made['machine']}, torch {made['libraries']['torch']}, " if "machine" in made else ""
    return f"From [{file}]({file}): {made['date'][:10]}, {where}commit {commit(made['code'])}."


def block_pattern(kinds: Kinds) -> re.Pattern[str]:
    """Blocks of these kinds; groups: kind, words behind it."""
    return re.compile(rf"<!-- ({'|'.join(kinds)}) ([^>]*?) -->\n.*?<!-- end -->", re.DOTALL)


def render(text: str, kinds: Kinds, page: str = "README.md") -> str:
    """A page with every block rendered anew.

    Args:
        kinds: functions of a block's words.
        page: path in the repository; links to result files are relative to it.

    Raises:
        UserError: a block cannot be rendered: its file is missing or of another format.
    """
    up = "../" * page.count("/")

    def block(match: re.Match[str]) -> str:
        kind, words = match.groups()
        try:
            shown = kinds[kind](*words.split())
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"README block '{kind} {words}' cannot be rendered: {error!r}") from error
        shown = re.sub(r"\]\((?=(eval|inference)/results/)", f"]({up}", shown)
        return f"<!-- {kind} {words} -->\n{shown}\n<!-- end -->"

    return block_pattern(kinds).sub(block, text)


def inline_code(text: str) -> str:
    """Inline code of one line, also in a cell of a table, whatever is in the text."""
    line = " ".join(text.split()).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", line)), default=0)
    space = " " * bool(longest)
    return f"{'`' * (longest + 1)}{space}{line}{space}{'`' * (longest + 1)}"
