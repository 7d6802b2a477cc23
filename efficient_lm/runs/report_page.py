"""The report of one or more runs as files: `report.html` (one file, nothing loaded) and `report.png`."""
import base64
import html
import io
import json
from pathlib import Path

from efficient_lm.runs import charts, ledger, tracking
from efficient_lm.runs.results import Result, labelled, load
from efficient_lm.system import workdir as workdirs

NAMES = ('report.html', 'report.png')
COSTS = {
  'forward FLOPs per token': lambda row: row.size.flops_per_token,
  'bytes in memory': lambda row: row.size.bytes_in_memory,
}
# Shown small, in this order, when logged; the rest stays in metrics.jsonl and TensorBoard.
SERIES = ('learning_rate', 'grad_norm', 'tokens_per_second', 'mfu', 'load_balance', 'router_z', 'moe/max_violation',
          'moe/dead_experts', 'moe/router_entropy', 'moe/dropped_share', 'teacher_kl', 'skipped')


def write_report(workdir) -> Path:
  """Writes report.html and report.png of the one run in `workdir`; returns the former's path."""
  return write([load(workdir)], workdir)


def write(results: list[Result], folder) -> Path:
  """Writes the report of `results` into `folder`, which is made if it is missing."""
  drawings = _drawings(results)
  for name in (*NAMES, *(f'{name}.partial' for name in NAMES)): workdirs.place(folder, name)   # before anything is written
  path = workdirs.write(folder, NAMES[0], page(results))
  if drawings: workdirs.write(folder, NAMES[1], charts.png(drawings))
  return path


def _drawings(results: list[Result]) -> list:
  """Functions of a plot, one a large picture that there are figures for."""
  losses, evals = ({run.name: curves for run in results if (curves := run.curves(name))}
                   for name in ('loss', 'eval/bits_per_byte'))
  baselines = {name: value for run in results for name, value in run.baselines.items()}
  drawings = []
  if losses: drawings.append(lambda plot: charts.draw_loss(plot, losses))
  if evals: drawings.append(lambda plot: charts.draw_eval(plot, evals, baselines))
  for label, cost in COSTS.items():
    points = [(name, cost(row), row.quality.bits_per_byte) for name, row in labelled(results).items()
              if cost(row) and row.quality.bits_per_byte is not None]
    if len({cost for _, cost, _ in points}) > 1:
      drawings.append(lambda plot, points=points, label=label: charts.draw_pareto(plot, points, label))
  return drawings


def page(results: list[Result]) -> str:
  """The report as one HTML page."""
  title = ', '.join(run.name for run in results)
  figures = [f'<figure>{charts.svg(draw, 5.2, 3.2)}</figure>' for draw in _drawings(results)]
  sections = [_cards(results[0]) if len(results) == 1 else '', _section('Curves', _grid('wide', figures)),
              _section('Cost', _cost_table(labelled(results)))]
  for run in results:
    suffix = f': {run.name}' if len(results) > 1 else ''
    if run.load_LE: sections.append(_section(f'Expert load{suffix}', _image(tracking.load_heatmap(run.load_LE))))
    if len(results) == 1: sections.append(_section('Along the way', _small(run)))
    sections.append(_section(f'Sample{suffix}', f'<pre>{html.escape(run.sample)}</pre>' * bool(run.sample.strip())))
    for stage, lines in run.weights.items():
      heading = html.escape(f'Weights after {stage}{suffix}')
      sections.append(f'<details><summary>{heading}</summary>{_weights_table(lines)}</details>')
    if run.config:
      text = html.escape(json.dumps(run.config, indent=2, ensure_ascii=False))
      sections.append(f'<details><summary>Configuration{html.escape(suffix)}</summary><pre>{text}</pre></details>')
  return PAGE.replace('{title}', html.escape(title)).replace('{body}', ''.join(sections))


def _grid(kind: str, figures: list[str]) -> str:
  return f'<div class="{kind}">{"".join(figures)}</div>' if figures else ''


def _section(title: str, body: str) -> str:
  return f'<section><h2>{html.escape(title)}</h2>{body}</section>' if body else ''


def _cards(run: Result) -> str:
  """The figures that one looks for first."""
  last = run.rows[-1] if run.rows else ledger.Row(stage='')
  bits = run.curve('eval/bits_per_byte')[1]
  value = last.quality.bits_per_byte if last.quality.bits_per_byte is not None else bits[-1] if len(bits) else None
  beside = ', '.join(f'{name} {value:.3f}' for name, value in run.baselines.items())
  size, speed, seconds = last.size, last.speed, [row.effort.wall_seconds for row in run.rows]
  active = size.active_parameters if size.active_parameters != size.parameters else None
  last_step = run.metrics[-1]['step'] if run.metrics else None
  cards = [
    ('bits per byte', ledger.number(value), beside),
    ('parameters', ledger.quantity(size.parameters), f'{ledger.quantity(active)} active' if active else ''),
    ('FLOPs per token', ledger.quantity(size.flops_per_token), 'forward'),
    ('tokens per second', ledger.quantity(speed.tokens_per_second), last.origin.hardware or ''),
    ('time', ledger.duration(sum(filter(None, seconds)) or None), f'{last_step:,} steps' if last_step is not None else ''),
    ('peak memory', ledger.quantity(speed.peak_memory_bytes, 'B', 1024), speed.memory_source or ''),
  ]
  return '<div class="cards">' + ''.join(
    f'<div><small>{html.escape(name)}</small><b>{html.escape(figure)}</b><small>{html.escape(note)}</small></div>'
    for name, figure, note in cards if figure != '–') + '</div>'


