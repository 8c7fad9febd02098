"""The lines of deploy/torchrun/README.md. Needs PyTorch, as scripts/install-libtorch.sh installs it."""

import os
import re
import signal
import unittest

from hosts import CACHE, Process, environment, example

TORCHRUN = CACHE / "libtorch-venv" / "bin" / "torchrun"


class UnderTorchrun(unittest.TestCase):
    def test_five_processes_and_a_failure_that_restarts_all(self):
        if not TORCHRUN.exists():
            self.skipTest("torchrun is missing: scripts/install-libtorch.sh installs it")
        command = [
            TORCHRUN, "--no-python", "--nproc-per-node=5", "--max-restarts=2", "--master-addr=127.0.0.1",
            f"--master-port={24000 + 2 * (os.getpid() % 1000)}", example("sharded_ps"),
            "--offline", "--num-workers=4", "--iterations=3000", "--batch-size=64",
        ]
        training = Process(self, command, env=environment(HOME=os.environ.get("HOME", "/")))
        process = training.wait_for(r"a node has joined node=node 3 .*pid=(\d+)", 90)[1]
        training.wait_for("Iter 100:")
        os.kill(int(process), signal.SIGKILL)
        code, text = training.wait(120)
        self.assertEqual(code, 0, text)
        self.assertIn("updates of 12000 gradients", text)
        self.assertGreater(float(re.findall(r"Final accuracy is (\d+\.\d)", text)[-1]), 85)


if __name__ == "__main__":
    unittest.main(verbosity=2)
