"""The tables of `evaluate`."""

from __future__ import annotations

from tuckerize.cli.printing import count_text, make_table, print_all, size_text
from tuckerize.report.evaluation import Divergence, Estimate, EvaluateReport


def show_evaluate(report: EvaluateReport) -> None:
    """Print perplexities and, of two checkpoints, how far apart they are."""
    first = report.results[0].perplexity
    rows = [
        (
            one.folder,
            size_text(one.size.total_bytes),
            count_text(one.size.routed_parameters),
            f"{one.perplexity:.3f}",
            f"x {one.perplexity / first:.4f}" if len(report.results) > 1 else "",
        )
        for one in report.results
    ]
    print_all(make_table(("checkpoint", "all bytes", "routed parameters", "perplexity", ""), rows))
    if report.divergence is not None:
        _show_divergence(report.divergence)
    print_all(
        f"on {report.tokens:,} tokens, evenly spread over {', '.join(report.texts)}, in windows of "
        f"{report.window}; not comparable with other texts, numbers of tokens or windows"
    )
    if report.results[0].perplexity_error is None:
        print_all("warning: that is one window, which says little: give a longer text")


def _show_divergence(found: Divergence) -> None:
    changed = "not the same layers of experts"
    if found.experts_changed is not None:
        changed = f"{_percentage_text(found.experts_changed)} of the tokens, in any layer"
    rows = [
        ("perplexity", f"x {_estimate_text(found.perplexity_ratio, 4)}"),
        ("KL divergence", f"{_estimate_text(found.kl, 5)} nats per token"),
        ("same top token", f"{_percentage_text(found.same_top)} of the tokens"),
        ("other experts", changed),
    ]
    print_all(make_table(("", "from the first, ± standard error"), rows, text_columns=2))


def _estimate_text(estimate: Estimate, digits: int) -> str:
    error = "" if estimate.error is None else f" ± {estimate.error:.{digits}f}"
    return f"{estimate.value:.{digits}f}{error}"


def _percentage_text(share: Estimate) -> str:
    error = "" if share.error is None else f" ± {share.error:.2%}"
    return f"{share.value:.2%}{error}"
