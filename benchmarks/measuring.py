"""Ways of doing one thing, timed in turn, so that a slow minute hits them all alike.

Nothing here imports jax: the torch scripts use it too. The functions that are timed must wait for
their own results.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Times:
    """The seconds of one way, a number a round.

    Attributes:
      seconds: in the order of the rounds.
    """

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median in milliseconds."""
        return 1e3 * statistics.median(self.seconds)

    def over(self, other: "Times") -> float:
        """The median of the ratios to another way of the same rounds."""
        return statistics.median(self.ratios(other))

    def over_at_best(self, other: "Times") -> float:
        """The ratio of the fastest rounds: what a noisy machine disturbs least."""
        return min(self.seconds) / min(other.seconds)

    def spread(self, other: "Times") -> str:
        """The 10th and 90th percentile of the ratios to another way."""
        ratios = self.ratios(other)
        if len(ratios) < 2:
            return f"{ratios[0]:.2f}-{ratios[0]:.2f}"
        tenths = statistics.quantiles(ratios, n=10, method="inclusive")
        return f"{tenths[0]:.2f}-{tenths[-1]:.2f}"

    def ratios(self, other: "Times") -> list[float]:
        """The ratio in each round."""
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]


def in_turn(
    ways: Mapping[str, Callable[[], object]], rounds: int, title: str = "", warmup: int = 2
) -> dict[str, Times]:
    """Times each way once a round, the order turned by one from round to round.

    Args:
      ways: functions that wait for their results.
      rounds: how many rounds count.
      title: what the progress bar says.
      warmup: rounds that do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    with progress() as bar:
        task = bar.add_task(title, total=(rounds + warmup) * len(names))
        for n in range(-warmup, rounds):
            for name in names[n % len(names) :] + names[: n % len(names)]:
                start = time.perf_counter()
                ways[name]()
                took = time.perf_counter() - start
                if n >= 0:
                    seconds[name].append(took)
                bar.advance(task)
    return {name: Times(tuple(found)) for name, found in seconds.items()}


def progress() -> Progress:
    """A bar with what is done, in the terminal only and gone at the end."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    bar = (*columns, TimeRemainingColumn())
    return Progress(*bar, console=console, transient=True, disable=not console.is_terminal)
