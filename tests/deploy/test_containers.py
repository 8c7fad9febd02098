"""deploy/containers as far as it can be checked without Docker: structure, sources, users, and the services'
commands as processes of this machine."""

import json
import os
import re
import subprocess
import unittest

from hosts import CACHE, REPOSITORY, Process, environment, example, install

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
        self.assertEqual(stages, ["build", "ray", "ps"])
        last = lines[max(index for index, words in enumerate(lines) if words[0] == "FROM"):]
        self.assertEqual([words[1] for words in last if words[0] == "USER"], ["10001"])
        for words in lines:
            if words[0] == "COPY":
                stage = next((word[7:] for word in words if word.startswith("--from=")), None)
                self.assertIn(stage, [None, *stages])
                sources = [word for word in words[1:-1] if not word.startswith("--")]
                for source in sources:
                    self.assertTrue(source.startswith("/programs") or (REPOSITORY / source).exists(), source)
        binaries = re.findall(r"target/release/examples/(\w+)", text)
        for binary in binaries:
            self.assertTrue((REPOSITORY / "examples" / f"{binary}.rs").exists(), binary)


if __name__ == "__main__":
    unittest.main(verbosity=2)
