"""What to generate: the options of `python -m magihuman.infer`, and the requests of the command line or a prompt file.

    InferOptions(checkpoint="scene/base", prompt="round face, says ma", output="x.mp4").command()

A prompt file has lines (`.txt`) or is a table (`.csv`, `.tsv`, `.jsonl`, `.json`). A request keeps its name and seed
whatever the other lines are, so an interrupted batch continues where it was. Imports no torch.
"""

import os
import re
import reprlib
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from magihuman.cli import option
from magihuman.codecs.costs import TEXT_LIMIT
from magihuman.errors import UserError
from magihuman.io.text import CAPTION_COLUMNS, MAX_CHARACTERS, TABLES, TableRow, prompt_rows

FIELDS = ("prompt", "seed", "name", "image", "audio", "seconds", "negative_prompt")
FORMAT = "magihuman-clip/1"
"""Format of a clip's record."""
MANIFEST = "manifest.jsonl"
"""File in a folder of clips with a line per finished clip."""
MAX_SEED = 2**63 - 1
AUTO = "auto"
RELEASED = "released"
"""negative_prompt= of the release's own one."""


@dataclass(frozen=True, kw_only=True)
class InferOptions:
    """Generate video clips with audio from text.

    Writes H.264 + AAC mp4 files, each with a JSON record of all that is needed to make it again. The same command on the
    same machine gives the same bytes. With prompts= an interrupted run continues where it was: finished clips are skipped.
    Started by torchrun, each process makes its share of the prompts; with prompt= all of them compute the one clip
    together.
    """

    # identity: the value is part of a clip's identity in its record (sampling settings are without it).
    # command: whether the reproducing command states the value.
    checkpoint: str = option(
        "a name of `python -m magihuman.zoo list`, an exported folder, a run folder, or a folder of the published weights",
        "scene/base",
    )
    lora: str | None = option(
        "LoRA merged into the checkpoint: the folder adapter/ of a run with recipe=lora, or the run", None
    )
    sr: str | None = option(
        "checkpoint of the second stage (super-resolution): scene/sr, a run folder, the folder 540p_sr or 1080p_sr",
        None,
    )
    turbo: str | None = option(
        "a small, fast decoder: a name of `python -m magihuman.zoo list`, an exported folder, a run folder, or the "
        "folder turbo_vae of the published weights, which is the default where it lies next to their checkpoint; "
        "wan is the full decoder",
        None,
    )
    tile: int | None = option(
        "decode in tiles of so many pixels a side, for GPUs too small for whole frames", None, identity=True
    )
    output_size: str | None = option(
        "WIDTHxHEIGHT in pixels to which finished frames are resized (bicubic), such as 1920x1080", None, identity=True
    )
    crf: int | None = option(
        "x264's quality, 0 to 51, less is better and larger; none is 18, with the published weights 10 as in the release",
        None,
        identity=True,
    )
    codecs: str | None = option(
        "package.module:function of your own codecs, for checkpoints that were trained with them; imports that code",
        None,
    )
    video_codec: str | None = option("Wan 2.2 VAE for the published weights; none takes MAGIHUMAN_WAN_VAE", None)
    audio_codec: str | None = option(
        "Stable Audio Open for the published weights; none takes MAGIHUMAN_STABLE_AUDIO", None
    )
    text_encoder: str | None = option("T5-Gemma for the published weights; none takes MAGIHUMAN_T5GEMMA", None)
    prompt: str | None = option(f"the scene and the speech, up to {TEXT_LIMIT} tokens", None)
    prompts: str | None = option(
        "a file of many prompts: .txt (one a line), or a .csv, .tsv, .jsonl or .json with prompt and optionally seed, "
        "name, image, audio, seconds, negative_prompt",
        None,
        command=False,
    )
    negative_prompt: str | None = option(
        "prompt of the unconditional branch of the guidance; nothing behind the = is an empty one; released is that of "
        "the release, read from its code in the folder MAGIHUMAN_RELEASE",
        None,
        keep_empty=True,
    )
    negative_prompt_file: str | None = option(
        "the same from a text file; the released one is recognised by its hash", None, command=False
    )
    output: str | None = option("the mp4 to write; with prompts= the folder", None)
    seed: int = option("of the noise; prompt i of a file gets seed + i unless it has its own", 42)
    steps: int | None = option("solver steps; none takes the checkpoint's setting, as for all sampling settings", None)
    solver: str | None = option("unipc, renoise (distilled models), euler or sde", None)
    shift: float | None = option("of the noise levels; higher spends more steps on noisy ones", None)
    cfg: float | dict[str, float] | None = option(  # noqa: RUF009
        'guidance scale, 1 is off; or by part: cfg="{video_high: 5, video_low: 2, threshold: 500, audio: 5}"', None
    )
    cfg_passes: int = option(
        "1 computes both branches of the guidance at once, 2 one after the other in less memory", 1
    )
    compat: str | None = option("o2 lets unguided sampling change the given audio, as the released code does", None)
    seconds: float | str | None = option(
        "length, rounded to the nearest possible number of frames; auto takes the given audio's, or what the prompt's "
        "dialogue needs in its language",
        None,
    )
    resolution: str | None = option(
        "256p, 540p or 1080p with the published weights (the second stage is found next to the base)",
        None,
        command=False,
    )
    height: int | None = option("of the clip in pixels, before super-resolution", None)
    width: int | None = option("of the clip in pixels, before super-resolution", None)
    sr_steps: int | None = option("solver steps of the second stage", None)
    sr_cfg: float | None = option("guidance scale of the second stage, 1 is off; the release also knows 3.5", None)
    sr_shift: float | None = option("of the second stage's noise levels", None)
    sr_noise_index: int | None = option(
        "strength of the noise on the enlarged latents, an index 0 (none) to 999 (noise alone); the release's is 220",
        None,
    )
    sr_audio_noise: float | None = option(
        "share of noise, 0 to 1, in the audio that the second stage reads; the release's is 0.7", None
    )
    sr_early_frames: int | None = option(
        "first latent frames with a lower sr_cfg, 0 for none; the release's are 13", None
    )
    sr_early_cfg: float | None = option("guidance scale of these frames; the release's is 2", None)
    sr_height: int | None = option("of the finished clip in pixels", None)
    sr_width: int | None = option("of the finished clip in pixels", None)
    image: str | None = option("image file for the first frame, cropped to the clip's shape", None)
    audio: str | None = option(
        "audio file, or a clip with audio: conditions the clip and becomes its audio track", None
    )
    audio_overlap: float | None = option(
        "share that the windows overlap in which the released audio codec reads more than 29 s; the release's is 0.5",
        None,
    )
    device: str = option("auto, cpu, cuda or cuda:N", "auto", identity=True)
    dtype: str | None = option(
        "of the network: float32 or bfloat16; none is bfloat16 on a GPU, float32 on the CPU", None, identity=True
    )
    memory: str = option("fast (all on the GPU), balanced (one stage at a time) or low (layer by layer)", "fast")
    weights: str | None = option(
        "store the network's matrices in bf16, fp8 or int4; none keeps them", None, identity=True
    )
    tier: str | None = option(
        "optimisation level of the network: reference, exact (the same bits, sooner), fast (the same mathematics in "
        "another order); approximate: fp8, fp8_attention, cached (for many steps); none is exact where "
        "memory= and weights= allow it, else reference",
        None,
        identity=True,
    )
    batch: int | None = option(
        "clips of a prompt file that are computed at once; none is 8, with the published weights 1", None, command=False
    )
    gallery: bool = option(
        "with prompts=: also write index.html, a page of the clips for any browser", False, command=False
    )
    progress: bool = option("show a progress bar", True, command=False)

    def identity(self) -> dict[str, Any]:
        """Options of a clip's identity other than its sampling settings."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("identity")}

    def command(self) -> list[str]:
        """The command line with these options; None is left out."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("command", True)}
        words = [f"{name}={_as_text(value)}" for name, value in chosen.items() if value is not None]
        return ["python", "-m", "magihuman.infer", *words]


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {inner}" for key, inner in value.items()) + "}"
    return str(value)


