"""Choose which cases of expensive tests the quick suite runs: every n-th case, or none (0).

The listed tests take the most time for what they can find. They are products of parameters in which
a fault of one case is also a fault of similar cases, or they run whole programs whose parts cheaper
tests check. ``make test-slow`` runs all cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest

#: n for each test by its name
EVERY = {
    "adapter_files/test_base_proof.py::test_any_tensor_that_forward_uses_is_refused_once_it_was_changed": 5,  # noqa: E501
    "adapter_files/test_derived_folder.py::test_a_layer_gives_the_same_outputs": 3,
    "adapter_files/test_peft.py::test_real_models_go_both_ways": 5,
    "adapter_files/test_peft_tasks.py::test_peft_s_forward_gives_our_numbers": 3,
    "adapter_files/test_save_load.py::test_round_trip_of_every_layer_kind": 2,
    "adapter_files/test_save_load.py::test_round_trip_on_every_storage": 2,
    "adapter_files/test_save_pretrained.py::test_an_adapter_alone_is_written_that_gives_the_model_again": 3,  # noqa: E501
    "attach/test_blend.py::test_a_blend_is_the_weighted_sum_of_the_changes_of_each_weight": 3,
    "attach/test_blend.py::test_checkpointing_and_compiled_calls_follow_a_blend": 0,
    "attach/test_blend.py::test_training_through_a_blend_gives_each_adapter_its_gradient": 5,
    "attach/test_compile.py::test_compiled_calls_follow_whatever_is_done_to_the_adapters": 0,
    "attach/test_compile.py::test_exported_programs_equal_eager_calls": 3,
    "attach/test_compile.py::test_inductor": 0,
    "attach/test_compile.py::test_the_adapters_of_every_kind_are_one_graph": 3,
    "attach/test_compile.py::test_training_under_compile_alternates_adapters_as_eager_training_does": 0,  # noqa: E501
    "attach/test_compile.py::test_twelve_adapters_are_one_graph": 2,
    "attach/test_compile.py::test_what_makes_another_graph_and_what_does_not": 0,
    "attach/test_copies.py::test_a_meta_model_that_gets_its_numbers_later": 2,
    "attach/test_copies.py::test_the_default_device_does_not_decide_where_an_adapter_lives": 2,
    "attach/test_fused_linear.py::test_a_hundred_steps_lose_what_the_definition_loses": 2,
    "attach/test_memory.py::test_a_merge_that_keeps_nothing_ends_with_no_copy": 2,
    "attach/test_real_models.py::test_a_saved_adapter_gives_the_same_answers_on_an_equal_base": 3,
    "attach/test_real_models.py::test_attaching_changes_nothing_and_everything_is_seen": 3,
    "attach/test_real_models.py::test_detaching_gives_back_the_very_model": 2,
    "attach/test_real_models.py::test_merging_is_exact_and_unmerging_restores_the_bits": 2,
    "attach/test_real_models.py::test_training_moves_the_adapter_alone": 3,
    "attach/test_select.py::test_compiled_models_follow_the_selection": 0,
    "attach/test_select.py::test_compiled_training_gives_the_same_gradients": 3,
    "attach/test_trace.py::test_every_kind_of_layer_traces_where_its_base_does": 4,
    "bank/test_bank.py::test_mixed_rows_equal_each_adapter_alone": 5,
    "bank/test_bank.py::test_whole_models": 3,
    "kernels/test_saved_inputs.py::test_an_input_is_made_again_to_the_same_bits": 2,
    "layers/test_layers.py::test_a_thousand_merges_leave_no_trace": 3,
    "layers/test_layers.py::test_attaching_changes_no_output": 5,
    "layers/test_shapes.py::test_four_ways_to_the_same_output": 3,
    "serve/test_engine.py::test_64_requests_at_once_are_answered_as_each_alone": 4,
    "serve/test_engine.py::test_in_float32_a_seed_gives_the_same_answer_whoever_else_is_in_the_batch": 2,  # noqa: E501
    "serve/test_engine_bank.py::test_64_mixed_requests_at_once_are_those_of_merged_models": 2,
    "serve/test_page.py::test_a_stream_cut_anywhere": 2,
    "serve/test_page.py::test_nothing_that_is_said_becomes_html": 2,
    "serve/test_page.py::test_on_a_phone": 2,
    "serve/test_page.py::test_words_are_readable_and_nothing_moves_unasked": 2,
    "store/test_crashes.py::test_a_death_before_any_step_on_the_disk": 3,
    "test_benchmarks.py::test_a_task_runs": 2,
    "test_benchmarks.py::test_every_candidate_adapts_the_same_layers": 3,
    "test_runs.py::test_autocast_gives_what_merged_weights_give": 2,
    "test_runs.py::test_function_transforms_over_an_adapters_numbers": 3,
    "test_runs.py::test_hooks_fire_once_a_call": 3,
    "test_runs.py::test_inference_mode_inside_and_outside": 3,
    "test_runs.py::test_the_gradient_of_a_module_that_is_called_twice_is_the_sum": 2,
    "test_torture.py::test_the_judges_can_fail": 2,
    "tools/test_compose.py::test_a_sum_on_every_layer": 5,
    "tools/test_compose.py::test_dora_with_weights_alone": 3,
    "tools/test_compose.py::test_every_variant_and_plain_lora_on_a_tied_model": 2,
    "tools/test_convert.py::test_every_layer_and_variant_has_a_dense_change": 5,
    "tools/test_convert.py::test_every_layer_comes_back_bit_by_bit": 5,
    "tools/test_extract.py::test_a_randomised_product_is_as_near_as_it_says": 4,
    "tools/test_extract.py::test_every_kind_of_layer_is_extracted_as_it_was_changed": 3,
    "tools/test_extract.py::test_from_files_it_is_the_same_adapter_as_from_live_models": 2,
    "tools/test_extract.py::test_memory_is_a_few_times_the_largest_tensor": 0,
    "tools/test_linear_stub.py::test_the_model_is_not_asked": 4,
    "tools/test_linear_stub.py::test_whatever_is_drawn_is_right": 4,
    "tools/test_merge_checkpoint.py::test_every_architecture": 4,
    "tools/test_merge_checkpoint.py::test_memory_is_bounded_by_the_largest_tensor": 2,
    "tools/test_merge_checkpoint.py::test_the_bits_are_those_of_a_merge_in_memory": 4,
    "tools/test_report.py::test_intruders_and_their_repair_on_every_layer": 4,
    "train/test_before_a_run.py::test_a_dry_run_of_a_task_says_what_its_run_says": 2,
    "train/test_before_a_run.py::test_a_sweep_writes_nothing_and_a_run_at_the_found_rate_learns": 0,
    "train/test_hidden_state_cache.py::test_a_run_is_that_without_it_and_survives_a_crash": 3,
    "train/test_loss.py::test_a_compiled_model_is_run_whole": 0,
    "train/test_loss.py::test_every_kind_of_head": 2,
    "train/test_plan.py::test_the_numbers_that_train_are_those_of_a_real_attach": 3,
    "train/test_resume.py::test_a_crash_and_a_resume_change_nothing": 4,
    "train/test_start_data.py::test_a_run_starts_where_attach_starts_with_the_first_rows": 3,
    "train/test_tasks.py::test_a_crash_and_a_resume_change_nothing": 2,
    "train/test_tasks.py::test_a_task_learns_and_its_adapter_is_measured_alike": 3,
    "train/test_tasks.py::test_accumulated_batches_are_one": 2,
    "train/test_trainer_snippets.py::test_an_example_runs": 3,
    "train/test_trainers.py::test_a_checkpoint_is_no_larger_than_pefts": 2,
    "train/test_trainers.py::test_a_policy_is_compared_with_its_own_start_as_pefts_is": 2,
    "train/test_trainers.py::test_a_trainer_does_with_an_adapter_what_the_page_says": 7,
    "train/test_trainers.py::test_optimisers_of_adapters_in_a_trainer": 3,
    "train/test_vocabulary.py::test_a_run_that_was_killed_ends_as_one_that_was_not": 0,
}


def leave_to_the_slow_suite(items: Iterable[pytest.Item]) -> set[str]:
    """Mark all cases but every n-th of the listed tests as slow. Returns the entries of ``EVERY``
    that name none of ``items``."""
    counts: Counter[str] = Counter()
    for item in items:
        name = item.nodeid.partition("[")[0].removeprefix("tests/")
        if (every := EVERY.get(name)) is None or item.get_closest_marker("slow") is not None:
            continue
        if every == 0 or counts[name] % every:
            item.add_marker(pytest.mark.slow)
        counts[name] += 1
    return EVERY.keys() - counts.keys()
