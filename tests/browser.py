"""A real headless Chromium, driven over its own pipe: no driver and no further package is needed."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BOUND_S = 30.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

AS_3_AND_4 = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads orders from descriptor 3 and answers on 4."""


def find_browser() -> str | None:
    """A Chromium on the path."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page in a browser of its own.

    Attributes:
        errors: What the console showed as errors, and exceptions that nobody caught.
        requested: Addresses that the page asked for.
    """

    def __init__(self, binary: str, profile: Path) -> None:
        self.errors: list[str] = []
        self.requested: list[str] = []
        (read, browser_writes), (browser_reads, write) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (browser_reads, browser_writes)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", AS_3_AND_4, *map(str, theirs), binary, "--headless=new",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-sandbox", "--disable-gpu",
             "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--hide-scrollbars", "about:blank"],
            pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (browser_reads, browser_writes, *theirs):
            os.close(end)
        self._read, self._write, self._rest = read, write, b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        target = self._order("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._order("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._order(f"{domain}.enable")

    def _order(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        order: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            order["sessionId"] = self._session
        os.write(self._write, json.dumps(order).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == number:
                assert "error" not in said, said["error"]
                return said["result"]
            self._note(said)

    def _next(self) -> dict[str, Any]:
        end_s = time.monotonic() + BOUND_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end_s - time.monotonic()))
            assert ready, f"the browser says nothing for {BOUND_S} s"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        said: dict[str, Any] = json.loads(line)
        return said

    def _note(self, said: dict[str, Any]) -> None:
        params = said.get("params", {})
        match said.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"])[:1000])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert", "warning"):
                self.errors.append(json.dumps(params["args"])[:1000])
            case "Log.entryAdded" if params["entry"]["level"] == "error" and params["entry"]["source"] != "network":
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requested.append(params["request"]["url"])

    def open(self, url: str) -> None:
        self._order("Page.navigate", url=url)

    def eval(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self._order("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        """What stands in the first element; empty if there is none."""
        return str(self.eval(f"document.querySelector({json.dumps(selector)})?.textContent.trim() ?? ''"))

    def type(self, text: str) -> None:
        """Types into whatever has the focus."""
        self._order("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Presses Enter, Tab or Space."""
        code = {"Enter": 13, "Tab": 9, "Space": 32}[key]
        named = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        self._order("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        self._order("Input.dispatchKeyEvent", type="keyUp", **named)

    def look_like(self, width: int, height: int, scheme: str = "light", scale: float = 1.0) -> None:
        """A screen of this size, in a colour scheme."""
        self._order(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        self._order("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._order("Page.captureScreenshot", format="png")["data"]))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
