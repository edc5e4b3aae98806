"""Runs that take seconds."""


def small_recipe(**changes):
    """A run of a few seconds: the digits at their own 8×8 pixels."""
    from tokenfusion.recipe import Recipe

    values = {
        "data": "digits", "model": "tokenfusion_early_micro", "img_size": (8, 8), "epochs": 2, "batch_size": 128,
        "lr": 4e-3, "hflip": 0.0, "crop_scale": 0.6, "ema": 0.9, "drop_path": 0.1,
    }  # fmt: skip
    return Recipe(**values | changes)
