"""Colours: HDR, wide gamuts and every kind of image file against closed forms; what cannot be converted is refused."""

import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from magihuman.media.colour import to_sdr
from magihuman.media.container import MediaError
from magihuman.media.image_files import open_image, read_image
from magihuman.media.reading import probe, read_clip

TRUTH = np.array([200, 120, 90])  # as BT.709 signal
BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # BT.2087
P3 = np.array([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]])
LIGHT = (TRUTH / 255) ** 2.4


def pq(light: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084 signal of light, 1 for 10,000 cd/m2."""
    root = light**0.1593017578125
    return ((0.8359375 + 18.8515625 * root) / (1 + 18.6875 * root)) ** 78.84375


def hlg(display: np.ndarray) -> np.ndarray:
    """BT.2100 HLG signal of BT.2020 light [...,3] on a display of 1000 cd/m2, 1 for its peak."""
    luminance = display @ np.array([0.2627, 0.6780, 0.0593])
    scene = display * luminance[..., None] ** (1 / 1.2 - 1)
    upper = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), upper)


def plain(
    path: Path, rgb: np.ndarray, trc: int, primaries: int, matrix: int, depth: int = 10, full: bool = False
) -> Path:
    """A clip of one colour, non-linear RGB in [0,1], tagged with numbers of H.273."""
    kr, kb = (0.2627, 0.0593) if matrix in (2, 9) else (0.299, 0.114) if matrix in (5, 6) else (0.2126, 0.0722)
    y = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
    chroma = (rgb[2] - y) / 2 / (1 - kb), (rgb[0] - y) / 2 / (1 - kr)
    levels = [255 * y, *(255 * c + 128 for c in chroma)] if full else [219 * y + 16, *(224 * c + 128 for c in chroma)]
    kind = np.uint16 if depth > 8 else np.uint8
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height = 64, 64
        stream.pix_fmt = "yuv420p10le" if depth == 10 else "yuv420p"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = trc, primaries, matrix
        context.color_range = 2 if full else 1
        for number in range(3):
            frame = av.VideoFrame(64, 64, stream.pix_fmt)
            for plane, level in zip(frame.planes, levels, strict=True):
                values = np.full(plane.buffer_size // kind().itemsize, round(level * 2 ** (depth - 8)), kind)
                plane.update(values.tobytes())
            frame.colorspace, frame.color_range = matrix, context.color_range
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def colour_of(path: Path) -> np.ndarray:
    return read_clip(path, fps=25, frames=2, size=(32, 32)).frames[1, 16, 16].numpy().astype(int)


@pytest.mark.parametrize(
    ("signal", "tags", "note"),
    [
        (pq(BT2020 @ LIGHT * 203 / 10000), (16, 9, 9), "tone-mapped from PQ"),
        (pq(BT2020 @ LIGHT * 203 / 10000), (16, 9, 2), "tone-mapped from PQ"),  # without the matrix
        (hlg(BT2020 @ LIGHT * 0.203), (18, 9, 9), "tone-mapped from HLG"),
        ((BT2020 @ LIGHT) ** (1 / 2.4), (14, 9, 9), "converted from BT.2020 colours"),
        ((P3 @ LIGHT) ** (1 / 2.4), (1, 12, 1), "converted from P3 colours"),
        (TRUTH / 255, (1, 1, 1), ""),
        (TRUTH / 255, (6, 6, 6), ""),
    ],
)
def test_a_colour_comes_out_the_same_from_every_encoding(
    tmp_path: Path, signal: np.ndarray, tags: tuple[int, int, int], note: str
) -> None:
    path = plain(tmp_path / "a.mp4", signal, *tags)
    assert probe(path).note == note
    assert np.abs(colour_of(path) - TRUTH).max() <= 3


@pytest.mark.parametrize("full", [False, True])
def test_range_of_values_is_read(tmp_path: Path, full: bool) -> None:
    assert np.abs(colour_of(plain(tmp_path / "a.mp4", TRUTH / 255, 1, 1, 1, 8, full)) - TRUTH).max() <= 2


@pytest.mark.parametrize(("tags", "why"), [((8, 1, 1), "linear"), ((1, 10, 1), "XYZ"), ((1, 1, 8), "YCgCo")])
def test_unread_colours_are_refused(tmp_path: Path, tags: tuple[int, int, int], why: str) -> None:
    path = plain(tmp_path / "a.mp4", TRUTH / 255, *tags)
    for read in (probe, colour_of):
        with pytest.raises(MediaError, match=rf"its .*\({why}\) are not read here; convert it to BT.709"):
            read(path)


@pytest.mark.parametrize("transfer", [16, 18])
def test_tone_mapping_keeps_mid_tones_and_separates_highlights(transfer: int) -> None:
    nits = np.array([0.0, 1.0, 10.0, 50.0, 100.0, 160.0, 203.0, 400.0, 700.0, 1000.0])
    grey = np.repeat(nits[None, :, None], 3, -1)
    signal = pq(grey / 10000) if transfer == 16 else hlg(np.maximum(grey, 1e-6) / 1000)
    got = to_sdr((signal * 65535).round().astype(np.uint16), transfer, 9)[0].astype(int)
    assert (got.max(-1) - got.min(-1)).max() <= 1  # grey stays grey
    assert np.abs(got[:6, 0] - (nits[:6] / 203) ** (1 / 2.4) * 255).max() <= 1
    assert 235 <= got[6, 0] < got[7, 0] < got[8, 0] <= got[9, 0] == 255
    assert to_sdr(np.full((1, 1, 3), 65535, np.uint16), 16, 9).min() == 255  # 10,000 cd/m2


def grey_of(path: Path) -> np.ndarray:
    pixels = read_image(path).numpy()[0]
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].astype(int)


RAMP = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(8, 0)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif", "a.pgm", "a.jp2"])
def test_16_bit_images_keep_their_brightness(tmp_path: Path, name: str) -> None:
    values = RAMP.astype(np.uint16) * 257
    image = Image.fromarray(values.astype(">u2")) if "big" in name else Image.fromarray(values)
    image.save(tmp_path / name)
    assert np.abs(grey_of(tmp_path / name) - RAMP).max() <= 1
    assert probe(tmp_path / name).kind == "image"


def test_16_bit_png_with_alpha_and_colours(tmp_path: Path) -> None:
    """Written by hand: Pillow writes none."""
    for kind, channels in ((4, 2), (2, 3), (6, 4)):
        values = np.full((8, 64, channels), 65535, ">u2")
        values[..., : min(channels, 3) if channels != 2 else 1] = RAMP[..., None].astype(np.uint16) * 257
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        path = tmp_path / f"{kind}.png"
        chunks = (
            (b"IHDR", struct.pack(">IIBBBBB", 64, 8, 16, kind, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
        body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        assert np.abs(grey_of(path) - RAMP).max() <= 1, kind


def test_floating_point_and_integer_tiff(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray((RAMP / 255).astype(np.float32)).save(path)
    assert np.abs(grey_of(path) - RAMP).max() <= 1
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path, tiffinfo={262: 0})  # white is zero
    assert np.abs(255 - grey_of(path) - RAMP).max() <= 1
    for bad, why in (
        (RAMP.astype(np.float32), "floating-point pixels from 0 to 255, not 0 to 1; save it"),
        (np.full((4, 4), np.nan, np.float32), "floating-point pixels from nan to nan"),
        (np.full((4, 4), 200, np.int32), "has 32-bit pixels, whose range is not known; save it"),
        (RAMP.astype(np.int32) << 20, "has 32-bit pixels, whose range is not known; save it"),
    ):
        Image.fromarray(bad).save(path)
        for read in (probe, read_image):
            with pytest.raises(MediaError, match=why):
                read(path)


@pytest.mark.filterwarnings("ignore:Palette images")
def test_transparency_is_dropped_as_the_release_does(tmp_path: Path) -> None:
    pixels = np.dstack([np.full((20, 40, 3), (10, 200, 30), np.uint8), np.full((20, 40), 0, np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    Image.fromarray(pixels).quantize(4).save(tmp_path / "palette.png")
    Image.fromarray(pixels[..., :3]).quantize(4).save(tmp_path / "key.png", transparency=0)
    for name in ("clear.png", "palette.png", "key.png"):
        released = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert (read_image(tmp_path / name).numpy()[0] == released).all()
        assert probe(tmp_path / name).note == "its transparency is dropped"
    Image.fromarray(pixels | 255 * np.eye(4, dtype=np.uint8)[3]).save(tmp_path / "opaque.png")
    assert probe(tmp_path / "opaque.png").note == ""


def test_icc_profiles_are_applied(tmp_path: Path) -> None:
    """Of a display whose red and blue are exchanged: nothing else could turn red into blue."""
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "srgb.png", icc_profile=srgb)
    assert read_image(tmp_path / "srgb.png")[0, 4, 4].tolist() == [255, 0, 0]
    assert probe(tmp_path / "srgb.png").note == ""
    swapped = bytearray(srgb.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ"))
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "BGRs".encode("utf-16-be"))
    for name in ("a.png", "a.jpg"):
        image.save(tmp_path / name, icc_profile=bytes(swapped))
        assert np.abs(read_image(tmp_path / name)[0, 4, 4].numpy().astype(int) - (0, 0, 255)).max() <= 2
        assert probe(tmp_path / name).note.startswith("converted from BGRs")
    image.convert("L").save(tmp_path / "wrong.png", icc_profile=bytes(swapped))
    assert probe(tmp_path / "wrong.png").note == "its colour profile does not fit and is ignored"
    at = srgb.index(b"rTRC", 128)  # one curve for all: of gamma 1
    start = struct.unpack(">I", srgb[at + 4 : at + 8])[0]
    linear = srgb[:start] + b"curv" + bytes(8) + srgb[start + 12 :]
    Image.new("RGB", (8, 8), (55, 55, 55)).save(tmp_path / "linear.png", icc_profile=linear)
    assert np.abs(read_image(tmp_path / "linear.png")[0, 4, 4].numpy().astype(int) - 128).max() <= 1
    assert "sRGB" in probe(tmp_path / "linear.png").note


@pytest.mark.parametrize("name", ["a.avif", "a.png"])
@pytest.mark.parametrize(("transfer", "primaries"), [(16, 9), (18, 9), (13, 12), (13, 1)])
def test_images_that_state_their_colours(tmp_path: Path, name: str, transfer: int, primaries: int) -> None:
    light = {9: BT2020, 12: P3, 1: np.eye(3)}[primaries] @ LIGHT
    signal = pq(light * 0.0203) if transfer == 16 else hlg(light * 0.203) if transfer == 18 else light ** (1 / 2.4)
    image = Image.new("RGB", (16, 16), tuple((signal * 255).round().astype(int).tolist()))
    if name == "a.png":
        chunks = PngInfo()
        chunks.add(b"cICP", bytes([primaries, transfer, 0, 1]))
        image.save(tmp_path / name, pnginfo=chunks)
    else:
        image.save(tmp_path / name, quality=100, subsampling="4:4:4")
        data = bytearray((tmp_path / name).read_bytes())
        at = data.index(b"colrnclx") + 8
        data[at : at + 4] = struct.pack(">HH", primaries, transfer)
        (tmp_path / name).write_bytes(data)
    # Steps of 8-bit PQ are coarse.
    assert np.abs(read_image(tmp_path / name)[0, 8, 8].numpy().astype(int) - TRUTH).max() <= 5
    note = {16: "tone-mapped from PQ", 18: "tone-mapped from HLG"}.get(transfer)
    assert probe(tmp_path / name).note == (note or ("converted from P3 colours" if primaries == 12 else ""))


def test_cmyk_and_lab_images(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), tuple(TRUTH.tolist()))
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "cmyk.jpg")[0, 4, 4].numpy() - TRUTH).max() <= 3
    assert "CMYK" in probe(tmp_path / "cmyk.jpg").note
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    lab.save(tmp_path / "lab.tif")
    assert np.abs(read_image(tmp_path / "lab.tif")[0, 4, 4].numpy() - TRUTH).max() <= 3


def test_several_pictures_in_a_file(tmp_path: Path) -> None:

    def save(name: str, **how: Any) -> None:
        first, *more = (Image.new("RGB", (32, 16), colour) for colour in ("red", "blue", "green"))
        first.save(tmp_path / name, save_all=True, append_images=more, **how)

    save("phone.jpg", format="MPO")
    save("scan.tif")
    for name, note in (("phone.jpg", ""), ("scan.tif", "the first of its 3 images")):
        info = probe(tmp_path / name)
        assert (info.kind, info.width, info.height, info.note) == ("image", 32, 16, note)
        assert np.abs(read_image(tmp_path / name)[0, 4, 4].numpy().astype(int) - (255, 0, 0)).max() <= 2
    for name in ("a.gif", "a.png", "a.webp"):
        save(name, duration=40)
        assert open_image(tmp_path / name)[1] == "the first of its 3 images"
        if name == "a.webp":
            with pytest.raises(
                MediaError, match="is an animated WebP image, which is not read here; convert it to mp4"
            ):
                probe(tmp_path / name)
        else:
            assert probe(tmp_path / name).kind == "video"


def test_orientation_and_high_bit_depth_together(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "a.png", exif=exif)
    assert (probe(tmp_path / "a.png").width, probe(tmp_path / "a.png").height) == (8, 64)
    assert np.abs(grey_of(tmp_path / "a.png") - RAMP.T).max() <= 1


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo"),
        (b"%PDF-1.7\n", "a PDF document"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "a PostScript document",
        ),  # Pillow would start ghostscript
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    ],
)
def test_other_kinds_of_image_are_named(tmp_path: Path, head: bytes, kind: str) -> None:
    (tmp_path / "a.jpg").write_bytes(head + bytes(600))
    with pytest.raises(MediaError, match=f"is {kind}, which is not read here; export it as JPEG or PNG"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(MediaError):
        probe(tmp_path / "a.jpg")


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (16000, 9000)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match=r"too large to be opened safely \(16000 x 9000 pixels\); shrink it"):
        read_image(tmp_path / "a.png")
