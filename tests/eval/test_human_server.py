"""Server of a human study: blindness of every byte, both clips must play, one vote per pair, resume, hostile requests."""

import contextlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from human_study import PROMPT, SECRET, SYSTEMS, HttpRater, made_study

from eval.human.study_plan import DAMAGED, StudyPlan, assign_trials, write_plan
from eval.human.study_server import StudyHandler, StudyServer, _range, links, open_votes, serve_study
from eval.human.vote_store import VoteRefused, VoteStore
from magihuman.errors import UserError

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyPlan]:
    folder = tmp_path_factory.mktemp("human")
    return folder / "study", made_study(folder)


@pytest.fixture
def study(template: tuple[Path, StudyPlan], tmp_path: Path) -> tuple[Path, StudyPlan]:
    """A study without votes; the media are shared."""
    folder, plan = template
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "plan.json").write_bytes((folder / "plan.json").read_bytes())
    (tmp_path / "study" / "media").symlink_to(folder / "media")
    return tmp_path / "study", plan


@pytest.fixture
def server(study: tuple[Path, StudyPlan]) -> Iterator[StudyServer]:
    with StudyServer(study[0], port=0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()
        running.store.close()


def rater_of(server: StudyServer, number: int = 0) -> HttpRater:
    return HttpRater(server.server_address[1], server.plan.tokens[number])


def watch(rater: HttpRater, trial: int, seconds: float = 0.13) -> None:
    for side in ("left", "right"):
        assert rater.post("play", trial=trial, side=side, event="start")[0] == 200
    time.sleep(seconds)
    for side in ("left", "right"):
        assert rater.post("play", trial=trial, side=side, event="end")[0] == 200


# ---- Votes ----


def test_a_vote_needs_both_clips_played_for_their_length(server: StudyServer) -> None:
    rater = rater_of(server)
    assert rater.post("vote", trial=0, choice="left") == (
        409,
        {"error": "both clips must be played to their end", "wait": 0.0},
    )
    assert rater.post("play", trial=0, side="left", event="end")[1]["error"] == "the clip has not begun to play"
    rater.post("play", trial=0, side="left", event="start")
    status, found = rater.post("play", trial=0, side="left", event="end")
    assert (status, found["error"]) == (409, "the clip cannot have ended yet")
    assert 0 < found["wait"] <= 0.9 * 0.12
    time.sleep(found["wait"] + 0.01)
    assert rater.post("play", trial=0, side="left", event="end") == (200, {"played": ["left"]})
    assert rater.post("vote", trial=0, choice="left")[0] == 409  # one of two
    watch(rater, 0)
    status, found = rater.post("vote", trial=0, choice="left")
    assert (status, found["answered"]) == (200, 1)
    assert found["trial"]["number"] == 1
    assert found["trial"]["played"] == []


def test_a_pair_takes_one_vote_in_two_tabs_and_in_order(server: StudyServer) -> None:
    first, second = rater_of(server), rater_of(server)
    watch(first, 0)
    assert first.post("vote", trial=0, choice="left")[0] == 200
    assert second.post("vote", trial=0, choice="right") == (409, {"error": "this pair is answered", "wait": 0.0})
    assert second.post("vote", trial=2, choice="right")[1]["error"] == "an earlier pair is not answered"
    assert second.post("play", trial=2, side="left", event="start")[0] == 409
    votes = server.store.votes()
    assert [(vote.rater, vote.trial, vote.choice) for vote in votes] == [(0, 0, "left")]
    assert 0.12 < votes[0].seconds < 10
    assert rater_of(server, 1).next()["answered"] == 0  # another rater is not concerned


def test_votes_at_once_are_stored_once(server: StudyServer) -> None:
    rater = rater_of(server)
    watch(rater, 0)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: rater_of(server).post("vote", trial=0, choice="tie")[0], range(8)))
    assert sorted(answers) == [200] + [409] * 7
    assert len(server.store.votes()) == 1


