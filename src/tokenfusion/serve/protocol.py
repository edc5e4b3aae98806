"""The Open Inference Protocol (KServe's V2, Triton's), so that its clients work.

Source: github.com/kserve/open-inference-protocol, and Triton's binary tensor data extension.
"""

import asyncio
import json
import struct
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tokenfusion.serve.holder import Holder
from tokenfusion.serve.limits import read_body
from tokenfusion.serve.refusal import OURS, Refused, json_response
from tokenfusion.serve.served import Served
from tokenfusion.serve.settings import Settings
from tokenfusion.version import __version__
from tokenfusion_runtime.image import Pixels

SIZE_HEADER = "Inference-Header-Content-Length"
"""Bytes of JSON in front of the binary tensors."""
REMEDY = "give the input `image` (BYTES, image files) or `pixels` (UINT8, as the preprocessing leaves them)"
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


class Protocol:
    """Its addresses. The model has the served classifier's name, and no versions."""

    def __init__(self, holder: Holder, settings: Settings) -> None:
        self.holder, self.settings = holder, settings

    def routes(self) -> list[Route]:
        """Each with its errors as the protocol wants them; health, the model's too, is the guard's."""
        model = "/v2/models/{name}"
        return [
            Route("/v2", plainly_refused(self.server)),
            Route(model, plainly_refused(self.metadata)),
            Route(f"{model}/infer", plainly_refused(self.infer), methods=["POST"]),
        ]

    async def server(self, _: Request) -> Response:
        """What the server is."""
        return json_response({"name": "tokenfusion", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def metadata(self, request: Request) -> Response:
        """What goes into the model and comes out of it."""
        self.require_name(request)
        about = self.holder.served.about
        label = {"name": "label", "datatype": "BYTES", "shape": [-1]}
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
                "outputs": [
                    {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(about["classes"])]},
                    *([] if about["multi_label"] else [label]),
                ],
            }
        )

    async def infer(self, request: Request) -> Response:
        """Probabilities and labels of image files, or of prepared pixels."""
        with self.holder.use() as served:
            self.require_name(request)
            asked, pixels = await self.read(request, served)
            rows = await served.batches(pixels)
        found: dict[str, Any] = {"probabilities": rows}
        if not served.about["multi_label"]:
            found["label"] = [served.model.classes[index] for index in rows.argmax(1)]
        return answer(asked, served.about["name"], found)

    async def read(self, request: Request, served: Served) -> tuple[dict[str, Any], Pixels]:
        """What is asked for, and the pixels to judge, uint8 (n, in_chans, h, w); files are let go of when decoded."""
        body, header = await read_body(request, self.settings), request.headers.get(SIZE_HEADER)
        parsing = partial(self.parsed, body, header, served.about["preprocess"])
        asked, given = await asyncio.get_running_loop().run_in_executor(served.decoders, parsing)  # few hold much JSON
        del body, parsing
        if not isinstance(given, list):
            return asked, given
        prepared = await served.decode(given)
        if bad := [pixels for pixels in prepared if isinstance(pixels, str)]:
            raise Refused(422, "image", bad[0], "send whole image files")
        return asked, np.stack([pixels for pixels in prepared if not isinstance(pixels, str)])

    def parsed(
        self, body: bytes, header: str | None, preprocess: dict[str, Any]
    ) -> tuple[dict[str, Any], list[bytes] | Pixels]:
        """A body's JSON without its inputs, and these: image files, or pixels."""
        asked, binary = split_body(body, header)
        inputs = asked.pop("inputs", None)
        if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
            raise Refused(400, "inputs", "there is not one input", REMEDY)
        name, kind = inputs[0].get("name"), inputs[0].get("datatype")
        if (name, kind) == ("image", "BYTES"):
            files = list(islice(elements(binary), self.settings.max_images + 1))
            self.require_few(len(files))
            return asked, files
        if (name, kind) != ("pixels", "UINT8"):
            raise Refused(400, f"{str(name)[:50]} of {str(kind)[:50]}", "no such input", REMEDY)
        data = inputs[0].get("data")
        try:
            flat = np.frombuffer(binary, np.uint8) if data is None else whole_bytes(data)
            pixels = flat.reshape(-1, preprocess["in_chans"], *preprocess["img_size"])
        except (ValueError, TypeError, OverflowError) as error:
            shape = [-1, preprocess["in_chans"], *preprocess["img_size"]]
            raise Refused(400, "pixels", f"not of the shape {shape}, or not whole bytes", "prepare them so") from error
        self.require_few(len(pixels))
        return asked, pixels

    def require_name(self, request: Request) -> None:
        """Refuse a model of another name."""
        name = request.path_params.get("name", self.holder.served.about["name"])
        if name != self.holder.served.about["name"]:
            raise Refused(404, name[:100], "no such model", f"ask for {self.holder.served.about['name']}")

    def require_few(self, images: int) -> None:
        """Refuse no images, and too many."""
        most = self.settings.max_images
        if not 0 < images <= most:
            value = f"more than {most:,} images" if images else "0 images"
            reason = f"a request may have 1 to {most:,} images"
            raise Refused(413 if images else 400, value, reason, "send as many")


