r"""A real Slurm of one's own on this machine: each node is a network namespace with its own host name and address.

    bridge 10.B.C.1 ---- veth ---- namespace of host0, 10.B.C.10: slurmd       slurmctld and munged on this side
                    \--- veth ---- namespace of host1, 10.B.C.11: slurmd

Names and addresses are made from this process's id, so that two test runs do not meet. Everything is ended by id.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare")
CONF = """
ClusterName=me{pid}
SlurmctldHost={host}({gateway})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job starts when its credentials have expired.
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
# No cgroups: a container of the tests may not own any.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdTimeout=12
MessageTimeout=5
LaunchParameters=disable_send_gids
RebootProgram=/bin/true
GresTypes=gpu
{nodes}
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} Port=6818 CPUs=4 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:h100:8 State=UNKNOWN"
)


class PrivateCluster:
    """munged, slurmctld and some slurmd, from `start` to `stop`."""

    def __init__(self, nodes: int) -> None:
        pid = os.getpid()
        # A short path: sockets lie in it.
        self.root = Path(tempfile.mkdtemp(prefix="me-slurm-"))
        self.nodes = [f"host{index}" for index in range(nodes)]
        self._prefix = f"me{pid}"
        self._network = f"10.{64 + pid // 256 % 128}.{pid % 256}"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": os.path.expanduser("~"),
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(self.root / "slurm.conf"),
        }

    def start(self) -> None:
        """Everything up and all nodes idle."""
        self.root.chmod(0o755)
        self._write_configuration()
        self._network_up()
        self._daemon(
            "munged",
            [
                *("munged", "--foreground", "--force", "--num-threads=2", f"--key-file={self.root}/munge.key"),
                *(f"--socket={self.root}/munge.sock", f"--pid-file={self.root}/munged.pid"),
                *(f"--log-file={self.root}/munged.log", f"--seed-file={self.root}/munge.seed"),
            ],
        )
        _await(lambda: (self.root / "munge.sock").exists(), "munged's socket", 20)
        self._daemon("slurmctld", ["slurmctld", "-D", "-f", self.environment["SLURM_CONF"]])
        for name in self.nodes:
            self.start_node(name)
        _await(lambda: self._in_state("idle") == set(self.nodes), "idle nodes", 15)

    def start_node(self, name: str) -> None:
        """One slurmd in its namespaces."""
        # `ip netns exec` would remount /sys, without which slurmd does not start.
        inside = f"hostname {name}; exec slurmd -D -N {name} -f {self.environment['SLURM_CONF']}"
        namespace = f"--net=/run/netns/{self._namespace(name)}"
        self._daemon(name, ["nsenter", namespace, "unshare", "--uts", "bash", "-c", inside])

    def kill_node(self, name: str) -> None:
        """What a power cut does to a node: every process in its namespace is gone at once."""
        for process in self.processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._daemons.pop(name).wait(timeout=10)

    def processes(self, name: str) -> list[int]:
        """Ids of all processes of a node."""
        listing = subprocess.run(
            ["ip", "netns", "pids", self._namespace(name)], capture_output=True, text=True, check=True, timeout=30
        )
        return [int(line) for line in listing.stdout.split()]

    def run(self, *command: str, folder: Path | None = None) -> str:
        """Output of a Slurm command; the test fails with its error otherwise."""
        result = subprocess.run(
            command, cwd=folder, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert result.returncode == 0, (
            f"{' '.join(command)} ended with {result.returncode}: {result.stdout}{result.stderr}{self.logs()}"
        )
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`, asked a second time if need be.

        On a busy machine it was seen to fail once, without a word, beside a job that went on.
        """
        command = ("scontrol", "--oneliner", "show", "job", job)
        try:
            words = self.run(*command).split()
        except AssertionError:
            time.sleep(2)
            words = self.run(*command).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The daemons' logs, for messages."""
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.root.glob("*.log")))

    def stop(self) -> None:
        """End all jobs and daemons, remove namespaces, bridge and files."""
        if "slurmctld" in self._daemons:
            subprocess.run(["scancel", "--user=root"], env=self.environment, check=False, timeout=60)
            with contextlib.suppress(AssertionError):
                _await(lambda: not self.run("squeue", "--noheader"), "the jobs' end", 30)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(timeout=10)
        for name in self.nodes:
            if not Path("/run/netns", self._namespace(name)).exists():
                continue
            for process in self.processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            _ip("netns", "delete", self._namespace(name))
        if Path(f"/sys/class/net/{self._prefix}b").exists():
            _ip("link", "delete", f"{self._prefix}b")
        shutil.rmtree(self.root)

    def _write_configuration(self) -> None:
        with socket.create_server(("", 0)) as probe:
            port = probe.getsockname()[1]
        lines = [NODE.format(name=name, address=self._address(name)) for name in self.nodes]
        values = {"pid": os.getpid(), "host": socket.gethostname(), "gateway": f"{self._network}.1", "port": port}
        (self.root / "slurm.conf").write_text(CONF.format(root=self.root, nodes="\n".join(lines), **values))
        # Slurm counts device files; any file will do.
        (self.root / "gres.conf").write_text(f"Name=gpu Type=h100 File={self.root}/gpu[0-7]\n")
        for index in range(8):
            (self.root / f"gpu{index}").touch()
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        (self.root / "state").mkdir(mode=0o700)
        for name in self.nodes:
            (self.root / f"spool.{name}").mkdir()

    def _network_up(self) -> None:
        bridge = f"{self._prefix}b"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{self._network}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for index, name in enumerate(self.nodes):
            namespace, ours = self._namespace(name), f"{self._prefix}v{index}"
            _ip("netns", "add", namespace)
            _ip("link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", ours, "master", bridge, "up")
            _ip("-n", namespace, "address", "add", f"{self._address(name)}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.root / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    def _in_state(self, state: str) -> set[str]:
        listing = subprocess.run(
            ["sinfo", "--noheader", "--Node", f"--states={state}", "--format=%N"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        return set(listing.stdout.split())

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _address(self, name: str) -> str:
        return f"{self._network}.{10 + self.nodes.index(name)}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


def _await(condition: object, what: str, limit_s: float) -> None:
    assert callable(condition)
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.1)
