"""Where weights live and in which form: same results whatever the place, bounded errors whatever the form."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from inference.memory.offload import LayerStream, Resident, Stages, prepare_transformer
from inference.memory.quantization import StoredLinear, store_weights
from inference.memory.text_cache import CachedText, encoder_identity
from inference.sampling import sample
from magihuman import zoo
from magihuman.codecs.text_encoders import ByteTextEncoder
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.flow.sampling import seeded
from magihuman.models.config import DiTConfig, PackConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.layers import ExpertLinear

SHAPE = (3, 2, 4, 4), (5, 6)


def _denoiser(layers: int = 4, dtype: torch.dtype = torch.float32) -> Denoiser:
    config = DiTConfig(layers, 32, 16, 1, 12, 6, 10, mm_layers=(0, layers - 1), gelu7_layers=(0,))
    denoiser = zoo.build(config, PackConfig(2), compute_dtype=dtype, linear_dtype=dtype, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for head in (denoiser.model.final_linear_video, denoiser.model.final_linear_audio):
        nn.init.normal_(head.weight, std=0.2, generator=generator)
    return denoiser


def _clip(denoiser: Denoiser) -> tuple[torch.Tensor, torch.Tensor]:
    text = [torch.randn(3, 10, generator=torch.Generator().manual_seed(3))]
    guidance = Guidance(3.0, 2.0, audio=2.0)
    return sample(denoiser, text, [text[0][:2]], SHAPE, 3, "unipc", guidance, generator=seeded([7]))


class TestPlaces:
    """fast, balanced and low give the same bits."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("weights", [None, "fp8", "int4"])
    @pytest.mark.parametrize("layers", [1, 4, 5])
    def test_streamed_equals_resident(self, layers: int, weights: str | None, dtype: torch.dtype) -> None:
        fast, low = _denoiser(layers, dtype), _denoiser(layers, dtype)
        assert prepare_transformer(fast, "fast", weights, "cpu") is None
        expected = _clip(fast)
        stages = Stages("low", "cpu")
        stages.add("sample", prepare_transformer(low, "low", weights, "cpu"))
        for _ in range(2):  # a second visit finds everything again
            stages.enter("sample")
            found = _clip(low)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
            stages.clear()

    def test_two_layers_hold_device_memory(self) -> None:
        denoiser = _denoiser(6)
        sizes = [
            sum(t.numel() * t.element_size() for t in layer.state_dict().values())
            for layer in denoiser.model.block.layers
        ]
        stream = LayerStream(list(denoiser.model.block.layers), "cpu")
        slack = 256 * 12 * 2  # alignment of every tensor
        stream.enter()
        slots = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in denoiser.model.block.parameters()}
        assert len(slots) == 2
        needed = max(sizes[0::2]) + max(sizes[1::2])
        assert needed <= sum(slot.nbytes() for slot in slots.values()) <= needed + slack
        stream.leave()
        assert all(p.numel() == 0 for p in denoiser.model.block.parameters())

    def test_streamed_layers_refuse_to_train_or_to_run_outside(self) -> None:
        denoiser = _denoiser()
        stages = Stages("low", "cpu")
        stages.add("sample", prepare_transformer(denoiser, "low", None, "cpu"))
        with pytest.raises(RuntimeError, match=r"enter\(\) and leave\(\)"):
            _clip(denoiser)
        stages.enter("sample")
        z = torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 5, 6), [torch.zeros(2, 10)]
        with pytest.raises(RuntimeError, match="no_grad"):
            denoiser(*z)

    @pytest.mark.gpu
    @pytest.mark.parametrize("memory", ["balanced", "low"])
    @pytest.mark.parametrize("weights", [None, "fp8", "int4"])
    def test_on_a_gpu(self, memory: str, weights: str | None) -> None:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        fast, other = _denoiser(5, torch.bfloat16), _denoiser(5, torch.bfloat16)
        prepare_transformer(fast, "fast", weights, "cuda")
        expected = _clip(fast)
        stages = Stages(memory, "cuda")
        stages.add("sample", prepare_transformer(other, memory, weights, "cuda"))
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            stages.enter("sample")
            found = _clip(other)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
            stages.clear()
        del found
        other._layouts.clear()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before + (1 << 20)


