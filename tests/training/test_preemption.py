"""Signals at every stage of a training: it is recorded, requeued, and ends as one that ran through."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import training_stub
from free_port import free_port
from one_process import Processes, assert_same_training

from magihuman import preemption, train
from magihuman.errors import UserError
from magihuman.io.files import CONFIGS
from magihuman.training.lock import LOCK, RunLock, state_of
from magihuman.training.runs import RunFolder

EVALUATIONS = (
    "after_fit={first: {_target_: training_stub.evaluate_slowly, file: %s/first, wait: %s}, "
    "second: {_target_: training_stub.evaluate_slowly, file: %s/second, wait: %s}}"
)


def write_scontrol(folder: Path, facts: str = "JobState=RUNNING BatchFlag=1 Reason=None", requeue: str = "") -> Path:
    """A stand-in for scontrol that answers `show` with these facts and writes down what it is asked; returns that file."""
    folder.mkdir(parents=True, exist_ok=True)
    tool = folder / "scontrol"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\n'
        f'if [ "$1" = show ]; then echo "JobId=17 {facts} Command=x"; else {requeue or ":"}; fi\n'
    )
    tool.chmod(0o755)
    return folder / "asked"


def wait_for(condition, alive, seconds: float = 300.0) -> None:
    """Until the condition holds; a process that ends before is a failure."""
    until = time.monotonic() + seconds
    while not condition():
        assert alive()
        assert time.monotonic() < until
        time.sleep(0.01)


def evaluations(folder: Path, first: bool = False, second: bool = False) -> str:
    return EVALUATIONS % (folder, str(first).lower(), folder, str(second).lower())


@pytest.fixture(scope="module")
def processes(shards) -> Processes:
    return Processes(shards)


@pytest.fixture(scope="module")
def reference(processes, tmp_path_factory) -> Path:
    """An unbroken run."""
    folder = tmp_path_factory.mktemp("runs") / "through"
    assert processes.run(folder) == 0
    return folder


STAGES = ["first", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("data", "export", "second"))]


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_at_any_stage_is_recorded_and_requeued_and_changes_nothing(
    processes, reference, tmp_path, stage
) -> None:
    asked = write_scontrol(tmp_path / "bin")
    slurm = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "job",
        "SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": "0",
    }  # fmt: skip
    folder, reached = tmp_path / "run", tmp_path / stage
    overrides = [evaluations(tmp_path, stage == "first", stage == "second")]
    if stage == "data":
        make = f"{{_target_: training_stub.make_slowly, file: {reached}, shards: {processes.shards}}}"
        overrides += [f"++data.make={make}", "~data.module.shards"]
    if stage == "export":
        overrides.append(f"+callbacks.slow={{_target_: training_stub.SlowExport, file: {reached}}}")
    process = processes.start(folder, *overrides, **slurm)
    wait_for(reached.exists, process.is_alive)
    assert (folder / LOCK).exists()
    os.kill(process.pid, signal.SIGUSR1)
    process.join(300)
    assert process.exitcode == preemption.STOPPED
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["stage"], record["requeue"]) == ("preempted", stage, "accepted")
    assert (record["job"], record["restarts"], record["starts"]) == ("16_3", 0, 1)
    assert asked.read_text().splitlines()[-1] == "requeue 16_3"
    assert not (folder / LOCK).exists()

    assert processes.run(folder, *overrides, SLURM_RESTART_COUNT="1", **slurm) == 0
    assert_same_training(folder, reference)
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["stage"], record["restarts"], record["starts"]) == ("finished", None, 1, 2)
    assert "requeue" not in record
    # What was interrupted is done again; what had finished before is not.
    calls = {name: len((tmp_path / name).read_text().splitlines()) for name in ("first", "second")}
    assert calls == {"first": 2 if stage == "first" else 1, "second": 2 if stage == "second" else 1}
    assert record["results"]["first"] == {"calls": calls["first"]}


def two_processes(rank: int) -> dict[str, str]:
    """Variables of a launcher for one of two processes."""
    return {"WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "TEST_GRACE": "2"}


@pytest.mark.slow
def test_a_signal_to_one_process_of_two_while_the_other_waits_for_it(processes, tmp_path) -> None:
    """Process 0 waits for process 1 in C code, and nobody signals it."""
    reached, folder = tmp_path / "data", tmp_path / "run"
    make = f"{{_target_: training_stub.make_slowly, file: {reached}, shards: {processes.shards}, rank: 1}}"
    overrides = [f"++data.make={make}", "~data.module.shards", "trainer.devices=2", "strategy=ddp"]
    overrides += ["data.module.batch_size=4"]
    port = str(free_port())
    both = [processes.start(folder, *overrides, MASTER_PORT=port, **two_processes(rank)) for rank in (0, 1)]

    def waiting() -> bool:
        return reached.exists() and RunFolder(folder).read().get("stage") == "training"

    wait_for(waiting, both[0].is_alive)
    os.kill(both[1].pid, signal.SIGUSR1)
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [preemption.STOPPED] * 2
    record = RunFolder(folder).read()
    assert (record["status"], record["stage"]) == ("preempted", "training")
    assert not (folder / LOCK).exists()


@pytest.mark.slow
def test_signals_and_kills_of_processes_that_the_training_starts_itself(shards, tmp_path) -> None:
    """A signal to the second process alone stops both; the second ends with the first, which then continues."""
    folder, support = tmp_path / "run", CONFIGS.parent / "tests" / "support"
    words = [*training_stub.SMALL, "+recipe=pretrain", f"folder={folder}", f"data.module.shards={shards}"]
    words += [
        "trainer.devices=2",
        "strategy=ddp",
        "data.module.batch_size=4",
        "trainer.max_steps=2000",
        "trainer.log_every=1",
    ]
    command = [
        sys.executable,
        "-m",
        "magihuman.train",
        *words,
        "+callbacks.slow={_target_: training_stub.DieAt, delay: 0.05}",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{CONFIGS.parent}:{support}", "OMP_NUM_THREADS": "1"}

    def start() -> tuple[subprocess.Popen, int]:
        """The first process, and the id of the second, when a step is done."""
        (folder / "metrics.csv").unlink(missing_ok=True)
        first = subprocess.Popen(command, cwd=CONFIGS.parent, env=environment)
        wait_for((folder / "metrics.csv").exists, lambda: first.poll() is None)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        (second,) = [int(pid) for pid in children if b"magihuman.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return first, second

    first, second = start()
    os.kill(second, signal.SIGUSR1)
    assert first.wait(300) == preemption.STOPPED
    assert RunFolder(folder).read()["status"] == "preempted"
    first, second = start()
    first.kill()
    first.wait()
    wait_for(lambda: not Path(f"/proc/{second}").exists(), lambda: True)
    assert state_of(folder) == "lost"


def test_a_signal_in_the_first_moments_requeues_before_anything_begins(tmp_path) -> None:
    asked = write_scontrol(tmp_path / "bin")
    environment = {
        **os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SLURM_PROCID": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "magihuman.train", "+recipe=pretrain", f"folder={tmp_path}/run"]
    process = subprocess.Popen(command, cwd=CONFIGS.parent, env=environment, stderr=subprocess.PIPE, text=True)

    def handled() -> bool:
        text = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(next(line.split()[1] for line in text.splitlines() if line.startswith("SigCgt")), 16)
        return bool(caught >> (signal.SIGUSR1 - 1) & 1)

    wait_for(handled, lambda: process.poll() is None)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == preemption.STOPPED, errors
    assert "SIGUSR1: stopped before the training began; Slurm job 17 is requeued" in errors
    assert asked.read_text().splitlines()[-1] == "requeue 17"


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A function that puts a stand-in for scontrol in the path, and the environment of job 17."""
    for variable in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_PROCID", "RANK", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return lambda **answers: write_scontrol(tmp_path / "bin", **answers)


