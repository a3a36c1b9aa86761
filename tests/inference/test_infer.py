"""The command line: from a prompt or a file of them to mp4s with records; kills; bad input."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_bundle import FRAMES, SIDE, fake_bundle, fake_checkpoint
from infer_command import failure, manifest, run, write_prompts
from PIL import Image

from inference.loading import find
from inference.requests import InferOptions
from magihuman import infer
from magihuman.flow.guidance import Guidance
from magihuman.media.images import resize_frames
from magihuman.media.reading import probe

REPO = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("with_fake_codecs")


# ----------------------------------------------------------------------------------------------- one prompt


PROMPT = 'round face, "ginger" hair = red; says: ma ${bi} {so} [x]'


def test_one_prompt_makes_a_clip_and_its_record(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "x.mp4"
    run(f"checkpoint={checkpoint}", f"prompt={PROMPT}", f"output={output}", "seed=3")
    info = probe(output)
    assert (info.width, info.height, info.audio_rate) == (SIDE, SIDE, 16000)
    assert info.seconds == pytest.approx(FRAMES / 25, abs=0.01)
    record = json.loads(output.with_suffix(".json").read_text())
    assert (record["prompt"], record["seed"], record["settings"]["steps"]) == (PROMPT, 3, 2)
    assert torch.__version__.startswith(record["versions"]["torch"])  # the build (+cu130) may be left out
    assert len(record["checkpoint"]["sha256"]) == 64
    summary = capsys.readouterr().err
    assert "1 made" in summary
    assert all(stage in summary for stage in ("load", "text", "sample", "decode", "write"))
    assert sorted(path.name for path in output.parent.iterdir()) == ["x.json", "x.mp4"]


def test_what_the_world_does_not_know_is_said_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def strict(*arguments: Any, **named: Any) -> Any:
        return replace(fake_bundle(*arguments, **named), prompt_pattern="face( m[ai])+", prompt_example="face ma")

    monkeypatch.setattr("magihuman.codecs.bundle.load_bundle", strict)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\nface  ma mi\na dog\n")
    run(f"checkpoint={checkpoint}", f"prompts={prompts}", f"output={tmp_path / 'out'}", "seconds=1")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2
    assert "1 s is longer than this checkpoint's usual 0.68 s; unless" in notes[0]
    assert "the prompt 'a cat' and 1 more is not of the only form" in notes[1]
    assert notes[1].endswith("such as 'face ma'")
    run(f"checkpoint={checkpoint}", "prompt=face mi", f"output={tmp_path / 'y.mp4'}")
    assert "note: " not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seconds=0.36"], "0.36 s is shorter than this checkpoint's usual 0.68 s"),
        (["width=64"], "64x32 is another size than this checkpoint's usual 32x32"),
        (["output_size=64x32"], "output_size=64x32 is of another shape than the clip, so frames are stretched"),
        (["negative_prompt=grey", "cfg=1"], "negative_prompt= changes nothing here: no stage is guided"),
        (["negative_prompt=", "cfg=1"], None),
        (["negative_prompt=grey", "cfg=2"], None),
        (["output_size=64x64"], None),
    ],
)
def test_what_changes_nothing_or_was_never_trained_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str | None
) -> None:
    run(f"checkpoint={checkpoint}", "prompt=a b", f"output={tmp_path / 'x.mp4'}", *arguments)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


def test_what_is_changed_in_a_given_image_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGBA", (64, 64), (200, 100, 50, 0)).save(tmp_path / "a.png")
    run(f"checkpoint={checkpoint}", "prompt=a b", f"output={tmp_path / 'x.mp4'}", f"image={tmp_path / 'a.png'}")
    assert f"note: {tmp_path / 'a.png'}: its transparency is dropped" in capsys.readouterr().err


def test_an_empty_negative_prompt_is_empty_and_not_the_checkpoints(tmp_path: Path) -> None:
    checkpoint = fake_checkpoint(tmp_path / "export", Guidance(3.0, 3.0, audio=3.0))
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    config["sampling"]["negative_prompt"] = "grey wall"
    file.write_text(json.dumps(config))
    made: dict[str, tuple[str, bytes]] = {}
    for name, more in (("own", []), ("none", ["negative_prompt=none"]), ("empty", ["negative_prompt="])):
        output = tmp_path / f"{name}.mp4"
        run(f"checkpoint={checkpoint}", "prompt=a b", f"output={output}", *more)
        record = json.loads(output.with_suffix(".json").read_text())
        made[name] = record["settings"]["negative_prompt"], output.read_bytes()
        output.unlink()
        infer.main([*shlex.split(record["command"])[3:], "progress=false"])
        assert output.read_bytes() == made[name][1]
    assert made["own"] == made["none"]
    assert (made["own"][0], made["empty"][0]) == ("grey wall", "")
    assert made["own"][1] != made["empty"][1]


def test_frames_are_resized_and_compressed_as_asked(checkpoint: Path, tmp_path: Path) -> None:
    sizes = {}
    for name, more in (("plain", []), ("large", ["output_size=64x48"]), ("fine", ["crf=1"]), ("same", ["crf=18"])):
        output = tmp_path / f"{name}.mp4"
        run(f"checkpoint={checkpoint}", "prompt=a b", f"output={output}", *more)
        sizes[name] = output.read_bytes()
        record = json.loads(output.with_suffix(".json").read_text())
        assert record["width"], record["height"] == ((64, 48) if name == "large" else (SIDE, SIDE))
    assert (probe(tmp_path / "large.mp4").width, probe(tmp_path / "large.mp4").height) == (64, 48)
    assert sizes["same"] == sizes["plain"]
    assert len(sizes["fine"]) > len(sizes["plain"])
    small, large = (
        find(InferOptions(checkpoint=str(checkpoint), device="cpu", output_size=size)).load().generate(["a b"], [1])[0]
        for size in (None, "64x48")
    )
    assert torch.equal(large.frames, resize_frames(small.frames, 48, 64))


def test_the_same_command_gives_the_same_bytes_and_another_seed_does_not(checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(f"checkpoint={checkpoint}", "prompt=x y", f"output={tmp_path / name / 'x.mp4'}", f"seed={seed}")
    a, b, c = ((tmp_path / name / "x.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_the_recorded_command_repeats_the_clip(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), "green").save(tmp_path / "p.png")
    run(
        f"checkpoint={checkpoint}",
        f"prompt={PROMPT}",
        f"output={tmp_path / 'x.mp4'}",
        f"image={tmp_path / 'p.png'}",
        "cfg={video_high: 4, audio: 2.5}",
        "seconds=0.36",
        "solver=renoise",
        "steps=3",
    )
    before = (tmp_path / "x.mp4").read_bytes(), (tmp_path / "x.json").read_bytes()
    command = shlex.split(json.loads(before[1])["command"])
    assert command[:3] == ["python", "-m", "magihuman.infer"]
    (tmp_path / "x.mp4").unlink()
    infer.main(command[3:])
    assert ((tmp_path / "x.mp4").read_bytes(), (tmp_path / "x.json").read_bytes()) == before


def test_a_sound_steers_the_clip(checkpoint: Path, tmp_path: Path) -> None:
    run(f"checkpoint={checkpoint}", "prompt=a", f"output={tmp_path / 'x.mp4'}", "seed=1")
    run(f"checkpoint={checkpoint}", "prompt=a", f"output={tmp_path / 'y.mp4'}", "seed=2", f"audio={tmp_path / 'x.mp4'}")
    record = json.loads((tmp_path / "y.json").read_text())
    assert record["audio"]["path"] == str(tmp_path / "x.mp4")
    assert record["audio"]["sha256"] == json.loads((tmp_path / "x.json").read_text())["sha256"]


# --------------------------------------------------------------------------------------------- many prompts


def test_many_prompts_make_files_a_manifest_and_can_be_continued(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = write_prompts(tmp_path), tmp_path / "clips"
    command = [f"checkpoint={checkpoint}", f"prompts={prompts}", f"output={output}", "batch=2", "seed=10"]
    run(*command)
    lines = manifest(output)
    assert [line["prompt"] for line in lines] == [f"prompt number {i}" for i in range(5)]
    assert [line["seed"] for line in lines] == [10, 11, 12, 13, 14]
    assert len({line["sha256"] for line in lines}) == 5
    assert all((output / line["file"]).exists() for line in lines)
    stamps = {path.name: path.stat().st_mtime_ns for path in output.glob("*.mp4")}

    # What a kill may leave: a torn line, a clip cut short, a clip without record, a half-written file.
    (output / lines[1]["file"]).write_bytes(b"cut")
    (output / lines[2]["file"]).with_suffix(".json").unlink()
    (output / f".{lines[2]['file']}.99.part").touch()
    text = (output / "manifest.jsonl").read_text()
    (output / "manifest.jsonl").write_text(text[: text.rindex('"seed"')])
    capsys.readouterr()
    run(*command)
    assert "2 made, 3 done before" in capsys.readouterr().err
    assert sorted(map(str, manifest(output))) == sorted(map(str, lines))
    assert not list(output.glob(".*"))
    made_again = {p.name for p in output.glob("*.mp4") if p.stat().st_mtime_ns != stamps[p.name]}
    assert made_again == {lines[1]["file"], lines[2]["file"]}

    run(*command, "steps=3")  # another request: nothing of the old one counts
    assert "5 made in" in capsys.readouterr().err
    assert {line["name"]: line["sha256"] for line in manifest(output)} != {
        line["name"]: line["sha256"] for line in lines
    }
    assert len(manifest(output)) == 5


def test_effort_per_clip_does_not_grow_with_their_number(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts of the next clips are encoded, not of all, and the folder is searched once, not per clip."""
    from inference.pipeline import Pipeline

    count, batch, events = 150, 5, []
    glob, encode, draft = Path.glob, Pipeline.encode_texts, Pipeline.draft

    def encoded(self: Pipeline, prompts: list[str]) -> object:
        events.append(len(prompts))
        return encode(self, prompts)

    def drafted(self: Pipeline, prompts: list[str], *rest: object) -> object:
        assert set(prompts) <= self._texts.keys()  # encoded before
        return draft(self, prompts, *rest)  # type: ignore[arg-type]

    searched: list[Path] = []
    monkeypatch.setattr(Path, "glob", lambda self, *given, **more: searched.append(self) or glob(self, *given, **more))
    monkeypatch.setattr(Pipeline, "encode_texts", encoded)
    monkeypatch.setattr(Pipeline, "draft", drafted)
    monkeypatch.setattr(Pipeline, "write", lambda self, draft, path: {"bytes": Path(path).write_bytes(b"")})
    (tmp_path / "p.txt").write_text("".join(f"text {i}\n" for i in range(count)))
    out = tmp_path / "out"
    run(f"checkpoint={checkpoint}", f"prompts={tmp_path / 'p.txt'}", f"output={out}", f"batch={batch}", "cfg=2")
    assert searched.count(out) == 1
    ahead = [number for number in events if number > batch]
    assert ahead == [61, 61, 31]  # 12 batches of 5 with the one negative prompt, twice; then the rest
    assert max(events) <= 65


