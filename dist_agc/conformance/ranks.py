"""What the ranks of a check tell each other beside their collectives, so that one that fails leaves none waiting."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from threading import Event, Lock, Thread
from typing import NoReturn, TypeVar

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")

GRACE = 10.0  # seconds that a rank has to come back once another has failed
PATIENCE = timedelta(seconds=300)  # of those that came back, for the others
STUCK = "waits in a collective to which others do not come"


class NotSetUp(Exception):
    """What the check itself has to say of a model that it cannot bring under a layout."""


class Failed(Exception):
    """At least one rank failed, ``rank`` first. ``everywhere``: all of them did, each by itself.

    ``setting_up``: before AGC was asked for anything.
    """

    def __init__(self, texts: list[str], rank: int, setting_up: bool) -> None:
        self.rank, self.everywhere = rank, all(text not in ("", STUCK) for text in texts)
        self.setting_up = setting_up
        same = self.everywhere and len(set(texts)) == 1
        super().__init__(texts[rank] if same else f"rank {rank}: {texts[rank]}")


class Ranks:
    """The ranks of the default process group, with a store of their own: no collective can hold it up.

    Args:
        last_words: called on rank 0, in any thread, before all ranks exit with code 1: some failed, and others may
            wait for them in a collective, which nothing can end.
    """

    def __init__(self, last_words: Callable[[Failed], None]) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._last_words = last_words
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")  # of rank 0, to every launcher
        port: list[int] = [0]
        if self.rank == 0:
            self._server = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port = [self._server.port]
        dist.broadcast_object_list(port)
        # One for each thread: a client that waits lets nobody else use it.
        self._store, self._watched = (TCPStore(host, port[0], is_master=False, timeout=PATIENCE) for _ in range(2))
        self._meetings = 0

    def gather(self, text: str) -> list[str]:
        """What every rank says, in the order of ranks. All must call it."""
        self._meetings += 1
        return self._hear(self._store, self._meetings, text)

    def each(self, call: Callable[[], T], *, setting_up: bool = False, together: bool = True) -> T:
        """What ``call`` gives here, once it has come back on every rank. It may call nothing of this object.

        Where it fails on some ranks alone, and has collectives (``together``), the others may be out of step from then
        on: the run ends on all of them. ``setting_up``: it is no work of AGC, and what failed says so.

        Raises:
            Failed: on every rank, where it raised on any.
        """
        self._meetings += 1
        meeting, turn = self._meetings, Lock()  # taken for good by the thread that speaks for this rank
        over = Event()
        watcher = Thread(target=self._watch, args=(meeting, turn, over, setting_up), daemon=True)
        watcher.start()
        result, said = None, ""
        try:
            result = call()
        except (Exception, SystemExit) as error:
            said = str(error) if isinstance(error, NotSetUp) else f"{type(error).__name__}: {error}"
            self._store.compare_set(f"{meeting}/failed", "", str(self.rank))  # the first alone
        turn.acquire()
        over.set()
        watcher.join()  # a thread inside of the store while Python ends would abort the process
        texts = self._hear(self._store, meeting, said)
        if any(texts):
            self._fail(self._store, meeting, texts, setting_up, together)
        return result  # type: ignore[return-value]

    def _watch(self, meeting: int, turn: Lock, over: Event, setting_up: bool) -> None:
        """Speaks for this rank where it does not come back from ``each`` though another failed there."""
        left = GRACE
        while not turn.locked():
            over.wait(0.2)
            if left < GRACE or self._watched.check([f"{meeting}/failed"]):
                left -= 0.2
            if left <= 0 and turn.acquire(blocking=False):
                self._fail(self._watched, meeting, self._hear(self._watched, meeting, STUCK), setting_up, True)

    def _hear(self, store: TCPStore, meeting: int, text: str) -> list[str]:
        def word(rank: int) -> str:
            try:
                return store.get(f"{meeting}/{rank}").decode()
            except RuntimeError:  # after all of PATIENCE
                return STUCK

        store.set(f"{meeting}/{self.rank}", text)
        return [word(rank) for rank in range(self.size)]

    def _fail(self, store: TCPStore, meeting: int, texts: list[str], setting_up: bool, together: bool) -> NoReturn:
        any_rank = next(rank for rank, text in enumerate(texts) if text)
        error = Failed(texts, int(store.compare_set(f"{meeting}/failed", "", str(any_rank))), setting_up)
        if STUCK not in texts and (error.everywhere or not together):
            raise error
        try:
            if self.rank == 0:
                self._last_words(error)
                sys.stdout.flush()
                store.set("said", "")
            else:  # a launcher ends the others with the first that exits
                store.wait(["said"], PATIENCE)
        finally:
            os._exit(1)
