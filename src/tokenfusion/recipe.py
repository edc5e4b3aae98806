"""Recipe: everything that decides a run, as one frozen value that is written to and read from TOML."""

import dataclasses
import math
import os
import tomllib
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from tokenfusion.errors import InputError
from tokenfusion.recipe_fields import MAX_SIDE, RANGES, named_fields, no_field, of_their_types, require_value_range

Auto = Literal["auto"]
"""In place of a number that is chosen by measuring, or that only training finds."""
Depth = Literal["probe", "fusion", "all"]
DEPTHS: tuple[Depth, ...] = get_args(Depth)
"""How deep a model that starts from trained parents may be trained, each from the one before it on."""
Number = TypeVar("Number", int, float)


@named_fields
@dataclass(frozen=True, kw_only=True)
class Reading:
    """How data is understood where it does not say so itself: the fields of a recipe that say so, for other verbs."""

    root: str = ""
    """Folder that the paths in a list start at; the list's own when not given."""
    encoding: str = ""
    """Encoding of a list that is in no UTF, such as cp1252, mac_roman or gb18030; guessed, and printed, by default."""
    path_column: str = ""
    """Column of a list that names the image files, where its name is none of the usual ones."""
    label_column: str = ""
    """Column of a list or of Parquet that holds the labels, where its name is none of the usual ones."""
    image_column: str = ""
    """Column of Parquet that holds the images, where several might."""
    group_by: str = ""
    """Regular expression that finds a group in each image's name, by its first (...): images of a group, such as one
    patient's, stay on one side of the split."""
    rare_classes: Literal["refuse", "train", "drop"] = "refuse"
    """Classes with a single image, of which none can be held out: refuse the data, train on them all the same, or drop
    them, which names them."""
    value_range: tuple[float, ...] = ()
    """Lowest and highest value, black and white, of images of more than 8 bits; found in training images by default."""

    def __post_init__(self) -> None:
        if self.value_range:
            require_value_range(self.value_range)


