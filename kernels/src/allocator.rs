//! What the system's allocator does with large blocks that are freed.
//!
//! glibc raises the size from which a block is a mapping of its own whenever such a block is freed, up to 32 MB. Buffers of the
//! loading stage then leave holes that no weight fits into. While a model is loaded that size had better be fixed: SmolLM2 in
//! 60 MiB takes 6 to 8 MB less, and every run the same. Afterwards a token's temporary buffers had better stay: a mapping
//! for each costs a fault a page, which made short prompts slower by a third. Other C libraries have no such habit, and
//! nothing is done.

/// Freed blocks of 256 KiB and more go back to the system. To be called before a model is loaded.
pub fn return_freed_blocks() {
    set(256 << 10, 2 << 20);
}

/// Freed blocks are kept for later ones. To be called when a model has been loaded.
pub fn keep_freed_blocks() {
    set(32 << 20, 64 << 20);
}

/// `own_mapping`: bytes from which a block is a mapping of its own; `kept_at_end`: free bytes at the heap's end beyond which
/// they are given back.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set(own_mapping: i32, kept_at_end: i32) {
    unsafe extern "C" {
        fn mallopt(parameter: i32, value: i32) -> i32;
    }
    const M_TRIM_THRESHOLD: i32 = -1;
    const M_MMAP_THRESHOLD: i32 = -3;
    for (parameter, value) in [(M_TRIM_THRESHOLD, kept_at_end), (M_MMAP_THRESHOLD, own_mapping)] {
        // SAFETY: glibc's own function, with its signature; it takes a lock and sets a number. A refusal costs memory alone.
        let _ = unsafe { mallopt(parameter, value) };
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn set(_: i32, _: i32) {}
