"""Scores of sets of clips: perfect on the truth, and degraded in the way in which the clips are."""

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from data.tiny.puppets import draw_puppet, render, synthesise
from eval.metrics.puppet_clips import CLIP_METRICS
from eval.metrics.registry import metrics
from eval.output import folder_for
from eval.puppet_scores import score_clip, sync_of
from eval.scores import score_clips

N = 30
PUPPETS = [draw_puppet(70, index) for index in range(N)]
CAPTIONS = [puppet.caption for puppet in PUPPETS]


@pytest.fixture(scope="module")
def frames():
    return [render(puppet) for puppet in PUPPETS]


@pytest.fixture(scope="module")
def waves():
    return [synthesise(puppet) for puppet in PUPPETS]


@pytest.fixture(scope="module")
def truth(frames, waves):
    return score_clips(frames, waves, CAPTIONS)


def value(scores, name) -> float:
    found = scores.table[name].value
    assert found is not None, scores.table[name].reason
    return found


def lags(scores) -> list[int]:
    return [clip.sync.lag for clip in scores.clips]


def test_the_truth_is_perfect(truth):
    assert list(truth.table) == [name for name in metrics() if name in truth.table]
    assert truth.table.keys() > CLIP_METRICS.keys()
    assert {"sync_skill", "sync_retrieval", "syllable_error", "skin_distance"} < truth.table.keys()
    for name in ("attributes", "face", "hair", "shirt", "wall", "vowels", "vowels_exact", "words_exact"):
        assert value(truth, name) == 1
    for name in ("syllable_error", "static", "silent"):
        assert value(truth, name) == 0
    assert value(truth, "sync_r") > 0.98
    assert value(truth, "sync_retrieval") == 1
    assert value(truth, "sync_lag0") == 1
    assert truth.table["sync_skill"].status == "unavailable"
    assert "bound" in truth.table["sync_skill"].reason
    assert truth.skins == {s: sum(p.skin == s for p in PUPPETS) for s in ("light", "tan", "dark")}


def test_against_itself_the_skill_is_one(truth, frames, waves):
    again = score_clips(frames, waves, CAPTIONS, truth)
    for name in ("sync_skill", "sync_skill_shifted"):
        assert again.table[name].low == pytest.approx(1)
        assert again.table[name].high == pytest.approx(1)


@pytest.mark.parametrize(("late", "r"), [(-2, 0.3), (1, 0.75), (2, 0.3), (3, 0.0), (5, 0.0)])
def test_a_delay_is_found_to_the_frame_and_costs_skill(late, r, truth, frames, waves):
    moved = [np.roll(movie, late, 0) for movie in frames]  # every clip starts and ends with its mouth shut
    scores = score_clips(moved, waves, CAPTIONS, truth)
    assert np.mean(np.array(lags(scores)) == late) > 0.9
    assert value(scores, "sync_lag0") == 0
    assert value(scores, "sync_r") < r
    assert value(scores, "sync_skill") < 0.3


def test_another_clips_voice_has_no_skill_though_it_correlates(truth, frames, waves):
    """The shared rhythm alone gives r near .6, and .6 of skill against circular shifts."""
    scores = score_clips(frames, waves[1:] + waves[:1], CAPTIONS, truth)
    assert 0.45 < value(scores, "sync_r") < 0.7
    assert abs(value(scores, "sync_skill")) < 0.25
    assert value(scores, "sync_skill_shifted") > 0.5
    assert value(scores, "sync_retrieval") < 0.25
    assert value(scores, "vowels") < 0.4
    assert value(scores, "attributes") == 1


def test_shuffled_pictures_are_worse_than_another_voice(truth, frames, waves):
    rng = np.random.default_rng(0)
    scores = score_clips([movie[rng.permutation(25)] for movie in frames], waves, CAPTIONS, truth)
    assert abs(value(scores, "sync_r")) < 0.12
    assert value(scores, "sync_skill") < -1
    assert value(scores, "sync_skill_shifted") < 0.2
    assert value(scores, "vowels") == 1


