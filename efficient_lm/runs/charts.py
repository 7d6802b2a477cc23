"""The pictures of a report: curves of a run and quality against cost over runs, drawn with matplotlib on `Figure`s.

What is drawn of a run are its curves, one a stage: pairs of arrays, steps and values. No line joins two stages. A value that
is not finite is marked, not left out in silence.
"""
import io
import itertools

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

# Okabe and Ito's colours, which colour-blind readers can tell apart; the first is for a run on its own.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#6B6B6B')
STYLE = {
  'font.family': 'sans-serif', 'font.size': 9,
  'axes.titlesize': 10, 'axes.titleweight': 'bold', 'axes.titlelocation': 'left',
  'axes.spines.top': False, 'axes.spines.right': False, 'axes.edgecolor': '#8a8f98', 'axes.labelcolor': '#4a4f57',
  'xtick.color': '#8a8f98', 'ytick.color': '#8a8f98', 'xtick.labelcolor': '#4a4f57', 'ytick.labelcolor': '#4a4f57',
  'axes.grid': True, 'grid.color': '#e8eaed', 'axes.axisbelow': True, 'legend.frameon': False, 'svg.fonttype': 'none',
  'svg.hashsalt': 'charts',   # or the names of shapes within a picture would be drawn by chance
}
MAX_POINTS = 1000   # of a line; more are not seen and make pages heavy


def svg(draw, width: float, height: float) -> str:
  """The picture that `draw(plot)` makes, as an <svg> element for a page; inches. Margins are fixed: a layout engine
  would take longer than the drawing."""
  with rc_context(STYLE):
    picture, buffer = Figure(figsize=(width, height)), io.StringIO()
    left, right, bottom, top = (0.65, 0.45, 0.5, 0.3) if width > 4 else (0.55, 0.1, 0.25, 0.3)
    draw(picture.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)))
    picture.savefig(buffer, format='svg', transparent=True, metadata={'Date': None, 'Creator': None})
  text = buffer.getvalue()
  return text[text.index('<svg'):]


