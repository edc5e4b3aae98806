"""The verb `serve`, which imports what it needs when it is called."""

import importlib.util
import inspect
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tokenfusion.errors import InputError, how_to_install


def serve(
    artefact: Annotated[Path, Parameter(name="RUN_OR_EXPORT")],
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 3000,
    workers: int = 1,
    token_file: Path | None = None,
    allow_origin: tuple[str, ...] = (),
    max_bytes: int = 32 * 2**20,
    max_pixels: int | None = None,
    max_images: int = 64,
    queue: int = 128,
    seconds: float = 60,
    batch_size: int = 32,
    dockerfile: Path | None = None,
    layout: Literal["triton"] | None = None,
    out: Path | None = None,
) -> None:
    """Answer over HTTP what `predict` answers, and give a page to people; needs the extra `serve`.

    SIGTERM ends it when what was asked is answered; SIGHUP, or another folder under the same name, loads anew.

    Example: tokenfusion serve photos-onnx

    Parameters
    ----------
    artefact
        Folder that `export` wrote, which is served without torch, or that `train` wrote.
    host
        Numeric address to listen on; others than this machine reach 0.0.0.0 too.
    port
        To listen on; 0 for any that is free.
    workers
        Processes that answer; they share the cores.
    token_file
        File with a token that requests must bring: Authorization: Bearer TOKEN.
    allow_origin
        Web pages that may use the service, such as https://example.org; none but its own when not given.
    max_bytes
        Largest request.
    max_pixels
        Largest image; as in training when not given.
    max_images
        Most images of a request.
    queue
        Requests that may be under way at once; more get 429. Each of several workers takes an equal share, rounded up.
    seconds
        That a request may take to arrive, and then may wait; after three times as many it ends in any case.
    batch_size
        Images in the model at once.
    dockerfile
        New folder to write in place of serving: Dockerfile, compose file, pinned versions, the classifier.
    layout
        With --out, write the folders that Triton and OpenVINO Model Server read, in place of serving.
    out
        New folder for --layout.
    """
    chosen = locals()
    from tokenfusion.serve.settings import Settings

    require(artefact, workers=workers, max_bytes=max_bytes, max_images=max_images, queue=queue, batch_size=batch_size)
    if (layout is None) != (out is None):
        raise InputError("--layout says what to write and --out where; give both, or neither")
    if dockerfile or out:
        require_alone(chosen)
        from tokenfusion.serve.deploy import write_docker, write_triton

        write = write_docker if dockerfile else write_triton
        folder = dockerfile or out
        assert folder is not None
        write(artefact, folder)
        print(f"written to {folder}")
        return
    if not 0 < seconds <= 3600 or not 0 <= port < 2**16 or (max_pixels is not None and max_pixels < 1):
        given = f"seconds={seconds:g}, port={port}, max_pixels={max_pixels}"
        raise InputError(f"{given}: one is out of range; give more than 0, a port below 65536, an hour at most")
    if queue < workers:
        raise InputError(f"queue={queue} leaves some of {workers} workers without a request; give {workers} or more")
    settings = Settings(
        path=os.path.abspath(artefact),  # a link stays a link, so that another folder under it is seen
        workers=workers,
        token_file=os.path.abspath(token_file) if token_file else "",
        origins=allow_origin,
        max_bytes=max_bytes,
        max_pixels=max_pixels or 0,
        max_images=max_images,
        queue=queue,
        seconds=seconds,
        batch_size=batch_size,
        host=host,
    )
    settings.read_token()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the launcher heeds it, whose imports take a while
    from tokenfusion.serve.launch import launch

    status = launch(settings, port, lambda text: print(text, flush=True))
    if status:
        sys.exit(status)


def require_alone(given: dict[str, object]) -> None:
    """Refuse beside an order to write a folder what that folder would not keep to.

    Raises:
        InputError: an option of serving, or the order to write another folder.
    """
    order, kept = ("dockerfile", ()) if given["dockerfile"] else ("layout", ("out",))
    for name, option in inspect.signature(serve).parameters.items():
        if name not in ("artefact", order, *kept) and given[name] != option.default:
            said = " ".join(map(str, value)) if isinstance(value := given[name], tuple) else value
            remedy = "leave it out"
            if order == "dockerfile" and name not in ("layout", "out"):
                remedy = "append it to the ENTRYPOINT of the Dockerfile, with files that are in the container"
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} {said} is not used by --{order}, which writes a folder; {remedy}")


def require(artefact: Path, **counts: int) -> None:
    """Refuse before anything starts what cannot be served.

    Raises:
        InputError: the extra is not installed, there is no such folder, or a number is below 1.
    """
    if importlib.util.find_spec("bentoml") is None:
        raise InputError(f"bentoml is not installed, which serves; {how_to_install('serve')}")
    if not (artefact / "model.json").is_file():
        raise InputError(f"{artefact} holds no model.json; give a folder that `export` or `train` wrote")
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name}={count} leaves nothing to answer; give 1 or more")
