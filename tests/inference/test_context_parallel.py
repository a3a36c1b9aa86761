"""One clip over several processes equals one process."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from free_port import free_port
from torch import Tensor

from inference.sampling import sample
from magihuman import zoo
from magihuman.context_parallel import parallelise, require_divisible_heads, shard_layout
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.flow.sampling import seeded
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.tokens import Layout

# 4 query and 2 key/value heads; layer 1 is local. Odd numbers of tokens in every modality.
CONFIG = DiTConfig(4, 64, 16, 2, 12, 6, 10, mm_layers=(0, 3), gelu7_layers=(0,), local_attn_layers=(1,))
SHAPE = (3, 3, 6, 2), (5, 6)


def _denoiser(config: DiTConfig, window: int) -> Denoiser:
    denoiser = zoo.build(config, PackConfig(2, frame_receptive_field=window), compute_dtype=torch.float32, seed=1)
    generator = torch.Generator().manual_seed(2)
    for head in (denoiser.model.final_linear_video, denoiser.model.final_linear_audio):
        torch.nn.init.normal_(head.weight, std=0.2, generator=generator)
    return denoiser.eval()


def _results(denoiser: Denoiser) -> dict[str, Tensor]:
    """A plain call with a window, and a guided sampling loop: its batch of two has unequal texts."""
    generator = torch.Generator().manual_seed(3)
    text, other = torch.randn(7, 10, generator=generator), torch.randn(2, 10, generator=generator)
    z = torch.randn(1, *SHAPE[0], generator=generator), torch.randn(1, 5, 6, generator=generator)
    with torch.no_grad():
        single = denoiser(*z, [text])
    denoiser.model.frame_receptive_field = -1
    looped = sample(denoiser, [text], [other], SHAPE, 3, "unipc", Guidance(3.0, 2.0, audio=2.0), generator=seeded([4]))
    names = ("single video", "single audio", "looped video", "looped audio")
    return dict(zip(names, (*single, *looped), strict=True))


def _child(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    denoiser = _denoiser(CONFIG, 1)
    parallelise(denoiser.model)
    torch.save(_results(denoiser), Path(folder) / f"{rank}.pt")
    with pytest.raises(UserError, match="3 key/value heads"):
        parallelise(_denoiser(replace(CONFIG, hidden_size=96, num_query_groups=3), 1).model)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    expected = _results(_denoiser(CONFIG, 1))
    port = free_port()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_child, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, tensor in expected.items():
        assert torch.equal(found[0][name], found[1][name])  # every process has all of it
        assert found[0][name].shape == tensor.shape
        assert (found[0][name] - tensor).abs().max() <= 2e-6 * tensor.abs().max()


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_shares_cover_every_token_once(processes: int) -> None:
    whole = Layout.build((3, 3, 1), 5, [7, 2], device="cpu")
    whole = whole.with_rotary(torch.arange(whole.length).unsqueeze(1).float())
    parts = [shard_layout(whole, rank, processes) for rank in range(processes)]
    assert sum(part.length for part in parts) == whole.length
    for modality in range(3):
        sizes = [part.sizes[modality] for part in parts]
        assert sum(sizes) == whole.sizes[modality]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)  # earlier processes get the odd token
    everyone = torch.cat([part.coords for part in parts])
    assert torch.equal(everyone[parts[0].positions], whole.coords)
    assert torch.equal(whole.coords[parts[0].rows], everyone)
    tables = torch.cat([part.rotary for part in parts if part.rotary is not None])
    assert torch.equal(tables[parts[0].positions], whole.rotary)
    with pytest.raises(ValueError, match="routed"):
        parts[0].route(0.5)


def test_heads_that_do_not_divide() -> None:
    require_divisible_heads(zoo.arch("15b"), 8)
    with pytest.raises(UserError, match="8 key/value heads cannot be split over 3 processes; start 1, 2, 4, 8"):
        require_divisible_heads(zoo.arch("15b"), 3)