def test_a_frozen_picture_is_static_and_has_no_sync(truth, frames, waves):
    scores = score_clips([np.repeat(movie[:1], 25, 0) for movie in frames], waves, CAPTIONS, truth)
    assert value(scores, "static") == 1
    assert scores.table["sync_r"].value is None
    assert "moving mouth" in scores.table["sync_skill"].reason
    assert {clip.sync.status for clip in scores.clips} == {"static"}
    assert {clip.sync.lag for clip in scores.clips} == {None}


@pytest.mark.parametrize("nothing", [np.zeros(16000, np.float32), None], ids=["zeros", "no track"])
def test_silence_has_no_sync_and_no_lag(nothing, truth, frames):
    scores = score_clips(frames, [nothing] * N, CAPTIONS, truth)
    assert value(scores, "silent") == 1
    assert scores.table["sync_r"].value is None
    assert {clip.sync.lag for clip in scores.clips} == {None}
    assert value(scores, "vowels") == 0
    assert value(scores, "syllable_error") == 1


def test_frozen_clips_among_good_ones_count_as_not_following(truth, frames, waves):
    half = [np.repeat(m[:1], 25, 0) if i % 2 else m for i, m in enumerate(frames)]
    scores = score_clips(half, waves, CAPTIONS, truth)
    assert value(scores, "static") == 0.5
    assert value(scores, "sync_r") == pytest.approx(value(truth, "sync_r") / 2, abs=0.01)
    assert value(scores, "sync_retrieval") == 0.5


@pytest.mark.parametrize(("sigma", "least"), [(1, 0.99), (2, 0.98), (3, 0.97)])
def test_blur_costs_sharpness_and_no_sync(sigma, least, truth, frames, waves):
    soft = [gaussian_filter(movie.astype(float), (0, sigma, sigma, 0)).astype(np.uint8) for movie in frames]
    scores = score_clips(soft, waves, CAPTIONS, truth)
    assert value(scores, "sync_skill") > least
    assert value(scores, "sharpness") < 0.15 * value(truth, "sharpness")
    assert value(scores, "attributes") == 1


@pytest.mark.parametrize(("level", "least", "flicker"), [(0.05, 0.98, 0.037), (0.1, 0.97, 0.072), (0.2, 0.92, 0.133)])
def test_noise_costs_flicker_and_little_sync(level, least, flicker, truth, frames, waves):
    rng = np.random.default_rng(0)
    rough = [np.clip(m + rng.standard_normal(m.shape) * level * 255, 0, 255).astype(np.uint8) for m in frames]
    scores = score_clips(rough, waves, CAPTIONS, truth)
    assert value(scores, "sync_skill") > least
    assert value(scores, "flicker") == pytest.approx(flicker, rel=0.15)
    assert value(scores, "attributes") == 1


@pytest.mark.parametrize(("frames_held", "low", "high"), [(2, 0.7, 0.9), (4, -0.5, 0.2)])
def test_pictures_held_in_time_lose_skill(frames_held, low, high, truth, frames, waves):
    def hold(movie):
        means = movie[1:].reshape(24 // frames_held, frames_held, 64, 64, 3).mean(1).astype(np.uint8)
        return np.concatenate([movie[:1], means.repeat(frames_held, 0)])

    scores = score_clips([hold(movie) for movie in frames], waves, CAPTIONS, truth)
    assert low < value(scores, "sync_skill") < high


def test_noise_for_a_video_scores_at_chance(truth, waves):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (25, 64, 64, 3)).astype(np.uint8) for _ in range(N)]
    scores = score_clips(noise, waves, CAPTIONS, truth)
    assert value(scores, "attributes") < 0.4
    assert abs(value(scores, "sync_r")) < 0.15
    assert value(scores, "sync_retrieval") < 0.25


