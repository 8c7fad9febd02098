"""README.md, followed line by line; and that each command line of a guide is typed by some test."""

import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

from hosts import OWN_SOCKETS, REPOSITORY, Hosts, Process, environment, example
from readme import command, commands, desk

# The command lines that no test types, and why.
NOT_TYPED = {
    "README.md": {
        "cargo test --workspace": "it would run these tests again",
        "cargo run --release --example sharded_ps --features cuda": "it needs a GPU",
        "cargo run --release --features burn-train --example burn_learner": "another build; tests/processes types it where CI has the feature",
        "cargo run --release --example sync_ps --no-default-features": "another build; CI checks that the backend compiles",
    },
    "deploy/ray/README.md": {
        "pip install": "test_ray.py installs this version into a virtual environment",
    },
    "deploy/kubernetes/README.md": {
        "kubectl create secret": "no cluster",
        "kubectl apply": "no cluster; test_kubernetes.py renders and validates what would be sent",
        "kubectl logs": "no cluster",
        "kubectl delete": "no cluster",
    },
}


class Guides(unittest.TestCase):
    def test_each_command_line_is_typed_by_a_test_or_it_is_said_why_not(self):
        sources = [path.read_text() for path in pathlib.Path(__file__).parent.glob("test_*.py")]
        typed = [found for source in sources for found in re.findall(r'command\(\s*"([^"]+)",\s*"([^"]+)"', source)]
        guides = ["README.md", *(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("deploy/*/README.md"))]
        for guide in guides:
            beginnings = [beginning for name, beginning in typed if name == guide]
            reasons = NOT_TYPED.get(guide, {})
            lines = commands(guide)
            self.assertTrue(lines, guide)
            for line in lines:
                is_known = [line.startswith(beginning) for beginning in [*beginnings, *reasons]]
                self.assertTrue(any(is_known), f"{guide}: no test types `{line}`")
            for beginning in reasons:
                self.assertTrue(any(line.startswith(beginning) for line in lines), f"{guide} has no `{beginning}` any more")

    def test_files_that_the_untyped_lines_name_exist(self):
        for guide, reasons in NOT_TYPED.items():
            for line in commands(guide):
                for path in re.findall(r"\bdeploy/[\w/.-]+", line):
                    self.assertTrue((REPOSITORY / path).exists(), f"{guide}: {path}")


class Readme(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ps-readme-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.binaries = desk(self.folder)

    def variables(self, **more):
        return environment(PATH=f"{self.binaries}:{os.environ['PATH']}", **more)

    def type(self, line, **more):
        """Types a line into a shell of this machine."""
        return Process(self, ["bash", "-c", line], cwd=self.folder, env=self.variables(**more))

    def ends_well(self, process, *texts):
        code, text = process.wait(150)
        self.assertEqual(code, 0, text)
        for part in texts:
            self.assertRegex(text, part)

    def test_one_program_on_one_machine(self):
        for name in ("async_ps", "rpc_ps"):
            example(name)
        lines = [command("README.md", "cargo run --release --example async_ps"),
                 command("README.md", "cargo run --release --example sharded_ps -- --processes 3")]
        for line in lines:
            self.ends_well(self.type(line), r"Final accuracy is \d\d\.\d")
        self.ends_well(self.type(command("README.md", "cargo run --release --example rpc_ps")), "updates by 2 trainers")

    def test_a_schedule_of_the_learning_rate(self):
        line = command("README.md", "cargo run --release --example sharded_ps -- --lr-schedule cosine")
        self.ends_well(self.type(line), r"Final accuracy is \d\d\.\d", "200 updates of 400 gradients")
        # A flag that names no schedule says which there are.
        code, text = self.type(line.replace("cosine", "cos")).wait(150)
        self.assertEqual(code, 2, text)
        self.assertIn("`cos` is no schedule: give constant, linear", text)

    def test_checkpoints(self):
        first = command("README.md", "cargo run --release --example sharded_ps -- --checkpoint-dir runs/one")
        again = command("README.md", "cargo run --release --example sharded_ps -- --checkpoint-dir runs/one --resume")
        self.ends_well(self.type(first), "Final accuracy is", "saved a checkpoint")
        # It was done, so nothing is left to do.
        self.ends_well(self.type(again), "[Gg]oing on", "Final accuracy is")

    def test_a_plan_of_faults(self):
        line = command("README.md", "cargo run --release --example sharded_ps -- --processes 3 --num-servers 3")
        self.ends_well(self.type(line), "lost: 0, doubled: 0")

    def test_two_runs_are_compared(self):
        example("compare_runs")
        for name in ("one", "two"):
            self.ends_well(self.type(f"sharded_ps --iterations 20 --run-dir runs/{name}"), "Final accuracy is")
        self.ends_well(self.type(command("README.md", "cargo run --release --example compare_runs")), "one", "two")
        self.assertGreater((self.folder / "runs" / "compare.svg").stat().st_size, 1000)

    def test_other_tools_look_on(self):
        line = command("README.md", "cargo run --release --example sharded_ps -- --tensorboard")
        self.ends_well(self.type(line), "metrics are at http://127.0.0.1:9464/metrics", "Final accuracy is")
        self.assertTrue(list((self.folder / "runs/tensorboard/one").glob("*tfevents*")))
        self.assertIn('"name":"compute"', (self.folder / "runs/one.json").read_text())

    def test_three_machines(self):
        # The driver's address in README.md is 10.0.0.1.
        hosts = Hosts(self, 3, prefix="ps-readme", network="10.0.0")
        export = command("README.md", "export PS_TOKEN=")
        token = subprocess.run(["bash", "-c", f"{export}; printf %s $PS_TOKEN"], capture_output=True, text=True, check=True)
        self.assertEqual(len(token.stdout), 32, token)
        lines = [command("README.md", "sharded_ps --world-size 3 --rank 0 "),
                 command("README.md", "sharded_ps --world-size 3 --rank 1 "),
                 command("README.md", "sharded_ps --world-size 3 --rank 2 ")]
        # The order does not matter: the driver is the last.
        processes = []
        for rank, line in reversed(list(enumerate(lines))):
            shell = hosts.command(rank, ["bash", "-c", line])
            processes.append(Process(self, shell, env=self.variables(PS_TOKEN=token.stdout, **OWN_SOCKETS)))
        *nodes, driver = processes
        self.ends_well(driver, r"Final accuracy is \d\d\.\d", "node 1.*host1", "node 2.*host2")
        for node in nodes:
            self.ends_well(node, "joined")

    def test_the_sentence_of_the_doctor_is_the_one_in_the_guide(self):
        sample = re.search(r"^BAD  node 2: (.*)$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)[1]
        hosts = Hosts(self, 3, prefix="ps-readme", network="10.0.0")
        if shutil.which("nft") is None:
            self.skipTest("nft is missing")
        for rule in ["add table inet t", "add chain inet t c { type filter hook input priority 0 ; }",
                     "add rule inet t c tcp dport 29500 drop"]:
            subprocess.run(hosts.command(0, ["nft", *rule.split()]), check=True)
        line = command("README.md", "sharded_ps --world-size 3 --rank 2 ")
        node = Process(self, hosts.command(2, ["bash", "-c", f"{line} --doctor"]),
                       env=self.variables(PS_TOKEN="token-of-three-machines", **OWN_SOCKETS))
        code, text = node.wait(30)
        self.assertEqual(code, 64, text)
        self.assertIn(f"BAD  node 2: {sample}\n", text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
