"""Where modules are imported from: in this program, and in the Pythons that it starts.

Python looks first in the working directory (`python -m`, `python -c`) or in the script's folder. A file there that is
called like a module, `queue.py` beside a model or somebody's own `torch.py`, would be run in place of it. So what is
started has neither on its path, whoever put it there. It loads Shoal from where this process has it, and everything
else from the other folders that this process imports from, in the same order.
"""

import os
import site
import sys
from collections.abc import Iterable

_HOME = os.path.dirname(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
)  # the folder, or the archive, that Shoal lies in

# What a started Python runs, as `python -P -c _START MODULE PATHS ...`, which leaves MODULE and what follows PATHS as
# its arguments. Shoal may lie in a folder that is not on the path, so its package is loaded by its place.
_START = """\
import sys, json
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
_, module, paths, *rest = sys.argv
sys.path[:], home = json.loads(paths)
spec = PathFinder.find_spec("shoal", [home])
sys.modules["shoal"] = package = module_from_spec(spec)
spec.loader.exec_module(package)
sys.argv[:] = [module, *rest]
import runpy
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def python_command(module: str) -> list[str]:
    """The command that runs a module of Shoal in a process of its own; arguments may follow."""
    import json  # in here: the program's own path may not be safe yet when this module is loaded

    flags = sys.flags
    options = {"-I": flags.isolated, "-E": flags.ignore_environment, "-s": flags.no_user_site, "-S": flags.no_site}
    given = [option for option, is_set in options.items() if is_set]
    paths = json.dumps([safe(folder for folder in sys.path if isinstance(folder, str)), _HOME])
    return [sys.executable, "-P", *given, "-c", _START, module, paths]


def forget_implicit_folders() -> None:
    """Takes the working directory and the script's folder off this program's own path."""
    sys.path[:] = safe(sys.path)


def safe(folders: Iterable[str]) -> list[str]:
    """Absolute paths of `folders`, without the working directory and the script's folder.

    Where one of these is the interpreter's own, or Shoal and what it needs were installed into it, it comes last.
    """
    unsafe = _implicit_folders()
    kept, last = [], []
    for folder in filter(None, dict.fromkeys(map(_absolute, folders))):
        if os.path.realpath(folder) not in unsafe:
            kept.append(folder)
        elif _holds_installed_packages(folder):
            last.append(folder)
    return [*kept, *last]


def _absolute(folder: str) -> str:
    """The path of a folder or an archive; what is neither stays as it is, since an import hook may know it. The working
    directory, or "" once it is gone."""
    try:
        return os.path.abspath(folder) if folder == "" or os.path.exists(folder) else folder
    except OSError:
        return ""


def _implicit_folders() -> set[str]:
    """The folders that Python may have put on the path by itself, with symbolic links resolved. Archives are not among
    them: nobody leaves a file in one by accident."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    folders = {_FIRST_WORKING_DIRECTORY, _absolute(""), os.path.dirname(_absolute(script)) if script else ""}
    return {os.path.realpath(folder) for folder in folders if folder and os.path.isdir(folder)}


def _holds_installed_packages(folder: str) -> bool:
    import glob
    import sysconfig

    names = ("stdlib", "platstdlib", "purelib", "platlib")
    own = [*(sysconfig.get_path(name) for name in names), *site.getsitepackages(), site.getusersitepackages()]
    if os.path.realpath(folder) in map(os.path.realpath, own):
        return True
    return bool(glob.glob(os.path.join(glob.escape(folder), "shoal-*.dist-info")))


_FIRST_WORKING_DIRECTORY = _absolute("")  # what is on the path is this one, wherever the program goes later
