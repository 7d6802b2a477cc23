"""Shapes of models by name: one short function each, to train, to compare with, or to plan for.

The published ones have the dimensions of their config.json on Hugging Face and, tested, their numbers of parameters.
`tiny`, `small` and `gpt2_124m` take another `mlp`, so that a mixture differs from its dense row in that only.
"""
from typing import Any

from efficient_lm.models.moe.routing import LossFreeBias, SigmoidTopK, SoftmaxTopK
from efficient_lm.models.spec import GroupedQuery, Latent, MoE, Rope, Stack, SwiGLU, Transformer

BYTES = 320   # 256 bytes and the end of a document, padded to a multiple of 64


def experts(num_experts: int, top_k: int, hidden: int, **more) -> MoE:
  """Mixture whose tokens visit the `top_k` likeliest of `num_experts` experts of `hidden` units."""
  return MoE(num_experts=num_experts, hidden=hidden, router=SoftmaxTopK(top_k=top_k), **more)


def tiny(mlp: Any = None) -> Transformer:
  """0.7 million active parameters, over bytes: minutes on a laptop's CPU, where unrolled layers run faster."""
  attention = GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=32)
  stack = Stack(num_layers=4, attention=attention, mlp=mlp or SwiGLU(hidden=320), unroll=4)
  return Transformer(vocab_size=BYTES, dim=128, stacks=(stack,), tied=True)


def small(mlp: Any = None) -> Transformer:
  """14 million active parameters, over bytes: an hour on a CPU, minutes on one accelerator."""
  attention = GroupedQuery(num_heads=6, num_kv_heads=6, head_dim=64)
  stack = Stack(num_layers=8, attention=attention, mlp=mlp or SwiGLU(hidden=1024))
  return Transformer(vocab_size=BYTES, dim=384, stacks=(stack,), tied=True)


def gpt2_124m(mlp: Any = None) -> Transformer:
  """GPT-2 small (Radford et al. 2019) in today's parts: rotary positions, RMSNorm, and a SwiGLU with as many parameters
  as its 4 D wide MLP; vocabulary padded to a multiple of 128."""
  attention = GroupedQuery(num_heads=12, num_kv_heads=12, head_dim=64)
  stack = Stack(num_layers=12, attention=attention, mlp=mlp or SwiGLU(hidden=2048))
  return Transformer(vocab_size=50_304, dim=768, stacks=(stack,), tied=True, dtype='bfloat16')


def llama3_8b() -> Transformer:
  """Llama 3 8B (arXiv:2407.21783, table 3)."""
  attention = GroupedQuery(num_heads=32, num_kv_heads=8, head_dim=128, rope=Rope(theta=5e5))
  stack = Stack(num_layers=32, attention=attention, mlp=SwiGLU(hidden=14_336), remat='full')
  return Transformer(vocab_size=128_256, dim=4096, stacks=(stack,), norm_eps=1e-5, dtype='bfloat16')


def mixtral_8x7b() -> Transformer:
  """Mixtral 8x7B (arXiv:2401.04088, table 1)."""
  attention = GroupedQuery(num_heads=32, num_kv_heads=8, head_dim=128, rope=Rope(theta=1e6))
  stack = Stack(num_layers=32, attention=attention, mlp=experts(8, 2, 14_336), remat='full')
  return Transformer(vocab_size=32_000, dim=4096, stacks=(stack,), norm_eps=1e-5, dtype='bfloat16')


def olmoe_1b_7b() -> Transformer:
  """OLMoE-1B-7B (arXiv:2409.02060, table 10): gates are probabilities, not normalised over the chosen experts."""
  attention = GroupedQuery(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm='NH')
  mixture = MoE(num_experts=64, hidden=1024, router=SoftmaxTopK(top_k=8, normalize=False))
  stack = Stack(num_layers=16, attention=attention, mlp=mixture, remat='full')
  return Transformer(vocab_size=50_304, dim=2048, stacks=(stack,), norm_eps=1e-5, dtype='bfloat16')


def qwen3_30b_a3b() -> Transformer:
  """Qwen3-30B-A3B (arXiv:2505.09388, table 2)."""
  attention = GroupedQuery(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm='H', rope=Rope(theta=1e6))
  stack = Stack(num_layers=48, attention=attention, mlp=experts(128, 8, 768), remat='full')
  return Transformer(vocab_size=151_936, dim=2048, stacks=(stack,), dtype='bfloat16')


def deepseek_v3() -> Transformer:
  """DeepSeek-V3 (arXiv:2412.19437, section 4.2) without its multi-token prediction module: three dense layers first."""
  attention = Latent(num_heads=128, query_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
  router = SigmoidTopK(top_k=8, num_groups=8, top_groups=4, scale=2.5)
  mixture = MoE(num_experts=256, hidden=2048, router=router, balance=(LossFreeBias(),), num_shared=1)
  dense = Stack(num_layers=3, attention=attention, mlp=SwiGLU(hidden=18_432), remat='full')
  sparse = Stack(num_layers=58, attention=attention, mlp=mixture, remat='full')
  return Transformer(vocab_size=129_280, dim=7168, stacks=(dense, sparse), dtype='bfloat16')
