use crate::{Random, device, pinned, poisoned, read, upload};
use proptest::prelude::*;
use thermocline_kernels::cuda::launch::{
    Ahead, CacheTables, Choose, Foreseen, HOST_ROWS, HostWork, INPUT_FLAG, Selection, WorkList, choose, flag_value,
};

const NONE: u32 = u32::MAX;

/// Misses that compete for slots at one token.
const CANDIDATES: usize = 2048;

/// `log2(1 + 2^d)`, operation by operation as in choose.cu: decisions hang on the last bit.
fn log2_of_one_plus_power(d: f32) -> f32 {
    let t = d.clamp(-126.0, 126.0);
    let whole = (t + 12_582_912.0) - 12_582_912.0;
    let f = t - whole;
    let p =
        [0.055_504_1, 0.240_226_5, std::f32::consts::LN_2, 1.0].iter().fold(0.009_618_1f32, |p, c| f.mul_add(p, *c));
    let y = f32::from_bits(((whole as i32 + 127) as u32) << 23).mul_add(p, 1.0);
    let e = ((y.to_bits() >> 23) as i32 - 127) as f32;
    let m = f32::from_bits(y.to_bits() & 0x7f_ffff | 0x3f80_0000);
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let series = [0.412_198_6, 0.577_078, 0.961_796_7, 2.885_39]
        .iter()
        .fold(0.320_598_9f32, |series, c| square.mul_add(series, *c));
    s.mul_add(series, e)
}

#[derive(Clone)]
struct Model {
    n_hot: usize,
    n_sets: usize,
    n_ways: usize,
    lambda: f32,
    share: f32,
    slot_of: Vec<u32>,
    owner: Vec<u32>,
    key: Vec<f32>,
    used: Vec<u32>,
    /// Of each neuron that was fetched its place, else all ones.
    fetched: Vec<u32>,
}

/// One token's work.
#[derive(Debug, Default, PartialEq)]
struct Work {
    ids: Vec<u32>,
    items: Vec<[u32; 2]>,
    counts: [u32; 8],
    host: Vec<u32>,
}

/// No cache.
pub(crate) fn no_cache() -> CacheTables {
    let none = upload(&[NONE; 4]).view();
    CacheTables {
        n_sets: 0,
        n_ways: 1,
        slot_of: none.clone(),
        owner: none.clone(),
        key: none.clone(),
        used: none,
        lambda: 1.0,
    }
}

/// Which rows of each neuron behind the first `n_always` are read.
struct RowsModel {
    n_hot: usize,
    n_always: usize,
    share: f32,
    masks: Vec<u32>,
}

impl RowsModel {
    /// A token's work, and the rows over the link and of hot neurons.
    fn token(&self) -> (Work, [u64; 2]) {
        let n_rows = |neurons: &[usize]| neurons.iter().map(|i| self.mask(*i).count_ones()).sum::<u32>();
        let is_active = |i: &usize| *i < self.n_always || self.mask(*i) > 0;
        let (n_hot, ffn) = (self.n_hot, self.n_always + self.masks.len());
        let hot: Vec<usize> = (0..n_hot).filter(is_active).collect();
        let misses: Vec<usize> = (n_hot..ffn).filter(is_active).collect();
        let eligible: Vec<usize> = misses.iter().copied().filter(|i| self.mask(*i) & 4 > 0).collect();
        let (of_misses, of_eligible) = (n_rows(&misses) as f32, n_rows(&eligible) as f32);
        let wanted = if eligible.is_empty() { 0.0 } else { of_misses * eligible.len() as f32 / of_eligible };
        let n_host = (self.share.mul_add(wanted, 0.5) as usize).min(eligible.len());
        let host = &eligible[eligible.len() - n_host..];
        let link: Vec<usize> = misses.iter().copied().filter(|i| !host.contains(i)).collect();
        let second = |i: &usize| 0xffff_fff8 | self.mask(*i);
        let items = link.iter().map(|i| [0x4000_0000 | (i - n_hot) as u32, second(i)]);
        let items: Vec<_> = items.chain(hot.iter().map(|i| [*i as u32, second(i)])).collect();
        let counts = [items.len(), link.len(), 0, hot.len(), n_host, hot.len() + misses.len(), 0, 0].map(|n| n as u32);
        let work = Work {
            ids: hot.iter().chain(&misses).map(|i| *i as u32).collect(),
            items,
            counts,
            host: host.iter().map(|i| (i - n_hot) as u32 | self.mask(*i) << 29).collect(),
        };
        (work, [n_rows(&link).into(), n_rows(&hot).into()])
    }

