"""Runs N copies of a ps program on a Ray cluster: one Ray actor per rank, which runs the program as its child.

    python ps_on_ray.py --servers 2 --workers 3 -- ./sharded_ps --servers-on-nodes …

Rank 0 is the driver; then come the servers, then the workers. The exit code is that of the driver. README.md,
beside this file, says how to use it.
"""

import argparse
import asyncio
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time

os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # Otherwise Ray leaves out lines that resemble others.
import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

BAD_START, TERMINATED = 64, 143
FINAL = (0, 2, BAD_START)  # Exit codes after which it does not help to start the process again.
KILLED, ASKED_TO_END = 137, (130, TERMINATED)  # Exit codes for the signals KILL, INT and TERM.
PASSED_ON = ("PS_", "RUST_", "NO_COLOR")  # Actors do not inherit variables; these are passed on.


def is_killed(code):
    return code > 128 and code not in ASKED_TO_END


def say(name, text):
    print(f"{time.strftime('%H:%M:%S')} {name}: {text}", flush=True)


@ray.remote
class Rank:
    """One rank. If this actor ends, its process is killed."""

    process, is_stopped = None, False

    def free_address(self):
        """This machine's address in the cluster, and a port that is free on it."""
        host = ray.util.get_node_ip_address()
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.bind((host, 0))
            return host, listener.getsockname()[1]

    def run(self, name, command, variables):
        """Runs the program to its end, prints its lines, and returns its exit code."""
        prctl = ctypes.CDLL(None).prctl  # PR_SET_PDEATHSIG is 1.
        if self.is_stopped:
            return TERMINATED
        try:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **variables},  # Here Ray has set CUDA_VISIBLE_DEVICES.
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace",
                preexec_fn=lambda: prctl(1, signal.SIGKILL),
            )
        except OSError as error:
            say(name, f"cannot start {command[0]}: {error.strerror}")
            return BAD_START
        if self.is_stopped:  # `stop` was called meanwhile, and has perhaps not seen the process.
            self.process.terminate()
        host, attempt = ray.util.get_node_ip_address(), variables["PS_ATTEMPT"]
        say(name, f"runs on {host} as process {self.process.pid}, attempt {attempt}")
        for line in self.process.stdout:
            say(name, line.rstrip("\n"))
        code = self.process.wait()
        return code if code >= 0 else 128 - code  # As a shell does for a signal.

    def stop(self):
        self.is_stopped = True
        if self.process is not None:
            self.process.terminate()


