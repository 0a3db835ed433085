"""Entry of the frozen program: the CNI plugin when a runtime calls, else the CLI."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class _Pack:
    """Imports modules from one file, which build.spec fills with all that an ADD needs.

    Finding and reading some thirty files would take a tenth of an ADD's time. A module that
    is not in the pack comes from its own file as usual.
    """

    def __init__(self, root: str) -> None:
        import marshal

        self._root = root
        with open(f"{root}/hot.pack", "rb") as pack:
            # As much ours as this file: both belong to the frozen program.
            self._code: dict[str, tuple[str, bool, bytes]] = marshal.loads(pack.read())  # noqa: S302

    def find_spec(self, name: str, _path: object, _target: object = None) -> ModuleSpec | None:
        """Part of the import protocol (importlib.abc.MetaPathFinder)."""
        entry = self._code.get(name)
        if entry is None:
            return None
        from _frozen_importlib import ModuleSpec

        file, package, _ = entry
        loader: Any = self  # the protocol asks for no base class
        spec = ModuleSpec(name, loader, origin=f"{self._root}/{file}", is_package=package)
        spec.has_location = True  # gives the module its __file__
        if package:
            spec.submodule_search_locations = [f"{self._root}/{os.path.dirname(file)}"]
        return spec

    def create_module(self, _spec: ModuleSpec) -> None:
        """Part of the import protocol (importlib.abc.Loader)."""

    def exec_module(self, module: ModuleType) -> None:
        """Part of the import protocol (importlib.abc.Loader)."""
        import marshal

        code = marshal.loads(self._code[module.__name__][2])  # noqa: S302 - see above
        exec(code, module.__dict__)  # noqa: S102 - what an import does


def _serve() -> None:
    """Serve a container runtime's request; does not return."""
    root = getattr(sys, "_MEIPASS", "")
    if root:
        sys.meta_path.insert(0, _Pack(root))
    from nearpath.cni.commands import main

    # The kernel frees our memory faster than Python would, and nothing waits in buffers.
    os._exit(main())


if __name__ == "__main__":
    if "CNI_COMMAND" in os.environ:
        _serve()
    from nearpath.cli.main import main

    raise SystemExit(main())
