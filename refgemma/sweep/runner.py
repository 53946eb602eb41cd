"""Run many checks in processes of this machine or on the workers of a Dask cluster.

Checked in the tests: one worker, two workers and a cluster write the same report, byte for byte. A killed worker loses
nothing, and finished jobs are not computed again.

The result of a job is stored under its key, in a file that appears complete or not at all. So an interrupted sweep
continues where it stopped, and a job whose input or program has changed is computed again.
"""

import hashlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from refgemma.errors import RefgemmaError, UsageError
from refgemma.files import read_object, replace_file, write_json
from refgemma.oracle.verdicts import EXIT, FAILED, LOST, UNREADABLE
from refgemma.sweep.jobs import KEPT, Done, Job, fail, perform
from refgemma.sweep.tally import Tally, merge_tallies
from refgemma.trace.names import AXES

TRIES = 3  # attempts for a job that kills its worker
ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

Pool = Callable[[int], AbstractContextManager[Executor]]
"""A function that makes an executor with the given number of workers."""


@contextmanager
def processes(workers: int) -> Iterator[Executor]:
    """Start processes on this machine, each with one thread, so that sums do not depend on the number of threads."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    theirs, ours = Pipe(duplex=False)  # the system closes the pipe whenever this process ends
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), _follow, (theirs,)) as pool:
            try:
                yield pool
            except BaseException:
                ours.close()  # do not wait for running jobs
                raise
    finally:
        ours.close()
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


@contextmanager
def hold_signals() -> Iterator[None]:
    """Delay SIGINT and SIGTERM to the end of this block, in which a worker starts.

    A worker prints a traceback if it loses its parent while starting, or gets the terminal's SIGINT while importing. So
    it inherits a mask that blocks SIGINT; `_follow` removes the mask.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived = list[int]()
    handled = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, frame: arrived.append(number)) for number in handled}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # delayed signals arrive here
        for number, handler in before.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _follow(parent: Connection) -> None:
    """End this worker and its command when the parent's end of the pipe closes."""
    os.setpgid(0, 0)  # a new group with the command, which the terminal's Ctrl-C does not reach
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # also discards an earlier SIGINT
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def end() -> None:
        with suppress(EOFError, OSError):
            parent.recv()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()


@contextmanager
def cluster(address: str) -> Iterator[tuple[Pool, int]]:
    """Yield the workers of a Dask cluster as a pool, and the number of jobs that keeps them busy.

    Raises
    ------
    UsageError
        If dask.distributed is not installed, or no scheduler answers.
    RefgemmaError
        If the scheduler ends before the work.
    """
    try:
        from distributed import Client
        from distributed.utils import silence_logging_cmgr
    except ImportError:
        raise UsageError('--scheduler needs dask.distributed: pip install "refgemma[cluster]"') from None
    try:
        client = Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"--scheduler {address}: no scheduler answers ({error})") from None
    with silence_logging_cmgr("CRITICAL"), client:  # otherwise it prints tracebacks when the scheduler ends
        threads = sum(client.nthreads().values())
        if not threads:
            raise UsageError(f"--scheduler {address}: the scheduler has no workers; start some")
        try:
            yield (lambda workers: nullcontext(client.get_executor(pure=False))), 2 * threads
        except Exception as error:
            if client.status == "running" and not isinstance(error, CancelledError):
                raise
            raise RefgemmaError(
                f"--scheduler {address}: the scheduler ended before all jobs were done; start another and run the "
                "same command again to continue"
            ) from None


def is_lost_worker(error: BaseException) -> bool:
    """Return True if an exception means that a worker died, in a pool or a cluster."""
    return isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker"


def submit(job: Job, workers: Executor) -> Future[Done]:
    """Submit a job to the workers; this may start a worker."""
    with hold_signals():
        return workers.submit(perform, job)


