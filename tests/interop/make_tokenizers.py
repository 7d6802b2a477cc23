"""Small tokenizers of the three kinds that families have, and the ids that transformers gives.

  python tests/interop/make_tokenizers.py

Run by hand, with transformers installed (5.24 wrote what is committed).
"""
import json
import pathlib

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent / 'fixtures' / 'tokenizers'
TEXTS = ['The quick brown fox jumps over the lazy dog.', '  two spaces, a\ttab\n\nand two lines',
         'déjà vu — 漢字 😀', '', 'e\u0301 composed', 'one<|im_end|>two </s> three',
         'x = [1, 22, 333]  # comment\n', 'the the the', ' <code> is added']
CORPUS = TEXTS * 4 + [(pathlib.Path(__file__).parent / 'make_fixtures.py').read_text()]


def byte_level() -> Tokenizer:
  """As Qwen2's: NFC, then a cut by GPT-2's rules with single digits, then bytes; one text is a token by itself."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  cut = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(cut), 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
    vocab_size=320, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.add_special_tokens([AddedToken('<|endoftext|>'), AddedToken('<|im_end|>')])
  tokenizer.add_tokens([AddedToken('<code>', normalized=False)])
  return tokenizer


def pieces(prefix: bool) -> Tokenizer:
  """As Llama 2's, which puts a space before every text, or as Gemma's, which does not."""
  bare = Tokenizer(models.BPE())
  bare.pre_tokenizer = pre_tokenizers.Metaspace()
  bare.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=160, show_progress=False))
  learned = json.loads(bare.to_str())['model']
  first = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
  plain = [token for token in sorted(learned['vocab'], key=learned['vocab'].get) if token.isascii() or '▁' in token]
  vocab = {token: i for i, token in enumerate(dict.fromkeys([*first, *plain]))}
  merges = [tuple(pair) for pair in learned['merges'] if {*pair, ''.join(pair)} <= vocab.keys()]
  tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True))
  tokenizer.add_special_tokens(first[:3])
  if prefix:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    ends = [decoders.Strip(' ', 1, 0)]
  else:
    tokenizer.normalizer, ends = normalizers.Replace(' ', '▁'), []
    tokenizer.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')
  tokenizer.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), *ends])
  return tokenizer


def make(name: str, tokenizer: Tokenizer, bos: str | None, eos: str):
  """Saves it, with a post-processor that writes `bos` before texts, and what transformers makes of TEXTS."""
  if bos: tokenizer.post_processor = processors.TemplateProcessing(f'{bos} $A', None, [(bos, tokenizer.token_to_id(bos))])
  transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos).save_pretrained(HERE / name)
  loaded = transformers.AutoTokenizer.from_pretrained(HERE / name)
  split = loaded(TEXTS, add_special_tokens=False, split_special_tokens=True)['input_ids']
  expected = {'texts': TEXTS, 'ids': split, 'prompts': loaded(TEXTS, split_special_tokens=True)['input_ids'],
              'decoded': [loaded.decode(ids) for ids in split], 'eos': loaded.eos_token_id, 'size': len(loaded)}
  (HERE / name / 'expected.json').write_text(json.dumps(expected))


if __name__ == '__main__':
  make('bytes', byte_level(), None, '<|im_end|>')
  make('bytes_bos', byte_level(), '<|endoftext|>', '<|im_end|>')
  make('pieces', pieces(prefix=True), '<s>', '</s>')
  make('pieces_bare', pieces(prefix=False), '<s>', '</s>')
