"""Tokens, packing and the layout's invariants (SPEC 2)."""

import pytest
import torch
from small_dit import patchify_target

from magihuman.models.rotary import rotary_bands, rotary_table
from magihuman.models.tokens import AUDIO, TEXT, VIDEO, Layout, pad_or_trim, patchify, unpatchify


def latents(batch: int = 2) -> torch.Tensor:
    return torch.arange(batch * 3 * 2 * 4 * 6, dtype=torch.float32).view(batch, 3, 2, 4, 6)


def test_input_tokens_are_channel_major() -> None:
    z = latents()
    tokens = patchify(z, 2)
    assert tokens.shape == (2, 2 * 2 * 3, 12)
    frame, row, column, channel, dy, dx = 1, 1, 2, 2, 1, 0
    token = (frame * 2 + row) * 3 + column
    assert tokens[1, token, channel * 4 + dy * 2 + dx] == z[1, channel, frame, 2 * row + dy, 2 * column + dx]


def test_output_tokens_are_channel_last() -> None:
    z = latents()
    tokens = patchify_target(z, 2)
    frame, row, column, channel, dy, dx = 1, 0, 1, 2, 0, 1
    token = (frame * 2 + row) * 3 + column
    assert tokens[0, token, (dy * 2 + dx) * 3 + channel] == z[0, channel, frame, 2 * row + dy, 2 * column + dx]
    assert torch.equal(unpatchify(tokens, (2, 4, 6), 2, 3), z)
    assert not torch.equal(unpatchify(patchify(z, 2), (2, 4, 6), 2, 3), z)  # O5: not inverses


def test_latents_that_no_patch_fits_are_refused() -> None:
    with pytest.raises(ValueError, match="4 x 6"):
        patchify(latents(), 4)


def test_packing_is_modality_major_and_a_partition() -> None:
    layout = Layout.build((2, 1, 3), 4, [3, 1, 3])
    assert layout.sizes == (18, 12, 7)
    assert layout.modality.tolist() == [VIDEO] * 18 + [AUDIO] * 12 + [TEXT] * 7
    rows = torch.cat([layout.sample_rows(i) for i in range(3)])
    assert rows.sort().values.tolist() == list(range(layout.length))
    assert layout.sample_rows(1).tolist() == [*range(6, 12), *range(22, 26), 33]


def test_sample_major_order_groups_equal_lengths() -> None:
    layout = Layout.build((2, 1, 3), 4, [3, 1, 3])
    assert layout.groups == ((1, 11), (2, 13))
    assert layout.cu_seqlens.tolist() == [0, 11, 24, 37]
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.max_seqlen == 13
    assert not layout.uniform
    assert layout.order is not None
    assert layout.inverse is not None
    assert torch.equal(layout.order[layout.inverse], torch.arange(37))
    for place, sample in enumerate((1, 0, 2)):
        start, stop = layout.cu_seqlens[place : place + 2].tolist()
        assert torch.equal(layout.order[start:stop], layout.sample_rows(sample))


def test_one_sample_needs_no_order() -> None:
    layout = Layout.build((2, 1, 3), 4, [3])
    assert layout.order is None
    assert layout.sample_rows(0).tolist() == list(range(13))


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_each_sample_has_the_coordinates_it_has_alone(style: str) -> None:
    together = Layout.build((3, 2, 2), 9, [3, 2, 5], coords_style=style)
    for i, length in enumerate((3, 2, 5)):
        alone = Layout.build((3, 2, 2), 9, [length], coords_style=style)
        assert torch.equal(together.coords[together.sample_rows(i)], alone.coords)


def test_sound_runs_on_the_video_clock() -> None:
    layout = Layout.build((3, 1, 1), 9, [2])
    angle = rotary_table(layout.coords, rotary_bands(8)).chunk(2, dim=-1)[0].asin()[:, 0]
    torch.testing.assert_close(angle[[0, 1]], torch.tensor([0.0, 1.0]))  # video frames 0 and 1
    torch.testing.assert_close(angle[3 + 4], torch.tensor(1.0))  # audio latent 4 sounds with frame 1
    torch.testing.assert_close(angle[3 + 1], torch.tensor(0.25))


