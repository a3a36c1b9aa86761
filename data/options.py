"""Options of `python -m data.prepare`: the command line and its help come from this dataclass."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from magihuman.cli import option
from magihuman.errors import UserError
from magihuman.io.text import TABLES

RUNTIME_OPTIONS = ("workers", "device", "progress")
"""Options without effect on the content of the shards."""


@dataclass(frozen=True)
class PrepareOptions:
    """Encode a folder of media files to shards of latents.

    Captions come from a .txt next to each file or from a .csv, .tsv, .jsonl or .json with a file and a caption column.
    Long files are cut into several clips. Files that cannot be used are listed in report.md with the reason.

    Raises:
        UserError: a value out of range, or a file or folder that does not exist.
    """

    input: str = option("folder of video files, searched with its subfolders")
    output: str = option("folder for the shards, made if it does not exist")
    codecs: str = option(
        "codecs and text encoder: scene or tiny (of that world of puppets), released, or package.module:function for your own",
        "scene",
    )
    workers: int = option("processes, 0 for one per CPU core, or a single one with device=cuda", 0)
    device: str = option("where the codecs run: cpu, cuda, cuda:1", "cpu")
    sizes: str | None = option(
        "width x height choices such as 448x256,256x448; a clip gets the one with the nearest aspect ratio", None
    )
    sr_sizes: str | None = option(
        "sizes of the second stage, one for each of sizes, such as 896x512,512x896; clips are stored at both, for "
        "training super-resolution",
        None,
    )
    frames: str | None = option("lengths to cut to, such as 101,49,25; none for the usual length of the codecs", None)
    captions: Literal["required", "optional"] = option(
        "required rejects files without a caption, optional accepts them with an empty one", "required"
    )
    table: str | None = option("a caption table elsewhere than in the input folder", None)
    silent: bool = option("accept clips without audio; their audio is masked in training", False)
    images: bool = option("accept still images as clips of one frame", False)
    pixels: bool = option("store the frames too, for training a decoder; 7 to 27 times the space", False)
    duplicates: Literal["skip", "keep"] = option("skip or keep files with the same bytes", "skip")
    max_crop: float = option("share of a frame's area that cropping to a size may remove", 0.5)
    max_enlarge: float = option("largest factor of upscaling", 2.0)
    max_windows: int | None = option("clips per file at most, none for all", None)
    shard_clips: int = option("clips per shard", 100)
    progress: bool = option("show a bar", True)

    def __post_init__(self) -> None:
        if not self.source.is_dir():
            raise UserError(f"input={self.input} is not a folder; give the folder that holds the video files")
        for name in ("shard_clips", "max_windows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value} is out of range; give at least 1")
        if self.workers < 0 or not 0 <= self.max_crop < 1 or self.max_enlarge <= 0:
            raise UserError("workers must not be negative, max_crop in [0, 1), max_enlarge above 0")
        if self.table is not None and not (Path(self.table).is_file() and self.table.lower().endswith(TABLES)):
            raise UserError(f"table={self.table} is not a file ending in {', '.join(TABLES)}; give a caption table")

    @property
    def source(self) -> Path:
        """Absolute path of the input folder."""
        return Path(self.input).absolute()

    @property
    def target(self) -> Path:
        """Absolute path of the output folder."""
        return Path(self.output).absolute()

    def identity(self) -> dict[str, Any]:
        """The options that decide the shards, and where they are."""
        return {name: value for name, value in asdict(self).items() if name not in RUNTIME_OPTIONS}
