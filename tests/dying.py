"""Tasks for spawned processes: this module can be imported by them."""

import os
import signal
import sys
import time
from pathlib import Path

from dsdistill.data import blocks


def double(number):
    return 2 * number


def loaded(names):
    """Which modules this process has imported."""
    return [name for name in names if name in sys.modules]


def die_once(task):
    """Kill this process the first time; the marker tells."""
    marker, number = Path(task[0]), task[1]
    if number == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(_task):
    os.kill(os.getpid(), signal.SIGKILL)


def write_until_the_second_block(block):
    """Decode, but die at the second block."""
    if block.first:
        os.kill(os.getpid(), signal.SIGKILL)
    return blocks.write(block)


def outlive(folder):
    """Say who we are and work longer than any test."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)
