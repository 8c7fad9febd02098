"""deploy/slurm on a Slurm cluster of three hosts, each a network namespace. Needs root, Slurm and munge."""

import os
import re
import shutil
import signal
import subprocess
import unittest

from hosts import OWN_SOCKETS, Hosts, Process, environment, eventually, need_root
from readme import command, desk

CONFIGURATION = """
ClusterName=ps
SlurmctldHost=host0({head})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock
CryptoType=crypto/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
MinJobAge=300
NodeName=host[0-{last}] CPUs=8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A Slurm cluster on these hosts, whose first one is the head."""

    def __init__(self, test, hosts):
        missing = [name for name in ("munged", "slurmctld", "slurmd", "srun", "salloc") if shutil.which(name) is None]
        if missing:
            test.skipTest(f"{', '.join(missing)}: apt-get install slurm-wlm munge")
        self.test, self.hosts, self.directory = test, hosts, hosts.directory
        self.desk = self.directory / "desk"
        desk(self.desk)
        (self.directory / "state").mkdir()
        self.directory.chmod(0o755)
        self.configuration = self.directory / "slurm.conf"
        last = len(hosts.names) - 1
        self.configuration.write_text(
            CONFIGURATION.format(head=hosts.address(0), directory=self.directory, last=last))
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        flags = [f"--{flag}={self.directory}/munge.{ending}" for flag, ending in files.items()]
        self.run_on(0, "munged", "--foreground", f"--key-file={key}", "--force", *flags)
        eventually((self.directory / "munge.sock").exists, "munged listens")
        self.run_on(0, "slurmctld", "-D", "-f", self.configuration)
        for number in range(last + 1):
            (self.directory / f"spool.host{number}").mkdir()
            self.run_on(number, "slurmd", "-D", "-N", f"host{number}", "-f", self.configuration)
        idle = f"idle {last + 1}"
        eventually(lambda: self.ask("sinfo", "-h", "-o", "%T %D").strip() == idle, "all nodes are idle")

    def run_on(self, number, *line, **variables):
        return Process(self.test, self.hosts.command(number, line), env=self.environment(**variables))

    def environment(self, **variables):
        return environment(SLURM_CONF=str(self.configuration), HOME=str(self.directory), **OWN_SOCKETS, **variables)

    def ask(self, *line):
        done = subprocess.run(
            self.hosts.command(0, line), env=self.environment(), capture_output=True, text=True, timeout=60,
        )
        return done.stdout


class OnSlurm(unittest.TestCase):
    def setUp(self):
        need_root()
        self.slurm = Cluster(self, Hosts(self, 3))

    def test_srun_starts_five_processes_on_three_hosts_and_one_may_be_killed(self):
        export = command("deploy/slurm/README.md", "export PS_TOKEN=")
        # The guide puts the wrapper before the program, too.
        line = command("deploy/slurm/README.md", "srun --ntasks=5 --label ./").replace("./", "deploy/restart.sh ./")
        # On all three hosts, although two have processors enough.
        line = f"{export}; {line} --iterations=3000 --batch-size=64".replace("--label", "--label --nodes=3")
        training = self.slurm.run_on(0, "bash", "-c", f"cd {self.slurm.desk} && {line}")
        joined = [training.wait_for(rf'a node has joined node=node {rank} .*host="(\w+)" pid=(\d+)')
                  for rank in range(1, 5)]
        self.assertEqual({match[1] for match in joined}, {"host0", "host1", "host2"})
        training.wait_for(r"Iter \d{3,}:")
        os.kill(int(joined[3][2]), signal.SIGKILL)
        training.wait_for("ended with 137; starting it again")
        training.wait_for("a node has joined node=node 4", occurrence=2)
        code, text = training.wait(120)
        self.assertEqual(code, 0, text)
        # Each of the gradients was applied exactly once.
        self.assertIn("updates of 12000 gradients", text)
        self.assertGreater(float(re.findall(r"Final accuracy is (\d+\.\d)", text)[-1]), 85)

    def test_a_rank_that_is_asked_to_leave_and_pmi2(self):
        export = command("deploy/slurm/README.md", "export PS_TOKEN=")
        line = command("deploy/slurm/README.md", "srun --ntasks=5 --label ./")
        listed = self.slurm.run_on(0, "srun", "--mpi=list").wait(60)[1]
        if "pmi2" not in listed:
            self.skipTest(f"this Slurm has no plugin pmi2: {listed}")
        # The other way to start it that the guide names.
        line = line.replace("--label", "--label --mpi=pmi2 --nodes=3") + " --iterations=3000 --batch-size=64"
        training = self.slurm.run_on(0, "bash", "-c", f"cd {self.slurm.desk} && {export}; {line}")
        process = training.wait_for(r"a node has joined node=node 4 .*pid=(\d+)")[1]
        training.wait_for(r"Iter \d{3,}:")
        os.kill(int(process), signal.SIGTERM)
        training.wait_for("a node has left node=node 4")
        training.wait_for("a worker goes on at another node")
        code, text = training.wait(120)
        self.assertEqual(code, 0, text)
        self.assertIn("updates of 12000 gradients", text)
        self.assertNotIn("is lost", text)

    def test_mpirun_in_a_job_needs_no_address(self):
        if shutil.which("mpirun.openmpi") is None:
            self.skipTest("mpirun.openmpi: apt-get install openmpi-bin")
        export = command("deploy/slurm/README.md", "export PS_TOKEN=")
        line = command("deploy/mpi/README.md", "mpirun -np 5 ./sharded_ps").replace("mpirun", "mpirun.openmpi -x PS_TOKEN")
        line = f"cd {self.slurm.desk} && {export}; salloc --nodes=3 --ntasks=5 {line}"
        training = self.slurm.run_on(0, "bash", "-c", line, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        code, text = training.wait(120)
        self.assertEqual(code, 0, text)
        joined = re.findall(r'a node has joined node=node \d.*?host="?(host\d)', text)
        self.assertEqual(set(joined), {"host0", "host1", "host2"}, text)
        self.assertIn("updates of 800 gradients", text)

    def test_a_job_goes_on_after_its_time_limit(self):
        saved, log = self.slurm.directory / "saved", self.slurm.directory / "ps.log"
        line = command("deploy/slurm/README.md", "sbatch --ntasks=5 ").replace("/shared/runs/one", str(saved))
        line = line.replace("deploy/", f"--nodes=2 --output={log} deploy/")
        line += " --iterations=1000000 --servers-on-nodes --checkpoint-every=0"
        answer = self.slurm.ask("bash", "-c", f"cd {self.slurm.desk} && {line}").strip()
        self.assertRegex(answer, r"Submitted batch job \d+")
        job = answer.split()[-1]
        lines = lambda: log.read_text() if log.exists() else ""
        eventually(lambda: re.search(r"Iter \d{3,}:", lines()), "the training runs")
        # What Slurm does by `--signal=B:TERM@120` near the time limit, whose smallest unit is a minute.
        self.slurm.ask("scancel", "--batch", "--signal=TERM", job)
        eventually(lambda: "saved a checkpoint" in lines(), lambda: "a checkpoint:\n" + lines())
        eventually(lambda: "put back into the queue" in lines(), lambda: "the job is requeued:\n" + lines())
        # Slurm holds a requeued job back for two minutes.
        self.assertRegex(self.slurm.ask("scontrol", "show", "job", job), "Restarts=1")
        self.slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
        eventually(lambda: "going on from a checkpoint" in lines(), lambda: "it goes on:\n" + lines(), 150)
        self.slurm.ask("scancel", job)


if __name__ == "__main__":
    unittest.main(verbosity=2)
