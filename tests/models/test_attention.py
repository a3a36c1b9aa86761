"""Every back end is the same function: against a loop over samples, forward and backward, with and without windows."""

import pytest
import torch
from fake_gpu import fake_gpu
from torch import Tensor

from magihuman.models.attention import HAS_FLASH_ATTN, _sdpa, attention, local_mask, local_ranges
from magihuman.models.tokens import Layout

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

LAYOUTS = {"one": [4], "equal": [3, 3, 3], "ragged": [5, 2, 5, 1], "no text but one": [0, 2]}
HEADS, SHARED, DIM = 4, 2, 16


def make(text: list[int], audio: int = 3, device: str = "cpu") -> tuple[Layout, list[Tensor]]:
    layout = Layout.build((4, 1, 2), audio, text, device=device)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(layout.length, n, DIM, generator=generator) for n in (HEADS, SHARED, SHARED))
    return layout, [x.to(device).requires_grad_() for x in (q, k, v)]


def by_loop(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    """Softmax attention written down sample by sample and head by head."""
    out = torch.zeros_like(q)
    for sample in range(layout.batch):
        rows = layout.sample_rows(sample).to(q.device)
        mask = torch.ones(len(rows), len(rows), dtype=torch.bool)
        if window is not None:
            mask = local_mask(layout.video_len, len(rows) - layout.video_len, layout.frames, window)
        for head in range(HEADS):
            key = head // (HEADS // SHARED)
            scores = q[rows, head] @ k[rows, key].T / DIM**0.5
            scores = scores.masked_fill(~mask.to(q.device), -torch.inf)
            out = out.index_put((rows, torch.tensor(head, device=q.device)), scores.softmax(-1) @ v[rows, key])
    return out


def check(backend: str, text: list[int], window: int | None, audio: int = 3, device: str = "cpu") -> None:
    layout, inputs = make(text, audio, device)
    weight = torch.randn(layout.length, HEADS, DIM, generator=torch.Generator().manual_seed(1)).to(device)

    def run(out: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]

    ours = run(attention(*inputs, layout, backend, window))
    for mine, theirs in zip(ours, run(by_loop(*inputs, layout, window)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", ["auto", "math", "sdpa", "reference", "windowed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_backends_attend_within_samples(backend: str, name: str) -> None:
    check(backend, LAYOUTS[name], None)


@pytest.mark.parametrize("backend", ["auto", "reference", "windowed"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [0, 1, 9])
def test_windows_equal_the_mask(backend: str, name: str, window: int) -> None:
    check(backend, LAYOUTS[name], window)


def test_windows_without_any_other_tokens() -> None:
    check("windowed", [0], 1, audio=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("text", [[4], [5, 2]])
def test_flex_forward(text: list[int]) -> None:
    layout, inputs = make(text)
    with torch.no_grad():
        for window in (1, None, 0):  # one layout serves local and other layers
            ours = attention(*(x.detach() for x in inputs), layout, "flex", window)
            torch.testing.assert_close(ours, by_loop(*inputs, layout, window), rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["math", "flex"])
def test_routed_tokens_see_each_other_however_far_apart_their_frames_are(backend: str) -> None:
    layout, inputs = make([6, 2])
    torch.manual_seed(0)
    rows, kept = layout.route(0.6)
    chosen = [x.detach()[rows] for x in inputs]
    with torch.no_grad():
        ours = attention(*chosen, kept, backend)
        torch.testing.assert_close(ours, by_loop(*chosen, kept, None), rtol=1e-4, atol=2e-5)


def test_samples_do_not_see_each_other() -> None:
    layout, (q, k, v) = make([3, 3])
    before = attention(q, k, v, layout)
    with torch.no_grad():
        v[layout.sample_rows(1)] += 1
    after = attention(q, k, v, layout)
    first, second = layout.sample_rows(0), layout.sample_rows(1)
    assert torch.equal(before[first], after[first])
    assert not torch.allclose(before[second], after[second])


def test_bf16_stays_close_to_fp32() -> None:
    layout, inputs = make([5, 2])
    exact = attention(*inputs, layout, "math")
    for backend in ("math", "sdpa", "reference", "windowed"):
        ours = attention(*(x.bfloat16() for x in inputs), layout, backend)
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - exact).norm() / exact.norm() < 0.01, backend


def test_ranges_of_a_small_grid() -> None:
    queries, keys = local_ranges(8, 3, 4, 1)
    assert queries.tolist() == [[0, 2], [2, 4], [4, 6], [6, 8], [0, 8], [8, 11]]
    assert keys.tolist() == [[0, 4], [0, 6], [2, 8], [4, 8], [8, 11], [0, 11]]


def test_refusals_name_the_choices() -> None:
    layout, inputs = make([2])
    with pytest.raises(ValueError, match="choose from auto, math"):
        attention(*inputs, layout, "fast")
    with pytest.raises(ValueError, match="has no windows"):
        attention(*inputs, layout, "sdpa", 1)
    rows, kept = layout.route(0.5)
    with pytest.raises(ValueError, match="whole frames"):
        attention(*(x[rows] for x in inputs), kept, "windowed", 1)
    if not HAS_FLASH_ATTN:
        with pytest.raises(ValueError, match="flash-attn"):
            attention(*inputs, layout, "flash")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("backend", "window"), [("sdpa", None), ("flex", None), ("flex", 1), ("windowed", 1)])
def test_backends_on_cuda(backend: str, window: int | None, name: str) -> None:
    check(backend, LAYOUTS[name], window, device="cuda")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.skipif(not HAS_FLASH_ATTN, reason="flash-attn is not installed")
@pytest.mark.parametrize("name", LAYOUTS)
def test_flash_on_cuda(name: str) -> None:
    layout, inputs = make(LAYOUTS[name], device="cuda")
    half = [x.bfloat16() for x in inputs]
    ours, exact = attention(*half, layout, "flash"), by_loop(*inputs, layout, None)
    assert (ours.float() - exact).norm() / exact.norm() < 0.01
    weight = torch.randn_like(exact)
    mine = torch.autograd.grad((ours.float() * weight).sum(), inputs)
    theirs = torch.autograd.grad((exact * weight).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() / b.norm() < 0.02


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch that was built for CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is at hand")
def test_a_gpu_gets_fp32_without_shared_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fused kernels take no others; plain mathematics would hold 35 GB of scores at 540p."""
    given = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> Tensor:
        given.append((k.shape[1], v.shape[1], enable_gqa))
        return q

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", kernel)
    with fake_gpu(monkeypatch):
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.empty(1, 14802, 40, 128, device="cuda", dtype=dtype)
            k, v = torch.empty(2, 1, 14802, 8, 128, device="cuda", dtype=dtype).unbind()
            assert _sdpa(q, k, v).shape == q.shape
    assert given == [(40, 40, False), (8, 8, True)]
