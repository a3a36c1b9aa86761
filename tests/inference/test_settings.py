"""Sizes and lengths of clips, and what follows from a checkpoint and what is given (SPEC 4.1)."""

import hashlib
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from fake_release import dit_config

from inference import conditioning
from inference.requests import InferOptions
from inference.settings import fit_side, latent_shape, parse_output_size, resolve
from magihuman.codecs.bundle import bundle_spec
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance, frame_scales
from magihuman.flow.solvers import SOLVERS
from magihuman.io.export import ExportConfig
from magihuman.zoo.released import config_for


@pytest.fixture(scope="module")
def configs() -> dict[str, ExportConfig]:
    shapes = {key: shape for key, shape, _ in dit_config(8).tensors()}
    return {role: config_for(role, shapes, role) for role in ("base", "distill", "540p_sr", "1080p_sr")}


@pytest.mark.parametrize(
    ("seconds", "sound", "audio", "latent_frames"),
    [
        (4, None, 101, 26),
        (5, None, 126, 32),
        (10, None, 251, 63),
        (4, 60.0, 100, 25),  # a longer sound is cut
        (4, 2.0, 50, 13),  # a shorter one makes a short clip
        (4, 2.03, 50, 13),
        (40, 30.01, 751, 188),  # windows: a started latent counts
        (40, 29.0, 725, 182),
    ],
)
def test_released_lengths(
    configs: dict[str, ExportConfig], seconds: float, sound: float | None, audio: int, latent_frames: int
) -> None:
    settings = resolve(configs["base"], None, InferOptions(seconds=seconds), sound)
    assert settings.audio == audio
    assert settings.frames == 4 * latent_frames - 3
    shape = latent_shape(configs["base"], settings, settings.size)
    assert (shape[0][1:], shape[1][0]) == ((latent_frames, 16, 28), audio)


def test_published_defaults(configs: dict[str, ExportConfig]) -> None:
    base, distill = resolve(configs["base"]), resolve(configs["distill"])
    assert (base.solver, base.steps, base.shift, base.seconds, base.audio) == ("unipc", 32, 5.0, 4.0, 101)
    assert base.guidance == Guidance(5.0, 2.0, 500, 5.0)
    assert (distill.solver, distill.steps, distill.needs_negative) == ("renoise", 8, False)
    stage = resolve(configs["distill"], configs["540p_sr"]).sr
    assert stage is not None
    assert (stage.steps, stage.shift, stage.guidance, stage.height, stage.width) == (5, 5.0, 1.0, 512, 896)
    assert resolve(configs["distill"], configs["540p_sr"], InferOptions(sr_cfg=3.5)).needs_negative


@pytest.mark.parametrize(("name", "size"), [("256p", (256, 448)), ("540p", (512, 896)), ("1080p", (1088, 1920))])
def test_named_resolutions(configs: dict[str, ExportConfig], name: str, size: tuple[int, int]) -> None:
    second = configs.get(f"{name}_sr")
    settings = resolve(configs["base"], second, InferOptions(resolution=name))
    assert (settings.height, settings.width) == (256, 448)
    assert settings.size == size


