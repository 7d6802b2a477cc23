"""What llama.cpp makes of a GGUF file: a program of its own, as a failed assertion there ends the process. It needs numpy
and llama-cpp-python, and nothing of this project.

  python engine.py model.gguf asked.json answered.npz

asked.json: {"ids": [...], "texts": [...]}. Answered: the logits of all of `ids` (T, V) at once, `steps` token by token, and
the ids of each text as one array, with `ends`. The cache of keys and values is kept in float32 and flash attention is off:
with its defaults, halves, logits differ by 2e-2. Weights stay in the order of the file: reordered for AMX they cannot be
multiplied where a machine has these instructions and does not let programs use them. One thread: more wait by spinning.
"""
import ctypes
import json
import sys

import llama_cpp as lib
import numpy as np


def opened(path: str, length: int):
  """(model, context) for texts of `length` tokens."""
  lib.llama_backend_init()
  settings = lib.llama_model_default_params()
  settings.n_gpu_layers, settings.use_extra_bufts = 0, False
  model = lib.llama_model_load_from_file(path.encode(), settings)
  if not model: sys.exit(f'llama.cpp does not load {path}')
  settings = lib.llama_context_default_params()
  settings.n_ctx = settings.n_batch = settings.n_ubatch = length
  settings.n_threads = settings.n_threads_batch = 1
  settings.type_k = settings.type_v = lib.GGML_TYPE_F32
  settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
  return model, lib.llama_init_from_model(model, settings)


def logits(model, context, ids: list[int], first: int = 0) -> np.ndarray:
  """(T, V), of tokens that stand from place `first` on."""
  batch = lib.llama_batch_init(len(ids), 0, 1)
  batch.n_tokens = len(ids)
  for i, token in enumerate(ids):
    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, first + i, 1, 1
    batch.seq_id[i][0] = 0
  if lib.llama_decode(context, batch): sys.exit('llama.cpp cannot compute')
  size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
  return np.stack([np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (size,)).copy() for i in range(len(ids))])


def ids_of(model, text: str) -> list[int]:
  """Without marks."""
  raw, most = text.encode(), 4 * len(text.encode()) + 8
  found = (lib.llama_token * most)()
  count = lib.llama_tokenize(lib.llama_model_get_vocab(model), raw, len(raw), found, most, False, False)
  return list(found[:count])


def main(path: str, asked: str, answered: str):
  """Asks and answers, by files."""
  with open(asked) as file: wanted = json.load(file)
  model, context = opened(path, len(wanted['ids']))
  whole = logits(model, context, wanted['ids'])
  lib.llama_memory_clear(lib.llama_get_memory(context), True)
  steps = np.concatenate([logits(model, context, [token], i) for i, token in enumerate(wanted['ids'])])
  texts = [ids_of(model, text) for text in wanted['texts']]
  tokens = np.array([token for ids in texts for token in ids], np.int64)
  np.savez(answered, logits=whole, steps=steps, tokens=tokens, ends=np.cumsum([*map(len, texts)]))


if __name__ == '__main__':
  said = lib.llama_log_callback(lambda level, text, data: sys.stderr.write(text.decode(errors='replace')) and None)
  lib.llama_log_set(said, ctypes.c_void_p(0))
  main(*sys.argv[1:])