    fn mask(&self, neuron: usize) -> u32 {
        if neuron < self.n_always { 7 } else { self.masks[neuron - self.n_always] }
    }
}

fn active(scores: &[f32], selection: Selection) -> Vec<u32> {
    let score = |i: u32| if scores[i as usize] > 0.0 { scores[i as usize] } else { 0.0 };
    let all = 0..scores.len() as u32;
    match selection {
        Selection::Every => all.collect(),
        Selection::Above(threshold) => all.filter(|i| score(*i) > threshold).collect(),
        Selection::Top(k) => {
            let mut ids: Vec<u32> = all.collect();
            ids.sort_by(|a, b| score(*b).total_cmp(&score(*a)).then(a.cmp(b)));
            ids.truncate(k);
            ids.sort_unstable();
            ids
        }
    }
}

impl Model {
    fn token(&mut self, ids: Vec<u32>, serial: u32) -> Work {
        let now = self.lambda * serial as f32;
        let hot = ids.partition_point(|i| (*i as usize) < self.n_hot);
        let cold: Vec<usize> = ids[hot..].iter().map(|i| *i as usize - self.n_hot).collect();
        let (mut misses, mut hits, mut fetched) = (Vec::new(), Vec::new(), Vec::new());
        for &c in &cold {
            if self.n_sets > 0 && self.slot_of[c] != NONE {
                hits.push(self.slot_of[c]);
            } else if self.fetched[c + self.n_hot] != NONE {
                fetched.push(c);
            } else {
                misses.push(c);
            }
            if self.n_sets > 0 {
                self.key[c] = now + log2_of_one_plus_power(self.key[c] - now);
            }
        }
        hits.iter().for_each(|slot| self.used[*slot as usize] = serial);
        let n_host = (self.share.mul_add(misses.len() as f32, 0.5) as usize).min(misses.len());
        let host = misses.split_off(misses.len() - n_host);
        let mut items: Vec<[u32; 2]> = Vec::new();
        let over_link = misses.iter().map(|&c| (c, 0x4000_0000 | c as u32));
        let beforehand = fetched.iter().map(|&c| (c, 0xc000_0000 | self.fetched[c + self.n_hot]));
        let candidates: Vec<(usize, u32)> = over_link.chain(beforehand).collect();
        for (i, (c, from)) in candidates.into_iter().enumerate() {
            let slot = if i < CANDIDATES { self.admit(c, serial) } else { NONE };
            items.push([from, slot]);
        }
        items.extend(hits.iter().map(|slot| [0x8000_0000 | slot, NONE]));
        items.extend(ids[..hot].iter().map(|i| [*i, NONE]));
        let n = |n: usize| n as u32;
        let counts =
            [n(items.len()), n(misses.len()), n(hits.len()), n(hot), n(n_host), n(ids.len()), n(fetched.len()), 0];
        Work { ids, items, counts, host: host.iter().map(|c| *c as u32 | 7 << HOST_ROWS).collect() }
    }

