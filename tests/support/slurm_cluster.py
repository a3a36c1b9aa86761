"""A Slurm cluster of one node on this machine: munged, slurmctld and slurmd of Debian's slurm-wlm, in a folder of its own.

    with SlurmCluster(folder) as cluster:
        cluster.run("sbatch", "--parsable", "job.sbatch")

By hand, until Ctrl-C: python tests/support/slurm_cluster.py FOLDER. It needs root, since slurmd does, and no systemd, no
cgroups and no settings in /etc: ports, key and files are its own.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from free_port import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")

# cred_expire: the seconds that a requeued job waits before it starts again (and for which the credential of a step is valid);
# less than 5 is refused, the default is 120. config_overrides: the node counts as having the CPUs of its line.
CONFIG = """
ClusterName=magihuman
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire={requeue_seconds}
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [name for name in (*DAEMONS, "sbatch", "srun") if _daemon(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmd needs root"


def _daemon(name: str) -> str | None:
    return shutil.which(name, path=f"/usr/sbin:/usr/local/sbin:{os.environ.get('PATH', '')}")


class SlurmCluster:
    """The cluster while the block runs; its commands find it by SLURM_CONF.

    Args:
        folder: of its files; a short path, since it holds a socket.
        cpus: of the node, whatever the machine has. requeue_seconds: wait of a requeued job, at least 5.
    """

    def __init__(self, folder: Path, cpus: int = 4, requeue_seconds: int = 8) -> None:
        self.folder, self.cpus, self.requeue_seconds = folder.resolve(), cpus, requeue_seconds
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SBATCH_", "SLURM_JOB", "SLURM_STEP"))]:
            del self.environment[name]

    def __enter__(self) -> "SlurmCluster":
        for part in ("state", "spool"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host, port = os.uname().nodename.split(".")[0], free_port()
        text = CONFIG.format(
            host=host, port=port, node_port=free_port(), folder=self.folder, cpus=self.cpus,
            requeue_seconds=self.requeue_seconds,
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)
        try:
            here = {name: str(self.folder / f"munge.{name}") for name in ("key", "sock", "seed")}
            self._start(
                "munged", f"--key-file={here['key']}", f"--socket={here['sock']}", f"--seed-file={here['seed']}",
                f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log", "--force",
            )  # fmt: skip
            self._start("slurmctld", "-f", str(self.folder / "slurm.conf"))
            self._start("slurmd", "-f", str(self.folder / "slurm.conf"))
            self._wait_until_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if (self.folder / "slurmctld.pid").exists():
            subprocess.run(
                ["scancel", "--full", "--signal=KILL", "--user=root"], env=self.environment, capture_output=True
            )
        for name in reversed(DAEMONS):
            file = self.folder / f"{name}.pid"
            if not file.exists():
                continue
            pid = int(file.read_text())
            for number in (15, 9):
                try:
                    os.kill(pid, number)
                    for _ in range(50):
                        time.sleep(0.1)
                        os.kill(pid, 0)
                except ProcessLookupError:
                    break

    def _start(self, name: str, *words: str) -> None:
        done = subprocess.run([str(_daemon(name)), *words], env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr}")

    def _wait_until_idle(self) -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            shown = subprocess.run(["sinfo", "-h", "-o", "%T"], env=self.environment, capture_output=True, text=True)
            if shown.stdout.strip() == "idle":
                return
            time.sleep(0.3)
        raise RuntimeError(f"the node is {shown.stdout.strip() or shown.stderr}; see {self.folder}/slurmctld.log")

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a command of Slurm."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with SlurmCluster(Path(sys.argv[1])) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass
