"""Which two latents of a clip super-resolution trains on, and what it says where there are none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_stub
from small_sr import clips, recipe

from magihuman.errors import UserError
from magihuman.training.first_stage import FirstStage, FirstStageSettings
from magihuman.training.rng import BatchRng
from recipes.sr import SuperResolution


class Cells:
    """Decodes to pictures as large as the latents times four, encodes by averages."""

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z.repeat_interleave(4, -2).repeat_interleave(4, -1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool3d(x, (1, 4, 4))


def remaking(size: tuple[int, int], sr_size: tuple[int, int] | None) -> SuperResolution:
    """A recipe that makes the first stage's latents from the larger ones."""
    made = recipe(first_stage=FirstStageSettings(size=size))
    made.context = replace(made.context, sr_size=sr_size)
    made._first_stage = FirstStage(made.settings, codec=Cells())  # type: ignore[arg-type]
    return made


def test_the_first_stage_can_be_made_from_large_shards_alone() -> None:
    made = remaking((8, 8), None)
    batch = made.paired(training_stub.batch(range(2)))
    assert batch["video_sr"].shape == (2, 3, 3, 4, 4)
    assert batch["video"].shape == (2, 3, 3, 2, 2)
    assert torch.isfinite(made.loss(training_stub.batch(range(2)), BatchRng(0, 0, range(2))))
    assert made.export_config().size.height == 16


def test_the_first_stage_is_made_from_the_larger_of_two_sizes() -> None:
    made = remaking((8, 8), (32, 32))
    batch = made.paired(clips(2))
    assert torch.equal(batch["video_sr"], clips(2)["video_sr"].float())
    assert float((batch["video"].mean((-2, -1)) - batch["video_sr"].mean((-2, -1))).abs().max()) < 0.15
    assert batch["video"].shape == (2, 3, 3, 2, 2)
    assert made.export_config().size.height == 32
    assert made.batch_flops(clips(2)) == recipe().batch_flops(clips(2))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((64, 64), "give a smaller size, of multiples of"),
        ((10, 10), r"clips of \[32, 32\] pixels: give a smaller size, of multiples of \[4, 4\]"),
        ((16, 8), "differ in aspect ratio; prepare clips of several aspect ratios with sr_sizes="),
    ],
)
def test_a_first_stage_that_is_no_smaller_clip_is_one_line(size: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        remaking(size, (32, 32)).paired(clips(2))


def test_a_clip_without_a_second_size_is_one_line() -> None:
    batch = training_stub.batch(range(2)) | {"key": ["a_0000", "b_0000"]}
    with pytest.raises(UserError, match="clip a_0000 is stored at one size and others at two; prepare all"):
        recipe().loss(batch, BatchRng(0, 0, range(2)))


def test_sizes_that_the_patches_do_not_divide_are_one_line_before_the_training(tmp_path: Path) -> None:
    shards = training_stub.write_shards(tmp_path / "shards", large=7)
    with pytest.raises(UserError, match="clips of 28x28 pixels, whose latents cannot be cut into patches of 2"):
        training_stub.train_here(tmp_path / "run", shards, ["+recipe=sr"])
    # What a table of runs shows; nothing was trained.
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["config.yaml", "run.json"]
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"


def test_windows_of_local_layers_are_counted() -> None:
    """Utilisation is of what is computed: at 1080p windows leave out a third of the attention."""
    batch = clips(2)
    made = recipe()
    model, pack = made.context.transformer
    made.context = replace(made.context, model=replace(model, local_attn_layers=(0, 1)))
    counted = []
    for reach in (0, 1, 2, -1):
        made.context = replace(made.context, pack=replace(pack, frame_receptive_field=reach))
        counted.append(made.batch_flops(batch))
    full = recipe().batch_flops(batch)
    # Three frames of 16 tokens: 6 of 9 pairs of frames are not seen with reach 0, 2 with reach 1.
    pair = 3 * 4 * 16 * 16 * model.hidden_size * 2 * len(batch["text"])
    assert counted == [full - 6 * pair, full - 2 * pair, full, full]
