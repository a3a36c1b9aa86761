"""Puppets on disk: mp4 clips with captions, or shards of latents, made on first use and kept.

`python -m data.tiny output=clips clips=200` writes mp4 files, for `data.prepare` and other readers of media. Configurations
call `ensure`, which encodes the rendered frames and waves without files in between: samples have the keys and metadata that
`data.prepare` gives the mp4 files, and latents without the losses of H.264 and AAC.
"""

import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.clip_plan import PlannedClip, check_lengths, key_of, pair_sizes, parse_sizes
from data.encode import PRELOADED, VERSION, describe_codecs, encode_clip, open_bundle, store
from data.shards import INDEX, Entry, Index, Shards, ShardWriter
from data.tiny.puppets import FPS, SAMPLE_RATE, WORLDS, draw_puppet, render, synthesise
from data.worker_pool import Tick, Workers
from magihuman.codecs.bundle import bundle_spec
from magihuman.errors import UserError
from magihuman.io.files import locked, write_atomically
from magihuman.io.text import load_json

if TYPE_CHECKING:
    import torch

    from magihuman.codecs.bundle import CodecBundle

SETTINGS_FILE = ".puppets.json"
PROMPTS = "prompts.txt"
SIZES = (32, 512)
WORK = ".work"
SHARD_CLIPS = 100
SAME = 1e-2  # root mean square difference of latents, of deviation 1, that other threads or machines may make


def clip_files(folder: Path, index: int) -> tuple[Path, Path]:
    """The mp4 and the caption of clip `index`."""
    return folder / f"clip-{index:06d}.mp4", folder / f"clip-{index:06d}.txt"


def write_clip(index: int, folder: Path, seed: int, size: int, world: str) -> None:
    """Write clip `index`. The caption is last and both files are atomic, so a killed run leaves no half clip behind."""
    from magihuman.media.mp4 import write_mp4

    movie, caption = clip_files(folder, index)
    puppet = draw_puppet(seed, index, world)
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
    world: str = "scene",
    progress: bool = True,
) -> int:
    """Write clips of a puppet world: clip-000000.mp4 (H.264 + AAC) and clip-000000.txt (its caption) each.

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
        world: scene or tiny, see `data.tiny.puppets`
        progress: show a progress bar

    Raises:
        UserError: a value out of range, a folder that cannot be written, or one with clips of another seed
        or size.
    """
    from tqdm import tqdm

    _check_numbers(size=size, clips=clips, seed=seed, first=first, workers=workers)
    folder = Path(output)
    wanted = dict(only or {})
    check_appearance(wanted, world)
    named = {} if world == "tiny" else {"world": world}  # folders of earlier versions do not say it
    _claim(folder, {"seed": seed, "size": size, **named, **wanted})
    numbers = islice(_numbers(world, seed, first, wanted), clips)
    todo = [i for i in numbers if not all(file.exists() for file in clip_files(folder, i))]
    job = partial(write_clip, folder=folder, seed=seed, size=size, world=world)
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


def _check_numbers(size: int, **values: int) -> None:
    for name, value in values.items():
        if value < (least := 0 if name in ("seed", "first") else 1):
            raise UserError(f"{name}={value} is out of range; give at least {least}")
    if size % 2 or not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"size={size} should be even (H.264) and between {SIZES[0]} and {SIZES[1]}")


def _numbers(world: str, seed: int, first: int, wanted: Mapping[str, str]) -> Iterator[int]:
    """Numbers of the puppets of this world and appearance, without end."""
    return (i for i in count(first) if wanted.items() <= vars(draw_puppet(seed, i, world)).items())


def check_appearance(wanted: Mapping[str, str], world: str) -> None:
    """Raises UserError for an unknown world, attribute or value, with the choices, or for a pair that no clip of it has."""
    if world not in WORLDS:
        raise UserError(f"world={world} is unknown; choose from {', '.join(WORLDS)}")
    attributes = WORLDS[world].attributes
    for name, value in wanted.items():
        if name not in attributes:
            raise UserError(f"only={{{name}: {value}}}: puppets have no {name}; choose from {', '.join(attributes)}")
        if value not in attributes[name].values:
            raise UserError(f"only={{{name}: {value}}}: choose {name} from {', '.join(attributes[name].values)}")
    shirt, wall = wanted.get("shirt", ""), wanted.get("wall", "")
    if (shirt, wall) in WORLDS[world].novel_pairs:
        raise UserError(
            f"only={{shirt: {shirt}, wall: {wall}}}: world={world} keeps this pair for evaluation, so no clip has it; give "
            "another shirt or wall"
        )


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


