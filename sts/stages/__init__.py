"""What each chapter computes, one file a chapter. Importing this package registers every stage."""

import importlib
import pkgutil

from sts.run import others, resources  # noqa: F401  (stages name resources)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
