"""Context parallelism (Ulysses): one clip over several processes (SPEC 1.7).

Every process has the whole network and the same inputs, and computes a share of each modality's tokens. Around
attention one all-to-all exchanges tokens for heads, so that a process attends over all tokens with its share of the
heads, and another one exchanges them back. Velocities are gathered at the end: every process returns all of them.
Jacobs et al. 2023, arXiv 2309.14509. For inference only: it has no gradients.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from magihuman.errors import UserError
from magihuman.models.attention import Attend
from magihuman.models.config import DiTConfig
from magihuman.models.tokens import Layout

if TYPE_CHECKING:
    from inference.loading import Source
    from inference.pipeline import Pipeline


@dataclass(frozen=True, eq=False, kw_only=True)
class LayoutShard(Layout):
    """One process's share of a layout, with the coordinates, modalities and rotary table of its own tokens.

    Attributes:
        whole: layout of all processes together.
        shares: number of packed rows by process and modality: shares[process][modality].
        rank, group: this process, and the torch.distributed group of all of them.
        positions: int64 [L], index in process-major order of each packed row of `whole`.
    """

    whole: Layout
    shares: tuple[tuple[int, int, int], ...]
    rank: int
    group: Any
    positions: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """This process's rows of video, audio and text."""
        return self.shares[self.rank]

    def route(self, rate: float, generator: torch.Generator | None = None) -> tuple[Tensor, Layout]:
        """Raises ValueError: token routing belongs to training."""
        raise ValueError("tokens that are split over processes cannot be routed")

    def attend(self, attention: Attend, q: Tensor, k: Tensor, v: Tensor, backend: str, window: int | None) -> Tensor:
        """Attention of this process's tokens over all tokens.

        Args:
            q: [n,Hq,D], k, v: [n,Hkv,D] of the process's own n tokens.

        Returns:
            [n,Hq,D].
        """
        processes, own = len(self.shares), len(q)
        counts = [sum(share) for share in self.shares]
        # Heads are grouped by the process that receives them: its queries, keys and values travel as one block.
        parts = [x.unflatten(1, (processes, -1)) for x in (q, k, v)]  # [n,P,H/P,D]
        widths = [part.shape[2] for part in parts]
        packed = torch.cat(parts, dim=2).transpose(0, 1).flatten(0, 1)  # [P n,heads,D]
        everyone = self._exchange(packed, [own] * processes, counts)[self.positions]
        queries, keys, values = everyone.split(widths, dim=1)
        out = attention(queries, keys, values, self.whole, backend, window)  # [L,Hq/P,D]
        back = torch.empty_like(out)
        back[self.positions] = out
        mine = self._exchange(back, counts, [own] * processes)
        return mine.unflatten(0, (processes, own)).transpose(0, 1).flatten(1, 2)

    def gather(self, rows: Tensor, modality: int) -> Tensor:
        """All processes' rows [n,width] of a modality, in packed order."""
        counts = [share[modality] for share in self.shares]
        processes = len(counts)
        return self._exchange(rows.repeat(processes, 1), [len(rows)] * processes, counts)

    def _exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=self.group)
        return out


def shard_layout(whole: Layout, rank: int, processes: int, group: Any = None) -> LayoutShard:
    """The share of process `rank`: a contiguous run of each modality's tokens, earlier processes get the odd one."""
    shares = [[size // processes + (i < size % processes) for i in range(processes)] for size in whole.sizes]
    by_process = tuple((video, audio, text) for video, audio, text in zip(*shares, strict=True))
    starts = [0, whole.sizes[0], whole.sizes[0] + whole.sizes[1]]
    rows = []  # packed rows of every process, process-major
    for process in range(processes):
        for modality in range(3):
            first = starts[modality] + sum(shares[modality][:process])
            rows.append(torch.arange(first, first + shares[modality][process]))
    order = torch.cat(rows)
    positions = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    before = sum(sum(share) for share in by_process[:rank])
    device = whole.coords.device
    own = order[before : before + sum(by_process[rank])].to(device)
    values: dict[str, Any] = {field.name: getattr(whole, field.name) for field in fields(Layout) if field.init}
    values |= {"coords": whole.coords[own], "modality": whole.modality[own]}
    values["rotary"] = None if whole.rotary is None else whole.rotary[own]
    return LayoutShard(**values, whole=whole, shares=by_process, rank=rank, group=group, positions=positions.to(device))


def require_divisible_heads(config: DiTConfig, processes: int) -> None:
    """Raises UserError when the heads cannot be split evenly, listing the numbers of processes that can."""
    shared = config.num_query_groups
    if shared % processes:
        able = [n for n in range(1, shared + 1) if shared % n == 0]
        raise UserError(
            f"{shared} key/value heads cannot be split over {processes} processes; start "
            f"{', '.join(map(str, able))} of them for one clip"
        )


def parallelise(model: nn.Module, group: Any = None) -> None:
    """Make a `SingleStreamDiT` compute together with the same network of the other processes.

    It takes and returns whole tensors as before; all processes have to call it with the same inputs.

    Args:
        group: of torch.distributed, initialised before; None for all processes.

    Raises:
        UserError: key/value heads that cannot be split over the processes.
    """
    rank, processes = dist.get_rank(group), dist.get_world_size(group)
    config: Any = model.config
    require_divisible_heads(config, processes)
    if processes == 1:
        return
    known: dict[int, LayoutShard] = {}

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if torch.is_grad_enabled():
            raise RuntimeError("context parallelism is for inference: call the network under torch.no_grad()")
        *tokens, whole = args
        # A layout is made once per request and cached by the denoiser; the share of the last one is cached here.
        if id(whole) not in known or known[id(whole)].whole is not whole:
            known.clear()
            known[id(whole)] = shard_layout(whole, rank, processes, group)
        layout = known[id(whole)]
        own = []
        for modality, x in enumerate(tokens):
            first = sum(share[modality] for share in layout.shares[:rank])
            own.append(x[first : first + layout.sizes[modality]])
        if kwargs.get("rotary") is not None:
            raise ValueError("give the rotary table with the layout: layout.with_rotary(table)")
        return (*own, layout), kwargs

    def leave(_: nn.Module, __: Any, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        (layout,) = known.values()
        return layout.gather(outputs[0], 0), layout.gather(outputs[1], 1)

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave)


def check_processes(source: "Source", processes: int) -> None:
    """Raises UserError when a network of the command cannot be split over that many processes."""
    for config in (source.config, source.second):
        if config is not None:
            require_divisible_heads(config.model, processes)


def parallelise_pipeline(pipeline: "Pipeline") -> None:
    """Make the pipeline's networks compute together with those of the other processes.

    Every process reads the same prompt, draws the same noise and ends with the same latents.
    """
    group = dist.new_group(backend="nccl") if pipeline.device.type == "cuda" else None
    for denoiser in (pipeline.denoiser, None if pipeline.second is None else pipeline.second.denoiser):
        if denoiser is not None:
            parallelise(denoiser.model, group)
