//! Reader threads between the disk and the computation.
//!
//! A request names a byte range of one file; a reader fills a buffer from a fixed set with it, past the page cache
//! where the file system allows (the budget would be a fiction otherwise), and checks and decodes chunks, so that the
//! computing threads only ever see good bundles. Memory is the buffers and nothing else.

use crate::pauses::pause;
use crate::{Error, Result};
use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use thermocline_kernels::AlignedBuf;
use thermocline_split::{FileRange, LayerFile};

/// Offsets, lengths and addresses of direct reads are multiples of this.
const BLOCK: u64 = 4096;
/// Attempts at a read that the system fails.
const ATTEMPTS: u32 = 4;

/// A file opened for reads that bypass the page cache.
#[derive(Debug)]
pub(crate) struct DirectFile {
    path: PathBuf,
    file: File,
    direct: bool,
    bytes: u64,
}

impl DirectFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
        let error = |source| Error::Read { path: path.to_owned(), offset: 0, attempts: 1, source };
        let (file, direct) = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(file) => (file, true),
            Err(_) => (File::open(path).map_err(error)?, false),
        };
        let bytes = file.metadata().map_err(error)?.len();
        Ok(Self { path: path.to_owned(), file, direct, bytes })
    }

    /// Whether reads bypass the page cache.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads `len` bytes at `offset` somewhere into `buf`; returns where in `buf` they start.
    pub(crate) fn read(&self, offset: u64, len: usize, buf: &mut [u8]) -> Result<usize> {
        let first = offset / BLOCK * BLOCK;
        let start = (offset - first) as usize;
        let want = start + len;
        let span = want.next_multiple_of(BLOCK as usize).min(buf.len());
        let (mut got, mut attempts) = (0, 0);
        while got < want {
            match self.file.read_at(&mut buf[got..span], first + got as u64) {
                Ok(0) => break,
                Ok(n) if got + n >= want => got += n,
                // The end of a cut file, not a short read.
                Ok(n) if first + (got + n) as u64 >= self.file.metadata().map_or(0, |m| m.len()) => {
                    got += n;
                    break;
                }
                Ok(n) if !self.direct => got += n,
                // A short direct read continues at a block's boundary.
                Ok(n) if n >= BLOCK as usize => got = (got + n) / BLOCK as usize * BLOCK as usize,
                Ok(n) => {
                    attempts += 1;
                    if attempts >= ATTEMPTS {
                        let source = std::io::Error::other(format!("reads end after {n} bytes, again and again"));
                        return Err(Error::Read { path: self.path.clone(), offset, attempts, source });
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => {
                    attempts += 1;
                    if attempts >= ATTEMPTS {
                        return Err(Error::Read { path: self.path.clone(), offset, attempts, source });
                    }
                    std::thread::sleep(std::time::Duration::from_millis(1 << attempts));
                }
            }
        }
        if got < want {
            let got = got.saturating_sub(start);
            return Err(Error::ModelChanged { path: self.path.clone(), offset, expected: len, got });
        }
        Ok(start)
    }
}

/// What to read, and what becomes of it.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    /// One piece of each plane's file, the base first.
    pub parts: Vec<RunPart>,
    pub content: RunContent,
}

/// Bytes of one file.
#[derive(Debug, Clone)]
pub(crate) struct RunPart {
    pub file: Arc<DirectFile>,
    pub offset: u64,
    pub len: usize,
}

#[derive(Debug, Clone)]
pub(crate) enum RunContent {
    /// The bytes themselves, of one part.
    Plain,
    /// Rows of a matrix, from the one of this number on.
    Rows(Arc<MatrixIndex>, usize),
    /// Chunks, to be checked and decoded.
    Chunks(Arc<LayerIndex>, Range<usize>),
}

impl Run {
    /// Bytes to read.
    pub(crate) fn len(&self) -> usize {
        self.parts.iter().map(|part| part.len).sum()
    }
}

/// The part of an open split's layer that readers need.
#[derive(Debug)]
pub(crate) struct LayerIndex {
    pub split: Arc<thermocline_split::Split>,
    pub layer: usize,
}

impl LayerIndex {
    pub(crate) fn file(&self) -> &LayerFile {
        &self.split.layers()[self.layer]
    }

    /// The run of `chunks`, whose files are `files`.
    pub(crate) fn run(self: &Arc<Self>, files: &[Arc<DirectFile>], chunks: Range<usize>) -> Run {
        let ranges = self.file().stored_ranges(chunks.clone());
        let part = |r: &FileRange| RunPart { file: Arc::clone(&files[r.file]), offset: r.offset, len: r.bytes };
        Run { parts: ranges.iter().map(part).collect(), content: RunContent::Chunks(Arc::clone(self), chunks) }
    }

    /// Bytes of bundles in `chunks`.
    pub(crate) fn bundle_bytes(&self, chunks: Range<usize>) -> usize {
        self.file().bundles().bytes(self.file().neurons(chunks))
    }
}

/// A matrix of an open split, as readers need it.
#[derive(Debug)]
pub(crate) struct MatrixIndex {
    pub split: Arc<thermocline_split::Split>,
    pub name: String,
}

