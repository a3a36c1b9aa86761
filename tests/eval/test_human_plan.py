"""Plan of a human study: balance of sides, quotas, repeats and checks, matching of clips, equal media, refusals."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from human_study import PROMPT, SECRET, SYSTEMS, made_study, write_clips

from eval.clip_file import ClipFile
from eval.human import study_media
from eval.human.study_plan import (
    DAMAGED,
    StudySettings,
    Trial,
    assign_trials,
    balance,
    check_settings,
    exclusion_rule,
    make_plan,
    matched,
    read_plan,
)
from magihuman.errors import UserError
from magihuman.media.reading import probe, read_clip

SETTINGS = StudySettings(systems="a=a,b=b,c=c", focus="a", raters=10, pairs=200)


def assigned(opponents: int = 2, pool: int = 100, **changed: int) -> list[list[Trial]]:
    settings = replace(SETTINGS, **changed)
    pools = [list(range(k * pool, (k + 1) * pool)) for k in range(opponents)]
    checks = range(opponents * pool, opponents * pool + settings.checks)
    return assign_trials(pools, checks, settings, np.random.default_rng(settings.seed))


@pytest.mark.parametrize(("opponents", "pairs"), [(1, 100), (2, 200), (2, 151), (3, 100), (3, 77)])
@pytest.mark.parametrize("share", [True, False])
def test_sides_are_balanced_for_every_rater_and_opponent(opponents: int, pairs: int, share: bool) -> None:
    for asked in assigned(opponents, pairs=pairs, share=share):
        for opponent in range(opponents):
            sides = [t.focus_left for t in asked if t.kind == "pair" and t.pair // 100 == opponent]
            assert len(sides) in (pairs // opponents, pairs // opponents + 1)
            assert abs(2 * sum(sides) - len(sides)) <= 1
        checks = [t.focus_left for t in asked if t.kind == "check"]
        assert sum(checks) == 3 == len(checks) // 2


def test_shared_pairs_are_the_same_for_all_and_balanced_over_raters() -> None:
    every = assigned()
    sides: dict[int, list[bool]] = {}
    for asked in every:
        for trial in asked:
            if trial.kind == "pair":
                sides.setdefault(trial.pair, []).append(trial.focus_left)
    assert len(sides) == 200
    assert {(len(of), sum(of)) for of in sides.values()} == {(10, 5)}
    assert len({tuple(t.pair for t in asked) for asked in every}) == 10  # each in an order of its own


def test_pairs_that_are_not_shared_are_spread_evenly() -> None:
    counts = Counter(t.pair for asked in assigned(pool=300, share=False) for t in asked if t.kind == "pair")
    assert len(counts) == 600
    assert set(counts.values()) == {3, 4}  # 1000 votes on 300 pairs of each opponent


def test_repeats_come_late_with_sides_exchanged() -> None:
    for asked in assigned():
        assert len(asked) == 212
        where = {t.pair: (k, t.focus_left) for k, t in enumerate(asked) if t.kind == "pair"}
        repeats = [(k, t) for k, t in enumerate(asked) if t.kind == "repeat"]
        assert len(repeats) == len({t.pair for _, t in repeats}) == 6
        for k, trial in repeats:
            first, side = where[trial.pair]
            assert k - first >= 50
            assert trial.focus_left != side


def test_the_seed_decides() -> None:
    assert assigned() == assigned()
    assert assigned() != assigned(seed=1)


def test_too_few_clips_name_the_number_that_fits() -> None:
    with pytest.raises(UserError, match=r"pairs=300 needs 150 pairs .* there are 100; give pairs=200, or more clips"):
        assigned(pairs=300)


@pytest.mark.parametrize("pool", [1, 2, 3, 8])
@pytest.mark.parametrize("pairs", [1, 3, 16, 18, 200])
@pytest.mark.parametrize("opponents", [1, 2])
def test_the_setting_that_a_message_names_works(opponents: int, pairs: int, pool: int) -> None:
    """From any number of pairs, at most two messages lead to a plan of all opponents."""
    systems = ",".join(f"{name}=." for name in ("x", "y", "z")[: opponents + 1])
    settings = replace(SETTINGS, systems=systems, focus="x", pairs=pairs)
    for _ in range(3):
        try:
            check_settings(settings)
            asked = assigned(opponents, pool, **{k: getattr(settings, k) for k in ("pairs", "checks", "repeats")})
            break
        except UserError as error:
            advice = str(error).rpartition("give ")[2].rpartition(" or more, or ")[2].removesuffix(", or more clips")
            named = dict(word.split("=") for word in advice.split())
            settings = replace(settings, **{name: int(value) for name, value in named.items()})
    assert {t.pair // pool for t in asked[0] if t.kind == "pair"} == set(range(opponents))


def test_small_studies_get_whole_settings() -> None:
    with pytest.raises(UserError, match=r"there are 8; give pairs=16 checks=4 repeats=2, or more clips$"):
        assigned(pool=8)
    with pytest.raises(UserError, match=r"give pairs=18 or more, or pairs=4 checks=1 repeats=0 failures=0$"):
        check_settings(replace(SETTINGS, systems="x=.,y=.", focus="x", pairs=4))
    with pytest.raises(UserError, match=r"pairs=1 is too few .* and 2 opponents; give pairs=2 or more, or pairs=2"):
        check_settings(replace(SETTINGS, systems="x=.,y=.,z=.", focus="x", pairs=1, checks=0, repeats=0))


def clip(name: str, prompt: str = "") -> ClipFile:
    return ClipFile(Path(f"{name}.mp4"), prompt=prompt)


def test_clips_are_matched_by_prompt_or_by_name() -> None:
    ours = [clip("1", "x"), clip("2", "y"), clip("3", "x")]
    theirs = [clip("b", "x"), clip("c", "z"), clip("a", "x")]
    assert [(a.name, b.name) for a, b in matched(ours, theirs)] == [("1", "a"), ("3", "b")]
    assert [(a.name, b.name) for a, b in matched(ours, [clip("3"), clip("1")])] == [("1", "1"), ("3", "3")]
    assert matched([clip("1", "x")], [clip("1", "y")]) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"systems": "a"}, "is not NAME=FOLDER"),
        ({"systems": "a=.,a=."}, "has a twice"),
        ({"systems": "a=.,b=nowhere"}, "nowhere does not exist"),
        ({"systems": "a|b=.,c=."}, "may hold letters"),
        ({"focus": "x"}, "focus=x"),
        ({"raters": 0}, "raters=0 is impossible"),
        ({"pairs": 10}, "pairs=10 is too few for repeats=6, checks=6 and 1 opponents; give pairs=18"),
        ({"checks": 1}, "failures=1 of checks=1 excludes nobody; give failures=0 or fewer, or checks=0"),
        ({"failures": 7}, "failures=7 of checks=6 excludes nobody; give failures=5"),
        ({"loudness": 0.0}, "loudness=0.0 is impossible"),
        ({"height": 101}, "height=101 is impossible"),
        (
            {"question": "Is A better?"},
            r"question=Is A better\? has the name of the system 'a', .*; reword it, or give",
        ),
    ],
)
def test_impossible_settings_are_refused(changed: dict[str, object], message: str) -> None:
    settings = replace(SETTINGS, systems="a=.,bb=.", focus="a", question="Which?")
    with pytest.raises(UserError, match=message):
        check_settings(replace(replace(settings, instructions=None), **changed))  # type: ignore[arg-type]


def test_texts_of_the_program_name_no_system(tmp_path: Path) -> None:
    """Systems may be called as words of the usual question and instructions; an own text is read for them."""
    settings = replace(SETTINGS, systems="a=.,clip=.", focus="clip")
    assert check_settings(settings).startswith("You will see pairs of short clips")
    (tmp_path / "own.txt").write_text("Choose the better clip.")
    with pytest.raises(UserError, match=r"own\.txt has the name of the system 'clip'"):
        check_settings(replace(settings, instructions=str(tmp_path / "own.txt")))


def test_without_checks_nobody_is_excluded() -> None:
    settings = replace(SETTINGS, systems="x=.,y=.", focus="x", checks=0)
    check_settings(settings)
    assert exclusion_rule(settings) == "no rater is excluded: there are no attention checks"


def test_loudness_is_that_of_the_standard() -> None:
    """EBU Tech 3341, case 1: a stereo sine of 1 kHz at -23 dBFS per channel is -23 LUFS."""
    time = np.arange(48000 * 4) / 48000
    wave = np.stack([10 ** (-23 / 20) * np.sin(2 * np.pi * 1000 * time)] * 2).astype(np.float32)
    assert study_media.loudness(wave, 48000) == pytest.approx(-23, abs=0.1)
    assert study_media.loudness(wave[:, :4800], 48000) == pytest.approx(-23, abs=0.3)  # shorter than a block
    for samples in (48001, 47999, 41234):  # no whole number of blocks of 0.1 s, as almost every clip
        assert study_media.loudness(wave[:, :samples], 48000) == pytest.approx(-23, abs=0.1)
    assert study_media.loudness(np.zeros((2, 48000), np.float32), 48000) is None
    louder, limited = study_media.at_loudness(wave, 48000, -30)
    assert study_media.loudness(louder, 48000) == pytest.approx(-30, abs=0.1)
    assert not limited
    click = np.zeros((2, 48000), np.float32)
    click[:, ::12000] = 0.5
    capped, limited = study_media.at_loudness(click, 48000, -10)
    assert limited
    assert np.abs(capped).max() == pytest.approx(study_media.PEAK)


def test_frames_are_fitted_without_distortion() -> None:
    frames = np.full((2, 10, 20, 3), 9, np.uint8)
    fitted = study_media.fit(frames, (16, 24))
    assert fitted.shape == (2, 16, 24, 3)
    assert (fitted[:, 3:13, 2:22] == 9).all()
    assert fitted.sum() == frames.sum()


def test_only_clips_of_an_interrupted_plan_are_removed(tmp_path: Path) -> None:
    for name in ("0123456789abcdef", "holiday"):
        (tmp_path / f"{name}.mp4").touch()
    study_media.encode_all([], tmp_path, (16, 16), -23)
    assert [file.name for file in tmp_path.iterdir()] == ["holiday.mp4"]


def test_the_damaged_copy_is_obviously_worse() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (25, 48, 64, 3), dtype=np.uint8)
    wave = (0.1 * rng.standard_normal((2, 16000))).astype(np.float32)
    bad, noisy = study_media.damage(frames, wave, rng)
    assert bad.shape == frames.shape
    assert len(np.unique(bad[0].reshape(-1, 3), axis=0)) <= 12 * 16  # blocks of 4 x 4
    assert (bad[:12] == bad[0]).all()
    assert noisy is not None
    assert np.std(noisy - wave) == pytest.approx(np.std(wave), rel=0.05)  # 0 dB


def test_media_are_equal_in_all_but_content(tmp_path: Path) -> None:
    write_clips(tmp_path / "loud", 4, frames=15, size=(72, 128), level=0.5)
    write_clips(tmp_path / "soft", 4, frames=25, size=(36, 48), level=0.02)
    plan = make_plan(
        StudySettings(
            systems=f"loud={tmp_path / 'loud'},soft={tmp_path / 'soft'}", focus="loud", raters=1, pairs=4, repeats=1, checks=2,
            output=str(tmp_path / "study"),
        )
    )  # fmt: skip
    assert len(plan.media) == 8 + 2
    for name, seconds in plan.media.items():
        path = tmp_path / "study" / "media" / f"{name}.mp4"
        info = probe(path)
        assert (info.height, info.width, info.audio_rate, info.audio_channels) == (36, 64, 48000, 2)
        assert info.seconds == pytest.approx(seconds, abs=0.01)
        wave = read_clip(path, fps=info.fps, rate=48000, channels=2).wave
        assert wave is not None
        assert study_media.loudness(wave.numpy(), 48000) == pytest.approx(-23, abs=1.0)
        content = path.read_bytes()
        for word in (SECRET, PROMPT, "loud", "soft", str(tmp_path)):
            assert word.encode() not in content
        with av.open(str(path)) as container:
            kept = {**container.metadata, **container.streams.video[0].metadata, **container.streams.audio[0].metadata}
        assert set(kept) <= {
            "major_brand",
            "minor_version",
            "compatible_brands",
            "encoder",
            "language",
            "handler_name",
            "vendor_id",
        }
    assert {(tmp_path / "study" / "media").name} | {p.stem for p in (tmp_path / "study" / "media").iterdir()} == {
        "media",
        *plan.media,
    }
    said = "\n".join(plan.notes)
    assert "lengths differ" in said
    assert "loud 0.6 s, soft 1 s" in said
    assert "aspect ratios differ" in said
    assert "height 36" in said


def test_the_plan_is_read_as_it_was_written_and_never_overwritten(tmp_path: Path) -> None:
    plan = made_study(tmp_path)
    folder = tmp_path / "study"
    assert read_plan(folder) == plan
    assert (folder / "plan.json").stat().st_mode & 0o077 == 0
    assert len(set(plan.tokens)) == 2
    assert all(len(token) >= 16 for token in plan.tokens)
    assert all(abs(difference) <= 1 for of in balance(plan).values() for difference in of)
    content = json.loads((folder / "plan.json").read_text())
    assert content["settings"]["share"] is True
    assert content["exclusion"].startswith(
        "a rater who fails more than 1 of 2 attention checks is excluded; a check is failed unless"
    )
    with pytest.raises(UserError, match="holds a study"):
        make_plan(plan.settings)


def test_a_clip_is_of_one_system(tmp_path: Path) -> None:
    write_clips(tmp_path / "a", 2)
    settings = replace(
        SETTINGS, systems=f"aa={tmp_path}/a,bb={tmp_path}/a/../a", focus="aa", output=str(tmp_path / "study")
    )
    with pytest.raises(UserError, match=r"00[01].mp4 is a clip of both aa and bb"):
        make_plan(settings)


def test_a_clip_that_cannot_be_shown_is_left_out_and_said(tmp_path: Path) -> None:
    for name in SYSTEMS[:2]:
        write_clips(tmp_path / name, 4)
    (tmp_path / SYSTEMS[1] / f"{SECRET}002.mp4").write_bytes(b"")
    places = ",".join(f"{name}={tmp_path / name}" for name in SYSTEMS[:2])
    settings = StudySettings(
        places, SYSTEMS[0], raters=1, pairs=3, repeats=1, checks=1, failures=0, output=str(tmp_path / "study")
    )
    plan = make_plan(settings)
    assert sum(pair.opponent != DAMAGED for pair in plan.pairs) == 3
    assert any("1 clips cannot be shown" in note and f"{SECRET}002" in note and "empty" in note for note in plan.notes)
    assert any(note.startswith("1 clips of alphamodel have no counterpart") for note in plan.notes)
    write_clips(tmp_path / "other", 1)
    (tmp_path / "other" / f"{SECRET}000.txt").write_text("another")
    settings = replace(settings, systems=f"{places},other={tmp_path / 'other'}", output=str(tmp_path / "second"))
    with pytest.raises(UserError, match="no clip of other has the prompt"):
        make_plan(settings)
