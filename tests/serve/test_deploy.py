"""The folders that a classifier is deployed by hold what they need; no image was built and no other server started."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tokenfusion
from services import NAMES, write_export

pytest.importorskip("bentoml", reason="the extra `serve` is not installed")


def test_the_folder_for_docker_pins_all_that_is_imported_and_runs_as_no_root(tmp_path, command):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    export, out = write_export(tmp_path / "export"), tmp_path / "docker"
    mask = os.umask(0o077)
    try:
        assert command("serve", export, "--dockerfile", out)[0] == 0
    finally:
        os.umask(mask)
    modes = {path.stat().st_mode & 0o777 for path in (out, *out.rglob("*")) if path != out / "secret"}
    assert modes == {0o755, 0o644}  # users of containers are others
    assert command("serve", export, "--dockerfile", out)[0] == 2  # it is there now
    file = (out / "Dockerfile").read_text()
    assert file.index("useradd") < file.index("USER serve") < file.index("ENTRYPOINT")
    assert "HEALTHCHECK" in file
    assert json.loads((out / "model" / "model.json").read_text())["name"] == "tiny"
    compose = yaml.safe_load((out / "compose.yaml").read_text())
    assert set(compose["services"]) == {"classifier", "prometheus"}
    assert all(":v" in one["image"] for one in compose["services"].values() if "image" in one)
    (job,) = yaml.safe_load((out / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["classifier:3000"]
    token = (out / "secret" / "token").read_text().strip()
    assert len(token) > 30
    assert (out / "secret").stat().st_mode & 0o077 == 0
    for name in ("classifier", "prometheus"):
        assert compose["services"][name]["secrets"] == ["token"]
    assert compose["services"]["classifier"]["command"] == ["--token-file", "/run/secrets/token"]
    assert compose["secrets"]["token"]["file"] == "./secret/token"
    assert job["authorization"]["credentials_file"] == "/run/secrets/token"
    lines = (out / "requirements.txt").read_text().splitlines()[1:]
    assert all("==" in line for line in lines)
    pinned = {line.partition("==")[0] for line in lines}
    assert not {"torch", "timm", "scipy"} & pinned
    code = (
        "import sys, tokenfusion.cli, tokenfusion.serve.cli, tokenfusion.serve.launch, tokenfusion.serve.worker\n"
        "import tokenfusion_runtime, onnxruntime\ntokenfusion_runtime.load(sys.argv[1])\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, tokenfusion.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(out / "packages"), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, out / "model"], env=environment, capture_output=True, text=True, check=True
    )
    *modules, place = done.stdout.split()
    assert Path(place).is_relative_to(out)
    owners = packages_distributions()
    needed = {owners[name][0].lower().replace("_", "-").replace(".", "-") for name in modules if name in owners}
    assert needed - pinned - {"tokenfusion", "setuptools", "distutils-precedence"} == set()


def test_every_package_that_the_service_imports_is_named_by_its_extra():
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["serve"]
    named = {canonicalize_name(Requirement(line).name) for line in lines}
    owners, used = packages_distributions(), set()
    for file in (root / "src" / "tokenfusion" / "serve").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            used |= {name.partition(".")[0] for name in names}
    used = {canonicalize_name(owner) for name in used for owner in owners.get(name, [])}
    assert {"bentoml", "kantoku", "psutil", "prometheus-client"} <= used
    assert used - named - {"tokenfusion", "tokenfusion-runtime"} == set()


@pytest.mark.parametrize("batch", [None, 8])
def test_the_folder_for_triton_names_the_graph_its_tensors_and_its_labels(tmp_path, command, batch):
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    export = write_export(tmp_path / "export")
    description = json.loads((export / "model.json").read_text()) | {"name": "fuse(a,b,early)", "batch": batch}
    (export / "model.json").write_text(json.dumps(description))
    assert command("serve", export, "--layout", "triton", "--out", tmp_path / "models")[0] == 0
    folder = tmp_path / "models" / "fuse_a_b_early"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "1/model.onnx", "config.pbtxt", "labels.txt",
    ]  # fmt: skip
    graph = onnx.load(folder / "1" / "model.onnx").graph
    config = (folder / "config.pbtxt").read_text()
    assert f'name: "{graph.input[0].name}" data_type: TYPE_UINT8 dims: {[8] if batch else []}'[:-2] in config
    assert f'name: "{graph.output[0].name}" data_type: TYPE_FP32' in config
    assert ("max_batch_size: 0" in config, "dynamic_batching" in config) == (bool(batch), not batch)
    assert (folder / "labels.txt").read_text().split() == NAMES


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": ".."}, "name '..' gives no folder"),
        ({"name": "/"}, "name '/' gives no folder"),
        ({"classes": ["red", "green\nblue", "grey"]}, "line break"),
        ({"classes": ["red", "\udcff", "grey"]}, "no UTF-8"),
    ],
)
def test_no_name_leads_out_of_the_folder_for_triton_and_no_class_makes_two_lines(tmp_path, command, change, words):
    export = write_export(tmp_path / "export")
    description = json.loads((export / "model.json").read_text()) | change
    (export / "model.json").write_text(json.dumps(description))
    status, _, errors = command("serve", export, "--layout", "triton", "--out", tmp_path / "models")
    assert (status, words in " ".join(errors.split())) == (2, True)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("order", [["--dockerfile"], ["--layout", "triton", "--out"]])
def test_no_folder_to_deploy_by_is_written_into_the_export_that_it_copies(tmp_path, command, order):
    export = write_export(tmp_path / "export")
    status, _, errors = command("serve", export, *order, export / "deploy")
    assert (status, "lies inside" in " ".join(errors.split())) == (2, True)
    assert not (export / "deploy").exists()


def test_a_run_half_an_order_and_options_that_would_be_lost_are_refused(tmp_path, command):
    export = write_export(tmp_path / "export")
    assert "--out" in command("serve", export, "--layout", "triton")[2]
    assert "--layout" in command("serve", export, "--out", tmp_path / "x")[2]
    for order in (["--dockerfile", tmp_path / "x"], ["--layout", "triton", "--out", tmp_path / "x"]):
        for option in (["--token-file", "t"], ["--port", 80], ["--allow-origin", "https://a.b"], ["--workers", 2]):
            status, _, errors = command("serve", export, *order, *option)
            assert status == 2
            assert f"{option[0]} {option[1]} is not used by {order[0]}" in " ".join(errors.split())
    both = command("serve", export, "--dockerfile", tmp_path / "x", "--layout", "triton", "--out", tmp_path / "y")
    assert (both[0], "--layout triton is not used by --dockerfile" in " ".join(both[2].split())) == (2, True)
    assert not (tmp_path / "x").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.json").write_text("{}")
    status, _, errors = command("serve", tmp_path / "run", "--dockerfile", tmp_path / "docker")
    assert (status, "no exported classifier" in " ".join(errors.split())) == (2, True)
    assert tokenfusion.__version__
