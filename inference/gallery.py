"""A page of all clips of a folder, to open in any browser: python -m inference.gallery FOLDER.

One static file next to the clips: it loads nothing but them, needs no server, and may be moved with its folder. The same
folder gives the same bytes.
"""

import html
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from inference.requests import FORMAT, MANIFEST, Request
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


def _manifest(path: Path) -> Iterator[dict[str, Any]]:
    """Lines with a clip; others were torn by a kill."""
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        with suppress(ValueError, AttributeError):
            line = json.loads(text)
            if {"name", "prompt", "seed"} <= line.keys():
                yield line


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
        # With the metadata alone a browser may show black; asked for a moment, it shows that frame.
        shown = (
            f'<video src="{_link(card.name, ".mp4")}#t=0.001"{shape} controls loop playsinline '
            f'preload="metadata" aria-label="{_text(card.name)}"></video>'
        )
    else:
        shape = f' style="aspect-ratio: {card.size[1]} / {card.size[0]}"' if card.size else ""
        shown = f'<div class="gap"{shape}>no clip</div>'
    own = {label: value for label, value in card.facts.items() if shared.get(label) != value}
    seed = f"<span>seed {_text(card.seed)}</span>" if card.seed is not None else ""
    link = f'<a href="{_link(card.name, ".json")}">record</a>' if card.record else ""
    prompt = _text(card.prompt) if card.prompt is not None else "prompt unknown"
    return f"""<article{' data-state="problem"' if card.problem else ""}>
{shown}
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
    """Write index.html, a page of all clips of a folder, into it.

    Args:
        folder: that `python -m magihuman.infer prompts=... output=FOLDER` wrote

    Raises:
        UserError: there is no such folder, or its index.html is not ours.
    """
    cards = write_page(Path(folder))
    bad = sum(bool(card.problem) for card in cards)
    print(f"{Path(folder) / PAGE}: {len(cards)} clips{f', {bad} with problems' if bad else ''}")


# -- style sheet and script, the same on every page ------------------------------------------------------------

GENERATOR = "magihuman gallery"

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f5f3; --card: #fff; --text: #1c1d20; --faint: #63666d; --line: #dfdfdb; --accent: #2457c5; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131417; --card: #1d1f23; --text: #ececee; --faint: #9b9fa8; --line: #31343a; --accent: #8fb3ff;
    --bad: #ff9a92;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body {
  margin: 0 auto; padding: 1.5rem clamp(1rem, 3vw, 2.5rem) 3rem; max-width: 110rem;
  background: var(--page); color: var(--text); font: 1rem/1.45 system-ui, sans-serif;
}
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .4rem 1.25rem; margin-bottom: 1.25rem; }
h1 { margin: 0; font-size: 1.5rem; font-weight: 650; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--faint); }
header dl { flex-basis: 100%; }
input {
  order: 1; margin-left: auto; flex: 0 1 18rem; min-width: 10rem; padding: .45rem .75rem; font: inherit;
  color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
}
input + p + dl { order: 2; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
main { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
article {
  display: flex; flex-direction: column; min-width: 0; overflow: hidden;
  background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
}
video, .gap { display: block; width: 100%; height: auto; max-height: 75vh; background: #000; }
.gap {
  display: grid; place-items: center; aspect-ratio: 16 / 9; color: var(--faint);
  background: repeating-linear-gradient(45deg, transparent 0 10px, var(--line) 10px 11px);
}
.problem { margin: 0; padding: .75rem 1rem 0; color: var(--bad); font-size: .875rem; font-weight: 600; }
.problem::before { content: "\\26a0\\fe0e\\00a0"; }
.prompt {
  margin: 0; padding: .8rem 1rem; max-height: 14rem; overflow: auto; white-space: pre-line; overflow-wrap: anywhere;
}
dl { display: flex; flex-wrap: wrap; gap: .15rem 1.25rem; margin: 0; font-size: .8125rem; }
article dl { padding: 0 1rem .8rem; }
dl div { min-width: 0; }
dt, dd { display: inline; margin: 0; overflow-wrap: anywhere; }
dt { color: var(--faint); margin-right: .4em; }
footer {
  display: flex; gap: 1rem; margin-top: auto; padding: .55rem 1rem; font-size: .8125rem; color: var(--faint);
  border-top: 1px solid var(--line); font-variant-numeric: tabular-nums;
}
footer > * { white-space: nowrap; }
.name { flex: 1; overflow: hidden; text-overflow: ellipsis; }
a { color: var(--accent); }
#none { color: var(--faint); }
"""

# The filter's words can also be given in the address, behind #. One clip plays at a time, since all have audio.
SCRIPT = """
"use strict";
const cards = [...document.querySelectorAll("article")];
const videos = [...document.querySelectorAll("video")];
const filter = document.getElementById("filter"), count = document.getElementById("count");
const all = count.textContent;

function apply() {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const text = card.textContent.toLowerCase();
    card.hidden = !words.every((word) => text.includes(word));
    shown += !card.hidden;
    if (card.hidden) card.querySelector("video")?.pause();
  }
  count.textContent = words.length ? `${shown} of ${all}` : all;
  document.getElementById("none").hidden = shown > 0 || !words.length;
}

function fromAddress() {
  try { filter.value = decodeURIComponent(location.hash.slice(1)); } catch { filter.value = ""; }
  apply();
}

for (const video of videos) {
  const card = video.closest("article"), problem = card.querySelector(".problem");
  const ready = () => { video.dataset.metadata = `${video.videoWidth}x${video.videoHeight}`; };
  const failed = () => {
    card.dataset.state = "problem";
    problem.textContent = [problem.textContent, "this browser cannot play it"].filter(Boolean).join("; ");
    problem.hidden = false;
  };
  video.addEventListener("loadedmetadata", ready);
  video.addEventListener("error", failed);
  video.addEventListener("play", () => videos.forEach((other) => other !== video && other.pause()));
  if (video.readyState > 0) ready();
  if (video.error) failed();
}
filter.addEventListener("input", apply);
window.addEventListener("hashchange", fromAddress);
filter.hidden = false;
fromAddress();
"""


if __name__ == "__main__":
    from magihuman.cli import run

    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith(("folder=", "-")) and arguments[0] != "help":
        arguments[0] = f"folder={arguments[0]}"
    run(gallery, "python -m inference.gallery", arguments)