def _cost_table(rows: dict[str, ledger.Row]) -> str:
  if not rows: return ''
  headings, texts = ledger.cells(list(rows.values()))
  said = {'hardware': [row.origin.hardware or '–' for row in rows.values()],
          'energy': [row.effort.energy_source or '–' for row in rows.values()]}
  differing = {name: values for name, values in said.items() if len(set(values)) > 1}
  head = ''.join(f'<th>{html.escape(heading)}</th>' for heading in ['', *headings, *differing])
  lines = []
  for i, label in enumerate(rows):
    lines.append(f'<tr><th>{html.escape(label)}</th>'
                 + ''.join(f'<td>{html.escape(text)}</td>' for text in texts[i])
                 + ''.join(f'<td class="text">{html.escape(values[i])}</td>' for values in differing.values()) + '</tr>')
  origin = next(iter(rows.values())).origin
  made = [*(f'{name}: {values[0]}' for name, values in said.items() if name not in differing and values[0] != '–'),
          *(f'{name} {version}' for name, version in origin.versions.items()),
          *([f'corpus {origin.corpus_hash[:12]}'] if origin.corpus_hash else []),
          *([f'seed {origin.seed}'] if origin.seed is not None else [])]
  said_by = {}   # each note once, in order
  for label, row in rows.items():
    for note in row.notes: said_by.setdefault(note, []).append(label)
  notes = [note if len(rows) == 1 else f'{", ".join(labels)}: {note}' for note, labels in said_by.items()]
  return (f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
          + ''.join(f'<p class="note">{html.escape(note)}</p>' for note in [*notes, ' · '.join(made)]))


def _weights_table(lines: list[dict]) -> str:
  """What each weight is stored as and multiplied by, and its bytes."""
  head = ''.join(f'<th>{heading}</th>' for heading in ('weight', 'stored as', 'multiplied', 'bytes', 'of float32'))
  texts = ((line['path'], line['kind'], line['product'], ledger.quantity(line['num_bytes'], 'B', 1024),
            f'{line["num_bytes"] / line["float_bytes"]:.3f}') for line in lines)
  body = ''.join(f'<tr><th>{html.escape(path)}</th>' + ''.join(
    f'<td{" class=text" if i < 2 else ""}>{html.escape(cell)}</td>' for i, cell in enumerate(cells)) + '</tr>'
    for path, *cells in texts)
  return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _small(run: Result) -> str:
  shown = {name: run.curves(name) for name in SERIES if len(run.curve(name)[0]) > 1}
  draw = lambda name, curves: charts.svg(lambda plot: charts.draw_series(plot, name, curves), 2.6, 1.6)
  return _grid('small', [f'<figure>{draw(name, curves)}</figure>' for name, curves in shown.items()])


def _image(image_HWC) -> str:
  from matplotlib.image import imsave
  buffer = io.BytesIO()
  imsave(buffer, image_HWC, format='png')
  return f'<img alt="expert load" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


PAGE = '''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body { margin: 2rem auto; max-width: 1120px; padding: 0 1.5rem; color: #1d2127; background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1.2rem; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .7rem; }
.note { margin: .5rem 0; } small, .note { color: #667; font-size: .8rem; } small { display: block; font-weight: normal; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: .8rem; }
.cards div { background: #f5f7f9; border-radius: 8px; padding: .7rem .9rem; } .cards b { font-size: 1.35rem; }
figure { margin: 0; } svg, img { width: 100%; height: auto; display: block; } img { width: auto; max-width: 100%; }
svg text { font-family: system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif !important; }
.wide { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); gap: 1rem; }
.small { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: .8rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; font-size: .87rem; text-align: right; border-bottom: 1px solid #e8eaed;
  white-space: nowrap; }
th { font-weight: 600; } tr:first-child th { color: #667; font-size: .8rem; } th:first-child, .text { text-align: left; }
.text { color: #667; font-size: .8rem; }
pre { background: #f5f7f9; border-radius: 8px; padding: .9rem; overflow-x: auto; white-space: pre-wrap;
  font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
details { margin-top: 2.2rem; } summary { cursor: pointer; font-weight: 600; }
</style></head><body><h1>{title}</h1>{body}</body></html>
'''
