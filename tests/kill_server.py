"""Compresses a tiny model again and again in forked children that die by SIGKILL. Run by test_killed.py.

    python kill_server.py MODEL FOLDER KILLS SEED SETTINGS

A child is forked for every attempt, so that transformers is imported once. Half of the kills strike after a random
time, wherever the child then is, in the middle of a write too; the other half at a random system event of Python
(a file opened, renamed, removed, …), so that the narrow places between two of them are met. Prints a JSON line for
every run that got to its end: how often it was killed on the way, and where.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

# Threads that load a model convert dtypes by torch's pool, which does not survive a fork.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")

import torch  # noqa: E402

from reallm.errors import ReallmError  # noqa: E402
from reallm.pipeline import Settings, prepare, run  # noqa: E402

EVENTS = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "os.chmod",
    "shutil.rmtree",
)


def child(job, out: Path, delay: float | None, event: int | None) -> None:
    """Runs in a forked process: compress, unless killed before."""
    left = event

    def count(name: str, arguments: tuple) -> None:
        nonlocal left
        if left is not None and name in EVENTS:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if delay is not None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        if os.fork() == 0:  # a second process pulls the trigger, whatever the first is in
            time.sleep(delay)
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)
    try:
        run(job, out, resume=True)
    except ReallmError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        os._exit(3)
    os._exit(0)


def attempt(job, out: Path, rng: random.Random, whole: float, events: int) -> bool:
    """One try, killed or not. Whether it got to its end."""
    by_time = rng.random() < 0.5
    delay = rng.uniform(0, whole) if by_time else None
    event = None if by_time else rng.randrange(events)
    process = os.fork()
    if process == 0:
        child(job, out, delay, event)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, f"exit {os.WEXITSTATUS(status)}"
    return True


def main() -> None:
    """Runs until there were KILLS kills; the last run is let live."""
    model, folder, kills, seed, settings = sys.argv[1:]
    torch.set_num_threads(1)  # threads do not survive a fork
    chosen = json.loads(settings)
    job = prepare(model, Settings(**chosen | {"calibration": tuple(chosen.get("calibration", ()))}))
    events, counting = 0, True

    def count(name: str, arguments: tuple) -> None:
        nonlocal events
        events += counting and name in EVENTS

    sys.addaudithook(count)  # for good: there is no way to take one away
    start = time.perf_counter()
    run(job, Path(folder) / "whole")
    whole, counting = time.perf_counter() - start, False
    rng, so_far, number = random.Random(int(seed)), 0, 0
    while so_far < int(kills):
        number += 1
        out, killed, left_behind = Path(folder) / f"out{number}", 0, []
        while not attempt(job, out, rng, whole, events):
            killed += 1
            work = out.with_name(out.name + ".work")
            left_behind.append(len(list(work.glob("*.safetensors"))) if work.exists() else -1)
        so_far += killed
        print(json.dumps({"out": out.name, "killed": killed, "finished_matrices": left_behind}), flush=True)


if __name__ == "__main__":
    main()
