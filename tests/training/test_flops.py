"""Model FLOPs of a training step of every recipe: closed forms, and what torch's own counter sees in real steps.

Networks are small enough for attention by plain products, of which the counter sees every one, forward and backward: a
fused kernel's backward pass would count 2.5 times its forward instead of twice, since it makes the scores again. Two
kinds of products are in the formulas and in no run, and are taken off by name: gradients of a network's inputs, which
are data, and with frozen embedders those of the first block's input.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_stub
from small_sr import clips
from small_sr import recipe as second_stage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from toy_dmd2 import DIT, UNGUIDED, Alone, make_context

from magihuman import zoo
from magihuman.distill.discriminator import GanSettings
from magihuman.distill.fake_score_settings import FakeScoreSettings
from magihuman.flow.guidance import Guidance
from magihuman.flow.sigmas import SigmaPrior
from magihuman.io.export import Sampling
from magihuman.models.config import LoraConfig, PackConfig, TreadConfig
from magihuman.models.flops import SampleTokens, distillation_flops, forward_flops, lora_flops, passes
from magihuman.training.first_stage import FirstStage, FirstStageSettings
from magihuman.training.rng import BatchRng
from recipes.base import Recipe
from recipes.lora import Lora
from recipes.pretrain import Pretrain

SIZE, GUIDED = LoraConfig(3), Guidance()
VIDEO, AUDIO = 12, 9  # tokens of a clip of `training_stub`; its texts have 2, 3, 4, 2, ... tokens
HIDDEN = DIT.hidden_size
FINAL = 2 * HIDDEN * (VIDEO * 12 + AUDIO * 4)
"""Final linears of one sample."""


def embedding(text: int) -> int:
    """Embedders of one sample; as much as the gradients of its tokens would cost."""
    return FINAL + 2 * HIDDEN * text * 5


def forward(text: int, **more: Any) -> int:
    return forward_flops(DIT, VIDEO, AUDIO, text, **more).total


def attention(text: int, layers: int = 2) -> int:
    """Scores and values of one sample."""
    return layers * 4 * (VIDEO + AUDIO + text) ** 2 * HIDDEN


def own(text: int) -> int:
    """An adapter's products in one forward pass of one sample, written out for two blocks of width 16.

    Queries, keys, values and gates: 2 + 2 x 1 heads of 8 and 2 gates; inner widths: 64 with GELU7, 40 with SwiGLU7.
    """
    first = (16 + 34) + (16 + 16) + (16 + 64) + (64 + 16)
    second = (16 + 34) + (16 + 16) + (16 + 2 * 40) + (40 + 16)
    return 2 * (VIDEO + AUDIO + text) * SIZE.rank * (first + second)


class Products(TorchDispatchMode):
    """What torch's `FlopCounterMode` counts; that itself breaks on latents with gradients in passes without any."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def counted(step: Callable[[], Any]) -> int:
    with Products() as run:
        step()
    return run.flops


def stepped(recipe: Recipe, batch: dict[str, Any]) -> int:
    """Products of the loss and its gradients."""
    return counted(lambda: recipe.loss(batch, BatchRng(0, 0, range(len(batch["video"])))).backward())


@pytest.mark.parametrize("tread", [None, TreadConfig(0.5, 1, 1)])
def test_pretraining(tmp_path: Path, tread: TreadConfig | None) -> None:
    recipe = Pretrain(
        replace(make_context(tmp_path), init=None), sigma=SigmaPrior(), sampling=Sampling(), text_drop=0.0, tread=tread
    )
    recipe.configure_model()
    batch = training_stub.batch(range(3))
    computed = recipe.batch_flops(batch)
    assert stepped(recipe, batch) == computed - sum(embedding(text) for text in (2, 3, 4))
    whole = 3 * sum(forward(text) for text in (2, 3, 4))
    assert computed == whole if tread is None else 0.5 * whole < computed < 0.9 * whole


@pytest.mark.parametrize("heads", [True, False])
def test_adapters_on_a_frozen_network(tmp_path: Path, heads: bool) -> None:
    size = replace(SIZE, heads=heads)
    recipe = Lora(make_context(tmp_path), lora=size, text_drop=0.0)
    recipe.configure_model()
    batch = training_stub.batch(range(3))
    ends, missing = 0, 0
    for text in (2, 3, 4):
        tokens = VIDEO + AUDIO + text
        ends += heads * (embedding(text) + FINAL)
        missing += embedding(text) + (0 if heads else 2 * tokens * HIDDEN * (DIT.qkv_width + size.rank))
    computed = recipe.batch_flops(batch)
    assert computed == ends + sum(2 * forward(text) + attention(text) + 3 * own(text) for text in (2, 3, 4))
    assert stepped(recipe, batch) == computed - missing


def test_the_second_stage_counts_the_first_one_s_passes() -> None:
    settings = FirstStageSettings(base="tiny/base", base_share=1.0, base_steps=3)
    recipe = second_stage()
    recipe.settings = settings
    base = zoo.build(DIT, PackConfig(), compute_dtype=torch.float32, seed=0).requires_grad_(False)
    recipe._first_stage = FirstStage(settings, base)
    batch, texts = clips(3), (2, 3, 4)
    large = [forward_flops(DIT, 4 * VIDEO, AUDIO, text).total for text in texts]
    computed = 3 * sum(large) + 3 * sum(forward(text) for text in texts)
    assert recipe.batch_flops(batch) == computed
    inputs = sum(2 * HIDDEN * (4 * VIDEO * 12 + AUDIO * 4 + text * 5) for text in texts)
    assert stepped(recipe, batch) == computed - inputs
    recipe.settings = replace(settings, base_share=0.25)
    assert recipe.batch_flops(batch) == 3 * sum(large) + 0.25 * 3 * sum(forward(text) for text in texts)


