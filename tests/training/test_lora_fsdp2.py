"""Two processes share one frozen bf16 base with fp32 adapters (FSDP2) and compute what one process computes."""

import multiprocessing
import os
from pathlib import Path

import torch
from free_port import free_port
from small_dit import LOCAL, SIZE, inputs, loss
from torch import Tensor

from magihuman import zoo
from magihuman.models import lora
from magihuman.models.config import PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.training import parallel

STEPS = 2


def base() -> Denoiser:
    """The same random network everywhere, stored as the release stores it."""
    model = zoo.build(LOCAL, PackConfig(2, "v2", 1), compute_dtype=torch.float32, linear_dtype=torch.bfloat16, seed=3)
    torch.nn.init.normal_(model.model.final_linear_video.weight, std=0.1, generator=torch.Generator().manual_seed(4))
    return adapt(model)


def adapt(network: Denoiser) -> Denoiser:
    network.requires_grad_(False)
    for name in ("critic", "student"):
        lora.add_lora(network.model, name, SIZE, 7)
    network.model.gradient_checkpointing = True
    return network


def train(network: Denoiser, rows: slice) -> Tensor:
    """Updates that take turns, with calls of the base in between; returns the base's last prediction."""
    optimizers = {
        name: torch.optim.SGD(lora.lora_parameters(network, name).values(), lr=0.1) for name in ("critic", "student")
    }
    for step in range(STEPS):
        for name, optimizer in optimizers.items():
            video, audio, text = inputs([3, 3], seed=step)
            batch = video[rows], audio[rows], text[rows]
            with torch.no_grad():
                teacher = network(*batch)
            predicted = network(*batch, lora=name)
            with torch.no_grad():
                network(*batch, lora="critic")  # between a pass and its recomputation
            (loss(predicted) - (predicted[0] * teacher[0]).mean()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return network(*inputs([3, 3]))[0]


def child(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    weights = base().state_dict() if rank == 0 else None
    with torch.device("meta"):
        network = adapt(
            zoo.build(
                LOCAL, PackConfig(2, "v2", 1), compute_dtype=torch.float32, linear_dtype=torch.bfloat16, device="meta"
            )
        )
    parallel.shard(network, mesh)
    parallel.fill(network, weights, torch.device("cpu"))
    kinds = {key.rsplit(".", 1)[-1]: p.dtype for key, p in network.named_parameters() if "mlp.down" in key}
    assert kinds == {"weight": torch.bfloat16, "A": torch.float32, "B": torch.float32}
    last = train(network, slice(rank, rank + 1))
    state = parallel.whole_state_dict(network.model)
    if rank == 0:
        torch.save({"state": state, "last": last}, Path(folder) / "sharded.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_shard_the_base_with_its_adapters(tmp_path) -> None:
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=child, args=(rank, port, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    alone = base()
    before = {key: tensor.clone() for key, tensor in alone.model.state_dict().items()}
    last = train(alone, slice(0, 2))
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)

    one, two = alone.model.state_dict(), sharded["state"]
    assert one.keys() == two.keys()
    for key in one:
        if lora.lora_of(key) is None:
            assert torch.equal(two[key], before[key]), key
        else:
            torch.testing.assert_close(
                two[key], one[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    moved = max(float((two[k] - before[k]).norm()) for k in two if k.endswith("down_proj.lora.student.B"))
    assert moved > 1e-3
    torch.testing.assert_close(sharded["last"], last, rtol=1e-4, atol=1e-5)
