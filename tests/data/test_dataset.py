import dataclasses
from pathlib import Path

import numpy as np
import pytest
from making import pixels_of

from serving import picture, write_shards
from tokenfusion.data.open import open_dataset

Tree = dict[str, np.ndarray]


def test_a_subset_of_a_subset_has_its_own_images(pets_folder: Path, pets: Tree) -> None:
    rows = "".join(f"{name},{name.split('/')[0]},{number + 1}\n" for number, name in enumerate(pets))
    (pets_folder / "list.csv").write_text("path,label,weight\n" + rows)
    whole = open_dataset(pets_folder / "list.csv")
    some = whole.subset([9, 0, 5, 4]).subset(np.array([2, 0, 2]))  # 5, 9, 5
    assert some.names == [list(pets)[index] for index in (5, 9, 5)]
    assert some.labels.tolist() == [1, 1, 1]
    assert some.weights is not None
    assert some.weights.tolist() == [6, 10, 6]
    assert some.classes == whole.classes
    for index, name in enumerate(some.names):
        assert np.array_equal(pixels_of(some, index), pets[name])
    assert len(whole) == 11
    with pytest.raises(dataclasses.FrozenInstanceError):
        some.names = []  # type: ignore[misc]


def test_a_subset_of_shards_knows_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFUSION_CACHE", str(tmp_path / "cache"))
    some = open_dataset(write_shards(tmp_path / "data", {"train-0.tar": 3, "val-0.tar": 4})).subset([5, 1])
    assert some.shards is not None
    assert some.shards.tolist() == [1, 0]
    assert some.splits == ["val", "train"]
    assert np.array_equal(pixels_of(some, 0), picture(5))
