"""Makes PEFT know the method "LPT", whoever imports PEFT and when."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys

PACKAGE = __name__.split(".")[0]


def register() -> None:
    """Registers the method, unless one of this package's modules is just being imported.

    A module that imports peft itself would be met half made. Then LPTConfig, or the next import of
    anything, registers.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{PACKAGE}.") and getattr(module.__spec__, "_initializing", False):
            return
    importlib.import_module(".tuner", __package__).register()
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _AfterPeft)]


def register_with_peft() -> None:
    """Registers now, or directly after `peft` is imported for the first time."""
    if "peft" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterPeft())


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Registers the method directly after `peft` has been imported, whoever imports it and when.

    Importing peft here instead would cost every `lpt-fast --help` several seconds. The finder stays
    until peft has really run: many only ask whether it could be imported.
    """

    def __init__(self):
        self._looking = False
        self._loaded = False

    def find_spec(self, fullname, path=None, target=None):
        if self._looking:
            return None
        if fullname != "peft":
            # (Not for a module of ours, which would be there twice: registering may import it.)
            own = fullname.split(".")[0] == PACKAGE
            if "peft" in sys.modules and self._loaded and not own:
                self._looking = True
                try:
                    register()
                finally:
                    self._looking = False
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(fullname)  # by the other finders
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                self._loaded = True
                register()

            spec.loader.exec_module = exec_module
        return spec
