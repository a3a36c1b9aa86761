"""Decoding as a stream: the same pictures as at once, in tiles, on the way to an mp4, with decoders of ours."""

import json
import shlex
import threading
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from fake_bundle import FRAMES, SIDE, FakeVideoCodec, fake_bundle, fake_checkpoint

from inference import decoding
from inference.decoding import Decoder, latents_per_tile, spans, stream_tiles, to_uint8
from inference.pipeline import Pipeline
from magihuman import infer, zoo
from magihuman.codecs.causal_decoder import CausalDecoder, CausalDecoderCodec
from magihuman.codecs.causal_decoder_config import CausalDecoderConfig, DecoderStage
from magihuman.codecs.turbo_vaed import TurboCodec, TurboConfig, TurboDecoder
from magihuman.errors import UserError
from magihuman.media.images import frames_to_uint8
from magihuman.media.mp4 import write_mp4
from magihuman.media.reading import read_clip
from magihuman.zoo import decoders
from magihuman.zoo.memory_tracker import Allocations

SMALL = CausalDecoderConfig(3, (DecoderStage(8, 1, "full", (2, 2)), DecoderStage(6, 2, "split")), (2, 2))
REACH = 6  # latents that a pixel of SMALL sees to each side: 1 + 2 at the latents' resolution, 5 at twice that


def _student(seed: int = 0, chunk: int | None = None) -> CausalDecoderCodec:
    torch.manual_seed(seed)
    return CausalDecoderCodec(CausalDecoder(SMALL), chunk)


def _latents(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(3, frames, height, width, generator=torch.Generator().manual_seed(1))


# The stream


def _released() -> TurboCodec:
    settings = {
        **decoders.arch("released")["network"],
        "latent_channels": 3,
        "decoder_block_out_channels": [4, 4, 8, 8],
        "decoder_layers_per_block": [1] * 5,
    }
    config = TurboConfig.from_json(settings)
    torch.manual_seed(0)
    return TurboCodec(TurboDecoder(config), config, torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize(
    ("codec", "parts"),
    # Chunks of two latents; windows of seven; a codec that can only decode at once.
    [(_student(chunk=2), [5, 8, 8, 8, 8]), (_released(), [25, 12]), (FakeVideoCodec(), [37])],
    ids=["student", "released", "at once"],
)
def test_the_stream_is_the_clip_in_parts(codec: Any, parts: list[int]) -> None:
    z = _latents(10, 3, 2)
    stream = list(Decoder(codec).stream(z))
    assert [len(part) for part in stream] == parts
    assert all(part.dtype == torch.uint8 for part in stream)
    whole = frames_to_uint8(codec.decode(z[None]))[0]
    assert whole.float().std() > 5
    assert torch.equal(torch.cat(stream), whole)


def test_pictures_come_before_later_latents_are_looked_at() -> None:
    z = _latents(4, 3, 2)
    z[:, 1:] = torch.nan
    first = next(Decoder(_student(chunk=1)).stream(z))
    assert first.shape == (1, 12, 8, 3)
    assert 0 < first.float().mean() < 255


def test_pictures_of_one_frame_at_a_time_are_those_of_all() -> None:
    frames = torch.randn(1, 3, 5, 6, 4)
    assert torch.equal(to_uint8(frames), frames_to_uint8(frames)[0])
    there = to_uint8(frames.to("meta"))
    # 8 bits before anything leaves the device.
    assert (there.device.type, there.dtype) == ("meta", torch.uint8)


def test_a_part_is_gone_before_the_next_is_made() -> None:
    class Watched(FakeVideoCodec):
        def decode_stream(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
            for _ in range(3):
                part = torch.zeros(1, 3, 4, 8, 8)
                made.append(weakref.ref(part))
                yield part
                del part
                alive.append(sum(other() is not None for other in made))

    made: list[Any] = []
    alive: list[int] = []
    for _ in Decoder(Watched()).stream(torch.zeros(3, 3, 2, 2)):
        pass
    assert alive == [0, 0, 0]


def test_pictures_of_two_clips_are_not_one_stream() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3, 2, 3, 3\]: frames are streamed clip by clip"):
        next(Decoder(_student()).stream(torch.zeros(2, 3, 2, 3, 3)))


def test_tiles_let_go_of_the_pictures_before_the_next() -> None:
    def tiles(latents: torch.Tensor) -> Iterator[torch.Tensor]:
        for _ in range(latents.shape[2]):
            yield torch.empty(1, 3, 4, *(4 * side for side in latents.shape[3:]), device="meta")

    z = torch.empty(1, 3, 3, 30, 28, device="meta")
    with Allocations().ignore(z) as memory:
        for part in stream_tiles(tiles, z, 8, 4):
            size = part.nbytes
            del part
    assert memory.peak < 1.5 * size  # the pictures, a tile, and the weights of all tiles


@pytest.mark.parametrize("tile", [None, 32])
def test_memory_does_not_grow_with_the_clip(tile: int | None) -> None:
    codec = CausalDecoderCodec(CausalDecoder(SMALL).to("meta"), chunk=1)
    decoder, peaks = Decoder(codec, tile), []
    for frames in (3, 9):
        z = torch.empty(1, 3, frames, 10, 8, device="meta")
        with Allocations().ignore(*codec.parameters(), z) as memory:
            for part in decoder.frames(z):
                del part
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_pictures() -> None:
    z = _latents(9, 16, 16)
    here = torch.cat(list(Decoder(_student(chunk=2)).stream(z)))
    there = torch.cat(list(Decoder(_student(chunk=2).to("cuda")).stream(z)))
    assert there.device.type == "cpu"
    assert (here.int() - there.int()).abs().max() <= 1
    half = torch.cat(list(Decoder(_student(chunk=2).bfloat16().to("cuda")).stream(z)))
    assert (here.float() - half.float()).square().mean().sqrt() < 2


# Tiles


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(20, 8, 2), (21, 8, 4), (17, 16, 4), (100, 32, 8), (9, 8, 7), (8, 8, 2)]
)
def test_spans_cover_the_axis_and_their_weights_sum_to_one(length: int, tile: int, overlap: int) -> None:
    found = spans(length, tile, overlap, 4)
    total = torch.zeros(length * 4)
    for span in found:
        assert span.stop - span.start == found[0].stop <= tile
        total[span.start * 4 : span.stop * 4] += span.weight
    torch.testing.assert_close(total, torch.ones(length * 4))
    for left, right in pairwise(found):
        assert overlap <= left.stop - right.start <= overlap + 1
    assert (found[0].start, found[-1].stop) == (0, length)
    # No more tiles than are needed.
    assert len(found) == 1 or tile + (len(found) - 2) * (tile - overlap) < length


