"""Writes the tiny world to disk: mp4 files with captions, by several processes, resumable."""

import json
import multiprocessing
from collections.abc import Mapping
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from data.tiny.puppets import (
    FACES,
    FPS,
    HAIR,
    SAMPLE_RATE,
    SHIRTS,
    SKINS,
    WALLS,
    Puppet,
    draw_puppet,
    render,
    synthesise,
)
from magihuman.errors import UserError
from magihuman.io.files import write_atomically

SETTINGS_FILE = ".puppets.json"
SIZES = (32, 512)
LOOKS = {
    "face": FACES,
    "hair": tuple(HAIR),
    "shirt": tuple(SHIRTS),
    "wall": tuple(WALLS),
    "skin": tuple(SKINS),
}


def clip_name(index: int) -> str:
    """File name without ending of clip `index`."""
    return f"clip-{index:06d}"


def write_clip(index: int, output: Path, seed: int, size: int) -> bool:
    """Write the mp4 and caption of clip `index` unless both are there; whether anything was written.

    The caption comes last and both appear complete or not at all, so a killed run leaves no half clip behind.
    """
    from magihuman.media.mp4 import write_mp4

    movie, caption = (output / f"{clip_name(index)}.{ending}" for ending in ("mp4", "txt"))
    if movie.exists() and caption.exists():
        return False
    puppet = draw_puppet(seed, index)
    write_mp4(movie, render(puppet, size), FPS, synthesise(puppet)[None], SAMPLE_RATE)
    write_atomically(caption, puppet.caption + "\n")
    return True


def make_clips(
    output: str,
    clips: int,
    seed: int = 0,
    size: int = 64,
    first: int = 0,
    workers: int = 2,
    only: dict[str, str] | None = None,
    progress: bool = True,
) -> int:
    """Write clips of the tiny world: clip-000000.mp4 (H.264 + AAC) and clip-000000.txt (its caption) each.

    Clip i of a seed is always the same, whatever the number of clips, and clips that exist are kept, so a
    run that was stopped goes on where it was. Returns how many were written.

    Args:
        output: folder, made if need be
        clips: how many
        seed: of the world; evaluation uses 1000003 and the recogniser 4000037, so train on others
        size: width and height in pixels, even, 32 to 512
        first: number of the first clip
        workers: processes
        only: take the first puppets that look so, for example only="{skin: dark}": a world to fine-tune on
        progress: show a bar

    Raises:
        UserError: a value out of range, a folder that cannot be written, or one with clips of another seed
        or size.
    """
    from tqdm import tqdm

    for name, value, least in (
        ("clips", clips, 1),
        ("seed", seed, 0),
        ("first", first, 0),
        ("workers", workers, 1),
    ):
        if value < least:
            raise UserError(f"{name}={value} is impossible; give at least {least}")
    if size % 2 or not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"size={size} should be even (H.264) and between {SIZES[0]} and {SIZES[1]}")
    folder = Path(output)
    looks = dict(only or {})
    check_looks(looks)
    numbers = list(islice((i for i in count(first) if _looks(draw_puppet(seed, i), looks)), clips))
    _claim(folder, {"seed": seed, "size": size, **looks})
    todo = [
        i
        for i in numbers
        if not all((folder / f"{clip_name(i)}.{ending}").exists() for ending in ("mp4", "txt"))
    ]
    job = partial(write_clip, output=folder, seed=seed, size=size)
    bar = tqdm(total=clips, initial=clips - len(todo), desc="puppets", unit="clip", disable=not progress)
    written = 0
    with bar:
        # A process takes seconds to start; a few clips are made sooner here.
        if workers == 1 or len(todo) < 50:
            for done in map(job, todo):
                written += done
                bar.update()
        else:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                for done in pool.imap_unordered(job, todo, chunksize=8):
                    written += done
                    bar.update()
    return written


def check_looks(looks: Mapping[str, str]) -> None:
    """Raises UserError for a look that no puppet has, naming those that there are."""
    for name, value in looks.items():
        if name not in LOOKS:
            raise UserError(
                f"only={{{name}: {value}}}: puppets have no {name}; choose from {', '.join(LOOKS)}"
            )
        if value not in LOOKS[name]:
            raise UserError(f"only={{{name}: {value}}}: choose {name} from {', '.join(LOOKS[name])}")


def _looks(puppet: Puppet, looks: Mapping[str, str]) -> bool:
    return all(getattr(puppet, name) == value for name, value in looks.items())


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Note the folder's seed, size and looks, or refuse where they differ: a mix could not be told apart later."""
    note = folder / SETTINGS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
        if known is None:
            note.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"output={folder} cannot be used: {error}") from error
    if known is not None and known != settings:
        there = ", ".join(f"{key}={value}" for key, value in known.items())
        raise UserError(f"output={folder} holds clips of {there}; choose another folder or the same values")
