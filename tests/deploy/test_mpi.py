"""The lines of deploy/mpi/README.md: mpirun of Open MPI and of MPICH, on this machine and on several hosts."""

import os
import pathlib
import re
import shutil
import signal
import tempfile
import unittest

from hosts import OWN_SOCKETS, Hosts, Process, environment
from readme import command, desk

# What the tests' surroundings need beside the line of the guide: root may start ranks, more of them than processors.
LAUNCHERS = {
    "mpirun.openmpi": {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                       "OMPI_MCA_rmaps_base_oversubscribe": "1"},
    "mpirun.mpich": {},
}
# Takes the place of ssh: `ssh [flags] host command`. The hosts are network namespaces.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
host=$1
shift
exec "{folder}/enter.$host" "$*"
"""


class UnderMpi(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ps-mpi-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.binaries = desk(self.folder)

    def mpirun(self, launcher, line, hosts=None, **variables):
        """Types a line, with that launcher as `mpirun`; on host 1, if there are hosts."""
        if shutil.which(launcher) is None:
            self.skipTest(f"{launcher}: apt-get install openmpi-bin mpich")
        # Not a link: MPICH looks for its other programs where `mpirun` seems to be.
        (self.binaries / "mpirun").write_text(f'#!/bin/sh\nexec {shutil.which(launcher)} "$@"\n')
        (self.binaries / "mpirun").chmod(0o755)
        # Not the default port, which another training on this machine may have.
        variables = {"MASTER_PORT": str(23000 + os.getpid() % 1000), **LAUNCHERS[launcher], **variables}
        variables = environment(PATH=f"{self.binaries}:{os.environ['PATH']}", HOME=os.environ.get("HOME", "/"), **variables)
        shell = ["bash", "-c", line]
        return Process(self, hosts.command(1, shell) if hosts else shell, cwd=self.folder, env=variables)

    def check(self, training, num_workers=4):
        code, text = training.wait(120)
        self.assertEqual(code, 0, text)
        self.assertIn(f"updates of {num_workers * 200} gradients", text)
        self.assertRegex(text, r"Final accuracy is \d\d\.\d")
        return text

    def test_five_processes_on_one_machine_need_no_address(self):
        line = command("deploy/mpi/README.md", "mpirun -np 5 ./sharded_ps")
        for launcher in LAUNCHERS:
            with self.subTest(launcher):
                text = self.check(self.mpirun(launcher, line))
                self.assertEqual(len(set(re.findall(r"a node has joined node=node (\d)", text))), 4, text)

    def test_several_machines(self):
        export = command("deploy/mpi/README.md", "export PS_TOKEN=")
        lines = {
            "mpirun.openmpi": command("deploy/mpi/README.md", "mpirun -np 5 -H "),
            "mpirun.mpich": command("deploy/mpi/README.md", "mpirun -np 5 -hosts "),
        }
        hosts = Hosts(self, 4, prefix="ps-mpi")
        for number in range(4):
            enter = self.folder / f"enter.host{number}"
            words = " ".join(f"'{word}'" for word in hosts.command(number, ["sh", "-c"]))
            enter.write_text(f"#!/bin/sh\ncd {self.folder}\nexec {words} \"$1\"\n")
            enter.chmod(0o755)
        ssh = self.folder / "ssh"
        ssh.write_text(SSH.format(folder=self.folder))
        ssh.chmod(0o755)
        agents = {"OMPI_MCA_plm_rsh_agent": str(ssh), "HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(ssh)}
        for launcher, line in lines.items():
            with self.subTest(launcher):
                training = self.mpirun(launcher, f"{export}; {line}", hosts=hosts, **agents, **OWN_SOCKETS)
                text = self.check(training)
                joined = re.findall(r'a node has joined node=node \d.*?host="?(host\d)', text)
                self.assertEqual(set(joined), {"host1", "host2"}, text)

    def test_a_rank_that_crashes_is_started_again_by_the_wrapper(self):
        line = command("deploy/mpi/README.md", "mpirun -np 5 ./sharded_ps").replace("./", "deploy/restart.sh ./")
        for launcher in LAUNCHERS:
            with self.subTest(launcher):
                training = self.mpirun(launcher, f"{line} --iterations=2000 --batch-size=64")
                process = training.wait_for(r"a node has joined node=node 3 .*pid=(\d+)")[1]
                training.wait_for(r"Iter \d{3,}:")
                os.kill(int(process), signal.SIGKILL)
                training.wait_for("ended with 137; starting it again")
                training.wait_for("a node has joined node=node 3", occurrence=2)
                code, text = training.wait(90)
                self.assertEqual(code, 0, text)
                self.assertIn("updates of 8000 gradients", text)
                self.assertGreater(float(re.findall(r"Final accuracy is (\d+\.\d)", text)[-1]), 85)

    def test_a_rank_that_is_asked_to_leave_and_a_run_that_is_asked_to_end(self):
        line = command("deploy/mpi/README.md", "mpirun -np 5 ./sharded_ps")
        export = command("deploy/mpi/README.md", "export OMPI_MCA_odls_base_sigkill_timeout=")
        for launcher in LAUNCHERS:
            with self.subTest(launcher):
                saved = self.folder / launcher
                endless = f"{line} --iterations=1000000 --servers-on-nodes --num-servers=2 --checkpoint-every=0"
                training = self.mpirun(launcher, f"{export}; exec {endless} --checkpoint-dir={saved}")
                process = training.wait_for(r"a node has joined node=node 4 .*pid=(\d+)")[1]
                training.wait_for("Iter .*accuracy")
                # One rank. Its worker goes on elsewhere, and no other rank ends.
                os.kill(int(process), signal.SIGTERM)
                training.wait_for("a node has left node=node 4")
                training.wait_for("a worker goes on at another node")
                so_far = training.text().count("Iter ")
                training.wait_for("Iter .*accuracy", occurrence=so_far + 1)
                self.assertNotIn("is lost", training.text())
                # All of them, by mpirun.
                os.kill(training.child.pid, signal.SIGTERM)
                _, text = training.wait(60)
                self.assertIn("Interrupted by SIGTERM", text)
                self.assertIn("To go on: ", text)
                self.assertEqual(len(list(saved.glob("checkpoint-*"))), 1, text)

    def test_on_several_hosts_it_says_what_to_pass(self):
        line = command("deploy/mpi/README.md", "mpirun -np 5 ./sharded_ps")
        # As if some of the ranks were elsewhere.
        line = line.replace("./", "env OMPI_COMM_WORLD_LOCAL_SIZE=2 MPI_LOCALNRANKS=2 ./")
        for launcher, advice in {"mpirun.openmpi": "-x NAME=VALUE", "mpirun.mpich": "-genv NAME VALUE"}.items():
            with self.subTest(launcher):
                code, text = self.mpirun(launcher, line).wait(30)
                self.assertNotEqual(code, 0)
                self.assertIn("nothing says where rank 0 listens: set PS_RENDEZVOUS=host:port or MASTER_ADDR", text)
                self.assertIn(advice, text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
