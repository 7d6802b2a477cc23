"""Where models go: each target is a dataclass that `Export` takes, and that writes what some other engine opens."""
from efficient_lm.interop.targets.compressed import CompressedTensors
from efficient_lm.interop.targets.folder import HuggingFaceFolder

__all__ = ['CompressedTensors', 'HuggingFaceFolder']
