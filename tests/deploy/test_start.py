"""A start that fails explains itself within five seconds: each mistake that can be made, on hosts that are network
namespaces, with and without `--doctor`. The interruption of a start ends it at once, whatever it waits for."""

import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

from hosts import EXPLAINED_WITHIN, OWN_SOCKETS, Hosts, Process, environment, example, need_root

TOKEN = "token-of-the-three-hosts"
# A training that would go on for long; and the same start, examined.
PLAIN, DOCTOR = ["--offline", "--iterations=1000000", "--learning-rate=0.001"], ["--offline", "--doctor"]
# The port of each: both start at the same time.
PORTS = {29500: PLAIN, 29501: DOCTOR}

# Lets the clock of a process run ahead by SKEW seconds.
SKEWED_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME) now->tv_sec += atol(getenv("SKEW"));
    return result;
}
"""


class Start(unittest.TestCase):
    def setUp(self):
        need_root()
        self.program = example("sharded_ps")
        self.hosts = Hosts(self, 3, prefix="ps-start")
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ps-start-"))
        self.started = []
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def start(self, rank, *flags, host=None, address=None, world_size=3, token=TOKEN, program=None, **variables):
        """Starts a rank, as a training and as its examination. Returns both."""
        host = rank if host is None else host
        variables = {**({"PS_TOKEN": token} if token else {}), **OWN_SOCKETS, **variables}
        processes = []
        for port, mode in PORTS.items():
            words = [f"--rank={rank}", f"--world-size={world_size}", f"--master-addr={address or self.hosts.address(0)}",
                     f"--master-port={port}", *mode, *flags]
            command = self.hosts.command(host, [program or self.program, *words])
            processes.append(Process(self, command, env=environment(**variables)))
        self.started.append(processes)
        return processes

    def explain(self, processes, *patterns):
        """Both the training and its examination name the cause. With two patterns, the second is for the latter."""
        for mode, pattern in enumerate([patterns[0], patterns[-1]]):
            process = processes[mode]
            try:
                process.explains(pattern)
            except AssertionError as error:
                others = [pair[mode].text() for pair in self.started if pair[mode] is not process]
                raise AssertionError("\n".join([str(error), "The other processes:", *others])) from None
            self.assertNotIn("panicked", process.text())

    def nft(self, host, *rules):
        if shutil.which("nft") is None:
            self.skipTest("nft is missing: apt-get install nftables")
        table = ["add table inet t", "add chain inet t c { type filter hook input priority 0 ; }"]
        for rule in [*table, *(f"add rule inet t c {rule}" for rule in rules)]:
            subprocess.run(self.hosts.command(host, ["nft", *rule.split()]), check=True)

    # Names

    def test_a_name_that_means_another_address_elsewhere(self):
        self.hosts.set_names("10.78.0.99 host0\n", host=1)
        self.hosts.set_names(f"{self.hosts.address(2)} host0\n", host=2)
        driver, silent, refusing = [self.start(rank, address="host0") for rank in range(3)]
        advice = "if it means something else on the driver's machine, pass the driver's address in place of the name"
        self.explain(silent, rf"nothing answers at 10\.78\.0\.99:2950.*host0 means 10\.78\.0\.99 on this machine; {advice}")
        self.explain(refusing, rf"10\.78\.0\.3 refuses connections.*host0 means 10\.78\.0\.3 on this machine; {advice}")
        self.explain(driver, "missing=\"?ranks 1, 2", "ranks 1, 2 did not")

    def test_a_name_that_nobody_knows(self):
        self.explain(self.start(1, address="nowhere"), "the driver's name nowhere does not resolve on this machine",
                     "the driver's name nowhere does not resolve here")
        self.explain(self.start(0, address="nowhere"), "could not find the address of nowhere",
                     "the driver's name nowhere does not resolve here")

    def test_a_name_server_that_does_not_answer(self):
        # If nobody had its address, the network would say so.
        self.nft(0, "udp dport 53 drop")
        self.hosts.set_name_server(self.hosts.address(0))
        for rank in (0, 1):
            self.explain(self.start(rank, address="gpu-1.example"), "no name server has answered",
                         "no name server answers")

    def test_the_drivers_own_name_is_a_loopback_address(self):
        self.hosts.set_names("127.0.1.1 host0\n")
        driver, node = self.start(0, address="host0"), self.start(1, address="host0")
        self.explain(driver, "this name is an address of this machine alone here",
                     "its name host0 means 127.0.1.1, where no other machine can reach it")
        self.explain(node, "host0 means 127.0.1.1 on this machine, which is this machine itself")

    # Networks

    def test_ipv6_alone_works_and_a_name_without_an_ipv6_address_does_not(self):
        lines = [f"fd00:78::{number + 1} host{number}\n" for number in range(3)]
        self.hosts.set_names(*lines, "10.78.0.1 old-name\n")
        for number, name in enumerate(self.hosts.names):
            self.hosts.ip(f"-n {name} addr del {self.hosts.address(number)}/24 dev eth0",
                          f"-n {name} -6 addr add fd00:78::{number + 1}/64 dev eth0 nodad")
        for address in ("fd00:78::1", "host0"):
            with self.subTest(address):
                driver, *nodes = [self.start(rank, address=address) for rank in range(3)]
                for node in nodes:
                    self.explain(node, "joined node=node", "has the same as the driver: .*the training data")
                self.stop(driver, *nodes)
        self.explain(self.start(1, address="old-name"),
                     r"there is no way from this machine to 10\.78\.0\.1 .*old-name means 10\.78\.0\.1 on this machine")

    def test_two_interfaces(self):
        # Host 2 is only in the second network, in which host 0 has an address, too.
        for number in (0, 2):
            self.hosts.ip(f"-n {self.hosts.names[number]} addr add 10.79.0.{number + 1}/24 dev eth0")
        self.hosts.ip(f"-n {self.hosts.names[2]} addr del {self.hosts.address(2)}/24 dev eth0")
        node = self.start(2)
        self.explain(node, r"there is no way from this machine to 10\.78\.0\.1 .*use an address in a network that both")
        self.stop(node)
        # The driver listens on the first address of its name.
        self.hosts.set_names("10.78.0.1 host0\n", "10.79.0.1 host0\n")
        driver, node = self.start(0, address="host0"), self.start(2, address="host0")
        self.explain(node, r"(?=.*no way from this machine to 10\.78\.0\.1 ).*10\.79\.0\.1 refuses connections to port 2950")
        self.stop(driver, node)
        driver, node = self.start(0, address="10.79.0.1", world_size=3), self.start(2, address="10.79.0.1")
        self.explain(node, "joined node=node 2", "reaches the driver at 10.79.0.1:29501 from 10.79.0.3")

    def test_firewalls(self):
        for rule, text in [
            ("tcp dport 29500-29501 drop", r"nothing answers at 10\.78\.0\.1:2950\d: a firewall drops the packets"),
            ("tcp dport 29500-29501 reject with tcp reset", r"10\.78\.0\.1 refuses connections to port 2950\d: .* a firewall"),
        ]:
            with self.subTest(rule):
                self.nft(0, rule)
                driver, node = self.start(0, world_size=2), self.start(1, world_size=2)
                self.explain(node, text)
                self.explain(driver, 'waiting for nodes.*missing="?rank 1', "0 of 1 nodes have joined .*; rank 1 did not")
                self.stop(driver, node)
                subprocess.run(self.hosts.command(0, ["nft", "delete", "table", "inet", "t"]), check=True)

    def test_a_firewall_before_a_node(self):
        self.nft(1, "tcp flags & (syn | ack) == syn drop")
        driver, node = self.start(0, world_size=2), self.start(1, world_size=2)
        self.explain(node, "joined node=node 1")
        self.explain(driver, "this node has joined, but it does not answer at its own address")
        driver[1].explains("BAD .*rank 1 has joined, but this process cannot call it: .*firewall before it")

    def test_a_driver_that_starts_later_is_found(self):
        nodes = [self.start(rank) for rank in (1, 2)]
        for node in nodes:
            self.explain(node, "no driver listens there, or not yet")
        driver = self.start(0)
        for process in (driver, *nodes):
            process[0].wait_for("joined node=node|a node has joined")
        self.stop(driver, *nodes)

    # Ports and addresses

    def test_a_port_that_another_program_has(self):
        program = "import socket, time; s = [socket.create_server(('10.78.0.1', p)) for p in (29500, 29501)]; " \
                  "print('taken', flush=True); time.sleep(300)"
        Process(self, self.hosts.command(0, ["python3", "-c", program])).wait_for("taken")
        driver, node = self.start(0), self.start(1)
        self.explain(driver, r"could not listen on 10\.78\.0\.1:29500: another run may have it",
                     r"port 29501 of 10\.78\.0\.1 is taken")
        self.explain(node, r"10\.78\.0\.1:2950\d takes connections but does not answer: another program may have the port")

    def test_two_drivers(self):
        first = self.start(0)
        self.explain(first, "waiting for nodes", "is free to listen on")
        self.explain(self.start(0), "another run may have it, or another process with rank 0", r"is taken")
        self.explain(self.start(0, host=1), "this is no address of this machine, and rank 0 has to run on the machine",
                     r"10\.78\.0\.1 is no address of this machine")

    # Who takes part

    def test_a_wrong_token_and_none(self):
        driver, node = self.start(0), self.start(2, token="another-token-of-someone")
        self.explain(node, "did not take this process: .*asks for a token.*this is not it")
        self.explain(driver, "it brings another token: start it with the PS_TOKEN of this process")
        self.explain(self.start(1, token=None), "needs a token: set PS_TOKEN")

    def certificates(self, authority):
        """Makes an authority and a certificate for one day, and returns the flags."""
        folder = self.folder / authority
        folder.mkdir()
        run = lambda *words: subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        run("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-days", "30", "-subj", f"/CN={authority}")
        run("req", *curve, "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=ps", "-addext", "subjectAltName=DNS:ps")
        run("x509", "-req", "-in", "own.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1",
            "-copy_extensions", "copy", "-out", "own.pem")
        return [f"--tls-ca={folder}/ca.pem", f"--tls-cert={folder}/own.pem", f"--tls-key={folder}/own.key"]

    def test_wrong_certificates(self):
        if shutil.which("openssl") is None:
            self.skipTest("openssl is missing")
        ours, others = self.certificates("ours"), self.certificates("others")
        driver = self.start(0, *ours)
        self.explain(self.start(1, *others), "refused by TLS: its certificate is from another authority")
        self.explain(driver, "refused a connection .*does not accept this process's certificate")
        self.explain(self.start(2), "does it use TLS|it does not speak TLS")
        self.stop(driver)
        driver, node = self.start(0), self.start(1, *ours)
        self.explain(node, "refused by TLS: it does not speak TLS: give all processes certificates")

    def test_another_build(self):
        # Another name of a type that travels, as another version of the program would have.
        content = self.program.read_bytes()
        self.assertIn(b"JoinRefused", content)
        other = self.folder / "other"
        other.write_bytes(content.replace(b"JoinRefused", b"JoinRejectd"))
        other.chmod(0o755)
        driver, node = self.start(0), self.start(1, program=other)
        self.explain(node, "has another version of .*: start the same build everywhere")
        self.explain(driver, "rank 1: the caller has another version of")

    def test_too_large_a_world(self):
        driver, *nodes = [self.start(rank, world_size=4) for rank in range(3)]
        self.explain(driver, 'waiting for nodes.*missing="?rank 3', "rank 3 has not joined")

    def test_a_rank_twice(self):
        driver, first = self.start(0), self.start(1)
        for process in driver:
            process.wait_for("a node has joined node=node 1")
        second = self.start(1, host=2)
        self.explain(second, r"process \d+ on host1 has rank 1 since \d+ s, as attempt 0: give each process its own --rank")
        self.explain(driver, "waiting for nodes.*rank 2", "rank 2 has not joined")

    def test_other_data_and_settings(self):
        driver, node, other = self.start(0), self.start(1), self.start(2, "--batch-size=99")
        self.explain(other, "the batch size is 99 here, but .* in the driver",
                     "have not loaded the same: .*the batch size is 99 here, but .* in the driver")
        self.explain(driver, "rank 2 was told: .*batch size is 99 here", "rank 2 has other data or settings")
        self.stop(driver, node, other)
        # The bundled sample, and the same with one image changed.
        data = self.other_mnist()
        # With a third process, because a driver that has refused all others ends at once, and now and then before the refusal
        # has arrived.
        driver, node, _ = self.start(0), self.start(1, f"--data-dir={data}"), self.start(2)
        self.explain(node, "the content of the training data is .* here, but .* in the driver",
                     "have not loaded the same: .*training data")

    def other_mnist(self):
        """Files of MNIST's layout, with few examples."""
        folder = self.folder / "mnist"
        folder.mkdir()
        for split, count in (("train", 600), ("t10k", 100)):
            images, labels = bytes(28 * 28 * count), bytes(count)
            number = lambda value: value.to_bytes(4, "big")
            (folder / f"{split}-images-idx3-ubyte").write_bytes(number(2051) + number(count) + number(28) * 2 + images)
            (folder / f"{split}-labels-idx1-ubyte").write_bytes(number(2049) + number(count) + labels)
        return folder

    def test_another_clock(self):
        if shutil.which("cc") is None:
            self.skipTest("a C compiler is missing")
        source, library = self.folder / "clock.c", self.folder / "clock.so"
        source.write_text(SKEWED_CLOCK)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        skewed = {"LD_PRELOAD": str(library), "SKEW": "7200"}
        driver, node = self.start(0, world_size=2), self.start(1, world_size=2, **skewed)
        self.explain(node, "the driver's clock differs from this machine's: set the clocks by NTP difference=\"?-7", "has joined")
        self.explain(driver, "a node has joined", r"the clock of rank 1 on host1 differs by \+7[12]\d\d\.\d s: set the clocks")
        self.stop(driver, node)
        if shutil.which("openssl"):
            flags = self.certificates("ours")
            driver, node = self.start(0, *flags), self.start(1, *flags, **{**skewed, "SKEW": str(3 * 86400)})
            self.explain(node, "is not a valid certificate of the authority for `ps` at this time, by this machine's clock")

    # Interruption

    def stop(self, *pairs):
        """Ends what a test has started, so that the next part finds free ports."""
        for process in (process for pair in pairs for process in pair):
            process.kill()

    def test_an_interrupted_wait_ends_at_once_whatever_it_waits_for(self):
        self.nft(2, "udp dport 53 drop", "tcp dport 1 drop")
        self.hosts.set_name_server(self.hosts.address(2))
        silent = "import socket, time; s = socket.create_server(('10.78.0.3', 2)); print('listens', flush=True); time.sleep(300)"
        Process(self, self.hosts.command(2, ["python3", "-c", silent])).wait_for("listens")

        def start(rank, port, address, *flags):
            words = ["--offline", f"--rank={rank}", "--world-size=3", f"--master-addr={address}", f"--master-port={port}"]
            command = self.hosts.command(rank, [self.program, *words, *flags])
            return Process(self, command, env=environment(PS_TOKEN=TOKEN, **OWN_SOCKETS))

        driver = self.hosts.address(0)
        cases = {
            "a driver looks its name up": (start(0, 1, "gpu-1.example"), "no name server has answered"),
            "a node looks the driver's name up": (start(1, 1, "gpu-1.example"), "no name server has answered"),
            "a node meets a firewall": (start(1, 1, self.hosts.address(2)), "nothing answers"),
            "a node is refused": (start(1, 3, self.hosts.address(2)), "refuses connections"),
            "a node gets no answer": (start(1, 2, self.hosts.address(2)), "does not answer"),
            "a node has joined and waits": (start(1, 29502, driver), "joined node=node 1"),
            "a driver waits for nodes": (start(0, 29502, driver), "waiting for nodes"),
            "the doctor meets a firewall": (start(1, 1, self.hosts.address(2), "--doctor=60"), "wait .*nothing answers"),
            "the doctor waits for nodes": (start(0, 29503, driver, "--doctor=60"), "waiting for nodes"),
        }
        for what, (process, pattern) in cases.items():
            with self.subTest(what):
                process.wait_for(pattern, 30)
                begun = time.monotonic()
                # nsenter, unshare and sh have become the program by `exec`.
                os.kill(process.child.pid, signal.SIGTERM)
                code, text = process.wait(30)
                took = time.monotonic() - begun
                self.assertIn(code, (0, -signal.SIGTERM, 143), text)
                # At once: much less than any time that it would wait for.
                self.assertLess(took, EXPLAINED_WITHIN / 2, text)
        with self.subTest("a node whose driver has been killed"):
            silent, node = start(0, 29504, driver), start(1, 29504, driver)
            node.wait_for("joined node=node 1", 30)
            os.kill(silent.child.pid, signal.SIGKILL)
            begun = time.monotonic()
            os.kill(node.child.pid, signal.SIGTERM)
            code, text = node.wait(30)
            self.assertEqual(code, 0, text)
            self.assertLess(time.monotonic() - begun, EXPLAINED_WITHIN / 2, text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
