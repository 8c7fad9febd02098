"""The dashboard in a real browser: what it shows, who may change something, keyboard, colours, sizes.

With PS_SCREENSHOTS=DIR it leaves pictures there. Those of docs/ were made so."""

import contextlib
import http.server
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import tempfile
import threading
import unittest
import urllib.request

from browser import ENTER, RIGHT, TAB, Browser
from hosts import Process, environment, eventually, example, free_port
from readme import command, desk

TOKEN = "correct-horse-battery-staple"
CONTROLS = {"theme", "token", "pause", "checkpoint", "rate", "set-rate", "mode", "set-mode", "who", "remove", "end"}
CHARTS = ["chart-loss", "chart-accuracy", "chart-rate", "chart-staleness"]


class Client:
    """A worker that speaks HTTP, whose gradients are all the same. It sends heartbeats until it falls silent."""

    def __init__(self, url, worker, test):
        self.url, self.worker, self.test = url, worker, test
        self.is_silent = threading.Event()
        self.beating = threading.Thread(target=self.beat, daemon=True)

    def ask(self, path, body=b"", **headers):
        headers = {f"ps-{name.replace('_', '-')}": str(value) for name, value in headers.items()}
        request = urllib.request.Request(f"{self.url}/v1/{path}", body, {"ps-worker": str(self.worker), **headers})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.headers

    def join(self):
        headers = self.ask("join", request=1)
        self.incarnation, self.size = headers["ps-incarnation"], int(headers["ps-num-weights"])
        self.test.addCleanup(self.is_silent.set)
        self.beating.start()

    def beat(self):
        while not self.is_silent.wait(2):
            # If none arrives, the worker is lost, and the test sees that.
            with contextlib.suppress(OSError):
                self.ask("heartbeat", incarnation=self.incarnation)

    def fall_silent(self):
        self.is_silent.set()
        self.beating.join(30)

    def push(self, clock):
        gradient = struct.pack("<f", 1e-3) * self.size
        headers = self.ask("push", gradient, incarnation=self.incarnation, clock=clock, version=clock, loss=1, num_examples=8)
        self.test.assertEqual(headers["ps-outcome"], "applied")

    def leave(self):
        self.fall_silent()
        self.ask("leave", incarnation=self.incarnation)


