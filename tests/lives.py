"""Many lives of one run: processes that are forked from one that has imported all, so that they start in no time."""

import itertools
import multiprocessing
import os
import sys

from jaxlm import config
from tests.tiny import tiny

_CONTEXT = multiprocessing.get_context("forkserver")
_NUMBERS = itertools.count()
_CONTEXT.set_forkserver_preload(["jaxlm.training.loop"])


class Life:
    """A process that trains in a run directory."""

    def __init__(self, workdir, **changes):
        self._said = workdir.with_name(f"{workdir.name}.{next(_NUMBERS)}.err")
        text = config.to_json(config.resolve(tiny(**changes)))
        self._process = _CONTEXT.Process(target=_live, args=(text, workdir, self._said))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, seconds):
        """The exit code, or None where it lives on; minus its number for a signal."""
        self._process.join(seconds)
        return self._process.exitcode

    def signal(self, number):
        os.kill(self.pid, number)

    def said(self):
        """What it wrote to stderr."""
        return self._said.read_text() if self._said.exists() else ""


def _live(text, workdir, said):
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, sys.stderr.fileno())
    import jaxlm
    from jaxlm import errors

    sys.exit(errors.exit_code(lambda: jaxlm.train(config.from_json(text), workdir).exit_code))
