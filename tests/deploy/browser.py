"""A browser under the control of a test: Debian's Chromium, driven by WebDriver over HTTP, with nothing but the standard
library. See https://www.w3.org/TR/webdriver2/."""

import base64
import json
import shutil
import time
import unittest
import urllib.error
import urllib.request

from hosts import SLOW, Process, environment

# The name of an element in WebDriver's JSON.
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
TAB, ENTER, SPACE, RIGHT = "\ue004", "\ue007", "\ue00d", "\ue014"

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
]


class Browser:
    def __init__(self, test):
        programs = [shutil.which("chromium"), shutil.which("chromedriver")]
        if None in programs:
            raise unittest.SkipTest("Chromium is missing: apt-get install chromium chromium-driver")
        driver = Process(test, [programs[1], "--port=0"], env=environment(HOME="/tmp"))
        port = driver.wait_for(r"started successfully on port (\d+)")[1]
        self.address = f"http://127.0.0.1:{port}"
        options = {"binary": programs[0], "args": FLAGS}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"}}
        session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{session['sessionId']}"
        test.addCleanup(self.quit)

    def call(self, method, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.address + path, data, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.read().decode()[:500]}") from None

    def quit(self):
        self.call("DELETE", self.session)

    def open(self, url):
        self.call("POST", f"{self.session}/url", {"url": url})

    def run(self, script, *arguments):
        """Runs a function body in the page, and returns what it returns."""
        return self.call("POST", f"{self.session}/execute/sync", {"script": script, "args": list(arguments)})

    def run_async(self, script, *arguments):
        """Runs a function body in the page, whose last argument is a function that takes the result."""
        return self.call("POST", f"{self.session}/execute/async", {"script": script, "args": list(arguments)})

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def find(self, selector):
        found = self.call("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        return found[ELEMENT]

    def frame(self, selector):
        """From now on looks into this frame of the page, or at the whole page if it is None."""
        frame = selector and {ELEMENT: self.find(selector)}
        self.call("POST", f"{self.session}/frame", {"id": frame})

    def click(self, selector):
        self.call("POST", f"{self.session}/element/{self.find(selector)}/click", {})

    def type(self, selector, text):
        self.call("POST", f"{self.session}/element/{self.find(selector)}/value", {"text": text})

    def press(self, *keys):
        """Presses and releases keys, whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("POST", f"{self.session}/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def protocol(self, command, **parameters):
        """Sends a command of Chromium's own protocol."""
        return self.call("POST", f"{self.session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def logs(self, kind):
        return self.call("POST", f"{self.session}/se/log", {"type": kind})

    def requests(self):
        """The addresses that pages have asked for since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.logs("performance")]
        sent = [one for one in messages if one["method"] == "Network.requestWillBeSent"]
        return [one["params"]["request"]["url"] for one in sent]

    def screenshot(self, path, height=None):
        """Saves a picture of the page, from its top, at most so high."""
        size = self.protocol("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], height or 1e9), "scale": 1}
        shot = self.protocol("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def look(self, width, height, colours, is_phone=False):
        """From now on the page has this size, and the system these colours."""
        self.protocol("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone)
        features = [{"name": "prefers-color-scheme", "value": colours}]
        self.protocol("Emulation.setEmulatedMedia", features=features)

    def eventually(self, script, *arguments, seconds=30):
        """Polls until a function body returns something true, and returns it."""
        deadline = time.monotonic() + seconds * SLOW
        while time.monotonic() < deadline:
            if value := self.run(script, *arguments):
                return value
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s: {script} {arguments}: {self.text('body')[:2000]}")
