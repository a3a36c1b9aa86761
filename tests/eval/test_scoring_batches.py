"""Scoring in batches: which clips share one, what one clip's failure and a batch's failure do, the cache, released frames."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_metrics import calls, metric_file, write_clip

from eval.clip_file import ClipFile
from eval.metrics.registry import InBatches, measurements
from eval.score_rows import Value
from eval.scoring import Scored, plan, score

BATCHES = """
from eval.metrics.registry import InBatches

SEEN = []

@dataclass(frozen=True)
class Lengths:
    batch: int = option("clips at once", 3)
    fits: int = option("clips that the memory has room for", 9)

def prepare(clip, options):
    SEEN.append(clip)
    if "narrow" in clip.prompt:
        raise MeasurementError("the clip is too narrow")
    return clip.prompt, float(clip.frames.mean())

def together(clips, options):
    note("+".join(prompt for prompt, _ in clips))
    if any("frames" in clip.media.__dict__ for clip in SEEN):
        note("decoded-frames-are-kept")
    words = [prompt for prompt, _ in clips]
    if len(clips) > options.fits:
        raise MemoryError("out of memory")
    if "crash" in words:
        raise ZeroDivisionError("of nothing")
    if "stop" in words:
        raise KeyboardInterrupt
    found = {"quiet": NotMeasured("nobody speaks"), "odd": MeasurementError("no score", {"toy_text": "hm"})}
    return [found.get(word, {"toy_length": len(word) + level / 1000, "toy_text": word}) for word, level in clips]

METRICS_OF_IT = (Metric("toy_length", "letters"),)
MEASUREMENTS = (
    Measurement(
        "toy_batches", METRICS_OF_IT, InBatches(prepare, together), inputs=("frames", "prompt"), options=Lengths,
        identity=IDENTITY, costly=COSTLY,
    ),
)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    text = BATCHES.replace("IDENTITY", "lambda options: {}").replace("COSTLY", "True")
    with metric_file(tmp_path / "m", text, "toy_batches"):
        yield tmp_path / "m"


@pytest.fixture
def clip(tmp_path: Path) -> Any:
    def made(prompt: str, level: int = 100) -> ClipFile:
        path = tmp_path / f"{prompt}.mp4"
        return ClipFile(path if path.exists() else write_clip(path, level), prompt=prompt)

    return made


def run(clips: list[ClipFile], cache: Path | None = None, progress: bool = False, **options: int) -> Scored:
    return score(clips, ["toy_batches"], {"toy_batches": options}, cache, progress)


def test_rows_are_those_of_single_clips_and_in_order(folder: Path, tmp_path: Path, clip: Any) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"broken")
    clips = [
        clip("a", 50), clip("narrow"), clip("quiet"), ClipFile(broken, prompt="b"), clip("ccc", 200), clip("odd"),
        ClipFile(clip("none").path), clip("dd", 10),
    ]  # fmt: skip
    found = run(clips)
    assert calls(folder) == ["a+quiet+ccc", "odd+dd"], "clips that cannot be measured take no place"
    assert [row.clip for row in found.rows] == [c.name for c in clips]
    values = [row.values["toy_length"] for row in found.rows]
    assert [value.status for value in values] == [
        "ok", "failed", "skipped", "failed", "ok", "failed", "skipped", "ok",
    ]  # fmt: skip
    assert [int(values[n].value) for n in (0, 4, 7)] == [1, 3, 2]
    assert values[1].reason == "the clip is too narrow"
    assert values[2].reason == "nobody speaks"
    assert values[5] == Value(None, "failed", "no score")
    assert found.rows[5].texts == {"toy_text": "hm"}
    single = run(clips, batch=1)
    assert calls(folder) == ["a", "quiet", "ccc", "odd", "dd"]
    assert single.rows == found.rows


