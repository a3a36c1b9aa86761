"""Speed of reading shards: `python -m data.stream_speed shards=URL [local=FOLDER]`.

Says whether a connection is fast enough for a training before GPUs wait for it.
"""

import time
from typing import Any


def measure(loader: Any, sizes: dict[str, int], batches: int) -> dict[str, float]:
    """Read batches and count; the first one, which starts workers and connections, has its own time.

    Args:
        loader: of a data module; sizes: bytes of each sample by key; batches: how many to read after the first.

    Returns:
        first_batch_s, samples_per_s, mb_per_s (10^6 bytes).
    """
    start = time.perf_counter()
    reader = iter(loader)
    next(reader)
    first = time.perf_counter()
    keys = [key for _ in range(batches) for key in next(reader)["key"]]
    seconds = time.perf_counter() - first
    return {
        "first_batch_s": round(first - start, 3),
        "samples_per_s": round(len(keys) / seconds, 1),
        "mb_per_s": round(sum(sizes[key] for key in keys) / seconds / 1e6, 1),
    }


def stream_speed(
    shards: str,
    local: str | None = None,
    batches: int = 100,
    batch_size: int = 16,
    num_workers: int = 2,
    shuffle: int = 100,
    cache_dir: str | None = None,
) -> dict[str, dict[str, float]]:
    """Measure how fast data=stream reads shards, and how fast data=shards reads a local copy.

    Args:
        shards: as data.module.shards: a URL, a path, or pipe: and a command
        local: folder with a copy of the shards, read as by data=shards
        batches: how many to read
        batch_size: samples of a batch
        num_workers: reading processes
        shuffle: samples of a worker's shuffle buffer
        cache_dir: as data.module.cache_dir

    Returns:
        results of `measure` by the kind of data.

    Raises:
        UserError: shards that cannot be read, or settings out of range.
    """
    from data.module import LatentDataModule
    from data.stream import StreamDataModule
    from magihuman.errors import UserError

    if batches < 1:
        raise UserError(f"batches={batches} measures nothing; give at least 1")
    module: LatentDataModule = StreamDataModule(
        shards, batch_size, num_workers=num_workers, shuffle=shuffle, cache_dir=cache_dir
    )
    module.setup("fit")
    sizes = {entry.key: entry.bytes for entry in module.reader.index}
    results = {"stream": measure(module.train_dataloader(), sizes, batches)}
    if local is not None:
        module = LatentDataModule(local, batch_size, num_workers=num_workers)
        results["shards"] = measure(module.train_dataloader(), sizes, batches)
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """The results in lines."""
    return "\n".join(
        f"data={name:8} {r['samples_per_s']:8g} samples/s {r['mb_per_s']:8g} MB/s, first batch after {r['first_batch_s']:g} s"
        for name, r in results.items()
    )


if __name__ == "__main__":
    from magihuman.cli import run

    print(table(run(stream_speed, "python -m data.stream_speed")))
