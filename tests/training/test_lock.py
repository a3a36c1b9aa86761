"""The lock of a run folder: refused while its holder lives, broken by rule when it is dead."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from magihuman.errors import UserError
from magihuman.training import lock
from magihuman.training.lock import LOCK, RunLock, holder, start_time, state_of

DEAD_PID = 2**22 + 5  # above the largest pid


def write_lock(folder: Path, age: float = 0.0, **fields: object) -> None:
    """A lock of another process, touched `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "host": "elsewhere", "kernel": "another", "pid": 7, "started": "1", "job": None, "restarts": 0,
        "since": "yesterday", "nonce": "f00d",
    }  # fmt: skip
    (folder / LOCK).write_text(json.dumps({**content, **fields}))
    os.utime(folder / LOCK, (time.time() - age,) * 2)


def is_broken(folder: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether a new training takes the folder, and says so."""
    try:
        with RunLock(folder) as mine:
            assert mine.held
            assert holder(folder)["nonce"] == mine.content["nonce"]
    except UserError:
        assert holder(folder)["nonce"] == "f00d"
        return False
    assert "the lock is broken" in capsys.readouterr().out
    assert not (folder / LOCK).exists()
    return True


def test_a_second_training_is_refused_and_told_who_holds_the_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    with RunLock(tmp_path / "a") as mine:
        since = mine.content["since"]
        with pytest.raises(UserError) as refused, RunLock(tmp_path / "a"):
            pass
        assert str(refused.value) == (
            f"{tmp_path}/a is in use by process {os.getpid()} on {platform.node()}, Slurm job 17, since {since}; wait for it "
            f"or end it, or choose another name= (if it is certainly dead, remove {tmp_path}/a/{LOCK})"
        )
        assert (tmp_path / "a" / LOCK).exists()
    assert not (tmp_path / "a").exists()  # nothing was begun in it


def test_on_this_kernel_the_process_decides(tmp_path, capsys) -> None:
    here = {"kernel": lock.this_kernel(), "host": platform.node()}
    write_lock(tmp_path, **here, pid=os.getpid(), started=start_time(os.getpid()))
    assert not is_broken(tmp_path, capsys)
    write_lock(
        tmp_path, age=1e6, **here, pid=os.getpid(), started=start_time(os.getpid())
    )  # stopped, or a laptop that slept
    assert not is_broken(tmp_path, capsys)
    write_lock(tmp_path, **here, pid=os.getpid(), started="1")  # the pid was given to another process
    assert is_broken(tmp_path, capsys)
    write_lock(tmp_path, **here, pid=DEAD_PID)
    assert is_broken(tmp_path, capsys)


@pytest.mark.parametrize(
    ("host", "age", "broken"),
    [("elsewhere", 200, False), ("elsewhere", 310, True), ("here", 60, False), ("here", 130, True)],
)
def test_elsewhere_the_time_since_the_last_touch_decides(tmp_path, capsys, host, age, broken) -> None:
    """Of a machine of the same name, such as this one before a reboot or another container, sooner."""
    write_lock(tmp_path, age, host=platform.node() if host == "here" else host, pid=os.getpid())
    assert is_broken(tmp_path, capsys) == broken


def test_the_time_is_the_disks(tmp_path, capsys, monkeypatch) -> None:
    write_lock(tmp_path, 60)
    monkeypatch.setattr(time, "time", lambda: 1e12)  # this machine's clock is wrong
    assert not is_broken(tmp_path, capsys)


def test_a_requeued_job_breaks_its_own_lock_at_once(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    write_lock(tmp_path, job="16_3")
    assert not is_broken(tmp_path, capsys)  # two commands of one job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_broken(tmp_path, capsys)
    write_lock(tmp_path, job="16_4")
    assert not is_broken(tmp_path, capsys)


def test_other_processes_of_a_job_refuse_a_folder_of_another_job(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    write_lock(tmp_path, job="17")
    with RunLock(tmp_path, main=False) as mine:
        assert not mine.held
    write_lock(tmp_path, job="18")
    with (
        pytest.raises(UserError, match="in use by process 7 on elsewhere, Slurm job 18"),
        RunLock(tmp_path, main=False),
    ):
        pass


def test_a_lock_that_was_left_empty_ages_like_another_machines(tmp_path, capsys) -> None:
    (tmp_path / LOCK).touch()
    with pytest.raises(UserError, match="a process that is just starting"), RunLock(tmp_path):
        pass
    os.utime(tmp_path / LOCK, (time.time() - 310,) * 2)
    assert is_broken(tmp_path, capsys)


def test_of_many_breakers_one_wins(tmp_path) -> None:
    for attempt in range(20):
        folder, held, refused = tmp_path / str(attempt), [], []
        write_lock(folder, kernel=lock.this_kernel(), pid=DEAD_PID)
        together = threading.Barrier(4)

        def take(folder=folder, held=held, refused=refused, together=together) -> None:
            mine = RunLock(folder)
            together.wait()
            try:
                mine.__enter__()
                held.append(mine)
            except UserError:
                refused.append(mine)

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(held), len(refused)) == (1, 3)
        held[0].release()


def test_the_lock_is_touched_made_again_and_not_shared(tmp_path, monkeypatch) -> None:
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with RunLock(tmp_path) as mine:
        os.utime(tmp_path / LOCK, (0, 0))
        mine.beat()
        assert abs((tmp_path / LOCK).stat().st_mtime - time.time()) < 60
        (tmp_path / LOCK).unlink()  # somebody tidied up
        mine.beat()
        assert holder(tmp_path)["nonce"] == mine.content["nonce"]
        assert left == []
        write_lock(tmp_path)  # this process slept, and another took the folder
        mine.beat()
        assert left == [2]
    assert holder(tmp_path)["nonce"] == "f00d"  # not this process's to remove


def test_a_killed_process_leaves_a_lost_run(tmp_path) -> None:
    (tmp_path / "run.json").write_text('{"status": "running"}')
    code = f"""
import time
from magihuman.training.lock import RunLock
with RunLock({str(tmp_path)!r}):
    print(flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    assert state_of(tmp_path) == "running"
    process.kill()
    process.wait()
    assert state_of(tmp_path) == "lost"
    assert (tmp_path / LOCK).exists()


def test_states_for_tables(tmp_path) -> None:
    assert state_of(tmp_path) is None
    for status in ("queued", "preempted", "failed", "interrupted", "finished"):
        (tmp_path / "run.json").write_text(json.dumps({"status": status}))
        assert state_of(tmp_path) == status
    (tmp_path / "run.json").write_text("{")
    assert state_of(tmp_path) == "damaged"
    (tmp_path / "run.json").write_text('{"status": "running"}')
    assert state_of(tmp_path) == "lost"
    write_lock(tmp_path, 60)
    started = time.process_time()
    assert {state_of(tmp_path) for _ in range(500)} == {"running"}
    assert time.process_time() - started < 1.0


def test_readers_need_no_torch() -> None:
    code = "import magihuman.training.lock, magihuman.training.runs, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