def test_requests_of_a_file_may_differ(checkpoint: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "p.png")
    requests: list[dict[str, Any]] = [
        {"prompt": "a", "name": "one", "seed": 1},
        {"prompt": "b", "name": "two", "seconds": 0.36},
        {"prompt": "c", "name": "three", "image": "p.png"},
        {"prompt": "d", "name": "four"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, requests)))
    run(f"checkpoint={checkpoint}", f"prompts={tmp_path / 'p.jsonl'}", f"output={tmp_path / 'out'}")
    records = {r["name"]: json.loads((tmp_path / "out" / f"{r['name']}.json").read_text()) for r in requests}
    assert [records[r["name"]]["seed"] for r in requests] == [1, 43, 44, 45]
    assert [records[r["name"]]["settings"]["frames"] for r in requests] == [17, 9, 17, 17]
    assert probe(tmp_path / "out" / "two.mp4").seconds == pytest.approx(9 / 25, abs=0.01)
    assert [bool(records[r["name"]]["image"]) for r in requests] == [False, False, True, False]


DRIVER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import magihuman.codecs.bundle, fake_bundle, inference.jobs
magihuman.codecs.bundle.load_bundle = fake_bundle.fake_bundle
append = inference.jobs.append_line
def slowly(path, line):
    append(path, line)
    time.sleep(0.2)
