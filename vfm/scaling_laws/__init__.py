"""Scaling laws: loss as a function of parameters N, data D (tokens) and compute C (FLOPs).

  fit("power", {"N": n}, loss)       L = (N_c / N)^alpha, and the same of D and C (Kaplan et al. 2020; equations 7 to 9
                                     of the survey); "floor" adds an irreducible loss (Henighan et al. 2020)
  fit("kaplan", {"N": n, "D": d}, loss), fit("chinchilla", {"N": n, "D": d}, loss)    the joint L(N, D)
  compare                            power law against exponential, by AIC
  hold_out                           the largest cell predicted from the others
  envelope, isoflop, parametric      the three approaches of Hoffmann et al. (2022)
  compute_optimal                    N and D of a budget from the third; compute_optimal_tokens: D of an N
  save, load                         a study's laws as one JSON file, which `config.mode=plan` reads

All of them take plain arrays with one entry for each run, need NumPy and SciPy alone, give intervals, and say "not
identified" where the data do not pin a parameter (`str` of an `Estimate`; `.reason`). Input that cannot be fitted at
all (too few cells, no spread, a loss that is not positive) is a UserError.
"""

from vfm.scaling_laws.compute import (
    Allocation,
    Optimum,
    compute_optimal,
    compute_optimal_tokens,
    envelope,
    isoflop,
    parametric,
)
from vfm.scaling_laws.files import Laws, load, save
from vfm.scaling_laws.fitting import Comparison, Estimate, Fit, HoldOut, Prediction, compare, fit, hold_out
from vfm.scaling_laws.forms import FORMS

__all__ = [
    "FORMS",
    "Allocation",
    "Comparison",
    "Estimate",
    "Fit",
    "HoldOut",
    "Laws",
    "Optimum",
    "Prediction",
    "compare",
    "compute_optimal",
    "compute_optimal_tokens",
    "envelope",
    "fit",
    "hold_out",
    "isoflop",
    "load",
    "parametric",
    "save",
]
