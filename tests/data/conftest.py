import pytest


@pytest.fixture(scope='session', autouse=True)
def _own_cache(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('EFFICIENT_LM_CACHE', str(tmp_path_factory.mktemp('cache')))
    yield
