"""Every mode of the published weights from the command line, with a complete fake of them; outputs decoded again."""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import fake_release
import numpy as np
import pytest
import torch
from PIL import Image

from inference import loading
from inference.pipeline import Draft, Pipeline
from inference.requests import InferOptions
from magihuman import infer
from magihuman.flow.sampling import seeded
from magihuman.media.mp4 import write_mp4
from magihuman.media.reading import MediaReader, probe, read_audio

PROMPT = 'A woman in a garden. Dialogue: <Woman, English>: "Good morning." Background Sound: birds'
SIZE = {"height": 32, "width": 64, "sr_height": 64, "sr_width": 96}
SECONDS = 0.6  # 16 audio latents, 4 latent frames, 13 frames; a given sound: 15 audio latents
STAGES = {"base": None, "540p": "540p_sr", "1080p": "1080p_sr"}
MODES = {"t2v": (), "ti2v": ("image",), "a2v": ("audio",), "both": ("image", "audio")}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the weights; codecs and text encoder are found by the environment."""
    root = tmp_path_factory.mktemp("release")
    made = fake_release.make(root, layers=8)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment.items():
            patch.setenv(name, value)
        patch.setenv("MAGIHUMAN_CACHE", str(root / "cache"))
        yield made.weights


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A picture, and a clip with a second of a tone of 300 Hz."""
    folder = tmp_path_factory.mktemp("given")
    gradient = np.linspace(0, 255, 80 * 120 * 3).reshape(80, 120, 3).astype(np.uint8)
    Image.fromarray(gradient).save(folder / "p.png")
    time = np.arange(44100) / 44100
    wave = np.stack([0.5 * np.sin(2 * np.pi * 300 * time), 0.2 * np.sin(2 * np.pi * 300 * time)])
    write_mp4(folder / "s.mp4", np.zeros((25, 16, 16, 3), np.uint8), 25, wave.astype(np.float32), 44100)
    return {"image": folder / "p.png", "audio": folder / "s.mp4"}


def run(*arguments: str, **settings: Any) -> None:
    given = {"device": "cpu", "progress": "false", "prompt": PROMPT, **settings}
    infer.main([*arguments, *(f"{key}={value}" for key, value in given.items() if value is not None)])


