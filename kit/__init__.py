"""kit: an open implementation of VideoAR (arXiv 2601.05966), tokenizer and generator."""

import importlib.util

__version__ = "0.1.0"


def _admit_torchvision() -> None:
    """Makes a torchvision built for CUDA importable beside a CPU-only torch.

    Such a wheel registers kernels for operators that its missing CUDA library would declare; importing it dies, and
    Lightning with it, through torchmetrics. Once declared here it imports, all but its box operators and image files.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        import torch

        global _operators  # the declarations live as long as this does
        _operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_admit_torchvision()
