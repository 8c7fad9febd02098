"""deploy/restart.sh under a launcher that signals all processes of a group, as torchrun, Slurm and Open MPI can."""

import os
import pathlib
import shutil
import signal
import tempfile
import unittest

from hosts import REPOSITORY, Process, environment, example


class UnderTheWrapper(unittest.TestCase):
    def test_a_signal_to_the_whole_group_ends_a_training_with_a_checkpoint(self):
        # The wrapper has half a second to hand the signal on. A busy machine may be slower once, but not three times.
        for _ in range(3):
            saved, code, text = self.signalled()
            if "ending at once" not in text:
                break
        self.assertEqual(code, 0, text)
        self.assertIn("To go on: ", text)
        self.assertEqual(len(list(saved.glob("checkpoint-*"))), 1, text)

    def signalled(self):
        """A training that is asked to end: its checkpoints, its exit code, and what it said."""
        saved = pathlib.Path(tempfile.mkdtemp(prefix="ps-restart-"))
        self.addCleanup(shutil.rmtree, saved, ignore_errors=True)
        training = Process(self, [
            REPOSITORY / "deploy" / "restart.sh", example("sharded_ps"), "--offline", "--iterations=1000000",
            "--checkpoint-every=0", f"--checkpoint-dir={saved}",
        ], env=environment())
        training.wait_for("Iter .*accuracy")
        # The program gets it twice: from here, and from the wrapper.
        os.killpg(training.child.pid, signal.SIGTERM)
        return saved, *training.wait(60)


if __name__ == "__main__":
    unittest.main(verbosity=2)
