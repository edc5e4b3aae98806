"""Collapse where it was built in, none where it was kept out, and the same numbers however the images come."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.beit import Beit

from tokenfusion import InputError, create_model, record_attention
from tokenfusion.analyze import collapse as room
from tokenfusion.analyze.attention_metrics import block_cosines
from tokenfusion.analyze.collapse import measure_collapse
from tokenfusion.analyze.collapse_figures import feature_maps, write_figures
from tokenfusion.analyze.collapse_summary import collapse_summary, on_features
from tokenfusion.analyze.inputs import open_run_or_model
from tokenfusion.layers.attend import split_heads
from tokenfusion.models.deepvit import DeepViT

SMALL = {"img_size": (24, 40), "patch_size": 8, "dim": 12, "depth": 4, "heads": 3, "num_classes": 5}


def deepvit(re_attention, spread=1.0, **changes):
    """A DeepViT whose attention is not uniform."""
    torch.manual_seed(0)
    model = DeepViT(**SMALL | {"re_attention": re_attention, "mixing_norm": "none"} | changes).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.normal_(std=spread)
    return model


def images(batch=5, size=(24, 40)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def make_blocks_alike(model, blocks):
    """Give blocks the weights of the first of them, and nothing to add to the stream."""
    with torch.no_grad():
        for i in blocks:
            model.blocks[i].load_state_dict(model.blocks[blocks[0]].state_dict())
            for layer in (model.blocks[i].attn.proj, model.blocks[i].mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    return model


def test_blocks_that_repeat_each_other_are_found():
    result = measure_collapse(make_blocks_alike(deepvit(0), [0, 1, 2, 3]), [images()])
    (group,) = result["groups"]
    torch.testing.assert_close(torch.tensor(group["similarity"]), torch.ones(4, 4))
    assert group["similar_share"] == torch.ones(4, 4).tolist()
    assert [len(group["neighbours"][k]) for k in ("1", "2", "3")] == [3, 2, 1]
    assert group["similar_blocks"] == [f"blocks.{i}.attn" for i in range(4)]
    assert (group["share_of_similar_blocks"], group["runs"]) == (1, [[0, 3]])
    text = collapse_summary(result)
    assert "Blocks 1-4 of 4 repeat each other" in text
    assert "The last 3 of 4 add little" in text
    assert "a depth smaller by 3" in text


def test_the_run_is_where_the_blocks_are_alike():
    result = measure_collapse(make_blocks_alike(deepvit(0), [1, 2]), [images()])
    assert result["groups"][0]["runs"] == [[1, 2]]
    assert "Blocks 2-3 of 4 repeat each other" in collapse_summary(result)
    assert "add little" not in collapse_summary(result)


def test_identity_mixing_is_plain_attention():
    plain, mixed = deepvit(0), deepvit(4)
    with torch.no_grad():
        for block in mixed.blocks:
            block.attn.mixing.matrix.weight.copy_(torch.eye(3)[:, :, None, None])
            block.attn.mixing.matrix.bias.zero_()
    mixed.load_state_dict(plain.state_dict(), strict=False)  # all but the mixing
    one, other = (measure_collapse(model, [images()])["groups"][0] for model in (plain, mixed))
    torch.testing.assert_close(torch.tensor(other["similarity"]), torch.tensor(one["similarity"]))
    torch.testing.assert_close(torch.tensor(other["similarity_before_mixing"]), torch.tensor(one["similarity"]))
    assert one["similarity_before_mixing"] is None


def test_mixing_that_differs_makes_alike_maps_differ():
    model = make_blocks_alike(deepvit(4), [0, 1, 2, 3])
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            order = torch.eye(3).roll(i, 0)  # block i's head h is head h - i
            block.attn.mixing.matrix.weight.copy_(order[:, :, None, None])
            block.attn.mixing.matrix.bias.zero_()
    result = measure_collapse(model, [images()])
    (group,) = result["groups"]
    before, after = torch.tensor(group["similarity_before_mixing"]), torch.tensor(group["similarity"])
    torch.testing.assert_close(before, torch.ones(4, 4))
    torch.testing.assert_close(after[0, 3], torch.tensor(1.0))  # three heads: the fourth block's order is the first's
    heads = result["blocks"][0]["head_similarity"]
    torch.testing.assert_close(after[0, 1], torch.tensor(heads))  # each head meets another head of the same map


def test_the_similarity_is_that_of_the_recorded_maps():
    model, pixels = deepvit(2), images()
    with torch.no_grad(), record_attention(model) as maps:
        model(pixels)
    expected = block_cosines([record.applied for record in maps.values()]).mean((0, 1, 2))
    (group,) = measure_collapse(model, [pixels])["groups"]
    torch.testing.assert_close(torch.tensor(group["similarity"]), expected, rtol=1e-5, atol=1e-5)


def test_the_batches_do_not_matter(monkeypatch):
    model, pixels = deepvit(2), images()
    whole = measure_collapse(model, [pixels])
    monkeypatch.setattr(room, "STEP_BYTES", 1)  # an image at a time
    parts = measure_collapse(model, pixels.split([2, 3]))
    assert parts["images"] == whole["images"] == 5
    for one, other in ((whole["groups"][0], parts["groups"][0]), *zip(whole["blocks"], parts["blocks"], strict=True)):
        for key, value in one.items():
            if isinstance(value, float):
                assert other[key] == pytest.approx(value, rel=1e-4), key
    torch.testing.assert_close(*(torch.tensor(result["groups"][0]["similarity"]) for result in (whole, parts)))


def test_only_blocks_with_the_same_tokens_are_compared():
    late = measure_collapse(create_model("tokenfusion_late_micro"), [images(size=(32, 32))])
    assert "Not compared, since no other block has their tokens: " + ", ".join(
        late["not_compared"]
    ) in collapse_summary(late)
    crossvit = measure_collapse(create_model("crossvit_micro"), [images(size=(32, 32))])
    for group in crossvit["groups"]:
        assert len({name.split(".", 2)[2].split(".")[0] for name in group["blocks"]}) == 1  # one branch, or fusion
    queries = [group["queries"] for group in crossvit["groups"]]
    assert queries[:2] == ["small_cls + small_patch 8×8", "large_cls + large_patch 4×4"]


def test_untrained_models_are_called_so():
    result = measure_collapse(create_model("vit_micro"), [images()])
    assert "almost uniform, as in an untrained model" in collapse_summary(result)


def test_the_model_is_left_as_it_was():
    model = deepvit(2).train()
    model.blocks[1].eval()
    before = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    measure_collapse(model, [images()])
    with pytest.raises(InputError, match="not finite"):
        measure_collapse(model, [images() * torch.nan])
    with pytest.raises(InputError, match="give them one size"):
        measure_collapse(model, [images(), images(size=(32, 40))])
    assert [(module.training, len(module._forward_hooks)) for module in model.modules()] == before
    assert all(weights[key].equal(value) for key, value in model.state_dict().items())


def test_what_costs_most_is_of_a_sample(monkeypatch):
    monkeypatch.setattr(room, "SAMPLE", 3)
    few, all_of_them = (measure_collapse(deepvit(2), [images()[:n]]) for n in (3, 5))
    before = [result["groups"][0]["similarity_before_mixing"] for result in (few, all_of_them)]
    torch.testing.assert_close(torch.tensor(before[0]), torch.tensor(before[1]))
    ranks = [[block["effective_rank"] for block in result["blocks"]] for result in (few, all_of_them)]
    assert ranks[0] == pytest.approx(ranks[1])
    assert few["groups"][0]["similarity"] != all_of_them["groups"][0]["similarity"]
    assert (few["sample"], all_of_them["sample"], all_of_them["images"]) == (3, 3, 5)
    assert "in 3 of the images." in collapse_summary(all_of_them)


def test_the_first_images_are_not_of_the_first_classes(tmp_path):
    for label in ("ant", "bee", "cow"):
        (tmp_path / label).mkdir()
        for i in range(20):
            Image.new("RGB", (8, 8)).save(tmp_path / label / f"{i}.png")
    first, again = (open_run_or_model("vit_micro", str(tmp_path), 30)[1] for _ in range(2))
    assert first.names == again.names
    assert torch.as_tensor(first.labels).bincount().tolist() == [10, 10, 10]  # spread evenly all the same
    assert set(torch.as_tensor(first.labels[:10]).tolist()) == {0, 1, 2}


def test_without_feature_maps_it_is_said_and_none_are_left(tmp_path):
    model = Beit(img_size=(24, 40), patch_size=8, embed_dim=12, depth=3, num_heads=3, num_classes=5).eval()
    features = feature_maps(model, images(2))
    assert features == []
    assert "Feature maps are not drawn" in on_features({"feature_maps": features})[0]
    for name in ("feature_maps.png", "feature_maps.svg"):
        (tmp_path / name).write_text("of another model")
    drawn = write_figures(measure_collapse(model, [images()]), tmp_path, torch.zeros(0, 3, 8, 8), features)
    assert {path.name for path in tmp_path.iterdir()} == set(drawn)
    assert not any("feature_maps" in name for name in drawn)


def test_nothing_to_mend_is_said_of_nothing_alike_only():
    result = measure_collapse(deepvit(0, spread=3.0), [images()])
    for block in result["blocks"]:
        block["head_similarity"] = 0.1
    result["groups"][0] |= {"runs": [], "similar_blocks": []}
    assert "Nothing to mend here" in collapse_summary(result)
    result["groups"][0]["similar_blocks"] = ["blocks.0.attn", "blocks.2.attn"]
    assert "To try: a smaller depth" in collapse_summary(result)
    result["blocks"][1]["head_similarity"] = 0.9
    assert "To try: fewer heads" in collapse_summary(result)
    assert "Nothing to mend" not in collapse_summary(result)


def test_models_that_have_nothing_to_compare():
    with pytest.raises(InputError, match="no image is given"):
        measure_collapse(deepvit(0), [])
    with pytest.raises(InputError, match="1 block of attention; collapse compares 2"):
        measure_collapse(deepvit(0, depth=1), [images()])
    with pytest.raises(InputError, match="no attention that can be seen"):
        measure_collapse(create_model("resnet_micro"), [images()])


def test_feature_maps_are_attention_times_values():
    model, pixels = deepvit(1), images(2)
    tokens = {}
    model.blocks[3].attn.register_forward_hook(lambda _m, inputs, _o: tokens.update(last=inputs[0]))
    first, *_, last = feature_maps(model, pixels)
    with torch.no_grad(), record_attention(model) as maps:
        model(pixels)
        value = split_heads(model.blocks[3].attn.qkv(tokens["last"])[..., 24:], 3)
        record = maps[last.block]
        expected = [(one @ value).square().sum((1, 3)).sqrt()[:, 1:] for one in (record.map, record.mixed)]
    assert first.after is None
    torch.testing.assert_close(last.before.flatten(1), expected[0])
    torch.testing.assert_close(last.after.flatten(1), expected[1])
    assert last.before.shape == (2, 3, 5)


def test_the_command_on_a_run(command, run):
    status, output, errors = command("analyze", "collapse", run, "--num-images", 7)
    assert status == 0, errors
    result = json.loads((run / "collapse" / "collapse.json").read_text())
    assert (result["images"], result["img_size"]) == (7, [8, 8])
    assert result["summary"] in output
    assert {path.name for path in (run / "collapse").iterdir()} == {"collapse.json", *result["figures"]}
    assert {"curves.png", "block_by_block.svg", "heads_by_block.svg", "feature_maps.png"} <= set(result["figures"])
    for path in (run / "collapse").glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 0


def test_the_command_on_a_name(command, tmp_path):
    out = tmp_path / "a folder" / "below"
    words = ("analyze", "collapse", "deepvit_micro", "digits", "--num-images", 3, "--out", out, "--json")
    status, output, errors = command(*words)
    assert status == 0, errors
    assert json.loads(output) == json.loads((out / "collapse.json").read_text())
    assert (out / "block_by_block.svg").read_text().count("<svg") == 1


def test_what_the_command_refuses(command, run, tmp_path, digit):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    digit.rename(tmp_path / "data" / "cat" / "a.png")
    for words, message in (
        ((run, tmp_path / "data"), "classes that the model does not know: 'cat'"),
        (("resnet_micro", "digits"), "no attention that can be seen"),
        (("vit_micro",), "DATA is missing"),
        ((run, "--num-images", 0), "num_images=0 shows nothing"),
        (("no_such_model", "digits"), "no model is called 'no_such_model'"),
    ):
        status, _, errors = command("analyze", "collapse", *words, "--out", tmp_path / "out")
        assert (status, message in errors) == (2, True), errors
    assert not (tmp_path / "out").exists()
