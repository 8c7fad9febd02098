"""What the tests of the engines share: hosts that are network namespaces, and waiting with a time limit."""

import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TARGET = REPOSITORY / os.environ.get("CARGO_TARGET_DIR", "target")
# `release` for measurements.
PROFILE = os.environ.get("PS_PROFILE", "debug")
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "ps"

# On a machine where other programs take the processor away, PS_SLOW=3 allows three times as much for each wait.
SLOW = float(os.environ.get("PS_SLOW", "1"))
# A failed start has to name its cause within this time, from the start of the process (namespaces and all) to the line. It
# is not a time after which the test looks: each test waits for the line, and then asks when it came.
# PS_SLOW_EXPLANATION=1 checks the promise of the guides, whatever PS_SLOW is.
EXPLAINED_WITHIN = 5 * float(os.environ.get("PS_SLOW_EXPLANATION", SLOW))

# Processes of one host find each other's Unix sockets here; those of others do not, and must use the network.
OWN_SOCKETS = {"TMPDIR": "/dev/shm"}


def example(name):
    """The path of an example's binary."""
    path = TARGET / PROFILE / "examples" / name
    if not path.exists():
        raise unittest.SkipTest(f"{path} is missing: run `cargo build --workspace --examples`")
    return path


def environment(**variables):
    """The environment of a process in a test: nothing of a launcher around the test, no download."""
    return {"PATH": os.environ["PATH"], "PS_OFFLINE": "1", "NO_COLOR": "1", **variables}


def install(venv, *packages):
    """Installs packages into a virtual environment of their own, or skips the tests and says why."""
    done = venv / "installed"
    if done.exists() and done.read_text() == " ".join(packages):
        return
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True, capture_output=True, text=True)
        pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", *packages]
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=300)
    except (subprocess.SubprocessError, OSError) as error:
        why = getattr(error, "stderr", None) or str(error)
        raise unittest.SkipTest(f"{' '.join(packages)} cannot be installed: {why.strip()[-300:]}") from None
    done.write_text(" ".join(packages))


def free_port():
    """A port that the system gives to nobody by itself, so that it stays free while nobody listens there."""
    for _ in range(100):
        port = random.randrange(20000, 32768)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def need_root():
    if os.geteuid() != 0:
        raise unittest.SkipTest("network namespaces need root")
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        raise unittest.SkipTest("iproute2 or nsenter is missing")


class Process:
    """A child process with its lines. It is killed at the end of the test, with its process group."""

    def __init__(self, test, command, **options):
        self.lines, self.changed = [], threading.Condition()
        self.times, self.begun = [], time.monotonic()
        self.child = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True, **options,
        )
        self.is_over = False
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        test.addCleanup(self.kill)

    def _read(self):
        for line in self.child.stdout:
            with self.changed:
                self.lines.append(line)
                self.times.append(time.monotonic() - self.begun)
                self.changed.notify_all()
        with self.changed:
            self.is_over = True
            self.changed.notify_all()

    def text(self):
        with self.changed:
            return "".join(self.lines)

    def wait_for(self, pattern, seconds=60, occurrence=1):
        """Waits until a line matches, and returns the match. Fails when the process ends before that."""
        seconds *= SLOW

        def found():
            matches = [match for line in self.lines if (match := re.search(pattern, line))]
            return matches[occurrence - 1] if len(matches) >= occurrence else None

        with self.changed:
            self.changed.wait_for(lambda: found() or self.is_over, seconds)
            if match := found():
                return match
        raise AssertionError(f"no line {occurrence} with {pattern!r} within {seconds} s:\n{self.text()}")

    def explains(self, pattern):
        """Waits until a line matches, and checks that it has come soon enough after the start. Returns the time."""
        self.wait_for(pattern)
        with self.changed:
            at = next(at for line, at in zip(self.lines, self.times) if re.search(pattern, line))
        if at > EXPLAINED_WITHIN:
            raise AssertionError(f"{pattern!r} only came after {at:.1f} s:\n{self.text()}")
        return at

    def wait(self, seconds=60):
        """Waits for the end. Returns the exit code and all output."""
        seconds *= SLOW
        try:
            code = self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text()}") from None
        self.reader.join(10)
        return code, self.text()

    def kill(self):
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()
        # The pipe stays open as long as a process of another group has it.
        self.reader.join(1)
        if not self.reader.is_alive():
            self.child.stdout.close()


