"""A process that lets a llama.cpp library quantise one file: `llama_library.py LIBRARY SOURCE TARGET FILE_TYPE`.

By itself, because a library that aborts takes its process along. Of llama.h it declares what has stood since 2023: the
settings begin with the number of threads and the type of file, 0 threads are as many as there are cores. The library
fills in the rest, however long it is in its version. Deliberately not here: which library (k_quants.py).
"""

from __future__ import annotations

import ctypes
import sys

LARGEST_FILE_TYPE = 1024  # llama.cpp's guessed types begin there


class QuantizeParams(ctypes.Structure):
    """llama_model_quantize_params and room for more than it has (64 bytes in llama.cpp 0.5)."""

    _fields_ = [("threads", ctypes.c_int32), ("file_type", ctypes.c_int32), ("rest", ctypes.c_uint64 * 63)]


def main() -> None:
    library, source, target, file_type = sys.argv[1:]
    llama = ctypes.CDLL(library)
    defaults, work = llama.llama_model_quantize_default_params, llama.llama_model_quantize
    defaults.restype, defaults.argtypes = QuantizeParams, []
    work.restype, work.argtypes = ctypes.c_uint32, [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams)]
    settings = defaults()
    if settings.threads != 0 or not 0 <= settings.file_type < LARGEST_FILE_TYPE:
        sys.exit(f"{library}: its settings are laid out otherwise than in any llama.h that is known here")
    settings.file_type = int(file_type)
    failed = work(source.encode(), target.encode(), ctypes.byref(settings))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
