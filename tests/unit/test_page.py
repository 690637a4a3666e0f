"""The page of the server, in a headless browser."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from mlpmem_jax.config.serve import ServeConfig
from mlpmem_jax.serving.app import App
from mlpmem_jax.serving.server import _running, bound_socket, start
from tests.unit.tiny_models import WEIGHT, tiny_language_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
NETWORKS = ("decoder", "memory", "mixture")
CONFIG = ServeConfig(slots=1, port=0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if PROGRAM is None:
        pytest.skip(f"there is no browser ({', '.join(NAMES)})")
    with api.sync_playwright() as playwright:
        # Its sandbox needs rights that containers often lack; the page is ours.
        started = playwright.chromium.launch(executable_path=PROGRAM, chromium_sandbox=False)
        yield started
        started.close()


@contextlib.contextmanager
def _served(with_memory: bool = True, key: str | None = None) -> Iterator[str]:
    service = start(CONFIG, tiny_language_model(with_memory), "tiny")
    config = uvicorn.Config(App(service, key).asgi, http="h11", ws="none", lifespan="off")
    listening = bound_socket(CONFIG)
    listening.listen()
    with _running(uvicorn.Server(config), listening) as thread:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    thread.join()
    service.worker.stop()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with _served() as url:
        yield url


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens pages; whatever a page complains about fails the test."""
    complaints: list[str] = []
    pages = []

    def opened(url: str) -> Any:
        page = browser.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.goto(url)
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert not complaints


def _percentages(page: Any) -> list[list[float]]:
    """Returns what stands in the bars, in percent, by row and network."""
    rows = page.locator("#rows tr")
    found = []
    for row in rows.all():
        texts = [row.locator(f".{name} .number").inner_text() for name in NETWORKS]
        found.append([float(text.removesuffix(" %")) for text in texts])
    return found


def _set_weight(page: Any, value: float) -> None:
    page.locator("#weight").fill(str(value))


def _wait_until(page: Any, expression: str) -> None:
    """The page's policy forbids what the browser's own waiting does."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def _text(page: Any) -> str:
    return str(page.locator("#text").text_content())


def _mixture(rows: list[list[float]], weight: float) -> list[float]:
    return [weight * memory + (1 - weight) * decoder for decoder, memory, _ in rows]


def test_bars_follow_the_slider(opened: Any, address: str) -> None:
    page = opened(address)
    page.locator("#prompt").fill("def read(")
    page.get_by_role("button", name="Start").click()
    page.locator("#rows tr").first.wait_for()
    assert _text(page) == "def read("
    assert page.locator("#shown").inner_text() == f"{WEIGHT:.3f} (the model's own)"
    rows = _percentages(page)
    assert 10 <= len(rows) <= 20
    assert any(abs(decoder - memory) > 1 for decoder, memory, _ in rows)
    own = [row[2] for row in rows]
    assert own == sorted(own, reverse=True) and 0 < sum(own) <= 100.1
    assert own == pytest.approx(_mixture(rows, WEIGHT), abs=0.011)
    # The bars are as wide as their numbers say.
    for name, column in zip(NETWORKS, zip(*rows, strict=True), strict=True):
        for place, percent in enumerate(column):
            track = page.locator(f"#rows .{name} .track").nth(place).bounding_box()
            fill = page.locator(f"#rows .{name} .fill").nth(place).bounding_box()
            assert 100 * fill["width"] / track["width"] == pytest.approx(percent, abs=0.5)
    for weight in (0.0, 0.5, 1.0):
        _set_weight(page, weight)
        assert page.locator("#shown").inner_text() == f"{weight:.3f}"
        rows = _percentages(page)
        mixed = [row[2] for row in rows]
        assert mixed == pytest.approx(_mixture(rows, weight), abs=0.011)
        assert mixed == sorted(mixed, reverse=True) and mixed != own
        rest = float(page.locator("#rest").inner_text().split()[3])
        assert rest == pytest.approx(100 - sum(mixed), abs=0.2)
    page.get_by_role("button", name="λ of the model").click()
    assert [row[2] for row in _percentages(page)] == own


def test_tokens_are_chosen_and_taken_back(opened: Any, address: str) -> None:
    page = opened(address)
    page.locator("#prompt").fill("def")
    page.get_by_role("button", name="Start").click()
    page.locator("#rows tr").first.wait_for()
    buttons = page.locator("#rows .token button")
    names = buttons.all_inner_texts()
    place, shown = next(
        (n, name) for n, name in enumerate(names) if n and name.isascii() and name[:6] != "bytes:"
    )
    buttons.nth(place).click()
    _wait_until(page, "history.length == 1")
    assert _text(page) == "def" + shown
    assert page.locator("#text mark").text_content() == shown
    length = page.evaluate("state.tokens.length")
    page.get_by_role("button", name="Ten tokens").click()
    _wait_until(page, f"state.tokens.length == {length + 10}")
    for name in ("Most probable token", "Sampled token"):
        before = page.evaluate("state.tokens.length")
        page.get_by_role("button", name=name).click()
        _wait_until(page, f"state.tokens.length == {before + 1}")
    for left in range(12, -1, -1):
        page.get_by_role("button", name="Back").click()
        _wait_until(page, f"history.length == {left}")
    assert _text(page) == "def"


def test_errors_are_shown(opened: Any) -> None:
    with _served(key="secret") as url:
        page = opened(url)
        page.get_by_role("button", name="Start").click()
        error = page.get_by_role("alert")
        _wait_until(page, "document.getElementById('error').textContent != ''")
        assert "Authorization: Bearer KEY" in error.inner_text()
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Start").click()
        page.locator("#rows tr").first.wait_for()
        assert error.inner_text() == ""


def test_without_a_memory(opened: Any) -> None:
    with _served(with_memory=False) as url:
        page = opened(url)
        page.get_by_role("button", name="Most probable token").click()
        page.locator("#rows tr").first.wait_for()
        assert page.locator("#rows .memory").first.inner_text() == "no memory"
        assert page.locator("#shown").inner_text() == "no memory"
        assert page.locator("#weight").is_disabled()
