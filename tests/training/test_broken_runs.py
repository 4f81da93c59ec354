"""Run directories that were damaged or edited: never a bare traceback, whatever is in them."""

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxlm
from jaxlm.errors import JaxlmError
from tests.runs import THOROUGH
from tests.tiny import tiny

FILES = ("config.json", "tokenizer.json", "metrics.jsonl", "status.json", "lock")


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("broken") / "run")
    return folder, {name: (folder / name).read_bytes() for name in FILES}


def broken(content):
    """Strategies of what may become of a file's content."""
    return st.one_of(
        st.binary(max_size=60),
        st.integers(0, len(content)).map(lambda n: content[:n]),
        st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255)).map(
            lambda at: content[: at[0]] + bytes([content[at[0]] ^ at[1]]) + content[at[0] + 1 :]
        ),
        st.sampled_from([b"null", b"[]", b"{}", b'{"a": 1}', b"[" * 100_000, b'{"steps": 1e999}', b"\xff\xfe"]),
    )


@pytest.mark.slow
@settings(max_examples=100 if THOROUGH else 15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_broken_file_of_a_run_is_a_clear_error_or_no_matter(run, data):
    folder, whole = run
    name = data.draw(st.sampled_from(FILES))
    content = data.draw(broken(whole[name]))
    try:
        (folder / name).write_bytes(content)
        for use in (
            lambda: jaxlm.load(folder),
            lambda: jaxlm.train(tiny(steps=40, eval__every=20, checkpoint__every=20), folder),
        ):
            try:
                use()
            except JaxlmError as error:
                assert str(error) and "\n" not in str(error)
    finally:
        for name, content in whole.items():  # of all: a run writes its status anew, at another length
            (folder / name).write_bytes(content)
