"""FSDP2 with matrices gathered in bf16: the numbers of fp32 gathers, and fp32 wherever the specification asks for it."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from free_port import free_port
from small_dit import LOCAL, SIZE, inputs, loss

from magihuman import zoo
from magihuman.models import lora
from magihuman.models.config import PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.training import parallel

KINDS = ("trained", "frozen")
"""A network that is trained whole from fp32 master weights, and a frozen bf16 base with a trained LoRA."""


def network(kind: str, device: str = "cpu") -> Denoiser:
    stored = torch.float32 if kind == "trained" else torch.bfloat16
    pack = PackConfig(2, "v2", 1)
    model = zoo.build(LOCAL, pack, compute_dtype=torch.bfloat16, linear_dtype=stored, device=device, seed=3)
    if kind == "frozen":
        model.requires_grad_(False)
        lora.add_lora(model.model, "student", SIZE, 7)
    model.model.gradient_checkpointing = True
    return model


def start(kind: str) -> dict[str, torch.Tensor]:
    """Weights of which none is at its initial 0, and no norm is a number of bf16."""
    state = network(kind).state_dict()
    generator = torch.Generator().manual_seed(4)
    for name, weight in state.items():
        if weight.ndim == 1 or name.startswith("model.final_linear") or name.endswith("lora.student.B"):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return state


def run(rank: int, port: int, folder: str) -> None:
    """Two steps of gradients with each way to gather; what the forward passes saw of the weights' dtypes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=4)
    mesh = parallel.make_mesh("cpu", 4, replicas=2)
    reduced: set[torch.dtype] = set()
    reduce_scatter, all_reduce = torch.distributed.reduce_scatter_tensor, torch.distributed.all_reduce

    def spied(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            reduced.update(tensor.dtype for tensor in tensors)
            return function(*args, **kwargs)

        return call

    torch.distributed.reduce_scatter_tensor = spied(reduce_scatter)
    torch.distributed.all_reduce = spied(all_reduce)
    found: dict[str, Any] = {}
    for kind in KINDS:
        weights = start(kind) if rank == 0 else None
        for gather in ("compute", "fp32"):
            denoiser = network(kind, "meta")
            parallel.shard(denoiser, mesh, gather=gather)
            parallel.fill(denoiser, weights, torch.device("cpu"))
            seen: dict[str, torch.dtype] = {}

            def look(module: Any, *_: Any, seen: dict[str, torch.dtype] = seen) -> None:
                seen.update({name: weight.dtype for name, weight in module.named_parameters()})

            block = denoiser.model.block.layers[1]
            for half in (block.attention, block.mlp):  # after FSDP2's own hook, which gathers
                half.register_forward_pre_hook(look)
            reduced.clear()
            name = "student" if kind == "frozen" else None
            for step in range(2):  # a gradient is the sum over micro-batches
                video, audio, text = inputs([3, 3, 2, 4], seed=step)
                rows = slice(rank, rank + 1)
                options = {} if name is None else {"lora": name}
                loss(denoiser(video[rows], audio[rows], text[rows], **options)).backward()
            stored = {key: weight.dtype for key, weight in denoiser.named_parameters()}
            gradients = {
                key: weight.grad.full_tensor() for key, weight in denoiser.named_parameters() if weight.grad is not None
            }
            found[f"{kind} {gather}"] = {
                "seen": seen,
                "stored": stored,
                "gradients": gradients,
                "reduced": set(reduced),
            }
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    folder, port = tmp_path_factory.mktemp("gather"), free_port()
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=run, args=(rank, port, str(folder))) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * 4
    return torch.load(folder / "found.pt", weights_only=False)


def alone(kind: str) -> dict[str, torch.Tensor]:
    """Gradients of one process with all samples."""
    denoiser = network(kind)
    denoiser.load_state_dict(start(kind))
    for step in range(2):
        video, audio, text = inputs([3, 3, 2, 4], seed=step)
        for i in range(4):
            rows = slice(i, i + 1)
            options = {"lora": "student"} if kind == "frozen" else {}
            (loss(denoiser(video[rows], audio[rows], text[rows], **options)) / 4).backward()
    return {key: weight.grad for key, weight in denoiser.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_two_replicas_of_two_shards_have_the_gradients_of_one_process(found, kind) -> None:
    one = alone(kind)
    compute, fp32 = (found[f"{kind} {gather}"]["gradients"] for gather in ("compute", "fp32"))
    assert one.keys() == compute.keys() == fp32.keys()
    for key, gradient in fp32.items():
        # The same products in bf16, summed in fp32: what is gathered in bf16 is what is multiplied.
        assert torch.equal(compute[key], gradient), key
        torch.testing.assert_close(gradient, one[key], rtol=1e-4, atol=1e-6)
    assert all(gradient.dtype == torch.float32 for gradient in compute.values())


def test_matrices_are_gathered_in_bf16_and_nothing_else(found) -> None:
    for kind in KINDS:
        seen, stored = found[f"{kind} compute"]["seen"], found[f"{kind} compute"]["stored"]
        matrices = {name for name in seen if "linear" in name or "proj" in name}
        assert {name for name, dtype in seen.items() if dtype == torch.bfloat16} == matrices
        assert {seen[name] for name in seen if "norm" in name} == {torch.float32}
        # Shards, which the optimiser updates, are as they were.
        assert stored == found[f"{kind} fp32"]["stored"]
        assert {dtype for name, dtype in stored.items() if "final" in name or "adapter" in name} == {torch.float32}
    seen = found["trained fp32"]["seen"]
    assert set(seen.values()) == {torch.float32}


def test_gradients_are_averaged_in_fp32(found) -> None:
    for run_ in found.values():
        assert run_["reduced"] == {torch.float32}
