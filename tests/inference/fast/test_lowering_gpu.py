"""CompiledBlocks as torch.compile makes GPU kernels of them, on a machine without a GPU: lowered to code that is not run.

Needs a torch that was built for CUDA, and triton, as GPU boxes have them; no driver and no GPU.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from inference.fast import fused_blocks
from inference.fast.fused_weights import BlockKind, LayerTensors, MatrixTensors

pytestmark = [
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch that was built for CUDA"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is at hand"),
]
H, HEADS, SHARED, DIM = 512, 4, 2, 128
SIZES = (448, 30, 34)
# Video, audio and text tokens of the released sizes, 5 s: 4050, 14,802 and 65,746 in all.
RELEASED = {"256p": (3584, 126, 340), "540p": (14336, 126, 340), "1080p": (65280, 126, 340)}


class Lowered(Exception):
    """Instead of loading the code."""


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Code of what is compiled inside, for a Hopper GPU that is not there."""
    pytest.importorskip("triton")
    import torch._dynamo.device_interface as interfaces
    import torch._inductor.config as inductor
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    limits = {"multi_processor_count": 132, "regs_per_multiprocessor": 65536, "warp_size": 32}
    limits["max_threads_per_multi_processor"] = 2048
    properties = SimpleNamespace(
        name="NVIDIA H100", total_memory=80 << 30, major=9, minor=0, L2_cache_size=50 << 20, gcnArchName="",
        shared_memory_per_block_optin=232448, **limits,
    )  # fmt: skip
    hopper = DeviceProperties(type="cuda", index=0, cc=90, major=9, **limits)

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=None: (9, 0)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    class Mode(FakeTensorMode):
        avoid_device_init = True

    codes: list[str] = []

    def load(self: GraphLowering) -> Any:
        code: Any = self.codegen()
        codes.append(code[0].value if hasattr(code[0], "value") else str(code[0]))
        raise Lowered

    answers: dict[str, Any] = {
        "is_available": True, "current_device": 0, "device_count": 1, "get_device_capability": (9, 0),
        "get_device_properties": properties, "synchronize": None, "get_device_name": "NVIDIA H100",
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "is_initialized": True,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "set_device": None,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for owner in (interfaces.CudaInterface, interfaces.CudaInterface.Worker):
        monkeypatch.setattr(owner, "get_device_properties", staticmethod(lambda device=None: properties))
        monkeypatch.setattr(owner, "current_device", staticmethod(lambda: 0))
    monkeypatch.setattr(interfaces.CudaInterface, "get_compute_capability", staticmethod(lambda d=None: 90))
    monkeypatch.setattr(interfaces.CudaInterface, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
    monkeypatch.setattr(DeviceProperties, "create", classmethod(lambda cls, device: hopper))
    for passes in (joint_graph, post_grad):  # patterns of attention and the like, which are traced on the device
        monkeypatch.setattr(passes, "lazy_init", lambda *_, **__: None)
    monkeypatch.setattr(GraphLowering, "compile_to_module", load)
    monkeypatch.setattr(driver, "_active", Driver())
    torch._dynamo.reset()
    options = {"fx_graph_cache": False, "compile_threads": 1, "use_static_cuda_launcher": False}
    with inductor.patch(options), Mode(allow_non_fake_inputs=True):
        yield codes
    torch._dynamo.reset()


def compiled(function: Any, codes: list[str], *arguments: Any) -> str:
    """What is called, in order, of the function compiled as tiers compile it."""
    with torch.no_grad(), pytest.raises(Exception) as caught:  # noqa: PT011
        torch.compile(function, fullgraph=True, dynamic=False)(*arguments)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, Lowered):
        error = error.__cause__ or error.__context__
    if error is None:
        raise caught.value
    return codes[-1][codes[-1].rfind("def call(") :]


def matrix(experts: int, rows: int, columns: int, eight: bool) -> MatrixTensors:
    dtype = torch.float8_e4m3fn if eight else torch.bfloat16
    weight = torch.empty(experts, rows, columns, dtype=dtype, device="cuda")
    if not eight:
        return MatrixTensors(weight, None, None)
    return MatrixTensors(weight, torch.empty(experts, rows, device="cuda"), torch.empty(experts, 2, device="cuda"))


def layer(
    experts: int, gelu: bool = False, eight: bool = False, released: bool = False
) -> tuple[LayerTensors, BlockKind]:
    width, heads, shared = (5120, 40, 8) if released else (H, HEADS, SHARED)
    gates = -(-heads // 16) * 16 if eight else heads
    qkv, inner = (heads + 2 * shared) * DIM + gates, 4 * width if gelu else (13696 if released else 1408)

    def scale(*shape: int) -> Tensor:
        return torch.empty(experts, *shape, device="cuda")

    kind = BlockKind(experts, heads, shared, DIM, True, gelu, True, torch.bfloat16, False)
    sizes = ((qkv, width), (width, width), (inner if gelu else 2 * inner, width), (width, inner))
    qkv_matrix, proj, up, down = (matrix(experts, *size, eight) for size in sizes)
    attention_norm, qk_norm, mlp_norm = scale(width), scale(heads + shared, DIM), scale(width)
    return LayerTensors(attention_norm, qk_norm, mlp_norm, None, None, qkv_matrix, proj, up, down, None), kind


def tokens(sizes: tuple[int, ...] = SIZES) -> fused_blocks.BlockTokens:
    sin, cos = (torch.empty(sum(sizes), 1, 3 * DIM // 8, device="cuda") for _ in range(2))
    return fused_blocks.BlockTokens(sizes, sin, cos, torch.empty(3, dtype=torch.int32, device="cuda"))


def stream(kind: BlockKind, eight: bool, sizes: tuple[int, ...] = SIZES) -> tuple[Any, ...]:
    rows = sum(sizes)
    dtype = torch.float32 if eight else torch.bfloat16
    counts = sizes if kind.experts > 1 else (rows,)
    before = (kind.heads + 2 * kind.shared) * kind.dim
    width = before + (-(-kind.heads // 16) * 16 if eight else kind.heads)
    gates = tuple(torch.empty(n, width, dtype=dtype, device="cuda")[:, before : before + kind.heads] for n in counts)
    out = torch.empty(rows, kind.heads, DIM, dtype=torch.bfloat16, device="cuda")
    return torch.empty(rows, kind.heads * kind.dim, device="cuda"), out, gates


@pytest.mark.parametrize(
    ("own", "following", "products"),
    [
        ("shared", "shared", ["mm"] * 4),
        ("gelu experts", "gelu experts", ["_grouped_mm"] * 4),
        ("gelu experts", "shared", ["_grouped_mm"] * 3 + ["mm"]),
        ("shared", "experts", ["mm"] * 3 + ["_grouped_mm"]),
        ("gelu experts", "fp8", ["_grouped_mm"] * 3 + ["_scaled_mm"]),
        ("fp8", "fp8", ["_scaled_mm"] * 4),
    ],
)
def test_between_two_layers(own: Any, following: Any, products: list[str], lowered: list[str]) -> None:
    made: dict[str, tuple[Any, ...]] = {
        "gelu experts": (3, True), "experts": (3,), "shared": (1,), "fp8": (1, False, True),
    }  # fmt: skip
    (w, kind), (other, next_kind) = layer(*made[own]), layer(*made[following])
    code = compiled(fused_blocks.between, lowered, *stream(kind, own == "fp8"), tokens(), w, kind, other, next_kind)
    assert re.findall(r"extern_kernels\.(\w+)\(", code) == products
    if kind.experts == next_kind.experts == 1:
        # Gate; residual sum and norm, twice; activation; norms and rotation of queries and keys, and their parts.
        assert len(re.findall(r"triton_\w+\.run\(", code)) <= 7


PAIRS = (
    ("gelu experts", "gelu experts"), ("gelu experts", "shared"), ("shared", "shared"), ("shared", "experts"),
    ("experts", "experts"), ("gelu experts", "fp8"), ("fp8", "fp8"), ("fp8", "experts"),
)  # fmt: skip
"""Neighbours in the published network, in the bf16 and in the 8-bit tier."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("size", RELEASED)
def test_the_published_shapes(size: str, lowered: list[str]) -> None:
    """Every region of the 15 B network at every sequence length; its Triton kernels become machine code for sm_90."""
    made: dict[str, tuple[Any, ...]] = {
        "gelu experts": (3, True), "experts": (3,), "shared": (1,), "fp8": (1, False, True),
    }  # fmt: skip
    kernels: dict[str, str] = {}
    for own, following in PAIRS:
        w, kind = layer(*made[own], released=True)
        other, next_kind = layer(*made[following], released=True)
        given = stream(kind, own == "fp8", RELEASED[size])
        code = compiled(fused_blocks.between, lowered, *given, tokens(RELEASED[size]), w, kind, other, next_kind)
        products = re.findall(r"extern_kernels\.(\w+)\(", code)
        names = {"fp8": "_scaled_mm", "shared": "mm"}
        wanted = [names.get(own, "_grouped_mm")] * 3 + [names.get(following, "_grouped_mm")]
        assert products == wanted, (own, following)
        for found in re.finditer(r"async_compile\.triton\('(\w+)', '''(.*?)'''", lowered[-1], re.DOTALL):
            kernels[found[2]] = found[1]
    assert len(kernels) > 30
    sizes = [machine_code(name, source) for source, name in kernels.items()]
    assert min(sizes) > 1000
    print(f"{size}: {len(PAIRS)} regions, {len(sizes)} kernels, {sum(sizes)} bytes of machine code")


def machine_code(name: str, source: str) -> int:
    """Bytes of an Inductor kernel that Triton compiles, in its first configuration, for the GPU that is not there."""
    with unset_fake_temporarily(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.py"
        file.write_text(source)  # Triton reads the source of its functions from files
        space: dict[str, Any] = {"__name__": name, "__file__": str(file)}
        exec(compile(source, str(file), "exec"), space)
        tuner = space[name]
        return len(tuner._precompile_config(tuner.configs[0]).kernel.asm["cubin"])


def test_either_end(lowered: list[str]) -> None:
    """The first layer's `before`; the last one's `after`, without text."""
    w, kind = layer(3, gelu=True)
    x, out, gates = stream(kind, False)
    code = compiled(fused_blocks.before, lowered, x, tokens(), w, kind)
    assert re.findall(r"extern_kernels\.(\w+)\(", code) == ["_grouped_mm"]
    w, kind = layer(3)
    x, out, gates = stream(kind, False, SIZES[:2])
    rest = tokens()._replace(sizes=SIZES[:2])
    code = compiled(fused_blocks.after, lowered, x, out, gates, rest, w, kind)
    assert re.findall(r"extern_kernels\.(\w+)\(", code) == ["_grouped_mm"] * 3
