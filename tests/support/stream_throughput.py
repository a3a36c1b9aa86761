"""Speed of data=stream compared with local reading, and what a failing server costs.

    PYTHONPATH=.:tests/support python tests/support/stream_throughput.py eval/results/stream_throughput.json

Shards with clips of the released size lie in a temporary folder; a process of its own serves them over HTTP.
"""

import multiprocessing
import os
import sys
import tempfile
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from failing_server import FailingServer, Failure

from data.module import LatentDataModule
from data.shards import Index, ShardWriter
from data.stream import StreamDataModule
from data.stream_speed import measure
from magihuman.io.files import write_result
from magihuman.io.provenance import code_version, processor
from magihuman.models.config import Contract

CLIPS, PER_SHARD, BATCH = 48, 8, 4
CONTRACT = Contract(
    video_codec="v", audio_codec="a", text_encoder="t", video_channels=48, audio_channels=64, text_channels=3584,
    video_stride=(4, 16, 16), fps=25.0, audio_rate=51200, waveform_channels=2,
)  # fmt: skip


def write(folder: Path) -> None:
    """Clips of 101 frames of 448x256 pixels with 256 text tokens."""
    draw, shards = torch.Generator().manual_seed(0), []
    for first in range(0, CLIPS, PER_SHARD):
        with ShardWriter(folder / f"shard-{first // PER_SHARD:06d}.tar") as writer:
            for number in range(first, first + PER_SHARD):
                sizes = {"video": (48, 26, 16, 28), "audio": (101, 64), "text": (256, 3584)}
                tensors = {name: torch.randn(size, generator=draw) for name, size in sizes.items()}
                writer.add(f"clip-{number:05d}_0000", "101x256x448+a", tensors, {"caption": f"no {number}"})
        shards.append((writer.path.name, writer.entries))
    Index("synthetic", CONTRACT.to_dict(), shards).save(folder)


def every_shard_breaks_off(name: str, number: int) -> Failure:
    """Each shard's first two requests: a connection reset in the middle, and status 503."""
    if not name.endswith(".tar") or number > 1:
        return None
    return ("status", 503) if number else ("reset", 10_000_000)


def serve(folder: str, failing: bool, answers: Connection) -> None:
    """Until the other end says something."""
    with FailingServer(Path(folder), *([every_shard_breaks_off] if failing else [])) as server:
        answers.send(server.url)
        answers.recv()


def main(output: Path) -> None:
    """Measure and write the result file."""
    load = round(os.getloadavg()[0], 1)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        local = LatentDataModule(folder, BATCH, num_workers=0)
        sizes = {entry.key: entry.bytes for entry in local.reader.index}
        size, batches = sum(sizes.values()) / len(sizes), local.order.batches_per_epoch - 2

        def record(name: str, module: LatentDataModule) -> None:
            results[name] = {
                **measure(module.train_dataloader(), sizes, batches),
                "lost_connections": getattr(module, "lost_connections", 0),
                "lost_samples": len(module.skipped),
            }

        record("data=shards", local)
        record("data=stream from the folder", StreamDataModule(folder, BATCH, num_workers=0, shuffle=4))
        for failing in (False, True):
            here, there = multiprocessing.Pipe()
            server = multiprocessing.get_context("fork").Process(target=serve, args=(folder, failing, there))
            server.start()
            what = ", each shard breaks off once and answers 503 once" if failing else ""
            url = here.recv()
            record(f"data=stream over HTTP{what}", StreamDataModule(url, BATCH, num_workers=0, shuffle=4))
            here.send("end")
            server.join()
    write_result(
        output,
        {
            "what": f"one epoch of {CLIPS} clips of {size / 1e6:.2f} MB in shards of {PER_SHARD}, batches of {BATCH}, "
            "shuffle=4, no workers; server and reader on one machine, files in the page cache",
            "machine": processor(),
            "load_average": load,
            "results": results,
            "provenance": {
                "command": f"PYTHONPATH=.:tests/support python tests/support/stream_throughput.py {output}",
                "code": code_version(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
