import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dying import die, die_once, double, loaded

from dsdistill.data import workers
from dsdistill.errors import BadData

TESTS = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [TESTS, TESTS.parent]))}


@pytest.mark.parametrize("processes", [1, 2])
def test_every_task_is_done_once(processes):
    found = list(workers.run(double, range(7), processes, "toy"))
    assert sorted(found) == [(number, 2 * number) for number in range(7)]
    assert list(workers.run(double, [], processes, "toy")) == []


def test_processes_start_light():
    names = ["torch", "dsdistill.data.blocks", "pytest", "sklearn"]
    assert sorted(workers.run(loaded, [names, names], 2, "toy")) == [(0, names[1:2]), (1, names[1:2])]


def test_a_killed_process_costs_nothing_but_its_task(tmp_path, caplog):
    tasks = [(str(tmp_path / "marker"), number) for number in range(9)]
    with caplog.at_level(logging.WARNING, "dsdistill"):
        found = list(workers.run(die_once, tasks, 2, "toy"))
    assert sorted(found) == [(number, number) for number in range(9)]
    assert caplog.text.count("toy: a process that decodes images was killed; trying once more") == 1


def test_the_second_death_ends_it():
    with pytest.raises(workers.WorkersKilled) as caught:
        list(workers.run(die, range(9), 2, "toy"))
    assert caught.value.tasks == (0, 1, 2, 3)


def refuse(_task):
    raise BadData("unsuitable")


def test_errors_of_a_task_arrive_as_they_are():
    with pytest.raises(BadData, match=r"^unsuitable$"):
        list(workers.run(refuse, range(9), 1, "toy"))


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('begin', flush=True)\n"
        "from dying import double\n"
        "from dsdistill.data import workers\n"
        "import sys\n"
        "print(sorted(workers.run(double, range(3), 2, 'toy')), sys.modules['__main__'].__file__ == __file__)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.splitlines() == ["begin", "[(0, 0), (1, 2), (2, 4)] True"]


@pytest.mark.skipif(not Path("/proc").exists(), reason="asks /proc whether a process lives")
def test_processes_end_with_a_killed_parent(tmp_path):
    code = (
        "from dying import outlive; from dsdistill.data import workers; import sys\n"
        "list(workers.run(outlive, [sys.argv[1]] * 2, 2, 'toy'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT)
    end = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    children = [int(path.name) for path in tmp_path.iterdir()]
    while any(_lives(child) for child in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(children) == 2
    assert not any(_lives(child) for child in children)


def _lives(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
