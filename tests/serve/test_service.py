"""A service answers as `predict` does, says what it refuses, and keeps to its limits."""

import json
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from services import DEADLINE, NAMES, answers_of, form, pictures, rest_of
from tokenfusion.serve.settings import Settings
from tokenfusion_runtime.__main__ import main


def test_an_image_is_answered_as_predict_does_to_the_letter(served, exported, tmp_path, capsys):
    for number, data in enumerate(pictures(6)):
        file = tmp_path / f"{number}.img"
        file.write_bytes(data)
        for query, words in (("", ["--topk", "5"]), ("?topk=2&abstain=0.02", ["--topk", "2", "--abstain", "0.02"])):
            assert main([str(exported), str(file), "--format", "json", *words]) == 0
            line = capsys.readouterr().out.replace(str(file), "")
            status, headers, body = served.ask(f"/v1/predict{query}", data, {"Content-Type": "image/png"})
            assert (status, body.decode()) == (200, line.strip())
            assert headers["x-model-sha256"] == json.loads((exported / "model.json").read_text())["graph_sha256"]


def test_several_images_are_answered_in_order_and_a_bad_one_by_its_reason(served, exported):
    files = pictures(4)
    body, headers = form([("a.png", files[0]), ("../../etc/passwd", b"no image"), ("c", files[2]), ("d", files[3])])
    status, _, text = served.ask("/v1/predict?topk=2", body, headers)
    found, expected = json.loads(text), answers_of(exported, [files[0], b"no image", files[2], files[3]], topk=2)
    assert status == 200
    assert [one["path"] for one in found] == ["a.png", "../../etc/passwd", "c", "d"]
    assert found[1]["error"] == expected[1]["error"]
    for one, other in zip(found, expected, strict=True):
        assert one.get("label") == other.get("label")
        assert one.get("score") == pytest.approx(other.get("score"), abs=1e-6)


def test_images_of_many_clients_share_batches_and_each_gets_its_own_answer(served, exported):
    files = pictures(60)
    with ThreadPoolExecutor(12) as clients:
        found = list(clients.map(served.predict, files))
    for one, other in zip(found, answers_of(exported, files), strict=True):
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-6)


def test_it_says_what_it_serves(served, exported):
    about = json.loads(served.ask("/v1/model")[2])
    said = json.loads((exported / "model.json").read_text())
    for key in ("name", "classes", "preprocess", "parity", "mistaken"):
        assert about[key] == said[key]
    too_few = "200 held-out images cannot promise 0.01: 299 are needed, or --abstain 0.015 or more"
    assert about["calibration"] == {"temperature": 1.0, "held_out_images": 200, "not_promised": {"0.01": too_few}}
    assert (about["limits"]["bytes"], about["limits"]["images"], about["limits"]["pixels"]) == (20_000, 5, 10_000)
    assert set(about["served_by"]) == {"tokenfusion", "bentoml"}


def test_workers_hold_no_torch_and_tell_nobody(served):
    (worker,) = served.workers()
    assert "libtorch" not in Path(f"/proc/{worker}/maps").read_text()
    told = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    assert b"BENTOML_DO_NOT_TRACK=True" in told


