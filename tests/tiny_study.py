"""A study of a tiny language model: does the learning rate matter? For tests of the runner."""

from experiments.records import spread


def runs(settings):
    return [{"optimizer.learning_rate": rate, "seed": seed} for seed in settings["seeds"] for rate in settings["rates"]]


def summarize(records):
    rates = sorted({record["overrides"]["optimizer.learning_rate"] for record in records})
    return [
        {
            "rate": rate,
            "loss": spread(
                record["metrics"]["test_loss"]
                for record in records
                if record["overrides"]["optimizer.learning_rate"] == rate
            ),
        }
        for rate in rates
    ]


def figure(table):
    from matplotlib.figure import Figure

    drawing = Figure()
    drawing.add_subplot().plot([row["rate"] for row in table], [row["loss"].mean for row in table])
    return drawing
