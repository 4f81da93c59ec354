"""How a row of a table becomes a document: a column of text, or a prompt and its completion by templates."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from jaxlm.data.section import Section
from jaxlm.errors import ConfigError, DataError


class Document(NamedTuple):
    name: str  # unique in its source, and the same wherever the source lies
    text: str  # not empty, but for a prompt; no surrogates, so it has a UTF-8 form
    completion: str | None = None  # not empty; None where the document is no pair


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
    columns = {column: field for field, template in templates.items() for column in names(template, field)}
    if not names(completion, "data.completion"):
        raise ConfigError(f"data.completion={completion!r} names no column; write such as 'data.completion={{label}}'")

    def documents(name: str, where: str, row: Mapping[str, str]) -> Iterator[Document]:
        answer = completion.format_map(row)
        if not answer.strip():
            raise DataError(f"{where}: the completion is empty, by data.completion={completion!r}")
        yield Document(name, prompt.format_map(row), answer)

    return Form(columns, documents, True, ["pairs", prompt, completion])


def names(template: str, field: str) -> list[str]:
    """The columns that a template names. `field`, of the config, is for the error."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{field}={template!r} is no template: {error}; a brace itself is {{{{ or }}}}") from error
    for _, name, form, conversion in parts:
        if name is not None and (form or conversion or not name.isidentifier()):
            raise ConfigError(f"{field}={template!r} is no template: expected names of columns in braces, as {{text}}")
    return [name for _, name, _, _ in parts if name is not None]