def eventually(condition, what, seconds=60):
    """Polls until the condition holds, and returns its value."""
    seconds *= SLOW
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what() if callable(what) else what}")


class Hosts:
    """N hosts and a switch between them: host0 at 10.78.0.1, and so on. Each has its own /tmp/ray, /dev/shm
    and /etc/hosts."""

    def __init__(self, test, count, prefix="ps-engine", network="10.78.0"):
        need_root()
        self.network = network
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="ps-engine-"))
        self.prefix = f"{prefix}.{os.getpid()}"
        self.names = [f"{self.prefix}.{number}" for number in range(count)]
        self.switch = f"{self.prefix}.switch"
        test.addCleanup(self.remove)
        names = [f"{self.address(number)} host{number}\n" for number in range(count)]
        self.set_names(*names)
        self.ip(f"netns add {self.switch}", f"-n {self.switch} link add br0 type bridge",
                f"-n {self.switch} link set br0 up")
        for number, name in enumerate(self.names):
            self.ip(
                f"netns add {name}",
                f"link add eth0 netns {name} type veth peer name h{number} netns {self.switch}",
                f"-n {self.switch} link set h{number} master br0 up",
                f"-n {name} addr add {self.address(number)}/24 dev eth0",
                f"-n {name} link set eth0 up",
                f"-n {name} link set lo up",
            )

    @staticmethod
    def ip(*commands):
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            if done.returncode != 0:
                raise unittest.SkipTest(f"ip {command}: {done.stderr.strip()}")

    def address(self, number):
        return f"{self.network}.{number + 1}"

    def set_names(self, *lines, host=None):
        """What /etc/hosts says, beside localhost, in commands from now on: on one host, or on all that have no own one."""
        name = "hosts" if host is None else f"hosts.{host}"
        (self.directory / name).write_text("127.0.0.1 localhost\n" + "".join(lines))

    def set_name_server(self, address):
        """Whom hosts ask for names that are not in /etc/hosts, in commands from now on."""
        (self.directory / "resolv.conf").write_text(f"nameserver {address}\n")

    def command(self, number, command):
        """The command, on that host."""
        private = self.directory / str(number)
        private.mkdir(exist_ok=True)
        script = (
            'mount --make-rprivate / && mkdir -p /tmp/ray && mount --bind "$1" /tmp/ray && '
            'mount -t tmpfs tmpfs /dev/shm && mount --bind "$3" /etc/hosts && { [ ! -e "$4" ] || '
            'mount --bind "$4" /etc/resolv.conf; } && hostname "$2" && shift 4 && exec "$@"'
        )
        own_names = self.directory / f"hosts.{number}"
        names = own_names if own_names.exists() else self.directory / "hosts"
        name_server = self.directory / "resolv.conf"
        enter = ["nsenter", f"--net=/run/netns/{self.names[number]}", "unshare", "-m", "-u"]
        return [*enter, "sh", "-c", script, "sh", private, f"host{number}", names, name_server, *command]

    def processes(self, number):
        found = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, text=True)
        return [int(word) for word in found.stdout.split()]

    def crash(self, number):
        """Kills all processes of a host, and cuts its cable."""
        self.ip(f"-n {self.switch} link set h{number} down")
        self._kill_all(number)

    def _kill_all(self, number):
        for _ in range(50):
            processes = self.processes(number)
            for process in processes:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if not processes:
                return
            time.sleep(0.1)

    def remove(self):
        for number, name in enumerate(self.names):
            self._kill_all(number)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.switch], capture_output=True)
        shutil.rmtree(self.directory, ignore_errors=True)
