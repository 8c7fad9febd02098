"""deploy/ray on a Ray cluster of two hosts, each a network namespace. Needs root, and Ray from PyPI."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import unittest

from hosts import CACHE, OWN_SOCKETS, Hosts, Process, environment, example, install, need_root
from readme import command, desk, words

VERSION = "2.60.0"
VENV = CACHE / f"ray-{VERSION}-venv"
# Ray notices within about 2 s that a host is gone, not within 5 to 65 s.
QUICK = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class Cluster:
    """A Ray cluster: a head on host 0, and nodes on the others."""

    def __init__(self, test, cpus, hosts=None, venv=VENV, **variables):
        self.test, self.hosts, self.variables, self.venv = test, hosts or Hosts(test, len(cpus)), variables, venv
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="ps-ray-home-"))
        test.addCleanup(shutil.rmtree, self.home, ignore_errors=True)
        self.head = self.hosts.address(0)
        # The lines of the guide, and what several Rays on one machine need.
        self.start(0, cpus[0], *self.typed(command("deploy/ray/README.md", "ray start --head")),
                   "--port=6379", f"--dashboard-host={self.head}")
        for number, count in enumerate(cpus[1:], 1):
            self.start(number, count, *self.typed(command("deploy/ray/README.md", "ray start --address")),
                       '--resources={"side":1}')

    def typed(self, line):
        """The words of a line of the guide, with the address of the first machine."""
        return words(line.replace("FIRST_MACHINE", self.head))

    def environment(self, **variables):
        return environment(
            # As in an activated virtual environment.
            PATH=f"{self.venv / 'bin'}:{os.environ['PATH']}", HOME=str(self.home), RAY_USAGE_STATS_ENABLED="0", PYTHONUNBUFFERED="1",
            # How long `ray job stop` waits before it kills; the default is 3 s.
            RAY_JOB_STOP_WAIT_TIME_S="30", RAY_prestart_worker_first_driver="0", RAY_enable_worker_prestart="0",
            **{"RAY_AUTH_MODE": "disabled", **QUICK, **self.variables, **variables},
        )

    def start(self, number, cpus, *line):
        node = self.run(number, [
            *line, "--block", f"--node-ip-address={self.hosts.address(number)}", f"--num-cpus={cpus}",
            "--object-store-memory=100000000", "--disable-usage-stats",
        ])
        node.wait_for("Ray runtime started", 90)
        return node

    def run(self, number, command, **variables):
        variables = {**OWN_SOCKETS, "RAY_TMPDIR": "/tmp", **variables}
        return Process(self.test, self.hosts.command(number, command), env=self.environment(**variables))

    def submit(self, working_dir, *more, **variables):
        """`ray job submit` of the guide, on the head, with other words after it."""
        line = self.typed(command("deploy/ray/README.md", "ray job submit"))
        line[line.index("--working-dir=job")] = f"--working-dir={working_dir}"
        return self.run(0, [*line[:line.index("--") + 1], *more], **variables)


def words_of_the_job():
    """What the guide submits: the script and its flags, `--`, the program and its flags."""
    line = words(command("deploy/ray/README.md", "ray job submit"))
    return line[line.index("--") + 1:]


class OnRay(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        need_root()
        example("sharded_ps")
        install(VENV, f"ray[default]=={VERSION}")

    def working_dir(self):
        """The folder of the guide, made by the guide's lines."""
        folder = pathlib.Path(tempfile.mkdtemp(prefix="ps-ray-job-"))
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        binaries = desk(folder)
        lines = [command("deploy/ray/README.md", "cargo build --release --example sharded_ps"),
                 command("deploy/ray/README.md", "mkdir job"),
                 command("deploy/ray/README.md", "cp deploy/ray/ps_on_ray.py")]
        variables = environment(PATH=f"{binaries}:{os.environ['PATH']}")
        for line in lines:
            subprocess.run(["bash", "-c", line], cwd=folder, env=variables, check=True)
        return folder / "job"

    def job(self, cluster, *more, **variables):
        """Submits ps_on_ray.py with 2 servers and 3 workers; rank 0 is on the head."""
        line = words_of_the_job()
        script = line[:line.index("--")]
        return cluster.submit(self.working_dir(), *script, "--strategy=SPREAD", *more, **variables)

    def test_a_training_outlives_a_process_and_a_host(self):
        cluster = Cluster(self, [6, 3])
        directory = cluster.hosts.directory
        line = words_of_the_job()
        program = line[line.index("--"):]
        length = ["--batch-size=64", "--iterations=8000"]
        job = self.job(
            cluster, *program, *length, f"--checkpoint-dir={directory / 'saved'}", "--checkpoint-every=500", "--resume",
            f"--export={directory / 'on-ray.safetensors'}",
        )
        job.wait_for("saved a checkpoint", 90)
        # The processes of all hosts have numbers that are valid here, too.
        for name in ("worker 5", "driver 0"):
            process = job.wait_for(rf"{name}: runs on .* as process (\d+), attempt 0")
            os.kill(int(process[1]), signal.SIGKILL)
            job.wait_for(f"{name}: exit code 137; starting it again")
            job.wait_for(rf"{name}: runs on .*, attempt 1")
        job.wait_for("going on from a checkpoint")
        job.wait_for("saved a checkpoint", occurrence=3)

        lost = re.findall(rf"(server|worker) (\d): runs on {cluster.hosts.address(1)} ", job.text())
        self.assertTrue(lost, "Ray has placed nothing on the second host:\n" + job.text())
        cluster.hosts.crash(1)
        for role, rank in lost:
            job.wait_for(rf"{role} {rank}: Ray has lost it")
            job.wait_for(rf"{role} {rank}: runs on {cluster.head} .*, attempt [1-9]")

        code, text = job.wait(180)
        self.assertEqual(code, 0, text)
        accuracy = re.search(r"Final accuracy is (\d+\.\d)", text)
        self.assertGreater(float(accuracy[1]), 85, text)
        # 8000 steps of 3 workers: each gradient was applied once.
        self.assertIn("updates of 24000 gradients", text)

        # The same training in one process, to which nothing happens: the same bits (S-13, S-16).
        flags = [word for word in program[2:] if word != "--servers-on-nodes"]
        undisturbed = Process(
            self, [example("sharded_ps"), *flags, *length, "--offline", f"--export={directory / 'undisturbed.safetensors'}"],
            # Without data of this user, as on Ray.
            env=environment(HOME=str(directory)),
        )
        code, text = undisturbed.wait(180)
        self.assertEqual(code, 0, text)
        ours, theirs = [(directory / f"{name}.safetensors").read_bytes() for name in ("on-ray", "undisturbed")]
        self.assertGreater(len(ours), 1000)
        self.assertTrue(ours == theirs, "a training on Ray whose processes and host were lost has other weights")

    def test_a_training_outlives_the_host_of_its_driver(self):
        cluster = Cluster(self, [1, 2, 2])
        saved = cluster.hosts.directory / "saved"
        job = cluster.submit(
            self.working_dir(), "python", "ps_on_ray.py", "--workers=1", "--driver-resources=CPU=1,side=0.1",
            "--", "./sharded_ps", "--offline", "--num-workers=1", "--batch-size=64", "--iterations=3000",
            f"--checkpoint-dir={saved}", "--checkpoint-every=500", "--resume", "--update-log",
        )
        first = job.wait_for(r"driver 0: runs on 10.78.0.(\d) .*, attempt 0", 90)
        job.wait_for("saved a checkpoint", 90)
        cluster.hosts.crash(int(first[1]) - 1)
        job.wait_for("driver 0: Ray has lost it")
        second = job.wait_for(r"driver 0: runs on 10.78.0.(\d) .*, attempt 1", 90)
        self.assertNotEqual(first[1], second[1])
        job.wait_for("going on from a checkpoint")
        code, text = job.wait(120)
        self.assertEqual(code, 0, text)
        self.assertIn("3000 updates", text)

    def test_the_job_ends_as_its_driver_does_and_says_what_it_waits_for(self):
        cluster = Cluster(self, [6])
        job = self.job(cluster, "--wait=6", "--worker-resources=CPU=1,GPU=1", "--", "./sharded_ps")
        code, text = job.wait(60)
        self.assertNotEqual(code, 0)
        self.assertIn("the cluster has no room for these 6 ranks", text)
        self.assertIn("'GPU': 1.0", text)
        self.assertIn("; waiting", text)
        self.assertNotIn("Traceback", text)

        # Without the servers: to start five more Python processes takes a while.
        job = self.job(cluster, "--servers=0", "--workers=1", "--", "./sharded_ps", "--offline", "--learning-rate=inf")
        code, text = job.wait(120)
        self.assertNotEqual(code, 0)
        self.assertIn("learning rate", text)
        self.assertIn("failed with exit code 1", text)

        saved = cluster.hosts.directory / "saved"
        job = self.job(
            cluster, "--servers=0", "--workers=1", "--", "./sharded_ps", "--offline", "--iterations=1000000",
            "--consistency=asp", "--learning-rate=0.001", f"--checkpoint-dir={saved}",
        )
        name = job.wait_for("ray job stop (\\w+)")[1]
        job.wait_for("Iter .*accuracy", 90)
        stop = cluster.run(0, [VENV / "bin" / "ray", "job", "stop", f"--address=http://{cluster.head}:8265", name])
        self.assertEqual(stop.wait(60)[0], 0, stop.text())
        job.wait_for("saved a checkpoint")
        self.assertTrue(any(saved.glob("checkpoint-*")))

    def test_a_client_without_ray_submits_to_a_cluster_that_asks_for_a_token(self):
        client, token = example("submit"), "a-token-of-32-characters-or-more"
        cluster = Cluster(self, [3], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)

        def submit(*program, **variables):
            # The line of the guide, with fewer ranks: to start five more Python processes takes a while.
            line = cluster.typed(command("deploy/ray/README.md", "cargo run --example submit"))
            first = line.index("--") + 1
            flags = [word for word in line[first:line.index("--", first)] if word.startswith("--address")]
            line = [client, *flags, "--servers=0", "--workers=1", "--", *program]
            # Neither Ray's variables nor its Python.
            variables = {"PATH": "/usr/bin:/bin", "HOME": "/nowhere", **variables}
            return Process(self, cluster.hosts.command(0, line), env=environment(**variables))

        code, text = submit(example("sharded_ps")).wait(90)
        self.assertEqual(code, 1, text)
        self.assertIn("the cluster asks for a token: set RAY_AUTH_TOKEN", text)

        flags = ["--offline", "--num-workers=1", "--iterations=200"]
        code, text = submit(example("sharded_ps"), *flags, RAY_AUTH_TOKEN=token).wait(120)
        self.assertEqual(code, 0, text)
        self.assertEqual(text.count("Final accuracy is"), 1, text)
        code, text = submit(example("sharded_ps"), *flags, "--consistency=never", RAY_AUTH_TOKEN=token).wait(120)
        self.assertEqual(code, 2, text)
        self.assertIn("consistency mode", text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
