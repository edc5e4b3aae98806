"""A linear classifier on what two frozen parents see: on the CNN's means, the transformer's, both, and their mixture.

The mixture is what a fusion starts from: logits of all three, each weighed so that the loss on images that it was not
fitted on is smallest. A weighted sum of linear classifiers is one, so that it fits into one linear layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tokenfusion.errors import InputError
from tokenfusion.formatting import counted

CS = (3e-3, 1e-2, 3e-2)
"""Inverse strengths of the penalty that are tried, on standardised features."""
FOLDS = 5
FEW = 1e-2
"""C where some class has a single image, so that nothing can be set aside to choose it by."""
ONE_FOLD = 20_000
"""From so many images on, a fifth of them is set aside once, instead of each fifth in turn."""


POOLED = {"cnn": ("cnn",), "vit": ("vit",), "both": ("cnn", "vit")}
"""Linear classifiers of a probe, and the blocks of features that each reads: means of either parent's tokens."""
TOKENS = {"cnn_tokens": ("cnn", "cnn_tokens"), "vit_tokens": ("vit", "vit_tokens")}
"""Those that a fusion adds: every token votes too, by a weight of its own place."""
MEANS = {"mean": ("cnn", "vit"), "mean_tokens": ("cnn_tokens", "vit_tokens")}
"""Means of two parts' predictions: of the parents alone, and of each with the votes of its own tokens."""

Blocks = dict[str, np.ndarray]
"""Standardised features (N, f) by their block's name."""


@dataclass(frozen=True)
class LinearClassifier:
    """A linear classifier of some blocks of features.

    Attributes:
        weight, bias: (K, F) of the blocks in a row, and (K,).
        logits: (M, K), of images that were set aside while it was fitted; none where none could be.
        c: chosen inverse strength of the penalty.
    """

    weight: np.ndarray
    bias: np.ndarray
    logits: np.ndarray
    c: float


@dataclass(frozen=True)
class Probe:
    """What the parents know, and what a fusion starts from.

    Attributes:
        weight, bias: of the mixture: (K, f) by the block's name, and (K,).
        reads: the blocks that each part reads.
        parts: the linear classifiers.
        weights: of these in the mixture.
        temperatures: that the parts' logits are divided by before predictions are averaged.
    """

    weight: Blocks
    bias: np.ndarray
    reads: dict[str, tuple[str, ...]]
    parts: dict[str, LinearClassifier]
    weights: dict[str, float]
    temperatures: dict[str, float]

    def name_classes(self, blocks: Blocks) -> dict[str, np.ndarray]:
        """The class (N,) that each part names, means of the parents' predictions (`MEANS`), and the mixture."""
        logits = {
            name: joined(blocks, self.reads[name]) @ part.weight.T + part.bias for name, part in self.parts.items()
        }
        means = {
            mean: np.mean([softmax(logits[name] / self.temperatures[name]) for name in names], axis=0)
            for mean, names in MEANS.items()
            if logits.keys() >= set(names)
        }
        mixture = sum(blocks[name] @ weight.T for name, weight in self.weight.items()) + self.bias
        found = logits | means | {"mixture": np.asarray(mixture)}
        return {name: value.argmax(1) for name, value in found.items()}

    def judge(self, blocks: Blocks, labels: np.ndarray) -> dict[str, float]:
        """Accuracy of each part, of the mean of the parents' predictions, and of the mixture, on labels (N,)."""
        return {name: float((named == labels).mean()) for name, named in self.name_classes(blocks).items()}


def fit_probe(
    blocks: Blocks,
    reads: dict[str, tuple[str, ...]],
    labels: np.ndarray,
    say: Callable[[str], None],
    images: np.ndarray | None = None,
) -> Probe:
    """Fit the linear classifiers, C cross-validated, and mix them.

    Args:
        blocks: standardised features of the training images.
        reads: the blocks that each classifier reads: `POOLED`, or more.
        labels: int64 (N,), of which every class has one at least.
        say: told where a class has fewer images than there are folds.
        images: int64 (N,): which image each row is a view of, so that all of its views lie in one fold.
    """
    folds = choosing_folds(labels, say, np.arange(len(labels)) if images is None else images)
    aside = np.concatenate([held for _, held in folds]) if folds else np.zeros(0, dtype=np.int64)
    parts = {name: fit_linear(joined(blocks, names), labels, folds) for name, names in reads.items()}
    weights = dict(zip(parts, mixture([part.logits for part in parts.values()], labels[aside]), strict=True))
    classes = len(parts["cnn"].bias)
    weight = {name: np.zeros((classes, block.shape[1])) for name, block in blocks.items()}
    for name, part in parts.items():
        ends = np.cumsum([blocks[block].shape[1] for block in reads[name]])[:-1]
        for block, columns in zip(reads[name], np.split(part.weight, ends, axis=1), strict=True):
            weight[block] += weights[name] * columns
    bias = np.sum([weights[name] * part.bias for name, part in parts.items()], axis=0)
    temperatures = {name: 1 / mixture([part.logits], labels[aside])[0] for name, part in parts.items()}
    return Probe(weight, bias, reads, parts, weights, temperatures)


def joined(blocks: Blocks, names: tuple[str, ...]) -> np.ndarray:
    """Some blocks in a row."""
    return np.concatenate([blocks[name] for name in names], axis=1) if len(names) > 1 else blocks[names[0]]


