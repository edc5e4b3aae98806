"""What is said of scores, alike for an exported folder and a run."""

from typing import Any

from tokenfusion_runtime.abstain import SurestErrors, why_silent

SHARES = (0.01, 0.02, 0.05, 0.1)
"""Largest shares of wrong answers that the page offers."""


def calibration(description: dict[str, Any]) -> dict[str, Any]:
    """How scores were made true, on how many held-out images, None where that is not known, and by share of wrong
    answers why these cannot promise it, so that with it nothing is answered."""
    errors = [SurestErrors.from_dict(one) for one in description["surest_errors"]]
    reasons = {f"{share:g}": why_silent(share, errors) for share in SHARES}
    return {
        "temperature": description["temperature"],
        "held_out_images": errors[0].images if errors else None,
        "not_promised": {share: reason for share, reason in reasons.items() if reason},
    }
