"""Where models go: each target is a dataclass that `Export` takes, and that writes what some other engine opens."""
from efficient_lm.interop.gguf.writer import GgufFile
from efficient_lm.interop.litert import LiteRT
from efficient_lm.interop.stablehlo.target import StableHlo
from efficient_lm.interop.targets.compressed import CompressedTensors
from efficient_lm.interop.targets.folder import HuggingFaceFolder

__all__ = ['CompressedTensors', 'GgufFile', 'HuggingFaceFolder', 'LiteRT', 'StableHlo']
