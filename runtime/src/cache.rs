//! Cold neurons of late, in memory, one slot each.

use thermocline_kernels::{AlignedBuf, AllocError};

/// No slot.
const NONE: u32 = u32::MAX;

/// A cache of bundles with the CLOCK policy: a slot whose neuron was used since the hand last passed is spared once.
#[derive(Debug)]
pub(crate) struct NeuronCache {
    data: AlignedBuf,
    bundle_bytes: usize,
    /// Slot of each neuron, `[n_layers, n_neurons]`.
    slot_of: Vec<u32>,
    n_neurons: usize,
    /// Index into `slot_of` of each slot's neuron.
    owner: Vec<u32>,
    used: Vec<bool>,
    hand: usize,
}

impl NeuronCache {
    pub(crate) fn new(
        n_slots: usize,
        bundle_bytes: usize,
        n_layers: usize,
        n_neurons: usize,
    ) -> Result<Self, AllocError> {
        Ok(Self {
            data: AlignedBuf::zeroed(n_slots * bundle_bytes)?,
            bundle_bytes,
            slot_of: vec![NONE; if n_slots == 0 { 0 } else { n_layers * n_neurons }],
            n_neurons,
            owner: vec![NONE; n_slots],
            used: vec![false; n_slots],
            hand: 0,
        })
    }

    /// Memory of a cache of `n_slots`, its tables included.
    pub(crate) fn bytes(n_slots: usize, bundle_bytes: usize, n_layers: usize, n_neurons: usize) -> u64 {
        if n_slots == 0 {
            return 0;
        }
        ((n_slots * (bundle_bytes + 5)).next_multiple_of(4096) + 4 * n_layers * n_neurons) as u64
    }

    /// Whether a neuron's bundle is here.
    pub(crate) fn contains(&self, layer: usize, neuron: usize) -> bool {
        self.slot_of.get(layer * self.n_neurons + neuron).is_some_and(|&s| s != NONE)
    }

    /// Marks a bundle as used.
    pub(crate) fn touch(&mut self, layer: usize, neuron: usize) {
        if let Some(&slot) = self.slot_of.get(layer * self.n_neurons + neuron)
            && slot != NONE
        {
            self.used[slot as usize] = true;
        }
    }

    /// The bundle of a neuron that [`NeuronCache::contains`].
    pub(crate) fn get(&self, layer: usize, neuron: usize) -> Option<&[u8]> {
        let slot = *self.slot_of.get(layer * self.n_neurons + neuron)? as usize;
        (slot != NONE as usize).then(|| &self.data[slot * self.bundle_bytes..(slot + 1) * self.bundle_bytes])
    }

    /// Keeps a copy of a bundle that is not here yet. Neurons of the same layer with higher numbers keep their slots:
    /// a layer is computed in ascending order, and what was in the cache when its reads were decided must still be
    /// there when its turn comes. If they have all slots, nothing happens.
    pub(crate) fn insert(&mut self, layer: usize, neuron: usize, bundle: &[u8]) {
        let (n_slots, id) = (self.owner.len(), layer * self.n_neurons + neuron);
        if n_slots == 0 || self.contains(layer, neuron) {
            return;
        }
        let later = id as u32 + 1..((layer + 1) * self.n_neurons) as u32;
        // Two rounds: one may only take the marks away.
        let victim = (0..2 * n_slots).find_map(|_| {
            let slot = self.hand;
            self.hand = (self.hand + 1) % n_slots;
            (!later.contains(&self.owner[slot]) && !std::mem::take(&mut self.used[slot])).then_some(slot)
        });
        let Some(slot) = victim else { return };
        if self.owner[slot] != NONE {
            self.slot_of[self.owner[slot] as usize] = NONE;
        }
        self.owner[slot] = id as u32;
        self.slot_of[id] = slot as u32;
        // Bundles of other layers may be longer.
        self.data[slot * self.bundle_bytes..][..bundle.len()].copy_from_slice(bundle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_in_it_is_what_was_put_in(ops in proptest::collection::vec((0usize..3, 0usize..20, any::<bool>()), 1..300)) {
            let mut cache = NeuronCache::new(7, 16, 3, 20)?;
            for (layer, neuron, touch) in ops {
                if touch { cache.touch(layer, neuron) } else { cache.insert(layer, neuron, &[(layer * 20 + neuron) as u8; 16]) }
                let mut present = 0;
                for l in 0..3 {
                    for n in 0..20 {
                        if let Some(bundle) = cache.get(l, n) {
                            present += 1;
                            prop_assert_eq!(bundle, &[(l * 20 + n) as u8; 16]);
                        }
                    }
                }
                prop_assert!(present <= 7);
            }
        }

        #[test]
        fn a_layer_never_evicts_what_it_still_needs(
            before in proptest::collection::vec((0usize..3, 0usize..20), 0..30),
            active in proptest::collection::btree_set(0usize..20, 1..20),
        ) {
            let mut cache = NeuronCache::new(7, 16, 3, 20)?;
            before.into_iter().for_each(|(l, n)| cache.insert(l, n, &[0; 16]));
            let held: Vec<usize> = active.iter().copied().filter(|&n| cache.contains(1, n)).collect();
            for &n in &active {
                prop_assert_eq!(cache.contains(1, n), held.contains(&n));
                cache.touch(1, n);
                cache.insert(1, n, &[0; 16]);
            }
        }
    }
}
