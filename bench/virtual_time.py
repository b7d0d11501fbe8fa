"""Time that passes only when nothing is left to do: how much happens in it, no machine decides.

A `Loop` jumps to its next timer as soon as nothing that has begun is unfinished: no callback, no
byte on its way between sockets of this process, no thread at work. What it takes to compute takes
no time. Threads take part by `Threads`, which has what `threading` and `time` would give them.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")

PATIENCE_S = 1.0
"""Real time, after which bytes that nobody reads are taken for what nobody waits for."""


class Selector(selectors.DefaultSelector):
    """Waits as a selector does, but for timers.

    Attributes:
        now: seconds since the start.
        at_work: how many threads are, and how many connections are being made.
        bytes_under_way: by the two ends of a connection, from one to the other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.at_work = 0
        self.bytes_under_way: Counter[tuple[Any, Any]] = Counter()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        if timeout is None or self.at_work:
            return super().select(None)  # a thread wakes the loop, through its own socket
        if found := super().select(PATIENCE_S if any(self.bytes_under_way.values()) else 0):
            return found
        self.now += timeout
        return []


class CountedSocket:
    """A connection's end in this process, where the other end is, too."""

    def __init__(self, sock: socket.socket, under_way: Counter[tuple[Any, Any]]) -> None:
        self._sock = sock
        self._under_way = under_way
        self._to = (sock.getsockname(), sock.getpeername())
        self._from = self._to[::-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: bytes) -> int:
        sent = self._sock.send(data)
        self._under_way[self._to] += sent
        return sent

    def sendmsg(self, buffers: Any) -> int:
        sent = self._sock.sendmsg(buffers)
        self._under_way[self._to] += sent
        return sent

    def recv(self, most: int) -> bytes:
        data = self._sock.recv(most)
        self._under_way[self._from] -= len(data)
        return data

    def recv_into(self, buffer: Any) -> int:
        count = self._sock.recv_into(buffer)
        self._under_way[self._from] -= count
        return count

    def close(self) -> None:
        self._under_way.pop(self._to, None)
        self._under_way.pop(self._from, None)
        self._sock.close()


class Loop(asyncio.SelectorEventLoop):
    """An event loop in such a time."""

    def __init__(self) -> None:
        self.selector = Selector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now

    def _make_socket_transport(self, sock: socket.socket, *args: Any, **options: Any) -> Any:
        counted = CountedSocket(sock, self.selector.bytes_under_way)
        return super()._make_socket_transport(counted, *args, **options)  # type: ignore[misc]

    def run_in_executor(self, *of: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = super().run_in_executor(*of)
        self.selector.at_work += 1
        future.add_done_callback(self._worked)
        return future

    def _worked(self, _: object) -> None:
        self.selector.at_work -= 1

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        self.selector.at_work += 1
        try:
            await super().sock_connect(sock, address)
        finally:
            self.selector.at_work -= 1


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a loop of its own; `time` says what that says, meanwhile."""
    began_at = time.time()
    with asyncio.Runner(loop_factory=Loop) as runner:
        now = runner.get_loop().time

        def unix_time() -> float:
            return began_at + now()

        with mock.patch.multiple(time, monotonic=now, time=unix_time):
            return runner.run(coroutine)


class Threads:
    """What threads use in the place of `threading` and `time`; made in the loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        self.loop = loop

    def Thread(self, *, target: Callable[[], None], **_: Any) -> Thread:  # noqa: N802
        return Thread(self, target)

    def Condition(self) -> Condition:  # noqa: N802
        return Condition(self)

    def monotonic(self) -> float:
        return self.loop.time()

    def sleep(self, seconds: float) -> None:
        self.until(asyncio.sleep(seconds))

    def until(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Have the calling thread wait for what the loop does."""

        async def waited_for() -> T:
            self.loop.selector.at_work -= 1
            try:
                return await coroutine
            finally:
                self.loop.selector.at_work += 1  # before the thread can know

        return asyncio.run_coroutine_threadsafe(waited_for(), self.loop).result()

    async def call(self, function: Callable[[], T]) -> T:
        """Call a function in a thread."""
        found: list[T] = []
        thread = Thread(self, lambda: found.append(function()))
        thread.start()
        await thread.ended.wait()
        if thread.error is not None:
            raise thread.error
        return found[0]


class Thread:
    """A thread, of `Threads`."""

    def __init__(self, threads: Threads, target: Callable[[], None]) -> None:
        self.ended = asyncio.Event()
        self.error: BaseException | None = None
        self._threads = threads
        self._target = target
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._threads.loop.call_soon_threadsafe(self._count, 1)
        self._thread.start()

    def join(self) -> None:
        self._threads.until(self.ended.wait())

    def _run(self) -> None:
        try:
            self._target()
        except BaseException as error:
            self.error = error
        self._threads.loop.call_soon_threadsafe(self._count, -1)

    def _count(self, change: int) -> None:
        self._threads.loop.selector.at_work += change
        if change < 0:
            self.ended.set()


class Condition:
    """A condition variable, of `Threads`."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._notified = 0
        self._event = asyncio.Event()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def notify(self) -> None:
        self._notified += 1
        self._threads.loop.call_soon_threadsafe(self._event.set)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        deadline = None if timeout is None else self._threads.monotonic() + timeout
        while not (result := predicate()):
            if deadline is not None and self._threads.monotonic() >= deadline:
                break
            with self._released():
                self._threads.until(self._notice(self._notified, deadline))
        return result

    @contextlib.contextmanager
    def _released(self) -> Iterator[None]:
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    async def _notice(self, notified: int, deadline: float | None) -> None:
        if self._notified != notified:  # since the lock was released
            return
        self._event.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._event.wait()
