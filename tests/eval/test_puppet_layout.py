"""Place, size, camera and object of a puppet are found, drawn and through the codec; mixtures are not taken for puppets."""

from dataclasses import replace

import numpy as np
import pytest

from data.tiny.puppets import REST_WIDTH, draw_puppet, mouth_track, render, synthesise
from eval.clips import ground_truth, held_out, through_codec
from eval.metrics.puppet_clips import CLIP_METRICS, RECOGNISABLE
from eval.puppet_layout import close_up, find_layout, mouth_pixels
from eval.puppet_scores import score_clip
from eval.puppet_vision import measure_frames, mouth_region
from magihuman.codecs.bundle import load_bundle

FOUND = ("side", "size", "camera", "object", "wall")


def test_every_layout_is_found_on_drawn_clips() -> None:
    for index in range(60):
        puppet = draw_puppet(50, index, "scene")
        layout = find_layout(render(puppet))
        assert {name: getattr(layout, name) for name in FOUND} == {name: getattr(puppet, name) for name in FOUND}
        assert layout.error < 0.03


def test_a_mouth_is_drawn_within_its_pixels_wherever_the_puppet_stands() -> None:
    for index in range(12):
        puppet = draw_puppet(50, index, "scene")
        closed = np.tile([REST_WIDTH, 0.0], (puppet.frames, 1))
        differs = (render(puppet, 128) != render(puppet, 128, closed)).any(-1)
        pixels = mouth_pixels(puppet, 128)
        assert differs.any()
        assert (differs & ~pixels).sum() < 0.01 * differs.sum()  # a faint edge may lie outside
        assert pixels.mean() < 0.1
    assert (mouth_pixels(draw_puppet(50, 0), 128) == mouth_region(128)).all()


def test_the_size_of_the_image_does_not_matter() -> None:
    puppet = draw_puppet(50, 3, "scene")
    small, large = (find_layout(render(puppet, size)) for size in (64, 128))
    assert replace(small, error=0) == replace(large, error=0)
    with pytest.raises(ValueError, match="multiples of 64 pixels, not 96"):
        find_layout(render(puppet, 96))


def test_the_close_up_shows_the_puppet_as_if_it_filled_the_frame() -> None:
    for index in range(12):
        puppet = draw_puppet(51, index, "scene")
        frames = render(puppet)
        seen = measure_frames(frames, "scene")
        assert {name: seen.attributes[name] for name in ("face", "hair", "shirt", "skin")} == {
            name: getattr(puppet, name) for name in ("face", "hair", "shirt", "skin")
        }
        drawn = np.pi * mouth_track(puppet).prod(1)
        assert np.corrcoef(seen.openness, drawn)[0, 1] > 0.98
        assert close_up(frames, find_layout(frames)).shape == frames.shape


def test_two_half_transparent_puppets_are_not_recognisable() -> None:
    """But for a sixth (4 of these 24), whose colours are near to that of the wall."""
    alone, mixed = [], []
    for index in range(24):
        puppet = replace(draw_puppet(52, index, "scene"), side="left", camera="still")
        other = replace(puppet, side="right")
        alone.append(find_layout(render(puppet)).error)
        mixed.append(find_layout(((render(puppet).astype(int) + render(other)) // 2).astype(np.uint8)).error)
    assert max(alone) < 0.03
    assert np.mean(np.array(mixed) > RECOGNISABLE) > 0.75
    assert np.median(mixed) > 0.8
    assert all(np.array(mixed) > 2 * np.array(alone) + 0.02)


def test_a_clip_without_a_puppet_is_not_recognisable() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (37, 64, 64, 3)).astype(np.uint8)
    assert find_layout(noise).error > RECOGNISABLE


def test_everything_that_a_caption_states_is_seen_and_heard_through_the_codec() -> None:
    puppets = held_out(30, "scene")
    clips = through_codec(ground_truth(puppets), load_bundle("scene"))
    scores = clips.score()
    for name in ("attributes", "layout", "voice", "sound", "novel_pair", "recognisable", "open_recognisable", "vowels"):
        assert scores.table[name].value == 1.0, name
    assert scores.table["onsets"].value > 0.97
    assert scores.table["sync_r"].value > 0.93
    assert scores.table["sync_other"].value < 0.25


def test_rows_of_open_attributes_have_no_value_where_the_prompt_states_them() -> None:
    puppet = replace(
        draw_puppet(50, 0, "scene"), stated=frozenset({"face", "hair", "shirt", "wall", "camera", "side", "size"})
    )
    score = score_clip(render(puppet), synthesise(puppet), puppet.caption)
    assert CLIP_METRICS["open_recognisable"].of(score) is None
    assert CLIP_METRICS["voice"].of(score) is None
    assert CLIP_METRICS["layout"].of(score) == 1.0
    left = replace(puppet, side="left")
    shown = score_clip(render(left), synthesise(left), replace(puppet, side="right").caption)
    assert CLIP_METRICS["side"].of(shown) == 0.0
    assert CLIP_METRICS["layout"].of(shown) == pytest.approx(2 / 3)
