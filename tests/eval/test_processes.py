"""Items spread over processes: the same results in the same order, errors, killed processes."""

import os
import signal

import pytest

from eval import processes
from eval.processes import FEWEST, in_processes
from magihuman.errors import UserError

THIS = os.getpid()


def square(item):
    return item * item, os.getpid()


def refuse(item):
    if item == 11:
        raise ValueError(f"no {item}")


def die(item):
    if os.getpid() != THIS:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(processes, "_cores", lambda: 2)


@pytest.mark.skipif("sys.platform != 'linux'", reason="forks on Linux only")
def test_many_items_are_spread(two_cores):
    results = in_processes(square, range(3 * FEWEST))
    assert [value for value, _ in results] == [item * item for item in range(3 * FEWEST)]
    assert results[0][1] == THIS
    assert THIS not in {process for _, process in results[1:]}


def test_few_items_stay_here(two_cores):
    assert {process for _, process in in_processes(square, range(2 * FEWEST - 1))} == {THIS}


def test_number_of_threads_is_a_limit(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert {process for _, process in in_processes(square, range(3 * FEWEST))} == {THIS}


def test_errors_are_raised_here(two_cores):
    with pytest.raises(ValueError, match="no 11"):
        in_processes(refuse, range(3 * FEWEST))


@pytest.mark.skipif("sys.platform != 'linux'", reason="forks on Linux only")
def test_a_killed_process_is_said(two_cores):
    with pytest.raises(UserError, match="a process that measured clips was killed"):
        in_processes(die, range(3 * FEWEST))