class TestDMD2:
    """Steps K = 8, fake score's updates R = 5."""

    def made(self, folder: Path, guidance: Guidance = UNGUIDED, **settings: Any) -> Alone:
        usual: dict[str, Any] = {
            "steps": 8, "fake_score": FakeScoreSettings(updates=5, warmup=1), "lora": SIZE
        }  # fmt: skip
        recipe = Alone(make_context(folder, guidance=guidance), **{**usual, **settings})
        recipe.configure_model()
        return recipe

    def test_closed_forms(self, tmp_path: Path) -> None:
        """Of two samples whose texts are as long as the empty prompt."""
        F, S, A, E = forward(2), attention(2), own(2), embedding(2) + FINAL
        batch = training_stub.batch(range(0, 6, 3))

        def passes_of(step: int, guidance: Guidance = GUIDED, **settings: Any) -> float:
            recipe = self.made(tmp_path, guidance, **settings)
            recipe.step = step + 1  # the iteration is over
            return recipe.batch_flops(batch) / 2

        assert passes_of(1) == (8 + 15 + 6) * F
        assert passes_of(1, UNGUIDED) == (8 + 15 + 5) * F
        assert passes_of(0) == (8 + 15) * F  # the student stands still
        short = FakeScoreSettings(updates=5, warmup=1, samples_per_rollout=5)
        assert passes_of(0, fake_score=short) == (8 + 15) * F
        assert passes_of(1, fake_score=short) == (2 * 8 + 15 + 6) * F
        assert passes_of(1, networks="lora_fake_score") == (8 + 10 + 6) * F + 5 * S + (15 + 1) * A + 5 * E
        assert passes_of(1, networks="lora") == (8 + 10 + 2 + 3) * F + 6 * S + (8 + 15 + 3 + 1) * A + 6 * E
        gan = GanSettings(weight=0.1, start=2, taps=(0,))
        tap = forward(2, layers=1)
        assert passes_of(1, gan=gan) == 29 * F
        assert passes_of(2, gan=gan) == 29 * F + (3 * 5 + 2) * tap + attention(2, layers=1)
        assert 0 < tap < F - FINAL

    def test_a_longer_negative_prompt(self) -> None:
        kinds = {"steps": 8, "updates": 5, "samples_per_rollout": 6, "student_updated": True}
        sample = SampleTokens(VIDEO, AUDIO, 3)
        more = distillation_flops(DIT, sample, null_text=50, **kinds) - distillation_flops(DIT, sample, **kinds)
        assert more == forward(50)

    @pytest.mark.parametrize("networks", ["full", "lora_fake_score", "lora"])
    def test_an_iteration(self, tmp_path: Path, networks: str) -> None:
        recipe = self.made(tmp_path, Guidance(), networks=networks)
        batch = training_stub.batch(range(2))
        inputs = embedding(2) + embedding(3)
        for trained in (5, 6):  # passes whose gradients end at data: the fake score's alone, then the student's too
            assert counted(lambda: recipe.training_step(batch, 0)) == recipe.batch_flops(batch) - trained * inputs

    @pytest.mark.parametrize(
        ("networks", "judge", "updates"),
        [("full", "teacher", None), ("full", "teacher", 1), ("lora", "fake_score", None)],
    )
    def test_an_iteration_with_the_discriminator(
        self, tmp_path: Path, networks: str, judge: str, updates: int | None
    ) -> None:
        """Its heads read the last block; the final linears behind it are not computed."""
        fake_score = FakeScoreSettings(updates=2, warmup=0)
        gan = GanSettings(weight=0.1, taps=(1,), network=judge, updates=updates)
        recipe = self.made(tmp_path, fake_score=fake_score, networks=networks, gan=gan)
        batch = training_stub.batch(range(2))
        run = counted(lambda: recipe.training_step(batch, 0))
        # The heads' linears for both modalities: trained on three latents in an update, passed through for the student.
        heads = 2 * 2 * ((updates or 2) * 3 * 3 + 2) * 2 * ((HIDDEN + 16) * 128 + 128)
        texts = 2 * HIDDEN * (2 + 3) * 5  # latents have gradients in the student's turn, texts have none
        inputs = 3 * (embedding(2) + embedding(3)) + texts
        assert run == recipe.batch_flops(batch) + heads - inputs


def test_an_adapter_up_to_a_layer() -> None:
    assert lora_flops(DIT, SIZE, VIDEO + AUDIO + 2) == own(2)
    parts = [lora_flops(DIT, SIZE, 10, layers=n) for n in (0, 1, 2)]
    assert parts == [0, 2 * 10 * 3 * 242, 2 * 10 * 3 * (242 + 234)]
    tap = passes(DIT, SampleTokens(VIDEO, AUDIO, 2), lora=SIZE, layers=1)
    only = forward(2, layers=1) + lora_flops(DIT, SIZE, VIDEO + AUDIO + 2, layers=1)
    assert (tap.forward, tap.through) == (only, 2 * only + attention(2, layers=1))
