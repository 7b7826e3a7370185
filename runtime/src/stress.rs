//! What computing and reading threads share, with random pauses wherever they meet: buffers, reading ahead, prefetch by
//! prediction against eviction from the cache.

use crate::fetch::{DirectFile, Fetcher, Run, RunContent, RunPart, Staged, Ticket};
use crate::pauses::in_time;
use crate::{Engine, Error, Logits, Mode, Plan, PlanRequest};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use thermocline_datasets::Random;
use thermocline_datasets::planted::{PlantedModel, Shape, Statistics};
use thermocline_split::{Split, split_planted};

const LIMIT: Duration = Duration::from_secs(240);
const FILE_BYTES: usize = 64 << 10;
const LONGEST: usize = 9000;
const BUFFERS: usize = 6;

fn byte(i: usize) -> u8 {
    (i * 31 + i / 251) as u8
}

fn file() -> (tempfile::NamedTempFile, Arc<DirectFile>) {
    let mut file = tempfile::NamedTempFile::new_in(".").expect("a temporary file");
    file.write_all(&(0..FILE_BYTES).map(byte).collect::<Vec<u8>>()).expect("written");
    let direct = Arc::new(DirectFile::open(file.path()).expect("opened"));
    (file, direct)
}

/// A range of the file; one in eight reaches beyond its end.
fn place(random: &mut Random) -> (usize, usize) {
    let len = 1 + random.below(LONGEST);
    match random.below(8) {
        0 => (FILE_BYTES - len / 2, len),
        _ => (random.below(FILE_BYTES - LONGEST), len),
    }
}

/// One of several users of the same buffers: asks, waits, holds, gives back and gives up in any order.
fn use_buffers(fetcher: &Fetcher, file: &Arc<DirectFile>, seed: u64) {
    let mut random = Random::new(seed);
    let mut asked: Vec<(usize, usize, Ticket)> = Vec::new();
    let mut held: Vec<(usize, usize, Staged)> = Vec::new();
    let check = |(offset, len, staged): &(usize, usize, Staged)| {
        assert!(staged.bytes().iter().copied().eq((*offset..offset + len).map(byte)), "{len} bytes at {offset}");
    };
    for _ in 0..1500 {
        match random.below(5) {
            0 | 1 => {
                let (offset, len) = place(&mut random);
                let part = RunPart { file: Arc::clone(file), offset: offset as u64, len };
                let run = Run { parts: vec![part], content: RunContent::Plain };
                asked.extend(fetcher.try_submit(&run).map(|ticket| (offset, len, ticket)));
            }
            2 if !asked.is_empty() => {
                let (offset, len, ticket) = asked.swap_remove(random.below(asked.len()));
                match fetcher.wait(ticket) {
                    Ok(staged) => held.push((offset, len, staged)),
                    Err(Error::ModelChanged { expected, .. }) => {
                        assert!(expected == len && offset + len > FILE_BYTES, "{len} bytes at {offset}");
                    }
                    Err(e) => panic!("{e}"),
                }
            }
            3 if !asked.is_empty() => {
                let (_, _, ticket) = asked.swap_remove(random.below(asked.len()));
                fetcher.discard(ticket);
            }
            4 if !held.is_empty() => {
                let last = held.swap_remove(random.below(held.len()));
                check(&last);
                fetcher.release(last.2);
            }
            _ => {}
        }
        // Nobody writes to a buffer that is held.
        held.iter().for_each(check);
    }
    asked.into_iter().for_each(|(_, _, ticket)| fetcher.discard(ticket));
    held.into_iter().for_each(|(_, _, staged)| fetcher.release(staged));
}

#[test]
fn buffers_belong_to_one_user_at_a_time_and_none_is_lost() {
    in_time(LIMIT, || {
        let (_guard, file) = file();
        let fetcher = Fetcher::new(4, BUFFERS, LONGEST, 1, 0).expect("readers");
        std::thread::scope(|scope| {
            for user in 0..3 {
                let (fetcher, file) = (&fetcher, &file);
                scope.spawn(move || use_buffers(fetcher, file, user));
            }
        });
        assert_eq!(fetcher.n_free(), BUFFERS);
    });
}

