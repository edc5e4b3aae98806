"""The Open Inference Protocol: what its clients send, and its errors."""

import json

import numpy as np
import pytest

from services import NAMES, answers_of, pictures


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


def test_half_a_character_in_a_request_leaves_the_answer_whole(served):
    half = "\ud800"
    found = infer(served, [{"name": "label"}], id=half)
    assert (found[0], json.loads(found[2])["id"]) == (200, half)
    status, _, text = infer(served, [{"name": half}])
    assert (status, half in json.loads(text)["error"]) == (400, True)
    head = b'--b\r\nContent-Disposition: form-data; name="a"; filename="+2AA-"\r\n\r\n'
    form = head + pictures(1)[0] + b"\r\n--b--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=b; charset=utf-7"}
    assert served.ask("/v1/predict", form, kind)[0] < 500


def test_pixels_of_another_shape_than_their_data_is_asked_for_are_refused(served):
    def asked(shape):
        pixels = {"name": "pixels", "datatype": "UINT8", "shape": shape, "data": [128] * 3 * 8 * 8}
        return served.ask("/v2/models/tiny/infer", json.dumps({"inputs": [pixels]}).encode())

    assert asked([1, 3, 8, 8])[0] == 200
    for shape in ([1, 8, 8, 3], [192], "3"):
        status, _, text = asked(shape)
        assert (status, "of shape [1, 3, 8, 8]" in json.loads(text)["error"]) == (400, True)


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


def test_a_tensor_of_empty_elements_is_refused_by_their_number_before_all_are_read(served):
    text = b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [4000]}]}'
    headers = {"Inference-Header-Content-Length": str(len(text))}
    whole, cut = bytes(4 * 4000), bytes(4 * 6) + b"\xff"
    for tensor in (whole, cut):  # the second is damaged behind the sixth, which nobody reads
        status, _, said = served.ask("/v2/models/tiny/infer", text + tensor, headers)
        assert (status, "more than 5 images" in json.loads(said)["error"]) == (413, True)
    assert served.ask("/v2/models/tiny/infer", text + bytes(4 * 5) + b"\xff", headers)[0] == 400


def test_json_that_would_hold_up_everybody_is_refused_by_its_size_and_a_tensor_behind_it_is_not():
    protocol = pytest.importorskip("tokenfusion.serve.protocol", reason="the extra `serve` is not installed")
    most = protocol.MOST_JSON
    longest, tensor = b"{}".ljust(most), bytes(2 * most)
    assert protocol.split_body(longest, None)[0] == {}
    assert protocol.split_body(b"{}" + tensor, "2")[1] == tensor
    for body, header in ((longest + b" ", None), (longest + b" " + tensor, f"{most + 1}")):
        with pytest.raises(protocol.Refused, match=r"1,048,577 bytes of JSON: .* as binary data") as refused:
            protocol.split_body(body, header)
        assert refused.value.status == 413