class Dashboard(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ps-dashboard-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.pictures = pathlib.Path(os.environ.get("PS_SCREENSHOTS", self.folder))
        self.binaries = desk(self.folder)

    @property
    def browser(self):
        """The browser, started when a test first needs it."""
        if not hasattr(self, "_browser"):
            self._browser = Browser(self)
        return self._browser

    def start(self, *flags, port=0, token=TOKEN, consistency="ssp:2", iterations=200000):
        """Starts a training of some minutes, and returns its process and the address of its page."""
        variables = {"PS_DASHBOARD_TOKEN": token} if token else {}
        line = [example("sharded_ps"), "--iterations", iterations, "--batch-size", "32", "--num-servers", "2",
                "--consistency", consistency, "--dashboard", f"127.0.0.1:{port}", *flags]
        process = Process(self, line, cwd=self.folder, env=environment(**variables))
        return process, process.wait_for(r"The dashboard is at (http://\S+)")[1]

    def start_loop(self, *flags):
        """Starts a program with a loop of its own."""
        line = [example("sync_ps"), "--iterations", "200000", "--batch-size", "32", "--dashboard", "127.0.0.1:0", *flags]
        process = Process(self, line, cwd=self.folder, env=environment(PS_DASHBOARD_TOKEN=TOKEN))
        return process, process.wait_for(r"The dashboard is at (http://\S+)")[1]

    def happened(self, url, text):
        """Waits until the page tells of something. All earlier steps are counted then."""
        eventually(lambda: any(text in one["text"] for one in self.state(url)["incidents"]), text)

    def end(self, process):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.child.pid, signal.SIGTERM)
        process.wait(60)

    def state(self, url):
        with urllib.request.urlopen(f"{url}api/state", timeout=20) as answer:
            return json.load(answer)["state"]

    def version(self, url):
        return self.state(url)["version"]

    def post(self, url, path, **body):
        """Changes something as a program does, and returns what the training says."""
        headers = {"content-type": "application/json", "x-ps-dashboard": "1", "authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(f"{url}api/{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)["done"]

    def look(self, url):
        """Waits until the servers have been looked at once more, which happens once per second."""
        before = self.state(url)["looked"]
        eventually(lambda: self.state(url)["looked"] != before, "a look at the servers")

    def stands_still(self, url):
        """Checks that no update is made between two looks at the servers. Returns the version."""
        # The first look may have begun before the pause.
        self.look(url)
        self.look(url)
        version = self.version(url)
        self.look(url)
        self.assertEqual(self.version(url), version)
        return version

    def is_live(self):
        self.browser.eventually("return document.querySelector('#connection').dataset.state === 'live'")

    def can_use(self, selector):
        """Waits until a control can be used. They are disabled while the page waits for an answer."""
        self.browser.eventually("return document.querySelector(arguments[0]).matches(':not(:disabled)')", selector)

    def click(self, selector):
        self.can_use(selector)
        self.browser.click(selector)

    def number(self, selector):
        return float(re.sub(r"[^\d.]", "", self.browser.text(selector)) or "nan")

    def test_it_shows_a_training_and_controls_it(self):
        browser = self.browser
        process, url = self.start("--num-workers", "3", "--checkpoint-dir", "saved", "--checkpoint-every", "500", "--update-log")
        browser.open(url)
        self.is_live()

        # Numbers come and curves move.
        line = "return document.querySelector('#chart-loss .line')?.getAttribute('points')"
        before = browser.eventually(line)
        browser.eventually(f"{line.replace('return', 'return arguments[0] !==')}", before)
        browser.eventually("return document.querySelectorAll('#workers tbody tr').length === 3")
        browser.eventually("return document.querySelectorAll('#servers tbody tr').length === 2")
        browser.eventually("return document.querySelectorAll('#chart-staleness .bar').length > 0")
        browser.eventually("return document.querySelector('#chart-accuracy .line') !== null")
        self.assertEqual(browser.text("#status"), "training")

        # Without the token nothing can be changed, and with a wrong one neither.
        self.assertIn("Type the token", browser.text("#control-note"))
        self.assertTrue(browser.run("return document.querySelector('#controls').disabled"))
        browser.type("#token", "a-token-that-is-wrong")
        self.click("#pause")
        browser.eventually("return document.querySelector('#result').dataset.ok === 'no'")
        self.assertIn("not the dashboard's token", browser.text("#result"))
        self.assertEqual(self.state(url)["status"], "training")

        # With the token, pausing pauses.
        browser.run("document.querySelector('#token').value = ''")
        browser.type("#token", TOKEN)
        self.click("#pause")
        browser.eventually("return document.querySelector('#status').textContent === 'paused'")
        paused_at = self.stands_still(url)

        # What is no number is not taken for one: nothing typed is not 0.
        before = self.state(url)["learning_rate"]
        for typed in ["", "fast", "1e999"]:
            self.can_use("#rate")
            browser.run("const [typed] = arguments, rate = document.querySelector('#rate'); rate.focus(); rate.value = typed; document.querySelector('#result').textContent = ''", typed)
            browser.press(ENTER)
            browser.eventually("return document.querySelector('#result').textContent !== '' && !document.querySelector('#controls').disabled")
            self.assertIn("type the learning rate as a number", browser.text("#result"), typed)
        self.look(url)
        self.assertEqual(self.state(url)["learning_rate"], before)

        # Settings change, and a checkpoint is saved, while it is paused.
        self.can_use("#rate")
        # In one step: without the focus, the page fills it in again.
        browser.run("const rate = document.querySelector('#rate'); rate.focus(); rate.value = ''")
        browser.type("#rate", f"0.005{ENTER}")
        browser.eventually("return document.querySelector('#n-version-more').textContent.includes('learning rate 0.005')")
        before = self.state(url)["checkpoints"][:1]
        self.click("#checkpoint")
        eventually(lambda: self.state(url)["checkpoints"][:1] not in ([], before), "a checkpoint")
        browser.eventually("return [...document.querySelectorAll('#checkpoints li')].some((one) => one.textContent.includes('Update'))")
        # The sizes are those of the files. Nothing is written while it is paused.
        self.look(url)
        state = self.state(url)
        latest = state["checkpoints"][0]
        self.assertEqual(latest["bytes"], sum(file.stat().st_size for file in (self.folder / latest["path"]).iterdir()))
        browser.eventually("return / [kM]B in /.test(document.querySelector('#checkpoints li').textContent)")
        self.assertTrue(state["log"]["is_written"])
        self.assertGreater(state["log"]["bytes"], 0)
        browser.eventually("return /^Update log: updates from [\\d,]+ on, [\\d.]+ [kMG]?B in \\d files?[.]$/.test(document.querySelector('#log-text').textContent)")
        self.click("#resume")
        eventually(lambda: self.version(url) > paused_at, "it goes on")

        # A worker is removed, after it was asked again.
        browser.run("document.querySelector('#who').value = '1'")
        self.click("#remove")
        self.assertIn("Really remove worker 1?", browser.text("#remove"))
        self.click("#remove")
        browser.eventually("return document.querySelectorAll('#workers .state[data-state=removed]').length === 1")

        # What the page says of itself is right, and nothing went wrong in it.
        self.assertIn("worker 1 was told to leave", browser.text("#incidents"))
        problems = [entry for entry in browser.logs("browser") if entry["level"] == "SEVERE" and "401" not in entry["message"]]
        self.assertEqual(problems, [])
        elsewhere = [asked for asked in browser.requests() if not asked.startswith((url, "data:", "chrome:", "chrome-"))]
        self.assertEqual(elsewhere, [])

        # The training ends, and the page says so.
        self.end(process)
        browser.eventually("return document.querySelector('#status').textContent === 'interrupted'")
        self.assertTrue(browser.run("return document.querySelector('#controls').disabled"))

    def test_a_training_is_told_to_end(self):
        browser = self.browser
        process, url = self.start("--num-workers", "2")
        browser.open(url)
        self.is_live()
        browser.type("#token", TOKEN)
        browser.eventually("return !document.querySelector('#controls').disabled")
        # It is asked again, and thinks better of it first.
        self.click("#end")
        self.assertIn("Really end it?", browser.text("#end"))
        self.click("#end-no")
        self.assertIn("End the training", browser.text("#end"))
        self.click("#end")
        self.click("#end")
        browser.eventually("return document.querySelector('#status').textContent === 'finished'")
        code, text = process.wait()
        self.assertEqual(code, 0, text)
        self.assertIn("Ended as asked after ", text)

    def test_a_page_of_another_site_changes_nothing(self):
        process, url = self.start("--num-workers", "2")
        attack = f"""<!doctype html><form id=f method=post action="{url}api/pause" target=t enctype="text/plain">
        <input name='{{"a":"' value='"}}'></form><iframe name=t></iframe><iframe id=page src="{url}"></iframe>"""

        class Elsewhere(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("content-type", "text/html")
                self.end_headers()
                self.wfile.write(attack.encode())

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        # `localhost` is another site than 127.0.0.1.
        self.browser.open(f"http://localhost:{server.server_port}/")
        fetched = self.browser.run_async("""
            const [url, token, done] = arguments;
            const ask = (path, options) => fetch(url + path, options).then((answer) => answer.type + answer.status, () => "refused");
            const custom = { "content-type": "application/json", "x-ps-dashboard": "1", authorization: `Bearer ${token}` };
            Promise.all([
                ask("api/pause", { method: "POST", headers: custom, body: "{}" }),
                ask("api/pause", { method: "POST", mode: "no-cors", headers: { "content-type": "text/plain" }, body: "{}" }),
                ask("api/state", {}),
            ]).then(done);""", url, TOKEN)
        self.assertEqual([fetched[0], fetched[2]], ["refused", "refused"])
        self.assertIn(fetched[1], ["opaque0", "refused"])
        # Nor is the page shown in a frame of another one, where clicks could be stolen. The frame shows an error.
        self.browser.frame("#page")
        self.browser.eventually("return location.href !== 'about:blank' && document.readyState === 'complete'")
        self.assertEqual(self.browser.run("return location.protocol"), "chrome-error:")
        files = "return performance.getEntriesByType('resource').filter(({ name }) => name.startsWith(arguments[0])).length"
        self.assertEqual(self.browser.run(files, url), 0)
        self.browser.frame(None)
        self.browser.run("document.querySelector('#f').submit()")
        # The answer to the form has come when its frame shows another document.
        self.browser.eventually("try { return frames.t.document === null } catch { return true }")
        self.assertEqual(self.state(url)["status"], "training")
        self.assertFalse(self.state(url)["control"]["is_paused"])
        self.end(process)

    def test_the_keyboard_reaches_everything_and_charts_can_be_read_with_it(self):
        browser = self.browser
        process, url = self.start("--num-workers", "2", "--checkpoint-dir", "saved")
        browser.open(url)
        self.is_live()
        browser.type("#token", TOKEN)
        browser.run("document.querySelector('.skip').focus()")
        reached = ["skip"]
        for _ in range(60):
            browser.press(TAB)
            reached.append(browser.run("""const at = document.activeElement;
                return at === document.body ? null : at.id || at.closest('figure')?.id || at.name || at.className || at.tagName"""))
            if reached[-1] is None:
                break
        self.assertLessEqual(CONTROLS | set(CHARTS) | {"skip", "axis"}, set(reached), reached)
        # What has the focus can be seen: it has an outline.
        self.can_use("#pause")
        browser.run("document.querySelector('.skip').focus()")
        for _ in range(len(reached) - 2):
            browser.press(TAB)
            name, style, width = browser.run("""const { id, tagName } = document.activeElement, style = getComputedStyle(document.activeElement);
                return [id || tagName, style.outlineStyle, parseFloat(style.outlineWidth)]""")
            self.assertTrue(style != "none" and width > 0, f"{name}: {style} {width}")
        browser.run("document.querySelector('#pause').focus()")
        browser.press(ENTER)
        browser.eventually("return document.querySelector('#status').textContent === 'paused'")
        browser.eventually("return document.activeElement.id === 'resume'")
        self.can_use("#resume")
        browser.press(ENTER)
        browser.eventually("return document.querySelector('#status').textContent === 'training'")
        browser.eventually("return document.activeElement.id === 'pause'")
        # The focus stays with the one that can be used, also if somebody else pauses the training.
        self.can_use("#pause")
        for path, other in [("pause", "resume"), ("resume", "pause")]:
            self.post(url, path)
            browser.eventually("return document.querySelector(arguments[0]).disabled", f"#{path}")
            self.assertEqual(browser.run("return document.activeElement.id"), other)
        # A chart says what is under the cursor.
        browser.eventually("return document.querySelector('#chart-loss .line')")
        browser.run("document.querySelector('#chart-loss svg').focus()")
        browser.press("\ue011", RIGHT)
        self.assertRegex(browser.text("#chart-loss output"), r"update [\d,.]+M?: [\d.]+")
        self.assertEqual(browser.run("return document.querySelectorAll('#chart-loss .cross').length"), 1)
        # Everything that takes input has a name, each chart a text and a table.
        unnamed = browser.run("""return [...document.querySelectorAll('button, input, select, svg[role=img]')]
            .filter((one) => !(one.textContent.trim() && one.tagName === 'BUTTON') && !one.labels?.length && !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby'))
            .map((one) => one.outerHTML)""")
        self.assertEqual(unnamed, [])
        for chart in CHARTS:
            self.assertTrue(browser.text(f"#{chart}-text"), chart)
        browser.run("document.querySelector('#chart-loss details').open = true")
        browser.eventually("return document.querySelectorAll('#chart-loss tbody tr').length > 3")
        self.end(process)

    def test_it_comes_back_when_the_driver_is_started_again(self):
        browser = self.browser
        port = free_port()
        process, url = self.start("--num-workers", "2", "--checkpoint-dir", "saved", "--checkpoint-every", "50",
                                  port=port)
        browser.open(url)
        self.is_live()
        eventually(lambda: self.state(url)["num_checkpoints"] > 0, "a checkpoint")
        process.kill()
        browser.eventually("return document.querySelector('#connection').textContent === 'disconnected, reconnecting'")
        process, again = self.start("--num-workers", "2", "--checkpoint-dir", "saved", "--resume", port=port)
        self.assertEqual(again, url)
        self.is_live()
        browser.eventually("return document.querySelector('#status').textContent === 'training'")
        first = self.state(url)["run"]["first_version"]
        self.assertGreater(first, 0)
        self.end(process)

    def test_a_signal_ends_a_pause_and_nothing_is_lost(self):
        # It saves no checkpoint by itself before the end.
        process, url = self.start("--num-workers", "2", "--checkpoint-dir", "saved", "--checkpoint-every", "0",
                                  "--run-dir", "run", consistency="bsp")
        self.post(url, "pause")
        version = self.stands_still(url)
        os.killpg(process.child.pid, signal.SIGTERM)
        code, text = process.wait(30)
        self.assertEqual(code, 0, text)
        self.assertNotIn("before all steps are finished", text)
        saved = int(re.findall(r"saved a checkpoint.*version=\D*(\d+)", text)[-1])
        self.assertIn(saved - version, (0, 1), text)
        self.assertEqual(self.changes(), ["paused", "resumed"])

    def test_a_pause_and_settings_outlive_the_servers(self):
        process, url = self.start("--num-workers", "2", "--processes", "3", "--servers-on-nodes",
                                  "--checkpoint-dir", "saved", "--checkpoint-every", "200")
        eventually(lambda: self.state(url)["num_checkpoints"] > 0, "a checkpoint", 120)
        self.post(url, "learning-rate", learning_rate=0.005)
        self.post(url, "consistency", consistency="asp")
        self.post(url, "pause")
        joined = [one["text"] for one in self.state(url)["incidents"] if "joined" in one["text"]]
        os.kill(int(re.search(r"process (\d+)", joined[-1])[1]), signal.SIGKILL)
        eventually(lambda: any("goes on from update" in one["text"] for one in self.state(url)["incidents"]), process.text, 60)
        self.assertEqual(self.state(url)["status"], "paused")
        version = self.stands_still(url)
        state = self.state(url)
        self.assertEqual((state["learning_rate"], state["consistency"]), (0.005, "asp"))
        self.post(url, "resume")
        eventually(lambda: self.version(url) > version, "it goes on")
        self.end(process)

    def changes(self):
        """What the directory of the run says that was changed."""
        events = map(json.loads, (self.folder / "run" / "events.jsonl").read_text().splitlines())
        return [event["change"] for event in events if event["event"] == "controlled"]

    def test_a_loop_of_its_own_is_controlled_and_says_what_it_decides_itself(self):
        browser = self.browser
        # It saves no checkpoint by itself.
        process, url = self.start_loop("--checkpoint-dir", "saved", "--checkpoint-every", "0", "--run-dir", "run")
        browser.open(url)
        self.is_live()
        browser.type("#token", TOKEN)
        browser.eventually("return !document.querySelector('#controls').disabled")
        self.assertIn("decides itself when gradients are applied", browser.text("#control-missing"))
        disabled = browser.run("return ['mode', 'set-mode', 'who', 'remove', 'end', 'pause', 'checkpoint', 'set-rate'].map((id) => document.getElementById(id).disabled)")
        self.assertEqual(disabled, [True] * 5 + [False] * 3)
        eventually(lambda: self.version(url) > 10, "it trains")
        # It says how fast it is, and not how many weights it has.
        browser.eventually("return document.querySelector('#chart-rate .line, #chart-rate .dot')")
        self.assertEqual(browser.text("#servers-text"), "1 server. The first one decides.")
        self.click("#pause")
        self.happened(url, "paused")
        version = self.version(url)
        self.post(url, "learning-rate", learning_rate=0.005)
        self.post(url, "checkpoint")
        eventually(lambda: self.state(url)["num_checkpoints"] == 1, "a checkpoint")
        self.happened(url, "the learning rate is 0.005 now")
        state = self.state(url)
        self.assertEqual((state["version"], state["status"], state["learning_rate"]), (version, "paused", 0.005))
        self.assertEqual(state["checkpoints"][0]["version"], version)
        # The same version is not saved again.
        self.post(url, "checkpoint")
        self.click("#resume")
        eventually(lambda: self.version(url) > version, "it goes on")
        # A signal ends a pause.
        self.post(url, "pause")
        os.killpg(process.child.pid, signal.SIGTERM)
        code, text = process.wait(60)
        self.assertEqual(code, 0, text)
        self.assertIn("To go on: ", text)
        saved = re.findall(r"saved a checkpoint.*version=\D*(\d+)", text)
        self.assertEqual(saved.count(str(version)), 1, text)
        asked = ["learning_rate", "checkpoint_asked", "checkpoint_asked"]
        self.assertEqual(self.changes(), ["paused", *asked, "resumed", "paused", "resumed"])

    def test_workers_of_any_language_are_shown(self):
        browser = self.browser
        # Its own port is the one that the page has elsewhere.
        line = [example("http_server"), "--consistency", "asp", "--num-workers", "2", "--dashboard"]
        process = Process(self, line, cwd=self.folder, env=environment(PS_DASHBOARD_TOKEN=TOKEN))
        process.wait_for(r"Waiting for workers: http://127.0.0.1:8265/")
        url = process.wait_for(r"The dashboard is at (http://\S+)")[1]
        self.assertEqual(url, "http://127.0.0.1:8266/")
        workers = [Client("http://127.0.0.1:8265", worker, self) for worker in range(2)]
        for worker in workers:
            worker.join()
        for clock in range(20):
            for worker in workers:
                worker.push(clock)
        # Both ports have the metrics.
        for port in [url, "http://127.0.0.1:8265/"]:
            eventually(lambda port=port: self.num_applied(port) == 20, f"metrics at {port}")
        browser.open(url)
        self.is_live()
        browser.eventually("return document.querySelectorAll('#workers .state[data-state=live]').length === 2")
        browser.eventually("return document.querySelector('#n-version').textContent === '40'")
        self.assertEqual(browser.text("#workers td.shares"), "not known")
        self.assertIn("nobody says where the workers are", browser.text("#nodes"))
        self.assertEqual(browser.text("#progress-text").split(" in ")[0], "40 steps")
        browser.eventually("return document.querySelector('#chart-accuracy .line, #chart-accuracy .dot') || document.querySelector('#n-accuracy').textContent !== '–'")
        browser.type("#token", TOKEN)
        browser.eventually("return !document.querySelector('#controls').disabled")
        self.assertEqual(browser.text("#control-missing"), "This program decides itself which workers there are, so none can be removed here, and when it ends.")
        self.assertTrue(browser.run("return document.getElementById('remove').disabled"))
        self.assertFalse(browser.run("return document.getElementById('set-mode').disabled"))
        browser.screenshot(self.pictures / "http.png", 1130)
        workers[0].leave()
        self.happened(url, "worker 0 has left")
        browser.eventually("return document.querySelectorAll('#workers .state[data-state=left]').length === 1")
        # The other one falls silent: it is lost after its lease, and the training ends, which the page still gets.
        workers[1].fall_silent()
        code, text = process.wait(60)
        self.assertEqual(code, 0, text)
        browser.eventually("return document.querySelector('#status').textContent === 'finished'")
        self.assertIn("worker 1 is lost: it was silent for longer than its lease", browser.text("#incidents"))

    def test_several_processes_colours_sizes_and_pictures(self):
        browser = self.browser
        process, url = self.start("--num-workers", "3", "--processes", "3", "--servers-on-nodes",
                                  "--checkpoint-dir", "saved", "--checkpoint-every", "1000", iterations=6000)
        browser.open(url)
        self.is_live()
        browser.eventually("return document.querySelectorAll('#nodes li').length === 2")
        # Enough for a picture.
        eventually(lambda: (state := self.state(url))["steps_done"] > 0.3 * state["steps_all"], "a third of the steps", 120)
        for name, width, height, colours, is_phone in [("light", 1280, 900, "light", False), ("dark", 1280, 900, "dark", False),
                                                       ("phone", 390, 844, "light", True)]:
            browser.look(width, height, colours, is_phone)
            browser.eventually("return document.documentElement.dataset.theme === arguments[0]", colours)
            browser.eventually("return innerWidth === arguments[0]", width)
            # Nothing has to be scrolled to the side.
            self.assertLessEqual(browser.run("return document.documentElement.scrollWidth"), width, name)
            browser.screenshot(self.pictures / f"dashboard-{name}.png", 1500 if is_phone else 1130)
        # The switch overrules the system.
        browser.look(1280, 900, "light")
        browser.run("const theme = document.querySelector('#theme'); theme.value = 'dark'; theme.dispatchEvent(new Event('change'))")
        self.assertEqual(browser.run("return document.documentElement.dataset.theme"), "dark")
        self.end(process)

    def test_the_pictures_of_a_run_can_be_opened(self):
        browser = self.browser
        line = [example("sharded_ps"), "--iterations", "60", "--batch-size", "16", "--num-workers", "3", "--run-dir", "run"]
        code, text = Process(self, line, cwd=self.folder, env=environment()).wait(120)
        self.assertEqual(code, 0, text)
        # Loss and accuracy, each over updates and over time, and the staleness; a row for each worker.
        for name, size in [("curves", [1200, 60 + 3 * 330]), ("timeline", [1200, 150 + 3 * 44])]:
            picture = (self.folder / "run" / name).as_uri()
            browser.open(f"{picture}.png")
            found = browser.eventually("const [one] = document.images; return one?.complete && [one.naturalWidth, one.naturalHeight]")
            self.assertEqual(found, size, name)
            browser.open(f"{picture}.svg")
            # A file that is no XML shows an error in a document of another kind.
            kind, errors, words = browser.run("""const { tagName, textContent } = document.documentElement;
                return [tagName, document.querySelectorAll('parsererror').length, textContent]""")
            self.assertEqual((kind, errors), ("svg", 0), name)
            self.assertIn({"curves": "Staleness", "timeline": "worker 2"}[name], words)

    def test_the_line_of_the_readme(self):
        line = command("README.md", "cargo run --release --example sharded_ps -- --dashboard")
        variables = environment(PATH=f"{self.binaries}:{os.environ['PATH']}", PS_DASHBOARD_TOKEN=TOKEN)
        process = Process(self, ["bash", "-c", line], cwd=self.folder, env=variables)
        process.wait_for(r"The dashboard is at http://127.0.0.1:8265/")
        code, text = process.wait(150)
        self.assertEqual(code, 0, text)

    def num_applied(self, url):
        """How many gradients of worker 1 were applied, as Prometheus reads it."""
        with urllib.request.urlopen(f"{url}metrics", timeout=20) as answer:
            found = re.search(r'^ps_gradients_total\{worker="1",outcome="applied"\} (\d+)$', answer.read().decode(), re.MULTILINE)
        return int(found[1]) if found else 0

    def test_it_has_the_metrics_too(self):
        process, url = self.start("--num-workers", "2")
        eventually(lambda: self.num_applied(url) > 10, "metrics")
        self.end(process)

    def test_a_wrong_token_is_refused_where_reading_needs_one(self):
        browser = self.browser
        line = [example("sharded_ps"), "--iterations", "200000", "--batch-size", "32", "--dashboard", "0.0.0.0:0"]
        process = Process(self, line, cwd=self.folder, env=environment(PS_DASHBOARD_TOKEN=TOKEN))
        browser.open(process.wait_for(r"The dashboard is at (http://\S+)")[1].replace("0.0.0.0", "127.0.0.1"))
        browser.eventually("return document.querySelector('#connection').dataset.state === 'needs-token'")
        self.assertIn("shows nothing without the token", browser.text("#control-note"))
        self.assertEqual(browser.text("#result"), "")
        for wrong in ["a-token-that-is-wrong", "another-token-that-is-wrong"]:
            browser.run("document.querySelector('#token').value = ''")
            browser.type("#token", wrong)
            self.assertEqual(browser.text("#result"), "")
            browser.press(ENTER)
            browser.eventually("return document.querySelector('#result').textContent === \"This is not the dashboard's token.\"")
            # A screen reader reads it.
            self.assertEqual(browser.run("return document.querySelector('#result').getAttribute('aria-live')"), "polite")
        browser.run("document.querySelector('#token').value = ''")
        browser.type("#token", f"{TOKEN}{ENTER}")
        self.is_live()
        self.assertEqual(browser.text("#result"), "")
        self.end(process)

    def test_other_hosts_need_a_token(self):
        line = [example("sharded_ps"), "--dashboard", "0.0.0.0:0"]
        code, text = Process(self, line, env=environment()).wait(60)
        self.assertEqual(code, 64, text)
        self.assertIn("needs a token", text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
