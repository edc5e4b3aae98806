"""Linear classifiers on what two parents see: chosen on images that were set aside, and mixed."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tokenfusion import InputError
from tokenfusion.probe import POOLED, TOKENS, choosing_folds, fit_linear, fit_probe, joined, softmax, turned

RNG = np.random.default_rng(0)


def blobs(count, classes, features):
    """Classes around centres of their own, in two blocks."""
    labels = np.arange(count) % classes
    centres = np.random.default_rng(1).normal(size=(classes, features))
    values = centres[labels] + RNG.normal(scale=1.5, size=(count, features))
    return {"cnn": values[:, : features // 2], "vit": values[:, features // 2 :]}, labels


def test_the_mixture_is_one_linear_classifier_and_no_worse_than_its_parts():
    blocks, labels = blobs(300, 4, 30)
    unseen, truth = blobs(1000, 4, 30)
    probe = fit_probe(blocks, POOLED, labels, print)
    judged = probe.judge(unseen, truth)
    parts = [joined(unseen, POOLED[name]) @ part.weight.T + part.bias for name, part in probe.parts.items()]
    mixed = sum(weight * logits for weight, logits in zip(probe.weights.values(), parts, strict=True))
    assert judged["mixture"] == pytest.approx((mixed.argmax(1) == truth).mean())
    assert judged["mixture"] >= max(judged["cnn"], judged["vit"])


def test_fewer_images_than_features_give_the_classifier_that_all_features_give():
    blocks, labels = blobs(40, 4, 200)
    values = joined(blocks, ("cnn", "vit"))
    values[7] = values[3]  # images may depend on each other
    coordinates, to_weight = turned(values)
    assert coordinates.shape == (40, 40)
    np.testing.assert_allclose(coordinates @ coordinates.T, values @ values.T, rtol=1e-5, atol=1e-3)
    weight = np.random.default_rng(0).normal(size=(4, 40)) @ coordinates
    np.testing.assert_allclose(values @ to_weight(weight).T, coordinates @ weight.T, rtol=1e-5, atol=1e-3)
    part = fit_linear(values, labels, [])
    direct = LogisticRegression(C=part.c, max_iter=2000, tol=1e-8).fit(values, labels)
    np.testing.assert_allclose(values @ part.weight.T + part.bias, direct.decision_function(values), atol=0.02)


@pytest.mark.parametrize("kind", ["few factors", "frames of scenes"])
def test_images_that_depend_on_each_other_are_fitted_too(kind):
    random = np.random.default_rng(0)
    labels = np.arange(300) % 3
    if kind == "few factors":
        values = random.normal(size=(300, 5)) @ random.normal(size=(5, 1500))
    else:
        values = random.normal(size=(30, 1500))[np.arange(300) % 30] + 1e-3 * random.normal(size=(300, 1500))
    values = values.astype(np.float32)
    part = fit_linear(values, labels, choosing_folds(labels, print, np.arange(300)))
    direct = LogisticRegression(C=part.c, max_iter=2000).fit(values, labels)
    agree = (values @ part.weight.T + part.bias).argmax(1) == direct.predict(values)
    assert agree.mean() > 0.95


@pytest.mark.parametrize(
    ("rarest", "said"),
    [
        (3, "3 training images: the strength of the linear classifiers' penalty is cross-validated in 3 parts, not 5"),
        (1, "is not chosen (C is 0.01)"),
    ],
)
def test_folds_adapt_to_a_class_of_few_images_and_say_so(rarest, said):
    blocks, labels = blobs(60, 3, 10)
    kept = np.sort(np.concatenate([np.flatnonzero(labels != 2), np.flatnonzero(labels == 2)[:rarest]]))
    told = []
    probe = fit_probe({name: block[kept] for name, block in blocks.items()}, POOLED, labels[kept], told.append)
    assert said in told[0]
    assert np.isfinite(probe.bias).all()


def test_two_classes_have_two_logits():
    blocks, labels = blobs(60, 2, 10)
    probe = fit_probe(blocks, POOLED, labels, print)
    assert probe.weight["cnn"].shape == (2, 5)
    assert probe.judge(blocks, labels)["mixture"] > 0.8


def test_one_class_is_refused():
    blocks, labels = blobs(10, 2, 10)
    with pytest.raises(InputError, match="all training images are of one class"):
        fit_probe(blocks, POOLED, labels * 0, print)


def test_the_mean_of_parents_with_their_own_tokens_is_judged_beside_that_of_the_parents_alone():
    blocks, labels = blobs(120, 3, 20)
    blocks |= {f"{name}_tokens": np.repeat(block, 2, axis=1) for name, block in list(blocks.items())}
    assert "mean_tokens" not in fit_probe(blocks, POOLED, labels, print).judge(blocks, labels)
    probe = fit_probe(blocks, POOLED | TOKENS, labels, print)
    parts = [
        softmax((joined(blocks, TOKENS[name]) @ part.weight.T + part.bias) / probe.temperatures[name])
        for name in TOKENS
        for part in [probe.parts[name]]
    ]
    named = (parts[0] + parts[1]).argmax(1)
    assert np.array_equal(probe.name_classes(blocks)["mean_tokens"], named)


def test_views_of_an_image_lie_in_one_fold():
    labels, images = np.tile(np.arange(30) % 3, 4), np.tile(np.arange(30), 4)
    folds = choosing_folds(labels, print, images)
    assert len(folds) == 5
    for fitted, held in folds:
        assert not set(images[fitted]) & set(images[held])
        assert len(held) == 24
