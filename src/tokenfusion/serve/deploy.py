"""Folders to deploy an exported classifier by: for Docker, and as Triton and OpenVINO Model Server read them."""

import re
import secrets
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tokenfusion.errors import InputError
from tokenfusion.files import write_text
from tokenfusion.version import __version__
from tokenfusion_runtime.description import read_description, require_whole

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
NEEDED = ("bentoml", "uvicorn", "starlette", "python-multipart", "prometheus_client", "numpy", "pillow", "packaging")
COMMAND = ("cyclopts", "rich", "tomli_w")
"""What the service needs, and what the command needs: neither torch nor what comes with it."""
BACKENDS = {"onnx": "onnxruntime", "openvino": "openvino"}
LARGEST_BATCH = 64


def write_docker(export: Path, out: Path) -> None:
    """Write a folder that `docker compose up` serves: the classifier, this package, pinned versions, Prometheus.

    Args:
        export: an exported folder of ONNX or OpenVINO.
        out: a new folder.

    Raises:
        InputError: it is no such folder, or `out` is there already.
    """
    description = require_deployable(export, out)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    pins = pinned([*NEEDED, *COMMAND, ENGINES[description["format"]]])
    out.mkdir(parents=True)
    shutil.copytree(export, out / "model")
    for package in ("tokenfusion", "tokenfusion_runtime"):
        source = Path(__file__).parents[2] / package
        shutil.copytree(source, out / "packages" / package, ignore=shutil.ignore_patterns("__pycache__"))
    write_text(
        out / "requirements.txt", f"# of tokenfusion {__version__}, on Python {python}\n" + "\n".join(pins) + "\n"
    )
    write_text(out / "Dockerfile", DOCKERFILE.format(python=python))
    write_text(out / "compose.yaml", COMPOSE)
    (out / "secret").mkdir(mode=0o700)  # which keeps others of this machine out: in a container it is another's
    write_text(out / "secret" / "token", secrets.token_urlsafe(32) + "\n")
    write_text(out / "prometheus.yml", PROMETHEUS)
    for path in (out, *out.rglob("*")):  # users of containers are others, whatever this one's umask
        if path != out / "secret":
            path.chmod(0o755 if path.is_dir() else 0o644)


def write_triton(export: Path, out: Path) -> None:
    """Write a model repository: OUT/NAME/1/ with the graph, OUT/NAME/config.pbtxt and labels.txt.

    Raises:
        InputError: as `write_docker`; or no folder can have the classifier's name, or no line that of a class.
    """
    description = require_deployable(export, out)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", description["name"]).strip("_.")
    if not name:
        raise InputError(f"the classifier's name {description['name']!r} gives no folder; name it in its model.json")
    for one in description["classes"]:
        if len(f"{one}.".splitlines()) > 1 or one.encode(errors="ignore").decode() != one:
            raise InputError(
                f"the class {one!r} has a line break, or is no UTF-8, and labels.txt has a class a line; rename it in "
                "the data, then train and export again"
            )
    folder = out / name
    (folder / "1").mkdir(parents=True)
    for file in description["files"]:
        shutil.copy(export / file, folder / "1" / file)
    write_text(folder / "labels.txt", "\n".join(description["classes"]) + "\n")
    write_text(folder / "config.pbtxt", triton_config(name, description))


def triton_config(name: str, description: dict[str, Any]) -> str:
    """What Triton is told of the graph; batches are formed where it takes any number of images."""
    (height, width), channels = description["preprocess"]["img_size"], description["preprocess"]["in_chans"]
    fixed = description["batch"]
    batch = [fixed] if fixed else []  # a graph of one size of batch has it among its dimensions
    batching = "" if fixed else "dynamic_batching { }\n"
    return (
        f'name: "{name}"\nbackend: "{BACKENDS[description["format"]]}"\n'
        f"max_batch_size: {0 if fixed else LARGEST_BATCH}\n"
        f'input [ {{ name: "images" data_type: TYPE_UINT8 dims: {[*batch, channels, height, width]} }} ]\n'
        f'output [ {{ name: "probabilities" data_type: TYPE_FP32 dims: {[*batch, len(description["classes"])]} '
        f'label_filename: "labels.txt" }} ]\n{batching}'
    )


def require_deployable(export: Path, out: Path) -> dict[str, Any]:
    """An exported folder's description.

    Raises:
        InputError: it is a run, of a format that needs torch, damaged, or `out` is there already or inside it.
    """
    description = read_description(export)
    if description["format"] not in ENGINES:
        raise InputError(
            f"{export} is of format {description['format']}, which needs torch; export it as onnx or openvino"
        )
    require_whole(export, description)
    if out.exists():
        raise InputError(f"{out} exists; give another folder, or remove it")
    if out.resolve().is_relative_to(export.resolve()):
        raise InputError(f"{out} lies inside {export}, whose files are copied; give a folder outside")
    return description


def pinned(names: list[str]) -> list[str]:
    """`package==version` of packages and all that they require here, as they are installed.

    Raises:
        InputError: one of them is not installed.
    """
    found: dict[str, str] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        key = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if key in found:
            continue
        try:
            package = distribution(wanted.name)
        except PackageNotFoundError as error:
            raise InputError(
                f"{wanted.name} is not installed, whose version is to be pinned; pip install it"
            ) from error
        found[key] = f"{key}=={package.version}"
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)
            ):
                waiting.append(requirement)
    return sorted(found.values())


DOCKERFILE = """\
FROM python:{python}-slim
COPY requirements.txt /app/
RUN pip install --no-cache-dir --no-deps -r /app/requirements.txt && useradd --system serve
COPY packages /app/packages
COPY model /app/model
ENV PYTHONPATH=/app/packages PYTHONDONTWRITEBYTECODE=1
USER serve
# another --port is to be named here, in compose.yaml and in prometheus.yml too
EXPOSE 3000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD \\
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:3000/readyz', timeout=4)"]
ENTRYPOINT ["python", "-m", "tokenfusion", "serve", "/app/model", "--host", "0.0.0.0"]
"""
COMPOSE = """\
services:
  classifier:
    build: .
    command: ["--token-file", "/run/secrets/token"]
    secrets: [token]
    ports: ["127.0.0.1:3000:3000"]
    read_only: true
    tmpfs: [/tmp]
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    restart: unless-stopped
    stop_grace_period: 4m
  prometheus:
    image: prom/prometheus:v3.5.0
    ports: ["127.0.0.1:9090:9090"]
    volumes: ["./prometheus.yml:/etc/prometheus/prometheus.yml:ro"]
    secrets: [token]
secrets:
  token:
    file: ./secret/token
"""
PROMETHEUS = """\
scrape_configs:
  - job_name: classifier
    scrape_interval: 15s
    authorization:
      credentials_file: /run/secrets/token
    static_configs:
      - targets: ["classifier:3000"]
"""
