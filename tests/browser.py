"""A headless Chromium under a test's control, through the pipe of its DevTools protocol."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-component-update",
    "--disable-background-networking",
    "--no-first-run",
)
TO_BROWSER, FROM_BROWSER = 3, 4  # the numbers that Chromium expects
SHORTCUT = {"Control": 2, "Shift": 8}


class Page:
    """One page: what it requests, what it logs, and a mouse and a keyboard for it."""

    def __init__(self, send: Callable[..., dict[str, Any]], session: str) -> None:
        self._send, self._session = send, session
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Network", "Runtime", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._send(method, params, self._session)

    def heard(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if fault := answer.get("exceptionDetails"):
            raise AssertionError(fault.get("exception", {}).get("description", fault["text"]))
        return answer["result"].get("value")

    def until(self, script: str, *, timeout_s: float = 60) -> Any:
        """Wait for an expression to be true, and return its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script} stayed {value!r}; {self.errors}"
            time.sleep(0.05)
        return value

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, scrolled into view."""
        found: list[float] = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'nearest'}); const r = e.getBoundingClientRect();"
            "return [r.left, r.top, r.width, r.height]; })()"
        )
        return found[0], found[1], found[2], found[3]

    def click(self, selector: str) -> None:
        left, top, width, height = self.box(selector)
        self.drag([(left + width / 2, top + height / 2)])

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Press the left button at the first point, move over all of them, release at the last."""
        for kind, (x, y) in [
            ("mousePressed", points[0]),
            *[("mouseMoved", point) for point in points],
            ("mouseReleased", points[-1]),
        ]:
            button = {"button": "left", "buttons": 1, "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def press(self, key: str, *held: str) -> None:
        """One key, with ``held`` keys of ``SHORTCUT``."""
        modifiers = sum(SHORTCUT[name] for name in held)
        text = {"text": key} if len(key) == 1 and "Control" not in held else {}
        named = {"key": key, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def choose_file(self, selector: str, path: Path) -> None:
        """Give ``path`` to a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


class Browser:
    """A running Chromium; ``page`` opens one more page in a profile of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]", write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._buffer, self._number = b"", 0
        self._pages: dict[str, Page] = {}

    def page(self, width: int = 1280, height: int = 900, *, downloads: Path | None = None) -> Page:
        """A new page; what it saves lies in ``downloads``."""
        context = self._call("Target.createBrowserContext", {})["browserContextId"]
        if downloads:
            allow = {"behavior": "allow", "downloadPath": str(downloads)}
            self._call("Browser.setDownloadBehavior", {**allow, "browserContextId": context})
        target = self._call(
            "Target.createTarget", {"url": "about:blank", "browserContextId": context}
        )["targetId"]
        attach = {"targetId": target, "flatten": True}
        session = self._call("Target.attachToTarget", attach)["sessionId"]
        page = self._pages[session] = Page(self._call, session)
        page.resize(width, height)
        return page

    def _call(
        self, method: str, params: dict[str, Any], session: str | None = None
    ) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        for answer in self._messages(timeout_s=60):
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            if page := self._pages.get(answer.get("sessionId", "")):
                page.heard(answer.get("method", ""), answer.get("params", {}))
        raise AssertionError(f"Chromium did not answer {method}: {self._process.poll()}")

    def _messages(self, *, timeout_s: float) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            while b"\0" in self._buffer:
                message, self._buffer = self._buffer.split(b"\0", 1)
                yield json.loads(message)
            if select.select([self._read], [], [], left)[0]:
                received = os.read(self._read, 1 << 20)
                if not received:
                    return
                self._buffer += received


@contextmanager
def headless_browser(profile: Path) -> Iterator[Browser]:
    """A headless Chromium with its files under ``profile``, ended after the block."""
    for_browser, ours = os.pipe()
    answers, from_browser = os.pipe()

    def connect() -> None:
        os.dup2(for_browser, 100 + TO_BROWSER)  # first out of the way of each other
        os.dup2(from_browser, 100 + FROM_BROWSER)
        os.dup2(100 + TO_BROWSER, TO_BROWSER)
        os.dup2(100 + FROM_BROWSER, FROM_BROWSER)

    process = subprocess.Popen(
        [
            str(CHROMIUM),
            *FLAGS,
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "about:blank",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[TO_BROWSER, FROM_BROWSER],
        preexec_fn=connect,
    )
    os.close(for_browser)
    os.close(from_browser)
    try:
        yield Browser(process, ours, answers)
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours)
        os.close(answers)
