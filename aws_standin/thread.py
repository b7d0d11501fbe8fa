"""A stand-in for callers that block, such as boto3's clients or a process's main thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar

from aws_standin import StandIn

Result = TypeVar("Result")


class ThreadedStandIn:
    """A stand-in that serves from a daemon thread of its own until it is closed.

    Attributes:
        stand_in: for what may be looked at; whatever acts on it goes through `call` or `wait_for`.

    Raises:
        OSError: `port` of 127.0.0.1 cannot be had (0 picks a free one).
    """

    def __init__(self, port: int = 0) -> None:
        self.stand_in = StandIn()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="aws_standin", daemon=True
        )
        self._thread.start()
        try:
            self.wait_for(lambda: self.stand_in.start(port))
        except BaseException:
            self._end_loop()
            raise

    def call(self, action: Callable[[], Result]) -> Result:
        """Call `action` in the stand-in's thread, and return or raise what it does."""

        async def act() -> Result:
            return action()

        return self.wait_for(act)

    def wait_for(self, action: Callable[[], Awaitable[Result]]) -> Result:
        """Await what `action` returns in the stand-in's thread; return or raise what it does."""

        async def act() -> Result:
            return await action()

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result()

    def close(self) -> None:
        """Stop listening, cut all connections, and end the thread."""
        if not self._loop.is_closed():
            self.wait_for(self.stand_in.stop)
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> ThreadedStandIn:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
