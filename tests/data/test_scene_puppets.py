"""The world `scene`: known shares of what captions leave open, pairs that are held out, drawing that follows the words."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import chisquare

from data.tiny.dataset import check_appearance
from data.tiny.fit_codec import fit
from data.tiny.puppets import (
    CENTRES,
    FPS,
    NOVEL_PAIRS,
    SAMPLE_RATE,
    SCALES,
    SKINS,
    WORLDS,
    draw_puppet,
    mouth_track,
    parse_caption,
    render,
    synthesise,
)
from magihuman.codecs.tiny_captions import WALLS
from magihuman.errors import UserError

SCENE = WORLDS["scene"]


@pytest.fixture(scope="module")
def puppets():
    return [draw_puppet(5, index, "scene") for index in range(1500)]


def test_shares_of_all_attributes_are_the_declared_ones(puppets) -> None:
    for name, attribute in SCENE.attributes.items():
        counts = Counter(getattr(puppet, name) for puppet in puppets)
        expected = np.array(attribute.expected) * len(puppets)
        assert chisquare([counts[value] for value in attribute.values], expected).pvalue > 1e-3, name


def test_captions_state_attributes_as_often_as_declared(puppets) -> None:
    for name, attribute in SCENE.attributes.items():
        share = np.mean([name in puppet.stated for puppet in puppets])
        assert abs(share - attribute.stated) < 4 * np.sqrt(0.25 / len(puppets)), name


def test_a_caption_can_be_read_back_and_says_nothing_of_what_is_open(puppets) -> None:
    for puppet in puppets[:200]:
        world, words, stated = parse_caption(puppet.caption)
        assert (world, words) == ("scene", puppet.words)
        assert stated == {name: getattr(puppet, name) for name in puppet.stated}


def test_syllables_are_the_same_words_of_every_caption(puppets) -> None:
    """The text encoder gives a word its index; after optional words the first syllable would have five different ones."""
    assert {puppet.caption.split().index(puppet.words[0]) for puppet in puppets} == {9}


def test_walls_beside_a_shirt_are_equally_often_but_for_the_held_out_one(puppets) -> None:
    for shirt, novel in NOVEL_PAIRS:
        counts = Counter(puppet.wall for puppet in puppets if puppet.shirt == shirt)
        assert novel not in counts
        assert chisquare([counts[wall] for wall in WALLS if wall != novel]).pvalue > 1e-3, shirt


def test_held_out_pairs_are_drawn_for_evaluation_alone(puppets) -> None:
    assert not any((puppet.shirt, puppet.wall) in NOVEL_PAIRS for puppet in puppets)
    novel = [draw_puppet(5, index, "scene", novel=True) for index in range(600)]
    assert np.mean([(puppet.shirt, puppet.wall) in NOVEL_PAIRS for puppet in novel]) == pytest.approx(1 / 6, abs=0.05)


def test_a_held_out_pair_cannot_be_asked_for() -> None:
    with pytest.raises(UserError, match=r"only=\{shirt: red, wall: pink\}: world=scene keeps this pair for evaluation"):
        check_appearance({"shirt": "red", "wall": "pink"}, "scene")
    check_appearance({"shirt": "red", "wall": "pink"}, "tiny")
    check_appearance({"shirt": "red", "wall": "blue"}, "scene")


def test_codecs_of_an_unknown_world_are_refused_before_the_folder_is_made(tmp_path) -> None:
    with pytest.raises(UserError, match="world=city is unknown; choose from tiny, scene"):
        fit(str(tmp_path / "codecs"), world="city")
    assert not (tmp_path / "codecs").exists()


def test_another_puppet_of_a_caption_differs_in_what_is_open_alone(puppets) -> None:
    for puppet in puppets[:50]:
        others = [draw_puppet(6, index, "scene", like=puppet) for index in range(12)]
        assert {other.caption for other in others} == {puppet.caption}
        assert len({other.skin for other in others}) > 1
        assert len({other.syllables[0].start for other in others}) == len(others)


def test_syllables_fit_the_clip_and_differ_in_number(puppets) -> None:
    assert {len(puppet.syllables) for puppet in puppets} == {4, 5, 6}
    for puppet in puppets:
        assert puppet.syllables[0].start >= SCENE.pause
        assert puppet.syllables[-1].end <= SCENE.frames / FPS - SCENE.pause + 1e-9
        for before, after in pairwise(puppet.syllables):
            assert after.start - before.end >= SCENE.pause - 1e-9


def test_sound_has_the_length_of_the_frames_and_voices_their_range(puppets) -> None:
    wave = synthesise(puppets[0])
    assert len(wave) == SCENE.frames * SAMPLE_RATE // FPS
    for puppet in puppets[:300]:
        pitches = [syllable.pitch for syllable in puppet.syllables]
        assert (np.mean(pitches) < 157.5) == (puppet.voice == "low")


def test_lips_close_for_b_and_m_alone() -> None:
    for puppet in (draw_puppet(7, index, "scene") for index in range(60)):
        height = mouth_track(puppet)[:, 1]
        for syllable in puppet.syllables:
            frame = int((syllable.start + syllable.onset_seconds / 2) * FPS)
            before = [other for other in puppet.syllables if other.end <= syllable.start + 0.001][-1:]
            if before and syllable.start - before[0].end < 0.08:  # still closing from the vowel before
                continue
            assert (height[frame] < 0.003) == (syllable.onset in "bm"), (puppet.words, syllable)


@pytest.mark.parametrize("side", list(CENTRES))
@pytest.mark.parametrize("size", ["near", "far"])
def test_the_puppet_stands_where_the_prompt_says(side, size) -> None:
    from dataclasses import replace

    puppet = replace(draw_puppet(8, 1, "scene"), side=side, size=size, camera="still", object="none", skin="dark")
    frame = render(puppet, 128)[0].astype(float)
    skin = np.abs(frame - np.array(SKINS["dark"])).sum(2) < 12
    centre = (np.flatnonzero(skin.any(0)).mean() + 0.5) / 128
    assert centre == pytest.approx(CENTRES[side], abs=0.02)
    lowest = np.flatnonzero((np.abs(frame - frame[-1, int(CENTRES[side] * 128)]).sum(2) < 12).any(1))[0] / 128
    assert lowest == pytest.approx(1 - 0.19 * SCALES[size], abs=0.05)  # upper edge of the shirt


def test_the_camera_pans_and_zooms() -> None:
    from dataclasses import replace

    puppet = replace(draw_puppet(8, 2, "scene"), side="middle", size="far", object="none", skin="dark")
    widths, centres = {}, {}
    for camera in ("still", "pan", "zoom"):
        frames = render(replace(puppet, camera=camera), 128)
        for place in (0, -1):
            seen = np.flatnonzero((np.abs(frames[place].astype(float) - np.array(SKINS["dark"])).sum(2) < 12).any(0))
            widths[camera, place], centres[camera, place] = len(seen) / 128, (seen.mean() + 0.5) / 128
    assert widths["still", -1] == widths["still", 0]
    assert widths["zoom", -1] == pytest.approx(1.2 * widths["zoom", 0], abs=0.02)
    assert centres["pan", 0] - centres["pan", -1] == pytest.approx(0.14, abs=0.02)
