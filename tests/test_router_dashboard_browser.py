"""The live page in a real browser: it follows a burst, survives a restart, asks for a key, fits a phone."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from browser import Page, find_browser
from mock_cluster import RunningRouter, call, mock_cluster, wait_until
from one_request import ask

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path: apt-get install chromium")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    assert BROWSER is not None
    page = Page(BROWSER, tmp_path / "profile")
    try:
        yield page
    finally:
        page.end()


def says(page: Page, words: str) -> None:
    wait_until(lambda: words in page.text("#status-text"), f"the page says {words}")


@contextlib.contextmanager
def burst(router: RunningRouter) -> Iterator[None]:
    def client(number: int) -> None:
        for k in range(3):
            ask(router, [number + 3, k] * (20 + 40 * number), True, max_tokens=80)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join()


def test_page_follows_a_burst_and_survives_a_restart(page: Page, tmp_path: Path) -> None:
    with mock_cluster(tmp_path, "PDD", policy="kairos") as (router, _):
        page.open(router.url + "/dashboard")
        says(page, "Live")
        assert "No requests yet" in page.text("#decisions tbody")
        assert page.text("#policy") == "kairos"
        with burst(router):
            wait_until(lambda: int(page.text("#in-flight")) > 0, "requests are in flight")
            wait_until(lambda: page.text("#decisions tbody th").startswith("#"), "decisions are shown")
        wait_until(lambda: page.text("#rate-note").startswith("18 ended"), "all have ended")
        assert page.eval("document.querySelectorAll('#nodes tbody tr').length") == 3
        assert page.text("#ttft").endswith("%")
        assert page.text("#ttft-note").startswith("P50")
        assert page.eval("document.querySelector('#rate-line path').getAttribute('d').length") > 10

        config = yaml.safe_load(router.path.read_text())
        port = int(router.url.rsplit(":", 1)[1])
        router.path.write_text(yaml.safe_dump(config | {"port": port}))
        router.process.kill()
        router.process.wait()
        says(page, "Disconnected")
        assert page.text("#state") == "unknown"
        again = RunningRouter(router.path)
        try:
            says(page, "Live")
            wait_until(lambda: page.text("#rate-note").startswith("0 ended"), "the new router is shown")
        finally:
            again.end()
    assert page.errors == []


def test_key_is_asked_for_and_never_stands_in_an_address(page: Page, tmp_path: Path) -> None:
    with mock_cluster(tmp_path, "D", policy="always", api_keys=["right-key"], warm_pairs=False) as (router, _):
        page.open(router.url + "/dashboard")
        for key in ("wrong-key", "right-key"):
            wait_until(lambda: page.eval("document.activeElement?.id") == "key", "the key is asked for")
            page.type(key)
            page.press("Enter")
            says(page, "Live" if key == "right-key" else "does not know this key")
        page.open(router.url + "/dashboard")
        says(page, "Live")
        assert any("/dashboard/events" in url for url in page.requested)
        assert [url for url in page.requested if "key" in url] == []
        page.eval("document.getElementById('forget').click()")
        says(page, "An API key is needed")
        assert page.eval("sessionStorage.length + localStorage.length") == 0
    assert page.errors == []


def test_page_fits_a_phone_is_used_by_keyboard_and_shows_names_as_text(page: Page, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>:80"
    with mock_cluster(tmp_path, "D", policy="always") as (router, _):
        call(router.admin + "/nodes", {"role": "decode", "url": f"http://{hostile}"})
        page.look_like(375, 700)
        page.open(router.url + "/dashboard")
        says(page, "Live")
        wait_until(lambda: hostile in page.text("#nodes tbody"), "the node is shown")
        assert page.eval("document.images.length") == 0
        assert page.eval("document.documentElement.scrollWidth") <= 375
        page.press("Tab")
        assert "Skip" in page.eval("document.activeElement?.textContent")
        page.press("Tab")
        assert page.eval("document.activeElement?.id") == "pause"
        page.press("Space")
        says(page, "Paused")
        page.press("Space")
        says(page, "Live")
    assert page.errors == []
