"""What this processor can do, asked without an instruction that it may not have."""

cdef extern from "c/processor.h":
    bint has_v3()
    bint has_v4()


def supports(str level):
    """Whether this processor, and its operating system, run code of `level`."""
    return level == "baseline" or (level == "x86-64-v3" and has_v3()) or (
        level == "x86-64-v4" and has_v4()
    )
