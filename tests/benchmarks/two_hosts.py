"""Two hosts, as network namespaces with a cable between them, train one adapter; then one of them is killed.

    sudo python tests/benchmarks/two_hosts.py            # plain data parallelism
    sudo python tests/benchmarks/two_hosts.py --fsdp     # the weights sharded over the hosts

Linux, `ip` and `unshare`, and the right to make namespaces. Prints the losses of one process beside those of two hosts,
what the training says when the cable is out and when a host is killed, and that the same call goes on afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny import random_rows, tiny_model

from bettertogether.errors import ConfigError, TrainingError
from bettertogether.training import TrainingConfig
from bettertogether.training.launcher import launch
from bettertogether.training.progress import TrainingProgress
from bettertogether.training.trainer import TrainingResult, train_adapter

HOSTS = (0, 1)
NAME = f"bt{os.getpid()}h"
START = """
for host in 0 1; do
  NODE_RANK=$host GLOO_SOCKET_IFNAME=cable$host ip netns exec {name}$host unshare --uts \
    bash -c 'hostname node$NODE_RANK; exec "$@"' bash "$@" &
done
wait
"""
CONFIG = """
distributed_type: {kind}
use_cpu: true
num_machines: 2
num_processes: 2
main_process_ip: 10.99.0.1
main_process_port: {port}
same_network: true
"""
FSDP = """
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
"""


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """The namespaces; whatever runs in them afterwards is ended with them."""
    try:
        for host in HOSTS:
            ip("netns", "add", f"{NAME}{host}")
        ip("link", "add", "cable0", "netns", f"{NAME}0", "type", "veth", "peer", "name", "cable1", "netns", f"{NAME}1")
        for host in HOSTS:
            ip("-n", f"{NAME}{host}", "address", "add", f"10.99.0.{host + 1}/24", "dev", f"cable{host}")
            ip("-n", f"{NAME}{host}", "link", "set", "lo", "up")
            ip("-n", f"{NAME}{host}", "link", "set", f"cable{host}", "up")
        yield
    finally:
        for host in HOSTS:
            kill(host)
            subprocess.run(["ip", "netns", "delete", f"{NAME}{host}"], check=False)


def kill(host: int) -> None:
    """End all that runs on a host, as a loss of power does."""
    listed = subprocess.run(["ip", "netns", "pids", f"{NAME}{host}"], check=False, capture_output=True, text=True)
    for pid in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def losses(result: TrainingResult) -> list[str]:
    return [f"{line.loss or line.validation_loss:.6f}" for line in result.history]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="shard the weights over the hosts")
    fsdp = parser.parse_args().fsdp
    with tempfile.TemporaryDirectory() as name, two_hosts():
        show(Path(name), fsdp)


def show(folder: Path, fsdp: bool) -> None:
    port = random.randrange(20_000, 30_000)
    text = CONFIG.format(kind="FSDP" if fsdp else "MULTI_CPU", port=port) + (FSDP if fsdp else "")
    (folder / "hosts.yaml").write_text(text)
    options: dict[str, Any] = {"learning_rate": 1e-2, "dtype": "float32", "batch_size": 7, "epochs": 3}
    command = ("bash", "-c", START.format(name=NAME), "bash")
    training = TrainingConfig(accelerate_config=folder / "hosts.yaml", launch_command=command, **options)
    rows: dict[str, Any] = {"rows": random_rows(10, shared=20), "validation_rows": random_rows(3, shared=20)}
    model = tiny_model()
    model.save_pretrained(folder / "model")
    ip("-n", f"{NAME}1", "link", "set", "cable1", "down")
    try:
        launch(folder / "model", **rows, training=training, folder=folder / "two")
    except ConfigError as error:
        print(f"Without a cable:\n  {error}")
    ip("-n", f"{NAME}1", "link", "set", "cable1", "up")

    def lose_a_host(line: TrainingProgress) -> None:
        if line.step == 3:
            kill(1)

    try:
        launch(folder / "model", **rows, training=training, folder=folder / "two", on_progress=lose_a_host)
    except TrainingError as error:
        print(f"With node1 killed in the second epoch:\n  {error}")
    print("Left there:", sorted(path.name for path in (folder / "two" / "checkpoint").iterdir()))
    seen: list[int] = []
    two = launch(
        folder / "model",
        **rows,
        training=training,
        folder=folder / "two",
        on_progress=lambda line: seen.append(line.step),
    )
    print(f"The same call goes on with step {seen[0]} of {two.history[-1].total_steps}.")
    one = train_adapter(model, **rows, training=TrainingConfig(**options), folder=folder / "one")
    print("One process:", *losses(one))
    print("Two hosts:  ", *losses(two))


if __name__ == "__main__":
    main()