def test_size_changes_nothing_but_sharpness(truth, waves):
    large = score_clips([render(puppet, 128) for puppet in PUPPETS], waves, CAPTIONS, truth)
    assert value(large, "sync_skill") == pytest.approx(1, abs=0.01)
    assert value(large, "amplitude") == pytest.approx(value(truth, "amplitude"), rel=0.02)
    assert value(large, "sharpness") < 0.7 * value(truth, "sharpness")
    assert value(large, "attributes") == 1


def test_wrong_captions_are_wrong(truth, frames, waves):
    shifted = [p.caption for p in PUPPETS[1:] + PUPPETS[:1]]
    scores = score_clips(frames, waves, shifted)
    assert value(scores, "attributes") < 0.4
    assert value(scores, "vowels_exact") < 0.1


def test_a_collapsed_skin_tone_is_seen(truth, frames, waves):
    one = [i for i, p in enumerate(PUPPETS) if p.skin == "dark"]
    scores = score_clips([frames[i] for i in one], [waves[i] for i in one], [CAPTIONS[i] for i in one])
    assert value(scores, "skin_distance") == pytest.approx(2 / 3)
    assert scores.skin_p < 1e-3
    assert value(truth, "skin_distance") < 0.2


def test_one_clip_has_a_score_but_no_comparison(truth, frames, waves):
    scores = score_clips(frames[:1], waves[:1], CAPTIONS[:1], truth)
    assert value(scores, "sync_r") > 0.95
    assert "other clips" in scores.table["sync_other"].reason


@pytest.mark.parametrize(("count", "found"), [(19, None), (20, 1.0)])
def test_retrieval_among_twenty_needs_twenty(count, found, frames, waves):
    """With fewer, the own audio would win more easily."""
    measure = score_clips(frames[:count], waves[:count], CAPTIONS[:count]).table["sync_retrieval"]
    assert measure.value == found
    assert measure.reason == ("" if found else "needs 20 clips of one length with audio")


def test_what_cannot_be_scored_is_refused(frames, waves):
    with pytest.raises(ValueError, match="not the same number"):
        score_clips(frames[:2], waves[:1], CAPTIONS[:2])
    with pytest.raises(ValueError, match="no clips"):
        score_clips([], [], [])
    with pytest.raises(ValueError, match="one channel"):
        score_clip(frames[0], waves[0][None], PUPPETS[0].caption)
    with pytest.raises(ValueError, match="not a puppet's caption"):
        score_clip(frames[0], waves[0], "a man speaks")
    with pytest.raises(ValueError, match="not a puppet's caption"):
        score_clip(frames[0], waves[0], "round face, grey hair, red shirt, blue wall, says")


def test_sync_of_a_known_signal():
    called = np.sin(np.arange(25) / 25 * 4 * np.pi) + 1
    assert sync_of(3 * called + 1, called, False).r == pytest.approx(1)
    found = sync_of(np.roll(called, 2), called, False)
    assert found.lag == 2
    assert found.r_best > 0.99
    assert sync_of(called, None, False).status == "silent"
    assert sync_of(called, called, True).r is None


def test_scores_can_be_written_as_json(truth):
    import json

    content = json.loads(json.dumps([truth.to_dict(), [clip.to_dict() for clip in truth.clips]]))
    assert content[0]["edits"] == {"substitutions": 0, "deletions": 0, "insertions": 0, "syllables": 3 * N}
    assert content[0]["table"]["sync_skill"]["value"] is None
    assert content[1][0]["heard"] == list(PUPPETS[0].words)


def test_results_go_into_a_run_folder_or_under_runs(tmp_path: Path) -> None:
    (tmp_path / "a" / "export").mkdir(parents=True)
    assert folder_for("compare", str(tmp_path / "a")) == tmp_path / "a" / "compare"
    assert folder_for("eval", "tiny/base") == Path("runs/eval/tiny-base")
    assert folder_for("compare", "runs/dmd2/a", "tiny/b") == Path("runs/compare/runs-dmd2-a+tiny-b")
