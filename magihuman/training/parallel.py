"""Training on several devices: Lightning strategies by name, FSDP2 sharding, averages over processes, compilation.

| strategy | what each process holds | for |
|---|---|---|
| single | everything, one process | puppets, one GPU |
| ddp | a copy of everything | small models on many GPUs |
| fsdp2 | a shard of weights, gradients, optimiser and average | large models; any number of optimisers |
| zero1, zero2, zero3 | DeepSpeed: a shard of the optimiser; and of gradients; and of weights | one optimiser, by preference |

fsdp2 shards within each node and keeps one replica per node (hybrid sharding, HSDP), so that weights are gathered over the
fast links in a node and only gradients cross the network; `strategy.replicas` sets another number. With replicas=1 a
shard is the smallest, for what does not fit one node. With ddp and fsdp2 `strategy.context_parallel` splits the tokens of a
batch over neighbouring processes as well (`magihuman.context_parallel`).

The matrices of each half of a block (attention, MLP) are gathered together, by default (`strategy.gather`) in the dtype
of the products: with bf16 half the traffic and memory of fp32, and the same numbers, since the network casts them there
anyway (SPEC 1.5). Norms, embedders, heads, and the average of gradients over processes stay in fp32.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.distributed.checkpoint.staging import AsyncStager
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from magihuman.config import StrategySettings, TrainerSettings
from magihuman.errors import UserError
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import Block
from magihuman.models.layers import ExpertLinear
from magihuman.schema import one_line
from magihuman.training.checkpoint import SyncedFiles, check_shares

FP32_COMPILES_SINCE = "2.13"
"""torch 2.11 loses the gradients of compiled feed-forward halves in fp32 (bf16 is right); 2.13 does not, 2.12 was not
tried."""


def check_device(trainer: TrainerSettings) -> None:
    """Raise unless the machine has the devices that `trainer` asks for.

    Raises:
        UserError: no CUDA device, or fewer than asked for.
    """
    if trainer.accelerator != "cuda":
        return
    found = torch.cuda.device_count()
    if found < trainer.devices:
        raise UserError(
            f"trainer.accelerator=cuda with trainer.devices={trainer.devices}, but {found} CUDA devices are visible; "
            "lower trainer.devices, or set trainer.accelerator=cpu"
        )


def check_launch(trainer: TrainerSettings) -> None:
    """Raise unless torchrun or Slurm starts as many processes as `trainer` asks for.

    Raises:
        UserError: another number, or a Slurm job of several tasks without srun.
    """
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    wanted, environment = trainer.devices * trainer.nodes, os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        started = int(environment.get("WORLD_SIZE", 1))
        if started != wanted:
            raise UserError(
                f"torchrun started {started} processes, but trainer.devices * trainer.nodes = {wanted}; set "
                "trainer.devices to its --nproc-per-node, trainer.nodes to its --nnodes, and a strategy for several processes"
            )
        return
    if not SLURMEnvironment.detect():
        return
    tasks = int(environment["SLURM_NTASKS"])
    by_srun = "SLURM_PROCID" in environment and (tasks == 1 or "SLURM_STEP_ID" in environment)
    if tasks != wanted or not by_srun:
        raise UserError(
            f"this is a Slurm job of {tasks} tasks (SLURM_NTASKS), which srun has to start, and trainer.devices * "
            f"trainer.nodes = {wanted}: start it with srun --nodes={trainer.nodes} --ntasks-per-node={trainer.devices}, or "
            "without Slurm's part in it with env -u SLURM_NTASKS python -m magihuman.train ..."
        )
    try:
        SLURMEnvironment(auto_requeue=False).validate_settings(trainer.devices, trainer.nodes)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{one_line(str(error))} (trainer.devices={trainer.devices}, trainer.nodes={trainer.nodes})"
        ) from None


class _CheckedLoad(Strategy):
    """Strategy that compares the checksums of a checkpoint folder before it loads it."""

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        check_shares(Path(checkpoint_path), self.global_rank, self.world_size)  # type: ignore[attr-defined]
        return super().load_checkpoint(checkpoint_path, weights_only)


class FSDP2Strategy(_CheckedLoad, ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with a mesh of replicas, checked checkpoints, and asynchronous ones.

    Args:
        replicas: copies of the network (hybrid sharding); each is sharded over neighbouring processes.
        asynchronous: `save_checkpoint` returns when the state is copied to the CPU, and a thread writes it.

    Attributes:
        writing: result of the latest asynchronous write, or None; `.result()` waits and raises its error.
    """

    def __init__(self, replicas: int = 1, asynchronous: bool = False) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1)
        self.replicas, self.asynchronous = replicas, asynchronous
        self.writing: Future[Any] | None = None
        self._writers: Any = None

    def setup_environment(self) -> None:
        """Start the processes and make the mesh of all of them: [shard], or [replicate, shard]."""
        self._setup_distributed()
        self._device_mesh = make_mesh(self.root_device.type, self.world_size, self.replicas)
        if self.global_rank == 0:
            print(f"   {describe_mesh(self.world_size, self.replicas)}", flush=True)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh
        if self.asynchronous:  # a group of their own: the writers talk while the training does
            self._writers = torch.distributed.new_group(backend="gloo")

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every process has samples of its own."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The network's shards; where they are written asynchronously, not copied yet."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        if not self.asynchronous:
            return super().lightning_module_state_dict()
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimiser's shards; where they are written asynchronously, not copied yet."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        if not self.asynchronous:
            return super().optimizer_state(optimizer)
        assert self.model is not None
        return dict(get_optimizer_state_dict(self.model, getattr(optimizer, "_optimizer", optimizer)))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a folder in Lightning's layout; asynchronously, `writing` says when it is complete."""
        from torch.distributed.checkpoint import async_save

        if not self.asynchronous:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        path.mkdir(parents=True, exist_ok=True)
        entries = {"state_dict": checkpoint.pop("state_dict")}
        entries |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        if self.global_rank == 0:
            torch.save(checkpoint, path / "meta.pt")
        self.writing = async_save(  # type: ignore[assignment]
            entries, checkpoint_id=path, process_group=self._writers, async_stager=_Copies()
        )