inference.jobs.append_line = slowly
from magihuman.infer import main
main(sys.argv[2:])
"""


def test_sigkill_in_the_middle_loses_nothing_and_repeats_nothing(checkpoint: Path, tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path, 6), tmp_path / "clips"
    arguments = [f"checkpoint={checkpoint}", f"prompts={prompts}", "batch=2", "device=cpu", "progress=false"]
    command = [sys.executable, "-c", DRIVER, str(REPO / "tests"), *arguments, f"output={output}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPO, env=environment)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "manifest.jsonl").exists() and len((output / "manifest.jsonl").read_text()) > 300:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    done = {line["file"]: (output / line["file"]).stat().st_mtime_ns for line in manifest(output)}
    assert 0 < len(done) < 6
    run(*arguments[:3], f"output={output}")
    lines = manifest(output)
    assert sorted(line["seed"] for line in lines) == list(range(42, 48))
    assert all((output / name).stat().st_mtime_ns == stamp for name, stamp in done.items())
    run(*arguments[:3], f"output={tmp_path / 'through'}")
    through = {line["name"]: line["sha256"] for line in manifest(tmp_path / "through")}
    assert {line["name"]: line["sha256"] for line in lines} == through


# ---------------------------------------------------------------------------------------------------- others


def test_the_length_can_follow_the_dialogue(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"prompt": "a face", "seconds": "auto"}', '{"prompt": "says \\"ma bi so\\"", "seconds": "auto"}']
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    output = tmp_path / "out"
    run(f"checkpoint={checkpoint}", f"prompts={tmp_path / 'p.jsonl'}", f"output={output}")
    frames = [probe(path).seconds * 25 for path in sorted(output.glob("*.mp4"))]
    assert frames == pytest.approx([FRAMES, 49], abs=0.3)  # three syllables: 2 s
    assert "the prompt has no dialogue" in capsys.readouterr().err


def test_a_negative_prompt_from_a_file(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "n.txt").write_text("grey wall\n")
    output = tmp_path / "x.mp4"
    common = [f"checkpoint={checkpoint}", "prompt=a", f"output={output}", f"negative_prompt_file={tmp_path / 'n.txt'}"]
    run(*common)
    assert "not the released negative prompt: 9 characters" in capsys.readouterr().err
    assert json.loads(output.with_suffix(".json").read_text())["settings"]["negative_prompt"] == "grey wall"
    assert "not both" in failure(capsys, *common, "negative_prompt=x")
    assert "cannot be read" in failure(capsys, *common[:3], "negative_prompt_file=nowhere.txt")


RANKS = """
import sys
sys.path.insert(0, sys.argv[1])
import magihuman.codecs.bundle, fake_bundle
magihuman.codecs.bundle.load_bundle = fake_bundle.fake_bundle
from magihuman.infer import main
main(sys.argv[2:])
"""


def test_processes_share_the_prompts_and_one_manifest(checkpoint: Path, tmp_path: Path) -> None:
    prompts, script = write_prompts(tmp_path, 5), tmp_path / "ranks.py"
    script.write_text(RANKS)
    arguments = [f"checkpoint={checkpoint}", f"prompts={prompts}", "batch=1", "device=cpu", "progress=false"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command = [*launch, str(REPO / "tests"), *arguments, f"output={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPO}:{REPO}/tests/support"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2: 3 made" in done.stderr
    assert "process 1 of 2: 2 made" in done.stderr
    run(*arguments[:3], f"output={tmp_path / 'one'}")
    one, two = (sorted(map(str, manifest(tmp_path / name))) for name in ("one", "two"))
    assert one == two


# ------------------------------------------------------------------------------------------------------ help


def test_help_names_every_setting_and_starts_fast(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    infer.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {field.name} " in text for field in fields(InferOptions))
    code = "import sys; from magihuman.infer import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True)
    assert done.returncode == 0, "help imports torch"


# ------------------------------------------------------------------------------------------ bad input


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
        (
            ["prompt=a", "output=x.mp4", "cfg={video: 5}"],
            "Guidance has no field video; its fields are audio, threshold",
        ),
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
        (
            ["prompt=a", "output=x.mp4", "width=100000"],
            "width=100000 is too large for this checkpoint; give at most 256",
        ),
        (["prompt=a", "output=x.mp4", "output_size=100000x2"], "give even WIDTHxHEIGHT up to 8192 a side"),
        (["prompt=a", "output=x.mp4", "crf=99"], "crf=99 is impossible; give 0 (lossless) to 51"),
        (["prompt=a", "output=x.mp4", "turbo=wan"], "turbo=wan is for the published weights"),
        (["prompt=a", "output=x.mp4", "checkpoint=~nouser123/x"], "~nouser123/x"),
        (["prompt=a", "output=x.mp4", "negative_prompt=released"], "set MAGIHUMAN_RELEASE to a checkout of https"),
        (["output=x.mp4", "prompt=a", "negative_prompt=" + 5000 * "word "], "the negative prompt has 5000 words"),
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


def test_bad_conditions_and_checkpoints(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_folder_that_cannot_be_written(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for output, reason in (
        (tmp_path / "file" / "x.mp4", "is a file"),
        (tmp_path / f"{'x' * 251}.mp4", "name too long"),
    ):
        error = failure(capsys, f"checkpoint={checkpoint}", "prompt=a", f"output={output}")
        assert reason in error
        assert len(error) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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


def test_sounds_that_cannot_be_used(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import wave

    (tmp_path / "empty.wav").touch()
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(bytes(600 * 8000))
    for name, message in (("empty.wav", "the file is empty (0 bytes)"), ("long.wav", "it lasts 600 s")):
        output = tmp_path / "out" / "x.mp4"
        error = failure(capsys, f"checkpoint={checkpoint}", "prompt=a", f"output={output}", f"audio={tmp_path / name}")
        assert message in error
        assert not output.parent.exists()
