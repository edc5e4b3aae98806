"""A service ends, loses a worker and takes another classifier without losing a request."""

import json
import os
import signal
import threading

import pytest

from services import DEADLINE, answers_of, pictures, rest_of, service, start, write_export


@pytest.fixture
def exported(tmp_path):
    return write_export(tmp_path / "export")


def test_sigterm_finishes_what_is_under_way_and_exits_with_0(exported):
    image = pictures(1)[0]
    with service(exported) as running:
        begun, (worker,) = running.begin(image), running.workers()
        running.process.terminate()

        def accepts_no_more():
            try:
                return running.ask("/livez")[0] != 200
            except ConnectionError:
                return True

        running.wait_until(accepts_no_more)
        begun.sendall(image[-1:])
        status, body = rest_of(begun)
        assert (status, json.loads(body)["label"]) == (200, answers_of(exported, [image])[0]["label"])
        _, errors = running.process.communicate(timeout=60)
        assert (running.process.returncode, errors) == (0, "")
        assert not os.path.exists(f"/proc/{worker}")


def test_a_worker_that_is_killed_is_replaced_and_the_next_answer_is_right(exported):
    image = pictures(1)[0]
    with service(exported) as running:
        (worker,) = running.workers()
        os.kill(worker, signal.SIGKILL)
        running.wait_until(lambda: running.ask("/v1/predict", image)[0] == 200)
        assert running.predict(image) == answers_of(exported, [image])[0]
        assert running.workers() != {worker}
        assert running.stop()[0] == 0


def test_a_worker_that_cannot_be_replaced_ends_no_other_and_is_tried_until_it_can_be(exported):
    image, whole = pictures(1)[0], (exported / "model.onnx").read_bytes()
    expected = answers_of(exported, [image])[0]
    with service(exported, "--workers", 2) as running:
        one, other = running.workers()
        (exported / "model.onnx").write_bytes(b"damaged")
        os.kill(one, signal.SIGKILL)
        said = running.process.stderr.readline()
        assert "a worker cannot take the place" in said
        assert "do not belong together" in said
        assert running.predict(image) == expected
        os.kill(other, signal.SIGKILL)
        assert "a worker cannot take the place" in running.process.stderr.readline()
        (exported / "model.onnx").write_bytes(whole)
        running.wait_until(lambda: running.ask("/v1/predict", image)[0] == 200)
        assert running.predict(image) == expected
        assert running.stop()[0] == 0


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


def test_sighup_loads_anew_and_what_cannot_be_loaded_leaves_the_classifier_in_use(exported):
    image = pictures(1)[0]

    def loads(result):
        return f'tokenfusion_loads_total{{result="{result}"}} 1.0'

    with service(exported) as running:
        before, (worker,) = running.predict(image), running.workers()
        running.process.send_signal(signal.SIGHUP)
        running.wait_until(lambda: loads("loaded") in running.ask("/metrics")[2].decode())
        (exported / "model.onnx").write_bytes(b"damaged")
        running.process.send_signal(signal.SIGHUP)
        running.wait_until(lambda: loads("failed") in running.ask("/metrics")[2].decode())
        assert running.predict(image) == before
        assert running.workers() == {worker}
        status, errors = running.stop()
        assert status == 0
        assert "the classifier before it goes on" in errors
        assert "Traceback" not in errors


def test_a_classifier_that_cannot_be_loaded_ends_the_service_with_its_reason(exported):
    pytest.importorskip("bentoml", reason="the extra `serve` is not installed")
    (exported / "model.onnx").write_bytes(b"damaged")
    process = start(exported)
    _, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"error: {exported}: model.json and model.onnx do not belong together")
