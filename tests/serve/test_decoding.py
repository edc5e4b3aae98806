"""Image files of a request are decoded a few at a time, of one classifier, and for nobody who has gone."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from services import write_export
from tokenfusion.serve.refusal import Refused
from tokenfusion.serve.served import Served, open_served
from tokenfusion.serve.settings import Settings

GREY = np.zeros((3, 8, 8), np.uint8)


class Decoder:
    """A model that decodes when it is told to, and counts."""

    classes = ("a",)

    def __init__(self) -> None:
        self.go, self.started, self.begun = threading.Semaphore(0), threading.Event(), list[bytes]()

    def prepare(self, image):
        self.begun.append(image)
        if image == b"large":
            self.started.set()
            assert self.go.acquire(timeout=60)
        return "", GREY

    def probabilities(self, _images):
        raise AssertionError("nothing is asked of it here")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setattr(Settings, "threads", 2)


def served_by(model):
    return Served(model, {"sha256": ""}, Settings(path=""))


async def here():
    return False


async def gone():
    return True


def test_large_images_of_one_request_leave_a_thread_to_another():
    model = Decoder()

    async def both():
        served = served_by(model)
        large = asyncio.create_task(served.decode([b"large"] * 5, here))
        assert await asyncio.to_thread(model.started.wait, 60)
        small = await served.decode([b"small"], here)  # comes back while the first large one is being decoded
        begun = list(model.begun)
        model.go.release(5)
        return begun, small, await large

    begun, small, large = asyncio.run(both())
    assert begun == [b"large", b"small"]
    assert (len(small), len(large)) == (1, 5)


def test_nothing_is_decoded_for_a_client_that_has_gone():
    model = Decoder()
    with pytest.raises(Refused, match="the connection ended before its images were decoded"):
        asyncio.run(served_by(model).decode([b"small"] * 3, gone))
    assert model.begun == []


def test_all_of_a_classifier_is_read_behind_one_end_of_a_link(tmp_path, monkeypatch):
    one, other, link = write_export(tmp_path / "one", 1), write_export(tmp_path / "other", 2), tmp_path / "link"
    link.symlink_to(one)
    hashed = Path.open

    def switching(self, *arguments, **options):
        if self.name == "model.onnx":  # model.json has been read
            link.unlink(missing_ok=True)
            link.symlink_to(other)
        return hashed(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", switching)
    served = open_served(Settings(path=str(link)))
    monkeypatch.undo()
    assert link.resolve() == other
    expected = open_served(Settings(path=str(one)))
    images = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(1, 3, 8, 8)
    assert np.array_equal(served.model.probabilities(images), expected.model.probabilities(images))
    assert served.sha256 == expected.sha256
