"""Build backend: setuptools, with the torch of the target environment in sight.

An isolated build gets an environment of its own. Asking for torch there would download a second copy, and
perhaps another version than the one the extension will meet; so the packages of the environment that is being
installed into are put at the end of the search path, behind everything that belongs to the build.
"""

import os
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks of PEP 517 and PEP 660)


def _target_site_packages() -> list[str]:
    """Site-packages of the running interpreter, and of an activated environment that a front end left behind."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    if environment := os.environ.get("VIRTUAL_ENV"):
        folders.append(sysconfig.get_path("platlib", vars={"base": environment, "platbase": environment}))
    return [folder for folder in dict.fromkeys(folders) if folder not in sys.path and os.path.isdir(folder)]


sys.path += _target_site_packages()
__all__ = build_meta.__all__
