"""Studies on Ray: real nodes and workers, all on this machine, all in processes of their own."""

import csv
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

import pytest

from jaxlm.ablation import cluster, runner, study
from jaxlm.ablation.runner import Group
from jaxlm.errors import ConfigError, DataError
from jaxlm.telemetry.board import Board
from jaxlm.training import lock
from jaxlm.training.signals import Signals
from tests.ablation.small import small
from tests.runs import ROOT, checkpoints, rows

ray = pytest.importorskip("ray", reason="needs Ray: pip install jaxlm[cluster]")
pytestmark = pytest.mark.slow

# A transform that the file defines itself, under the name of a module that no worker can import.
OWN = """
import jax, optax
from tests.ablation.small import small, without

SCALE = 0.5

def halved(**_):
    return optax.stateless(lambda updates, params: jax.tree.map(lambda x: x * SCALE, updates))

def own(spec):
    chain = tuple(spec["chain"])
    return {**spec, "chain": (*chain[:-1], "own", chain[-1]), "own": {"transform": halved}}

def study():
    return small(variants={"clip": {}, "own": {"optimizer": own}})
"""
LONG = """
from tests.ablation.small import small, without

def study():
    changes = dict(steps=300, eval__every=100, checkpoint__every=50, log__every=10)
    return small(lanes=1, variants={"clip": {}, "no clip": without("clip_by_global_norm")}, **changes)
"""
NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster()
quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 1000}
store = {"object_store_memory": 100 * 2**20}
cluster.add_node(num_cpus=0, include_dashboard=False, _system_config=quick, **store)
for _ in range(2):
    cluster.add_node(num_cpus=1, **store)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def written(path, text):
    path.write_text(textwrap.dedent(text))
    return path


