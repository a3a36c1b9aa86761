"""The command `python -m magihuman.infer`: requests in, clips on disk, a summary at the end."""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.records import MANIFEST, Job, repair_manifest, write
from inference.requests import Request, check_length, check_seconds, check_seed, read_requests
from magihuman.errors import UserError

if TYPE_CHECKING:
    from inference.pipeline import Pipeline
    from magihuman.flow.guidance import Guidance


def run(
    checkpoint: str = "tiny/base",
    lora: str | None = None,
    prompt: str | None = None,
    prompts: str | None = None,
    output: str | None = None,
    seed: int = 42,
    steps: int | None = None,
    solver: str | None = None,
    cfg: float | dict[str, float] | None = None,
    cfg_passes: int = 1,
    shift: float | None = None,
    negative_prompt: str | None = None,
    negative_prompt_file: str | None = None,
    image: str | None = None,
    audio: str | None = None,
    seconds: float | str | None = None,
    resolution: str | None = None,
    height: int | None = None,
    width: int | None = None,
    sr: str | None = None,
    sr_steps: int | None = None,
    sr_cfg: float | None = None,
    sr_height: int | None = None,
    sr_width: int | None = None,
    turbo: str | None = None,
    tile: int | None = None,
    codecs: str | None = None,
    video_codec: str | None = None,
    audio_codec: str | None = None,
    text_encoder: str | None = None,
    batch: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    memory: str = "fast",
    weights: str | None = None,
    tier: str | None = None,
    compat: str | None = None,
    gallery: bool = False,
    progress: bool = True,
) -> None:
    """Generate video clips with sound from text.

    Writes H.264 + AAC mp4, and beside each a JSON record with all that is needed to make it again. The same
    command on the same machine gives the same bytes. With prompts= a run that was stopped continues where it
    was: clips that are done are skipped. Started by torchrun, each process makes its share of the prompts; with
    prompt= all of them compute the one clip together.

    Args:
        checkpoint: a name of `python -m magihuman.zoo list`, an exported folder, a run folder, or a folder of
            the published weights
        lora: adapter that changes it: the folder adapter/ of a run with recipe=lora, or the run
        prompt: what to show and say, up to 640 tokens
        prompts: a file of many: .txt (one a line), .jsonl or .csv (prompt, and if you like seed, name, image,
            audio, seconds, negative_prompt)
        output: the mp4 to write; with prompts= the folder
        seed: of the noise; prompt i of a file gets seed + i unless it has its own
        steps: solver steps; none takes the checkpoint's setting, as for all that follow
        solver: unipc, renoise (distilled models), euler or sde
        cfg: guidance scale, 1 is off; or by part:
            cfg="{video_high: 5, video_low: 2, threshold: 500, audio: 5}"
        cfg_passes: 1 computes both sides of the guidance at once, 2 one after the other in less memory
        shift: of the noise levels; higher spends more steps on noisy ones
        negative_prompt: what to stay away from
        negative_prompt_file: the same from a text file; the released one is recognised by its hash
        image: picture for the first frame, cropped to the clip's shape
        audio: sound file or clip whose sound is used, cut to the clip's length; it is the clip's sound
        seconds: length, rounded to the nearest possible number of frames; auto takes the given sound's, or what
            the prompt's dialogue needs in its language
        resolution: 256p, 540p or 1080p with the published weights (the second stage is found beside the base)
        height: of the clip in pixels, before super-resolution
        width: of the clip in pixels, before super-resolution
        sr: checkpoint of the second stage (super-resolution): tiny/sr, a run folder, the folder 540p_sr or 1080p_sr
        sr_steps: its solver steps
        sr_cfg: its guidance scale, 1 is off; the release also knows 3.5
        sr_height: of the finished clip in pixels
        sr_width: of the finished clip in pixels
        turbo: a small, fast decoder: a name of `python -m magihuman.zoo list`, an exported folder, a run folder, or
            the folder turbo_vae of the published weights
        tile: decode in tiles of so many pixels a side, for cards that cannot hold the whole picture; none is whole
        codecs: package.module:function of your own codecs, for checkpoints that were trained with them; imports that code
        video_codec: Wan 2.2 VAE for the published weights; none takes MAGIHUMAN_WAN_VAE
        audio_codec: Stable Audio Open for the published weights; none takes MAGIHUMAN_STABLE_AUDIO
        text_encoder: T5-Gemma for the published weights; none takes MAGIHUMAN_T5GEMMA
        batch: clips of a prompt file that are computed at once; none is 8, with the published weights 1
        device: auto, cpu, cuda or cuda:N
        dtype: of the network: float32 or bfloat16; none is bfloat16 on a GPU, float32 on the CPU
        memory: fast (all on the GPU), balanced (one stage at a time) or low (layer by layer)
        weights: store the network's matrices in bf16, fp8 or int4; none keeps them
        tier: how the network is computed: reference, exact (the same bits, sooner), fast (the same mathematics in
            another order); approximate: fp8, fp8_attention, cached (for many steps); none is exact on the CPU,
            reference on a GPU
        compat: o2 lets unguided sampling change the given sound, as the released code does
        gallery: with prompts=: also write index.html into the folder, a page of its clips for any browser
        progress: show a progress bar

    Raises:
        UserError: bad input; found before any weights are loaded wherever that is possible.
    """
    from inference.distributed import check_spread, spread
    from inference.gallery import check_page, write_page
    from inference.jobs import Resolver, batches
    from inference.loading import find, ranks
    from inference.memory.memory_check import check_room
    from magihuman.codecs.bundle import bundle_spec

    if batch is not None and batch < 1:
        raise UserError(f"batch={batch} is impossible; give at least 1")
    for key, file in (("image", image), ("audio", audio)):
        if file is not None and not Path(file).is_file():
            raise UserError(f"{key}={file} does not exist")
    requests, folder = _requests(prompt, prompts, output, check_seed(seed, "the command line"))
    requests = [replace(r, image=r.image or image, audio=r.audio or audio) for r in requests]
    if gallery:
        if prompts is None:
            raise UserError("gallery=true is for many clips, with prompts=FILE")
        check_page(folder)
    rank, processes, _ = ranks()
    shared = processes > 1 and prompts is None
    with _plain_warnings():
        paths = {"video_codec": video_codec, "audio_codec": audio_codec, "text_encoder": text_encoder}
        source = find(
            checkpoint,
            sr,
            turbo,
            resolution,
            tile,
            device=device,
            dtype=dtype,
            memory=memory,
            weights=weights,
            codecs=codecs,
            codec_paths=paths,
            lora=lora,
            tier=tier,
            shared=shared,
        )
        overrides = {
            "steps": steps,
            "solver": solver,
            "guidance": guidance_from(cfg),
            "cfg_passes": cfg_passes,
            "shift": shift,
            "negative_prompt": _negative(negative_prompt, negative_prompt_file),
            "seconds": _number(seconds),
            "resolution": resolution,
            "height": height,
            "width": width,
            "sr_steps": sr_steps,
            "sr_guidance": sr_cfg,
            "sr_height": sr_height,
            "sr_width": sr_width,
            "compat": compat,
        }
        resolver = Resolver(source, folder, overrides)
        jobs = [resolver.job(request) for request in requests]
        manifest = None if prompts is None else folder / MANIFEST
        if shared:
            check_spread(source, processes)
        _check_folder(folder)
        with together(processes):
            finished = {} if manifest is None else {job.request.name: job.finished() for job in jobs}
            waiting = {job.request.name for job in jobs if finished.get(job.request.name) is None}
            mine = jobs if shared else jobs[rank::processes]
            own = waiting & {job.request.name for job in mine}
            size = batch or bundle_spec(source.config.codecs).batch
            check_room(
                source, [job.settings for job in mine if job.request.name in own], min(size, len(mine))
            )
            start, pipeline = time.perf_counter(), source.load() if own else None
            times = {"load": time.perf_counter() - start}
            _prepare(folder, manifest, finished, rank)
            try:
                if pipeline is not None:
                    resolver.check_prompts(pipeline.codecs, [r.prompt for r in requests if r.name in waiting])
                    if shared:
                        spread(pipeline)
                    written = own if rank == 0 or not shared else set()
                    _make(pipeline, batches(mine, size), own, written, manifest, progress and rank == 0)
                    times |= pipeline.times
                meet()  # the page shows the clips of all processes
            finally:
                if gallery and rank == 0:  # a run that is stopped leaves one, too
                    write_page(folder, requests)
    share = f", process {rank} of {processes}" if processes > 1 else ""
    _summary(f"{output}{share}", len(own), len(mine), times)


