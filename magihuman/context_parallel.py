"""Context parallelism (Ulysses): the tokens of a batch over several processes, in inference and training (SPEC 1.7).

Every process has the whole network and the same inputs, and computes a share of each modality's tokens. Around
attention one all-to-all exchanges tokens for heads, so that a process attends over all tokens with its share of the
heads, and another one exchanges them back. Velocities are gathered at the end: every process returns all of them.
Jacobs et al. 2023, arXiv 2309.14509.

Gradients. Let L be the loss of the batch and P the number of processes. From equal velocities every process computes the
same L and the same dL/dv of all rows v.

- Behind the gather a process keeps the part of dL/dv that belongs to its own rows. An all-to-all only moves numbers, so
  its gradient is the all-to-all with swapped counts, and process i ends with g_i, the part of dL/dW that comes through
  its own tokens: dL/dW = g_1 + ... + g_P.
- DDP and FSDP2 average gradients over all processes, those of a group included, and the mean of the g_i is dL/dW / P.
  Therefore the gather's gradient is multiplied by P. Over D groups with the losses L_d the average is then
  1/(D P) sum_d sum_i P g_di = 1/D sum_d dL_d/dW, as with D processes that have one batch each.
- Weights outside of the network (heads of a discriminator) have the whole gradient on every process, and their average
  is right as it is. The gradient of the network's inputs is gathered and divided by P again, so that what lies before
  the network has the whole gradient, too.

Per layer and process, in elements of the compute dtype, for L tokens, Hq query and Hkv key/value heads of dimension D:
one direction sends (2 Hq + 2 Hkv) D L (P - 1) / P^2. The backward pass sends as much again, and recomputed activations
(`trainer.activation_checkpointing`, either kind) once more. Activations take 1/P of the memory; latents, velocities and
the loss are whole on every process.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from magihuman.errors import UserError
from magihuman.models.attention import Attend
from magihuman.models.config import DiTConfig
from magihuman.models.tokens import Layout
from magihuman.schema import divisors

_KEPT_SHARES = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class LayoutShard(Layout):
    """One process's share of a layout, with the coordinates, modalities and rotary table of its own tokens.

    Attributes:
        whole: layout of all processes together.
        shares: number of packed rows by process and modality: shares[process][modality].
        rank, group: this process, and the torch.distributed group of all of them.
        rows: int64 [L], packed rows of `whole` in process-major order; positions: its inverse.
    """

    whole: Layout
    shares: tuple[tuple[int, int, int], ...]
    rank: int
    group: Any
    rows: Tensor
    positions: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """This process's rows of video, audio and text."""
        return self.shares[self.rank]

    def route(self, rate: float, generator: torch.Generator | None = None) -> tuple[Tensor, Layout]:
        """Raises ValueError: of a random subset of the tokens the processes would hold unequal shares."""
        raise ValueError("tokens that are split over processes cannot be routed")

    def attend(self, attention: Attend, q: Tensor, k: Tensor, v: Tensor, backend: str, window: int | None) -> Tensor:
        """Attention of this process's tokens over all tokens.

        Args:
            q: [n,Hq,D], k, v: [n,Hkv,D] of the process's own n tokens.

        Returns:
            [n,Hq,D].
        """
        processes, own = len(self.shares), len(q)
        # Heads are grouped by the process that receives them: its queries, keys and values travel as one block.
        parts = [x.unflatten(1, (processes, -1)) for x in (q, k, v)]  # [n,P,H/P,D]
        widths = [part.shape[2] for part in parts]
        packed = torch.cat(parts, dim=2).transpose(0, 1).flatten(0, 1)  # [P n,heads,D]
        queries, keys, values = _TokensForHeads.apply(packed, self).split(widths, dim=1)
        out = attention(queries, keys, values, self.whole, backend, window)  # [L,Hq/P,D]
        mine = _HeadsForTokens.apply(out, self)
        return mine.unflatten(0, (processes, own)).transpose(0, 1).flatten(1, 2)

    def scatter(self, rows: Tensor, modality: int) -> Tensor:
        """This process's part of a modality's rows [N,width]."""
        return _Scatter.apply(rows, self, modality)

    def gather(self, rows: Tensor, modality: int) -> Tensor:
        """All processes' rows [n,width] of a modality, in packed order."""
        return _Gather.apply(rows, self, modality)

    def gather_all(self, rows: Tensor) -> Tensor:
        """All processes' rows [n,width] of all modalities, in packed order."""
        return torch.cat([self.gather(part, modality) for modality, part in enumerate(rows.split(self.sizes))])

    def _counts(self, modality: int) -> list[int]:
        return [share[modality] for share in self.shares]

    def _exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=self.group)
        return out

    def _from_everyone(self, rows: Tensor, modality: int) -> Tensor:
        counts = self._counts(modality)
        return self._exchange(rows.repeat(len(counts), 1), [len(rows)] * len(counts), counts)


