"""Report of `data.prepare` on every file: report.json for programs, report.md for people."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.captions import Captions
from data.clip_plan import ClipPlan
from data.scan import Listing
from data.shards import Bucket, Entry
from magihuman.codecs.tiny_captions import FORMS, of_another_form, read_caption
from magihuman.io.files import write_atomically


@dataclass(frozen=True)
class FileResult:
    """One file: status taken | partly (some windows) | rejected | ignored, number of clips, reason for missing ones.

    `note` says what reading changed, such as "deinterlaced" (from `MediaInfo`).
    """

    file: str
    status: str
    clips: int
    reason: str
    note: str = ""


@dataclass(frozen=True)
class PrepareReport:
    """Result of a run: settings, files, clips per bucket, seconds of video, faulty caption tables, what is odd though valid."""

    settings: Mapping[str, Any]
    files: Sequence[FileResult]
    buckets: Mapping[str, int]
    seconds: float
    table_problems: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()

    def count(self, status: str) -> int:
        return sum(result.status == status for result in self.files)

    @property
    def clips(self) -> int:
        return sum(result.clips for result in self.files)

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Rejection reasons without their numbers and names, most frequent first."""
        counts = Counter(_kind(r.reason) for r in self.files if r.status in ("rejected", "partly"))
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))

    def save(self, folder: Path) -> None:
        """Write report.json and report.md."""
        write_atomically(folder / "report.json", self._json(), sync=True)
        write_atomically(folder / "report.md", self.markdown().encode("utf-8", "backslashreplace"), sync=True)

    def is_saved(self, folder: Path) -> bool:
        """Whether report.json has this content."""
        file = folder / "report.json"
        return file.exists() and file.read_text(encoding="utf-8") == self._json()

    def _json(self) -> str:
        content = {
            "settings": dict(self.settings),
            "clips": self.clips,
            "seconds": round(self.seconds, 3),
            "files": {s: self.count(s) for s in ("taken", "partly", "rejected", "ignored")},
            "buckets": dict(self.buckets),
            "reasons": dict(self.reasons),
            "table_problems": [{"table": table, "problem": problem} for table, problem in self.table_problems],
            "notes": list(self.notes),
            "per_file": [vars(result) for result in self.files],
        }
        return json.dumps(content, indent=1) + "\n"

    def summary(self) -> str:
        """A few lines for the terminal."""
        notes = Counter(result.note for result in self.files if result.note)
        lines = [
            f"{self.clips} clips ({self.seconds:.0f} s); files: {self.count('taken')} taken, "
            f"{self.count('partly')} partly, {self.count('rejected')} rejected, "
            f"{self.count('ignored')} ignored",
            *(f"  {number:>6} clips in bucket {name}" for name, number in self.buckets.items()),
            *(f"  {number:>6} x {kind}" for kind, number in self.reasons[:8]),
            *(f"  {number:>6} x taken, {note}" for note, number in notes.most_common(8)),
            *(f"  {table}: {problem}" for table, problem in self.table_problems[:5]),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def markdown(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        lines = ["# Report of data.prepare", "", f"Settings: {settings}", "", "```", self.summary(), "```", ""]
        lines += ["| file | result | clips | reason or note |", "|---|---|---|---|"]
        order = {"rejected": 0, "partly": 1, "ignored": 2, "taken": 3}
        for result in sorted(self.files, key=lambda r: (order[r.status], r.file)):
            why = "; ".join(filter(None, (result.reason, result.note)))
            lines.append(f"| {_cell(result.file)} | {result.status} | {result.clips} | {_cell(why)} |")
        return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text for a table cell: one line of printable characters."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown.replace("|", "\\|")


def _kind(reason: str) -> str:
    """Part of a reason that is equal for many files."""
    kind = reason.split(":")[0].split(" (")[0]
    if kind.startswith("caption "):
        return "caption cannot be read"
    for start in ("same content as", "its video ends", "its video is damaged", "its audio is damaged"):
        if kind.startswith(start):
            return start
    if kind.startswith("named in"):
        return "named in a caption table but not there"
    return " ".join(word for word in kind.split() if not word[0].isdigit())


def make_report(
    settings: Mapping[str, Any], listing: Listing, captions: Captions, root: Path, plan: ClipPlan,
    entries: Sequence[Entry], rejected: Mapping[str, str], fps: float,
) -> PrepareReport:  # fmt: skip
    """Combine the results of planning and encoding for every file."""
    taken = Counter[str]()
    stored = {entry.key for entry in entries}
    trouble: dict[str, list[str]] = {}
    for clip in plan.clips:
        if clip.key in stored:
            taken[clip.relative] += 1
        else:
            trouble.setdefault(clip.relative, []).append(rejected.get(clip.key, "lost"))
    files = []
    for found in listing.media:
        name, lost = found.relative, trouble.get(found.relative, [])
        if name in plan.rejected:
            status, reason = "rejected", plan.rejected[name]
        elif not lost:
            status, reason = "taken", ""
        elif taken[name]:
            status, reason = "partly", f"{lost[0]} ({len(lost)} of {taken[name] + len(lost)} windows lost)"
        else:
            status, reason = "rejected", lost[0]
        info = found.info if taken[name] else None
        note = "" if info is None else "; ".join(filter(None, (info.note, info.audio_note)))
        files.append(FileResult(name, status, taken[name], reason, note))
    files += [FileResult(found.relative, "ignored", 0, found.problem) for found in listing.ignored]
    files += _named_but_missing(captions, root)
    buckets = Counter(entry.bucket for entry in entries)
    seconds = sum(Bucket.parse(name).frames * number for name, number in buckets.items()) / fps
    problems = [(table, problem) for table, problems in captions.problems.items() for problem in problems]
    odd = form_note([clip.caption for clip in plan.clips if clip.key in stored], settings["codecs"])
    notes = [] if odd is None else [odd]
    return PrepareReport(settings, files, dict(sorted(buckets.items())), seconds, problems, notes)


def form_note(captions: Sequence[str], codecs: str) -> str | None:
    """What to say where most captions have not the form of the codecs' puppet world, else None.

    Such codecs cut clips of another world to the length of their own.
    """
    captions = [caption for caption in captions if caption]
    strange = of_another_form(captions, codecs)
    if 2 * len(strange) <= len(captions):
        return None
    first = strange[0] if len(strange[0]) <= 120 else f"{strange[0][:117]}..."
    try:
        world, _ = read_caption(strange[0])
        remedy = f"give codecs={world}, whose clips have {FORMS[world].frames} frames (codecs={codecs}: {FORMS[codecs].frames})"
    except ValueError:
        remedy = f"codecs={codecs} are fitted to puppets alone: give codecs=released or your own for other videos"
    return f"{len(strange)} of {len(captions)} captions have not the form of codecs={codecs}, the first: {first!r}; {remedy}"


def _named_but_missing(captions: Captions, root: Path) -> list[FileResult]:
    """Rows of caption tables that name no media file."""
    results = []
    for path, row in captions.missing:
        name = Path(path)
        shown = str(name.relative_to(root)) if name.is_relative_to(root) else path
        why = "is not a media file in the input folder" if os.path.exists(path) else "there is no such file"
        results.append(FileResult(shown, "rejected", 0, f"named in {row.table} {row.line}, but {why}"))
    return results
