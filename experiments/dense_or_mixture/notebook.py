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
# # Dense or mixture, at the same active size and on the same tokens?
#
# `results.json` holds six runs: `configs/baseline.py` and `configs/moe.py`, three seeds each. A token passes through as
# many feed-forward parameters in one as in the other; the mixture chooses them out of four times as many.

# %%
import json
import pathlib
import statistics

import matplotlib.pyplot as plt

results = json.loads(pathlib.Path('results.json').read_text())
runs = {model: [row for row in results['rows'] if row['model'] == model] for model in ('baseline', 'moe')}
print(results['hardware'], results['versions'])
for model, rows in runs.items():
  bits = [row['bits_per_byte'] for row in rows]
  print(f'{model:10s} {statistics.mean(bits):.4f} bits per byte, from {min(bits):.4f} to {max(bits):.4f};',
        f'{rows[0]["parameters"]:,} parameters, {rows[0]["active_parameters"]:,} active')

# %% [markdown]
# Held-out bits per byte while training, every seed a line. The two dashed lines are what `xz -9e` and an order-3
# Kneser-Ney model make of the same text.

# %%
figure, plot = plt.subplots(figsize=(7, 4))
for (model, rows), color in zip(runs.items(), ('tab:gray', 'tab:red')):
  for row in rows:
    steps, bits = zip(*row['curve'])
    plot.plot(steps, bits, color=color, label=model if row is rows[0] else None)
for (name, bits), style in zip(results['baselines'].items(), ('--', ':')):
  plot.axhline(bits, color='black', linewidth=0.8, linestyle=style, label=name)
plot.set(xlabel='step', ylabel='held-out bits per byte')
plot.legend()
plt.show()

# %% [markdown]
# Is the difference larger than that of seeds? The paired differences, seed by seed:

# %%
for dense, mixture in zip(runs['baseline'], runs['moe']):
  assert dense['seed'] == mixture['seed'] and dense['tokens'] == mixture['tokens']
  print(f'seed {dense["seed"]}: {mixture["bits_per_byte"] - dense["bits_per_byte"]:+.4f} bits per byte')
