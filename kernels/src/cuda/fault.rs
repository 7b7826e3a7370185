//! Faults of the emulated device: what a GPU does only when something is broken.

use super::error::{CudaError, Result};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What an emulated device does wrong. Read from text as `memory:N` or `kernel:N`, with N from 1 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmulatedFault {
    /// It refuses the first N requests for memory, although it reports that memory as free.
    Memory(u64),
    /// The N-th kernel goes wrong. Neither it nor what was given after it runs, and every later call fails: the error
    /// sticks, as with a GPU's context.
    Kernel(u64),
}

impl FromStr for EmulatedFault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = text.split_once(':').and_then(|(kind, n)| {
            let n = n.parse().ok().filter(|&n| n > 0)?;
            match kind {
                "memory" => Some(Self::Memory(n)),
                "kernel" => Some(Self::Kernel(n)),
                _ => None,
            }
        });
        fault.ok_or_else(|| format!("{text:?} is no fault; give memory:N or kernel:N, N from 1 on"))
    }
}

/// A device's fault, and how far it has come.
#[derive(Debug, Default)]
pub(super) struct Faults {
    fault: Option<EmulatedFault>,
    allocations: AtomicU64,
    kernels: AtomicU64,
    is_broken: AtomicBool,
}

impl Faults {
    pub(super) fn new(fault: Option<EmulatedFault>) -> Self {
        Self { fault, ..Self::default() }
    }

    /// Counts a request for memory; whether it is refused.
    pub(super) fn refuses_memory(&self) -> bool {
        let nth = self.allocations.fetch_add(1, Ordering::Relaxed) + 1;
        matches!(self.fault, Some(EmulatedFault::Memory(n)) if nth <= n)
    }

    /// Counts a kernel; whether it goes wrong, and with it everything after it.
    pub(super) fn breaks_at_kernel(&self) -> bool {
        let nth = self.kernels.fetch_add(1, Ordering::Relaxed) + 1;
        let breaks = self.fault == Some(EmulatedFault::Kernel(nth));
        if breaks {
            self.is_broken.store(true, Ordering::Relaxed);
        }
        breaks
    }

    /// Whether a kernel has gone wrong.
    pub(super) fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Relaxed)
    }

    /// What every call begins with.
    pub(super) fn check(&self, call: &'static str) -> Result<()> {
        if self.is_broken() {
            return Err(CudaError::Driver { call, reason: "a kernel has failed before (injected)".to_owned() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_from_text() {
        assert_eq!("memory:1".parse(), Ok(EmulatedFault::Memory(1)));
        assert_eq!("kernel:500".parse(), Ok(EmulatedFault::Kernel(500)));
        for wrong in ["", "memory", "memory:", "memory:0", "kernel:-1", "kernel:x", "disk:1"] {
            assert!(EmulatedFault::from_str(wrong).unwrap_err().contains("memory:N"), "{wrong}");
        }
    }

    #[test]
    fn an_error_sticks() {
        let faults = Faults::new(Some(EmulatedFault::Kernel(3)));
        assert_eq!([(); 3].map(|()| faults.breaks_at_kernel()), [false, false, true]);
        assert!(faults.is_broken() && faults.check("a call").is_err() && faults.check("another").is_err());
        let faults = Faults::new(Some(EmulatedFault::Memory(2)));
        assert_eq!([(); 3].map(|()| faults.refuses_memory()), [true, true, false]);
        assert!(faults.check("a call").is_ok());
    }
}
