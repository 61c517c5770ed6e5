"""The folders from which modules are imported: in this program, and in the Python processes that it starts.

Python looks first in the working directory (`python -m`, `python -c`) or in the script's folder. A file there with the
name of a module, such as `queue.py` beside a model or the user's own `torch.py`, would be run in place of the module.
So a started process has neither folder on its path. It loads Shoal from the same folder as this process, and everything
else from the other folders of this process's path, in the same order.
"""

import os
import site
import sys
from collections.abc import Iterable

# The folder, or the archive, that contains the package shoal.
_HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# The program of a started Python: `python -P -c _START MODULE PATHS ...`. The module gets the arguments after PATHS.
# Shoal may be in a folder that is not on the path, so its package is loaded from its file.
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
    """Return the command that runs a module of Shoal in a Python process of its own. Arguments may be appended."""
    import json  # not at the top: when this module is loaded, the program's own path may not be safe yet

    flags = sys.flags
    options = {"-I": flags.isolated, "-E": flags.ignore_environment, "-s": flags.no_user_site, "-S": flags.no_site}
    given = [option for option, is_set in options.items() if is_set]
    paths = json.dumps([safe_folders(folder for folder in sys.path if isinstance(folder, str)), _HOME])
    return [sys.executable, "-P", *given, "-c", _START, module, paths]


def remove_implicit_folders() -> None:
    """Remove the working directory and the script's folder from this program's own path."""
    sys.path[:] = safe_folders(sys.path)


def safe_folders(folders: Iterable[str]) -> list[str]:
    """Return the absolute paths of `folders`, without the working directory and the script's folder.

    If one of these belongs to the interpreter, or contains Shoal's installed packages, it is put last instead.
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
    """Return the absolute path of a folder or an archive; any other entry is returned unchanged, for import hooks.

    "" gives the working directory, or "" if that was deleted.
    """
    try:
        return os.path.abspath(folder) if folder == "" or os.path.exists(folder) else folder
    except OSError:
        return ""


def _implicit_folders() -> set[str]:
    """Return the folders that Python may have added to the path by itself, with symbolic links resolved.

    Archives are not included, since a file does not get into one by accident.
    """
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


_FIRST_WORKING_DIRECTORY = _absolute("")  # this one is on the path, even if the program changes its directory later