def plainly_refused(endpoint: Endpoint) -> Endpoint:
    """An address whose errors are a text, as this protocol has them."""

    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Refused as error:
            response = error.response()
            plain = json_response({"error": str(error)}, error.status)
            plain.headers.update({name: value for name, value in response.headers.items() if name == "retry-after"})
            return plain

    return answered


def split_body(body: bytes, header: str | None) -> tuple[dict[str, Any], memoryview]:
    """The JSON of a request, and the tensor behind it, which is not copied."""
    size = len(body) if header is None else int(header) if header.isdecimal() and len(header) < 12 else -1
    if not 0 <= size <= len(body):
        raise Refused(400, f"{SIZE_HEADER}: {header}", "not a size within the body", "give the bytes of its JSON")
    try:
        asked = json.loads(body[:size])
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body", "its JSON cannot be read", REMEDY) from error
    if not isinstance(asked, dict):
        raise Refused(400, "the body", "its JSON is no object", REMEDY)
    return asked, memoryview(body)[size:]


def elements(tensor: memoryview) -> Iterator[bytes]:
    """Those of a BYTES tensor: each its length in 4 bytes, the lowest first, and so many bytes."""
    place = 0
    while place < len(tensor):
        size = int.from_bytes(tensor[place : place + 4], "little")
        place += 4 + size
        if place > len(tensor):
            raise Refused(400, "image", "the tensor ends before its last element", "send it whole, as binary data")
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


def answer(asked: dict[str, Any], name: str, found: dict[str, Any]) -> Response:
    """The outputs that were asked for, all where none was, as JSON or binary."""
    wanted = asked.get("outputs") or [{"name": output} for output in found]
    parameters = asked.get("parameters")
    all_binary = isinstance(parameters, dict) and bool(parameters.get("binary_data_output"))
    outputs, tail = list[dict[str, Any]](), b""
    for output in wanted if isinstance(wanted, list) else [wanted]:
        key = output.get("name") if isinstance(output, dict) else None
        if not isinstance(output, dict) or not isinstance(key, str) or key not in found:
            raise Refused(400, str(key)[:100], "no such output", f"ask for {' or '.join(found)}")
        rows = found[key]
        is_label = isinstance(rows, list)
        said: dict[str, Any] = {"name": key, "datatype": "BYTES" if is_label else "FP32", "shape": list(np.shape(rows))}
        own = output.get("parameters")
        if own.get("binary_data", all_binary) if isinstance(own, dict) else all_binary:
            tensor = b"".join(map(element, rows)) if is_label else np.asarray(rows, "<f4").tobytes()
            said["parameters"], tail = {"binary_data_size": len(tensor)}, tail + tensor
        else:
            said["data"] = rows if is_label else np.asarray(rows, float).ravel().tolist()
        outputs.append(said)
    said = {"model_name": name, "outputs": outputs} | ({"id": str(asked["id"])} if "id" in asked else {})
    if not tail:
        return json_response(said)
    text = json.dumps(said).encode()
    headers = OURS | {SIZE_HEADER: str(len(text))}
    return Response(text + tail, headers=headers, media_type="application/octet-stream")


def element(text: str) -> bytes:
    """One of a BYTES tensor."""
    data = text.encode()
    return struct.pack("<I", len(data)) + data