def huge():
    return pictures(1)[0][:50] + bytes(20_000)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "words"),
    [
        ("/v1/predict", b"", {}, 422, "empty (0 bytes)"),
        ("/v1/predict", b"no image", {}, 422, "not an image"),
        ("/v1/predict", pictures(1)[0][:70], {}, 422, "damaged"),
        ("/v1/predict", b"P5 200 200 255 " + bytes(40), {}, 422, "more than max_pixels=10000"),
        ("/v1/predict", huge(), {}, 413, "20,000 bytes"),
        ("/v1/predict", form([("a", b"")] * 6)[0], form([])[1], 413, "5 images"),
        ("/v1/predict", form([])[0], form([])[1], 400, "no image"),
        ("/v1/predict", b"nothing", form([])[1], 400, "form"),
        ("/v1/predict", b"nothing", {"Content-Type": "multipart/form-data"}, 400, "boundary"),
        ("/v1/predict", b"{}", {"Content-Type": "application/json"}, 415, "application/json"),
        ("/v1/predict?topk=0", b"x", {}, 400, "names no class"),
        ("/v1/predict?topk=many", b"x", {}, 400, "topk=many"),
        ("/v1/predict?abstain=2", b"x", {}, 400, "between 0 and 1"),
        ("/v1/predict?abstain=nan", b"x", {}, 400, "between 0 and 1"),
        ("/v1/predict?path=/etc/passwd", b"x", {}, 400, "no option"),
        ("/v1/predict", None, {}, 405, "GET /v1/predict"),
        ("/etc/passwd", None, {}, 404, "/docs"),
        ("/schema.json", None, {}, 404, "/docs"),
        ("/v1/explain", pictures(1)[0], {}, 501, "gradients"),
        ("/v1/model", None, {"X": "x" * 40_000}, 400, "more than 32,768 bytes of headers"),
        (f"/v1/model?{'x' * 40_000}", None, {}, 400, "more than 32,768 bytes of headers"),
    ],
)
def test_what_is_refused_is_said_by_value_reason_and_remedy(served, path, body, headers, status, words):
    found, said, text = served.ask(path, body, headers)
    assert found == status
    error = json.loads(text)["error"]
    assert set(error) == {"value", "reason", "remedy"}
    assert all(error.values())
    assert words in " ".join(error.values())
    assert "access-control-allow-origin" not in said


def test_measures_count_requests_batches_stages_and_refusals_but_no_address_that_there_is_not(served):
    served.predict(pictures(1)[0])
    served.ask("/nowhere/" + "x" * 30)
    served.ask("/v1/predict", b"no image")
    measures = served.ask("/metrics")[2].decode()
    assert 'bentoml_service_request_total{endpoint="/v1/predict",http_response_code="200"' in measures
    for name in ("bentoml_service_request_in_progress", "tokenfusion_batch_images_bucket", 'stage="decode"'):
        assert name in measures
    for kind, status in (("no_address", 404), ("unreadable", 422)):
        assert f'tokenfusion_refused_total{{kind="{kind}",status="{status}"}}' in measures
    assert "tokenfusion_waiting_images 0.0" in measures
    for path in ("/nowhere", "/static_content/swagger-ui-nowhere", "/static_content/swagger-ui.css/nowhere"):
        assert served.ask(path)[0] == 404
    assert "nowhere" not in served.ask("/metrics")[2].decode()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which files are open")
def test_clients_that_come_faster_than_they_are_answered_open_no_more_files_than_there_may_be(served):
    (worker,), image, most = served.workers(), pictures(1)[0], 0
    head = f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(image)}\r\n\r\n".encode()
    for number in range(3000):
        with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE) as connection:
            connection.sendall(head + image)
        if number % 50 == 0:
            most = max(most, len(os.listdir(f"/proc/{worker}/fd")))
    assert most < 900
    assert served.ask("/readyz")[0] == 200


def test_every_address_of_the_description_is_there_and_its_examples_are_answers(served):
    from tokenfusion.serve.refusal import KINDS

    said = json.loads(served.ask("/openapi.json")[2])
    paths = {path.replace("{name}", "tiny"): ways.keys() - {"parameters"} for path, ways in said["paths"].items()}
    for path, (method,) in paths.items():
        status = served.ask(path, b"" if method == "post" else None)[0]
        assert status in (200, 400 if path.startswith("/v2") else 422, 501)
    assert paths.keys() >= {"/metrics", "/v2", "/v2/models/tiny/infer", *HEALTH}
    examples = said["paths"]["/v1/predict"]["post"]["responses"]["200"]["content"]["application/json"]["examples"]
    assert set(examples["one"]["value"]) == set(served.predict(pictures(1)[0]))
    assert "/v2" in said["info"]["description"]
    refused = {status for status in said["paths"]["/v1/explain"]["post"]["responses"] if status != "200"}
    assert refused == {str(status) for status in KINDS.values() if status != 500}
    assert served.ask("/docs")[0] == served.ask("/static_content/swagger-ui-bundle.js")[0] == 200
    assert b"googletagmanager" not in served.ask("/docs")[2]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:3000", "[::1]:3000", "127.8.0.1"])
