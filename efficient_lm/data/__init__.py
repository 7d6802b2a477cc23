"""Text for training and evaluation: sources, tokenizers, rows, batches. Needs nothing but numpy to import."""
from efficient_lm.data.corpus import Corpus, OpenCorpus
from efficient_lm.data.markov import Markov, MarkovMixture
from efficient_lm.data.sources import HuggingFaceDataset, PythonPackages, StandardLibrary, TextFiles
from efficient_lm.data.tokenizers import BPE, ByteTokenizer, SymbolTokenizer

__all__ = ['BPE', 'ByteTokenizer', 'Corpus', 'HuggingFaceDataset', 'Markov', 'MarkovMixture', 'OpenCorpus',
           'PythonPackages', 'StandardLibrary', 'SymbolTokenizer', 'TextFiles']
