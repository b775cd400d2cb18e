"""The child's side of `fastrl.train.rewards.code`: confine this process, and run a program as `python program.py` does.

Run as a script, with nothing but the standard library: `python -I -S code_runner.py CPU_SECONDS MEMORY_BYTES
OUTPUT_BYTES SOURCE_FD FAILURE_FD`. If the kernel refuses a part of the confinement, the reason goes to FAILURE_FD and
no program runs.
"""

from __future__ import annotations

import builtins
import os
import sys
from types import ModuleType


def main() -> None:
    """Confine this process and run the program."""
    cpu_seconds, memory_bytes, output_bytes, source_fd, failure_fd = map(int, sys.argv[1:])
    with os.fdopen(source_fd, "rb") as file:
        source = file.read()
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, folder)
    import confine  # pyright: ignore[reportMissingImports]  # a sibling file, without its package

    sys.path.remove(folder)
    # The module `site`, which -S leaves out, gives these two.
    import _sitebuiltins

    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    try:
        # Started with -I -S, the path is the standard library.
        confine.confine(sys.path, cpu_seconds=cpu_seconds, memory_bytes=memory_bytes, file_bytes=output_bytes)
    except OSError as error:
        os.write(failure_fd, str(error).encode())
        os._exit(1)
    os.close(failure_fd)
    # The program is the module __main__: dataclasses, pickle and typing look its names up there.
    module = ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, __file__="program.py")
    for name in ("confine", "_sitebuiltins"):
        del sys.modules[name]
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)


if __name__ == "__main__":
    main()
