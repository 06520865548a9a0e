"""What several test processes build in common: one of them at a time, the others find it built."""
import contextlib
import fcntl
from pathlib import Path

BUILD = Path(__file__).parents[1] / "build"


@contextlib.contextmanager
def one_at_a_time():
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "tests.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        yield
