"""Trials in as many processes as there are cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from .runner import run
from .trials import Study, Trial


def results(study: Study, trials: Sequence[Trial], jobs: int) -> Generator[dict[str, Any], None, None]:
    """The line of each trial, as soon as it is there. Closed early, by Ctrl-C say, it leaves no process behind."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_end_with_parent) as pool:
        # Ctrl-C in a terminal reaches every process: new ones inherit that it is ignored, and this one ends them.
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            running = [pool.submit(run, study, trial) for trial in trials]
        finally:
            signal.signal(signal.SIGINT, former)
        try:
            for done in as_completed(running):
                yield done.result()
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.kill()
            raise


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
