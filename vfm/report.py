"""The report of a run: one self-contained HTML file, its figures as PNG files, and the JSON files beside
it."""

import base64
import html
import io
import json
import math
import re
import textwrap
import warnings
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vfm.errors import UserError
from vfm.train.logging import read_history, write_atomic

# Matplotlib is imported where it draws: it takes a second, and runs without a report do not need it. Figures
# are made with its object interface; pyplot would keep them alive and choose a backend for the whole process.

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2129; background: #fff; max-width: 62rem;
       margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p { white-space: pre-line; } figure { margin: 1.6rem 0; } figure > img { max-width: 100%; height: auto; }
figcaption { color: #5a6270; font-size: .9rem; margin: .4rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #dfe3e8; text-align: left; vertical-align: middle; }
th { border-bottom: 2px solid #9aa3af; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td img { display: block; height: 6rem; width: auto; image-rendering: pixelated; } td audio { width: 11rem; }
td.text { white-space: pre-wrap; min-width: 5rem; max-width: 24rem; }
"""


class Report:
    """Collects text, tables, figures and sample outputs, and writes them as `report.html` and
    `figures/*.png`.

    The HTML holds its images and sounds itself, loads nothing, and runs no script. All text is escaped.
    """

    def __init__(self, title: str):
        self._title = title
        self._parts: list[str] = []
        self._figures: dict[str, bytes] = {}

    def section(self, title: str) -> None:
        """A heading."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")

    def text(self, text: str) -> None:
        """Plain text. Blank lines separate paragraphs."""
        paragraphs = (p for p in re.split(r"\n\s*\n", text.strip()) if p)
        self._parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs]

    def table(self, header: Sequence, rows: Sequence[Sequence], caption: str = "") -> None:
        """A table. Numbers are set to the right; floats are shown with four digits."""
        body = []
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"table {caption!r}: a row of {len(row)} cells under {len(header)} headings")
            body.append("".join(_table_cell(cell) for cell in row))
        self._parts.append(_figure(_html_table(header, body), caption))

    def figure(self, name: str, figure, caption: str = "") -> None:
        """A matplotlib figure; also written as figures/<name>.png. It is drawn now and not kept."""
        self._parts.append(_figure(_image(self._keep(name, figure), caption), caption))

    def samples(
        self, name: str, rows: Sequence[Sequence[tuple]], caption: str = "", header: Sequence[str] = ()
    ) -> None:
        """Inputs beside outputs: one row per example; also written as figures/<name>.png.

        Args:
          rows: lists of cells. A cell is ("text", str), ("image", float[H, W] or float[H, W, C] in [0, 1], C
            1 or 3) or ("audio", float[samples] in [-1, 1], sample rate in Hz). Images are clipped to [0, 1];
            a louder sound is scaled down. Sounds are drawn as a spectrogram and can be played.
          header: a name per column, if wanted.

        Raises ValueError for another kind of cell, another shape, and values that are not finite.
        """
        for row in rows:
            if header and len(row) != len(header):
                raise ValueError(f"samples {name!r}: a row of {len(row)} cells under {len(header)} headings")
        drawn = [[_draw(cell, name) for cell in row] for row in rows]
        body = ["".join(map(_sample_cell, row, pixels)) for row, pixels in zip(rows, drawn)]
        self._keep(name, _sheet(rows, drawn, header))
        self._parts.append(_figure(_html_table(header, body), caption))

    def write(self, workdir, name: str = "report.html") -> Path:
        """Writes figures/*.png, then the page; each file atomically. Returns the path of the page.

        Raises UserError when the workdir cannot be written or the disk is full.
        """
        folder = Path(workdir) / "figures"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
        for figure, png in self._figures.items():
            write_atomic(folder / f"{figure}.png", png)
        title = html.escape(self._title)
        parts = "\n".join(self._parts)
        page = (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{parts}\n"
            "</body>\n</html>\n"
        )
        path = Path(workdir) / name
        write_atomic(path, page.encode())
        return path

    def _keep(self, name: str, figure) -> bytes:
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"figure name {name!r}: use letters, digits, '_' and '-', since it names a file")
        if name in self._figures:
            raise ValueError(f"there is a figure {name!r} already")
        file = io.BytesIO()
        with warnings.catch_warnings():
            # Generated text may hold any character; the font draws a box for those that it lacks.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(file, format="png", dpi=150, facecolor="white", bbox_inches="tight")
        self._figures[name] = file.getvalue()
        return self._figures[name]