class TestStages:
    """Who is there when."""

    def test_one_stage_is_present_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        moves: list[str] = []
        text, codec, audio = nn.Linear(2, 2), nn.Linear(3, 3), nn.Linear(4, 4)
        stages = Stages("balanced", "cpu")
        stages.add("text", text)
        stages.add("condition", codec, audio)
        stages.add("decode", codec, audio)
        stages.add("bytes", object(), None)
        monkeypatch.setattr(Resident, "enter", lambda part: moves.append("+"))
        monkeypatch.setattr(Resident, "leave", lambda part: moves.append("-"))
        # The modules of "decode" are those of "condition".
        for name, expected in (("text", "+"), ("condition", "-++"), ("decode", ""), ("bytes", "--")):
            moves.clear()
            stages.enter(name)
            assert "".join(moves) == expected
        with pytest.raises(KeyError):
            stages.enter("other")

    def test_parts_come_and_leave_once(self) -> None:
        class Part:
            calls: list[str]

            def __init__(self, name: str) -> None:
                self.name = name

            def enter(self) -> None:
                calls.append(f"+{self.name}")

            def leave(self) -> None:
                calls.append(f"-{self.name}")

        calls: list[str] = []
        stages = Stages("balanced", "cpu")
        a, b = Part("a"), Part("b")
        stages.add("first", a)
        stages.add("second", a, b)
        stages.add("third", b)
        for name in ("first", "first", "second", "third", "first"):
            stages.enter(name)
        assert calls == ["+a", "+b", "-a", "-b", "+a"]

    def test_shared_and_integer_tensors_survive(self) -> None:
        class Tied(nn.Module):
            steps: torch.Tensor

            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(4, 4, bias=False)
                self.outer = nn.Linear(4, 4, bias=False)
                self.outer.weight = self.inner.weight
                self.register_buffer("steps", torch.arange(3))

        module = Tied()
        expected = module.inner.weight.detach().clone()
        part = Resident(module, "cpu")
        part.enter()
        part.leave()
        part.enter()
        assert module.outer.weight is module.inner.weight
        assert torch.equal(module.inner.weight, expected)
        assert module.steps.tolist() == [0, 1, 2]

    def test_deep_networks_are_streamed_in_low(self) -> None:
        class Deep(nn.Module):
            def __init__(self, layers: int) -> None:
                super().__init__()
                self.first = nn.Linear(4, 4)
                self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for layer in (self.first, *self.layers):
                    x = layer(x)
                return x

        for layers, streamed in ((9, True), (7, False)):
            network = Deep(layers)
            x = torch.ones(2, 4)
            with torch.no_grad():
                expected = network(x)
                stages = Stages("low", "cpu")
                stages.add("text", network)
                assert (network.layers[0].weight.numel() == 0) is streamed
                stages.enter("text")
                assert torch.equal(network(x), expected)

    def test_unknown_choices_list_what_there_is(self) -> None:
        with pytest.raises(UserError, match="fast, balanced, low"):
            Stages("tiny", "cpu")
        with pytest.raises(UserError, match="bf16, fp8, int4"):
            prepare_transformer(_denoiser(1), "fast", "int3", "cpu")


