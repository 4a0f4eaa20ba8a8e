"""The previews of one request, for any number of readers in asyncio: the newest of each image, and no queue that a slow
reader could fill."""

import asyncio
from collections.abc import AsyncIterator

from ddpm_deploy.serve.handle import Handle, Preview
from ddpm_deploy.serve.settings import MOST_PREVIEWS


class Feed:
    """Watches a handle once, in the loop that makes it, whoever reads and however often.

    watch: whether there are previews; without, it tells of the end alone.
    """

    def __init__(self, handle: Handle, *, watch: bool = True) -> None:
        steps = len(handle.request.timesteps or ()) or handle.request.steps or 1
        self._newest: dict[int, Preview] = {}  # by the image's index
        self._done = False
        self._changed = asyncio.Event()  # replaced whenever it is set
        self._loop = asyncio.get_running_loop()
        if watch:
            handle.watch(self._tell, min(MOST_PREVIEWS, steps))
        handle.add_done_callback(lambda _: self._tell(None))

    def _tell(self, preview: Preview | None) -> None:
        """In the batcher's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, preview)

    def _put(self, preview: Preview | None) -> None:
        if preview:
            self._newest[preview.index] = preview
        else:
            self._done = True
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def read(self, looks: int, quiet: float) -> AsyncIterator[Preview | None]:
        """Previews until the request is over, at most `looks` of each image, evenly spread over its steps; None after
        `quiet` seconds of silence."""
        seen: dict[int, int] = {}  # the part of its steps in which each image was last shown
        while True:
            changed, done = self._changed, self._done
            for preview in list(self._newest.values()):
                part = (preview.step + 1) * (looks + 1) // preview.steps
                if seen.get(preview.index, 0) < part:
                    seen[preview.index] = part
                    yield preview
            if done:
                return
            try:
                async with asyncio.timeout(quiet):
                    await changed.wait()
            except TimeoutError:
                yield None
