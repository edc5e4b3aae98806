"""A run is served by torch: as `predict` answers, and with pictures of where it looked."""

import asyncio
import hashlib
import json

import pytest
import torch

from services import pictures
from tokenfusion import Classifier
from tokenfusion.analyze.explain import Question, draw_batch
from tokenfusion.report.pictures import png_of

pytest.importorskip("bentoml", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the extra `serve` is not installed")
REGISTRY = pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed").REGISTRY

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was not trained, with an evaluation by which dogs are often called cats."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("served") / "run"
    folder.mkdir()
    Classifier.create("tokenfusion_early_micro", CLASSES, img_size=(32, 32), precision="fp32").save(folder)
    confusion = [[8, 0, 1], [2, 5, 0], [0, 0, 9]]
    (folder / "evaluation.json").write_text(json.dumps({"own": True, "confusion": confusion}))
    return folder


def ask(folder, *requests):
    """Answers of the service's addresses, in this process."""
    from tokenfusion.serve.holder import Holder
    from tokenfusion.serve.service import Addresses
    from tokenfusion.serve.settings import Settings

    async def asked():
        settings = Settings(str(folder))
        app = Addresses(Holder(settings), settings).app()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return [await client.request(*request[:2], content=request[2]) for request in requests]

    return asyncio.run(asked())


def test_a_run_answers_as_predict_does(run):
    files = pictures(3)
    answers = ask(run, *(("POST", "/v1/predict?topk=2", file) for file in files))
    classifier = Classifier.load(run)
    expected = [classifier.predict(file, topk=2)[0].to_dict() for file in files]
    assert [answer.json() for answer in answers] == expected


def test_it_says_what_its_answers_are_often_wrong_about(run):
    about = ask(run, ("GET", "/v1/model", None))[0].json()
    assert about["mistaken"] == {"cat": {"dog": 0.2}}  # one owl in ten cats is too few to tell
    assert (about["format"], about["explains"], about["classes"]) == ("run", True, CLASSES)


def test_where_it_looked_is_the_picture_of_explain(run):
    image = pictures(1)[0]
    before = REGISTRY.get_sample_value("tokenfusion_stage_seconds_count", {"stage": "explain"}) or 0
    both, cnn, bad, none = ask(
        run,
        ("POST", "/v1/explain", image),
        ("POST", "/v1/explain?branch=cnn", image),
        ("POST", "/v1/explain", b"no image"),
        ("POST", "/v1/explain?branch=fish", image),
    )
    classifier = Classifier.load(run)
    ((_, _, overlays),) = draw_batch(classifier, [(classifier.prepare(image)[1], "")], Question())
    assert both.headers["x-branches"] == ", ".join(branch for branch, *_ in overlays) == "cnn, transformer"
    assert both.content == png_of(torch.cat([picture for *_, picture in overlays], 2))
    assert cnn.content == png_of(overlays[0][-1])
    files = b"".join((run / name).read_bytes() for name in ("model.safetensors", "model.json"))
    assert both.headers["x-model-sha256"] == hashlib.sha256(files).hexdigest()
    assert REGISTRY.get_sample_value("tokenfusion_stage_seconds_count", {"stage": "explain"}) - before == 2
    assert (bad.status_code, none.status_code) == (422, 400)


def test_a_branch_that_the_model_has_not_is_refused_by_its_own_reason(tmp_path):
    torch.manual_seed(0)
    Classifier.create("resnet_micro", CLASSES, img_size=(32, 32), precision="fp32").save(tmp_path)
    (answer,) = ask(tmp_path, ("POST", "/v1/explain?branch=transformer", pictures(1)[0]))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["value"] == "branch=transformer"
    assert "has no transformer" in error["reason"]
    assert error["remedy"] == "take branch=both"


def test_a_picture_whose_client_has_gone_before_its_turn_is_not_drawn(run):
    from tokenfusion.serve.holder import Holder
    from tokenfusion.serve.service import Addresses
    from tokenfusion.serve.settings import Settings

    def drawn():
        return REGISTRY.get_sample_value("tokenfusion_stage_seconds_count", {"stage": "explain"}) or 0

    async def asked(*after):
        settings = Settings(str(run))
        holder, statuses = Holder(settings), []
        messages = [{"type": "http.request", "body": pictures(1)[0]}, *after]

        async def receive():
            return messages.pop(0) if messages else await asyncio.Event().wait()

        async def send(message):
            statuses.append(message.get("status"))

        scope = {"type": "http", "method": "POST", "path": "/v1/explain", "headers": [], "query_string": b""}
        before = drawn()
        await Addresses(holder, settings).app()(scope, receive, send)
        holder.served.close()
        return statuses[0], drawn() - before

    assert asyncio.run(asked()) == (200, 1)
    assert asyncio.run(asked({"type": "http.disconnect"})) == (400, 0)


def test_the_open_inference_protocol_gives_one_label_an_image_of_models_of_one_class_alone(run, tmp_path):
    several = tmp_path / "run"
    several.mkdir()
    Classifier.create("tokenfusion_early_micro", CLASSES, img_size=(32, 32), multi_label=True).save(several)
    pixels = {"name": "pixels", "datatype": "UINT8", "data": [0] * 3 * 32 * 32}
    for folder, outputs in ((run, ["probabilities", "label"]), (several, ["probabilities"])):
        model = "/v2/models/tokenfusion_early_micro"
        about, found, asked = ask(
            folder,
            ("GET", model, None),
            ("POST", f"{model}/infer", json.dumps({"inputs": [pixels]})),
            ("POST", f"{model}/infer", json.dumps({"inputs": [pixels], "outputs": [{"name": "label"}]})),
        )
        assert [output["name"] for output in about.json()["outputs"]] == outputs
        assert [output["name"] for output in found.json()["outputs"]] == outputs
        assert asked.status_code == (200 if "label" in outputs else 400)


def test_a_run_of_several_labels_is_answered_and_says_why_it_is_not_explained(tmp_path):
    (tmp_path / "run").mkdir()
    classifier = Classifier.create("tokenfusion_early_micro", CLASSES, img_size=(32, 32), multi_label=True)
    classifier.save(tmp_path / "run")
    image = pictures(1)[0]
    answer, refused = ask(tmp_path / "run", ("POST", "/v1/predict", image), ("POST", "/v1/explain", image))
    assert {"labels", "topk"} <= set(answer.json())
    assert refused.status_code == 501
    assert "any number of classes" in refused.json()["error"]["reason"]
