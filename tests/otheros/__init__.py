"""Models of other operating systems' kernels, as far as a UDP socket sees them: they run on Linux.

`kernels` is what they do, as data with its sources; model.c does it, preloaded into a process whose
``sys.platform`` says that it is elsewhere (`running`). None of this is the operating system itself.
"""
