"""What libraries say for themselves, kept out of the log."""

from __future__ import annotations

import logging
import sys
import warnings

NOISY = ("transformers", "bitsandbytes", "accelerate", "huggingface_hub", "torch")


def quiet_libraries() -> None:
    """To be called before they are imported: warnings by module, progress bars unless a person watches.

    bitsandbytes advises at its import to install a package of the name of one of ours, which it would not use here.
    """
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=rf"{name}(\..*)?")
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
