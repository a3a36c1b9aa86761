"""A page of all clips of a folder, to open in any browser: python -m inference.gallery FOLDER.

One static file beside the clips: it loads nothing but them, needs no server, and may be moved with its folder. The same
folder gives the same bytes.
"""

import html
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from inference.gallery_template import GENERATOR, SCRIPT, STYLE
from inference.records import FORMAT, MANIFEST
from inference.requests import Request
from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.provenance import file_hash

PAGE = "index.html"


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


def _manifest(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            line = json.loads(text)
            if {"name", "prompt", "seed"} <= line.keys():
                lines.append(line)
        except (ValueError, AttributeError):
            continue  # torn by a kill
    return lines


def _record(path: Path) -> dict[str, Any] | None:
    """A clip's record, or None where the file is none or has another form."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
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
    guidance = [f"video {_range(video)}", f"audio {scales['audio']:g}"]
    facts = {
        "size": f"{record['width']} × {record['height']}",
        "length": f"{record['frames'] / record['fps']:.2f} s, {record['frames']} frames",
        "solver": f"{settings['solver']}, {settings['steps']} steps, shift {settings['shift']:g}",
        "guidance": "off" if video | {scales["audio"]} == {1.0} else ", ".join(guidance),
        "negative prompt": settings["negative_prompt"],
        "second stage": f"{second['steps']} steps, guidance {second['guidance']:g}" if second else "",
        "first frame": record["image"]["path"] if record["image"] else "",
        "given sound": record["audio"]["path"] if record["audio"] else "",
        "checkpoint": record["checkpoint"]["name"],
        "weights": record["weights"] or "",
        "computed": f"{record['dtype']} on {record['device']}",
        "tier": record.get("tier", ""),
    }
    return {label: value for label, value in facts.items() if value}


def _range(values: set[float]) -> str:
    return " to ".join(f"{value:g}" for value in sorted(values, reverse=True))


def render(title: str, cards: list[Card]) -> str:
    """The page. Settings that all clips share stand once at its top, the others with their clip."""
    told = [card.facts for card in cards if card.facts]
    shared = {k: v for k, v in told[0].items() if all(f.get(k) == v for f in told)} if told else {}
    good = sum(not card.problem for card in cards)
    count = f"{len(cards)} clip{'' if len(cards) == 1 else 's'}"
    count += f", {len(cards) - good} with problems" if good < len(cards) else ""
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{GENERATOR}">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<input id="filter" type="search" placeholder="Filter by words" aria-label="Filter by words" hidden>
<p id="count" role="status">{count}</p>
{_list(shared)}
</header>
<main>
{"".join(_card(card, shared) for card in cards)}</main>
<p id="none" hidden>No clip has these words.</p>
<script>{SCRIPT}</script>
</body>
</html>
"""
    # File names and JSON can hold halves of surrogate pairs, which UTF-8 cannot.
    return page.encode("utf-8", "replace").decode()


def _card(card: Card, shared: dict[str, str]) -> str:
    if card.video:
        shape = f' width="{card.size[1]}" height="{card.size[0]}"' if card.size else ""
        # With the metadata alone a browser may show black; asked for a moment, it shows that picture.
        picture = (
            f'<video src="{_link(card.name, ".mp4")}#t=0.001"{shape} controls loop playsinline '
            f'preload="metadata" aria-label="{_text(card.name)}"></video>'
        )
    else:
        shape = f' style="aspect-ratio: {card.size[1]} / {card.size[0]}"' if card.size else ""
        picture = f'<div class="gap"{shape}>no clip</div>'
    own = {label: value for label, value in card.facts.items() if shared.get(label) != value}
    seed = f"<span>seed {_text(card.seed)}</span>" if card.seed is not None else ""
    link = f'<a href="{_link(card.name, ".json")}">record</a>' if card.record else ""
    prompt = _text(card.prompt) if card.prompt is not None else "prompt unknown"
    return f"""<article{' data-state="problem"' if card.problem else ""}>
{picture}
<p class="problem"{"" if card.problem else " hidden"}>{_text(card.problem)}</p>
<p class="prompt" dir="auto">{prompt}</p>
{_list(own)}
<footer><span class="name" title="{_text(card.name)}">{_text(card.name)}</span>{seed}{link}</footer>
</article>
"""


def _list(facts: dict[str, str]) -> str:
    rows = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _link(name: str, ending: str) -> str:
    """Relative address of a file: quoted as bytes, so that any file name works."""
    return quote(os.fsencode(name + ending), safe="")


def gallery(folder: str) -> None:
    """Write index.html, a page of all clips of a folder, beside them.

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
