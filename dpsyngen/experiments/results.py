"""What a job of an experiment found, read back from its file.  It is private: its figures come from private images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from dpsyngen.errors import printable
from dpsyngen.experiments.spec import Job


@pydantic_dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False))
class Figure:
    """One number: a `metric` `on` a classifier or feature extractor ("" for a fact of the run).

    `of_class` names the class, "" for all.  `low` and `high` are a 95 % interval from this run's images alone: it does
    not hold the spread between seeds.  `floor` is what real test images get, `ceiling` what images drawn by programs
    get.  `better` is None for a fact; the unit "share" is a number from 0 to 1.  `images` counts generated images
    (features) or real test images (accuracy).
    """

    metric: str
    on: str
    of_class: str
    value: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    ceiling: float | None = None
    better: Literal["lower", "higher"] | None = None
    unit: str = ""
    images: int | None = None


@pydantic_dataclass(frozen=True)
class JobResult(Job):
    """One finished job: the specification's, and what was found, as its file states it.

    `delta` is None without privacy; `private` is False if the noise could be predicted, `facts` are steps, seconds and
    so on, and `evaluation` what :func:`dpsyngen.evaluation.evaluate_images` found.
    """

    delta: float | None = None
    private: bool = True
    facts: dict[str, Any] = Field(default_factory=dict)
    evaluation: Annotated[dict[str, Any], BeforeValidator(lambda given: given or {})] = Field(repr=False, kw_only=True)

    @classmethod
    def of(cls, job: Job, found: dict[str, Any]) -> JobResult:
        """Take from the file of `job` what was found; ValueError says why it is not such a file."""
        try:
            out = cls(**found | vars(job))
            list(out.figures())  # so that what is wrong in the figures shows here
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 200)) from None
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its evaluation has not the right form ({error!r})") from None
        if found.get("job") != job.name:
            raise ValueError(f"it is about the job {printable(found.get('job'), 60)}")
        return out

    @property
    def seconds_unit(self) -> str:
        """ "core-seconds" on a CPU, "seconds" elsewhere."""
        return str(self.facts.get("seconds_unit", "seconds"))

    def figures(self) -> Iterator[Figure]:
        """Yield everything that was measured on this job; any error if the evaluation has not the form it should."""
        names = self.evaluation.get("class_names") or ()
        share: Any = {"better": "higher", "unit": "share"}
        for on, c in (self.evaluation.get("cas") or {}).items():
            low, high, n = c.get("accuracy_low"), c.get("accuracy_high"), c.get("n_test")
            yield Figure("accuracy", on, "", c["accuracy"], low, high, images=n, **share)
            if c.get("validation_accuracy") is not None:
                value, n = c["validation_accuracy"], c.get("n_validation")
                yield Figure("validation_accuracy", on, "", value, images=n, **share)
            for number, value in enumerate(c.get("per_class_accuracy") or ()):
                if value is not None:
                    name = str(names[number] if number < len(names) else number)
                    yield Figure("accuracy", on, name, value, **share)
        for on, f in (self.evaluation.get("features") or {}).items():
            for metric, m in f["metrics"].items():
                if m["value"] is None:
                    continue  # the images allow no such figure; its flag says why
                bounds = {k: m.get(k) for k in ("low", "high", "floor", "ceiling")}
                better, images = m.get("better", "lower"), f.get("generated_images")
                yield Figure(metric, on, "", m["value"], better=better, images=images, **bounds)
        for name, value in sorted(self.facts.items()):
            if is_number(value):
                yield Figure(name, "", "", value, unit=self.seconds_unit if name.startswith("seconds_") else "")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