class TestForms:
    """Errors of fewer bits, in closed form."""

    def _weight(self, rows: int = 96, columns: int = 200) -> torch.Tensor:
        generator = torch.Generator().manual_seed(4)
        scales = 10.0 ** torch.randint(-6, 3, (rows, 1), generator=generator)
        weight = torch.randn(rows, columns, generator=generator) * scales
        weight[5] = 0
        weight[7, 64:128] = 0
        weight[8, 3] = 1e3  # one outlier
        return weight

    @pytest.mark.parametrize("experts", [1, 3])
    def test_fp8(self, experts: int) -> None:
        weight = self._weight()
        back = torch.cat(list(StoredLinear(weight, experts, "fp8").slices(torch.float32)))
        step = weight.abs().amax(1, keepdim=True) / 448
        bound = torch.maximum(weight.abs() / 16, step / 1024) * (1 + 1e-5)
        error = (back - weight).abs()
        assert (error <= bound).all()
        assert (error > bound / 2).any()  # the bound is tight within two
        assert back[5].abs().max() == 0

    @pytest.mark.parametrize("experts", [1, 3])
    def test_int4(self, experts: int) -> None:
        weight = self._weight()
        stored = StoredLinear(weight, experts, "int4")
        back = torch.cat(list(stored.slices(torch.float32)))
        assert back.shape == weight.shape
        groups = nn.functional.pad(weight, (0, 56)).unflatten(1, (4, 64))
        step = groups.abs().amax(-1, keepdim=True) / 7 * (1 + 2**-8)
        bound = (step / 2).expand_as(groups).flatten(1)[:, :200]
        error = (back - weight).abs()
        assert (error <= bound * (1 + 1e-5)).all()
        assert (error > bound * 0.9).any()
        assert back[5].abs().max() == 0
        assert back[7, 64:128].abs().max() == 0
        bits = 8 * sum(b.numel() * b.element_size() for b in stored.buffers()) / (96 * 256)
        assert bits == 4.25

    @pytest.mark.parametrize(("form", "grid"), [("fp8", [448.0, -26.0, 0.0, 3.5]), ("int4", [7.0, -7.0, 0.0, 3.0])])
    def test_values_on_the_grid_come_back_exactly(self, form: str, grid: list[float]) -> None:
        weight = torch.tensor(grid * 16).repeat(4, 1) * 0.25
        for dtype in (torch.float32, torch.bfloat16):
            (back,) = StoredLinear(weight, 1, form).slices(dtype)
            assert back.dtype == dtype
            assert torch.equal(back.float(), weight)

    def test_bf16_adds_one_rounding(self) -> None:
        weight = self._weight()
        for form in ("fp8", "int4"):
            stored = StoredLinear(weight, 1, form)
            (exact,), (rounded,) = stored.slices(torch.float32), stored.slices(torch.bfloat16)
            assert ((rounded.float() - exact).abs() <= exact.abs() * 2**-8).all()

    def test_only_block_matrices_change(self) -> None:
        denoiser = _denoiser()
        before = {k: v.clone() for k, v in denoiser.model.state_dict().items()}
        store_weights(denoiser.model, "fp8", "cpu", "cpu")
        after = denoiser.model.state_dict()
        matrices = {k for k, _, is_bf16 in denoiser.model.config.tensors() if is_bf16}
        assert {k for k in before if k not in after} == matrices
        assert all(torch.equal(after[k], before[k]) for k in before if k in after)
        assert not any(isinstance(m, ExpertLinear) for m in denoiser.modules())
        with pytest.raises(UserError, match="load the checkpoint again"):
            store_weights(denoiser.model, "int4", "cpu", "cpu")

    def test_bf16_storage_rounds_once(self) -> None:
        denoiser = _denoiser()
        weight = denoiser.model.block.layers[0].mlp.down_proj.weight.detach().clone()
        store_weights(denoiser.model, "bf16", "cpu", "cpu")
        kept = denoiser.model.block.layers[0].mlp.down_proj.weight
        assert kept.dtype == torch.bfloat16
        assert torch.equal(kept, weight.bfloat16())

    def test_weights_that_are_not_finite_are_refused(self) -> None:
        denoiser = _denoiser()
        with torch.no_grad():
            denoiser.model.block.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
        with pytest.raises(UserError, match="down_proj is not finite"):
            store_weights(denoiser.model, "int4", "cpu", "cpu")

    def test_the_network_still_says_nearly_the_same(self) -> None:
        z = torch.randn(1, 3, 2, 4, 4, generator=torch.Generator().manual_seed(5))
        inputs = z, torch.zeros(1, 5, 6), [torch.ones(2, 10)]
        errors = {}
        for form in ("bf16", "fp8", "int4"):
            exact, stored = _denoiser(), _denoiser()
            store_weights(stored.model, form, "cpu", "cpu")
            with torch.no_grad():
                a, b = exact(*inputs)[0], stored(*inputs)[0]
            errors[form] = ((a - b).norm() / a.norm()).item()
        assert errors["bf16"] < errors["fp8"] < errors["int4"] < 0.3
        assert errors["bf16"] < 0.01
        assert errors["fp8"] < 0.06