def test_a_service_for_this_machine_alone_is_asked_by_its_names(served, host):
    assert served.ask("/v1/model", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example:3000", "localhost.evil.example", "[::1].evil.example", "192.0.2.1", "[2001:db8::1]", "[::1"]
)
@pytest.mark.parametrize("path", ["/", "/v1/model", "/livez", "/metrics", "/v2/models/tiny"])
def test_a_page_whose_own_name_was_made_to_lead_here_is_refused(served, host, path):
    status, _, text = served.ask(path, headers={"Host": host})
    assert status == 421
    assert host in str(json.loads(text)["error"])
    assert "localhost" in str(json.loads(text)["error"])


def test_a_method_that_an_address_does_not_take_is_told_from_those_it_takes(served):
    assert served.ask("/v1/predict")[1]["allow"] == "POST"


TYPES = ["image/png", "multipart/form-data; boundary=edge", "multipart/form-data", "application/octet-stream", "text/x"]
PARTS = [b"--edge", b"\r\n", b"--edge--", b'Content-Disposition: form-data; name="a"; filename="b"', b"\0\xff", b":"]
BODIES = st.one_of(
    st.binary(max_size=300),
    st.lists(st.sampled_from(PARTS), max_size=12).map(b"".join),
    st.tuples(st.sampled_from(pictures(6)), st.integers(0, 400)).map(lambda cut: cut[0][: cut[1]]),
    st.tuples(st.sampled_from(pictures(6)), st.integers(0, 200), st.binary(min_size=1, max_size=9)).map(
        lambda changed: changed[0][: changed[1]] + changed[2] + changed[0][changed[1] :]
    ),
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(body=BODIES, kind=st.sampled_from(TYPES), path=st.sampled_from(["/v1/predict", "/v2/models/tiny/infer"]))
@example(body=b"[" * 10_000, kind="text/x", path="/v2/models/tiny/infer")
@example(
    body=b'{"inputs": [{"name": "pixels", "datatype": "UINT8", "data": [1e400]}]}',
    kind="",
    path="/v2/models/tiny/infer",
)
def test_no_body_makes_it_fail(served, body, kind, path):
    status, _, _ = served.ask(path, body, {"Content-Type": kind})
    assert status in (200, 400, 413, 415, 422)


def bearer(token="s3cret"):
    return {"Authorization": f"Bearer {token}"}


def test_more_requests_than_it_takes_get_429_slow_ones_408_and_those_under_way_their_answer(guarded):
    image = pictures(1)[0]
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=DEADLINE) as endless:
        endless.sendall(b"GET /v1/model HTTP/1.1\r\nHost: localhost\r\nX: ")
        slow, late = guarded.begin(image, bearer()), guarded.begin(image, bearer())
        status, headers, text = guarded.ask("/v1/predict", image, bearer())
        assert (status, headers["retry-after"]) == (429, "1")
        assert set(json.loads(text)["error"]) == {"value", "reason", "remedy"}
        status, headers, text = guarded.ask("/v2/models/tiny", headers=bearer())
        assert (status, headers["retry-after"], type(json.loads(text)["error"])) == (429, "1", str)
        assert 'kind="queue_full",status="429"' in guarded.ask("/metrics", headers=bearer())[2].decode()
        for path in (*HEALTH, "/", "/page.js", "/openapi.json", "/static_content/swagger-ui.css"):
            assert guarded.ask(path)[0] == 200
        late.sendall(image[-1:])
        assert rest_of(late)[0] == 200
        status, text = rest_of(slow)
        assert (status, "did not arrive within 5 seconds" in text.decode()) == (408, True)
        status, text = rest_of(endless)
        assert (status, "headers did not end within 5 seconds" in text.decode()) == (408, True)
        assert endless.recv(1) == b""
    assert guarded.ask("/v1/predict", image, bearer())[0] == 200


def test_who_goes_on_sending_what_was_refused_is_hung_up_on(guarded):
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=DEADLINE) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\nx")
        assert rest_of(connection)[0] == 404

        def is_hung_up_on():
            try:
                connection.sendall(b"x")
            except ConnectionError:
                return True
            return False

        guarded.wait_until(is_hung_up_on)


