"""What the launch command starts on each machine: `python -m bettertogether.training.machine FOLDER`.

It checks that this machine sees the job's folder and reaches the main machine, and then becomes `accelerate launch`.
No torch here.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

JOB = "machines.json"
"""File of the job's folder: {"machines", "static", "address", "port", "paths", "environment", "launch", "script"}."""
REFUSED = "This machine can't train: "
"""How a refusal begins, in the log of all machines."""
NUMBERS = ("NODE_RANK", "SLURM_NODEID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables that tell a machine its number, from 0; the first that is set counts."""
CONNECT_S = 10.0


def refuse(reason: str) -> NoReturn:
    """End, with the reason in the log."""
    sys.exit(f"{REFUSED}{socket.gethostname()} {reason}")


def main(folder: Path) -> NoReturn:
    """Become the launcher of this machine's processes."""
    try:
        job: dict[str, Any] = json.loads((folder / JOB).read_text())
    except OSError as error:
        refuse(
            f"does not see the job's folder {folder} ({error.strerror}). Put the run's directory on a file system that "
            "all machines share, under the same path."
        )
    for path in job["paths"]:
        if not Path(path).exists():
            refuse(f"does not see {path}. Put it on a file system that all machines share, under the same path.")
    number = machine_number(job)
    come(folder, number)
    if number:
        check_reachable(job["address"], job["port"])
    os.environ.update(job["environment"])
    which = [] if number is None else ["--machine_rank", str(number)]
    os.execv(sys.executable, [sys.executable, *job["launch"], *which, *job["script"]])


def machine_number(job: dict[str, Any]) -> int | None:
    """Which of the machines this is, from 0; None where they find it out among themselves."""
    if job["machines"] == 1:
        return 0
    given = next((name for name in NUMBERS if os.environ.get(name, "").isdigit()), None)
    if given is None:
        if not job["static"]:
            return None
        refuse(
            "doesn't know which of the machines it is. Slurm and mpirun tell it; else set NODE_RANK, from 0, where the "
            "launch command starts it."
        )
    number = int(os.environ[given])
    if number >= job["machines"]:
        refuse(f"is number {number} by {given}, but there are {job['machines']} machines: numbers start from 0.")
    return number


def come(folder: Path, number: int | None) -> None:
    """Leave word that this machine is there."""
    place = folder / f"machine-{socket.gethostname() if number is None else number}"
    try:
        with place.open("x") as file:
            file.write(socket.gethostname())
    except FileExistsError:
        refuse(f"is number {number}, and so is {place.read_text()}. Start the command once on each machine.")


def check_reachable(address: str, port: int) -> None:
    """Refuse where the main machine is out of reach. That it doesn't listen yet is no reason."""
    try:
        socket.create_connection((address, port), CONNECT_S).close()
    except ConnectionRefusedError:
        return
    except OSError as error:
        refuse(
            f"can't reach the main machine at {address}:{port} ({error.strerror or error}). Check main_process_ip and "
            "main_process_port in the configuration of accelerate, and the firewalls between."
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
