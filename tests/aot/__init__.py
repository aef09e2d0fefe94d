"""Ahead-of-time gate: Triton's kernels compiled for GPUs without one, and what they take held to limits.

Every kernel in every launch configuration and dtype (a job, which has a label) is compiled for sm_80, sm_90, sm_100
and sm_120. Nothing may be spilled (no stack, no local memory), shared memory stays under the architecture's limit
(the compiler does not hold it), registers under 110 % of those in ``registers.json`` (or 8 more), and wgmma stands in
sm_90's code where a job says so. ``registers.json`` has registers by Triton version, label and architecture, and for
each label the hash of what they were found for: source of the kernel and of all that it calls, signature, constants,
options.

* ``python -m tests.aot check``: every job that the table lacks or whose hash has changed is compiled (and is an error
  until the table is updated), and of the others a subset that covers each kernel's configurations, dtypes and
  architectures and moves on from day to day. ``--full`` compiles all.
* ``python -m tests.aot update``: compiles what the table lacks or whose hash has changed (``--full``: all) and writes
  it down. What spills or is over a limit is not written down; nor are more registers without ``--accept-growth``.
* ``python -m tests.aot list``: the labels, as JSON.

Each command speaks for the Triton that is installed: update with each one that CI runs.

A new op brings a module ``jobs/<op>.py`` with a function ``jobs() -> Iterator[Job]``; it is found by its name. Every
``@triton.jit`` function of ``kernels/triton`` whose name ends in ``_kernel`` must be compiled by some job: one that
is not is an error of ``check``. Words of a label tell jobs of one kernel apart, and the subset covers each of a
kernel's words: configuration, dtype and mode should each be a word without spaces.
"""
