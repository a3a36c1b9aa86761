"""Runs as W&B has them: from its offline folders, without a server and without its own reader, or through its API.

    read_offline(offline_folders(Path("wandb")))
    read_api("ENTITY/PROJECT?group=dmd2_lr")

A .wandb file is a log in LevelDB's format: after 7 bytes (":W&B", 0xBEE1, version) blocks of 32 KiB with chunks of
[crc32:4][length:2][type:1][payload], type 1 a whole record, 2 its first, 3 a middle, 4 its last part. A record is a protobuf
message of `wandb.proto`. wandb 0.31 ships no reader of these files.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from eval.compare_runs.run_records import STATES, RunClip, RunRecord, Series, _number, apply_curves, apply_settings
from magihuman.errors import UserError
from magihuman.io.text import parse_json

BLOCK, CHUNK_HEAD, FILE_HEAD = 32768, 7, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
STEP = "trainer/global_step"
OURS = {
    "finished": "finished",
    "running": "running",
    "crashed": "lost",
    "killed": "interrupted",
    "failed": "failed",
    "preempted": "preempted",
    "preempting": "preempted",
}
"""State of a run at W&B -> status."""


class DamagedLog(ValueError):
    """A .wandb file whose beginning is no log, or whose chunks do not have their checksums."""


def log_records(data: bytes) -> Iterator[bytes]:
    """Payloads of the records of a .wandb file; a last record that a kill has torn is left out.

    Raises:
        DamagedLog: it is no such file, or a record in the middle is damaged.
    """
    if data[:4] != b":W&B":
        raise DamagedLog("it does not begin as a .wandb file")
    place, parts = FILE_HEAD, b""
    while place + CHUNK_HEAD <= len(data):
        left = BLOCK - place % BLOCK
        checksum, length, kind = struct.unpack_from("<IHB", data, place)
        if left < CHUNK_HEAD or (kind == 0 and length == 0):  # the rest of the block is filled with zeros
            place += left
            continue
        chunk = data[place + CHUNK_HEAD : place + CHUNK_HEAD + length]
        if len(chunk) < length:
            return
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            raise DamagedLog(f"the record at byte {place} is damaged")
        place += CHUNK_HEAD + length
        parts = chunk if kind in (WHOLE, FIRST) else parts + chunk
        if kind in (WHOLE, LAST):
            yield parts


def offline_folders(folder: Path) -> list[Path]:
    """W&B's offline-run folders that a folder is, or holds, directly or in wandb/."""
    found = [folder] if folder.name.startswith("offline-run-") else []
    found += [path for place in (folder, folder / "wandb") for path in place.glob("offline-run-*") if path.is_dir()]
    return sorted(path for path in found if any(path.glob("run-*.wandb")))


def read_offline(folders: Sequence[Path]) -> list[RunRecord]:
    """Runs of offline folders; folders of one run, which has been continued, are one."""
    by_run: dict[str, list[Path]] = {}
    for folder in folders:
        by_run.setdefault(next(iter(sorted(folder.glob("run-*.wandb")))).stem.removeprefix("run-"), []).append(folder)
    return [_offline_run(identifier, sorted(parts)) for identifier, parts in by_run.items()]


def _offline_run(identifier: str, folders: Sequence[Path]) -> RunRecord:
    run = RunRecord(identifier, str(folders[-1]), status="running")
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    rows: dict[int, dict[str, Any]] = {}
    exit_code = None
    for folder in folders:
        rows_here: dict[int, dict[str, Any]] = {}
        exit_code = None
        try:
            for kind, content in _messages(next(iter(sorted(folder.glob("run-*.wandb"))))):
                if kind == "run":
                    run.name = str(content.display_name or identifier).rpartition("/")[2]
                    _merge(config, content.config)
                elif kind == "config":
                    _merge(config, content)
                elif kind == "history":
                    row = _row_of(content)
                    step = _step_of(row)
                    if step is not None:
                        rows_here.setdefault(step, {}).update(row)
                        run.clips += _sampled_clips(folder / "files", step, row)
                elif kind == "summary":
                    summary |= {
                        item.key or "/".join(item.nested_key): parse_json(item.value_json) for item in content.update
                    }
                elif kind == "exit":
                    exit_code = content.exit_code
        except (OSError, ValueError) as error:
            run.add_reason(f"{folder.name} cannot be read whole: {error}")
        if rows_here:  # a continued run repeats the steps after its checkpoint
            rows = {step: row for step, row in rows.items() if step < min(rows_here)} | rows_here
    run.status = {None: "running", 0: "finished", 75: "preempted"}.get(exit_code, "failed")
    _fill(run, config, summary, _curves_of(rows))
    if exit_code is None:
        run.add_reason("its W&B file has no end: it is running or was killed")
    return run