class Job:
    def __init__(self, args, needs, group):
        self.args, self.needs, self.group = args, needs, group
        roles = ["driver"] + ["server"] * args.servers + ["worker"] * args.workers
        self.names = [f"{role} {rank}" for rank, role in enumerate(roles)]
        passed_on = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        self.variables = {"PS_TOKEN": secrets.token_hex(16), **passed_on, "PS_WORLD_SIZE": str(len(roles))}
        self.actors, self.address, self.is_stopping = {}, None, False
        self.has_address = asyncio.Event()

    async def run(self):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stop)
        driver, *others = [asyncio.create_task(self.keep_running(rank)) for rank in range(len(self.names))]
        code = await driver
        if code == 0 and others:
            await asyncio.wait(others, timeout=10)  # The driver has told them to end.
        return code

    def stop(self):
        """Asks the driver to end in order; it saves a checkpoint and releases the other ranks."""
        self.is_stopping = True
        if 0 in self.actors:
            self.actors[0].stop.remote()

    async def keep_running(self, rank):
        """Starts the rank, and again after a failure, in the same bundle. Returns its last exit code."""
        name, attempt, failures = self.names[rank], 0, 0
        while True:
            address = self.address
            try:
                address = await self.make_ready(rank)
                own = {"PS_RANK": str(rank), "PS_ATTEMPT": str(attempt), "PS_RENDEZVOUS": address}
                code = await self.actors[rank].run.remote(name, self.args.command, {**self.variables, **own})
            except RayError as error:
                # `max_restarts` does not repeat a long call. Ray moves the bundle to another machine by itself.
                code = KILLED
                say(name, f"Ray has lost it ({type(error).__name__}); it starts again where there is room")
                if actor := self.actors.pop(rank, None):
                    ray.kill(actor)
            # A driver that ends by itself has released the other ranks. If it is killed, they wait for it.
            if code in FINAL or self.is_stopping or (rank == 0 and not is_killed(code)):
                return code
            failures += address == self.address  # Not if it ended because the driver has moved.
            if failures > self.args.restarts:
                say(name, f"exit code {code}; not started again, because it failed {failures} times")
                return code
            attempt += 1
            say(name, f"exit code {code}; starting it again")
            await asyncio.sleep(min(0.1 * 2**failures, 10))
            if self.is_stopping:
                return code

    async def make_ready(self, rank):
        """Makes the rank's actor, unless it has one. Returns the driver's address."""
        if rank not in self.actors:
            self.actors[rank] = self.new_actor(rank)
        if rank == 0:
            await self.settle_address(self.actors[rank])
        await self.has_address.wait()
        return self.address

    async def settle_address(self, driver):
        """Chooses the driver's address. If the driver has moved to another machine, all ranks start again."""
        host, port = await driver.free_address.remote()
        host = f"[{host}]" if ":" in host else host
        if self.address is not None and self.address.startswith(f"{host}:"):
            return
        is_move, self.address = self.address is not None, f"{host}:{port}"
        self.has_address.set()
        for rank in [rank for rank in self.actors if is_move and rank != 0]:
            ray.kill(self.actors.pop(rank))

    def new_actor(self, rank):
        custom = dict(self.needs[rank])
        return Rank.options(
            num_cpus=custom.pop("CPU", 0), num_gpus=custom.pop("GPU", 0), resources=custom,
            max_concurrency=2,  # `stop` beside `run`.
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank),
        ).remote()


def reserve(needs, strategy, seconds):
    """Reserves room for all ranks."""
    group, deadline = placement_group(needs, strategy=strategy), time.monotonic() + seconds
    while not group.wait(max(0, min(5, deadline - time.monotonic()))):
        free = {name: amount for name, amount in ray.available_resources().items() if "node:" not in name}
        text = f"the cluster has no room for these {len(needs)} ranks: {needs}; free are {free}"
        if time.monotonic() >= deadline:
            sys.exit(f"{text}; it had none for {seconds:g} s (--wait): add machines, or ask for less")
        say("ps_on_ray", f"{text}; waiting")
    return group


def resources(text):
    try:
        found = {name: float(amount) for name, amount in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as CPU=1,GPU=0.5,special=1")
    if not any(amount > 0 for amount in found.values()):
        raise argparse.ArgumentTypeError("a rank needs some resource, at least CPU=0.01")
    return {name: amount for name, amount in found.items() if amount > 0}


def main():
    parser = argparse.ArgumentParser(description="Runs a ps program on a Ray cluster.")
    parser.add_argument("--servers", type=int, default=0, help="number of ranks after the driver, for servers")
    parser.add_argument("--workers", type=int, default=2, help="number of ranks after the servers, for workers")
    for role in ("driver", "server", "worker"):
        parser.add_argument(f"--{role}-resources", type=resources, default={"CPU": 1.0}, metavar="CPU=1,GPU=0.5,name=1")
    parser.add_argument("--strategy", default="PACK", help="PACK, SPREAD, STRICT_PACK or STRICT_SPREAD")
    parser.add_argument("--restarts", type=int, default=3, help="how often each rank is started again")
    parser.add_argument("--wait", type=float, default=300, help="seconds to wait for room in the cluster")
    parser.add_argument("command", nargs="+", help="-- then the program and its arguments")
    args = parser.parse_args()
    needs = [args.driver_resources] + [args.server_resources] * args.servers + [args.worker_resources] * args.workers
    ray.init()
    group = reserve(needs, args.strategy, args.wait)
    sys.exit(asyncio.run(Job(args, needs, group).run()))


if __name__ == "__main__":
    main()
