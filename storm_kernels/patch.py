"""``storm_kernels.patch`` as a module: :mod:`storm_kernels.interop.patching` under the name by
which it is imported and pickled.
"""

from .interop.patching import Entry, PatchError, PatchReport, _rebuild, patch, patched, unpatch

__all__ = ["Entry", "PatchError", "PatchReport", "_rebuild", "patch", "patched", "unpatch"]
