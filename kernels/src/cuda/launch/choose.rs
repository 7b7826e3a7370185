//! The active neurons, the cache of cold ones, and who computes what.

use super::{Step, address, floats, u32_of};
use crate::cuda::backend::{Arg, Launch};
use crate::cuda::device::Device;
use crate::cuda::error::Result;
use crate::cuda::memory::View;

/// Which neurons a token computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Selection {
    /// All.
    Every,
    /// The so many of highest score.
    Top(usize),
    /// Those whose score is above this.
    Above(f32),
}

/// The cache of one layer: a cold neuron (number: its place minus the hot ones) may be in a slot of set `number % sets`.
#[derive(Debug, Clone)]
pub struct CacheTables {
    /// Sets; 0 if there is no cache.
    pub n_sets: usize,
    /// Slots of a set.
    pub n_ways: usize,
    /// u32 `[n_cold]`: slot, or all ones.
    pub slot_of: View,
    /// u32 `[n_sets * n_ways]`: cold number, or all ones.
    pub owner: View,
    /// `[n_cold]`: recency and frequency in one number, see `kernels/cuda/choose.cu`.
    pub key: View,
    /// u32 `[n_sets * n_ways]`: serial of the last token that used the slot.
    pub used: View,
    /// Octaves that a key falls behind per token: large is least-recently-used, small is least-frequently-used.
    pub lambda: f32,
}

/// Where the host reads which neurons it is to compute: mapped memory. [`super::predict_scores`] gives it the input.
#[derive(Debug, Clone)]
pub struct HostWork {
    /// u32 `[ffn]`: cold numbers, ascending, and from [`HOST_ROWS`] on the rows to read: a sum of 1 for gate, 2 for up, 4 for down.
    pub list: View,
    /// `[ffn]` pairs, used with [`Choose::rows`]: gate and up of each of these as the sketch has them.
    pub known: View,
    /// u32: length of the list.
    pub count: View,
    /// u32: the layer's number, raised last ([`flag_value`]); at [`INPUT_FLAG`] the same, raised as soon as x is there.
    pub flag: View,
}

/// The bit of an entry of [`HostWork::list`] at which its rows begin: those below are its number.
pub const HOST_ROWS: u32 = 29;

/// Words from [`HostWork::flag`] to the one for the input: another line of the cache.
pub const INPUT_FLAG: usize = 32;

/// The cold neurons that a layer will probably need: a list for [`super::fetch_bundles`], and where [`choose`] looks them
/// up. One of the layer in progress and one of the next must be different memory.
#[derive(Debug, Clone)]
pub struct Foreseen {
    /// u32 pairs `[ffn / 32, rounded up]`: a bit for each of 32 neurons that is listed, and the first one's place.
    pub words: View,
    /// u32 `[n_places]`: cold numbers, ascending.
    pub list: View,
    /// u32: how many are listed.
    pub n_listed: View,
    /// Room for so many.
    pub n_places: usize,
}

/// What it takes to foresee the next layer's needs.
#[derive(Debug, Clone, Copy)]
pub struct Ahead<'a> {
    /// `[ffn]`, and room up to a multiple of four.
    pub scores: &'a View,
    /// Of that layer.
    pub n_hot: usize,
    /// Of that layer.
    pub cache: &'a CacheTables,
    /// The result: as many as the step says, if there are places for them.
    pub foreseen: &'a Foreseen,
}

/// The value that the flags of layer `layer` reach in the token of that serial number.
pub fn flag_value(serial: u32, layer: usize, n_layers: usize) -> u32 {
    serial.wrapping_mul(n_layers as u32).wrapping_add(layer as u32 + 1)
}

/// What [`choose`] decides.
#[derive(Debug, Clone)]
pub struct WorkList {
    /// u32 `[ffn]`: the active neurons, ascending.
    pub ids: View,
    /// u32 pairs `[ffn]`: where each bundle comes from and which slot it fills; from `0xffff_fff8` on none, and the three lowest bits
    /// are the rows to read, as in [`HostWork::list`].
    pub items: View,
    /// u32 `[8]`: items, over the link, cached, hot, host, active, fetched beforehand, 0.
    pub counts: View,
    /// u64 `[8]`: the same, added up over tokens, but rows to read of those over the link and of hot ones, three of a whole
    /// neuron; with [`Choose::rows`], in place of cached ones, those that were chosen and whose down row is read; the last is what
    /// [`super::fetch_bundles`] has fetched.
    pub totals: View,
}