@dataclass(frozen=True)
class Request:
    """One clip to make.

    Attributes:
        name: file name without ending, unique in a batch.
        prompt: text as given.
        seed: seeds this clip's own noise generator, whatever batch it is computed in.
        image: first frame, or None; audio: conditioning audio file, or None.
        seconds: length, "auto", or None for the run's setting.
        negative_prompt: text of the unconditional branch of the guidance, or None for the run's setting.
    """

    name: str
    prompt: str
    seed: int
    image: str | None = None
    audio: str | None = None
    seconds: float | str | None = None
    negative_prompt: str | None = None


def slug(text: str) -> str:
    """A readable piece of file name from `text`: up to 40 lower-case ASCII letters, digits and dashes, cut at a word.

    A prompt may hold slashes, quotes or any script, so it never becomes a path as it is (compare SPEC O11).
    """
    lines = textwrap.wrap(" ".join(re.findall(r"[a-z0-9]+", text.lower())), 40, break_long_words=False)
    return lines[0][:40].replace(" ", "-") if lines else "clip"


def read_requests(path: str | Path, seed: int) -> list[Request]:
    """All requests of a prompt file.

    Args:
        path: `.txt` (a prompt a line) or a table as `magihuman.io.text.read_rows` reads it. Its rows have the
            fields of `FIELDS`, of which only `prompt` is needed (or `caption`, `text` and the like). Relative image and
            audio paths start at the file's folder.
        seed: request i (counted from 0) without a seed of its own gets `seed + i`.

    Raises:
        UserError: the file is missing, empty, not UTF-8 or of another kind; a line that is not valid, named
            by its number.
    """
    path = Path(path)
    if path.suffix.lower() not in (".txt", *TABLES):
        raise UserError(f"prompts={path}: cannot tell the format; name the file .txt, {', '.join(TABLES)}")
    requests: list[Request] = []
    where_of: dict[str, str] = {}
    for row in prompt_rows(path, f"prompts={path}"):
        request = _request(row, len(requests), seed, f"{path} {row.where}", path.parent)
        if request.name in where_of:
            raise UserError(
                f"{path}: the name {request.name!r} is used in {where_of[request.name]} and again in {row.where}; "
                "every clip needs its own"
            )
        where_of[request.name] = row.where
        requests.append(request)
    if not requests:
        raise UserError(f"prompts={path} holds no prompt")
    return requests