def test_a_border_inside_the_picture_counts_for_nothing() -> None:
    left, right = spans(28, 16, 4, 4)
    assert (left.stop, right.start) == (16, 12)
    assert (left.weight[:48] == 1).all(), "a picture's own border counts in full"
    assert (left.weight[-4:] == 0).all()
    assert (right.weight[:4] == 0).all()
    assert ((left.weight[48:] + right.weight[:16]) == 1).all()


def test_tiles_that_overlap_by_more_than_the_reach_make_the_whole_picture() -> None:
    codec = _student()
    z = _latents(3, 36, 40)[None]
    whole = codec.decode(z)
    exact = _blended(codec, z, tile=32, overlap=4 * REACH)
    torch.testing.assert_close(exact, whole, rtol=0, atol=1e-5)
    short = _blended(codec, z, tile=16, overlap=0)
    assert (short - whole).abs().max() > 0.05, "without overlap the borders show"


def _blended(codec: CausalDecoderCodec, z: torch.Tensor, tile: int, overlap: int) -> torch.Tensor:
    rows, columns = (spans(length, tile, overlap, 4) for length in z.shape[3:])
    assert len(rows) * len(columns) > 1
    out = torch.zeros_like(codec.decode(z))
    for row in rows:
        for column in columns:
            part = codec.decode(z[..., row.start : row.stop, column.start : column.stop])
            area = out[..., row.start * 4 : row.stop * 4, column.start * 4 : column.stop * 4]
            area += part * row.weight[:, None] * column.weight
    return out


def test_tiles_are_the_same_in_chunks_of_any_length() -> None:
    z = _latents(5, 12, 10)[None]
    parts = [torch.cat(list(Decoder(_student(chunk=n), tile=32).frames(z)), 2) for n in (1, 2, 3, 5)]
    assert parts[0].shape == (1, 3, 17, 48, 40)
    for other in parts[1:]:
        torch.testing.assert_close(other, parts[0], rtol=0, atol=1e-5)


def test_tiles_are_close_to_the_whole_and_leave_no_seam() -> None:
    codec = _student()
    z = _latents(3, 56, 56)
    whole = torch.cat(list(Decoder(codec).frames(z[None])), 2)
    tiled = torch.cat(list(Decoder(codec, tile=128).frames(z[None])), 2)
    assert [(s.start, s.stop) for s in spans(56, 32, 8, 4)] == [(0, 32), (24, 56)]
    error = (tiled - whole).square()
    assert 10 * torch.log10(4 / error.mean()) > 50  # dB; the range of a frame is 2
    # A seam is a step between neighbouring columns that the whole picture does not have.
    step = (tiled.diff(dim=4) - whole.diff(dim=4)).abs().mean(dim=(0, 1, 2, 3))
    assert step.max() < 0.03 * whole.diff(dim=4).abs().mean()


