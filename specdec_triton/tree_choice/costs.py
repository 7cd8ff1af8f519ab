"""The costs of a round: seconds of a verify forward by number of rows, and of a draft by depth.

Costs are given (`Costs`), learned from rounds (`OnlineCosts`) or measured (`measure_costs`). N is the number of rows
per sequence in a verify forward, root included. If only ratios matter, as in `CPU_PRIOR`, any unit of time may be used.
"""

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median, median_low

import numpy as np

WINDOW = 9  # a learned time is the median of this many latest rounds, because times grow with the length of the text
# With at most this many measurements, the median also includes this many copies of the expected time, so that a single
# slow round has little effect.
PRIOR_VOTES = 2


def _is_seconds(number: float) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number) and number >= 0


def _table(name: str, table: Iterable[Sequence[float]], positive: bool) -> tuple[tuple[int, float], ...]:
    wanted = (
        f"Costs: {name} must be (whole number of at least 1, finite seconds {'above' if positive else 'of at least'} "
        "0) pairs, the first increasing, the second not decreasing"
    )
    try:
        pairs = tuple((size, seconds) for size, seconds in table)
    except (TypeError, ValueError):
        raise ValueError(f"{wanted}, got {table!r}") from None
    last_size, last_seconds = 0, 0.0
    for size, seconds in pairs:
        if (
            not isinstance(size, int)
            or size <= last_size
            or not _is_seconds(seconds)
            or seconds < last_seconds
            or (positive and not seconds)
        ):
            raise ValueError(f"{wanted}, got {table!r}")
        last_size, last_seconds = size, seconds
    return pairs


@dataclass(frozen=True)
class Costs:
    """Seconds of one round for the whole batch. Times between the entries of a table are interpolated linearly; times
    after the last entry continue with the last slope.

    Attributes:
        verify: (N, seconds) pairs with increasing N >= 1 and non-decreasing seconds > 0. The first entry also holds for
            smaller N.
        draft: (depth, seconds) pairs with increasing depth >= 1 and non-decreasing seconds >= 0. Depth 0 takes 0 s.
        other: seconds of all other steps of a round.

    Raises:
        ValueError: a table or a number is invalid.
    """

    verify: tuple[tuple[int, float], ...]
    draft: tuple[tuple[int, float], ...] = ()
    other: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "verify", _table("verify", self.verify, positive=True))
        object.__setattr__(self, "draft", _table("draft", self.draft, positive=False))
        if not self.verify:
            raise ValueError("Costs: verify must have an entry, got none")
        if not _is_seconds(self.other):
            raise ValueError(f"Costs: other must be finite seconds of at least 0, got {self.other!r}")

    def verify_seconds(self, num_nodes: int) -> float:
        """Seconds of a verify forward over `num_nodes` >= 1 rows per sequence."""
        if num_nodes < 1:
            raise ValueError(f"Costs.verify_seconds: num_nodes must be at least 1, got {num_nodes}")
        return _interpolate(self.verify, num_nodes)

    def draft_seconds(self, depth: int) -> float:
        """Seconds of drafting `depth` >= 0 levels."""
        if depth < 0:
            raise ValueError(f"Costs.draft_seconds: depth must be at least 0, got {depth}")
        return _interpolate(((0, 0.0), *self.draft), depth)

    def round_seconds(self, num_nodes: int, depth: int) -> float:
        """Seconds of a round with a tree of `num_nodes` nodes, root included, and `depth` levels below it."""
        return self.verify_seconds(num_nodes) + self.draft_seconds(depth) + self.other


# On a CPU, a forward over 6 rows takes about 5 times as long as one over a single row.
CPU_PRIOR = Costs(verify=((1, 1.0), (6, 5.0)))


