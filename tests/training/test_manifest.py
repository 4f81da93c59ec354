import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.training import manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    (folder / "params").mkdir()
    (folder / "params" / "a").write_bytes(bytes(range(100)))
    (folder / "data").write_bytes(b"")
    manifest.write(folder, step=3, metric=None)
    return folder


def test_a_folder_as_it_was_written_is_whole(folder):
    manifest.verify(folder)
    assert manifest.read(folder)["step"] == 3 and manifest.read(folder)["metric"] is None
    assert sorted(path.name for path in folder.iterdir()) == ["data", "manifest.json", "params"]


def test_a_file_that_came_later_shows(folder):
    (folder / "params" / "b").write_bytes(b"")
    with pytest.raises(ValueError, match="params/b was not saved with it"):
        manifest.verify(folder)
    (folder / "params" / "b").unlink()


@settings(max_examples=50)
@given(st.data())
def test_any_flipped_bit_of_the_manifest_itself_shows(folder, data):
    whole = (folder / manifest.NAME).read_bytes()
    position = data.draw(st.integers(0, 8 * len(whole) - 1))
    broken = bytearray(whole)
    broken[position // 8] ^= 1 << position % 8
    try:
        (folder / manifest.NAME).write_bytes(broken)
        try:
            same = json.loads(broken) == json.loads(whole)
        except ValueError:
            same = False
        if not same:
            with pytest.raises(ValueError, match="manifest.json is damaged"):
                manifest.verify(folder)
    finally:
        (folder / manifest.NAME).write_bytes(whole)