def test_small_pictures_and_no_tile_are_decoded_whole() -> None:
    z = _latents(2, 8, 6)
    whole = torch.cat(list(Decoder(_student()).stream(z)))
    assert torch.equal(torch.cat(list(Decoder(_student(), tile=32).stream(z))), whole)


def test_one_side_longer_than_a_tile_is_enough_for_tiles() -> None:
    z = _latents(2, 6, 20)[None]
    codec = _student(chunk=2)
    tiled = torch.cat(list(Decoder(codec, tile=32).frames(z)), 2)
    assert torch.equal(tiled, torch.cat(list(stream_tiles(codec.decode_stream, z, 8, 4)), 2))
    assert not torch.equal(tiled, codec.decode(z))


@pytest.mark.parametrize(("name", "share"), [("b", 0.75), ("released", 0.35)])
def test_tiles_need_less_memory(name: str, share: float) -> None:
    described = decoders.arch(name)
    latents = decoders.Latents("wan2.2", 48, (4, 16, 16))
    network: Any = decoders.build(decoders.DecoderConfig(described["layout"], described["network"], latents), "meta")
    codec = CausalDecoderCodec(network) if name == "b" else TurboCodec(network.decoder, network.config).to("meta")
    z, peaks = torch.empty(1, 48, 2, 68, 120, device="meta"), []
    for tile in (None, 1024):
        with torch.no_grad(), Allocations().ignore(*codec.parameters(), *codec.buffers(), z) as memory:
            for part in Decoder(codec, tile).frames(z):
                del part
        peaks.append(memory.peak)
    assert peaks[1] < share * peaks[0]


@pytest.mark.parametrize("tile", [16, 33, 0])
def test_a_tile_that_cannot_be_is_refused(tile: int) -> None:
    with pytest.raises(UserError, match=rf"tile={tile} is impossible; give a multiple of 4 pixels, at least 32"):
        Decoder(_student(), tile)
    assert latents_per_tile(None, (4, 4, 4)) is None


# On the way to a file


def _chunks(count: int, started: list[int] | None = None) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        if started is not None:
            started.append(i)
        yield torch.randint(0, 256, (5, 32, 48, 3), generator=generator, dtype=torch.uint8)


def test_encoding_while_decoding_makes_the_same_file(tmp_path: Path) -> None:
    wave = torch.sin(torch.arange(0, 16000 * 1.0) / 20)[None] * 0.5
    count = decoding.write(tmp_path / "a.mp4", _chunks(5), 25.0, wave, 16000)
    assert count == (25, 32, 48)
    # In one thread, one chunk after the other: the same bytes.
    from magihuman.media.mp4 import Mp4Writer

    with Mp4Writer(tmp_path / "b.mp4", (32, 48), 25.0, 16000, 1) as writer:
        for i, chunk in enumerate(_chunks(5)):
            writer.add_frames(chunk)
            writer.add_wave(wave[:, 3200 * i : 3200 * (i + 1)])
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    # All at once: the same pictures.
    write_mp4(tmp_path / "c.mp4", torch.cat(list(_chunks(5))), 25.0, wave, 16000)
    a, c = (read_clip(tmp_path / f"{name}.mp4", fps=25.0) for name in "ac")
    assert torch.equal(a.frames, c.frames)


def test_a_sound_longer_than_the_pictures_is_written_whole(tmp_path: Path) -> None:
    wave = 0.5 * torch.sin(torch.arange(0, 24000 * 1.0) / 20)[None]  # 1.5 s beside 1 s of frames
    decoding.write(tmp_path / "a.mp4", _chunks(5), 25.0, wave, 16000)
    with av.open(str(tmp_path / "a.mp4")) as file:
        samples = sum(frame.samples for frame in file.decode(audio=0))
    assert 24000 <= samples < 24000 + 3 * 1024  # AAC has frames of 1024 samples


def test_the_next_chunk_is_made_while_one_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from magihuman.media.mp4 import Mp4Writer

    made, threads = threading.Event(), set()
    add = Mp4Writer.add_frames

    def slow(self: Mp4Writer, frames: Any) -> None:
        threads.add(threading.current_thread())
        # The first chunk is not done before the second has been made: in one thread this would wait for ever.
        assert made.wait(timeout=100)
        add(self, frames)

    def chunks() -> Iterator[torch.Tensor]:
        for i, chunk in enumerate(_chunks(9)):
            if i == 1:
                made.set()
            yield chunk

    monkeypatch.setattr(Mp4Writer, "add_frames", slow)
    assert decoding.write(tmp_path / "a.mp4", chunks(), 25.0, torch.zeros(1, 0), 0)[0] == 45
    assert len(threads) == 1
    assert threading.main_thread() not in threads