def png(drawings: list) -> bytes:
  """All of `drawings` (functions of a plot) in one picture, two in a row."""
  columns = min(2, len(drawings))
  rows = -(-len(drawings) // columns)
  with rc_context(STYLE):
    picture = Figure(figsize=(5.2 * columns, 3.4 * rows), layout='constrained')
    for i, draw in enumerate(drawings): draw(picture.add_subplot(rows, columns, i + 1))
    buffer = io.BytesIO()
    picture.savefig(buffer, format='png', dpi=130)
  return buffer.getvalue()


def smoothed(values: np.ndarray) -> np.ndarray:
  """Moving average over the last fiftieth of the points (exponential, without a bias towards the start)."""
  decay = 1 - 1 / max(1, len(values) / 50)
  total, weight, result = 0.0, 0.0, np.empty(len(values))
  for i, value in enumerate(values):
    if np.isfinite(value): total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
    result[i] = total / weight if weight else np.nan
  return result


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Every k-th point and the last."""
  keep = np.arange(len(steps)) % max(1, -(-len(steps) // MAX_POINTS)) == 0
  keep[-1:] = True
  return steps[keep], values[keep]


def draw_loss(plot, runs: dict[str, list[tuple]]):
  """Training losses by run: as logged (faint) and smoothed. The scale leaves out the fall of the first steps."""
  lows, highs = [], []
  for color, (name, curves) in zip(_colors(), runs.items()):
    labels = itertools.chain([name], itertools.repeat('_'))   # in the legend once
    for (steps, values), label in zip(curves, labels):
      plot.plot(*thinned(steps, values), color=color, alpha=0.25, linewidth=0.8)
      plot.plot(*thinned(steps, smoothed(values)), color=color, linewidth=1.6, label=label)
      bad = ~np.isfinite(values)
      if bad.any(): plot.plot(steps[bad], np.full(bad.sum(), 0.98), 'x', color='#c00000',
                              transform=plot.get_xaxis_transform(), label=f'{name}: not finite')
      seen = values[np.isfinite(values)]
      if seen.size: lows.append(seen.min()), highs.append(np.quantile(seen, 0.98 if seen.size > 50 else 1))
  if lows and max(highs) > min(lows):
    margin = 0.05 * (max(highs) - min(lows))
    plot.set_ylim(min(lows) - margin, max(highs) + margin)
  plot.set(title='training loss', xlabel='step', ylabel='nats per token')
  _legend(plot, len(runs) > 1)


def draw_eval(plot, runs: dict[str, list[tuple]], baselines: dict[str, float]):
  """Bits per byte on held-out text by run, beside those of compressors on the same text."""
  several = len(runs) > 1
  for color, (name, curves) in zip(_colors(), runs.items()):
    last_step, last = curves[-1][0][-1], curves[-1][1][-1]
    labels = itertools.chain([f'{name}: {last:.3f}'], itertools.repeat('_'))
    for (steps, values), label in zip(curves, labels):
      plot.plot(*thinned(steps, values), color=color, linewidth=1.6, marker='o', markersize=3 * (len(steps) < 40),
                label=label)
    if not several: plot.annotate(f'{last:.3f}', (last_step, last), (5, 0), textcoords='offset points', color=color,
                                  va='center', fontsize=9, annotation_clip=False)
  lowest = min(baselines.values(), default=None)
  for name, value in baselines.items():
    plot.axhline(value, color='#6B6B6B', linestyle='--', linewidth=1)
    # The lowest one's name below its line: two compressors are often close, and names above both would overlap.
    offset, side = ((0, -2), 'top') if value == lowest and len(baselines) > 1 else ((0, 2), 'bottom')
    plot.annotate(f'{name} {value:.3f}', (1, value), offset, xycoords=plot.get_yaxis_transform(), ha='right', va=side,
                  textcoords='offset points', color='#4a4f57', fontsize=8)
  plot.set(title='held-out text', xlabel='step', ylabel='bits per byte')
  _legend(plot, several)


def draw_pareto(plot, points: list[tuple[str, float, float]], label: str):
  """points: (name, cost, bits per byte). The line joins those that no other one beats in both."""
  best, front = np.inf, []
  for _, cost, quality in sorted(points, key=lambda point: point[1:]):
    if quality < best:
      front.append((cost, quality))
      best = quality
  if len(front) > 1: plot.step(*zip(*front), where='post', color='#b9bec6', linewidth=1.2, zorder=1)
  costs = [cost for _, cost, _ in points]
  if max(costs) > 20 * min(costs): plot.set_xscale('log')
  plot.xaxis.set_major_formatter(EngFormatter(sep=' '))
  plot.xaxis.set_minor_formatter(NullFormatter())
  plot.margins(0.3, 0.15)
  for color, (_, cost, quality) in zip(_colors(), points):
    plot.scatter(cost, quality, color=color, s=34, zorder=2, edgecolor='white', linewidth=0.8)
  to_fractions = plot.transData + plot.transAxes.inverted()
  places = label_places([name for name, _, _ in points], to_fractions.transform([point[1:] for point in points]))
  for color, (name, cost, quality), (side, rise) in zip(_colors(), points, places):
    plot.annotate(name, (cost, quality), (6 * side, rise), ha='left' if side > 0 else 'right', va='center',
                  textcoords='offset points', fontsize=8, color=color)
  plot.set(title=f'quality against {label}', xlabel=label, ylabel='bits per byte')


def label_places(names: list[str], fractions) -> list[tuple[int, int]]:
  """For each name beside its point (fractions of a plot's width and height): the side, 1 for right, and its rise in points
  of type. The first place that crosses no name before it and no border: a little below the point, where no line runs, then
  farther off."""
  width, height, letter, line = 280, 190, 4.7, 10   # in points of type, of the smallest plot and of its letters: about
  taken, places = [], []
  for name, (x, y) in zip(names, np.asarray(fractions) * (width, height)):
    choices = [(side, rise) for rise in (-6, 6, -18, 18, -30, 30) for side in (1, -1)]
    boxes = []
    for side, rise in choices:
      left = x + 6 if side > 0 else x - 6 - letter * len(name)
      boxes.append((left, left + letter * len(name), y + rise - line / 2, y + rise + line / 2))
    crosses = lambda a, b: a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
    free = [i for i, box in enumerate(boxes) if not any(crosses(box, other) for other in taken)]
    inside = [i for i in free if boxes[i][0] >= 0 and boxes[i][1] <= width and boxes[i][2] >= 0 and boxes[i][3] <= height]
    best = next(iter(inside or free), 0)
    taken.append(boxes[best])
    places.append(choices[best])
  return places


def draw_series(plot, name: str, curves: list[tuple]):
  """A small picture of one more thing that was logged."""
  for steps, values in curves:
    plot.plot(*thinned(steps, values), color=COLORS[0], linewidth=1, marker='.', markersize=3 * (len(steps) == 1))
  plot.yaxis.set_major_formatter(EngFormatter(sep=''))
  plot.xaxis.set_major_formatter(EngFormatter(sep=''))
  plot.locator_params(nbins=4)
  logged = np.concatenate([values for _, values in curves])
  finite = logged[np.isfinite(logged)]
  if finite.size and finite.min() == finite.max():   # or the axis would be of thousandths of nothing
    plot.set_ylim(finite[0] - 1, finite[0] + 1)
    plot.set_yticks([finite[0]])
  plot.set_title(name)


def _colors():
  while True: yield from COLORS


def _legend(plot, several: bool):
  if several or any('finite' in text for text in plot.get_legend_handles_labels()[1]): plot.legend(fontsize=8)
