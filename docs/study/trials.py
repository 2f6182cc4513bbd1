"""What the study tries: every combination of network, batch size, clipping, learning rate and seed, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from typing_extensions import Self

PARTS = ("images", "text", "sharded")
THRESHOLDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
BATCHES = (128, 256, 1024)
TEXT_BATCH = 32

Kind = Literal["none", "agc", "agc+last", "norm"]


@dataclass(frozen=True)
class Clipping:
    """`at`: the clipping threshold of AGC, or the max_norm of `clip_grad_norm_`. "agc+last": the last layer too."""

    kind: Kind = "none"
    at: float = 0.0

    def __lt__(self, other: Clipping) -> bool:
        """None first, then by threshold."""
        kinds = get_args(Kind)
        return (kinds.index(self.kind), self.at) < (kinds.index(other.kind), other.at)

    def __str__(self) -> str:
        return {
            "none": "no clipping",
            "agc": f"AGC {self.at:g}",
            "agc+last": f"AGC {self.at:g}, last layer too",
            "norm": f"global norm {self.at:g}",
        }[self.kind]

    def as_dict(self) -> dict[str, Any]:
        return {} if self == NONE else {"clip": self.kind, "at": self.at}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Clipping:
        return cls(record.get("clip", "none"), record.get("at", 0.0))


NONE = Clipping()


@dataclass(frozen=True)
class Training:
    """What trials and cases have in common, and how a line of the results names it."""

    network: str
    batch: int
    clipping: Clipping
    lr: float

    def as_dict(self) -> dict[str, Any]:
        more = {field.name: getattr(self, field.name) for field in fields(self)[3:]}
        return {"net": self.network, "batch": self.batch, **self.clipping.as_dict(), **more}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        more = {field.name: record[field.name] for field in fields(cls)[3:]}
        return cls(record["net"], record["batch"], Clipping.of(record), **more)


@dataclass(frozen=True)
class Trial(Training):
    """One training run."""

    seed: int


@dataclass(frozen=True)
class Case(Training):
    """A training that is run alone and sharded. A line is told from a trial's by its `dtype`."""

    dtype: Literal["float64", "float32"]


@dataclass(frozen=True)
class Rates:
    """Learning rates `lowest`, twice that, ... up to `top`.

    A step under AGC is no longer than rate times threshold times weights, so that small thresholds bear larger rates:
    there, up to `reach` / threshold where that is more.
    """

    lowest: float
    top: float
    reach: float

    def of(self, clipping: Clipping) -> Iterator[float]:
        agc = clipping.kind in ("agc", "agc+last")
        top = max(self.top, self.reach / clipping.at) if agc else self.top
        rate = self.lowest
        while rate <= 1.001 * top:
            yield float(f"{rate:.6g}")
            rate *= 2


RATES = {
    "nf": Rates(0.05, 1.6, 0.256),
    "plain": Rates(0.0125, 0.4, 0.064),
    "bn": Rates(0.1, 6.4, 0.256),
    "nf-deep": Rates(0.05, 1.6, 0.256),
    "plain-deep": Rates(0.00625, 0.4, 0.032),
    "bn-deep": Rates(0.1, 6.4, 0.128),
    "gpt": Rates(0.004, 0.128, 0.0),
}


@dataclass(frozen=True)
class Study:
    """Lengths, and the grids. `settings()` go into the results, which are of no use under other ones."""

    epochs: int  # of every network on images, whatever the batch size
    text_steps: int
    sharded_steps: int
    grids: tuple[tuple[str, tuple[int, ...], tuple[Clipping, ...]], ...]  # network, batch sizes, clippings
    rates: tuple[float, ...] | None = None  # in place of RATES
    dtypes: tuple[Literal["float64", "float32"], ...] = ("float64", "float32")

    def settings(self) -> dict[str, int]:
        return {k: v for k, v in asdict(self).items() if k in ("epochs", "text_steps", "sharded_steps")}

    def trials(self, part: str, seeds: int) -> list[Trial]:
        return [
            Trial(network, batch, clipping, lr, seed)
            for seed in range(seeds)
            for network, batches, clippings in self.grids
            if part == ("text" if network == "gpt" else "images")
            for batch in batches
            for clipping in clippings
            for lr in self.rates or RATES[network].of(clipping)
        ]

    def cases(self) -> list[Case]:
        """At rates where AGC has work to do and training goes well: what differs is not chaos."""
        trainings = [
            ("nf", 256, Clipping("agc", 0.02), 0.4),
            ("nf", 256, Clipping("agc+last", 0.02), 0.4),
            ("plain", 256, Clipping("agc", 0.02), 0.1),
            ("gpt", TEXT_BATCH, Clipping("agc", 0.01), 0.008),
        ]
        return [Case(*training, dtype) for dtype in self.dtypes for training in trainings]


def _agc(*thresholds: float, kind: Kind = "agc") -> tuple[Clipping, ...]:
    return tuple(Clipping(kind, threshold) for threshold in thresholds)


def _norm(*norms: float) -> tuple[Clipping, ...]:
    return tuple(Clipping("norm", norm) for norm in norms)


_THIN = (NONE, *_agc(0.01, 0.16))

FULL = Study(
    epochs=20,
    text_steps=240,
    sharded_steps=40,
    grids=(
        ("nf", BATCHES, (NONE, *_agc(*THRESHOLDS), *_agc(0.01, 0.04, 0.16, kind="agc+last"))),
        ("plain", BATCHES, _THIN),
        ("bn", BATCHES, _THIN),
        ("nf-deep", (1024,), (NONE, *_agc(0.01))),
        ("plain-deep", (1024,), (NONE, *_agc(0.01))),
        ("bn-deep", (1024,), (NONE, *_agc(0.01))),
        ("gpt", (TEXT_BATCH,), (NONE, *_agc(0.0025, 0.01, 0.04, 0.16), *_norm(0.0625, 0.25, 1.0))),
    ),
)

QUICK = Study(
    epochs=2,
    text_steps=10,
    sharded_steps=4,
    grids=(
        ("nf", (128, 1024), (NONE, *_agc(0.01, 0.16), *_agc(0.01, kind="agc+last"))),
        ("plain", (1024,), (NONE, *_agc(0.01))),
        ("bn", (1024,), (NONE, *_agc(0.01))),
        ("gpt", (TEXT_BATCH,), (NONE, *_agc(0.01), *_norm(0.25))),
    ),
    rates=(0.05, 0.4),
    dtypes=("float64",),
)


def mixed(trials: Sequence[Trial]) -> list[Trial]:
    """In an order without meaning, so that the time of those to come can be told from those that are done."""
    import random

    return random.Random(0).sample(trials, len(trials))
