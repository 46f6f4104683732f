"""lpt-fast: Late Prompt Tuning as a PEFT method.

`import lpt_fast` makes PEFT know the method "LPT", so that saved adapters load by PEFT's and
Transformers' own classes. It costs nothing: what is heavy (torch, transformers, peft) is imported
when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys

__version__ = "0.1.0"

_EXPORTS = {
    "ActivationCache": "cache",
    "LPTConfig": "config",
    "LPTModel": "tuner",
    "LPTTrainer": "trainer",
    "LatePrompt": "late_prompt",
    "PackedBatch": "packing",
}
__all__ = [
    "ActivationCache",
    "LPTConfig",
    "LPTModel",
    "LPTTrainer",
    "LatePrompt",
    "PackedBatch",
    "__version__",
]


def __getattr__(name: str):
    if name in _EXPORTS:
        import peft  # noqa: F401

        _register()
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


def _register() -> None:
    """Registers the method, unless one of this package's modules is just being imported.

    A module that imports peft itself would be met half made. Then LPTConfig, or the next import of
    anything, registers.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{__name__}.") and getattr(module.__spec__, "_initializing", False):
            return
    importlib.import_module(".tuner", __name__).register()
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _AfterPeft)]


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
            if "peft" in sys.modules and self._loaded:
                self._looking = True
                try:
                    _register()
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
                _register()

            spec.loader.exec_module = exec_module
        return spec


if "peft" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterPeft())