class OnlineCosts:
    """Costs learned from the rounds of a call.

    The time of a measured size is the median of its rounds. The times of other sizes follow the prior, scaled to fit
    the nearest measured sizes.

    Args:
        prior: expected costs before the first round; only their ratios matter. Its draft seconds must be above 0, or
            its draft table empty if they are not known.

    Raises:
        ValueError: `prior` is not a `Costs` or has draft seconds of 0.
    """

    def __init__(self, prior: Costs = CPU_PRIOR):
        if not isinstance(prior, Costs) or any(not seconds for _, seconds in prior.draft):
            raise ValueError(f"OnlineCosts: prior must be a Costs with draft seconds above 0, got {prior!r}")
        self.prior = prior
        self._verify: dict[int, deque[float]] = {}
        self._draft: dict[int, deque[float]] = {}
        self._costs: Costs | None = prior

    def record(self, num_nodes: int, depth: int, verify: float | None = None, draft: float | None = None) -> None:
        """Add a round's measured seconds.

        Args:
            num_nodes: N >= 1, rows per sequence of the verify forward.
            depth: number of levels drafted, at least 0.
            verify: seconds of the verify forward, above 0; None if not measured.
            draft: seconds of the draft, at least 0; None if not measured. Ignored at depth 0.

        Raises:
            ValueError: a number is out of range.
        """
        for name, number, least in (("num_nodes", num_nodes, 1), ("depth", depth, 0)):
            if number < least:
                raise ValueError(f"OnlineCosts.record: {name} must be at least {least}, got {number}")
        if verify is not None and not (_is_seconds(verify) and verify):
            raise ValueError(f"OnlineCosts.record: verify must be finite seconds above 0, got {verify!r}")
        if draft is not None and not _is_seconds(draft):
            raise ValueError(f"OnlineCosts.record: draft must be finite seconds of at least 0, got {draft!r}")
        if verify is not None:
            self._verify.setdefault(num_nodes, deque(maxlen=WINDOW)).append(verify)
        if draft is not None and depth:
            self._draft.setdefault(depth, deque(maxlen=WINDOW)).append(draft)
        self._costs = None

    def rounds(self, num_nodes: int) -> int:
        """Number of measured verify forwards over `num_nodes` rows per sequence, at most `WINDOW`."""
        return len(self._verify.get(num_nodes, ()))

    @property
    def costs(self) -> Costs:
        """The current estimate. It is the prior until the first verify forward is recorded."""
        if self._costs is None:
            self._costs = self._learned() if self._verify else self.prior
        return self._costs

    def _learned(self) -> Costs:
        prior = self.prior
        # the size that was measured most often gives the scale of this machine
        known = max(self._verify, key=lambda size: (len(self._verify[size]), -size))
        scale = median_low(self._verify[known]) / prior.verify_seconds(known)
        verify = _fit(prior.verify, prior.verify_seconds, self._verify, scale, known)
        if prior.draft:
            draft = _fit(prior.draft, prior.draft_seconds, self._draft, scale)
        else:
            measured = sorted(self._draft.items())
            draft = _nondecreasing([(depth, median_low(seconds), len(seconds)) for depth, seconds in measured])
        return Costs(verify, draft, prior.other * scale)


def measure_costs(
    forward: Callable[[int], object],
    sizes: Sequence[int],
    synchronize: Callable[[], object] = lambda: None,
    repeats: int = 5,
) -> tuple[tuple[int, float], ...]:
    """Time `forward(N)` for each N in `sizes`.

    Each size runs once to warm up and then `repeats` times, alternating between sizes. The median is used.

    Args:
        forward: runs a verify forward over N rows per sequence.
        sizes: increasing numbers N >= 1.
        synchronize: waits for the device, if `forward` returns before the device is done.
        repeats: number of timed runs of each size, at least 1.

    Returns:
        (N, seconds) pairs with non-decreasing seconds, for `Costs.verify`.

    Raises:
        ValueError: `sizes` or `repeats` is invalid.
    """
    sizes = list(sizes)
    if not sizes or sizes[0] < 1 or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"measure_costs: sizes must be increasing numbers of at least 1, got {sizes}")
    if repeats < 1:
        raise ValueError(f"measure_costs: repeats must be at least 1, got {repeats}")
    for size in sizes:
        forward(size)
    times = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            synchronize()
            begin = time.perf_counter()
            forward(size)
            synchronize()
            times[size].append(time.perf_counter() - begin)
    return _nondecreasing([(size, median(seconds), 1) for size, seconds in times.items()])


