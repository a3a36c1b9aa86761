"""Two processes train what one trains: each sample once, the same weights, exact after a kill."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
import training_stub
from safetensors.torch import load_file

MORE = [
    "+recipe=pretrain", "optim=muon", "optim.ema_decay=0.9", "trainer.max_steps=5", "checkpoint.every_steps=3",
    "data.module.batch_size=4", "callbacks.validation=null", "trainer.devices=%d", "strategy=%s",
    "+callbacks.spy={_target_: training_stub.Spy}",
]  # fmt: skip

VALIDATION = "_target_: magihuman.training.callbacks.Validation"


def _child(folder: str, shards: str, overrides: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # a real process learns it at import
    torch.set_num_threads(1)
    training_stub.train_here(Path(folder), Path(shards), overrides)


class World:
    """Trainings by one or two processes.

    Args:
        more: overrides of all of them; "%d" and "%s" become the number of processes and the strategy.
    """

    child = staticmethod(_child)

    def __init__(self, shards: Path, more: list[str] = MORE) -> None:
        self.shards, self.more = shards, more
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["training_stub", "lightning.pytorch", "recipes.pretrain"])

    def run(self, folder: Path, strategy: str, size: int, *overrides: str) -> list[int | None]:
        """Exit codes by rank; when one process dies the others are killed, as a launcher would."""
        chosen = [o % (size if "devices" in o else strategy) if "%" in o else o for o in self.more]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(size):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
            environment |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"} if size > 1 else {}
            arguments = (str(folder), str(self.shards), [*chosen, *overrides], environment)
            processes.append(self.context.Process(target=self.child, args=arguments))
            processes[-1].start()
        processes[0].join(60)
        for process in processes:
            process.join(10 if processes[0].exitcode == 0 else 0.1)
            process.kill()
            process.join()
        return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(training_stub.write_shards(tmp_path_factory.mktemp("data") / "shards"))


@pytest.fixture(scope="module")
def single(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "single"
    assert world.run(folder, "single", 1) == [0]
    return folder


def seen(folder: Path) -> dict[int, list[int]]:
    """Rank -> positions of the samples it trained on, in order."""
    return {int(f.stem.split("-")[1]): json.loads(f.read_text()) for f in sorted(folder.glob("seen-*.json"))}


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_share_the_work_of_one_and_continue_exactly(world, single, tmp_path, strategy) -> None:
    through, killed = tmp_path / "through", tmp_path / "killed"
    assert world.run(through, strategy, 2) == [0, 0]

    alone, shared = seen(single), seen(through)
    assert alone == {0: list(range(20))}
    assert not set(shared[0]) & set(shared[1])
    assert sorted(shared[0] + shared[1]) == alone[0]

    die = "+callbacks.die={_target_: training_stub.DieAt, batch: 4}"
    assert world.run(killed, strategy, 2, die)[0] == -signal.SIGKILL
    assert os.readlink(killed / "checkpoints" / "last.ckpt") == "step-00000003.ckpt"
    # Recomputing activations changes memory and time, not one bit; nor does keeping gathered weights, also those of the
    # average, which a look at it leaves behind.
    saving = [f"trainer.activation_checkpointing={'attention' if strategy == 'fsdp2' else 'true'}"]
    if strategy == "fsdp2":
        saving += [
            "strategy.reshard_after_forward=false",
            f"+callbacks.look={{{VALIDATION}, every_steps: 1}}",
        ]
    assert world.run(killed, strategy, 2, *saving) == [0, 0]
    for rank in (0, 1):
        assert seen(killed)[rank] == [
            p for p in shared[rank] if p >= 12
        ]  # goes on at the fourth batch of four

    one, whole, resumed = exported(single), exported(through), exported(killed)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    for key, weight in whole.items():
        # Matrices' gradients are sums in bf16, rounded in another order here; Muon's iteration and Adam's division
        # amplify that in single numbers. Norms and heads began at 0: 3 % is of all that they learned.
        apart = (weight.float() - one[key].float()).norm()
        assert apart <= (0.003 if weight.dtype == torch.bfloat16 else 0.03) * one[key].float().norm(), key
    # Behind the sound is no matrix in bf16 but its own: equal but for the last bits.
    sound = "final_linear_audio.weight"
    assert (whole[sound] - one[sound]).norm() < 1e-6 * one[sound].norm()
    assert (whole["adapter.video_embedder.weight"] - one["adapter.video_embedder.weight"]).norm() < 1e-3
    assert json.loads((killed / "run.json").read_text())["status"] == "finished"


def test_a_checkpoint_of_two_processes_is_continued_by_one(world, single, tmp_path) -> None:
    folder = tmp_path / "run"
    world.run(folder, "ddp", 2, "+callbacks.die={_target_: training_stub.DieAt, batch: 4}")
    assert world.run(folder, "single", 1) == [0]
    assert seen(folder)[0] == list(range(12, 20))
    one, mixed = exported(single), exported(folder)
    key = "adapter.video_embedder.weight"
    assert (mixed[key] - one[key]).norm() < 1e-3
