"""The lines of deploy/mpi/README.md: mpirun of Open MPI and of MPICH, on this machine alone."""

import os
import re
import shutil
import signal
import unittest

from hosts import REPOSITORY, Process, environment, example

RANKS = {"mpirun.openmpi": ["--allow-run-as-root", "--oversubscribe"], "mpirun.mpich": []}
FLAGS = ["--offline", "--num-workers=4", "--iterations=2000", "--batch-size=64"]


class UnderMpi(unittest.TestCase):
    def mpirun(self, launcher, *words, **variables):
        if shutil.which(launcher) is None:
            self.skipTest(f"{launcher}: apt-get install openmpi-bin mpich")
        command = [launcher, *RANKS[launcher], "-np", "5", *words]
        # Not the default port, which another training on this machine may have.
        variables = {"MASTER_PORT": str(23000 + os.getpid() % 1000), **variables}
        return Process(self, command, env=environment(**variables, HOME=os.environ.get("HOME", "/")))

    def test_five_processes_on_one_machine_need_no_address(self):
        for launcher in RANKS:
            with self.subTest(launcher):
                training = self.mpirun(launcher, example("sharded_ps"), *FLAGS)
                code, text = training.wait(90)
                self.assertEqual(code, 0, text)
                self.assertEqual(len(re.findall("a node has joined", text)), 4, text)
                self.assertIn("2000 updates of 8000 gradients", text)
                self.assertGreater(float(re.findall(r"Final accuracy is (\d+\.\d)", text)[-1]), 85)

    def test_a_rank_that_crashes_is_started_again_by_the_wrapper(self):
        for launcher in RANKS:
            with self.subTest(launcher):
                wrapper = REPOSITORY / "deploy" / "restart.sh"
                training = self.mpirun(launcher, wrapper, example("sharded_ps"), *FLAGS)
                process = training.wait_for(r"a node has joined node=node 3 .*pid=(\d+)")[1]
                training.wait_for("Iter 100:")
                os.kill(int(process), signal.SIGKILL)
                training.wait_for("ended with 137; starting it again")
                training.wait_for("a node has joined node=node 3", occurrence=2)
                code, text = training.wait(90)
                self.assertEqual(code, 0, text)
                self.assertIn("updates of 8000 gradients", text)

    def test_on_several_hosts_it_says_what_to_pass(self):
        for launcher, advice in {"mpirun.openmpi": "-x NAME=VALUE", "mpirun.mpich": "-genv NAME VALUE"}.items():
            with self.subTest(launcher):
                # As if some of the ranks were elsewhere.
                hidden = ["env", "OMPI_COMM_WORLD_LOCAL_SIZE=2", "MPI_LOCALNRANKS=2"]
                code, text = self.mpirun(launcher, *hidden, example("sharded_ps"), *FLAGS).wait(30)
                self.assertNotEqual(code, 0)
                self.assertIn("nothing says where rank 0 listens: set PS_RENDEZVOUS=host:port or MASTER_ADDR", text)
                self.assertIn(advice, text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