def choosing_folds(
    labels: np.ndarray, say: Callable[[str], None], images: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit on and to set aside, as many folds as the rarest class has images, none where it has one."""
    from sklearn.model_selection import StratifiedKFold

    _, first = np.unique(images, return_index=True)
    own = labels[first]
    rarest = int(np.bincount(own)[np.unique(own)].min())
    folds = min(FOLDS, rarest)
    if folds < FOLDS:
        few = counted(rarest, "training image")
        how = f"is cross-validated in {folds} parts, not {FOLDS}" if folds > 1 else f"is not chosen (C is {FEW:g})"
        say(f"a class has {few}: the strength of the linear classifiers' penalty {how}")
    if folds < 2:
        return []
    parts = StratifiedKFold(folds, shuffle=True, random_state=0).split(own, own)
    held = [np.isin(images, images[first[part]]) for _, part in parts]
    found = [(np.flatnonzero(~part), np.flatnonzero(part)) for part in held]
    return found[:1] if len(labels) >= ONE_FOLD else found


def fit_linear(values: np.ndarray, labels: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]) -> LinearClassifier:
    """A linear classifier of the C that does best on what each fold sets aside."""
    from sklearn.metrics import log_loss

    coordinates, to_weight = turned(values)
    classes, best, chosen, logits = np.unique(labels), np.inf, FEW, np.zeros((0, int(labels.max()) + 1))
    fitted = [regressions(coordinates[fit], labels[fit], CS) for fit, _ in folds]
    for c, models in zip(CS, zip(*fitted, strict=True), strict=False):
        aside = np.concatenate([model(coordinates[held]) for model, (_, held) in zip(models, folds, strict=True)])
        loss = log_loss(np.concatenate([labels[held] for _, held in folds]), softmax(aside), labels=classes)
        if loss < best:
            best, chosen, logits = loss, c, aside
    (model,) = regressions(coordinates, labels, (chosen,))
    return LinearClassifier(to_weight(model.weight), model.bias, logits, chosen)


def turned(values: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Features (N, F) in coordinates of the space that N images span, (N, N), where they are fewer than F.

    With V Vᵀ = L Lᵀ the rows of L are those of V, turned: V = L Q, and Q = L⁻¹ V has orthonormal rows. The penalty does
    not change by a rotation: a classifier w of L is the classifier w Q = (L⁻ᵀ wᵀ)ᵀ V of V.

    Returns:
        the coordinates; and what makes weights (K, N) of them weights (K, F) of the features.
    """
    if len(values) >= values.shape[1]:
        return values, lambda weight: weight
    from scipy.linalg import solve_triangular

    root = root_of((values @ values.T).astype(np.float64))

    def to_weight(weight: np.ndarray) -> np.ndarray:
        shares = solve_triangular(root, weight.T.astype(np.float64), lower=True, trans="T", check_finite=False).T
        return np.asarray(shares.astype(values.dtype) @ values)

    return root.astype(values.dtype), to_weight


def root_of(squares: np.ndarray) -> np.ndarray:
    """L of V Vᵀ (N, N) = L Lᵀ, lower triangular; where images depend on others, of the next matrix that has one."""
    from scipy.linalg import LinAlgError, cholesky

    mean, diagonal = np.trace(squares) / len(squares), np.diag_indices_from(squares)
    for added in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        squares[diagonal] += added * mean
        try:
            return np.asarray(cholesky(squares, lower=True, check_finite=False))
        except LinAlgError:
            continue
    raise InputError("the features of the training images are not finite; train from other weights")


@dataclass(frozen=True)
class Line:
    """Logits of features: weight (K, F) and bias (K,)."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Features (N, F) to logits (N, K)."""
        return values @ self.weight.T + self.bias


def regressions(values: np.ndarray, labels: np.ndarray, cs: Sequence[float]) -> list[Line]:
    """scikit-learn's logistic regression for each C in turn, each from where the one before it ended."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        raise InputError("all training images are of one class; a classifier needs two or more")
    model, found = LogisticRegression(max_iter=200, tol=1e-3, warm_start=True), []
    for c in cs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a penalty this strong needs no exact minimum
            model.set_params(C=c).fit(values, labels)
        weight, bias = np.array(model.coef_), np.array(model.intercept_)
        if len(weight) == 1:  # scikit-learn then gives the second class's alone
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        found.append(Line(weight, bias))
    return found


def mixture(logits: list[np.ndarray], labels: np.ndarray) -> list[float]:
    """Weights of logits (M, K) whose weighted sum has the smallest loss; equal ones where nothing can be judged."""
    from scipy.optimize import minimize

    if not len(labels):
        return [1 / len(logits)] * len(logits)
    stacked = np.stack(logits)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        probabilities = softmax(np.tensordot(weights, stacked, 1))
        rows = np.arange(len(labels))
        error = probabilities.copy()
        error[rows, labels] -= 1
        value = -np.log(probabilities[rows, labels].clip(1e-12)).mean()
        return value, (stacked * error).sum((1, 2)) / len(labels)

    start = np.full(len(logits), 1 / len(logits))
    return [float(w) for w in minimize(loss, start, jac=True, bounds=[(1e-3, None)] * len(logits)).x]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (N, K)."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
