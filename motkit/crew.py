"""Jobs over tensor data, shared out to processes where there is much of it.

Not to threads: torch gives the interpreter's lock back and takes it again at every operator, operators on a piece of a
tensor take microseconds, and two threads that wait for one another so often are slower than one. So a large merge
forks, as torch's DataLoader does, and a small one is done in this process.
"""

import contextlib
import gc
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from motkit.errors import UserError

FORK_BYTES = 1 << 26  # less than this is done sooner than processes are started
_MOST_WORKERS = 16  # beyond, a disk is the limit
_IN_ADVANCE = 2  # jobs that a worker has at a time, so that it never waits for the next


@dataclass(frozen=True)
class _Report:
    content: bytes


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class Crew:
    """Does jobs in processes of its own, or in this one.

    Args:
        make_space: makes a worker's work space, given to each of its jobs.
        num_bytes: of data that the jobs will read.
        advance: called here with what each job returns, in any order.
        device: of the arithmetic; processes are for the CPU.
    """

    def __init__(
        self, make_space: Callable[[], Any], num_bytes: int, advance: Callable[[int], object], device: str = "cpu"
    ) -> None:
        self._make_space, self._advance = make_space, advance
        self._workers = _num_workers() if num_bytes >= FORK_BYTES and device == "cpu" else 1
        self._space: Any = None

    def run(
        self, jobs: Iterable[Any], do: Callable[[Any, Any], int], report: Callable[[], Any] = lambda: None
    ) -> tuple[int, list[Any]]:
        """Run ``do(work space, job)`` for every job.

        What ``do`` notes elsewhere stays in the process that ran it: ``report`` is called there at the end, and what it
        returns comes back.

        Args:
            jobs: taken one by one, as workers get free; small, because they are sent.
            do: returns the bytes that it has read.

        Returns:
            (the sum of what ``do`` returned, the reports).

        Raises:
            UserError: a worker was killed. What ``do`` raises is raised here.
        """
        if self._workers > 1:
            return self._run_forked(jobs, do, report)
        if self._space is None:
            self._space = self._make_space()
        total = 0
        with one_thread():
            for job in jobs:
                count = do(self._space, job)
                total += count
                self._advance(count)
        return total, [report()]

    def _run_forked(
        self, jobs: Iterable[Any], do: Callable[[Any, Any], int], report: Callable[[], Any]
    ) -> tuple[int, list[Any]]:
        waiting, total, reports = iter(jobs), 0, []
        workers: dict[Connection, int] = {}
        try:
            for _ in range(self._workers):
                ours, theirs = Pipe()
                with _uninterrupted():
                    workers[ours] = _fork(lambda end=theirs: _work(end, self._make_space, do, report), [*workers, ours])  # type: ignore[misc]
                theirs.close()
            for worker in [worker for _ in range(_IN_ADVANCE) for worker in workers]:
                _give(worker, next(waiting, None))
            busy: list[Any] = list(workers)
            while busy:
                ready: list[Any] = wait(busy)
                for worker in ready:
                    said = _hear(worker)
                    if isinstance(said, _Failed):
                        raise said.error
                    if isinstance(said, _Report):
                        reports.append(pickle.loads(said.content))
                        busy.remove(worker)
                        continue
                    total += said
                    self._advance(said)
                    _give(worker, next(waiting, None))
        finally:
            for process in workers.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            for worker, process in workers.items():
                worker.close()
                with contextlib.suppress(ChildProcessError):  # who started us ignores SIGCHLD
                    os.waitpid(process, 0)
        return total, reports


def _give(worker: Connection, job: Any) -> None:
    # A worker that has ended, with its report or a fault, has said so in what is still to be heard.
    with contextlib.suppress(ConnectionError):
        worker.send(job)


def _hear(worker: Connection) -> Any:
    try:
        return worker.recv()
    except (EOFError, ConnectionError) as error:
        raise UserError("a process of this merge was killed; is there too little memory?") from error


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits: a fork that got it before it is set up would go on as the parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _num_workers() -> int:
    """Processes to work with: as many as torch would use threads; one where a fork is not safe."""
    import torch

    return min(torch.get_num_threads(), _MOST_WORKERS) if sys.platform == "linux" else 1


def _fork(work: Callable[[], None], not_ours: Sequence[Connection]) -> int:
    """Run ``work`` in a fork of this process; returns its number. ``not_ours``: the parent's ends of pipes."""
    # The tokenizers library, where it was used in parallel, prints a warning at a fork unless told what is wanted.
    said = os.environ.get("TOKENIZERS_PARALLELISM")
    if said is None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of locks that another thread may hold. A worker runs torch's operators, on one thread,
            # and writes to its pipe.
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
    finally:
        if said is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
    if process:
        return process
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends us
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        gc.freeze()  # what is the parent's, a tensor on a GPU perhaps, is not ours to collect
        for connection in not_ours:
            connection.close()  # so that the pipes end when the parent does
        work()
        status = 0
    finally:
        os._exit(status)


def _work(
    connection: Connection, make_space: Callable[[], Any], do: Callable[[Any, Any], int], report: Callable[[], Any]
) -> None:
    """A worker's life: a job, what it read, and so on until there is None; then the report."""
    import torch

    try:
        torch.set_num_threads(1)  # also because threads do not survive a fork
        space = make_space()
        while (job := connection.recv()) is not None:
            connection.send(do(space, job))
        # Pickled here: the connection itself would send a tensor as a piece of shared memory that ends with us.
        connection.send(_Report(pickle.dumps(report())))
    except (EOFError, BrokenPipeError):  # the parent is gone
        return
    except BaseException as error:
        connection.send(_Failed(_sendable(error)))


def _sendable(error: BaseException) -> BaseException:
    """The exception with its traceback as a note; one that cannot be sent as a RuntimeError that tells all of it."""
    told = "".join(traceback.format_exception(error))
    try:
        error.add_note(f"in a process of the merge:\n{told}")
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(told)
    return error


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch's operators on this thread alone: sharing pieces as small as ours among threads costs more than it saves
    (8 ms an operator where another process holds a core)."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
