//! Hostile inputs and faults, by number: for each a typed error with the exit code promised, no panic, and memory bounded
//! by the input's own size. What is made here is made by generators; what the program says is in `snapshots/`.
#![allow(missing_docs, clippy::unwrap_used, clippy::indexing_slicing)]

mod cases;
mod damaged;
mod disk;
mod folder;
mod gguf;
#[cfg(feature = "cuda")]
mod gpu;
mod harness;
mod planes;
mod profile;
mod runtime;
mod sections;
mod shares;
mod split;
#[path = "../support/mod.rs"]
mod support;
mod text;
mod writers;
