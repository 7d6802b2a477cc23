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
| parallel/stopping_test\.py::test_a_signal_to_one_ends_both
| runs/damage_test\.py::test_a_kill_between_any_two_files
| runs/derived_test\.py::test_it_is_taken_up
| techniques/adapters/lora_test\.py::test_it_composes_in_both_orders
| techniques/orders_test\.py::test_two_techniques_of_training
| techniques/pruning/(pack_test\.py::test_it_is_the_same_model|prune_test\.py::test_each_matrix_of_each_layer)
| techniques/pruning/sparse_gpt_test\.py::test_it_leaves_less_error
| techniques/quantization/gptq_test\.py::test_with_the_identity
| models/cache_test\.py::test_(rows_are_those_rounded|a_prompt_read_at_once)
| models/transformer_test\.py::test_(a_model_taken_apart|a_token_changes_no_logits|unrolling_and_rematerialising)
| models/moe/(layer_test\.py::test_padding_is_routed|dispatch_test\.py::test_a_full_buffer)
| compression/(rotation_test\.py::test_it_computes_the_same|scaling_test\.py::test_clipping_raises)
| compression/(pruning_test\.py::test_every_allocation|patterns_test\.py::test_piece_by_piece)
| compression/(sparse_updates_test\.py::test_what_comes_back|dimensions_test\.py::test_masking_all_dimensions)
| ops/(block_sparse_matmul_test\.py::test_of_equal_columns|low_precision_matmul_test\.py::test_an_equation_is)
| ops/contract_test\.py::test_(auto_does_every_equation|a_product_of_matrices)
| formats/ranges_test\.py::test_the_range_of_least_error
| formats/format_test\.py::test_(stored_matrices|rounding_errs|bytes_are|layers_and)
| interop/(targets/compressed_test\.py::test_what_is_written_stands|write_test\.py::test_what_is_stored_leaves)
| weights/parted_test\.py::test_(products_of_any|it_holds_the_very)
| weights/(low_rank_test\.py::test_a_product_is|learned_test\.py::test_what_is_trained)
| weights/(block_sparse_test\.py::test_it_multiplies|quantizers_test\.py::test_no_token)
''', re.VERBOSE)


def split(items: list) -> tuple[list, list]:
  """Those of pytest's items that `make test` runs, and those that it leaves to `make test-long`."""
  run, left, seen = [], [], {}
  for item in items:
    name = item.nodeid.split('[')[0]
    seen[name] = seen.get(name, -1) + 1
    (left if THINNED.search(name) and seen[name] % KEPT else run).append(item)
  return run, left
