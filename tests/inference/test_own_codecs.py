"""An own codec bundle, package.module:function, from data.prepare over a training with previews to infer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import training_stub
from bad_media import movie
from infer_command import failure, run

from data.options import PrepareOptions
from data.prepare import prepare
from magihuman.codecs import bundle
from magihuman.errors import UserError
from magihuman.media.reading import probe

REPO = Path(__file__).resolve().parents[2]
OWN = "pooled_bundle:build"


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    channels = ["model.dit.audio_in_channels=32", "model.dit.text_in_channels=26"]
    usual = [s for s in training_stub.SMALL if not s.startswith("callbacks.samples")]
    return subprocess.run(
        [sys.executable, "-m", "magihuman.train", "+recipe=pretrain", *usual, *channels, *arguments],
        cwd=REPO, env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "media").mkdir()
    for i in range(6):
        movie(folder / "media" / f"c{i}.mp4", seconds=1.0 + i / 25)
        (folder / "media" / f"c{i}.txt").write_text(f"clip number {i}")
    prepare(PrepareOptions(str(folder / "media"), str(folder / "shards"), codecs=OWN, workers=1, progress=False))
    return folder / "shards"


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "own"
    settings = [
        "+callbacks.samples.settings.steps=2",
        "callbacks.samples.prompts=[clip number one]",
        f"data.module.codecs={OWN}",
    ]
    done = train(f"data.module.shards={shards}", f"folder={folder}", *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_allowed", set())


def test_training_previews_are_decoded_by_the_own_codecs(trained: Path) -> None:
    assert list((trained / "samples").glob("step-*/*.mp4"))


def test_a_training_imports_no_codecs_that_only_its_shards_name(shards: Path, tmp_path: Path) -> None:
    refused = train(f"data.module.shards={shards}", f"folder={tmp_path / 'run'}")
    assert refused.returncode == 2
    assert f"data.module.codecs={OWN}" in refused.stderr


def test_infer_makes_a_clip_with_codecs_that_the_user_names(
    trained: Path, tmp_path: Path, nothing_allowed: None
) -> None:
    clip = tmp_path / "x.mp4"
    run(f"checkpoint={trained}", f"codecs={OWN}", "prompt=clip number one", f"output={clip}", "steps=2")
    assert (probe(clip).width, probe(clip).height) == (64, 64)
    assert f"codecs={OWN}" in clip.with_suffix(".json").read_text()


def test_infer_imports_no_codecs_that_only_a_checkpoint_names(
    trained: Path, tmp_path: Path, nothing_allowed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"checkpoint={trained}", "prompt=clip number one", f"output={tmp_path / 'x.mp4'}"
    assert f"give codecs={OWN}" in failure(capsys, *given)
    assert "was trained with 'pooled_bundle:build'" in failure(capsys, *given, "codecs=other:build")


def test_own_codecs_that_cannot_be_made_are_one_line(nothing_allowed: None) -> None:
    for name, message in (
        ("nowhere:build", "No module named"),
        ("os.path:join", "returns a str, not a CodecBundle"),
        ("pooled_bundle:absent", "has no attribute"),
    ):
        with pytest.raises(UserError, match="code that a file names"):
            bundle.load_bundle(name)
        bundle.allow_codecs(name)
        with pytest.raises(UserError, match=message):
            bundle.load_bundle(name)