# ---- Shards ----


@dataclass(frozen=True)
class PuppetFormat:
    """What decides a puppet's sample: world, seed, codecs, (height, width) of its latents and of the second stage, and whether
    its frames are stored."""

    world: str
    seed: int
    codecs: str
    size: tuple[int, int]
    large: tuple[int, int] | None
    pixels: bool


def encode_puppet(
    form: PuppetFormat, number: int, codecs: "CodecBundle"
) -> "tuple[PlannedClip, dict[str, torch.Tensor]]":
    """Clip `number` as `data.prepare` would plan its mp4 file, and the tensors of its sample."""
    import torch

    from magihuman.media.reading import MediaClip

    puppet = draw_puppet(form.seed, number, form.world)
    frames = render(puppet, (form.large or form.size)[0])
    check_lengths([len(frames)], codecs.contract.video_stride[0])
    name = clip_files(Path(), number)[0].name
    planned = PlannedClip(
        key=key_of(name, 0), path="", relative=name, caption=puppet.caption, start=0.0, frames=len(frames),
        height=form.size[0], width=form.size[1], still=False, content="", large=form.large,
    )  # fmt: skip
    clip = MediaClip(torch.from_numpy(frames), torch.from_numpy(synthesise(puppet))[None])
    return planned, encode_clip(codecs, clip, planned, form.pixels)


def write_puppets(job: tuple[PuppetFormat, list[int], Path], tick: Tick, excluded: frozenset[str]) -> list[Entry]:
    """Task: make one shard; the clips by their numbers.

    Raises:
        UserError: a clip that the codecs cannot encode.
    """
    form, numbers, path = job
    codecs = open_bundle(form.codecs, "cpu")
    with ShardWriter(path) as writer:
        for number in numbers:
            tick(str(number))
            if problem := store(writer, codecs, *encode_puppet(form, number, codecs)):
                raise UserError(f"codecs={form.codecs} cannot encode clip {number} of seed {form.seed}: {problem}")
    return writer.entries


def ensure(
    folder: str,
    clips: int,
    seed: int = 0,
    size: int = 64,
    workers: int = 2,
    world: str = "scene",
    codecs: str | None = None,
    sr_size: int | None = None,
    pixels: bool = False,
    only: dict[str, str] | None = None,
) -> str:
    """Make shards of clips in FOLDER/shards-... unless they exist; returns the shards' folder.

    Its name contains the settings, so other settings make other folders, and all trainings of the same settings share one.
    Captions are in its prompts.txt, too. An interrupted call is completed by the next; concurrent processes wait for the first.

    Args:
        folder: made if it does not exist
        clips: number of clips
        seed: of the puppets; evaluation and the recogniser have their own
        size: width and height in pixels
        workers: processes
        world: of the puppets: scene or tiny
        codecs: codecs and text encoder; none takes those of the world
        sr_size: width and height of the second stage: clips are rendered at it and stored at both
        pixels: store the frames too, for training a decoder
        only: puppets of this appearance, for example {skin: dark}

    Raises:
        UserError: a value out of range, codecs of another frame or sample rate, a folder that cannot be written, or one
            whose clips other code has made.
    """
    root, wanted = Path(folder), dict(only or {})
    rendered = size if sr_size is None else sr_size
    _check_numbers(size=rendered, clips=clips, seed=seed, workers=workers)
    check_appearance(wanted, world)
    codecs = world if codecs is None else codecs
    form = _format(world, seed, codecs, size, sr_size, pixels)
    appearance = "".join(f"-{value}-{key}" for key, value in sorted(wanted.items()))
    suffix = ("" if sr_size is None else f"-and-{size}px") + ("-pixels" if pixels else "")
    named = f"{codecs}-" if world == codecs else f"{world}-{codecs}-"
    shards = root / f"shards-{named}{clips}-seed{seed}-{rendered}px{appearance}{suffix}"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.make.folder={folder} cannot be made: {error.strerror}; choose another") from error
    with locked(root / f".{shards.name}.lock"):
        numbers = list(islice(_numbers(world, seed, 0, wanted), clips))
        if (shards / INDEX).exists():
            _require_same(shards, form, numbers[0])
        else:
            _make_shards(shards, form, numbers, workers)
    return str(shards)


