"""The page at /, in a real browser, over a real server."""

import base64
import importlib.util
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve")
pytest.importorskip("httpx2")

from ddpm_deploy import Sampler, to_uint8
from ddpm_deploy.runtime.images import grid
from tests.browser import CHROMIUM, Browser, Page, browser
from tests.test_guidance import Labelled
from tests.test_serve import Held, Live, mounted, pixels, serving, until

FILES = Path(__file__).parent.parent / "ddpm_deploy" / "serve" / "page"
NAMES = ("naught", "<b>one</b>", "an incomprehensibilitiesandcounterrevolutionaries")


class Slow(Labelled):
    """A network whose images one can watch."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(class_names=NAMES, **changes)

    def predict(self, batch: int) -> None:
        time.sleep(0.015)
        super().predict(batch)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    with chromium.page() as tab:
        yield tab


@pytest.fixture(scope="module")
def slow() -> Iterator[Live]:
    with serving(Slow(), name="toy", max_count=8) as running:
        yield running


def opened(page: Page, live: Live) -> None:
    """The page of a server, when it knows the model."""
    page.open(live.url + "/")
    page.until("document.querySelector('#about').textContent.startsWith('The model')")


def fill(page: Page, **fields: Any) -> None:
    for name, value in fields.items():
        page.js(f"document.querySelector('#{name}').value = {str(value)!r}")


def text(page: Page, selector: str) -> str:
    return str(page.js(f"document.querySelector({selector!r}).innerText"))


def status(page: Page, begins: str) -> str:
    """What the page says, once it begins so."""
    page.until(f"document.querySelector('#status').textContent.startsWith({begins!r})")
    return text(page, "#status")


def error(page: Page) -> str:
    page.until("document.querySelector('#error').textContent")
    return text(page, "#error")


def focused(page: Page) -> str:
    return str(page.js("document.activeElement.id || document.activeElement.textContent"))


def shown(page: Page) -> np.ndarray:
    """The pixels (N, H, W, C) of the images on the page."""
    sources = page.js("[...document.querySelectorAll('#images img')].map((image) => image.src)")
    return np.stack([pixels(base64.b64decode(source.partition(",")[2])) for source in sources])


def break_off(live: Live) -> None:
    """End every connection, in the middle of whatever is said on it."""
    for connection in list(live.server.server_state.connections):
        connection.loop.call_soon_threadsafe(connection.transport.abort)


def right(**fields: Any) -> np.ndarray:
    with Sampler(Slow()) as sampler:
        return to_uint8(sampler.sample(**fields))


# --- the files ----------------------------------------------------------------------------------------------


def test_it_is_served_with_a_strict_policy_and_asks_nothing_of_other_sites() -> None:
    with serving(api_keys=("secret",)) as live:
        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            answer = live.ask("GET", path)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "unsafe" not in policy
            assert "*" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert not re.search(r"https?://|//\w+\.", answer.text)
        assert live.ask("GET", "/page.py").status_code == 404
        assert live.ask("GET", "/__init__.py").status_code == 404
        assert live.ask("GET", "/v1/model").status_code == 401
        shown = {"Authorization": "Bearer secret"}
        document = live.ask("GET", "/openapi.json", headers=shown).json()
        assert not any(path.startswith("/page") for path in document["paths"])


def test_its_policy_holds_in_a_browser(page: Page, slow: Live) -> None:
    opened(page, slow)
    assert page.trouble == []
    put = "document.body.append(Object.assign(document.createElement('{}'), {{{}}}))"
    page.js(put.format("script", "textContent: 'window.ran = true'"))
    page.js(put.format("img", "src: 'page.css', onerror: () => { window.refused = true }"))
    page.until("window.refused")
    assert page.js("window.ran") is None
    assert len(page.trouble) >= 2
    assert all("Content Security Policy" in one for one in page.trouble)


# --- by mouse -----------------------------------------------------------------------------------------------


def test_a_click_and_the_images_appear_out_of_noise(page: Page, slow: Live) -> None:
    opened(page, slow)
    assert page.js("document.querySelector('#solver').value") == "fast"
    assert text(page, "#about") == "The model toy makes images of 4 × 4 pixels."
    fill(page, count=3, solver="ddpm", steps=20, seed=2**64 - 1, labels=1)
    page.click("#make")
    status(page, "At work")
    page.until("document.querySelector('#images img')?.alt === 'Image 1, on its way'")
    early = page.js("document.querySelector('#images img').src")
    page.until(f"document.querySelector('#images img').src !== {early!r}")
    later = page.js("document.querySelector('#images img').src")
    assert page.js("document.querySelector('#progress').value") > 0
    assert status(page, "Done") == "Done: 3 images in 20 steps, of seed 18446744073709551615."
    wanted = right(count=3, solver="ddpm", steps=20, seed=2**64 - 1, labels=1)
    np.testing.assert_array_equal(shown(page), wanted)
    assert not {early, later} & set(page.js("[...document.querySelectorAll('img')].map((i) => i.src)"))
    assert page.js("document.querySelector('#images img').alt") == "Image 1: <b>one</b>"
    assert page.trouble == []


def test_what_is_saved(page: Page, slow: Live, tmp_path: Path) -> None:
    page.saves_to(tmp_path)
    opened(page, slow)
    fill(page, count=5, steps=3, seed=9, guidance=1.5)
    page.click("#make")
    status(page, "Done")
    wanted = right(count=5, solver="fast", steps=3, seed=9, guidance=1.5)
    for selector in ("#images li:nth-child(2) a", "#all-png", "#all-npz"):
        page.click(selector)
    files = [tmp_path / f"toy-seed-9{rest}" for rest in ("-1.png", ".png", ".npz")]
    until(lambda: all(file.exists() for file in files))
    np.testing.assert_array_equal(pixels(files[0].read_bytes()), wanted[1])
    np.testing.assert_array_equal(pixels(files[1].read_bytes()), grid(wanted))
    with np.load(io.BytesIO(files[2].read_bytes())) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], wanted)
    assert page.trouble == []


def test_images_that_are_no_pictures_are_saved_as_arrays(page: Page) -> None:
    with serving(Slow(image_shape=(2, 4, 4))) as live:
        opened(page, live)
        page.click("#make")
        status(page, "Done")
        assert page.js("document.querySelectorAll('#images li, #all-png:not([hidden])').length") == 0
        assert page.js("!document.querySelector('#all-npz').hidden")


def test_it_works_within_another_application(page: Page) -> None:
    with mounted() as url:
        page.open(url)  # without the slash at its end
        page.until("document.querySelector('#about').textContent.startsWith('The model')")
        page.click("#make")
        status(page, "Done")
        assert page.trouble == []
        page.open("about:blank")


# --- by keyboard --------------------------------------------------------------------------------------------


def test_all_of_it_by_keyboard(page: Page, slow: Live) -> None:
    opened(page, slow)
    seen: list[str] = []

    def tab_to(name: str) -> None:
        for _ in range(12):
            page.press("Tab")
            seen.append(focused(page))
            assert page.js("getComputedStyle(document.activeElement).outlineStyle") != "none"
            if seen[-1] == name:
                return
        raise AssertionError(f"{name} is not reached: {seen}")

    tab_to("count")
    page.write("2")
    tab_to("steps")
    page.write("4")
    tab_to("labels")
    page.press("ArrowDown")
    tab_to("make")
    assert seen == ["count", "solver", "steps", "seed", "labels", "guidance", "make"]
    page.press("Enter")
    assert status(page, "Done").startswith("Done: 2 images in 4 steps, of seed ")
    assert focused(page) == "make"  # not lost on the way
    assert page.js("document.querySelector('#images img').alt") == "Image 1: naught"
    tab_to("Save image 2")
    tab_to("all-npz")


def test_cancel_frees_the_server(page: Page) -> None:
    with serving(Held()) as live:
        live.network.go.clear()
        opened(page, live)
        page.js("document.querySelector('#make').focus()")
        page.press("Enter")
        page.until("document.querySelectorAll('#images li').length === 4")
        page.js(
            "window.said = []; new MutationObserver(() => said.push(document.querySelector('#status').textContent))"
            ".observe(document.querySelector('#status'), {childList: true})"
        )
        page.press("Enter")  # again: nothing more is asked
        page.press("Tab")
        assert focused(page) == "cancel"
        page.press("Enter")
        status(page, "Cancelled.")
        assert focused(page) == "make"
        assert set(page.js("said")) <= {
            "Waiting for room on the server …",
            "At work: 0 % done.",
            "Cancelled.",
        }
        asked = page.js("performance.getEntriesByType('resource').map((one) => one.name)")
        assert sum(name.endswith("/v1/samples") for name in asked) == 1
        until(lambda: len(live.service.results) == 0)
        live.network.go.set()
        live.idle()
        page.press("Enter")
        status(page, "Done")


def test_who_leaves_the_page_calls_it_off(page: Page) -> None:
    with serving(Held()) as live:
        live.network.go.clear()
        opened(page, live)
        page.click("#make")
        until(lambda: len(live.service.results) == 1)
        page.until("document.querySelectorAll('#images li').length === 4")
        page.open("about:blank")
        until(lambda: len(live.service.results) == 0)
        live.network.go.set()
        live.idle()


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_a_refusal_is_the_servers_sentence_at_its_field(page: Page, slow: Live) -> None:
    opened(page, slow)
    fill(page, seed=2**64)
    page.click("#make")
    assert error(page) == f"Seed must be from 0 to 2^64 - 1, not {2**64}."
    assert text(page, "#status") == "Not done."
    assert focused(page) == "seed"
    assert page.js("document.querySelector('#seed').getAttribute('aria-errormessage')") == "error"
    fill(page, seed="")
    page.click("#make")
    status(page, "Done")
    assert text(page, "#error") == ""
    assert page.js("document.querySelectorAll('[aria-invalid]').length") == 0


def test_a_full_server_says_when_to_try_again(page: Page) -> None:
    with serving(Held(2), max_queue=1) as live:
        opened(page, live)
        live.network.go.clear()
        while live.post({"count": 2}, Prefer="respond-async").status_code != 429:
            pass
        page.click("#make")
        assert re.search(r"[Tt]ry again in [\d.]+ s", error(page))
        live.network.go.set()
        live.idle()
        page.click("#make")
        status(page, "Done")


def test_a_server_that_starts_says_how_far_it_is(page: Page) -> None:
    with serving(Slow()) as live:
        live.service.open(None)
        live.service.preparing = "its proof is checked, 40 % done"
        opened(page, live)
        assert "its proof is checked, 40 % done" in status(page, "Not yet")
        live.service.open(live.batcher)
        status(page, "None yet.")


def test_a_key_is_asked_for_where_there_is_one(page: Page, tmp_path: Path) -> None:
    page.saves_to(tmp_path)
    with serving(Slow(), name="toy", api_keys=("secret",)) as live:
        page.open(live.url + "/")
        assert "API key" in error(page)
        assert focused(page) == "key"
        assert page.js("document.querySelector('#document').checkVisibility()") is False
        page.write("wrong")
        page.press("Enter")
        status(page, "Not done.")
        assert "API key" in error(page)
        fill(page, key="secret", seed=3)
        page.press("Enter")
        status(page, "Done")
        assert text(page, "#error") == ""
        page.click("#all-npz")
        until((tmp_path / "toy-seed-3.npz").exists)


def test_a_connection_that_is_lost_is_told_and_found_again(page: Page) -> None:
    with serving(Held()) as live:
        live.network.go.clear()
        opened(page, live)
        page.click("#make")
        page.until("document.querySelectorAll('#images li').length === 4")
        status(page, "Waiting for room")
        break_off(live)
        status(page, "The connection to the server is lost.")
        status(page, "Waiting for room")
        live.network.go.set()
        status(page, "Done")
        assert page.js("document.querySelectorAll('#images a').length") == 4
        page.connect(False)
        page.click("#make")
        assert "The server does not answer." in error(page)


# --- for everybody ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "dark"), [(360, True), (1100, False)])
def test_it_fits_a_phone_and_has_no_barriers(page: Page, slow: Live, width: int, dark: bool) -> None:
    found = importlib.util.find_spec("axe_playwright_python")  # of it the script alone is used
    if found is None or found.origin is None:
        pytest.skip("axe-core is not there: make .venv/installed")
    axe = (Path(found.origin).parent / "axe.min.js").read_text()
    page.look(width, 740, dark=dark)
    opened(page, slow)
    page.js(axe + "; 0")

    def barriers() -> None:
        assert page.js("document.documentElement.scrollWidth") <= width
        assert page.js("axe.run({resultTypes: ['violations']}).then((all) => all.violations)") == []

    luminance = page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(luminance) < 64) == dark
    fill(page, count=8, solver="ddpm", steps=20)
    page.click("#make")
    status(page, "At work")
    barriers()
    status(page, "Done")
    barriers()
    page.js("document.querySelector('#key-field').hidden = false")
    fill(page, seed=2**64)
    page.click("#make")
    error(page)
    barriers()


def test_whom_moving_pictures_trouble_sees_few(page: Page, slow: Live) -> None:
    for still, looks in ((True, 2), (False, 16)):
        page.look(still=still)
        opened(page, slow)
        page.click("#make")
        status(page, "Done")
        asked = page.js("performance.getEntriesByType('resource').map((one) => one.name)")
        assert any(name.endswith(f"/events?previews={looks}") for name in asked)
        moves = page.js("getComputedStyle(document.querySelector('#images img')).animationName")
        assert moves == ("none" if still else "appear")
