"""Two processes train what one trains: each sample once, the same weights, exact after a kill."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from free_port import free_port
from processes import Launcher, exported, seen

from magihuman.training.parallel import average_gradients, average_metrics, make_mesh

VALIDATION = "_target_: magihuman.training.callbacks.Validation"


@pytest.fixture(scope="module")
def world(shards) -> Launcher:
    return Launcher(shards)


@pytest.fixture(scope="module")
def single(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "single"
    assert world.run(folder, "single", 1) == [0]
    return folder


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
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
        saving += ["strategy.reshard_after_forward=false", f"+callbacks.look={{{VALIDATION}, every_steps: 1}}"]
    assert world.run(killed, strategy, 2, *saving) == [0, 0]
    for rank in (0, 1):
        assert seen(killed)[rank] == [p for p in shared[rank] if p >= 12]  # goes on at the fourth batch of four

    whole, resumed = exported(through), exported(killed)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert_close(whole, exported(single))
    assert json.loads((killed / "run.json").read_text())["status"] == "finished"


def assert_close(whole: dict[str, torch.Tensor], one: dict[str, torch.Tensor]) -> None:
    """Weights of several processes against those of one."""
    for key, weight in whole.items():
        # Matrices' gradients are sums in bf16, rounded in another order here; Muon's iteration and Adam's division
        # amplify that in single numbers. Norms and heads began at 0: 3 % is of all that they learned.
        apart = (weight.float() - one[key].float()).norm()
        assert apart <= (0.003 if weight.dtype == torch.bfloat16 else 0.03) * one[key].float().norm(), key
    # Behind the sound is no matrix in bf16 but its own: equal but for the last bits.
    sound = "final_linear_audio.weight"
    assert (whole[sound] - one[sound]).norm() < 1e-6 * one[sound].norm()
    assert (whole["adapter.video_embedder.weight"] - one["adapter.video_embedder.weight"]).norm() < 1e-3


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_replicas_of_shards_on_two_nodes_train_what_one_process_trains(world, single, tmp_path, size) -> None:
    """HSDP: [2 replicas, 1 shard] and [2, 2]."""
    through, killed = tmp_path / "through", tmp_path / "killed"
    assert world.run(through, "fsdp2", size, nodes=2) == [0] * size
    assert sorted(position for rank in seen(through).values() for position in rank) == list(range(20))
    assert_close(exported(through), exported(single))
    if size == 4:
        die = "+callbacks.die={_target_: training_stub.DieAt, batch: 4}"
        assert world.run(killed, "fsdp2", size, die, nodes=2)[0] == -signal.SIGKILL
        checkpoint = killed / "checkpoints" / "step-00000003.ckpt"
        assert len(list(checkpoint.glob("*.distcp"))) == size
        saving = "trainer.activation_checkpointing=attention"
        assert world.run(killed, "fsdp2", size, saving, nodes=2) == [0] * size
        whole, resumed = exported(through), exported(killed)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_checkpoint_of_two_processes_is_continued_by_one(world, single, tmp_path) -> None:
    folder = tmp_path / "run"
    world.run(folder, "ddp", 2, "+callbacks.die={_target_: training_stub.DieAt, batch: 4}")
    assert world.run(folder, "single", 1) == [0]
    assert seen(folder)[0] == list(range(12, 20))
    one, mixed = exported(single), exported(folder)
    key = "adapter.video_embedder.weight"
    assert (mixed[key] - one[key]).norm() < 1e-3


def of_two(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    weights[0].grad = torch.tensor([1.0, 5.0]) + rank
    if rank == 0:
        weights[1].grad = torch.tensor([4.0, 6.0])
    average_gradients(weights)
    metrics = average_metrics({"video": 1.0 + rank, **({"audio": 5.0} if rank == 0 else {})})
    mesh = make_mesh("cpu", 2, replicas=2)
    found = {
        "gradients": [None if w.grad is None else w.grad.tolist() for w in weights],
        "metrics": metrics,
        "mesh": dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_a_mesh_and_averages_of_two_processes_of_which_one_has_no_sound(tmp_path) -> None:
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    processes = [context.Process(target=of_two, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["gradients"] == [[1.5, 5.5], [2.0, 3.0], None]
        assert found["metrics"] == {"video": 1.5, "audio": 5.0}
        assert found["mesh"] == {"replicate": 2, "shard": 1}
