"""What a study must not decide twice, and what it says of an edit."""

import pytest

from jaxlm.ablation import study
from jaxlm.ablation.memory import Memory
from jaxlm.errors import DataError
from tests.ablation.small import PEAK, arms, small


def trials(seeds=(0, 1), **fields):
    made = small(seeds=seeds, **fields)
    return [study.trial(cfg, name, seed) for name, cfg in arms(made).items() for seed in seeds]


def test_memory_is_read_again(tmp_path):
    first = Memory(tmp_path / "study.json")
    first.lanes["a"], first.steps["seconds"]["b"] = 4, 0.5
    assert first.note(trials()) == []
    again = Memory(tmp_path / "study.json")
    assert (again.lanes, again.steps) == ({"a": 4}, {"seconds": {"b": 0.5}, "joules": {}})
    assert again.note(trials()) == []


def test_memory_without_a_directory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory = Memory()
    memory.write()
    assert memory.note(trials()) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", '{"lanes": {}', "[]", "null", '{"lanes": {}, "seconds": {}}', "\xff"])
def test_damaged_memory_names_its_file(tmp_path, text):
    path = tmp_path / "study.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=f"{path} is damaged: .* delete it"):
        Memory(path)
    assert path.read_bytes() == text.encode("latin-1")


def test_an_edited_study_says_which_trials_stay_are_new_and_are_gone(tmp_path):
    def edited(**fields):
        return Memory(tmp_path / "study.json").note(trials(**fields))

    assert edited(variants={"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}}) == []
    assert edited(seeds=(0, 1, 2), variants={"clip": {}, "b2": {"optimizer.scale_by_adam.b2": 0.9}}) == [
        "the study was edited: 4 trials stay, 2 are new (clip seed=2, b2 seed=2)"
    ]
    assert edited(variants={"clip": {}}) == [
        "the study was edited: 2 trials stay, 0 are new, 4 are no longer looked at but keep their directories "
        "(clip seed=2, b2 seed=0, b2 seed=1, ...)"
    ]
    assert edited(variants={"clip": {PEAK: 0.5}}) == [
        "the study was edited: 0 trials stay, 2 are new (clip seed=0, clip seed=1), 2 are no longer looked at but "
        "keep their directories (clip seed=0, clip seed=1)"
    ]
    assert edited(variants={"clip": {PEAK: 0.5}}) == []


def designed(tmp_path, *, over, seeds=(0, 1), **fields):
    made = small(seeds=seeds, **fields)
    return Memory(tmp_path / "study.json").design(arms(made), seeds, trials(seeds, **fields), lambda address: over)


def test_a_design_counts_once_one_of_its_trials_is_over(tmp_path):
    assert designed(tmp_path, over=False) == []
    assert designed(tmp_path, over=False, seeds=(0, 1, 2)) == []  # the first was seen by nobody
    said = "seeds were added after results were seen: (0, 1, 2), then (0, 1, 2, 3); the intervals do not account for it"
    for over in (True, True, False):  # nor do directories that are gone undo it
        assert designed(tmp_path, over=over, seeds=(0, 1, 2, 3)) == [said]


def test_other_seeds_and_dropped_variants_are_told(tmp_path):
    assert designed(tmp_path, over=True) == []
    (line,) = designed(tmp_path, over=True, seeds=(5,))
    assert line.startswith("seeds were changed after results were seen: (0, 1), then (5,);")
    renamed = {"clip": {}, "beta": {"optimizer.scale_by_adam.b2": 0.9}}
    assert designed(tmp_path, over=True, seeds=(5,), variants=renamed)[1:] == [
        "variants were dropped after results were seen: no clip; the correction for several does not count them"
    ]


def test_a_variant_that_is_another_under_its_name_is_told(tmp_path):
    assert designed(tmp_path, over=True) == []
    edited = small().variants | {"b2": {"optimizer.scale_by_adam.b2": 0.5}}
    said = "variants were edited after results were seen: b2; the correction for several counts one edition only"
    assert designed(tmp_path, over=True, variants=edited) == [said]
    assert designed(tmp_path, over=True) == [said]


def test_a_design_that_gave_nothing_new_before_it_was_changed_was_seen_by_nobody(tmp_path):
    def now(seeds, over):
        memory = Memory(tmp_path / "study.json")
        return memory.design(arms(small()), seeds, trials(seeds), over)

    done = {one.address for one in trials((0, 1))}
    assert now((0, 1), lambda address: False) == []
    (line,) = now((0, 1, 2), done.__contains__)
    assert "(0, 1), then (0, 1, 2);" in line
    (line,) = now((0, 1, 2, 3), done.__contains__)
    assert "(0, 1), then (0, 1, 2, 3);" in line


def test_a_design_that_shares_no_arm_has_new_results(tmp_path):
    """As a first try of a few steps in the same directory."""
    assert designed(tmp_path, over=True, seeds=(0,), steps=2) == []
    assert designed(tmp_path, over=True, seeds=(0, 1, 2)) == []


def test_a_memory_of_earlier_versions_is_read(tmp_path):
    path = tmp_path / "study.json"
    path.write_text('{"lanes": {"a": 4}, "steps": {"seconds": {}, "joules": {}}, "trials": {}}')
    assert Memory(path).lanes == {"a": 4}
    assert designed(tmp_path, over=True) == []
