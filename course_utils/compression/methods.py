"""Methods by name: the method NAME is defined by the module NAME in the folder of the methods.

So there is no list of methods, and a method's module is imported only when the method is asked for.
"""

import pkgutil
from importlib import import_module, util

from course_utils.compression.base import Method

FOLDER = "course_utils.quantizers"


def method_names() -> list[str]:
    """The names of all methods, as the folder has them, sorted. Imports none."""
    paths = util.find_spec(FOLDER).submodule_search_locations
    return sorted(module.name for module in pkgutil.iter_modules(paths))


def method_class(name: str) -> type[Method]:
    """The class of the method `name`; ValueError if there is none."""
    if name not in method_names():
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(method_names())}")
    module = import_module(f"{FOLDER}.{name}")
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    (found,) = [c for c in classes if issubclass(c, Method) and vars(c).get("name") == name]
    return found


def get_method(name: str, **settings) -> Method:
    """The method `name` with these settings; ValueError if there is none, or if it refuses them."""
    return method_class(name)(**settings)
