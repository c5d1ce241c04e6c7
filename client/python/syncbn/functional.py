"""`syncbn.functional.batch_norm`, with the arguments of torch.nn.functional.batch_norm. It imports PyTorch."""

from syncbn.torch.functional import batch_norm, moments

__all__ = ["batch_norm", "moments"]