class _TokensForHeads(torch.autograd.Function):
    """[P n,heads,D], all heads of one's own tokens by receiver -> [L,heads,D], one's own heads of all packed tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: LayoutShard) -> Tensor:
        ctx.layout = layout
        own, counts = sum(layout.sizes), [sum(share) for share in layout.shares]
        return layout._exchange(x, [own] * len(counts), counts).index_select(0, layout.positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _HeadsForTokens.apply(grad, ctx.layout), None


class _HeadsForTokens(torch.autograd.Function):
    """The inverse of `_TokensForHeads`, and so its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: LayoutShard) -> Tensor:
        ctx.layout = layout
        own, counts = sum(layout.sizes), [sum(share) for share in layout.shares]
        return layout._exchange(x.index_select(0, layout.rows), counts, [own] * len(counts))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _TokensForHeads.apply(grad, ctx.layout), None


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient is one's own part of it, times the number of processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: LayoutShard, modality: int) -> Tensor:
        ctx.layout, ctx.modality = layout, modality
        return layout._from_everyone(rows, modality)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Scatter.apply(grad, ctx.layout, ctx.modality) * len(ctx.layout.shares), None, None


class _Scatter(torch.autograd.Function):
    """One's own rows; the gradient is that of all processes, divided by their number."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: LayoutShard, modality: int) -> Tensor:
        ctx.layout, ctx.modality = layout, modality
        return rows.split(layout._counts(modality))[layout.rank]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(grad, ctx.layout, ctx.modality) / len(ctx.layout.shares), None, None


def shard_layout(whole: Layout, rank: int, processes: int, group: Any = None) -> LayoutShard:
    """The share of process `rank`: a contiguous run of each modality's tokens, earlier processes get the odd one."""
    shares = [[size // processes + (i < size % processes) for i in range(processes)] for size in whole.sizes]
    by_process = tuple((video, audio, text) for video, audio, text in zip(*shares, strict=True))
    starts = [0, whole.sizes[0], whole.sizes[0] + whole.sizes[1]]
    runs = []
    for process in range(processes):
        for modality in range(3):
            first = starts[modality] + sum(shares[modality][:process])
            runs.append(torch.arange(first, first + shares[modality][process]))
    rows = torch.cat(runs)
    positions = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows)))
    before = sum(sum(share) for share in by_process[:rank])
    device = whole.coords.device
    rows, positions = rows.to(device), positions.to(device)
    own = rows[before : before + sum(by_process[rank])]
    values: dict[str, Any] = {field.name: getattr(whole, field.name) for field in fields(Layout) if field.init}
    values |= {"coords": whole.coords[own], "modality": whole.modality[own]}
    values["rotary"] = None if whole.rotary is None else whole.rotary[own]
    split = {"whole": whole, "shares": by_process, "rank": rank, "group": group}
    return LayoutShard(**values, **split, rows=rows, positions=positions)


def require_divisible_heads(config: DiTConfig, processes: int) -> None:
    """Raises UserError when the heads cannot be split evenly, listing the numbers of processes that can."""
    shared = config.num_query_groups
    if shared % processes:
        raise UserError(
            f"{shared} key/value heads cannot be split over {processes} processes; start {divisors(shared)} of them for "
            "one clip"
        )


def context_group(processes: int) -> Any:
    """The torch.distributed group of this process and its neighbours, `processes` in each; call it on every process."""
    group, _ = dist.new_subgroups(processes)
    return group


def require_same(number: int, what: str, group: Any, device: torch.device | str) -> None:
    """Raises UserError, on every process of the group, unless all have the same number (int64)."""
    highest = torch.tensor([number, -number], device=device)  # the highest number, and minus the lowest
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    top, bottom = highest.tolist()
    if top != -bottom:
        raise UserError(
            f"the processes that share tokens (strategy.context_parallel) have different {what}: a file or a connection "
            "failed for some of them only, or the data differ between nodes; mend that, and the same command continues"
        )


def parallelise(model: nn.Module, group: Any = None) -> None:
    """Make a `SingleStreamDiT` compute together with the same network of the other processes.

    It takes and returns whole tensors as before; all processes have to call it with the same inputs. In training they
    have to compute the same loss, and gradients have to be averaged over all processes, see above.

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

    # A layout is made once per request or batch and cached by the denoiser; so are the shares of the latest ones.
    @lru_cache(_KEPT_SHARES)
    def share(whole: Layout) -> LayoutShard:
        with torch.inference_mode(False), torch.no_grad():  # it may be used for training later
            return shard_layout(whole, rank, processes, group)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if kwargs.get("rotary") is not None:
            raise ValueError("give the rotary table with the layout: layout.with_rotary(table)")
        *tokens, whole = args
        layout = share(whole)
        return (*(layout.scatter(x, modality) for modality, x in enumerate(tokens)), layout), kwargs

    def leave(_: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        layout: LayoutShard = args[-1]
        if isinstance(outputs, list):  # residual streams at taps
            return [layout.gather_all(stream) for stream in outputs]
        return layout.gather(outputs[0], 0), layout.gather(outputs[1], 1)

    model.register_forward_pre_hook(enter, with_kwargs=True)
    model.register_forward_hook(leave)
