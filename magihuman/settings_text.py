"""Settings written as text: what `yaml.safe_load` reads, also where PyYAML is not installed.

GPU machines often have torch and little else. Our own files (configs/model) and the values of command lines need
one small part of YAML, which is read here: mappings by indentation, lists in brackets on one line, plain scalars.
"""

import re
from typing import Any

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+][0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null"), None),
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}


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
        ValueError: naming the line that is not of the simple form.
    """
    lines = [
        (len(line) - len(line.lstrip(" ")), line.strip()) for line in map(_uncommented, text.splitlines())
    ]
    lines = [(depth, line) for depth, line in lines if line]
    if len(lines) == 1 and not _entry(lines[0][1]):
        return _value(lines[0][1])
    values, rest = _mapping(lines, 0)
    if rest:
        raise ValueError(f"{rest[0][1]!r} is indented unlike its neighbours")
    return values or None


def _uncommented(line: str) -> str:
    return re.sub(r"(^|\s)#.*", "", line).rstrip()


def _entry(line: str) -> re.Match[str] | None:
    return re.fullmatch(r"([A-Za-z_][\w.]*):(?:\s+(.*))?", line)


def _mapping(lines: list[tuple[int, str]], depth: int) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    values: dict[str, Any] = {}
    while lines and lines[0][0] == depth:
        line, lines = lines[0][1], lines[1:]
        entry = _entry(line)
        if entry is None:
            raise ValueError(f"{line!r} is not of the form key: value; install PyYAML to read more of YAML")
        if entry[2]:
            values[entry[1]] = _value(entry[2])
        elif lines and lines[0][0] > depth:
            values[entry[1]], lines = _mapping(lines, lines[0][0])
        else:
            values[entry[1]] = None
    return values, lines


def _value(text: str) -> Any:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        inner = text[1:-1].strip()
        if "[" in inner or "{" in inner:
            raise ValueError(f"{text!r} is nested; install PyYAML to read more of YAML")
        return [_value(part) for part in inner.split(",") if part.strip()]
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if (text[:1] and text[0] in "[]{}&*|>%@`!'\"") or ": " in text:
        raise ValueError(f"{text!r} is no plain value; install PyYAML to read more of YAML")
    if text.lower() in _WORDS and text in (text.lower(), text.upper(), text.capitalize()):
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
