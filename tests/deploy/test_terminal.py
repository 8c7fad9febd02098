"""The progress of a training on a terminal whose size changes, or that has the bar of another process; after Ctrl-C;
and where nobody reads any more."""

import fcntl
import os
import pathlib
import pty
import re
import signal
import struct
import tempfile
import termios
import threading
import unittest
import urllib.request

from hosts import SLOW, environment, example

# What a terminal does not show: colours, the erasing of lines, moves of the cursor.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, test, line, columns, **variables):
        self.bytes, self.changed = b"", threading.Condition()
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            # The size is there before the program looks.
            resize(0, columns)
            os.execve(line[0], [str(word) for word in line], environment(**{"TERM": "xterm", **variables}))
        self.status = None
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        test.addCleanup(self.kill)

    def read(self):
        while True:
            try:
                some = os.read(self.terminal, 1 << 16)
            except OSError:  # The program has ended.
                some = b""
            with self.changed:
                self.bytes += some
                if not some:
                    self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                self.changed.notify_all()
            if not some:
                return

    def text(self, start=0):
        return self.bytes[start:].decode(errors="replace")

    def wait_for(self, pattern, start=0, seconds=60):
        with self.changed:
            is_there = lambda: re.search(pattern, self.text(start)) or self.status is not None
            self.changed.wait_for(is_there, seconds * SLOW)
            if not re.search(pattern, self.text(start)):
                raise AssertionError(f"no {pattern!r} within {seconds} s:\n{self.text(start)}")
            return len(self.bytes)

    def wait(self, seconds=60):
        with self.changed:
            if not self.changed.wait_for(lambda: self.status is not None, seconds * SLOW):
                raise AssertionError(f"it does not end:\n{self.text()}")
            return self.status, self.text()

    def kill(self):
        with self.changed:
            if self.status is None:
                os.kill(self.pid, signal.SIGKILL)
        self.reader.join(10)
        os.close(self.terminal)


def resize(terminal, columns):
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))


def drawn(text):
    """All that was written to a line, without what a terminal does not show."""
    return [CONTROL.sub("", part) for part in re.split(r"\r\n|\r|\n|\x1b\[2K", text)]


class Progress(unittest.TestCase):
    def start(self, *flags, columns=100, **variables):
        line = [example("sharded_ps"), "--offline", "--batch-size", "16", *flags]
        return Terminal(self, line, columns, **variables)

    def test_the_bar_fits_into_a_terminal_that_becomes_narrow(self):
        terminal = self.start("--iterations", "200000")
        start = terminal.wait_for("gradients/s, staleness")
        self.assertTrue(any(60 < len(part) <= 100 for part in drawn(terminal.text())), drawn(terminal.text()))
        resize(terminal.terminal, 40)
        # What was under way is drawn in the old width.
        two = r"(?s)\[=*>? *\].*\[=*>? *\]"
        start = terminal.wait_for(two, start)
        terminal.wait_for(two, start)
        bars = [part for part in drawn(terminal.text(start)) if part.startswith("[")]
        self.assertTrue(bars)
        for bar in bars:
            self.assertLessEqual(len(bar), 40, bar)

    def test_ctrl_c_leaves_the_table_and_no_bar(self):
        terminal = self.start("--iterations", "200000")
        terminal.wait_for("gradients/s")
        os.write(terminal.terminal, b"\x03")
        code, text = terminal.wait()
        self.assertEqual(code, 130, text)
        self.assertIn("Interrupted by SIGINT", text)
        # The last thing that was written to each line is what stays there.
        shown = [re.split(r"\r|\x1b\[2K", line.rstrip("\r"))[-1] for line in text.split("\n")]
        self.assertTrue(any(re.match(r"worker 1 +\d+ ", line) for line in shown), shown)
        self.assertEqual([line for line in shown if "left, " in line], [])

    def test_a_pause_is_shown(self):
        token = "correct-horse-battery-staple"
        terminal = self.start("--iterations", "200000", "--dashboard", "127.0.0.1:0", PS_DASHBOARD_TOKEN=token)
        start = terminal.wait_for("gradients/s")
        url = re.search(r"The dashboard is at (http://\S+/)", terminal.text())[1]
        headers = {"content-type": "application/json", "x-ps-dashboard": "1", "authorization": f"Bearer {token}"}
        for path, pattern in [("pause", r"\] +\d+ % paused, "), ("resume", r"\] +\d+ % [\d:]+ \S+ left, ")]:
            with urllib.request.urlopen(urllib.request.Request(f"{url}api/{path}", b"{}", headers), timeout=20):
                start = terminal.wait_for(pattern, start)

    def test_a_terminal_that_cannot_erase_gets_no_bar_and_no_colours(self):
        terminal = self.start("--iterations", "100", TERM="dumb", NO_COLOR="")
        code, text = terminal.wait(150)
        self.assertEqual(code, 0, text)
        self.assertNotIn("\x1b", text)
        self.assertRegex(text, r"\nworker 1 +\d+ ")

    def waits_for_the_cache(self, **variables):
        """Starts a program that waits for another one, which fills the cache and may show a bar on the same terminal.
        Returns all that it wrote until it says so."""
        folder = tempfile.TemporaryDirectory(prefix="ps-terminal-")
        self.addCleanup(folder.cleanup)
        cache = pathlib.Path(folder.name) / "ps" / "mnist"
        cache.mkdir(parents=True)
        lock = (cache / ".lock").open("w")
        self.addCleanup(lock.close)
        fcntl.flock(lock, fcntl.LOCK_EX)
        variables = {"XDG_CACHE_HOME": folder.name, "PS_OFFLINE": "0", **variables}
        terminal = Terminal(self, [example("sharded_ps")], 100, **variables)
        terminal.wait_for("waiting for another process[^\n]*\n")
        return terminal.text()

    def test_a_log_line_erases_the_bar_that_is_where_it_begins(self):
        self.assertRegex(self.waits_for_the_cache(), r"\r\x1b\[K[^\r\n\x1b]*waiting for another process")
        # This one cannot erase anything.
        self.assertNotIn("\x1b", self.waits_for_the_cache(TERM="dumb"))

    def test_a_reader_that_goes_away_ends_no_training(self):
        line = f"{example('sharded_ps')} --offline --batch-size 16 --iterations 300 | head -1; echo code ${{PIPESTATUS[0]}}"
        terminal = Terminal(self, ["/bin/bash", "-c", line], 100)
        _, text = terminal.wait(150)
        self.assertNotIn("panicked", text)
        # The bar goes on, although nobody reads the lines any more, and the table comes.
        self.assertRegex(text, r"\[=*>? *\] +\d+ %")
        shown = [re.split(r"\r|\x1b\[2K", line.rstrip("\r"))[-1] for line in text.split("\n")]
        self.assertIn("code 0", shown)
        self.assertTrue(any(re.match(r"worker 1 +\d+ ", line) for line in shown), shown)
        # Of the program's lines, only the first one was read.
        self.assertEqual(re.findall(r"MNIST, |Iter |Final ", text), ["MNIST, "])


if __name__ == "__main__":
    unittest.main(verbosity=2)