def test_requeue_asks_slurm_for_this_job(slurm, monkeypatch) -> None:
    asked = slurm()
    assert preemption.requeue() == "accepted"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert preemption.requeue() == "accepted"
    assert [line for line in asked.read_text().splitlines() if "requeue" in line] == ["requeue 17", "requeue 16_4"]
    assert preemption.told("accepted") == "Slurm job 16_4 is requeued"
    assert preemption.requeue("no progress") == "held: no progress"
    assert asked.read_text().splitlines()[-1] == "requeuehold 16_4"


def test_why_a_job_is_not_requeued(slurm, monkeypatch) -> None:
    slurm(requeue="echo 'Requested operation is presently disabled for job 17' >&2; exit 1")
    assert preemption.requeue() == "Requested operation is presently disabled for job 17"
    slurm(facts="JobState=RUNNING BatchFlag=0")
    assert "interactive job" in preemption.requeue()
    # As Slurm 21.08 answers while a signal is handled.
    asked = slurm(facts="JobState=COMPLETING Reason=None Requeue=1 Restarts=0 BatchFlag=1")
    assert preemption.requeue() == "the job is being cancelled"  # by scancel; it would start again
    slurm(facts="JobState=COMPLETING Reason=None Requeue=1 Restarts=1 BatchFlag=1")
    assert preemption.requeue() == "accepted"  # Slurm requeues it already
    assert "requeue 17" not in asked.read_text().splitlines()[-2:]
    slurm(facts="JobState=COMPLETING BatchFlag=1 Reason=TimeLimit")
    assert preemption.requeue() == "accepted"
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert preemption.requeue() == "left to the main process"
    monkeypatch.delenv("SLURM_PROCID")
    monkeypatch.setenv("PATH", "/nowhere")
    assert preemption.requeue().startswith("scontrol: ")
    monkeypatch.delenv("SLURM_JOB_ID")
    assert preemption.requeue() == "not a Slurm job"
    assert preemption.told("not a Slurm job") == "not requeued (not a Slurm job)"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """A process that has installed the handlers with a grace of half a second."""
    head = "import os, signal, time, threading\nfrom magihuman import preemption\n"
    head += "preemption.GRACE = 0.5\npreemption.install()\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=300)


