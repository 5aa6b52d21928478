"""Rankings and searches for people and for other programs: tables, CSV, JSON, scatter plots."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from diswot.ranking import Agreement, Ranking
from visionkernels.extras import require
from visionkernels.files import finite_or_none, replace_file

if TYPE_CHECKING:
    from diswot.searching import SearchResult

__all__ = ["agreement_table", "order_table", "ranking_json", "shortlist_table", "write_csv", "write_scatter"]


def agreement_table(agreements: Sequence[Agreement]) -> str:
    """Return a GitHub table, a row an order."""
    headers = ("order", "Kendall", "95 % interval", "given params", "Spearman", "Pearson", "seconds")
    rows = [
        (row.proxy, _figure(row.kendall), f"{_figure(row.kendall_low)} to {_figure(row.kendall_high)}",
         _figure(row.kendall_given_params), _figure(row.spearman), _figure(row.pearson), f"{row.seconds:.1f}")
        for row in agreements
    ]  # fmt: skip
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def order_table(ranking: Ranking, most: int = 20) -> str:
    """Return a GitHub table of the best networks by the first order, with their scores in all."""
    first = next(iter(ranking.scores))
    place = {key: i for i, key in enumerate(ranking.keys)}
    rows = [
        [key, *(f"{values[place[key]]:.6g}" for values in ranking.scores.values())]
        for key in ranking.order(first)[:most]
    ]
    return tabulate(rows, ["network", *ranking.scores], tablefmt="github", disable_numparse=True)


def shortlist_table(result: "SearchResult", most: int = 10) -> str:
    """Return a GitHub table of the best students."""
    terms = list(result.best.terms)
    headers = ["student", "score", "±", *terms, "seeds", "params", "MACs"]
    rows = [
        [
            candidate.key,
            f"{candidate.score:.6g}",
            _figure(candidate.stderr, ".2g"),
            *(f"{candidate.terms[term]:.6g}" for term in terms),
            str(candidate.seeds),
            f"{candidate.params:,}",
            f"{candidate.macs / 1e6:.2f} M",
        ]
        for candidate in result.candidates[:most]
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def ranking_json(ranking: Ranking, agreements: Sequence[Agreement]) -> dict[str, Any]:
    """Return scores by network and the agreements as plain data; what is not finite is null."""
    scores = [
        {"key": key, **{proxy: values[i] for proxy, values in ranking.scores.items()}}
        for i, key in enumerate(ranking.keys)
    ]
    report: dict[str, Any] = finite_or_none({"rows": [asdict(row) for row in agreements], "scores": scores})
    return report


def write_csv(path: Path, ranking: Ranking, truth: Mapping[str, float], *, overwrite: bool = False) -> None:
    """Write a line a network: key, true accuracy where it is known, and all scores."""
    with (
        replace_file(path, overwrite=overwrite) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["key", "accuracy", *ranking.scores])
        for i, key in enumerate(ranking.keys):
            writer.writerow([key, truth.get(key, ""), *(values[i] for values in ranking.scores.values())])


def write_scatter(path: Path, ranking: Ranking, truth: Mapping[str, float], *, overwrite: bool = False) -> None:
    """Draw each order's scores against the true accuracies, in the format of the path's suffix."""
    pyplot = require("matplotlib.pyplot", "diswot[plots]")
    columns = min(4, len(ranking.scores))
    rows = -(-len(ranking.scores) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.2 * columns, 2.9 * rows), squeeze=False, layout="constrained"
    )
    true = [truth[key] for key in ranking.keys]
    agreements = {row.proxy: row for row in ranking.agreements(truth)}
    for axis, (proxy, values) in zip(axes.flat, ranking.scores.items(), strict=False):
        axis.scatter(values, true, s=14, color="#2a6f97")
        axis.set_title(f"{proxy}: Kendall {_figure(agreements[proxy].kendall)}", fontsize=10)
        axis.set_ylabel("accuracy, %", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=5)  # counts of parameters have long labels
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(ranking.scores) :]:
        axis.set_visible(False)
    with replace_file(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, dpi=150)
    pyplot.close(figure)


def _figure(value: float, form: str = ".3f") -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"
