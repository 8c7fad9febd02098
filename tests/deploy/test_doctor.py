"""`--doctor` on three hosts: what is right, and each mistake that can be made at the start, named in one sentence."""

import os
import shutil
import subprocess
import tempfile
import unittest

from hosts import OWN_SOCKETS, Hosts, Process, environment, example, need_root

TOKEN = "token-of-the-three-hosts"


class Doctor(unittest.TestCase):
    def setUp(self):
        need_root()
        self.program = example("sharded_ps")
        self.hosts = Hosts(self, 3)

    def start(self, rank, host=None, address=None, world_size=3, token=TOKEN, program=None, within=4):
        flags = [f"--doctor={within}", f"--rank={rank}", f"--world-size={world_size}",
                 f"--master-addr={address or self.hosts.address(0)}"]
        host = rank if host is None else host
        command = self.hosts.command(host, [program or self.program, *flags])
        variables = {"PS_TOKEN": token} if token else {}
        return Process(self, command, env=environment(**OWN_SOCKETS, **variables))

    def ends(self, process, *texts, is_well=False):
        code, text = process.wait(60)
        self.assertEqual(code, 0 if is_well else 64, text)
        self.assertEqual("BAD" in text, not is_well, text)
        self.assertNotIn("panicked", text)
        for part in texts:
            self.assertIn(part, text)

    def nft(self, host, *rules):
        if shutil.which("nft") is None:
            self.skipTest("nft is missing: apt-get install nftables")
        table = ["add table inet t", "add chain inet t c { type filter hook input priority 0 ; }"]
        for rule in [*table, *(f"add rule inet t c {rule}" for rule in rules)]:
            subprocess.run(self.hosts.command(host, ["nft", *rule.split()]), check=True)

    def test_what_is_right_is_said(self):
        ranks = [self.start(rank) for rank in range(3)]
        self.ends(ranks[0], "is free to listen on", "rank 2 on host2 has joined, with the same program and clock",
                  "6 connections between 3 processes work", is_well=True)
        for node in ranks[1:]:
            self.ends(node, "reaches the driver at 10.78.0.1:29500 from 10.78.0.", "has joined", is_well=True)

    def test_names_and_ipv6_addresses_do_too(self):
        for number in range(3):
            self.hosts.ip(f"-n {self.hosts.names[number]} -6 addr add fd00:78::{number + 1}/64 dev eth0 nodad")
        self.hosts.set_names(f"{self.hosts.address(0)} host0.cluster.example host0\n")
        for address in ("host0", "host0.cluster.example", "fd00:78::1"):
            with self.subTest(address):
                # A success does not wait that long.
                for process in [self.start(rank, address=address, within=30) for rank in range(3)]:
                    self.ends(process, is_well=True)

    def test_a_wrong_token(self):
        ranks = [self.start(0), self.start(1), self.start(2, token="another-token-of-someone")]
        self.ends(ranks[0], "rank 2 has not joined")
        self.ends(ranks[1], is_well=True)
        self.ends(ranks[2], "token")

    def test_no_token(self):
        self.ends(self.start(0, token=None), "needs a token: set PS_TOKEN")

    def test_a_port_that_is_taken(self):
        taken = "import socket, time; s = socket.create_server(('10.78.0.1', 29500)); print('taken', flush=True); time.sleep(60)"
        Process(self, self.hosts.command(0, ["python3", "-c", taken])).wait_for("taken")
        self.ends(self.start(0), "port 29500 of 10.78.0.1 is taken")

    def test_firewalls(self):
        for rule, text in [("tcp dport 29500 drop", "nothing answers at 10.78.0.1:29500"),
                           ("tcp dport 29500 reject with tcp reset", "10.78.0.1 refuses connections to port 29500")]:
            with self.subTest(rule):
                self.nft(0, rule)
                ranks = [self.start(0, world_size=2), self.start(1, world_size=2)]
                self.ends(ranks[1], text)
                self.ends(ranks[0], "nodes have joined")
                subprocess.run(self.hosts.command(0, ["nft", "delete", "table", "inet", "t"]), check=True)

    def test_nodes_that_do_not_reach_each_other(self):
        self.nft(2, f"ip saddr {self.hosts.address(1)} tcp flags syn drop")
        ranks = [self.start(rank) for rank in range(3)]
        self.ends(ranks[0], "rank 1 cannot call rank 2")

    def test_a_name_that_nobody_knows(self):
        self.ends(self.start(1, address="nowhere"), "the driver's name nowhere does not resolve here")

    def test_a_name_that_appears_later_is_found(self):
        node = self.start(1, address="late", world_size=2, within=60)
        node.wait_for("wait node 1: the driver's name late does not resolve here .*; trying for")
        self.hosts.set_names(f"{self.hosts.address(0)} late\n")
        driver = self.start(0, address="late", world_size=2, within=60)
        self.ends(node, "reaches the driver at 10.78.0.1:29500", is_well=True)
        self.ends(driver, is_well=True)

    def test_too_little_address_space(self):
        code, text = Process(self, ["sh", "-c", f"ulimit -v 250000; exec {self.program} --doctor"],
                             env=environment()).wait(60)
        self.assertEqual(code, 64, text)
        self.assertIn("BAD  driver 0: 244 MiB of memory is the limit of its address space", text)

    def test_the_drivers_own_name_is_a_loopback_address(self):
        self.hosts.set_names("127.0.1.1 host0\n")
        self.ends(self.start(0, address="host0"), "its name host0 means 127.0.1.1, where no other machine can reach it")

    def test_an_address_of_another_machine(self):
        self.ends(self.start(0, host=1), "10.78.0.1 is no address of this machine")

    def test_too_large_a_world(self):
        ranks = [self.start(rank, world_size=4) for rank in range(3)]
        self.ends(ranks[0], "rank 3 has not joined")

    def test_a_rank_twice(self):
        # The driver waits for rank 2 meanwhile.
        driver = self.start(0)
        first = self.start(1)
        driver.wait_for("a node has joined node=node 1")
        self.ends(self.start(1, host=2), "has rank 1")
        self.ends(driver, "rank 2 has not joined")
        self.ends(first, is_well=True)

    def test_another_build(self):
        with tempfile.NamedTemporaryFile(prefix="ps-other-", delete=False) as other:
            self.addCleanup(os.unlink, other.name)
            other.write(self.program.read_bytes() + b"another build")
        shutil.copymode(self.program, other.name)
        ranks = [self.start(0), self.start(1), self.start(2, program=other.name)]
        self.ends(ranks[0], "rank 2 on host2 runs another build of the program")


if __name__ == "__main__":
    unittest.main(verbosity=2)
