"""What cannot be loaded is named, leaves the classifier in use, and is tried again."""

import asyncio
import json
import sys

import pytest

from services import write_export
from tokenfusion.serve.settings import Settings
from tokenfusion_runtime.errors import InputError


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
            held.next_try -= 2000 * bool(number)  # as if its pause were over
            await held.look()
            assert held.served is before
            pauses.append(held.pause)
            held.next_try += 1000  # as if the machine were quick
            await held.look()
            assert held.pause == pauses[-1]  # nothing has changed
        (folder / "model.onnx").write_bytes((new / "model.onnx").read_bytes())
        await held.look()
        after = held.served
        (folder / "model.onnx").write_bytes(whole)  # in place, beside the same model.json
        await held.look()
        return pauses, before, after, held

    pauses, before, after, held = asyncio.run(copied())
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert after.sha256 == json.loads((new / "model.json").read_text())["graph_sha256"] != before.sha256
    assert (held.served is after, held.pause) == (True, 1)
    assert capsys.readouterr().err.count("do not belong together") == 2
