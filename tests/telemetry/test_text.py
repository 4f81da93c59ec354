import pytest

from jaxlm.telemetry.text import aligned


def test_cells_are_as_wide_as_their_column():
    rows = [("name", "n", "what"), ("a", "1,000", "first"), ("longer", "7", "")]
    assert aligned(rows, right={1}) == ["name        n  what", "a       1,000  first", "longer      7"]
    assert aligned(rows)[1] == "a       1,000  first"
    assert aligned([]) == []


def test_rows_of_different_lengths_are_a_mistake():
    with pytest.raises(ValueError, match="shorter|longer"):
        aligned([("a", "b"), ("c",)])