    /// The slot that a miss takes.
    fn admit(&mut self, cold: usize, serial: u32) -> u32 {
        if self.n_sets == 0 {
            return NONE;
        }
        let first = cold % self.n_sets * self.n_ways;
        let slots = first..first + self.n_ways;
        let empty = slots.clone().find(|s| self.owner[*s] == NONE);
        let key_of = |s: usize| self.key[self.owner[s] as usize];
        let weakest = || {
            let free = slots.filter(|s| self.used[*s] != serial);
            let slot = free.min_by(|a, b| key_of(*a).total_cmp(&key_of(*b)))?;
            (key_of(slot) < self.key[cold]).then_some(slot)
        };
        let Some(slot) = empty.or_else(weakest) else { return NONE };
        if self.owner[slot] != NONE {
            self.slot_of[self.owner[slot] as usize] = NONE;
        }
        (self.owner[slot], self.used[slot], self.slot_of[cold]) = (cold as u32, serial, slot as u32);
        slot as u32
    }
}

fn selection(ffn: usize) -> impl Strategy<Value = Selection> {
    prop_oneof![
        1 => Just(Selection::Every),
        3 => (1..=ffn).prop_map(Selection::Top),
        5 => (1..=ffn.div_ceil(10)).prop_map(Selection::Top),
        1 => (-0.1f32..1.0).prop_map(Selection::Above),
    ]
}

/// Layers that end within a group of four, a word, a warp's range, and behind what is kept in registers.
fn sizes() -> impl Strategy<Value = (usize, Selection, usize)> {
    let wide = prop::sample::select(vec![4097usize, 11_008, 28_672, 32_767, 34_000, 66_001]);
    prop_oneof![6 => 1usize..300, 3 => 1000usize..5000, 4 => wide]
        .prop_flat_map(|ffn| (Just(ffn), selection(ffn), prop_oneof![Just(0), Just(ffn), 0..=ffn]))
}

/// How scores are distributed.
#[derive(Debug, Clone, Copy)]
enum Scores {
    Even,
    /// Over many octaves, to both ends of what a float can be.
    Wide,
    /// Within a few thousandths.
    Narrow,
    /// With many ties.
    Coarse,
    /// Nearly all zero.
    Sparse,
    /// The first are much higher: a sample in the middle of every stretch is misled.
    Sloped,
}

