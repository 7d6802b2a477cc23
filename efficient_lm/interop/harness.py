"""A model as the Language Model Evaluation Harness asks for one (the package `lm-eval`, github.com/EleutherAI)."""
import functools

import tqdm
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from efficient_lm.errors import ConfigError
from efficient_lm.models import decode, requests

ROWS = 8   # texts that are continued at once


class Model(TemplateLM):
  """Log-likelihoods by `models.requests.score`, texts by `models.requests.continued`.

  A context begins with the tokenizer's bos where it has one. What nothing precedes, an empty context or the beginning of a
  text whose perplexity is asked for, is predicted from that mark or, where there is none, from the one that ends documents.
  """

  def __init__(self, model, tokenizer, longest: int, batch_size: int | None = None):
    """longest: tokens that are read of a text, context and continuation. batch_size: texts that are read at once (None: as
    many as make some thousand tokens, and ROWS that are continued)."""
    super().__init__()
    self.model, self.codec, self.max_length, self.batch_size = model, tokenizer, longest, batch_size

  @property
  def eot_token_id(self) -> int | None:
    return self.codec.eod

  @property
  def prefix_token_id(self) -> int:
    """Raises ConfigError for a tokenizer without marks."""
    found = self.codec.eod if self.codec.bos is None else self.codec.bos
    if found is None: raise ConfigError('--run', type(self.codec).__name__, 'has no mark from which a text could begin')
    return found

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    """With bos in front, unless that is declined. Raises ConfigError for characters that the tokenizer does not have."""
    begin = [] if self.codec.bos is None or add_special_tokens is False else [self.codec.bos]
    try: return [*begin, *self.codec.encode(string).tolist()]
    except ValueError as error: raise ConfigError('--tasks', string, str(error)) from error

  def _loglikelihood_tokens(self, requests_: list, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
    found = [(0.0, True)] * len(requests_)
    pairs = [(context, continuation) for _, context, continuation in requests_]
    scored = requests.score(self.model, pairs, longest=self.max_length, at_once=self.batch_size)
    for i, likelihood, greedy in tqdm.tqdm(scored, 'log-likelihoods', len(pairs), disable=disable_tqdm):
      found[i] = likelihood, greedy
      if requests_[i][0] is not None: self.cache_hook.add_partial('loglikelihood', requests_[i][0], found[i])
    return found

  def loglikelihood_rolling(self, requests_: list, disable_tqdm: bool = False) -> list[float]:
    """Each text in windows side by side, as the harness cuts them: every token is predicted once."""
    owners, windows = [], []
    for i, request in enumerate(requests_):
      ids = self.tok_encode(request.args[0], add_special_tokens=False)
      for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
        owners.append(i)
        windows.append((None, *utils.make_disjoint_window(window)))
    totals = [0.0] * len(requests_)
    for i, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)): totals[i] += likelihood
    for request, total in zip(requests_, totals): self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  @functools.cached_property
  def _decoder(self):
    return decode.ready(self.model)

  def generate_until(self, requests_: list, disable_tqdm: bool = False) -> list[str]:
    """Texts of one setting and of about one length together. Of a context that is too long the last tokens are read."""
    found = [''] * len(requests_)
    settings = [normalize_gen_kwargs(dict(request.args[1])) for request in requests_]
    contexts = [self._context(request.args[0], setting) for request, setting in zip(requests_, settings)]
    order = sorted(range(len(requests_)), key=lambda i: (repr(settings[i]), -len(contexts[i])))
    bar = tqdm.tqdm(total=len(order), desc='texts', disable=disable_tqdm)
    while order:
      chosen = [i for i in order[:self.batch_size or ROWS] if settings[i] == settings[order[0]]]
      order = order[len(chosen):]
      setting = settings[chosen[0]]
      texts = requests.continued(self._decoder, self.codec, [contexts[i] for i in chosen], until=setting['until'],
                                 num_tokens=setting['max_gen_toks'], sampling=_sampling(setting))
      for i, text in zip(chosen, texts):
        found[i] = text
        self.cache_hook.add_partial('generate_until', requests_[i].args, text)
      bar.update(len(chosen))
    bar.close()
    return found

  def _context(self, text: str, setting: dict) -> list[int]:
    room = self.max_length - setting['max_gen_toks']
    if room < 1:
      raise ConfigError('--max_length', self.max_length, f'must be above the {setting["max_gen_toks"]} tokens of an answer')
    return (self.tok_encode(text) or [self.prefix_token_id])[-room:]


def _sampling(setting: dict) -> decode.Sampling:
  """Greedy, unless a task asks for a temperature."""
  temperature = setting.get('temperature') or 0.0
  if not setting.get('do_sample', temperature > 0): return decode.Sampling(0)
  return decode.Sampling(temperature or 1.0, setting.get('top_k') or None, setting.get('top_p') or None)