@contextmanager
def together(processes: int) -> Iterator[None]:
    """Start and end with all processes of a torchrun command; nothing for one process."""
    if processes == 1:
        yield
        return
    from torch import distributed

    distributed.init_process_group("gloo")
    try:
        yield
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def meet() -> None:
    """Wait for all processes inside `together`."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as lines for people, without file names and code."""
    from inference.jobs import note

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and not issubclass(category, DeprecationWarning | FutureWarning):
            note(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _negative(text: str | None, file: str | None) -> str | None:
    from inference.conditioning import read_negative_prompt
    from inference.jobs import note

    if text is not None and file is not None:
        raise UserError("give negative_prompt= or negative_prompt_file=, not both")
    if file is not None:
        text, warning = read_negative_prompt(file)
        if warning is not None:
            note(warning)
    if text is not None:
        text = text.strip() if file is None else text
        check_length(text, "the negative prompt")
    return text


def _number(seconds: float | str | None) -> float | str | None:
    """The setting seconds=, which reaches us as text."""
    if seconds is None:
        return None
    try:
        return float(seconds)  # its range is judged with the checkpoint
    except ValueError:
        return check_seconds(seconds, "the command line")


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
    check_length(prompt, "the prompt")
    if path.suffix != ".mp4" or path.is_dir():
        raise UserError(f"output={output} must be a file that ends in .mp4")
    return [Request(path.stem, prompt, seed)], path.parent


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


def _check_folder(folder: Path) -> None:
    """Raises UserError where a folder cannot be made or written, without making it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write to the folder {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to the folder {folder}: no permission")


def _prepare(folder: Path, manifest: Path | None, finished: dict[str, Any], rank: int) -> None:
    """The folder, and a manifest that says what is done; by one process, after all have looked."""
    meet()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if manifest is not None and rank == 0:
            repair_manifest(manifest, finished)
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from error
    meet()  # nobody adds lines while the manifest is replaced


def _make(
    pipeline: "Pipeline",
    parts: list[list[Job]],
    waiting: set[str],
    written: set[str],
    manifest: Path | None,
    progress: bool,
) -> None:
    """Generate the batches in which a clip is waiting, and write those that this process has to write.

    A batch that was half done is computed as a whole: its members' last bits depend on each other, and a run
    that was killed shall end with the same files as one that ran through.
    """
    from tqdm import tqdm

    made = 0
    parts = [part for part in parts if any(job.request.name in waiting for job in part)]
    # All texts at once: the text encoder, the largest network of all, comes once.
    pipeline.text([job.request.prompt for part in parts for job in part])
    pipeline.text([j.settings.negative_prompt for part in parts for j in part if j.settings.needs_negative])
    total = sum(_steps(job) for part in parts for job in part)
    with tqdm(total=total, unit="step", disable=not (progress and parts)) as bar:
        for part in parts:
            settings, requests = part[0].settings, [job.request for job in part]
            here = f"clip {made + 1} of {len(waiting)}"

            def advance(stage: str, step: int, of: int, count: int = len(part), here: str = here) -> None:
                bar.set_description(f"{here}, {stage} {step}/{of}")
                bar.update(count)

            bar.set_description(here)
            drafts = pipeline.draft(
                [request.prompt for request in requests],
                [request.seed for request in requests],
                settings,
                [r.image for r in requests if r.image] or None,
                [r.audio for r in requests if r.audio] or None,
                advance,
            )
            bar.set_description(f"{here}, decode and write")
            for job, draft in zip(part, drafts, strict=True):
                if job.request.name in written:
                    write(job, partial(pipeline.write, draft), manifest)
                    made += 1


def _steps(job: Job) -> int:
    return job.settings.steps + (job.settings.sr.steps if job.settings.sr else 0)


def _summary(output: str, made: int, asked: int, times: dict[str, float]) -> None:
    before = f", {asked - made} done before" if asked > made else ""
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items())
    print(f"{output}: {made} made{before} in {sum(times.values()):.1f} s ({stages})", file=sys.stderr)