def _interpolate(table: Sequence[tuple[int, float]], place: int) -> float:
    """Linear interpolation between the points of a table. It is constant before the first point and continues with the
    last slope after the last point."""
    after = bisect_left(table, place, key=lambda point: point[0])
    if not after or len(table) == 1:
        return float(table[0][1])
    (left, low), (right, high) = table[min(after, len(table) - 1) - 1 :][:2]
    return low + (high - low) * (place - left) / (right - left)


def _nondecreasing(points: Sequence[tuple[int, float, float]]) -> tuple[tuple[int, float], ...]:
    """Isotonic regression by pooling adjacent violators: (place, value, weight) points -> (place, value) pairs whose
    values never decrease. Neighbours whose values decrease are replaced by their weighted mean."""
    blocks = []
    for place, value, weight in points:
        blocks.append(([place], value, weight))
        while len(blocks) > 1 and blocks[-2][1] > blocks[-1][1]:
            (left, low, light), (right, high, heavy) = blocks[-2:]
            blocks[-2:] = [(left + right, (low * light + high * heavy) / (light + heavy), light + heavy)]
    return tuple((place, float(value)) for places, value, _ in blocks for place in places)


def _fit(
    table: Sequence[tuple[int, float]],
    prior: Callable[[int], float],
    measured: dict[int, deque[float]],
    scale: float,
    known: int | None = None,
) -> tuple[tuple[int, float], ...]:
    """Fit the prior's table to the measurements.

    Args:
        table: the prior's table.
        prior: the interpolated table.
        measured: place -> measured seconds.
        scale: factor between seconds on this machine and seconds of the prior, used far from measured places.
        known: the place that `scale` comes from.
    """
    settled = {
        place: median_low(seconds)
        for place, seconds in measured.items()
        if len(seconds) > PRIOR_VOTES or place == known
    }
    expected = _curve(prior, scale, settled)
    medians = settled | {
        place: median_low([*measured[place], *[expected(place)] * PRIOR_VOTES]) for place in measured.keys() - settled
    }
    seconds = _curve(prior, scale, medians)
    beyond = {2 * max(medians), 3 * max(medians)} if medians else set()
    # places without measurements get a negligible weight, so that they do not move measured ones
    return _nondecreasing(
        [
            (place, seconds(place), len(measured.get(place, ())) or 1e-9)
            for place in sorted({*medians, *beyond, *(place for place, _ in table)})
        ]
    )


def _curve(prior: Callable[[int], float], scale: float, known: dict[int, float]) -> Callable[[int], float]:
    """A function that gives the seconds at any place, from the seconds at the `known` places.

    Up to the largest known place, the prior is scaled by the interpolated ratio of known seconds to the prior's. From
    there to twice that place, the slope of the prior is scaled by the ratio of the two slopes over the known range.
    Beyond that, the prior's own slope is used, because the cost of a few rows says little about that of many.
    """
    if not known:
        return lambda place: scale * prior(place)
    places = sorted(known)
    ratios = [known[place] / prior(place) for place in places]
    first, last = places[0], places[-1]
    rise = scale * (prior(last) - prior(first))
    steepness = max(known[last] - known[first], 0.0) / rise if rise else 1.0

    def seconds(place: int) -> float:
        if place <= last:
            return float(np.interp(place, places, ratios)) * prior(place)
        near, far = prior(min(place, 2 * last)) - prior(last), prior(max(place, 2 * last)) - prior(2 * last)
        return known[last] + scale * (steepness * near + far)

    return seconds
