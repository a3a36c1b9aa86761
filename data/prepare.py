"""Preparation of training data: a folder of media files to webdataset shards of latents, text features and metadata.

    python -m data.prepare input=VIDEOS output=SHARDS [codecs=scene] [workers=2]

A run that was stopped, even by SIGKILL, resumes when the same command is given again. The bytes of the shards depend
neither on interruptions nor on the number of workers.

A finished folder is brought up to date by the same command: samples of unchanged files and captions stay as they are, in
full shards or copied from shards that are not full or lose a sample, and all others are encoded. The old shards stay
until the new index is written.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from data.captions import read_tables
from data.clip_plan import ClipFormats, PlannedClip, make_plan
from data.encode import PRELOADED, VERSION, ShardJob, ShardResult, describe_codecs, probe_files, write_shard
from data.options import PrepareOptions
from data.prepare_report import PrepareReport, make_report
from data.scan import MediaFile, list_files
from data.shards import INDEX, NULL_TEXT, Entry, Index, SampleIndex
from data.worker_pool import Workers
from magihuman.errors import UserError
from magihuman.io.files import locked, write_atomically

WORK = ".work"  # folder inside the output with what later runs need: a file per shard, and
PROBED = "seen.jsonl"  # the result of probing each file,
SETTINGS = "settings.json"  # options and codecs that decide the samples,
CRASHED = "crashed.json"  # and the files of an unfinished run that crash the decoder
PROBE_CHUNK = 32  # files per probing task


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
            of_output = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(options.target)
            if not of_output and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
                raise UserError(f"data.prepare failed ({error}); give the same command again") from error
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


@dataclass(frozen=True)
class _Stored:
    """A shard of an earlier run, its planned clips (key -> identity) and what became of them."""

    path: Path
    clips: dict[str, str]
    result: ShardResult


class _Preparation:
    """One run: probe the files, plan, encode the missing samples, report."""

    def __init__(self, options: PrepareOptions, work: Path) -> None:
        self.options, self.work = options, work
        self.source, self.target = options.source, options.target
        self.crashed: set[str] = set()  # paths
        self.stamps: dict[str, str] = {}  # path -> stamp

    def run(self, pool: Workers) -> PrepareReport:
        started = time.monotonic()
        listing = list_files(self.source, self.target)
        if not listing.media:
            raise UserError(f"input={self.source} holds no media file ({len(listing.ignored)} files of other kinds)")
        options = self.options
        self.stamps = {found.path: found.stamp for found in listing.media}
        if (crashed := self.work / CRASHED).exists():
            self.crashed |= {path for path, _ in self.stamps.items() & json.loads(crashed.read_text()).items()}
        payload = (options.codecs, options.device, str(self.work))
        codecs = dict(pool.run(describe_codecs, {"codecs": payload}))["codecs"]
        formats = ClipFormats.of(options, codecs)
        settings = self._claim_output(codecs)
        files = self._probe(pool, listing.media)
        # Once where table= is in the input folder, too.
        tables = {table.resolve(): table for table in ([Path(options.table)] if options.table else []) + listing.tables}
        captions = read_tables(tables.values(), self.source, listing.names, listing.texts)
        plan = make_plan(files, captions, options, formats)
        stored = self._stored()
        identities = {clip.key: clip.identity for clip in plan.clips}
        self._check_gone(stored, identities)
        shards = self._arrange(plan.clips, identities, stored)
        finished = (self.target / INDEX).exists()
        results, encoded = self._encode(pool, shards, identities, stored)
        entries = [entry for result in results.values() for entry in result.entries]
        rejected = {key: why for result in results.values() for key, why in result.rejected.items()}
        listing = replace(listing, media=files)
        shown = {key: value for key, value in options.identity().items() if value is not None}
        report = make_report(shown, listing, captions, self.source, plan, entries, rejected, formats.fps)
        content = json.dumps([settings, [(name, identities[clip.key]) for name in shards for clip in shards[name]]])
        fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        if finished and SampleIndex.load(self.target).fingerprint == fingerprint and report.is_saved(self.target):
            self._tidy(results, files)
            return report
        report.save(self.target)
        if not entries:
            (self.work / CRASHED).unlink(missing_ok=True)
            most = f"; most often: {report.reasons[0][0]}" if report.reasons else ""
            raise UserError(f"no clip of {self.source} could be used{most}; {self.target}/report.md says why, per file")
        (self.work / NULL_TEXT).replace(self.target / NULL_TEXT)
        indexed = [(f"{name}.tar", result.entries) for name, result in results.items() if result.entries]
        Index(options.codecs, codecs["contract"], indexed, fingerprint).save(self.target)
        self._tidy(results, files)
        gone = len({key for shard in stored.values() for key in shard.clips} - identities.keys())
        if finished and (encoded or gone):
            kept = len(identities) - encoded
            print(f"{self.target}: {kept} clips kept, {encoded} encoded, {gone} removed", file=sys.stderr)
        if options.progress:
            spent = time.monotonic() - started
            print(f"prepared in {spent:.1f} s, {1000 * spent / max(1, encoded):.0f} ms a clip", file=sys.stderr)
        return report

    def _probe(self, pool: Workers, media: list[MediaFile]) -> list[MediaFile]:
        """Probe the files; results of an earlier run for files that did not change are reused."""
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
                    file.write(_lines(results))
                    file.flush()
                    known |= {found.path: found for found in results}
        return [known[found.path] or found for found in media]

    def _save_crashed(self) -> None:
        if self.crashed:
            content = {path: self.stamps[path] for path in sorted(self.crashed)}
            write_atomically(self.work / CRASHED, json.dumps(content), sync=True)

    def _claim_output(self, codecs: dict[str, Any]) -> dict[str, Any]:
        """The settings that decide the samples; raises an error if existing shards were made with others."""
        # Captions are part of the plan, wherever their table is.
        own = {k: v for k, v in self.options.identity().items() if k not in ("input", "output", "table")}
        settings: dict[str, Any] = json.loads(json.dumps({**own, "bundle": codecs, "version": VERSION}))
        note = self.work / SETTINGS
        known = json.loads(note.read_text()) if note.exists() else {}
        if known != settings:
            if any(self.target.glob("*.tar")):
                differing = [f"{k}: {known.get(k)!r} then, {v!r} now" for k, v in settings.items() if known.get(k) != v]
                why = f"of other settings ({'; '.join(differing)[:300]})" if known else "without notes on their making"
                raise UserError(f"output={self.target} holds shards {why}; delete it or choose another")
            for file in (*self.work.glob("shard-*.json"), self.work / PROBED):  # of a plan without clips
                file.unlink(missing_ok=True)
        write_atomically(note, json.dumps(settings), sync=True)
        return settings

    def _stored(self) -> dict[str, _Stored]:
        """Whole shards of earlier runs by name, in order."""
        found = {}
        for manifest in sorted(self.work.glob("shard-*.json")):
            content, tar = json.loads(manifest.read_text()), self.target / f"{manifest.stem}.tar"
            result = ShardResult([Entry(**entry) for entry in content["entries"]], content["refused"])
            needed = max((entry.offset + entry.bytes for entry in result.entries), default=0)
            if not needed or (tar.exists() and tar.stat().st_size >= needed):
                found[manifest.stem] = _Stored(tar, content["clips"], result)
        return found

    def _check_gone(self, stored: dict[str, _Stored], identities: Mapping[str, str]) -> None:
        """Raise an error if most samples would be removed: the input is probably another one, or incomplete."""
        there = {entry.key for shard in stored.values() for entry in shard.result.entries}
        gone = there - identities.keys()
        if 2 * len(gone) > len(there):
            raise UserError(
                f"output={self.target} holds shards of other files: {len(gone)} of its {len(there)} clips are not in "
                f"input={self.source} or no longer usable; delete it or choose another"
            )

    def _arrange(
        self, clips: Sequence[PlannedClip], identities: Mapping[str, str], stored: Mapping[str, _Stored]
    ) -> dict[str, list[PlannedClip]]:
        """Clips by shard: full shards whose clips are all wanted stay, the other clips fill new ones in their order."""
        size = self.options.shard_clips
        by_key = {clip.key: clip for clip in clips}
        shards: dict[str, list[PlannedClip]] = {}
        for name, shard in stored.items():
            wanted = all(key in by_key and identities[key] == identity for key, identity in shard.clips.items())
            if wanted and len(shard.clips) == size:
                shards[name] = [by_key.pop(key) for key in shard.clips]
        left = list(by_key.values())
        same = {tuple(shard.clips.items()): name for name, shard in stored.items()}
        taken = {*stored, *(Path(name).stem for name in self._indexed())}
        free = (name for name in map("shard-{:06d}".format, count()) if name not in taken)
        for first in range(0, len(left), size):
            part = left[first : first + size]
            shards[same.get(tuple((clip.key, clip.identity) for clip in part)) or next(free)] = part
        return dict(sorted(shards.items()))

    def _indexed(self) -> list[str]:
        """Files of the shards in the index."""
        return SampleIndex.load(self.target).shards if (self.target / INDEX).exists() else []

    def _encode(
        self, pool: Workers, shards: Mapping[str, list[PlannedClip]], identities: Mapping[str, str],
        stored: Mapping[str, _Stored],
    ) -> tuple[dict[str, ShardResult], int]:  # fmt: skip
        """Write the missing shards; returns the results of all, and the number of clips that were encoded."""
        from tqdm import tqdm

        samples: dict[str, tuple[Path, Entry]] = {}
        refused: dict[str, str] = {}
        for shard in stored.values():
            wanted = shard.clips.items() & identities.items()
            keys = {key for key, _ in wanted}
            samples |= {entry.key: (shard.path, entry) for entry in shard.result.entries if entry.key in keys}
            refused |= {key: why for key, why in shard.result.rejected.items() if key in keys}
        results = {name: stored[name].result for name in shards if name in stored}
        todo = {
            name: ShardJob(
                self.target / f"{name}.tar", clips, self.options,
                {clip.key: samples[clip.key] for clip in clips if clip.key in samples},
                {clip.key: refused[clip.key] for clip in clips if clip.key in refused},
            )
            for name, clips in shards.items()
            if name not in results
        }  # fmt: skip
        new = sum(clip.key not in samples and clip.key not in refused for name in todo for clip in shards[name])
        with tqdm(
            total=len(identities), initial=len(identities) - new, desc="encoding", unit="clip",
            disable=not self.options.progress,
        ) as bar:  # fmt: skip
            for name, result in pool.run(write_shard, todo, bar.update):
                self._save_crashed()
                content = {
                    "clips": {clip.key: clip.identity for clip in shards[name] if clip.key not in result.transient},
                    "entries": [asdict(entry) for entry in result.entries],
                    "refused": {key: why for key, why in result.rejected.items() if key not in result.transient},
                }
                write_atomically(self.work / f"{name}.json", json.dumps(content), sync=True)
                results[name] = result
        return {name: results[name] for name in shards}, new

    def _tidy(self, shards: Mapping[str, Any], files: list[MediaFile]) -> None:
        """Remove shards that the new index does not name, and what only an unfinished run needs."""
        for path in (*self.target.glob("shard-*.tar"), *self.work.glob("shard-*.json")):
            if path.stem not in shards:
                path.unlink()
        (self.work / CRASHED).unlink(missing_ok=True)
        (self.work / NULL_TEXT).unlink(missing_ok=True)
        write_atomically(self.work / PROBED, _lines(files))


def _lines(files: Sequence[MediaFile]) -> str:
    return "".join(json.dumps(asdict(found)) + "\n" for found in files)


def _read_journal(path: Path) -> dict[tuple[str, str], MediaFile]:
    """Files probed by earlier runs; a half-written last line is dropped, and what could not be read is tried again."""
    seen = {}
    if path.exists():
        for line in path.read_text().split("\n"):
            try:
                found = MediaFile.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue
            if found.info is not None:
                seen[(found.path, found.stamp)] = found
    return seen


def main() -> None:
    """The command `python -m data.prepare`, also installed as `magihuman-prepare`."""
    from magihuman.cli import run

    print(run(prepare, "python -m data.prepare").summary())


if __name__ == "__main__":
    main()