/// The item of a neuron in device memory for good.
pub fn hot_item(neuron: usize) -> [u32; 2] {
    [neuron as u32, u32::MAX]
}

/// The item of a cold neuron that is read from host memory and fills no slot.
pub fn host_item(cold: usize) -> [u32; 2] {
    [0x4000_0000 | cold as u32, u32::MAX]
}

/// Selects the active neurons of a layer, looks them up in the cache, and divides the work.
#[derive(Debug, Clone, Copy)]
pub struct Choose<'a> {
    /// `[ffn - n_always]`, of those that are chosen among, and room up to a multiple of four.
    pub scores: &'a View,
    /// Neurons.
    pub ffn: usize,
    /// Neurons in device memory for good.
    pub n_hot: usize,
    /// The first so many are active at every token; at most `n_hot`.
    pub n_always: usize,
    /// Which of the others are active.
    pub selection: Selection,
    /// Whether rows are read or not, each alone: scores are which of a neuron's, as [`super::RowChoice`] leaves them, and those that
    /// have any are active, [`Selection::Above`] 0.5. Without a cache.
    pub rows: bool,
    /// `[ffn - n_always]`: activations as a sketch has them, which become 0 of the active ones, with `rows` of those whose down row is
    /// read.
    pub sketched: Option<&'a View>,
    /// `[ffn - n_always]` pairs: gate and up as the sketch has them, for the host; wanted with `rows`.
    pub products: Option<&'a View>,
    /// The cache.
    pub cache: &'a CacheTables,
    /// The step.
    pub step: &'a View,
    /// This layer, of `n_layers`.
    pub layer: usize,
    /// As above.
    pub n_layers: usize,
    /// The host's part, if it has one.
    pub host: Option<&'a HostWork>,
    /// What was fetched for this layer.
    pub fetched: Option<&'a Foreseen>,
    /// The next layer, if its needs are to be foreseen.
    pub ahead: Option<Ahead<'a>>,
    /// The result.
    pub out: &'a WorkList,
}

