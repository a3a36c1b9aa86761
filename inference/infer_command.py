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

from inference.requests import MANIFEST, InferOptions, Request, check_length, check_seconds, check_seed, read_requests
from inference.torchrun import ranks, together, wait_for_all
from magihuman.errors import UserError
from magihuman.io.files import require_writable
from magihuman.io.text import prompt_text

if TYPE_CHECKING:
    from inference.jobs import Job
    from inference.loading import Source
    from inference.pipeline import Pipeline

MAX_BATCH = 1000
# Prompts that are encoded before the clips of all of them are made, so that the text encoder, the largest network of
# all, comes to the device once for many clips, and their features take little memory.
TEXTS_AHEAD = 64


def run(options: InferOptions) -> None:
    """Generate the clips that the options ask for, and print a summary.

        run(InferOptions(prompt="round face, says ma", output="x.mp4"))

    Raises:
        UserError: bad input; found before any weights are loaded wherever that is possible.
    """
    from inference.jobs import Resolver, batches
    from inference.loading import find
    from magihuman.codecs.bundle import bundle_spec

    options, requests, folder = _checked(options)
    rank, processes, _ = ranks()
    shared = processes > 1 and options.prompts is None
    with _plain_warnings():
        source = find(replace(options, negative_prompt=_negative_prompt(options), negative_prompt_file=None), shared)
        resolver = Resolver(source, folder)
        jobs = [resolver.job(request) for request in requests]
        manifest = None if options.prompts is None else folder / MANIFEST
        if shared:
            check_heads(source, processes)
        longest = max((job.path for job in jobs), key=lambda path: len(os.fsencode(path.name)))
        require_writable(longest.with_suffix(".json"), "output")  # the longer ending
        with together(processes):
            finished = {} if manifest is None else {job.request.name: job.finished() for job in jobs}
            waiting = {job.request.name for job in jobs if finished.get(job.request.name) is None}
            mine = jobs if shared else jobs[rank::processes]
            own = waiting & {job.request.name for job in mine}
            size = options.batch or bundle_spec(source.config.codecs).batch
            if source.device.type == "cuda":
                from inference.memory.memory_check import check_fits

                settings = [job.settings for job in mine if job.request.name in own]
                check_fits(source, settings, min(size, len(mine)))
            start, pipeline = time.perf_counter(), source.load() if own else None
            times = {"load": time.perf_counter() - start}
            _prepare(folder, jobs, manifest, finished, rank)
            try:
                if pipeline is not None:
                    resolver.check_prompts(pipeline.codecs, [r.prompt for r in requests if r.name in waiting])
                    if shared:
                        parallelise_pipeline(pipeline)
                    written = own if rank == 0 or not shared else set()
                    bar = options.progress and rank == 0
                    _make(pipeline, batches(mine, size), own, written, manifest, bar)
                    times |= pipeline.times
                wait_for_all()  # the page shows the clips of all processes
            finally:
                if options.gallery and rank == 0:  # a run that is stopped leaves one, too
                    from inference.gallery import write_page

                    write_page(folder, requests)
    share = f", process {rank} of {processes}" if processes > 1 else ""
    before = f", {len(mine) - len(own)} done before" if len(mine) > len(own) else ""
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items())
    total = sum(times.values())
    print(f"{options.output}{share}: {len(own)} made{before} in {total:.1f} s ({stages})", file=sys.stderr)


def _checked(options: InferOptions) -> tuple[InferOptions, list[Request], Path]:
    """The options with seconds= as a number or "auto", the requests, and the folder for their files."""
    if options.batch is not None and not 1 <= options.batch <= MAX_BATCH:
        raise UserError(f"batch={options.batch} is impossible; give 1 to {MAX_BATCH}")
    image, audio = options.image, options.audio
    for key, file in (("image", image), ("audio", audio)):
        if file is not None and not Path(file).is_file():
            raise UserError(f"{key}={file} does not exist")
    seed = check_seed(options.seed, "the command line")
    requests, folder = _requests(options.prompt, options.prompts, options.output, seed)
    requests = [replace(r, image=r.image or image, audio=r.audio or audio) for r in requests]
    if options.gallery:
        from inference.gallery import check_page

        if options.prompts is None:
            raise UserError("gallery=true is for many clips, with prompts=FILE")
        check_page(folder)
    seconds = options.seconds  # text, from the command line
    if seconds is not None:
        try:
            seconds = float(seconds)  # its range is judged with the checkpoint
        except ValueError:
            seconds = check_seconds(seconds, "the command line")
    return replace(options, seconds=seconds), requests, folder


