"""The same exported classifier behind LitServe, as its manual has it, for `serve.py` to measure beside ours.

    python benchmarks/serve_peer.py EXPORT PORT BATCH CLASSES

Runs in an environment of its own that holds litserve, and finds the runtime by PYTHONPATH. An image is base64 in JSON,
which is LitServe's way: it hands JSON, or forms, to what decodes.
"""

import base64
import sys
from typing import Any

import litserve  # type: ignore[import-not-found]
import numpy as np

import tokenfusion_runtime


class Classify(litserve.LitAPI):  # type: ignore[misc]
    """Decodes an image a request, and classifies those of a batch together."""

    def setup(self, _device: str) -> None:
        self.classifier = tokenfusion_runtime.load(sys.argv[1], threads=2)
        self.to_answer = self.classifier.answers(int(sys.argv[4]))

    def decode_request(self, request: dict[str, str]) -> Any:
        return self.classifier.prepare(base64.b64decode(request["image"]))[1]

    def batch(self, inputs: list[Any]) -> Any:
        return np.stack(inputs)

    def predict(self, x: Any) -> Any:
        return self.classifier.probabilities(x)

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def encode_response(self, output: Any) -> Any:
        return self.to_answer.prediction("", output).to_dict()


if __name__ == "__main__":
    api = Classify(max_batch_size=int(sys.argv[3]), batch_timeout=0.01)
    litserve.LitServer(api, accelerator="cpu", timeout=300).run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning"
    )
