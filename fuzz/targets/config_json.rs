//! `config.json` beside sound weights: an error, or the shape that the weights have.
#![no_main]

use libfuzzer_sys::fuzz_target;
use thermocline_datasets::open_checkpoint;

fuzz_target!(|data: &[u8]| {
    let folder = thermocline_fuzz::folder();
    std::fs::write(folder.join("config.json"), data).unwrap();
    if let Ok(checkpoint) = open_checkpoint(folder) {
        let (config, shape) = (checkpoint.config(), thermocline_fuzz::shape());
        assert_eq!((config.hidden_size, config.intermediate_size), (shape.hidden_size, shape.intermediate_size));
        assert!(config.n_layers > 0 && config.n_layers <= shape.n_layers && config.vocab_size == shape.vocab_size);
    }
});
