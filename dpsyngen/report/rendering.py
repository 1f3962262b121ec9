"""Filling a template of the reports.  Everything is escaped, and a value that is missing is an error."""

from __future__ import annotations

from functools import partial
from typing import Any

from dpsyngen.privacy.certificate import number


def render(template: str, values: dict[str, Any]) -> str:
    """The page that `template`, a file of ``dpsyngen/report/templates``, makes of `values`.

    Text of `values` is escaped (class names come from the user's folders).  Filter ``bound`` rounds a bound up.

    Raises:
        jinja2.TemplateNotFound: no such template.
        jinja2.UndefinedError: the template names a value that is not given.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dpsyngen.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bound"] = partial(number, up=True)
    return environment.get_template(template).render(**values)
