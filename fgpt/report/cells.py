"""Figures as they stand in the tables' cells; a figure that is not known is a dash."""

from __future__ import annotations

from fgpt.report.records import Figures, Record

NONE = "-"
SAMPLES = 500
"""The published tables' times are for so many samples."""
GIB = 2**30


def number(value: float) -> str:
    """With the places that a measurement of a per mille deserves."""
    if value >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def billions(parameters: float) -> str:
    """Parameters as the published tables print them; smaller models keep one digit."""
    text = f"{parameters / 1e9:.3f}"
    return text if float(text) else f"{parameters / 1e9:.1g}"


def gigabytes(n_bytes: float) -> str:
    """2^30 bytes, as the published tables' GB."""
    return f"{n_bytes / GIB:.3f}"


def percent(fraction: float | None) -> str:
    """Of a share."""
    return NONE if fraction is None else f"{100 * fraction:.1f}%"


def times(ratio: tuple[float, float, float] | None) -> str:
    """Median, and in brackets the lowest and highest round."""
    if ratio is None:
        return NONE
    return "{:.2f} ({:.2f}-{:.2f})".format(*ratio)


def training_ms(figures: Figures) -> str:
    """For 500 samples: median (lowest-highest round)."""
    median, low, high = figures.train.ms_for(SAMPLES)
    return f"{number(median)} ({number(low)}-{number(high)})"


def prediction_ms(figures: Figures) -> str:
    """For 500 samples, median."""
    return NONE if figures.predict is None else number(figures.predict.ms_for(SAMPLES)[0])


def prediction_sps(figures: Figures) -> str:
    """Samples per second."""
    return NONE if figures.predict is None else number(figures.predict.samples_per_s)


def departure(figures: Figures) -> str:
    """Of the losses, relative to the reference's, and its bound."""
    if figures.loss_departure is None:
        return NONE
    text = f"{figures.loss_departure:.1e}"
    return text if figures.loss_bound is None else f"{text} (bound {figures.loss_bound:.0e})"


def sent(figures: Figures) -> str:
    """MB (10^6 bytes) per step and kind of group, without kinds that send nothing."""
    if figures.sent_bytes is None:
        return NONE
    kinds = [f"{kind} {n / 1e6:.3g}" for kind, n in figures.sent_bytes.items() if n]
    return ", ".join(kinds) or "nothing"


def share(figures: Figures, name: str) -> str:
    """One part of a step's time."""
    return NONE if figures.shares is None else percent(figures.shares.get(name))


def name(record: Record) -> str:
    """The rung's; one whose losses are wrong is not a faster way to the same thing."""
    return f"{record.env_name} (WRONG)" if record.state == "wrong" else record.env_name
