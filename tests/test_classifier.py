"""Classifier: the same image gives the same prediction however it is given, and weights travel with class names."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import tokenfusion
from tokenfusion import Classifier, InputError
from tokenfusion.data.decode import THREADS
from tokenfusion.recipe import load_recipe


@pytest.fixture(scope="module")
def classifier(trained):
    return Classifier.load(trained)


def picture(height=13, width=9, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_paths_arrays_and_pil_images_give_the_same_prediction(classifier, tmp_path):
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    kinds = [tmp_path / "a.png", str(tmp_path / "a.png"), pixels, Image.fromarray(pixels)]
    one, two, three, four = (classifier.predict([kind])[0] for kind in kinds)  # rows of a batch may round otherwise
    assert one.path == str(tmp_path / "a.png")
    assert three.path == ""
    assert one.topk == two.topk == three.topk == four.topk


def test_a_single_image_needs_no_list(classifier):
    (prediction,) = classifier.predict(picture())
    assert prediction.label in classifier.classes


def test_scores_are_the_calibrated_softmax_of_the_model(classifier):
    pixels = picture(8, 8)
    (prediction,) = classifier.predict(pixels, topk=99)
    batch = classifier.preprocess.resize(torch.from_numpy(pixels).permute(2, 0, 1))[None]
    expected = (classifier.logits(batch) / classifier.temperature).softmax(1)[0]
    assert [label for label, _ in prediction.topk] == [classifier.classes[i] for i in expected.argsort(descending=True)]
    assert prediction.score == pytest.approx(expected.max().item())
    assert sum(score for _, score in prediction.topk) == pytest.approx(1, abs=1e-5)


def test_gray_arrays_and_alpha_are_read_as_seen(classifier):
    gray = picture()[..., 0]
    assert classifier.predict(gray)[0].topk == classifier.predict(np.stack([gray] * 3, -1))[0].topk
    assert classifier.predict(gray[..., None])[0].topk == classifier.predict(gray)[0].topk
    transparent = np.dstack([picture(), np.zeros((13, 9), np.uint8)])
    assert classifier.predict(transparent)[0].topk == classifier.predict(np.full((13, 9, 3), 255, np.uint8))[0].topk


def test_an_unreadable_file_does_not_stop_the_others(classifier, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    good, bad, also_good = classifier.predict([picture(), tmp_path / "bad.jpg", picture(seed=1)], batch_size=2)
    assert not good.error
    assert not also_good.error
    assert bad.error
    assert (bad.label, bad.score) == ("", None)
    assert bad.to_dict() == {"path": str(tmp_path / "bad.jpg"), "error": bad.error}


def test_predictions_do_not_depend_on_the_batch(classifier):
    several = [picture(seed=seed) for seed in range(5)]
    together = classifier.predict(several, batch_size=5)
    alone = [classifier.predict(image)[0] for image in several]
    for one, other in zip(together, alone, strict=True):
        assert one.label == other.label
        assert one.score == pytest.approx(other.score, rel=0.05)  # bfloat16 products


def test_files_are_decoded_ahead_in_order(classifier, tmp_path):
    paths = []
    for i, side in enumerate((900, 8, 8, 700, 8, 8, 8, 500, 8, 8, 8, 8)):  # the large ones take longest
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(picture(side, side, seed=i)).save(paths[-1])
    paths[4].write_bytes(b"no image")
    paths[9].unlink()
    found = classifier.predict(paths, batch_size=5)
    assert [prediction.path for prediction in found] == [str(path) for path in paths]
    assert [i for i, prediction in enumerate(found) if prediction.error] == [4, 9]
    for path, prediction in zip(paths, found, strict=True):
        assert prediction.label == classifier.predict(path)[0].label


def test_an_input_without_end_is_read_no_further_than_needed(classifier, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    taken = 0

    def paths():
        nonlocal taken
        while True:
            taken += 1
            yield tmp_path / "a.png"

    predictions = classifier.iter_predictions(paths(), batch_size=3)
    for row in range(1, 8):
        assert next(predictions).label
        begun = 3 * math.ceil(row / 3)  # the batches up to this one
        assert taken <= begun + 2 * THREADS + 1  # all images that are anywhere in memory


def test_an_array_may_be_overwritten_once_it_was_taken(classifier):
    frames = [picture(seed=seed) for seed in range(4)]
    buffer = np.empty_like(frames[0])

    def camera():
        for frame in frames:
            buffer[:] = frame
            yield buffer

    found = classifier.iter_predictions(camera(), batch_size=4)
    assert [one.topk for one in found] == [one.topk for one in classifier.predict(frames, batch_size=4)]


def test_huge_images_are_refused_by_the_limit(classifier, tmp_path):
    Image.fromarray(picture(20, 30)).save(tmp_path / "large.png")
    (prediction,) = replace(classifier, max_pixels=599).predict(tmp_path / "large.png")
    assert "600 pixels, more than max_pixels=599" in prediction.error


def test_the_limit_of_a_run_travels_with_it(trained, classifier):
    assert classifier.max_pixels == load_recipe(trained / "recipe.toml")["max_pixels"]


def test_no_class_and_no_image_are_no_prediction(classifier):
    with pytest.raises(InputError, match=r"topk=0 names no class.*give 1 or more"):
        classifier.iter_predictions([picture()], topk=0)
    for size in (0, -3):
        with pytest.raises(InputError, match=rf"batch_size={size} lets no image.*give 1 or more"):
            classifier.iter_predictions([picture()], batch_size=size)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("topk", "3", "topk='3' is no whole number"),
        ("topk", 2.5, r"topk=2\.5 is no whole number"),
        ("batch_size", 1.5, r"batch_size=1\.5 is no whole number"),
        ("batch_size", True, "batch_size=True is no whole number"),
        ("abstain", "x", "abstain='x' is no share"),
    ],
)
def test_options_of_the_wrong_kind_are_refused_in_words(classifier, option, value, said):
    with pytest.raises(InputError, match=said):
        classifier.predict([picture()], **{option: value})


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)])
def test_arrays_that_are_no_image_are_refused(classifier, image):
    with pytest.raises(InputError, match=r"is not an image; give uint8"):
        classifier.predict(image)


def test_classes_travel_with_the_model(classifier):
    assert classifier.classes == tuple("0123456789")
    assert classifier.preprocess.img_size == (8, 8)


def test_grayscale_models(tmp_path):
    classifier = Classifier.create("tokenfusion_late_micro", ["a", "b"], in_chans=1, img_size=(16, 24))
    classifier.save(tmp_path)
    loaded = Classifier.load(tmp_path)
    assert loaded.preprocess.in_chans == 1
    assert loaded.predict(picture())[0].topk == classifier.predict(picture())[0].topk


def test_the_public_names():
    for name in tokenfusion.__all__:
        assert getattr(tokenfusion, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = tokenfusion.nothing


def test_torch_files_are_not_opened(tmp_path, trained):
    import shutil

    run = shutil.copytree(trained, tmp_path / "run")
    buffer = io.BytesIO()
    torch.save(Classifier.load(run).model.state_dict(), buffer)
    (run / "model.safetensors").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="pickled weights are refused"):
        Classifier.load(run)
