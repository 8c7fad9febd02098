"""deploy/ray on a Ray cluster of two hosts, each a network namespace. Needs root, and Ray from PyPI. And what the script
and the client decide by themselves, without any Ray."""

import asyncio
import contextlib
import http.server
import importlib.util
import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
import unittest
from unittest import mock

from hosts import CACHE, OWN_SOCKETS, REPOSITORY, Hosts, Process, environment, eventually, example, install, need_root
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

    def __init__(self, test, cpus, hosts=None, venv=VENV, head_has=(), **variables):
        self.test, self.hosts, self.variables, self.venv = test, hosts or Hosts(test, len(cpus)), variables, venv
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="ps-ray-home-"))
        test.addCleanup(shutil.rmtree, self.home, ignore_errors=True)
        self.head = self.hosts.address(0)
        # The lines of the guide, and what several Rays on one machine need.
        self.start(0, cpus[0], *self.typed(command("deploy/ray/README.md", "ray start --head")),
                   "--port=6379", f"--dashboard-host={self.head}", *head_has)
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


def script(lost):
    """ps_on_ray.py as a module, on a Ray of which only the names are there. `lost` is its RayError."""
    names = {
        "ray": {"remote": lambda kind: kind, "kill": lambda actor: actor.kill()},
        "ray.exceptions": {"RayError": lost},
        "ray.util": {},
        "ray.util.placement_group": {"placement_group": None},
        "ray.util.scheduling_strategies": {"PlacementGroupSchedulingStrategy": None},
    }
    modules = {}
    for name, content in names.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(content)
    modules["ray"].util = modules["ray.util"]
    modules["ray.util"].get_node_ip_address = lambda: "10.0.0.1"
    found = importlib.util.spec_from_file_location("ps_on_ray", REPOSITORY / "deploy" / "ray" / "ps_on_ray.py")
    module = importlib.util.module_from_spec(found)
    with mock.patch.dict(sys.modules, modules):
        found.loader.exec_module(module)
    return module


class Lost(Exception):
    pass


class Method:
    """A method of an actor that the test plays."""

    def __init__(self, answer):
        self.remote = answer


class FakeActor:
    """An actor whose process runs until the test says how it ends."""

    def __init__(self, host):
        self.result, self.runs, self.is_asked, self.host = None, 0, False, host
        self.run, self.stop, self.free_address = Method(self.begin), Method(self.ask), Method(self.address)

    def begin(self, *_):
        self.runs, self.result = self.runs + 1, asyncio.get_running_loop().create_future()
        return self.result

    def ask(self):
        self.is_asked = True

    async def address(self):
        return self.host, 7

    def kill(self):
        if self.result is not None and not self.result.done():
            self.result.set_exception(Lost())


class TheScript(unittest.TestCase):
    def setUp(self):
        self.script = script(Lost)
        self.output = io.StringIO()
        self.enterContext(contextlib.redirect_stdout(self.output))

    def test_a_program_that_cannot_be_started_is_not_tried_again(self):
        code = self.script.Rank().run("driver 0", ["./no-such-program"], {"PS_ATTEMPT": "0"})
        self.assertEqual(code, 64)
        self.assertIn(code, self.script.FINAL)
        self.assertIn("driver 0: cannot start ./no-such-program: No such file or directory", self.output.getvalue())

    def test_a_rank_that_is_stopped_before_its_process_starts_does_not_start_it(self):
        rank = self.script.Rank()
        rank.stop()
        self.assertEqual(rank.run("driver 0", ["echo", "started"], {"PS_ATTEMPT": "0"}), 143)
        self.assertNotIn("started", self.output.getvalue())

    def test_a_rank_that_is_stopped_while_its_process_starts_ends_it(self):
        rank = self.script.Rank()
        start = subprocess.Popen

        def stopped_meanwhile(*words, **options):
            rank.stop()
            return start(*words, **options)

        with mock.patch.object(self.script.subprocess, "Popen", stopped_meanwhile):
            self.assertEqual(rank.run("driver 0", ["sleep", "60"], {"PS_ATTEMPT": "0"}), 143)

    def job(self, *hosts):
        """A job of a driver and a worker. The driver's actors are made on these hosts, in this order."""
        args = types.SimpleNamespace(servers=0, workers=1, restarts=0, command=["./program"])
        job = self.script.Job(args, needs=[{}, {}], group=None)
        left = list(hosts)
        job.new_actor = lambda rank: FakeActor(left.pop(0) if rank == 0 else "10.0.0.9")
        return job

    @staticmethod
    async def until(condition):
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0)

    def test_a_job_that_is_stopped_between_two_attempts_starts_no_driver(self):
        async def scenario():
            job = self.job("10.0.0.1")
            job.args.restarts = 3
            running = asyncio.create_task(job.run())
            await self.until(lambda: 0 in job.actors and job.actors[0].runs)
            driver = job.actors[0]
            driver.result.set_result(137)
            await self.until(lambda: "exit code 137; starting it again" in self.output.getvalue())
            job.stop()
            self.assertEqual(await asyncio.wait_for(running, 20), 137)
            self.assertEqual(driver.runs, 1)
            self.assertTrue(driver.is_asked)

        asyncio.run(scenario())

    def test_a_rank_that_ends_because_the_driver_has_moved_has_not_failed(self):
        async def scenario():
            job = self.job("10.0.0.1", "10.0.0.2")
            # The driver may be lost once, and the worker never.
            driver, worker = [asyncio.create_task(job.keep_running(rank)) for rank in (0, 1)]
            await self.until(lambda: len(job.actors) == 2 and all(actor.runs for actor in job.actors.values()))
            first = job.actors[1]
            job.args.restarts = 1
            job.actors[0].kill()
            await self.until(lambda: job.address.startswith("10.0.0.2"))
            job.args.restarts = 0
            await self.until(lambda: worker.done() or job.actors.get(1, first) is not first and job.actors[1].runs)
            self.assertFalse(worker.done(), self.output.getvalue())
            # At the same address, it has.
            job.actors[1].result.set_result(137)
            self.assertEqual(await asyncio.wait_for(worker, 20), 137)
            driver.cancel()

        asyncio.run(scenario())


