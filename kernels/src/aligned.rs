use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};

/// Alignment of every buffer: a page, which O_DIRECT wants and vectors profit from.
const ALIGN: usize = 4096;

/// A zeroed, page-aligned block of bytes whose length is a whole number of pages.
///
/// Pages are only taken from the system when they are written: it is a mapping of its own, because the allocator fills
/// aligned blocks with zeros by hand.
#[derive(Debug)]
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
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
        let len = len.max(1).checked_next_multiple_of(ALIGN).filter(|&n| n <= isize::MAX as usize).ok_or(refused)?;
        // SAFETY: a new mapping wherever the system likes touches no memory that is in use.
        let ptr = unsafe { mmap_anonymous(null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE) };
        let ptr = ptr.ok().and_then(|p| NonNull::new(p.cast::<u8>())).ok_or(refused)?;
        Ok(Self { ptr, len })
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: the pages are this value's own, and it ends here.
        let unmapped = unsafe { munmap(self.ptr.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "a mapping of our own");
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` points to `len` bytes, zeros unless they were written, that this value owns.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
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
            assert_eq!(AlignedBuf::zeroed(bytes).err(), Some(AllocError { bytes }));
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
