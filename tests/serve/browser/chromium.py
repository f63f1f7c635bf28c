"""A headless Chromium, driven over its DevTools protocol: JSON messages, each ended by a zero byte, on two pipes."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Chromium reads from descriptor 3 and writes to 4; what the test process has open under these numbers stays its own.
LAUNCHER = """
import os, sys
read, write = [os.dup(int(number)) for number in sys.argv[1:3]]  # The second is always the larger.
for source, wanted in ((read, 3), (write, 4)):
    os.dup2(source, wanted)
    os.set_inheritable(wanted, True)  # dup2 leaves a descriptor alone that is the wanted one already.
os.execvp(sys.argv[3], sys.argv[3:])
"""
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "Space": (32, " ")}
SHIFT = 8


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One browser process. Use it as a context manager, so that it ends with the tests."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.mkdtemp(prefix="dsv3-browser-")
        to_read, self._to = os.pipe()
        self._from, from_write = os.pipe()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", "-c", LAUNCHER, str(to_read), str(from_write), program),
                *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-extensions", "--disable-component-update"),
                *(f"--user-data-dir={self._profile}", "about:blank"),
            ],
            pass_fds=(to_read, from_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        self._ids = count(1)
        self._rest = b""
        self._answers: dict[int, dict] = {}
        self.events: list[dict] = []

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, *, session: str | None = None, **params) -> dict:
        """Send a command and return its result."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 20
        while number not in self._answers:
            self._read(deadline, waiting_for=method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _read(self, deadline: float, *, waiting_for: str) -> None:
        ready, _, _ = select.select([self._from], [], [], max(deadline - time.monotonic(), 0))
        received = os.read(self._from, 1 << 20) if ready else b""
        if not received:
            raise TimeoutError(f"no answer from Chromium to {waiting_for}")
        *messages, self._rest = (self._rest + received).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append(message)

    def open_page(self) -> "Page":
        """Open a page with its own storage, as a private window has."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session=session, context=context)


class Page:
    """One page: what a person does with it, and what they see."""

    def __init__(self, browser: Chromium, *, session: str, context: str) -> None:
        self._browser, self._session, self._context = browser, session, context
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        return self._browser.call(method, session=self._session, **params)

    def close(self) -> None:
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    def grant_clipboard(self, origin: str) -> None:
        permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        self._browser.call(
            "Browser.grantPermissions", permissions=permissions, origin=origin, browserContextId=self._context
        )

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def evaluate(self, expression: str):
        """Run an expression in the page and return its value; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_for(self, expression: str, *, seconds: float = 30) -> None:
        """Return once an expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise AssertionError(f"never true: {expression}; the page shows: {self.text('body')}")
            time.sleep(0.01)

    def text(self, selector: str) -> str:
        """What a person reads in the first element that matches; empty where there is none."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def is_shown(self, selector: str) -> bool:
        return self.evaluate(f"Boolean(document.querySelector({json.dumps(selector)})?.checkVisibility())")

    def type(self, text: str) -> None:
        """Write into whatever has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        code, text = KEYS[key]
        event = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        event |= {"modifiers": SHIFT if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, selector: str) -> None:
        """Press the mouse where the middle of an element is, as a person would; what covers it gets the click."""
        place = self.evaluate(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            "found.scrollIntoView({block: 'nearest'});"
            "const box = found.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2] })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def resize(self, width: int, height: int, *, is_phone: bool = False, scale: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=is_phone
        )

    def prefer(self, scheme: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def forget_complaints(self) -> None:
        self._browser.events.clear()

    def complaints(self) -> list[str]:
        """Exceptions that nobody caught, and what the security policy blocked."""
        self.evaluate("0")  # So that events which came before have been read.
        own = [event for event in self._browser.events if event.get("sessionId") == self._session]
        thrown = [str(event["params"]) for event in own if event["method"] == "Runtime.exceptionThrown"]
        entries = [event["params"]["entry"] for event in own if event["method"] == "Log.entryAdded"]
        return thrown + [entry["text"] for entry in entries if entry["source"] in ("security", "violation")]
