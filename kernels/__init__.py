"""Device code and its launchers, installed as ``dlkern.kernels``.

Nothing here knows autograd, modules or policy. Every implementation of an op is a module
``dlkern.kernels.<backend>.<op>`` with three functions of one signature on every backend:
``forward``, ``backward`` and ``supports(request) -> str | None``.
"""
