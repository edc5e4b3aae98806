"""A pretrained model sees what timm shows it, on real JPEGs and with real weights."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from tokenfusion import Classifier

IMAGES = 80


@pytest.fixture(scope="module")
def jpegs(shared):
    """Some of Imagenette's held-out images, from all over the tar."""
    with tarfile.open(shared / "data" / "imagenette-224.tar") as tar:
        members = [member for member in tar if "/val/" in f"/{member.name}" and member.isfile()]
        return [tar.extractfile(member).read() for member in members[:: len(members) // IMAGES][:IMAGES]]


def test_inputs_and_predictions_are_those_of_timm(shared, jpegs, tmp_path):
    weights = shared / "weights" / "tf_efficientnet_lite0.safetensors"
    if not weights.exists():
        pytest.skip(f"no {weights}")
    classes = [str(number) for number in range(1000)]
    classifier = Classifier.create(
        "tf_efficientnet_lite0", classes, pretrained=weights, crop_pct=None, precision="fp32"
    )
    model = classifier.model.eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    ours, theirs = [], []
    for number, jpeg in enumerate(jpegs):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(jpeg)
        ours.append(classifier.prepare(path)[1])
        theirs.append(transform(Image.open(io.BytesIO(jpeg)).convert("RGB")))
    pixels, expected = torch.stack(ours), torch.stack(theirs)
    levels = (classifier.preprocess.normalize(pixels) - expected).abs() * 0.5 * 255  # 0.5: the deviation
    assert levels.max() < 1.01
    with torch.inference_mode():
        own = np.concatenate([classifier.logits(part).argmax(1) for part in pixels.split(25)])
        other = np.concatenate([model(part).argmax(1) for part in expected.split(25)])
    assert (own == other).all()
