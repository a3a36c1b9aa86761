"""The tiny world on disk: mp4 clips with captions, and shards of their latents, made on first use and kept.

The command is `python -m data.tiny output=clips clips=200`; configurations call `ensure`.
"""

import json
import multiprocessing
from collections.abc import Mapping
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from data.options import PrepareOptions
from data.prepare import prepare
from data.shards import INDEX
from data.tiny import puppets
from data.tiny.puppets import FPS, SAMPLE_RATE, draw_puppet, render, synthesise
from magihuman.errors import UserError
from magihuman.io.files import locked, write_atomically
from magihuman.io.text import load_json

SETTINGS_FILE = ".puppets.json"
SIZES = (32, 512)
APPEARANCE = {
    "face": puppets.FACES,
    "hair": tuple(puppets.HAIR),
    "shirt": tuple(puppets.SHIRTS),
    "wall": tuple(puppets.WALLS),
    "skin": tuple(puppets.SKINS),
}


def clip_files(folder: Path, index: int) -> tuple[Path, Path]:
    """The mp4 and the caption of clip `index`."""
    return folder / f"clip-{index:06d}.mp4", folder / f"clip-{index:06d}.txt"


def write_clip(index: int, folder: Path, seed: int, size: int) -> None:
    """Write clip `index`. The caption is last and both files are atomic, so a killed run leaves no half clip behind."""
    from magihuman.media.mp4 import write_mp4

    movie, caption = clip_files(folder, index)
    puppet = draw_puppet(seed, index)
    write_mp4(movie, render(puppet, size), FPS, synthesise(puppet)[None], SAMPLE_RATE)
    write_atomically(caption, puppet.caption + "\n")


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

    Clip i of a seed does not depend on the number of clips, and existing clips are kept, so the same command resumes a
    stopped run. Returns the number of clips written.

    Args:
        output: folder, made if it does not exist
        clips: number of clips
        seed: of the puppets; evaluation uses 1000003 and the recogniser 4000037, so train on others
        size: width and height in pixels, even, 32 to 512
        first: number of the first clip
        workers: processes
        only: only puppets of this appearance, for example only="{skin: dark}", to fine-tune on
        progress: show a progress bar

    Raises:
        UserError: a value out of range, a folder that cannot be written, or one with clips of another seed
        or size.
    """
    from tqdm import tqdm

    for name, value, least in (("clips", clips, 1), ("seed", seed, 0), ("first", first, 0), ("workers", workers, 1)):
        if value < least:
            raise UserError(f"{name}={value} is out of range; give at least {least}")
    if size % 2 or not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"size={size} should be even (H.264) and between {SIZES[0]} and {SIZES[1]}")
    folder = Path(output)
    wanted = dict(only or {})
    check_appearance(wanted)
    numbers = islice((i for i in count(first) if wanted.items() <= vars(draw_puppet(seed, i)).items()), clips)
    _claim(folder, {"seed": seed, "size": size, **wanted})
    todo = [i for i in numbers if not all(file.exists() for file in clip_files(folder, i))]
    job = partial(write_clip, folder=folder, seed=seed, size=size)
    with tqdm(total=clips, initial=clips - len(todo), desc="puppets", unit="clip", disable=not progress) as bar:
        # Processes take seconds to start; a few clips are faster without them.
        if workers == 1 or len(todo) < 50:
            for index in todo:
                job(index)
                bar.update()
        else:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                for _ in pool.imap_unordered(job, todo, chunksize=8):
                    bar.update()
    if progress:
        kept = f", {clips - len(todo)} were there" if len(todo) < clips else ""
        print(f"{len(todo)} clips written to {folder}{kept}")
    return len(todo)


def check_appearance(wanted: Mapping[str, str]) -> None:
    """Raises UserError for an attribute or value that no puppet has; the message lists the choices."""
    for name, value in wanted.items():
        if name not in APPEARANCE:
            raise UserError(f"only={{{name}: {value}}}: puppets have no {name}; choose from {', '.join(APPEARANCE)}")
        if value not in APPEARANCE[name]:
            raise UserError(f"only={{{name}: {value}}}: choose {name} from {', '.join(APPEARANCE[name])}")


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Record the folder's seed, size and appearance; raises UserError where it has clips of others."""
    note = folder / SETTINGS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = load_json(note) if note.exists() else None
        if known is None:
            write_atomically(note, json.dumps(settings) + "\n")  # a kill that left it empty would block the folder
    except (OSError, ValueError) as error:
        raise UserError(f"output={folder} cannot be used: {error}") from error
    if known is not None and known != settings:
        there = ", ".join(f"{key}={value}" for key, value in known.items())
        raise UserError(f"output={folder} holds clips of {there}; choose another folder or the same values")


def ensure(
    folder: str,
    clips: int,
    seed: int = 0,
    size: int = 64,
    workers: int = 2,
    codecs: str = "tiny",
    sr_size: int | None = None,
    pixels: bool = False,
    only: dict[str, str] | None = None,
) -> str:
    """Make clips in FOLDER/clips-... and shards in FOLDER/shards-... unless they exist; returns the shards' folder.

    The folder names contain the settings, so other settings make other folders. An interrupted call is completed by the
    next; concurrent processes wait for the first.

    Args:
        folder: for both, made if it does not exist
        clips: number of clips
        seed: of the puppets; evaluation and the recogniser have their own
        size: width and height in pixels
        workers: processes
        codecs: codecs and text encoder
        sr_size: width and height of the second stage: clips are rendered at it and stored at both
        pixels: store the frames too, for training a decoder
        only: puppets of this appearance, for example {skin: dark}

    Raises:
        UserError: a value out of range, or a folder that cannot be written.
    """
    root = Path(folder)
    rendered = size if sr_size is None else sr_size
    check_appearance(only or {})
    appearance = "".join(f"-{value}-{key}" for key, value in sorted((only or {}).items()))
    name = f"{clips}-seed{seed}-{rendered}px{appearance}"
    suffix = ("" if sr_size is None else f"-and-{size}px") + ("-pixels" if pixels else "")
    shards = root / f"shards-{codecs}-{name}{suffix}"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.make.folder={folder} cannot be made: {error.strerror}; choose another") from error
    with locked(root / f".{name}.lock"):
        if not (shards / INDEX).exists():
            make_clips(str(root / f"clips-{name}"), clips, seed, rendered, workers=workers, only=only)
            options = PrepareOptions(
                str(root / f"clips-{name}"), str(shards), codecs, workers, sizes=f"{size}x{size}",
                sr_sizes=None if sr_size is None else f"{sr_size}x{sr_size}", pixels=pixels,
            )  # fmt: skip
            prepare(options)
    return str(shards)