@pytest.mark.parametrize(("audio", "frames"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_sound_of_any_length_has_the_frames_that_it_begins(audio: int, frames: int) -> None:
    coords = Layout.build((3, 1, 1), audio, [2]).coords[3 : 3 + audio]
    assert coords[:, 0].tolist() == list(range(audio))
    assert coords[0, 3:].tolist() == [audio, 1, 1, frames, 1, 1]


def test_text_of_style_v2_has_no_position() -> None:  # O4
    layout = Layout.build((2, 2, 2), 5, [4])
    table = rotary_table(layout.coords, rotary_bands(16))[-4:]
    assert torch.equal(table, torch.cat([torch.zeros(4, 6), torch.ones(4, 6)], dim=1))


@pytest.mark.parametrize(
    ("audio", "text", "style", "message"),
    [
        (5, [3, 1], "v1", "single text token"),
        (1, [3], "v1", "single audio token"),
        (5, [3], "v3", "choose v1 or v2"),
        (5, [], "v2", "at least one sample"),
    ],
)
def test_lengths_without_positions_are_refused(audio: int, text: list[int], style: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.build((2, 2, 2), audio, text, coords_style=style)


@pytest.mark.parametrize(("audio", "text"), [(0, [3, 2]), (0, [0, 2]), (5, [1, 1]), (1, [2, 2])])
def test_tables_are_finite(audio: int, text: list[int]) -> None:
    layout = Layout.build((2, 2, 2), audio, text)
    assert rotary_table(layout.coords, rotary_bands(16)).isfinite().all()
    assert len(layout.coords) == layout.length == sum(layout.sizes)


def test_padding_of_text_features() -> None:
    features = torch.ones(1, 3, 2)
    padded, length = pad_or_trim(features, 5)
    assert length == 3
    assert padded.sum(dim=(0, 2)).tolist() == [2, 2, 2, 0, 0]
    assert pad_or_trim(features, 2)[0].shape == (1, 2, 2)
    assert pad_or_trim(features, 2)[1] == 2


class TestRoute:
    """Drawing the tokens that pass through routed layers."""

    @pytest.mark.parametrize("text", [[4, 4], [6, 2, 3], [5]])
    def test_keeps_a_share_of_each_modality_of_each_sample(self, text: list[int]) -> None:
        layout = Layout.build((2, 2, 3), 6, text).with_rotary(torch.randn(2 * len(text) * 9 + sum(text), 12))
        rows, kept = layout.route(0.5)
        assert rows.diff().min() > 0
        assert kept.text_lens == tuple(round(n / 2) for n in text)
        assert (kept.video_len, kept.audio_len) == (6, 3)
        assert torch.equal(kept.modality, layout.modality[rows])
        assert torch.equal(kept.coords, layout.coords[rows])
        assert kept.rotary is not None
        assert layout.rotary is not None
        assert torch.equal(kept.rotary, layout.rotary[rows])
        for i in range(len(text)):
            assert set(rows[kept.sample_rows(i)].tolist()) <= set(layout.sample_rows(i).tolist())

    def test_is_uniform_over_tokens(self) -> None:
        layout = Layout.build((2, 2, 2), 4, [3])
        torch.manual_seed(0)
        counts = torch.zeros(layout.length)
        for _ in range(2000):
            counts[layout.route(0.25)[0]] += 1
        assert (counts[:8] / 2000 - 0.25).abs().max() < 0.04
        assert (counts[12:] / 2000 - 1 / 3).abs().max() < 0.05  # at least one token of a modality stays

    def test_one_token_at_least_of_whatever_there_is(self) -> None:
        _, kept = Layout.build((2, 2, 2), 0, [3, 1]).route(0.05)
        assert (kept.video_len, kept.audio_len, kept.text_lens) == (1, 0, (1, 1))

    def test_full_rate_keeps_everything(self) -> None:
        layout = Layout.build((2, 2, 2), 0, [3, 1])
        rows, kept = layout.route(1.0)
        assert torch.equal(rows, torch.arange(layout.length))
        assert kept.groups == layout.groups
