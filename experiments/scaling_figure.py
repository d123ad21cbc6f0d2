"""The figure of the study of scaling."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.scaling_points import COUNTS, Cells

CAN_DRAW = 3  # sizes of a budget, for a parabola


def figure(table: Sequence[Mapping[str, Any]]):
    """The cells of every sweep with their laws: loss by size, by data and by budget, the optimal sizes, and what the
    variations gain. Lines are power laws; where an irreducible loss is identified, a dashed line has it."""
    from matplotlib.figure import Figure

    panels = [(title, law, draw) for title, law, draw in PANELS if any(row["law"] == law for row in table)]
    drawing = Figure(figsize=(5 * max(len(panels), 1), 4.2), layout="constrained")
    for i, (title, law, draw) in enumerate(panels):
        axes, bend = drawing.add_subplot(1, len(panels), i + 1), law.replace(")", ") = E + …", 1)
        for j, row in enumerate(row for row in table if row["law"] == law):
            kind = row["tokens"], row["architecture"]
            bent = (other for other in table if (other["tokens"], other["architecture"], other["law"]) == (*kind, bend))
            draw(axes, row["cells"], f"C{j}", ", ".join(kind), next((other["cells"] for other in bent), None))
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return drawing


def _draw_law(axes, cells: Cells, color: str, label: str, bent: Cells | None) -> None:
    axes.loglog(cells.x, cells.loss, "o", color=color, markersize=4, alpha=0.6)
    axes.set_ylabel("held-out loss, nats per token")
    x = np.geomspace(min(cells.x), max(cells.x), 100)
    if cells.fit is not None:
        (variable,) = cells.fit.variables
        axes.loglog(x, cells.fit.evaluate({variable: x}), color=color, label=f"{label}: α = {_short(cells.fit)}")
        axes.set_xlabel("tokens of the training set" if variable == "D" else "N without embeddings")
    if bent is not None and bent.fit is not None and bent.fit.identified:
        (variable,) = bent.fit.variables
        label = f"{label}, E + …: α = {_short(bent.fit)}"
        axes.loglog(x, bent.fit.evaluate({variable: x}), "--", color=color, label=label)


def _short(fit) -> str:
    alpha = fit.parameters["alpha"]
    return f"{alpha.value:.3f}" if alpha.identified else "not identified"


def _draw_budgets(axes, cells: Cells, color: str, label: str, bent: Cells | None) -> None:
    for i, budget in enumerate(sorted({*cells.budget})):
        points = [(x, y) for x, y, b in zip(cells.x, cells.loss, cells.budget) if b == budget]
        x, y = np.array(sorted(points)).T
        axes.loglog(x, y, "o", color=f"C{i}", markersize=4, label=f"{budget:.2g} FLOPs")
        if len({*x}) >= CAN_DRAW:
            middle = np.log(x).mean()
            curve, grid = np.polyfit(np.log(x) - middle, np.log(y), 2), np.linspace(np.log(x[0]), np.log(x[-1]), 60)
            axes.loglog(np.exp(grid), np.exp(np.polyval(curve, grid - middle)), color=f"C{i}")
    axes.set_xlabel("N without embeddings")


def _draw_optimum(axes, cells: Cells, color: str, label: str, bent: Cells | None) -> None:
    if cells.allocation is None:
        return
    found = [point for point in cells.allocation.points if not point.reason]
    if found:
        n = np.array([(p.n.value, p.n.low, p.n.high) for p in found]).T
        error = np.maximum(np.stack([n[0] - n[1], n[2] - n[0]]), 0)
        axes.errorbar([p.budget for p in found], n[0], error, fmt="o", color=color, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
    if cells.allocation.size is not None:
        x = np.geomspace(found[0].budget, found[-1].budget, 50)
        (variable,) = cells.allocation.size.variables
        axes.plot(x, cells.allocation.size.evaluate({variable: x}), color=color)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("N_opt without embeddings")


def _draw_gains(axes, cells: Cells, color: str, label: str, bent: Cells | None) -> None:
    axes.semilogx(list(cells.best), [100 * gain for _, gain in cells.best.values()], "o-", color=color, label=label)
    axes.set_xlabel("N without embeddings")
    axes.set_ylabel("% of the loss")


PANELS = (
    ("Size: one pass over the same tokens", f"L(N), N {COUNTS[0]}", _draw_law),
    ("Data: one model, stopped early", "L(D)", _draw_law),
    ("Compute: sizes of each budget", f"N_opt(C), IsoFLOP, N {COUNTS[0]}", _draw_budgets),
    ("Compute-optimal size", f"N_opt(C), IsoFLOP, N {COUNTS[0]}", _draw_optimum),
    ("What the best rate and batch gain over the rule", f"L(N), N {COUNTS[0]}", _draw_gains),
)
