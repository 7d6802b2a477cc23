"""Names of stages on disk; what stages do in a run is in run_test."""
from efficient_lm.runs import stages


class Quantize: pass


def test_a_stages_folder_says_its_place_and_its_kind():
  assert stages.folder_name(0, Quantize()) == '1_quantize'
