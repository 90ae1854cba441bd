"""How a run went, in pictures: the losses of recovery, and accuracy after each round."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmtkd.reporting import numbers
from rmtkd.reporting.frame import WIDTH, Frame, Scale, path_of, picture, text
from rmtkd.reporting.markup import Html, element
from rmtkd.schedule import Round

TOP, BOTTOM, LEFT, RIGHT = 14, 166, 46, WIDTH - 10
HEIGHT = 206


def losses_picture(key: str, rounds: Sequence[Round]) -> Html | None:
    """The loss of recovery over the steps of all rounds; None where none is recorded."""
    done = [found for found in rounds if found.losses]
    if not done:
        return None
    starts = [sum(found.steps for found in done[:i]) for i in range(len(done))]
    curves = [[(start + step, loss) for step, loss in found.losses] for start, found in zip(starts, done, strict=True)]
    losses = [loss for curve in curves for _, loss in curve]
    is_log = min(losses) > 0 and max(losses) / min(losses) > 8
    low = min(losses) * 0.8 if is_log else 0.0
    total = sum(found.steps for found in done)
    frame = Frame(
        x=Scale(low=0, high=total, start=LEFT, end=RIGHT),
        y=Scale(low=low, high=max(losses) * 1.1 or 1.0, start=BOTTOM, end=TOP, log=is_log),
    )
    ticks = frame.y.ticks() if not is_log or len(frame.y.ticks()) > 1 else [frame.y.low, frame.y.high]
    parts = [
        frame.rows([(tick, numbers.small(tick)) for tick in ticks]),
        frame.columns([(tick, numbers.count(round(tick))) for tick in frame.x.ticks()], "steps of recovery"),
        *(
            element("path", d=path_of([frame.point(*point) for point in curve]), class_="curve losses")
            for curve in curves
        ),
        *(_boundary(frame, start, found) for start, found in zip(starts, done, strict=True) if len(done) > 1),
    ]
    told = (
        f"{numbers.count(total)} steps in {numbers.count(len(done))} rounds, each point the mean loss of a stretch. "
        + "; ".join(
            f"round {found.number} from {numbers.small(found.loss_first)} to {numbers.small(found.loss_last)}"
            for found in done
        )
        + "."
    )
    return picture(key, "Losses of recovery", told, *parts, height=HEIGHT)


def _boundary(frame: Frame, start: int, found: Round) -> list[Html | None]:
    x = frame.x(start)
    line = element("line", x1=x, x2=x, y1=TOP, y2=BOTTOM, class_="grid") if start else None
    return [line, text(x + 3, TOP - 3, str(found.number), "tick")]


def accuracy_picture(
    key: str, rounds: Sequence[Round], baseline: Mapping[str, Any] | None, measure: str = "accuracy"
) -> Html | None:
    """Selection accuracy, or what else was measured, after the cut and after recovery of every round; None without
    rounds."""
    if not rounds:
        return None
    shares = [share for done in rounds for share in (done.accuracy_cut, done.accuracy)]
    shares += (
        [] if baseline is None else [baseline["value"] - baseline["stderr"], baseline["value"] + baseline["stderr"]]
    )
    room = max(0.01, 0.1 * (max(shares) - min(shares)))
    count = len(rounds)
    frame = Frame(
        x=Scale(low=0.4, high=count + 0.6, start=LEFT, end=RIGHT),
        y=Scale(low=max(0.0, min(shares) - room), high=min(1.0, max(shares) + room), start=BOTTOM, end=TOP),
    )
    shown = {1, count} | set(range(1, count + 1, max(1, -(-count // 8))))
    parts = [
        frame.rows([(tick, f"{tick:.3g}" if tick == 0 else f"{100 * tick:.3g}%") for tick in frame.y.ticks()]),
        frame.columns([(number, str(number)) for number in sorted(shown)], "rounds"),
        _untouched(frame, baseline) if baseline else None,
        *(_round(frame, i, done) for i, done in enumerate(rounds, 1)),
    ]
    told = "; ".join(
        f"round {done.number}: {numbers.percent(done.accuracy_cut)} after the cut, {numbers.percent(done.accuracy)} "
        "after recovery"
        for done in rounds[:20]
    )
    title = f"{measure.capitalize()} of every round on selection rows"
    return picture(key, title, f"{told}.", *parts, height=HEIGHT)


def _untouched(frame: Frame, baseline: Mapping[str, Any]) -> list[Html]:
    """The untouched model: its accuracy, within its standard error."""
    value, error = baseline["value"], baseline["stderr"]
    top, bottom = frame.y(value + error), frame.y(value - error)
    width = frame.x.end - frame.x.start
    return [
        element("rect", x=frame.x.start, y=top, width=width, height=max(1.0, bottom - top), class_="band"),
        element("line", x1=frame.x.start, x2=frame.x.end, y1=frame.y(value), y2=frame.y(value), class_="untouched"),
        text(frame.x.end, top - 3 if top > TOP + 10 else bottom + 11, "untouched ± standard error", "tick end"),
    ]


def _round(frame: Frame, place: int, done: Round) -> list[Html]:
    x, cut, after = frame.x(place), frame.y(done.accuracy_cut), frame.y(done.accuracy)
    return [
        element("line", x1=x, x2=x, y1=cut, y2=after, class_="rise"),
        element("circle", cx=x, cy=cut, r=3.5, class_="dot hollow"),
        element("circle", cx=x, cy=after, r=4.5, class_="dot taken" if done.rolled_back else "dot"),
    ]