def test_sizes_are_rounded_down_as_released(configs: dict[str, ExportConfig]) -> None:
    settings = resolve(configs["base"], None, InferOptions(height=272, width=480))
    assert (settings.height, settings.width) == (256, 480)
    assert [fit_side("height", pixels, 16, 2) for pixels in (32, 48, 64, 1088)] == [32, 32, 64, 1088]
    for pixels in (0, 16, 31, 100, 1080):
        with pytest.raises(UserError, match="is not a multiple of 32; the nearest is"):
            fit_side("height", pixels, 16, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seconds": 0}, "must be positive"),
        ({"seconds": 65}, "too long for this checkpoint; give at most 64.64"),
        ({"sound": 0.01}, "lasts 0.010 s; give at least 0.04 s"),
        ({"resolution": "540p"}, "needs a second stage"),
        ({"sr_cfg": 3.5}, "sr_cfg=3.5 needs a checkpoint"),
        ({"sr_noise_index": 100}, "sr_noise_index=100 needs a checkpoint"),
        ({"audio_overlap": 1.0}, "audio_overlap=1 is impossible; give 0 to 0.9"),
        ({"cfg_passes": 0}, "choose 1 .faster. or 2"),
    ],
)
def test_impossible(configs: dict[str, ExportConfig], settings: dict[str, Any], message: str) -> None:
    given_audio = settings.pop("sound", None)
    with pytest.raises(UserError, match=message):
        resolve(configs["base"], None, InferOptions(**settings), given_audio)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100_000}, "width=100000 is too large for this checkpoint; give at most 3584"),
        ({"height": 10**12}, "height=1000000000000 is too large"),
        ({"sr_width": 100_000}, "sr_width=100000 is too large for this checkpoint; give at most 7168"),
        ({"width": 3584, "height": 3584}, "3584x3584 at 4 s has 112 times the pixels .* and 64 times is the most"),
        ({"width": 1792, "height": 1024, "seconds": 20}, "1792x1024 at 20 s has 79 times the pixels"),
        ({"sr_width": 7168, "sr_height": 7168}, "give a smaller sr_height= and sr_width= or fewer seconds="),
        ({"seconds": 1e9}, "seconds=1e.09 is too long for this checkpoint; give at most 64.64"),
        ({"steps": 10**9}, "steps=1000000000 is impossible; give 1 to 1000"),
        ({"shift": 1e300}, "shift=1e.300 is impossible; give 0.001 to 1000"),
        ({"shift": 1e-300}, "shift=1e-300 is impossible"),
        ({"sr_steps": 1001}, "sr_steps=1001 is impossible; give 1 to 1000"),
    ],
)
def test_what_would_exhaust_the_memory_is_refused_with_the_limit(
    configs: dict[str, ExportConfig], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve(configs["base"], configs["540p_sr"], InferOptions(**settings))


@pytest.mark.parametrize(
    ("part", "change"), [("contract", {"fps": 0.0}), ("contract", {"fps": 1e9}), ("size", {"frames": 0})]
)
def test_an_impossible_config_is_refused(configs: dict[str, ExportConfig], part: str, change: dict[str, Any]) -> None:
    damaged = replace(configs["base"], **{part: replace(getattr(configs["base"], part), **change)})
    with pytest.raises(UserError, match=r"the checkpoint's config.json is damaged: fps="):
        resolve(damaged)


def test_the_sizes_of_resized_frames() -> None:
    assert parse_output_size("1920x1080") == (1080, 1920)
    for text in ("1920", "1921x1080", "1920x0", "-2x2", "1920x100000", "9" * 5000 + "x2", "1920 x 1080"):
        with pytest.raises(UserError, match="give even WIDTHxHEIGHT up to 8192 a side, such as 1920x1080"):
            parse_output_size(text)


SCRIPT = """
import nothing_of_this_name
class Evaluator:
    def __init__(self):
        {broken}
        negative_prompt = "grey, "
        negative_prompt += "shaking"  # noqa
"""


def test_the_released_negative_prompt_is_read_from_the_releases_code_without_running_it(
    configs: dict[str, ExportConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "inference" / "pipeline" / "video_generate.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.format(broken=""))
    monkeypatch.delenv("MAGIHUMAN_RELEASE", raising=False)

    def negative(role: str = "base", **options: Any) -> str:
        conditioning._released_text.cache_clear()
        return resolve(configs[role], None, InferOptions(**options)).negative_prompt

    assert negative() == ""
    with pytest.raises(UserError, match=r"set MAGIHUMAN_RELEASE to a checkout of .*, which changes every guided clip"):
        negative(negative_prompt="released")
    monkeypatch.setenv("MAGIHUMAN_RELEASE", "~nouser123/x")
    with pytest.raises(UserError, match="MAGIHUMAN_RELEASE=~nouser123/x is no checkout of the release"):
        negative(negative_prompt="released")
    monkeypatch.setenv("MAGIHUMAN_RELEASE", str(tmp_path))
    with pytest.raises(UserError, match=r"13 characters, sha256 7cea8b2f, instead of 1719 and 4515a21f"):
        negative(negative_prompt="released")
    text = hashlib.sha256(b"grey, shaking").hexdigest()
    monkeypatch.setattr(conditioning, "NEGATIVE_SHA256", text)
    # Where the release's code is here, its guided checkpoints follow it; an empty text is still possible.
    assert negative() == negative(negative_prompt="released") == "grey, shaking"
    assert negative(negative_prompt="") == negative(negative_prompt=" ") == ""
    assert negative(negative_prompt="blue") == "blue"
    assert negative("distill") == ""
    assert negative("distill", cfg=3.0) == "grey, shaking"
    for broken, message in (("(", "is not a Python script"), ("(" * 10**6, "more than 1000000 bytes")):
        script.write_text(SCRIPT.format(broken=broken))
        with pytest.raises(UserError, match=message):
            negative(negative_prompt="released")
    script.unlink()
    with pytest.raises(UserError, match=r"is no checkout of the release: .*video_generate.py is missing"):
        negative()


def test_impossible_second_stage(configs: dict[str, ExportConfig]) -> None:
    for settings, message in (
        ({"sr_steps": 0}, "sr_steps=0"),
        ({"sr_cfg": 0.5}, "sr_cfg=0.5"),
        ({"sr_shift": 0.0}, "sr_shift=0 is impossible"),
        ({"sr_noise_index": 1000}, "sr_noise_index=1000 is impossible; give 0"),
        ({"sr_audio_noise": -0.1}, "sr_audio_noise=-0.1 is impossible"),
        ({"sr_early_frames": -1, "sr_cfg": 3.5}, "sr_early_frames=-1"),
        ({"sr_early_cfg": 0.5, "sr_cfg": 3.5}, "sr_early_cfg=0.5"),
        ({"sr_early_cfg": 2.5}, "sr_early_cfg=2.5 changes nothing without guidance"),
        ({"resolution": "256p"}, "first stage alone"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(configs["base"], configs["540p_sr"], InferOptions(**settings))  # type: ignore[arg-type]


def test_settings_return_as_the_options_that_made_them(configs: dict[str, ExportConfig]) -> None:
    given = InferOptions(
        sr_shift=3.0, sr_noise_index=0, sr_audio_noise=0.4, sr_cfg=3.0, sr_early_frames=1, sr_early_cfg=1.5,
        audio_overlap=0.2, negative_prompt="grey",
    )  # fmt: skip
    settings = resolve(configs["base"], configs["540p_sr"], given)
    stage = settings.sr
    assert stage is not None
    assert (stage.shift, stage.noise_index, stage.audio_noise, stage.guidance) == (3.0, 0, 0.4, 3.0)
    assert (stage.early_frames, stage.early_guidance, settings.audio_overlap) == (1, 1.5, 0.2)
    assert resolve(configs["base"], configs["540p_sr"], InferOptions(**settings.options())) == settings
    plain = resolve(configs["base"], configs["540p_sr"])
    assert (
        resolve(configs["base"], configs["540p_sr"], InferOptions(**plain.options() | {"negative_prompt": ""})) == plain
    )


def test_a_bare_rate_decides_length(configs: dict[str, ExportConfig]) -> None:
    contract = replace(configs["base"].contract, fps=12.5)
    assert bundle_spec("released").length(4, contract).audio == 51


def test_early_frames_are_guided_less() -> None:
    scales = frame_scales(3.5, 26)
    assert scales("video", 999).flatten().tolist() == [2.0] * 13 + [3.5] * 13  # type: ignore[union-attr]
    assert scales("audio", 999) == 1.0
    assert frame_scales(1.5, 3)("video", 0).flatten().tolist() == [1.5] * 3  # type: ignore[union-attr]


def test_the_help_names_every_solver() -> None:
    (text,) = (field.metadata["help"] for field in fields(InferOptions) if field.name == "solver")
    assert all(re.search(rf"\b{name}\b", text) for name in SOLVERS)
