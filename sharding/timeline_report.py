"""A timeline as text: every collective and what hides it, the computing of each scope, and what it adds up to."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sharding.collective import axis_name
from sharding.timeline import BETWEEN, INSIDE, Timeline


def collectives_table(timeline: Timeline) -> Table:
    """One row for each collective, in the order of the program; bytes are those that one device sends."""
    table = Table(title=f"collectives of the program for {timeline.topology.name}")
    table.add_column("collective")
    table.add_column("scope")
    table.add_column("axis")
    for name in ("MB sent", "asynchronous", "GFLOP meanwhile", "MB meanwhile", "ms", "hidden"):
        table.add_column(name, justify="right")
    for exchange in timeline.exchanges:
        table.add_row(
            exchange.collective.kind,
            exchange.scope,
            axis_name(exchange.collective.axes),
            f"{exchange.collective.wire_bytes / 1e6:,.3f}",
            "yes" if exchange.asynchronous else "no",
            f"{exchange.window.flops / 1e9:,.1f}",
            f"{exchange.window.num_bytes / 1e6:,.1f}",
            _milliseconds(exchange.seconds),
            f"{exchange.hidden_share:.0%}",
        )
    return table


def computing_table(timeline: Timeline) -> Table:
    """What a device computes, by named scope of the step."""
    table = Table("scope", title="computing")
    for name in ("ms", "share of the step"):
        table.add_column(name, justify="right")
    for scope, seconds in sorted(timeline.scope_seconds().items(), key=lambda part: -part[1]):
        table.add_row(scope, _milliseconds(seconds), f"{seconds / timeline.seconds:.1%}")
    return table


def summary(timeline: Timeline, batch_size: int) -> Text:
    """The step's estimated time, samples a second, exposed communication, and bounds of these.

    Args:
        timeline: The timeline.
        batch_size: Samples of the global batch.
    """
    work, seconds = timeline.work, timeline.seconds
    exposed = timeline.exposed_seconds
    lines = [
        f"estimated step: {_milliseconds(seconds)} ms, {batch_size / seconds:,.0f} samples a second (QPS)",
        f"computing: {_milliseconds(timeline.compute_seconds)} ms ({work.flops / 1e9:,.0f} GFLOP of matrix products, "
        f"{work.num_bytes / 1e9:,.1f} GB of memory traffic, {work.kernels} kernels)",
        f"exchanges: {_milliseconds(timeline.exchange_seconds)} ms one after another, of which "
        f"{timeline.hidden_share:.1%} hidden; exposed communication {_milliseconds(exposed)} ms, "
        f"{exposed / seconds:.1%} of the step",
        f"links are busy for {_milliseconds(timeline.busy_seconds(INSIDE))} ms inside nodes and "
        f"{_milliseconds(timeline.busy_seconds(BETWEEN))} ms between",
        f"bounds: in any order this work takes {_milliseconds(timeline.shortest_seconds)} ms or more, and at most "
        f"{timeline.largest_hidden_share:.1%} of the exchanges can be hidden",
    ]
    return Text("\n".join(lines))


def timeline_report(timeline: Timeline, batch_size: int) -> Group:
    """All of it.

    Args:
        timeline: The timeline.
        batch_size: Samples of the global batch.
    """
    return Group(collectives_table(timeline), computing_table(timeline), summary(timeline, batch_size))


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"
