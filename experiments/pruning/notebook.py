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
# # What does it cost to take weights away?
#
# Three tables, drawn: a real model of 135M parameters pruned by every method, beside a peer's implementation
# (`results.json`); a small model trained here, pruned in the same ways, three seeds (`../sparsity`); and the same with less
# of its width, depth or experts, three seeds (`../shapes`).

# %%
import json
import pathlib
import statistics

import matplotlib.pyplot as plt

results, small, shapes = (json.loads(pathlib.Path(folder, 'results.json').read_text())
                          for folder in ('.', '../sparsity', '../shapes'))
print(results['hardware'], results['versions'])
peers = {'magnitude, 50 %': 536.9, 'Wanda, 50 %': 67.4, 'SparseGPT, 50 %': 62.8, 'magnitude, 2:4': 3266, 'Wanda, 2:4': 241.0,
         'SparseGPT, 2:4': 123.8}
for name, row in results['rows'].items():
  beside = f', {row["perplexity"] / peers[name] - 1:+.1%} beside the peer' if name in peers else ''
  print(f'{name:45s} perplexity {row["perplexity"]:8.2f}{beside}')

# %% [markdown]
# A real model, SmolLM2-135M: perplexity of WikiText-2, on a logarithmic axis. A ring is the peer's.

# %%
figure, plot = plt.subplots(figsize=(7, 3.5))
for i, name in enumerate(reversed(results['rows'])):
  plot.plot(results['rows'][name]['perplexity'], i, 'o', color='tab:blue')
  if name in peers: plot.plot(peers[name], i, 'o', color='tab:gray', fillstyle='none', markersize=10)
plot.set_yticks(range(len(results['rows'])), list(reversed(results['rows'])))
plot.set(xscale='log', xlabel='perplexity')
plot.grid(axis='x', alpha=0.3)
plt.show()

# %% [markdown]
# The small model: bits per byte above the dense one of the same seed, every seed a point.

# %%
bits = {(row['name'], row['seed']): row['bits_per_byte'] for row in small['rows']}
names, seeds = list(dict.fromkeys(name for name, _ in bits)), sorted({seed for _, seed in bits})
above = {name: [bits[name, seed] - bits['dense', seed] for seed in seeds] for name in names if name != 'dense'}
order = sorted(above, key=lambda name: -statistics.mean(above[name]))
figure, plot = plt.subplots(figsize=(7, 3.5))
for i, name in enumerate(order):
  plot.plot(above[name], [i] * len(seeds), 'o', color='tab:red', alpha=0.6)
  print(f'{name:22s} {statistics.mean(above[name]):+.4f}, from {min(above[name]):+.4f} to {max(above[name]):+.4f}')
plot.set_yticks(range(len(order)), order)
plot.set(xlabel='bits per byte above dense')
plot.grid(axis='x', alpha=0.3)
plt.show()

# %% [markdown]
# Less of a small model, recovered for 250 steps (blue), and the same shapes from scratch after as many (orange): bits per
# byte against parameters, every seed a point.

# %%
figure, plot = plt.subplots(figsize=(7, 3.5))
for name in dict.fromkeys(row['name'] for row in shapes['rows']):
  rows = [row for row in shapes['rows'] if row['name'] == name]
  color = 'black' if name in ('dense', 'mixture') else 'tab:orange' if name.endswith('scratch') else 'tab:blue'
  size, bits = rows[0]['parameters'] / 1e6, [row['bits_per_byte'] for row in rows]
  plot.plot([size] * len(bits), bits, 'o', color=color, alpha=0.6)
  plot.annotate(name.replace('_', ' '), (size, min(bits)), (0, -14), textcoords='offset points', ha='center')
  print(f'{name:20s} {size:.2f}M parameters, {rows[0]["flops_per_token"] / 1e6:.2f}M FLOPs, {statistics.mean(bits):.4f}')
plot.set(xscale='log', xlabel='million parameters', ylabel='bits per byte')
plot.set_xticks([0.5, 1, 2], ['0.5', '1', '2'])
plot.minorticks_off()
plot.margins(0.15)
plot.grid(alpha=0.3)
plt.show()
