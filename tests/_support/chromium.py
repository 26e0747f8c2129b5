"""Headless Chromium on a page from a file: what it says, asks for and overflows, pictures and print.

It is spoken to over a pair of pipes (`--remote-debugging-pipe`): messages of the DevTools protocol with a zero byte between.
As a command it takes the pictures of a report that the documentation has:

    python tests/_support/chromium.py report.html --out docs/pictures --name report-demo
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60  # seconds for one answer
QUALITY = 75
WIDTHS = {"phone": (390, 844), "laptop": (1280, 800)}


@dataclasses.dataclass
class Seen:
    """What a page did while it was open.

    Attributes:
        messages: on the console, exceptions and violations of its policy included.
        requests: addresses that were asked for, the page's own apart.
        overflow: how many pixels the page is wider than the window.
        wide: elements that reach beyond the window, for the message of a failing test.
    """

    messages: list[str]
    requests: list[str]
    overflow: int
    wide: list[str]


class Browser:
    """One process, one page at a time."""

    def __init__(self, arguments: tuple[str, ...] = ()) -> None:
        assert CHROMIUM is not None
        self._profile = tempfile.mkdtemp(prefix="chromium-")
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        command = [
            CHROMIUM,
            "--headless=new",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            f"--user-data-dir={self._profile}",
            *arguments,
        ]

        def pipes() -> None:
            os.dup2(to_browser, 10)
            os.dup2(from_browser, 11)
            os.dup2(10, 3)
            os.dup2(11, 4)

        self._process = subprocess.Popen(
            command, preexec_fn=pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.page(f"{domain}.enable")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._send("Browser.close", {}, None)
        os.close(self._out)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._answer(self._send(method, parameters, None))

    def page(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._answer(self._send(method, parameters, self._session))

    def evaluate(self, expression: str) -> Any:
        found = self.page("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path: Path, width: int = 1280, height: int = 800, *, dark: bool = False, media: str = "") -> Seen:
        """Open a page, let it settle, and say what it did."""
        self.page("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.page("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.events.clear()
        address = path.resolve().as_uri()
        self.page("Page.navigate", url=address)
        self._until("Page.loadEventFired")
        # Two frames later everything that the page would ask for has been asked for.
        self.page(
            "Runtime.evaluate",
            expression="new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))",
            awaitPromise=True,
        )
        return self._seen(address)

    def screenshot(self, path: Path, *, height: int, anchor: str = "") -> None:
        """Of the page from an element on, so many pixels of it, as WebP or PNG by the path's suffix."""
        size = self.page("Page.getLayoutMetrics")["cssContentSize"]
        top = self.evaluate(f"document.getElementById({anchor!r}).getBoundingClientRect().top") - 24 if anchor else 0
        clip = {"x": 0, "y": top, "width": size["width"], "height": min(height, size["height"] - top), "scale": 1}
        kind: dict[str, Any] = {"format": path.suffix[1:], "captureBeyondViewport": True, "clip": clip}
        if path.suffix == ".webp":
            kind["quality"] = QUALITY
        path.write_bytes(base64.b64decode(self.page("Page.captureScreenshot", **kind)["data"]))

    def pdf(self, path: Path) -> None:
        found = self.page(
            "Page.printToPDF", printBackground=True, preferCSSPageSize=True, paperWidth=8.27, paperHeight=11.69
        )
        path.write_bytes(base64.b64decode(found["data"]))

    def _seen(self, address: str) -> Seen:
        messages, requests = [], []
        for event in self.events:
            found = event["params"]
            if event["method"] == "Runtime.consoleAPICalled":
                messages.append(str(found["args"]))
            elif event["method"] == "Runtime.exceptionThrown":
                messages.append(str(found["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded":
                messages.append(found["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent":
                requests.append(found["request"]["url"])
        asked = [url for url in requests if url != address and not url.startswith("data:")]
        width = "document.documentElement.clientWidth"
        overflow = self.evaluate(f"document.documentElement.scrollWidth - {width}")
        beyond = (
            f"[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > {width} + 1)"
            ".slice(0, 5).map(e => e.outerHTML.slice(0, 120))"
        )
        return Seen(messages, asked, overflow, self.evaluate(beyond) if overflow > 0 else [])

    def _send(self, method: str, parameters: dict[str, Any], session: str | None) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        return self._number

    def _answer(self, number: int) -> dict[str, Any]:
        while True:
            message = self._next()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            if "method" in message:
                self.events.append(message)

    def _until(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            message = self._next()
            if "method" in message:
                self.events.append(message)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0, end - time.monotonic()))
            piece = os.read(self._in, 1 << 20) if ready else b""
            if not piece:
                raise RuntimeError("Chromium does not answer" if not ready else "Chromium has ended")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    found = Browser()
    try:
        yield found
    finally:
        found.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--height", type=int, default=1500, help="pixels of the page")
    parser.add_argument("--anchor", default="", help="id of the element to begin at")
    parser.add_argument("--print", action="store_true", help="a PDF of the page too")
    parser.add_argument("--suffix", default="webp", choices=("webp", "png"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with browser() as window:
        for name, (width, height) in WIDTHS.items():
            for dark in (False, True):
                print(name, "dark" if dark else "light", window.open(given.report, width, height, dark=dark))
                mode = "-dark" if dark else ""
                path = given.out / f"{given.name}-{name}{mode}.{given.suffix}"
                window.screenshot(path, height=given.height, anchor=given.anchor)
        if given.print:
            window.open(given.report)
            window.pdf(given.out / f"{given.name}.pdf")


if __name__ == "__main__":
    main()
