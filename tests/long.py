"""What `make test` leaves to `make test-long`: further cases of tests that have many, in other shapes and combinations.

Continuous integration has 35 minutes on two cores. Of the tests named here the first and every sixth case after it are run
there; which these are depends on nothing but their order.
"""
import re

KEPT = 6
THINNED = re.compile(r'''
  ops/\w+_test\.py::test_((the_)?tpu_kernels?|splash)_equals?_the_reference | ops/\w+_test\.py::test_equals_the_reference
| composition_test\.py::test_(techniques_compose_in_every_order|a_float_model_is_smoothed)
| compile/train_step_test\.py::test_the_loss_is_the_same
| interop/load_test\.py::test_a_model_on_eight_devices
| compression/layerwise_test\.py::test_what_was_pruned_is_zero
| compression/dimensions_test\.py::test_(masking_one_dimension|what_is_left_is_described)
| compression/solver_test\.py::test_(with_the_identity|what_is_pruned_stays_zero)
| models/cache_test\.py::test_eight_devices_decode_as_one
| models/decode_test\.py::test_prompts_of_several_lengths
| models/moe/dispatch_test\.py::test_(equals_the_dense_oracle|every_variant_equals)
| models/transformer_test\.py::test_reading_with_a_cache
| runs/(invariants_test\.py::test_every_stage_keeps|resume_test\.py::test_a_kill_between|structure_test\.py::test_a_model_is)
| techniques/(orders_test\.py::test_a_float_model_is_taken|zeros_test\.py::test_every_zero_is_kept)
| techniques/pruning/(prune_test\.py::test_by_the_end|sparse_training_test\.py::test_(each_method_composes|eight_devices))
| techniques/quantization/ptq_test\.py::test_(over_eight_devices|all_that_rules_name)
| techniques/quantization/(qat_test\.py::test_every_method_trains|low_precision_training_test\.py::test_the_train_step)
| composition_test\.py::test_what_(composes_is_known_by|was_pruned_is_zero_whatever)
| compression/(scaling_test\.py::test_smoothing_changes|calibration_test\.py::test_padding_enters)
| compression/sparse_updates_test\.py::test_after_every_update
| interop/stablehlo/run_test\.py::test_logits_are_those
| ops/decode_attention_test\.py::test_blocks_of_a_cache
| techniques/(quantization/convert_test\.py::test_a_converted_model_holds|unroll_test\.py::test_it_trains_as_the_stack)
| weights/fake_quantized_test\.py::test_stored_and_trained_weights
| weights/quantized_test\.py::test_(an_embedding_is_read_by_rows|experts_multiply_their_own)
| training/trainer_test\.py::test_(every_mesh_trains|a_student_is_taught|a_step_is_the_same_in_however_many_parts)
| weights/layout_test\.py::test_a_matrix_that_is_cut
| compression/pruning_test\.py::test_(over_eight_devices|two_of_every_four)
| techniques/quantization/gptq_test\.py::test_with_a_sparsity
| techniques/adapters/lora_test\.py::test_only_adapters
| runs/outside_test\.py::test_parts_of_a_users
| words_test\.py::test_a_flag_takes_any_value
| runs/mirror_test\.py::test_a_run_that_is_killed_goes_on
''', re.VERBOSE)


def split(items: list) -> tuple[list, list]:
  """Those of pytest's items that `make test` runs, and those that it leaves to `make test-long`."""
  run, left, seen = [], [], {}
  for item in items:
    name = item.nodeid.split('[')[0]
    seen[name] = seen.get(name, -1) + 1
    (left if THINNED.search(name) and seen[name] % KEPT else run).append(item)
  return run, left
