"""The options of a probe on the command line, made from the fields of `EstimateOptions` and `RunOptions`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from entropy_fast.config import EstimateOptions, OptionField, RunOptions, option_fields

__all__ = ["changed_options", "with_probe_options"]

METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
NOTHING = "none"  # the word for None, where an option has no such word of its own

Command = Callable[..., None]


def with_probe_options(command: Command) -> Command:
    """Give a command that ends in ``**options`` an option for every field, in the place of that.

    An option that is not given is None, which leaves it to the run folder.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = [*option_fields(EstimateOptions), *option_fields(RunOptions)]
    made = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(field))
        for field in fields
    ]
    # typer reads the one for order and defaults, the other for types.
    command.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *made)} | {"return": None}
    return command


def changed_options(
    estimate: EstimateOptions, run: RunOptions, given: Mapping[str, Any]
) -> tuple[EstimateOptions, RunOptions]:
    """The options of a run folder with those from the command line put over them.

    Args:
        estimate: the folder's, or the defaults.
        run: likewise.
        given: by field name; None means not given.

    Raises:
        ConfigError: an option has a value outside what there is.
    """
    names = {f.name for f in option_fields(EstimateOptions)}
    fields = [*option_fields(EstimateOptions), *option_fields(RunOptions)]
    values = {f.name: _value(f, given[f.name]) for f in fields if given.get(f.name) is not None}
    return (
        dataclasses.replace(estimate, **{key: value for key, value in values.items() if key in names}),
        dataclasses.replace(run, **{key: value for key, value in values.items() if key not in names}),
    )


def _annotation(field: OptionField) -> Any:
    flag = "--" + field.name.replace("_", "-")
    if field.kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
        return Annotated[bool | None, typer.Option(flag, help=f"{field.help}.", show_default=False)]
    default = "" if field.default is None else f"; {field.default} by default"
    words = [*field.choices, *([NOTHING] if field.optional and field.choices else [])]
    info = typer.Option(
        flag,
        help=f"{field.help}{default}.",
        metavar="|".join(words) or METAVARS[field.kind],
        autocompletion=lambda incomplete: [word for word in words if word.startswith(incomplete)],
        show_default=False,
    )
    return Annotated[str | None, info]


def _value(field: OptionField, text: Any) -> Any:
    """What a field is given for the text of its option. What is no number is left to the field to refuse, as a text."""
    if field.optional and text == NOTHING and NOTHING not in field.choices:
        return None
    if field.kind in (int, float):
        try:
            return field.kind(text)
        except ValueError:
            return text
    return text
