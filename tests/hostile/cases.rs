//! Which test stands for which case: the list is checked, so that a case cannot lose its test unseen.

use std::collections::BTreeSet;
use std::path::Path;

/// Case, file and test.
const TESTS: &[(u8, &str, &str)] = &[
    (1, "tests/hostile/gguf.rs", "heads_of_files"),
    (1, "tests/hostile/folder.rs", "headers"),
    (2, "tests/hostile/gguf.rs", "heads_of_files"),
    (2, "tests/hostile/split.rs", "a_newer_version_is_told_apart_from_damage"),
    (3, "tests/hostile/gguf.rs", "counts_lengths_and_nesting"),
    (4, "tests/hostile/gguf.rs", "counts_lengths_and_nesting"),
    (5, "tests/hostile/gguf.rs", "counts_lengths_and_nesting"),
    (6, "tests/hostile/gguf.rs", "alignments_and_shapes"),
    (7, "tests/hostile/gguf.rs", "alignments_and_shapes"),
    (8, "tests/hostile/gguf.rs", "alignments_and_shapes"),
    (9, "tests/hostile/gguf.rs", "alignments_and_shapes"),
    (10, "tests/hostile/folder.rs", "headers"),
    (10, "tests/hostile/split.rs", "forged_headers_and_indices_are_refused_before_anything_is_allocated"),
    (11, "tests/hostile/gguf.rs", "names_that_occur_twice"),
    (11, "tests/hostile/folder.rs", "headers"),
    (12, "tests/hostile/gguf.rs", "alignments_and_shapes"),
    (12, "tests/hostile/folder.rs", "headers"),
    (13, "tests/hostile/gguf.rs", "configurations"),
    (13, "tests/hostile/folder.rs", "configurations"),
    (14, "tests/hostile/folder.rs", "headers_of_100_megabytes"),
    (14, "tests/hostile/folder.rs", "headers"),
    (15, "tests/hostile/folder.rs", "headers"),
    (16, "tests/hostile/split.rs", "weights_that_are_not_finite_are_named_by_tensor_and_neuron"),
    (16, "tests/hostile/split.rs", "matrices_of_zeros_are_named"),
    (17, "tests/hostile/folder.rs", "shards_that_lead_out"),
    (18, "tests/hostile/folder.rs", "shards_that_disagree"),
    (19, "tests/hostile/folder.rs", "pickles"),
    (16, "tests/hostile/damaged.rs", "splits_with_damaged_weights"),
    (20, "tests/hostile/damaged.rs", "splits_that_cannot_be_opened"),
    (20, "tests/hostile/damaged.rs", "splits_with_damaged_weights"),
    (20, "tests/hostile/damaged.rs", "deltas_that_are_damaged_or_of_another_base"),
    (20, "tests/hostile/split.rs", "every_damaged_byte_of_the_manifest_is_found"),
    (20, "tests/hostile/split.rs", "every_damaged_byte_of_header_order_and_index_is_found"),
    (21, "tests/hostile/damaged.rs", "splits_with_damaged_weights"),
    (21, "tests/hostile/split.rs", "every_damaged_chunk_is_named_by_layer_and_neurons"),
    (22, "tests/faults.rs", "killed_splits_resume_to_the_same_bytes"),
    (22, "tests/faults.rs", "killed_deltas_resume_to_the_same_bytes"),
    (23, "tests/hostile/disk.rs", "a_disk_that_is_full_or_broken_loses_nothing"),
    (23, "tests/hostile/disk.rs", "a_delta_on_a_full_disk_is_never_half_there"),
    (23, "tests/faults.rs", "a_full_disk_says_how_much_is_needed_and_is_resumed_when_there_is_room"),
    (24, "tests/hostile/damaged.rs", "splits_that_cannot_be_opened"),
    (24, "tests/hostile/split.rs", "forged_orders_are_no_permutations"),
    (25, "tests/hostile/damaged.rs", "splits_and_profiles_of_another_model"),
    (25, "tests/hostile/damaged.rs", "deltas_that_are_damaged_or_of_another_base"),
    (25, "tests/hostile/split.rs", "what_was_made_from_another_model_is_refused_by_digest"),
    (26, "tests/hostile/runtime.rs", "what_does_not_fit_is_told_before_it_is_allocated"),
    (26, "tests/cli.rs", "a_budget_that_is_too_small_exits_with_3_and_says_what_is_needed"),
    (27, "tests/faults.rs", "killed_calibrations_resume_to_the_same_bytes"),
    (27, "tests/hostile/writers.rs", "interrupted_calibrations_say_what_they_go_on_from"),
    (27, "calibrate/tests/runs.rs", "a_corrupt_checkpoint_falls_back_and_says_so"),
    (27, "calibrate/tests/runs.rs", "resuming_something_else_is_refused"),
    (28, "tests/hostile/writers.rs", "a_second_writer_is_told_so"),
    (28, "tests/faults.rs", "a_second_writer_is_told_that_the_output_is_locked"),
    (29, "tests/hostile/disk.rs", "a_file_cut_under_a_running_program_is_named"),
    (29, "tests/faults.rs", "a_file_cut_while_it_is_in_use_is_an_error_and_mending_it_mends_the_engine"),
    (29, "tests/faults.rs", "a_file_replaced_by_name_does_not_reach_the_engine"),
    (30, "tests/hostile/disk.rs", "short_interrupted_and_late_reads_change_nothing"),
    (30, "tests/hostile/disk.rs", "a_disk_that_fails_is_named_and_given_up_on"),
    (31, "tests/hostile/disk.rs", "a_disk_ten_times_slower_gives_the_same_answer_and_shows"),
    (32, "tests/hostile/gpu.rs", "memory_that_is_refused_shrinks_the_hot_neurons_once"),
    (32, "tests/hostile/gpu.rs", "an_engine_that_was_refused_memory_can_be_loaded_with_less"),
    (33, "tests/hostile/gpu.rs", "an_error_that_sticks_ends_the_program"),
    (33, "tests/hostile/gpu.rs", "an_engine_whose_device_fails_ends_with_an_error_and_no_wrong_logits"),
    (34, "tests/hostile/runtime.rs", "predictors_that_lie_choose_neurons_all_the_same"),
    (35, "tests/hostile/runtime.rs", "a_full_context_ends_the_answer_with_its_reason"),
    (36, "tests/hostile/disk.rs", "short_interrupted_and_late_reads_change_nothing"),
    (36, "tests/exactness.rs", "cache_and_lookahead_change_no_bit"),
    (37, "tests/hostile/runtime.rs", "signals_end_a_run_in_mid_token_and_leave_nothing"),
    (37, "tests/hostile/runtime.rs", "signals_end_writers_and_their_work_is_taken_up"),
    (37, "tests/cli.rs", "a_reader_that_leaves_early_ends_the_program_quietly"),
];

