"""A real browser for tests: Chromium, headless, driven by its own protocol over a pair of pipes.

No driver is between: one has to fit the browser's version, and weighs more than these lines. The protocol is at
https://chromedevtools.github.io/devtools-protocol/.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = 30.0  # seconds that nothing takes: a hang fails
# --no-sandbox: it refuses to run as root with one, and all that it opens here is our own.
_SWITCHES = (
    "--headless=new --no-sandbox --remote-debugging-pipe --no-first-run --disable-gpu --disable-dev-shm-usage "
    "--disable-background-networking --disable-extensions --disable-sync --mute-audio --hide-scrollbars"
)
_KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " "), "ArrowDown": (40, ""), "Backspace": (8, "")}


class Page:
    """One tab. trouble: what it complained of: exceptions, answers that are errors, what its policy forbids."""

    def __init__(self, browser: "Browser", session: str, context: str) -> None:
        self._browser, self._session, self._context = browser, session, context
        self.trouble: list[str] = []

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        return self._browser.send(method, self._session, **parameters)

    def look(self, width: int = 1100, height: int = 800, *, dark: bool = False, still: bool = False) -> None:
        """The size of the window, and what its user prefers."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": name, "value": value} for name, value in features.items()],
        )

    def open(self, url: str) -> None:
        """Go there, and wait until it is all there."""
        self.send("Page.navigate", url=url)
        self.until(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression; of a promise, what it comes to."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until it is true."""
        end = time.monotonic() + LONG
        while not self.js(expression):
            assert time.monotonic() < end, f"{expression} is not so: {self.js('document.body.innerText')}"
            time.sleep(0.01)

    def press(self, key: str) -> None:
        """A key, down and up."""
        code, text = _KEYS[key]
        named = {"key": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def write(self, text: str) -> None:
        """Text, into what has the focus."""
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element."""
        box = f"document.querySelector({selector!r})"
        self.js(f"{box}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y, width, height = self.js(
            f"(({{x, y, width, height}}) => [x, y, width, height])({box}.getBoundingClientRect())"
        )
        assert width * height > 0, f"{selector} is not seen"
        at = {"x": x + width / 2, "y": y + height / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **at)

    def saves_to(self, folder: Path) -> None:
        """Where its downloads go."""
        self._browser.send(
            "Browser.setDownloadBehavior",
            behavior="allow",
            browserContextId=self._context,
            downloadPath=str(folder),
        )

    def connect(self, online: bool) -> None:
        """Give it a network, or take it away."""
        self.send(
            "Network.emulateNetworkConditions",
            offline=not online,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )

    def picture(self) -> bytes:
        """What is seen, as a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])


class Browser:
    """Chromium, from its start to its end."""

    def __init__(self, to: int, answers: int) -> None:
        self._to, self._from = to, answers
        self._read, self._number = b"", 0
        self._pages: dict[str, Page] = {}

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command, and its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._heard(answer)

    def _next(self) -> Any:
        while b"\0" not in self._read:
            assert select.select([self._from], [], [], LONG)[0], "the browser does not answer"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def _heard(self, event: dict[str, Any]) -> None:
        """Note what a page complains of."""
        page = self._pages.get(event.get("sessionId", ""))
        if page and event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
            page.trouble.append(json.dumps(event["params"]))

    @contextmanager
    def page(self) -> Iterator[Page]:
        """A tab with nothing in it, apart from all others."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, context)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.look()
        try:
            yield page
        finally:
            del self._pages[session]
            self.send("Target.disposeBrowserContext", browserContextId=context)


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser whose files lie in a folder."""
    assert CHROMIUM
    commands, to = os.pipe()
    answers, tell = os.pipe()
    wired = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{tell}', "bash"]
    running = subprocess.Popen(
        [*wired, CHROMIUM, *_SWITCHES.split(), f"--user-data-dir={folder}"],
        pass_fds=(commands, tell),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands)
    os.close(tell)
    started = Browser(to, answers)
    try:
        yield started
        started.send("Browser.close")
    finally:
        os.close(to)
        os.close(answers)
        try:
            running.wait(LONG)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
