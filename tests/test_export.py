import pytest

from jaxlm import export


def call(*flags):
    return export.main(list(flags))


def test_the_door_says_where_the_model_lies(trained, capsys, tmp_path):
    out = tmp_path / "out"
    assert call(f"--checkpoint={trained}", f"--out={out}") == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert (out / "model.safetensors").is_file()
    assert call(f"--checkpoint={trained}", f"--out={out}") == 2
    assert f"--out='{out}' exists and is not an empty folder" in capsys.readouterr().err


def test_missing_things_are_named(trained, capsys, tmp_path):
    assert call(f"--checkpoint={tmp_path / 'none'}", f"--out={tmp_path / 'out'}") == 4
    assert "no checkpoint at" in capsys.readouterr().err
    assert call(f"--checkpoint={trained / 'checkpoints' / '999'}", f"--out={tmp_path / 'out'}") == 4
    assert "999" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(f"--checkpoint={trained}")
    assert not any(tmp_path.iterdir())
