"""Which frequencies an embedding of the numbers 0 … p - 1 is made of."""

import numpy as np

from vfm.errors import UserError
from vfm.evaluate import Evaluation, options

OPTIONS = {"top": 5}


def check_spectrum(experiment) -> None:
    """Refuses a model without embeddings of tokens, and data without numbers modulo p."""
    config, chosen = experiment.config, options(experiment, "spectrum", OPTIONS)
    source = config.data.get("source", {})
    if "modulus" not in source or config.tokenizer.get("numbers", 0) < source["modulus"]:
        raise UserError(
            "the evaluator 'spectrum' needs config.data.source.name='modular' with a modulus, and "
            "config.tokenizer.name='symbols' with as many numbers"
        )
    if chosen["top"] < 1:
        raise UserError(f"config.eval.spectrum.top={chosen['top']} must be at least 1")


def spectrum(experiment, params, variables, split: str, limit: int | None) -> Evaluation:
    """Of the token embeddings of 0 … p - 1, over the numbers (Nanda et al. 2023, arXiv:2301.05217, section 4.1):

      spectrum_top_share     the share of their power, without the mean, that the `top` largest of the (p - 1) / 2
                             frequencies have; a model that adds on circles needs few
      spectrum_K             with the test split: the share of the power at frequency K = 1 … (p - 1) / 2

    Options in config.eval.spectrum: top.
    """
    config = experiment.config
    ids = [experiment.tokenizer.encode(str(i))[0] for i in range(config.data.source.modulus)]
    table = experiment.fetch(params["encoders_text"]["embedding"]["embedding"])[ids]
    share = power(table)
    found = {"spectrum_top_share": float(np.sort(share)[::-1][: options(experiment, "spectrum", OPTIONS)["top"]].sum())}
    if split == config.eval.test_split:
        found |= {f"spectrum_{k}": float(value) for k, value in enumerate(share, start=1)}
    return Evaluation(found, {})


def power(table: np.ndarray) -> np.ndarray:
    """float[p // 2]: the shares of the frequencies 1, 2, … in the power of float[p, D] along the first axis, without
    its mean."""
    p = len(table)
    found = np.square(np.abs(np.fft.rfft(table.astype(np.float64), axis=0))).sum(axis=1)[1:]
    if p % 2 == 0:
        found[-1] /= 2  # the others stand for their mirror image as well
    return found / max(found.sum(), 1e-300)