/// A filled buffer; give it back with [`Fetcher::release`].
#[derive(Debug)]
pub(crate) struct Staged {
    buffer: Buffer,
    range: Range<usize>,
    decoded: bool,
}

impl Staged {
    /// The bytes that were asked for: bundles, if there were chunks to decode.
    pub(crate) fn bytes(&self) -> &[u8] {
        let area = if self.decoded { &self.buffer.decoded } else { &self.buffer.raw };
        &area[self.range.clone()]
    }
}

#[derive(Debug)]
struct Buffer {
    raw: AlignedBuf,
    decoded: AlignedBuf,
}

/// Identifies a request.
pub(crate) type Ticket = u64;

#[derive(Debug)]
struct State {
    queue: VecDeque<(Ticket, Run, Buffer)>,
    done: HashMap<Ticket, Result<Staged>>,
    free: Vec<Buffer>,
    next_ticket: Ticket,
    stop: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
    ready: Condvar,
}

/// The reader threads and their buffers.
#[derive(Debug)]
pub(crate) struct Fetcher {
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
    raw_bytes: usize,
}

impl Fetcher {
    /// `n_buffers` buffers for runs of at most `raw_bytes` on disk, in at most `n_parts` files, and `decoded_bytes` of
    /// bundles and rows (0 if all of them are stored as they are used).
    ///
    /// # Errors
    /// If the system refuses memory or a thread.
    pub(crate) fn new(
        n_readers: usize,
        n_buffers: usize,
        raw_bytes: usize,
        n_parts: usize,
        decoded_bytes: usize,
    ) -> Result<Self> {
        let raw_bytes = Self::raw_len(raw_bytes, n_parts);
        let buffer = || Ok(Buffer { raw: AlignedBuf::zeroed(raw_bytes)?, decoded: AlignedBuf::zeroed(decoded_bytes)? });
        let free = (0..n_buffers).map(|_| buffer()).collect::<Result<_>>()?;
        let state = State { queue: VecDeque::new(), done: HashMap::new(), free, next_ticket: 0, stop: false };
        let shared = Arc::new(Shared { state: Mutex::new(state), work: Condvar::new(), ready: Condvar::new() });
        // Dropping a fetcher that is not complete ends the readers that it has.
        let mut fetcher = Self { shared, readers: Vec::new(), raw_bytes };
        for r in 0..n_readers {
            let shared = Arc::clone(&fetcher.shared);
            let builder = std::thread::Builder::new().name(format!("reader-{r}"));
            let reader = builder.spawn(move || read_loop(&shared)).map_err(|source| Error::Readers {
                nth: r + 1,
                n_readers,
                source,
            })?;
            fetcher.readers.push(reader);
        }
        Ok(fetcher)
    }

    /// A run may begin and end anywhere in a block, in each of its files.
    fn raw_len(raw_bytes: usize, n_parts: usize) -> usize {
        raw_bytes.next_multiple_of(BLOCK as usize) + (2 * n_parts - 1) * BLOCK as usize
    }