def run_jobs(jobs: Sequence[Job], pool: Pool, width: int) -> Iterator[tuple[Job, Done]]:
    """Yield each job with its result as soon as it is finished.

    If a worker dies, the running jobs are repeated in a new pool, one at a time. This finds the job that killed the
    worker, without affecting the others. At most `width` jobs run at once.
    """
    waiting, suspects = deque(jobs), list[Job]()
    while waiting:
        with pool(width) as workers:
            running: dict[Future[Done], Job] = {}
            whole = True
            while running or (waiting and whole):
                while waiting and whole and len(running) < width:
                    try:
                        running[submit(waiting[0], workers)] = waiting[0]
                        waiting.popleft()
                    except BrokenExecutor:
                        whole = False
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    job, error = running.pop(future), future.exception()
                    if error is None:
                        yield job, future.result()
                    elif is_lost_worker(error):
                        suspects.append(job)
                        whole = False
                    else:
                        raise error
    for job in suspects:
        yield job, _run_alone(job, pool)


def _run_alone(job: Job, pool: Pool) -> Done:
    for _ in range(TRIES):
        with pool(1) as workers:
            try:
                return submit(job, workers).result()
            except Exception as error:
                if not is_lost_worker(error):
                    raise
    return fail(LOST, f"the worker died {TRIES} times; see its output for the reason")


def sweep(
    jobs: Sequence[Job], results: Path, pool: Pool, width: int, again: bool = False
) -> Iterator[tuple[Job, Done]]:
    """Yield each job with its result: stored results first, then new results when they are finished.

    Parameters
    ----------
    jobs : sequence of Job
        The jobs, from `read_jobs`.
    results : Path
        A folder for results, by key.
    pool : callable
        Function that makes an executor; see `processes` and `cluster`.
    width : int
        The number of jobs that run at once.
    again : bool
        If true, repeat finished jobs.
    """
    results.mkdir(parents=True, exist_ok=True)
    kept = {} if again else {job.key: found for job in jobs if (found := _read_result(results, job)) is not None}
    yield from ((job, kept[job.key]) for job in jobs if job.key in kept)
    for job, done in run_jobs([job for job in jobs if job.key not in kept], pool, width):
        if done["verdict"] not in (UNREADABLE, FAILED, LOST):  # such jobs are tried again the next time
            replace_file(results / f"{job.key}.json", write_json(done | {"digest": _digest(done)}).encode())
        yield job, done


def _read_result(results: Path, job: Job) -> Done | None:
    try:
        found = read_object(results / f"{job.key}.json", RefgemmaError)
    except RefgemmaError:
        return None
    whole = found.pop("digest", None) == _digest(found)  # if another program changed a result, compute it again
    return found if whole and found.get("schema") == KEPT else None


def _digest(result: Mapping[str, Any]) -> str:
    return hashlib.sha256(write_json(result).encode()).hexdigest()


# --- the report -------------------------------------------------------------------------------------------------------


def as_json(found: Sequence[tuple[Job, Done]]) -> dict[str, Any]:
    """Combine all results, in the order of the jobs' names."""
    ordered = sorted(found, key=lambda pair: (pair[0].name, pair[0].key))
    verdicts = {done["verdict"] for _, done in ordered}
    verdict = next(v for v in EXIT if v in verdicts)
    groups: dict[tuple[str, str], list[Tally]] = {}
    for job, done in ordered:
        for kind, kept in done["tensors"].items():
            t = Tally.from_json(kept)
            groups.setdefault((done["dtype"], kind), []).append(replace(t, at=f"{job.name}: {t.at}"))
    totals = {group: merge_tallies(tallies) for group, tallies in groups.items()}
    seen = {name for _, done in ordered for name in done["found"]}
    excluded = {name for _, done in ordered for name in done["excluded"]} - seen
    blind = {name for _, done in ordered for name in done["blind"]} - seen - excluded
    return {
        "schema": "refgemma-sweep/1", "verdict": verdict, "exit_code": EXIT[verdict],
        "counts": {v: n for v in EXIT if (n := sum(done["verdict"] == v for _, done in ordered))},
        "jobs": [{"name": job.name, "key": job.key, **{k: done[k] for k in (
            "verdict", "first_divergence", "named", "dtype", "message")}} for job, done in ordered],
        "tensors": [
            {"dtype": dtype, "tensor": kind} | total.as_json() | {"rms": total.rms}
            for (dtype, kind), total in sorted(totals.items(), key=lambda one: (one[0][0], [*AXES].index(one[0][1])))
        ],
        "found": sorted(seen), "excluded": sorted(excluded), "blind": sorted(blind),
    }  # fmt: skip
