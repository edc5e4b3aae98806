"""A service ends, loses a worker and takes another classifier without losing a request."""

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from services import DEADLINE, Restarted, Service, answers_of, pictures, rest_of, service, start, write_export


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("served") / "export")


@pytest.fixture(scope="module")
def shared_service(folder):
    starting = Restarted(folder, "--workers", 2, "--queue", 3)
    yield starting
    starting.end()


@pytest.fixture
def running(shared_service):
    """A service of two workers, which a test may kill and end."""
    return shared_service()


@pytest.fixture
def damaged(folder):
    """Damages the folder that is served, until the test ends or says otherwise."""
    graph = folder / "model.onnx"
    whole = graph.read_bytes()

    def change(to_what=b"damaged"):
        graph.write_bytes(to_what or whole)

    yield change
    graph.write_bytes(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_sigint_finish_what_is_under_way_and_exit_with_0(running, folder, number):
    image = pictures(1)[0]
    begun, workers = running.begin(image), running.workers()
    running.process.send_signal(number)  # workers are of other sessions, which Ctrl-C does not reach
    assert all(os.getsid(worker) == worker for worker in workers)

    def accepts_no_more():
        try:
            return running.ask("/livez")[0] != 200
        except ConnectionError:
            return True

    running.wait_until(accepts_no_more)
    begun.sendall(image[-1:])
    status, body = rest_of(begun)
    assert (status, json.loads(body)["label"]) == (200, answers_of(folder, [image])[0]["label"])
    _, errors = running.process.communicate(timeout=60)
    assert (running.process.returncode, errors) == (0, "")
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which signals a process heeds")
def test_sigterm_before_it_listens_ends_it_with_0(folder):
    process = start(folder)
    heeded = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", heeded.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, said, errors) == (0, "", "")


def test_each_of_several_workers_takes_its_share_of_the_queue_and_no_more(running):
    image = pictures(1)[0]
    connections, taken = [], 0
    for _ in range(12):
        connection = running.send(image)
        connections.append(connection)
        taken += connection.recv(12) == b"HTTP/1.1 100"
    assert 2 <= taken <= 2 * 2  # of 3 for two workers; which takes a connection is chance
    for connection in connections:
        connection.close()


def test_a_worker_that_cannot_be_replaced_ends_no_other_and_is_tried_until_it_can_be(running, folder, damaged):
    image = pictures(1)[0]
    expected = answers_of(folder, [image])[0]
    one, other = running.workers()
    damaged()
    os.kill(one, signal.SIGKILL)
    running.wait_for_words(f"worker {one} ended by signal 9: another takes its place")
    assert "do not belong together" in running.wait_for_words("a worker cannot take the place")
    assert running.predict(image) == expected
    os.kill(other, signal.SIGKILL)
    running.wait_for_words("a worker cannot take the place")
    damaged(None)
    running.wait_until(lambda: running.ask("/v1/predict", image)[0] == 200)
    assert running.predict(image) == expected
    assert not {one, other} & running.workers()


def test_workers_that_die_one_after_another_are_waited_with_twice_as_long_and_spoken_of_once(tmp_path, capsys):
    hooks = pytest.importorskip("tokenfusion.serve.launch", reason="the extra `serve` is not installed").Hooks
    (tmp_path / "came-up").touch()
    watcher = SimpleNamespace(env={})
    counted, waits = hooks(str(tmp_path), None), []
    for pid in range(8):
        assert counted.before_spawn(watcher)
        counted.after_spawn(pid)
        waits.append(float(watcher.env["TOKENFUSION_SERVE_WAIT"]))
        counted.after_reap(pid, -11)
    assert waits == [0, 0, 1, 2, 4, 8, 16, 30]
    counted.early = 5000  # of which no power is taken
    assert counted.wait == 30
    counted.early = 8
    counted.after_reap(8, 1)  # of which nobody knows when it began: long ago
    assert (counted.before_spawn(watcher), watcher.env["TOKENFUSION_SERVE_WAIT"]) == (True, "0.0")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == ["worker 0 ended by signal 11", "worker 8 ended with status 1"]


def test_a_worker_that_ends_before_any_could_answer_ends_the_service(tmp_path, capsys):
    hooks = pytest.importorskip("tokenfusion.serve.launch", reason="the extra `serve` is not installed").Hooks
    counted = hooks(str(tmp_path), None)
    counted.after_spawn(1)
    counted.after_reap(1, -9)
    assert counted.cannot_start
    assert not counted.before_spawn(SimpleNamespace(env={}))
    assert capsys.readouterr().err == "error: a worker ended by signal 9 before it could answer\n"


def test_another_folder_under_the_same_link_takes_over_and_every_answer_is_of_the_classifier_it_names(tmp_path):
    folders = [write_export(tmp_path / str(seed), seed) for seed in (1, 2)]
    files = pictures(8)
    expected = {}
    for folder in folders:
        sha = json.loads((folder / "model.json").read_text())["graph_sha256"]
        expected[sha] = [one["score"] for one in answers_of(folder, files)]
    link = tmp_path / "current"
    link.symlink_to(folders[0])
    with service(link) as running:
        found, ended = [], threading.Event()

        def ask_on():
            while not ended.is_set():
                for number, file in enumerate(files):
                    found.append((number, *running.ask("/v1/predict", file)))

        client = threading.Thread(target=ask_on)
        client.start()
        try:
            (tmp_path / "next").symlink_to(folders[1])
            os.replace(tmp_path / "next", link)
            second = list(expected)[1]
            running.wait_until(lambda: running.ask("/v1/predict", files[0])[1]["x-model-sha256"] == second)
        finally:
            ended.set()
            client.join()
        assert {headers["x-model-sha256"] for _, _, headers, _ in found} <= set(expected)
        for number, status, headers, body in found:
            assert status == 200
            assert json.loads(body)["score"] == pytest.approx(expected[headers["x-model-sha256"]][number], abs=1e-6)


def test_sighup_loads_anew_and_what_cannot_be_loaded_leaves_the_classifier_in_use(running, damaged):
    image = pictures(1)[0]

    def loads(result):
        found = re.search(rf'^tokenfusion_loads_total{{result="{result}"}} (.*)$', measures(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def measures():
        return running.ask("/metrics")[2].decode()

    before, workers, loaded, failed = running.predict(image), running.workers(), loads("loaded"), loads("failed")
    running.process.send_signal(signal.SIGHUP)
    running.wait_until(lambda: loads("loaded") > loaded)
    damaged()
    running.process.send_signal(signal.SIGHUP)
    running.wait_until(lambda: loads("failed") > failed)
    running.wait_for_words("the classifier before it goes on")
    assert running.predict(image) == before
    assert running.workers() == workers


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_workers_end_with_a_launcher_that_is_killed(folder):
    service = Service(folder)
    try:
        (worker,) = psutil.Process(service.process.pid).children()
        service.process.kill()
        gone, _ = psutil.wait_procs([worker], timeout=DEADLINE)
        assert gone == [worker]
    finally:
        service.process.kill()
        service.process.communicate()


def test_a_classifier_that_cannot_be_loaded_ends_the_service_with_its_reason(folder, damaged):
    pytest.importorskip("bentoml", reason="the extra `serve` is not installed")
    damaged()
    process = start(folder)
    _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"error: {folder}: model.json and model.onnx do not belong together")
