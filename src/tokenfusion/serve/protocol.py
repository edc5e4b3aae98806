"""The Open Inference Protocol (KServe's V2, Triton's), so that its clients work.

Source: github.com/kserve/open-inference-protocol, and Triton's binary tensor data extension.
"""

import asyncio
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tokenfusion.serve.holder import Holder
from tokenfusion.serve.limits import read_body
from tokenfusion.serve.refusal import MODEL, OURS, Refused, json_response
from tokenfusion.serve.served import Served
from tokenfusion.serve.settings import Settings
from tokenfusion.version import __version__
from tokenfusion_runtime.image import Pixels

SIZE_HEADER = "Inference-Header-Content-Length"
"""Bytes of JSON in front of the binary tensors."""
REMEDY = "give the input `image` (BYTES, image files) or `pixels` (UINT8, as the preprocessing leaves them)"
MOST_JSON = 2**20
"""Bytes of a request's JSON, which no other thread goes on beside while it is read; an image of 224 px has 0.7 MB."""
LONGEST_ID = 1000
"""Characters of a request's own name, which its answer repeats."""


@dataclass(frozen=True)
class Asked:
    """What a request wants back.

    Attributes:
        outputs: their names, and whether each is wanted as binary data.
        id: the request's own name, None where it has none.
    """

    outputs: dict[str, bool]
    id: str | None