@named_fields
@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how. Every field is an option of `tokenfusion train`."""

    data: str = ""
    """Images: a folder with a subfolder per class, Parquet files, a CSV or JSONL, a tar, shards, or `digits`."""
    _: KW_ONLY
    root: str = ""
    """Folder that the paths in a list start at; the list's own when not given."""
    encoding: str = ""
    """Encoding of a list that is in no UTF, such as cp1252, mac_roman or gb18030; guessed, and printed, by default."""
    path_column: str = ""
    """Column of a list that names the image files, where its name is none of the usual ones."""
    label_column: str = ""
    """Column of a list or of Parquet that holds the labels, where its name is none of the usual ones."""
    image_column: str = ""
    """Column of Parquet that holds the images, where several might."""
    group_by: str = ""
    """Regular expression that finds a group in each image's name, by its first (...): images of a group, such as one
    patient's, stay on one side of the split."""
    value_range: tuple[float, ...] = ()
    """Lowest and highest value, black and white, of images of more than 8 bits; found in training images by default."""

    model: str = "tokenfusion_early_tiny"
    """Name of the model; `tokenfusion models` lists them."""
    warm_start_from: tuple[str, ...] = ()
    """Two finished runs that a model fuse(CNN,VIT) starts from, the CNN's first: as the transformer, gates closed."""
    pretrained: tuple[str, ...] = ()
    """Weights that the model begins with: hub for timm's, or a .safetensors or .pth file of them; of fuse(CNN,VIT) two
    files, the CNN's first."""
    freeze: Literal["none", "cnn", "vit", "both"] = "none"
    """Parents of a fusion model whose weights stay as they are; what fuses and the head still learn."""

    tune: Literal["", Depth, "auto"] = ""
    """How deep fuse(CNN,VIT,probe) of trained parents learns: probe fits a linear classifier on what both see, fusion
    goes on from it with their tokens, all from there with every weight; auto goes as deep as tune_minutes allow."""
    tune_minutes: float = 10.0
    """Minutes that tune=auto may take by its own estimate, from a few steps that are measured first."""
    views: int = 1
    """How often frozen parents look at each training image: once as it is, then augmented, each time anew."""

    epochs: int | Auto = 30
    """Passes over the training images; auto goes on until held-out accuracy stops improving, then lets lr fall to 0."""
    batch_size: int | Auto = 0
    """Images per optimiser step, accumulation included; 0 takes 128, or fewer for 20 steps an epoch, but 8 at least;
    auto the largest that fits into memory."""
    accumulate: int = 1
    """Parts that a batch is computed in, to save memory; BatchNorm sees a part at a time."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Muon for matrices and kernels, AdamW for the rest: learns faster from random weights; or AdamW for everything."""
    lr: float | Auto = 2e-3
    """Peak learning rate; one value suits both optimisers; auto chooses it by a range test."""
    min_lr: float = 0.0
    """Learning rate at the end of training, to which it falls from its peak."""
    backbone_lr: float = 1.0
    """Learning rate of a fusion model's parents, or of all but the classifier of any other model, in units of lr."""
    head_lr: float = 1.0
    """Learning rate of the classifier, in units of lr."""
    layer_decay: float = 1.0
    """Learning rate of a backbone's layer, in units of that of the layer behind it, nearer to the classifier."""
    fix_batchnorm: bool = False
    """Leave BatchNorm's means and variances as they are, as those of pretrained weights; its scales still learn."""
    warmup_epochs: float = 1.0
    """Epochs over which the learning rate rises from 0 to its peak; then it falls along a cosine to min_lr."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices and kernels; none on biases, norms and gates."""
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    ema: float = 0.0
    """Decay of the exponential moving average of weights that is evaluated and shipped; 0 for none."""
    patience: int = 0
    """Epochs without a better held-out accuracy (or mAP) before training stops and keeps the best epoch; 0 trains to
    the end, or with --epochs auto waits for 10."""

    img_size: tuple[int, ...] = ()
    """Height and width that images are resized to, or one number for both; the model's own when not given."""
    in_chans: Literal[1, 3] = 3
    """Channels: 3 for colour, 1 for grayscale."""
    crop_scale: float = 0.35
    """Smallest share of an image's area that a random-resized crop keeps; 1 for no crop."""
    eval_crop: float = 0.0
    """Share of an image's sides that evaluation keeps; 0 follows crop_scale, for objects as large as in training."""
    crop_padding: int = 0
    """Pixels by which a crop may reach over an image's edge, where the image is mirrored; 4 is usual for 32×32."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    trivial_augment: bool = False
    """TrivialAugment: one random colour or geometric change per image."""
    rand_augment: float = 0.0
    """RandAugment's magnitude of 10, 9 in the papers' recipes; 0 for none: two changes, each made half of the time."""
    color_jitter: float = 0.0
    """How far brightness, contrast and saturation are changed at random, 0.4 for 40 % either way; 0 for none."""
    random_erasing: float = 0.0
    """Probability that noise takes the place of a rectangle of an image."""
    repeats: int = 1
    """How often a batch has each of its images, each time augmented anew (repeated augmentation); an epoch stays as
    long, and so draws that much fewer images."""
    mixup: float = 0.0
    """Mixup's alpha; 0 for none."""
    cutmix: float = 0.0
    """CutMix's alpha; 0 for none. With both, each batch draws one of the two."""
    mix_prob: float = 1.0
    """Share of the batches that are mixed."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes; of multi-label data, over a label's two values."""
    balance: Literal["none", "sampling", "loss"] = "none"
    """For classes of unequal size: sampling draws them evenly, loss weighs them by their inverse frequency."""
    drop_path: float = 0.0
    """Largest rate of stochastic depth."""

    branch_dropout: float = 0.0
    """Share of the images that a fusion model sees without its patches or without its pixels while it trains, so that
    either side learns to answer alone."""
    side_loss: float = 0.0
    """Weight of a loss of each side of a fusion model alone, beside that of both, at the start; it falls to 0 while the
    model trains."""

    seed: int = 0
    """Decides weights, split, order, augmentation and dropout."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the matrix products; auto takes bf16 where the hardware has it."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What several processes share: ddp the batch alone, fsdp weights and optimiser state too."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the training step (torch.compile), which takes a minute or more before the first one and needs a C++
    compiler; a run is compiled throughout or not at all."""
    workers: int = 0
    """Processes that augment images; 0 does it between steps. The result does not depend on it."""
    exclude: str = ""
    """CSV whose column path names images to leave out, such as the quarantine.csv that `tokenfusion check` writes."""
    rare_classes: Literal["refuse", "train", "drop"] = "refuse"
    """Classes with a single image, of which none can be held out: refuse the data, train on them all the same, or drop
    them, which names them."""
    val_fraction: float = 0.2
    """Share of each class's images that is held out, to judge by, where the data does not say which are."""
    max_skipped: float = 0.01
    """Largest share of unreadable training images that is put up with; a few are in any case, unless it is 0."""
    max_pixels: int = 100_000_000
    """Largest image, in pixels, that is decoded at all."""
    cache_mb: int = 4096
    """Largest part (training, held-out) that is kept in memory decoded; a larger one is decoded anew each epoch."""
    save_minutes: float = 5.0
    """Minutes between checkpoints inside an epoch; there is one after every epoch."""
    every: int = 0
    """Epochs between looks at attention collapse, on 32 held-out images (see `analyze collapse`); 0 for none."""
    loggers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Where else to log: wandb (Weights & Biases), mlflow; TensorBoard's events and CSV are always written."""

    @property
    def crop_pct(self) -> float:
        """Share of an image's sides that evaluation keeps.

        Unless `eval_crop` says it, objects look as large as in an average training crop, whose area is midway between
        `crop_scale` and 1 (FixRes, arXiv 1906.06423).
        """
        return self.eval_crop or math.sqrt((self.crop_scale + 1) / 2)

    @property
    def augments(self) -> bool:
        """Whether a training image may look different each time."""
        changes = (self.hflip, self.crop_padding, self.trivial_augment, self.rand_augment, self.color_jitter)
        return self.crop_scale < 1 or any(changes) or self.random_erasing > 0

    @property
    def reading(self) -> Reading:
        """How the data is understood."""
        return Reading(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Reading)})

    @property
    def autos(self) -> tuple[str, ...]:
        """Names of the fields that are left to be chosen by measuring."""
        return tuple(name for name in AUTO_FIELDS if getattr(self, name) == "auto")

    def batch_size_for(self, images: int, processes: int = 1) -> int:
        """Images per optimiser step when so many are trained on, by so many processes together."""
        if self.batch_size:
            return number(self.batch_size)
        size = 2 ** int(math.log2(min(max(images / 20, 8), 128)))
        parts = self.accumulate * processes
        return size // parts * parts or parts

    def may_skip(self, images: int) -> int:
        """How many of so many training images may be unreadable."""
        return max(FEW_SKIPPED, int(self.max_skipped * images)) if self.max_skipped else 0

    def __post_init__(self) -> None:
        for name, value in typed({name: getattr(self, name) for name in FIELDS}).items():
            object.__setattr__(self, name, value)
        if len(self.img_size) == 1:
            object.__setattr__(self, "img_size", self.img_size * 2)
        if self.pretrained != (HUB,):
            object.__setattr__(self, "pretrained", tuple(map(os.path.abspath, self.pretrained)))
        runs = tuple(map(os.path.abspath, self.warm_start_from))  # so that the run can be resumed from anywhere
        object.__setattr__(self, "warm_start_from", runs)
        for name in ("exclude", "root"):
            object.__setattr__(self, name, getattr(self, name) and os.path.abspath(getattr(self, name)))
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value != "auto" and not low <= value <= high:
                auto = ", or auto" * (name in AUTO_FIELDS)
                raise InputError(f"{name}={value} is out of range; give a value from {low:g} to {high:g}{auto}")
        if self.value_range:
            require_value_range(self.value_range)
        if self.trivial_augment and self.rand_augment:
            raise InputError(
                f"trivial_augment and rand_augment={self.rand_augment:g} both change an image; give one of them"
            )
        if self.compile and self.grad_checkpointing:
            raise InputError(
                "compile=True and grad_checkpointing=True both decide what the backward pass computes again; give one"
            )
        if self.compile and self.tune:
            raise InputError(
                f"compile=True with tune={self.tune} would compile each of its short stages anew; leave out --compile"
            )
        if self.lr != "auto" and self.min_lr > self.lr:
            raise InputError(f"min_lr={self.min_lr:g} is above lr={self.lr:g}, from which it is reached; give less")
        if len(runs) not in (0, 2):
            raise InputError(
                f"warm_start_from={runs} is no pair of run folders; give the CNN's and then the transformer's"
            )
        if len(self.pretrained) > 2 or (len(self.pretrained) == 2 and HUB in map(os.path.basename, self.pretrained)):
            raise InputError(
                f"pretrained={' '.join(self.pretrained)} is neither hub alone nor one file or two; give "
                "--pretrained hub, or FILE, or of a pair CNN_FILE VIT_FILE"
            )
        if self.pretrained and runs:
            raise InputError("pretrained and warm_start_from both say what the model begins with; give one of them")
        if len(self.img_size) > 2:
            raise InputError(
                f"img_size={self.img_size} is not a size; give a height and a width, or one number for both"
            )
        if any(side < 1 for side in self.img_size):
            nearest = tuple(max(side, 1) for side in self.img_size)
            raise InputError(f"img_size={self.img_size} has no pixels; the nearest that works is {nearest}")
        if any(side > MAX_SIDE for side in self.img_size):
            raise InputError(f"img_size={self.img_size} is too large; give sides up to {MAX_SIDE}")
        if self.batch_size != "auto" and self.batch_size % self.accumulate:
            raise InputError(
                f"batch_size={self.batch_size} does not divide into accumulate={self.accumulate} equal parts; "
                f"try batch_size={self.batch_size // self.accumulate * self.accumulate or self.accumulate}"
            )