impl Scores {
    /// Negative ones and NaN count as zero.
    fn draw(self, random: &mut Random, place: f32) -> f32 {
        let value = random.value();
        match self {
            _ if random.below(16) == 0 => f32::NAN,
            Scores::Even => value,
            Scores::Wide => value * (random.value() * 140.0).exp2(),
            Scores::Narrow => 1.0 + value / 512.0,
            Scores::Coarse => (value * 4.0).round(),
            Scores::Sparse if random.below(32) > 0 => 0.0,
            Scores::Sparse => value,
            Scores::Sloped => value.abs() * (-20.0 * place).exp2(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn choose_does_what_the_model_does(
        (ffn, selection, n_hot) in sizes(),
        // With few sets, more candidates of one than a warp has lanes; with many, more sets than are chained at once.
        (n_sets, n_ways) in (
            prop_oneof![Just(0usize), 1usize..4, 1usize..60, 100usize..400, Just(5000)],
            prop_oneof![1usize..9, Just(16), Just(32)],
        ),
        lambda in prop_oneof![Just(0.0f32), Just(0.01), Just(1.0), Just(20.0)],
        share in prop_oneof![Just(0.0f32), Just(0.3), Just(0.77), Just(1.0)],
        fetched in prop_oneof![2 => Just(None), 3 => prop_oneof![Just(0u64), Just(3), Just(8)].prop_map(Some)],
        always in prop_oneof![Just(0.0f64), Just(1.0), 0.0..1.0],
        first_serial in prop_oneof![Just(1u32), Just(1_000_000), Just(0x5555_5550)],
        kind in prop::sample::select(vec![
            Scores::Even, Scores::Wide, Scores::Narrow, Scores::Coarse, Scores::Sparse, Scores::Sloped,
        ]),
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let (n_cold, n_slots) = (ffn - n_hot, n_sets * n_ways);
        // What is fetched has the numbers of all neurons, and somebody must be chosen among.
        let n_always = if fetched.is_some() { 0 } else { ((n_hot as f64 * always) as usize).min(ffn - 1) };
        let n_others = ffn - n_always;
        let selection = match selection {
            Selection::Top(k) => Selection::Top(k.min(n_others)),
            other => other,
        };
        let never = |n: usize| vec![NONE; n];
        let mut model = Model {
            n_hot, n_sets, n_ways, lambda, share,
            slot_of: never(n_cold), owner: never(n_slots), key: vec![f32::NEG_INFINITY; n_cold], used: vec![0; n_slots],
            fetched: never(ffn),
        };
        // So many of 8 of the cold ones.
        let mut n_fetched = 0;
        let mut words = vec![[0u32; 2]; ffn.div_ceil(32)];
        for i in 0..ffn {
            if i % 32 == 0 {
                words[i / 32][1] = n_fetched;
            }
            if i >= n_hot && (random.below(8) as u64) < fetched.unwrap_or(0) {
                words[i / 32][0] |= 1 << (i % 32);
                model.fetched[i] = n_fetched;
                n_fetched += 1;
            }
        }
        let foreseen = Foreseen { words: upload(&words).view(), list: poisoned(4).view(), n_listed: poisoned(4).view(), n_places: 1 };
        let (slot_of, owner) = (upload(&model.slot_of), upload(&model.owner));
        let (key, used) = (upload(&model.key), upload(&model.used));
        let cache = CacheTables {
            n_sets, n_ways, slot_of: slot_of.view(), owner: owner.view(), key: key.view(), used: used.view(), lambda,
        };
        let totals = upload(&[5u64; 8]);
        let mut expected_totals = [5u64; 8];
        let place = |i: usize| i as f32 / ffn as f32;
        let mut scores: Vec<f32> = (0..n_others).map(|i| kind.draw(random, place(i))).collect();
        for serial in first_serial..first_serial + 4 {
            for (i, score) in scores.iter_mut().enumerate() {
                if random.below(3) == 0 {
                    *score = kind.draw(random, place(i));
                }
            }
            let (list, count, flag) = (pinned(&vec![7u32; n_cold]), pinned(&[99u32]), pinned(&[98u32; INPUT_FLAG + 1]));
            let host = HostWork { list: list.view(), known: pinned(&[0u32]).view(), count: count.view(), flag: flag.view() };
            let (activations, sketched) = (random.values(n_others), serial % 2 == 0);
            let after = upload(&activations);
            let activations_view = after.view();
            let (ids, items, counts) = (poisoned(4 * ffn), poisoned(8 * ffn), poisoned(32));
            let out = WorkList { ids: ids.view(), items: items.view(), counts: counts.view(), totals: totals.view() };
            choose(device(), &Choose {
                scores: &upload(&[&scores[..], &[9.0; 3]].concat()).view(), ffn, n_hot, n_always, selection, cache: &cache,
                step: &upload(&[0u32, 3, serial, share.to_bits(), 0]).view(), layer: 1, n_layers: 3, host: Some(&host),
                fetched: fetched.map(|_| &foreseen), ahead: None, out: &out,
                rows: false, sketched: sketched.then_some(&activations_view), products: None,
            }).unwrap();

            let chosen = active(&scores, selection).into_iter().map(|i| n_always as u32 + i);
            let want = model.token((0..n_always as u32).chain(chosen).collect(), serial);
            let got = Work {
                ids: read::<u32>(&ids)[..want.ids.len()].to_vec(),
                items: read::<[u32; 2]>(&items)[..want.items.len()].to_vec(),
                counts: read::<[u32; 8]>(&counts)[0],
                host: read::<u32>(&list)[..want.host.len()].to_vec(),
            };
            prop_assert_eq!(got.counts, want.counts);
            prop_assert!(got == want, "{:?}\n{:?}", got, want);
            let mut left = activations;
            want.ids[n_always..].iter().filter(|_| sketched).for_each(|i| left[*i as usize - n_always] = 0.0);
            prop_assert_eq!(read::<f32>(&after), left);
            prop_assert_eq!(read::<u32>(&flag)[INPUT_FLAG], flag_value(serial, 1, 3));
            if want.host.is_empty() {
                prop_assert_eq!((read::<u32>(&count)[0], read::<u32>(&flag)[0]), (99, 98), "the host is left alone");
            } else {
                let flags = (read::<u32>(&count)[0], read::<u32>(&flag)[0]);
                prop_assert_eq!(flags, (want.host.len() as u32, flag_value(serial, 1, 3)));
            }
            if n_sets > 0 {
                prop_assert_eq!(read::<u32>(&slot_of), model.slot_of.clone());
                prop_assert_eq!(read::<u32>(&owner), model.owner.clone());
                prop_assert_eq!(read::<u32>(&used), model.used.clone());
                let bits = |keys: &[f32]| keys.iter().map(|k| k.to_bits()).collect::<Vec<_>>();
                prop_assert_eq!(bits(&read::<f32>(&key)), bits(&model.key));
            }
            // Rows, of those over the link and of hot ones.
            let rows = [1, 3, 1, 3, 1, 1, 1, 1];
            for (total, (n, rows)) in expected_totals.iter_mut().zip(want.counts.into_iter().zip(rows)) {
                *total += rows * u64::from(n);
            }
            prop_assert_eq!(read::<u64>(&totals), expected_totals);
        }
    }

    #[test]
    fn choose_divides_rows_as_the_model_does(
        (ffn, _, n_hot) in sizes(),
        share in prop_oneof![Just(0.0f32), 0.0f32..1.0, Just(1.0)],
        always in prop_oneof![Just(0.0f64), Just(1.0), 0.0..1.0],
        // Neurons in so many of which rows are read; which rows, mostly.
        one_in in prop_oneof![Just(1usize), 2usize..40, Just(usize::MAX >> 32)],
        mostly in 0u32..8,
        (has_host, has_sketched) in any::<(bool, bool)>(),
        serial: u32,
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let n_cold = ffn - n_hot;
        let n_always = ((n_hot as f64 * always) as usize).min(ffn - 1);
        let n_others = ffn - n_always;
        let totals = upload(&[5u64; 8]);
        let mut expected_totals = [5u64; 8];
        for serial in [serial, serial.wrapping_add(1)] {
            let mut mask = || match random.below(one_in) {
                0 if mostly > 0 && random.below(4) > 0 => mostly,
                0 => random.below(8) as u32,
                _ => 0,
            };
            let masks: Vec<u32> = (0..n_others).map(|_| mask()).collect();
            let model = RowsModel { n_hot, n_always, share: if has_host { share } else { 0.0 }, masks };
            let scores: Vec<f32> = model.masks.iter().map(|m| *m as f32).chain([7.0; 3]).collect();
            let (activations, products) = (random.values(n_others), random.values(2 * n_others));
            let after = upload(&activations);
            let (list, known) = (pinned(&vec![NONE; n_cold + 1]), pinned(&vec![9f32; 2 * n_cold + 2]));
            let (count, flag) = (pinned(&[99u32]), pinned(&[98u32; INPUT_FLAG + 1]));
            let host = HostWork { list: list.view(), known: known.view(), count: count.view(), flag: flag.view() };
            let (ids, items, counts) = (poisoned(4 * ffn), poisoned(8 * ffn), poisoned(32));
            let out = WorkList { ids: ids.view(), items: items.view(), counts: counts.view(), totals: totals.view() };
            choose(device(), &Choose {
                scores: &upload(&scores).view(), ffn, n_hot, n_always, selection: Selection::Above(0.5), cache: &no_cache(),
                step: &upload(&[0u32, 3, serial, share.to_bits(), 0]).view(), layer: 1, n_layers: 3,
                host: has_host.then_some(&host), fetched: None, ahead: None, out: &out,
                rows: true, sketched: has_sketched.then_some(&after.view()), products: Some(&upload(&products).view()),
            }).unwrap();

            let (want, [link_rows, hot_rows]) = model.token();
            let (n, n_host) = (want.items.len(), want.host.len());
            let (got_items, got_list, got_known) = (read::<[u32; 2]>(&items), read::<u32>(&list), read::<[f32; 2]>(&known));
            let got = Work {
                ids: read::<u32>(&ids)[..want.ids.len()].to_vec(),
                items: got_items[..n].to_vec(),
                counts: read::<[u32; 8]>(&counts)[0],
                host: got_list[..n_host].to_vec(),
            };
            prop_assert_eq!(got.counts, want.counts);
            prop_assert!(got == want, "{:?}\n{:?}", got, want);
            let over_link = got.items[..want.counts[1] as usize].iter().map(|item| item[0]);
            prop_assert!(over_link.is_sorted(), "ascending");
            prop_assert!(got_items[n..].iter().flatten().all(|word| *word == NONE), "nothing behind the last item");
            prop_assert!(got_list[n_host..=n_cold].iter().all(|entry| *entry == NONE), "nothing behind the last entry");
            prop_assert!(got_known[n_host..=n_cold].iter().flatten().all(|v| *v == 9.0), "nothing behind the last entry");
            for (got, entry) in got_known.iter().zip(&want.host) {
                let i = (entry & 0x1fff_ffff) as usize + n_hot - n_always;
                prop_assert_eq!(&got[..], &products[2 * i..][..2]);
            }
            let left = activations.iter().zip(&model.masks).map(|(h, m)| if has_sketched && m & 4 > 0 { 0.0 } else { *h });
            prop_assert_eq!(read::<f32>(&after), left.collect::<Vec<_>>());
            let flags = (read::<u32>(&count)[0], read::<u32>(&flag)[0]);
            prop_assert_eq!(flags, if n_host > 0 { (n_host as u32, flag_value(serial, 1, 3)) } else { (99, 98) });
            let mut grown = want.counts.map(u64::from);
            let with_down = model.masks.iter().filter(|mask| **mask & 4 > 0).count() as u64;
            [grown[1], grown[2], grown[3]] = [link_rows, with_down, hot_rows];
            expected_totals.iter_mut().zip(grown).for_each(|(total, n)| *total += n);
            prop_assert_eq!(read::<u64>(&totals), expected_totals);
        }
    }

    #[test]
    fn foresight_gives_places_to_about_the_highest_scores_that_are_neither_hot_nor_cached(
        (ffn, n_hot) in prop_oneof![1usize..300, 1000usize..5000, Just(28_672usize), Just(34_000), Just(66_001)]
            .prop_flat_map(|ffn| (Just(ffn), prop_oneof![Just(0), Just(ffn), 0..=ffn])),
        wanted in prop_oneof![Just(0.0f64), Just(0.001), Just(0.02), Just(0.1), Just(1.0)],
        n_places in prop_oneof![3 => Just(usize::MAX), 1 => 1usize..200],
        (has_cache, has_host) in any::<(bool, bool)>(),
        kind in prop::sample::select(vec![Scores::Even, Scores::Wide, Scores::Coarse, Scores::Sparse]),
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let (n_wanted, n_cold, n_places) = ((ffn as f64 * wanted) as usize, ffn - n_hot, n_places.min(ffn));
        let scores: Vec<f32> = (0..ffn).map(|i| kind.draw(random, i as f32 / ffn as f32)).collect();
        let slot_of: Vec<u32> = (0..n_cold).map(|_| if random.below(3) == 0 { 5 } else { NONE }).collect();
        let none = upload(&[NONE; 4]);
        let tables = |n_sets: usize, slot_of: &thermocline_kernels::cuda::Memory| CacheTables {
            n_sets, n_ways: 1, slot_of: slot_of.view(), owner: none.view(), key: none.view(), used: none.view(), lambda: 1.0,
        };
        let (cache, next) = (tables(0, &none), tables(usize::from(has_cache), &upload(&[&slot_of[..], &[NONE]].concat())));
        let (list, count, flag) = (pinned(&vec![7u32; ffn]), pinned(&[99u32]), pinned(&[98u32; INPUT_FLAG + 1]));
        let host = HostWork { list: list.view(), known: pinned(&[0u32]).view(), count: count.view(), flag: flag.view() };
        let (ids, items, counts) = (poisoned(4 * ffn), poisoned(8 * ffn), poisoned(32));
        let totals = upload(&[0u64; 8]);
        let out = WorkList { ids: ids.view(), items: items.view(), counts: counts.view(), totals: totals.view() };
        let (words, places, n_listed) = (poisoned(8 * ffn.div_ceil(32)), upload(&vec![NONE; n_places + 1]), poisoned(4));
        let foreseen = Foreseen { words: words.view(), list: places.view(), n_listed: n_listed.view(), n_places };
        let scores_view = upload(&[&scores[..], &[9.0; 3]].concat()).view();
        choose(device(), &Choose {
            scores: &scores_view, ffn, n_hot: ffn, n_always: 0, selection: Selection::Top(1), cache: &cache,
            step: &upload(&[0u32, 3, 11, 0, n_wanted as u32]).view(), layer: 1, n_layers: 3,
            host: has_host.then_some(&host), fetched: None, rows: false, sketched: None, products: None,
            ahead: Some(Ahead { scores: &scores_view, n_hot, cache: &next, foreseen: &foreseen }), out: &out,
        }).unwrap();

        prop_assert_eq!(read::<u32>(&flag)[INPUT_FLAG], if has_host { flag_value(11, 1, 3) } else { 98 });
        let (places, n) = (read::<u32>(&places), read::<u32>(&n_listed)[0] as usize);
        let most = n_wanted.min(n_places);
        prop_assert!(n <= most && places[n..].iter().all(|c| *c == NONE), "no more than there is room for");
        // Every neuron of the list is found at its place, and no other at any.
        let words = read::<[u32; 2]>(&words);
        let mut found = Vec::new();
        for i in 0..ffn {
            let [bits, first] = words[i / 32];
            if bits >> (i % 32) & 1 == 1 {
                prop_assert_eq!(first + (bits & ((1 << (i % 32)) - 1)).count_ones(), found.len() as u32);
                found.push((i - n_hot) as u32);
            }
        }
        prop_assert_eq!(&places[..n], &found[..]);
        // Whatever the threshold is: those at it and above, from the first on.
        let may_be = |i: usize| scores[i] > 0.0 && i >= n_hot && !(has_cache && slot_of[i - n_hot] != NONE);
        let least = found.iter().map(|&c| scores[c as usize + n_hot]).fold(f32::INFINITY, f32::min);
        let want: Vec<u32> =
            (0..ffn).filter(|&i| may_be(i) && scores[i] >= least).map(|i| (i - n_hot) as u32).collect();
        if n < most {
            prop_assert_eq!(&found, &want);
        } else {
            prop_assert!(want.starts_with(&found) || kind as u8 != Scores::Even as u8);
        }
        // And it is about as high as it should be, if scores differ: a bin is a 32nd of an octave, and holds 1 in 45.
        if matches!(kind, Scores::Even) && most == n_wanted && n > 0 {
            let (above, possible) = (want.len() as f64, (0..ffn).filter(|i| may_be(*i)).count() as f64);
            let sampled = (most as f64 * 4096.0 / ffn as f64).min(most as f64).max(1.0);
            let slack = 1.0 + 5.0 / sampled.sqrt();
            prop_assert!(above <= (most as f64 * slack + possible / 40.0 + 40.0).min(possible), "{above} of {most}");
            prop_assert!(above * slack + possible / 40.0 + 40.0 >= (most as f64).min(possible), "{above} of {most}");
        }
    }
}