def _messages(file: Path) -> Iterator[tuple[str, Any]]:
    """Kind and content of every record."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    for payload in log_records(file.read_bytes()):
        try:
            record = wandb_internal_pb2.Record.FromString(payload)  # type: ignore[attr-defined]
        except DecodeError as error:
            raise DamagedLog(f"a record is no message: {error}") from error
        kind = record.WhichOneof("record_type")
        if kind:
            yield kind, getattr(record, kind)


def _merge(config: dict[str, Any], message: Any) -> None:
    """Apply updates of a config; its keys may be paths."""
    for update in message.update:
        keys = [update.key] if update.key else list(update.nested_key)
        node = config
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        if keys and isinstance(node, dict):
            node[keys[-1]] = parse_json(update.value_json)


def _row_of(message: Any) -> dict[str, Any]:
    """Values of a row of the history as JSON; media are mappings of their facts."""
    row: dict[str, Any] = {}
    for item in message.item:
        first, *rest = [item.key] if item.key else list(item.nested_key)
        if rest:
            row.setdefault(first, {})[".".join(rest)] = item.value_json
        else:
            row[first] = item.value_json
    return row


def _step_of(row: Mapping[str, Any]) -> int | None:
    for key in (STEP, "_step"):
        try:
            return int(float(row[key]))
        except (KeyError, ValueError, TypeError):
            continue
    return None


def _curves_of(rows: Mapping[int, Mapping[str, Any]]) -> dict[str, Series]:
    """Curves of rows by step; values are numbers or their JSON."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            if name.startswith("_") or name in (STEP, "epoch"):
                continue
            try:
                number = float(value)
            except (TypeError, ValueError):  # media, texts
                continue
            steps, values = points.setdefault(name, ([], []))
            steps.append(step)
            values.append(number)
    return {name: Series(np.array(steps, float), np.array(values)) for name, (steps, values) in points.items()}


def _sampled_clips(files: Path, step: int, row: Mapping[str, Any]) -> Iterator[RunClip]:
    """Sample clips of a row: samples/00 is a video of prompt and seed 0, with its prompt as caption."""
    for name, facts in row.items():
        found = re.fullmatch(r"samples/(\d{1,6})", name)
        if not found or not isinstance(facts, Mapping):
            continue
        try:
            path, prompt = _inside(files, parse_json(facts["path"])), str(parse_json(facts["caption"]))
        except (KeyError, ValueError, TypeError):
            continue
        if path.is_file() and path.suffix == ".mp4":
            yield RunClip("step", step, prompt, int(found[1]), path)


def _inside(folder: Path, name: str) -> Path:
    """A file below a folder.

    Raises:
        ValueError: the name leads out of it.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads out of {folder}")
    return path


def _fill(run: RunRecord, config: Mapping[str, Any], summary: Mapping[str, Any], curves: dict[str, Series]) -> None:
    """Fill in what both sources have: settings, curves, scores and status as training wrote them."""
    provenance = config.get("provenance")
    provenance = provenance if isinstance(provenance, Mapping) else {}
    try:
        apply_settings(run, {key: value for key, value in config.items() if not key.startswith("_")})
    except (TypeError, ValueError, AttributeError) as error:
        run.add_reason(f"its settings cannot be read: {error}")
    apply_curves(run, curves)
    parents = provenance.get("parents")
    run.parents = [
        {key: str(parent.get(key, "")) for key in ("role", "name", "sha256")}
        for parent in (parents if isinstance(parents, list) else [])
        if isinstance(parent, Mapping)
    ]
    run.sha256 = str(summary.get("export/sha256", ""))
    if summary.get("status") in STATES:
        run.status = str(summary["status"])
    if run.status == "failed" and summary.get("error"):
        run.add_reason(str(summary["error"]))
    for key, value in summary.items():
        kind, _, rest = key.partition("/")
        evaluation, _, metric = rest.partition("/")
        parts = {part: _number(summary.get(f"{key}/{part}")) for part in ("low", "high", "bound")}
        # What an evaluation says beside its scores, such as a number of clips, has no interval and no bound.
        if kind == "eval" and metric and "/" not in metric and any(part is not None for part in parts.values()):
            run.scores[f"{evaluation}: {metric}"] = {"value": _number(value), "n": None, **parts}


# ---- Through W&B's API ----

FILTERS = {"group": "group", "job_type": "jobType", "state": "state", "tag": "tags"}
"""Filter of the command line -> field of W&B's query; others are settings."""
HISTORY = 500
"""Points of a curve that W&B is asked for; it samples them."""


def read_api(address: str) -> list[RunRecord]:
    """Runs of ENTITY/PROJECT?FILTER=VALUE&... at W&B, newest first.

    Raises:
        UserError: another form, no such project, no connection, or no run.
    """
    project, _, query = address.partition("?")
    if project.count("/") != 1 or not all(project.split("/")):
        raise UserError(f"wandb={address} is not of the form ENTITY/PROJECT or ENTITY/PROJECT?group=NAME")
    filters = {FILTERS.get(key, f"config.{key}.value"): _plain(key, value) for key, value in parse_qsl(query)}
    if query and not filters:
        raise UserError(f"wandb={address}: the filter is not of the form KEY=VALUE&KEY=VALUE")
    import wandb

    try:
        found = [_api_run(run) for run in wandb.Api().runs(project, filters=filters)]
    except (wandb.Error, ValueError, OSError) as error:  # wandb's CommError among them
        raise UserError(f"wandb={address} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not found:
        raise UserError(f"wandb={address} has no runs{' with these filters' if filters else ''}")
    return found


def _plain(key: str, value: str) -> Any:
    if key in FILTERS:
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _api_run(api: Any) -> RunRecord:
    """A run of W&B's API."""
    place, status = str(getattr(api, "url", api.id)), OURS.get(api.state, "running")
    run = RunRecord(str(api.name or api.id).rpartition("/")[2], place, status)
    try:
        summary = dict(_nested({key: api.summary[key] for key in api.summary.keys()}))  # noqa: SIM118 - no mapping
        rows = {step: row for row in api.history(samples=HISTORY, pandas=False) if (step := _step_of(row)) is not None}
        _fill(run, dict(api.config), summary, _curves_of(rows))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        run.add_reason(f"W&B's answer has another form ({type(error).__name__}: {error})")
    return run


def _nested(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path with slashes, value) of a summary, which W&B may have nested."""
    for key, value in values.items():
        name = f"{path}/{key}" if path else str(key)
        if isinstance(value, Mapping) and "_type" not in value:
            yield from _nested(value, name)
        else:
            yield name, value