def test_a_rater_who_finished_sees_the_end(server: StudyServer) -> None:
    rater = rater_of(server)
    total = len(server.plan.trials[0])
    for trial in range(total):
        server.store.play(0, trial, "left", 0)
        server.store.play(0, trial, "right", 0)
        watch(rater, trial, 0)
        status, found = rater.post("vote", trial=trial, choice="tie")
        assert status == 200
    assert found["answered"] == found["total"] == total == 9
    assert "trial" not in found
    assert "trial" not in rater.next()
    assert rater.post("vote", trial=total, choice="tie") == (400, {"error": "no such pair"})


@pytest.mark.parametrize(
    "content",
    [
        {}, {"trial": 0}, {"trial": 0, "choice": "best"}, {"trial": -1, "choice": "tie"}, {"trial": True, "choice": "tie"},
        {"trial": "0", "choice": "tie"}, {"trial": 10**9, "choice": "tie"},
    ],
)  # fmt: skip
def test_nonsense_is_no_vote(server: StudyServer, content: dict[str, Any]) -> None:
    assert rater_of(server).post("vote", **content)[0] == 400
    assert server.store.votes() == []


# ---- The store ----


def test_the_database_itself_refuses_a_second_vote(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes.sqlite", "plan")
    for side in ("left", "right"):
        store.play(0, 0, side, 10.0)
        store.played(0, 0, side, 15.0, 4.5)
    store.vote(0, 0, "left", 20.0)
    with pytest.raises(VoteRefused, match="is answered"):
        store.vote(0, 0, "left", 21.0)
    assert store.votes()[0].seconds == 10.0
    store.close()
    raw = sqlite3.connect(tmp_path / "votes.sqlite")
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        raw.execute("INSERT INTO votes VALUES (0, 0, 'tie', 1, 1)")
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        raw.execute("INSERT INTO votes VALUES (0, 1, 'best', 1, 1)")
    raw.close()


def test_a_clock_that_is_set_back_stops_no_rater(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes.sqlite", "plan")
    for side in ("left", "right"):
        store.play(0, 0, side, 5000)
        with pytest.raises(VoteRefused) as refused:
            store.played(0, 0, side, 1000, 4)  # an hour less
        assert refused.value.wait == 4
        store.played(0, 0, side, 1004, 4)
    store.vote(0, 0, "left", 900)
    assert store.votes()[0].seconds == 0
    store.close()


def test_a_vote_is_on_the_disk_when_it_is_confirmed(tmp_path: Path) -> None:
    store = VoteStore(tmp_path / "votes.sqlite", "plan")
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA: the folder's entry, too
    store.close()


def test_votes_belong_to_the_plan_under_which_they_were_given(study: tuple[Path, StudyPlan]) -> None:
    open_votes(study[0]).close()
    (study[0] / "plan.json").write_text((study[0] / "plan.json").read_text().replace('"failures": 1', '"failures": 9'))
    with pytest.raises(UserError, match=r"votes of another plan: plan\.json was changed"):
        open_votes(study[0])


def test_no_database_is_an_error_of_one_line(study: tuple[Path, StudyPlan]) -> None:
    (study[0] / "votes.sqlite").write_bytes(b"no database, but long enough to be read as one" * 30)
    with pytest.raises(UserError, match=r"votes\.sqlite cannot be used"):
        open_votes(study[0])


# ---- What is sent ----


def test_no_byte_names_a_system_a_file_or_a_prompt(server: StudyServer, tmp_path: Path) -> None:
    rater = rater_of(server)
    token = rater.token
    for method in ("GET", "HEAD"):
        for path in ("/", f"/r/{token}", f"/r/{token}/next", "/r/wrong", "/plan.json", "/favicon.ico"):
            rater.request(method, path)
    for media in server.media:
        assert rater.request("GET", f"/media/{media}.mp4")[0] == 200
    watch(rater, 0)
    rater.post("vote", trial=0, choice="tie")
    rater.post("vote", trial=0, choice="tie")
    rater.request("PUT", f"/r/{token}/vote", b"{}")
    sent = bytes(rater.received).lower()
    assert len(sent) > 20_000
    words = [*SYSTEMS, SECRET, PROMPT, str(tmp_path), "python", "basehttp", DAMAGED, "opponent", "check", "repeat"]
    assert [
        word for word in words if word.lower().encode() in sent.replace(b"krepeat", b"").replace(b"event.repeat", b"")
    ] == []


def test_a_clip_has_another_address_in_every_question(server: StudyServer) -> None:
    asked = sum(map(len, server.plan.trials))
    assert len(server.media) == 2 * asked  # no address twice
    assert len(set(server.media.values())) == len(server.plan.media) < 2 * asked
    assert not server.media.keys() & server.plan.media.keys()
    for rater, trials in enumerate(server.plan.trials):
        for number, trial in enumerate(trials):
            for side, name in server.plan.sides(trial).items():
                assert server.media[server.address(rater, number, side)].stem == name


def test_the_prompt_is_shown_where_the_plan_says_so(tmp_path: Path) -> None:
    plan = made_study(tmp_path, clips=3, systems=2, pairs=2, repeats=0, checks=0, raters=1, show_prompt=True)
    with StudyServer(tmp_path / "study", port=0) as server:
        assert server.next_trial(0)["trial"]["prompt"].startswith(PROMPT)
        server.store.close()
    assert plan.settings.show_prompt


def test_the_page_loads_nothing_from_elsewhere(server: StudyServer) -> None:
    status, head, body = rater_of(server).request("GET", f"/r/{server.plan.tokens[0]}")
    assert status == 200
    assert b"http:" not in body
    assert b"https:" not in body
    assert head["content-security-policy"].startswith("default-src 'none'")
    assert head["referrer-policy"] == "no-referrer"
    assert head["cache-control"] == "no-store"


# ---- HTTP ----


def test_ranges_as_safari_asks_for_them(server: StudyServer) -> None:
    name, path = next(iter(server.media.items()))
    whole, rater = path.read_bytes(), rater_of(server)
    address, size = f"/media/{name}.mp4", path.stat().st_size
    status, head, body = rater.request("GET", address)
    assert (status, body, head["accept-ranges"], head["content-type"]) == (200, whole, "bytes", "video/mp4")
    for asked, first, last in (
        ("0-1", 0, 1),
        ("5-", 5, size - 1),
        ("-7", size - 7, size - 1),
        ("10-999999", 10, size - 1),
    ):
        status, head, body = rater.request("GET", address, Range=f"bytes={asked}")
        assert (status, body) == (206, whole[first : last + 1])
        assert head["content-range"] == f"bytes {first}-{last}/{size}"
        assert int(head["content-length"]) == last + 1 - first
    status, head, body = rater.request("GET", address, Range=f"bytes={size}-")
    assert (status, head["content-range"], body) == (416, f"bytes */{size}", b"")
    for whatever in ("bytes=0-1,4-5", "bytes=-", "bytes=9-3", "lines=1-2", "bytes=x"):
        assert rater.request("GET", address, Range=whatever)[0] == 200
    status, head, body = rater.request("HEAD", address, Range="bytes=0-1")
    assert (status, head["content-length"], body) == (206, "2", b"")
    assert _range("bytes=-0", size) == ()


@pytest.mark.parametrize(
    "path",
    [
        "/plan.json", "/votes.sqlite", "/links.txt", "/media", "/media/", "/media/../plan.json", "/media/..%2fplan.json",
        "/media/%2e%2e/plan.json", "/../../etc/passwd", "//etc/passwd", "/media/plan.json.mp4", "/r/", "/r/../plan.json",
        "/r/x/next", "/r/x", "/media/0000000000000000.mp4",
    ],
)  # fmt: skip
def test_nothing_else_is_served(server: StudyServer, path: str) -> None:
    status, _, body = rater_of(server).request("GET", path)
    assert status == 404
    assert len(body) < 200


def test_the_page_learns_that_its_link_is_not_valid_any_more(server: StudyServer) -> None:
    """As JSON, which the page can read; it would try again for ever otherwise."""
    status, _, body = rater_of(server).request("GET", "/r/gone/next")
    assert (status, json.loads(body)) == (404, {"error": "this link is not valid"})


def test_an_address_that_is_none_gets_an_answer(server: StudyServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10) as connection:
        connection.sendall(b"GET http://[ HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 404")


def test_a_clip_that_is_lost_while_serving_is_said(server: StudyServer, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(iter(server.media))
    server.media[name] = Path("/nowhere/lost.mp4")
    with pytest.raises(http.client.RemoteDisconnected):
        rater_of(server).request("GET", f"/media/{name}.mp4")
    assert "No such file or directory: '/nowhere/lost.mp4'" in capsys.readouterr().err


def test_bodies_are_limited_and_must_be_json(server: StudyServer) -> None:
    rater = rater_of(server)
    path = f"/r/{rater.token}/vote"
    assert rater.request("POST", path, b"x" * 5000)[0] == 413
    assert rater.request("POST", path, b"[" * 4000)[0] == 400
    assert rater.request("POST", path, b"[]")[0] == 400
    assert rater.request("POST", path, b"\xff\xfe")[0] == 400
    assert rater.request("POST", path, None, Transfer_Encoding="chunked")[0] == 411
    assert rater.request("POST", path, b"", Content_Length="-1")[0] == 411
    assert rater.request("POST", "/r/wrong/vote", b"{}")[0] == 404
    assert rater.request("POST", "/", b"{}")[0] == 404
    assert rater.request("DELETE", path)[0] == 501
    with socket.create_connection(("127.0.0.1", server.server_address[1])) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        assert SYSTEMS[0].encode() not in raw.recv(1000)
    assert rater.next()["answered"] == 0  # it still answers


def test_problems_of_starting_are_one_line(study: tuple[Path, StudyPlan], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no plan\.json; make one with"):
        StudyServer(tmp_path / "nowhere")
    with StudyServer(study[0], port=0) as server:
        with pytest.raises(UserError, match="choose another port"):
            StudyServer(study[0], port=server.server_address[1])
        server.store.close()
    (study[0] / "media").unlink()
    (study[0] / "media").mkdir()
    with pytest.raises(UserError, match=r"lacks .* clips of the plan"):
        StudyServer(study[0], port=0)


# ---- A rater in a browser ----


class Served:
    """`python -m eval.human serve` in a process of its own."""

    def __init__(self, study: Path, port: int = 0) -> None:
        command = [sys.executable, "-m", "eval.human", "serve", f"study={study}", f"port={port}"]
        self.process = subprocess.Popen(
            command, cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.links = []
        for line in map(bytes.decode, self.process.stdout):
            if line.startswith("rater "):
                self.links.append(line.split(": ")[1].strip())
            if line.startswith("listening"):
                self.port = int(line.partition(";")[0].rpartition(":")[2])
                break

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


OPENED = "document.querySelector('#intro')?.hidden === false"
SIMULATED = """
window.simulated = setInterval(() => {
  if (document.querySelector("#task").hidden) return;
  for (const side of ["left", "right"]) {
    const figure = document.querySelector("#" + side);
    if (!figure.classList.contains("done")) {
      const one = figure.querySelector("video");
      if (one.paused && !(one.ended && one.currentTime > 0 && one.played.length && figure.dataset.src === one.src)) {
        figure.dataset.src = one.src;
        figure.querySelector(".play").click();
      }
      return;
    }
  }
  const votes = [...document.querySelectorAll("#votes button:enabled")];
  if (votes.length) votes[Number(document.querySelector("#count").textContent.split(" ")[0]) % 3].click();
}, 10)
"""


def wait_while_answering(browser: Browser, condition: str, seconds: float = 120) -> None:
    """Wait until an expression is true, for as long as a question is answered every `seconds`: machines differ."""
    answered, since = -1, time.monotonic()
    while not browser.evaluate(condition):
        if (now := browser.evaluate("document.querySelector('#progress').value")) != answered:
            answered, since = now, time.monotonic()
        state = "[...document.querySelectorAll('#problem, #state')].map((part) => part.textContent).join('; ')"
        assert time.monotonic() < since + seconds, f"stuck after {answered} answers: {browser.evaluate(state)}"
        time.sleep(0.05)


def rate(folder: Path, study: Path, total: int, kills: tuple[int, ...]) -> list[str]:
    """A simulated rater answers all; the server is killed after so many answers and started again. Returns the choices."""
    served = Served(study)
    with contextlib.ExitStack() as ends:
        ends.callback(lambda: served.kill())
        browser = ends.enter_context(Browser(folder, (500, 500)))
        browser.call("Page.navigate", url=served.links[0])
        browser.wait(OPENED)
        assert browser.evaluate("document.querySelector('#task').hidden")
        browser.click("#begin")
        assert browser.evaluate("[...document.querySelectorAll('#votes button')].every((button) => button.disabled)")
        browser.evaluate(SIMULATED)
        for kill in kills:
            wait_while_answering(browser, f"document.querySelector('#progress').value >= {kill}")
            confirmed = browser.evaluate("document.querySelector('#progress').value")
            served.kill()
            raw = sqlite3.connect(study / "votes.sqlite")
            assert raw.execute("SELECT COUNT(*) FROM votes").fetchone()[0] >= confirmed
            raw.close()
            browser.wait("!document.querySelector('#problem').hidden")
            assert browser.evaluate("document.querySelector('#problem').textContent").startswith("The server cannot be")
            served = Served(study, served.port)
        wait_while_answering(browser, "!document.querySelector('#end').hidden")
        assert browser.errors == []
    store = open_votes(study)
    votes = store.votes()
    store.close()
    assert [vote.trial for vote in votes] == list(range(total))
    return [vote.choice for vote in votes]


def test_a_real_browser_rates_all_pairs_and_the_server_is_killed(study: tuple[Path, StudyPlan], tmp_path: Path) -> None:
    choices = rate(tmp_path, study[0], 9, (3,))
    assert choices == [("left", "tie", "right")[k % 3] for k in range(1, 10)]


def test_a_clip_that_breaks_off_is_loaded_again(
    server: StudyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the server is killed in the middle of a clip: nobody has to reload the page."""
    whole, asked = StudyHandler._clip, Counter[str]()

    def break_off_twice(handler: StudyHandler, path: Path) -> None:
        asked[handler.path] += 1
        if asked[handler.path] > 2:
            whole(handler, path)
        else:
            handler._head(200, {"Content-Type": "video/mp4", "Content-Length": str(path.stat().st_size)})
            handler.wfile.write(path.read_bytes()[:200])
            handler.close_connection = True

    monkeypatch.setattr(StudyHandler, "_clip", break_off_twice)
    with Browser(tmp_path) as browser:
        browser.call("Page.navigate", url=links(server.plan, f"http://127.0.0.1:{server.server_address[1]}")[0])
        browser.wait(OPENED)
        browser.click("#begin")
        browser.evaluate(SIMULATED)
        browser.wait("document.querySelector('#progress').value >= 1")
        assert browser.evaluate("document.querySelector('#problem').hidden")
    assert sorted(asked.values())[-2:] == [3, 3]


def test_a_device_that_cannot_play_a_clip_is_told_so(server: StudyServer, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(bytes(5000))
    name = server.address(0, 0, "right")
    good, server.media[name] = server.media[name], damaged
    problem = "document.querySelector('#problem')"
    with Browser(tmp_path) as browser:
        browser.call("Page.navigate", url=links(server.plan, f"http://127.0.0.1:{server.server_address[1]}")[0])
        browser.wait(OPENED)
        browser.click("#begin")
        browser.wait(f"!{problem}.hidden")
        browser.evaluate(SIMULATED)
        browser.wait("document.querySelectorAll('figure.done').length === 1")  # the other clip plays
        assert browser.evaluate(f"{problem}.textContent").startswith("This device cannot play clip B. Please open")
        server.media[name] = good  # another device
        browser.call("Page.reload")
        browser.wait(OPENED)
        browser.click("#begin")
        browser.evaluate(SIMULATED)
        browser.wait("document.querySelector('#progress').value >= 1")
        assert browser.evaluate(f"{problem}.hidden")


def test_keys_jumps_and_a_second_tab(server: StudyServer, tmp_path: Path) -> None:
    played = "document.querySelectorAll('figure.done').length"
    with Browser(tmp_path) as browser:
        browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        browser.call("Page.navigate", url=links(server.plan, f"http://127.0.0.1:{server.server_address[1]}")[1])
        browser.wait(OPENED)
        browser.click("#begin")
        browser.key("ArrowLeft")  # nothing was played
        browser.wait("document.querySelector('#left video').readyState >= 2")
        # A jump to the end fires `ended`, but shows next to nothing.
        browser.evaluate(
            "new Promise((resolve) => { const one = document.querySelector('#left video'); one.onended = () => "
            "setTimeout(resolve, 200); one.currentTime = one.duration; one.play(); })"
        )
        assert browser.evaluate(played) == 0
        assert server.store.votes() == []
        browser.key("a")
        browser.wait(f"{played} === 1")
        browser.key("b")
        browser.wait(f"{played} === 2")
        # Meanwhile the same pair is answered in another tab.
        server.store.vote(1, 0, "right", time.time())
        browser.key("ArrowLeft")
        browser.wait("document.querySelector('#count').textContent === '2 of 9'")
        assert [vote.choice for vote in server.store.votes()] == ["right"]
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.errors == []


@pytest.mark.slow
def test_a_rater_does_200_pairs_and_the_server_is_killed_three_times(tmp_path: Path) -> None:
    """The default study, 200 pairs with 6 checks and 6 repeats; clips of 0.12 s, each in several pairs."""
    plan = made_study(tmp_path, clips=5, pairs=10, repeats=2, checks=6)
    listed = [pair for pair in plan.pairs if pair.opponent != DAMAGED] * 20 + plan.pairs[-6:]
    settings = replace(plan.settings, pairs=200, repeats=6)
    pools = [[k for k, pair in enumerate(listed) if pair.opponent == name] for name in plan.opponents]
    trials = assign_trials(pools, range(200, 206), settings, np.random.default_rng(0))
    write_plan(tmp_path / "study", replace(plan, settings=settings, pairs=listed, trials=trials))
    assert rate(tmp_path, tmp_path / "study", 212, (50, 100, 150)) == [
        ("left", "tie", "right")[k % 3] for k in range(1, 213)
    ]


def test_links_carry_the_public_address(template: tuple[Path, StudyPlan]) -> None:
    plan = template[1]
    assert links(plan, "https://example.org/study/")[1] == f"https://example.org/study/r/{plan.tokens[1]}"
    assert json.loads((template[0] / "plan.json").read_text())["raters"][1]["token"] == plan.tokens[1]


@pytest.mark.parametrize("url", ["mystudy.example.com/x", "https://", "ftp://host/x", ""])
def test_an_address_that_gives_no_links_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=f"url={url} gives links that cannot be clicked; begin it with https://"):
        serve_study("study", url=url)