def table(workdir):
    """results.csv without what depends on the clock."""
    with (workdir / "results.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def by_itself(file, workdir):
    runner.run(study.load(str(file)), workdir)
    return workdir


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of the processes of these tests, that knows them again. Ray keeps a token in the home directory."""
    mark = uuid.uuid4().hex
    temp = Path(f"/tmp/jaxlm-ray-{mark[:6]}")  # a short path, for Ray's sockets
    temp.mkdir()
    home = str(tmp_path_factory.mktemp("home"))
    yield {**os.environ, "HOME": home, "RAY_TMPDIR": str(temp), "JAXLM_TEST_MARK": mark}
    shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture
def nothing_left(environment):
    """Checks, at the end, that no process lives that was not there before."""
    before = marked(environment)
    yield
    deadline = time.monotonic() + 15
    while (left := marked(environment).items() - before.items()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid, _ in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def marked(environment):
    """{pid: command} of the processes that descend from these tests."""
    mark = f"JAXLM_TEST_MARK={environment['JAXLM_TEST_MARK']}".encode()
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (path / "environ").read_bytes() and (command := (path / "cmdline").read_bytes()):
                found[int(path.name)] = command.split(b"\0")[0]
        except OSError:
            pass
    return found


def start(file, workdir, environment, *flags):
    command = [sys.executable, "-m", "jaxlm.sweep", f"--experiment={file}", f"--workdir={workdir}", "--executor=ray"]
    return subprocess.Popen([*command, *flags], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    """(exit code, stderr)."""
    try:
        _, said = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, said


def underway(workdir, found, process):
    """Waits for a trial of which `found(its directory, its status)` holds."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail("ended with {}: {}".format(*finish(process)))
        for path in workdir.glob("trials/*/status.json"):
            status = json.loads(path.read_text())
            if found(path.parent, status):
                return path.parent, status
        time.sleep(0.02)
    process.kill()
    pytest.fail("no such trial ever came: {}: {}".format(*finish(process)))


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A study of four trials, and its table where nothing disturbed it."""
    folder = tmp_path_factory.mktemp("long")
    file = written(folder / "long.py", LONG)
    return file, by_itself(file, folder / "local")


@pytest.fixture(scope="module")
def nodes(environment):
    """The address of a cluster: a head without CPUs, and two nodes of one each."""
    command = [sys.executable, "-c", NODES]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, text=True, **pipes)
    address = process.stdout.readline().strip()
    if not address:
        pytest.fail(process.communicate()[1])
    yield address
    process.communicate(timeout=60)


def test_the_table_is_that_of_the_local_executor(tmp_path, environment, nothing_left):
    file = written(tmp_path / "own.py", OWN)
    code, said = finish(start(file, tmp_path / "ray", environment))
    assert code == 0, said
    by_itself(file, tmp_path / "local")
    assert table(tmp_path / "ray") == table(tmp_path / "local")
    for path in (tmp_path / "local" / "trials").iterdir():
        assert rows(tmp_path / "ray" / "trials" / path.name) == rows(path)
    lines = said.splitlines()
    assert [line.split("  ")[0] for line in lines[:5]] == [
        "4 runs, of which 0 are over",
        *(f"run {i} of 4" for i in range(1, 5)),
    ]
    assert all("step 12 of 12" in line and "eval/loss" in line for line in lines[1:5]), said
    assert len(lines) == 7 and lines[-1].startswith("report: "), said  # and a verdict; Ray says nothing


def test_sigterm_saves_and_a_later_call_goes_on(tmp_path, environment, nothing_left, long):
    file, local = long
    process = start(file, tmp_path, environment)
    where, _ = underway(tmp_path, lambda path, _: (path / "metrics.jsonl").exists() and len(rows(path)) > 3, process)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75, said
    assert "preempted; run the same command to go on" in said
    assert "Traceback" not in said
    status = json.loads((where / "status.json").read_text())
    assert status["status"] == "interrupted"
    assert checkpoints(where)[-1] == status["step"]
    assert table(by_itself(file, tmp_path)) == table(local)  # `test_a_node_is_killed` goes on with Ray


def test_a_mistake_in_a_worker_is_the_users_error(tmp_path, environment, nothing_left, nodes):
    file = written(tmp_path / "own.py", OWN)
    found = study.load(str(file))
    first = runner.folder(tmp_path, study.trial(study.arm(found, "own"), "own", 0))
    first.mkdir(parents=True)
    (first / "config.json").write_text("{")
    (first / "metrics.jsonl").write_text('{"step": 1}\n')  # a run has begun there
    code, said = finish(start(file, tmp_path, environment, f"--address={nodes}"))
    assert code == DataError.exit_code
    assert said.splitlines()[-1].startswith(f"error: variant 'own': can't read {first / 'config.json'}"), said
    assert "Traceback" not in said


def test_a_node_is_killed(tmp_path, environment, nothing_left, nodes, long):
    file, local = long
    process = start(file, tmp_path, environment, f"--address={nodes}")
    underway(tmp_path, lambda _, status: status["status"] == "done", process)
    where, status = underway(
        tmp_path,
        lambda path, status: status["status"] == "running" and len(checkpoints(path)) > 1,
        process,
    )
    parent = int(Path(f"/proc/{status['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    assert "raylet" in Path(f"/proc/{parent}/cmdline").read_text()
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for pid in (parent, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    assert json.loads((where / "status.json").read_text())["status"] == "running"
    code, said = finish(process)
    assert code == 0, said
    assert "Traceback" not in said
    assert table(tmp_path) == table(local)
    assert "resumed at step" in (where / "log.txt").read_text()
    for path in (tmp_path / "trials").iterdir():
        assert rows(path) == rows(local / "trials" / path.name)


def test_a_task_waits_for_the_lock_of_a_worker_that_still_lives(tmp_path, monkeypatch):
    with lock.held(tmp_path):
        monkeypatch.setattr(cluster, "_LOCKED", 0.3)
        with pytest.raises(DataError, match=f"process {os.getpid()} on host .* trains in"):
            cluster._await_lock(tmp_path)
    monkeypatch.setattr(cluster, "_LOCKED", 60)
    held = threading.Event()

    def hold():
        with lock.held(tmp_path):
            held.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    cluster._await_lock(tmp_path)
    lock.check(tmp_path)  # nobody holds it any more
    thread.join()


def test_a_task_that_is_over_is_not_run_again(tmp_path):
    one = study.trial(study.arm(small(), "clip"), "clip", 0)
    where = runner.folder(tmp_path, one)
    where.mkdir(parents=True)
    (where / "status.json").write_text('{"status": "diverged", "step": 3}')
    assert cluster._task(Group([one], 1), str(tmp_path), "eval/loss") == (None, [])
    assert [path.name for path in where.iterdir()] == ["status.json"]


def test_a_task_gives_back_that_its_trial_lacks_the_metric(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.host, "settle", lambda: None)
    one = study.trial(study.arm(small(steps=4), "clip"), "clip", 0)
    error, _ = cluster._task(Group([one], 1), str(tmp_path), "eval/los")
    assert isinstance(error, ConfigError) and "did you mean 'eval/loss'" in str(error)


def test_configs_reach_workers_equal(tmp_path):
    """As Ray pickles them, not as JSON; a function of a file that no worker can import goes along."""
    one = study.trial(study.arm(small(), "clip"), "clip", 1)
    assert pickle.loads(ray.cloudpickle.dumps(one)) == one
    found = study.load(str(written(tmp_path / "own.py", OWN)))
    one = study.trial(study.arm(found, "own"), "own", 1)
    sent = pickle.loads(ray.cloudpickle.dumps(one))
    assert sent.address == one.address
    halved = sent.config.optimizer.own.transform()
    assert halved.update({"w": 1.0}, halved.init({"w": 1.0}), {"w": 1.0})[0] == {"w": 0.5}


def test_a_run_that_diverges_is_shown(tmp_path, capsys):
    one = study.trial(study.arm(small(), "clip"), "clip", 0)
    rows = ({"step": 1, "train/loss": 3.0, "eval/loss": "inf"}, {"step": 2, "train/loss": "nan"})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "status.json").write_text('{"status": "running", "step": 2}')
    with Board(1, 12) as board, cluster._Shown(one, tmp_path, board) as shown:
        shown.look()
        shown.close()
    assert "step 2 of 12  train/loss nan  eval/loss inf" in capsys.readouterr().err


def call(address):
    with Signals() as signals, Board(0, 0) as board:
        cluster.on_ray(address)([], Path(), board, signals)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.2:1", "no Ray cluster at 127.0.0.2:1: .*refused"),
        ("somewhere", "--address=somewhere is no address of a Ray cluster; expected 'auto' or 'host:port'"),
        ("127.0.0.2:99999", "no Ray cluster at 127.0.0.2:99999"),
    ],
)
def test_no_such_cluster(address, said):
    with pytest.raises(ConfigError, match=said):
        call(address)


def test_ray_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install jaxlm\[cluster\]"):
        cluster.on_ray()


def test_what_workers_take_over(monkeypatch):
    monkeypatch.setenv("NPROC", "3")
    monkeypatch.setenv("JAX_SOMETHING", "x")
    monkeypatch.setenv("HF_TOKEN", "secret")
    taken = cluster._environment()
    assert (taken["NPROC"], taken["JAX_SOMETHING"]) == ("3", "x")
    assert "secret" not in taken.values()
    assert str(ROOT) in taken["PYTHONPATH"].split(os.pathsep)
