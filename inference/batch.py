"""The command `python -m magihuman.infer`: requests in, clips on disk, a summary at the end."""

import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.prompts import Request, check_seed, read_requests
from inference.records import FORMAT, MANIFEST, Job, repair_manifest, write
from magihuman.errors import UserError
from magihuman.provenance import file_hash, fingerprint

if TYPE_CHECKING:
    from inference.pipeline import Pipeline, Settings
    from magihuman.flow.guidance import Guidance


def run(
    checkpoint: str = "tiny/base",
    prompt: str | None = None,
    prompts: str | None = None,
    output: str | None = None,
    seed: int = 42,
    steps: int | None = None,
    solver: str | None = None,
    cfg: float | dict[str, float] | None = None,
    shift: float | None = None,
    negative_prompt: str | None = None,
    image: str | None = None,
    audio: str | None = None,
    seconds: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch: int = 8,
    device: str = "auto",
    dtype: str | None = None,
    progress: bool = True,
) -> None:
    """Generate video clips with sound from text.

    Writes H.264 + AAC mp4, and beside each a JSON record with all that is needed to make it again. The same
    command on the same machine gives the same bytes. With prompts= a run that was stopped continues where it
    was: clips that are done are skipped.

    Args:
        checkpoint: a name of `python -m magihuman.zoo list`, an exported folder, or a run folder
        prompt: what to show and say
        prompts: a file of many: .txt (one a line), .jsonl or .csv (prompt, and if you like seed, name, image,
            audio, seconds, negative_prompt)
        output: the mp4 to write; with prompts= the folder
        seed: of the noise; prompt i of a file gets seed + i unless it has its own
        steps: solver steps; none takes the checkpoint's setting, as for all that follow
        solver: unipc, renoise (distilled models), euler or sde
        cfg: guidance scale, 1 is off; or by part:
            cfg="{video_high: 5, video_low: 2, threshold: 500, audio: 5}"
        shift: of the noise levels; higher spends more steps on noisy ones
        negative_prompt: what to stay away from
        image: picture for the first frame, cropped to the clip's shape
        audio: sound file or clip whose sound is used, cut or padded to the clip's length
        seconds: length, rounded to the nearest possible number of frames
        height: of the clip in pixels
        width: of the clip in pixels
        batch: clips of a prompt file that are computed at once
        device: auto, cpu, cuda or cuda:N
        dtype: of the network: float32 or bfloat16; none is bfloat16 on a GPU, float32 on the CPU
        progress: show a progress bar

    Raises:
        UserError: bad input; found before the first clip is made wherever that is possible.
    """
    if batch < 1:
        raise UserError(f"batch={batch} is impossible; give at least 1")
    for key, file in (("image", image), ("audio", audio)):
        if file is not None and not Path(file).is_file():
            raise UserError(f"{key}={file} does not exist")
    requests, folder = _requests(prompt, prompts, output, check_seed(seed, "the command line"))
    requests = [replace(r, image=r.image or image, audio=r.audio or audio) for r in requests]
    start = time.perf_counter()
    pipeline = _load(checkpoint, device, dtype)
    loaded = time.perf_counter() - start
    overrides = {
        "steps": steps,
        "solver": solver,
        "guidance": guidance_from(cfg),
        "shift": shift,
        "negative_prompt": None if negative_prompt is None else negative_prompt.strip(),
        "seconds": seconds,
        "height": height,
        "width": width,
    }
    jobs = _jobs(pipeline, checkpoint, requests, folder, overrides)
    manifest = None if prompts is None else folder / MANIFEST
    waiting = _unfinished(jobs, folder, manifest)
    written = _make(pipeline, batches(jobs, batch), waiting, manifest, progress)
    _summary(output, len(waiting), len(jobs), {"load": loaded, **pipeline.times, "write": written})


