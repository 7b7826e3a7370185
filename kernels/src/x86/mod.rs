//! x86-64 variants.

pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod exact;
pub(crate) mod exact_bmi2;
pub(crate) mod patch;
pub(crate) mod sketch;
pub(crate) mod vnni;

use std::arch::x86_64::{_MM_HINT_T2, _mm_prefetch};

/// Lines of memory that a loop asks for while it computes, a few at each of its steps: asked for all at once they would
/// keep its own loads waiting.
pub(crate) struct Ahead<'a> {
    parts: &'a [&'a [u8]],
    lines: std::slice::Chunks<'a, u8>,
    each_step: usize,
}

impl<'a> Ahead<'a> {
    /// All lines of `parts` within `steps`.
    #[inline]
    fn new(parts: &'a [&'a [u8]], steps: usize) -> Self {
        let lines: usize = parts.iter().map(|part| part.len().div_ceil(64)).sum();
        Self { parts, lines: [].chunks(64), each_step: lines.div_ceil(steps.max(1)) }
    }

    /// Into the second level of caches: the first is full of inputs and sums.
    #[inline]
    fn step(&mut self) {
        for _ in 0..self.each_step {
            let mut line = self.lines.next();
            while line.is_none() {
                let [part, rest @ ..] = self.parts else { return };
                (self.lines, self.parts) = (part.chunks(64), rest);
                line = self.lines.next();
            }
            if let Some(line) = line {
                // SAFETY: a prefetch has no effect but on the caches, whatever the address; SSE is part of x86-64.
                unsafe { _mm_prefetch::<_MM_HINT_T2>(line.as_ptr().cast()) };
            }
        }
    }
}