/// See [`Choose`].
///
/// # Errors
/// See the module.
pub fn choose(device: &Device, c: &Choose<'_>) -> Result<()> {
    let n_cold = c.ffn - c.n_hot;
    let (cache, out) = (c.cache, c.out);
    assert!(c.n_always <= c.n_hot && c.n_always < c.ffn, "neurons that are always active");
    let foresees = c.fetched.is_some() || c.ahead.is_some();
    assert!(c.n_always == 0 || !foresees, "what is foreseen has the numbers of all neurons");
    let n_others = c.ffn - c.n_always;
    if c.selection != Selection::Every {
        // They are read four at a time.
        floats(c.scores, n_others.next_multiple_of(4));
        assert!(c.scores.address().is_multiple_of(16), "scores in the middle of sixteen bytes");
    }
    if cache.n_sets > 0 {
        assert!(cache.n_ways <= 32 && cache.n_sets <= 0xffff, "a lane for each way, 16 bits for a set");
        let slots = cache.n_sets * cache.n_ways;
        assert!(cache.slot_of.len() >= 4 * n_cold && cache.key.len() >= 4 * n_cold, "cache tables");
        assert!(cache.owner.len() >= 4 * slots && cache.used.len() >= 4 * slots, "cache tables");
    }
    assert!(out.ids.len() >= 4 * c.ffn && out.items.len() >= 8 * c.ffn, "work list");
    assert!(out.counts.len() >= 32 && out.totals.len() >= 64, "counts");
    if let Some(host) = c.host {
        assert!(
            host.list.len() >= 4 * n_cold && host.count.len() >= 4 && host.flag.len() > 4 * INPUT_FLAG,
            "host work"
        );
        assert!(n_cold <= 1 << HOST_ROWS, "room for the rows");
    }
    c.sketched.iter().for_each(|v| floats(v, n_others));
    if c.rows {
        assert!(c.selection == Selection::Above(0.5), "neurons that have rows to read");
        assert!(cache.n_sets == 0 && !foresees, "no cache, and nothing foreseen");
        if let Some(host) = c.host {
            floats(&host.known, 2 * n_cold);
            floats(c.products.expect("products for the host"), 2 * n_others);
        }
    }
    if let Some(a) = &c.ahead {
        floats(a.scores, c.ffn.next_multiple_of(4));
        assert!(a.scores.address().is_multiple_of(16), "scores in the middle of sixteen bytes");
        assert!(a.cache.n_sets == 0 || a.cache.slot_of.len() >= 4 * (c.ffn - a.n_hot), "cache tables");
    }
    for foreseen in c.fetched.into_iter().chain(c.ahead.map(|a| a.foreseen)) {
        let words = 8 * c.ffn.div_ceil(32);
        assert!(
            foreseen.words.len() >= words
                && foreseen.list.len() >= 4 * foreseen.n_places
                && foreseen.n_listed.len() >= 4,
            "what is foreseen"
        );
    }
    let (every, k, threshold) = match c.selection {
        Selection::Every => (1, 0, 0.0),
        Selection::Top(k) => (0, k.clamp(1, n_others), 0.0),
        Selection::Above(threshold) => (0, 0, threshold),
    };
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let host = |field: fn(&HostWork) -> &View| c.host.map_or(0, |h| field(h).address());
    let ahead = |field: &dyn Fn(&Ahead<'_>) -> u64| c.ahead.as_ref().map_or(0, field);
    // The fields of `struct Choose` in kernels/cuda/choose.cu, with its padding.
    let words = vec![
        c.scores.address(),
        c.sketched.map_or(0, View::address),
        c.products.map_or(0, View::address),
        // Those that are always active are left out of all numbers but of what comes out.
        pair(n_others as u32, k as u32),
        pair((c.n_hot - c.n_always) as u32, every),
        pair(f32::to_bits(threshold), cache.n_sets as u32),
        pair(cache.n_ways as u32, c.n_always as u32),
        cache.slot_of.address(),
        cache.owner.address(),
        cache.key.address(),
        cache.used.address(),
        pair(cache.lambda.to_bits(), 0),
        c.step.address(),
        pair(c.layer as u32, c.n_layers as u32),
        host(|h| &h.list),
        host(|h| &h.known),
        host(|h| &h.count),
        host(|h| &h.flag),
        out.ids.address(),
        out.items.address(),
        out.counts.address(),
        out.totals.address(),
        c.fetched.map_or(0, |f| f.words.address()),
        ahead(&|a| a.scores.address()),
        ahead(&|a| if a.cache.n_sets > 0 { a.cache.slot_of.address() } else { 0 }),
        ahead(&|a| a.foreseen.words.address()),
        ahead(&|a| a.foreseen.list.address()),
        ahead(&|a| a.foreseen.n_listed.address()),
        ahead(&|a| pair(a.n_hot as u32, a.foreseen.n_places as u32)),
    ];
    let launch = Launch {
        kernel: if c.rows { "choose_rows" } else { "choose" }.to_owned(),
        grid: [1 + u32::from(c.host.is_some()) + u32::from(c.ahead.is_some()), 1],
        block: 1024,
        shared_bytes: 0,
        args: vec![Arg::Struct(words)],
    };
    let mut uses = vec![c.scores, c.step, &cache.slot_of, &cache.owner, &cache.key, &cache.used];
    uses.extend([&out.ids, &out.items, &out.counts, &out.totals]);
    uses.extend(c.host.iter().flat_map(|h| [&h.list, &h.known, &h.count, &h.flag]));
    uses.extend(c.sketched.into_iter().chain(c.products));
    uses.extend(c.ahead.iter().flat_map(|a| [a.scores, &a.cache.slot_of]));
    let foreseen = c.fetched.into_iter().chain(c.ahead.map(|a| a.foreseen));
    uses.extend(foreseen.flat_map(|f| [&f.words, &f.list, &f.n_listed]));
    device.launch(launch, &uses)
}

/// Tells the host that its input is there, of a layer (of so many) that it chooses and computes by itself. [`super::finish`] waits
/// for its sums if `counts` ([`WorkList::counts`]) are what this leaves.
///
/// # Errors
/// See the module.
pub fn ask_host(
    device: &Device,
    host: &HostWork,
    counts: &View,
    step: &View,
    (layer, n_layers): (usize, usize),
) -> Result<()> {
    assert!(counts.len() >= 32 && step.len() >= Step::BYTES && host.flag.len() >= 4, "counts, step, flag");
    let launch = Launch {
        kernel: "ask_host".to_owned(),
        grid: [1, 1],
        block: 32,
        shared_bytes: 0,
        args: vec![address(counts), address(step), u32_of(layer), u32_of(n_layers), address(&host.flag)],
    };
    device.launch(launch, &[counts, step, &host.flag])
}
