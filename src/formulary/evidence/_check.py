"""A check: the experiment that tests a paper's claim, with its prediction stated before it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from formulary.errors import UsageError, nearest
from formulary.evidence._predicates import TIME_METRIC, Exact, Predicate, Speedup

SCOPE = "one small test on this machine"


@dataclass(frozen=True)
class Outcome:
    """What an arm gives for one seed.

    values: one outcome per item, or a mapping from metric to them; may be empty when there is only `work` to time.
    budget: what the arm spends, such as {"parameters": n, "state": n, "flops": n, "tokens": n, "tuning trials": n};
    compared between arms.
    work: a callable of no arguments; the runner times it beside the works of the other arms under the metric "CPU
    seconds".

    >>> Outcome([0.1, 0.2], budget={"parameters": 1000}).budget["parameters"]
    1000
    """

    values: Any = ()
    budget: Mapping[str, int | float] = field(default_factory=dict)
    work: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Check:
    """A seeded experiment that can fail.

    claim: the prediction in words, with its direction and size.
    setup: seed -> context, any object. Run once per seed and shared by all arms, which must not change it.
    arms: name -> (context -> outcomes). Outcomes are one number per item, a mapping from metric to them, or an
    `Outcome`.
    holds: a predicate, or several through `all_of`.
    metric: what the numbers are, with the unit after a comma ("excess loss, nats/token"); None when the arms name their
    metrics themselves.
    items: "same" when every seed measures the same items, "fresh" when each seed draws its own.
    redraws: what a new seed changes, in words ("calibration").
    seeds: how many, fixed before the run; 5 to 10.
    version: raised whenever the claim, a threshold or the protocol changes.
    oracle: the arm that must fulfill the prediction in the method's place, when there is a natural one.
    null_arm: the arm that must not fulfill it, when there is a better one than the baseline rerun with fresh seeds.
    scope: what the verdict is about.

    Made wrongly, it raises UsageError. The method is the first arm of the first predicate; `oracle` and `null_arm` take
    its place.

    >>> from formulary.evidence import at_most
    >>> arms = {"a": lambda s: [1.0 + s], "b": lambda s: [3.0 + 2 * s]}
    >>> check = Check(claim="a is half of b", setup=lambda seed: seed, arms=arms,
    ...               holds=at_most("a", "b", ratio=0.6), metric="loss", items="fresh", redraws="everything", seeds=5)
    >>> check.method
    'a'
    """

    claim: str
    setup: Callable[[int], Any] | None = None
    arms: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    holds: Predicate | tuple[Predicate, ...] = ()
    metric: str | None = None
    items: str = "fresh"
    redraws: str = "everything"
    seeds: int = 8
    version: int = 1
    oracle: str | None = None
    null_arm: str | None = None
    scope: str = SCOPE
    why: str | None = None
    smaller: "Check | None" = None

    def __post_init__(self):
        if not self.claim.strip():
            raise UsageError("a check needs a claim")
        if self.version < 1:
            raise UsageError(f"version={self.version}; versions of a check start at 1")
        if self.why is None:
            self._validate()

    def _validate(self):
        if self.items not in ("fresh", "same"):
            raise UsageError(
                f"items={self.items!r}; it must be 'fresh' or 'same'{nearest(self.items, ['fresh', 'same'])}"
            )
        if self.setup is None or not self.predicates:
            raise UsageError(
                "a check needs setup= and holds=; a claim that cannot be tested is Check.not_testable(...)"
            )
        for arm in {arm for p in self.predicates for arm in (p.a, p.b, p.null, p.oracle)} | {
            self.oracle,
            self.null_arm,
        }:
            if arm is not None and arm not in self.arms:
                raise UsageError(
                    f"{arm!r} is no arm of the check (it has {', '.join(self.arms)}){nearest(arm, self.arms)}"
                )
        sampled = any(not isinstance(p, Exact | Speedup) for p in self.predicates)
        if self.seeds < (2 if sampled else 1):
            raise UsageError(
                f"seeds={self.seeds}; an interval over seeds needs at least 2, and a check should have 5 to 10"
            )

    @classmethod
    def not_testable(cls, why: str, *, claim: str, smaller: "Check | None" = None, version: int = 1) -> "Check":
        """A claim that no small machine can test, and why; `smaller` is the smaller question that is tested instead,
        with its own claim.

        >>> Check.not_testable("needs ImageNet-22k", claim="pre-training on 22k classes helps").why
        'needs ImageNet-22k'
        """
        return cls(claim=claim, why=why, smaller=smaller, version=version)

    @property
    def predicates(self) -> tuple[Predicate, ...]:
        """All predicates, in order."""
        return self.holds if isinstance(self.holds, tuple) else (self.holds,)

    @property
    def method(self) -> str:
        """The arm that the check is about."""
        return self.predicates[0].a

    def metric_of(self, predicate: Predicate, reported: Mapping[str, list[str]]) -> str:
        """The metric that a predicate is about, given the metrics that each arm reported. UsageError if unclear."""
        of_arm = reported[predicate.a]
        metric = predicate.metric or self.metric or (of_arm[0] if len(of_arm) == 1 else None)
        if metric is None:
            raise UsageError(
                f"arm {predicate.a!r} reports several metrics ({', '.join(of_arm)}); name one with metric="
            )
        for arm in (predicate.a, predicate.b):
            if arm is not None and metric not in reported[arm]:
                hint = (
                    " (return Outcome(work=...) from the arm)"
                    if metric == TIME_METRIC
                    else nearest(metric, reported[arm])
                )
                raise UsageError(
                    f"arm {arm!r} reports no {metric!r}, only {', '.join(map(repr, reported[arm])) or 'nothing'}{hint}"
                )
        return metric
