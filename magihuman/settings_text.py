"""Settings written as text: what `yaml.safe_load` reads, also where PyYAML is not installed.

GPU machines often have torch and little else. Our own files in configs/ and the values of command lines need a small
part of YAML, which is read here: mappings by indentation, lists of dashes, [a, b] and {a: b} on one line, plain
scalars.
"""

import re
from typing import Any

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+][0-9]+)?")
_KEY = re.compile(r"([A-Za-z_][\w.]*):(?:\s+(.*))?")
_WORDS = {
    **dict.fromkeys(("", "~", "null"), None),
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}

_Lines = list[tuple[int, str]]  # indentation and text


def parse(text: str) -> Any:
    """The value that a text stands for.

    Raises:
        ValueError: it is no YAML; without PyYAML also where it is more than the part that is read here.
    """
    try:
        import yaml
    except ImportError:
        return parse_plain(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {error}") from error


def parse_plain(text: str) -> Any:
    """As `parse`, never with PyYAML.

    Raises:
        ValueError: naming what is not of the simple form.
    """
    lines = [
        (len(line) - len(line.lstrip(" ")), line.strip()) for line in map(_uncommented, text.splitlines())
    ]
    lines = [(depth, line) for depth, line in lines if line]
    if not lines:
        return None
    if len(lines) == 1 and not _KEY.fullmatch(lines[0][1]) and not lines[0][1].startswith("- "):
        return _flow(lines[0][1])
    values, rest = _block(lines, lines[0][0])
    if rest:
        raise ValueError(f"{rest[0][1]!r} is indented unlike its neighbours")
    return values


def _uncommented(line: str) -> str:
    return re.sub(r"(^|\s)#.*", "", line).rstrip()


def _block(lines: _Lines, depth: int) -> tuple[Any, _Lines]:
    """The list or mapping that starts here, and the lines behind it."""
    if lines[0][1].startswith("- "):
        items = []
        while lines and lines[0][0] == depth and lines[0][1].startswith("- "):
            items.append(_flow(lines[0][1][2:]))
            lines = lines[1:]
        return items, lines
    values: dict[str, Any] = {}
    while lines and lines[0][0] == depth:
        line, lines = lines[0][1], lines[1:]
        entry = _KEY.fullmatch(line)
        if entry is None:
            raise _unread(line)
        if entry[2]:
            values[entry[1]] = _flow(entry[2])
        elif lines and lines[0][0] > depth:
            values[entry[1]], lines = _block(lines, lines[0][0])
        else:
            values[entry[1]] = None
    return values, lines


def _flow(text: str) -> Any:
    """What stands on one line: a scalar, [a, b] or {a: b}, nested."""
    text = text.strip()
    if text[:1] == "[" and text[-1:] == "]":
        return [_flow(part) for part in _parts(text[1:-1])]
    if text[:1] == "{" and text[-1:] == "}":
        entries = {part: _KEY.fullmatch(part.strip()) for part in _parts(text[1:-1])}
        if not all(entries.values()):
            raise _unread(text)
        return {entry[1]: _flow(entry[2] or "") for entry in entries.values() if entry}
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if (text[:1] and text[0] in "[]{}&*|>%@`!'\"") or ": " in text or text.startswith("- "):
        raise _unread(text)
    if text.lower() in _WORDS and text in (text.lower(), text.upper(), text.capitalize()):
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _parts(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _unread(text: str) -> ValueError:
    return ValueError(f"{text!r} is not of the simple form that is read without PyYAML; install it")