def curves(history_path):
    """A matplotlib figure of every loss in a metrics.jsonl against the step: one panel per name, one line per
    split.

    Raises UserError when the file cannot be read or holds no loss.
    """
    from matplotlib.figure import Figure

    series: dict[str, dict[str, list]] = {}
    for record in read_history(history_path):
        for name, value in record.items():
            if "loss" in name and isinstance(value, int | float):
                line = series.setdefault(name, {}).setdefault(record.get("split", "train"), [])
                line.append((record["step"], value))
    if not series:
        raise UserError(f"{history_path} holds no loss to draw")
    names = sorted(series, key=lambda name: (name != "loss", name))
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(4 * columns, 6), 3.2 * rows), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        for split, line in sorted(series[name].items()):
            style = {"linewidth": 1.0} if split == "train" else {"marker": "o", "markersize": 3.5}
            axes.plot(*zip(*line), label=split, **style)
        values = [value for line in series[name].values() for _, value in line]
        if min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def write_json(path, obj) -> None:
    """Writes obj as JSON, atomically: for config.json and results.json.

    Takes mappings (also ConfigDict), sequences, strings, numbers, booleans, None, NumPy and JAX arrays and
    scalars.
    Raises UserError that names the key of a number that is not finite, and when the file cannot be written;
    TypeError that names the key of anything else.
    """
    text = json.dumps(_plain(obj, "", Path(path).name), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def _plain(obj, key: str, file: str):
    if isinstance(obj, Mapping) or hasattr(obj, "to_dict"):
        return {str(name): _plain(obj[name], f"{key}.{name}".lstrip("."), file) for name in obj}
    if hasattr(obj, "tolist"):  # NumPy and JAX
        obj = np.asarray(obj).tolist()
    if isinstance(obj, tuple | list):
        return [_plain(value, f"{key}[{i}]", file) for i, value in enumerate(obj)]
    if isinstance(obj, float) and not math.isfinite(obj):
        raise UserError(f"{file}: {key or 'the value'} is {obj}, and JSON has finite numbers only")
    if obj is None or isinstance(obj, str | bool | int | float):
        return obj
    raise TypeError(f"{file}: {key or 'the value'} is a {type(obj).__name__}, which JSON cannot hold")


# HTML.


def _figure(content: str, caption: str) -> str:
    caption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{content}{caption}</figure>"


def _html_table(header: Sequence, body: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    rows = "\n".join(f"<tr>{row}</tr>" for row in body)
    return f'<div class="scroll"><table>{head}<tbody>\n{rows}\n</tbody></table></div>'


def _table_cell(cell) -> str:
    if hasattr(cell, "item"):
        cell = cell.item()
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return f"<td>{html.escape(str(cell))}</td>"
    return f'<td class="number">{f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}"}</td>'


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(description)}">'


def _sample_cell(cell: tuple, pixels) -> str:
    if cell[0] == "text":
        return f'<td class="text">{html.escape(_printable(cell[1]))}</td>'
    image = _image(_png(pixels), cell[0])
    if cell[0] == "image":
        return f"<td>{image}</td>"
    data = base64.b64encode(_wav(*cell[1:])).decode()
    return f'<td>{image}<audio controls src="data:audio/wav;base64,{data}"></audio></td>'


# Samples.


def _draw(cell: tuple, name: str):
    """The pixels float[H, W, 3] in [0, 1] of a cell; None for text."""
    kind, value = cell[0], cell[1]
    if kind == "text":
        return None
    if kind not in ("image", "audio"):
        raise ValueError(f"samples {name!r}: unknown kind of cell {kind!r}; known: audio, image, text")
    array = np.asarray(value, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"samples {name!r}: the {kind} holds numbers that are not finite")
    if kind == "audio":
        if array.ndim != 1:
            raise ValueError(f"samples {name!r}: audio must be float[samples], not {array.shape}")
        return _spectrogram(array, cell[2])
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise ValueError(f"samples {name!r}: an image must be [H, W] or [H, W, 1 or 3], not {array.shape}")
    return np.broadcast_to(np.clip(array, 0, 1), (*array.shape[:2], 3))


def _spectrogram(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Pixels of the power spectrum in dB (range 80 dB; Hann windows of 25 ms, every 10 ms), low frequencies
    at the bottom."""
    import matplotlib

    window, hop = max(round(0.025 * sample_rate), 2), max(round(0.01 * sample_rate), 1)
    audio = np.pad(audio, (0, max(window - len(audio), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(audio, window)[::hop] * np.hanning(window)
    power = np.abs(np.fft.rfft(frames, n=max(window, 256))) ** 2
    decibels = 10 * np.log10(np.maximum(power, 1e-10))
    level = np.clip((decibels - decibels.max()) / 80 + 1, 0, 1)
    return matplotlib.colormaps["magma"](level.T[::-1])[..., :3]


def _png(pixels: np.ndarray) -> bytes:
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, np.ascontiguousarray(pixels), format="png")
    return file.getvalue()


def _wav(audio, sample_rate: int) -> bytes:
    """16-bit mono WAV."""
    audio = np.asarray(audio, np.float32)
    audio = audio / max(1.0, float(np.abs(audio).max(initial=0.0)))
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(int(sample_rate))
        sound.writeframes(np.round(audio * 32767).astype("<i2").tobytes())
    return file.getvalue()


def _printable(text: str) -> str:
    """Control characters, which a page cannot show, as the replacement character."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _sheet(rows, drawn, header):
    """All samples on one figure."""
    from matplotlib.figure import Figure

    columns = max([len(row) for row in rows] + [len(header), 1])
    figure = Figure(figsize=(1.7 * columns, 1.5 * max(len(rows), 1) + 0.3), layout="constrained")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            axes = figure.add_subplot(len(rows), columns, i * columns + j + 1)
            axes.set_axis_off()
            if i == 0 and header:
                axes.set_title(header[j], fontsize=9)
            if cell[0] == "text":
                lines = [part for line in _printable(cell[1]).split("\n") for part in textwrap.wrap(line, 22) or [""]]
                text = "\n".join(lines[:7]) + ("\n…" if len(lines) > 7 else "")
                # A lone dollar sign must not start a formula.
                axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, parse_math=False)
            else:
                aspect = "equal" if cell[0] == "image" else "auto"
                axes.imshow(drawn[i][j], interpolation="nearest", aspect=aspect)
                axes.set_anchor("N")
    return figure
