"""Clips at two sizes: what data.prepare stores for super-resolution, and who is told what is wrong."""

from pathlib import Path

import pytest
import torch

from data.clip_plan import ClipFormats, pair_sizes, parse_sizes
from data.module import LatentDataModule, collate
from data.options import PrepareOptions
from data.prepare import prepare
from data.shards import SampleError, Shards
from data.tiny.dataset import make_clips
from magihuman.codecs.bundle import load_bundle
from magihuman.errors import UserError
from magihuman.flow.super_resolution import shrink_pictures
from magihuman.media.reading import read_clip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "clips"
    make_clips(str(folder), 3, size=128, workers=1, world="tiny", progress=False)
    return folder


def prepared(clips: Path, output: Path, **settings: str) -> Path:
    prepare(PrepareOptions(str(clips), str(output), "tiny", workers=1, progress=False, **settings))  # type: ignore[arg-type]
    return output


def test_a_clip_is_stored_at_both_sizes_from_the_same_pixels(clips: Path, tmp_path: Path) -> None:
    shards = Shards(prepared(clips, tmp_path / "both", sizes="64x64", sr_sizes="128x128"))
    assert len(shards) == 3
    codec = load_bundle("tiny").video_codec
    for number, entry in enumerate(shards.entries):
        sample = shards.read(number)
        assert entry.bucket == "25x64x64+a"
        assert (sample.meta["height"], sample.meta["width"]) == (64, 64)
        frames = read_clip(clips / f"{sample.meta['source']}", fps=25).frames
        pictures = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        for name, wanted in (("video_sr", pictures), ("video", shrink_pictures(pictures, 64, 64))):
            stored = sample.tensors[name].float()
            torch.testing.assert_close(stored, codec.encode(wanted)[0], atol=5e-3, rtol=2e-3)


def test_the_data_module_knows_the_second_size_and_stacks_it(clips: Path, tmp_path: Path) -> None:
    both = prepared(clips, tmp_path / "both", sizes="64x64", sr_sizes="128x128")
    module = LatentDataModule(str(both), batch_size=2, val_fraction=0)
    assert module.size == (25, 64, 64)
    assert module.sr_size == (128, 128)
    batch = next(iter(module.train_dataloader()))
    assert batch["video"].shape == (2, 12, 7, 16, 16)
    assert batch["video_sr"].shape == (2, 12, 7, 32, 32)
    one = prepared(clips, tmp_path / "one", sizes="64x64")
    assert LatentDataModule(str(one), val_fraction=0).sr_size is None
    assert "video_sr" not in Shards(one).read(0).tensors


def test_a_damaged_first_sample_does_not_hide_the_second_size(clips: Path, tmp_path: Path) -> None:
    both = prepared(clips, tmp_path / "both", sizes="64x64", sr_sizes="128x128")
    entry, (shard,) = Shards(both).entries[0], both.glob("*.tar")
    data = bytearray(shard.read_bytes())
    data[entry.offset + 700] ^= 0xFF
    shard.write_bytes(bytes(data))
    module = LatentDataModule(str(both), batch_size=2, val_fraction=0)
    with pytest.raises(SampleError, match="checksum differs"):
        module.reader.read(0)
    assert module.sr_size == (128, 128)
    assert module.sizes == [(64, 64)]


def test_samples_of_one_and_of_two_sizes_do_not_mix(clips: Path, tmp_path: Path) -> None:
    both = Shards(prepared(clips, tmp_path / "both", sizes="64x64", sr_sizes="128x128"))
    first, second = both.read(0), both.read(1)
    del second.tensors["video_sr"]
    with pytest.raises(UserError, match="sample b has no video_sr, a has; prepare both with the same settings"):
        collate([("a", first), ("b", second)], range(2), torch.zeros(0, 64))


def test_files_are_judged_by_the_larger_size(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="most often: would be enlarged"):
        prepared(clips, tmp_path / "big", sizes="64x64", sr_sizes="512x512")


@pytest.mark.parametrize(
    ("small", "large", "message"),
    [
        ("448x256,256x448", "896x512", "sr_sizes has 1 sizes and sizes has 2"),
        ("448x256", "224x128", "sr_sizes=224x128 for 448x256 is smaller"),
        ("448x256", "512x896", "has another aspect ratio"),
        ("448x256,480x272", "896x512,896x512", "sr_sizes names a size twice"),
        ("448x256,448x256", "896x512,1920x1088", "sizes names a size twice: clips of a batch share both"),
        ("448x256", "900x514", "sr_sizes=900x514 cannot be trained: height must be divisible by 16"),
        ("448x256", "large", "sr_sizes='large' should look like"),
    ],
)
def test_sizes_that_are_no_pair_are_one_line(small: str, large: str, message: str) -> None:
    def read() -> None:
        sizes = parse_sizes(small, (16, 16))
        pair_sizes(sizes, parse_sizes(large, (16, 16), "sr_sizes"))

    with pytest.raises(UserError, match=message):
        read()


@pytest.mark.parametrize(("codecs", "side"), [("tiny", 16), ("released", 8), ("mine:codecs", 4)])
def test_sizes_are_whole_tokens_where_the_models_of_the_codecs_are_known(
    codecs: str, side: int, tmp_path: Path
) -> None:
    """Patches of 4 and 2 latents; those of own codecs are known to their model alone."""
    latents = {"contract": {"video_stride": [4, 4, 4], "fps": 25.0}, "width": 64, "height": 64, "frames": 25}

    def formats(size: str, **more: bool) -> ClipFormats:
        return ClipFormats.of(PrepareOptions(str(tmp_path), "out", codecs, sizes=size, **more), latents)  # type: ignore[arg-type]

    assert formats(f"64x{4 * side + side}").sizes == [(5 * side, 64)]
    assert formats(f"64x{5 * side + 4}", pixels=True).sizes == [(5 * side + 4, 64)]
    with pytest.raises(UserError, match=f"height must be divisible by {side} and width by {side}; the nearest size"):
        formats(f"64x{5 * side + 1}")


def test_released_sizes_are_pairs() -> None:
    small = parse_sizes("448x256,256x448", (32, 32))
    for large in ("896x512,512x896", "1920x1088,1088x1920"):
        sizes = parse_sizes(large, (32, 32), "sr_sizes")
        assert pair_sizes(small, sizes) == sizes


def test_pictures_are_shrunk_without_a_shift_or_new_colours() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 5, 64, 64)
    small = shrink_pictures(ramp, 32, 32)
    assert small.shape == (1, 3, 5, 32, 32)
    torch.testing.assert_close(
        small[..., 4:-4], ramp.unflatten(4, (32, 2)).mean(5)[:, :, :, ::2, 4:-4], atol=1e-3, rtol=0
    )
    checks = (torch.arange(64) % 2 * 2.0 - 1).expand(1, 3, 5, 64, 64)
    assert shrink_pictures(checks, 32, 32)[..., 2:-2].abs().max() < 0.01  # not aliased to one of the two colours
