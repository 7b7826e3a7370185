use crate::{Random, device, pinned, poisoned, read, upload};
use proptest::prelude::*;
use thermocline_kernels::cuda::Queue;
use thermocline_kernels::cuda::launch::{Foreseen, fetch_bundles};
use thermocline_kernels::{BundleLayout, Encoding};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn listed_bundles_come_to_their_places(
        groups in prop_oneof![1usize..20, Just(160), Just(256)],
        encoding in 0usize..3,
        n_cold in 1usize..40,
        (n_listed, n_more) in (0usize..40, 0usize..4),
        seed: u64,
    ) {
        let random = &mut Random::new(seed);
        let layout = BundleLayout::new(Encoding::PLAIN[encoding], 32 * groups).unwrap();
        let bytes = layout.bundle_bytes();
        let cold: Vec<u8> = (0..n_cold * bytes).map(|_| random.below(256) as u8).collect();
        let list: Vec<u32> = (0..n_listed + n_more).map(|_| random.below(n_cold) as u32).collect();
        let n_places = n_listed + n_more + 1;
        let (places, totals) = (upload(&vec![0x5au8; n_places * bytes]), upload(&[7u64; 8]));
        let foreseen = Foreseen {
            words: poisoned(8).view(),
            list: upload(&[&list[..], &[u32::MAX]].concat()).view(),
            n_listed: upload(&[n_listed as u32]).view(),
            n_places,
        };
        fetch_bundles(device(), layout, &foreseen, &pinned(&cold).view(), &places.view(), &totals.view()).unwrap();
        device().order(Queue::Copy, Queue::Compute).unwrap();
        let places = read::<u8>(&places);
        for (place, number) in places.chunks_exact(bytes).zip(&list[..n_listed]) {
            prop_assert_eq!(place, &cold[*number as usize * bytes..][..bytes]);
        }
        prop_assert!(places[n_listed * bytes..].iter().all(|b| *b == 0x5a), "nothing but what is listed");
        prop_assert_eq!(read::<u64>(&totals), [7, 7, 7, 7, 7, 7, 7, 7 + n_listed as u64]);
    }
}
