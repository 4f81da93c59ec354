import pytest


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's own; each under a name of its own, since imports are kept."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source):
        (tmp_path / f"{name}.py").write_text("import jax.numpy as jnp\nimport optax\n\n\n" + source)

    return write