class _Copies(AsyncStager):
    """A stager of `async_save` that copies to the CPU in the training's thread; torch's own cannot copy 8-bit moments, nor
    can `Tensor.clone`."""

    _synchronize_after_execute = False

    def stage(self, state: dict[str, Any]) -> Any:
        return tree_map_only(torch.Tensor, _copy, state)

    def synchronize_staging(self) -> None: ...

    def close(self) -> None: ...


def _copy(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return tensor  # of a shard: its mesh
    if is_traceable_wrapper_subclass(tensor):  # a shard (DTensor), 8-bit moments, or both
        names, context = tensor.__tensor_flatten__()
        parts = {name: _copy(getattr(tensor, name)) for name in names}
        return tensor.__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")


def make_mesh(device: str, processes: int, replicas: int = 1) -> Any:
    """Device mesh of FSDP2: [shard], or [replicate, shard] with neighbouring processes in a shard group.

    Args:
        device: "cpu" or "cuda".
    """
    from torch.distributed.device_mesh import init_device_mesh

    if replicas == 1:
        return init_device_mesh(device, (processes,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, processes // replicas), mesh_dim_names=("replicate", "shard"))


def describe_mesh(processes: int, replicas: int) -> str:
    """One line for the log."""
    if replicas == 1:
        return f"mesh: weights, gradients and optimiser are sharded over {processes} process{'es' * (processes > 1)}"
    return f"mesh: {replicas} replicas (strategy.replicas), each sharded over {processes // replicas} processes"


class ZeroStrategy(_CheckedLoad, DeepSpeedStrategy):
    """Lightning's strategy for DeepSpeed, with checked checkpoints."""

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Lightning has divided the loss by the number of accumulated batches, and DeepSpeed would do so again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


def build_strategy(
    settings: StrategySettings, trainer: TrainerSettings, alternating: bool = False, asynchronous: bool = False
) -> Strategy | str:
    """The Lightning strategy for `settings`.

    Args:
        alternating: whether the recipe's steps train one of several networks each.
        asynchronous: whether the training goes on while FSDP2 writes a checkpoint.

    Raises:
        UserError: DeepSpeed is asked for and not installed, or FSDP2 is to offload and there is no GPU.
    """
    if settings.name == "single":
        return "auto"
    if settings.name == "ddp":
        # All weights take part in every step (a missing modality contributes zero), so DDP need not search for
        # unused ones; unless each step trains another network.
        return DDPStrategy(find_unused_parameters=alternating, broadcast_buffers=False, gradient_as_bucket_view=True)
    if settings.name == "fsdp2":
        if settings.offload and not torch.cuda.is_available():
            raise UserError(
                "strategy.offload=true keeps shards in pinned memory next to a GPU, and there is none; leave it out"
            )
        return FSDP2Strategy(trainer.nodes if settings.replicas == "auto" else settings.replicas, asynchronous)
    _note_compilation()
    return _zero(int(settings.name[-1]), settings.offload)


@rank_zero_only
def _note_compilation() -> None:
    """Say where DeepSpeed will wait: for the lock of a compilation, which stays behind when that is killed."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        print(
            f"note: DeepSpeed waits while {lock} exists, which a process that compiles there made "
            f"{time.time() - lock.stat().st_mtime:.0f} s ago; if none is running any more, stop this and remove that file",
            flush=True,
        )


def _zero(stage: int, offload: bool) -> Strategy:
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise UserError(
            f"strategy=zero{stage} needs DeepSpeed; install it with pip install -e '.[scale]', or choose strategy=fsdp2"
        )
    return ZeroStrategy(stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3)


def plugins(settings: StrategySettings) -> list[Any]:
    """Lightning plugins: synced checkpoint files, and Slurm without Lightning's own requeue (see `checkpoint`)."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    found: list[Any] = []
    if settings.name in ("single", "ddp"):
        found.append(SyncedFiles())
    if SLURMEnvironment.detect() and "TORCHELASTIC_RUN_ID" not in os.environ:
        found.append(SLURMEnvironment(auto_requeue=False))
    return found


def blocks(denoiser: Denoiser) -> Iterator[Block]:
    """The transformer's layers."""
    yield from denoiser.model.block.layers  # type: ignore[misc]


def shard(
    denoiser: Denoiser,
    mesh: Any,
    *,
    reshard_after_forward: bool = True,
    offload: bool = False,
    gather: Literal["compute", "fp32"] = "compute",
) -> None:
    """Shard every block, then the remaining weights, with FSDP2, in place.

    Args:
        mesh: device mesh of `make_mesh`; of its dimensions the last shards, one before it replicates.
        reshard_after_forward: free a block's gathered weights after its forward pass (less memory, one more
            gather).
        offload: keep shards and optimiser on the CPU.
        gather: compute: fp32 matrices of the blocks are gathered in the compute dtype; fp32: as they are stored.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    model, dtype = denoiser.model, denoiser.model.compute_dtype
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    options = {"mesh": mesh, "reshard_after_forward": reshard_after_forward, "offload_policy": policy}
    if gather == "fp32" or dtype == torch.float32:
        for block in blocks(denoiser):
            fully_shard(block, **options)
        fully_shard(model, **options)
        return
    # FSDP2 has one precision for all weights of a unit, and a unit takes what is left to it: first all but the matrices.
    matrices = {weight for m in model.modules() if isinstance(m, ExpertLinear) for weight in m.parameters()}
    fully_shard(model, **options, ignored_params=matrices)
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(denoiser):
        for half in (block.attention, block.mlp):
            others = set(half.parameters()) - matrices
            fully_shard(half, **options, mp_policy=precision, ignored_params=others)


def fill(module: nn.Module, weights: Mapping[str, torch.Tensor] | None, device: torch.device) -> None:
    """Give a sharded module on the meta device real memory and the weights that rank 0 holds.

    Args:
        weights: whole state dict on rank 0; None elsewhere. Only one process ever holds all of it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    module.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(module, dict(weights or {}), options=options)


def average_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Average gradients over processes: for small networks that are not sharded, next to one that FSDP2 shards.

    A gradient that is missing on some processes (their clips have no sound) counts as zero there.
    """
    weights = list(weights)
    found = torch.tensor([float(weight.grad is not None) for weight in weights], device=weights[0].device)
    torch.distributed.all_reduce(found)
    for weight, processes in zip(weights, found.tolist(), strict=True):
        if processes:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.distributed.all_reduce(weight.grad)
            weight.grad /= torch.distributed.get_world_size()


def gathered(value: Any) -> list[Any]:
    """The value of every process, by rank, on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, value)
    return everywhere


def average_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Means of metrics over the processes that have them; every process has to call it, and gets all names."""
    everywhere = gathered(dict(metrics))
    names = dict.fromkeys(name for each in everywhere for name in each)
    return {name: fmean(each[name] for each in everywhere if name in each) for name in names}


def zero3_units(denoiser: Denoiser) -> None:
    """Tell DeepSpeed to fetch a block's weights together: its attention reads the weights of its parts itself."""
    from deepspeed.utils import set_z3_leaf_modules

    model = denoiser.model
    set_z3_leaf_modules(denoiser, [type(model.block.layers[0])])


def whole_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """Gather a (sharded or whole) module's state on the CPU; complete on rank 0, empty on other ranks if sharded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if any(hasattr(weight, "ds_id") for weight in module.parameters()):
        return _whole_zero3(module)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    options = StateDictOptions(full_state_dict=distributed, cpu_offload=distributed)
    state = get_model_state_dict(module, options=options)
    return {name: tensor.detach().cpu() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def _whole_zero3(module: nn.Module) -> dict[str, torch.Tensor]:
    from deepspeed import zero

    state = {name: buffer.detach().cpu() for name, buffer in module.named_buffers()}
    for name, weight in module.named_parameters():
        with zero.GatheredParameters([weight]):
            state[name] = weight.detach().cpu().clone()
    return {name: state[name] for name in module.state_dict()}


def compile_blocks(denoiser: Denoiser) -> None:
    """Compile every block in place; state-dict keys stay as they are, equal blocks share one compilation.

    Raises:
        UserError: a version of torch that compiles fp32 blocks to wrong gradients.
    """
    if denoiser.model.compute_dtype == torch.float32 and TorchVersion(torch.__version__) < FP32_COMPILES_SINCE:
        raise UserError(
            f"trainer.compile=true with trainer.precision=fp32 gives wrong gradients with torch {torch.__version__}; "
            f"use precision=bf16, compile=false, or torch {FP32_COMPILES_SINCE}"
        )
    from torch import _dynamo

    # All blocks share one cache: three kinds of block, ragged batches or not, with and without gradients, and
    # a static before a dynamic version of each.
    _dynamo.config.recompile_limit = max(64, _dynamo.config.recompile_limit)
    for block in blocks(denoiser):
        block.compile(dynamic=None)
