"""The page of clips: what it says, that it is safe with any text and file name, and that a browser plays it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from fake_bundle import fake_bundle, fake_checkpoint
from PIL import Image

from inference.gallery import PAGE, collect, write_page
from inference.requests import FORMAT, MANIFEST, Request
from magihuman import infer
from magihuman.errors import UserError
from magihuman.io.provenance import file_hash

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # which root cannot use
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
)
HOSTILE = "</p><script>document.title = 'run'</script> & \"quoted\" 'x' <b>"
NAMES = ("a b", "q\"u'o", "hash#50%?x=1&y", "été 人", "a:b")


class Page(HTMLParser):
    """Elements of a page, each with its attributes and the text directly in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.found and data.strip():
            self.found[-1][2].append(data.strip())

    def all(self, tag: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        wanted = attributes.items()
        return [(a, " ".join(t)) for name, a, t in self.found if name == tag and wanted <= a.items()]


def clip(folder: Path, name: str, prompt: str = "a face", steps: int = 8, content: bytes = b"mp4") -> Path:
    """An mp4 (of no use) and its record, in the form that infer writes."""
    video = folder / f"{name}.mp4"
    video.write_bytes(content)
    settings = {
        "solver": "unipc",
        "steps": steps,
        "shift": 5.0,
        "guidance": {"video_high": 5.0, "video_low": 2.0, "threshold": 500, "audio": 5.0},
        "negative_prompt": "",
        "sr": None,
    }
    record = {
        "format": FORMAT,
        "prompt": prompt,
        "seed": 7,
        "image": None,
        "audio": None,
        "settings": settings,
        "checkpoint": {"name": "tiny/base"},
        "dtype": "float32",
        "device": "cpu",
        "weights": None,
        "sha256": file_hash(video),
        "fps": 25.0,
        "frames": 25,
        "height": 64,
        "width": 48,
    }
    video.with_suffix(".json").write_text(json.dumps(record))
    return video


def page_of(folder: Path) -> Page:
    write_page(folder)
    return Page((folder / PAGE).read_text(encoding="utf-8"))


def test_any_prompt_and_file_name_is_only_text(tmp_path: Path) -> None:
    for name in NAMES:
        clip(tmp_path, name, HOSTILE)
    page = page_of(tmp_path)
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert [text for _, text in page.all("p", **{"class": "prompt"})] == [HOSTILE] * len(NAMES)
    for tag, key, ending in (("video", "src", ".mp4"), ("a", "href", ".json")):
        links = [(attributes[key] or "").removesuffix("#t=0.001") for attributes, _ in page.all(tag)]
        assert all(re.fullmatch(r"[\w.%~-]+", link) for link in links)  # relative, one path segment
        assert sorted(map(unquote, links)) == sorted(name + ending for name in NAMES)
    assert {attributes["title"] for attributes, _ in page.all("span", **{"class": "name"})} == set(NAMES)


def test_nothing_outside_the_folder_is_loaded_and_bytes_repeat(tmp_path: Path) -> None:
    for name in "cab":
        clip(tmp_path, name)
    page = page_of(tmp_path)
    before = (tmp_path / PAGE).read_bytes()
    assert b"//" not in before.replace(b"// ", b"")
    assert not page.all("link")
    assert b"@import" not in before
    assert b"url(" not in before
    assert [a["src"] for a, _ in page.all("video")] == [f"{name}.mp4#t=0.001" for name in "abc"]
    for attributes, _ in page.all("video"):
        assert attributes["preload"] == "metadata"
        assert {"controls", "loop"} <= attributes.keys()
        assert (attributes["width"], attributes["height"]) == ("48", "64")
    write_page(tmp_path)
    assert (tmp_path / PAGE).read_bytes() == before


def test_shared_settings_stand_once_and_others_with_their_clip(tmp_path: Path) -> None:
    clip(tmp_path, "a")
    clip(tmp_path, "b", steps=32)
    told = [text for _, text in page_of(tmp_path).all("dd")]
    assert told.count("48 × 64") == told.count("1.00 s, 25 frames") == 1
    assert told.count("video 5 to 2, audio 5") == 1
    assert told[-2:] == ["unipc, 8 steps, shift 5", "unipc, 32 steps, shift 5"]


def test_what_is_wrong_with_a_clip_is_said(tmp_path: Path) -> None:
    for name in ("good", "cut", "gone", "bare", "torn"):
        clip(tmp_path, name)
    (tmp_path / "cut.mp4").write_bytes(b"m")
    (tmp_path / "gone.mp4").unlink()
    (tmp_path / "bare.json").unlink()
    (tmp_path / "torn.json").write_text('{"format": "magih')
    (tmp_path / "notes.json").write_text('{"not": "ours"}')
    (tmp_path / ".good.mp4.1.part").touch()
    lines = ['{"name": "lost", "prompt": "from the manifest", "seed": 3}', '{"name": "to', "[]"]
    (tmp_path / MANIFEST).write_text("\n".join(lines))
    asked = [Request("later", "asked for", 9), Request("good", "a face", 7)]
    cards = {card.name: card for card in collect(tmp_path, asked)}
    assert {name: card.problem for name, card in cards.items()} == {
        "good": "",
        "cut": "the mp4 is not the one of its record",
        "gone": "the mp4 is missing",
        "bare": "no record; writing it may have been interrupted",
        "torn": "its record cannot be read",
        "lost": "not made",
        "later": "not made",
    }
    assert (cards["lost"].prompt, cards["lost"].seed) == ("from the manifest", 3)
    assert (cards["later"].prompt, cards["later"].seed) == ("asked for", 9)
    page = page_of(tmp_path)
    assert [text for _, text in page.all("p", id="count")] == ["6 clips, 5 with problems"]
    assert len(page.all("video")) == 4
    assert len(page.all("div", **{"class": "gap"})) == 2


def test_another_page_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / PAGE).write_text("<title>my own</title>")
    with pytest.raises(UserError, match="was not made by this command"):
        write_page(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        write_page(tmp_path / "nowhere")
    assert (tmp_path / PAGE).read_text() == "<title>my own</title>"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that makes two clips with hostile names and prompts, and their page."""
    monkeypatch.setattr("magihuman.codecs.bundle.load_bundle", fake_bundle)
    rows = [{"prompt": HOSTILE, "name": 'a #1 "été" 人'}, {"prompt": "a calm voice"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = fake_checkpoint(tmp_path / "export")
    return [
        f"checkpoint={checkpoint}",
        f"prompts={tmp_path / 'p.jsonl'}",
        f"output={tmp_path / 'clips'}",
        "gallery=true",
        "batch=1",
        "device=cpu",
        "progress=false",
    ]


def test_a_stopped_run_leaves_a_page_and_the_next_one_completes_it(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "clips" / PAGE
    with monkeypatch.context() as patch:
        patch.setattr("inference.pipeline.Pipeline.write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(SystemExit):
            infer.main(made)
    assert "2 clips, 2 with problems" in page.read_text()
    infer.main(made)
    assert "2 clips<" in page.read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        infer.main(["prompt=a", f"output={tmp_path / 'x.mp4'}", "gallery=true"])
    assert "with prompts=FILE" in capsys.readouterr().err
    page.write_text("mine")
    with pytest.raises(SystemExit):
        infer.main(made)
    assert page.read_text() == "mine"


def browse(tmp_path: Path, *arguments: str) -> str:
    """What a headless browser prints."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on PATH ({', '.join(BROWSERS)})")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def test_a_real_browser_plays_the_clips_and_filters_them(tmp_path: Path, made: list[str]) -> None:
    infer.main(made)
    folder = tmp_path / "clips"
    clip(folder, "broken", "cannot be played", content=b"this is no video")
    write_page(folder)
    address = (folder / PAGE).as_uri()

    page = Page(browse(tmp_path, "--dump-dom", address))
    metadata = {unquote((a["src"] or "").partition("#")[0]): a.get("data-metadata") for a, _ in page.all("video")}
    assert metadata == {'a #1 "été" 人.mp4': "32x32", "0001-a-calm-voice.mp4": "32x32", "broken.mp4": None}
    assert [text for _, text in page.all("title")] == ["clips"]  # the script in the prompt did not run
    assert [t for a, t in page.all("p", **{"class": "problem"}) if "hidden" not in a] == ["this browser cannot play it"]
    assert ["hidden" in a for a, _ in page.all("article")] == [False, False, False]

    page = Page(browse(tmp_path, "--dump-dom", f"{address}#voice%20CALM"))
    shown = ["hidden" not in a for a, _ in page.all("article")]
    assert shown == [True, False, False]
    assert [text for _, text in page.all("p", id="count")] == ["1 of 3 clips"]

    picture = tmp_path / "page.png"
    browse(tmp_path, f"--screenshot={picture}", "--window-size=1200,800", address)
    with Image.open(picture) as image:
        assert image.size == (1200, 800)
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 50  # text and pictures, not an empty page