def _format(world: str, seed: int, codecs: str, size: int, sr_size: int | None, pixels: bool) -> PuppetFormat:
    """Raises UserError for sizes that cannot be encoded, or codecs of another frame or sample rate."""
    contract = open_bundle(codecs, "cpu").contract
    found, own = (contract.fps, contract.audio_rate, contract.waveform_channels), (FPS, SAMPLE_RATE, 1)
    if found != own:
        raise UserError(
            f"codecs={codecs} take {found[0]:g} frames and {found[1]} samples a second, {found[2]} channels, and puppets have "
            f"{own[0]}, {own[1]} and {own[2]}; write mp4 files with python -m data.tiny, and give them to data.prepare"
        )
    patch = 1 if pixels else bundle_spec(codecs).patch  # decoders know no tokens
    unit = patch * contract.video_stride[1], patch * contract.video_stride[2]
    small = parse_sizes(f"{size}x{size}", unit, "data.make.size")
    large = (
        None if sr_size is None else pair_sizes(small, parse_sizes(f"{sr_size}x{sr_size}", unit, "data.make.sr_size"))
    )
    return PuppetFormat(world, seed, codecs, small[0], None if large is None else large[0], pixels)


def _make_shards(folder: Path, form: PuppetFormat, numbers: list[int], workers: int) -> None:
    """Write the shards that a stopped call has not written, then the index. What is in each waits in .work/NAME.json."""
    from tqdm import tqdm

    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".*.part"):
        unfinished.unlink()
    contract = describe_codecs((form.codecs, "cpu", str(folder)), lambda _: None, frozenset())["contract"]
    settings = {**asdict(form), "contract": contract, "version": VERSION}
    parts = [numbers[i : i + SHARD_CLIPS] for i in range(0, len(numbers), SHARD_CLIPS)]
    jobs = {f"shard-{i:06d}": (form, part, folder / f"shard-{i:06d}.tar") for i, part in enumerate(parts)}
    done = {name: work / f"{name}.json" for name in jobs}
    left = {name: job for name, job in jobs.items() if not done[name].exists()}
    missing = sum(len(part) for _, part, _ in left.values())
    with tqdm(total=len(numbers), initial=len(numbers) - missing, desc="puppets", unit="clip") as bar:
        for name, entries in _run(left, workers, work, bar.update):
            write_atomically(done[name], json.dumps([asdict(entry) for entry in entries]), sync=True)
    indexed = [(f"{name}.tar", [Entry(**entry) for entry in load_json(file)]) for name, file in done.items()]
    write_atomically(folder / PROMPTS, "".join(f"{draw_puppet(form.seed, i, form.world).caption}\n" for i in numbers))
    fingerprint = hashlib.sha256(json.dumps([settings, numbers], sort_keys=True).encode()).hexdigest()[:16]
    Index(form.codecs, contract, indexed, fingerprint).save(folder)
    shutil.rmtree(work)


def _run(
    jobs: Mapping[str, tuple[PuppetFormat, list[int], Path]], workers: int, work: Path, progress: Callable[[int], Any]
) -> Iterator[tuple[str, list[Entry]]]:
    """Results of `write_puppets` by name as they come; a single shard is written here: processes take seconds to start."""
    import torch

    if len(jobs) > 1 and workers > 1:
        with Workers(workers, work, set(), PRELOADED) as pool:
            yield from pool.run(write_puppets, jobs, progress)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in workers
    try:
        for name, job in jobs.items():
            yield name, write_puppets(job, lambda _: progress(1), frozenset())
    finally:
        torch.set_num_threads(threads)


def _require_same(folder: Path, form: PuppetFormat, number: int) -> None:
    """Raises UserError where the first clip made anew is not the folder's, whose clips are those of other code then."""
    _, now = encode_puppet(form, number, open_bundle(form.codecs, "cpu"))
    before = Shards(folder).read(0).tensors
    alike = now.keys() == before.keys() and all(
        now[name].shape == before[name].shape
        and float((now[name].float() - before[name].float()).square().mean().sqrt()) < SAME
        for name in now
    )
    if not alike:
        raise UserError(
            f"{folder} holds clips that another version has made; remove it, or choose another data.make.folder"
        )
