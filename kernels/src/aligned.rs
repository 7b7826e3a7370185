use std::alloc::{Layout, alloc, dealloc};
use std::ops::{Deref, DerefMut};

/// Alignment of every buffer: a page, which O_DIRECT wants and vectors profit from.
const ALIGN: usize = 4096;

/// Blocks of at least this size are given huge pages where the system has them for those that ask: rows that lie far
/// apart otherwise cost a walk through the page tables each, on a virtual machine through two.
const HUGE_FROM: usize = 8 << 20;

/// A huge page on the machines that have them of this size; elsewhere an alignment like any other.
const HUGE_PAGE: usize = 2 << 20;

/// A zeroed, page-aligned block of bytes whose length is a whole number of pages.
///
/// The zeros are written, so its pages are in RAM, each one its own: no later write can find that there is none left,
/// and what is measured on it is RAM.
#[derive(Debug)]
pub struct AlignedBuf {
    ptr: *mut u8,
    layout: Layout,
}

/// Memory that the system does not give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the system has no block of {bytes} bytes")]
pub struct AllocError {
    /// Bytes asked for.
    pub bytes: usize,
}

impl AlignedBuf {
    /// At least `len` bytes of zeros.
    ///
    /// # Errors
    /// If the system has no such block, or no address space could.
    pub fn zeroed(len: usize) -> Result<Self, AllocError> {
        let refused = AllocError { bytes: len };
        let pages = len.max(1).checked_next_multiple_of(ALIGN).ok_or(refused)?;
        let align = if pages < HUGE_FROM { ALIGN } else { HUGE_PAGE };
        let layout = Layout::from_size_align(pages, align).map_err(|_| refused)?;
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc(layout) };
        if ptr.is_null() {
            return Err(refused);
        }
        if align == HUGE_PAGE {
            // Before the first write. Whole huge pages only: none reaches beyond the block. A refusal costs speed alone.
            let whole = pages / HUGE_PAGE * HUGE_PAGE;
            // SAFETY: the range lies inside the block, and this advice changes nothing that a program can see.
            let _ = unsafe { rustix::mm::madvise(ptr.cast(), whole, rustix::mm::Advice::LinuxHugepage) };
        }
        // SAFETY: the block is `pages` long and nobody else's.
        unsafe { ptr.write_bytes(0, pages) };
        Ok(Self { ptr, layout })
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `alloc` with this same layout and is freed once.
        unsafe { dealloc(self.ptr, self.layout) }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` points to initialised bytes of the layout's size, which this value owns.
        unsafe { std::slice::from_raw_parts(self.ptr, self.layout.size()) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.layout.size()) }
    }
}

// SAFETY: the buffer is plain owned memory; access follows the borrow rules of `Deref` and `DerefMut`.
unsafe impl Send for AlignedBuf {}
// SAFETY: as above.
unsafe impl Sync for AlignedBuf {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_no_memory_has_is_an_error() {
        for bytes in [usize::MAX, usize::MAX - ALIGN, isize::MAX as usize, 1 << 60] {
            // Or the compiler leaves the allocation out, whose memory nobody looks at.
            let refused = std::hint::black_box(AlignedBuf::zeroed(bytes));
            assert_eq!(refused.err(), Some(AllocError { bytes }));
        }
    }

    #[test]
    fn buffers_are_whole_pages_of_zeros() {
        for (asked, got) in [(0, ALIGN), (1, ALIGN), (ALIGN, ALIGN), (ALIGN + 1, 2 * ALIGN)] {
            let mut buffer = AlignedBuf::zeroed(asked).expect("memory");
            assert!(buffer.len() == got && buffer.as_ptr().addr().is_multiple_of(ALIGN));
            assert!(buffer.iter().all(|b| *b == 0));
            buffer.fill(7);
        }
    }
}
