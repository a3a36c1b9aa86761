"""A page of all clips of a folder, to open in any browser: python -m inference.gallery FOLDER.

One static file next to the clips: it loads nothing but them, needs no server, and may be moved with its folder. The same
folder gives the same bytes.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment

from inference.requests import FORMAT, MANIFEST, Request
from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.provenance import file_hash
from magihuman.io.text import load_json, parse_json

PAGE, GENERATOR = "index.html", "magihuman gallery"
TEMPLATE = Path(__file__).with_suffix(".html")


@dataclass
class Card:
    """What the page shows of one clip.

    Attributes:
        name: of its files, without ending.
        prompt, seed: None where no record, manifest or request tells them.
        problem: what is wrong with the clip, "" if nothing is.
        video, record: whether there is an mp4 to play and a JSON to link to.
        size: (height, width) in pixels, or None where unknown.
        facts: settings in words, by label.
    """

    name: str
    prompt: str | None = None
    seed: int | None = None
    problem: str = ""
    video: bool = False
    record: bool = False
    size: tuple[int, int] | None = None
    facts: dict[str, str] = field(default_factory=dict)


def write_page(folder: Path, asked: Iterable[Request] = ()) -> list[Card]:
    """Write the page of a folder.

    Args:
        asked: clips that should be there; those that are not are shown as missing.

    Returns:
        What it shows, in the order of the page.

    Raises:
        UserError: there is no such folder, or the page cannot be written.
    """
    check_page(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the one that infer wrote with prompts=")
    try:
        cards = collect(folder, asked)
        write_atomically(folder / PAGE, render(folder.resolve().name, cards))
    except OSError as error:
        raise UserError(f"cannot write {folder / PAGE}: {error.strerror or error}") from error
    return cards


def check_page(folder: Path) -> None:
    """Refuse to replace a page that is not ours.

    Raises:
        UserError: the folder holds such a page.
    """
    page = folder / PAGE
    if page.is_dir() or (page.is_file() and GENERATOR.encode() not in page.read_bytes()[:1000]):
        raise UserError(f"{page} is there and was not made by this command; move it away")


def collect(folder: Path, asked: Iterable[Request] = ()) -> list[Card]:
    """A card for every clip that a folder holds, or should hold by its manifest or by `asked`; sorted by name."""
    cards = {request.name: Card(request.name, request.prompt, request.seed) for request in asked}
    for line in _manifest(folder / MANIFEST):
        cards.setdefault(line["name"], Card(line["name"], line["prompt"], line["seed"]))
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    records = {path.stem: _record(path) for path in files if path.suffix == ".json"}
    videos = {path.stem for path in files if path.suffix == ".mp4"}
    for name in cards.keys() | videos | {name for name, record in records.items() if record}:
        card = cards.setdefault(name, Card(name))
        card.video, card.record = name in videos, name in records
        record = records.get(name)
        if record:
            card.prompt, card.seed = record["prompt"], record["seed"]
            card.size = int(record["height"]), int(record["width"])
            card.facts = _facts(record)
        if not card.video:
            card.problem = "the mp4 is missing" if card.record else "not made"
        elif not card.record:
            card.problem = "no record; writing it may have been interrupted"
        elif not record:
            card.problem = "its record cannot be read"
        elif file_hash(folder / f"{name}.mp4") != record["sha256"]:
            card.problem = "the mp4 is not the one of its record"
    return sorted(cards.values(), key=lambda card: card.name)


def _manifest(path: Path) -> Iterator[dict[str, Any]]:
    """Lines with a clip; others were torn by a kill."""
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        with suppress(ValueError, AttributeError):
            line = parse_json(text)
            if {"name", "prompt", "seed"} <= line.keys():
                yield line


def _record(path: Path) -> dict[str, Any] | None:
    """A clip's record, or None where the file is none or has another form."""
    try:
        record = load_json(path)
        if record["format"] != FORMAT:
            return None
        _facts(record)
        int(record["height"]), int(record["width"]), record["prompt"], record["seed"], record["sha256"]
        return record
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _facts(record: dict[str, Any]) -> dict[str, str]:
    """A record's settings in words."""
    settings, scales, second = record["settings"], record["settings"]["guidance"], record["settings"]["sr"]
    video = {scales["video_high"], scales["video_low"]}
    both = " to ".join(f"{value:g}" for value in sorted(video, reverse=True))
    facts = {
        "size": f"{record['width']} × {record['height']}",
        "length": f"{record['frames'] / record['fps']:.2f} s, {record['frames']} frames",
        "solver": f"{settings['solver']}, {settings['steps']} steps, shift {settings['shift']:g}",
        "guidance": "off" if video | {scales["audio"]} == {1.0} else f"video {both}, audio {scales['audio']:g}",
        "negative prompt": settings["negative_prompt"],
        "second stage": f"{second['steps']} steps, guidance {second['guidance']:g}" if second else "",
        "first frame": record["image"]["path"] if record["image"] else "",
        "given audio": record["audio"]["path"] if record["audio"] else "",
        "checkpoint": record["checkpoint"]["name"],
        "weights": record["weights"] or "",
        "computed": f"{record['dtype']} on {record['device']}",
        "tier": record.get("tier", ""),
    }
    return {label: value for label, value in facts.items() if value}


def render(title: str, cards: list[Card]) -> str:
    """The page. Settings that all clips share stand once at its top, the others with their clip."""
    known = [card.facts for card in cards if card.facts]
    shared = {k: v for k, v in known[0].items() if all(f.get(k) == v for f in known)} if known else {}
    good = sum(not card.problem for card in cards)
    count = f"{len(cards)} clip{'' if len(cards) == 1 else 's'}"
    count += f", {len(cards) - good} with problems" if good < len(cards) else ""
    template = Environment(autoescape=True, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    page = template.render(
        generator=GENERATOR,
        title=title,
        count=count,
        cards=cards,
        shared=shared,
        own=lambda card: {label: value for label, value in card.facts.items() if shared.get(label) != value},
        link=_link,
    )
    # File names and JSON can hold halves of surrogate pairs, which UTF-8 cannot.
    return page.encode("utf-8", "replace").decode()


def _link(name: str, ending: str) -> str:
    """Relative address of a file: quoted as bytes, so that any file name works."""
    return quote(os.fsencode(name + ending), safe="")


def gallery(folder: str) -> None:
    """Write index.html, a page of all clips of a folder, into it.

    Args:
        folder: that `python -m magihuman.infer prompts=... output=FOLDER` wrote

    Raises:
        UserError: there is no such folder, or its index.html is not ours.
    """
    cards = write_page(Path(folder))
    bad = sum(bool(card.problem) for card in cards)
    print(f"{Path(folder) / PAGE}: {len(cards)} clips{f', {bad} with problems' if bad else ''}")


if __name__ == "__main__":
    from magihuman.cli import run

    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith(("folder=", "-")) and arguments[0] != "help":
        arguments[0] = f"folder={arguments[0]}"
    run(gallery, "python -m inference.gallery", arguments)