/// Cases in which the program has nothing to say, so that there is no snapshot and nothing is refused, and why.
const SILENT: &[(u8, &str)] = &[
    (22, "a killed process says nothing; the next one takes up its work and says no more than an undisturbed one"),
    (31, "a slow disk changes nothing but the speed that is reported"),
    (36, "prefetch and eviction are inside of a run, whose answer is compared"),
    (37, "a signal ends the process as the system does it, and a reader that leaves early wants to hear nothing"),
];

/// Parts of cases that have no test, and why.
const OPEN: &[(u8, &str)] = &[(33, "a server that says it is unhealthy: there is none yet")];

#[test]
fn every_case_has_a_test_that_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (case, file, test) in TESTS {
        let source = std::fs::read_to_string(root.join(file)).unwrap();
        assert!(source.contains(&format!("#[test]\nfn {test}()")), "{case}: {file} has no test {test}");
    }
    let tested: BTreeSet<u8> = TESTS.iter().map(|t| t.0).collect();
    assert_eq!(tested.iter().copied().collect::<Vec<_>>(), (1..=37).collect::<Vec<_>>());
    let security = std::fs::read_to_string(root.join("SECURITY.md")).unwrap();
    for (case, why) in OPEN {
        assert!(security.contains(&format!("({case})")), "SECURITY.md does not say what case {case} lacks: {why}");
    }
}

/// What the program says is a snapshot, in which each entry begins with its case, and the harness has measured its memory.
#[test]
fn what_is_said_in_every_tested_case_is_a_snapshot() {
    let snapshots = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile/snapshots");
    let mut said = BTreeSet::new();
    for entry in std::fs::read_dir(snapshots).unwrap() {
        let snapshot = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let lines: Vec<&str> = snapshot.lines().collect();
        let runs = lines.windows(2).filter(|pair| pair[1].starts_with("$ thermocline "));
        said.extend(runs.filter_map(|pair| pair[0].split(' ').next()?.parse::<u8>().ok()));
    }
    let silent: BTreeSet<u8> = SILENT.iter().map(|s| s.0).collect();
    assert!(said.is_disjoint(&silent), "a case has a snapshot and is listed as silent");
    for case in TESTS.iter().map(|t| t.0).filter(|case| !silent.contains(case)) {
        assert!(said.contains(&case), "case {case} has no snapshot");
    }
}