class TheClient(unittest.TestCase):
    def test_it_hands_on_what_it_can_of_variables_that_are_not_unicode(self):
        sent = []

        class Answers(http.server.BaseHTTPRequestHandler):
            def answer(self, text=b"{}"):
                sent.append((self.path, self.rfile.read(int(self.headers.get("Content-Length") or 0))))
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self):
                self.answer()

            def do_POST(self):
                self.answer(b'{"submission_id": "one"}')

            def log_message(self, *_):
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Answers) as cluster:
            threading.Thread(target=cluster.serve_forever, daemon=True).start()
            line = [example("submit"), f"--address=http://127.0.0.1:{cluster.server_port}", "--detach", "--", "/bin/true"]
            variables = {**environment(), b"PS_RUN_ID": b"caf\xe9", b"OTHER\xff": b"\xff"}
            code, text = Process(self, line, env=variables).wait(60)
            cluster.shutdown()
        self.assertEqual(code, 0, text)
        path, body = sent[-1]
        self.assertEqual(path, "/api/jobs/")
        self.assertIn('"PS_RUN_ID":"caf\ufffd"', body.decode())


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

    def test_each_worker_sees_the_gpus_that_ray_gives_it(self):
        cluster = Cluster(self, [3], head_has=["--num-gpus=4"])
        folder = self.working_dir()
        # What Ray reserves, and how many GPUs each worker and both together then see.
        for needed, each, together in [("0.5", 1, 1), ("2", 2, 4)]:
            with self.subTest(needed):
                seen = cluster.hosts.directory / f"seen-{needed}"
                seen.mkdir()
                # Not in the output: its last lines may be lost when the job ends. The driver ends last.
                (folder / "gpus").write_text(f'#!/bin/sh -e\ncd {seen}\necho "$CUDA_VISIBLE_DEVICES" > .$PS_RANK\n'
                                             'mv .$PS_RANK $PS_RANK\n'
                                             'until [ $PS_RANK != 0 ] || [ -e 1 -a -e 2 ]; do sleep 0.1; done\n')
                (folder / "gpus").chmod(0o755)
                job = cluster.submit(folder, "python", "ps_on_ray.py", "--workers=2", f"--worker-resources=CPU=1,GPU={needed}",
                                     "--", "./gpus")
                code, text = job.wait(120)
                self.assertEqual(code, 0, text)
                gpus = [(seen / rank).read_text().strip().split(",") for rank in "12"]
                self.assertEqual([len(one) for one in gpus], [each] * 2, text)
                self.assertEqual(len({gpu for one in gpus for gpu in one}), together, text)

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
        job = self.job(cluster, "--servers=0", "--workers=1", "--", "./no_such_program")
        code, text = job.wait(120)
        self.assertNotEqual(code, 0)
        self.assertIn("failed with exit code 64", text)
        self.assertNotIn("starting it again", text)

        job = self.job(cluster, "--servers=0", "--workers=1", "--", "./sharded_ps", "--offline", "--learning-rate=inf")
        code, text = job.wait(120)
        self.assertNotEqual(code, 0)
        self.assertIn("learning rate", text)
        self.assertIn("failed with exit code 1", text)

        saved = cluster.hosts.directory / "saved"
        job = self.job(
            cluster, "--servers=0", "--workers=2", "--", "./sharded_ps", "--offline", "--iterations=1000000",
            "--num-workers=2", "--consistency=asp", "--learning-rate=0.001", f"--checkpoint-dir={saved}",
        )
        name = job.wait_for("ray job stop (\\w+)")[1]
        job.wait_for("Iter .*accuracy", 90)
        # A process that is asked to leave finishes its step, and its worker goes on elsewhere.
        process = job.wait_for(r"worker 2: runs on .* as process (\d+), attempt 0")
        os.kill(int(process[1]), signal.SIGTERM)
        job.wait_for("a node has left node=node 2")
        job.wait_for("a worker goes on at another node")
        self.assertNotIn("starting it again", job.text())
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