def test_a_main_thread_that_does_not_come_back_is_ended_and_recorded() -> None:
    """As in a rendezvous whose partner has gone: no handler of Python can run."""
    code = """
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
never = threading.Lock()
never.acquire()
def hang():  # a destructor, in which the exception is lost, and a wait in C without the interpreter's lock
    while True: never.acquire(timeout=60)
class Swallows:
    def __del__(self): hang()
with preemption.recorded(lambda reason: print("recorded", reason, flush=True)):
    while True: Swallows()
"""
    result = run_python(code)
    assert (result.returncode, result.stdout) == (preemption.STOPPED, "recorded SIGTERM\n"), result.stderr


def test_in_deferred_a_signal_sets_a_flag_however_long_it_takes() -> None:
    code = """
with preemption.recorded(lambda reason: print("recorded", reason)):
    try:
        with preemption.deferred(lambda number: print("noted", number, flush=True)):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1.5)  # longer than the grace
            print("saved", preemption.received(), flush=True)
            os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
        preemption.check()
    except preemption.Preempted as signal_:
        preemption.leave(str(signal_))
        preemption.leave(str(signal_))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["noted 10", "saved SIGUSR1", "recorded SIGUSR1"]


def test_a_process_that_leaves_wakes_the_main_process(tmp_path) -> None:
    """Signals may reach one process of a job only."""
    code = f"""
from pathlib import Path
def record(reason): print("recorded", reason, "|", preemption.left_by_another(), flush=True)
with preemption.recorded(record, Path({str(tmp_path)!r})):
    threading.Timer(0.2, lambda: preemption.tell_main_process(Path({str(tmp_path)!r}), "SIGTERM")).start()
    try: time.sleep(60)
    except preemption.Preempted as signal_: preemption.leave(str(signal_))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("recorded SIGUSR1 | SIGTERM to process ")


def test_forked_workers_end_by_sigterm_and_ignore_sigusr1() -> None:
    code = """
with preemption.recorded(lambda reason: print("recorded", flush=True)):
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), preemption.received())
"""
    result = run_python(code)
    assert (result.returncode, result.stdout) == (0, "-15 None\n"), result.stderr


def test_after_the_end_signals_change_nothing() -> None:
    code = """
with preemption.recorded(lambda reason: print("recorded", flush=True)):
    pass
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(1.0)
print("done")
"""
    result = run_python(code)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_a_signal_while_the_job_is_requeued_does_not_stop_that() -> None:
    code = """
def record(reason):
    os.kill(os.getpid(), signal.SIGUSR1)  # by the thread that notices another process's end
    time.sleep(0.2)
    print("recorded", flush=True)
with preemption.recorded(record):
    preemption.leave("SIGTERM")
"""
    result = run_python(code)
    assert (result.returncode, result.stdout) == (0, "recorded\n"), result.stderr


def test_a_failed_training_whose_loggers_are_closed_is_not_requeued(tmp_path) -> None:
    code = f"""
from pathlib import Path
from types import SimpleNamespace
from magihuman import train
def stages(node, text, run, settings, branching, closing):
    run.update(status="running")
    closing.callback(lambda: (os.kill(os.getpid(), signal.SIGUSR1), time.sleep(0.2)))
    raise ValueError("broken")
train.stages, preemption.requeue = stages, lambda: print("requeued", flush=True) or "accepted"
try:
    train.train({{}}, "{{}}", Path({str(tmp_path)!r}), SimpleNamespace(resume="auto", trainer=SimpleNamespace(max_steps=1)))
except ValueError as error:
    print(error)
"""
    result = run_python(code)
    assert (result.returncode, result.stdout) == (0, "broken\n"), result.stderr
    assert RunFolder(tmp_path).read()["status"] == "failed"


