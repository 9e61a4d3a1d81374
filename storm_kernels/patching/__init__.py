"""How :mod:`storm_kernels.patch` works: what a module is (recognise), how its forward is called (signature), whether ours agrees with it (trial),
and how its class changes and changes back (classes).
"""
