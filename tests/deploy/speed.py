"""Measures what an engine costs: the speed of five processes, and the time to the first gradient on Ray. And what workers
gain that compute while they push, on networks of several speeds.

    cargo build --release --workspace --example sharded_ps
    cargo build --release --workspace --features submit --example submit
    PS_PROFILE=release python3 tests/deploy/speed.py engines --rounds 7
    PS_PROFILE=release python3 tests/deploy/speed.py start --rounds 5
    PS_PROFILE=release python3 tests/deploy/speed.py overlap --rounds 5

Needs root. The first two need Slurm from Debian, and install Ray and PyTorch into ~/.cache/ps/speed-venv: several
gigabytes, once. Everything runs on one host, in network namespaces. All engines run the whole time, so each disturbs the
others alike, and the runs take turns.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import time
import unittest

import test_ray
import test_slurm
from hosts import CACHE, OWN_SOCKETS, REPOSITORY, Hosts, Process, environment, example, install

VENV = CACHE / "speed-venv"
# The versions of bench/requirements.txt; with what `ray job submit` needs.
PACKAGES = ["ray[default]==2.60.0", "torch==2.15.0", "numpy==2.4.6"]

# Ray's own example, as bench/rivals has it, in place of a cluster of its own on the one that the job runs on. It says by
# a file when its first gradients are applied.
RIVAL = """
import pathlib, sys
import ray
import common, ray_ps
done, init, say = pathlib.Path(sys.argv.pop(1)), ray.init, common.say
ray.init = lambda **_: init()
common.say = lambda *words: (done.touch() if words[0] == "first" else None, say(*words))
ray_ps.main()
"""


class Measurement(unittest.TestCase):
    """Only because the helpers of the tests clean up with a test."""

    def runTest(self):
        pass


def print_table(title, seconds_or_rates, unit, reference):
    print(f"\n{title}")
    base = statistics.median(seconds_or_rates[reference])
    for name, values in seconds_or_rates.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.4g} {unit} ({min(values):.4g}–{max(values):.4g}) | {middle / base:.3f} |", flush=True)


def engines(test, rounds, flags):
    """Gradients per second of a driver and four nodes, as the program itself counts them."""
    hosts = Hosts(test, 1, prefix="ps-speed")
    slurm = test_slurm.Cluster(test, hosts)
    # With the priority that the others have; see deploy/ray/README.md.
    ray = test_ray.Cluster(test, [8], hosts=hosts, venv=VENV, RAY_worker_niceness="0")
    program, flags = example("sharded_ps"), ["--num-workers=4", *flags]
    folder = hosts.directory / "job"
    folder.mkdir()
    for file in (program, REPOSITORY / "deploy" / "ray" / "ps_on_ray.py"):
        shutil.copy(file, folder)
    token = {"PS_TOKEN": "token-of-the-measurement"}

    def by_hand():
        ranks = [[program, *flags, "--world-size=5", f"--rank={rank}", f"--master-addr={hosts.address(0)}"] for rank in range(5)]
        driver, *nodes = [Process(test, hosts.command(0, rank), env=environment(**token, **OWN_SOCKETS)) for rank in ranks]
        return driver

    def under_slurm():
        return slurm.run_on(0, "bash", "-c", f"cd {slurm.desk} && srun --ntasks=5 --label ./sharded_ps {' '.join(flags)}", **token)

    def on_ray():
        return ray.submit(folder, "python", "ps_on_ray.py", "--workers=4", "--", "./sharded_ps", *flags)

    ways = {"by hand": by_hand, "Slurm (`srun`)": under_slurm, "Ray (`ray job submit`)": on_ray}
    rates = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways)
        for name in names[number % len(names):] + names[:number % len(names)]:
            process = ways[name]()
            code, text = process.wait(180)
            assert code == 0, text
            rate = float(re.search(r"\((\d+) gradients/s", text)[1])
            rates[name].append(rate)
            print(f"round {number}: {name}: {rate:.0f} gradients/s", flush=True)
    print_table("Gradients per second", rates, "/s", "by hand")


def start(test, rounds):
    """Seconds from the submission to the first gradient that is applied, on one cluster."""
    hosts = Hosts(test, 1, prefix="ps-speed")
    ray = test_ray.Cluster(test, [8], hosts=hosts, venv=VENV)
    done = hosts.directory / "first"
    ours, theirs = hosts.directory / "ours", hosts.directory / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    shutil.copy(example("sharded_ps"), ours)
    shutil.copy(REPOSITORY / "deploy" / "ray" / "ps_on_ray.py", ours)
    for name in ("common.py", "ray_ps.py"):
        shutil.copy(REPOSITORY / "bench" / "rivals" / name, theirs)
    (theirs / "rival.py").write_text(RIVAL)
    # A checkpoint after the first update shows that it was made.
    flags = ["--num-workers=2", "--iterations=20", f"--checkpoint-dir={done}", "--checkpoint-every=1"]

    def with_ray():
        return ray.submit(ours, "python", "ps_on_ray.py", "--workers=2", "--", "./sharded_ps", *flags)

    def with_client():
        line = [example("submit"), f"--address=http://{ray.head}:8265", "--workers=2", "--", example("sharded_ps"), *flags]
        return Process(test, hosts.command(0, line), env=environment(RAY_AUTH_MODE="disabled"))

    def rival():
        sample = REPOSITORY / "ps-data" / "sample"
        line = ["python", "rival.py", done, f"--data-dir={sample}", "--seconds=0.1", "--num-test=100"]
        return ray.submit(theirs, *line)

    ways = {
        "ps, `ray job submit`": with_ray,
        "ps, `submit`": with_client,
        "Ray's parameter-server example, `ray job submit`": rival,
    }
    times = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways)
        for name in names[number % len(names):] + names[:number % len(names)]:
            begun = time.monotonic()
            process = ways[name]()
            while not (done.is_file() or any(done.glob("checkpoint-*"))):
                assert time.monotonic() - begun < 120 and not process.is_over, process.text()
                time.sleep(0.005)  # The moment is what is measured.
            times[name].append(time.monotonic() - begun)
            print(f"round {number}: {name}: {times[name][-1]:.2f} s", flush=True)
            code, text = process.wait(120)
            assert code == 0, text
            shutil.rmtree(done) if done.is_dir() else done.unlink()
    print_table("From the submission to the first applied gradient", times, "s", list(ways)[-1])


def overlap(test, rounds):
    """Gradients per second of a worker on another host than its server, whose network has a limited rate."""
    hosts = Hosts(test, 2, prefix="ps-speed")
    flags = ["--net", "--consistency=asp", "--num-workers=1", "--num-servers=1", "--learning-rate=0.01"]
    program, flags = example("sharded_ps"), [*flags, "--batch-size=32", "--iterations=100"]
    variables = environment(PS_TOKEN="token-of-the-measurement", **OWN_SOCKETS)

    def rate_of(more):
        place = ["--world-size=2", f"--master-addr={hosts.address(0)}"]
        ranks = [[program, *flags, *more, *place, f"--rank={rank}"] for rank in range(2)]
        driver, _node = [Process(test, hosts.command(n, rank), env=variables) for n, rank in enumerate(ranks)]
        code, text = driver.wait(180)
        assert code == 0, text
        seconds = float(re.search(r"gradients in ([0-9.]+) s", text)[1])
        return 100 / seconds

    for megabits in [1000, 2500, 10000]:
        for name in hosts.names:
            limit = f"qdisc replace dev eth0 root tbf rate {megabits}mbit burst 256kb latency 100ms"
            subprocess.run(["tc", "-n", name, *limit.split()], check=True)
        rates = {"without": [], "with overlap": []}
        for number in range(rounds):
            names = list(rates)
            for name in names[number % 2:] + names[:number % 2]:
                rates[name].append(rate_of(["--overlap"] if name == "with overlap" else []))
        print_table(f"Gradients of `Net` per second, {megabits} Mbit/s", rates, "/s", "without")
        gains = [after / before for before, after in zip(rates["without"], rates["with overlap"])]
        print(f"Gain of each round: {statistics.median(gains):.2f} ({min(gains):.2f}–{max(gains):.2f})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["engines", "start", "overlap"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flags", default="--iterations=5000", help="flags of sharded_ps, for `engines`")
    args = parser.parse_args()
    if args.what != "overlap":
        install(VENV, *PACKAGES)
    test = Measurement()
    try:
        if args.what == "engines":
            engines(test, args.rounds, args.flags.split())
        elif args.what == "start":
            start(test, args.rounds)
        else:
            overlap(test, args.rounds)
    finally:
        test.doCleanups()


if __name__ == "__main__":
    main()
