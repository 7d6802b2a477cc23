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
# # What does each technique cost in quality, and what does it save?
#
# `results.json` holds a row for each run: the model that its last stage leaves.

# %%
import json
import pathlib

import matplotlib.pyplot as plt

results = json.loads(pathlib.Path('results.json').read_text())
print(results['date'], results['hardware'], results['versions'])
for row in sorted(results['rows'], key=lambda row: row['bits_per_byte']):
  print(f'{row["name"]:14s} {row["bits_per_byte"]:.4f} bits per byte, {row["bytes_in_memory"]:10,} bytes,',
        f'{row["nonzero_parameters"]:9,} of {row["parameters"]:9,} parameters are not zero')

# %% [markdown]
# Held-out bits per byte against the bytes of the model in memory, one point a run: better is below, smaller is on the left.

# %%
LEFT = ('baseline', 'labels_alone')   # labels of points that lie close to another
figure, plot = plt.subplots(figsize=(7.5, 4.5))
for row in results['rows']:
  name, place = row['name'], (row['bytes_in_memory'] / 2 ** 20, row['bits_per_byte'])
  plot.plot(*place, 'o', color='tab:red' if name == 'baseline' else 'tab:blue')
  plot.annotate(name, place, xytext=(-6 if name in LEFT else 6, -3), textcoords='offset points', fontsize=9,
                ha='right' if name in LEFT else 'left')
plot.set(xlabel='MiB in memory', ylabel='held-out bits per byte', xscale='log')
plot.set_xticks([0.5, 1, 2, 4, 8, 16], ['0.5', '1', '2', '4', '8', '16'])
plot.minorticks_off()
plot.margins(x=0.2)
plt.show()