class _Encoder:
    channels = 4

    def __init__(self, exact_in_half: bool = True) -> None:
        self.calls: list[list[str]] = []
        self.exact = exact_in_half

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        self.calls.append(list(prompts))
        features = [torch.randn(1 + len(p), 4, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
        return [f.half().float() for f in features] if self.exact else features


class TestTextCache:
    """Features on disk."""

    @pytest.mark.parametrize("exact", [True, False])
    def test_a_prompt_is_encoded_once_and_comes_back_exactly(self, tmp_path: Path, exact: bool) -> None:
        encoder = _Encoder(exact)
        first = CachedText(encoder.encode, "t5-1", 4, tmp_path / "cache")
        made = first.encode(["one", "three", "one"])
        assert encoder.calls == [["one", "three"]]
        assert torch.equal(made[0], made[2])
        second = CachedText(encoder.encode, "t5-1", 4, tmp_path / "cache")
        found = second.encode(["three", "one"])
        assert len(encoder.calls) == 1
        assert torch.equal(found[1], made[0])
        assert torch.equal(found[0], made[1])
        names = {p.name for p in (tmp_path / "cache").iterdir()}
        assert names == {hashlib.sha256(f"t5-1\0{p}".encode()).hexdigest() + ".safetensors" for p in ("one", "three")}
        per_number = 2 if exact else 4
        sizes = {p: first.path(p).stat().st_size for p in ("one", "three")}
        assert sizes["three"] - sizes["one"] == pytest.approx(2 * 4 * per_number, abs=8)

    def test_other_encoder_and_damage_mean_encoding_again(self, tmp_path: Path) -> None:
        encoder = _Encoder()
        CachedText(encoder.encode, "t5-1", 4, tmp_path).encode(["one"])
        CachedText(encoder.encode, "t5-2", 4, tmp_path).encode(["one"])
        assert len(encoder.calls) == 2
        cache = CachedText(encoder.encode, "t5-1", 4, tmp_path)
        for damage in (b"", b"not a tensor", cache.path("one").read_bytes()[:-3]):
            cache.path("one").write_bytes(damage)
            assert cache.encode(["one"])[0].shape == (4, 4)
        assert len(encoder.calls) == 5
        assert cache.encode(["one"])[0].shape == (4, 4)
        assert len(encoder.calls) == 5

    def test_without_a_place_to_write_it_still_encodes(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        cache = CachedText(_Encoder().encode, "t5-1", 4, tmp_path / "file")
        assert cache.encode(["one"])[0].shape == (4, 4)

    def test_identity_sees_weights_dtype_and_name(self) -> None:
        class Net(nn.Module):
            channels = 4

            def __init__(self, value: float, end: float | None = None) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.full((1000,), value))
                self.weight.data[500:] = value if end is None else end

            def encode(self, prompts: list[str]) -> list[torch.Tensor]:
                return []

        assert encoder_identity(Net(1.0), "t5") == encoder_identity(Net(1.0), "t5")
        others = (
            encoder_identity(Net(2.0), "t5"),
            encoder_identity(Net(1.0, end=2.0), "t5"),
            encoder_identity(Net(1.0).bfloat16(), "t5"),
            encoder_identity(Net(1.0), "t6"),
            encoder_identity(ByteTextEncoder(), "t5"),
        )
        assert len({*others, encoder_identity(Net(1.0), "t5")}) == 6
