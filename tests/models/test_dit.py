"""The whole network: released shape, batches, routing, checkpointing, compilation."""

from pathlib import Path

import pytest
import torch
from small_dit import CONFIG, gradients, inputs, make
from torch import Tensor

from magihuman import zoo
from magihuman.errors import UserError
from magihuman.models.config import DiTConfig, PackConfig, TreadConfig
from magihuman.models.denoiser import Denoiser
from magihuman.models.dit import SingleStreamDiT
from magihuman.models.rotary import rotary_table
from magihuman.models.tokens import Layout, patchify
from magihuman.zoo.verify import verify


def test_released_shape_on_the_meta_device() -> None:
    config = zoo.arch("15b")
    model = zoo.build(config, zoo.pack("15b"), compute_dtype=torch.bfloat16, device="meta").model
    state = model.state_dict()
    assert len(state) == 331
    assert sum(p.numel() for p in model.parameters()) == 15_299_419_136 == config.parameter_count()
    assert {k: tuple(v.shape) for k, v in state.items()} == {k: shape for k, shape, _ in config.tensors()}
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.block.layers]
    assert (layers[0], layers[4], layers[39]) == (818_535_168, 272_824_576, 818_473_728)
    in_bf16 = {key: is_bf16 for key, _, is_bf16 in config.tensors()}
    stored = sum(v.numel() * (2 if in_bf16[k] else 4) for k, v in state.items())
    assert stored == 30_642_008_128


def test_released_vectors(golden: Path) -> None:
    rows = verify(golden, only="dit_")
    assert {row.case for row in rows} >= {"dit_v2_mm_gelu", "dit_v1_local", "dit_postnorm"}
    assert [row for row in rows if row.status != "pass"] == []
    exact = [r for r in rows if r.detail == "out/video" and r.result is not None and r.result.tolerance == 0]
    assert len(exact) == 2 or not torch.cpu._is_avx512_bf16_supported()


@pytest.mark.parametrize("text", [[4, 4, 4], [6, 2, 6, 1]])
def test_a_batch_equals_its_samples_one_by_one(text: list[int]) -> None:
    denoiser = make()
    video, audio, words = inputs(text)
    with torch.no_grad():
        together = denoiser(video, audio, words)
        for i in range(len(text)):
            alone = denoiser(video[i : i + 1], audio[i : i + 1], words[i : i + 1])
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[i : i + 1], b, rtol=1e-4, atol=1e-5)


def test_every_expert_learns_from_its_own_modality() -> None:
    denoiser = make()
    gradients(denoiser, inputs([4, 4]))
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        for expert in parameter.grad.chunk(3) if "layers.0." in name else [parameter.grad]:
            assert expert.abs().max() > 0, name


def test_without_sound() -> None:
    denoiser = make()
    batch = inputs([3, 2], audio=0)
    video, audio = denoiser(*batch)
    assert audio.shape == (2, 0, 6)
    assert video.shape == batch[0].shape
    assert all(g.isfinite().all() for g in gradients(denoiser, batch))


def test_backward_agrees_with_finite_differences() -> None:
    denoiser = make()
    batch = inputs([3, 2])
    weight = denoiser.model.block.layers[3].mlp.up_gate_proj.weight
    gradient = dict(zip([n for n, _ in denoiser.named_parameters()], gradients(denoiser, batch), strict=True))
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))

    def loss(step: float) -> float:
        with torch.no_grad():
            weight.add_(step * direction)
            video, audio = denoiser(*batch)
            weight.sub_(step * direction)
        return (video.double().square().mean() + audio.double().square().mean()).item()

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    analytic = (gradient["model.block.layers.3.mlp.up_gate_proj.weight"] * direction).sum().item()
    assert slope == pytest.approx(analytic, rel=2e-2)


