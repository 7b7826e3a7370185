//! x86-64 variants.

pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod vnni;
