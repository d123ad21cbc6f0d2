"""Distances between items, and between sets of items: pure functions of NumPy arrays.

Items: float[n, ...], images channels last. Sets: features float[n, D], one row for each item. All is computed in double
precision.
"""

import numpy as np
from scipy import linalg, ndimage
from scipy.spatial.distance import cdist

WINDOW = 7  # side of the window of SSIM
SIGMA, TRUNCATE = 1.5, 3.5  # of its Gaussian variant, whose window has 11 pixels
LEAST_MSE = 1e-10  # below which `psnr` grows no more: 100 dB


def mse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared error of each pair of items [n, ...] -> float64[n]."""
    a, b = _pair(a, b)
    return np.square(a - b).reshape(len(a), -1).mean(axis=1)


def psnr(a: np.ndarray, b: np.ndarray, data_range: float = 1.0) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each pair of items [n, ...] -> float64[n]; at most 100 dB for equal ones.

    data_range: the largest possible difference of two values, 1 for images in [0, 1].
    """
    return -10 * np.log10(np.maximum(mse(a, b) / data_range**2, LEAST_MSE))


def ssim(a: np.ndarray, b: np.ndarray, data_range: float = 1.0, gaussian: bool = False) -> np.ndarray:
    """Structural similarity of each pair of images [n, H, W, C] -> float64[n], mean over places and channels.

    Windows of 7×7 pixels, of equal weights and with the sample covariance; gaussian: the weights of Wang et al. 2004
    (section III.B: σ 1.5, 11×11 pixels, no correction of the covariance). Only windows that lie in the image count; a
    side that is shorter than the window raises ValueError.
    """
    a, b = _pair(a, b)
    side = 2 * int(TRUNCATE * SIGMA + 0.5) + 1 if gaussian else WINDOW
    if a.ndim != 4 or min(a.shape[1:3]) < side:
        raise ValueError(f"SSIM takes images [n, H, W, C] of at least {side}×{side} pixels, not {a.shape}")

    def local(x):
        """Weighted means of the windows that lie in the image."""
        for axis in (1, 2):
            if gaussian:
                x = ndimage.gaussian_filter1d(x, SIGMA, axis, truncate=TRUNCATE)
            else:
                x = ndimage.uniform_filter1d(x, side, axis)
        edge = side // 2
        return x[:, edge : x.shape[1] - edge, edge : x.shape[2] - edge]

    correction = 1.0 if gaussian else side**2 / (side**2 - 1)
    mean_a, mean_b = local(a), local(b)
    var_a = correction * (local(a * a) - mean_a * mean_a)
    var_b = correction * (local(b * b) - mean_b * mean_b)
    covariance = correction * (local(a * b) - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    value = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    value /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return value.reshape(len(a), -1).mean(axis=1)


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians with the moments of two sets [n, D], [m, D] (FID, Heusel et al. 2017).

    |μx - μy|² + tr(Cx + Cy - 2 (Cx Cy)^½). The trace of the root is the sum of the singular values of Cx^½ Cy^½, which
    has no error of its own where there are fewer items than features, as the root of a singular matrix has. It is
    biased upwards for small sets: compare only distances of equally many items.
    """
    x, y = _sets(x, y)
    shift = x.mean(axis=0) - y.mean(axis=0)
    cov_x, cov_y = (np.atleast_2d(np.cov(z, rowvar=False)) for z in (x, y))
    cross = linalg.svdvals(_root(cov_x) @ _root(cov_y).T).sum()
    return float(max(shift @ shift + np.trace(cov_x) + np.trace(cov_y) - 2 * cross, 0.0))


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of two sets with the kernel (x·y / D + 1)³ (KID, Bińkowski et al. 2018,
    section 4). It may be below 0."""
    x, y = _sets(x, y)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    within = 0.0
    for z in (x, y):
        k = kernel(z, z)
        within += (k.sum() - np.trace(k)) / (len(z) * (len(z) - 1))
    return float(within - 2 * kernel(x, y).mean())


def inception_score(probabilities: np.ndarray) -> float:
    """exp of the mean of KL(p(class | item) || p(class)), 1 to the number of classes: float[n, classes] of a classifier
    (Salimans et al. 2016, section 4)."""
    p = np.asarray(probabilities, np.float64)
    marginal = p.mean(axis=0, keepdims=True)
    terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(marginal, 1e-300))), 0.0)
    return float(np.exp(terms.sum(axis=1).mean()))


def manifold_scores(real: np.ndarray, generated: np.ndarray, k: int = 3) -> dict[str, float]:
    """How two sets [n, D], [m, D] cover each other; around every item of a set is a ball that reaches to its k-th
    nearest neighbour in its set.

      precision  the share of generated items in the ball of a real one; recall: of real items in the ball of a
                 generated one (Kynkäänniemi et al. 2019, eqs. 1 to 3)
      density    the number of real balls that hold a generated item, mean, over k; coverage: the share of real items
                 whose ball holds a generated one (Naeem et al. 2020, eqs. 3 and 4), which are less moved by outliers

    Raises ValueError for sets that have no k-th neighbour.
    """
    real, generated = _sets(real, generated)
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"k={k} neighbours need more than {k} items in both sets, not {len(real)}, {len(generated)}")
    radius = [np.partition(cdist(z, z), k, axis=1)[:, k] for z in (real, generated)]  # the nearest of all is itself
    distance = cdist(real, generated)
    in_real, in_generated = distance <= radius[0][:, None], distance <= radius[1][None]
    return {
        "precision": float(in_real.any(axis=0).mean()),
        "recall": float(in_generated.any(axis=1).mean()),
        "density": float(in_real.sum(axis=0).mean() / k),
        "coverage": float(in_real.any(axis=1).mean()),
    }


def spread(x: np.ndarray, labels: np.ndarray) -> float:
    """Mean Euclidean distance of two different rows of one class: features [n, D], labels int[n]; 0 without any."""
    total, count = 0.0, 0
    for label in np.unique(labels):
        rows = np.asarray(x, np.float64)[labels == label]
        total, count = total + cdist(rows, rows).sum(), count + len(rows) * (len(rows) - 1)
    return float(total / max(count, 1))


def _pair(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not len(a):
        raise ValueError(f"two arrays of items of one shape are needed, not {a.shape} and {b.shape}")
    return a, b


def _sets(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"two sets [n, D], [m, D] of at least 2 items are needed, not {x.shape} and {y.shape}")
    return x, y


def _root(covariance: np.ndarray) -> np.ndarray:
    """A with Aᵀ A = covariance."""
    values, vectors = linalg.eigh(covariance)
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
