"""The page, in a real browser: images come in by every way, and what goes wrong is said beside the image."""

import base64
import csv
import io
import json
import os
from pathlib import Path

import pytest
import torch

from services import Restarted, answers_of, pictures, service, write_export
from tokenfusion import Classifier
from tokenfusion_runtime.output import csv_cells, csv_columns
from tokenfusion_runtime.prediction import Prediction

WAIT = 60_000
"""Milliseconds that the page may take, however busy the machine."""
HAND_OVER = """([kind, files]) => {
    const held = new DataTransfer();
    for (const [name, type, data] of files) {
        held.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type }));
    }
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: held, bubbles: true, cancelable: true })
        : new DragEvent(kind, { dataTransfer: held, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
}"""
SCREENSHOTS = os.environ.get("TOKENFUSION_SCREENSHOTS")
"""Folder to keep pictures of the page in, for a person to look at."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("served") / "export")


@pytest.fixture(scope="module")
def shared_service(exported):
    starting = Restarted(exported, "--max-bytes", 50_000)
    yield starting
    starting.end()


@pytest.fixture
def served(shared_service):
    return shared_service()


@pytest.fixture
def page(browser, served):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(WAIT)
    opened, said = context.new_page(), []
    opened.on("pageerror", lambda error: said.append(str(error)))
    asked = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(f"http://127.0.0.1:{served.port}/")
    yield opened
    assert said == []
    here = ("http://127.0.0.1:", "blob:", "data:")
    assert [url for url in asked if not url.startswith(here)] == []  # nothing is fetched from elsewhere
    context.close()


def hand_over(page, kind, files):
    encoded = [(name, "image/png", base64.b64encode(data).decode()) for name, data in files]
    page.evaluate(HAND_OVER, [kind, encoded])


def done(page, text):
    page.get_by_text(text).wait_for()
    return page.locator(".card")


def keep(page, name):
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


@pytest.fixture
def uncalibrated(exported, served):
    """The same classifier without what its scores were calibrated by."""
    file = exported / "model.json"
    whole = file.read_text()
    for text, held in ((json.dumps(json.loads(whole) | {"surest_errors": []}), None), (whole, 200)):
        file.write_text(text)
        served.wait_until(lambda held=held: held_out(served) == held)
        if held is None:
            yield


def held_out(served):
    return json.loads(served.ask("/v1/model")[2])["calibration"]["held_out_images"]


@pytest.mark.usefixtures("uncalibrated")
def test_scores_that_nothing_calibrated_are_not_called_calibrated(page):
    page.reload()
    page.get_by_text("red, green, blue; scores are not calibrated.").wait_for()
    page.locator("#files").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": pictures(1)[0]})
    card = done(page, "1 of 1 images done")
    assert "which says little of how often such answers are right" in card.inner_text()


def test_images_are_dropped_pasted_and_chosen_and_each_shows_its_answer(page, exported):
    files = pictures(3)
    page.get_by_text("tiny knows 3 classes: red, green, blue; scores are calibrated on 200 images").wait_for()
    hand_over(page, "drop", [("dropped.png", files[0])])
    hand_over(page, "paste", [("pasted.png", files[1])])
    page.locator("#files").set_input_files({"name": "chosen.png", "mimeType": "image/png", "buffer": files[2]})
    cards = done(page, "3 of 3 images done")
    for number, expected in enumerate(answers_of(exported, files)):
        card = cards.nth(number)
        assert card.locator(".named").inner_text() == expected["label"]
        rows = [tuple(row.split("\n")) for row in card.locator(".rows li").all_inner_texts()]
        assert rows == [(one["label"], f"{100 * one['score']:.1f}\N{NO-BREAK SPACE}%") for one in expected["topk"]]
        assert card.locator(".mistaken").count() == (expected["label"] == "red")
        assert card.locator("img.thumbnail").evaluate("image => image.naturalWidth") > 0
    assert page.locator("#camera").get_attribute("capture") == "environment"


def test_a_bad_and_a_huge_file_are_refused_beside_themselves_and_the_others_answered(page):
    files = [("bad.png", b"no image"), ("huge.png", bytes(60_000)), ("good.png", pictures(1)[0])]
    hand_over(page, "drop", files)
    cards = done(page, "3 of 3 images done, of which 2 could not be judged")
    assert "not an image" in cards.nth(0).get_by_role("alert").inner_text()
    assert "59 KB are more than the 49 KB" in cards.nth(1).get_by_role("alert").inner_text()
    assert cards.nth(2).locator(".named").count() == 1
    assert cards.get_by_role("button").count() == 0  # the same files would fare alike
    assert cards.nth(0).get_by_text("no picture").is_visible()
    keep(page, "errors")


def test_none_of_these_is_said_where_a_largest_share_of_wrong_answers_is_chosen(page):
    page.get_by_text("tiny knows").wait_for()
    offered = page.locator("#abstain option").evaluate_all("all => all.map((one) => [one.textContent, one.disabled])")
    assert offered[1:3] == [["1 % (cannot be promised)", True], ["2 %", False]]
    page.locator("#abstain").select_option("0.02")
    hand_over(page, "drop", [("a.png", pictures(1)[0])])
    assert done(page, "1 of 1 images done").locator(".named").inner_text() == "none of these"


def test_many_images_are_all_answered_and_downloaded_as_predict_prints_them(page, exported):
    files = pictures(40)
    hand_over(page, "drop", [(f'{number},"x".png', data) for number, data in enumerate(files)] + [("bad", b"no")])
    done(page, "41 of 41 images done, of which 1 could not be judged")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text())))
    assert rows[0] == ["path", "label", "score", "label_2", "score_2", "label_3", "score_3", "error"]
    for row, (number, expected) in zip(rows[1:], enumerate(answers_of(exported, files)), strict=False):
        assert row[:2] == [f'{number},"x".png', expected["label"]]
        assert float(row[2]) == pytest.approx(expected["score"], abs=2e-6)
    assert "not an image" in rows[-1][-1]
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".card").count() == 0


def test_several_labels_are_downloaded_as_predict_prints_them(page, served):
    about = json.loads(served.ask("/v1/model")[2]) | {"multi_label": True}
    shares = (("red", 0.8), ("blue", 0.6), ("green", 0.1))
    found = Prediction("a.png", topk=shares, labels=shares[:2])
    page.route("**/v1/model", lambda route: route.fulfill(json=about))
    page.route("**/v1/predict*", lambda route: route.fulfill(json=found.to_dict()))
    page.reload()
    page.get_by_text("tiny knows").wait_for()
    hand_over(page, "drop", [("a.png", pictures(1)[0])])
    assert done(page, "1 of 1 images done").locator(".named").inner_text() == "red, blue"
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    heading, row = csv.reader(io.StringIO(Path(download.value.path()).read_text()))
    assert heading == ["path", *csv_columns(3, multi_label=True), "error"]
    assert row == ["a.png", *map(str, csv_cells(found)), ""]


def test_a_token_that_is_wanted_is_asked_for_and_sent_from_then_on(page, exported):
    def wants_a_token(route):
        if route.request.headers.get("authorization") == "Bearer s3cret":
            route.continue_()
        else:
            error = {"value": "Authorization", "reason": "not the token of this service", "remedy": "send it"}
            route.fulfill(status=401, json={"error": error})

    image = pictures(1)[0]
    page.route("**/v1/*", wants_a_token)
    page.reload()
    hand_over(page, "drop", [("a.png", image)])
    assert "not the token" in done(page, "1 of 1 images done, of which 1 could not").get_by_role("alert").inner_text()
    page.get_by_label("This service wants a token").fill("s3cret")
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("tiny knows").wait_for()
    label = done(page, "1 of 1 images done").locator(".named")
    label.wait_for()
    assert label.inner_text() == answers_of(exported, [image])[0]["label"]
    assert not page.get_by_label("This service wants a token").is_visible()


@pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1280, "light")])
def test_it_fits_a_phone_and_a_desk_in_dark_and_light(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    name = "an_image_with_a_name_that_is_much_longer_than_a_telephone_is_wide_and_has_no_blank_in_it.png"
    hand_over(page, "drop", [(name, pictures(1)[0]), *((f"{i}.jpg", one) for i, one in enumerate(pictures(3)))])
    hand_over(page, "drop", [("bad.png", b"no image")])
    done(page, "5 of 5 images done")
    about = "fuse(tf_efficientnet_lite0,vit_small_patch14_dinov2,probe)"  # the model's name in most runs
    page.evaluate("name => { document.querySelector('#about').textContent = name }", about)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (brightness(ink) > brightness(paper)) == (scheme == "dark")
    keep(page, f"{width}-{scheme}")


def brightness(colour):
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))


def test_it_is_used_by_keyboard_and_told_to_a_screen_reader(page):
    page.get_by_text("tiny knows").wait_for()
    focused = []
    for _ in range(4):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert focused == ["files", "camera", "abstain", "For programs"]
    hand_over(page, "drop", [("a.png", pictures(1)[0])])
    done(page, "1 of 1 images done")
    assert page.get_by_role("status").inner_text() == "1 of 1 images done"
    for name in ("Download CSV", "Clear"):
        assert page.get_by_role("button", name=name).is_visible()
    assert page.get_by_role("heading", name="a.png").is_visible()


def test_an_answer_that_was_lost_with_its_worker_is_asked_for_again(page):
    page.route("**/v1/predict*", lambda route: route.abort("connectionreset"), times=2)
    hand_over(page, "drop", [("a.png", pictures(1)[0])])
    assert done(page, "1 of 1 images done").locator(".named").count() == 1


@pytest.fixture
def put(exported, served):
    """Puts other files in the place of those that are served, and waits until the service answers by them."""
    before = {name: (exported / name).read_bytes() for name in ("model.onnx", "model.json")}

    def put(files):
        for name, content in files.items():
            (exported / name).write_bytes(content)
        wanted = json.loads(files["model.json"])["classes"]
        served.wait_until(lambda: json.loads(served.ask("/v1/model")[2])["classes"] == wanted)

    yield put
    put(before)


def test_an_open_page_says_of_another_classifier_what_that_one_is(page, put, tmp_path):
    hand_over(page, "drop", [("a.png", pictures(1)[0])])
    assert "images like the 200" in done(page, "1 of 1 images done").inner_text()
    other = write_export(tmp_path / "other", seed=1)
    description = json.loads((other / "model.json").read_text())
    description |= {"classes": ["uno", "dos", "tres"], "surest_errors": []}
    put({"model.onnx": (other / "model.onnx").read_bytes(), "model.json": json.dumps(description).encode()})
    hand_over(page, "drop", [("b.png", pictures(1)[0])])
    card = done(page, "2 of 2 images done").nth(1)
    assert card.locator(".named").inner_text() in description["classes"]
    assert "which says little" in card.inner_text()
    assert "uno, dos, tres; scores are not calibrated" in page.locator("#about").inner_text()


def test_answers_of_another_classifier_are_kept_and_downloaded_beside_those_of_this_one(page, served):
    about = json.loads(served.ask("/v1/model")[2]) | {"sha256": "another", "classes": list("abcd"), "multi_label": True}
    about["calibration"] |= {"held_out_images": None}
    shares = tuple(zip("abcd", (0.8, 0.6, 0.1, 0.1), strict=True))
    found = Prediction("a.png", topk=shares, labels=shares[:2]).to_dict()
    page.route("**/v1/model", lambda route: route.fulfill(json=about))
    page.route("**/v1/predict*", lambda route: route.fulfill(json=found, headers={"X-Model-SHA256": "another"}))
    page.reload()
    page.get_by_text("tiny knows 4 classes").wait_for()
    assert not page.locator("#abstain").is_visible()
    hand_over(page, "drop", [("a.png", pictures(1)[0])])
    before = done(page, "1 of 1 images done").inner_text()
    page.unroute_all()
    hand_over(page, "drop", [("b.png", pictures(1)[0])])
    cards = done(page, "2 of 2 images done")
    assert cards.nth(0).inner_text() == before
    page.get_by_text("tiny knows 3 classes").wait_for()
    assert page.locator("#abstain").is_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    heading, first, second = csv.reader(io.StringIO(Path(download.value.path()).read_text()))
    assert heading == ["path", *csv_columns(4, multi_label=True), "error"]
    assert first[:3] == ["a.png", "a|b", "0.800000|0.600000"]
    assert second[:2] == ["b.png", cards.nth(1).locator(".named").inner_text()]
    assert second[1:3] == second[3:5]
    assert len(first) == len(second) == len(heading)


def test_the_service_going_away_is_said_and_trying_again_works(page, served, shared_service):
    page.get_by_text("tiny knows").wait_for()
    served.stop()
    hand_over(page, "drop", [("a.png", pictures(1)[0])])
    card = done(page, "1 of 1 images done, of which 1 could not be judged")
    assert "cannot be reached" in card.get_by_role("alert").inner_text()
    keep(page, "gone")
    shared_service()
    card.get_by_role("button", name="Try a.png again").click()
    card.locator(".named").wait_for()
    assert page.evaluate("document.activeElement.className") == "card"  # not lost with its button
    assert page.get_by_role("status").inner_text() == "1 of 1 images done"


def test_where_each_branch_of_a_run_looked_is_shown_beside_the_image(browser, tmp_path):
    torch.manual_seed(0)
    classifier = Classifier.create("tokenfusion_early_micro", ["cat", "dog", "owl"], img_size=(32, 32))
    classifier.save(tmp_path)
    with service(tmp_path) as running, browser.new_context(viewport={"width": 320, "height": 900}) as context:
        context.set_default_timeout(WAIT)
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{running.port}/")
        page.locator("#files").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": pictures(1)[0]})
        page.get_by_role("button", name="Where did it look in a.png?").click()
        looked = page.get_by_role("img", name="Where it looked, from left to right: cnn, transformer")
        looked.wait_for()
        sides = "image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])"
        width, height = looked.evaluate(sides)
        assert page.evaluate("document.activeElement.className") == "card"
        assert width == 2 * height > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        keep(page, "maps")

        def by_another(route):
            answer = route.fetch()
            route.fulfill(response=answer, headers=answer.headers | {"x-model-sha256": "another"})

        page.route("**/v1/explain", by_another)
        page.locator("#files").set_input_files({"name": "b.png", "mimeType": "image/png", "buffer": pictures(1)[0]})
        page.get_by_role("button", name="Where did it look in b.png?").click()
        page.get_by_text("has loaded another classifier since").wait_for()
        assert page.locator(".map").count() == 1


def test_the_description_for_programs_is_drawn_and_asks_with_a_form_of_files(page, served, exported):
    image = pictures(1)[0]
    page.goto(f"http://127.0.0.1:{served.port}/docs")
    predict = page.locator(".opblock").first
    predict.locator(".opblock-summary-control").click()
    predict.get_by_role("button", name="Try it out").click()
    predict.get_by_label("Request content type").select_option("multipart/form-data")
    predict.get_by_role("button", name="Add").click()
    predict.locator("input[type=file]").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": image})
    with page.expect_response("**/v1/predict*") as answer:
        predict.get_by_role("button", name="Execute").click()
    (expected,) = answers_of(exported, [image])
    assert answer.value.json() == [expected | {"path": "a.png"}]