HUB = "hub"
FEW_SKIPPED = 3
"""Unreadable training images that end no run, however few images there are."""
FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))
AUTO_FIELDS = ("epochs", "batch_size", "lr")
"""Fields that may be "auto"."""
NO_LONGER_KNOWN = {"on_bad_loss": "stop", "max_bad_steps": 10}
"""Fields that recipes had once, and the values that mean what is done now."""


def number(value: Number | Auto) -> Number:
    """A field that may be "auto", once it is a number."""
    assert not isinstance(value, str)
    return value


def typed(values: dict[str, Any]) -> dict[str, Any]:
    """Fields with values of their types, or an InputError."""
    return of_their_types(values, get_type_hints(Recipe), AUTO_FIELDS)


def load_recipe(path: Path) -> dict[str, Any]:
    """Read the fields that a TOML file sets.

    Raises:
        InputError: the file is missing, is not TOML, or has a field that Recipe lacks or a value of another type.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"recipe {path}: {reason}; give a readable TOML file") from error
    for name, harmless in NO_LONGER_KNOWN.items():
        if (value := values.pop(name, harmless)) != harmless:
            raise InputError(
                f"recipe {path}: {name}={value!r} is no longer known: a loss that is not finite stops the run; remove "
                "the line"
            )
    for name in values:
        if name not in FIELDS:
            raise InputError(f"recipe {path}: {no_field(name, FIELDS)}")
    try:
        return typed(values)
    except InputError as error:
        raise InputError(f"recipe {path}: {error}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML, every field stated."""
    import tomli_w

    values = dataclasses.asdict(recipe)
    return tomli_w.dumps({name: list(v) if isinstance(v, tuple) else v for name, v in values.items()})
