use super::backend::Backend;
use super::error::Result;
use crate::AlignedBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

/// A block of device memory, or of host memory that the device can read and write in place. Clones share it; it is
/// freed when the last clone, and the last graph that uses it, is gone.
#[derive(Debug, Clone)]
pub struct Memory(Arc<Block>);

#[derive(Debug)]
struct Block {
    backend: Arc<dyn Backend>,
    address: u64,
    bytes: usize,
    /// The host side of pinned memory.
    host: Option<AlignedBuf>,
}

impl Drop for Block {
    fn drop(&mut self) {
        // Work that still uses it must end first; an error here would be an earlier one's echo.
        let _ = self.backend.synchronize();
        match &mut self.host {
            Some(host) => self.backend.unpin(host.as_mut_ptr()),
            None => self.backend.free(self.address, self.bytes),
        }
    }
}

impl Memory {
    pub(super) fn device(backend: Arc<dyn Backend>, bytes: usize) -> Result<Self> {
        // An address that kernels may be given, although they read nothing there.
        let address = backend.allocate(bytes.max(16))?;
        Ok(Self(Arc::new(Block { backend, address, bytes, host: None })))
    }

    pub(super) fn pinned(backend: Arc<dyn Backend>, mut host: AlignedBuf) -> Result<Self> {
        let bytes = host.len();
        let address = backend.pin(host.as_mut_ptr(), bytes)?;
        Ok(Self(Arc::new(Block { backend, address, bytes, host: Some(host) })))
    }

    /// Its size, in bytes.
    pub fn len(&self) -> usize {
        self.0.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.bytes == 0
    }

    /// All of it.
    pub fn view(&self) -> View {
        self.slice(0, self.len())
    }

    /// `bytes` of it from `offset` on.
    ///
    /// # Panics
    /// If they are not inside.
    pub fn slice(&self, offset: usize, bytes: usize) -> View {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.len()), "{offset}+{bytes} of {}", self.len());
        View { memory: self.clone(), offset, bytes }
    }

    /// The bytes of pinned memory, for weights: no kernel writes to what holds weights.
    ///
    /// # Panics
    /// If it is device memory.
    pub fn host_bytes(&self) -> &[u8] {
        self.0.host.as_ref().expect("host memory")
    }

    /// Copies the start of pinned memory, which the device has written: after it has ended, or has raised a flag.
    ///
    /// # Panics
    /// If it is device memory, or shorter than `out`.
    pub fn copy_to(&self, out: &mut [f32]) {
        let host = self.0.host.as_ref().expect("host memory");
        assert!(size_of_val(out) <= host.len(), "{} numbers from {} bytes", out.len(), host.len());
        // SAFETY: both are that long and do not overlap, and any bytes are a number. A kernel that still wrote would
        // make the numbers wrong, nothing else: the bytes are copied without being looked at.
        unsafe { std::ptr::copy_nonoverlapping(host.as_ptr(), out.as_mut_ptr().cast(), size_of_val(out)) }
    }

    /// Copies `from` to pinned memory, from its `offset`-th number on: for the device to read when a flag is raised.
    ///
    /// # Panics
    /// If it is device memory, or not so long.
    pub fn copy_from(&self, offset: usize, from: &[f32]) {
        let to = &self.words()[offset..offset + from.len()];
        // SAFETY: `to` has that many words of four bytes, which are inside cells that shared references may change; that
        // nobody else writes there, or reads before the flag, is up to the caller, and would make numbers wrong, nothing
        // else.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr().cast::<f32>().cast_mut(), from.len()) }
    }

    /// Pinned memory as words that the device changes while the host looks.
    ///
    /// # Panics
    /// If it is device memory.
    pub fn words(&self) -> &[AtomicU32] {
        let host = self.0.host.as_ref().expect("host memory");
        // SAFETY: the block is aligned to a page and lives as long as `self`; atomics may be shared, and every access
        // of the host to memory that kernels write goes through them.
        unsafe { std::slice::from_raw_parts(host.as_ptr().cast::<AtomicU32>(), host.len() / 4) }
    }
}

/// A part of a [`Memory`], which it keeps alive.
#[derive(Debug, Clone)]
pub struct View {
    memory: Memory,
    offset: usize,
    bytes: usize,
}

impl View {
    /// Its size, in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// `bytes` of it from `offset` on.
    ///
    /// # Panics
    /// If they are not inside.
    pub fn slice(&self, offset: usize, bytes: usize) -> View {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.bytes), "{offset}+{bytes} of {}", self.bytes);
        View { memory: self.memory.clone(), offset: self.offset + offset, bytes }
    }

    /// The memory that it is a part of.
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Its address on the device.
    pub(super) fn address(&self) -> u64 {
        self.memory.0.address + self.offset as u64
    }
}