class Protocol:
    """Its addresses. The model has the served classifier's name, and no versions."""

    def __init__(self, holder: Holder, settings: Settings) -> None:
        self.holder, self.settings = holder, settings

    def routes(self) -> list[Route]:
        """All but those of health, the model's too, which are the guard's."""
        model = "/v2/models/{name}"
        return [
            Route("/v2", self.server),
            Route(model, self.metadata),
            Route(f"{model}/infer", self.infer, methods=["POST"]),
        ]

    async def server(self, _: Request) -> Response:
        """What the server is."""
        return json_response({"name": "tokenfusion", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def metadata(self, request: Request) -> Response:
        """What goes into the model and comes out of it."""
        self.require_name(request)
        about = self.holder.served.about
        outputs = {
            "probabilities": {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(about["classes"])]},
            "label": {"name": "label", "datatype": "BYTES", "shape": [-1]},
        }
        (height, width), channels = about["preprocess"]["img_size"], about["preprocess"]["in_chans"]
        return json_response(
            {
                "name": about["name"],
                "versions": [],
                "platform": f"tokenfusion_{about['format']}",
                "inputs": [
                    {"name": "image", "datatype": "BYTES", "shape": [-1]},
                    {"name": "pixels", "datatype": "UINT8", "shape": [-1, channels, height, width]},
                ],
                "outputs": [outputs[name] for name in outputs_of(about)],
            }
        )

    async def infer(self, request: Request) -> Response:
        """Probabilities and labels of image files, or of prepared pixels."""
        with self.holder.use() as served:
            self.require_name(request)
            asked, pixels = await self.read(request, served)
            rows = await served.batches(pixels)
        labels = [served.model.classes[index] for index in rows.argmax(1)]
        response = answer(asked, served.about["name"], {"probabilities": rows, "label": labels})
        response.headers[MODEL] = served.sha256
        return response

    async def read(self, request: Request, served: Served) -> tuple[Asked, Pixels]:
        """What is asked for, and the pixels to judge, uint8 (n, in_chans, h, w); files are let go of when decoded."""
        body, header = await read_body(request, self.settings), request.headers.get(SIZE_HEADER)
        parsing = partial(self.parsed, body, header, served.about)
        asked, given = await asyncio.get_running_loop().run_in_executor(served.decoders, parsing)  # few at once
        del body, parsing
        if not isinstance(given, list):
            return asked, given
        prepared = await served.decode(given, request.is_disconnected)
        if bad := [pixels for pixels in prepared if isinstance(pixels, str)]:
            raise Refused("unreadable", "image", bad[0], "send whole image files")
        return asked, np.stack([pixels for pixels in prepared if not isinstance(pixels, str)])

    def parsed(self, body: bytes, header: str | None, about: dict[str, Any]) -> tuple[Asked, list[bytes] | Pixels]:
        """What a body asks for, and its input: image files, or pixels."""
        said, binary = split_body(body, header)
        asked, preprocess = what_is_asked(said, outputs_of(about)), about["preprocess"]
        inputs = said.get("inputs")
        if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
            raise Refused("tensor", "inputs", "there is not one input", REMEDY)
        name, kind = inputs[0].get("name"), inputs[0].get("datatype")
        if (name, kind) == ("image", "BYTES"):
            files = list(islice(elements(binary), self.settings.max_images + 1))
            self.require_few(len(files))
            return asked, files
        if (name, kind) != ("pixels", "UINT8"):
            raise Refused("tensor", f"{str(name)[:50]} of {str(kind)[:50]}", "no such input", REMEDY)
        data = inputs[0].get("data")
        try:
            flat = np.frombuffer(binary, np.uint8) if data is None else whole_bytes(data)
            pixels = flat.reshape(-1, preprocess["in_chans"], *preprocess["img_size"])
        except (ValueError, TypeError, OverflowError) as error:
            shape = [-1, preprocess["in_chans"], *preprocess["img_size"]]
            raise Refused(
                "tensor", "pixels", f"not of the shape {shape}, or not whole bytes", "prepare them so"
            ) from error
        self.require_few(len(pixels))
        if (said_shape := inputs[0].get("shape", [*pixels.shape])) != [*pixels.shape]:
            value = f"pixels of shape {str(said_shape)[:50]}"
            raise Refused("tensor", value, f"their data is of shape {[*pixels.shape]}", "prepare them so")
        return asked, pixels

    def require_name(self, request: Request) -> None:
        """Refuse a model of another name."""
        name = request.path_params.get("name", self.holder.served.about["name"])
        if name != self.holder.served.about["name"]:
            raise Refused("no_model", name[:100], "no such model", f"ask for {self.holder.served.about['name']}")

    def require_few(self, images: int) -> None:
        """Refuse no images, and too many."""
        most = self.settings.max_images
        if not 0 < images <= most:
            value = f"more than {most:,} images" if images else "0 images"
            reason = f"a request may have 1 to {most:,} images"
            raise Refused("too_many" if images else "tensor", value, reason, "send as many")


def outputs_of(about: dict[str, Any]) -> tuple[str, ...]:
    """Names of what a classifier gives; of several labels, which hold is for `/v1/predict` to say."""
    return ("probabilities",) if about["multi_label"] else ("probabilities", "label")


def split_body(body: bytes, header: str | None) -> tuple[dict[str, Any], memoryview]:
    """The JSON of a request, and the tensor behind it, which is not copied."""
    size = len(body) if header is None else int(header) if header.isdecimal() and len(header) < 12 else -1
    if not 0 <= size <= len(body):
        raise Refused("tensor", f"{SIZE_HEADER}: {header}", "not a size within the body", "give the bytes of its JSON")
    if size > MOST_JSON:
        reason = f"more than the {MOST_JSON:,} that a request may have"
        raise Refused("too_large", f"{size:,} bytes of JSON", reason, "send the tensor as binary data behind the JSON")
    try:
        asked = json.loads(body[:size])
    except (ValueError, RecursionError) as error:
        raise Refused("tensor", "the body", "its JSON cannot be read", REMEDY) from error
    if not isinstance(asked, dict):
        raise Refused("tensor", "the body", "its JSON is no object", REMEDY)
    return asked, memoryview(body)[size:]


def elements(tensor: memoryview) -> Iterator[bytes]:
    """Those of a BYTES tensor: each its length in 4 bytes, the lowest first, and so many bytes."""
    place = 0
    while place < len(tensor):
        size = int.from_bytes(tensor[place : place + 4], "little")
        place += 4 + size
        if place > len(tensor):
            raise Refused("tensor", "image", "the tensor ends before its last element", "send it whole, as binary data")
        yield bytes(tensor[place - size : place])


def whole_bytes(data: Any) -> Pixels:
    """Numbers from 0 to 255, of any shape.

    Raises:
        ValueError: they are something else.
    """
    numbers = np.array(data)
    if numbers.dtype.kind not in "iu" or not numbers.size or not 0 <= numbers.min() <= numbers.max() <= 255:
        raise ValueError
    return numbers.astype(np.uint8)


def what_is_asked(said: dict[str, Any], known: Sequence[str]) -> Asked:
    """The outputs that a request's JSON asks for, all where none is named, and its name.

    Raises:
        Refused: an output that there is not, one named twice, or a name of the request that is none.
    """
    wanted, parameters = said.get("outputs") or [{"name": name} for name in known], said.get("parameters")
    all_binary = isinstance(parameters, dict) and bool(parameters.get("binary_data_output"))
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if len(wanted) > len(known):
        raise Refused("tensor", f"{len(wanted):,} outputs", f"there are {len(known)}", "name each once, or none")
    outputs = dict[str, bool]()
    for output in wanted:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str) or name not in known:
            raise Refused("tensor", str(name)[:100], "no such output", f"ask for {' or '.join(known)}")
        if name in outputs:
            raise Refused("tensor", name, "an output that is named twice", "name each once, or none")
        own = output.get("parameters")
        outputs[name] = bool(own.get("binary_data", all_binary)) if isinstance(own, dict) else all_binary
    number = str(said["id"])[: LONGEST_ID + 1] if "id" in said else None
    if number is not None and len(number) > LONGEST_ID:
        raise Refused("tensor", "id", f"longer than {LONGEST_ID} characters", "give a shorter one")
    return Asked(outputs, number)


def answer(asked: Asked, name: str, found: dict[str, Any]) -> Response:
    """The outputs that were asked for, as JSON or binary."""
    outputs, tensors = list[dict[str, Any]](), list[bytes]()
    for key, binary in asked.outputs.items():
        rows = found[key]
        is_label = isinstance(rows, list)
        said: dict[str, Any] = {"name": key, "datatype": "BYTES" if is_label else "FP32", "shape": list(np.shape(rows))}
        if binary:
            tensors.append(b"".join(map(element, rows)) if is_label else np.asarray(rows, "<f4").tobytes())
            said["parameters"] = {"binary_data_size": len(tensors[-1])}
        else:
            said["data"] = rows if is_label else np.asarray(rows, float).ravel().tolist()
        outputs.append(said)
    said = {"model_name": name, "outputs": outputs} | ({} if asked.id is None else {"id": asked.id})
    if not tensors:
        return json_response(said)
    text = json.dumps(said).encode()
    headers = OURS | {SIZE_HEADER: str(len(text))}
    return Response(b"".join([text, *tensors]), headers=headers, media_type="application/octet-stream")


def element(text: str) -> bytes:
    """One of a BYTES tensor."""
    data = text.encode()
    return struct.pack("<I", len(data)) + data
