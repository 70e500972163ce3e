"""A timeline as a picture: one lane for the device and one for each kind of link, coloured by scope."""

import os

from sharding.timeline import LANES, Timeline

_COLOURS = {
    "dense": "tab:blue",
    "lookup": "tab:green",
    "lookup_stale": "tab:olive",
    "update": "tab:red",
    "route": "tab:orange",
    "route_ahead": "tab:orange",
    "return": "tab:cyan",
    "send_back": "tab:pink",
    "other": "tab:gray",
}
_MORE_COLOURS = ("tab:purple", "tab:brown", "gold", "black")


def draw_timeline(timeline: Timeline, path: str | os.PathLike[str]) -> None:
    """Writes a picture of one step.

    Args:
        timeline: The timeline.
        path: File; its ending says which format.
    """
    # Here, because it takes a second that only a picture is worth; and not pyplot, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots()
    lanes = [lane for lane in LANES if timeline.busy_seconds(lane)]
    scopes = sorted({span.scope for span in timeline.spans})
    unknown = (scope for scope in scopes if scope not in _COLOURS)
    colours = _COLOURS | {scope: _MORE_COLOURS[i % len(_MORE_COLOURS)] for i, scope in enumerate(unknown)}
    for row, lane in enumerate(lanes):
        for scope in scopes:
            bars = [
                (1e3 * span.start, 1e3 * span.seconds)
                for span in timeline.spans
                if span.lane == lane and span.scope == scope
            ]
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colours[scope])
    for scope in scopes:
        axes.broken_barh([], (0, 0), facecolors=colours[scope], label=scope)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1e3 * timeline.seconds)
    axes.set_xlabel("ms from the start of the step (estimated)")
    axes.set_title(
        f"{timeline.topology.name}: {1e3 * timeline.seconds:.2f} ms, of which {1e3 * timeline.exposed_seconds:.2f} ms "
        "wait for links"
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=120)
