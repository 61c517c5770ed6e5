"""The dashboard in a real browser, with a made-up fleet and with a server whose rank is really killed."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from shoal.client.http import ServerClient
from shoal.client.scale import scale_server
from shoal.wire.base import replace_fields
from shoal.wire.fleet import FleetStatus
from shoal.wire.traffic import Traffic
from support.fleet_status import engine, fleet, ranks, replica
from support.servers import ShoalServer
from support.status_server import StatusServer

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1400,1000"
)
needs_browser = pytest.mark.skipif(
    not (CHROMIUM.exists() and DRIVER.exists()), reason="needs Debian's packages chromium and chromium-driver"
)
pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]
DIED = "rank 1 (process 101, last step 9, computing step 10) was killed by SIGKILL"


class Browser:
    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", css))

    def until(self, true: Callable[[], Any], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self.holds(true):
            assert time.monotonic() < deadline, (
                f"this did not happen within {seconds:g} s; log of the page: {self.text('#log')}"
            )
            time.sleep(0.05)

    @staticmethod
    def holds(true: Callable[[], Any]) -> bool:
        try:
            return bool(true())
        except StaleElementReferenceException:
            return False

    def state(self, css: str) -> str | None:
        return self.one(css).get_attribute("data-state") if self.all(css) else None

    def states(self, css: str) -> list[str | None]:
        return [each.get_attribute("data-state") for each in self.all(css)]

    def watch(self, css: str) -> Callable[[], list[list[str]]]:
        """Return a function that returns all changes of state from now on, as [aria-label, new state]."""
        self.driver.execute_script(
            """window.seen = [];
            const note = (records) => records.forEach(({target}) =>
                window.seen.push([target.getAttribute("aria-label").split(":")[0], target.dataset.state]));
            const observer = new MutationObserver(note);
            document.querySelectorAll(arguments[0]).forEach((each) =>
                observer.observe(each, {attributeFilter: ["data-state"]}));""",
            css,
        )
        return lambda: list(self.driver.execute_script("return window.seen"))

    def errors(self) -> list[str]:
        """Return errors of the page's code and of the browser's security rules, but not failed connections."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [str(entry) for entry in entries if entry["source"] != "network"]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(str(DRIVER)))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """The browser with an empty page, of the usual size and without a log. Each test has an address of its own."""
    chromium.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.driver.get("about:blank")
    chromium.driver.get_log("browser")  # type: ignore[no-untyped-call]
    return chromium


class Clock:
    """A fleet of two replicas on two hosts that works evenly since the test began."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.second: tuple[str, str, int] = ("ready", "", 0)
        self.changed = self.begun
        self.gone = False
        self.metrics_made = 0

    def enter(self, state: str, cause: str = "", restarts: int = 0) -> None:
        self.second, self.changed = (state, cause, restarts), time.monotonic()

    def __call__(self) -> FleetStatus:
        up = time.monotonic() - self.begun
        state, cause, restarts = self.second
        computing, receiving = ranks(1, 2, busy_us=int(0.75e6 * up))
        traffic = Traffic(
            "pp", "recv", 9, 0, int(0.5e6 * up), int(0.4e6 * up), ((0, int(0.3e6 * up)), (3, int(0.1e6 * up)))
        )
        first = engine(
            running=6,
            waiting=2,
            free=25,
            prompt=int(500 * up),
            generated=int(200 * up),
            queries=int(400 * up),
            hits=int(100 * up),
            of_ranks=[computing, replace_fields(receiving, traffic=(traffic,))],
        )
        second = engine(running=1, free=90, of_ranks=ranks(1, 2, first_pid=100 + 100 * restarts))
        replicas = [replica(0, host="alpha", since=up, stats=first)]
        if not self.gone:
            since = time.monotonic() - self.changed
            stats = None if state == "starting" else second
            replicas.append(replica(1, state, host="beta", since=since, restarts=restarts, cause=cause, stats=stats))
        return fleet(*replicas, uptime=up, tp=1, pp=2, queued=3, replays=4 * restarts)

    def metrics(self) -> str:
        """Return metrics of 100 more requests each time; half of them have latencies from 0.1 s to 0.2 s."""
        self.metrics_made += 1
        n = 100 * self.metrics_made
        lines = []
        for name in ("vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"):
            for bound, count in (("0.1", 0), ("0.2", n // 2), ("0.4", n), ("+Inf", n)):
                lines += [f'{name}_bucket{{engine="{e}",le="{bound}",model_name="tiny"}} {count}.0' for e in (0, 1)]
        return "\n".join(lines)


def number(text: str) -> float:
    return float(re.sub(r"[^0-9.]", "", text) or -1)


@needs_browser
def test_a_replica_that_dies_and_comes_back_is_shown(browser: Browser) -> None:
    clock = Clock()
    with StatusServer(clock) as server:
        server.metrics = clock.metrics
        browser.driver.get(f"{server.url}/dashboard")
        browser.until(lambda: browser.state("[data-replica='1']") == "ready")

        assert [each.get_attribute("data-host") for each in browser.all("[data-host]")] == ["alpha", "beta"]
        for host, named in (("alpha", 0), ("beta", 1)):
            box = f"[data-host='{host}'] [data-replica='{named}']"
            for stage in (0, 1):
                assert browser.state(f"{box} [data-stage='{stage}'] [data-rank='{stage}']") == "ready"
        assert "pid 101" in browser.text("[data-replica='1'] [data-rank='1']")
        assert "1 MiB" in browser.text("[data-replica='1'] [data-rank='0']").replace("1.0 MiB", "1 MiB")

        check_bars_and_totals(browser)
        check_plots(browser)

        clock.enter("restarting", DIED, restarts=1)
        browser.until(lambda: browser.state("[data-replica='1']") == "restarting")
        assert browser.state("[data-replica='0']") == "ready"
        assert browser.state("[data-replica='1'] [data-rank='1']") == "failed"
        assert "died" in browser.text("[data-replica='1'] [data-rank='1']")
        assert browser.state("[data-replica='1'] [data-rank='0']") == "restarting"
        assert f"replica 1 ended: {DIED}" in browser.text("#log")
        assert "4 requests went on" in browser.text("#log")
        assert browser.text("#total-replicas") == "1"

        clock.enter("starting", DIED, restarts=1)
        browser.until(lambda: browser.state("[data-replica='1']") == "starting")
        assert browser.state("[data-replica='1'] [data-rank='1']") == "failed", "a failure stays visible for a moment"
        browser.until(lambda: browser.state("[data-replica='1'] [data-rank='1']") == "starting")
        clock.enter("ready", DIED, restarts=1)
        browser.until(lambda: browser.state("[data-replica='1']") == "ready")
        assert re.search(r"replica 1 is back after \d+\.\d s", browser.text("#log"))
        assert "pid 201" in browser.text("[data-replica='1'] [data-rank='1']")
        assert len(browser.all("svg:first-of-type .mark")) >= 2

        clock.gone = True
        browser.until(lambda: not browser.all("[data-replica='1']"))
        assert "replica 1 has left" in browser.text("#log")
        assert not browser.all("[data-host='beta']")

        assert browser.errors() == []
        fetched = browser.driver.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
        assert fetched
        assert all(name.startswith(server.url) for name in fetched)
        assert set(server.asked) == {"/dashboard", "/v1/admin/status", "/metrics"}


def check_bars_and_totals(browser: Browser) -> None:
    kv = browser.one("[data-replica='0'] [aria-label='KV cache in use']")
    browser.until(lambda: kv.get_attribute("aria-valuenow") == "75")
    inner = kv.find_element(By.TAG_NAME, "i")
    browser.until(lambda: abs(inner.size["width"] / kv.size["width"] - 0.75) < 0.02)
    assert "6 running, 2 waiting" in browser.text("[data-replica='0']")
    assert browser.text("#total-running") == "7"
    assert browser.text("#total-queued") == "5", "2 wait in an engine, 3 before any engine"
    assert browser.text("#total-kv") == "43 %" or browser.text("#total-kv") == "42 %"
    browser.until(lambda: abs(number(browser.text("#total-generated")) - 200) < 10)
    browser.until(lambda: abs(number(browser.text("#total-prompt")) - 500) < 25)
    browser.until(lambda: browser.text("#total-prefix") == "25 %")
    busy = browser.one("[data-replica='0'] [data-rank='0'] [aria-label='share of time computing']")
    browser.until(lambda: abs(int(busy.get_attribute("aria-valuenow") or 0) - 75) <= 3)
    meter = "[data-replica='0'] [data-rank='{}'] [aria-label='share of time communicating']"
    browser.until(lambda: abs(int(browser.one(meter.format(1)).get_attribute("aria-valuenow") or 0) - 50) <= 3)
    assert not browser.one(meter.format(0)).is_displayed(), "it has exchanged nothing"
    assert "75 % of waits for rank 0" in browser.text("[data-replica='0']")


def check_plots(browser: Browser) -> None:
    for key in ("generated", "prompt", "ttft50", "ttft99", "itl50"):
        browser.until(lambda key=key: browser.all(f"[data-series='{key}'] polyline"))  # type: ignore[misc]
    label = browser.one("#plots figure:nth-child(2) svg").get_attribute("aria-label") or ""
    assert "p50 200 ms" in label
    assert "p99 396 ms" in label, "the upper half is spread evenly from 0.2 s to 0.4 s"


@needs_browser
def test_a_server_that_is_away_for_a_while_is_shown(browser: Browser) -> None:
    with StatusServer(Clock()) as server:
        browser.driver.get(f"{server.url}/dashboard")
        browser.until(lambda: browser.all("[data-replica='1']"))
        server.close()
        browser.until(lambda: browser.one("#banner").is_displayed())
        assert "does not answer" in browser.text("#banner")
        assert browser.all("[data-replica='1']"), "the last known state stays on the page"
        server.now = Clock()
        server.open()
        browser.until(lambda: not browser.one("#banner").is_displayed())
        assert "the server answers again after" in browser.text("#log")
        assert browser.errors() == []


@needs_browser
def test_the_page_asks_for_the_key_and_keeps_it(browser: Browser) -> None:
    with StatusServer(Clock()) as server:
        server.key = "secret"
        browser.driver.get(f"{server.url}/dashboard")
        for key in ("wrong", "secret"):
            browser.until(lambda: browser.one("#ask").is_displayed())
            browser.one("#key").clear()
            browser.one("#key").send_keys(key + "\n")
            browser.until(lambda key=key: ("refused" in browser.text("#asked")) or key == "secret")  # type: ignore[misc]
        browser.until(lambda: browser.all("[data-replica='1']"))
        browser.driver.refresh()
        browser.until(lambda: browser.all("[data-replica='1']"))
        assert not browser.one("#ask").is_displayed()


@needs_browser
def test_a_thousand_replicas_do_not_freeze_the_page(browser: Browser) -> None:
    many = tuple(
        replica(n, host=f"host{n // 50}", stats=engine(running=1, free=n % 100, of_ranks=ranks(2, 2)))
        for n in range(1000)
    )
    begun = time.monotonic()
    with StatusServer(lambda: fleet(*many, uptime=time.monotonic() - begun, pp=2)) as server:
        browser.driver.get(f"{server.url}/dashboard")
        browser.until(lambda: len(browser.all("[data-replica]")) == 1000)
        assert len(browser.all("[data-host]")) == 20
        assert not browser.all("[data-rank]"), "a replica is one small box"
        browser.one("[data-replica='7'] > button").click()
        browser.until(lambda: len(browser.all("[data-replica='7'] [data-rank]")) == 4)
        script = (
            "const begun = performance.now(), done = arguments[0];"
            "requestAnimationFrame(() => setTimeout(() => done(performance.now() - begun)));"
        )
        frames = sorted(browser.driver.execute_async_script(script) for _ in range(20))
        assert frames[10] < 500, f"milliseconds until a frame, sorted: {frames}"


@needs_browser
@pytest.mark.parametrize("width", [360, 700, 1400])
def test_the_page_is_never_wider_than_its_window(browser: Browser, width: int) -> None:
    with StatusServer(Clock()) as server:
        browser.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.driver.get(f"{server.url}/dashboard")
        browser.until(lambda: browser.all("[data-rank='1']"))
        root = "document.documentElement"
        assert browser.driver.execute_script(f"return {root}.scrollWidth - {root}.clientWidth") <= 0


def test_the_page_loads_nothing_from_elsewhere() -> None:
    with StatusServer(Clock()) as server, urlopen(f"{server.url}/dashboard", timeout=60) as answer:
        policy = answer.headers["Content-Security-Policy"]
        page = answer.read().decode()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall("'sha256-[^']{44}'", policy)) == 2
    addresses = set(re.findall(r"""["'(](?:https?:)?//[^"')]*""", page))
    assert addresses == {'"http://www.w3.org/2000/svg'}, "this is the name of a format, which no browser fetches"
    assert not re.search(r"<(link|script|img|iframe)[^>]*(src|href)=(?!\"data:)", page)
    assert " style=" not in page


@needs_browser
@pytest.mark.timeout(600)
def test_a_rank_that_is_really_killed_is_shown_and_replaced(browser: Browser) -> None:
    with ShoalServer("-tp", "2", "-dp", "2") as server:
        browser.driver.get(f"{server.url}/dashboard")
        browser.until(lambda: browser.states("[data-replica]") == ["ready", "ready"])
        browser.until(lambda: browser.states("[data-rank]") == ["ready"] * 4)
        asyncio.run(generate(server.url))
        browser.until(lambda: number(browser.text("#total-generated")) >= 0)
        for key in ("generated", "prompt", "ttft50", "itl99"):
            browser.until(lambda key=key: browser.all(f"[data-series='{key}'] polyline"))  # type: ignore[misc]

        pid = rank_1_of_replica_1(server)
        browser.until(lambda: f"pid {pid}" in browser.text("[data-replica='1'] [data-rank='1']"))
        changes = browser.watch("[data-replica='1'], [data-replica='1'] [data-rank='1']")
        os.kill(pid, signal.SIGKILL)
        browser.until(lambda: "replica 1 goes on" in browser.text("#log"))
        browser.until(lambda: browser.state("[data-replica='1'] [data-rank='1']") == "ready")

        assert re.search(rf"replica 1: rank 1 \(process {pid}.*; it is replaced, the other", browser.text("#log"))
        seen = changes()
        assert ["rank 1", "failed"] in seen, "rank 1 was shown as failed"
        assert ["replica 1", "starting"] not in seen
        assert browser.states("[data-replica]") == ["ready", "ready"]
        browser.until(lambda: rank_1_of_replica_1(server) != pid)
        new = rank_1_of_replica_1(server)
        assert new != pid
        browser.until(lambda: f"pid {new}" in browser.text("[data-replica='1'] [data-rank='1']"))

        lines: list[str] = []
        asyncio.run(scale_server(server.url, 1, tell=lines.append))
        assert lines[-1] == "1 replica ready"
        browser.until(lambda: browser.states("[data-replica]") == ["ready"])
        assert browser.errors() == []


def rank_1_of_replica_1(server: ShoalServer) -> int:
    return int(server.status()["replicas"][1]["stats"]["ranks"][1]["pid"])


async def generate(url: str) -> None:
    body = {"model": "bundled", "prompt": "Count from 3 to 9:", "max_tokens": 80, "ignore_eos": True}
    async with ServerClient(url, timeout=120) as client:
        await asyncio.gather(*(client.post_json("/v1/completions", body) for _ in range(6)))
