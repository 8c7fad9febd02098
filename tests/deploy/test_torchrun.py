"""The lines of deploy/torchrun/README.md. Needs PyTorch, as scripts/install-libtorch.sh installs it."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import unittest

from hosts import CACHE, OWN_SOCKETS, Hosts, Process, environment
from readme import command, desk

# One of them is enough; the second is that of the comparison in bench/.
TORCHRUN = [CACHE / venv / "bin" / "torchrun" for venv in ("libtorch-venv", "bench-venv")]


class UnderTorchrun(unittest.TestCase):
    def setUp(self):
        found = [path for path in TORCHRUN if path.exists()]
        if not found:
            self.skipTest("torchrun is missing: scripts/install-libtorch.sh installs it")
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ps-torchrun-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        path = f"{desk(self.folder)}:{found[0].parent}:{os.environ['PATH']}"
        self.variables = environment(PATH=path, HOME=os.environ.get("HOME", "/"))

    def test_five_processes_and_a_failure_that_restarts_all(self):
        line = command("deploy/torchrun/README.md", "torchrun --no-python --nproc-per-node=5")
        # Another port, which no other torchrun of this machine has.
        port = f"--master-addr=127.0.0.1 --master-port={24000 + 2 * (os.getpid() % 1000)} --max-restarts=2"
        line = line.replace("./", f"{port} ./") + " --iterations=3000 --batch-size=64"
        training = Process(self, ["bash", "-c", line], cwd=self.folder, env=self.variables)
        process = training.wait_for(r"a node has joined node=node 3 .*pid=(\d+)", 90)[1]
        training.wait_for(r"Iter \d{3,}:")
        os.kill(int(process), signal.SIGKILL)
        code, text = training.wait(120)
        self.assertEqual(code, 0, text)
        self.assertIn("updates of 12000 gradients", text)
        self.assertGreater(float(re.findall(r"Final accuracy is (\d+\.\d)", text)[-1]), 85)

    def test_a_rank_that_is_asked_to_leave_and_a_run_that_is_asked_to_end(self):
        line = command("deploy/torchrun/README.md", "torchrun --no-python --nproc-per-node=5")
        port = f"--master-addr=127.0.0.1 --master-port={22000 + 2 * (os.getpid() % 1000)} --max-restarts=2"
        saved = self.folder / "saved"
        flags = f"--iterations=1000000 --servers-on-nodes --num-servers=2 --checkpoint-every=0 --checkpoint-dir={saved}"
        line = f"exec {line.replace('./', f'{port} ./')} {flags}"
        training = Process(self, ["bash", "-c", line], cwd=self.folder, env=self.variables)
        process = training.wait_for(r"a node has joined node=node 4 .*pid=(\d+)", 90)[1]
        training.wait_for("Iter .*accuracy")
        # One rank. Its worker goes on elsewhere, and torchrun starts nothing again.
        os.kill(int(process), signal.SIGTERM)
        training.wait_for("a node has left node=node 4")
        training.wait_for("a worker goes on at another node")
        so_far = training.text().count("Iter ")
        training.wait_for("Iter .*accuracy", occurrence=so_far + 1)
        self.assertNotIn("is lost", training.text())
        # All of them, by torchrun, which allows 30 s.
        os.kill(training.child.pid, signal.SIGTERM)
        _, text = training.wait(60)
        self.assertIn("Interrupted by SIGTERM", text)
        self.assertIn("To go on: ", text)
        self.assertEqual(len(list(saved.glob("checkpoint-*"))), 1, text)

    def test_two_machines(self):
        # The first one's address in the guide is 10.0.0.1.
        hosts = Hosts(self, 2, prefix="ps-torchrun", network="10.0.0")
        export = command("deploy/torchrun/README.md", "export PS_TOKEN=")
        token = subprocess.run(["bash", "-c", f"{export}; printf %s $PS_TOKEN"], capture_output=True, text=True, check=True)
        lines = [command("deploy/torchrun/README.md", "torchrun --no-python --nnodes=2 --node-rank=0"),
                 command("deploy/torchrun/README.md", "torchrun --no-python --nnodes=2 --node-rank=1")]
        variables = {**self.variables, "PS_TOKEN": token.stdout, **OWN_SOCKETS}
        first, second = [
            Process(self, hosts.command(number, ["bash", "-c", line]), cwd=self.folder, env=variables)
            for number, line in enumerate(lines)
        ]
        code, text = first.wait(120)
        self.assertEqual(code, 0, text)
        self.assertIn("updates of 1000 gradients", text)
        self.assertEqual(set(re.findall(r'a node has joined node=node \d.*?host="?(host\d)', text)), {"host0", "host1"})
        code, text = second.wait(60)
        self.assertEqual(code, 0, text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
