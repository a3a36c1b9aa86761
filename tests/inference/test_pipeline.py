"""From prompts to clips: settings, geometry, conditions, and what a saved clip holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_bundle import FRAMES, HOP, SIDE, fake_bundle, fake_checkpoint
from PIL import Image

from inference.pipeline import TEXTS_KEPT, Clip, Pipeline, frames_for
from magihuman import zoo
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.media.reading import probe, read_clip
from magihuman.models.config import Contract


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = fake_checkpoint(tmp_path_factory.mktemp("checkpoint") / "export")
    return Pipeline(zoo.load(folder), fake_bundle())


def test_clips_have_the_world_s_shape_and_follow_seed_and_prompt(pipeline: Pipeline) -> None:
    prompts = ["round face, says ma", "round face, says ma", "square face"]
    a, b, c = pipeline.generate(prompts, [1, 2, 1])
    assert (a.frames.shape, a.frames.dtype) == ((FRAMES, SIDE, SIDE, 3), torch.uint8)
    assert (a.wave.shape, a.wave.dtype) == ((1, FRAMES * HOP), torch.float32)
    assert (a.sample_rate, a.fps, a.prompt, a.seed) == (16000, 25.0, prompts[0], 1)
    assert (a.video.shape, a.audio.shape) == ((3, 5, 8, 8), (FRAMES, 4))
    assert float(a.wave.abs().max()) <= 1
    assert not torch.equal(a.frames, b.frames)
    assert not torch.equal(a.video, c.video)
    assert not torch.equal(a.audio, c.audio)


def test_batches_do_not_change_clips(pipeline: Pipeline) -> None:
    prompts, seeds = ["a", "b c d", "e f"], [5, 6, 7]
    together = pipeline.generate(prompts, seeds, steps=4)
    for clip, alone in zip(together, pipeline.generate(prompts, seeds, batch=1, steps=4), strict=True):
        assert (clip.video - alone.video).abs().max() < 1e-4
        assert (clip.audio - alone.audio).abs().max() < 1e-4


def test_texts_are_encoded_one_by_one_and_only_the_last_ones_are_kept(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, calls = pipeline.codecs.text_encoder, []

    def encode(prompts: list[str]) -> list[torch.Tensor]:
        calls.append(prompts)
        return type(encoder).encode(encoder, prompts)

    monkeypatch.setattr(encoder, "encode", encode, raising=False)
    monkeypatch.setattr(pipeline, "_texts", {})
    prompts = [f"text {i}" for i in range(2 * TEXTS_KEPT)]
    together = encoder.encode(list(prompts))
    calls.clear()
    for start in range(0, len(prompts), 50):
        found = pipeline.text([*prompts[start : start + 50], "nothing"])
        assert all(torch.equal(a, b) for a, b in zip(found, together[start : start + 50], strict=False))
        assert len(pipeline._texts) <= TEXTS_KEPT
    assert calls == [[prompt] for prompt in [*prompts[:50], "nothing", *prompts[50:]]]
    assert {features.device.type for features in pipeline._texts.values()} == {"cpu"}
    assert len(pipeline.text(prompts)) == len(pipeline._texts) == len(prompts)  # never fewer than one call needs


def test_the_checkpoint_s_settings_are_the_default(pipeline: Pipeline) -> None:
    own = pipeline.settings()
    assert (own.solver, own.steps, own.shift) == ("unipc", 2, 5.0)
    assert own.guidance == Guidance(3, 2, audio=2)
    assert (own.frames, own.height, own.width) == (FRAMES, SIDE, SIDE)
    given = pipeline.settings(steps=5, solver="euler", shift=3.0, cfg=1, negative_prompt="grey", width=64)
    assert (given.solver, given.steps, given.shift, given.negative_prompt) == ("euler", 5, 3.0, "grey")
    assert not given.guidance.needed
    assert (given.height, given.width) == (SIDE, 64)
    assert pipeline.settings(cfg=4.0).guidance == Guidance(4, 4, audio=4)


def test_negative_prompt_and_guidance_change_the_clip(pipeline: Pipeline) -> None:
    base, negative, off = (
        pipeline.generate(["a"], [1], **settings)[0] for settings in ({}, {"negative_prompt": "grey wall"}, {"cfg": 1})
    )
    assert not torch.equal(base.video, negative.video)
    assert not torch.equal(base.video, off.video)


@pytest.mark.parametrize(
    ("seconds", "frames"), [(1, 25), (0.64, 17), (1.02, 25), (1.1, 29), (4, 101), (0.01, 1), (5, 125)]
)
def test_seconds_become_the_nearest_possible_frames(seconds: float, frames: int) -> None:
    assert frames_for(seconds, 25, 4) == frames


def test_length_and_size_of_the_clip_can_be_chosen(pipeline: Pipeline) -> None:
    clip = pipeline.generate(["a"], [0], seconds=1.0, height=16, width=40)[0]
    assert clip.frames.shape == (25, 16, 40, 3)
    assert clip.wave.shape == (1, 25 * HOP)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 is impossible"),
        ({"solver": "heun"}, "choose one of unipc"),
        ({"shift": 0.0}, "shift=0 is impossible"),
        ({"shift": float("nan")}, "shift=nan is impossible"),
        ({"cfg": 0.5}, "scales start at 1"),
        ({"cfg": float("inf")}, "scales start at 1"),
        ({"seconds": -1}, "seconds=-1 must be positive"),
        ({"guidance": 2}, "guidance is not a sampling option; they are steps, solver, cfg"),
        ({"turbo": "tiny/turbo"}, "turbo is not a sampling option"),
        ({"seed": 7}, "seed is not a sampling option"),
        ({"seconds": 60}, "too long for this checkpoint; give at most 10.88"),
        ({"height": 30}, "height=30 is not a multiple of 8; the nearest is 32"),
        ({"width": 0}, "width=0 is not a multiple of 8; the nearest is 8"),
    ],
)
def test_impossible_settings(pipeline: Pipeline, settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.settings(**settings)  # type: ignore[arg-type]


def test_another_world_is_refused(pipeline: Pipeline) -> None:
    other = fake_bundle()
    loaded = zoo.Loaded(pipeline.denoiser, pipeline.config, pipeline.folder)
    wrong = Contract.from_dict({**other.contract.to_dict(), "video_codec": "other"})
    with pytest.raises(UserError, match="video_codec: 'fake' against 'other'"):
        Pipeline(loaded, replace(other, contract=wrong))


def test_a_diverged_checkpoint_is_named_not_written(tmp_path: Path) -> None:
    loaded = zoo.load(fake_checkpoint(tmp_path / "export"))
    with torch.no_grad():
        loaded.denoiser.model.final_linear_audio.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="output is not finite"):
        Pipeline(loaded, fake_bundle()).generate(["a"], [0])


# ---------------------------------------------------------------------------------------------- conditions


def test_a_picture_becomes_the_first_frame(pipeline: Pipeline, tmp_path: Path) -> None:
    picture = Image.new("RGB", (120, 64), "blue")  # wider than the clip: its sides are cropped
    picture.paste("red", (28, 0, 92, 64))
    picture.save(tmp_path / "p.png")
    clip = pipeline.generate(["a"], [0], image=tmp_path / "p.png")[0]
    plain = pipeline.generate(["a"], [0])[0]
    assert torch.equal(clip.frames[0], torch.tensor([255, 0, 0], dtype=torch.uint8).expand(SIDE, SIDE, 3))
    assert not torch.equal(clip.video[:, 1:], plain.video[:, 1:])


def test_given_sound_is_kept_cut_and_padded(pipeline: Pipeline, tmp_path: Path) -> None:
    tone = 0.5 * torch.sin(torch.arange(8000) * 0.01)
    video = torch.zeros(12, 16, 16, 3, dtype=torch.uint8)
    clip = Clip("", 0, video, tone[None], 16000, 25.0, torch.empty(0), torch.empty(0))
    clip.save(tmp_path / "sound.mp4")
    short = pipeline.generate(["a"], [0], audio=tmp_path / "sound.mp4")[0]  # 8000 of 10880 samples
    assert torch.equal(short.wave[:, 8100:], torch.zeros(1, FRAMES * HOP - 8100))
    assert (short.wave[0, :7000] - tone[:7000]).abs().max() < 0.05  # the sound itself; AAC lies between
    expected = tone[: 12 * HOP].view(12, 4, HOP // 4).mean(2)
    assert (short.audio[:12] - expected).abs().max() < 0.02
    cut = pipeline.generate(["a"], [0], audio=tmp_path / "sound.mp4", seconds=0.2, steps=3)[0]
    assert cut.wave.shape == (1, 5 * HOP)
    assert torch.equal(cut.audio, short.audio[:5])
    plain = pipeline.generate(["a"], [0])[0]
    assert not torch.equal(plain.video, short.video)


def test_conditions_that_cannot_be_used(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.wav").touch()
    Image.new("RGB", (1000, 1)).save(tmp_path / "line.png")
    with pytest.raises(UserError, match=r"image=.*text.png: is not a readable image"):
        pipeline.generate(["a"], [0], image=tmp_path / "text.png")
    with pytest.raises(UserError, match="too thin for a clip of 8 x 64"):
        pipeline.generate(["a"], [0], image=tmp_path / "line.png", height=64, width=8)
    with pytest.raises(UserError, match=r"audio=.*empty.wav: the file is empty"):
        pipeline.generate(["a"], [0], audio=tmp_path / "empty.wav")


# ---------------------------------------------------------------------------------------------- files


def test_a_saved_clip_plays_with_its_length_size_and_sound(pipeline: Pipeline, tmp_path: Path) -> None:
    clip = pipeline.generate(["a"], [0])[0]
    clip.save(tmp_path / "x.mp4")
    clip.save(tmp_path / "y.mp4")
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "y.mp4").read_bytes()
    info = probe(tmp_path / "x.mp4")
    assert (info.kind, info.width, info.height, info.audio_rate, info.audio_channels) == ("video", SIDE, SIDE, 16000, 1)
    assert info.fps == pytest.approx(25)
    assert info.seconds == pytest.approx(FRAMES / 25, abs=0.01)
    assert len(read_clip(tmp_path / "x.mp4", fps=25).frames) == FRAMES


def test_a_rate_that_players_do_not_know_is_resampled(tmp_path: Path) -> None:
    wave = 0.3 * torch.sin(torch.arange(51200) * 2 * torch.pi * 440 / 51200)[None]
    frames = torch.zeros(25, 16, 16, 3, dtype=torch.uint8)
    Clip("", 0, frames, wave, 51200, 25.0, torch.empty(0), torch.empty(0)).save(tmp_path / "x.mp4")
    info = probe(tmp_path / "x.mp4")
    assert info.audio_rate == 44100
    sound = read_clip(tmp_path / "x.mp4", fps=25, rate=44100).wave
    assert sound is not None
    spectrum = torch.fft.rfft(sound[0, :44100]).abs()
    assert abs(int(spectrum.argmax()) - 440) <= 1


def test_a_silent_clip_has_no_sound_track(tmp_path: Path) -> None:
    frames = torch.zeros(5, 16, 16, 3, dtype=torch.uint8)
    Clip("", 0, frames, torch.empty(1, 0), 16000, 25.0, torch.empty(0), torch.empty(0)).save(tmp_path / "x.mp4")
    assert not probe(tmp_path / "x.mp4").has_audio
