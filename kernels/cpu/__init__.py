"""The CPU's kernels in C, one shared library with a plain C interface, loaded by ctypes.

How the sources are laid out, and what a new kernel keeps to:

- `cpu.h` comes first everywhere: `EXPORT`, the instruction sets. `vector.h` turns one body of code into three: a
  kernel's body lives in a header of its own (`nf4_body.h`), which its source includes once per instruction set (the
  second and third under `#if defined(__x86_64__)`):

      #define ISA ISA_AVX2
      #include "vector.h"
      #include "nf4_body.h"
      #include "vector_end.h"

  Inside a body, functions are `static TARGET ... NAME(strip)(...)`; `VEC`, `LANES`, `vload`, `vfma` ... are the vector.
  A table by instruction set then picks the function: `static const strip_fn strips[] = ISA_TABLE(strip);`.
- An exported function is `EXPORT int32_t loraplex_<name>(int32_t isa, int32_t threads, ...)`: every size an `int64_t`,
  every tensor a pointer to contiguous memory. It opens one parallel region with `num_threads(threads)`. It returns 0
  (or a count), or -1 where it found no memory for its work space; all else that is wrong the Python side refuses.
- No state between calls, no allocation inside a parallel region, no reading past a tensor's end (sanitizers run on it).
- A row's sum has one order, whatever the rows beside it and the number of threads.
- Never `-march=native`, never `-ffast-math`; `vfma` is written where a fused product is meant (`-ffp-contract=off`).

A new source goes into `sources` and its headers into `depends` in pyproject.toml; a new function's arguments into
`library.py`, which finds the library and says which instruction set runs; its Python side into `operations.py`, tensors
in and tensors out, with the name of its twin in `kernels/reference.py`. The library is built by the package's install,
or in place by `make native`; where there was no compiler, `load` returns None and plain PyTorch serves.
"""