    /// Memory of `n_buffers` such buffers.
    pub(crate) fn buffer_bytes(n_buffers: usize, raw_bytes: usize, n_parts: usize, decoded_bytes: usize) -> u64 {
        (n_buffers * (Self::raw_len(raw_bytes, n_parts) + decoded_bytes.next_multiple_of(BLOCK as usize))) as u64
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Buffers that no request holds.
    pub(crate) fn n_free(&self) -> usize {
        self.lock().free.len()
    }

    /// Starts a read if a buffer is free.
    ///
    /// # Panics
    /// If the run is longer than the buffers.
    pub(crate) fn try_submit(&self, run: &Run) -> Option<Ticket> {
        let blocks = (2 * run.parts.len() - 1) * BLOCK as usize;
        assert!(run.len() + blocks <= self.raw_bytes, "a run of {} bytes", run.len());
        pause();
        let mut state = self.lock();
        let buffer = state.free.pop()?;
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.queue.push_back((ticket, run.clone(), buffer));
        drop(state);
        pause();
        self.shared.work.notify_one();
        Some(ticket)
    }

    /// Waits for a read.
    ///
    /// # Errors
    /// If the read failed or the bytes are damaged.
    pub(crate) fn wait(&self, ticket: Ticket) -> Result<Staged> {
        pause();
        let mut state = self.lock();
        loop {
            if let Some(result) = state.done.remove(&ticket) {
                return result;
            }
            state = self.shared.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives a buffer back.
    pub(crate) fn release(&self, staged: Staged) {
        pause();
        self.lock().free.push(staged.buffer);
    }

    /// Waits for a read that is no longer wanted and gives its buffer back.
    pub(crate) fn discard(&self, ticket: Ticket) {
        if let Ok(staged) = self.wait(ticket) {
            self.release(staged);
        }
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        self.lock().stop = true;
        pause();
        self.shared.work.notify_all();
        for reader in self.readers.drain(..) {
            // A reader only ends in this way.
            let _ = reader.join();
        }
    }
}

fn read_loop(shared: &Shared) {
    let lock = || shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let mut state = lock();
        let (ticket, run, mut buffer) = loop {
            if state.stop {
                return;
            }
            match state.queue.pop_front() {
                Some(request) => break request,
                None => state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(state);
        pause();
        let result = fill(&run, &mut buffer);
        pause();
        let mut state = lock();
        let staged = match result {
            Ok((range, decoded)) => Ok(Staged { buffer, range, decoded }),
            Err(e) => {
                state.free.push(buffer);
                Err(e)
            }
        };
        state.done.insert(ticket, staged);
        drop(state);
        pause();
        shared.ready.notify_all();
    }
}

/// Where in the buffer the bytes are, and whether in its decoded half.
fn fill(run: &Run, buffer: &mut Buffer) -> Result<(Range<usize>, bool)> {
    let mut ranges = Vec::with_capacity(run.parts.len());
    let mut at = 0;
    for part in &run.parts {
        let start = at + part.file.read(part.offset, part.len, &mut buffer.raw[at..])?;
        ranges.push(start..start + part.len);
        at = (start + part.len).next_multiple_of(BLOCK as usize);
    }
    let parts: Vec<&[u8]> = ranges.iter().map(|r| &buffer.raw[r.clone()]).collect();
    match (&run.content, ranges.as_slice()) {
        (RunContent::Plain, [only, ..]) => Ok((only.clone(), false)),
        (RunContent::Plain, []) => Ok((0..0, false)),
        (RunContent::Rows(index, first), _) => {
            let matrix = index.split.matrix(&index.name)?;
            let stored: usize = matrix.planes().iter().map(|(_, t)| t.row_bytes()).sum();
            let n = run.len() / stored * matrix.row_bytes();
            matrix.join(*first, &parts, &mut buffer.decoded[..n])?;
            Ok((0..n, true))
        }
        (RunContent::Chunks(layer, chunks), [only]) if layer.file().are_stored(chunks.clone()) => {
            layer.file().check_chunks(chunks.clone(), &buffer.raw[only.clone()])?;
            Ok((only.clone(), false))
        }
        (RunContent::Chunks(layer, chunks), _) => {
            let n = layer.bundle_bytes(chunks.clone());
            layer.file().decode_chunks(chunks.clone(), &parts, &mut buffer.decoded[..n])?;
            Ok((0..n, true))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LEN: usize = 64 << 10;

    fn byte(i: usize) -> u8 {
        (i * 31 + i / 251) as u8
    }

    fn file() -> (tempfile::NamedTempFile, Arc<DirectFile>) {
        let mut file = tempfile::NamedTempFile::new_in(".").expect("a temporary file");
        file.write_all(&(0..LEN).map(byte).collect::<Vec<u8>>()).expect("written");
        let direct = Arc::new(DirectFile::open(file.path()).expect("opened"));
        (file, direct)
    }

    fn run(file: &Arc<DirectFile>, offset: usize, len: usize) -> Run {
        let part = RunPart { file: Arc::clone(file), offset: offset as u64, len };
        Run { parts: vec![part], content: RunContent::Plain }
    }

    #[test]
    fn concurrent_requests_each_get_their_own_bytes() {
        let (_guard, file) = file();
        let fetcher = Fetcher::new(4, 6, 9000, 1, 0).expect("readers");
        let place = |i: usize| (i * 7919 % (LEN - 9000), 1 + i * 613 % 9000);
        let mut tickets = VecDeque::new();
        for i in 0..400 {
            let (offset, len) = place(i);
            while let (Some((j, ticket)), true) = (tickets.front().copied(), tickets.len() == 6) {
                let (offset, len) = place(j);
                let staged = fetcher.wait(ticket).expect("read");
                assert!(staged.bytes().iter().copied().eq((offset..offset + len).map(byte)), "request {j}");
                fetcher.release(staged);
                tickets.pop_front();
            }
            tickets.push_back((i, fetcher.try_submit(&run(&file, offset, len)).expect("a free buffer")));
        }
        assert!(fetcher.try_submit(&run(&file, 0, 1)).is_none(), "all buffers are taken");
        tickets.into_iter().for_each(|(_, ticket)| fetcher.discard(ticket));
        assert_eq!(fetcher.n_free(), 6);
    }

    #[test]
    fn errors_lose_no_buffers() {
        let (guard, file) = file();
        let fetcher = Fetcher::new(2, 5, 9000, 1, 0).expect("readers");
        for cut in [0, 100, 4096, 4097, 12_000] {
            guard.as_file().set_len(cut).expect("cut");
            for _ in 0..10 {
                let tickets: Vec<Ticket> = (0..5)
                    .map(|i| fetcher.try_submit(&run(&file, 9000 + i * 700, 9000)).expect("a free buffer"))
                    .collect();
                for ticket in tickets {
                    match fetcher.wait(ticket) {
                        Err(Error::ModelChanged { expected: 9000, got, .. }) => assert!(got <= 3000, "{got}"),
                        other => panic!("{cut}: {other:?}"),
                    }
                }
                assert_eq!(fetcher.n_free(), 5);
            }
        }
    }
}
