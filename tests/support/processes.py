"""Trainings by one or more processes, and the comparison of what they left."""

import json
import multiprocessing
import os
from pathlib import Path

import torch
import training_stub
from free_port import free_port
from safetensors.torch import load_file

MORE = [
    "+recipe=pretrain", "optim=muon", "optim.ema_decay=0.9", "trainer.max_steps=5", "checkpoint.every_steps=3",
    "data.module.batch_size=4", "callbacks.validation=null", "trainer.devices=%d", "strategy=%s",
    "+callbacks.spy={_target_: training_stub.Spy}",
]  # fmt: skip


def train_child(folder: str, shards: str, overrides: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    first = all(int(environment.get(name, 0)) == 0 for name in ("LOCAL_RANK", "NODE_RANK"))
    rank_zero_only.rank = 0 if first else 1  # a real process learns it at import
    torch.set_num_threads(1)
    training_stub.train_here(Path(folder), Path(shards), overrides)


class Launcher:
    """Trainings by one or more processes.

    Args:
        more: overrides of all of them; "%d" and "%s" become the number of processes and the strategy.
        seconds: after which a training is killed.
    """

    child = staticmethod(train_child)

    def __init__(self, shards: Path, more: list[str] = MORE, seconds: int = 300) -> None:
        self.shards, self.more, self.seconds = shards, more, seconds
        self.context = multiprocessing.get_context("forkserver")

    def run(self, folder: Path, strategy: str, size: int, *overrides: str, nodes: int = 1) -> list[int | None]:
        """Exit codes by rank; when one process dies the others are killed, as a launcher would.

        Args:
            nodes: size / nodes processes take themselves for those of a machine of their own.
        """
        devices = size // nodes
        chosen = [o % (devices if "devices" in o else strategy) if "%" in o else o for o in self.more]
        chosen += [f"trainer.nodes={nodes}"] if nodes > 1 else []
        port = free_port()
        processes = []
        for rank in range(size):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
            if size > 1:
                environment |= {"LOCAL_RANK": str(rank % devices), "NODE_RANK": str(rank // devices)}
            arguments = (str(folder), str(self.shards), [*chosen, *overrides], environment)
            processes.append(self.context.Process(target=self.child, args=arguments))
            processes[-1].start()
        processes[0].join(self.seconds)
        for process in processes:
            process.join(60 if processes[0].exitcode == 0 else 0.1)
            process.kill()
            process.join()
        return [process.exitcode for process in processes]


def seen(folder: Path) -> dict[int, list[int]]:
    """Rank -> positions of the samples it trained on, in order."""
    return {int(f.stem.split("-")[1]): json.loads(f.read_text()) for f in sorted(folder.glob("seen-*.json"))}


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model-00001-of-00001.safetensors")


def final_state(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same(a: object, b: object, where: str = "") -> None:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}.{i}")
    else:
        assert a == b, where
