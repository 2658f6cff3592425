"""A headless Chromium that shows a page at the width of a phone, tablet or desktop.

The options --window-size and --screenshot cannot do this: a window has a least width of 500 pixels.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile


def find_chromium():
    """The path of Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A context with an open browser, driven by messages of the DevTools protocol over two pipes."""

    def __enter__(self):
        # Processes of the browser may still write into the folder when it is removed.
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (to_browser, self.to_fd), (self.from_fd, from_browser) = os.pipe(), os.pipe()
        # The browser reads from descriptor 3 and writes to 4; numbers from 10 on are surely not these.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_browser, from_browser)]
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self.profile.name}"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", find_chromium(), *options],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (to_browser, from_browser, *ends):
            os.close(fd)
        self.answers, self.count, self.session = os.fdopen(self.from_fd, "rb"), 0, {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        os.close(self.to_fd)
        self.answers.close()
        self.profile.cleanup()

    def send(self, method, **params):
        """Send a command and return its result; events in between are ignored."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.session}
        os.write(self.to_fd, json.dumps(message).encode() + b"\0")
        while True:
            text = bytearray()
            while (byte := self.answers.read(1)) != b"\0":
                assert byte, "the browser has closed"
                text += byte
            answer = json.loads(text)
            if answer.get("id") == self.count:
                return answer["result"]

    def open(self, path, width, *, dark=False):
        """Load the page of a file at that width in CSS pixels."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.as_uri())
        while self.run("document.readyState + location.href") != "complete" + path.as_uri():
            pass

    def run(self, code):
        """Return the value of a JavaScript expression in the page."""
        result = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")
