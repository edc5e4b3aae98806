"""What is said of scores, alike for an exported folder and a run."""

from typing import Any


def calibration(description: dict[str, Any]) -> dict[str, Any]:
    """How scores were made true, and on how many held-out images, None where that is not known."""
    errors = description["surest_errors"]
    return {"temperature": description["temperature"], "held_out_images": errors[0]["images"] if errors else None}
