"""Prometheus' text format: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

Labels = Mapping[str, str]


def family(name: str, kind: str, text: str, samples: Iterable[tuple[Labels, float]]) -> Iterator[str]:
    """Yields the lines of a counter or a gauge."""
    yield from _head(name, kind, text)
    for labels, value in samples:
        yield _sample(name, labels, value)


def histogram(
    name: str, text: str, bounds: Sequence[float], rows: Iterable[tuple[Labels, Sequence[int], int, float]]
) -> Iterator[str]:
    """Yields the lines of a histogram. A row: labels, how many are at most each bound, how many in all, their sum."""
    yield from _head(name, "histogram", text)
    for labels, counts, total, together in rows:
        for bound, count in zip(bounds, counts, strict=True):
            yield _sample(f"{name}_bucket", {**labels, "le": f"{bound:g}"}, count)
        yield _sample(f"{name}_bucket", {**labels, "le": "+Inf"}, total)
        yield _sample(f"{name}_sum", labels, together)
        yield _sample(f"{name}_count", labels, total)


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _sample(name: str, labels: Labels, value: float) -> str:
    shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{shown}}} {value:.12g}" if shown else f"{name} {value:.12g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