def test_the_decoder_waits_for_a_slow_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from magihuman.media.mp4 import Mp4Writer

    go = threading.Event()
    started: list[int] = []
    ahead: list[int] = []
    add = Mp4Writer.add_frames

    def slow(self: Mp4Writer, frames: Any) -> None:
        if not go.wait(timeout=0.5):
            ahead.append(len(started))
            go.set()
        add(self, frames)

    monkeypatch.setattr(Mp4Writer, "add_frames", slow)
    decoding.write(tmp_path / "a.mp4", _chunks(12, started), 25.0, torch.zeros(1, 0), 0)
    assert ahead == [decoding.AHEAD + 1]


@pytest.mark.parametrize("place", ["decoder", "encoder"])
def test_what_fails_leaves_no_file(tmp_path: Path, place: str) -> None:
    def chunks() -> Iterator[torch.Tensor]:
        yield from _chunks(2)
        if place == "decoder":
            raise UserError("the decoder stopped")
        yield torch.zeros(5, 32, 44, 3, dtype=torch.uint8)
        yield from _chunks(4)

    error, words = (UserError, "stopped") if place == "decoder" else (ValueError, r"\[n,32,48,3\]")
    with pytest.raises(error, match=words):
        decoding.write(tmp_path / "a.mp4", chunks(), 25.0, torch.zeros(1, 0), 0)
    assert list(tmp_path.iterdir()) == []


# In the pipeline and on the command line


def test_the_pipeline_decodes_with_a_student(tmp_path: Path) -> None:
    loaded = zoo.load(fake_checkpoint(tmp_path / "export"))
    pipeline = Pipeline(loaded, fake_bundle(), decoder=_student(), tile=32)
    draft = pipeline.draft(["a"], [0], pipeline.settings())[0]
    made = pipeline.decode(draft)
    assert made.frames.shape == (FRAMES, SIDE, SIDE, 3)
    assert torch.equal(made.frames, frames_to_uint8(_student().decode(draft.video[None]))[0])
    facts = pipeline.write(draft, tmp_path / "x.mp4")
    assert (facts["frames"], facts["height"]) == (FRAMES, SIDE)
    assert pipeline.times["decode"] > 0


def _turbo(folder: Path, codec: str = "fake") -> Path:
    config = decoders.DecoderConfig("causal", SMALL.to_dict(), decoders.Latents(codec, 3, (4, 4, 4)))
    decoders.save(folder / "export", decoders.build(config, seed=0).state_dict(), config)
    return folder


def _infer(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("magihuman.codecs.bundle.load_bundle", fake_bundle)
    infer.main([*map(str, arguments), "prompt=a", "device=cpu", "progress=false"])


def test_infer_takes_a_run_folder_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, turbo = fake_checkpoint(tmp_path / "base" / "export"), _turbo(tmp_path / "turbo")
    output = tmp_path / "x.mp4"
    _infer(monkeypatch, f"checkpoint={checkpoint}", f"turbo={turbo}", "tile=32", f"output={output}")
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["turbo"]["name"] == str(turbo)
    assert len(record["turbo"]["sha256"]) == 64
    assert record["tile"] == 32
    assert {f"turbo={turbo}", "tile=32"} <= set(shlex.split(record["command"]))
    # The student's pictures, not the codec's.
    plain = tmp_path / "y.mp4"
    _infer(monkeypatch, f"checkpoint={checkpoint}", f"output={plain}")
    assert output.read_bytes() != plain.read_bytes()


def test_infer_refuses_a_decoder_of_other_latents_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, turbo = fake_checkpoint(tmp_path / "base" / "export"), _turbo(tmp_path / "turbo", "other")
    for argument, words in (
        (f"turbo={turbo}", "takes latents of 'other'"),
        (
            "turbo=tiny/nosuch",
            "neither a folder nor a shipped name (scene/teacher, scene/turbo, tiny/teacher, tiny/turbo)",
        ),
        ("tile=30", "give a multiple of 4 pixels"),
    ):
        with pytest.raises(SystemExit) as left:
            _infer(monkeypatch, f"checkpoint={checkpoint}", argument, f"output={tmp_path / 'x.mp4'}")
        assert left.value.code == 2
        assert words in capsys.readouterr().err
