"""Jobs in processes: what comes back, what goes wrong, and that nothing outlives the parent."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from motkit.crew import Crew
from motkit.errors import UserError

CHILD = """
import os, sys, time, torch
from motkit import crew
crew.FORK_BYTES = 0
torch.set_num_threads(3)
def do(space, job):
    open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
    time.sleep(0.05)
    return 1
crew.Crew(lambda: None, 0, lambda count: None).run(iter(int, 1), do)
"""


def squares(advance=lambda count: None):
    noted = []

    def do(space, job):
        noted.append((os.getpid(), space, torch.full((2,), float(job)).square()))
        return job

    return Crew(os.getpid, 0, advance).run(range(40), do, lambda: noted)


def check_squares(total, reports):
    found = [entry for report in reports for entry in report]
    assert total == sum(range(40))
    assert sorted(int(values[0]) for _, _, values in found) == [n * n for n in range(40)]
    assert all(process == space for process, space, _ in found)
    return {process for process, _, _ in found}


def test_every_job_is_done_once_in_some_process_and_reported(forked):
    seen = []
    processes = check_squares(*squares(seen.append))
    assert sum(seen) == sum(range(40))
    assert processes
    assert os.getpid() not in processes
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_little_work_is_done_here_on_one_thread():
    threads = torch.get_num_threads()
    seen = []
    total, _ = Crew(lambda: None, 10, lambda count: seen.append(torch.get_num_threads())).run(
        [1, 2], lambda _, job: job
    )
    assert (total, seen, torch.get_num_threads()) == (3, [1, 1], threads)
    assert check_squares(*squares()) == {os.getpid()}


def test_what_a_job_raises_is_raised_here(forked):
    def do(space, job):
        if job == 17:
            raise UserError(f"job {job}: full disk")
        return job

    with pytest.raises(UserError, match="job 17: full disk"):
        Crew(lambda: None, 0, lambda count: None).run(range(100), do)


def test_a_killed_worker_is_said(forked):
    with pytest.raises(UserError, match="killed"):
        Crew(lambda: None, 0, lambda count: None).run(range(9), lambda _, job: os.kill(os.getpid(), signal.SIGKILL))


def test_a_slow_parent_loses_nothing(forked):
    """A worker that has nothing left to do ends while the parent is busy with something else."""
    for num_jobs in (0, 1, 4, 9):
        done, _ = Crew(lambda: None, 0, lambda count: time.sleep(0.01)).run(range(num_jobs), lambda _, job: job)
        assert done == sum(range(num_jobs))

    def slowly():
        for job in range(20):
            time.sleep(0.03)
            yield job

    def do(space, job):
        raise UserError(f"job {job} fails at once")

    with pytest.raises(UserError, match="fails at once"):
        Crew(lambda: None, 0, lambda count: None).run(slowly(), do)


def test_a_bug_in_a_worker_shows_itself(forked):
    class Local(Exception):
        pass

    def do(space, job):
        if job == 1:
            raise Local("cannot be pickled")
        raise KeyError("can be")

    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in do.*Local: cannot be pickled"):
        Crew(lambda: None, 0, lambda count: None).run([1], do)
    with pytest.raises(KeyError) as caught:
        Crew(lambda: None, 0, lambda count: None).run([2], do)
    assert "in do" in caught.value.__notes__[0]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_workers_do_not_outlive_their_parent(signal_number, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path], stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    wait_until(lambda: len(list(tmp_path.iterdir())) == 3)
    workers = [int(file.name) for file in tmp_path.iterdir()]
    assert parent.pid not in workers
    parent.send_signal(signal_number)
    assert parent.wait(20) != 0
    wait_until(lambda: not any(map(is_alive, workers)))


def is_alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
