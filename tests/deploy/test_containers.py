"""deploy/containers: structure, sources, users, the services' commands as processes of this machine; and the lines of its
README, with podman in place of Docker."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

from hosts import CACHE, REPOSITORY, Process, environment, example, install, need_root
from readme import command, desk

VENV = CACHE / "compose-venv"
FOLDER = REPOSITORY / "deploy" / "containers"
# Merge keys (<<) are resolved by YAML.
PROGRAM = """
import json, sys, yaml
from compose_spec import PyCompose
content = yaml.safe_load(sys.stdin)
PyCompose.from_json(json.dumps(content)).validate()
print(json.dumps(content))
"""


class Containers(unittest.TestCase):
    def compose(self, text):
        install(VENV, "compose-spec==0.2.1", "pyyaml==6.0.3")
        return subprocess.run([VENV / "bin" / "python", "-c", PROGRAM], input=text, capture_output=True, text=True)

    def test_the_compose_file_is_valid_and_a_wrong_one_is_not(self):
        text = (FOLDER / "compose.yaml").read_text()
        done = self.compose(text)
        self.assertEqual(done.returncode, 0, done.stderr)
        for right, wrong in [("read_only: true", "read_only: [1]"), ("cap_drop", "cap_dropp")]:
            self.assertNotEqual(self.compose(text.replace(right, wrong)).returncode, 0, wrong)

    def test_the_services_train_together(self):
        content = json.loads(self.compose((FOLDER / "compose.yaml").read_text()).stdout)
        ranks = {}
        port = str(25000 + os.getpid() % 1000)
        for name, service in content["services"].items():
            # What Docker does: names that resolve, a volume, and variables of the caller.
            variables = {
                key: re.sub(r"\$\{PS_TOKEN.*?\}", "token-of-the-containers", value)
                for key, value in service["environment"].items()
            }
            variables["PS_RENDEZVOUS"] = variables["PS_RENDEZVOUS"].replace("driver:29500", f"127.0.0.1:{port}")
            program, *words = service["command"]
            if name != "driver":
                self.assertNotIn("volumes", service, "only the driver writes checkpoints")
            words = [word for word in words if "checkpoint" not in word and word != "--resume"]
            command = [example(program), *words, "--offline", "--iterations=50"]
            ranks[name] = Process(self, command, env=environment(**variables))
        for name, process in ranks.items():
            code, text = process.wait(90)
            self.assertEqual(code, 0, f"{name}: {text}")
        self.assertIn("50 updates of 100 gradients", ranks["driver"].text())

    def test_the_image_is_built_in_stages_from_what_exists_and_runs_without_root(self):
        text = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text())
        lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        known = {"FROM", "WORKDIR", "COPY", "ARG", "RUN", "ENV", "USER", "EXPOSE", "CMD"}
        self.assertLessEqual({words[0] for words in lines}, known)
        stages = [words[3] for words in lines if words[0] == "FROM"]
        self.assertEqual(stages, ["build", "ray", "run", "libdevice", "cuda", "ps"])
        # What runs is made in this one stage; the default image and that for GPUs begin with it.
        begins = {words[3]: words[1] for words in lines if words[0] == "FROM"}
        self.assertEqual((begins["ps"], begins["cuda"]), ("run", "run"))
        self.assertEqual([words[1] for words in lines if words[0] == "USER"], ["10001"])
        for source, exists in self.copied(lines):
            self.assertTrue(exists, source)
        # As it was once: a path that is relative to the root of the other stage.
        wrong = [["COPY", "--from=build", "deploy/ray/ps_on_ray.py", "/ps/"], ["COPY", "--from=ps", "/nothing", "/"]]
        self.assertEqual([exists for _, exists in self.copied(wrong)], [False, False])
        binaries = re.findall(r"target/release/examples/(\w+)", text)
        for binary in binaries:
            self.assertTrue((REPOSITORY / "examples" / f"{binary}.rs").exists(), binary)

    @staticmethod
    def copied(lines):
        """Each source of a COPY line, and whether it exists where it is copied from."""
        for words in (words for words in lines if words[0] == "COPY"):
            stage = next((word[7:] for word in words if word.startswith("--from=")), None)
            for source in (word for word in words[1:-1] if not word.startswith("--")):
                if stage is None:
                    yield source, (REPOSITORY / source).exists()
                elif stage == "build":
                    inside = source.removeprefix("/source/")
                    in_sources = inside != source and (REPOSITORY / inside).exists()
                    yield source, in_sources or source.startswith("/programs/")
                else:
                    # That the package has the file, another test sees.
                    yield source, stage == "libdevice" and source.startswith("/cuda/")

    def test_the_package_of_the_stage_libdevice_has_the_file(self):
        text = (FOLDER / "Dockerfile").read_text()
        folder = tempfile.mkdtemp(prefix="ps-libdevice-")
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        install = re.search(r"^RUN pip (.*--target=/cuda .*)$", text, re.MULTILINE)[1].replace("/cuda ", f"{folder} ")
        # A bare Python has no pip. One that another test has made has it.
        venv = CACHE / "kubernetes-venv"
        python = venv / "bin" / "python" if venv.exists() else sys.executable
        try:
            done = subprocess.run([python, "-m", "pip", *install.split()], capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            self.skipTest("the package cannot be downloaded within 300 s")
        if done.returncode != 0:
            self.skipTest(f"the package cannot be installed: {done.stderr.strip()[-300:]}")
        source, target = re.search(r"^COPY --from=libdevice /cuda/(\S+) (\S+)$", text, re.MULTILINE).groups()
        self.assertTrue((pathlib.Path(folder) / source).is_file(), source)
        # Where CubeCL looks for it.
        root = re.search(r"^ENV CUDA_PATH=(\S+)$", text, re.MULTILINE)[1]
        self.assertEqual(target + source.split("/")[-1], f"{root}/nvvm/libdevice/libdevice.10.bc")


# `docker`, as the guide calls it.
DOCKER = """#!/bin/sh
command=$1
shift
case $command in
compose) exec {venv}/bin/podman-compose "$@" ;;
build) exec podman build --pull=never --ignorefile=deploy/containers/Dockerfile.dockerignore "$@" ;;
*) exec podman "$command" "$@" ;;
esac
"""
# Images and containers of their own, on a machine that may not raise its limits.
SETTINGS = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""
# What the image needs of Debian, from this machine; and what the Dockerfile's RUN lines call.
PROGRAMS = ["sh", "bash", "cat", "chmod", "chown", "cp", "env", "kill", "ls", "mkdir", "sleep", "strip", "useradd"]
SETTINGS_OF_DEBIAN = ["passwd", "group", "shadow", "login.defs", "nsswitch.conf"]
# Stands for the compiler of the first stage: the programs have been built.
CARGO = """#!/bin/sh
mkdir -p target/release/examples && cp /built/* target/release/examples/
"""


class WithPodman(unittest.TestCase):
    """The real Dockerfile and the real compose file. The base images are made here, because none can be downloaded
    everywhere: from this machine's own Debian, and a `cargo` that hands out what the tests have built."""

    def setUp(self):
        need_root()
        missing = [name for name in ("podman", "runc", "strip", "useradd") if shutil.which(name) is None]
        if missing or "bookworm" not in pathlib.Path("/etc/os-release").read_text():
            self.skipTest(f"needs Debian 12 and podman, runc, strip, useradd; missing: {', '.join(missing) or 'Debian 12'}")
        venv = CACHE / "podman-compose-venv"
        install(venv, "podman-compose==1.6.0")
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ps-podman-"))
        self.addCleanup(self.remove)
        (self.folder / "containers.conf").write_text(SETTINGS)
        (self.folder / "storage.conf").write_text(STORAGE.format(folder=self.folder))
        binaries = desk(self.folder / "desk")
        docker = binaries / "docker"
        docker.write_text(DOCKER.format(venv=venv))
        docker.chmod(0o755)
        self.variables = environment(
            PATH=f"{binaries}:{os.environ['PATH']}", HOME=str(self.folder),
            CONTAINERS_CONF=str(self.folder / "containers.conf"),
            CONTAINERS_STORAGE_CONF=str(self.folder / "storage.conf"),
        )
        works = self.podman("info")
        if works.returncode != 0:
            self.skipTest(f"podman does not work here: {works.stderr.strip()[-300:]}")

    def remove(self):
        self.podman("rm", "--all", "--force", "--time=0")
        self.podman("network", "rm", "--force", "ps_default")
        # Its file systems stay mounted otherwise.
        self.podman("system", "reset", "--force")
        shutil.rmtree(self.folder, ignore_errors=True)

    def podman(self, *line):
        return subprocess.run(["podman", *line], env=self.variables, capture_output=True, text=True, timeout=120)

    def type(self, line, **more):
        return Process(self, ["bash", "-c", line], cwd=REPOSITORY, env={**self.variables, **more})

    def import_image(self, root, name):
        archive = self.folder / "image.tar"
        subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
        done = self.podman("import", str(archive), name)
        self.assertEqual(done.returncode, 0, done.stderr)

    def make_base_images(self):
        root = self.folder / "root"
        for folder in ("bin", "sbin", "lib", "lib64"):
            (root / "usr" / folder).mkdir(parents=True)
            (root / folder).symlink_to(f"usr/{folder}")
        for folder in ("etc", "tmp", "root", "proc", "sys", "dev"):
            (root / folder).mkdir()
        (root / "tmp").chmod(0o1777)
        files = {shutil.which(name) for name in PROGRAMS}
        for path in [*files, example("sharded_ps")]:
            listed = subprocess.run(["ldd", path], capture_output=True, text=True).stdout
            files |= set(re.findall(r"(/\S+)", listed))
        for path in files:
            (root / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.lstrip("/"))
        for name in SETTINGS_OF_DEBIAN:
            shutil.copy(f"/etc/{name}", root / "etc")
        self.import_image(root, "docker.io/library/debian:bookworm-slim")
        cargo = root / "usr" / "bin" / "cargo"
        cargo.write_text(CARGO)
        cargo.chmod(0o755)
        (root / "built").mkdir()
        for name in re.findall(r"target/release/examples/(\w+)", (FOLDER / "Dockerfile").read_text()):
            shutil.copy(example(name), root / "built")
        self.import_image(root, "docker.io/library/rust:1.95-bookworm")
        shutil.rmtree(root)

    def test_the_lines_of_the_guide(self):
        self.make_base_images()
        code, text = self.type(command("deploy/containers/README.md", "docker build")).wait(180)
        self.assertEqual(code, 0, text)
        user = self.podman("image", "inspect", "--format={{.Config.User}}", "ps").stdout.strip()
        self.assertEqual(user, "10001")

        export = command("deploy/containers/README.md", "export PS_TOKEN=")
        up = command("deploy/containers/README.md", "docker compose")
        code, text = self.type(f"{export}; {up}").wait(180)
        self.assertEqual(code, 0, text)
        self.assertRegex(text, r"Final accuracy is \d\d\.\d")
        self.assertEqual(len(set(re.findall(r"a node has joined node=node (\d)", text))), 2, text)
        self.assertIn("saved a checkpoint", text)


if __name__ == "__main__":
    unittest.main(verbosity=2)
