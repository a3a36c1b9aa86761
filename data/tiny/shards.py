"""The tiny world's clips and shards, made on first use and kept."""

from pathlib import Path

from data.prepare import prepare
from data.shards import INDEX
from data.tiny.render import check_looks, make_clips
from magihuman.errors import UserError
from magihuman.io.files import locked


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
    """Clips in FOLDER/clips-..., their shards in FOLDER/shards-...; returns the folder of the shards.

    Names carry what the clips depend on, so other settings make other folders. What an interrupted call left
    is completed; processes that ask at the same time wait for the first.

    Args:
        folder: for both, made if need be
        clips: how many
        seed: of the world; evaluation and the recogniser have seeds of their own
        size: width and height in pixels
        workers: processes
        codecs: bundle of codecs and text encoder that make the latents
        sr_size: width and height of the second stage: the clips are drawn at it and stored at both
        pixels: store the frames too, for training a decoder
        only: puppets that look so, for example {skin: dark}

    Raises:
        UserError: a value out of range, or a folder that cannot be written.
    """
    root = Path(folder)
    drawn = size if sr_size is None else sr_size
    check_looks(only or {})
    looks = "".join(f"-{value}-{key}" for key, value in sorted((only or {}).items()))
    name = f"{clips}-seed{seed}-{drawn}px{looks}"
    kind = ("" if sr_size is None else f"-and-{size}px") + ("-pixels" if pixels else "")
    shards = root / f"shards-{codecs}-{name}{kind}"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.make.folder={folder} cannot be made: {error.strerror}; choose another"
        ) from error
    with locked(root / f".{name}.lock"):
        if not (shards / INDEX).exists():
            make_clips(str(root / f"clips-{name}"), clips, seed, drawn, workers=workers, only=only)
            prepare(
                str(root / f"clips-{name}"),
                str(shards),
                codecs="tiny",
                workers=workers,
                sizes=f"{size}x{size}",
                sr_sizes=None if sr_size is None else f"{sr_size}x{sr_size}",
                pixels=pixels,
            )
    return str(shards)