def common(release: Path, stage: str = "base", **settings: Any) -> dict[str, Any]:
    second = STAGES[stage]
    sizes = {key: value for key, value in SIZE.items() if second or key[:3] != "sr_"}
    return {
        "checkpoint": release / "base",
        "sr": second and release / second,
        "steps": 2,
        "sr_steps": 2 if second else None,
        "seconds": SECONDS,
        "negative_prompt": "grey, shaking",
        **sizes,
        **settings,
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(release: Path, given: dict[str, Path], tmp_path: Path, mode: str, stage: str) -> None:
    conditions = {key: given[key] for key in MODES[mode]}
    output = tmp_path / "x.mp4"
    run(**common(release, stage, output=output, **conditions))
    info, record = probe(output), json.loads(output.with_suffix(".json").read_text())
    latents = 15 if "audio" in conditions else 16
    samples = latents * 44100 // 25
    size = (96, 64) if STAGES[stage] else (64, 32)
    assert (info.width, info.height, info.fps) == (*size, 25)
    assert (info.audio_rate, info.audio_channels) == (44100, 2)
    assert (record["settings"]["frames"], record["settings"]["audio"]) == (13, latents)
    assert abs(record["samples"] - samples) <= 1
    with MediaReader(output) as reader:
        frames = reader.read(fps=25).frames
    assert frames.shape == (13, size[1], size[0], 3)
    assert frames.float().std() > 1  # a picture, not a plain area
    wave = read_audio(output, 44100, 2)
    assert wave.shape[1] == pytest.approx(samples, abs=1100)  # AAC comes in frames of 1024
    if "audio" in conditions:
        original = read_audio(given["audio"], 44100, 2)
        heard = slice(2000, 24000)
        # Twice through AAC; a shift by two samples alone would be 0.03.
        assert (wave[:, heard] - original[:, heard]).square().mean().sqrt() < 0.025
        assert record["audio"]["path"] == str(given["audio"])
    else:
        assert wave.abs().max() > 1e-3
    assert bool(record["image"]) == ("image" in conditions)
    assert bool(record["sr"]) == bool(STAGES[stage])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.mp4"]


def test_one_seed_gives_the_same_bytes_in_every_place_of_memory(
    release: Path, given: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {}
    for memory, seed in (("fast", 1), ("fast", 1), ("balanced", 1), ("low", 1), ("fast", 2)):
        output = tmp_path / f"{len(written)}.mp4"
        run(**common(release, "1080p", output=output, seed=seed, sr_cfg=3.5, memory=memory, **given))
        written[output] = output.read_bytes()
    first, *same, other = written.values()
    assert all(bytes_ == first for bytes_ in same)
    assert other != first
    summary = capsys.readouterr().err.splitlines()[-1]
    stages = ("load", "text", "condition", "sample", "refine", "decode", "write")
    assert all(f"{stage} " in summary for stage in stages)


def test_distilled_turbo_and_the_release_beside_it(release: Path, given: dict[str, Path], tmp_path: Path) -> None:
    """resolution= finds the second stage beside the base; the recorded command repeats the clip."""
    output = tmp_path / "x.mp4"
    settings = common(release, "540p", checkpoint=release / "distill", output=output, sr=None)
    settings |= {"turbo": release / "turbo_vae", "steps": None, **given}
    run(**{**settings, "sr": release / "540p_sr"})
    record = json.loads(output.with_suffix(".json").read_text())
    assert (record["settings"]["solver"], record["settings"]["steps"]) == ("renoise", 8)
    assert record["turbo"]["sha256"]
    before = output.read_bytes()
    output.unlink()
    infer.main([*shlex.split(record["command"])[3:], "progress=false"])
    assert output.read_bytes() == before
    found = loading.find(InferOptions(checkpoint=str(release / "distill"), resolution="540p", device="cpu"))
    assert found.second_folder == release / "540p_sr"
    assert found.second is not None
    assert found.second.model.local_attn_layers == ()
    large = loading.find(InferOptions(checkpoint=str(release / "base"), resolution="1080p", device="cpu")).second
    assert large is not None
    assert large.model.local_attn_layers


def test_defaults_follow_the_releases_scripts(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Turbo decoder where it lies next to the network, crf 10; the recorded command says so."""
    made, records = {}, {}
    for name, more in (("usual", {}), ("turbo", {"turbo": release / "turbo_vae"}), ("wan", {"turbo": "wan"})):
        output = tmp_path / f"{name}.mp4"
        run(**common(release, output=output, **more))
        made[name], records[name] = output.read_bytes(), json.loads(output.with_suffix(".json").read_text())
    assert made["usual"] == made["turbo"] != made["wan"]
    assert records["usual"]["turbo"]["sha256"] == records["turbo"]["turbo"]["sha256"]
    assert records["wan"]["turbo"] is None
    assert "turbo=wan" in records["wan"]["command"]
    assert {record["crf"] for record in records.values()} == {10}
    assert records["usual"]["codecs"]["text_encoder"]["attention"] == "sdpa"
    shutil.copytree(release / "base", tmp_path / "alone" / "base")
    alone = loading.find(InferOptions(checkpoint=str(tmp_path / "alone" / "base"), device="cpu"))
    assert (alone.options.turbo, alone.turbo) == ("wan", None)
    assert "guidance without" not in capsys.readouterr().err
    run(**common(release, output=tmp_path / "x.mp4", negative_prompt="", prompt='A man says "你好".'))
    said = capsys.readouterr().err
    assert "guidance without the release's negative prompt, which changes every clip" in said
    assert "the prompt is not of the release's form: the description quotes" in said
    run(**common(release, output=tmp_path / "x.mp4", checkpoint=release / "distill", negative_prompt="grey", cfg=None))
    assert "negative_prompt= changes nothing here" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the pipeline


@pytest.fixture(scope="module")
def pipeline(release: Path) -> Pipeline:
    return loading.find(
        InferOptions(checkpoint=str(release / "distill"), sr=str(release / "540p_sr"), turbo="wan", device="cpu")
    ).load()


def drafts(pipeline: Pipeline, rows: list[int], given: dict[str, Path], **settings: Any) -> list[Draft]:
    chosen = pipeline.settings(
        **{"steps": 2, "sr_steps": 2, "seconds": SECONDS, "given_audio": 1.0, **SIZE, **settings}
    )
    prompts = ["a man", "a woman speaks to us", "rain"]
    images, sounds = [given["image"]] * len(rows), [given["audio"]] * len(rows)
    return pipeline.draft([prompts[i] for i in rows], [7 + i for i in rows], chosen, images, sounds)


def test_a_batch_gives_the_latents_of_one_by_one(pipeline: Pipeline, given: dict[str, Path]) -> None:
    settings: dict[str, Any] = {"cfg": 3.0, "sr_cfg": 3.5, "negative_prompt": "grey"}
    together = drafts(pipeline, [0, 1, 2], given, **settings)
    for i, draft in enumerate(together):
        (alone,) = drafts(pipeline, [i], given, **settings)
        (passes,) = drafts(pipeline, [i], given, cfg_passes=2, **settings)
        assert torch.equal(draft.audio, alone.audio)
        assert (draft.video - alone.video).abs().max() < 1e-4
        assert (passes.video - alone.video).abs().max() < 1e-4
    assert (together[0].video - together[1].video).abs().max() > 0.1


def test_draws_come_in_the_released_order(
    pipeline: Pipeline, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bottleneck, video, fresh video per step; then super-resolution's video and audio (SPEC 4.2)."""
    import inference.pipeline as module

    seen: dict[str, Any] = {}

    def watch(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen["noise"], seen["image"] = args[7] if len(args) > 7 else args[6], kwargs["image_latent"]
        return refine(*args, **kwargs)

    refine = module.refine
    monkeypatch.setattr(module, "refine", watch)
    (draft,) = drafts(pipeline, [0], given)
    (generator,) = seeded([7])
    codec: Any = pipeline.codecs.audio_codec
    wave = read_audio(given["audio"], codec.sample_rate)[None, :, : 15 * codec.hop]
    assert torch.equal(draft.audio, codec.encode(wave, generator)[0])
    assert not torch.equal(draft.audio, codec.encode(wave)[0])
    for _ in range(1 + 2):  # start and two steps
        torch.randn(48, 4, 2, 4, generator=generator)
    video, audio = seen["noise"]
    assert torch.equal(video[0], torch.randn(48, 4, 4, 6, generator=generator))
    assert torch.equal(audio[0], torch.randn(15, 4, generator=generator))
    # The picture was encoded again at the second stage's size, and is the clip's first latent frame.
    assert seen["image"].shape == (1, 48, 1, 4, 6)
    assert torch.equal(draft.video[:, :1], seen["image"][0])


def test_options_reach_the_second_stage(
    pipeline: Pipeline, given: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import inference.pipeline as module

    seen: dict[str, Any] = {}
    refine = module.refine

    def watch(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.update(kwargs, noise=args[6])
        return refine(*args, **kwargs)

    monkeypatch.setattr(module, "refine", watch)
    options: dict[str, Any] = {
        "sr_cfg": 3.0,
        "sr_early_frames": 1,
        "sr_early_cfg": 1.5,
        "sr_shift": 3.0,
        "sr_audio_noise": 0.4,
    }
    options["negative_prompt"] = "grey and dull"
    drafts(pipeline, [0], given, **options, sr_noise_index=100)
    assert (seen["shift"], seen["noise_index"], seen["audio_noise"]) == (3.0, 100, 0.4)
    assert seen["guidance"]("video", 999).flatten().tolist() == [1.5, 3.0, 3.0, 3.0]
    first = seen["noise"]
    drafts(pipeline, [0], given, sr_noise_index=0)
    video, audio = seen["noise"]
    assert not video.any()
    # Nothing was drawn for the video, so the audio's noise is what the video's began with.
    assert torch.allclose(audio.flatten()[:40], first[0].flatten()[:40], atol=1e-6)


def test_a_long_sound_is_encoded_in_windows(pipeline: Pipeline, tmp_path: Path) -> None:
    """Above 29 s: one draw per window, and a started latent counts (SPEC 4.2, 4.7)."""
    wave = 0.3 * np.sin(np.arange(30 * 44100 + 441, dtype=np.float32) * 0.02)[None]
    write_mp4(tmp_path / "s.mp4", np.zeros((2, 16, 16, 3), np.uint8), 25, wave, 44100)
    small = {"height": 32, "width": 32, "sr_height": 32, "sr_width": 32}
    settings = pipeline.settings(steps=1, sr_steps=1, seconds=40, given_audio=30.01, **small)
    (draft,) = pipeline.draft(["a song"], [3], settings, audio_files=[tmp_path / "s.mp4"])
    assert (settings.audio, settings.frames) == (751, 749)
    assert draft.video.shape[1] == 188
    codec: Any = pipeline.codecs.audio_codec
    samples = 751 * codec.hop
    sound = read_audio(tmp_path / "s.mp4", codec.sample_rate)[:, :samples]
    sound = torch.nn.functional.pad(sound, (0, samples - sound.shape[1]))
    assert torch.equal(draft.audio, codec.encode(sound[None], *seeded([3]))[0])
    settings = pipeline.settings(steps=1, sr_steps=1, seconds=40, given_audio=30.01, audio_overlap=0.2, **small)
    (other,) = pipeline.draft(["a song"], [3], settings, audio_files=[tmp_path / "s.mp4"])
    assert torch.equal(other.audio, codec.encode(sound[None], *seeded([3]), overlap=0.2)[0])
    assert not torch.equal(other.audio, draft.audio)


@pytest.mark.parametrize(("seconds", "kept"), [(5.0, 12 * 2048 + 1500), (0.47, 24064), (0.4, 10 * 2048)])
def test_the_last_latent_hears_the_rest_of_a_given_sound(
    pipeline: Pipeline, tmp_path: Path, seconds: float, kept: int
) -> None:
    """The release cuts the sound to int(seconds * rate) samples and encodes them all (SPEC 4.7)."""
    codec: Any = pipeline.codecs.audio_codec
    wave = np.random.default_rng(0).integers(-20000, 20000, 12 * 2048 + 1500).astype("<i2")
    with av.open(str(tmp_path / "s.wav"), "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=codec.sample_rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = codec.sample_rate, 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    settings = pipeline.settings(given_audio=len(wave) / codec.sample_rate, seconds=seconds)
    latents = pipeline.encode_audio_files([tmp_path / "s.wav"], settings, seeded([7]))
    whole = torch.from_numpy(wave[:kept] / np.float32(32768))[None, None]
    assert latents is not None
    assert latents.shape[1] == settings.audio == kept // codec.hop
    torch.testing.assert_close(latents, codec.encode(whole, *seeded([7])), atol=1e-5, rtol=1e-4)
    if kept % codec.hop:
        short = codec.encode(whole[..., : kept // codec.hop * codec.hop], *seeded([7]))
        assert (latents - short)[:, -1].abs().max() > 1e-3


def test_the_released_flaw_can_be_asked_for(pipeline: Pipeline, given: dict[str, Path]) -> None:
    """O2: without guidance the released code changes the given sound; here only with compat=o2."""
    (fixed,), (flawed,) = drafts(pipeline, [0], given), drafts(pipeline, [0], given, compat="o2")
    assert fixed.audio_file == given["audio"]
    assert flawed.audio_file is None
    assert not torch.allclose(fixed.audio, flawed.audio, atol=1e-2)


def test_decoding_in_parts_is_decoding_at_once(pipeline: Pipeline, given: dict[str, Path]) -> None:
    from magihuman.media.images import frames_to_uint8

    (draft,) = drafts(pipeline, [0], given)
    parts = list(pipeline.frames(draft))
    assert [len(part) for part in parts] == [1, 4, 4, 4]
    whole = frames_to_uint8(pipeline.codecs.video_codec.decode(draft.video[None]))[0]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(pipeline.decode(draft).frames, whole)


# ------------------------------------------------------------------------------------------------- bad input


def test_a_prompt_of_many_tokens_is_cut_and_said_so(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(**common(release, output=tmp_path / "x.mp4", prompt="x" * 700, steps=1))
    assert "note: a prompt of 701 tokens is cut to 640" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 40}, "height=40 is not a multiple of 32; the nearest is 32"),
        ({"sr": "base"}, "is base, for the first stage; one for the second, as scene/sr, is wanted"),
        ({"checkpoint": "540p_sr"}, "is 540p_sr, for the second stage; give it as sr="),
        ({"sr_height": 64}, "sr_height=64 needs a checkpoint for the second stage"),
        ({"resolution": "720p", "height": None, "width": None}, "choose one of 256p, 540p, 1080p"),
        ({"resolution": "256p"}, "resolution=256p and height= contradict"),
        ({"turbo": "nowhere"}, "neither a folder nor a shipped name"),
        ({"compat": "o9"}, "compat=o9 is unknown"),
        ({"memory": "huge"}, "memory=huge is unknown"),
        ({"text_encoder": "nowhere"}, "no folder"),
        ({"prompt": "word " * 5000}, "the prompt has 5000 words"),
    ],
)
def test_bad_input(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    output = tmp_path / "out" / "x.mp4"
    paths = {k: release / v for k, v in settings.items() if k in ("sr", "checkpoint")}
    with pytest.raises(SystemExit) as left:
        run(**{**common(release), "output": output, **settings, **paths})
    error = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2
    assert message in error[-1]
    assert [line for line in error if not line.startswith(("note: ", "error: "))] == []
    assert not output.parent.exists()


def test_no_second_stage_beside_the_base(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = tmp_path / "alone" / "base"
    shutil.copytree(release / "base", alone)
    with pytest.raises(SystemExit):
        run(checkpoint=alone, resolution="540p", output=tmp_path / "x.mp4")
    assert "540p_sr is not there; give sr=CHECKPOINT" in capsys.readouterr().err