def _requests(
    prompt: str | None, prompts: str | None, output: str | None, seed: int
) -> tuple[list[Request], Path]:
    """The requests, and the folder for their files."""
    if (prompt is None) == (prompts is None):
        raise UserError('give either prompt="what to show and say" or prompts=FILE')
    if output is None:
        example = "clip.mp4" if prompts is None else "clips"
        raise UserError(f"say where to write, for example output={example}")
    path = Path(output)
    if prompts is not None:
        if (path.exists() and not path.is_dir()) or path.suffix.lower() == ".mp4":
            raise UserError(f"output={output} must be a folder, since prompts= makes many files")
        return read_requests(prompts, seed), path
    if prompt is None or not prompt.strip():
        raise UserError('the prompt is empty; say what to show, for example prompt="round face, says ma"')
    if path.suffix != ".mp4" or path.is_dir():
        raise UserError(f"output={output} must be a file that ends in .mp4")
    return [Request(path.stem, prompt, seed)], path.parent


def _load(checkpoint: str, device: str, dtype: str | None) -> "Pipeline":
    import torch

    from inference.pipeline import Pipeline
    from magihuman import zoo
    from magihuman.world import load_world

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"device={device} is unknown; choose auto, cpu, cuda or cuda:0")
    if device != "cpu" and torch.device(device).index not in (None, *range(torch.cuda.device_count())):
        raise UserError(f"device={device}, but torch sees {torch.cuda.device_count()} GPUs here")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch finds no GPU here; use device=cpu")
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype={dtype} is unknown; choose float32 or bfloat16")
    loaded = zoo.load(checkpoint, device, None if dtype is None else getattr(torch, dtype))
    return Pipeline(loaded, load_world(loaded.config.world, device))


def guidance_from(cfg: float | dict[str, float] | None) -> "Guidance | float | None":
    """The setting cfg=: a number for everything, or fields of `Guidance`.

    Raises:
        UserError: fields that are none, or no numbers.
    """
    if not isinstance(cfg, dict):
        return cfg
    from magihuman.flow.guidance import Guidance

    if not all(isinstance(value, int | float) for value in cfg.values()):
        raise UserError(
            f'cfg={cfg} needs numbers, for example cfg="{{video_high: 5, video_low: 2, audio: 5}}"'
        )
    return Guidance.from_dict(cfg)


def _jobs(
    pipeline: "Pipeline", checkpoint: str, requests: list[Request], folder: Path, overrides: dict[str, Any]
) -> list[Job]:
    """Resolve every request; conditions are read once, so that bad ones stop the run at its start."""
    from inference.conditions import read_picture, read_sound

    hashes: dict[str, str] = {}
    checked: set[tuple[Any, ...]] = set()
    codec = pipeline.world.audio_codec

    def described(path: str | None) -> dict[str, str] | None:
        if path is None:
            return None
        if path not in hashes:
            hashes[path] = file_hash(Path(path))
        return {"path": path, "sha256": hashes[path]}

    parent = {"name": checkpoint, **fingerprint(pipeline.folder)}
    jobs = []
    for request in requests:
        own = {"seconds": request.seconds, "negative_prompt": request.negative_prompt}
        settings = pipeline.settings(**overrides | {k: v for k, v in own.items() if v is not None})
        for read, wanted in (
            (read_picture, (request.image, settings.height, settings.width)),
            (read_sound, (request.audio, codec.sample_rate, codec.waveform_channels, codec.hop)),
        ):
            if wanted[0] is not None and wanted not in checked:
                read(*wanted)
                checked.add(wanted)
        identity = {
            "format": FORMAT,
            "prompt": request.prompt,
            "seed": request.seed,
            "image": described(request.image),
            "audio": described(request.audio),
            "settings": settings.to_dict(),
            "checkpoint": parent,
            "dtype": pipeline.dtype,
            "device": pipeline.device.type,
        }
        path = folder / f"{request.name}.mp4"
        jobs.append(
            Job(request, settings, identity, path, _command(pipeline, checkpoint, request, settings, path))
        )
    return jobs


