use super::backend::{Backend, BackendEvent, BackendGraph, Launch, Queue};
use super::driver::Driver;
use super::emulator::Emulator;
use super::error::Result;
use super::fault::EmulatedFault;
use super::memory::{Memory, View};
use crate::AlignedBuf;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A GPU. Clones are the same device.
#[derive(Debug, Clone)]
pub struct Device {
    backend: Arc<dyn Backend>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Device bytes taken through [`Device::allocate`], freed ones included.
    allocated: AtomicUsize,
    /// What the launches of the graph that is being captured use.
    captured: Mutex<Option<Vec<Memory>>>,
}

impl Device {
    /// The driver's device of that number.
    ///
    /// # Errors
    /// If there is no driver, no such device, or it cannot run the kernels.
    pub fn open(ordinal: usize) -> Result<Self> {
        Ok(Self { backend: Arc::new(Driver::open(ordinal)?), shared: Arc::default() })
    }

    /// The emulator in `library` (see [`super::build_emulator`]): the same kernels, compiled for the CPU.
    ///
    /// # Errors
    /// If it cannot be loaded.
    pub fn emulated(library: &Path) -> Result<Self> {
        Ok(Self { backend: Arc::new(Emulator::load(library, None)?), shared: Arc::default() })
    }

    /// The emulator as a device with a fault: for tests of what becomes of it.
    ///
    /// # Errors
    /// As [`Device::emulated`].
    pub fn faulty(library: &Path, fault: EmulatedFault) -> Result<Self> {
        Ok(Self { backend: Arc::new(Emulator::load(library, Some(fault))?), shared: Arc::default() })
    }

    /// What the device calls itself.
    pub fn name(&self) -> String {
        self.backend.name()
    }

    /// Whether it is the emulator.
    pub fn is_emulated(&self) -> bool {
        self.backend.is_emulated()
    }

    /// Streaming multiprocessors.
    pub fn n_multiprocessors(&self) -> usize {
        self.backend.n_multiprocessors()
    }

    /// Bytes of shared memory that a block may ask for.
    pub(super) fn shared_bytes(&self) -> usize {
        self.backend.shared_bytes()
    }

    /// Bytes of the second-level cache.
    pub(super) fn cache_bytes(&self) -> usize {
        self.backend.cache_bytes()
    }