def _request(row: TableRow, index: int, seed: int, where: str, folder: Path) -> Request:
    if row.problem:
        raise UserError(f"{where} {row.problem}")
    given = {key: value for key, value in row.values.items() if value is not None}
    if unknown := sorted(set(given) - {*FIELDS, *CAPTION_COLUMNS}):
        raise UserError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(FIELDS)}")
    try:
        prompt = row.text(("prompt", *CAPTION_COLUMNS))
        texts = {key: row.text((key,)) for key in ("name", "image", "audio", "negative_prompt") if key in given}
    except ValueError as error:
        raise UserError(f"{where} {error}") from None
    texts = {key: text for key, text in texts.items() if text or key == "negative_prompt"}
    if not prompt:
        raise UserError(f"{where}: the prompt is missing or empty")
    check_length(prompt, f"{where}: the prompt")
    name = texts.get("name", f"{index:04d}-{slug(prompt)}")
    check_name(name, where)
    paths = {key: str(folder / texts[key]) for key in ("image", "audio") if key in texts}
    for key, file in paths.items():
        if not os.path.isfile(file):
            raise UserError(f"{where}: {key} {file} does not exist")
    return Request(
        name=name,
        prompt=prompt,
        seed=check_seed(given.get("seed", seed + index), where),
        seconds=check_seconds(given["seconds"], where) if "seconds" in given else None,
        negative_prompt=texts.get("negative_prompt"),
        **paths,
    )


def check_name(name: str, where: str) -> None:
    """Refuse what cannot be the name of a clip's file.

    Raises:
        UserError: slashes, control characters, a dot in front, or over 120 characters; `where` says where it stands.
    """
    if not re.fullmatch(r"[^/\\\x00-\x1f]{1,120}", name) or name.startswith("."):
        raise UserError(f"{where}: {name!r} cannot be a file name; use up to 120 characters without slashes")


def check_seed(value: Any, where: str) -> int:
    """`value` as a seed in 0 .. 2**63 - 1.

    Raises:
        UserError: it is none; `where` says where it stands.
    """
    try:
        seed = int(str(value))
    except ValueError:
        seed = -1
    if isinstance(value, bool) or not 0 <= seed <= MAX_SEED:
        raise UserError(f"{where}: seed must be a whole number from 0 to {MAX_SEED}, not {reprlib.repr(value)}")
    return seed


def check_seconds(value: Any, where: str) -> float | str:
    """`value` as a length: a positive number, or "auto".

    Raises:
        UserError: it is none; `where` says where it stands.
    """
    if value == AUTO:
        return AUTO
    try:
        seconds = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise UserError(f"{where}: seconds must be a positive number or auto, not {reprlib.repr(value)}")
    return seconds


def check_length(text: str, what: str) -> None:
    """Refuse a text that is certainly longer than the text encoder reads.

    What lies below, and still has more than `TEXT_LIMIT` tokens, is cut by the encoder with a warning.

    Raises:
        UserError: more than `TEXT_LIMIT` words or `MAX_CHARACTERS` characters.
    """
    words = len(text.split())  # a word is at least one token
    if words > TEXT_LIMIT:
        raise UserError(f"{what} has {words} words, and the text encoder reads {TEXT_LIMIT} tokens; shorten it")
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{what} has {len(text)} characters, and {MAX_CHARACTERS} is the most; shorten it")
