"""How a row of a table becomes a document: a column of text, or a prompt and its completion by templates."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxlm.data.section import Section
from jaxlm.errors import ConfigError, DataError


class Document(NamedTuple):
    name: str  # unique in its source, and the same wherever the source lies
    text: str  # not empty, but for a prompt; no surrogates, so it has a UTF-8 form
    completion: str | None = None  # not empty; None where the document is no pair


class Filled(str):
    """A template's text, filled in. `own`: the (start, stop) of what the template itself says, not a row."""

    own: tuple[tuple[int, int], ...] = ()


class Form(NamedTuple):
    columns: Mapping[str, str]  # those that are read -> the config's field that names them
    documents: Callable[[str, str, Mapping[str, str]], Iterator[Document]]  # of (name, where, row): one, or none
    pairs: bool
    key: object  # JSON that is different for forms that read differently


def of(section: Section) -> Form:
    """The form that a config's data section describes. Raises ConfigError for a template that is none."""
    return pairs(section.prompt, section.completion) if section.format == "pairs" else text(section.text_field)


def text(column: str = "text") -> Form:
    """Each row is a document; none where its text is empty."""

    def documents(name: str, where: str, row: Mapping[str, str]) -> Iterator[Document]:
        if row[column]:
            yield Document(name, row[column])

    return Form({column: "data.text_field"}, documents, False, column)


def pairs(prompt: str, completion: str) -> Form:
    """Each row is a prompt and what is to follow it.

    Args:
      prompt, completion: templates, in which {column} stands for that column's text, {{ and }} for braces.

    Raises:
      ConfigError: no template, or one of a completion that reads no column.
    """
    templates = {"data.prompt": prompt, "data.completion": completion}
    parts = {field: parsed(template, field) for field, template in templates.items()}
    columns = {column: field for field, template in parts.items() for _, column in template if column is not None}
    if "data.completion" not in columns.values():
        raise ConfigError(f"data.completion={completion!r} names no column; write such as 'data.completion={{label}}'")

    def documents(name: str, where: str, row: Mapping[str, str]) -> Iterator[Document]:
        answer = filled(parts["data.completion"], row)
        if not answer.strip():
            raise DataError(f"{where}: the completion is empty, by data.completion={completion!r}; leave the row out")
        yield Document(name, filled(parts["data.prompt"], row), answer)

    return Form(columns, documents, True, ["pairs", "special tokens in templates", prompt, completion])


Template = Sequence[tuple[str, str | None]]  # text, and the column that follows it, if one does


def parsed(template: str, field: str) -> Template:
    """A template in parts; all that stands in braces is a column's name. `field`, of the config, is for the error."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{field}={template!r} is no template: {error}; a brace itself is {{{{ or }}}}") from error
    for _, name, form, conversion in parts:
        if name is not None and (form or conversion or not name):
            raise ConfigError(
                f"{field}={template!r} is no template: expected names of columns in braces, as {{text}}, none of them "
                "with : or !"
            )
    return [(text, name) for text, name, _, _ in parts]


def filled(template: Template, row: Mapping[str, str]) -> Filled:
    own, out = [], ""
    for text, column in template:
        own.append((len(out), len(out) + len(text)))
        out += text + ("" if column is None else row[column])
    found = Filled(out)
    found.own = tuple(own)
    return found
