"""What a budget in minutes is measured on."""

import shutil

from runs import small_recipe
from serving import serving, write_shards
from tokenfusion.compare import timing
from tokenfusion.data.sources import open_source


def test_of_many_shards_only_those_of_the_first_batches_are_fetched(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("TOKENFUSION_CACHE", str(cache))
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    sizes = {f"train-{i}.tar": timing.BATCHES * 4 for i in range(4)} | {"val-0.tar": 6}
    with serving(write_shards(tmp_path / "shards", sizes)) as server:
        recipe = small_recipe(data=f"{server.url}/{{train-{{0..3}},val-0}}.tar", batch_size=4)
        assert len(open_source(recipe.data)) == 70
        for path in cache.iterdir():  # what the shards hold stays known, they themselves do not
            if path.name != "indexes":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        server.sent.clear()
        assert timing.train_some_steps(recipe, threads=1) > 0
        assert {path for path in server.sent if path.endswith(".tar")} == {"/train-0.tar"}
