"""Who runs an operation: what a backend implements (:mod:`contract`), who is chosen
(:mod:`dispatch`), and one package for each backend.
"""
