"""A slice of one host is told from one of several before JAX is loaded."""
import http.server
import threading

import pytest

from efficient_lm.parallel import tpu


@pytest.fixture
def here(monkeypatch):
  """As if this machine had a TPU."""
  monkeypatch.setattr(tpu, '_is_here', lambda: True)


@pytest.fixture
def metadata():
  """metadata(text) -> variables that point to a metadata server which answers with it."""
  servers, asked = [], []
  def serve(text):
    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        asked.append((self.path, self.headers['Metadata-Flavor']))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())
      def log_message(self, *words): pass
    servers.append(http.server.HTTPServer(('127.0.0.1', 0), Handler))
    threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
    return {'GCE_METADATA_IP': f'127.0.0.1:{servers[-1].server_port}'}
  serve.asked = asked
  yield serve
  for server in servers: server.shutdown(), server.server_close()


@pytest.mark.parametrize('hosts', [1, 4])
def test_the_metadata_server_is_asked(here, metadata, hosts):
  assert tpu.num_hosts(metadata(','.join(f'unknown:unknown:10.0.0.{i}' for i in range(hosts)))) == hosts
  assert metadata.asked == [(f'/{tpu.ENDPOINTS}', 'Google')]


@pytest.mark.parametrize(('variables', 'hosts'), [
  ({'TPU_WORKER_HOSTNAMES': 'a'}, 1), ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 2),
  ({'TPU_PROCESS_ADDRESSES': 'a:1,b:1,c:1'}, 3), ({'TPU_WORKER_HOSTNAMES': 'a,b', 'MEGASCALE_NUM_SLICES': '2'}, 4),
  ({'TPU_SKIP_MDS_QUERY': '1'}, 1), ({'TPU_WORKER_HOSTNAMES': 'a,b', 'JAX_PLATFORMS': 'cpu'}, 1),
  ({'TPU_WORKER_HOSTNAMES': 'a,b', 'JAX_PLATFORMS': 'tpu,cpu'}, 2)])
def test_variables_are_heard_first(here, metadata, variables, hosts):
  assert tpu.num_hosts(metadata('x,y,z,u,v') | variables) == hosts
  assert not metadata.asked


def test_without_a_tpu_nobody_is_asked(metadata, monkeypatch):
  monkeypatch.setattr(tpu.glob, 'glob', lambda pattern: [])
  assert tpu.num_hosts(metadata('a,b') | {'TPU_WORKER_HOSTNAMES': 'a,b'}) == 1
  assert not metadata.asked


def test_who_does_not_answer_is_one_host(here):
  assert tpu.num_hosts({'GCE_METADATA_IP': '127.0.0.1:1'}) == 1
