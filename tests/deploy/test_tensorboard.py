"""Event files of trainings, read by TensorBoard's own reader. It comes from PyPI."""

import json
import pathlib
import shutil
import signal
import subprocess
import tempfile
import unittest

from hosts import CACHE, Process, environment, eventually, example, install

VENV = CACHE / "tensorboard-venv"
PACKAGES = ["tensorboard==2.21.0", "setuptools<81"]

# For each directory that it is told, prints what TensorBoard's reader finds there. It is one process, because its start takes
# seconds.
READER = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
for line in sys.stdin:
    events = EventAccumulator(line.strip(), size_guidance={"scalars": 0, "histograms": 0, "compressedHistograms": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [[point.step, point.wall_time, point.value] for point in events.Scalars(tag)]
               for tag in tags["scalars"]}
    histograms = {tag: [[point.step, sum(point.histogram_value.bucket)] for point in events.Histograms(tag)]
                  for tag in tags["histograms"]}
    print(json.dumps({"scalars": scalars, "histograms": histograms}), flush=True)
"""


class TensorBoard(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        install(VENV, *PACKAGES)
        cls.errors = tempfile.TemporaryFile("w+")
        cls.addClassCleanup(cls.errors.close)
        cls.reader = subprocess.Popen([VENV / "bin" / "python", "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=cls.errors, text=True)
        cls.addClassCleanup(cls.reader.communicate)

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ps-tensorboard-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.directory = self.folder / "events" / "one"

    def start(self, *arguments, name="sharded_ps"):
        return Process(self, [example(name), "--batch-size", "16", "--tensorboard", self.directory, *arguments],
                       cwd=self.folder, env=environment())

    def read(self, directory=None):
        self.reader.stdin.write(f"{directory or self.directory}\n")
        self.reader.stdin.flush()
        line = self.reader.stdout.readline()
        self.errors.seek(0)
        errors = self.errors.read()
        self.assertTrue(line, errors)
        return json.loads(line)

    def ends_well(self, process):
        code, text = process.wait(150)
        self.assertEqual(code, 0, text)
        return text

    def files(self):
        return sorted(self.directory.glob("*tfevents*"))

    def test_curves_of_a_training(self):
        for name in ("sharded_ps", "sync_ps"):
            with self.subTest(name):
                self.directory = self.folder / name
                self.ends_well(self.start("--iterations", "30", "--learning-rate", "0.02", name=name))
                found = self.read()
                scalars = found["scalars"]
                losses = scalars["loss/batches"]
                self.assertEqual([step for step, _, _ in losses], list(range(1, 31)))
                self.assertTrue(all(0 < loss < 10 for _, _, loss in losses), losses)
                times = [time for _, time, _ in losses]
                self.assertEqual(times, sorted(times))
                step, _, accuracy = scalars["accuracy"][-1]
                self.assertEqual(step, 30)
                self.assertTrue(0 < accuracy <= 1, accuracy)
                self.assertEqual(scalars["loss/evaluation"][-1][0], 30)
                self.assertTrue(all(abs(rate - 0.02) < 1e-6 for _, _, rate in scalars["learning_rate"]), scalars)
                self.assertEqual(scalars["gradients_per_second"][-1][0], 30)
                # Two workers.
                self.assertEqual(sum(count for _, count in found["histograms"]["staleness"]), 60)

    def test_points_are_there_while_the_training_goes_on(self):
        self.start("--iterations", "1000000")
        last = lambda: (self.files() and self.read()["scalars"].get("loss/batches") or [[0]])[-1][0]
        first = eventually(last, "no points")
        eventually(lambda: last() > first, "no further points")

    def test_a_killed_training_goes_on_in_its_directory_and_points_that_are_no_more_are_dropped(self):
        self.ends_well(self.start("--iterations", "100", "--checkpoint-dir", "saved"))
        again = ["--iterations", "100000", "--checkpoint-dir", "saved", "--checkpoint-every", "1000000", "--resume"]
        last = lambda: self.read()["scalars"]["loss/batches"][-1][0]
        run = self.start(*again)
        run.wait_for(r"going on from a checkpoint.*version=\D*100\b")
        eventually(lambda: last() > 300, last)
        run.kill()
        # A record that is cut, as a write that did not end leaves it.
        before, newest = last(), self.files()[-1]
        with open(newest, "r+b") as file:
            file.truncate(newest.stat().st_size - 5)
        self.assertIn(last(), range(250, before + 1))
        run = self.start(*again)
        run.wait_for(r"going on from a checkpoint.*version=\D*100\b")
        eventually(lambda: len(self.files()) == 3 and last() > 150, lambda: f"{last()}\n{run.text()}")
        run.child.send_signal(signal.SIGTERM)
        self.ends_well(run)
        losses = self.read()["scalars"]["loss/batches"]
        # Each update is there once, up to the checkpoint from the first process, and after it from the third.
        steps = [step for step, _, _ in losses]
        # From some thousands on, not every point is kept.
        few = min(len(steps), 2000)
        self.assertEqual(steps[:few], list(range(1, few + 1)))
        times = [time for _, time, _ in losses]
        self.assertEqual(times, sorted(times))
        gap = max((later - earlier, number) for number, (earlier, later) in enumerate(zip(times, times[1:]), 1))
        self.assertEqual(gap[1], 100, gap)

    def test_another_training_gets_a_directory_of_its_own(self):
        for _ in range(2):
            text = self.ends_well(self.start("--iterations", "3"))
        self.assertIn("another run", text)
        self.assertEqual(len(self.files()), 1)
        other = self.directory.with_name("one-2")
        self.assertEqual(self.read(other)["scalars"]["loss/batches"][-1][0], 3)

    def test_a_directory_that_cannot_be_written_ends_no_training(self):
        for directory in (pathlib.Path("/dev/full"), pathlib.Path("/proc/one")):
            self.directory = directory
            text = self.ends_well(self.start("--iterations", "3"))
            self.assertIn("nothing is written for TensorBoard; the training goes on", text)
            self.assertIn("Final accuracy is", text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