def check_heads(source: "Source", processes: int) -> None:
    """Raises UserError when a network of the command cannot be split over that many processes."""
    from magihuman.context_parallel import require_divisible_heads

    for config in (source.config, source.second):
        if config is not None:
            require_divisible_heads(config.model, processes)


def parallelise_pipeline(pipeline: "Pipeline") -> None:
    """Make the pipeline's networks compute together with those of the other processes.

    Every process reads the same prompt, draws the same noise and ends with the same latents.
    """
    from torch import distributed

    from magihuman.context_parallel import parallelise

    group = distributed.new_group(backend="nccl") if pipeline.device.type == "cuda" else None
    for denoiser in (pipeline.denoiser, None if pipeline.second is None else pipeline.second.denoiser):
        if denoiser is not None:
            parallelise(denoiser.model, group)


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


def _negative_prompt(options: InferOptions) -> str | None:
    """The negative prompt of the options, read from its file where they name one."""
    text, file = options.negative_prompt, options.negative_prompt_file
    if text is not None and file is not None:
        raise UserError("give negative_prompt= or negative_prompt_file=, not both")
    if file is not None:
        from inference.conditioning import read_negative_prompt
        from inference.jobs import note

        text, warning = read_negative_prompt(file)
        if warning is not None:
            note(warning)
    if text is not None and file is None:
        text = text.strip()
    return text


def _requests(prompt: str | None, prompts: str | None, output: str | None, seed: int) -> tuple[list[Request], Path]:
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
    try:
        prompt = prompt_text(prompt)
    except ValueError as error:
        raise UserError(f"the prompt {error}") from None
    check_length(prompt, "the prompt")
    if path.suffix != ".mp4" or path.is_dir():
        raise UserError(f"output={output} must be a file that ends in .mp4")
    return [Request(path.stem, prompt, seed)], path.parent


def _prepare(folder: Path, jobs: list["Job"], manifest: Path | None, finished: dict[str, Any], rank: int) -> None:
    """The folder, and a manifest that says what is done; by one process, after all have looked."""
    from inference.jobs import remove_leftovers, repair_manifest

    wait_for_all()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            remove_leftovers(folder, jobs)
            if manifest is not None:
                repair_manifest(manifest, finished)
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from error
    wait_for_all()  # nobody adds lines while the manifest is replaced


def _make(
    pipeline: "Pipeline",
    parts: list[list["Job"]],
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

    from inference.jobs import texts_of, write

    made = 0
    parts = [part for part in parts if any(job.request.name in waiting for job in part)]
    chosen = [job.settings for part in parts for job in part]
    ahead = max(1, TEXTS_AHEAD // max(map(len, parts), default=1))
    total = sum(each.steps + (each.sr.steps if each.sr else 0) for each in chosen)
    with tqdm(total=total, unit="step", disable=not (progress and parts)) as bar:
        # In a log every redraw would be a line.
        show = partial(bar.set_description, refresh=sys.stderr.isatty())
        for number, part in enumerate(parts):
            if number % ahead == 0:
                pipeline.encode_texts(texts_of([job for later in parts[number : number + ahead] for job in later]))
            settings, requests = part[0].settings, [job.request for job in part]
            here = f"clip {made + 1} of {len(waiting)}"

            def advance(stage: str, step: int, of: int, count: int = len(part), here: str = here) -> None:
                show(f"{here}, {stage} {step}/{of}")
                bar.update(count)

            show(here)
            drafts = pipeline.draft(
                [request.prompt for request in requests],
                [request.seed for request in requests],
                settings,
                [r.image for r in requests if r.image] or None,
                [r.audio for r in requests if r.audio] or None,
                advance,
            )
            show(f"{here}, decode and write")
            for job, draft in zip(part, drafts, strict=True):
                if job.request.name in written:
                    write(job, partial(pipeline.write, draft), manifest)
                    made += 1
