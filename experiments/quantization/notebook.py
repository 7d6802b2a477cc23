# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What does quantization cost, and by which method?
#
# `results.json` holds a float model of 0.73M parameters in three seeds, the same trained for 200 steps more, and both in few
# bits: by PTQ, which is round-to-nearest (RTN), AWQ or GPTQ, or by QAT for those 200 steps. 32 inputs share a scale;
# embedding, head and activations are floats.

# %%
import json
import pathlib
import statistics

import matplotlib.pyplot as plt

results = json.loads(pathlib.Path('results.json').read_text())
seeds = sorted({row['seed'] for row in results['rows']})


def bits_per_byte(method, bits):
  """By seed; empty where there is no such run."""
  found = {row['seed']: row['bits_per_byte'] for row in results['rows'] if row['method'] == method and row['bits'] == bits}
  return [found[seed] for seed in seeds if seed in found]


print(results['hardware'], results['versions'])
for method, bits in dict.fromkeys((row['method'], row['bits']) for row in results['rows'] if row['method'] != 'whole'):
  found = bits_per_byte(method, bits)
  print(f'{method:10s} {bits:>4s} bits a weight: {statistics.mean(found):.4f} bits per byte,',
        f'from {min(found):.4f} to {max(found):.4f}')

# %% [markdown]
# Held-out bits per byte against the bits of a weight. A point is the mean of the seeds, a bar spans them; the two lines are
# the float models that the others start from: their baselines.

# %%
NAMES = {'rtn': 'RTN', 'awq': 'AWQ', 'gptq': 'GPTQ', 'gptq_more': 'GPTQ, 200 more steps', 'qat': 'QAT, 200 more steps'}
figure, plot = plt.subplots(figsize=(7.5, 4.5))
for (method, name), color in zip(NAMES.items(), ('tab:gray', 'tab:olive', 'tab:blue', 'tab:cyan', 'tab:red')):
  widths = [width for width in ('1.58', '2', '3', '4', '8') if bits_per_byte(method, width)]
  found = [bits_per_byte(method, width) for width in widths]
  means = [statistics.mean(values) for values in found]
  spread = [[abs(end(values) - mean) for mean, values in zip(means, found)] for end in (min, max)]
  plot.errorbar(list(map(float, widths)), means, spread, label=name, color=color, marker='o', capsize=3)
for method, style in (('float', '--'), ('more', ':')):
  plot.axhline(statistics.mean(bits_per_byte(method, '32')), color='black', linewidth=0.8, linestyle=style,
               label={'float': 'float, 500 steps', 'more': 'float, 200 more steps'}[method])
plot.set(xlabel='bits of a weight, without scales', ylabel='held-out bits per byte', xscale='log')
plot.set_xticks([1.58, 2, 3, 4, 8], ['1.58', '2', '3', '4', '8'])
plot.minorticks_off()
plot.legend()
plt.show()

# %% [markdown]
# Is the order the same on every seed? The bits per byte that RTN, AWQ and GPTQ lose, seed by seed:

# %%
for bits in ('8', '4', '3', '2'):
  for seed, full, rtn, awq, gptq in zip(seeds, *(bits_per_byte(method, width) for method, width in (
      ('float', '32'), ('rtn', bits), ('awq', bits), ('gptq', bits)))):
    print(f'{bits} bits, seed {seed}: RTN {rtn - full:+.4f}, AWQ {awq - full:+.4f}, GPTQ {gptq - full:+.4f}')
