"""Chats as a model was trained on them: its template, in Jinja, writes messages and marks as one text, and that becomes ids.

Templates are written for transformers (`apply_chat_template`), whose environment this is: sandboxed, whitespace around
blocks trimmed, and a few functions. A template is a program of strangers; the sandbox keeps it from all but the
messages, though not from taking long.

Marks that a template writes become their ids. The same characters in a message do not: before a template sees them, each
mark is hidden behind a character that stands nowhere else, and afterwards it is encoded as the letters that it is made of.
So nobody can end a message from within it.
"""
import datetime
import itertools
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.lazy import lazy

tokenizers = lazy('tokenizers')
PRIVATE = range(0xE000, 0xF900)   # characters that stand for nothing


def encode(tokenizer, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
  """int32 ids of a chat up to where the model's reply begins.

  Args:
    tokenizer: of `data.tokenizers`, with a template.
    messages: each with 'role' ('system', 'user' or 'assistant') and 'content'.

  Raises:
    ConfigError: there is no template, the package jinja2 is missing, or the template refuses such messages.
  """
  template = getattr(tokenizer, 'template', None)
  if not template: raise ConfigError('--chat', True, 'this model has no template for chats: leave --chat out')
  if tokenizer.bos is None and re.search(r'\bbos_token\b', template):
    raise ConfigError('--chat', True, 'its template begins with bos_token, and the tokenizer names none')
  letters = _letters(template, [message['content'] for message in messages], tokenizer.specials)
  hidden = [{**message, 'content': _hide(message['content'], letters)} for message in messages]
  text = {index: mark for mark, index in tokenizer.specials.items()}
  marks = {'bos_token': text.get(tokenizer.bos, ''), 'eos_token': text.get(tokenizer.eod, '')}
  return _ids(tokenizer, render(template, hidden, **marks), letters)


def render(template: str, messages: Sequence[Mapping[str, str]], **variables) -> str:
  """The text that a template makes of messages, up to where the reply begins. Raises ConfigError."""
  try:
    import jinja2
    compiled = _environment().from_string(template)
  except ImportError as error:
    raise ConfigError('--chat', True, 'needs the package jinja2 from 3.1.6 on: pip install "efficient_lm[hf]"') from error
  except (jinja2.TemplateError, RecursionError) as error:
    raise ConfigError('--chat', True, f'the template of this model cannot be read: {error}') from error
  # Whatever else a template raises, as strangers' programs do, is its refusal of these messages.
  try: return compiled.render(messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **variables)
  except Exception as error: raise ConfigError('--chat', True, f'the template refuses these messages: {error}') from error


def _environment():
  """Of jinja2 3.1.6, before which there were ways out of the sandbox. What templates may make of their own, dictionaries and
  namespaces, are given to them without the attributes of Python's classes."""
  import jinja2.ext
  import jinja2.sandbox
  import jinja2.utils
  if tuple(map(int, jinja2.__version__.split('.')[:3])) < (3, 1, 6): raise ImportError('jinja2 is older than 3.1.6')

  class Generation(jinja2.ext.Extension):
    """Marks what the model says, for training; here its content stands as it is."""
    tags = {'generation'}

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(('name:endgeneration',), drop_needle=True)

  class Namespace(jinja2.utils.Namespace):
    def __init__(self, **values):
      super().__init__()
      for name, value in values.items(): self[name] = value

    def __setitem__(self, name, value):
      if name.startswith('_'): raise jinja2.sandbox.SecurityError(f'{name!r} begins with an underscore')
      super().__setitem__(name, value)

  def refuse(message): raise jinja2.TemplateError(message)
  def to_json(value, **options): return json.dumps(value, ensure_ascii=False, **options)
  def now(form): return datetime.datetime.now().strftime(form)

  made = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                      extensions=[Generation, jinja2.ext.loopcontrols])
  made.filters['tojson'] = to_json
  made.globals |= {'raise_exception': refuse, 'strftime_now': now, 'namespace': Namespace}
  made.globals['dict'] = lambda **values: values
  return made


def _letters(template: str, contents: list[str], marks: Mapping[str, int]) -> dict[str, str]:
  """For each mark that stands in a message, a character that stands nowhere."""
  found = [mark for mark in sorted(marks, key=len, reverse=True) if any(mark in content for content in contents)]
  used = set(template).union(*contents)
  free = (chr(code) for code in PRIVATE if chr(code) not in used)
  return dict(zip(found, free))


def _hide(content: str, letters: Mapping[str, str]) -> str:
  content = content.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')   # what no tokenizer could take
  if not letters: return content
  return re.sub('|'.join(map(re.escape, letters)), lambda match: letters[match[0]], content)   # longer ones come first


def _ids(tokenizer, text: str, letters: Mapping[str, str]) -> np.ndarray:
  """Marks in `text` as ids, hidden ones as their characters."""
  marking = tokenizers.Tokenizer.from_str(tokenizer.model)
  marking.no_truncation()
  marking.no_padding()
  marked = lambda piece: marking.encode(piece, add_special_tokens=False).ids
  plain = lambda piece: tokenizer.encode(piece).tolist()
  if not letters: return np.array(marked(text), np.int32)
  mark_of = {letter: mark for mark, letter in letters.items()}
  pieces = [piece for piece in re.split(f'([{"".join(mark_of)}])', text) if piece]
  parts = [_inside(plain, mark_of[piece]) if piece in mark_of else _inside(marked, piece) if i else marked(piece)
           for i, piece in enumerate(pieces)]
  return np.array([*itertools.chain.from_iterable(parts)], np.int32)


def _inside(encode, piece: str) -> list[int]:
  """Ids of what does not begin a text: tokenizers that put a space before one see a line break there."""
  line, ids = encode('\n'), encode('\n' + piece)
  return ids[len(line):] if ids[:len(line)] == line else encode(piece)