    /// Free and total bytes of device memory, as the driver counts them for all processes.
    ///
    /// # Errors
    /// If the driver does not say.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.backend.memory()
    }

    /// Device memory with arbitrary content.
    ///
    /// # Errors
    /// [`super::CudaError::OutOfMemory`].
    pub fn allocate(&self, bytes: usize) -> Result<Memory> {
        let memory = Memory::device(Arc::clone(&self.backend), bytes)?;
        self.shared.allocated.fetch_add(bytes, Ordering::Relaxed);
        Ok(memory)
    }

    /// Device bytes taken so far.
    pub fn allocated_bytes(&self) -> usize {
        self.shared.allocated.load(Ordering::Relaxed)
    }

    /// Device memory that holds `bytes`.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn upload(&self, bytes: &[u8]) -> Result<Memory> {
        let memory = self.allocate(bytes.len())?;
        self.write(&memory.view(), bytes)?;
        Ok(memory)
    }

    /// Host memory that the device reads in place.
    ///
    /// # Errors
    /// [`super::CudaError::Pin`].
    pub fn pin(&self, host: AlignedBuf) -> Result<Memory> {
        Memory::pinned(Arc::clone(&self.backend), host)
    }

    /// Writes to the start of `to` and waits until it is there.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If `to` is shorter.
    pub fn write(&self, to: &View, from: &[u8]) -> Result<()> {
        assert!(from.len() <= to.len(), "{} bytes into {}", from.len(), to.len());
        self.backend.upload(to.address(), from)
    }

    /// Waits for all work and reads the start of `from`.
    ///
    /// # Errors
    /// If the driver, or work given before, fails.
    ///
    /// # Panics
    /// If `from` is shorter.
    pub fn read(&self, from: &View, to: &mut [u8]) -> Result<()> {
        assert!(to.len() <= from.len(), "{} bytes from {}", to.len(), from.len());
        self.backend.synchronize()?;
        self.backend.download(to, from.address())
    }

    /// [`Device::read`] as numbers; `from` holds a whole number of them.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn read_all<T: bytemuck::Pod>(&self, from: &View) -> Result<Vec<T>> {
        let mut out = vec![T::zeroed(); from.len() / size_of::<T>()];
        self.read(from, bytemuck::cast_slice_mut(&mut out))?;
        Ok(out)
    }

    /// Gives `queue` a copy; the host does not wait.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy(&self, queue: Queue, to: &View, from: &View) -> Result<()> {
        assert_eq!(to.len(), from.len(), "a copy of one length");
        self.keep([to, from]);
        self.backend.copy(queue, to.address(), from.address(), to.len())
    }

    /// Gives the compute queue the task to set every byte to `value`.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn fill(&self, to: &View, value: u8) -> Result<()> {
        self.keep([to]);
        self.backend.fill(to.address(), value, to.len())
    }

    /// What `then` is given from now on waits for what `first` was given until now.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn order(&self, first: Queue, then: Queue) -> Result<()> {
        self.wait(then, &self.mark(first)?)
    }

    /// What `queue` was given until now, for [`Device::wait`]; within a capture of the same one.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn mark(&self, queue: Queue) -> Result<Mark> {
        Ok(Mark(self.backend.mark(queue)?))
    }

    /// What `queue` is given from now on waits for what `mark` has marked, and for nothing that came behind it.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn wait(&self, queue: Queue, mark: &Mark) -> Result<()> {
        self.backend.wait(queue, &*mark.0)
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// If some of it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.backend.synchronize()
    }

    /// Records what `work` gives the compute queue, without running it.
    ///
    /// # Errors
    /// If `work` or the driver fails.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.backend.begin_capture()?;
        *self.captured() = Some(Vec::new());
        let worked = work();
        let graph = self.backend.end_capture();
        let kept = self.captured().take().unwrap_or_default();
        worked?;
        Ok(Graph { graph: graph?, _kept: kept })
    }

    /// A point in the compute queue's work.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn record(&self) -> Result<Event> {
        Ok(Event(self.backend.record()?))
    }

    pub(super) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    pub(super) fn launch(&self, launch: Launch, uses: &[&View]) -> Result<()> {
        self.launch_in(Queue::Compute, launch, uses)
    }

    pub(super) fn launch_in(&self, queue: Queue, launch: Launch, uses: &[&View]) -> Result<()> {
        self.keep(uses.iter().copied());
        self.backend.launch(queue, launch)
    }

    /// Remembers what a captured launch uses.
    pub(super) fn keep<'a>(&self, uses: impl IntoIterator<Item = &'a View>) {
        if let Some(kept) = &mut *self.captured() {
            kept.extend(uses.into_iter().map(|view| view.memory().clone()));
        }
    }

    fn captured(&self) -> std::sync::MutexGuard<'_, Option<Vec<Memory>>> {
        self.shared.captured.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Work that was recorded once and is started with one call. Keeps the memory that it uses.
#[derive(Debug)]
pub struct Graph {
    graph: Box<dyn BackendGraph>,
    _kept: Vec<Memory>,
}

impl Graph {
    /// Gives the compute queue this work; the host does not wait.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn start(&self) -> Result<()> {
        self.graph.start()
    }
}

/// A point in the compute queue's work, for timing.
#[derive(Debug)]
pub struct Event(Box<dyn BackendEvent>);

/// What a queue was given until some moment.
#[derive(Debug)]
pub struct Mark(Box<dyn BackendEvent>);

impl Event {
    /// Milliseconds of device time since `earlier`; waits for both.
    ///
    /// # Errors
    /// If work before them failed.
    pub fn since(&self, earlier: &Event) -> Result<f64> {
        self.0.since(&*earlier.0)
    }
}