def test_the_record_comes_before_the_requeue_and_names_what_continues(slurm, monkeypatch, tmp_path, capsys) -> None:
    asked = slurm()
    run, settings = RunFolder(tmp_path / "run"), SimpleNamespace(resume="auto")
    with RunLock(run.path) as lock:
        run.stage = "training"
        run.update(status="running", steps=7)
        order = []

        def requeue(hold: str = "") -> str:
            order.append(hold or run.read()["status"])
            return f"held: {hold}" if hold else "accepted"

        monkeypatch.setattr(preemption, "requeue", requeue)
        train.stopped(run, lock, settings, "SIGUSR1")
        assert not lock.held  # the requeued job may start at once
    assert order == ["preempted"]  # Slurm may end the job at once
    assert run.read()["requeue"] == "accepted"
    assert capsys.readouterr().out == (
        f"stopped by SIGUSR1 after step 7; Slurm job 17 is requeued; the same command with folder={run.path} continues; with "
        "trainer.max_steps=7 after_fit=null too, it exports what there is, to sample from\n"
    )
    # Without progress it is held, and not requeued for ever.
    for _ in range(train.MAX_STOPS):
        with RunLock(run.path) as lock:
            train.stopped(run, lock, settings, "SIGUSR1")
    told = "5 starts in a row were stopped in training without progress; give it more time"
    assert order == [*["preempted"] * 4, told, "preempted"]  # the sixth, which a person has released
    assert f"Slurm job 17 is requeued and held: {told}; scontrol release 17 starts it again" in capsys.readouterr().out
    run.update(steps=8)
    for _ in range(train.MAX_STOPS - 1):
        with RunLock(run.path) as lock:
            train.stopped(run, lock, settings, "SIGUSR1")
    assert order[6:] == ["preempted"] * 4
    capsys.readouterr()
    del order[1:]
    # What would be refused is not asked for.
    (run.path / "metrics.csv").write_text("step\n")
    train.stopped(run, lock, SimpleNamespace(resume="none"), "SIGTERM")
    assert len(order) == 1
    assert "not requeued (resume=none would refuse to continue; give the command without it)" in capsys.readouterr().out
    # Other processes leave it to the main one.
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.delenv("MAGIHUMAN_RUN", raising=False)
    train.stopped(run, lock, settings, "SIGTERM")
    assert (run.path / preemption.MARKER).read_text().startswith("SIGTERM to process ")
    assert len(order) == 1
    assert not asked.exists()


def test_a_queued_run_is_no_training_yet_and_run_json_follows_it(shards, tmp_path) -> None:
    run = RunFolder(tmp_path)
    run.update(status="queued", sweep="rates", wandb="abc")
    training_stub.train_here(tmp_path, shards, ["+recipe=pretrain", "resume=none"])
    record = run.read()
    assert (record["status"], record["stage"], record["sweep"], record["wandb"]) == ("finished", None, "rates", "abc")
    assert (record["host"], record["pid"], record["job"]) == (os.uname().nodename, os.getpid(), None)
    assert record["progress"].keys() == {"step", "max_steps", "seconds_left", "time"}
    assert (record["progress"]["step"], record["progress"]["max_steps"], record["progress"]["seconds_left"]) == (
        3,
        3,
        0.0,
    )
    with pytest.raises(UserError, match="holds a training already"):
        training_stub.train_here(tmp_path, shards, ["+recipe=pretrain", "resume=none"])


def test_a_folder_in_use_is_refused_and_left_alone(shards, tmp_path) -> None:
    run = RunFolder(tmp_path)
    run.update(status="running", starts=1)
    before = (tmp_path / "run.json").read_bytes()
    with RunLock(tmp_path), pytest.raises(UserError, match="is in use by process"):
        training_stub.train_here(tmp_path, shards, ["+recipe=pretrain"])
    assert (tmp_path / "run.json").read_bytes() == before


def test_an_error_before_anything_begins_leaves_no_folder_but_ends_a_queued_run(shards, tmp_path) -> None:
    wrong = ["+recipe=pretrain", "init=nowhere"]
    with pytest.raises(UserError, match="init=nowhere"):
        training_stub.train_here(tmp_path / "run", shards, wrong)
    assert not (tmp_path / "run").exists()
    RunFolder(tmp_path / "run").update(status="queued")
    with pytest.raises(UserError, match="init=nowhere"):
        training_stub.train_here(tmp_path / "run", shards, wrong)
    assert RunFolder(tmp_path / "run").read()["status"] == "failed"
