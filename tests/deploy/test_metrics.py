"""Metrics of a training, read by Prometheus itself: its format, its conventions, and the queries of the Grafana dashboard."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile
import unittest
import urllib.error
import urllib.parse
import urllib.request

from hosts import REPOSITORY, Process, environment, eventually, example, free_port
from readme import command, desk

TOKEN = "token-of-the-metrics"


def get(url, token=None):
    """The status and the text of an answer."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    # No proxy of the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def need(program):
    if shutil.which(program) is None:
        raise unittest.SkipTest(f"{program} is missing: install Debian's package prometheus")


def queries():
    """The queries of the dashboard, with values for Grafana's variables."""
    dashboard = json.loads((REPOSITORY / "deploy/grafana/ps.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [query.replace("$instance", ".*").replace("$__rate_interval", "1m") for query in found]


def scrape_config():
    """The lines for `prometheus.yml` that the guide has."""
    return re.search(r"^```yaml\n(.*?)^```", (REPOSITORY / "docs/metrics.md").read_text(), re.DOTALL | re.MULTILINE)[1]


class Training(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="ps-metrics-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    def start(self, *arguments, **variables):
        return Process(self, [example("sharded_ps"), *arguments], cwd=self.folder, env=environment(**variables))

    def start_long(self, *arguments, **variables):
        """A training that lasts until the end of the test. Returns it and the URL of its metrics."""
        run = self.start("--iterations", "1000000", "--batch-size", "16", *arguments, **variables)
        return run, run.wait_for(r"metrics are at (\S+)")[1]

    def metrics(self, url, wanted, token=None):
        """The text, as soon as it has a line."""
        def found():
            status, text = get(url, token)
            self.assertEqual(status, 200, text)
            return text if re.search(wanted, text, re.MULTILINE) else None

        return eventually(found, f"a line with {wanted}")


class Format(Training):
    def test_the_guide_and_promtool(self):
        need("promtool")
        need("curl")
        binaries = desk(self.folder)
        variables = environment(PATH=f"{binaries}:{os.environ['PATH']}", no_proxy="127.0.0.1")
        run = Process(self, ["bash", "-c", command("deploy/grafana/README.md", "sharded_ps --metrics")],
                      cwd=self.folder, env=variables)
        url = run.wait_for(r"metrics are at (\S+)")[1]
        self.metrics(url, r'^ps_server_version\{server="1"\} [1-9]')
        line = command("deploy/grafana/README.md", "curl --silent")
        text = subprocess.run(["bash", "-c", line], env=variables, capture_output=True, text=True, check=True).stdout
        checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
        # It also says what breaks the conventions.
        self.assertEqual((checked.returncode, checked.stdout + checked.stderr), (0, ""), text)
        # That it would.
        bad = "# TYPE ps_gradients counter\nps_gradients 1\n"
        checked = subprocess.run(["promtool", "check", "metrics"], input=bad, capture_output=True, text=True)
        self.assertNotEqual(checked.returncode, 0)

    def test_promtool_understands_the_queries_and_the_lines_for_prometheus(self):
        need("promtool")
        rules = [{"record": f"ps:query{number}", "expr": query} for number, query in enumerate(queries())]
        self.assertGreater(len(rules), 30)
        # JSON is YAML, too.
        path = self.folder / "rules.yml"
        path.write_text(json.dumps({"groups": [{"name": "ps", "rules": rules}]}))
        checked = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)
        self.assertEqual(checked.returncode, 0, checked.stdout + checked.stderr)
        token = self.folder / "token"
        token.write_text(TOKEN)
        path = self.folder / "prometheus.yml"
        path.write_text(scrape_config().replace("/etc/prometheus/ps-token", str(token)))
        checked = subprocess.run(["promtool", "check", "config", path], capture_output=True, text=True)
        self.assertEqual(checked.returncode, 0, checked.stdout + checked.stderr)

    def test_prometheus_reads_a_training_and_every_query_of_the_dashboard_has_an_answer(self):
        need("prometheus")
        # With a token, as from another machine.
        run, url = self.start_long("--metrics", "0.0.0.0:0", "--checkpoint-dir", "saved", "--checkpoint-every", "20",
                                   PS_TOKEN=TOKEN)
        address = url.split("/")[2].replace("0.0.0.0", "127.0.0.1")
        (self.folder / "token").write_text(TOKEN)
        config = scrape_config().replace("127.0.0.1:9464", address).replace("5s", "1s")
        config = config.replace("/etc/prometheus/ps-token", str(self.folder / "token"))
        (self.folder / "prometheus.yml").write_text(config)
        port = free_port()
        prometheus = Process(self, ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=tsdb",
                                    f"--web.listen-address=127.0.0.1:{port}"], cwd=self.folder, env=environment())
        prometheus.wait_for("Server is ready")

        def answer(query):
            url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
            status, text = get(url)
            self.assertEqual(status, 200, f"{query}: {text}")
            return json.loads(text)["data"]["result"]

        def says():
            return f"{answer('up')}\n{run.text()}"

        rate = "sum(rate(ps_gradients_total[1m]))"
        eventually(lambda: any(float(found["value"][1]) > 0 for found in answer(rate)), says)
        for query in queries():
            eventually(lambda query=query: answer(query), query)


class Flag(Training):
    def test_the_port_of_the_driver_has_them_behind_the_token(self):
        port, variables = free_port(), {"PS_TOKEN": TOKEN}
        place = ("--world-size", "2", "--master-port", str(port), "--metrics", "127.0.0.1:0")
        node = self.start("--iterations", "1000000", "--batch-size", "16", *place, "--rank", "1", **variables)
        driver, url = self.start_long(*place, "--rank", "0", **variables)
        own = self.metrics(url, r'^ps_gradients_total\{worker="0",outcome="applied"\} [1-9]')
        self.assertIn("ps_nodes 1\n", own)
        of_driver = f"http://127.0.0.1:{port}/metrics"
        self.assertEqual(get(of_driver)[0], 401)
        self.assertEqual(get(of_driver, "another-token-of-16")[0], 401)
        self.metrics(of_driver, r'^ps_gradients_total\{worker="0",outcome="applied"\} [1-9]', TOKEN)
        self.assertNotIn("metrics are at", node.text())
        # Its URL has the free port that it took.
        self.assertNotIn(":0/", url)
        self.assertNotIn("anybody", driver.text())

    def test_other_machines_need_the_token_if_there_is_one(self):
        _, url = self.start_long("--metrics", "0.0.0.0:0", PS_TOKEN=TOKEN)
        url = url.replace("0.0.0.0", "127.0.0.1")
        status, text = get(url)
        self.assertEqual(status, 401, text)
        self.assertNotIn(TOKEN, text)
        self.metrics(url, "^ps_running 1$", TOKEN)
        open_to_all, url = self.start_long("--metrics", "0.0.0.0:0")
        self.metrics(url.replace("0.0.0.0", "127.0.0.1"), "^ps_running 1$")
        open_to_all.wait_for("anybody who can connect to 0.0.0.0")

    def test_addresses_that_do_not_work_end_the_program_at_once(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            for address, code, text in [(f"127.0.0.1:{port}", 64, "in use.*free port"),
                                        ("192.0.2.1:9464", 64, "cannot serve metrics at 192.0.2.1:9464"),
                                        ("9464", 2, "such as 127.0.0.1:9464"),
                                        ("somewhere:9464", 2, "such as 127.0.0.1:9464")]:
                status, output = self.start("--metrics", address).wait()
                self.assertEqual(status, code, output)
                self.assertRegex(output, text)
                self.assertNotIn("panicked", output)


if __name__ == "__main__":
    unittest.main(verbosity=2)
