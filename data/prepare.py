"""Preparation of training data: a folder of media files to webdataset shards of latents, text features and metadata.

    python -m data.prepare input=VIDEOS output=SHARDS [codecs=tiny] [workers=2]

A run that was stopped, even by SIGKILL, resumes when the same command is given again. The bytes of the shards depend
neither on interruptions nor on the number of workers.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from data.captions import read_tables
from data.clip_plan import ClipPlan, Rules, check_lengths, make_plan, pair_sizes, parse_sizes
from data.prepare_report import PrepareReport, make_report
from data.scan import Listing, MediaFile, find_duplicates, list_files
from data.shards import INDEX, NULL_TEXT, Entry, Index
from data.worker_pool import Workers
from magihuman.errors import UserError
from magihuman.io.files import locked, write_atomically

WORK = ".work"  # folder inside the output with the state of an unfinished run
PROBED = "seen.jsonl"  # in it: the result of probing each file
PROBE_CHUNK = 32  # files per probing task
PRELOADED = ("data.encode", "torch", "webdataset.writer", "magihuman.codecs.bundle")  # once for all workers


def prepare(
    input: str,
    output: str,
    codecs: str = "tiny",
    workers: int = 0,
    device: str = "cpu",
    sizes: str | None = None,
    sr_sizes: str | None = None,
    frames: str | None = None,
    captions: Literal["required", "optional"] = "required",
    table: str | None = None,
    silent: bool = False,
    images: bool = False,
    pixels: bool = False,
    duplicates: Literal["skip", "keep"] = "skip",
    max_crop: float = 0.5,
    max_enlarge: float = 2.0,
    max_windows: int | None = None,
    shard_clips: int = 100,
    batch: int = 8,
    progress: bool = True,
) -> PrepareReport:
    """Encode a folder of media files to shards of latents.

    Captions come from a .txt next to each file or from a .csv, .tsv or .jsonl with a file and a caption column. Long
    files are cut into several clips. Files that cannot be used are listed in report.md with the reason.

    Args:
        input: folder of video files, searched with its subfolders
        output: folder for the shards, made if it does not exist
        codecs: codecs and text encoder: tiny, released, or package.module:function for your own
        workers: processes, 0 for one per CPU core, or a single one with device=cuda
        device: where the codecs run: cpu, cuda, cuda:1
        sizes: width x height choices such as 448x256,256x448; a clip gets the one with the nearest aspect ratio
        sr_sizes: sizes of the second stage, one for each of sizes, such as 896x512,512x896; clips are stored
            at both, for training super-resolution
        frames: lengths to cut to, such as 101,49,25; none for the usual length of the codecs
        captions: required rejects files without a caption, optional accepts them with an empty one
        table: a caption table elsewhere than in the input folder
        silent: accept clips without audio; their audio is masked in training
        images: accept still images as clips of one frame
        pixels: store the frames too, for training a decoder; 7 to 27 times the space
        duplicates: skip or keep files with the same bytes
        max_crop: share of a frame's area that cropping to a size may remove
        max_enlarge: largest factor of upscaling
        max_windows: clips per file at most, none for all
        shard_clips: clips per shard
        batch: clips per encoder call
        progress: show a bar

    Raises:
        UserError: a folder that cannot be used, a setting out of range, or no usable clip.
    """
    settings = {key: value for key, value in locals().items() if key not in ("workers", "progress", "device")}
    source, target = Path(input).absolute(), Path(output).absolute()
    if not source.is_dir():
        raise UserError(f"input={input} is not a folder; give the folder that holds the video files")
    for name, value in (("shard_clips", shard_clips), ("batch", batch), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} is out of range; give at least 1")
    if workers < 0 or not 0 <= max_crop < 1 or max_enlarge <= 0:
        raise UserError("workers must not be negative, max_crop in [0, 1), max_enlarge above 0")
    if table is not None and not Path(table).is_file():
        raise UserError(f"table={table} is not a file; give a .csv, .tsv or .jsonl")
    with _claimed(target) as work:
        task = _Preparation(source, target, work, settings, device, progress)
        workers = workers or ((os.cpu_count() or 1) if device == "cpu" else 1)
        try:
            with Workers(workers, work, task.crashed, PRELOADED) as pool:
                return task.run(pool)
        except OSError as error:
            raise UserError(
                f"output={output} cannot be written ({error.strerror}); make room and give the same command again"
            ) from error


@contextmanager
def _claimed(output: Path) -> Iterator[Path]:
    """The work folder, locked against a second run at the same time."""
    work, new = output / WORK, not output.exists()
    with ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(work / "lock", wait=False))
        except BlockingIOError:
            raise UserError(f"another data.prepare is writing to {output}; wait for it or choose another") from None
        except OSError as error:
            raise UserError(f"output={output} cannot be written ({error.strerror}); choose another folder") from error
        _sweep(output)
        try:
            yield work
        except UserError:
            # Without state that a next run could use, nothing stays behind.
            if new and list(output.iterdir()) == [work] and not (work / PROBED).exists():
                shutil.rmtree(output)
            raise
        _sweep(output)


def _sweep(output: Path) -> None:
    """Remove files that killed processes left half-written."""
    for partial in output.glob(".*.part"):
        partial.unlink(missing_ok=True)


class _Preparation:
    """One run: probe the files, plan, encode the missing shards, report."""

    def __init__(
        self, source: Path, target: Path, work: Path, settings: dict[str, Any], device: str, bar: bool
    ) -> None:
        self.source, self.target, self.work, self.settings = source, target, work, settings
        self.device, self.bar = device, bar
        crashed = work / "crashed.json"
        self.crashed: set[str] = set(json.loads(crashed.read_text())) if crashed.exists() else set()

    def run(self, pool: Workers) -> PrepareReport:
        started = time.monotonic()
        listing = list_files(self.source, self.target)
        if not listing.media:
            raise UserError(f"input={self.source} holds no media file ({len(listing.ignored)} files of other kinds)")
        codecs = self._describe_codecs(pool)
        fps = codecs["contract"]["fps"]
        files = self._probe(pool, listing.media)
        table = self.settings["table"]
        tables = read_tables([*listing.tables, *([Path(table).absolute()] if table else [])])
        duplicates = {} if self.settings["duplicates"] == "keep" else find_duplicates(files)
        plan = make_plan(files, tables, duplicates, self._rules(codecs))
        fingerprint = self._claim_output(files, plan, codecs)
        if (self.target / INDEX).exists():
            shutil.rmtree(self.work)
            return PrepareReport.load(self.target)
        (self.work / NULL_TEXT).replace(self.target / NULL_TEXT)
        entries, rejected, shards = self._encode(pool, plan)
        listing = Listing(files, listing.tables, listing.ignored)
        shown = {key: value for key, value in self.settings.items() if value is not None}
        report = make_report(shown, listing, tables, self.source, plan, entries, rejected, fps)
        report.save(self.target)
        if not entries:
            most = f"; most often: {report.reasons[0][0]}" if report.reasons else ""
            raise UserError(f"no clip of {self.source} could be used{most}; {self.target}/report.md says why, per file")
        Index(self.settings["codecs"], codecs["contract"], shards, fingerprint).save(self.target)
        shutil.rmtree(self.work)
        if self.bar:
            spent = time.monotonic() - started
            print(f"prepared in {spent:.1f} s, {1000 * spent / max(1, len(plan.clips)):.0f} ms a clip", file=sys.stderr)
        return report

    def _describe_codecs(self, pool: Workers) -> dict[str, Any]:
        from data.encode import describe_codecs

        payload = (self.settings["codecs"], self.device, str(self.work))
        return dict(pool.run(describe_codecs, {"codecs": payload}))["codecs"]

    def _rules(self, codecs: dict[str, Any]) -> Rules:
        chosen = self.settings
        sizes = str(chosen["sizes"] or f"{codecs['width']}x{codecs['height']}").replace(" ", "").split(",")
        try:
            lengths = [int(part) for part in str(chosen["frames"] or codecs["frames"]).split(",")]
        except ValueError as error:
            raise UserError(f"frames={chosen['frames']!r} should be numbers such as 101,49,25") from error
        stride, fps = codecs["contract"]["video_stride"], codecs["contract"]["fps"]
        small = parse_sizes(sizes, stride[1:])
        large = str(chosen["sr_sizes"] or "").replace(" ", "")
        return Rules(
            sizes=small, lengths=check_lengths(lengths, stride[0]), fps=fps,
            captions_required=chosen["captions"] == "required",
            large=pair_sizes(small, parse_sizes(large.split(","), stride[1:], "sr_sizes")) if large else (),
            **{key: chosen[key] for key in ("silent", "images", "max_crop", "max_enlarge", "max_windows")},
        )  # fmt: skip

    def _probe(self, pool: Workers, media: list[MediaFile]) -> list[MediaFile]:
        """Probe the files; results of an earlier, interrupted run are reused."""
        from tqdm import tqdm

        from data.encode import probe_files

        journal = self.work / PROBED
        seen = _read_journal(journal)
        known = {found.path: seen.get((found.path, found.size, found.modified)) for found in media}
        new = [found for found in media if known[found.path] is None]
        with tqdm(total=len(media), initial=len(media) - len(new), desc="probing", disable=not self.bar) as bar:
            chunks = {f"probe-{i:07d}": new[i : i + PROBE_CHUNK] for i in range(0, len(new), PROBE_CHUNK)}
            with open(journal, "a") as file:
                for _, results in pool.run(probe_files, chunks, bar.update):
                    self._save_crashed()
                    file.writelines(json.dumps(asdict(found)) + "\n" for found in results)
                    file.flush()
                    known |= {found.path: found for found in results}
        return [known[found.path] or found for found in media]

    def _save_crashed(self) -> None:
        if self.crashed:
            write_atomically(self.work / "crashed.json", json.dumps(sorted(self.crashed)), sync=True)

    def _claim_output(self, files: list[MediaFile], plan: ClipPlan, codecs: dict[str, Any]) -> str:
        """Raise an error if existing shards belong to another plan; returns the plan's fingerprint."""
        sizes = {found.relative: found.size for found in files}
        clips = [{**asdict(clip), "path": sizes[clip.relative]} for clip in plan.clips]
        settings = {key: value for key, value in self.settings.items() if key not in ("input", "output")}
        settings["world"] = settings.pop("codecs")  # the key when fingerprints of older shards were made
        content = json.dumps([clips, settings, codecs], sort_keys=True)
        fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        note = self.work / "plan.json"
        if (self.target / INDEX).exists():
            known = Index.load(self.target).fingerprint
        else:
            known = json.loads(note.read_text())["fingerprint"] if note.exists() else ""
        if known != fingerprint:
            if any(self.target.glob("*.tar")):
                raise UserError(
                    f"output={self.target} holds shards of other files or settings; delete it or choose another"
                )
            for manifest in self.work.glob("shard-*.json"):  # of a plan without clips
                manifest.unlink()
        write_atomically(note, json.dumps({"fingerprint": fingerprint}), sync=True)
        return fingerprint

    def _encode(
        self, pool: Workers, plan: ClipPlan
    ) -> tuple[list[Entry], dict[str, str], list[tuple[str, list[Entry]]]]:
        """Write the missing shards; returns all samples, rejections by key, and samples by shard."""
        from tqdm import tqdm

        from data.encode import EncodeJob, ShardJob, ShardResult, write_shard

        chosen, size = self.settings, self.settings["shard_clips"]
        job = EncodeJob(chosen["codecs"], self.device, chosen["silent"], chosen["batch"], chosen["pixels"])
        names = [f"shard-{i:06d}" for i in range(-(-len(plan.clips) // size))]
        slices = {name: plan.clips[i * size : (i + 1) * size] for i, name in enumerate(names)}
        results: dict[str, ShardResult] = {}
        for name in names:
            done = self._finished(name)
            if done is not None:
                results[name] = done
        todo = {
            name: ShardJob(str(self.target / f"{name}.tar"), slices[name], job) for name in names if name not in results
        }
        ready = sum(len(slices[name]) for name in results)
        with tqdm(total=len(plan.clips), initial=ready, desc="encoding", unit="clip", disable=not self.bar) as bar:
            for name, result in pool.run(write_shard, todo, bar.update):
                self._save_crashed()
                content = {"entries": [asdict(e) for e in result.entries], "refused": result.rejected}
                write_atomically(self.work / f"{name}.json", json.dumps(content), sync=True)
                results[name] = result
        entries = [entry for name in names for entry in results[name].entries]
        rejected = {key: why for name in names for key, why in results[name].rejected.items()}
        shards = [(f"{name}.tar", results[name].entries) for name in names if results[name].entries]
        return entries, rejected, shards

    def _finished(self, name: str) -> Any:
        """Result of a shard that an earlier run completed, or None."""
        from data.encode import ShardResult

        manifest, tar = self.work / f"{name}.json", self.target / f"{name}.tar"
        if manifest.exists():
            content = json.loads(manifest.read_text())
            result = ShardResult([Entry(**entry) for entry in content["entries"]], content["refused"])
            needed = max((entry.offset + entry.bytes for entry in result.entries), default=0)
            if not needed or (tar.exists() and tar.stat().st_size >= needed):
                return result
        return None


def _read_journal(path: Path) -> dict[tuple[str, int, int], MediaFile]:
    """Files probed by an interrupted run; a half-written last line is dropped."""
    seen = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                found = MediaFile.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue
            seen[(found.path, found.size, found.modified)] = found
    return seen


def main() -> None:
    """The command `python -m data.prepare`, also installed as `magihuman-prepare`."""
    from magihuman.cli import run

    print(run(prepare, "python -m data.prepare").summary())


if __name__ == "__main__":
    main()