def test_a_batch_that_fits_no_memory_is_measured_clip_by_clip(
    folder: Path, clip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [clip(word) for word in ("a", "b", "c", "d", "e", "f", "g")]
    found = run(clips, batch=4, fits=2)
    assert calls(folder) == ["a+b+c+d", "a", "b", "c", "d", "e+f", "g"]
    assert {row.values["toy_length"].status for row in found.rows} == {"ok"}
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == (
        "toy_batches: a batch of 4 clips failed (MemoryError: out of memory); they were measured one by one, and the next "
        "batches have 2; toy_batches.batch=2 avoids this"
    )


def test_one_clip_s_unexpected_error_is_its_own_and_is_tried_again(
    folder: Path, tmp_path: Path, clip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [clip(word) for word in ("a", "crash", "c", "d", "e", "f")]
    found = run(clips, tmp_path / "cache")
    assert calls(folder) == ["a+crash+c", "a", "crash", "c", "d+e+f"], "the next batch has all its places"
    assert [row.values["toy_length"].status for row in found.rows] == ["ok", "failed", "ok", "ok", "ok", "ok"]
    assert found.rows[1].values["toy_length"].reason == "ZeroDivisionError: of nothing"
    assert capsys.readouterr().err.strip().endswith("(ZeroDivisionError: of nothing); they were measured one by one")
    run(clips, tmp_path / "cache")
    assert calls(folder) == ["crash"]


def test_known_clips_take_no_place_and_the_size_is_no_part_of_the_key(folder: Path, tmp_path: Path, clip: Any) -> None:
    clips = [clip(word) for word in ("a", "bb", "ccc", "dddd", "eeeee")]
    run([clips[0], clips[2]], tmp_path / "cache")
    assert calls(folder) == ["a+ccc"]
    found = run(clips, tmp_path / "cache", batch=2)
    assert calls(folder) == ["bb+dddd", "eeeee"]
    assert [int(row.values["toy_length"].value) for row in found.rows] == [1, 2, 3, 4, 5]
    assert run(clips, tmp_path / "cache", batch=5).measured == 0


def test_values_are_kept_as_each_batch_is_done(folder: Path, tmp_path: Path, clip: Any) -> None:
    clips = [clip(word) for word in ("a", "b", "stop", "d")]
    with pytest.raises(KeyboardInterrupt):
        run(clips, tmp_path / "cache", batch=2)
    calls(folder)
    run([clips[0], clips[1], clips[3]], tmp_path / "cache", batch=2)
    assert calls(folder) == ["d"]


def test_the_bar_counts_clips(folder: Path, clip: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run([clip(word) for word in ("a", "b", "narrow", "d", "e")], progress=True)
    assert "| 5/5 [" in capsys.readouterr().err


def test_without_a_model_and_an_identity(tmp_path: Path, clip: Any) -> None:
    """Options by value are the identity, but for the size; batches are not mixed with what is measured clip by clip."""
    text = BATCHES.replace("IDENTITY", "None").replace("COSTLY", "False")
    text += "MEASUREMENTS += (Measurement('toy_red', (Metric('toy_red', 'r'),), lambda c, m: {'toy_red': 1}),)\n"
    with metric_file(tmp_path / "n", text, "toy_batches"):
        (one,) = plan(["toy_batches"], {"toy_batches": {"batch": 2}})
        assert one.identity == {"fits": 9}
        clips = [clip(word) for word in ("a", "b", "c")]
        options = {"toy_batches": {"batch": 2}}
        found = score(clips, ["toy_batches", "toy_red"], options, progress=False)
        assert calls(tmp_path / "n") == ["a+b", "c"]
        assert {(row.values["toy_red"].value, row.values["toy_length"].status) for row in found.rows} == {(1, "ok")}
        score(clips, ["toy_batches"], options, progress=False, workers=2)
        assert calls(tmp_path / "n") == ["a+b", "c"]


def test_a_wrong_number_of_results_is_no_value_of_another_clip(tmp_path: Path, clip: Any) -> None:
    text = (
        BATCHES.replace("IDENTITY", "None")
        .replace("COSTLY", "True")
        .replace("for word, level in clips]", "for word, level in clips[:1]]")
    )
    with metric_file(tmp_path / "n", text, "toy_batches"):
        found = run([clip("a"), clip("bb")])
        assert [int(row.values["toy_length"].value) for row in found.rows] == [1, 2]


def test_one_clip_is_a_batch_of_one(folder: Path, clip: Any) -> None:
    one = measurements()["toy_batches"]
    assert isinstance(one.measure, InBatches)
    assert one.measure(clip("abc"), one.options())["toy_text"] == "abc"
    with pytest.raises(Exception, match="nobody speaks"):
        one.measure(clip("quiet"), one.options())