def test_bf16_compute_is_near_fp32_and_trains_fp32_weights() -> None:
    exact, rounded = make(), make(dtype=torch.bfloat16)
    batch = inputs([4, 2])
    with torch.no_grad():
        a, b = exact(*batch)[0], rounded(*batch)[0]
    assert b.dtype == torch.float32
    assert 1e-4 < (a - b).norm() / a.norm() < 0.03
    fp32, bf16 = gradients(exact, batch), gradients(rounded, batch)
    assert all(g.dtype == torch.float32 for g in bf16)
    distance = sum((x - y).square().sum() for x, y in zip(fp32, bf16, strict=True))
    assert distance / sum(x.square().sum() for x in fp32) < 0.05**2


def test_gradient_checkpointing_changes_nothing() -> None:
    denoiser = make()
    batch = inputs([4, 2])
    plain = gradients(denoiser, batch)
    denoiser.model.gradient_checkpointing = True
    for a, b in zip(plain, gradients(denoiser, batch), strict=True):
        assert torch.equal(a, b)


def test_local_layers_read_the_window() -> None:
    local = DiTConfig.from_dict({**CONFIG.to_dict(), "local_attn_layers": [0, 1, 2, 3]})
    denoiser = make(local)
    batch = inputs([4, 2])
    with torch.no_grad():
        windowed = denoiser(*batch)[0]
        denoiser.model.frame_receptive_field = 2  # all three frames
        wide = denoiser(*batch)[0]
        denoiser.model.frame_receptive_field = -1
        off = denoiser(*batch)[0]
    torch.testing.assert_close(wide, off, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(windowed, off, atol=1e-3)


class TestRouting:
    """TREAD: unselected tokens skip a span of layers."""

    def test_full_rate_is_no_routing(self) -> None:
        denoiser = make().train()
        batch = inputs([4, 2])
        plain = gradients(denoiser, batch)
        denoiser.model.tread = TreadConfig(1.0, 1, 2)
        for a, b in zip(plain, gradients(denoiser, batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_routing_follows_the_generator_and_ends_with_training(self) -> None:
        denoiser = make().train()
        denoiser.model.tread = TreadConfig(0.5, 1, 2)
        batch = inputs([4, 2])

        def draw(seed: int) -> Tensor:
            torch.manual_seed(seed)
            return denoiser(*batch)[0].detach()

        assert torch.equal(draw(3), draw(3))
        assert not torch.equal(draw(3), draw(4))
        denoiser.eval()
        plain = denoiser(*batch)[0].detach()
        denoiser.model.tread = None
        assert torch.equal(plain, denoiser(*batch)[0])

    def test_skipped_tokens_pass_unchanged(self) -> None:
        denoiser = make().train()
        denoiser.model.tread = TreadConfig(0.5, 0, 3)  # all layers
        seen: dict[str, Tensor] = {}
        denoiser.model.adapter.register_forward_hook(lambda m, i, o: seen.update(before=o))
        denoiser.model.final_norm_video.register_forward_hook(lambda m, i, o: seen.update(after=i[0]))
        denoiser(*inputs([4, 4]))
        unchanged = (seen["before"][: len(seen["after"])] == seen["after"]).all(dim=1)
        assert unchanged.sum() == len(unchanged) // 2

    def test_routed_layers_are_those_of_the_kept_tokens_with_their_own_positions(self) -> None:
        denoiser = make().train()
        model = denoiser.model
        model.tread = TreadConfig(0.5, 1, 2)
        video, audio, text = inputs([4])
        layout = denoiser.layout_for(video.shape, 5, [4])
        tokens = patchify(video, 2)[0], audio[0], text[0]
        torch.manual_seed(3)
        routed = model(*tokens, layout)

        torch.manual_seed(3)
        rows, kept = layout.route(0.5)
        dense = Layout.build((3, 2, 2), 5, [4]), rotary_table(layout.coords, model.adapter.rope.bands)
        short = kept, rotary_table(layout.coords[rows], model.adapter.rope.bands)
        assert torch.equal(kept.coords, layout.coords[rows])
        x = model.adapter(*tokens)
        for i, block in enumerate(model.block.layers):
            if i in (1, 2):
                x = x.index_copy(0, rows, block(x[rows], short[1], short[0], "math", None, torch.float32))
            else:
                x = block(x, dense[1], dense[0], "math", None, torch.float32)
        by_hand = model.final_linear_video(model.final_norm_video(x[: len(tokens[0])]))
        torch.testing.assert_close(routed[0], by_hand, rtol=1e-4, atol=1e-5)


def test_layouts_are_kept_and_usable_after_inference_mode() -> None:
    denoiser = make()
    batch = inputs([4, 2])
    with torch.inference_mode():
        denoiser(*batch)
    first = denoiser.layout_for(batch[0].shape, 5, [4, 2])
    assert first is denoiser.layout_for(batch[0].shape, 5, [4, 2])
    assert first is not denoiser.layout_for(batch[0].shape, 5, [2, 4])
    assert gradients(denoiser, batch)


def test_initial_weights_follow_the_seed_and_predict_nothing() -> None:
    pack = PackConfig(2)
    a, b, c = (zoo.build(CONFIG, pack, compute_dtype=torch.float32, seed=s) for s in (0, 0, 1))
    states = [d.model.state_dict() for d in (a, b, c)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(*(s["block.layers.1.mlp.down_proj.weight"] for s in (states[0], states[2])))
    video, audio = a(*inputs([2]))
    assert video.abs().max() == audio.abs().max() == 0


def test_layouts_have_the_coordinates_of_the_pack() -> None:
    denoiser = Denoiser(SingleStreamDiT(CONFIG, compute_dtype=torch.float32), PackConfig(2, "v1", text_offset=7))
    built = Layout.build((3, 2, 2), 5, [4, 2], coords_style="v1", text_offset=7)
    assert torch.equal(denoiser.layout_for((3, 4, 4), 5, [4, 2]).coords, built.coords)
    assert built.coords[-2, 0] == 7


def test_products_keep_variance_and_residual_branches_are_scaled_by_their_number() -> None:
    config = DiTConfig(6, 256, 32, 2, 48, 16, 64, mm_layers=(0,), gelu7_layers=(0,))
    state = zoo.build(config, PackConfig(2), compute_dtype=torch.float32, seed=0).model.state_dict()
    truncated = 0.98658  # deviation of a standard normal variable between -3 and 3
    for layer in (0, 3):
        inner = config.intermediate_size(layer)
        branches = 2 * 6
        for name, columns, depth in (
            ("attention.linear_qkv", 256, 1),
            ("attention.linear_proj", 256, branches),
            ("mlp.up_gate_proj", 256, 1),
            ("mlp.down_proj", inner, branches),
        ):
            weight = state[f"block.layers.{layer}.{name}.weight"]
            std = (columns * depth) ** -0.5
            assert weight.std().item() == pytest.approx(truncated * std, rel=0.01), name
            assert 2.9 * std < weight.abs().max() <= 3 * std, name
    assert state["adapter.text_embedder.weight"].std().item() == pytest.approx(64**-0.5, rel=0.02)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="compute_dtype"):
        SingleStreamDiT(CONFIG, compute_dtype=torch.float16)
    with pytest.raises(UserError, match="patch area"):
        Denoiser(SingleStreamDiT(CONFIG), PackConfig(5))
    video, audio, text = inputs([2, 2])
    with pytest.raises(ValueError, match="batch sizes differ"):
        make()(video, audio, text[:1])
    with pytest.raises(ValueError, match="patches"):
        make()(video[..., :3], audio, text)


def test_blocks_compile_without_graph_breaks() -> None:
    denoiser = make(dtype=torch.bfloat16)
    batch = inputs([4, 4])
    plain = gradients(denoiser, batch)
    layer = denoiser.model.block.layers[3]
    layer.compile(backend="aot_eager", fullgraph=True)
    for a, b in zip(plain, gradients(denoiser, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