#[test]
fn readers_end_whatever_they_are_doing() {
    in_time(LIMIT, || {
        let (_guard, file) = file();
        let mut random = Random::new(4);
        for _ in 0..200 {
            let fetcher = Fetcher::new(1 + random.below(4), BUFFERS, LONGEST, 1, 0).expect("readers");
            for _ in 0..random.below(BUFFERS + 1) {
                let part = RunPart { file: Arc::clone(&file), offset: 0, len: LONGEST };
                let run = Run { parts: vec![part], content: RunContent::Plain };
                assert!(fetcher.try_submit(&run).is_some());
            }
        }
    });
}

/// Bits of the logits of a prompt and tokens after it, twice: the second time the cache holds neurons.
fn answers(engine: &mut Engine) -> Vec<u32> {
    let mut bits = Vec::new();
    for start in [3, 700] {
        engine.clear();
        let tokens: Vec<u32> = (start..start + 24).collect();
        let mut logits = engine.forward(&tokens[..6], Logits::Last).expect("a prompt");
        tokens[6..].iter().for_each(|&t| logits.extend(engine.forward(&[t], Logits::Last).expect("a token")));
        bits.extend(logits.iter().map(|l| l.to_bits()));
    }
    bits
}

/// An engine whose cache has at least so many slots, which the plan may not want.
fn engine(dir: &Path, mode: Mode, ram_budget_bytes: Option<u64>, slots: usize) -> Engine {
    let split = Split::open(dir).expect("a split");
    let request = PlanRequest { mode, always: None, ram_budget_bytes, context: 32, batch: 8, n_threads: 3 };
    let mut plan = Plan::new(&split, request).expect("a plan");
    plan.cache_slots = plan.cache_slots.max(slots);
    Engine::load(split, plan, &|_, _| ()).expect("an engine")
}

fn least_bytes(dir: &Path, mode: Mode) -> u64 {
    let request = PlanRequest { mode, always: None, ram_budget_bytes: Some(1), context: 32, batch: 8, n_threads: 3 };
    match Plan::new(&Split::open(dir).expect("a split"), request) {
        Err(Error::DoesNotFit { needed_bytes, .. }) => needed_bytes,
        other => panic!("a budget of one byte: {other:?}"),
    }
}

#[test]
fn prefetch_eviction_and_streams_change_no_bit_in_any_order() {
    let folder = tempfile::TempDir::new_in(".").expect("a folder");
    let dir = folder.path().join("split");
    let shape = Shape::named("tiny").expect("a shape");
    let model = PlantedModel::new(shape, "a", Statistics::case("a").expect("a case"), 0).expect("a model");
    split_planted(&model, None, &dir, &|_, _| ()).expect("a split");
    in_time(LIMIT, move || {
        for mode in [Mode::Sparse { active: 0.15 }, Mode::Exact] {
            let mut whole = engine(&dir, mode, None, 0);
            let (expected, all) = (answers(&mut whole), whole.plan().total_bytes);
            let least = least_bytes(&dir, mode);
            let (mut hits, mut misses, mut foreseen, mut disk) = (0, 0, 0, 0);
            // A token needs about 600 neurons: few slots for them, some, and nearly enough.
            for (part, slots) in [(0, 0), (1, 20), (2, 200), (4, 500), (6, 100)] {
                let slots = if mode == Mode::Exact { 0 } else { slots };
                let mut streamed = engine(&dir, mode, Some(least + (all - least) * part / 8), slots);
                assert!(answers(&mut streamed) == expected, "{mode:?}, budget {part}/8");
                let account = streamed.account();
                (hits, misses) = (hits + account.cache_hits, misses + account.cache_misses);
                (foreseen, disk) = (foreseen + account.foreseen_used, disk + account.bytes.disk);
            }
            let sparse = mode != Mode::Exact;
            assert!(disk > 0 && (!sparse || hits > 0 && misses > 0 && foreseen > 0), "{hits} {misses} {foreseen}");
        }
        drop(folder);
    });
}