def _command(
    pipeline: "Pipeline", checkpoint: str, request: Request, settings: "Settings", path: Path
) -> list[str]:
    """The command line that makes this clip alone, every setting written out."""
    scales = settings.guidance.to_dict()
    values: dict[str, Any] = {
        "checkpoint": checkpoint,
        "prompt": request.prompt,
        # On the command line nothing means the checkpoint's own, a space means nothing.
        "negative_prompt": settings.negative_prompt or " ",
        "output": path,
        "seed": request.seed,
        "steps": settings.steps,
        "solver": settings.solver,
        "shift": settings.shift,
        "cfg": "{" + ", ".join(f"{key}: {value}" for key, value in scales.items()) + "}",
        "seconds": settings.frames / pipeline.world.contract.fps,
        "height": settings.height,
        "width": settings.width,
        "image": request.image,
        "audio": request.audio,
        "device": pipeline.device.type,
        "dtype": pipeline.dtype,
    }
    given = [f"{key}={value}" for key, value in values.items() if value is not None]
    return ["python", "-m", "magihuman.infer", *given]


def _unfinished(jobs: list[Job], folder: Path, manifest: Path | None) -> set[str]:
    """Names of the clips to make: all without a manifest (a command for one file makes that file)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if manifest is None:
            return {job.request.name for job in jobs}
        finished = {job.request.name: job.finished() for job in jobs}
        repair_manifest(manifest, finished)
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from error
    return {name for name, record in finished.items() if record is None}


def batches(jobs: list[Job], size: int) -> list[list[Job]]:
    """Neighbours that can be computed together: same settings, same kinds of condition, at most `size`."""
    parts: list[list[Job]] = []
    for job in jobs:
        if not parts or len(parts[-1]) == size or _kind(job) != _kind(parts[-1][0]):
            parts.append([])
        parts[-1].append(job)
    return parts


def _kind(job: Job) -> tuple[Any, ...]:
    return job.settings, job.request.image is None, job.request.audio is None


def _make(
    pipeline: "Pipeline", parts: list[list[Job]], waiting: set[str], manifest: Path | None, progress: bool
) -> float:
    """Generate the batches in which a clip is waiting, and write what is waiting.

    A batch that was half done is computed as a whole: its members' last bits depend on each other, and a run
    that was killed shall end with the same files as one that ran through.

    Returns:
        seconds spent writing.
    """
    import torch
    from tqdm import tqdm

    written, made = 0.0, 0
    parts = [part for part in parts if any(job.request.name in waiting for job in part)]
    total = sum(job.settings.steps for part in parts for job in part)
    with tqdm(total=total, unit="step", disable=not (progress and parts)) as bar:
        for part in parts:
            bar.set_description(f"clip {made + 1} of {len(waiting)}")
            settings = part[0].settings
            images = [pipeline.encode_image(job.request.image, settings) for job in part if job.request.image]
            sounds = [pipeline.encode_audio(job.request.audio, settings) for job in part if job.request.audio]

            def advance(*_: Any, count: int = len(part)) -> None:
                bar.update(count)

            clips = pipeline.make(
                [job.request.prompt for job in part],
                [job.request.seed for job in part],
                settings,
                torch.cat(images) if images else None,
                torch.cat(sounds) if sounds else None,
                advance,
            )
            start = time.perf_counter()
            for job, clip in zip(part, clips, strict=True):
                if job.request.name in waiting:
                    write(job, clip, manifest)
                    made += 1
            written += time.perf_counter() - start
    return written


def _summary(output: str | None, made: int, asked: int, times: dict[str, float]) -> None:
    before = f", {asked - made} done before" if asked > made else ""
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items())
    print(f"{output}: {made} made{before} in {sum(times.values()):.1f} s ({stages})", file=sys.stderr)