HEALTH = ("/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready")


def test_a_token_is_wanted_of_all_but_the_page_and_health(guarded):
    for headers in ({}, bearer("wrong"), {"Authorization": "Basic s3cret"}):
        for path in ("/v1/model", "/metrics", "/v2/models/tiny"):
            status, _, text = guarded.ask(path, headers=headers)
            assert (status, isinstance(json.loads(text)["error"], str)) == (401, path.startswith("/v2"))
    assert guarded.ask("/v1/model", headers=bearer())[0] == 200
    of_docs = ("/docs", "/docs.js", "/openapi.json", "/static_content/swagger-ui.css")
    free = ("/", "/page.js", "/page.css", *of_docs, *HEALTH)
    assert {path: guarded.ask(path)[0] for path in free} == dict.fromkeys(free, 200)
    assert not any(f'"{name}"' in guarded.ask("/openapi.json")[2].decode() for name in NAMES)
    assert guarded.ask("/static_content/swagger-ui-other")[0] == 404
    assert guarded.ask("/v2/models/other/ready")[0] == 404
    assert guarded.ask("/v1/model", headers=bearer() | {"Host": "example.org"})[0] == 200
    origin = {"Origin": "https://example.org"}
    shown = guarded.ask("/livez", headers=origin)[1]
    assert shown["access-control-allow-origin"] == origin["Origin"]
    assert shown["access-control-expose-headers"] == "Retry-After, X-Branches, X-Model-SHA256"
    assert "access-control-allow-origin" not in guarded.ask("/livez", headers={"Origin": "https://other.org"})[1]


def test_another_token_in_the_file_is_taken_and_none_leaves_the_one_before(guarded, token_file):
    token_file.write_text("an0ther\n")
    guarded.wait_until(lambda: guarded.ask("/v1/model", headers=bearer("an0ther"))[0] == 200)
    assert guarded.ask("/v1/model", headers=bearer())[0] == 401
    token_file.write_text("")
    guarded.process.send_signal(signal.SIGHUP)
    assert "is empty" in guarded.wait_for_words("the token before it goes on")
    assert guarded.ask("/v1/model", headers=bearer("an0ther"))[0] == 200
    token_file.write_text("s3cret\n")
    guarded.wait_until(lambda: guarded.ask("/v1/model", headers=bearer())[0] == 200)


def test_what_cannot_be_served_is_said_before_or_as_it_starts(exported, tmp_path, command, monkeypatch):
    for words, said in [
        ((tmp_path,), "no model.json"),
        ((exported, "--workers", 0), "workers=0"),
        ((exported, "--host", "localhost"), "host=localhost"),
        ((exported, "--host", "192.0.2.1"), "cannot be listened on"),
        ((exported, "--seconds", -1), "seconds=-1"),
        ((exported, "--workers", 3, "--queue", 2), "queue=2 leaves some of 3 workers without a request; give 3"),
        ((exported, "--token-file", tmp_path / "none"), "none cannot be read"),
    ]:
        status, _, errors = command("serve", *words)
        assert (status, said in " ".join(errors.split())) == (2, True), errors
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install '.[serve]' in a copy of" in command("serve", exported)[2]
    assert os.environ.get("BENTOML_HOME") is None


def test_who_may_ask_is_known_by_the_address_and_the_token():
    is_open = pytest.importorskip("tokenfusion.serve.launch").is_open
    hosts = ("127.0.0.1", "::1", "0.0.0.0", "::", "192.0.2.1")
    open_to_all = {host: is_open(Settings("", host=host)) for host in hosts}
    assert open_to_all == {"127.0.0.1": False, "::1": False, "0.0.0.0": True, "::": True, "192.0.2.1": True}
    assert not is_open(Settings("", host="0.0.0.0", token_file="token"))
