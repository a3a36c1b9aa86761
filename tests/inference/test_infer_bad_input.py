"""What `python -m magihuman.infer` says of bad input: one line, exit status 2, nothing left behind."""

from pathlib import Path

import pytest
from fake_bundle import fake_checkpoint
from infer_command import failure, manifest, run, write_prompts

pytestmark = pytest.mark.usefixtures("with_fake_codecs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=x.mp4"], "give either prompt="),
        (["prompt=a", "prompts=b.txt", "output=x"], "give either prompt="),
        (["prompt=a"], "say where to write"),
        (["prompt= ", "output=x.mp4"], "the prompt is empty"),
        (["prompt=a", "output=x.avi"], "must be a file that ends in .mp4"),
        (["prompts=none.txt", "output=x"], "none.txt cannot be read"),
        (["prompts=none.txt", "output=x.mp4"], "must be a folder"),
        (["prompt=a", "output=x.mp4", "step=5"], "did you mean 'steps'"),
        (["prompt=a", "output=x.mp4", "steps=many"], "steps='many' should be an integer"),
        (["prompt=a", "output=x.mp4", "steps=0"], "steps=0 is impossible"),
        (["prompt=a", "output=x.mp4", "steps=5", "steps=6"], "steps is given twice"),
        (["prompt=a", "output=x.mp4", "solver=heun"], "choose one of unipc"),
        (["prompt=a", "output=x.mp4", "cfg={video: 5}"], "guidance"),
        (["prompt=a", "output=x.mp4", "cfg={audio: loud}"], "needs numbers"),
        (["prompt=a", "output=x.mp4", "cfg=0.2"], "scales start at 1"),
        (["prompt=a", "output=x.mp4", "seed=-1"], "seed must be a whole number"),
        (["prompt=a", "output=x.mp4", "seconds=0"], "seconds=0 must be positive"),
        (["prompt=a", "output=x.mp4", "seconds=600"], "too long for this checkpoint"),
        (["prompt=a", "output=x.mp4", "height=33"], "height=33 is not a multiple of 8"),
        (["prompt=a", "output=x.mp4", "image=none.png"], "image=none.png does not exist"),
        (["prompt=a", "output=x.mp4", "audio=none.wav"], "audio=none.wav does not exist"),
        (["prompt=a", "output=x.mp4", "batch=0"], "batch=0 is impossible"),
        (["prompt=a", "output=x.mp4", "dtype=int8"], "choose float32 or bfloat16"),
        (["prompt=a", "output=x.mp4", "device=tpu"], "choose auto, cpu"),
        (["prompt=a", "output=x.mp4", "device=cuda:99"], "but torch"),
        (["prompt=a", "output=x.mp4", "checkpoint=nowhere"], "'nowhere' is neither a folder nor"),
        (["output=x.mp4", "prompt=" + 5000 * "word "], "the prompt has 5000 words"),
        (["output=x.mp4", "prompt=" + 10001 * "\u8bdd"], "the prompt has 10001 characters"),
        (["prompt=a", "output=x.mp4", "seconds=long"], "positive number or auto, not 'long'"),
        (["prompt=a", "output=x.mp4", "resolution=540p"], "is for the published weights; give height= and"),
        (["prompt=a", "output=x.mp4", "resolution=256p"], "is for the published weights; give height= and"),
        (["prompt=a", "output=x.mp4", "sr_steps=3"], "sr_steps=3 needs a checkpoint"),
        (["prompt=a", "output=x.mp4", "cfg_passes=3"], "cfg_passes=3 is impossible"),
        (["prompt=a", "output=x.mp4", "video_codec=x"], "is for released checkpoints"),
        (["a prompt without key"], "is not of the form key=value"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if not any(argument.startswith("checkpoint=") for argument in arguments):
        arguments = [f"checkpoint={checkpoint}", *arguments]
    assert message in failure(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_bad_conditions_and_checkpoints(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.png").write_text("no picture")
    (tmp_path / "s.wav").write_bytes(b"RIFF....")
    common = ["prompt=a", f"output={tmp_path / 'out' / 'x.mp4'}"]
    good = f"checkpoint={checkpoint}"
    assert "not a readable image" in failure(capsys, good, *common, f"image={tmp_path / 'p.png'}")
    assert "cannot be read" in failure(capsys, good, *common, f"audio={tmp_path / 's.wav'}")
    broken = fake_checkpoint(tmp_path / "broken")
    next(broken.glob("*.safetensors")).write_bytes(b"\0" * 10)
    assert "not a readable safetensors file" in failure(capsys, f"checkpoint={broken}", *common)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "x.mp4"
    assert "cannot write to the folder" in failure(
        capsys, f"checkpoint={checkpoint}", "prompt=a", f"output={output}"
    )


def test_a_full_disk_leaves_no_half_clip(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("magihuman.media.mp4.Mp4Writer.add_wave", full)
    prompts = write_prompts(tmp_path, 2)
    error = failure(capsys, f"checkpoint={checkpoint}", f"prompts={prompts}", f"output={tmp_path / 'out'}")
    assert "No space left on device" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.jsonl"]
    assert manifest(tmp_path / "out") == []


def test_a_disk_that_fills_up_while_writing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system itself refuses to write more than a kilobyte."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(SystemExit) as left:
            run(f"checkpoint={checkpoint}", "prompt=a", f"output={tmp_path / 'out' / 'x.mp4'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left.value.code == 2
    assert "File too large" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_sounds_that_cannot_be_used(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import wave

    (tmp_path / "empty.wav").touch()
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(bytes(600 * 8000))
    for name, message in (("empty.wav", "the file is empty (0 bytes)"), ("long.wav", "it lasts 600 s")):
        output = tmp_path / "out" / "x.mp4"
        error = failure(
            capsys, f"checkpoint={checkpoint}", "prompt=a", f"output={output}", f"audio={tmp_path / name}"
        )
        assert message in error
        assert not output.parent.exists()
