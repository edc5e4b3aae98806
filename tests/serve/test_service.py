"""A service answers as `predict` does, says what it refuses, and keeps to its limits."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from services import DEADLINE, NAMES, answers_of, form, pictures, rest_of, service, write_export
from tokenfusion.serve.settings import Settings
from tokenfusion_runtime.__main__ import main
from tokenfusion_runtime.errors import InputError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("served") / "export")


@pytest.fixture(scope="module")
def served(exported):
    limits = ("--max-bytes", 20_000, "--max-images", 5, "--max-pixels", 10_000)
    with service(exported, *limits) as running:
        yield running


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
    assert about["calibration"] == {"temperature": 1.0, "held_out_images": 359}
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
    measures = served.ask("/metrics")[2].decode()
    assert 'bentoml_service_request_total{endpoint="/v1/predict",http_response_code="200"' in measures
    for name in ("bentoml_service_request_in_progress", "tokenfusion_batch_images_bucket", 'stage="decode"'):
        assert name in measures
    assert 'tokenfusion_refused_total{kind="no_address",status="404"}' in measures
    assert "tokenfusion_waiting_images 0.0" in measures
    for path in ("/nowhere", "/static_content/swagger-ui-nowhere", "/static_content/swagger-ui.css/nowhere"):
        assert served.ask(path)[0] == 404
    assert "nowhere" not in served.ask("/metrics")[2].decode()


def test_every_address_of_the_description_is_there_and_its_examples_are_answers(served):
    said = json.loads(served.ask("/openapi.json")[2])
    for path, ways in said["paths"].items():
        (method,) = ways
        assert served.ask(path, b"" if method == "post" else None)[0] in (200, 422, 501)
    examples = said["paths"]["/v1/predict"]["post"]["responses"]["200"]["content"]["application/json"]["examples"]
    assert set(examples["one"]["value"]) == set(served.predict(pictures(1)[0]))
    assert served.ask("/docs")[0] == served.ask("/static_content/swagger-ui-bundle.js")[0] == 200
    assert b"googletagmanager" not in served.ask("/docs")[2]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:3000", "[::1]:3000", "127.8.0.1"])
def test_a_service_for_this_machine_alone_is_asked_by_its_names(served, host):
    assert served.ask("/v1/model", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("host", ["evil.example:3000", "localhost.evil.example", "192.0.2.1", "[2001:db8::1]", "[::1"])
@pytest.mark.parametrize("path", ["/", "/v1/model", "/livez", "/metrics", "/v2/models/tiny"])
def test_a_page_whose_own_name_was_made_to_lead_here_is_refused(served, host, path):
    status, _, text = served.ask(path, headers={"Host": host})
    assert status == 421
    assert host in str(json.loads(text)["error"])
    assert "localhost" in str(json.loads(text)["error"])


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v2/nowhere", None, 404),
        ("/v2/models/other", None, 404),
        ("/v2/models/tiny/infer", None, 405),
        ("/v2/models/tiny/infer", bytes(20_001), 413),
        ("/v2/models/tiny/infer", b"{", 400),
    ],
)
def test_errors_below_v2_are_those_of_the_protocol(served, path, body, status):
    found, _, text = served.ask(path, body)
    assert found == status
    assert isinstance(json.loads(text)["error"], str)


def test_a_method_that_an_address_does_not_take_is_told_from_those_it_takes(served):
    assert served.ask("/v1/predict")[1]["allow"] == "POST"


def infer(served, outputs, binary=False, **more):
    """Status, headers and body of the answer for two grey images, by the Open Inference Protocol."""
    pixels = {"name": "pixels", "datatype": "UINT8", "data": [128] * 2 * 3 * 8 * 8}
    asked = {"inputs": [pixels], "outputs": outputs, "parameters": {"binary_data_output": binary}} | more
    return served.ask("/v2/models/tiny/infer", json.dumps(asked).encode())


def test_outputs_are_named_once_and_an_id_is_short(served):
    one, other = {"name": "probabilities"}, {"name": "label"}
    for outputs, words in [
        ([one, one], "named twice"),
        ([one, other, one], "3 outputs: there are 2"),
        ([{}] * 1200, "1,200 outputs: there are 2"),
        ([{"name": ["label"] * 900}], "no such output"),
        (["label"], "no such output"),
    ]:
        status, _, text = infer(served, outputs)
        assert (status, words in json.loads(text)["error"]) == (400, True)
    assert infer(served, [one], id="x" * 1001)[0] == 400
    assert json.loads(infer(served, [other, one], id=7)[2])["id"] == "7"


def test_binary_outputs_follow_the_json_in_the_order_asked_for_and_name_the_classifier(served, exported):
    status, headers, body = infer(served, [{"name": "label"}, {"name": "probabilities"}], binary=True)
    said = json.loads((exported / "model.json").read_text())
    assert (status, headers["x-model-sha256"]) == (200, said["graph_sha256"])
    size = int(headers["inference-header-content-length"])
    label, probabilities = json.loads(body[:size])["outputs"]
    place = size + label["parameters"]["binary_data_size"]
    rows = np.frombuffer(body[place:], "<f4").reshape(probabilities["shape"])
    name = NAMES[rows[0].argmax()].encode()
    assert body[size:place] == 2 * (len(name).to_bytes(4, "little") + name)
    assert rows.sum(1) == pytest.approx(1)


KINDS = ["image/png", "multipart/form-data; boundary=edge", "multipart/form-data", "application/octet-stream", "text/x"]
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
@given(body=BODIES, kind=st.sampled_from(KINDS), path=st.sampled_from(["/v1/predict", "/v2/models/tiny/infer"]))
@example(body=b"[" * 10_000, kind="text/x", path="/v2/models/tiny/infer")
@example(
    body=b'{"inputs": [{"name": "pixels", "datatype": "UINT8", "data": [1e400]}]}',
    kind="",
    path="/v2/models/tiny/infer",
)
def test_no_body_makes_it_fail(served, body, kind, path):
    status, _, _ = served.ask(path, body, {"Content-Type": kind})
    assert status in (200, 400, 413, 415, 422)


def received(connection):
    """Status and JSON of the answer; none where the other side has hung up."""
    try:
        status, text = rest_of(connection)
    except (ConnectionError, HTTPException):
        return None
    return status, json.loads(text)


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/model HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2_000_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_the_next_request_answered(served, sent):
    with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE) as connection:
        with suppress(ConnectionError):  # it may hang up before all of it is sent
            connection.sendall(sent)
        answer = received(connection)
    assert answer is None or (answer[0], set(answer[1]["error"])) == (400, {"value", "reason", "remedy"})
    assert served.ask("/v1/model")[0] == 200


def test_a_client_of_the_open_inference_protocol_works(served, exported):
    pytest.importorskip("gevent", reason="tritonclient[http] is not installed")
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    client = http.InferenceServerClient(f"127.0.0.1:{served.port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.get_model_metadata("tiny")["outputs"][0]["shape"] == [-1, len(NAMES)]
    files = pictures(3)
    image = http.InferInput("image", [3], "BYTES")
    image.set_data_from_numpy(np.array(files, dtype=object))
    found = client.infer("tiny", [image])
    assert [label.decode() for label in found.as_numpy("label")] == [
        one["label"] for one in answers_of(exported, files)
    ]
    pixels = http.InferInput("pixels", [2, 3, 8, 8], "UINT8")
    pixels.set_data_from_numpy(np.zeros((2, 3, 8, 8), np.uint8), binary_data=False)
    outputs = [http.InferRequestedOutput("probabilities", binary_data=False)]
    assert client.infer("tiny", [pixels], outputs=outputs).as_numpy("probabilities") == pytest.approx(1 / 3)
    wrong = http.InferInput("image", [1], "BYTES")
    wrong.set_data_from_numpy(np.array([b"no image"], dtype=object))
    with pytest.raises(Exception, match="not an image"):
        client.infer("tiny", [wrong])
    client.close()


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text("s3cret\n")
    return file


@pytest.fixture(scope="module")
def guarded(exported, token_file):
    """A service that takes two requests at once, wants a token, and waits for five seconds."""
    limits = ("--queue", 2, "--seconds", 5)
    with service(exported, *limits, "--token-file", token_file, "--allow-origin", "https://example.org") as running:
        yield running


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
        for path in HEALTH:
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


def test_who_does_not_read_a_long_answer_is_hung_up_on():
    """By the connection alone, with the time that it waits at none."""
    pytest.importorskip("bentoml", reason="the extra `serve` is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from tokenfusion.serve.connection import connection_for

    async def answered():
        ended = asyncio.Event()

        async def app(_scope, _receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": bytes(2**25), "more_body": True})
            await send({"type": "http.response.body"})  # which waits until the line has room, or is gone
            ended.set()

        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        state, loop = uvicorn.server.ServerState(), asyncio.get_running_loop()
        server = await loop.create_server(lambda: connection_for(0.05)(config, state, {}), "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.wait_for(ended.wait(), DEADLINE)
            left = len(state.connections)
        server.close()
        return left

    assert asyncio.run(answered()) == 0


def test_what_is_no_http_behind_an_answer_ends_the_connection_without_another(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert rest_of(connection)[0] == 404
        connection.sendall(b"zz\r\n")
        assert connection.recv(1) == b""


@pytest.mark.parametrize("sent", [b"", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_who_does_not_go_on_is_hung_up_on_whether_it_has_asked_before_or_not(sent):
    """By the connection alone, with the time that it waits at none."""
    pytest.importorskip("bentoml", reason="the extra `serve` is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from tokenfusion.serve.connection import connection_for

    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def received():
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        state = uvicorn.server.ServerState()
        loop, make = asyncio.get_running_loop(), connection_for(0.05)
        server = await loop.create_server(lambda: make(config, state, {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(sent)
        answered = await reader.readuntil(b"\r\n\r\n") if sent else b""
        writer.write(b"GE" if sent else b"")
        rest = await reader.read()
        writer.close()
        server.close()
        return answered[:12], rest[:12]

    assert asyncio.run(received()) == ((b"HTTP/1.1 200", b"HTTP/1.1 408") if sent else (b"", b""))


HEALTH = ("/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready")


def test_a_token_is_wanted_of_all_but_the_page_and_health(guarded):
    for headers in ({}, bearer("wrong"), {"Authorization": "Basic s3cret"}):
        for path in ("/v1/model", "/metrics", "/v2/models/tiny"):
            assert guarded.ask(path, headers=headers)[0] == 401
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


def test_a_tensor_of_empty_elements_is_refused_by_their_number_before_all_are_read(served):
    text = b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [4000]}]}'
    headers = {"Inference-Header-Content-Length": str(len(text))}
    whole, cut = bytes(4 * 4000), bytes(4 * 6) + b"\xff"
    for tensor in (whole, cut):  # the second is damaged behind the sixth, which nobody reads
        status, _, said = served.ask("/v2/models/tiny/infer", text + tensor, headers)
        assert (status, "more than 5 images" in json.loads(said)["error"]) == (413, True)
    assert served.ask("/v2/models/tiny/infer", text + bytes(4 * 5) + b"\xff", headers)[0] == 400


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
    assert "tokenfusion[serve]" in command("serve", exported)[2]
    assert os.environ.get("BENTOML_HOME") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:-40], "is not JSON"),
        (lambda text: text.replace('"classes"', '"clases"'), "lacks classes; it is damaged, export again"),
        (lambda text: text.replace('"parity"', '"parrot"'), "lacks parity; it is damaged, export again"),
        (lambda text: text.replace('"export_format": 1', '"export_format": 9'), "export format 9, newer than"),
        (lambda text: text.replace('"export_format"', '"run_format"'), "is a run, which needs torch"),
        (lambda text: text.replace('"format": "onnx"', '"format": "pt2"'), "pt2, which needs torch.*; serve its run"),
    ],
)
def test_a_damaged_export_is_named_as_such_and_not_taken_for_a_run(tmp_path, change, said, monkeypatch):
    opened = pytest.importorskip("tokenfusion.serve.served", reason="the extra `serve` is not installed").open_served
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "tokenfusion.serve.run", raising=False)
    folder = write_export(tmp_path / "export")
    whole = (folder / "model.json").read_text()
    (folder / "model.json").write_text(change(whole))
    with pytest.raises(InputError, match=said):
        opened(Settings(str(folder)))


def test_whatever_another_classifier_raises_leaves_the_one_in_use(exported, capsys, monkeypatch):
    holder = pytest.importorskip("tokenfusion.serve.holder", reason="the extra `serve` is not installed")

    def fails(_):
        raise RuntimeError("out of memory")

    async def reloaded():
        held = holder.Holder(Settings(str(exported)))
        before = held.served
        monkeypatch.setattr(holder, "open_served", fails)
        await held.reload()
        return held.served is before

    assert asyncio.run(reloaded())
    assert "the classifier before it goes on: RuntimeError: out of memory" in capsys.readouterr().err


def test_a_folder_copied_in_place_is_tried_until_it_is_whole_and_its_fault_said_once(tmp_path, capsys):
    holder = pytest.importorskip("tokenfusion.serve.holder", reason="the extra `serve` is not installed")
    folder, new = (write_export(tmp_path / name, seed) for seed, name in enumerate(("served", "new")))
    whole = (folder / "model.onnx").read_bytes()

    async def copied():
        held = holder.Holder(Settings(str(folder)))
        before = held.served
        (folder / "model.json").write_bytes((new / "model.json").read_bytes())
        pauses = []
        for number in range(9):
            held.next_try -= 100 * bool(number)  # as if its pause were over
            tried = time.monotonic()
            await held.look()
            assert held.served is before
            pauses.append(held.next_try - tried)
            failures = held.failures
            await held.look()
            assert held.failures == failures == number + 1  # nothing has changed, and the pause is not over
        (folder / "model.onnx").write_bytes((new / "model.onnx").read_bytes())
        await held.look()
        after = held.served
        (folder / "model.onnx").write_bytes(whole)  # in place, beside the same model.json
        await held.look()
        return pauses, before, after, held

    pauses, before, after, held = asyncio.run(copied())
    assert [round(pause, -1) for pause in pauses[-3:]] == [60, 60, 60]
    assert pauses[0] < pauses[2] < pauses[5]
    assert after.sha256 == json.loads((new / "model.json").read_text())["graph_sha256"] != before.sha256
    assert (held.served is after, held.failures) == (True, 1)
    assert capsys.readouterr().err.count("do not belong together") == 2


def test_who_may_ask_is_known_by_the_address_and_the_token():
    is_open = pytest.importorskip("tokenfusion.serve.launch").is_open
    hosts = ("127.0.0.1", "::1", "0.0.0.0", "::", "192.0.2.1")
    open_to_all = {host: is_open(Settings("", host=host)) for host in hosts}
    assert open_to_all == {"127.0.0.1": False, "::1": False, "0.0.0.0": True, "::": True, "192.0.2.1": True}
    assert not is_open(Settings("", host="0.0.0.0", token_file="token"))
