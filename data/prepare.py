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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data.captions import read_tables
from data.clip_plan import ClipFormats, ClipPlan, make_plan
from data.encode import ShardJob, ShardResult, describe_codecs, probe_files, write_shard
from data.options import PrepareOptions
from data.prepare_report import PrepareReport, make_report
from data.scan import MediaFile, list_files
from data.shards import INDEX, NULL_TEXT, Entry, Index, SampleIndex
from data.worker_pool import Workers
from magihuman.errors import UserError
from magihuman.io.files import locked, write_atomically

WORK = ".work"  # folder inside the output with the state of an unfinished run
PROBED = "seen.jsonl"  # in it: the result of probing each file
PROBE_CHUNK = 32  # files per probing task
PRELOADED = ("data.encode", "torch", "webdataset.writer", "magihuman.codecs.bundle")  # once for all workers


def prepare(options: PrepareOptions) -> PrepareReport:
    """Encode a folder of media files to shards of latents; a finished folder of the same options is left alone.

    Raises:
        UserError: a folder that cannot be used, sizes or lengths that the codecs cannot encode, or no usable clip.
    """
    with _claimed(options.target) as work:
        task = _Preparation(options, work)
        workers = options.workers or ((os.cpu_count() or 1) if options.device == "cpu" else 1)
        try:
            with Workers(workers, work, task.crashed, PRELOADED) as pool:
                return task.run(pool)
        except OSError as error:
            raise UserError(
                f"output={options.target} cannot be written ({error.strerror}); make room and give the same command "
                "again"
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

    def __init__(self, options: PrepareOptions, work: Path) -> None:
        self.options, self.work = options, work
        self.source, self.target = options.source, options.target
        crashed = work / "crashed.json"
        self.crashed: set[str] = set(json.loads(crashed.read_text())) if crashed.exists() else set()

    def run(self, pool: Workers) -> PrepareReport:
        started = time.monotonic()
        listing = list_files(self.source, self.target)
        if not listing.media:
            raise UserError(f"input={self.source} holds no media file ({len(listing.ignored)} files of other kinds)")
        options = self.options
        payload = (options.codecs, options.device, str(self.work))
        codecs = dict(pool.run(describe_codecs, {"codecs": payload}))["codecs"]
        formats = ClipFormats.of(options, codecs)
        files = self._probe(pool, listing.media)
        # Once where table= is in the input folder, too.
        tables = {table.resolve(): table for table in ([Path(options.table)] if options.table else []) + listing.tables}
        captions = read_tables(tables.values(), self.source, listing.names, listing.texts)
        plan = make_plan(files, captions, options, formats)
        fingerprint = self._claim_output(files, plan, codecs)
        if (self.target / INDEX).exists():
            shutil.rmtree(self.work)
            return PrepareReport.load(self.target)
        (self.work / NULL_TEXT).replace(self.target / NULL_TEXT)
        entries, rejected, shards = self._encode(pool, plan)
        listing = replace(listing, media=files)
        shown = {key: value for key, value in options.identity().items() if value is not None}
        report = make_report(shown, listing, captions, self.source, plan, entries, rejected, formats.fps)
        report.save(self.target)
        if not entries:
            most = f"; most often: {report.reasons[0][0]}" if report.reasons else ""
            raise UserError(f"no clip of {self.source} could be used{most}; {self.target}/report.md says why, per file")
        Index(options.codecs, codecs["contract"], shards, fingerprint).save(self.target)
        shutil.rmtree(self.work)
        if options.progress:
            spent = time.monotonic() - started
            print(f"prepared in {spent:.1f} s, {1000 * spent / max(1, len(plan.clips)):.0f} ms a clip", file=sys.stderr)
        return report

    def _probe(self, pool: Workers, media: list[MediaFile]) -> list[MediaFile]:
        """Probe the files; results of an earlier, interrupted run are reused."""
        from tqdm import tqdm

        journal = self.work / PROBED
        seen = _read_journal(journal)
        known = {found.path: seen.get((found.path, found.stamp)) for found in media}
        new = [found for found in media if known[found.path] is None]
        with tqdm(
            total=len(media), initial=len(media) - len(new), desc="probing", disable=not self.options.progress
        ) as bar:
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
        settings = {key: value for key, value in self.options.identity().items() if key not in ("input", "output")}
        settings["world"] = settings.pop("codecs")  # the key when fingerprints of older shards were made
        content = json.dumps([clips, settings, codecs], sort_keys=True)
        fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        note = self.work / "plan.json"
        if (self.target / INDEX).exists():
            known = SampleIndex.load(self.target).fingerprint
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

        size = self.options.shard_clips
        names = [f"shard-{i:06d}" for i in range(-(-len(plan.clips) // size))]
        slices = {name: plan.clips[i * size : (i + 1) * size] for i, name in enumerate(names)}
        results = {name: done for name in names if (done := self._finished(name)) is not None}
        todo = {
            name: ShardJob(self.target / f"{name}.tar", slices[name], self.options)
            for name in names
            if name not in results
        }
        ready = sum(len(slices[name]) for name in results)
        with tqdm(
            total=len(plan.clips), initial=ready, desc="encoding", unit="clip", disable=not self.options.progress
        ) as bar:
            for name, result in pool.run(write_shard, todo, bar.update):
                self._save_crashed()
                content = {"entries": [asdict(e) for e in result.entries], "refused": result.rejected}
                write_atomically(self.work / f"{name}.json", json.dumps(content), sync=True)
                results[name] = result
        entries = [entry for name in names for entry in results[name].entries]
        rejected = {key: why for name in names for key, why in results[name].rejected.items()}
        shards = [(f"{name}.tar", results[name].entries) for name in names if results[name].entries]
        return entries, rejected, shards

    def _finished(self, name: str) -> ShardResult | None:
        """Result of a shard that an earlier run completed, or None."""
        manifest, tar = self.work / f"{name}.json", self.target / f"{name}.tar"
        if manifest.exists():
            content = json.loads(manifest.read_text())
            result = ShardResult([Entry(**entry) for entry in content["entries"]], content["refused"])
            needed = max((entry.offset + entry.bytes for entry in result.entries), default=0)
            if not needed or (tar.exists() and tar.stat().st_size >= needed):
                return result
        return None


def _read_journal(path: Path) -> dict[tuple[str, str], MediaFile]:
    """Files probed by an interrupted run; a half-written last line is dropped."""
    seen = {}
    if path.exists():
        for line in path.read_text().split("\n"):
            try:
                found = MediaFile.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue
            seen[(found.path, found.stamp)] = found
    return seen


def main() -> None:
    """The command `python -m data.prepare`, also installed as `magihuman-prepare`."""
    from magihuman.cli import run

    print(run(prepare, "python -m data.prepare").summary())


if __name__ == "__main__":
    main()
